"""Test the benchmarks' own aggregates."""

from __future__ import annotations

import math

import pytest

from rmsd_fast.config import SettingsError
from rmsd_fast.data.benchmarks import aggregate
from rmsd_fast.data.benchmarks.aggregates import ASKS, MLVU_DEV, VERSIONS
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import ALL_TASKS


def rows_of(group: str, scores: dict[str, list[float]]) -> list[tuple[dict[str, str], float]]:
    return [({group: value}, score) for value, listed in scores.items() for score in listed]


def test_plain_means():
    for name in ("videomme", "worldsense", "longvideobench", "mathvista"):
        assert aggregate(name, rows_of("duration", {"short": [1, 0, 1], "long": [0]})) == {"mean": 0.5, "score": 0.5}


def test_mlvu_is_the_mean_over_tasks():
    scores = {"plotQA": [1, 1, 1, 0], "needle": [0, 1], "ego": [0], "count": [1], "order": [0], "topic_reasoning": [1]}
    scores["anomaly_reco"] = [0, 0]
    result = aggregate("mlvu", rows_of("task", scores))
    assert result["mean"] == 6 / 12 and result["score"] == pytest.approx((0.75 + 0.5 + 0 + 1 + 0 + 1 + 0) / 7)
    assert result["tasks"]["plotQA"] == 0.75 and list(result["tasks"]) == list(MLVU_DEV)
    # The test has two more tasks, and another spelling of one.
    scores |= {"needleQA": scores.pop("needle"), "sportsQA": [1], "tutorialQA": [1]}
    assert aggregate("mlvu", rows_of("task", scores))["score"] == pytest.approx(5.25 / 9)


@pytest.mark.parametrize("name", ["mlvu", "videommmu", "mathverse", "vstar"])
def test_a_part_of_a_benchmark_has_no_score(name):
    group, names = {
        "mlvu": ("task", MLVU_DEV),
        "videommmu": ("track", ("perception", "comprehension", "adaptation")),
        "mathverse": ("version", VERSIONS),
        "vstar": ("ask", ASKS),
    }[name]
    rows = rows_of(group, {value: [0.5] for value in names})
    assert aggregate(name, rows)["score"] > 0
    # A task without questions, a question without a task, and an unknown task.
    for partial in (rows[1:], [*rows, ({}, 1.0)], [*rows, ({group: "other"}, 1.0)]):
        result = aggregate(name, partial)
        assert "score" not in result and result["mean"] == pytest.approx(sum(s for _, s in partial) / len(partial))
    assert aggregate(name, [({"x": "y"}, 0.5)]) == {"mean": 0.5}


def test_videommmu_and_mathverse_are_means_over_all_parts():
    tracks = {"perception": [1, 1], "comprehension": [1, 0], "adaptation": [0]}
    result = aggregate("videommmu", rows_of("track", tracks))
    assert result["score"] == 0.5 and result["tracks"] == {"perception": 1, "comprehension": 0.5, "adaptation": 0}
    assert "score" not in aggregate("videommmu", rows_of("track", {"adaptation": [1], "unnamed": [0]}))
    versions = {
        "Text Dominant": [1],
        "Text Lite": [1, 0],
        "Vision Intensive": [0],
        "Vision Dominant": [1],
        "Vision Only": [0],
    }
    assert aggregate("mathverse", rows_of("version", versions))["score"] == pytest.approx(2.5 / 5)


def test_vstar_chains():
    scores = {"what": [1, 0], "when1": [0.5, 0.3], "where1": [0.2, 0.4], "where2": [0.1, 0.1], "when2": [0.4, 0.2]}
    result = aggregate("vstar", rows_of("ask", scores))
    # Accuracy 0.5; chain 1: tIoU 0.4, vIoU 0.3; chain 2: tIoU 0.3, vIoU 0.1.
    assert result["accuracy"] == 0.5
    assert result["chain1"]["tiou"] == 0.4 and result["chain1"]["viou"] == pytest.approx(0.3)
    assert result["chain2"]["tiou"] == pytest.approx(0.3) and result["chain2"]["viou"] == 0.1
    am = [(0.5 + 0.4 + 0.3) / 3, (0.5 + 0.3 + 0.1) / 3]
    lgm = [-math.log(0.5 * 0.6 * 0.7) / 3, -math.log(0.5 * 0.7 * 0.9) / 3]
    assert [result["chain1"]["am"], result["chain2"]["am"]] == pytest.approx(am)
    assert [result["chain1"]["lgm"], result["chain2"]["lgm"]] == pytest.approx(lgm)
    assert result["mam"] == pytest.approx(sum(am) / 2) and result["score"] == result["mlgm"] == pytest.approx(
        sum(lgm) / 2
    )
    # Perfect answers have a finite LGM.
    assert math.isfinite(aggregate("vstar", rows_of("ask", {ask: [1.0] for ask in scores}))["score"])
    assert set(aggregate("vstar", rows_of("ask", {"when1": [0.5]}))) == {"mean", "chain1"}


def test_aggregates_refuse_unknown_names_and_empty_rows():
    with pytest.raises(SettingsError, match="got 'mmbench'"):
        aggregate("mmbench", rows_of("task", {"a": [1]}))
    with pytest.raises(ValueError, match="at least one question"):
        aggregate("mlvu", [])


def test_tasks_of_benchmarks_have_prompts():
    for task in ALL_TASKS:
        assert "<answer>" in question_text(Question("a", "?", task))
