"""Test one copy of the model in vLLM on two processes: equal to a whole copy and to transformers, and planted faults.

These tests run with a Python that has vLLM and the trainer (`make test-vllm`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from material import tiny_material
from tensor_parallel_case import few_heads
from train_runs import environment
from warm_process import run_program

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Return what each of the two processes has written."""
    folder = tmp_path_factory.mktemp("parallel")
    few_heads(tiny_material(folder).model_path, folder / "few")
    path = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), os.environ.get("PYTHONPATH", "")])
    variables = {**environment(), "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": path}
    done = run_program("tensor_parallel_case", [str(folder)], variables, processes=2, timeout_s=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"results_{rank}.json").read_text()) for rank in range(2)]


def check_equal(rollouts, others):
    """Check that the tokens are the same, and that log-probs and banned masses differ by rounding only."""
    assert rollouts
    for rollout, other in zip(rollouts, others, strict=True):
        assert (rollout["question"], rollout["ids"]) == (other["question"], other["ids"])
        assert rollout["logp"] == pytest.approx(other["logp"], abs=ROUNDING)
        if other["banned_mass"] is not None:
            assert rollout["banned_mass"] == pytest.approx(other["banned_mass"], abs=1e-6)


def test_each_process_has_a_part_of_the_weights(outcome):
    """The student has 2 heads of 32 for queries, keys and values, a hidden size of 64, and an MLP of 128."""
    for results in outcome:
        parts = {name.rpartition("layers.1.")[2]: shape for name, shape in results["parts"].items()}
        assert parts["self_attn.qkv_proj.weight"] == [3 * 32, 64]
        assert parts["self_attn.o_proj.weight"] == [64, 32]
        assert parts["mlp.gate_up_proj.weight"] == [2 * 64, 64] and parts["mlp.down_proj.weight"] == [64, 64]
        assert parts["input_layernorm.weight"] == [64]


@pytest.mark.parametrize("student", ["greedy", "few heads"])
def test_greedy_rollouts_are_those_of_hf(outcome, student):
    for results in outcome:
        check_equal(results[student]["vllm"], results[student]["hf"])
    lengths = [[rollout["question"] for rollout in results[student]["vllm"]] for results in outcome]
    assert [len(questions) for questions in lengths] == [2, 3] and lengths[1][1] == "two" and lengths[0][1] == "text"


def test_rollouts_are_those_of_a_whole_copy(outcome):
    for results in outcome:
        check_equal(results["sampled"], results["sampled whole"])
        assert len({tuple(rollout["ids"]) for rollout in results["sampled"]}) > 3
    # One process has no media.
    check_equal(outcome[0]["few media"], outcome[0]["sampled"][3:])
    check_equal(outcome[1]["few media"], outcome[1]["sampled"])


def test_features_do_not_outlive_a_call(outcome):
    """Both processes get the features of both, each of which is a part of one tensor."""
    for results in outcome:
        assert results["kept"] == {"given": 5, "alive": 0, "encoded": 0, "requests": 0}


@pytest.mark.parametrize("student", ["greedy", "few heads"])
def test_sums_of_the_parts_are_those_of_the_whole(outcome, student):
    """With few heads, both processes have the only head of keys and values, and 320 and 270 rows of the vocabulary."""
    groups = {"embeddings", "layers.0", "layers.1", "norm"} | ({"head"} if student == "few heads" else set())
    for results in outcome:
        held, expected = results[student]["sums"]
        assert held == expected and set(held) == groups


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("skipped, row 0", "got others in layers.1 (1 of 4 groups)"),
        ("skipped, row -1", "got others in layers.1 (1 of 4 groups)"),
        ("swapped", "got others in layers.0, layers.1 (2 of 4 groups)"),
    ],
)
def test_a_wrong_sync_is_caught_by_both_processes(outcome, fault, expected):
    for results in outcome:
        assert expected in results["loading"][fault]


def test_faults_of_one_process_are_caught_by_both(outcome):
    for results in outcome:
        found = results["one process"]
        for end, group in (("model.norm.weight", "norm"), ("layers.1.mlp.down_proj.weight", "layers.1")):
            assert f"weights in vLLM, got others in {group} (1 of 4" in found[end] or (
                f"got different ones in {group};" in found[end]
            ), found[end]
        assert "question 'again': expected a prompt and response of at most 510 tokens, got 511" in found["long"]
        assert "rollout.tensor_parallel=2: expected the same tokens in all processes of a group" in found["tokens"]
        assert "layers.1" in results["one copy"] and "no error" not in results["one copy"]
        check_equal(results["after faults"], results["greedy"]["vllm"])


def test_training_is_that_with_a_whole_copy(outcome):
    for results in outcome:
        for step, (parts, whole) in enumerate(zip(results["training"], results["training whole"], strict=True)):
            check_equal(parts["rollouts"], whole["rollouts"])
            assert parts["metrics"].keys() == whole["metrics"].keys()
            for name, value in whole["metrics"].items():
                close = 1e-3 if name == "discriminator/length_correlation" else ROUNDING
                expected = pytest.approx(value, rel=close, abs=close) if isinstance(value, float) else value
                assert parts["metrics"][name] == expected, (step, name)
            assert abs(parts["metrics"]["policy/engine_kl"]) < 1e-5
        assert results["training"][-1]["metrics"]["policy/kl"] > 1e-4
    first = [results["training"][0]["rollouts"] for results in outcome]
    assert {rollout["question"] for rollout in first[0]} != {rollout["question"] for rollout in first[1]}
