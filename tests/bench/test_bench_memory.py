"""Test that the benchmark of an evaluation's memory measures all its phases, on a tiny student."""

from __future__ import annotations

import json
import sys

import pytest
from material import WORLD

from bench.memory.evaluation import EvaluationCase, make_folder, planned, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def test_an_evaluation_has_a_peak_in_each_planned_phase(tmp_path):
    case = EvaluationCase("tiny", prompts=2, frames=4, side=2, response=2, rollouts=2, reranker=True)
    make_folder(tmp_path / "student", case, tiny=True)
    settings, questions, peaks = run(case, tmp_path / "student", WORLD)
    assert len(questions) == 4 and all(peak > 0 for peak in peaks.values())
    config = (tmp_path / "student" / "config.json").read_text()
    assert set(peaks) == {"vision", "answers", "samples", "reranker"}
    # What the reranker encodes is measured with it.
    assert set(planned(case, settings, questions, json.loads(config)).phases) == {*peaks, "reranker vision"}
