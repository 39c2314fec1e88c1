"""Test the imitation of teacher responses in stage 2, and the choice of these responses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from material import tiny_material, tiny_settings
from separate_rows import plain_logits, plain_logp, step_gradients

from rmsd_fast.config import SettingsError
from rmsd_fast.data.records import write_questions
from rmsd_fast.method.matching import TOP_TOKENS, draw_response
from rmsd_fast.models.shared_prefix import disable_shared_prefix
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, imitation, policy_pass, sft
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.imitation import selected_answers
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.state import encode_step

SMALL = (
    *("rollout.n=3", "rollout.max_new_tokens=8", "rollout.parity_every=0", "data.max_prompt_tokens=500"),
    *("micro_tokens=1500", "runtime.zero_stage=0", "distill.kl=k3", "distill.kl_coef=0.05"),
    *("reward.alpha=0", "stages=[sft,distill]", "rollout.engine=hf"),
)
COEF = 0.3


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("imitation")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


@pytest.fixture(scope="module")
def trained(folder, material, world):
    """Return a state after one step of stage 1, four prompts, and the weights before and after the step.

    Three questions have several best answers, and the last one has nothing to imitate.
    """
    settings = tiny_settings(folder, *SMALL, f"distill.sft_coef={COEF}")
    state = build_distillation(material.model_path, settings, world, material)
    tied = [q for q in material.train if len(state.targets[q.id].top) > 1]
    prompts = [state.builder.build(question) for question in tied[:4]]
    last = prompts[-1].question.id
    before = copy.deepcopy(state.student.model)
    # Answers differ in overlap only if the student prefers some tokens.
    state.policy.set_lr(3e-3)
    assert not sft.step(state, prompts[:3], 0).skipped
    state.targets[last] = replace(state.targets[last], top=())
    return state, prompts, before, copy.deepcopy(state.student.model)


def double(model):
    """Return a copy in float64 with the attention of transformers."""
    model = copy.deepcopy(model).double()
    disable_shared_prefix(model)
    return model


def answers_of(state, prompt):
    """Return the token ids of the answers of highest quality among those that may be imitated, and their indices."""
    targets = state.targets[prompt.question.id]
    return [state.builder.encode_response(targets.answers[k].text) for k in targets.top]


def overlaps_by_hand(model, prompt, answers):
    """Return the share of each answer's tokens among the 16 largest logits, by sorting all of them in float64."""
    shares = []
    for ids in answers:
        with torch.no_grad():
            logits = plain_logits(model, prompt, prompt.input_ids, ids)
        top = torch.topk(logits, 16).indices
        shares.append(sum(int(token) in row for token, row in zip(ids, top.tolist(), strict=True)) / len(ids))
    return shares


CASES = {
    "tokens": (),
    "aligned": ("teacher.selection=aligned",),
    "sequences": ("distill.aggregation=sequence_mean",),
    "full KL": ("distill.kl=full",),
    "KL in reward": ("reward.kl_in_reward=0.1",),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_separate_rows_in_float64(trained, monkeypatch, case):
    state, prompts, before, after = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, f"distill.sft_coef={COEF}", *CASES[case])
    # Some micro-batches then have rollouts only, and some only teacher responses.
    longest = max(len(prompt.input_ids) + max(map(len, answers_of(state, prompt)), default=0) for prompt in prompts)
    state.settings.micro_tokens = longest + (12 if case == "tokens" else 800)
    heads, compose = [], imitation.with_imitation
    monkeypatch.setattr(
        policy_pass, "with_imitation", lambda loss, *rest, **more: heads.append(loss) or compose(loss, *rest, **more)
    )
    groups, metrics, gradients = step_gradients(state, prompts, monkeypatch)
    if case == "tokens":
        assert None in heads and any(heads)
    policy, reference = double(after), double(before)
    temperature = state.settings.rollout.temperature
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    tokens, total, entropy, imitated = sum(len(rollout.token_ids) for rollout in rollouts), 0.0, 0.0, 0
    means = dict.fromkeys(("kl", "logp"), 0.0)
    for group in groups:
        prompt, ids = group.prompt, group.prompt.input_ids
        for rollout, advantage in zip(group.rollouts, group.advantages.tolist(), strict=True):
            logits = plain_logits(policy, prompt, ids, rollout.token_ids) / temperature
            every = torch.log_softmax(logits, -1)
            own = every.gather(1, rollout.token_ids[:, None])[:, 0]
            with torch.no_grad():
                others = plain_logits(reference, prompt, ids, rollout.token_ids) / temperature
            others = torch.log_softmax(others, -1)
            if case == "full KL":
                kl = (every.exp() * (every - others)).sum(-1)
            else:
                d = others.gather(1, rollout.token_ids[:, None])[:, 0] - own
                kl = torch.exp(d) - d - 1
            means["kl"] += float(kl.detach().sum()) / tokens
            means["logp"] += float(own.detach().sum()) / tokens
            weight = 1 / tokens if case != "sequences" else 1 / (len(own) * len(rollouts))
            total = total + weight * (-advantage * own + 0.05 * kl).sum()
        answers = answers_of(state, prompt)
        if answers:
            seed = {"seed": state.settings.seed, "question_id": prompt.question.id}
            places = range(len(answers))
            if case == "aligned":
                shares = overlaps_by_hand(policy, prompt, answers)
                places = [place for place in places if shares[place] == max(shares)]
            chosen = answers[draw_response(places, **seed)]
            assert torch.equal(chosen, group.imitated)
            entropy = entropy - plain_logp(policy, prompt, ids, chosen, 1.0).sum()
            imitated += len(chosen)
        else:
            assert group.imitated is None
    loss = total + COEF * entropy / imitated
    names, params = zip(*((n, p) for n, p in policy.named_parameters() if n in gradients), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    assert metrics["policy/sft_loss"] == pytest.approx(float(entropy.detach()) / imitated, rel=1e-5)
    # The value of an on-policy loss is that of its ratios, which are 1. Teacher responses are not part of it.
    assert metrics["policy/kl"] == pytest.approx(means["kl"], rel=1e-3, abs=1e-6)
    assert metrics["policy/logp"] == pytest.approx(means["logp"], rel=1e-5)
    assert metrics["policy/loss"] == pytest.approx(
        float(total.detach() + sum_of_ratios(groups, case, tokens)), abs=1e-5
    )
    scale = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    assert scale > 1e-2
    for name, gradient in gradients.items():
        assert float((gradient.double() - expected[name]).norm()) <= 1e-4 * scale, name


def sum_of_ratios(groups, case, tokens):
    """Return what the policy loss has in place of its log-probs: -A for each token instead of -A * logp."""
    count = sum(len(group.rollouts) for group in groups)
    total = 0.0
    for group in groups:
        for rollout, advantage in zip(group.rollouts, group.advantages.tolist(), strict=True):
            weight = 1 / tokens if case != "sequences" else 1 / (len(rollout.token_ids) * count)
            total += weight * advantage * float(rollout.logp.double().sum() - len(rollout.token_ids))
    return total


def test_the_imitated_rows_change_neither_the_policy_loss_nor_its_metrics(trained, monkeypatch):
    state, prompts, _, _ = trained
    found = []
    for coef in (0, COEF):
        state.settings = tiny_settings(state.settings.made.folder, *SMALL, f"distill.sft_coef={coef}")
        found.append(step_gradients(state, prompts, monkeypatch))
    (_, plain, _), (groups, metrics, _) = found
    assert metrics.keys() - plain.keys() == {"policy/sft_loss"}
    for name, value in plain.items():
        if name.startswith("policy/"):
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    imitated = [group for group in groups if group.imitated is not None]
    assert len(imitated) == 3
    each = sum(len(group.prompt.input_ids) + len(group.imitated) for group in imitated)
    assert metrics["tokens"] - plain["tokens"] == each
    # Prompts are shared.
    assert metrics["tokens_computed"] - plain["tokens_computed"] == sum(len(group.imitated) for group in imitated)


@pytest.mark.parametrize("selection", ["quality", "aligned"])
def test_a_batch_without_answers_equals_a_plain_step_bit_for_bit(trained, monkeypatch, selection):
    state, prompts, _, _ = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL)
    assert state.settings.distill.sft_coef == 0
    _, _, expected = step_gradients(state, prompts, monkeypatch)
    names = [f"distill.sft_coef={COEF}", f"teacher.selection={selection}"]
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, *names)
    without = {name: replace(targets, top=()) for name, targets in state.targets.items()}
    monkeypatch.setattr(state, "targets", without)
    _, metrics, gradients = step_gradients(state, prompts, monkeypatch)
    assert metrics["policy/sft_loss"] is None
    assert expected.keys() == gradients.keys()
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_aligned_answers_are_those_nearest_to_the_student(trained, monkeypatch):
    state, prompts, _, after = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, "teacher.selection=aligned")
    policy, found = double(after), []
    for tokens in (4000, max(len(prompt.input_ids) for prompt in prompts) + 90):
        state.settings.micro_tokens = tokens
        features = encode_step(state, prompts)
        found.append(selected_answers(state, prompts, features))
    (answers, record), (others, _) = found
    assert [a if a is None else a.tolist() for a in answers] == [a if a is None else a.tolist() for a in others]
    best = mean = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        candidates = answers_of(state, prompt)
        if not candidates:
            assert answer is None
            continue
        shares = overlaps_by_hand(policy, prompt, candidates)
        share = shares[[ids.tolist() for ids in candidates].index(answer.tolist())]
        assert share == max(shares)
        best, mean = best + share / 3, mean + sum(shares) / len(shares) / 3
    # The student distinguishes the answers, but does not know all of them.
    assert 0 < mean < best < 1
    values = {name: metric[1] / metric[2] for name, metric in record.items()}
    assert values["selection/tied_share"] == 1
    assert values["selection/overlap"] == pytest.approx(best)
    assert values["selection/overlap_of_all"] == pytest.approx(mean)


def test_stage_1_imitates_aligned_answers(trained, monkeypatch):
    state, prompts, _, after = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, "teacher.selection=aligned")
    monkeypatch.setattr(sft, "apply_or_discard", lambda engines: ([e.discard() for e in engines] and [0.0], True))
    metrics = sft.step(state, prompts[:3], 1).metrics
    policy, total, tokens = double(after), 0.0, 0
    answers, _ = selected_answers(state, prompts[:3], encode_step(state, prompts[:3]))
    for prompt, answer in zip(prompts, answers, strict=False):
        with torch.no_grad():
            total -= float(plain_logp(policy, prompt, prompt.input_ids, answer, 1.0).sum())
        tokens += len(answer)
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["selection/tied_share"] == 1 and metrics["selection/overlap"] > 0


MODES = {
    "shared": (),
    "padded": ("packing=padded",),
    "lora": ("model.adapter=lora", "sft.train_vision=false", "distill.kl=full"),
    "vision": ("distill.train_vision=true",),
    "zero3": ("runtime.zero_stage=3",),
}


def first_step(folder, material, world, mode):
    """Return the metrics of the first step in a mode."""
    names = [f"distill.sft_coef={COEF}", "teacher.selection=aligned", *MODES[mode]]
    settings = tiny_settings(folder, *SMALL, *names)
    state = build_distillation(material.model_path, settings, world, material)
    prompts = [state.builder.build(q) for q in material.train[:3]]
    result = distill.step(state, prompts, 0)
    state.policy.close()
    assert not result.skipped
    return result.metrics


@pytest.fixture(scope="module")
def plain(folder, material, world):
    return first_step(folder, material, world, "shared")


@pytest.mark.parametrize("mode", ["padded", "lora", "vision", "zero3"])
def test_the_first_step_is_the_same_in_other_modes(folder, material, world, plain, mode):
    metrics = first_step(folder, material, world, mode)
    # The gradient has other parameters if the tower or adapters are trained.
    same = ["policy/sft_loss", "policy/logp", "policy/entropy", "selection/overlap", "selection/tied_share"]
    same += ["policy/grad_norm"] if mode in ("padded", "zero3") else []
    assert {name: metrics[name] for name in same} == pytest.approx({name: plain[name] for name in same}, rel=1e-4)
    assert metrics["policy/sft_loss"] > 1


def test_a_pool_without_usable_answers_is_refused(folder, material, world):
    settings = tiny_settings(folder, *SMALL, f"distill.sft_coef={COEF}")
    nothing = {
        name: [answer._replace(text="<bad", valid=False, quality=0.0, reason="empty") for answer in answers]
        for name, answers in material.scores.items()
    }
    with pytest.raises(SettingsError, match="distill.sft_coef: expected questions with a usable response, got none"):
        build_distillation(material.model_path, settings, world, replace(material, scores=nothing))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stages=[sft,control]", "distill.sft_coef=0.1"], "distill.sft_coef has no effect: stage distill is not in"),
        (
            ["stages=[sft]", "sft.responses=all", "teacher.selection=aligned"],
            "teacher.selection has no effect: no stage",
        ),
        (["stages=[distill]", "teacher.selection=aligned"], "teacher.selection has no effect: no stage imitates"),
        (["teacher.responses=1", "teacher.selection=aligned"], "teacher.selection has no effect: .* nothing to choose"),
        (
            [
                "stages=[distill]",
                *(f"reward.{name}=0" for name in ("alpha", "beta", "eta", "delta")),
                "distill.sft_coef=1",
            ],
            "kd.kind: expected .* if no reward has a weight",
        ),
    ],
)
def test_settings_without_effect_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", overrides)


def test_a_pool_is_required_and_its_filter_has_an_effect():
    names = ["stages=[distill]", "reward.alpha=0", "distill.sft_coef=0.05"]
    assert load_settings("rmsd_qwen3vl_4b", [*names, "teacher.filter=imitation"]).teacher.filter == "imitation"
    with pytest.raises(SettingsError, match="teacher.filter has no effect: no stage imitates"):
        load_settings("rmsd_qwen3vl_4b", [*names[:2], "teacher.filter=imitation"])
    assert TOP_TOKENS == 16


TINY = (
    *("data.heldout=", "data.max_prompt_tokens=500", "data.cache_mib=16", "micro_tokens=2000", "video.num_frames=8"),
    *("rollout.max_new_tokens=8", "distill.batch_size=4", "runtime.trackers=[]"),
)


@pytest.mark.parametrize("recipe", ["brts", "beta_kd"])
def test_recipes_train_a_tiny_student(folder, material, world, recipe):
    train = folder / "recipe.jsonl"
    write_questions(train, material.train, media_root=folder)
    paths = [f"data.train={train}", f"data.media_root={folder}", f"model.path={material.model_path}"]
    settings = load_settings(recipe, [*paths, f"teacher.pool={material.files['pool']}", *TINY])
    text, ready = describe_plan(settings)
    assert ready, text
    inputs = prepare_material(settings, world)
    state = build_distillation(material.model_path, settings, world, inputs)
    assert set(state.policy.names) == {name for name, p in state.policy.module.named_parameters() if p.requires_grad}
    prompts = [state.builder.build(question) for question in inputs.train if state.targets[question.id].top][:3]
    before = {name: p.detach().clone() for name, p in state.policy.module.named_parameters()}
    for number in range(2):
        state.policy.set_lr(1e-3)
        if state.term_weights is not None:
            state.term_weights.set_lr(0.1)
        result = distill.step(state, prompts, number)
        assert not result.skipped and result.metrics["policy/grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in state.policy.module.named_parameters())
    assert all(group.imitated is not None for group in result.groups)
    learned = {name: value for name, value in result.metrics.items() if name.startswith("uncertainty/")}
    if recipe == "brts":
        assert "imitates one best answer per question (aligned), with weight 0.05" in text
        assert result.metrics["selection/tied_share"] is not None and not learned
    else:
        assert "learned weights of the terms kd, sft, by instance" in text
        assert "selection/tied_share" not in result.metrics
        # Each s moves toward the logarithm of its term.
        assert learned.keys() == {"uncertainty/kd", "uncertainty/sft"} and learned["uncertainty/sft"] > 0
        assert not any("term" in name or "variance" in name for name in state.policy.module.state_dict())
    state.policy.close()
