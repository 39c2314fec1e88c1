"""Test the simulated teacher: schema, determinism, consistent reasoning, and the reported statistics."""

import hashlib
import random
from pathlib import Path

import pytest

from rmsd_fast.config import TEACHERS, WORDINGS, TeacherConfig
from rmsd_fast.data.records import DataError, Question
from rmsd_fast.made import errors
from rmsd_fast.made import teacher as teacher_module
from rmsd_fast.made.clips import make_question, sample_content
from rmsd_fast.made.teacher import SimulatedTeacher, is_simulated, simulate_teacher, write_simulated_pool
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES, parse_answer
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.pool import check_pool, load_pool
from rmsd_fast.teacher.scores import score_pool

REPORTED = SimulatedTeacher("reported")
OTHERS = [SimulatedTeacher("biased"), SimulatedTeacher("imprecise"), SimulatedTeacher("blind")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    path.write_bytes(b"the simulated teacher only hashes it")
    return path


def questions_of(clip: Path, count: int) -> list[Question]:
    rng = random.Random(0)
    return [
        make_question(sample_content(rng, heldout=False), task, rng, identity=f"{index}-{task}", clip=clip)
        for index in range(count)
        for task in TASK_TYPES
    ]


def by_id(responses):
    pool = {}
    for response in responses:
        pool.setdefault(response.id, []).append(response)
    return pool


@pytest.fixture(scope="module")
def questions(clip):
    return questions_of(clip, 500)


@pytest.fixture(scope="module")
def reported(questions):
    return by_id(simulate_teacher(questions, k=4, seed=0, teacher=REPORTED))


def test_reported_statistics(questions, reported):
    """Compare with METHOD 1.1 (arXiv 2603.11423); standard errors of 500 inputs per task are below 0.02."""
    cfg = TeacherConfig(responses=4, parse="strict")
    stats = pool_statistics(score_pool(reported, questions, cfg), questions, cfg, simulated=True)
    tasks = stats["tasks"]
    assert stats["closed"]["mean"] == pytest.approx(0.75, abs=0.04)
    assert stats["closed"]["sd_across"] == pytest.approx(0.22, abs=0.03)
    assert tasks["mcq"]["mean"] == pytest.approx(0.96, abs=0.02)
    assert tasks["mcq"]["sd_within"] == pytest.approx(0.07, abs=0.02)
    assert 0.50 <= tasks["ocr"]["mean"] <= 0.85
    assert tasks["spatial"]["sd_within"] == pytest.approx(0.15, abs=0.04)
    assert 0.05 < tasks["temporal"]["sd_within"] < 0.25
    assert 1 - tasks["temporal"]["valid_share"] == pytest.approx(0.10, abs=0.03)
    assert all(tasks[task]["valid_share"] > 0.99 for task in TASK_TYPES if task != "temporal")
    # 1% overall assumes that about one question in twelve is temporal.
    others = [tasks[task]["valid_share"] for task in TASK_TYPES if task != "temporal"]
    overall = (1 - tasks["temporal"]["valid_share"]) / 12 + (1 - sum(others) / 5) * 11 / 12
    assert overall == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize("rate", [0.0, 0.35, 1.0])
def test_error_rate(questions, rate):
    pool = by_id(simulate_teacher(questions, k=2, seed=1, teacher=SimulatedTeacher(error_rate=rate)))
    scores = score_pool(pool, questions, TeacherConfig(responses=2, parse="strict"))
    for task in CLOSED_TASKS:
        rows = [answer for q in questions if q.task_type == task for answer in scores[q.id]]
        exact = sum(row.quality == 1.0 for row in rows if row.valid) / sum(row.valid for row in rows)
        expected = (1 - rate) ** errors.ERROR_FACTORS[task]
        assert exact == pytest.approx(expected, abs=0.045), task


def test_errors_are_of_several_sizes(questions):
    pool = by_id(simulate_teacher(questions, k=4, seed=0, teacher=SimulatedTeacher(error_rate=1.0)))
    scores = score_pool(pool, questions, TeacherConfig(parse="strict"))
    for task in ("temporal", "spatial", "ocr"):
        own = [answer for question in questions if question.task_type == task for answer in scores[question.id]]
        values = {round(answer.quality, 2) for answer in own}
        assert 0.0 in values and any(0.3 <= value < 1 for value in values), task


def test_best_of_four_beats_one_response(questions):
    pool = by_id(simulate_teacher(questions, k=4, seed=0, teacher=SimulatedTeacher(error_rate=0.35)))
    scores = score_pool(pool, questions, TeacherConfig(parse="strict"))
    closed = [[a.quality for a in scores[q.id]] for q in questions if q.task_type in CLOSED_TASKS]
    assert sum(max(row) for row in closed) / len(closed) > 0.95
    assert sum(row[0] for row in closed) / len(closed) < 0.75


def test_independent_of_k_order_and_other_questions(questions):
    few, teacher = questions[:12], SimulatedTeacher(error_rate=0.5)
    whole = by_id(simulate_teacher(few, k=4, seed=3, teacher=teacher))
    assert by_id(simulate_teacher(few[::-1], k=4, seed=3, teacher=teacher)) == whole
    (alone,) = by_id(simulate_teacher(few[4:5], k=2, seed=3, teacher=teacher)).values()
    assert alone == whole[few[4].id][:2]
    other = by_id(simulate_teacher(few, k=4, seed=4, teacher=teacher))
    assert any(a.text != b.text for i in whole for a, b in zip(whole[i], other[i], strict=True))


@pytest.mark.parametrize("teacher", [SimulatedTeacher(error_rate=0.6), *OTHERS], ids=lambda teacher: teacher.kind)
def test_reasoning_agrees_with_the_answer(questions, teacher):
    for response in simulate_teacher(questions[:600], k=2, seed=0, teacher=teacher):
        question = next(q for q in questions if q.id == response.id)
        value = parse_answer(response.text, question.task_type, question.options)
        if value is None:
            continue
        think = response.text.split("</think>")[0]
        made = question.meta["made"]
        if question.task_type == "mcq":
            assert f"So {question.options['ABCD'.index(value)]} {value}." in think
        elif question.task_type == "temporal":
            assert f"The light is on from {value[0]:g} to {value[1]:g}." in think
        elif question.task_type == "spatial":
            center = [(value[axis] + value[axis + 2]) / 2 for axis in (0, 1)]
            assert ("left" in think, "right" in think) == (center[0] < 500, center[0] > 500)
            assert ("top" in think, "bottom" in think) == (center[1] < 500, center[1] > 500)
        elif question.task_type == "numeric":
            assert f"{value:g} {made['dot_color']} dots" in think
        elif question.task_type == "ocr":
            assert f"reads {value}." in think
        elif question.task_type == "open":
            assert value.split(" at ")[0] in think


def test_wrong_answers_stay_in_the_task_format(questions):
    for response in simulate_teacher(questions, k=1, seed=0, teacher=SimulatedTeacher(error_rate=1.0)):
        question = next(q for q in questions if q.id == response.id)
        value = parse_answer(response.text, question.task_type, question.options)
        if value is None or question.task_type == "open":
            continue
        assert quality_score(response.text, question.task_type, question.answer, options=question.options) < 1
        if question.task_type == "temporal":
            assert 0 <= value[0] < value[1] <= question.duration
        if question.task_type == "spatial":
            assert 0 <= value[0] < value[2] <= 1000 and 0 <= value[1] < value[3] <= 1000


def test_there_are_several_kinds_of_format_violations(questions, monkeypatch):
    monkeypatch.setattr(teacher_module, "OTHER_VIOLATIONS", 1.0)
    monkeypatch.setattr(teacher_module, "VIOLATION_RATES", {})
    texts = []
    for response in simulate_teacher(questions, k=1, seed=0, teacher=SimulatedTeacher(error_rate=0.0)):
        question = next(q for q in questions if q.id == response.id)
        assert parse_answer(response.text, question.task_type, question.options) is None, response.text
        texts.append(response.text)
        assert (response.finish_reason == "length") <= ("</answer>" not in response.text)
    assert any(text.startswith("<answer>") for text in texts)
    assert any(text.endswith("</answer> I am sure.") for text in texts)
    assert any("</think>" not in text for text in texts)
    assert any("-" in text for text in texts) and any("about " in text for text in texts)


@pytest.mark.parametrize(
    ("teacher", "name", "digest"),
    [
        (SimulatedTeacher(), "pool-c78a8d0b6a5d.jsonl", "dbe8a23d8a957b3f"),
        (REPORTED, "pool-c7b0d3b82f71.jsonl", "34f856d1e1975d8f"),
    ],
    ids=["noisy", "reported"],
)
def test_pools_of_the_first_two_kinds_stay_as_they_were(clip, tmp_path, teacher, name, digest):
    """Name and SHA-256 of the pools that the code made before there were other kinds (version 2)."""
    path = write_simulated_pool(tmp_path, questions_of(clip, 20), k=4, seed=0, teacher=teacher)
    assert path.name == name
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == digest


def test_every_teacher_has_a_pool_of_its_own(clip, tmp_path):
    questions = questions_of(clip, 2)
    teachers = [SimulatedTeacher(kind, wording=wording) for kind in TEACHERS for wording in WORDINGS]
    paths = [write_simulated_pool(tmp_path, questions, k=1, seed=0, teacher=teacher) for teacher in teachers]
    assert len(set(paths)) == 10
    assert len({load_pool(path)[questions[0].id][0].key for path in paths}) == 10
    # Other kinds ignore the rate.
    other = SimulatedTeacher("blind", error_rate=0.9)
    assert write_simulated_pool(tmp_path, questions, k=1, seed=0, teacher=other) in paths


def test_pool_file(clip, tmp_path):
    questions = questions_of(clip, 3)
    path = write_simulated_pool(tmp_path, questions, k=2, seed=0, teacher=SimulatedTeacher(error_rate=0.35))
    pool = load_pool(path)
    check_pool(pool, questions, check_media=True)
    assert is_simulated(pool) and {len(row) for row in pool.values()} == {2}
    assert {r.model for row in pool.values() for r in row} == {"simulated"}
    stamp = path.stat().st_mtime_ns
    assert write_simulated_pool(tmp_path, questions, k=2, seed=0, teacher=SimulatedTeacher(error_rate=0.35)) == path
    assert path.stat().st_mtime_ns == stamp
    assert write_simulated_pool(tmp_path, questions, k=2, seed=0, teacher=REPORTED) != path
    assert write_simulated_pool(tmp_path, questions[1:], k=2, seed=0, teacher=SimulatedTeacher(error_rate=0.35)) != path


def real(clip, task, answer, **fields):
    return Question(f"r-{task}-{answer}", "What?", task, videos=(str(clip),), answer=answer, **fields)


@pytest.mark.parametrize(
    "teacher",
    [REPORTED, SimulatedTeacher(error_rate=0.0), SimulatedTeacher(error_rate=1.0), *OTHERS],
    ids=lambda teacher: f"{teacher.kind}-{teacher.error_rate}",
)
def test_questions_without_generated_content(clip, teacher):
    """Questions without generated content, some of which hardly allow wrong answers."""
    questions = [
        real(clip, "mcq", "B", options=("A. a cat", "B. a dog")),
        real(clip, "mcq", "C"),
        real(clip, "temporal", "0.0 to 0.5", duration=0.5),
        real(clip, "temporal", "12.5 to 20.0"),
        real(clip, "spatial", "0,0,1000,1000"),
        real(clip, "spatial", "10,20,400,900"),
        real(clip, "numeric", "0"),
        real(clip, "numeric", "-2.5"),
        real(clip, "ocr", "TAXI to Gare du Nord"),
        real(clip, "open", "A dog runs."),
        real(clip, "open", None),
    ]
    pool = by_id(simulate_teacher(questions, k=6, seed=0, teacher=teacher))
    scores = score_pool(pool, questions, TeacherConfig(responses=6, parse="strict"))
    for question in questions:
        answers = scores[question.id]
        assert sum(answer.valid for answer in answers) >= 3, question.id
        if question.task_type != "open" and teacher.kind in ("noisy", "blind"):
            # Without generated content, the teacher `blind` answers all questions correctly.
            is_right = teacher.kind == "blind" or teacher.error_rate == 0.0
            assert all((answer.quality == 1) == is_right for answer in answers if answer.valid), question.id


def test_bad_arguments(clip):
    question = real(clip, "numeric", "3")
    with pytest.raises(ValueError, match="responses: expected at least 1"):
        simulate_teacher([question], k=0, seed=0, teacher=REPORTED)
    with pytest.raises(ValueError, match=r"error_rate: expected a number in \[0, 1\]"):
        SimulatedTeacher(error_rate=1.5)
    with pytest.raises(ValueError, match="teacher: expected one of noisy, reported, biased, imprecise, blind, got 'x'"):
        SimulatedTeacher("x")
    with pytest.raises(ValueError, match="wording: expected one of reference, paraphrased, got 'x'"):
        SimulatedTeacher(wording="x")
    with pytest.raises(ValueError, match="expected a ground truth"):
        simulate_teacher([real(clip, "numeric", None)], k=1, seed=0, teacher=REPORTED)
    with pytest.raises(DataError, match="cannot be read"):
        simulate_teacher([real("/gone.mp4", "numeric", "3")], k=1, seed=0, teacher=REPORTED)
