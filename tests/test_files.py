"""Writing whole or not at all, and one program at a time in a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rmsd_fast.files import FolderLock, Locked, remove_leftovers, replace_folder, write_text_atomic


def fail(error: BaseException) -> None:
    raise error


def test_a_write_that_fails_leaves_the_former_file(tmp_path, monkeypatch):
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


def test_a_folder_replaces_another(tmp_path):
    final = tmp_path / "export"
    replace_folder(folder(tmp_path / ".export.tmp", "1"), final)
    replace_folder(folder(tmp_path / ".export.tmp", "2"), final)
    assert (final / "config.json").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_is_whole_after_a_kill_at_any_rename(tmp_path, monkeypatch, renames):
    """The kill is an error that nothing handles, before the first, the second, and after the last rename."""
    final = folder(tmp_path / "export", "old")
    staged = folder(tmp_path / ".export.tmp", "new")
    rename, done = Path.rename, []

    def killed(self, target):
        if len(done) == renames:
            raise SystemExit
        done.append(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    if renames == 2:
        monkeypatch.setattr("rmsd_fast.files.sync_folder", lambda path: fail(SystemExit()) if done else None)
    with pytest.raises(SystemExit):
        replace_folder(staged, final)
    monkeypatch.undo()
    text = (final / "config.json").read_text() if final.exists() else None
    assert text == {0: "old", 1: None, 2: "new"}[renames]
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == (["export"] if text else [])


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
    root = Path(__file__).resolve().parents[1]
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
    with pytest.raises(Locked, match=rf"{tmp_path}: process {process.pid} on .* writes to this folder; wait for it"):
        FolderLock(tmp_path)
    # Killed, so that nothing but the kernel can let go of it.
    process.kill()
    process.wait()
    with FolderLock(tmp_path):
        pass
    FolderLock(tmp_path).close()


def test_waiting_for_another_program(tmp_path):
    process = hold(tmp_path)
    process.stdin.close()
    with FolderLock(tmp_path, wait_s=60):
        process.wait(timeout=60)
