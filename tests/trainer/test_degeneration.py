"""Test the metrics of degenerate rollouts by hand, and that real steps with degenerate rollouts raise alarms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from material import tiny_material, tiny_settings

from rmsd_fast.runtime.alarms import find_alarms
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.degeneration import degeneration_record, repeated_4grams
from rmsd_fast.stages.groups import make_group
from rmsd_fast.stages.step_metrics import global_metrics

SMALL = ("rollout.n=4", "rollout.max_new_tokens=64", "data.max_prompt_tokens=500", "micro_tokens=2000")
# The rollouts of these tests are not those of the policy, and the check of parity would end the run.
SMALL += ("rollout.parity_every=0",)
REPEATED, RATIO = "rollout/repeated_4grams", "rollout/length_ratio"
KL, IMPORTANCE = "policy/engine_kl", "policy/importance_ratio"


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("degeneration")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


@pytest.fixture(scope="module")
def state(folder, material, world):
    settings = tiny_settings(folder, *SMALL, "teacher.min_quality=0.1")
    return build_distillation(material.model_path, settings, world, material)


@pytest.fixture(scope="module")
def prompts(state, material):
    return [state.builder.build(q) for q in material.train if state.targets[q.id].has_teacher][:6]


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0),
        ([7, 7, 7], 0),
        ([7, 7, 7, 7], 0),
        # Seven 4-grams, all equal.
        ([7] * 10, 6 / 7),
        # Nine 4-grams, four of them different.
        ([1, 2, 3, 4] * 3, 5 / 9),
        # The 4-gram 1 2 3 4 occurs twice, among eight.
        ([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 9], 1 / 8),
        (list(range(500)), 0),
    ],
)
def test_repeated_4grams_by_hand(ids, share):
    assert repeated_4grams(ids) == pytest.approx(share)


def spoken(state, prompt, texts):
    """Return rollouts with these texts, or with these ids."""
    rollouts = []
    for index, text in enumerate(texts):
        ids = state.builder.encode_response(text) if isinstance(text, str) else torch.tensor(text)
        text = state.builder.decode_response(ids)
        rollouts.append(distill.Rollout(prompt.question.id, index, ids, text, torch.full((len(ids),), -1.0), False, 0))
    return rollouts


def test_the_length_ratio_gives_every_question_the_same_weight(state, prompts, world):
    """Questions without a kept answer do not count, however long their rollouts are."""
    eos, lengths = state.builder.eos_id, [(10, 30), (5, 5), (64, 64)]
    groups = []
    for prompt, (one, two) in zip(prompts, lengths, strict=False):
        rollouts = spoken(state, prompt, [[*range(20, 19 + one), eos], [*range(20, 19 + two), eos]])
        groups.append(make_group(prompt, rollouts, state.targets[prompt.question.id], state.settings, step=0))
    groups[2] = replace(groups[2], kept=[])
    theirs = []
    for group in groups[:2]:
        tokens = [len(state.builder.encode_response(group.targets.answers[k].text)) for k in group.kept]
        theirs.append(sum(tokens) / len(tokens))
    metrics = global_metrics(degeneration_record(groups, state.builder), world)
    assert metrics[RATIO] == pytest.approx((20 + 5) / sum(theirs))
    assert metrics[REPEATED] == 0
    assert global_metrics(degeneration_record(groups[2:], state.builder), world)[RATIO] is None


def alarms_of(state, prompts, speak, stage: str) -> tuple[dict, set[str]]:
    """Take a step with these rollouts, and return its metrics and the alarms if 20 steps are like it."""
    generate = state.rollouts.generate
    state.rollouts.generate = lambda model, prompts, sampling, **options: [
        spoken(state, p, speak(p)) if speak else [] for p in prompts
    ]
    take = distill.warm_up_step if stage == "warm_up" else distill.step
    try:
        metrics = take(state, prompts, 0).metrics
    finally:
        state.rollouts.generate = generate
    rows = [{"stage": stage, "step": step, **metrics} for step in range(1, 21)]
    return metrics, {alarm.condition.metric for alarm in find_alarms(rows, {stage: 20})}


@pytest.mark.parametrize("stage", ["warm_up", "distill"])
def test_loops_raise_alarms_in_each_stage(state, prompts, stage):
    """A third of the rollouts would not be enough; here half of them repeat a phrase until the limit."""

    def speak(prompt):
        answer = state.targets[prompt.question.id].answers[0].text
        loop = state.builder.encode_response("<think> the red ball moves").tolist()[:-1]
        return [answer, (loop * 64)[:64]] * 2

    metrics, alarms = alarms_of(state, prompts, speak, stage)
    assert 0.4 < metrics[REPEATED] < 0.6 and REPEATED in alarms


@pytest.mark.parametrize("stage", ["warm_up", "distill"])
def test_lengths_far_from_the_teachers_raise_alarms_in_each_stage(state, prompts, stage):
    def longest(prompt):
        return [list(range(20, 20 + 64))] * 4

    # The answers have about 20 tokens, or more.
    short, alarms = alarms_of(state, prompts, lambda prompt: ["<think></think>"] * 4, stage)
    assert short[RATIO] < 0.5 and RATIO in alarms
    long, alarms = alarms_of(state, prompts, longest, stage)
    assert long[RATIO] > 2 and RATIO in alarms and REPEATED not in alarms


@pytest.mark.parametrize("stage", ["warm_up", "distill"])
def test_rollouts_like_teacher_answers_raise_none(state, prompts, stage):
    """The prompts are about all kinds of questions."""
    metrics, alarms = alarms_of(
        state,
        prompts,
        lambda prompt: [answer.text for answer in state.targets[prompt.question.id].answers],
        stage,
    )
    assert metrics[REPEATED] < 0.15 and 0.8 < metrics[RATIO] < 1.25
    assert not alarms & {REPEATED, RATIO}


def test_an_alarm_is_raised_once_per_stage():
    rows = [{"stage": stage, "step": step, REPEATED: 0.9} for stage in ("warm_up", "distill") for step in range(1, 60)]
    assert [(alarm.stage, alarm.step) for alarm in find_alarms(rows, {})] == [("warm_up", 20), ("distill", 20)]


def step_of_another_policy(state, prompts, change) -> tuple[dict, set[str]]:
    """Take a step of stage 2 whose rollouts an engine has sampled from changed weights, or reported wrongly."""
    rollouts, _ = distill.roll_out(state, prompts, 3)
    changed = change(rollouts)
    generate = state.rollouts.generate
    state.rollouts.generate = lambda *_, **__: changed
    try:
        metrics = distill.step(state, prompts, 0).metrics
    finally:
        state.rollouts.generate = generate
    rows = [{"stage": "distill", "step": step, **metrics} for step in range(1, 21)]
    return metrics, {alarm.condition.metric for alarm in find_alarms(rows, {})}


def test_wrong_log_probs_raise_alarms(state, prompts):
    def lower(rollouts):
        return [[replace(r, logp=r.logp - 0.2) for r in drawn] for drawn in rollouts]

    metrics, alarms = step_of_another_policy(state, prompts, lower)
    # exp(0.2) = 1.22
    assert metrics[IMPORTANCE] == pytest.approx(1.22, abs=0.05) and {IMPORTANCE, KL} <= alarms


def test_rollouts_of_other_weights_raise_an_alarm(folder, material, world):
    """Their mean importance ratio can stay within its bounds, since its expectation is 1 for every sampler."""
    settings = tiny_settings(folder, *SMALL, "rollout.n=16")
    state = build_distillation(material.model_path, settings, world, material)
    prompts = [state.builder.build(q) for q in material.train[:6]]
    sampled, _ = distill.roll_out(state, prompts, 0)
    own, alarms = step_of_another_policy(state, prompts, lambda rollouts: rollouts)
    assert abs(own[KL]) < 1e-5 and abs(own[IMPORTANCE] - 1) < 1e-4 and not alarms & {KL, IMPORTANCE}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.policy.module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    other, alarms = step_of_another_policy(state, prompts, lambda rollouts: sampled)
    assert other[KL] > 0.02 and KL in alarms
    assert 0.9 < other[IMPORTANCE] < 1.1 and IMPORTANCE not in alarms
