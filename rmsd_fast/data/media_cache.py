"""Caches of decoded media, bounded in bytes: in memory (`ByteLru`) and on disk, shared by processes (`DiskCache`)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

import torch

from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames

log = logging.getLogger("rmsd_fast")
Value = TypeVar("Value")

MAGIC = "rmsd-frames-1"
HEADER_BYTES = 16384
# Evicting a little more than is needed spares the next writers a scan of the folder.
KEEP_SHARE = 0.9
# Older unfinished files were left by processes that were killed.
STALE_S = 3600.0


class ByteLru(Generic[Value]):
    """Values by key; the least recently used leave when the bytes exceed the budget. Safe with several threads."""

    def __init__(self, budget_bytes: int):
        self.budget = budget_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Value, size: int) -> None:
        """Keep a value of `size` bytes; one larger than the budget is not kept."""
        with self._lock:
            if size > self.budget or key in self._entries:
                return
            self._entries[key] = (value, size)
            self.bytes += size
            while self.bytes > self.budget:
                _, (_, gone) = self._entries.popitem(last=False)
                self.bytes -= gone


class DiskCache:
    """Resized frames in a folder, one file each; several processes may use it at once.

    A file is a JSON header with a checksum, padded to 16 KiB, and the pixels. It is written beside its place and
    renamed, so readers see whole files; one that does not check is removed and counted in `corrupt`, and its frames are
    made anew. The folder's total stands in `bytes`, changed under a lock; over the budget the files go first that were
    not used for longest.
    """

    def __init__(self, folder: str | Path, budget_bytes: int):
        self.folder, self.budget = Path(folder), budget_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self.corrupt = 0
        self._full = False

    def get(self, key: str) -> Frames | None:
        """The frames of a key, in memory of their own; None where there are none or the file is damaged."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                frames = _read(file, key)
            os.utime(path)
            return frames
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.corrupt += 1
            log.warning("%s: damaged cache entry (%s), made anew", path, str(error).split("\n", 1)[0])
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, frames: Frames) -> None:
        """Write the frames; where the disk is full the cache writes no more, and says so once."""
        path, size = self._path(key), HEADER_BYTES + frames.pixels.nbytes
        if self._full or size > self.budget or path.exists():
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            self._reserve(size)
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb", buffering=0) as file:
                _write(file, key, frames)
            temporary.replace(path)
        except OSError as error:
            self._full = True
            log.warning("%s: cannot be written (%s); frames are not kept on disk any more", path, error.strerror)
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.frames"

    def _reserve(self, size: int) -> None:
        """Make room for so many bytes and count them in."""
        with self._locked():
            ledger = self.folder / "bytes"
            try:
                used = int(ledger.read_text())
            except (OSError, ValueError):
                used = sum(found for _, found, _ in self._files())
            if used + size > self.budget:
                used = self._evict(KEEP_SHARE * self.budget - size)
            temporary = ledger.with_name("bytes.tmp")
            temporary.write_text(str(used + size))
            temporary.replace(ledger)

    def _evict(self, target: float) -> int:
        """Remove the least recently used files until `target` bytes are left; returns what is left."""
        files = sorted(self._files())
        used = sum(size for _, size, _ in files)
        for _, size, path in files:
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of every entry; unfinished ones that nobody writes are removed."""
        for path in self.folder.glob("??/*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".tmp" and time.time() - found.st_mtime > STALE_S:
                path.unlink(missing_ok=True)
            elif path.suffix == ".frames":
                yield found.st_mtime, found.st_size, path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _write(file, key: str, frames: Frames) -> None:
    pixels = frames.pixels.cpu().contiguous().numpy()
    header = {
        "magic": MAGIC,
        "key": key,
        "shape": pixels.shape,
        "crc32": zlib.crc32(pixels),
        "timestamps_s": frames.timestamps_s,
        "grid_thw": frames.grid_thw,
        "kind": frames.kind,
        "preprocessor": asdict(frames.preprocessor),
        "duration_s": frames.duration_s,
        "decoder": frames.decoder,
    }
    text = json.dumps(header).encode()
    if len(text) > HEADER_BYTES:
        raise OSError(0, f"{len(text)} bytes of header")
    _write_all(file, text.ljust(HEADER_BYTES))
    _write_all(file, pixels)


def _write_all(file, data) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]


def _read(file, key: str) -> Frames:
    header = json.loads(_read_exactly(file, bytearray(HEADER_BYTES)))
    if header["magic"] != MAGIC or header["key"] != key:
        raise ValueError("another kind of file, or of another key")
    pixels = torch.empty(header["shape"], dtype=torch.uint8)
    view = pixels.numpy()
    _read_exactly(file, memoryview(view).cast("B"))
    if file.read(1) or zlib.crc32(view) != header["crc32"]:
        raise ValueError("the checksum differs")
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in header["preprocessor"].items()
    }
    return Frames(
        pixels,
        tuple(header["timestamps_s"]),
        tuple(header["grid_thw"]),
        header["kind"],
        Preprocessor(**fields),
        duration_s=header["duration_s"],
        key=key,
        decoder=header["decoder"],
    )


def _read_exactly(file, buffer):
    """Fill the buffer from the file and return it; ValueError where the file ends before."""
    view = memoryview(buffer)
    while len(view):
        got = file.readinto(view)
        if not got:
            raise ValueError("the file is too short")
        view = view[got:]
    return buffer
