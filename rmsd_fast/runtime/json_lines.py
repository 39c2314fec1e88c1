"""Append to a JSONL file that survives kills and full disks. Resuming truncates the file to the checkpoint."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from rmsd_fast.config import CheckpointError
from rmsd_fast.files import append_whole, is_disk_error, sync_folder, truncate

log = logging.getLogger("rmsd_fast")

# Largest number of lines written between two calls of fsync.
SYNC_LINES = 64


class JsonLines:
    """Append records to a file that only one process writes.

    Args:
        path: the file, created by the first record.
        keep: `lines` from the checkpoint. Later lines and an unfinished line are removed. 0 means a new file; None
            keeps all complete lines.
        waiting: `waiting` from the checkpoint; these lines are appended next.
    """

    def __init__(self, path: Path, keep: int | None = 0, waiting: Sequence[str] = ()) -> None:
        self._path = path
        self._file: FileIO | None = None
        # Lines still to be written, and lines written since the last fsync.
        self._pending: deque[bytes] = deque()
        self._unsynced: list[bytes] = []
        self._fault: OSError | None = None
        self._lines = self._cut(keep)
        self._pending.extend(line.encode() + b"\n" for line in waiting)
        self._write_pending()

    def _cut(self, keep: int | None) -> int:
        if not self._path.exists():
            return 0
        kept = size = 0
        # Read line by line, because a pool can be larger than the memory.
        with self._path.open("rb") as file:
            for line in islice(file, keep):
                if line.endswith(b"\n"):
                    kept, size = kept + 1, size + len(line)
        if keep is not None and kept < keep:
            log.warning(
                "%s: expected at least %d lines as in the checkpoint, got %d; the records in between are lost",
                self._path,
                keep,
                kept,
            )
        if size < self._path.stat().st_size:
            os.truncate(self._path, size)
        return kept

    def records(self) -> list[dict[str, Any]]:
        """Return all records.

        Raises:
            CheckpointError: a line is damaged.
        """
        records = []
        lines = self._path.read_bytes().splitlines() if self._path.exists() else []
        for number, line in enumerate([*lines, *self._pending], start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("got another value")
                records.append(record)
            except ValueError as error:
                raise CheckpointError(
                    f"{self._path}:{number}: expected a JSON object ({error}); restore the file, or delete that line "
                    "and all that follow"
                ) from error
        return records

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record. Numbers that are not finite become null.

        The line is in the file when this method returns, so no line is lost if the run is killed. If the disk is full,
        lines are kept in memory until there is space. Partial lines are never left in the file.
        """
        self._pending.append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
        self._write_pending()

    def _write_pending(self) -> None:
        while self._pending:
            # Remove the line from the queue before writing it, so that an interrupt cannot cause a second write.
            line = self._pending.popleft()
            if fault := self._write(line):
                self._pending.appendleft(line)
                self._warn(fault)
                return
            self._unsynced.append(line)
            if len(self._unsynced) >= SYNC_LINES and not self._sync_written():
                return

    def _write(self, line: bytes) -> OSError | None:
        """Append a complete line. If the disk is full or fails, leave the file unchanged and return the error."""
        try:
            if self._file is None:
                # The file is unbuffered, so that the line is in the file when `append` returns. It is in append mode,
                # because a line that did not fit is removed again.
                self._file = self._path.open("ab", buffering=0)
                sync_folder(self._path.parent)
            append_whole(self._file, line)
        except OSError as error:
            if not is_disk_error(error):
                raise
            return error
        return None

    def _sync_written(self) -> bool:
        """Sync written lines to disk. If that fails, they are written again later: the kernel may have dropped them."""
        if self._file is None:
            return True
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if not is_disk_error(error):
                raise
            truncate(self._file, os.fstat(self._file.fileno()).st_size - sum(map(len, self._unsynced)))
            self._pending.extendleft(reversed(self._unsynced))
            self._unsynced.clear()
            self._warn(error)
            return False
        self._lines += len(self._unsynced)
        self._unsynced.clear()
        return True

    def _warn(self, fault: OSError) -> None:
        if self._fault is None:
            log.warning("%s: %s; lines are kept in memory until they can be written", self._path.name, fault.strerror)
        self._fault = fault

    @property
    def lines(self) -> int:
        """Number of lines synced to disk. Save it in a checkpoint's state and pass it as `keep` on resume."""
        return self._lines

    @property
    def waiting(self) -> list[str]:
        """Lines that the last `sync` could not write. Also save them in the checkpoint's state."""
        return [line.decode().removesuffix("\n") for line in self._pending]

    def sync(self) -> None:
        """Write and sync all lines that the disk has room for."""
        self._write_pending()
        self._sync_written()
        if not self._pending:
            self._fault = None

    def close(self) -> None:
        """Close the file. A later record opens it again.

        Raises:
            OSError: the disk is full or fails; the lines in memory are lost.
        """
        try:
            self.sync()
            if self._fault is not None:
                words = f"{self._fault.strerror}; lines not written: {len(self._pending)}"
                raise OSError(self._fault.errno, words, str(self._path))
        finally:
            self._pending.clear()
            if self._file is not None:
                self._file.close()
                self._file = None


def _finite(value: Any) -> Any:
    """Return the value, with numbers that JSON cannot represent replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
