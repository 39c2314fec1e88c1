"""Test the pool file of a collection: resuming, repair, edits, other settings, locks, full disks and scoring again."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import tempfile
from dataclasses import replace

import pytest
from collect_runs import answers, collect_plainly, expected, plain_questions, run, write_questions
from teacher_server import RIGHT, TeacherServer, completion, right

from rmsd_fast.collect_run import loop
from rmsd_fast.collect_run.config import load_collection, teachers
from rmsd_fast.collect_run.store import PoolStore, lock_pool, repair_tail
from rmsd_fast.config import SettingsError
from rmsd_fast.data.errors import DataError
from rmsd_fast.files import Locked
from rmsd_fast.teacher.pool import HINT_K


@pytest.fixture
def collected(tmp_path):
    """Return questions, the path of their complete pool, and a server that goes on."""
    questions, out = plain_questions(tmp_path, 6), tmp_path / "pool.jsonl"
    with TeacherServer() as server:
        collect_plainly(questions, [server.url], out)
        yield questions, out, server


def more(collected, *overrides: str) -> int:
    """Collect again. Return the number of requests."""
    questions, out, server = collected
    before = server.count
    collect_plainly(questions, [server.url], out, *overrides)
    return server.count - before


def test_a_complete_pool_needs_no_request(collected):
    assert more(collected) == 0


def test_missing_lines_are_collected_and_others_stay(collected):
    _, out, server = collected
    lines = out.read_text().splitlines(keepends=True)
    del lines[21], lines[3]
    out.write_text("".join(lines))
    assert more(collected) == 2
    assert out.read_text().startswith("".join(lines)) and set(answers(out)) == expected(6)
    assert [request.get("n") for request in server.requests[-2:]] == [None, None]


def test_more_answers_continue_the_same_requests(collected):
    _, out, _ = collected
    before = out.read_text()
    assert more(collected, "collect.k=6") == 6
    assert out.read_text().startswith(before) and set(answers(out)) == expected(6, 6)
    assert len({response.key for (name, _), response in answers(out).items() if name == "q0"}) == 1


def test_a_torn_last_line_is_removed_and_collected_again(collected, caplog):
    _, out, _ = collected
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    assert more(collected) == 1
    assert "pool.jsonl: the last line was incomplete, because an append was interrupted; it was removed" in caplog.text
    assert set(answers(out)) == expected(6)


def test_a_last_line_without_newline_is_kept(collected, caplog):
    _, out, _ = collected
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])
    assert more(collected) == 0 and out.read_bytes() == whole
    assert "the last line had no newline, which was added" in caplog.text


def test_repair_of_long_and_empty_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("rmsd_fast.collect_run.store.BLOCK_BYTES", 8)
    path = tmp_path / "p.jsonl"
    for before, after in ((b"", b""), (b'{"a": "bcdefghijklmn"', b""), (b'{"a": 1}\n{"b": "0123456789', b'{"a": 1}\n')):
        path.write_bytes(before)
        repair_tail(path)
        assert path.read_bytes() == after


def test_answers_to_an_edited_question_are_replaced(collected, caplog):
    questions, out, server = collected
    questions[2] = replace(questions[2], question="What is drunk in 2?")
    assert more((questions, out, server)) == 1
    assert "collecting 4 answers again about questions that were edited" in caplog.text
    aside = [json.loads(line) for line in out.with_name("pool.replaced.jsonl").read_text().splitlines()]
    assert [(line["id"], line["k"]) for line in aside] == [("q2", k) for k in range(4)]
    assert set(answers(out)) == expected(6) and len(out.read_text().splitlines()) == 24
    # A changed ground truth does not change the request.
    questions[2] = replace(questions[2], answer="A")
    assert more((questions, out, server)) == 0


def test_answers_about_changed_media_are_replaced_on_request(collected, tmp_path):
    (tmp_path / "picture.png").write_bytes(b"another picture")
    assert more(collected) == 0
    assert more(collected, "collect.check_media=true") == 6


def test_answers_to_other_requests(collected):
    _, out, _ = collected
    before = out.read_bytes()
    with pytest.raises(SettingsError) as caught:
        more(collected, "collect.temperature=0.5", "collect.model=[new]")
    assert "got 24 answers to others (model: m in the pool, now new; temperature: 1.0 in the pool, now 0.5)" in str(
        caught.value
    )
    assert out.read_bytes() == before
    assert more(collected, "collect.temperature=0.5", "collect.changed=keep", "collect.k=5") == 6
    assert more(collected, "collect.changed=replace", "collect.k=5", "collect.temperature=0.5") == 6
    assert {response.sampling["temperature"] for response in answers(out).values()} == {0.5}
    assert len(out.with_name("pool.replaced.jsonl").read_text().splitlines()) == 24


def test_answers_without_key_and_of_other_questions_stay(collected):
    questions, out, server = collected
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines:
        line["key"] = ""
    out.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "other", "k": 0, "text": "x"}\n')
    before = out.read_bytes()
    assert more((questions[:3], out, server)) == 0 and out.read_bytes() == before


def test_damaged_pools_are_not_written(collected):
    _, out, _ = collected
    damaged = out.read_bytes().replace(b'"k": 2', b'"k": -2', 1)
    out.write_bytes(damaged)
    with pytest.raises(DataError, match=r"pool.jsonl:3: field 'k'"):
        more(collected)
    assert out.read_bytes() == damaged


def test_one_collector_at_a_time(collected):
    _, out, _ = collected
    with lock_pool(out), pytest.raises(Locked, match=r"pool.jsonl: process \d+ on .* is writing to this file"):
        more(collected)
    # Another pool in the folder has a lock of its own.
    with lock_pool(out.with_name("other.jsonl")):
        assert more(collected) == 0


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path, "expected a file, got a folder"),
        (tmp_path / "file" / "p.jsonl", "cannot be written"),
    ):
        with pytest.raises(SettingsError, match=says):
            lock_pool(path)


class FullDisk:
    """Appends fail while `is_full` is set."""

    def __init__(self, monkeypatch) -> None:
        from rmsd_fast.runtime import json_lines

        self.is_full, self._append = False, json_lines.append_whole
        monkeypatch.setattr(json_lines, "append_whole", self)

    def __call__(self, file, content) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._append(file, content)


def test_a_full_disk_pauses_the_collection(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "DISK_RETRY_S", 0.01)
    disk, out = FullDisk(monkeypatch), tmp_path / "pool.jsonl"
    sent = []

    def script(request, number):
        disk.is_full = disk.is_full or number == 5
        sent.append(number)
        return right(request, number)

    def sync(self) -> None:
        # Someone frees some space after a while.
        sent.append("pause")
        disk.is_full = sent.count("pause") < 3
        before(self)

    before = loop.PoolStore.sync
    monkeypatch.setattr(loop.PoolStore, "sync", sync)
    with TeacherServer(script) as server:
        collect_plainly(plain_questions(tmp_path, 30), [server.url], out, "collect.max_concurrency=1")
    assert set(answers(out)) == expected(30) and len(out.read_text().splitlines()) == 120 and server.count == 30
    assert "pool.jsonl: No space left on device; lines are kept in memory" in caplog.text
    assert sent.count("pause") >= 3


def test_answers_that_cannot_be_written_are_saved_elsewhere(tmp_path, monkeypatch):
    disk, out = FullDisk(monkeypatch), tmp_path / "pool.jsonl"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(loop.Collection, "_until_disk_has_room", lambda self: loop.asyncio.sleep(0))
    disk.is_full = True
    with (
        TeacherServer() as server,
        pytest.raises(SettingsError, match=r"expected space for 8 more answers.*: cat /") as e,
    ):
        collect_plainly(plain_questions(tmp_path, 2), [server.url], out)
    name = str(e.value).split("cat ")[1].split(" >>")[0]
    disk.is_full = False
    with open(name) as saved, out.open("a") as pool:
        pool.write(saved.read())
    assert set(answers(out)) == expected(2)


def test_scoring_again_asks_nothing(tmp_path, capsys):
    questions, out = write_questions(tmp_path, 3), tmp_path / "pool.jsonl"
    script = lambda request, number: completion("**B**", RIGHT, "B or A", "It is tea.")  # noqa: E731
    with TeacherServer(script) as server:
        collect_plainly(plain_questions(tmp_path, 3), [server.url], out)
    assert [answers(out)["q0", k].reason for k in range(4)] == [None, None, "two_answers", None]
    assert [answers(out)["q0", k].quality for k in range(4)] == [1.0, 1.0, 0.0, 0.0]
    before = answers(out)
    # The ground truth was wrong.
    write_questions(tmp_path, 3, answer="A")
    assert run(questions, server.url, out, "--rescore") == 0
    printed = capsys.readouterr().out
    assert "12 answers, 6 converted to canonical form, 3 invalid" in printed
    assert printed.splitlines()[-3:] == [
        "changed: 9 of 12 answers",
        "  valid, lower quality: 6, such as q0 k=0 (quality 1 → 0), q0 k=1 (quality 1 → 0), q1 k=0 (quality 1 → 0)",
        "  valid, higher quality: 3, such as q0 k=3 (quality 0 → 1), q1 k=3 (quality 0 → 1), q2 k=3 (quality 0 → 1)",
    ]
    after = answers(out)
    assert [after["q0", k].quality for k in range(4)] == [0.0, 0.0, 0.0, 1.0]
    assert {place: response.raw or response.text for place, response in after.items()} == {
        place: response.raw or response.text for place, response in before.items()
    }
    assert run(questions, server.url, out, "--rescore", "teacher.parse=strict") == 0
    assert [answers(out)["q0", k].reason for k in range(4)] == ["format", None, "format", "format"]
    changes = capsys.readouterr().out.splitlines()[-3:]
    assert changes[0] == "changed: 9 of 12 answers"
    assert changes[1].startswith("  valid → format: 6, such as q0 k=0 (quality 0 → 0), q0 k=3 (quality 1 → 0),")
    assert changes[2].startswith("  two_answers → format: 3, such as q0 k=2 (quality 0 → 0),")
    assert run(questions, server.url, out, "--rescore", "teacher.parse=strict") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "no answer changed its validity, quality or reason"


def test_scoring_for_the_first_time_is_a_change(tmp_path, capsys):
    questions, out = write_questions(tmp_path, 2), tmp_path / "pool.jsonl"
    lines = [{"id": "q0", "k": 0, "text": RIGHT}, {"id": "q1", "k": 0, "text": RIGHT, "valid": True, "reason": None}]
    lines.append({"id": "gone", "k": 0, "text": RIGHT})
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(questions, "http://127.0.0.1:1/v1", out, "--rescore") == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "changed: 2 of 3 answers",
        "  no score → valid: 1, such as q0 k=0 (quality unknown → 1)",
        "  valid, unknown quality before: 1, such as q1 k=0 (quality unknown → 1)",
    ]


def test_torn_file_of_rejected_requests(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    out = tmp_path / "pool.jsonl"
    (tmp_path / "pool.failed.jsonl").write_text(
        '{"id": "q0", "k": [0], "key": "a-b-c", "reason": "refused"}\n{"id": "q'
    )
    with TeacherServer() as server:
        collect_plainly(plain_questions(tmp_path, 1), [server.url], out)
    assert set(answers(out)) == expected(1) and not (tmp_path / "pool.failed.jsonl").exists()


def test_the_budget_counts_all_answers_that_the_pool_has_paid_for(collected):
    questions, out, server = collected
    edited = [replace(questions[0], question="Which?"), *questions[1:3]]
    with pytest.raises(SettingsError, match="got 8 answers to others"):
        more((edited, out, server), "collect.temperature=0.5")
    # Four answers are replaced, and those to the last three questions are not asked about.
    assert more((edited, out, server)) == 1
    settings = load_collection("", ["collect.model=[m]", "collect.endpoint=['http://h/v1']"])
    with PoolStore(out, edited, settings, teachers(settings.collect), "qwen3_vl") as store:
        # Seven replies with 100 and 20 tokens.
        assert store.spent == [700, 140] and store.metered == 28 and store.models == {"m"}


def test_imported_answers_are_scored(tmp_path):
    out, questions = tmp_path / "pool.jsonl", plain_questions(tmp_path, 2)
    # A right answer without scores, and a wrong one.
    lines = [{"id": f"q{i}", "k": 0, "text": letter} for i, letter in enumerate("BA")]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with TeacherServer() as server:
        collect_plainly(questions, [server.url], out, "collect.k=1", "collect.hint_empty=true")
    assert server.count == 1 and set(answers(out)) == {("q0", 0), ("q1", 0), ("q1", HINT_K)}


def test_scoring_again_needs_the_questions_of_the_pool(tmp_path, capsys):
    out = tmp_path / "pool.jsonl"
    with TeacherServer() as server:
        collect_plainly(plain_questions(tmp_path, 2), [server.url], out)
    before = out.read_bytes()
    other = write_questions(tmp_path, 2, task_type="numeric", options=None, answer="3")
    assert run(other, server.url, out, "--rescore") == 2
    assert "expected responses to the questions as they are now" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_leftovers_of_killed_collectors_are_removed(collected):
    _, out, _ = collected
    # No process has this id.
    left = [out.with_name(f".{name}.99999999@{socket.gethostname()}.tmp") for name in (out.name, "pool.failed.jsonl")]
    for path in left:
        path.write_text("x")
    assert more(collected) == 0
    assert not any(path.exists() for path in left)
