"""Test the numbers and the recommendations of the pool report on small pools worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question
from rmsd_fast.method.matching import passes_filter
from rmsd_fast.teacher.agreement_check import agreement_check
from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.pool_advice import advise
from rmsd_fast.teacher.pool_analysis import analyze_pool
from rmsd_fast.teacher.pool_gain import stage2_gain
from rmsd_fast.teacher.pool_rows import pool_rows
from rmsd_fast.teacher.scores import score_pool
from rmsd_fast.teacher.usage import Prices, read_usage


def question(identity, task, answer, **fields):
    return Question(identity, "?", task, videos=("v.mp4",), answer=answer, **fields)


def answers(identity, *said, **fields):
    """Return answers to a question; `None` stands for an invalid answer."""
    return [
        TeacherResponse(
            identity, k, "", "no answer" if a is None else f"<think>t{k}</think><answer>{a}</answer>", **fields
        )
        for k, a in enumerate(said)
    ]


def analyzed(pool, questions, **teacher):
    return analyze_pool(pool, questions, TeacherConfig(parse="strict", **teacher), simulated=False)


INTERVALS = [question(f"t{i}", "temporal", "0 to 10") for i in range(2)]
# Qualities 1, 0.5, 0.2 and 0 (invalid); 0.5, 0.5, 0.5 and 0.5.
POOL = {
    "t0": answers("t0", "0 to 10", "0 to 5", "0 to 2", None),
    "t1": answers("t1", "0 to 5", "5 to 10", "0 to 5", "0 to 5"),
}


def test_kept_shares_and_best_of_k_by_hand():
    analysis = analyzed(POOL, INTERVALS, responses=2)
    kept = analysis["kept"]
    shares = {tau: (a, q) for tau, a, q in zip(kept["tau"], *kept["groups"]["temporal"].values(), strict=True)}
    # Of eight answers: seven above 0, six of at least 0.3, one of at least 0.6.
    assert [shares[tau][0] for tau in (0.0, 0.2, 0.3, 0.5, 0.6, 1.0)] == [7 / 8, 7 / 8, 6 / 8, 6 / 8, 1 / 8, 1 / 8]
    # At 0.3, the first question has two kept answers of four: 1 - 1/6 of the pairs contain one. At 0.6, half of them.
    assert shares[0.3][1] == pytest.approx((5 / 6 + 1) / 2) and shares[0.6][1] == pytest.approx(0.25)
    at = kept["at"]["temporal"]
    assert (at["answers"]["value"], at["questions"]["mean"]) == (0.75, pytest.approx(11 / 12))
    assert at["answers"]["low"] == 0.5 and at["answers"]["high"] == 1.0
    best = analysis["best_of"]["groups"]["closed"]["quality"]
    # Sorted: 0, 0.2, 0.5, 1. Pairs: 0.2, 0.5, 1, 0.5, 1, 1. Triples: 0.5, 1, 1, 1.
    assert [point["mean"] for point in best] == pytest.approx(
        [(0.425 + 0.5) / 2, (4.2 / 6 + 0.5) / 2, (3.5 / 4 + 0.5) / 2, 0.75]
    )
    assert [(s["from"], s["to"]) for s in analysis["best_of"]["groups"]["closed"]["steps"]] == [(1, 2), (2, 4)]
    assert analysis["best_of"]["left_out"] == 0
    assert analysis["means"]["closed"]["mean"] == pytest.approx(0.4625)
    assert analysis["quality"]["all"]["reasons"] == {"format": 1}
    assert analysis["format"]["temporal"]["as_sent"]["value"] == 7 / 8


def test_the_shares_follow_the_filter_of_training():
    values = [0.0, 0.05, 0.15, 0.3, 0.30000000000000004, 0.6, 1.0]
    rows = pool_rows_of(values)
    for tau in (0.0, 0.05, 0.15, 0.3, 0.6, 0.7, 1.0):
        expected = sum(passes_filter(value, tau) for value in values)
        assert int(((rows.quality >= tau) & (rows.quality > 0)).sum()) == expected


def pool_rows_of(qualities):
    asked = [question("t", "temporal", "0 to 10")]
    pool = {"t": answers("t", *["0 to 1"] * len(qualities))}
    scores = score_pool(pool, asked, TeacherConfig(responses=len(qualities)))
    scored = {"t": [answer._replace(quality=q) for answer, q in zip(scores["t"], qualities, strict=True)]}
    return pool_rows(pool, asked, scored)


def test_what_stage_2_leads_to_by_hand():
    scores = score_pool(POOL, INTERVALS, TeacherConfig(parse="strict"))
    gain = stage2_gain(INTERVALS, scores, TeacherConfig(parse="strict", min_quality=0.3))["closed"]
    # The first question keeps the qualities 1 and 0.5, the second four times 0.5.
    for name, first in (
        ("random", 1.7 / 4),
        ("uniform", 0.75),
        ("power_1", 1.125 / 1.25),
        ("power_2", (1 + 0.5**5) / (1 + 0.5**4)),
        ("power_4", (1 + 0.5**9) / (1 + 0.5**8)),
        ("best", 1.0),
    ):
        assert gain[name]["mean"] == pytest.approx((first + 0.5) / 2), name
    assert gain["questions"] == 2 and gain["without"] == 0
    assert gain["power_1-uniform"]["mean"] == pytest.approx(0.15 / 2)
    strict = stage2_gain(INTERVALS, scores, TeacherConfig(parse="strict", min_quality=0.8))["closed"]
    assert (strict["questions"], strict["without"], strict["uniform"]["mean"]) == (1, 1, 1.0)
    # The first answer alone.
    single = stage2_gain(INTERVALS, scores, TeacherConfig(parse="strict", responses=1))["closed"]
    assert single["random"]["mean"] == single["best"]["mean"] == single["power_4"]["mean"] == 0.75
    assert stage2_gain(INTERVALS, {"t0": [], "t1": []}, TeacherConfig()) is None


def test_agreement_against_the_metric_by_hand():
    asked = [question("m", "mcq", "B", options=("x", "y", "z")), question("n", "mcq", "A", options=("x", "y", "z"))]
    pool = {"m": answers("m", "B", "B", "B", "A"), "n": answers("n", "C", "C", "A", None)}
    cfg = TeacherConfig(parse="strict")
    closed = agreement_check(asked, score_pool(pool, asked, cfg), cfg)["closed"]
    # m: agreements 2/3, 2/3, 2/3, 0 and qualities 1, 1, 1, 0. n: 1/2, 1/2, 0 and 0, 0, 1; its fourth is invalid.
    assert (closed["questions"], closed["answers"], closed["differing"]) == (2, 7, 2)
    assert closed["top_best"]["mean"] == 0.5 and closed["random_best"]["mean"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert closed["random_quality"]["mean"] == pytest.approx((3 / 4 + 1 / 3) / 2)
    assert closed["top_quality"]["mean"] == 0.5 and closed["best_quality"]["mean"] == 1.0
    # (0.25 - 1/3) / (0.25 + 2/3), summed over the two questions.
    assert closed["recovered"]["value"] == pytest.approx((0.25 - 1 / 3) / (0.25 + 2 / 3))
    # Agreement keeps five answers, of which three are right. The metric keeps four.
    assert (closed["precision"]["value"], closed["recall"]["value"]) == (0.6, 0.75)
    # Deviations within m: agreement 1/6 three times and -1/2, quality 1/4 three times and -3/4. Within n: agreement
    # 1/6, 1/6 and -1/3, quality -1/3, -1/3 and 2/3.
    covariance = (3 * (1 / 6) * (1 / 4) + 3 / 8) + (-2 * (1 / 6) * (1 / 3) - 2 / 9)
    squares = (3 / 36 + 1 / 4 + 2 / 36 + 1 / 9) * (3 / 16 + 9 / 16 + 2 / 9 + 4 / 9)
    assert closed["within"]["value"] == pytest.approx(covariance / math.sqrt(squares))


def test_agreement_uses_the_first_k_answers():
    asked = [question("m", "mcq", "B", options=("x", "y"))]
    pool = {"m": answers("m", "B", "B", "A", "A", "A")}
    scores = score_pool(pool, asked, TeacherConfig(parse="strict", responses=5))
    check = agreement_check(asked, scores, TeacherConfig(parse="strict", responses=3))
    assert check["responses"] == 3 and check["closed"]["answers"] == 3
    assert check["closed"]["top_best"]["mean"] == 1.0
    single = agreement_check(asked, scores, TeacherConfig(parse="strict", responses=1))
    assert single is None


def test_a_blind_teacher_agrees_on_wrong_answers():
    """Errors that all answers share have full agreement, so the precision is the share of right answers."""
    asked = [question(f"n{i}", "numeric", str(i + 3)) for i in range(6)]
    pool = {q.id: answers(q.id, *[q.answer if i % 2 else "99"] * 4) for i, q in enumerate(asked)}
    check = agreement_check(asked, score_pool(pool, asked, TeacherConfig()), TeacherConfig())["closed"]
    assert check["precision"]["value"] == 0.5 and check["recall"]["value"] == 1.0
    assert check["recovered"] is None and check["top_best"] is None and check["within"] is None


def test_repetitions_lengths_and_different_answers():
    asked = [question("m", "mcq", "B", options=("x", "y")), question("n", "mcq", "A", options=("x", "y"))]
    same = "<think>t</think><answer>B</answer>"
    pool = {
        "m": [TeacherResponse("m", k, "", text) for k, text in enumerate((same, same, "<answer>A</answer>", same))],
        "n": [TeacherResponse("n", 0, "", same, raw="B"), TeacherResponse("n", 1, "", "The answer is A.")],
    }
    analysis = analyze_pool(pool, asked, TeacherConfig(responses=4), simulated=False)
    texts = analysis["texts"]["all"]
    # Two of six repeat an earlier answer. The first text of `n` was sent as "B", which no other answer is.
    assert texts["repeated_share"] == pytest.approx(2 / 6) and texts["elsewhere_share"] == 0
    assert texts["different_answers"] == 2.0 and texts["valid_answers"] == 3.0
    assert texts["characters"]["50"] == np.median([len(same)] * 3 + [18, 1, 16])
    # A text that belongs to both questions.
    pool["n"][1] = TeacherResponse("n", 1, "", same)
    rows = pool_rows(pool, asked, score_pool(pool, asked, TeacherConfig()))
    assert rows.elsewhere.tolist() == [True, True, False, True, False, True]
    assert rows.repeated.tolist() == [False, True, False, True, False, False]


@pytest.mark.parametrize(
    ("usage", "read"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15, "cost": 0.25}, (10, 5, 0.25)),
        ({"input_tokens": 10, "output_tokens": 5}, (10, 5, None)),
        # Reasoning tokens that only the total includes.
        ({"prompt_tokens": 14, "completion_tokens": 1, "total_tokens": 399}, (14, 385, None)),
        ({"prompt_tokens": 14, "completion_tokens": 9, "total_tokens": 20}, (14, 9, None)),
        ({"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 22}, (10, 12, None)),
        ({"promptTokenCount": 10, "candidatesTokenCount": 5, "thoughtsTokenCount": 7}, (10, 12, None)),
        ({"prompt_tokens": "10", "completion_tokens": -5, "cost": True}, (None, None, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": float("inf"), "cost": None}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_usage_of_several_servers(usage, read):
    assert [None if math.isnan(value) else value for value in read_usage(usage)] == list(read)


def test_costs_per_usable_answer():
    pool = {
        "t0": answers("t0", "0 to 10", "0 to 1", None, usage={"prompt_tokens": 100, "completion_tokens": 10}),
        "t1": answers("t1", "0 to 5"),
    }
    usage = analyzed(pool, INTERVALS)["usage"]
    # Three answers report tokens; two of them are valid, and one is kept.
    assert usage["prompt_tokens"] == {
        "answers": 3,
        "total": 300.0,
        "per_answer": 100.0,
        "per_valid": 150.0,
        "per_kept": 300.0,
    }
    assert set(usage) == {"prompt_tokens", "completion_tokens"}
    assert analyzed(POOL, INTERVALS)["usage"] is None


def test_costs_at_prices_by_hand():
    def used(prompt, completion):
        return {"prompt_tokens": prompt, "completion_tokens": completion}

    # Question t0 has a reply with three answers and a reply with one, and t1 has four replies with one.
    usages = {"t0": [used(1000, 300), {"with": 0}, {"with": 0}, used(1000, 60)], "t1": [used(500, 40)] * 4}
    pool = {name: [replace(r, usage=u) for r, u in zip(POOL[name], usages[name], strict=True)] for name in ("t0", "t1")}
    # Answers that only the costs of the whole pool include.
    pool["t1"] = [*pool["t1"], replace(pool["t1"][0], k=9, sampling={"hinted": True})]
    pool["foreign"] = [replace(pool["t0"][3], id="foreign")]
    analysis = analyze_pool(
        pool, INTERVALS, TeacherConfig(parse="strict"), simulated=False, prices=Prices(prompt=2.0, completion=10.0)
    )
    of_k = analysis["cost_of_k"]
    # t0: 3, 4, 5 and 7.6 thousandths; t1: 1.4, 2.8, 4.2 and 5.6.
    means = [point["mean"] for point in of_k["per_question"]]
    assert means == pytest.approx([0.0022, 0.0034, 0.0046, 0.0066]) and of_k["questions"] == 2
    assert of_k["per_question"][0]["low"] == pytest.approx(0.0014)
    # Valid: 2, 4, 6 and 7. Quality of at least 0.3: 2, 4, 5 and 6.
    assert of_k["per_valid"] == pytest.approx([0.0044 / 2, 0.0068 / 4, 0.0092 / 6, 0.0132 / 7])
    assert of_k["per_kept"] == pytest.approx([0.0044 / 2, 0.0068 / 4, 0.0092 / 5, 0.0132 / 6])
    priced = analysis["usage"]["priced"]
    assert (priced["answers"], priced["total"]) == (8, pytest.approx(0.0132))
    assert [priced[key] for key in ("per_answer", "per_valid", "per_kept")] == pytest.approx(
        [0.0132 / 8, 0.0132 / 7, 0.0132 / 6]
    )
    # One more answer with 500 and 40 tokens, and one with 1,000 and 60.
    assert analysis["pool_usage"] == pytest.approx({"prompt_tokens": 5500, "completion_tokens": 620, "priced": 0.0172})
    assert analysis["prices"] == {"prompt": 2.0, "completion": 10.0}
    without = analyzed(pool, INTERVALS)
    assert without["cost_of_k"] is without["prices"] is None and "priced" not in without["usage"]


def test_costs_of_pools_with_few_token_counts():
    prices = Prices(1.0, 1.0)
    counted = {"prompt_tokens": 10, "completion_tokens": 10}
    pool = {"t0": answers("t0", None, None, usage=counted), "t1": answers("t1", "0 to 10", "0 to 10")}
    analysis = analyze_pool(pool, INTERVALS, TeacherConfig(parse="strict"), simulated=False, prices=prices)
    of_k = analysis["cost_of_k"]
    assert analysis["pool_usage"]["priced"] == pytest.approx(4e-5) and analysis["pool_usage"]["unpriced_answers"] == 2
    # Only t0 has token counts, and no valid answer.
    assert of_k["questions"] == 1 and [point["mean"] for point in of_k["per_question"]] == [2e-5, 4e-5]
    assert of_k["per_valid"] == of_k["per_kept"] == [None, None] and of_k["per_question"][0]["low"] is None
    nothing = analyze_pool(POOL, INTERVALS, TeacherConfig(parse="strict"), simulated=False, prices=prices)
    assert nothing["cost_of_k"] is nothing["usage"] is None and nothing["pool_usage"] == {}


def test_several_teachers_are_compared_on_the_same_questions():
    pool = {
        "t0": answers("t0", "0 to 10", "0 to 10", model="a")
        + [replace(r, k=2) for r in answers("t0", "0 to 5", model="b")],
        "t1": answers("t1", "0 to 5", model="a"),
    }
    first, second = analyzed(pool, INTERVALS)["models"]
    assert (first["model"], first["quality"]["mean"], first["difference"]) == ("a", 0.75, None)
    # b answered only the first question, where a has quality 1.
    assert (second["model"], second["difference"]["mean"], second["difference"]["n"]) == ("b", -0.5, 1)
    assert analyzed(POOL, INTERVALS)["models"] is None


def test_agreement_is_never_mixed_with_the_metric():
    unlabeled = question("u", "temporal", None)
    pool = POOL | {"u": answers("u", "0 to 8", "0 to 8", "0 to 8", "0 to 8")}
    analysis = analyzed(pool, [*INTERVALS, unlabeled], unlabeled="agreement")
    assert analysis["means"]["closed"]["mean"] == pytest.approx(0.4625) and analysis["means"]["unlabeled"]["mean"] == 1
    assert analysis["quality"]["tasks"]["temporal"]["unlabeled"] == 0
    assert analysis["agreement_quality"]["tasks"]["temporal"]["mean"] == 1
    assert "unlabeled" not in analysis["best_of"]["groups"] and "unlabeled" in analysis["kept"]["groups"]


def subjects(analysis):
    return {advice.subject.split(" ")[0]: advice for advice in advise(analysis)}


def test_advice_about_k():
    many = [question(f"t{i}", "temporal", "0 to 10") for i in range(200)]
    same = {q.id: answers(q.id, *["0 to 6"] * 4) for q in many}
    k = subjects(analyzed(same, many))["K"]
    assert k.value == "4" and "No need to collect more: from K = 1 to 2" in k.reason
    assert k.subject == "K (collect.k)"
    # A doubling that pays, but fewer answers than the paper's K.
    pairs = {q.id: answers(q.id, "0 to 2", "0 to 9") for q in many}
    k = subjects(analyzed(pairs, many))["K"]
    assert k.value == "4" and "The last doubling pays: from K = 1 to 2" in k.reason
    assert "does not show whether 4 would pay; to find out, collect 4 answers" in k.reason
    equal = {q.id: answers(q.id, "0 to 6", "0 to 6") for q in many}
    k = subjects(analyzed(equal, many))["K"]
    assert k.value == "4" and "More answers may add little: from K = 1 to 2" in k.reason
    # Every question has one good answer among four.
    spread_out = {q.id: answers(q.id, "0 to 2", "0 to 3", "0 to 4", "0 to 9") for q in many}
    k = subjects(analyzed(spread_out, many))["K"]
    assert k.value == "4" and "does not show whether 8 would pay; to find out, collect 8" in k.reason
    # Two questions show nothing for certain, so the paper's K stays.
    k = subjects(analyzed(POOL, INTERVALS))["K"]
    assert k.value == "4" and "does not show whether more answers pay: from K = 1 to 2" in k.reason
    single = {q.id: answers(q.id, "0 to 6") for q in many}
    k = subjects(analyzed(single, many))["K"]
    assert k.value == "4" and "Most questions have one answer" in k.reason


def test_few_questions_are_named_first():
    def warning(intervals, numbers=0, k=2):
        asked = [question(f"t{i}", "temporal", "0 to 10") for i in range(intervals)]
        asked += [question(f"n{i}", "numeric", "3") for i in range(numbers)]
        said = {"temporal": ["0 to 5", "0 to 9"], "numeric": ["3", "4"]}
        first, *_ = advise(analyzed({q.id: answers(q.id, *said[q.task_type][:k]) for q in asked}, asked))
        return first

    few = warning(49)
    assert few.subject == "too few questions" and few.value == ""
    assert "fewer than 50 questions: K 49, tau 49, weights 49, agreement 49. With 49 questions" in few.reason
    # 0.98 / sqrt(49) = 0.14, and 1 - 0.05 ** (1 / 49) = 0.059.
    assert "to ±14 percentage points" in few.reason and "may still occur in 6% of them" in few.reason
    assert "Add questions with ground truth before you rely on this advice. Numbers by task type" in few.reason
    assert few.reason.endswith("come from fewer than 50 questions for: temporal 49.")
    assert "With 1 question, a share near a half is known only to ±98 percentage points" in warning(1).reason
    # One answer to each question says nothing about agreement.
    assert "K 10, tau 10, weights 10. With" in warning(10, k=1).reason
    assert warning(50).subject == "K (collect.k)"
    mixed = warning(49, 1)
    assert mixed.subject == "few questions" and mixed.reason.endswith("for: temporal 49, numeric 1.")


def test_advice_counts_lucky_guesses():
    asked = [question(f"m{i}", "mcq", "B", options=("w", "x", "y", "z")) for i in range(100)]
    pool = {q.id: answers(q.id, *"ABCD") for q in asked}
    analysis = analyzed(pool, asked)
    assert analysis["best_of"]["groups"]["mcq"]["chance"] == pytest.approx([1 - 0.75**k for k in (1, 2, 3, 4)])
    assert "4 random guesses contain the right option in 68% of cases" in subjects(analysis)["K"].reason


@pytest.mark.parametrize(
    ("said", "value", "words"),
    [
        (("0 to 10", "0 to 8", "0 to 5", "0 to 1"), "0.3", "its teacher kept 72%"),
        (("0 to 10", "0 to 2.5", "0 to 2", "0 to 1"), "0.2", "At 0.2, 75% are kept"),
        (("0 to 10", None, None, None), "0.3", "same effect"),
        (("0 to 9", None, None, None), "0.3", "No tau helps: 75% of the answers have quality 0"),
    ],
)
def test_advice_about_tau(said, value, words):
    pool = {q.id: answers(q.id, *said) for q in INTERVALS}
    tau = subjects(analyzed(pool, INTERVALS))["tau"]
    assert tau.value == value and words in tau.reason


def test_tau_changes_only_if_the_interval_supports_it():
    def tau(kept_questions, count):
        asked = [question(f"t{i}", "temporal", "0 to 10") for i in range(count)]
        said = [("0 to 9", "0 to 9") if i < kept_questions else ("0 to 2", "0 to 2") for i in range(count)]
        return subjects(analyzed({q.id: answers(q.id, *a) for q, a in zip(asked, said, strict=True)}, asked))["tau"]

    # 40% are kept at 0.3. Of ten questions, the interval contains a half; of 1,000, it does not.
    few = tau(4, 10)
    assert few.value == "0.3" and "too few questions to show that it keeps too little" in few.reason
    assert tau(400, 1000).value == "0.2"


def test_answers_that_depend_on_others_are_only_counted():
    def with_marks(responses, *marks):
        return [replace(r, sampling={mark: True} if mark else {}) for r, mark in zip(responses, marks, strict=True)]

    plain = {"t0": answers("t0", "0 to 5", "0 to 10"), "t1": answers("t1", "0 to 1", "0 to 2")}
    marked = {
        "t0": with_marks(answers("t0", "0 to 5", "0 to 10", "0 to 9"), "", "", "adaptive"),
        "t1": with_marks(answers("t1", "0 to 1", "0 to 2", "0 to 10", "0 to 10"), "", "", "adaptive", "hinted"),
    }
    expected, got = analyzed(plain, INTERVALS), analyzed(marked, INTERVALS)
    assert expected["counts"].pop("marked") == 0 and got["counts"].pop("marked") == 3
    assert got == expected and got["means"]["closed"]["mean"] == pytest.approx((0.75 + 0.15) / 2)
    with pytest.raises(DataError, match="got only adaptive or hinted ones"):
        analyzed({"t0": with_marks(answers("t0", "0 to 5"), "adaptive")}, INTERVALS)


def test_agreement_that_keeps_nothing():
    asked = [question(f"m{i}", "mcq", "B", options=("x", "y", "z")) for i in range(20)]
    reason = subjects(analyzed({q.id: answers(q.id, "A", "B") for q in asked}, asked))["agreement"].reason
    assert reason == "Not a substitute for labels here: agreement keeps no answer at tau = 0.3."
    equal = subjects(analyzed({q.id: answers(q.id, "B", "B") for q in asked}, asked))["agreement"].reason
    assert "equally good" in equal


def test_advice_about_agreement():
    asked = [question(f"m{i}", "mcq", "B", options=("x", "y", "z")) for i in range(100)]
    trusted = {q.id: answers(q.id, "B", "B", "B", "A") for q in asked}
    assert "It can stand in for labels" in subjects(analyzed(trusted, asked))["agreement"].reason
    wrong = {q.id: answers(q.id, "A", "A", "A", "B") for q in asked}
    assert "Not a substitute for labels" in subjects(analyzed(wrong, asked))["agreement"].reason
    mixed = {q.id: (wrong if i % 3 == 0 else trusted)[q.id] for i, q in enumerate(asked)}
    reason = subjects(analyzed(mixed, asked))["agreement"].reason
    assert "A partial substitute" in reason and "(mcq)" in reason


def test_pools_without_usable_numbers():
    invalid = {q.id: answers(q.id, None, None) for q in INTERVALS}
    analysis = analyzed(invalid, INTERVALS)
    assert analysis["stage2"] is analysis["agreement"] is None and analysis["means"]["closed"]["mean"] == 0
    assert "No answer has a quality above 0" in subjects(analysis)["K"].reason
    asked = [question("o", "open", None), question("p", "open", None)]
    pool = {"o": answers("o", "a", "b"), "p": answers("p", "c", None)}
    analysis = analyzed(pool, asked)
    assert analysis["best_of"] is None and analysis["kept"]["groups"] == {} and analysis["means"] == {}
    assert "all questions are open" in subjects(analysis)["tau"].reason and subjects(analysis)["K"].value == "4"
    for report in (analysis, analyzed(invalid, INTERVALS), analyzed(POOL, INTERVALS)):
        json.dumps(report, allow_nan=False)


def test_a_score_for_every_answer_is_required():
    with pytest.raises(ValueError, match="expected a score for each of its 4 answers, got 2"):
        pool_rows(POOL, INTERVALS, score_pool(POOL, INTERVALS, TeacherConfig(responses=2)))
    with pytest.raises(ValueError, match="expected at least one with an answer"):
        pool_rows(POOL, [], {})
