"""Test that files are written completely or not at all, and that one program at a time uses a folder."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rmsd_fast.files import (
    DISK_ERRORS,
    ENVIRONMENT_ADVICE,
    FolderLock,
    Locked,
    append_whole,
    remove_leftovers,
    replacing,
    staged_folder,
    write_text_atomic,
)


def fail(error: BaseException) -> None:
    raise error


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.json"
    write_text_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", lambda number: fail(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def stage(final: Path, text: str, *, replace: bool = True) -> None:
    with staged_folder(final, replace=replace) as staged:
        (staged / "config.json").write_text(text)


def test_a_folder_replaces_another(tmp_path):
    final = tmp_path / "made" / "export"
    stage(final, "1")
    stage(final, "2")
    assert (final / "config.json").read_text() == "2"
    assert [p.name for p in final.parent.iterdir()] == ["export"]


def test_a_folder_written_first_by_another_process_is_kept(tmp_path):
    stage(tmp_path / "made", "1")
    stage(tmp_path / "made", "2", replace=False)
    assert (tmp_path / "made" / "config.json").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_failed_folder_write_keeps_the_old_folder(tmp_path):
    stage(tmp_path / "export", "1")
    with pytest.raises(OSError, match="full"), staged_folder(tmp_path / "export", replace=True):
        fail(OSError(errno.ENOSPC, "full"))
    assert (tmp_path / "export" / "config.json").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_is_complete_after_a_kill_at_any_rename(tmp_path, renames):
    """Interrupt before the first and second rename and after the last.

    The next write to the folder removes leftovers.
    """
    final = folder(tmp_path / "export", "old")
    child = os.fork()
    if child == 0:
        rename, done = Path.rename, []

        def killed(self, target):
            if len(done) == renames:
                os._exit(9)
            done.append(target)
            return rename(self, target)

        Path.rename = killed
        shutil.rmtree = lambda *args, **options: os._exit(9)
        stage(final, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    text = (final / "config.json").read_text() if final.exists() else None
    assert text == {0: "old", 1: None, 2: "new"}[renames]
    assert len(list(tmp_path.iterdir())) == 2
    stage(final, "newer")
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_an_append_without_disk_space_keeps_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    limit = (4, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with path.open("ab", buffering=0) as file:
            append_whole(file, b"12\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            try:
                append_whole(file, b"34\n")
            except OSError as error:
                os._exit(error.errno)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EFBIG
    assert path.read_bytes() == b"12\n"


def test_a_failed_replacement_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a", sync=False) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_every_disk_error_has_advice():
    assert set(DISK_ERRORS) < set(ENVIRONMENT_ADVICE)
    assert ENVIRONMENT_ADVICE[errno.EMFILE] == "raise the limit on open files (ulimit -n)"


@pytest.mark.parametrize("done", [True, False])
def test_an_interrupt_between_the_renames_restores_the_old_folder(tmp_path, monkeypatch, done):
    """Interrupt right after the first rename, or instead of the second rename."""
    final = folder(tmp_path / "export", "old")
    rename = Path.rename

    def interrupted(self, target):
        if done and self == final:
            rename(self, target)
            raise KeyboardInterrupt
        if not done and target == final and (self / "config.json").read_text() == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage(final, "new")
    assert (final / "config.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_the_old_folder_is_removed_after_the_new_name_is_on_disk(tmp_path, monkeypatch):
    final = folder(tmp_path / "export", "old")
    done = []
    monkeypatch.setattr("rmsd_fast.files.sync_folder", lambda path: done.append(("sync", path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: done.append(("remove", path.name[:8])))
    stage(final, "new")
    assert done[-3:-1] == [("sync", tmp_path), ("remove", ".export.")]


def test_temporary_folders_of_other_machines_are_kept(tmp_path):
    (tmp_path / ".export.99999999@elsewhere.tmp").mkdir()
    stage(tmp_path / "export", "new")
    assert len(list(tmp_path.iterdir())) == 2
    # No other program writes to the folder while it is locked.
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_only_leftovers_are_removed(tmp_path):
    for name in ("notes.tmp", ".hidden", ".a.json.99999999.tmp"):
        (tmp_path / name).write_text("x")
    folder(tmp_path / ".stage1.tmp", "half")
    (tmp_path / ".link.tmp").symlink_to(folder(tmp_path / "kept", "x"))
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "kept", "notes.tmp"]
    assert (tmp_path / "kept" / "config.json").exists()


HOLD = """
import sys
from pathlib import Path

from rmsd_fast.files import FolderLock

lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_one_program_at_a_time(tmp_path):
    process = hold(tmp_path)
    with pytest.raises(
        Locked, match=rf"{tmp_path}: process {process.pid} on .* is writing to this folder; wait for it"
    ):
        FolderLock(tmp_path)
    # The process is killed, so only the kernel can release the lock.
    process.kill()
    process.wait()
    with FolderLock(tmp_path):
        pass
    FolderLock(tmp_path).close()


def test_a_lock_of_one_file(tmp_path):
    with FolderLock(tmp_path, file="a.jsonl"):
        with pytest.raises(
            Locked, match=rf"{tmp_path}/a.jsonl: process {os.getpid()} on .* is writing to this file; wait"
        ):
            FolderLock(tmp_path, file="a.jsonl")
        FolderLock(tmp_path, file="b.jsonl").close()
        FolderLock(tmp_path).close()
    FolderLock(tmp_path, file="a.jsonl").close()


def test_waiting_for_another_program(tmp_path):
    process = hold(tmp_path)
    process.stdin.close()
    with FolderLock(tmp_path, wait_s=60):
        process.wait(timeout=60)
