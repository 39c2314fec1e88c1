"""Caches of decoded media with a limit in bytes, in memory (`ByteLru`) and on disk (`DiskCache`)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Generic, TypeVar

import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames
from rmsd_fast.files import replacing, write_all

log = logging.getLogger("rmsd_fast")
Value = TypeVar("Value")

# An entry begins with the name of the format, the CRC-32 of everything after the checksum, and the header's length.
MAGIC = b"rmsdfr02"
CHECK, LENGTH = struct.Struct("<8sI"), struct.Struct("<I")
BLOCK = 4096
# Evict a little more than needed, so that the next writers do not have to scan the folder.
KEEP_SHARE = 0.9
# Maximum wait for other writers, after which the frames are not kept.
LOCK_S = 30.0


class ByteLru(Generic[Value]):
    """Cache values by key, and evict the least recently used ones when the bytes exceed the budget. Thread-safe."""

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
        """Keep a value of `size` bytes. A value larger than the budget is not kept."""
        with self._lock:
            if size > self.budget or key in self._entries:
                return
            self._entries[key] = (value, size)
            self.bytes += size
            while self.bytes > self.budget:
                _, (_, gone) = self._entries.popitem(last=False)
                self.bytes -= gone


def held_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that a tensor occupies. torch allocates pinned memory in powers of two."""
    return 1 << (tensor.nbytes - 1).bit_length() if tensor.is_pinned() else tensor.nbytes


class DiskCache:
    """Keep resized frames in a folder, one file per entry, shared by several processes.

    A file contains a checksum of everything after it, the length of a JSON header, the header padded to 4 KiB, and the
    pixels. It is written under a temporary name and renamed, so readers never see a partial file. A file that fails its
    check is removed and counted in `corrupt`, and its frames are decoded again. Only one process writes at a time, so
    the folder's total in the file `bytes` is exact. Above the budget, the least recently used files are evicted. Disk
    failures lose cache entries but do not end the run.

    Raises:
        SettingsError: the folder cannot be created.
    """

    def __init__(self, folder: str | Path, budget_bytes: int):
        self.folder, self.budget = Path(folder), budget_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"data.disk_cache: cannot create {self.folder} ({error.strerror}); choose another folder"
            ) from error
        self.corrupt = 0
        self._told = False

    def get(self, key: str) -> Frames | None:
        """Return the frames of a key, in newly allocated memory. Return None if there is no entry, or it is damaged."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                frames = _read(file, key)
        except OSError:
            return None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            self.corrupt += 1
            log.warning("%s: damaged cache entry (%s); decoding again", path, str(error).split("\n", 1)[0])
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return frames

    def peek(self, key: str) -> Frames | None:
        """Return the result of `get` without pixels and without verification; None if there is no entry."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                _, _, text = _read_header(file)
            return _frames(json.loads(text), torch.empty(0), key)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, frames: Frames) -> None:
        """Write the frames. If that fails, they are not kept, and a warning is logged once."""
        path, header = self._path(key), _header(key, frames)
        size = CHECK.size + len(header) + frames.pixels.nbytes
        if size > self.budget or path.exists():
            return
        try:
            with self._locked():
                self._make_room(size)
                path.parent.mkdir(exist_ok=True)
                pixels = frames.pixels.cpu().contiguous().numpy()
                crc = zlib.crc32(pixels, zlib.crc32(header))
                with replacing(path, sync=False) as file:
                    write_all(file, CHECK.pack(MAGIC, crc) + header)
                    write_all(file, pixels)
        except OSError as error:
            # The total is counted again next time.
            with suppress(OSError):
                (self.folder / "bytes").unlink()
            if not self._told:
                self._told = True
                log.warning("%s: cannot be written (%s); its frames are not kept", path, error.strerror or error)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.frames"

    def _make_room(self, size: int) -> None:
        """Evict until `size` bytes fit, then reserve them."""
        ledger = self.folder / "bytes"
        try:
            used = int(ledger.read_text())
        except (OSError, ValueError):
            used = self._evict(self.budget)
        if used + size > self.budget:
            used = self._evict(max(0, KEEP_SHARE * self.budget - size))
        with replacing(ledger, sync=False) as file:
            write_all(file, str(used + size).encode())

    def _evict(self, target: float) -> int:
        """Remove the least recently used files until at most `target` bytes remain. Return the remaining bytes."""
        # This process holds the lock, so no other process is writing these files.
        for left in [*self.folder.glob(".*.tmp"), *self.folder.glob("??/*.tmp")]:
            left.unlink(missing_ok=True)
        files = []
        for path in self.folder.glob("??/*.frames"):
            entry = path.stat()
            files.append((entry.st_mtime, entry.st_size, path))
        used = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder's lock. Raise OSError if another process does not release it."""
        with (self.folder / "lock").open("w") as file:
            end = time.monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)
            yield


def _header(key: str, frames: Frames) -> bytes:
    """Return the header's length and its JSON, padded so that the checksum and the header fill a multiple of 4 KiB."""
    fields = {
        "key": key,
        "shape": tuple(frames.pixels.shape),
        "timestamps_s": frames.timestamps_s,
        "grid_thw": frames.grid_thw,
        "kind": frames.kind,
        "preprocessor": asdict(frames.preprocessor),
        "duration_s": frames.duration_s,
        "decoder": frames.decoder,
        "frames_per_s": frames.frames_per_s,
    }
    text = json.dumps(fields).encode()
    size = -(-(CHECK.size + LENGTH.size + len(text)) // BLOCK) * BLOCK - CHECK.size
    return (LENGTH.pack(size) + text).ljust(size)


def _read(file, key: str) -> Frames:
    """Return the frames of an entry. ValueError and other exceptions mean that the file is damaged."""
    crc, length, text = _read_header(file)
    pixels = torch.empty(os.fstat(file.fileno()).st_size - file.tell(), dtype=torch.uint8)
    view = pixels.numpy()
    _read_exactly(file, memoryview(view))
    if zlib.crc32(view, zlib.crc32(text, zlib.crc32(length))) != crc:
        raise ValueError("the checksum differs")
    fields = json.loads(text)
    return _frames(fields, pixels.view(fields["shape"]), key)


def _read_header(file) -> tuple[int, bytes, bytes]:
    """Return the checksum of everything after it, the length as stored, and the JSON text."""
    magic, crc = CHECK.unpack(_read_exactly(file, bytearray(CHECK.size)))
    length = _read_exactly(file, bytearray(LENGTH.size))
    (size,) = LENGTH.unpack(length)
    if magic != MAGIC or not LENGTH.size <= size <= os.fstat(file.fileno()).st_size - CHECK.size:
        raise ValueError("another kind of file")
    return crc, length, _read_exactly(file, bytearray(size - LENGTH.size))


def _frames(fields: dict, pixels: torch.Tensor, key: str) -> Frames:
    if fields["key"] != key:
        raise ValueError("an entry of another key")
    preprocessor = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["preprocessor"].items()}
    return Frames(
        pixels,
        tuple(fields["timestamps_s"]),
        tuple(fields["grid_thw"]),
        fields["kind"],
        Preprocessor(**preprocessor),
        duration_s=fields["duration_s"],
        key=key,
        decoder=fields["decoder"],
        frames_per_s=fields["frames_per_s"],
    )


def _read_exactly(file, buffer):
    """Fill the buffer from the file and return it. Raise ValueError if the file is too short."""
    view = memoryview(buffer)
    while len(view):
        got = file.readinto(view)
        if not got:
            raise ValueError("the file is too short")
        view = view[got:]
    return buffer
