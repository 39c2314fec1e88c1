"""Test JSONL files of a run: kills and full disks do not damage them, and a resume truncates them."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from rmsd_fast.config import CheckpointError, UserError
from rmsd_fast.runtime.json_lines import SYNC_LINES, JsonLines


def written(file: JsonLines) -> list[int]:
    path = file._path
    return [json.loads(line)["n"] for line in path.read_text().splitlines()] if path.exists() else []


def test_every_line_is_flushed_and_is_strict_json(tmp_path):
    path = tmp_path / "x.jsonl"
    file = JsonLines(path)
    assert not path.exists() and file.records() == [] and file.lines == 0
    file.append({"n": 1, "values": [0.5, math.nan, (math.inf, "a")], "nested": {"x": -math.inf}, "text": "\ud800"})
    expected = '{"n": 1, "values": [0.5, null, [null, "a"]], "nested": {"x": null}, "text": "\\ud800"}\n'
    assert path.read_text() == expected
    file.close()
    file.append({"n": 2})
    file.sync()
    assert written(file) == [1, 2] and file.lines == 2


@pytest.mark.parametrize("torn", [b"", b'{"n": '])
def test_a_resume_removes_lines_after_the_checkpoint(tmp_path, torn):
    path = tmp_path / "x.jsonl"
    file = JsonLines(path)
    for n in (1, 2):
        file.append({"n": n})
    file.sync()
    saved = file.lines
    file.append({"n": 99})
    with path.open("ab") as after:
        after.write(torn)
    again = JsonLines(path, keep=saved)
    again.append({"n": 3})
    again.sync()
    assert written(again) == [1, 2, 3] and again.lines == 3
    # A run that starts over keeps no lines.
    assert JsonLines(path).records() == []


def test_lost_lines_are_reported(tmp_path, caplog):
    JsonLines(tmp_path / "x.jsonl").append({"n": 1})
    file = JsonLines(tmp_path / "x.jsonl", keep=3)
    assert "expected at least 3 lines as in the checkpoint, got 1" in caplog.text
    assert file.lines == 1


class Full:
    """A file that writes a few bytes and then none, as on a full disk."""

    def __init__(self, file):
        self.file = file

    def write(self, data):
        self.file.write(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_keeps_lines_until_there_is_space(tmp_path, caplog):
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"n": 1})
    real = file._file
    file._file = Full(real)
    file.append({"n": 2})
    file.append({"n": 3})
    file.sync()
    assert written(file) == [1] and file.lines == 1 and file.waiting == ['{"n": 2}', '{"n": 3}']
    assert [record["n"] for record in file.records()] == [1, 2, 3]
    # The run resumes from a checkpoint taken now.
    assert written(JsonLines(tmp_path / "x.jsonl", file.lines, file.waiting)) == [1, 2, 3]
    os.truncate(tmp_path / "x.jsonl", len('{"n": 1}\n'))
    assert caplog.text.count("x.jsonl: No space left on device; lines are kept in memory") == 1
    file._file = real
    file.append({"n": 4})
    file.sync()
    assert written(file) == [1, 2, 3, 4] and file.lines == 4


def test_a_disk_that_is_full_from_the_start(tmp_path, monkeypatch):
    file = JsonLines(tmp_path / "x.jsonl")

    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "open", refuse)
        file.append({"n": 1})
        file.sync()
        assert file.lines == 0 and file.waiting == ['{"n": 1}']
    file.close()
    assert written(file) == [1]


def test_lines_that_never_found_space_are_an_error_at_the_end(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"n": 1})
    file._file = Full(file._file)
    file.append({"n": 2})
    file.append({"n": 3})
    with pytest.raises(OSError, match="lines not written: 2"):
        file.close()
    assert written(file) == [1]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_that_is_detected_only_by_fsync(tmp_path, monkeypatch, code):
    """The kernel reports the error once and may have dropped the written data, so all of it is written again."""
    fsync, faults = os.fsync, [OSError(code, "refused")]

    def refuse_once(number):
        fsync(number)
        if faults:
            raise faults.pop()

    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"n": 1})
    file.sync()
    file.append({"n": 2})
    file.append({"n": 3})
    monkeypatch.setattr("os.fsync", refuse_once)
    file.sync()
    assert written(file) == [1] and file.lines == 1 and len(file.waiting) == 2
    file.sync()
    assert written(file) == [1, 2, 3] and file.lines == 3 and not file.waiting


def test_waiting_lines_do_not_accumulate_between_checkpoints(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    for n in range(SYNC_LINES + 1):
        file.append({"n": n})
    assert file.lines == SYNC_LINES


def test_a_line_that_can_neither_be_written_nor_removed_ends_the_run(tmp_path, monkeypatch):
    file = JsonLines(tmp_path / "x.jsonl")
    file.append({"n": 1})
    file._file = Full(file._file)
    monkeypatch.setattr(Full, "truncate", refuse_to_cut, raising=False)
    with pytest.raises(UserError, match=r"x\.jsonl: Input/output error, .* truncate the file to 9 bytes"):
        file.append({"n": 2})


def refuse_to_cut(self, size):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_damaged_lines_are_reported(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"n": 7}\n{"n": \n')
    with pytest.raises(CheckpointError, match=r"x\.jsonl:2: expected a JSON object .*restore the file"):
        JsonLines(tmp_path / "x.jsonl", keep=2).records()


def test_other_disk_faults_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        JsonLines(tmp_path / "gone" / "x.jsonl").append({"n": 1})


def test_records_of_other_writers_are_read(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"n": 7}) + "\n")
    assert written(JsonLines(tmp_path / "x.jsonl", keep=1)) == [7]
