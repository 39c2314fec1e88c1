"""Test the comparison of log-probs between rollout engine and trainer, with faults planted in the engine."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from material import tiny_material, tiny_settings

from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.parity import Parity, ParityError, bound_of, check_parity, compare, score_rollouts

SMALL = ("rollout.n=3", "rollout.max_new_tokens=12", "data.max_prompt_tokens=500", "micro_tokens=600")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


def build(folder, material, world, *overrides):
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_distillation(material.model_path, settings, world, material)
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].imitate and q.videos][:4]
    return state, prompts


def test_differences_by_hand(world) -> None:
    trainer = {(0, 0): torch.tensor([-1.0, -2.0]), (0, 1): torch.tensor([-3.0]), (1, 0): torch.tensor([-4.0])}
    engine = {(0, 0): torch.tensor([-1.0, -2.2]), (0, 1): torch.tensor([-3.0]), (1, 0): torch.tensor([-3.9])}
    parity = compare(trainer, engine | {(7, 7): torch.zeros(1)}, world)
    # Only exp(0.2) = 1.22 and exp(-0.1) = 0.905: the second is inside [0.9, 1.1].
    assert parity.mean == pytest.approx(0.3 / 4, rel=1e-6)
    # Question 0 has a mean of 0.2 / 3, question 1 of 0.1.
    assert parity.worst == pytest.approx(0.1, rel=1e-5)
    assert parity.largest == pytest.approx(0.2, rel=1e-6)
    assert (parity.outside, parity.tokens) == (0.25, 4)
    assert "log-probs of 4 tokens differ by 0.075 on average" in parity.text()
    assert "25.00% of the ratios are outside [0.9, 1.1]" in parity.text()
    assert parity.within(0.11) and not parity.within(0.09)
    # A process whose pass is a filler has no rollouts.
    assert compare({}, engine, world) == Parity(0.0, 0.0, 0.0, 0.0, 0)
    assert not compare({(0, 0): torch.tensor([math.nan, -1.0])}, engine, world).within(1e9)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_a_correct_engine_agrees_in_several_passes(folder, material, world, packing) -> None:
    state, prompts = build(
        folder, material, world, f"packing={packing}", "data.max_prompt_tokens=150", "micro_tokens=190"
    )
    rollouts, features = distill.roll_out(state, prompts, 0)
    scored = score_rollouts(state, prompts, rollouts, features)
    assert sorted(scored) == [(i, r) for i in range(len(prompts)) for r in range(3)]
    # The turns score all rollouts, each once, and then begin again.
    turns = [score_rollouts(state, prompts, rollouts, features, turn=turn) for turn in range(12)]
    count = next(n for n in range(1, 12) if turns[n].keys() == turns[0].keys())
    assert count > 1
    assert sorted(place for turn in turns[:count] for place in turn) == sorted(scored)
    for (i, r), logp in scored.items():
        torch.testing.assert_close(logp, rollouts[i][r].logp, atol=1e-5, rtol=0)


def test_it_is_checked_at_the_first_step_and_at_intervals(folder, material, world) -> None:
    state, prompts = build(folder, material, world, "rollout.parity_every=3")
    rollouts, features = distill.roll_out(state, prompts, 0)
    found = [check_parity(state, prompts, rollouts, features, step) for step in range(5)]
    assert [bool(metrics) for metrics in found] == [True, False, False, True, False]
    assert found[0]["parity/mean_difference"] < 1e-5 and found[0]["parity/outside_share"] == 0
    assert state.timer.take()["seconds/parity"] > 0
    state.settings.rollout.parity_every = 0
    assert not check_parity(state, prompts, rollouts, features, 0)


def test_a_resumed_run_is_checked_at_its_first_step_without_further_metrics(
    folder, material, world, monkeypatch
) -> None:
    state, prompts = build(folder, material, world)
    rollouts, features = distill.roll_out(state, prompts, 0)
    wrong = [[replace(rollout, logp=rollout.logp - 0.01) for rollout in drawn] for drawn in rollouts]
    with pytest.raises(ParityError):
        check_parity(state, prompts, wrong, features, 7)
    state.parity_checked = False
    assert check_parity(state, prompts, rollouts, features, 7) == {} and state.parity_checked
    # Between the intervals, a checked run is not checked again.
    assert check_parity(state, prompts, wrong, features, 8) == {}


def test_a_fault_in_one_question_is_not_hidden_by_the_others(folder, material, world) -> None:
    state, prompts = build(folder, material, world, "rollout.parity_bound=0.05")
    rollouts, features = distill.roll_out(state, prompts, 0)
    for wrong in range(len(prompts)):
        drawn = [
            [replace(rollout, logp=rollout.logp - 0.06 * (i == wrong)) for rollout in group]
            for i, group in enumerate(rollouts)
        ]
        state.parity_checked = False
        with pytest.raises(ParityError, match=r"0\.06 in the worst question"):
            check_parity(state, prompts, drawn, features, 0)


def test_the_bound_depends_on_the_dtype_unless_it_is_set(folder) -> None:
    bounds = [bound_of(tiny_settings(folder, f"model.dtype={dtype}")) for dtype in ("float32", "bfloat16")]
    assert bounds == [1e-3, 0.1]
    assert bound_of(tiny_settings(folder, "rollout.parity_bound=0.2")) == 0.2


def other_video(prompts):
    """Return the prompts with inverted pixels."""
    media = [tuple(replace(f, pixels=255 - f.pixels, key="") for f in prompt.media) for prompt in prompts]
    return [replace(prompt, media=own) for prompt, own in zip(prompts, media, strict=True)]


def other_text(prompts):
    """Return the prompts with another token before the last one."""
    changed = []
    for prompt in prompts:
        ids = prompt.input_ids.clone()
        ids[-2] = ids[-3]
        changed.append(replace(prompt, input_ids=ids))
    return changed


def swap(first, second):
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        former = one.clone()
        one.copy_(other)
        other.copy_(former)


@pytest.mark.parametrize("fault", ["other weights", "swapped layers", "other video", "other prompt", "not finite"])
@pytest.mark.parametrize("stage", ["warm_up", "distill"])
def test_planted_faults_stop_the_step(folder, material, world, monkeypatch, fault, stage) -> None:
    state, prompts = build(folder, material, world)
    generate = HfRollout.generate

    @torch.no_grad()
    def faulty(self, model, prompts, sampling, **keywords):
        layers = model.model.language_model.layers
        if fault == "other weights":
            weight = layers[0].mlp.down_proj.weight
            former = weight.clone()
            weight.mul_(0.5)
        if fault == "swapped layers":
            swap(layers[0].mlp, layers[1].mlp)
        if fault in ("other video", "other prompt"):
            # The fault is in one question only.
            change = other_video if fault == "other video" else other_text
            prompts = [*prompts[:-1], *change(prompts[-1:])]
        if fault == "other video":
            keywords["features"] = None
        rollouts = generate(self, model, prompts, sampling, **keywords)
        if fault == "other weights":
            weight.copy_(former)
        if fault == "swapped layers":
            swap(layers[0].mlp, layers[1].mlp)
        if fault == "not finite":
            # Rollouts that are not finite skip the step before the check, so the fault is in the trainer's log-probs.
            monkeypatch.setattr("rmsd_fast.stages.parity.linear_logprob", nan_logprob)
        return rollouts

    def nan_logprob(hidden, weight, targets, **keywords):
        return torch.full(targets.shape, math.nan)

    monkeypatch.setattr(HfRollout, "generate", faulty)
    step = distill.warm_up_step if stage == "warm_up" else distill.step
    before = {name: p.detach().clone() for name, p in state.policy.module.named_parameters()}
    with pytest.raises(ParityError, match="rollout engine \\(hf\\) and trainer disagree.*rmsd_fast.doctor"):
        step(state, prompts, 0)
    assert all(torch.equal(before[name], p) for name, p in state.policy.module.named_parameters())
    # Between the checks, nothing stops the step.
    assert not step(state, prompts, 1).skipped
