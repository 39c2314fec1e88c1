"""Test the summary at the start of a run and `python -m rmsd_fast.pool`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rmsd_fast import pool as pool_program
from rmsd_fast.config import RunConfig, TeacherConfig, VideoConfig
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.pool import TeacherResponse, load_pool
from rmsd_fast.teacher.scores import score_pool
from rmsd_fast.teacher.summary import Summary, describe_frames, describe_pool, describe_questions

DRINKS = ("tea", "milk")
NATURAL = ["It is white.\n\nB. milk", "The answer is A.", "<think>w</think><answer>B</answer>", "A or B"]


def mcq(identity: str, **fields) -> Question:
    values = {"videos": ("/v.mp4",), "options": DRINKS, "answer": "B"} | fields
    return Question(identity, "What is poured?", "mcq", **values)


def described(texts: list[str], questions=None, unanswered=(), others=(), **teacher):
    """Describe a pool with the same answers for all questions, and with other answers of the pool."""
    questions = questions or [mcq("q1")]
    cfg = RunConfig(teacher=TeacherConfig(**teacher))
    pool = {
        q.id: [TeacherResponse(q.id, k, "", text, finish_reason="stop", model="gpt") for k, text in enumerate(texts)]
        for q in questions
    }
    for response in others:
        pool.setdefault(response.id, []).append(response)
    statistics = pool_statistics(score_pool(pool, questions, cfg.teacher), questions, cfg.teacher, simulated=False)
    return describe_pool(questions, pool, statistics, unanswered, cfg)


MEANING = (
    "  as sent: in the format before rewriting; T_best: questions with an answer of quality above 0, before the filter"
)


def test_answers_by_task_with_reasons():
    summary = described(NATURAL, unanswered=["q7", "q9"])
    assert summary.lines == [
        "teacher: 4 answers of gpt, up to K=4 of each question (1 question has 4), read with teacher.parse=natural",
        "  task  questions  answers  valid  as sent  T_best  why not",
        "  mcq           1        4  75.0%    25.0%  100.0%  two_answers 1",
        MEANING,
        "  left out: 2 questions without an answer (q7, q9)",
    ]
    assert summary.warnings == summary.faults == []


def test_frames_that_the_student_does_not_see():
    def frames(*rules, family="qwen3_vl", **video):
        pool = {"q1": [TeacherResponse("q1", k, "", "x", sampling={"frames": rule}) for k, rule in enumerate(rules)]}
        return describe_frames([mcq("q1")], pool, RunConfig(video=VideoConfig(**video)), family)

    assert frames({"num_frames": 16}, None) == Summary()
    # The same settings choose other frames for another family.
    (warning,) = frames({"num_frames": 16}, {"num_frames": 16, "family": "qwen2_vl"}).warnings
    assert warning.startswith("1 answer of") and "num_frames=16 for a student of the family qwen2_vl, the" in warning
    (warning,) = frames({"num_frames": 16}, {"num_frames": 16, "family": "qwen2_vl"}, family="qwen2_vl").warnings
    assert warning.startswith("1 answer of") and "the student sees video.num_frames=16 for a student of the" in warning
    # The model has not been downloaded, so only the settings are compared.
    assert frames({"num_frames": 16}, {"num_frames": 16, "family": "qwen2_vl"}, family=None) == Summary()
    assert len(frames({"num_frames": 8, "family": "qwen2_vl"}, family=None).warnings) == 1
    by_rate = {"fps": 2.0, "min_frames": 4, "max_frames": 768}
    assert frames(by_rate, num_frames=None, fps=2.0) == Summary()
    (warning,) = frames({"num_frames": 16}, {"num_frames": 64}, by_rate).warnings
    assert warning.startswith("2 answers of the teacher to frames that the student does not see (the teacher saw ")
    assert "video.num_frames=64, the student sees video.num_frames=16" in warning
    assert frames("base64", "file").lines == ["  whole videos: 2 answers to frames that the server chose"]


def test_unused_answers_are_counted():
    others = [TeacherResponse("q1", 4 + k, "", "B", model=f"m{k}") for k in range(2)]
    others += [TeacherResponse(f"x{index}", k, "", "B") for index in range(6) for k in range(2)]
    summary = described(NATURAL, others=others)
    assert summary.lines[-2:] == [
        "  not used: 12 answers to ids that no question has (x0, x1, x2, x3, x4, …)",
        "  not used: 2 answers after the first 4 (teacher.responses)",
    ]
    # Six models wrote the responses, and the first three are named.
    assert (
        described(["B"], others=others[:2], responses=6)
        .lines[0]
        .startswith("teacher: 3 answers of gpt, m0, m1, up to K=6 of each question (1 question has 3)")
    )
    many = [TeacherResponse("q1", 4 + k, "", "B", model=f"m{k}") for k in range(3)]
    assert "of gpt, m0, m1, …, up to K=9" in described(["B"], others=many, responses=9).lines[0]


def test_unknown_finish_reasons_are_reported():
    others = [
        TeacherResponse("q1", 4, "", "B"),
        TeacherResponse("q1", 5, "", "B", finish_reason="FINISH_REASON_UNSPECIFIED"),
    ]
    others += [TeacherResponse("q1", 6 + k, "", "B", finish_reason=word) for k, word in enumerate(("odd", "odd", "x"))]
    summary = described(NATURAL, others=others, responses=9)
    assert "  no finish_reason: 2 answers; truncation may go undetected" in summary.lines
    warning = summary.warnings[0]
    assert warning.startswith("finish_reason of 3 answers is unknown ('odd' 2, 'x' 1)")


def test_a_task_without_valid_answers_is_a_warning():
    """The spatial questions have no valid answer, and all mcq questions are answered correctly."""
    boxes = [Question(f"s{i}", "Where?", "spatial", videos=("/v.mp4",), answer="1,2,3,4") for i in range(3)]
    count = Question("n", "How many?", "numeric", videos=("/v.mp4",), answer="7")
    summary = described(["White.\n\nB"], [mcq(f"q{i}") for i in range(9)] + boxes, responses=1)
    (warning,) = summary.warnings
    assert warning == "only 0% of the teacher's spatial answers are valid (no_answer 3)"
    # The answers are valid but never right.
    asked = [Question(f"n{i}", "How many?", "numeric", videos=("/v.mp4",), answer="7") for i in range(3)] + [count]
    summary = described(["I count.\n\n2"], [*asked, Question("o", "?", "open", videos=("/v.mp4",))], responses=1)
    (warning,) = summary.warnings
    assert warning.startswith("only 0% of the numeric questions have an answer of quality above 0")


def test_answers_without_reasoning_are_a_warning():
    (warning,) = described(["B", "The answer is B.", "<think>w</think><answer>B</answer>"]).warnings
    assert warning.startswith("67% of the valid answers have no reasoning: a student that imitates them learns to")
    # The text after the answer is its reasoning.
    assert described(["B. milk\n\nIt is white.", "<think>w</think><answer>B</answer>"]).warnings == []


def test_few_valid_answers_are_a_warning_and_almost_none_an_error():
    (warning,) = described(NATURAL, parse="strict").warnings
    assert warning == (
        "only 25% of the teacher's mcq answers are valid (format 3); teacher.parse=natural reads answers in other forms"
    )
    (fault,) = described(["I'm sorry, I can't view videos."] * 4).faults
    assert fault.startswith("teacher pool: 0.0% of 4 answers are valid") and fault.endswith("Reasons: refusal 4")
    # Valid answers that are all wrong are treated the same.
    (fault,) = described(["A"] * 4).faults
    assert "100.0% of 4 answers are valid, and 0.0% of the questions have one" in fault


def test_questions_by_task_and_the_prompt_that_a_teacher_needs():
    inferred = Question("q2", "?", "numeric", videos=("/w.mp4",), answer="3", meta={"inferred": True})
    summary = describe_questions([mcq("q1"), inferred], [mcq("h", videos=("/x.mp4",))])
    assert summary.lines == [
        "questions: 2 (mcq 1, numeric 1); the task types of 1 were inferred from options and answers",
        "held out: 1 (mcq 1)",
        "the user's turn, also for a teacher (question 'q1'):\n  | What is poured?\n  | A. tea\n  | B. milk\n"
        "  | Reply as <think>reasoning</think><answer>option letter</answer>",
    ]
    assert summary.warnings == []


def opened(identity: str, answer: str, **meta) -> Question:
    return Question(identity, "?", "open", videos=(f"/{identity}.mp4",), answer=answer, meta=meta)


def test_positional_ids_are_counted():
    train = [mcq("a"), *(mcq(f"train-{index}", meta={"id_by_position": True}) for index in (1, 2))]
    summary = describe_questions(train, [mcq("held-0", videos=("/w.mp4",), meta={"id_by_position": True})])
    assert summary.lines[2:4] == [
        "ids of 2 training questions come from their positions in the file (train-1, train-2): give each an `id` "
        "before the order changes",
        "ids of 1 held-out question come from their positions in the file (held-0): give each an `id` before the "
        "order changes",
    ]
    assert "position" not in describe_questions([mcq("a")], []).text()


def test_probable_mistakes_are_warnings():
    long = "A man walks to the door."
    (warning,) = describe_questions([opened("a", long), opened("b", long)], []).warnings
    assert "every question is `open`" in warning and "data.task_type" not in warning
    # The setting is for records without a task type.
    (warning,) = describe_questions([opened("a", long, inferred=True)], []).warnings
    assert warning.endswith("name their task type in data.task_type, or in the records, with an answer")
    (same,) = describe_questions([mcq("q1")], [mcq("h")]).warnings
    assert same.startswith(
        "held-out questions that are also training questions: 1 of 1 (h); scores on them say nothing"
    )
    (shared,) = describe_questions([mcq("q1")], [mcq("i", options=("milk", "tea"))]).warnings
    assert shared.startswith("held-out questions about the media of training questions: 1 of 1 (i); scores on them")


def test_shared_media_are_reported_with_equal_questions():
    heldout = [mcq("h"), *(mcq(f"i{index}", options=("milk", "tea")) for index in range(6)), mcq("j", videos=("/w",))]
    same, shared = describe_questions([mcq("q1")], heldout).warnings
    assert "also training questions: 1 of 8 (h)" in same
    assert "media of training questions: 6 of 8 (i0, i1, i2, i3, i4, …)" in shared


@pytest.mark.parametrize(
    "answer",
    [
        *("yes", "No.", "B", "A. tea is poured into it", "(b) milk it is", "2 dogs and 1 cat", "3-5", '{"bbox": [1]}'),
        *("three", "没有", "3只狗", "EXIT"),
    ],
)
def test_open_answers_that_look_closed_are_counted_in_every_file(answer):
    train = [mcq("q"), *(opened(f"o{index}", "A man walks to the door.") for index in range(40))]
    inferred = [opened("x", answer, inferred=True)]
    (warning,) = describe_questions([*train, *inferred], []).warnings
    assert warning.startswith("1 training question without a task type became `open`") and repr(answer) in warning
    (warning,) = describe_questions(train, inferred).warnings
    assert warning.startswith("1 held-out question without a task type")
    # A list of options also makes a question mcq, regardless of the answer.
    listed = replace(opened("l", "The answer is the first one.", inferred=True), question="Which?\nA. tea\nB. milk")
    (warning,) = describe_questions([*train, listed], []).warnings
    assert "with options or an answer like those of a closed question (l: 'The answer is the first one.')" in warning
    # If there are many, only some of them are named.
    assert describe_questions([*train, opened("x", answer)], []).warnings == []
    (warning,) = describe_questions([mcq("q"), opened("x", answer)], []).warnings
    assert warning.startswith("1 open training question with an answer like that of a closed question (x: ")


@pytest.mark.parametrize("answer", ["测试图", "A test.", "a thing", "A man.", "3个人走进房间然后坐下", "red and blue"])
def test_phrases_are_valid_open_answers(answer):
    train = [mcq("q"), opened("x", answer), opened("y", answer, inferred=True)]
    assert describe_questions(train, []).warnings == []


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


def run(*arguments: object) -> int:
    return pool_program.main([str(argument) for argument in arguments])


def test_pool_check_shows_counts_and_examples(files, capsys):
    assert run("check", *files) == 0
    printed = capsys.readouterr().out
    assert "mcq           2        5  60.0%    20.0%   50.0%  two_answers 1, truncated 1" in printed
    assert "  two_answers: several different answers were given\n    1 k=3: 'A or B'" in printed
    assert (
        "  truncated: the response was cut off, at the token limit or by an error of the server\n    2 k=0: '<think>a'"
        in printed
    )
    assert "not used: 1 answer to ids that no question has (other)" in printed
    assert run("check", *files, "teacher.parse=strict") == 0
    assert "format 3" in capsys.readouterr().out
    assert run("check", *files, "teacher.parse=loose") == 2
    assert "teacher.parse: expected one of strict, natural" in capsys.readouterr().err


def test_the_pool_program_refuses_settings_that_it_does_not_read(files, tmp_path, capsys):
    for override in ("sft.steps=3", "teacher.pool=x", "teacher.min_quality=0.5"):
        assert run("check", *files, override) == 2
        key = override.partition("=")[0]
        error = capsys.readouterr().err
        assert f"override: {key} has no effect: pool check reads data.format, " in error and f"leave {key} out" in error
    assert run("repair", *files, "teacher.responses=2", "--output", tmp_path / "new.jsonl") == 2
    assert "teacher.responses has no effect: pool repair reads" in capsys.readouterr().err
    assert run("check", *files, "teacher.responses=2", "data.media_root=.") == 0
    assert run("check", *files, "sft.stepz=3") == 2
    assert "did you mean sft.steps" in capsys.readouterr().err


def test_pool_check_judges_every_answer(files, capsys):
    pool, _ = files
    with pool.open("a") as file:
        refusal = "I'm sorry, I can't view videos."
        file.writelines(json.dumps({"id": 1, "k": 4 + k, "text": refusal}) + "\n" for k in range(4))
    assert run("check", *files) == 0
    printed = capsys.readouterr().out
    assert "teacher: 9 answers, up to K=8 of each question (1 question has 8, 1 question has 1)" in printed
    assert "all answers were checked; a run reads the first teacher.responses=4 per question" in printed
    assert "refusal 4" in printed and "    1 k=6: " in printed


def test_pool_check_shows_examples_before_it_fails(files, capsys):
    pool, _ = files
    lines = [{"id": i, "k": k, "text": "I'm sorry, I can't see it."} for i in (1, 2) for k in range(2)]
    pool.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("check", *files) == 2
    shown = capsys.readouterr()
    assert "  refusal: the teacher declined to answer\n    1 k=0: \"I'm sorry" in shown.out
    assert shown.err.count("rmsd_fast.pool: ") == 1 and "0.0% of 4 answers are valid" in shown.err


def test_pool_check_judges_existing_answers_if_too_many_are_missing(files, capsys):
    pool, _ = files
    pool.write_text("".join(line + "\n" for line in pool.read_text().splitlines() if '"id": 2' not in line))
    assert run("check", *files) == 2
    shown = capsys.readouterr()
    assert "mcq           1        4  75.0%" in shown.out
    assert "  left out: 1 question without an answer (2)" in shown.out and "  two_answers: several" in shown.out
    (fault,) = shown.err.splitlines()
    assert "got them for 1 of 2 (missing: '2'; the pool has '1', 'other')" in fault
    # Up to the share that a run accepts, it is not an error.
    assert run("check", *files, "teacher.max_unanswered_share=0.5") == 0
    assert capsys.readouterr().err == ""


def test_pool_check_reports_swapped_files_once_each(files, capsys):
    pool, questions = files
    assert run("check", questions, pool) == 2
    error = capsys.readouterr().err
    assert error.count("swap the two files") == 2 and "if this is the pool" in error and "remove" not in error


def test_answers_without_a_text_are_counted(files, capsys):
    pool, _ = files
    with pool.open("a") as file:
        file.write(json.dumps({"id": 2, "k": 1, "text": None, "finish_reason": "content_filter"}) + "\n")
        file.write(json.dumps({"id": 2, "k": 2, "text": None, "finish_reason": "stop"}) + "\n")
    assert run("check", *files) == 0
    printed = capsys.readouterr().out
    assert "filtered 1" in printed and "empty 1" in printed


def test_pool_check_reports_the_faults_of_both_files(files, capsys):
    pool, questions = files
    pool.write_text('{"id": 3, "k": 0, "text": "B"}\n{"id": 1, "k": 0}\n')
    box = {"id": 3, "question": "Where?", "videos": ["v.mp4"], "task_type": "spatial", "answer": [0, 0, 1920, 1080]}
    with questions.open("a") as file:
        file.write(json.dumps(box) + "\n")
    assert run("check", *files) == 2
    error = capsys.readouterr().err
    # Boxes in pixels once caused a traceback.
    assert "questions.jsonl:3: field 'answer': expected 'x1,y1,x2,y2'" in error and "1000 * pixels / width" in error
    assert "pool.jsonl:2: field 'text': expected a value" in error
    questions.write_text(questions.read_text().rpartition('{"id": 3')[0])
    pool.write_text('{"id": 3, "k": 0, "text": "B"}\n')
    assert run("check", *files) == 2
    assert "teacher.max_unanswered_share (now 0.05)" in capsys.readouterr().err
    assert run("check", *files, "data.task_type=ocr") == 2
    assert "data.task_type=ocr has no effect" in capsys.readouterr().err


def test_pool_repair_keeps_the_original_text_and_repairs_once(files, tmp_path, capsys):
    pool, questions = files
    output = tmp_path / "repaired.jsonl"
    assert run("repair", pool, questions, "--output", output) == 0
    assert "6 answers, 2 converted to canonical form, 2 invalid, 1 to questions" in capsys.readouterr().out
    repaired = load_pool(output)
    first, second, third, fourth = repaired["1"]
    assert (first.text, first.raw) == ("<think>It is white.</think><answer>B</answer>", NATURAL[0])
    assert (first.valid, first.quality, first.reason, first.usage) == (True, 1.0, None, {"n": 0})
    assert (second.text, second.raw) == ("<think></think><answer>A</answer>", "The answer is A.")
    assert second.quality == 0.0
    assert (third.text, third.raw) == (NATURAL[2], None)
    assert (fourth.text, fourth.raw, fourth.reason, fourth.valid) == ("A or B", None, "two_answers", False)
    assert repaired["other"] == load_pool(pool)["other"] and repaired["2"][0].reason == "truncated"
    # A second repair starts from the original texts.
    assert run("repair", output, questions, "--output", tmp_path / "twice.jsonl") == 0
    assert load_pool(tmp_path / "twice.jsonl") == repaired
    # A response that was sent in another form remains a format violation after the repair.
    for path in (pool, output):
        for parse in ("natural", "strict"):
            capsys.readouterr()
            assert run("check", path, questions, f"teacher.parse={parse}") == 0
            assert "20.0%   50.0%" in capsys.readouterr().out


def test_pool_repair_never_overwrites(files, tmp_path, capsys):
    pool, questions = files
    before = [path.read_text() for path in files]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    for output in (pool, questions, tmp_path, tmp_path / "link.jsonl"):
        assert run("repair", pool, questions, "--output", output) == 2
        assert "expected a new file, got an existing one; choose another name" in capsys.readouterr().err
    assert [path.read_text() for path in files] == before and not (tmp_path / "nothing.jsonl").exists()
    # The folder cannot be created.
    assert run("repair", pool, questions, "--output", pool / "below" / "x.jsonl") == 2
    assert "x.jsonl: cannot be written (" in capsys.readouterr().err
    # The pool belongs to other questions.
    pool.write_text('{"id": 3, "k": 0, "text": "B"}\n')
    assert run("repair", pool, questions, "--output", tmp_path / "new.jsonl") == 2
    assert "got them for 0 of 2" in capsys.readouterr().err and not (tmp_path / "new.jsonl").exists()


def test_questions_without_ground_truth_are_counted():
    questions = [mcq("q1"), mcq("q2", answer=None), mcq("q3", answer=None)]
    summary = described(["B", "B", "A"], questions)
    assert (
        "  without ground truth: 2 closed questions; the quality of their answers is agreement with the other valid "
        "answers, and their rollouts get no content reward"
    ) in summary.lines
    assert summary.warnings[1:] == summary.faults == []
    (fault,) = described(["B", "A"], questions[1:]).faults
    assert "Reasons: no answer is correct or agrees with another" in fault


def test_the_pool_program_reads_questions_without_ground_truth_on_request(files, tmp_path, capsys):
    _, questions = files
    questions.write_text(questions.read_text().replace(', "answer": "B"', ""))
    assert run("check", *files) == 2
    assert "training questions only, set teacher.unlabeled=agreement" in capsys.readouterr().err
    assert run("check", *files, "teacher.unlabeled=agreement") == 0
    printed = capsys.readouterr().out
    # Of B, A and B, the two B agree, so one of the two questions has an answer to imitate.
    assert "mcq           2        5  60.0%    20.0%   50.0%  two_answers 1, truncated 1" in printed
    assert "  without ground truth: 2 closed questions" in printed
    output = tmp_path / "repaired.jsonl"
    assert run("repair", *files, "teacher.unlabeled=agreement", "--output", output) == 0
    # A quality that depends on the number of answers that a run reads is not stored.
    assert [(a.valid, a.quality) for a in load_pool(output)["1"]] == [*[(True, None)] * 3, (False, None)]
