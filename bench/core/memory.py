"""Memory of a benchmark process: how much a call adds at its peak, and freed blocks that stay with the process.

- `peak_mib`: the highest use during one call (gradients still held) minus the use before it. CPU: resident pages, with
  malloc's defaults, so that every large block is new and gone when freed. CUDA: torch's caching allocator.
- `peak_beyond_gradients_mib`: that less the bytes of the gradients, which every variant has to produce; at least 0.

glibc maps large blocks anew at each malloc, so every call pays a page fault per 4 KiB of its buffers (half of the time
of an eager loss at D = 64). `keep_freed_memory` ends that for the whole process; the memory pass restores the defaults.
"""

from __future__ import annotations

import ctypes
import functools
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

# Names of <malloc.h>.
_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = 1, -1, -2, -3, -4
_DEFAULT_THRESHOLD, _DEFAULT_MMAP_MAX, _DEFAULT_MXFAST = 128 * 1024, 65536, 128
_CLEAR_REFS, _MAPS = Path("/proc/self/clear_refs"), Path("/proc/self/maps")


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """glibc; None elsewhere, where nothing is changed and peaks are not measured."""
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("mallopt", "malloc_trim", "gnu_get_libc_version")):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


def keep_freed_memory(reserve_bytes: int = 0) -> bool:
    """Keep freed blocks for the next malloc, `reserve_bytes` of them touched beforehand; False where there is no glibc.

    See fill_thread_cache, which has to be called again before each timed call.
    """
    libc = _libc()
    if libc is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20), (_M_MXFAST, 0))
    done = all([libc.mallopt(name, value) == 1 for name, value in settings])
    fill_thread_cache()
    reserve_bytes = min(reserve_bytes, psutil.virtual_memory().available // 2)
    if reserve_bytes:
        block = torch.empty(reserve_bytes, dtype=torch.uint8)
        # One byte in each page makes it resident.
        block[::4096] = 0
        del block
    return done


def fill_thread_cache() -> None:
    """Fill glibc's cache of small free blocks of this thread.

    An aligned block leaves a remainder of less than 128 bytes behind it. Freed into this cache, the remainder parts the
    block, once free, from the memory around it: the next block of the same size does not fit, and the heap grows. It
    still happens now and then, until there are blocks enough; `page_faults` in a record shows it.
    """
    libc = _libc()
    if libc is not None:
        held = [libc.malloc(size) for size in range(24, 152, 16) for _ in range(8)]
        for block in held:
            libc.free(block)


@contextmanager
def plain_malloc() -> Iterator[bool]:
    """malloc's defaults: every large block is mapped anew and returned when freed. False where there is no glibc.

    Free blocks of the heap would be taken first and stay resident after their use; so they are returned to the system
    and, untouched, held meanwhile. What comes after has to call keep_freed_memory again.
    """
    libc = _libc()
    if libc is None:
        yield False
        return
    for name, value in (
        (_M_MMAP_MAX, _DEFAULT_MMAP_MAX),
        (_M_MMAP_THRESHOLD, _DEFAULT_THRESHOLD),
        (_M_TRIM_THRESHOLD, _DEFAULT_THRESHOLD),
        (_M_TOP_PAD, 0),
        (_M_MXFAST, _DEFAULT_MXFAST),
    ):
        libc.mallopt(name, value)
    libc.malloc_trim(0)
    held = _all_large_blocks(libc)
    try:
        yield True
    finally:
        for block in held:
            libc.free(block)


def _all_large_blocks(libc: ctypes.CDLL) -> list[int]:
    """Addresses of blocks that take up all free memory of the heap in pieces of 128 KiB and more."""
    line = next((line for line in _MAPS.read_text().splitlines() if line.endswith("[heap]")), None)
    if line is None:
        return []
    low, high = (int(number, 16) for number in line.split()[0].split("-"))
    held, size = [], 1 << 34
    while size >= _DEFAULT_THRESHOLD:
        block = libc.malloc(size)
        if block and low <= block < high:
            held.append(block)
            continue
        # Mapped anew, or refused: the heap has no piece of this size.
        libc.free(block)
        size //= 2
    return held


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> tuple[int | None, object]:
    """Bytes that one call adds at its highest, and what it returned; None where they cannot be counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    with plain_malloc() as is_plain:
        if not is_plain or not _CLEAR_REFS.exists():
            return None, run()
        # Sets the high-water mark back to the present size.
        _CLEAR_REFS.write_text("5")
        before = status_bytes("VmRSS")
        result = run()
        return max(0, status_bytes("VmHWM") - before), result


def page_faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def status_bytes(field: str, pid: int | str = "self") -> int:
    """Return VmRSS or VmHWM of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)
