"""Test errors of the simulated teachers `biased`, `imprecise` and `blind`: shares, and answers at the edges."""

import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.made import errors
from rmsd_fast.made.clips import Content, make_question, sample_content
from rmsd_fast.made.errors import drawn_answer, is_unseen
from rmsd_fast.made.teacher import SimulatedTeacher, simulate_teacher
from rmsd_fast.method.answers import TASK_TYPES, parse_answer_body
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.scores import score_pool

DRAWS = 2000
# Four standard errors of a share of 0.35 to 0.70 over 2,000 draws: 4 * sqrt(0.25 / 2000).
TOLERANCE = 0.045


def question_of(task, *, box=(250, 500, 750, 1000), start=3, end=5, sign="H 4", dots=3, clip=Path("c.mp4"), name="x"):
    content = Content("red", "block", box, start, end, sign, dots, "yellow", 2**dots - 1)
    return make_question(content, task, random.Random(0), identity=name, clip=clip, letter="B")


def shares_of(question, kind):
    rng = random.Random(0)
    counts = Counter(drawn_answer(question, kind, rng) for _ in range(DRAWS))
    return {answer: count / DRAWS for answer, count in counts.items()}


def quality(question, answer):
    return quality_score(f"<think></think><answer>{answer}</answer>", question.task_type, question.answer)


def wrong_share(question, shares, named):
    """Return the share of the remaining answers, all of which must have almost nothing in common with the truth."""
    rest = {answer: share for answer, share in shares.items() if answer not in named}
    assert len(rest) > 1 and all(quality(question, answer) <= 0.2 for answer in rest), rest
    return sum(rest.values())


def test_every_kind_adds_up_to_1():
    for shares in (*errors.ERROR_SHARES.values(), errors.UNSEEN_SHARES):
        assert shares.exact + shares.slight + shares.shifted + shares.wrong == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "slight", "shifted"),
    [
        # The light is on from 3 to 5. IoU 2/3 and 1/3.
        ("temporal", "3.0 to 6.0", "4.0 to 6.0"),
        # The box is 250,500,750,1000. IoU 2/3 and 1/3.
        ("spatial", "250,500,1000,1000", "500,500,1000,1000"),
    ],
)
def test_biased_shares(task, slight, shifted):
    question = question_of(task)
    shares = shares_of(question, "biased")
    assert shares[question.answer] == pytest.approx(0.05, abs=TOLERANCE / 2)
    assert shares[slight] == pytest.approx(0.10, abs=TOLERANCE / 2)
    assert shares[shifted] == pytest.approx(0.70, abs=TOLERANCE)
    assert wrong_share(question, shares, (question.answer, slight, shifted)) == pytest.approx(0.15, abs=TOLERANCE)
    assert quality(question, slight) == pytest.approx(2 / 3) and quality(question, shifted) == pytest.approx(1 / 3)


def test_biased_counts():
    shares = shares_of(question_of("numeric"), "biased")
    assert shares["3"] == pytest.approx(0.05, abs=TOLERANCE / 2)
    assert shares["4"] == pytest.approx(0.80, abs=TOLERANCE)
    # Off by two or three, and a positive number of dots stays positive.
    assert set(shares) == {"3", "4", "1", "5", "6"}


@pytest.mark.parametrize(
    ("task", "truth", "biased"),
    [
        # The end of the clip of 8 s: the end cannot move, so the start does in both kinds of error.
        ("temporal", {"start": 4, "end": 8}, {"5.0 to 8.0"}),
        # An interval of one second cannot become shorter by a whole second.
        ("temporal", {"start": 7, "end": 8}, {"7.5 to 8.0"}),
        ("temporal", {"start": 6, "end": 7}, {"6.0 to 8.0", "7.0 to 8.0"}),
        ("spatial", {"box": (500, 0, 1000, 500)}, {"750,0,1000,500"}),
        ("spatial", {"box": (0, 250, 500, 750)}, {"0,250,750,750", "250,250,750,750"}),
    ],
)
def test_bias_at_the_edges(task, truth, biased):
    question = question_of(task, **truth)
    shares = shares_of(question, "biased")
    assert sum(shares[answer] for answer in biased) == pytest.approx(0.80, abs=TOLERANCE)
    assert shares[question.answer] == pytest.approx(0.05, abs=TOLERANCE / 2)


def test_imprecise_shares():
    question = question_of("temporal")
    shares = shares_of(question, "imprecise")
    edges, shifts = ("2.0 to 5.0", "4.0 to 5.0", "3.0 to 4.0", "3.0 to 6.0"), ("2.0 to 4.0", "4.0 to 6.0")
    assert shares["3.0 to 5.0"] == pytest.approx(0.30, abs=TOLERANCE)
    assert all(shares[answer] == pytest.approx(0.35 / 4, abs=TOLERANCE / 2) for answer in edges)
    assert all(shares[answer] == pytest.approx(0.20 / 2, abs=TOLERANCE / 2) for answer in shifts)
    assert wrong_share(question, shares, ("3.0 to 5.0", *edges, *shifts)) == pytest.approx(0.15, abs=TOLERANCE)
    question = question_of("spatial")
    shares = shares_of(question, "imprecise")
    # The box touches the lower edge of the frame: seven moves of an edge and three shifts are possible.
    edges = [
        "0,500,750,1000", "500,500,750,1000", "250,250,750,1000", "250,750,750,1000", "250,500,500,1000",
        "250,500,1000,1000", "250,500,750,750",
    ]  # fmt: skip
    shifts = ["0,500,500,1000", "500,500,1000,1000", "250,250,750,750"]
    assert shares[question.answer] == pytest.approx(0.30, abs=TOLERANCE)
    assert all(shares[answer] == pytest.approx(0.35 / 7, abs=TOLERANCE / 2) for answer in edges)
    assert all(shares[answer] == pytest.approx(0.20 / 3, abs=TOLERANCE / 2) for answer in shifts)
    shares = shares_of(question_of("numeric"), "imprecise")
    assert shares["3"] == pytest.approx(0.30, abs=TOLERANCE)
    assert shares["2"] == pytest.approx(0.55 / 2, abs=TOLERANCE) == shares["4"]


def test_the_best_of_four_of_a_biased_teacher(tmp_path):
    """The expected values are computed by hand for a light from 3 to 5, with the 10% of temporal answers that break the
    format.

    The shares of the qualities 1, 2/3, 1/3 and at most 0.2 are 0.045, 0.09, 0.63 and 0.135; 0.1 of the answers are
    invalid. The best of four is 1 with a probability of 1 - 0.955**4 = 0.1682, 2/3 with 0.955**4 - 0.865**4 = 0.2719,
    and 1/3 with 0.865**4 - 0.235**4 = 0.5568. Mean: 0.1682 + 0.1813 + 0.1856 = 0.5351. One of the three wrong intervals
    in ten that overlap has an IoU of 0.2, which adds less than 0.0005.
    """
    clip = tmp_path / "c.mp4"
    clip.write_bytes(b"x")
    questions = [question_of("temporal", clip=clip, name=f"q{index}") for index in range(DRAWS)]
    rows = _qualities(questions, "biased")
    # Standard error of the mean: sd 0.27 / sqrt(2000) = 0.006.
    assert sum(map(max, rows)) / DRAWS == pytest.approx(0.5351, abs=0.02)
    # One answer: 0.045 + 0.09 * 2/3 + 0.63 / 3 = 0.315, and 0.135 times the mean IoU of the wrong ones, below 0.027.
    assert 0.315 - 0.01 < sum(map(sum, rows)) / 4 / DRAWS < 0.342 + 0.01


def _qualities(questions, kind):
    pool = {}
    for response in simulate_teacher(questions, k=4, seed=0, teacher=SimulatedTeacher(kind)):
        pool.setdefault(response.id, []).append(response)
    scores = score_pool(pool, questions, TeacherConfig(parse="strict"))
    return [[answer.quality for answer in scores[question.id]] for question in questions]


def test_all_intervals_and_boxes_stay_valid():
    rng = random.Random(0)
    intervals = [(start, start + length) for start, length in product(range(2, 8), (1, 2, 3, 4)) if start + length <= 8]
    boxes = [(x, y, x + 500, y + 500) for x, y in product((0, 250, 500), repeat=2)]
    questions = [question_of("temporal", start=a, end=b) for a, b in intervals]
    questions += [question_of("spatial", box=box) for box in boxes]
    for question, kind, _ in product(questions, ("biased", "imprecise", "blind"), range(60)):
        low, *rest = parse_answer_body(drawn_answer(question, kind, rng), question.task_type)
        if question.task_type == "temporal":
            assert 0 <= low < rest[0] <= 8
        else:
            assert 0 <= low < rest[1] <= 1000 and 0 <= rest[0] < rest[2] <= 1000


def test_blind_to_one_kind_of_content(tmp_path):
    clip = tmp_path / "c.mp4"
    clip.write_bytes(b"x")
    rng = random.Random(0)
    for task in TASK_TYPES:
        contents = [sample_content(rng, heldout=False) for _ in range(400)]
        questions = [make_question(c, task, rng, identity=f"{i}", clip=clip) for i, c in enumerate(contents)]
        unseen = [question for question in questions if is_unseen(question)]
        # 6 of 18 intervals, 2 of 7 numbers, 2 of 6 digits, 3 of 9 boxes; four standard errors are 0.095.
        assert len(unseen) / 400 == pytest.approx(2 / 7 if task == "numeric" else 1 / 3, abs=0.095), task
        for question in questions:
            right = drawn_answer(question, "blind", rng) == question.answer
            assert right is not is_unseen(question), question
        if task != "open":
            rows = _qualities(questions, "blind")
            missed = [max(row) for row, question in zip(rows, questions, strict=True) if is_unseen(question)]
            # No answer to these questions passes the filter of quality.
            assert max(missed) <= 0.2 < TeacherConfig().min_quality, task


def test_blind_to_a_late_light():
    assert [is_unseen(question_of("temporal", start=start, end=8)) for start in (4, 5, 6, 7)] == [False] + [True] * 3
    assert [is_unseen(question_of("numeric", dots=dots)) for dots in (5, 6, 7)] == [False, True, True]
    assert [is_unseen(question_of("ocr", sign=sign)) for sign in ("H 5", "H 7", "C 8")] == [False, True, True]
    for task in ("mcq", "spatial", "open"):
        assert not is_unseen(question_of(task)) and is_unseen(question_of(task, box=(500, 250, 1000, 750)))


def test_other_task_types_err_like_noisy():
    for task, kind in product(("mcq", "ocr", "open"), ("biased", "imprecise")):
        question = question_of(task)
        expected = 0.65 ** errors.ERROR_FACTORS[task]
        assert shares_of(question, kind)[question.answer] == pytest.approx(expected, abs=TOLERANCE), (task, kind)


def test_without_a_duration_the_end_is_late_too():
    question = Question("q", "When?", "temporal", videos=("v.mp4",), answer="12.0 to 20.0")
    assert {"12.0 to 21.0", "13.0 to 21.0"} < set(shares_of(question, "biased"))
