"""Test the rollout benchmark: its gate, how it counts, its goals and its page."""

from __future__ import annotations

import pytest
import torch

from bench.core.goals import verdicts
from bench.core.report import evaluation_page, rollout_page
from bench.prefix.groups import HIDDEN, LAYERS, load
from bench.rollout import bench_evaluation, bench_rollout
from bench.rollout.bench_rollout import Rig, gate, launches_per_token
from rmsd_fast.rollout.base import Sampling


@pytest.fixture(scope="module")
def rig():
    return Rig(load(HIDDEN, LAYERS, "float32", "cpu"), 40, torch.device("cpu"))


def test_both_ways_sample_as_many_tokens_without_banned_ids(rig):
    sampling = Sampling(3, 1.0, 6, seed=1)
    for ids in (rig.ours(sampling), rig.generate(sampling)):
        assert ids.shape == (3, 6) and not torch.isin(ids, rig.banned).any()
        assert len({tuple(row.tolist()) for row in ids}) == 3


def test_the_gate_compares_greedy_tokens(monkeypatch):
    assert gate.__wrapped__(40, 5, "cpu") == 5
    ours = Rig.ours
    monkeypatch.setattr(Rig, "ours", lambda self, sampling: ours(self, sampling).roll(1, 1))
    with pytest.raises(AssertionError, match="greedy tokens differ"):
        gate.__wrapped__(40, 5, "cpu")


def test_operations_per_token_are_those_of_a_further_token():
    x = torch.ones(4, 4)

    def run(tokens: int) -> None:
        torch.mm(x, x)
        for _ in range(tokens):
            # One addition and one product; the transposed view is not counted.
            torch.mm(x.t(), x + 1)

    assert launches_per_token(run, torch.device("cpu")) == 2


def record_of(case: str, device: str = "cpu", **ms: float) -> dict:
    record = {"bench": "rollout", "case": case, "device": device, "quick": False, "baseline": "ours"}
    record |= {"shape": {"P": 2048, "N": 8, "R": 64}, "cpu": "one", "threads": 2, "torch": "2.13.0", "commit": "a" * 40}
    of_all = {"rounds": 7, "decode_ms_per_token": 5.0, "launches_per_token": 300.0}
    record["variants"] = {
        name.replace("_", ", "): of_all
        | {"forward": {"median_ms": time}, "tokens_per_s": 512e3 / time, "times_ours_by_round": time / ms["ours"]}
        for name, time in ms.items()
    }
    return record


def statuses(device: str, *records: dict) -> list[str]:
    return [verdict.status for verdict in verdicts(list(records), device, ["rollout"])]


def test_goal_on_cpu():
    def status(**ms: float) -> list[str]:
        return statuses("cpu", record_of("P2048-N8-R64-float32", **ms))

    assert status(ours=100.0, generate=301.0) == ["met"] and status(ours=100.0, generate=299.0) == ["MISSED"]
    assert status(ours=100.0) == statuses("cpu") == ["NOT MEASURED"]


def test_goals_on_cuda():
    def found(**ms: float) -> list[str]:
        return statuses("cuda", record_of("P2048-N8-R64-bfloat16", "cuda", **ms))

    fast = {"ours": 100.0, "ours_eager": 301.0, "vllm": 60.0, "vllm_weights": 999.0}
    slow = {"ours": 100.0, "ours_eager": 299.0, "vllm": 60.0, "vllm_weights": 1001.0}
    assert found(**fast) == ["met"] * 3 and found(**slow) == ["MISSED"] * 3
    assert found(ours=100.0) == statuses("cuda") == ["NOT MEASURED"] * 3


def test_the_page_shows_rates_ratios_and_goals():
    record = record_of("P2048-N8-R64-float32", ours=500.0, generate=2000.0, vllm=1000.0)
    record["variants"]["vllm, weights"] = {"rounds": 7, "forward": {"median_ms": 80.0}}
    text = rollout_page([record])
    assert "| 2048 | 8 | 64 | ours | 1,024 | 1.00 (1.00) | 5.00 | 300 |  | 7 |" in text
    assert "| 2048 | 8 | 64 | generate | 256 | 4.00 (4.00) | 5.00 | 300 |  | 7 |" in text
    assert "| 2048 | 8 | 64 | vllm | 512 | 2.00 (2.00) | 5.00 | 300 | 80 | 7 |" in text and "vllm, weights" not in text
    assert "| met | P2048-N8-R64-float32 | 4.00 times faster than generate" in text and "commit aaaaaaaaaa." in text


def test_cuda_measures_eager_steps_too():
    (case, *_) = bench_rollout.cases(False, "cuda")
    assert case.name == "P2048-N8-R64-bfloat16" and case.sizes.name == "Qwen3-VL-4B"


def test_the_page_of_evaluations_shows_what_each_part_gains():
    (case, *_) = bench_evaluation.cases(False, "cpu")
    record = {"bench": "evaluation", "case": case.name, "device": "cpu", "quick": False, "baseline": "ours"}
    record |= {"shape": {"videos": 40, "questions": 200, "frames": 32, "R": 32}, "prompt_tokens": 1200}
    record |= {"cpu": "one", "threads": 1, "torch": "2.13.0", "commit": "a" * 40}
    times = {"ours": 10e3, "generate": 40e3, "batched": 30e3, "decoded once": 20e3}
    record["variants"] = {
        name: {
            "rounds": 3,
            "forward": {"median_ms": ms},
            "questions_per_s": 200e3 / ms,
            "times_ours_by_round": ms / times["ours"],
        }
        for name, ms in times.items()
    }
    text = evaluation_page([record])
    assert (
        "| ours | 10.0 | 20.0 | 1.00 (1.00) |  | 3 |" in text
        and "| generate | 40.0 | 5.0 | 4.00 (4.00) |  | 3 |" in text
    )
    assert "| batched | 30.0 | 6.7 | 3.00 (3.00) | 1.33 | 3 |" in text and "| 2.00 (2.00) | 1.50 | 3 |" in text
    assert "| met | V40-Q200-F16-R32-float32 | 4.00 times faster than generate" in text


def test_all_ways_to_evaluate_give_the_same_tokens(tmp_path):
    (case,) = bench_evaluation.toy_cases("cpu")
    rig = bench_evaluation.Rig(case, tmp_path)
    with torch.no_grad():
        expected = rig.generate()
        assert expected.shape == (4, 4)
        for name in bench_evaluation.PARTS:
            assert torch.equal(rig.part(name), expected)
        with bench_evaluation.warm_reader(case, rig.questions[0].videos[0]) as reader:
            assert torch.equal(rig.ours(reader), expected)
