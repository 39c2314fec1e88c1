"""What is said at the start of a run, and `python -m rmsd_fast.pool`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rmsd_fast import pool as pool_program
from rmsd_fast.config import RunConfig, TeacherConfig
from rmsd_fast.data.records import DataError, Question
from rmsd_fast.teacher.pool import TeacherResponse, load_pool
from rmsd_fast.teacher.scores import score_pool
from rmsd_fast.teacher.summary import describe_pool, describe_questions

DRINKS = ("tea", "milk")
NATURAL = ["B. milk", "The answer is A.", "<think>w</think><answer>B</answer>", "A or B"]


def mcq(identity: str, **fields) -> Question:
    given = {"videos": ("/v.mp4",), "options": DRINKS, "answer": "B"} | fields
    return Question(identity, "What is poured?", "mcq", **given)


def described(texts: list[str], questions=None, unanswered=(), **teacher):
    questions = questions or [mcq("q1")]
    cfg = RunConfig(teacher=TeacherConfig(**teacher))
    pool = {q.id: [TeacherResponse(q.id, k, "", text, model="gpt") for k, text in enumerate(texts)] for q in questions}
    scores = score_pool(pool, questions, cfg.teacher)
    return describe_pool(questions, pool, scores, unanswered, cfg)


def test_answers_by_task_with_reasons():
    summary = described(NATURAL, unanswered=["q7", "q9"])
    assert summary.lines == [
        "teacher: 4 answers of gpt, K=4 asked: 1 have 4, read with teacher.parse=natural",
        "  task  questions  answers  valid  as sent  T_best  why not",
        "  mcq           1        4  75.0%    25.0%  100.0%  two_answers 1",
        "  left out: 2 questions without an answer (q7, q9)",
    ]
    assert summary.warnings == []


def test_few_valid_answers_are_a_warning_and_next_to_none_an_error():
    (warning,) = described(NATURAL, parse="strict").warnings
    assert "only 25% of the teacher's answers are valid (format 3)" in warning and "teacher.parse=natural" in warning
    with pytest.raises(DataError, match=r"0\.0% of 4 answers are valid.*Reasons: refusal 4\..*pool check"):
        described(["I'm sorry, I can't view videos."] * 4)
    # Valid answers of which none is right are as bad.
    with pytest.raises(DataError, match=r"100\.0% of 4 answers are valid, and 0\.0% of the questions have one"):
        described(["A"] * 4)


def test_questions_by_task_and_the_prompt_that_a_teacher_needs():
    inferred = Question("q2", "?", "numeric", videos=("/w.mp4",), answer="3", meta={"inferred": True})
    summary = describe_questions([mcq("q1"), inferred], [mcq("h", videos=("/x.mp4",))])
    assert summary.lines == [
        "questions: 2 (mcq 1, numeric 1); the task types of 1 were found by their answers",
        "held out: 1 (mcq 1)",
        "the user's turn, for a teacher too (question 'q1'):\n  | What is poured?\n  | A. tea\n  | B. milk\n"
        "  | Reply as <think>reasoning</think><answer>option letter</answer>",
    ]
    assert summary.warnings == []


def test_what_is_probably_not_meant_is_a_warning():
    openly = [Question(f"q{i}", "?", "open", videos=(f"/{i}.mp4",)) for i in range(2)]
    assert "every question is `open`" in describe_questions(openly, []).warnings[0]
    short = [mcq("q"), Question("o", "Is it red?", "open", videos=("/o.mp4",), answer="yes")]
    (warning,) = describe_questions(short, []).warnings
    assert "1 open questions have an answer of one or two words (o: 'yes')" in warning
    (same,) = describe_questions([mcq("q1")], [mcq("h"), mcq("i", options=("milk", "tea"))]).warnings
    assert "1 of 2 held-out questions are trained on too (h)" in same
    (shared,) = describe_questions([mcq("q1")], [mcq("i", options=("milk", "tea"))]).warnings
    assert "1 of 1 held-out questions are about media that are trained on (i)" in shared


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    questions, pool = tmp_path / "questions.jsonl", tmp_path / "pool.jsonl"
    asked = {"question": "What is poured?", "videos": ["v.mp4"], "task_type": "mcq", "options": DRINKS, "answer": "B"}
    questions.write_text("".join(json.dumps({"id": i, **asked}) + "\n" for i in (1, 2)))
    lines = [{"id": 1, "k": k, "text": text, "usage": {"n": k}} for k, text in enumerate(NATURAL)]
    lines += [{"id": "other", "k": 0, "text": "The answer is A."}]
    lines += [{"id": 2, "k": 0, "text": "<think>a", "finish_reason": "length"}]
    pool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return pool, questions


def test_pool_check_shows_counts_and_examples(files, capsys):
    assert pool_program.main(["check", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "mcq           2        5  60.0%    20.0%   50.0%  two_answers 1, truncated 1" in printed
    assert "  two_answers: several different answers were given\n    1 k=3: 'A or B'" in printed
    assert "  truncated: the response was cut at the token limit\n    2 k=0: '<think>a'" in printed
    assert pool_program.main(["check", *map(str, files), "teacher.parse=strict"]) == 0
    assert "format 3" in capsys.readouterr().out
    assert pool_program.main(["check", *map(str, files), "teacher.parse=loose"]) == 2
    assert "teacher.parse: expected one of strict, natural" in capsys.readouterr().err


def test_pool_check_says_what_is_wrong_with_a_pool(files, capsys):
    pool, _ = files
    pool.write_text('{"id": 3, "k": 0, "text": "B"}\n{"id": 1, "k": 0}\n')
    assert pool_program.main(["check", *map(str, files)]) == 2
    assert "pool.jsonl:2: field 'text': expected a value" in capsys.readouterr().err
    pool.write_text('{"id": 3, "k": 0, "text": "B"}\n')
    assert pool_program.main(["check", *map(str, files)]) == 2
    assert "teacher.max_unanswered_share (now 0.05)" in capsys.readouterr().err


def test_pool_repair_keeps_the_text_as_sent_and_repairs_only_once(files, tmp_path, capsys):
    pool, questions = files
    output = tmp_path / "repaired.jsonl"
    assert pool_program.main(["repair", str(pool), str(questions), "--output", str(output)]) == 0
    assert "6 answers, 2 brought into canonical form, 2 invalid, 1 to questions" in capsys.readouterr().out
    repaired = load_pool(output)
    first, second, third, fourth = repaired["1"]
    assert (first.text, first.raw) == ("<think></think><answer>B</answer>", "B. milk")
    assert (first.valid, first.quality, first.reason, first.usage) == (True, 1.0, None, {"n": 0})
    assert (second.text, second.raw) == ("<think></think><answer>A</answer>", "The answer is A.")
    assert second.quality == 0.0
    assert (third.text, third.raw) == (NATURAL[2], None)
    assert (fourth.text, fourth.raw, fourth.reason, fourth.valid) == ("A or B", None, "two_answers", False)
    assert repaired["other"] == load_pool(pool)["other"] and repaired["2"][0].reason == "truncated"
    # A second repair starts from the texts as they were sent.
    assert pool_program.main(["repair", str(output), str(questions), "--output", str(tmp_path / "twice.jsonl")]) == 0
    assert load_pool(tmp_path / "twice.jsonl") == repaired
    assert pool_program.main(["repair", str(pool), str(questions), "--output", str(pool)]) == 2
    assert "expected another file than the pool" in capsys.readouterr().err
