"""Manage the process group, and run small collectives.

Call `start` before creating any DeepSpeed engine.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rmsd_fast.config import NotInstalled, UserError, first_line
from rmsd_fast.data.transfer import to_device
from rmsd_fast.process import end_with_launcher

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process in the job.

    Attributes:
        rank: rank of the process.
        size: number of processes.
        local_rank: rank on the process's node.
        device: device that the process computes on.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


# Environment variables that `start` has set for a process without a launcher.
_SET_HERE: dict[str, str] = {}


def start(timeout_s: float = 1800.0) -> World:
    """Join the process group that torchrun describes in the environment, or create one with a single process.

    Args:
        timeout_s: seconds that a collective waits for the other ranks before it raises.
    Raises:
        NotInstalled: there are fewer CUDA devices than processes on this node.
    """
    cuda = torch.cuda.is_available()
    end_with_launcher()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
        _SET_HERE.update(alone)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed reads this variable.
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise NotInstalled(
                f"process {local_rank} of this node: expected {local_rank + 1} or more GPUs, got "
                f"{torch.cuda.device_count()}; start fewer processes with --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        # A single process does not need a network store, and torch's TCP store listens on all interfaces.
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if _SET_HERE else {}
        # `device_id` is left out because with it, groups that DeepSpeed creates later are split off eagerly, which can
        # hang.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s), **alone)
    _prepare_deepspeed(cuda)
    return World(rank, size, local_rank, torch.device("cuda", local_rank) if cuda else torch.device("cpu"))


def _prepare_deepspeed(cuda: bool) -> None:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed still calls functions that torch has renamed. Users cannot fix the warnings, which come with every call.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    if not cuda:
        # Its first use compiles a shared-memory op for a minute and a half, and gloo is sufficient.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)


def stop() -> None:
    """Leave the process group. `start` may then be called again. Idempotent."""
    # A signal may have interrupted the import of DeepSpeed, which cannot be repeated. Without it, there are no groups.
    comm = sys.modules.get("deepspeed.comm")
    if dist.is_initialized() and comm is not None and comm.is_initialized():
        # DeepSpeed caches its own groups, and the next engine would use them although they are destroyed.
        comm.destroy_process_group()
    if dist.is_initialized():
        dist.destroy_process_group()
    # Otherwise, processes started later would treat these variables as set by a launcher.
    while _SET_HERE:
        os.environ.pop(_SET_HERE.popitem()[0], None)


def exit_process(code: int) -> NoReturn:
    """Flush the output and end the process immediately.

    The interpreter's normal exit destroys the threads of process groups and stores in arbitrary order. This
    occasionally aborts a process (SIGABRT) that has finished its work, and with it the whole torchrun job.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def global_sum(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """Sum each value over all ranks in float64. Keys must be the same on every rank.

    This waits for the device once, but not at all if there is one process and no value is on the device.
    """
    return _reduce(values, world, dist.ReduceOp.SUM)


def global_max(values: Mapping[str, float | Tensor], world: World) -> dict[str, float]:
    """Return the maximum of each value over all ranks, in float64. Keys and waits are as in `global_sum`."""
    return _reduce(values, world, dist.ReduceOp.MAX)


def _reduce(values: Mapping[str, float | Tensor], world: World, op: Any) -> dict[str, float]:
    if not values:
        return {}
    # A value may be a number on one rank and a tensor on another, so its position depends on its key only.
    keys = sorted(values)
    numbers, on_device = [0.0] * len(keys), {}
    for i, key in enumerate(keys):
        value = values[key].detach() if isinstance(values[key], Tensor) else values[key]
        if isinstance(value, Tensor) and value.device.type != "cpu":
            on_device[i] = value.reshape(()).double()
        else:
            numbers[i] = float(value)
    if world.size > 1:
        (packed,) = to_device([torch.tensor(numbers, dtype=torch.float64)], world.device)
        for i, value in on_device.items():
            packed[i] = value
        dist.all_reduce(packed, op=op)
        numbers = packed.tolist()
    elif on_device:
        for i, number in zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True):
            numbers[i] = number
    return dict(zip(keys, numbers, strict=True))


def any_rank(flag: bool, world: World) -> bool:
    """Return on every rank whether the flag is true on any rank."""
    return global_max({"flag": float(flag)}, world)["flag"] > 0


def broadcast_object(value: Any, world: World, source: int = 0) -> Any:
    """Return the `value` of rank `source` on every rank. Objects are pickled between the processes of one run only."""
    box = [value]
    if world.size > 1:
        dist.broadcast_object_list(box, src=source, device=world.device if world.device.type == "cuda" else None)
    return box[0]


def on_main(world: World, work: Callable[[], Result]) -> Result:
    """Run `work` on the main process, and return its result, or raise its error, on all processes."""
    outcome: tuple[bool, object] = (False, None)
    if world.is_main:
        try:
            outcome = (True, work())
        except Exception as error:
            outcome = (False, error)
    done, value = broadcast_object(outcome, world)
    if not done:
        raise value
    return value


def raise_together(error: Exception | None, world: World) -> None:
    """Raise an error on all processes if any process has one. All processes call it together.

    A process raises its own error, or else that of the first process with one.
    """
    # Other errors may not survive being sent, and only the process that raises them shows where.
    sent = error
    if error is not None and not isinstance(error, UserError):
        sent = UserError(f"another process has failed ({type(error).__name__}: {first_line(error)}); see its message")
    errors = [each for each in all_gather_objects(sent, world) if each is not None]
    if errors:
        raise error or errors[0]


def all_gather_objects(value: Any, world: World) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank."""
    box: list[Any] = [None] * world.size
    if world.size == 1:
        return [value]
    dist.all_gather_object(box, value)
    return box


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()
