"""Write files atomically, and lock folders so that one program at a time writes to them."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import (
    EACCES,
    EDQUOT,
    EEXIST,
    EFBIG,
    EINVAL,
    EIO,
    EISDIR,
    ELOOP,
    EMFILE,
    ENAMETOOLONG,
    ENFILE,
    ENOLCK,
    ENOSPC,
    ENOSYS,
    ENOTDIR,
    ENOTEMPTY,
    ENOTSUP,
    EPERM,
    EROFS,
    ESTALE,
)
from glob import escape
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rmsd_fast.config import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("rmsd_fast")

# Advice by error number, for errors that the user or an administrator can fix.
ENVIRONMENT_ADVICE = {
    ENOSPC: "free some space",
    EDQUOT: "free some space, or ask for a larger quota",
    EFBIG: "raise the file size limit (ulimit -f)",
    EIO: "check the disk",
    EACCES: "check the permissions",
    EPERM: "check the permissions",
    EROFS: "the file system is read-only; mount it for writing, or choose another folder",
    EISDIR: "check the path",
    ENOTDIR: "check the path",
    ENAMETOOLONG: "check the path",
    ELOOP: "check the links",
    ESTALE: "remount the share",
    EMFILE: "raise the limit on open files (ulimit -n)",
    ENFILE: "raise the system's limit on open files (fs.file-max)",
}
# The disk, the quota or the file size limit is exhausted, or the disk is failing. Some of these errors are temporary.
DISK_ERRORS = (ENOSPC, EDQUOT, EFBIG, EIO)


# Longer waits are logged.
LONG_WAIT_S = 10.0
# Process id and host in the name of a temporary file.
_WRITER = re.compile(r"\.([0-9]+)(?:@(.+))?\.tmp$")


class Locked(UserError, RuntimeError):
    """Another program is writing to a folder."""


def is_disk_error(error: BaseException) -> bool:
    """Return whether a write failed because of the disk, rather than the path or the program."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


@contextmanager
def os_errors_of_safetensors(path: Path) -> Iterator[None]:
    """Convert operating system errors of safetensors to OSError inside the context.

    safetensors has its own error class, whose text ends with the error number.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def temporary_path(path: Path) -> Path:
    """Return the path of a temporary file or folder of this process, which replaces `path` when it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}@{socket.gethostname()}.tmp")


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[FileIO]:
    """Open a file that replaces `path` at the end of the context. Readers see either the old or the new content.

    With sync=False, the kernel decides when the content reaches the disk, for readers that verify what they read.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb", buffering=0) as file:
            yield file
            if sync:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_folder(path.parent)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Write all bytes. A single write to an unbuffered file may accept only some of them."""
    view = memoryview(content).cast("B")
    while len(view):
        view = view[file.write(view) :]


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write, sync, rename, and sync the folder. Readers see either the old or the new file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        write_all(file, text.encode())


def append_whole(file: FileIO, content: bytes) -> None:
    """Append all bytes to a file. If they do not fit, restore the file and raise the OSError.

    Raises:
        UserError: the bytes written so far cannot be removed.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        write_all(file, content)
    except BaseException:
        truncate(file, size)
        raise


def truncate(file: FileIO, size: int) -> None:
    """Truncate a file to the size that it had before a write failed."""
    try:
        file.truncate(size)
    except OSError as error:
        raise UserError(
            f"{file.name}: {error.strerror}, and a partial write cannot be removed; check the disk, and truncate "
            f"the file to {size} bytes"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors to a folder that is synced as a whole, such as a checkpoint or a staged folder.

    Other files of the folder are written with `Path.write_text`.
    """
    from safetensors.torch import save_file

    with os_errors_of_safetensors(path):
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into host memory."""
    from safetensors.torch import load_file

    return load_file(str(path))


def file_digest(path: str | os.PathLike) -> str:
    """Return a fast hash (about 1 GB/s) of a file's content, for comparisons within this program only."""
    return _digest(path, hashlib.blake2b(digest_size=16))


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file's content, for manifests and pool keys that other programs may check."""
    return _digest(path, hashlib.sha256())


def _digest(path: str | os.PathLike, digest: hashlib._Hash) -> str:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def staged_folder(final: Path, *, replace: bool) -> Iterator[Path]:
    """Create an empty folder to fill. At the end of the context, it is synced and renamed to `final`.

    After a kill, `final` is the old folder, the new one, or missing. Other leftovers are removed by the next call on
    this machine for the same path, and by `remove_leftovers`.

    Args:
        replace: whether the new folder replaces an existing one; if False, the existing folder is kept and the new one
            is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent, of=final.name)
    staged = temporary_path(final)
    staged.mkdir()
    try:
        yield staged
        for path in staged.rglob("*"):
            if path.is_file():
                sync_file(path)
        sync_folders(staged)
        _take_place(staged, final, replace=replace)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _take_place(staged: Path, final: Path, *, replace: bool) -> None:
    former = None
    if replace and final.exists():
        # On NFS, files in use can remain after they are removed, so each old folder gets a unique name.
        former = temporary_path(final.with_name(f"{final.name}.{time.monotonic_ns()}"))
    try:
        if former is not None:
            final.rename(former)
        staged.rename(final)
    except BaseException as error:
        if former is not None and former.exists() and not final.exists():
            former.rename(final)
        faster = isinstance(error, OSError) and error.errno in (EEXIST, ENOTEMPTY)
        if replace or not faster:
            raise
    sync_folder(final.parent)
    # Remove the old folder only after the new name is on disk.
    if former is not None:
        _remove(former)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, of: str | None = None) -> None:
    """Remove temporary files that killed writers left in a folder.

    Files of live processes on this machine are kept, such as a report that is being written. Without the folder's lock,
    files of other machines are also kept.

    Args:
        folder: the folder.
        of: name whose temporary files are removed; None removes the temporary files of all names, and requires the
            folder's lock.
    """
    for path in folder.glob(f".{escape(of)}.*.tmp" if of else ".*.tmp"):
        if writer := _WRITER.search(path.name):
            here = writer[2] in (None, socket.gethostname())
            if (here and _is_alive(int(writer[1]))) or (of and not here):
                continue
        _remove(path)


def _is_alive(pid: int) -> bool:
    """Return whether another process on this machine has this process id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems do not support this, because they sync names to disk themselves.
        if error.errno != EINVAL:
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Sync a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folders(folder: Path) -> None:
    """Sync the names in a folder and its subfolders to disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def make_folder(folder: Path) -> None:
    """Create a folder unless it exists, and sync its name to disk."""
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)


class FolderLock:
    """Lock a folder exclusively, as a context manager. The kernel releases the lock when the process ends in any way.

    Args:
        folder: folder to lock. The file `.lock` in it names the holder of the lock, and is never removed.
        wait_s: how long to wait for another program to release the lock, in seconds.
        file: name of a file in the folder; only this file is locked, with the lock file `.<file>.lock`.
    Raises:
        Locked: another program holds the lock.
    """

    def __init__(self, folder: Path, *, wait_s: float = 0.0, file: str = "") -> None:
        self._file = (folder / (f".{file}.lock" if file else ".lock")).open("a+")
        locked, kind = (folder / file, "file") if file else (folder, "folder")
        end, warned = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                if time.monotonic() < end:
                    if wait_s > LONG_WAIT_S and not warned:
                        warned = True
                        log.warning("%s: waiting for %s, which is writing to this %s", locked, holder, kind)
                    time.sleep(0.1)
                    continue
                self._file.close()
                raise Locked(f"{locked}: {holder} is writing to this {kind}; wait for it, or stop it first") from None
            except OSError as error:
                if error.errno not in (ENOLCK, ENOSYS, ENOTSUP):
                    self._file.close()
                    raise
                log.warning(
                    "%s: its file system does not support locks (%s); make sure that no other program writes there",
                    locked,
                    error.strerror,
                )
                return
        # The text is only for messages, so a full disk must not prevent locking.
        with suppress(OSError):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
