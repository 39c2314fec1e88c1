"""Test the self-teacher in stage 2: its log-probs, losses and gradients against separate rows, and its settings."""

from __future__ import annotations

import copy
import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from material import tiny_material, tiny_settings
from separate_rows import plain_logits, plain_logp, step_gradients
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import only_run, run_train

from rmsd_fast.config import DIVERGENCES, RewardConfig, SettingsError
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import write_questions
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.families.qwen2_5_vl import QWEN2_5_VL
from rmsd_fast.models.shared_prefix import disable_shared_prefix
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.setting_rules.uses import rewards_rollouts
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import distill, sft, vocabulary
from rmsd_fast.stages.build import build_distillation, build_imitation
from rmsd_fast.stages.hints import read_hints
from rmsd_fast.stages.material import check_top_tokens, prepare_material
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.rollout_log import log_rollouts

SMALL = (
    *("rollout.n=3", "rollout.max_new_tokens=8", "rollout.parity_every=0", "data.max_prompt_tokens=500"),
    *(
        "micro_tokens=1500",
        "runtime.zero_stage=0",
        "discriminator.head=random",
        "distill.lr=1e-2",
        "reward.score_sd_offset=0",
    ),
    *("self_teacher.max_hint_tokens=200", "self_teacher.views=[answer]", "kd.kind=k1"),
)
TAUGHT = ("self_teacher.kind=live", "self_teacher.views=[answer]", "kd.kind=k1")
WEIGHTED = ("self_teacher.kind=live", "self_teacher.views=[answer]", "credit.magnitude=teacher")
UNREWARDED = ("stages=[distill]", *(f"reward.{name}=0" for name in ("alpha", "beta", "eta", "delta")))
HINTS = {"reasoning": "It moves to the right and stops at the edge.", "cue": "The edge on the right.", "window": [1, 2]}
RATE = 0.3


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("self_teacher")


@pytest.fixture(scope="module")
def material(folder):
    material = tiny_material(folder)
    # One question has no hints of the file.
    hinted = [replace(q, hints=HINTS) if number % 4 else q for number, q in enumerate(material.train)]
    return replace(material, train=hinted)


def build(folder, material, world, *overrides):
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_distillation(material.model_path, settings, world, material)
    return state, [state.builder.build(q) for q in material.train[:3]]


@pytest.fixture(scope="module")
def trained(folder, material, world):
    """Return a state after one step, its prompts, and copies of the weights before and after the step."""
    state, prompts = build(
        *(folder, material, world, "self_teacher.kind=ema", f"self_teacher.ema_rate={RATE}", "distill.kl=k3")
    )
    before = copy.deepcopy(state.student.model)
    # Unlike in a run, the policy is then far from the stage-1 student, so that all kinds of teachers differ.
    state.policy.set_lr(1e-2)
    assert not distill.step(state, prompts, 0).skipped
    return state, prompts, before, copy.deepcopy(state.student.model)


def told(material, state, settings, world):
    """Return what the self-teacher is told."""
    return read_hints(material, state.builder, state.targets, settings, world, ())


def plain_divergence(kind, teacher, student, bound):
    """Return the divergence of each token from logits [R, V], with clipped summands, float64 [R]."""
    log_q, log_p = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":
        terms = q * (log_q - log_p)
    elif kind == "reverse_kl":
        terms = p * (log_p - log_q)
    else:
        share = {"jsd": 0.5, "skew_kl": 0.1}[kind]
        log_m = (share * q + (1 - share) * p).log()
        terms = q * (log_q - log_m)
        if kind == "jsd":
            terms = 0.5 * terms + 0.5 * p * (log_p - log_m)
    return torch.where(terms > bound, torch.full_like(terms, bound), terms).sum(-1)


def hint_of(question, views):
    """Return the texts of the views that a question has, written out again."""
    facts = {
        "answer": f"The correct answer: {question.answer}",
        "reasoning": f"A correct solution: {HINTS['reasoning']}",
        "half_reasoning": "A correct solution begins: It moves to the right",
        "cue": f"What to look at: {HINTS['cue']}",
        "window": "The answer is visible from 1 to 2 seconds.",
    }
    if question.task_type == "mcq":
        number = ord(question.answer) - ord("A")
        facts["answer"] = f"The correct answer: {question.answer}. {question.options[number].removeprefix('A. ')}"
    return [facts[view] for view in views if view == "answer" or question.hints]


METHODS = {
    "visd": ("ema", ["answer", "window"], {"credit.magnitude": "teacher", "kd.kind": "none"}),
    "k1": ("frozen", ["cue"], {"kd.kind": "k1", "kd.coef": 0.7}),
    "avsd": ("frozen", ["reasoning", "half_reasoning", "answer"], {"kd.kind": "avsd", "kd.gap_clip": 2.0}),
    "position": ("live", ["answer"], {"kd.kind": "k1", "credit.position": "sigmoid"}),
    "pw_opsd": (
        *("frozen", ["reasoning", "answer"]),
        {"kd.kind": "forward_kl", "kd.vocab_clip": 0.01, "kd.temperature": 1.1, "kd.coef": 2.0}
        | {"credit.position": "sigmoid", "distill.aggregation": "sequence_mean"},
    ),
    "reverse_kl": ("ema", ["cue"], {"kd.kind": "reverse_kl"}),
    "jsd": ("live", ["answer"], {"kd.kind": "jsd", "kd.coef": 5.0, "credit.position": "sigmoid"}),
    "visd_topk": (
        "ema",
        ["answer", "window"],
        {"credit.magnitude": "teacher", "kd.kind": "none"} | {"credit.magnitude_topk": 4, "credit.magnitude_clip": 1.0},
    ),
    "prune": (
        *("live", ["cue"]),
        {"kd.kind": "k1", "credit.prune": "overlap", "credit.prune_topk": 5, "credit.prune_decay": 0.2}
        | {"credit.magnitude": "teacher", "credit.magnitude_topk": 3},
    ),
    "pruned_kl": (
        *("frozen", ["cue"]),
        {"kd.kind": "forward_kl", "credit.prune": "overlap", "credit.prune_decay": 0.2, "credit.position": "sigmoid"}
        | {"credit.prune_overlap": 0.2},
    ),
    "skew_kl": ("ema", ["answer"], {"kd.kind": "skew_kl", "kd.vocab_clip": 0.02, "credit.magnitude": "teacher"}),
}


def with_settings(state, kind, views, changes, *others):
    overrides = [f"{name}={value}" for name, value in changes.items()]
    overrides += [f"self_teacher.kind={kind}", f"self_teacher.views=[{','.join(views)}]", *others]
    state.settings = tiny_settings(state.settings.made.folder, *SMALL, *overrides)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_separate_rows_in_float64(trained, material, world, monkeypatch, method):
    state, prompts, before, after = trained
    kind, views, changes = METHODS[method]
    with_settings(state, kind, views, changes)
    state.hints = told(material, state, state.settings, world)
    groups, metrics, gradients = step_gradients(state, prompts, monkeypatch)
    assert any(float(group.advantages.abs().max()) > 0.1 for group in groups)
    models = {name: copy.deepcopy(model).double() for name, model in (("live", after), ("frozen", before))}
    models["ema"] = copy.deepcopy(models["frozen"])
    with torch.no_grad():
        for average, new in zip(models["ema"].parameters(), models["live"].parameters(), strict=True):
            average.lerp_(new, RATE)
    for model in models.values():
        disable_shared_prefix(model)
    policy, temperature = models["live"], state.settings.rollout.temperature
    credit, kd = state.settings.credit, state.settings.kd
    total, tokens, gaps = 0.0, sum(len(r.token_ids) for group in groups for r in group.rollouts), []
    overlaps, pruned = [], []
    by_sequence, divergences, shares = state.settings.distill.aggregation == "sequence_mean", 0.0, 0.0
    for group in groups:
        ids = group.prompt.input_ids
        end = int((ids == state.builder.eos_id).nonzero()[-1])
        texts = hint_of(group.prompt.question, views)
        if method != "avsd" and texts:
            texts = ["\n".join(texts)]
        for rollout, advantage in zip(group.rollouts, group.advantages.tolist(), strict=True):
            own = plain_logp(policy, group.prompt, ids, rollout.token_ids, temperature)
            with torch.no_grad():
                reference = plain_logp(models["frozen"], group.prompt, ids, rollout.token_ids, temperature)
                hints = [torch.tensor(state.student.tokenizer("\n" + text)["input_ids"]) for text in texts]
                led = [torch.cat([ids[:end], hint, ids[end:]]) for hint in hints]
                views_logp = [plain_logp(models[kind], group.prompt, i, rollout.token_ids, temperature) for i in led]
                if led:
                    hinted_z = plain_logits(models[kind], group.prompt, led[0], rollout.token_ids)
                    untold = plain_logits(policy, group.prompt, ids, rollout.token_ids)
            misses = 0
            weights, positions = [], []
            for t, p in enumerate(own.tolist()):
                u, g, w = 1.0, 0.0, 1.0
                if views_logp:
                    q = [float(view[t]) for view in views_logp]
                    gap = sum(q) / len(q) - p
                    gaps.append(gap)
                    if kd.kind == "k1":
                        g = min(max(gap, -10), 10)
                    if kd.kind == "avsd":
                        j = math.log(sum(map(math.exp, q)) / len(q)) - sum(q) / len(q)
                        c = abs(gap) / (sum(abs(x - p) for x in q) / len(q) + 1e-8)
                        g = gap + c * abs(gap) / (abs(gap) + max(j, 0) + 1e-8) * max(j, 0)
                        g = min(max(g, -2), 2)
                    if credit.magnitude == "teacher":
                        share = 0.5 * (1 - 1 / 600)
                        sign = math.copysign(1, advantage) if advantage else 0
                        if credit.magnitude_topk:
                            own_id = int(rollout.token_ids[t])
                            union = sorted({*hinted_z[t].topk(credit.magnitude_topk).indices.tolist(), own_id})
                            at = union.index(own_id)
                            log_q, log_p = (torch.log_softmax(x[t, union] / temperature, 0) for x in (hinted_z, untold))
                            gap = float(log_q[at] - log_p[at])
                        clip = credit.magnitude_clip
                        u = 1 - share + share * min(max(math.exp(sign * gap), 1 - clip), 1 + clip)
                    if credit.prune == "overlap":
                        best = [set(x[t].topk(credit.prune_topk).indices.tolist()) for x in (hinted_z, untold)]
                        overlaps.append(len(best[0] & best[1]) / credit.prune_topk)
                        misses += overlaps[-1] < credit.prune_overlap
                        w = max(1 - 0.2 * misses, 0) + 0.5
                        pruned.append(w)
                if credit.position == "sigmoid":
                    place = (t + 0.5) / len(own)
                    w *= 0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1))
                weights.append(w * (advantage * u + kd.coef * g))
                positions.append(w)
            d = reference - own
            kl = torch.exp(d) - d - 1
            of_rollout = -(torch.tensor(weights, dtype=torch.float64) * own) + 1e-3 * kl
            share = 1 / len(own) if by_sequence else 1.0
            if kd.kind in DIVERGENCES and views_logp:
                heat, bound = kd.temperature or temperature, kd.vocab_clip or math.inf
                untold = plain_logits(policy, group.prompt, ids, rollout.token_ids)
                divergence = plain_divergence(kd.kind, hinted_z / heat, untold / heat, bound)
                positions = torch.tensor(positions, dtype=torch.float64)
                of_rollout = of_rollout + kd.coef * positions * divergence
                divergences += share * float((positions * divergence.detach()).sum())
                shares += share * float(positions.sum())
            total = total + share * of_rollout.sum()
    loss = total / (sum(len(group.rollouts) for group in groups) if by_sequence else tokens)
    names, params = zip(*((n, p) for n, p in policy.named_parameters() if n in gradients), strict=True)
    expected = dict(zip(names, torch.autograd.grad(loss, params), strict=True))
    if credit.prune == "overlap":
        assert metrics["credit/overlap"] == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-5)
        assert metrics["credit/prune_weight"] == pytest.approx(sum(pruned) / len(pruned), rel=1e-5)
        assert min(overlaps) < credit.prune_overlap <= max(overlaps) and min(pruned) < max(pruned)
    assert metrics["self_teacher/gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-3, abs=1e-5)
    assert metrics["self_teacher/gap_size"] > 1e-3
    hinted = 2 / 3 if views == ["cue"] else 1.0
    if kd.kind in DIVERGENCES:
        assert metrics["kd/divergence"] == pytest.approx(divergences / shares, rel=1e-3)
        assert "kd/clipped_share" not in metrics and not groups[0].teacher_hidden
    assert metrics["self_teacher/hinted_share"] == pytest.approx(hinted)
    # The value of an on-policy loss is that of its ratios, which are 1.
    scale = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in expected.values()))
    assert scale > 1e-3
    for name, gradient in gradients.items():
        assert float((gradient.double() - expected[name]).norm()) <= 2e-4 * scale, name


def test_the_teacher_pass_does_not_depend_on_micro_batches(trained, material, world, monkeypatch):
    state, prompts, _, _ = trained
    found = []
    reference, calls = state.reference, []
    monkeypatch.setattr(state, "reference", lambda *arguments: calls.append(1) or reference(*arguments))
    # All groups with their views in one pass, and a rollout after each of the views in several passes.
    for tokens in (4000, max(len(prompt.input_ids) for prompt in prompts) + 80):
        with_settings(state, "frozen", ["reasoning", "answer"], {"kd.kind": "avsd"}, "credit.magnitude=teacher")
        state.settings.micro_tokens = tokens
        state.hints = told(material, state, state.settings, world)
        found.append(step_gradients(state, prompts, monkeypatch)[1:])
        found[-1][0]["passes"] = len(calls)
    (expected, gradients), (metrics, others) = found
    # The reference's own log-probs come from the same passes.
    assert expected["passes"] == 1 and metrics["passes"] > 4
    for name in ("policy/kl", "self_teacher/gap", "self_teacher/gap_size", "credit/clipped_share"):
        assert metrics[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5)
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name


def test_divergences_without_rewards_skip_the_policy_gradient(trained, material, world, monkeypatch):
    """Their gradient is that of a policy loss with advantages of 0, in one micro-batch or in several."""
    state, prompts, _, _ = trained
    found = []
    for learns, tokens in ((False, 4000), (True, 4000), (False, max(len(p.input_ids) for p in prompts) + 80)):
        others = ["distill.kl_coef=0", "credit.position=sigmoid", "credit.prune=overlap", "credit.prune_decay=0.2"]
        with_settings(state, "ema", ["answer"], {"kd.kind": "forward_kl", "kd.vocab_clip": 0.05}, *others)
        state.settings.micro_tokens = tokens
        state.settings.reward = RewardConfig(alpha=0, beta=0, eta=0, delta=0)
        state.hints = read_hints(material, state.builder, state.targets, state.settings, world, ())
        with monkeypatch.context() as patched:
            if learns:
                patched.setattr(vocabulary, "has_policy_gradient", lambda settings: True)
            found.append(step_gradients(state, prompts, patched)[1:])
    (metrics, gradients), (_, whole), (others, parts) = found
    assert metrics["kd/divergence"] == pytest.approx(others["kd/divergence"], rel=1e-4) and metrics["policy/logp"] < 0
    assert metrics["credit/overlap"] == pytest.approx(others["credit/overlap"], rel=1e-3)
    # It does not contain the divergence.
    assert metrics["policy/loss"] == 0 and metrics["policy/engine_kl"] == pytest.approx(0, abs=1e-5)
    assert sum(float(gradient.norm()) for gradient in gradients.values()) > 1e-3
    for name, gradient in gradients.items():
        assert float((whole[name] - gradient).norm()) <= 1e-6 * float(gradient.norm()) + 1e-9, name
        assert float((parts[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name


def test_divergence_and_imitation_add_up(trained, material, world, monkeypatch):
    """Both are part of the policy's passes, of which some contain only the imitated answers."""
    state, prompts, _, _ = trained
    gradients, metrics = {}, {}
    # Room for one answer or a few rollouts.
    tokens = max(len(prompt.input_ids) for prompt in prompts) + 80
    for imitates in (True, False):
        for distilled in (True, False):
            others = ["distill.sft_coef=0.5"] if imitates else []
            if distilled:
                with_settings(state, "live", ["answer"], {"kd.kind": "forward_kl"}, *others)
                state.hints = told(material, state, state.settings, world)
            else:
                state.settings = tiny_settings(state.settings.made.folder, *SMALL[:-3], *others)
            state.settings.micro_tokens = tokens
            _, metrics[imitates, distilled], gradients[imitates, distilled] = step_gradients(
                state, prompts, monkeypatch
            )
    assert metrics[True, True]["kd/divergence"] == pytest.approx(metrics[False, True]["kd/divergence"], rel=1e-4)
    assert metrics[True, True]["policy/sft_loss"] == pytest.approx(metrics[True, False]["policy/sft_loss"], rel=1e-5)
    alone, both = (
        {name: gradients[imitates, True][name] - g for name, g in gradients[imitates, False].items()}
        for imitates in (False, True)
    )
    scale = sum(float(gradient.norm()) for gradient in alone.values())
    assert scale > 1e-3
    assert all(float((both[name] - gradient).norm()) <= 1e-3 * scale for name, gradient in alone.items())


@pytest.mark.parametrize(
    "overrides",
    [
        ("packing=padded",),
        ("distill.train_vision=true",),
        ("model.adapter=lora", "sft.train_vision=false", "discriminator.mode=shared", "runtime.zero_stage=2"),
    ],
    ids=" ".join,
)
def test_all_kinds_agree_before_the_first_update(folder, material, world, monkeypatch, overrides):
    """They have the same weights then. An average of rate 1 has the policy's weights afterwards, too."""
    ema = ("self_teacher.kind=ema", "self_teacher.ema_rate=1", *overrides)
    state, prompts = build(folder, material, world, *ema)
    seen, divergences = [], []

    def discarded(engines):
        for engine in engines:
            engine.discard()
        return [0.0] * len(engines), True

    for number in range(2):
        for kind in ("frozen", "live", "ema"):
            # A divergence needs the head of the teacher, too, and not only its log-probs.
            taught = (f"self_teacher.kind={kind}", "kd.kind=forward_kl")
            state.settings = tiny_settings(folder, *SMALL, *overrides, *taught)
            with monkeypatch.context() as patched:
                patched.setattr(distill, "apply_or_discard", discarded)
                metrics = distill.step(state, prompts, number).metrics
            seen.append(metrics["self_teacher/gap_size"])
            divergences.append(metrics["kd/divergence"])
        if number == 0:
            assert seen[1:] == pytest.approx(seen[:1] * 2, rel=1e-4) and seen[0] > 1e-3
            assert divergences[1:] == pytest.approx(divergences[:1] * 2, rel=1e-3) and divergences[0] > 1e-5
            state.settings = tiny_settings(folder, *SMALL, *ema)
            state.policy.set_lr(1e-2)
            assert not distill.step(state, prompts, 0).skipped
    frozen, live, average = seen[3:]
    assert average == pytest.approx(live, rel=1e-5) and abs(frozen - live) > 1e-3 * live
    frozen, live, average = divergences[3:]
    assert average == pytest.approx(live, rel=1e-4) and abs(frozen - live) > 1e-3 * live


def test_steps_without_the_teacher_equal_plain_steps_bit_for_bit(trained, material, world, monkeypatch):
    state, prompts, _, _ = trained
    state.settings = tiny_settings(state.settings.made.folder, *SMALL[:-3])
    assert state.settings.self_teacher.kind == "none"
    _, metrics, expected = step_gradients(state, prompts, monkeypatch)
    assert not any(name.startswith(("self_teacher/", "credit/", "kd/")) for name in metrics)
    weighted = {"credit.magnitude": "teacher", "kd.kind": "none"}
    for changes, others in (
        (weighted, ["self_teacher.until_step=1"]),
        (weighted, ["credit.magnitude_steps=1", "credit.magnitude_topk=4"]),
        ({"credit.prune": "overlap", "kd.kind": "none"}, ["self_teacher.until_step=1"]),
        ({"credit.magnitude": "teacher", "kd.kind": "jsd"}, ["self_teacher.until_step=1"]),
    ):
        with_settings(state, "ema", ["answer"], changes, *others)
        state.timer.take()
        _, metrics, gradients = step_gradients(state, prompts, monkeypatch)
        assert [metrics[f"self_teacher/{name}"] for name in ("gap", "gap_size", "hinted_share")] == [None] * 3
        assert [metrics.get(f"credit/{name}") for name in ("clipped_share", "overlap", "prune_weight")] == [None] * 3
        assert "seconds/teacher" not in state.timer.take()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    # Without any hint, the passes of the teacher run for the other processes, and change nothing.
    for kind, distilled in (("live", "k1"), ("ema", "k1"), ("ema", "forward_kl")):
        pruned = ["credit.prune=overlap"] if kind == "ema" else []
        with_settings(state, kind, ["answer"], {"kd.kind": distilled}, *pruned)
        state.hints = {name: () for name in state.hints}
        _, metrics, gradients = step_gradients(state, prompts, monkeypatch)
        assert metrics["self_teacher/hinted_share"] == 0 and "seconds/teacher" in state.timer.take()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_unusable_hints_are_counted_or_refused(trained, material, world, caplog):
    state = trained[0]

    def read(*overrides, rewards=True):
        settings = tiny_settings(state.settings.made.folder, *SMALL, "self_teacher.kind=live", *overrides)
        if not rewards:
            settings.reward = RewardConfig(alpha=0, beta=0, eta=0, delta=0)
        return told(material, state, settings, world)

    with pytest.raises(
        SettingsError, match=r"self_teacher.views: expected hints that the training questions have, got"
    ):
        read("self_teacher.views=[feedback]")
    with pytest.raises(DataError, match=r"hints: .* cannot be used: too_long .*max_hint_tokens: expected at least"):
        read("self_teacher.views=[reasoning]", "self_teacher.max_hint_tokens=9")
    # The reasoning is longer than the answers.
    answers = read("self_teacher.views=[answer]")
    most = max(len(state.builder.encode_hint(hint.text, max_tokens=99)) for (hint,) in answers.values())
    views = ["self_teacher.views=[reasoning,answer]", "kd.kind=avsd", f"self_teacher.max_hint_tokens={most}"]
    assert read(*views, "data.max_bad_share=1") == answers
    # A quarter of the questions has no cue. Rewards teach them something; without rewards, nothing does.
    caplog.clear()
    hints = read("self_teacher.views=[cue]", "data.max_bad_share=0.1")
    asked = f"self-teacher: {sum(map(bool, hints.values()))} of {len(hints)} questions have hints"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("WARNING", asked)]
    with pytest.raises(SettingsError, match=r"at most 0.1 of the training questions .*got 9 of 36 without any of"):
        read("self_teacher.views=[cue]", "data.max_bad_share=0.1", rewards=False)
    assert read("self_teacher.views=[cue]", "data.max_bad_share=0.5", rewards=False) == hints


def test_times_of_late_parts_need_a_student_that_knows_times(trained, material, world, monkeypatch):
    state = trained[0]
    settings = tiny_settings(
        state.settings.made.folder, *SMALL, "self_teacher.kind=live", "self_teacher.views=[window]"
    )
    late = [replace(q, hints=HINTS, spans=((5.0, 8.0),)) for q in material.train]
    assert state.builder.states_times
    told(replace(material, train=late), state, settings, world)
    monkeypatch.setattr(state.builder, "_family", QWEN2_5_VL)
    with pytest.raises(DataError, match="expected no window, since the part shown starts at 5 s of the file"):
        told(replace(material, train=late), state, settings, world)
    early = [replace(q, hints=HINTS, spans=((0.0, 8.0),)) for q in material.train]
    told(replace(material, train=early), state, settings, world)


def test_stage_1_with_hints_equals_separate_rows_in_float64(folder, material, world, monkeypatch):
    overrides = ("self_teacher.views=[cue]", "kd.kind=none", "sft.hinted_share=1", "sft.responses=all")
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_imitation(material.model_path, settings, world, material, stage="sft")
    # The first question has no cue.
    prompts = [state.builder.build(q) for q in material.train[:3]]
    answers = [
        [state.targets[p.question.id].answers[k].text for k in state.targets[p.question.id].imitate] for p in prompts
    ]
    assert min(map(len, answers)) > 1
    model = copy.deepcopy(state.student.model).double()
    disable_shared_prefix(model)
    total, tokens = 0.0, 0
    for prompt, texts in zip(prompts, answers, strict=True):
        end = int((prompt.input_ids == state.builder.eos_id).nonzero()[-1])
        hint = "".join(f"\n{text}" for text in hint_of(prompt.question, ["cue"]))
        ids = torch.tensor(state.builder.tokenizer(hint)["input_ids"], dtype=torch.int64)
        ids = torch.cat([prompt.input_ids[:end], ids, prompt.input_ids[end:]])
        for text in texts:
            response = state.builder.encode_response(text)
            total, tokens = total - plain_logp(model, prompt, ids, response, 1.0).sum(), tokens + len(response)
    (total / tokens).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {}

    def keep(engines):
        found.update({name: p.grad.clone() for name, p in state.policy.module.model.named_parameters()})
        engines[0].discard()
        return [0.0], True

    monkeypatch.setattr(sft, "apply_or_discard", keep)
    metrics = sft.step(state, prompts, 0).metrics
    assert metrics["loss"] == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    for name, gradient in found.items():
        if gradient is not None and name in expected:
            error = float((gradient.double() - expected[name]).norm() / (expected[name].norm() + 1e-9))
            assert error < 1e-4, name


def test_each_step_draws_the_questions_that_are_shown_with_hints(folder, material, world):
    overrides = ("self_teacher.views=[answer]", "kd.kind=none", "sft.hinted_share=0.5")
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_imitation(material.model_path, settings, world, material, stage="sft")
    prompts = [state.builder.build(q) for q in material.train[:3] if state.targets[q.id].imitate]
    drawn = []
    for number in range(60):
        bodies, leads = sft._with_hints(state, prompts, [[torch.empty(1)]] * len(prompts), number)
        plain = [len(p.input_ids) - len(body.input_ids) for p, body in zip(prompts, bodies, strict=True)]
        drawn.append([len(of[0]) > n for of, n in zip(leads, plain, strict=True)])
    share = torch.tensor(drawn).double().mean(dim=0)
    assert ((share > 0.25) & (share < 0.75)).all() and len(set(map(tuple, drawn))) > 2
    # Hints without a text cannot be shown.
    told = [replace(q, hints={"media": {"videos": list(q.videos), "images": []}}) for q in material.train]
    settings.self_teacher.views = ["media", "cue"]
    with pytest.raises(
        SettingsError, match="sft.hinted_share: expected training questions with a hint that has a text"
    ):
        read_hints(replace(material, train=told), state.builder, state.targets, settings, world, (), apart=True)
    # The control of stage 2 imitates without hints.
    control = build_imitation(material.model_path, settings, world, material, stage="control")
    assert control.hinted_share == 0


def test_missing_hints_are_reported_before_stage_1(folder, material, world):
    settings = tiny_settings(folder, *SMALL, "self_teacher.kind=live", "self_teacher.views=[feedback]")
    with pytest.raises(SettingsError, match="of which no question has any"):
        build_imitation(material.model_path, settings, world, material, stage="sft")
    train = folder / "questions.jsonl"
    write_questions(train, material.train, media_root=folder)
    paths = [f"data.train={train}", f"data.media_root={folder}", "data.heldout=", f"model.path={material.model_path}"]
    text, ready = describe_plan(load_settings("opsd", [*paths, "self_teacher.views=[feedback]"]))
    assert not ready and "MISSING: self_teacher.views: expected hints that the training questions have" in text
    text, ready = describe_plan(load_settings("opsd", paths))
    hinted = sum(q.answer is not None for q in material.train)
    asked = len(material.train)
    assert f"self-teacher: {hinted} of {asked} questions have hints (answer {hinted}; none was tokenized)" in text
    assert "  no rewards" in text and "tau=" not in text
    # A quarter of the questions has no cue, of which a run with rewards warns.
    text, _ = describe_plan(
        load_settings("visd", [*paths, "self_teacher.views=[cue,answer]", "data.max_bad_share=0.1"])
    )
    cues = sum(bool(q.hints) for q in material.train)
    assert f"(cue {cues}, answer {hinted}; none was tokenized)" in text
    text, _ = describe_plan(load_settings("visd", [*paths, "self_teacher.views=[cue]", "data.max_bad_share=0.1"]))
    assert f"WARNING: self-teacher: {cues} of {asked} questions have hints" in text


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["kd.kind=k1"],
            r"self_teacher.kind: expected frozen, live, ema or path, whose log-probs kd.kind=k1 needs, got none",
        ),
        (["credit.magnitude=teacher"], r"self_teacher.kind: expected frozen, .* credit.magnitude=teacher needs"),
        (["self_teacher.kind=live", "self_teacher.views=[answer]"], "self_teacher.kind: expected none, since neither"),
        (["self_teacher.kind=live", "kd.kind=k1"], "self_teacher.views: expected one or more hints"),
        (
            ["self_teacher.kind=live", "kd.kind=k1", "self_teacher.views=[truth]"],
            "self_teacher.views: expected some of",
        ),
        (
            ["self_teacher.kind=live", "kd.kind=avsd", "self_teacher.views=[cue]"],
            "expected two or more with kd.kind=avsd",
        ),
        (
            ["self_teacher.kind=live", "kd.kind=k1", "self_teacher.views=[cue]", "self_teacher.max_hint_tokens=9000"],
            "micro_tokens: expected room for data.max_prompt_tokens=1024 and a hint of self_teacher.max_hint_tokens",
        ),
        (
            [
                "self_teacher.kind=live",
                "credit.magnitude=teacher",
                "self_teacher.views=[cue]",
                "stages=[distill]",
                "reward.alpha=0",
                "reward.beta=0",
                "reward.eta=0",
                "reward.delta=0",
            ],
            "credit.magnitude: expected none if no reward has a weight",
        ),
        (["credit.position_least=0.1"], "credit.position_least has no effect: credit.position is none"),
        (["credit.magnitude_clip=0.1"], "credit.magnitude_clip has no effect: credit.magnitude is none"),
        (["kd.coef=2"], "kd.coef has no effect: kd.kind is none"),
        (["self_teacher.until_step=2"], "self_teacher.until_step has no effect: self_teacher.kind is none"),
        (
            ["self_teacher.kind=live", "kd.kind=k1", "self_teacher.views=[cue]", "self_teacher.ema_rate=0.1"],
            "self_teacher.ema_rate has no effect: self_teacher.kind=live has no average",
        ),
        (
            ["rollout.n=1"],
            "rollout.n: expected 2 or more if a reward has a weight, since the advantage of a single rollout is 0, got",
        ),
        (["rollout.n=1", *TAUGHT], "rollout.n: expected 2 or more"),
        (["rollout.n=1", *UNREWARDED, *TAUGHT, "reward.kl_in_reward=0.1"], "rollout.n: expected 2 or more"),
        (UNREWARDED, "kd.kind: expected k1 or another one if no reward has a weight"),
        ([*UNREWARDED, "credit.position=sigmoid"], "kd.kind: expected k1 or another one if no reward has a weight"),
        ([*UNREWARDED, "reward.kl_in_reward=0.1"], "kd.kind: expected k1 or another one if no reward has a weight"),
        (
            [*UNREWARDED, *TAUGHT, "distill.steps=20", "self_teacher.until_step=10"],
            "self_teacher.until_step: expected 0 if no reward has a weight, .* got 10 of distill.steps=20",
        ),
        (
            [*TAUGHT, "rollout.engine=replay", "rollout.replay=dumps/first"],
            "rollout.engine: expected hf, vllm or vllm_server with a self-teacher, .* self_teacher.kind=live",
        ),
        ([*UNREWARDED, *TAUGHT, "reward.normalization=sum_then_gn"], "reward.normalization has no effect: no reward"),
        (
            [*TAUGHT, "kd.kind=jsd", "credit.uncertainty=task"],
            "kd.kind: expected none, k1 or avsd with credit.uncertainty, which weighs the advantages of tokens",
        ),
        (["credit.prune=overlap"], "self_teacher.kind: expected .* whose log-probs credit.prune=overlap needs"),
        ([*TAUGHT, "credit.prune_decay=0.1"], "credit.prune_decay has no effect: credit.prune is none"),
        ([*TAUGHT, "credit.magnitude_topk=4"], "credit.magnitude_topk has no effect: credit.magnitude is none"),
        (
            [*TAUGHT, "kd.kind=avsd", "self_teacher.views=[answer,cue]", "credit.prune=overlap"],
            "kd.kind: expected another one than avsd with credit.prune=overlap",
        ),
        (
            [*WEIGHTED, "kd.kind=avsd", "self_teacher.views=[answer,cue]", "credit.magnitude_topk=8"],
            "kd.kind: expected another one than avsd with credit.magnitude_topk=8",
        ),
        ([*UNREWARDED, *TAUGHT, "kd.kind=none", "credit.prune=overlap"], "kd.kind: expected k1 or another one"),
        ([*TAUGHT, "kd.vocab_clip=0.05"], "kd.vocab_clip has no effect: kd.kind=k1 has no divergence"),
        ([*TAUGHT, "kd.temperature=1.1"], "kd.temperature has no effect: kd.kind=k1 has no divergence"),
        (
            [*TAUGHT, "kd.kind=jsd", "kd.gap_clip=5"],
            "kd.gap_clip has no effect: kd.kind=jsd has no advantages of its own; set kd.vocab_clip",
        ),
        (["kd.kind=forward_kl"], "self_teacher.kind: expected .*, whose log-probs kd.kind=forward_kl needs"),
        ([*TAUGHT, "kd.kind=forward_kl", "kd.vocab_clip=0"], "kd.vocab_clip: expected a number above 0, got 0"),
        (["credit.position=sigmoid", "credit.position_least=1"], "credit.position has no effect: .* all weights are 1"),
        (
            [*TAUGHT, "self_teacher.kind=ema", "distill.steps=20", "self_teacher.ema_every=20"],
            "self_teacher.ema_every has no effect: the average is used for 20 steps",
        ),
        (
            [*TAUGHT, "self_teacher.kind=ema", "self_teacher.until_step=5", "self_teacher.ema_every=5"],
            "self_teacher.ema_every has no effect: the average is used for 5 steps",
        ),
        (
            [*TAUGHT, "distill.steps=20", "self_teacher.until_step=20"],
            "self_teacher.until_step has no effect: stage 2 ends after distill.steps=20",
        ),
        (
            [*WEIGHTED, "distill.steps=20", "credit.magnitude_steps=10", "self_teacher.until_step=10"],
            "self_teacher.until_step has no effect: credit.magnitude_steps=10 ends the use of the self-teacher",
        ),
        (["sft.hinted_share=0.5"], "self_teacher.views: expected one or more hints with a text for sft.hinted_share"),
        (
            ["self_teacher.views=[answer]"],
            "self_teacher.views has no effect: self_teacher.kind is none",
        ),
        (
            # A judge's feedback is about rollouts, which stage 1 has not.
            [
                *TAUGHT,
                *("sft.hinted_share=0.5", "self_teacher.views=[feedback,media]", "self_teacher.judge.model=m"),
                "self_teacher.judge.endpoint=http://localhost:1/v1",
            ],
            r"self_teacher.views: expected one or more hints with a text .* got \['feedback', 'media'\]",
        ),
        (
            [*UNREWARDED, *TAUGHT, "kd.kind=jsd", "distill.kl_coef=0", "distill.tis_cap=2"],
            "distill.tis_cap has no effect: kd.kind=jsd is not corrected",
        ),
        ([*UNREWARDED, "distill.sft_coef=1"], "nothing else to learn from but teacher answers, which stage 1"),
        (
            ["stages=[distill]", "sft.hinted_share=0.5"],
            "sft.hinted_share has no effect: stage sft is not in stages",
        ),
        (["stages=[sft]", "credit.position=sigmoid"], "credit.position has no effect: stage distill is not in stages"),
    ],
)
def test_conflicting_settings_are_refused(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", overrides)


@pytest.mark.parametrize("name", ["min_quality=0.7", "responses=2", "filter=none", "max_unanswered_share=0.1"])
def test_settings_of_the_pool_need_a_pool(name):
    with pytest.raises(SettingsError, match="has no effect: there is no teacher pool; set teacher.pool"):
        load_settings("opsd", [f"teacher.{name}"])
    # Those that say how to score answers also score rollouts.
    load_settings("visd", ["teacher.ocr_metric=anls"])


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        # The best answer of the pool is one that can be matched.
        ("rmsd_visd", ["reward.alpha=0", "stages=[distill]", "teacher.filter=matching"]),
        ("rmsd_visd", ["reward.alpha=0", "stages=[distill]", "teacher.weighting=uniform"]),
        ("quickstart", ["stages=[sft]", "sft.hinted_share=0.5", "self_teacher.views=[answer]"]),
        ("opsd", ["distill.steps=10", "credit.position=sigmoid"]),
        ("visd", ["distill.steps=20", "self_teacher.until_step=10", "self_teacher.ema_every=9"]),
        # Magnitude weights end before the pruning does.
        ("visd", ["credit.prune=overlap", "credit.magnitude_steps=10", "self_teacher.until_step=20"]),
    ],
)
def test_useful_settings_are_accepted(recipe, overrides):
    load_settings(recipe, overrides)


def test_more_tokens_than_the_vocabulary_are_refused(trained):
    state = trained[0]
    vocabulary = state.student.model.config.text_config.vocab_size
    for name, others in (("magnitude", {"credit.magnitude": "teacher"}), ("prune", {"credit.prune": "overlap"})):
        with_settings(state, "live", ["answer"], others, f"credit.{name}_topk={vocabulary}")
        check_top_tokens(state.settings, vocabulary)
        with pytest.raises(SettingsError, match=f"credit.{name}_topk: expected at most {vocabulary - 1:,}, the stu"):
            check_top_tokens(state.settings, vocabulary - 1)


def test_programs_that_do_not_train_need_no_room_for_hints():
    with pytest.raises(SettingsError, match="micro_tokens: expected room for .* a hint"):
        load_settings("opsd", ["micro_tokens=9500"])
    assert load_settings("opsd", ["micro_tokens=9500"], trains=False).micro_tokens == 9500


TINY = (
    *("data.heldout=", "data.max_prompt_tokens=500", "data.cache_mib=16", "micro_tokens=2000", "video.num_frames=8"),
    *("rollout.max_new_tokens=8", "distill.batch_size=4", "self_teacher.max_hint_tokens=300", "runtime.trackers=[]"),
)
SHOWN = {
    "opsd": {"kd/clipped_share"},
    "pw_opsd": {"kd/divergence"},
    "vicur": {"kd/clipped_share"},
    "avsd": {"kd/clipped_share"},
    "visd": {"credit/clipped_share", "advantage/zero_share"},
    "prune_opd": {"kd/clipped_share", "credit/overlap"},
    "rmsd_visd": {"credit/clipped_share", "advantage/zero_share", "teacher/quality", "discriminator/loss"},
}


class WrittenRollouts:
    """A rollout engine whose rollouts are right and wrong answers in turn, with the log-probs of the policy."""

    runs_policy = True

    def __init__(self, state):
        self.state = state

    def update(self, policy, version):
        """Do nothing, since the policy itself computes the log-probs."""

    @torch.no_grad()
    def generate(self, model, prompts, sampling, *, features=None, policy_version=0):
        state, truths = self.state, [prompt.question.answer or "a cube" for prompt in prompts]
        texts = [
            [f"<think>It moves.</think><answer>{(truth, 'nothing')[r % 2]}</answer>" for r in range(sampling.n)]
            for truth in truths
        ]
        ids = [[state.builder.encode_response(text) for text in of_prompt] for of_prompt in texts]
        score = partial(linear_logprob, temperature=sampling.temperature, ignore_index=None)
        rollouts = [[None] * sampling.n for _ in prompts]
        for read in passes(state, prompts, ids, features):
            logp = state.policy(read.prompts, read.rows, read.features, score).split(read.rows.lengths_list)
            for (i, r), of_rollout in zip(read.indices, logp, strict=True):
                text, question = texts[i][r], prompts[i].question
                rollouts[i][r] = Rollout(question.id, r, ids[i][r], text, of_rollout, False, policy_version)
        return rollouts


@pytest.mark.parametrize("recipe", SHOWN)
def test_recipes_train_a_tiny_student(folder, material, world, monkeypatch, recipe):
    hints = HINTS | {"feedback": "Look at the end.", "keyframes": [1, 1.5]}
    train = folder / "hinted.jsonl"
    write_questions(train, [replace(q, hints=hints) for q in material.train], media_root=folder)
    pool = [f"teacher.pool={material.files['pool']}", "discriminator.head=random"] if recipe == "rmsd_visd" else []
    paths = [f"data.train={train}", f"data.media_root={folder}", f"model.path={material.model_path}", *pool]
    settings = load_settings(recipe, [*paths, *TINY])
    inputs = prepare_material(settings, world)
    state = build_distillation(material.model_path, settings, world, inputs)
    prompts = [state.builder.build(question) for question in inputs.train[:3]]
    # The answers of the tiny student to closed questions are never right.
    state.rollouts = WrittenRollouts(state)
    before = {name: p.detach().clone() for name, p in state.policy.module.named_parameters()}
    for number in range(2):
        state.policy.set_lr(1e-3)
        result = distill.step(state, prompts, number)
        assert not result.skipped and result.metrics["policy/grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in state.policy.module.named_parameters())
    metrics = result.metrics
    if rewards_rollouts(settings):
        assert 0 < metrics["reward/content/raw"] < 1 and metrics["advantage/zero_share"] < 1
    assert abs(metrics["policy/engine_kl"]) < 1e-5
    assert metrics["self_teacher/hinted_share"] == 1 and metrics["self_teacher/gap_size"] > 0
    every = {
        "kd/clipped_share",
        "kd/divergence",
        "credit/overlap",
        "credit/clipped_share",
        "advantage/zero_share",
        "teacher/quality",
        "discriminator/loss",
    }
    assert every & metrics.keys() == SHOWN[recipe]
    distilled = "kd/divergence" in metrics
    assert len(result.groups[0].teacher_logp[0]) == (3 if recipe == "avsd" else 1)
    log = JsonLines(folder / f"{recipe}.jsonl")
    (record, *_) = log_rollouts(
        log, result.groups, settings.rollout, builder=state.builder, stage="distill", step=1, total=2
    )
    log.close()
    for rollout in record["rollouts"]:
        assert "".join(text for text, _ in rollout["token_credit"]) == rollout["text"]
    # A divergence is not an advantage of the sampled tokens.
    assert distilled != any(value for rollout in record["rollouts"] for _, value in rollout["token_credit"])
    # The template of a Thinking model opens the response, so its text begins with tokens that were not sampled.
    with monkeypatch.context() as patched:
        patched.setattr(state.builder, "opening", "<think>")
        group = result.groups[0]
        opened = [replace(r, text=state.builder.decode_response(r.token_ids)) for r in group.rollouts]
        log = JsonLines(folder / f"{recipe}-opened.jsonl")
        (record, *_) = log_rollouts(
            *(log, [replace(group, rollouts=opened)], settings.rollout),
            **{"builder": state.builder, "stage": "distill", "step": 1, "total": 2},
        )
        log.close()
    for rollout in record["rollouts"]:
        assert rollout["token_credit"][0] == ["<think>", 0.0]
        assert "".join(text for text, _ in rollout["token_credit"]) == rollout["text"]
    if state.average is not None:
        masters = zip(state.average.values, state.policy.masters(), strict=True)
        assert any(not torch.equal(average, master) for average, master in masters)


def test_a_run_without_a_pool_has_a_report_about_what_it_has(folder, material):
    train = folder / "asked.jsonl"
    write_questions(train, material.train, media_root=folder)
    paths = [f"data.train={train}", f"data.media_root={folder}", f"model.path={material.model_path}"]
    sizes = ["distill.steps=2", "rollout.log_every_steps=1", f"output={folder / 'poolless'}"]
    done = run_train(["opsd", *paths, *TINY, *sizes])
    assert done.returncode == 0, done.stderr[-3000:]
    page = (only_run(folder / "poolless") / "report.html").read_text()
    assert "Gap of the self-teacher" in page and "Rewards, raw: format and content" in page
    for title in (
        "Reward, raw: discriminator",
        "Rewards, weighted",
        "Pair accuracy",
        "Questions without a teacher",
        "best of K",
    ):
        assert title not in page, title


class _Living(TorchDispatchMode):
    """Record the largest number of bytes that results of operators hold at the same time, besides `known` tensors."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.living, self.peak = weakref.WeakValueDictionary(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.living[storage.data_ptr()] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.living.values()))
        return result


def test_a_pass_holds_one_copy_of_the_average(world):
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    engine = Engine(layers, lr=0.0, zero_stage=2, dtype="bfloat16", world=world)
    average = MovingAverage(engine, 0.5)
    size = 2 * sum(value.numel() for value in average.values)
    with _Living([*average.values, *layers.parameters()]) as living, average.in_place():
        pass
    # The plan of the memory counts one copy.
    assert size <= living.peak < 1.5 * size, (living.peak, size)
    engine.close()


def test_a_bfloat16_average_would_hardly_move(world):
    """At a learning rate of 1e-6, over 600 steps, and with weights of the size of a language model's."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 256, bias=False)
    torch.nn.init.normal_(layer.weight, std=0.02)
    engine = Engine(layer, lr=0.0, zero_stage=2, dtype="bfloat16", world=world)
    average = MovingAverage(engine, 0.01)
    (master,) = engine.masters()
    start, direction = master.detach().clone(), torch.sign(torch.randn(master.shape))
    rounded = start.bfloat16()
    with torch.no_grad():
        for _ in range(600):
            master.add_(1e-6 * direction)
            average.update()
            rounded.lerp_(master.bfloat16(), 0.01)
    # The average of a steady motion lags by (1 - rate) / rate steps, apart from its start.
    exact = sum(1 - 0.99**step for step in range(1, 601)) * 1e-6
    moved = ((average.values[0] - start) * direction).mean()
    assert float(moved) == pytest.approx(exact, rel=1e-3)
    assert float(((rounded.float() - start) * direction).mean()) < 0.2 * exact
    engine.close()
