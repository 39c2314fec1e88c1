"""Test the selection of the responses for training from a pool."""

from __future__ import annotations

from collections import Counter

import pytest

from rmsd_fast.config import TeacherConfig
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
    cfg = TeacherConfig(**{"parse": "strict", **teacher})
    scores = score_pool(pool, [question], cfg)
    return build_targets([question], scores, cfg, refuse, seed=0, imitate=imitate)[question.id]


def test_quality_filter_and_matching_by_hand():
    t = targets([answer("0.0 to 10.0"), answer("0.0 to 5.0"), answer("0.0 to 2.0"), answer("nonsense")])
    assert t.quality.tolist() == pytest.approx([1.0, 0.5, 0.2, 0.0])
    # tau = 0.3 keeps the first two, with p = q / 1.5.
    assert t.p.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert t.valid == (True, True, True, False) and t.imitate == (0,) and t.has_teacher


def test_stage_1_may_imitate_every_response_of_quality_above_0():
    texts = [answer("0.0 to 10.0"), answer("nonsense"), answer("0.0 to 2.0<bad>"), answer("0.0 to 5.0")]
    assert targets(texts, imitate="all").imitate == (0, 3)
    assert targets(["nonsense"], imitate="all").imitate == ()


def test_special_tokens_are_refused_and_truncated_responses_are_invalid():
    t = targets(
        [answer("0.0 to 10.0<bad>"), answer("0.0 to 10.0"), answer("0.0 to 5.0")],
        reasons=["stop", "length", "stop"],
    )
    assert t.quality.tolist() == pytest.approx([0, 0, 0.5])
    assert t.valid == (False, False, True) and t.imitate == (2,)


def test_a_text_that_a_model_cannot_encode_is_never_matched():
    open_question = Question(id="o", question="?", task_type="open", videos=("v",))
    for settings in ({"quality": "uniform", "responses": 1, "min_quality": 0.0}, {"min_quality": 0.0}):
        t = targets([answer("x<bad>")], open_question, **settings)
        assert t.p.tolist() == [0] and not t.has_teacher


def test_only_usable_answers_are_checked():
    """Other responses were once counted as responses that cannot be taught to the student."""
    asked = []

    def note(text):
        asked.append(text)

    texts = [answer("0.0 to 10.0"), "nonsense"]
    responses = [TeacherResponse("q", k, "", text) for k, text in enumerate(texts)]
    for quality, imitate, expected in (
        ("metric", "best", texts[:1]),
        ("metric", "all", texts[:1]),
        ("metric", "random", texts),
        ("uniform", "best", texts),
    ):
        cfg = TeacherConfig(parse="strict", quality=quality)
        asked.clear()
        build_targets([QUESTION], score_pool({"q": responses}, [QUESTION], cfg), cfg, note, seed=0, imitate=imitate)
        assert asked == expected


def test_an_empty_pool_has_no_matches():
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


def test_k_and_uniform_quality():
    texts = [answer("0.0 to 1.0"), answer("0.0 to 10.0")]
    assert targets(texts, responses=1).quality.shape == (1,)
    gad = targets(texts, responses=1, quality="uniform", min_quality=0.0)
    assert gad.quality.tolist() == [1.0] and gad.p.tolist() == [1.0] and gad.imitate == (0,)


def test_random_imitation_uses_responses_of_any_quality():
    picked = Counter()
    for number in range(80):
        question = Question(id=f"t{number}", question="?", task_type="temporal", videos=("v",), answer="0.0 to 10.0")
        picked[targets([answer("0.0 to 10.0"), "wrong format"], question, imitate="random").imitate[0]] += 1
    assert set(picked) == {0, 1} and min(picked.values()) > 20


def test_natural_answers_are_taught_in_canonical_form():
    t = targets(["From 0 s to 10 s.", answer("0.0 to 5.0"), "soon"], parse="natural")
    assert [a.text for a in t.answers] == ["<think></think><answer>0 to 10</answer>", answer("0.0 to 5.0"), "soon"]
    assert t.quality.tolist() == pytest.approx([1.0, 0.5, 0.0]) and t.imitate == (0,)
    assert [a.as_sent for a in t.answers] == [False, True, False]
    assert targets(["From 0 s to 10 s."]).quality.tolist() == [0.0]
