"""Test the learned weights of the terms in stage 2 against separate rows, their training, and their checkpoints."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from material import WORLD, tiny_material, tiny_settings
from separate_rows import plain_logp, step_gradients

from rmsd_fast.config import CheckpointError, SettingsError
from rmsd_fast.models.shared_prefix import disable_shared_prefix
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.runtime.term_weights import TermWeights
from rmsd_fast.setting_rules.uses import loss_terms, uncertainty_lr_factor
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, uncertainty
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.state import encode_step

SMALL = (
    *("rollout.n=3", "rollout.max_new_tokens=8", "rollout.parity_every=0", "data.max_prompt_tokens=500"),
    *("micro_tokens=1500", "runtime.zero_stage=0", "distill.kl_coef=0.05", "reward.alpha=0", "stages=[sft,distill]"),
    *("self_teacher.kind=frozen", "self_teacher.views=[answer]", "self_teacher.max_hint_tokens=200"),
    *("kd.kind=k1", "kd.coef=0.7", "distill.sft_coef=0.3"),
)
POSITION = "credit.position=sigmoid"


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uncertainty")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


@pytest.fixture(scope="module")
def trained(folder, material, world):
    """Return a state after one step, four prompts, and the weights before and after the step.

    The third question has no hint, and the last one has nothing to imitate.
    """
    settings = tiny_settings(folder, *SMALL, "credit.uncertainty=instance")
    state = build_distillation(material.model_path, settings, world, material)
    usable = [q for q in material.train if state.targets[q.id].top]
    prompts = [state.builder.build(question) for question in usable[:4]]
    before = copy.deepcopy(state.student.model)
    state.policy.set_lr(1e-2)
    assert not distill.step(state, prompts, 0).skipped
    state.hints[prompts[2].question.id] = ()
    last = prompts[3].question.id
    state.targets[last] = replace(state.targets[last], top=())
    return state, prompts, before, copy.deepcopy(state.student.model)


def weigher(state, form, seed=1):
    """Return log-variances that are not zero, with a step of plain gradient descent."""
    hidden = state.student.model.config.text_config.hidden_size
    made = TermWeights(form, ["pg", "kd", "sft"], features=hidden, seed=0, world=WORLD)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in made.params.items():
            if not name.startswith("in."):
                param.copy_(0.4 * torch.randn(param.shape, generator=generator))
    made._optimizer = torch.optim.SGD(made.params.values(), lr=1.0)
    return made


def double(model):
    model = copy.deepcopy(model).double()
    disable_shared_prefix(model)
    return model


CASES = {"task": (), "instance": (), "instance by sequence": ("distill.aggregation=sequence_mean", POSITION)}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_separate_rows_in_float64(trained, monkeypatch, case):
    state, prompts, before, after = trained
    form = case.split()[0]
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, f"credit.uncertainty={form}", *CASES[case])
    # Groups are split over several passes.
    state.settings.micro_tokens = max(len(prompt.input_ids) for prompt in prompts) + 110
    state.term_weights = made = weigher(state, form)
    seen = []
    monkeypatch.setattr(uncertainty, "learn_weights", None)
    monkeypatch.setattr(distill, "learn_weights", lambda state, step: seen.append(step))
    keep = {name: param.detach().double().requires_grad_() for name, param in made.params.items()}
    groups, metrics, gradients = step_gradients(state, prompts, monkeypatch)
    # The step is not applied, so the log-variances do not learn either.
    assert not seen
    policy, reference = double(after), double(before)
    temperature = state.settings.rollout.temperature
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens, imitated = sum(len(r.token_ids) for r in rollouts), sum(len(g.imitated) for g in groups[:3])
    features = encode_step(state, prompts)
    total, learned, entropy, found = 0.0, 0.0, 0.0, []
    for i, group in enumerate(groups):
        prompt, ids = group.prompt, group.prompt.input_ids
        if form == "task":
            s = keep["log_variance"]
        else:
            pooled = torch.cat([features.pooled[m] for m in features.media_of(i)]).double().mean(0)
            hidden = torch.relu(keep["in.weight"] @ pooled + keep["in.bias"])
            s = keep["out.weight"] @ hidden + keep["out.bias"]
        found.append(s.detach())
        weights = (0.5 if form == "task" else 1.0) * torch.exp(-s)
        end = int((ids == state.builder.eos_id).nonzero()[-1])
        values, shares = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
        for rollout, advantage in zip(group.rollouts, group.advantages.tolist(), strict=True):
            own = plain_logp(policy, prompt, ids, rollout.token_ids, temperature)
            count = len(own)
            each = 1 / tokens if "sequence" not in case else 1 / (count * len(rollouts))
            place = (torch.arange(count, dtype=torch.float64) + 0.5) / count
            w = 0.25 + 0.75 / (1 + torch.exp(-(place - 0.3) / 0.1)) if "sequence" in case else torch.ones(count)
            with torch.no_grad():
                d = plain_logp(reference, prompt, ids, rollout.token_ids, temperature)
                added = torch.zeros(count)
                if i != 2:
                    (told,) = state.hints[prompt.question.id]
                    hint = torch.tensor(state.student.tokenizer("\n" + told.text)["input_ids"])
                    led = torch.cat([ids[:end], hint, ids[end:]])
                    added = 0.7 * (plain_logp(reference, prompt, led, rollout.token_ids, temperature) - own)
                    shares[1] += each * count
            shares[0] += each * count
            values[0] -= float(each * (w * advantage).sum())
            values[1] -= float(each * (w * added).sum())
            together = w * (weights[0].detach() * advantage + weights[1].detach() * added)
            d = d - own
            total = total + each * (-together * own + 0.05 * (torch.exp(d) - d - 1)).sum()
        if i != 3:
            loss = -plain_logp(policy, prompt, ids, group.imitated, 1.0).sum() / imitated
            total = total + 0.3 * weights[2].detach() * loss
            values[2], shares[2] = 0.3 * float(loss.detach()), len(group.imitated) / imitated
            entropy += float(loss.detach())
        for term in range(3):
            penalty = (0.5 if form == "task" else 1.0) * shares[term] * s[term]
            learned = learned + weights[term] * values[term] + penalty
    names, params = zip(*((n, p) for n, p in policy.named_parameters() if n in gradients), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, params), strict=True))
    scale = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    assert scale > 1e-2
    for name, gradient in gradients.items():
        assert float((gradient.double() - expected[name]).norm()) <= 2e-4 * scale, name
    assert metrics["policy/sft_loss"] == pytest.approx(entropy, rel=1e-5)
    means = torch.stack(found).mean(0).tolist()
    assert [metrics[f"uncertainty/{name}"] for name in ("pg", "kd", "sft")] == pytest.approx(means, rel=1e-4, abs=1e-5)
    # The same step, applied: descent with a rate of 1 moves the log-variances by their gradient.
    monkeypatch.undo()
    monkeypatch.setattr(distill, "apply_or_discard", lambda engines: ([e.discard() for e in engines] and [0.0], False))
    assert not distill.step(state, prompts, 1).skipped
    moved = dict(zip(keep, torch.autograd.grad(learned, list(keep.values())), strict=True))
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in moved.values())
    for name, param in made.params.items():
        step = keep[name].detach() - param.detach().double()
        assert float((step - moved[name]).norm()) <= 1e-3 * float(moved[name].norm()) + 1e-6, name


def test_weights_of_one_change_nothing(trained, monkeypatch):
    """The weights of `instance` are 1 before the first update. Those of `task` are 1/2, also of the loss' value."""
    state, prompts, _, _ = trained
    found = {}
    for form in ("none", "instance", "task"):
        names = [*SMALL, "distill.kl_coef=0", f"credit.uncertainty={form}"]
        state.settings = tiny_settings(state.settings.made.folder, *names)
        hidden = state.student.model.config.text_config.hidden_size
        made = TermWeights(form, ["pg", "kd", "sft"], features=hidden, seed=0, world=WORLD)
        state.term_weights = None if form == "none" else made
        found[form] = step_gradients(state, prompts, monkeypatch)[1:]
    (plain, expected), (metrics, gradients), (halved, halves) = found.values()
    assert metrics.keys() - plain.keys() == {"uncertainty/pg", "uncertainty/kd", "uncertainty/sft"}
    for name, gradient in expected.items():
        size = float(gradient.norm())
        assert float((gradients[name] - gradient).norm()) <= 1e-5 * size + 1e-9, name
        assert float((2 * halves[name] - gradient).norm()) <= 1e-5 * size + 1e-9, name
    for name in ("policy/loss", "policy/sft_loss", "policy/logp"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-7)
    assert halved["policy/loss"] == pytest.approx(plain["policy/loss"] / 2, rel=1e-5, abs=1e-7)
    assert halved["policy/sft_loss"] == pytest.approx(plain["policy/sft_loss"], rel=1e-5)


def test_a_skipped_step_teaches_nothing(trained, monkeypatch):
    state, prompts, _, _ = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, "credit.uncertainty=task")
    state.term_weights = made = weigher(state, "task")
    before = made.params["log_variance"].detach().clone()
    step_gradients(state, prompts, monkeypatch)
    assert torch.equal(made.params["log_variance"], before)


def test_features_are_constants():
    made = TermWeights("instance", ["kd", "sft"], features=6, seed=0, world=WORLD)
    with torch.no_grad():
        made.params["out.weight"].normal_(generator=torch.Generator().manual_seed(0))
    features = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    before = made.log_variances(features, 3).detach()
    made.set_lr(1e-2)
    made.step(torch.rand(3, 2), torch.ones(3, 2) / 3, features)
    assert features.grad is None
    # The log-variances of the questions differ, and have learned.
    assert before.std(dim=0).min() > 0.01 and not torch.equal(made.log_variances(features, 3), before)


def test_log_variances_stay_within_their_bounds():
    for form in ("task", "instance"):
        made = TermWeights(form, ["kd", "sft"], features=4, seed=0, world=WORLD)
        made.set_lr(3.0)
        features = torch.ones(1, 4)
        # The first term is huge, and the second one is negative, so that its s falls without end.
        for _ in range(10):
            made.step(torch.tensor([[1e6, -1.0]]), torch.ones(1, 2), features)
        assert made.log_variances(features, 1).tolist() == [[5.0, -5.0]]
        assert all(param.dtype == torch.float32 for param in made.params.values())


def test_log_variances_approach_the_logarithm_of_their_terms():
    made = TermWeights("task", ["kd", "sft"], features=0, seed=0, world=WORLD)
    made.set_lr(0.02)
    for _ in range(400):
        made.step(torch.tensor([[0.2, 1.0], [0.3, 1.5]]), torch.full((2, 2), 0.5), None)
    assert made.log_variances(None, 1)[0].tolist() == pytest.approx([math.log(0.5), math.log(2.5)], abs=1e-3)


@pytest.mark.parametrize("form", ["task", "instance"])
def test_checkpoints_continue_exactly(form, tmp_path):
    made, other = (TermWeights(form, ["pg", "sft"], features=3, seed=seed, world=WORLD) for seed in (0, 1))
    inputs = (torch.tensor([[0.1, 2.0]]), torch.ones(1, 2), torch.tensor([[1.0, -2.0, 3.0]]))
    made.set_lr(0.1)
    made.save(tmp_path / "start")
    for _ in range(3):
        made.step(*inputs)
    made.save(tmp_path / "saved")
    for folder in ("start", "saved"):
        other.load(tmp_path / folder)
        other.set_lr(0.1)
        for _ in range(3 if folder == "start" else 2):
            other.step(*inputs)
    for _ in range(2):
        made.step(*inputs)
    assert all(torch.equal(made.params[name], other.params[name]) for name in made.params)
    wrong = TermWeights(form, ["kd", "sft"], features=3, seed=0, world=WORLD)
    with pytest.raises(CheckpointError, match=r"got .*'pg', 'sft'.*; resume with the same credit.uncertainty"):
        wrong.load(tmp_path / "saved")


KD = ("self_teacher.kind=live", "self_teacher.views=[answer]", "kd.kind=k1")
UNREWARDED = ("stages=[distill]", *(f"reward.{name}=0" for name in ("alpha", "beta", "eta", "delta")))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["credit.uncertainty=task"], "credit.uncertainty: expected two or more of .*, got rewards; set e.g. distill"),
        ([*UNREWARDED, *KD, "credit.uncertainty=task"], "credit.uncertainty: expected two or more .* got kd.kind=k1"),
        (["credit.uncertainty_lr_factor=5"], "credit.uncertainty_lr_factor has no effect: credit.uncertainty is none"),
        (
            ["credit.uncertainty=instance", "distill.sft_coef=1", "distill.train_vision=true"],
            "credit.uncertainty: expected none or task with distill.train_vision",
        ),
        (
            [*KD, "credit.uncertainty=task", "distill.steps=20", "self_teacher.until_step=10"],
            "self_teacher.until_step: expected 0 with credit.uncertainty, .* got 10 of distill.steps=20",
        ),
        (["stages=[sft]", "credit.uncertainty=task"], "credit.uncertainty has no effect: stage distill is not in"),
    ],
)
def test_conflicting_settings_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", overrides)


def test_terms_and_learning_rates():
    settings = load_settings("quickstart", [*KD, "distill.sft_coef=1", "credit.uncertainty=task"])
    assert loss_terms(settings) == ["pg", "kd", "sft"] and uncertainty_lr_factor(settings) == 1000
    settings = load_settings("quickstart", [*UNREWARDED, *KD, "distill.sft_coef=1", "credit.uncertainty=instance"])
    assert loss_terms(settings) == ["kd", "sft"] and uncertainty_lr_factor(settings) == 10
    settings = load_settings(
        "quickstart", ["distill.sft_coef=1", "credit.uncertainty=task", "credit.uncertainty_lr_factor=3"]
    )
    assert loss_terms(settings) == ["pg", "sft"] and uncertainty_lr_factor(settings) == 3
