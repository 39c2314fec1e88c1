"""One variant of the media path in a process of its own: seconds of CPU, wall time and peak memory of its calls.

The process imports what the variant needs and prepares its inputs (neither is measured). Calls are made one at a time,
so that the calls of several variants can be interleaved.

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
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

from bench.core.memory import peak_extra_bytes, status_bytes

_MIB = 2**20
# More than any variant takes.
_TOUCHED = 2**30


@dataclass(frozen=True)
class Work:
    """What a variant does. Built in its process.

    Fields:
        run: the timed call; gets what `prepare` returned.
        prepare, clean: before and after each call, not measured; `clean` gets what `prepare` returned.
        output: the arrays or tensors of the result, whose bytes do not count as memory of the call.
        twice: bytes of the result that two of the processes have mapped at once.
        facts: numbers about the result that belong into the record.
        save: writes the result for comparison.
        library: name and versions.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    clean: Callable[[Any], None] = lambda state: None
    output: Callable[[Any], list[Any]] = lambda result: [result]
    twice: Callable[[Any], int] = lambda result: 0
    facts: Callable[[Any], dict[str, Any]] = lambda result: {}
    save: Callable[[Any, Path], None] | None = None
    library: str = ""


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of those below it that are alive (whose clock ticks are 10 ms)."""
    seconds = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # User and system time, of the process and of the children it has waited for.
            seconds += sum(process.cpu_times()[:4])
    return seconds


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


def memory_call(work: Work, save_to: Path | None) -> dict[str, Any]:
    """Return the peaks of one call, and save its result. Memory of a GPU is not in them."""
    state = work.prepare()
    try:
        before = {}
        for child in psutil.Process().children(recursive=True):
            # Sets the high-water mark back to the present size.
            Path(f"/proc/{child.pid}/clear_refs").write_text("5")
            before[child.pid] = status_bytes("VmRSS", child.pid)
        own, result = peak_extra_bytes(lambda: work.run(state), torch.device("cpu"))
        arrays = work.output(result)
        numbers: dict[str, Any] = {"output_mib": sum(array.nbytes for array in arrays) / _MIB}
        if own is not None:
            added = sum(max(0, status_bytes("VmHWM", pid) - size) for pid, size in before.items())
            numbers["peak_mib"] = (own + added - work.twice(result)) / _MIB
            host = sum(array.nbytes for array in arrays if not getattr(array, "is_cuda", False))
            numbers["beyond_output_mib"] = max(0.0, numbers["peak_mib"] - host / _MIB)
        if save_to is not None and work.save is not None:
            work.save(result, save_to)
        del result, arrays
    finally:
        work.clean(state)
    return numbers


class VariantProcess:
    """The process of one variant; `ready` comes before all else."""

    def __init__(self, part: str, variant: str, arguments: dict[str, Any], threads: int) -> None:
        self.library = ""
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        # Libraries read these when they are loaded.
        with mock.patch.dict(os.environ, limits):
            self._built = self._pool.submit(_build, part, variant, arguments, threads)

    def ready(self) -> None:
        """Wait until the inputs are there. Raises Unavailable where the variant cannot run here."""
        self.library = self._built.result()

    def call(self) -> dict[str, Any]:
        """Return the seconds of one call, and its facts."""
        return self._pool.submit(_in_process, timed_call).result()

    def memory(self, save_to: Path | None = None) -> dict[str, Any]:
        """Return the peaks of one call; its result is saved where the variant can."""
        return self._pool.submit(_in_process, memory_call, save_to).result()

    def close(self) -> None:
        self._pool.shutdown()


# The variant of this process.
_works: list[Work] = []


def _build(part: str, variant: str, arguments: dict[str, Any], threads: int) -> str:
    from bench.media.variants import PARTS

    torch.set_num_threads(threads)
    _works.append(PARTS[part][variant](**arguments))
    return _works[0].library


def _in_process(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    return call(_works[0], *arguments)
