"""Test the selection of the responses for training from a pool."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question
from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.scores import score_pool
from rmsd_fast.teacher.targets import build_targets

QUESTION = Question(id="q", question="When?", task_type="temporal", videos=("v",), answer="0.0 to 10.0")


def refuse(text):
    return "special_token" if "<bad>" in text else None


def answer(text):
    return f"<think>a</think><answer>{text}</answer>"


def targets(texts, question=QUESTION, imitate="best", reasons=None, **teacher):
    reasons = reasons or ["stop"] * len(texts)
    pool = {
        question.id: [
            TeacherResponse(question.id, k, "", text, finish_reason=reason)
            for k, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
    }
    cfg = TeacherConfig(**{"parse": "strict", "weight_power": 1.0, **teacher})
    scores = score_pool(pool, [question], cfg)
    return build_targets([question], scores, cfg, refuse, seed=0, imitate=imitate)[question.id]


def test_quality_filter_and_matching_by_hand():
    t = targets([answer("0.0 to 10.0"), answer("0.0 to 5.0"), answer("0.0 to 2.0"), answer("nonsense")])
    assert t.quality.tolist() == pytest.approx([1.0, 0.5, 0.2, 0.0])
    # tau = 0.3 keeps the first two, with p = q / 1.5.
    assert t.p.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert t.valid == (True, True, True, False) and t.imitate == (0,) and t.has_teacher
    assert t.top == (0,)


def test_the_best_answers_may_be_imitated():
    texts = [answer("0.0 to 5.0"), answer("0.0 to 5.0"), answer("0.0 to 10.0<bad>"), answer("0.0 to 5.0")]
    assert targets(texts).top == (0, 1, 3)
    # The filter applies to them, unless it applies only to matching.
    assert targets(texts, min_quality=0.6).top == ()
    assert targets(texts, min_quality=0.6, filter="matching").top == (0, 1, 3)


def test_stage_1_may_imitate_every_response_that_passes_the_filter():
    texts = [answer("0.0 to 10.0"), answer("nonsense"), answer("0.0 to 2.0<bad>"), answer("0.0 to 5.0")]
    assert targets(texts, imitate="all").imitate == (0, 3)
    assert targets(texts, imitate="all", min_quality=0.6).imitate == (0,)
    assert targets(["nonsense"], imitate="all").imitate == ()


def test_special_tokens_are_refused_and_truncated_responses_are_invalid():
    t = targets(
        [answer("0.0 to 10.0<bad>"), answer("0.0 to 10.0"), answer("0.0 to 5.0")],
        reasons=["stop", "length", "stop"],
    )
    assert t.quality.tolist() == pytest.approx([0, 0, 0.5])
    assert t.valid == (False, False, True) and t.imitate == (2,)


NO_FILTER = {"filter": "none", "weighting": "uniform"}


def test_a_text_that_a_model_cannot_take_is_never_matched():
    open_question = Question(id="o", question="?", task_type="open", videos=("v",))
    for settings in ({**NO_FILTER, "responses": 1}, {"min_quality": 0.0}):
        t = targets([answer("x<bad>")], open_question, **settings)
        assert t.p.tolist() == [0] and not t.has_teacher


def test_only_usable_answers_are_checked():
    """Other responses were once counted as responses that cannot be taught to the student."""
    asked = []

    def note(text):
        asked.append(text)

    texts = [answer("0.0 to 10.0"), "nonsense"]
    responses = [TeacherResponse("q", k, "", text) for k, text in enumerate(texts)]
    for where, imitate, expected in (
        ("both", "best", texts[:1]),
        ("both", "all", texts[:1]),
        ("both", "random", texts[:1]),
        ("matching", "random", texts),
        ("none", "best", texts),
    ):
        cfg = TeacherConfig(parse="strict", filter=where)
        asked.clear()
        build_targets([QUESTION], score_pool({"q": responses}, [QUESTION], cfg), cfg, note, seed=0, imitate=imitate)
        assert asked == expected


@pytest.mark.parametrize(
    ("where", "imitated", "matched"),
    [("both", [0, 1], [0, 1]), ("matching", [0, 1, 2, 3], [0, 1]), ("imitation", [0, 1], [0, 1, 2, 3])],
)
def test_the_filter_of_each_stage(where, imitated, matched):
    texts = [answer("0.0 to 10.0"), answer("0.0 to 5.0"), answer("0.0 to 2.0"), "nonsense", answer("0.0 to 9.0")]
    reasons = ["stop"] * 4 + ["length"]
    t = targets(texts, imitate="all", reasons=reasons, weighting="uniform", filter=where, responses=5)
    assert list(t.imitate) == imitated
    assert t.p.tolist() == pytest.approx([1 / len(matched) if k in matched else 0 for k in range(5)])
    assert t.weight.tolist() == [1.0] * 5 and t.valid == (True, True, True, False, False)
    # With weights that follow the quality, an answer of quality 0 has no weight.
    weighted = targets(texts, imitate="all", reasons=reasons, filter=where, responses=5)
    kept = {0: 1.0, 1: 0.5} if where != "imitation" else {0: 1.0, 1: 0.5, 2: 0.2}
    assert weighted.p.tolist() == pytest.approx([kept.get(k, 0) / sum(kept.values()) for k in range(5)])


def test_truncated_answers_are_neither_imitated_nor_matched():
    texts = [answer("0.0 to 10.0")[:-20], answer("0.0 to 10.0"), "<think>a</think>", " "]
    for imitate in ("best", "all", "random"):
        t = targets(texts, imitate=imitate, reasons=["length", "length", "content_filter", "stop"], **NO_FILTER)
        assert t.imitate == () and not t.has_teacher


def test_a_best_response_below_tau_is_imitated_only_without_the_filter():
    texts = [answer("0.0 to 1.0"), answer("0.0 to 2.0")]
    assert targets(texts).imitate == () and targets(texts, filter="imitation").imitate == ()
    assert targets(texts, filter="matching").imitate == (1,) and targets(texts, filter="none").imitate == (1,)


def test_a_single_sample_is_imitated_even_if_it_is_wrong():
    """It was once left out, which made single-sample imitation a rejection sampling."""
    assert targets([answer("20.0 to 30.0")], responses=1, **NO_FILTER).imitate == (0,)
    assert targets(["nonsense"], responses=1, **NO_FILTER).imitate == (0,)


def test_the_power_of_the_weights():
    t = targets([answer("0.0 to 10.0"), answer("0.0 to 5.0")], weight_power=2.0)
    assert t.p.tolist() == pytest.approx([0.8, 0.2]) and t.weight.tolist() == pytest.approx([1.0, 0.25])
    assert t.quality.tolist() == pytest.approx([1.0, 0.5])


def test_lexical_quality_of_open_answers_by_hand():
    question = Question(id="o", question="?", task_type="open", videos=("v",), answer="a red block at the top")
    texts = [answer("A red block at the left."), answer("red"), answer("blue")]
    t = targets(texts, question, open_quality="lexical", min_quality=0.1)
    # 2 * 5 / 12 and 2 * 1 / 7.
    assert t.quality.tolist() == pytest.approx([10 / 12, 2 / 7, 0.0])
    assert t.p.tolist() == pytest.approx([(10 / 12) / (10 / 12 + 2 / 7), (2 / 7) / (10 / 12 + 2 / 7), 0.0])
    assert t.imitate == (0,)
    assert targets(texts, question).p.tolist() == pytest.approx([1 / 3] * 3)
    unanswered = Question(id="o", question="?", task_type="open", videos=("v",))
    with pytest.raises(DataError, match="expected a reference answer to open question 'o'"):
        targets(texts, unanswered, open_quality="lexical")


def test_an_empty_pool_gives_no_teacher():
    t = targets([answer("nonsense")] * 4)
    assert not t.has_teacher and t.imitate == ()
    none = build_targets([QUESTION], {"q": []}, TeacherConfig(), refuse, seed=0, imitate="best")["q"]
    assert not none.has_teacher and none.imitate == () and none.quality.shape == (0,)


def test_open_questions_match_uniformly_and_imitate_a_valid_one():
    picked = Counter()
    for number in range(60):
        question = Question(id=f"o{number}", question="?", task_type="open", videos=("v",))
        t = targets([answer("x"), "no format", answer("y"), answer("z")], question)
        assert t.p.tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
        picked[t.imitate[0]] += 1
    assert set(picked) == {0, 2, 3}


def test_k_and_uniform_weights():
    texts = [answer("0.0 to 1.0"), answer("0.0 to 10.0")]
    assert targets(texts, responses=1).quality.shape == (1,)
    gad = targets(texts, responses=1, **NO_FILTER)
    assert gad.quality.tolist() == pytest.approx([0.1]) and gad.weight.tolist() == [1.0]
    assert gad.p.tolist() == [1.0] and gad.imitate == (0,)


def test_random_imitation_takes_any_response_that_passes_the_filter():
    picked = Counter()
    for number in range(80):
        question = Question(id=f"t{number}", question="?", task_type="temporal", videos=("v",), answer="0.0 to 10.0")
        texts = [answer("0.0 to 10.0"), "wrong format"]
        picked[targets(texts, question, imitate="random", filter="none").imitate[0]] += 1
        assert targets(texts, question, imitate="random").imitate == (0,)
    assert set(picked) == {0, 1} and min(picked.values()) > 20


def test_natural_answers_are_taught_in_canonical_form():
    t = targets(["From 0 s to 10 s.", answer("0.0 to 5.0"), "soon"], parse="natural")
    assert [a.text for a in t.answers] == ["<think></think><answer>0 to 10</answer>", answer("0.0 to 5.0"), "soon"]
    assert t.quality.tolist() == pytest.approx([1.0, 0.5, 0.0]) and t.imitate == (0,)
    assert [a.as_sent for a in t.answers] == [False, True, False]
    assert targets(["From 0 s to 10 s."]).quality.tolist() == [0.0]


def test_answers_without_ground_truth_are_matched_by_their_agreement():
    question = replace(QUESTION, answer=None)
    t = targets([answer("0 to 4"), answer("2 to 6"), answer("0 to 8"), answer("nonsense")], question)
    # The agreements are 5/12, 5/12 and 1/2, and their sum is 4/3.
    assert t.quality.tolist() == pytest.approx([5 / 12, 5 / 12, 1 / 2, 0])
    assert t.p.tolist() == pytest.approx([5 / 16, 5 / 16, 3 / 8, 0]) and t.imitate == (2,)
    # No other answer agrees with the only valid one, so it does not pass the filter.
    alone = targets([answer("0 to 4"), answer("nonsense")], question)
    assert alone.valid == (True, False) and not alone.has_teacher and alone.imitate == ()
