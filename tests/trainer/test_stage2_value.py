"""Test the metrics and the forecast of what stage 2 can gain, and the discriminator settings that affect it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from material import tiny_material, tiny_settings
from train_runs import mini_arguments, only_run

from rmsd_fast.method.advantages import group_advantages
from rmsd_fast.method.answers import answer_body
from rmsd_fast.method.quality import quality_score
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.discriminator_pass import discriminator_pass
from rmsd_fast.stages.groups import _score_counts, group_record, make_group, quality_record, set_advantages
from rmsd_fast.stages.step_metrics import global_metrics
from rmsd_fast.train_run import describe_forecast, train

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("value")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


def build(folder, material, world, *overrides):
    """Return the state of stage 2 and groups of questions that have a teacher."""
    state = build_distillation(material.model_path, tiny_settings(folder, *SMALL, *overrides), world, material)
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].has_teacher][:6]
    rollouts, features = distill.roll_out(state, prompts, 0)
    groups = [
        make_group(prompt, drawn, state.targets[prompt.question.id], state.settings, step=0)
        for prompt, drawn in zip(prompts, rollouts, strict=True)
    ]
    return state, groups, features


def with_pool(group, quality, p, weight):
    """Return the group with other qualities, probabilities and weights for its teacher responses."""
    names = {"quality": quality, "p": p, "weight": weight}
    changed = {name: torch.tensor(values) for name, values in names.items()}
    targets = replace(group.targets, answers=group.targets.answers[: len(p)], **changed)
    return replace(group, targets=targets, kept=[k for k, value in enumerate(p) if value > 0])


def test_the_quality_that_the_discriminator_leads_to_by_hand(folder, material, world):
    _, groups, _ = build(folder, material, world)
    targets = with_pool(groups[0], [1.0, 0.5, 0.0], [2 / 3, 1 / 3, 0.0], [1.0, 0.5, 0.0]).targets
    # (2/3 * 1 * 1 + 1/3 * 0.5 * 0.5) / (2/3 * 1 + 1/3 * 0.5) = 0.75 / (5/6).
    assert targets.target_quality == pytest.approx(0.9)
    uniform = with_pool(groups[0], [1.0, 0.5, 0.0], [1 / 3] * 3, [1.0] * 3).targets
    assert uniform.target_quality == pytest.approx(0.5)
    assert with_pool(groups[0], [0.1], [0.0], [0.1]).targets.target_quality is None


def test_metrics_of_what_stage_2_can_gain_by_hand(folder, material, world):
    _, groups, _ = build(folder, material, world)
    closed = [group for group in groups if group.prompt.question.task_type != "open"][:2]
    first = replace(with_pool(closed[0], [1.0, 0.5], [0.5, 0.5], [1.0, 1.0]), content=torch.tensor([0.0, 0.5, 1.0]))
    second = replace(with_pool(closed[1], [0.8, 0.0], [1.0, 0.0], [1.0, 0.0]), content=torch.tensor([0.2, 0.2, 0.2]))
    unmatched = with_pool(first, [0.1, 0.1], [0.0, 0.0], [0.0, 0.0])
    question = replace(first.prompt.question, task_type="open")
    opened = replace(first, prompt=replace(first.prompt, question=question))
    metrics = global_metrics(quality_record([first, second, unmatched, opened]), world)
    assert metrics == {
        "rollout/quality": pytest.approx(0.35),
        "rollout/signal_share": 0.5,
        "teacher/target_quality": pytest.approx((0.75 + 0.8) / 2),
        "teacher/best_quality": pytest.approx(0.9),
        "teacher/headroom": pytest.approx((0.75 + 0.8) / 2 - 0.35),
    }
    assert set(global_metrics(quality_record([opened]), world).values()) == {None}


def test_the_forecast_names_a_pool_that_teaches_nothing(folder):
    settings = tiny_settings(folder, *SMALL)
    numbers = {
        "rollout/quality": 0.6,
        "rollout/signal_share": 0.5,
        "teacher/target_quality": 0.7,
        "teacher/best_quality": 0.8,
    }
    (line,) = describe_forecast(numbers, settings)
    assert "the student has a quality of 0.600; the discriminator leads to 0.700, best answer of K 0.800" in line
    _, warning = describe_forecast({**numbers, "teacher/target_quality": 0.55}, settings)
    assert "are not better than the rollouts" in warning
    _, warning = describe_forecast({**numbers, "rollout/signal_share": 0.02}, settings)
    assert "almost no group differs in content" in warning
    content = tiny_settings(folder, *SMALL, "reward.alpha=0", "stages=[sft,distill]")
    (line,) = describe_forecast({**numbers, "teacher/target_quality": 0.55}, content)
    assert "leads to" not in line
    (line,) = describe_forecast(dict.fromkeys(numbers), settings)
    assert "forecast: none, since no question" in line


def test_a_zero_head_scores_all_texts_alike_at_first(folder, material, world):
    state, groups, features = build(folder, material, world, "discriminator.head=zero")
    discriminator_pass(state, groups, features)
    assert all(not group.d_score.any() and not group.teacher_d_score.any() for group in groups)
    state, groups, features = build(folder, material, world, "discriminator.head=random")
    discriminator_pass(state, groups, features)
    assert any(group.d_score.any() for group in groups)


def test_order_pairs_in_the_discriminator_loss(folder, material, world):
    """The loss equals a plain loop over the pairs, with the scores that the pass stores."""
    overrides = ("discriminator.head=random", "discriminator.score_l2=0")
    state, groups, features = build(folder, material, world, *overrides, "discriminator.order_weight=2")
    groups = [
        replace(group, content=torch.tensor([0.0, 0.25, 1.0])) if group.prompt.question.task_type != "open" else group
        for group in groups
    ]
    record, *_ = discriminator_pass(state, groups, features)
    pairs = ordered = rollouts = 0.0
    for group in groups:
        rollouts += len(group.rollouts)
        kept = list(zip(group.kept, group.teacher_d_score.tolist(), strict=True))
        for student in group.d_score.tolist():
            for k, teacher in kept:
                weight = float(group.targets.p[k] * group.targets.weight[k])
                pairs += weight * math.log1p(math.exp(student - teacher))
        if group.prompt.question.task_type == "open":
            continue
        for scored in (
            list(zip(group.content.tolist(), group.d_score.tolist(), strict=True)),
            [(float(group.targets.quality[k]), score) for k, score in kept],
        ):
            number = len(scored) * (len(scored) - 1) / 2
            for worse, low in scored:
                for better, high in scored:
                    if better > worse:
                        ordered += len(scored) / number * (better - worse) * math.log1p(math.exp(low - high))
    assert ordered > 0
    assert float(record["discriminator/loss"]) == pytest.approx((pairs + 2 * ordered) / rollouts, rel=1e-5)


def test_scores_count_only_in_groups_of_equal_content(folder, material, world):
    settings = tiny_settings(folder, *SMALL, "reward.score_groups=flat_content")
    _, groups, _ = build(folder, material, world)
    ones, scores = torch.ones(3), torch.tensor([1.0, 2.0, 4.0])
    flat = replace(groups[0], content=ones, outer=ones, task=ones, d_score=scores)
    mixed = replace(flat, content=torch.tensor([0.0, 0.5, 1.0]))
    for group in (flat, mixed):
        set_advantages(group, settings)
    expected = 0.4 * group_advantages(scores, eps=1e-6 + settings.reward.score_sd_offset)
    assert flat.advantages.tolist() == pytest.approx(expected.tolist())
    assert mixed.advantages.tolist() == pytest.approx((0.4 * group_advantages(mixed.content)).tolist())
    # The metric has the scores as they enter the reward: clipped, and only those of the flat group.
    settings.reward.score_clip = 2.0
    record = group_record([flat, mixed], settings)
    assert record["reward/discriminator/raw"][1:] == (14.0, 6)
    assert record["reward/discriminator/weighted"][1:] == (pytest.approx(0.4 * 5), 6)


def test_scores_count_only_while_the_teacher_is_ahead(folder, material, world):
    settings = tiny_settings(folder, *SMALL, "reward.score_groups=teacher_ahead")
    _, groups, _ = build(folder, material, world)
    closed = next(g for g in groups if g.prompt.question.has_truth and 0 < g.targets.target_quality < 1 and g.kept)
    target, scores = closed.targets.target_quality, torch.tensor([1.0, 2.0, 4.0])
    group = replace(closed, outer=torch.ones(3), task=torch.ones(3), d_score=scores)
    behind = replace(group, content=torch.full((3,), target / 2))
    level = replace(group, content=torch.full((3,), target))
    # All rollouts are as good as the only kept answer, but a float32 mean rounds.
    poor = replace(with_pool(group, [0.01], [1.0], [1.0]), content=torch.full((8,), 0.01), kept=[0])
    assert not _score_counts(poor, "teacher_ahead")
    unlabeled = replace(closed.prompt, question=replace(closed.prompt.question, answer=None))
    unknown = replace(level, content=torch.ones(3), prompt=unlabeled)
    counted = (0.4 * group_advantages(scores, eps=1e-6 + settings.reward.score_sd_offset)).tolist()
    for case, expected in ((behind, counted), (level, [0.0] * 3), (unknown, counted)):
        set_advantages(case, settings)
        assert case.advantages.tolist() == pytest.approx(expected)


def test_the_pool_can_reward_rollouts_without_ground_truth(folder, material, world):
    """The reward is the expected metric against the matched teacher response; otherwise it is 0."""
    _, groups, _ = build(folder, material, world)
    group = next(g for g in groups if g.prompt.question.task_type == "temporal" and len(g.kept) > 1)
    answers = [group.targets.answers[k].text for k in group.kept]
    prompt = replace(group.prompt, question=replace(group.prompt.question, answer=None))
    rollouts = [replace(group.rollouts[0], text=text) for text in (*answers, "no answer")]
    p = group.targets.p[group.kept].tolist()
    quality = [
        sum(w * quality_score(text, "temporal", answer_body(a)) for w, a in zip(p, answers, strict=True))
        for text in answers
    ]
    assert sum(quality) > 0
    for overrides, expected in (
        ((), [0.0] * len(rollouts)),
        (("teacher.unlabeled=agreement",), [0.0] * len(rollouts)),
        (("teacher.unlabeled=agreement", "reward.unlabeled=teacher"), [*quality, 0.0]),
    ):
        settings = tiny_settings(folder, *SMALL, *overrides)
        content = make_group(prompt, rollouts, group.targets, settings, step=0).content
        assert content.tolist() == pytest.approx(expected)
        # A question with ground truth is scored by it, whatever the setting.
        labeled = make_group(group.prompt, rollouts, group.targets, settings, step=0).content
        assert labeled.tolist() == pytest.approx([*group.targets.quality[group.kept].tolist(), 0.0])


def test_content_correlation_by_hand(folder, material, world):
    from rmsd_fast.stages.discriminator_pass import _content_sums, correlation

    _, groups, _ = build(folder, material, world)
    closed = next(group for group in groups if group.prompt.question.task_type != "open")
    group = replace(closed, content=torch.tensor([0.0, 0.5, 1.0]), d_score=torch.tensor([1.0, 2.0, 6.0]))
    # Centered: -0.5, 0, 0.5 and -2, -1, 3; 2.5 / sqrt(0.5 * 14).
    assert correlation(*_content_sums([group])) == pytest.approx(2.5 / 7**0.5)
    opened = replace(group, prompt=replace(group.prompt, question=replace(group.prompt.question, task_type="open")))
    assert correlation(*_content_sums([opened])) is None
    assert correlation(*_content_sums([group, opened])) == pytest.approx(2.5 / 7**0.5)


def test_the_accuracy_that_ends_the_warm_up_by_hand(folder, material, world):
    state, _, _ = build(folder, material, world, "discriminator.warm_up_accuracy=0.75")
    assert not any(distill._has_learned(state, accuracy) for accuracy in [0.7] * 7)
    assert not distill._has_learned(state, None)
    # The mean of the last 8 is 0.7 + 0.05, and an earlier value no longer counts.
    state.accuracies = [0.0] + [0.7] * 7
    assert distill._has_learned(state, 0.7 + 0.4 + 1e-9)
    state.settings.discriminator.warm_up_accuracy = None
    assert not distill._has_learned(state, 1.0)


def test_a_warm_up_that_reaches_its_goal_ends_and_is_not_continued(tmp_path, world, monkeypatch, capfd):
    made = tmp_path / "made"
    settings = load_settings(
        "quickstart", [*mini_arguments(tmp_path / "runs", made)[1:], "discriminator.warm_up_steps=5", "distill.steps=2"]
    )
    steps, warm_up_step = [], distill.warm_up_step

    def second_is_enough(state, prompts, number):
        steps.append(number)
        return replace(warm_up_step(state, prompts, number), finished=number == 1)

    monkeypatch.setattr(distill, "warm_up_step", second_is_enough)
    signals = StopSignal()
    try:
        # Interrupted after the warm-up, before stage 2 has saved anything.
        monkeypatch.setattr(distill, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(settings, world, signals)
        run = only_run(tmp_path / "runs")
        assert steps == [0, 1] and "warm_up: goal reached after 2 of 5 steps" in capfd.readouterr().err
        monkeypatch.undo()
        monkeypatch.setattr(distill, "warm_up_step", second_is_enough)
        train(load_settings(str(run / "config.yaml"), resumed=True), world, signals, run)
    finally:
        signals.restore()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1]
    assert [(line["stage"], line["step"]) for line in lines if line["stage"] != "sft"] == [
        ("warm_up", 1),
        ("warm_up", 2),
        ("distill", 1),
        ("distill", 2),
    ]
    forecast = json.loads((run / "forecast.json").read_text())
    assert set(forecast) >= {"rollout/quality", "teacher/target_quality", "teacher/headroom"}
