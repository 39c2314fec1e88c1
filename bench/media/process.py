"""One variant of the media path in a process of its own: seconds of CPU, wall time and peak memory of its calls.

The parent starts the process, which imports what the variant needs and prepares its inputs (neither is measured), and
then asks for calls one at a time, so that the calls of several variants can be interleaved.

- `cpu_s`: CPU seconds of the process and of all processes below it, every thread.
- `wall_s`: what the clock says.
- `peak_mib`: memory added at the highest point of a call, in the process and those below it, and `beyond_output_mib`:
  that less the bytes of what the call returned. From a call of its own, the last, with malloc's defaults (memory.py).
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.core.measure import Unavailable
from bench.core.memory import peak_extra_bytes
from bench.media import variants
from bench.media.work import Spec, Work, descendants, stat_fields

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MIB = 2**20
# More than any variant takes.
_TOUCHED = 2**30


class VariantFailed(RuntimeError):
    """A variant's process raised; the message holds its traceback."""


def cpu_seconds() -> float:
    """Of this process, and of those below it that are alive (whose clock ticks are 10 ms)."""
    ticks = 0
    for pid in descendants(os.getpid()):
        # User and system time, of the process and of the children it has waited for.
        ticks += sum(int(number) for number in stat_fields(pid)[11:15])
    return time.process_time() + ticks / _TICKS_PER_S


def resident_bytes(pid: int | str, name: str = "VmRSS") -> int:
    """VmRSS or VmHWM of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def touch_memory() -> None:
    """Take memory and give it back, so that the call to come finds pages that are there.

    A virtual machine's free memory is not: the first touch, 0.8 s of CPU for the patches of 64 frames, fell
    to the variant that happened to run after one which had freed much.
    """
    block = mmap.mmap(-1, _TOUCHED, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(block, dtype=torch.uint8)[::4096]
    pages.fill_(1)
    del pages
    block.close()


def timed_call(work: Work) -> dict[str, Any]:
    state = work.prepare()
    try:
        touch_memory()
        cpu, wall = cpu_seconds(), time.perf_counter()
        result = work.run(state)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        facts = work.facts(result)
        del result
    finally:
        work.clean(state)
    return {"cpu_s": cpu, "wall_s": wall, **facts}


def memory_call(work: Work, save_to: str | None) -> dict[str, Any]:
    """Peaks of one call. Memory of a GPU is not in them."""
    state = work.prepare()
    try:
        below = descendants(os.getpid())
        for pid in below:
            # Sets the high-water mark back to the present size.
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = {pid: resident_bytes(pid) for pid in below}
        own, result = peak_extra_bytes(lambda: work.run(state), torch.device("cpu"))
        numbers: dict[str, Any] = {"output_mib": sum(array.nbytes for array in work.output(result)) / _MIB}
        if own is not None:
            added = sum(max(0, resident_bytes(pid, "VmHWM") - size) for pid, size in before.items())
            numbers["peak_mib"] = (own + added - work.twice(result)) / _MIB
            host = sum(array.nbytes for array in work.output(result) if not getattr(array, "is_cuda", False))
            numbers["beyond_output_mib"] = max(0.0, numbers["peak_mib"] - host / _MIB)
        if save_to is not None and work.save is not None:
            work.save(result, Path(save_to))
        del result
    finally:
        work.clean(state)
    return numbers


class VariantProcess:
    """The parent's side of one variant; `ready` before all else."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.library = spec, ""
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(spec.threads))
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec), daemon=False)
        # Libraries read these when they are loaded.
        with mock.patch.dict(os.environ, limits):
            self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait until the inputs are there. Raises Unavailable where the variant cannot run here."""
        self.library = self._answer()

    def call(self) -> dict[str, Any]:
        """Seconds of one call, and its facts."""
        return self._ask(("call", None))

    def memory(self, save_to: Path | None = None) -> dict[str, Any]:
        """Peaks of one call; what it returned is saved where the variant can."""
        return self._ask(("memory", None if save_to is None else str(save_to)))

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, message: tuple) -> dict[str, Any]:
        self._connection.send(message)
        return self._answer()

    def _answer(self) -> Any:
        try:
            status, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise VariantFailed(f"{self.spec.part}, {self.spec.variant}: its process ended") from error
        if status == "unavailable":
            raise Unavailable(value)
        if status == "failed":
            raise VariantFailed(f"{self.spec.part}, {self.spec.variant}: {value}")
        return value


def serve(connection: Connection, spec: Spec) -> None:
    """The life of a variant's process."""
    torch.set_num_threads(spec.threads)
    try:
        work = variants.build(spec)
        connection.send(("ok", work.library))
    except Unavailable as error:
        connection.send(("unavailable", str(error)))
        return
    except Exception:
        connection.send(("failed", traceback.format_exc()))
        return
    while True:
        try:
            what, value = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            connection.send(("ok", timed_call(work) if what == "call" else memory_call(work, value)))
        except Exception:
            connection.send(("failed", traceback.format_exc()))
