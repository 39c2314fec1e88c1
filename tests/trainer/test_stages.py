"""Test steps of the stages with a real DeepSpeed engine and a tiny student."""

from __future__ import annotations

import copy
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from material import tiny_material, tiny_settings

from rmsd_fast.config import SettingsError
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.packing import make_rows
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.runtime import process_group
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.build import build_distillation, load, read_targets
from rmsd_fast.stages.discriminator_pass import _content_sums
from rmsd_fast.stages.groups import (
    distinct_texts,
    group_record,
    make_group,
    make_order_pairs,
    make_pairs,
    quality_record,
    set_advantages,
)
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import NonFiniteRun, count_skipped
from rmsd_fast.stages.step_metrics import global_metrics, mean

SMALL = ("rollout.n=3", "rollout.max_new_tokens=8", "data.max_prompt_tokens=500", "micro_tokens=600")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def material(folder):
    return tiny_material(folder)


def build(folder, material, world, *overrides):
    settings = tiny_settings(folder, *SMALL, *overrides)
    state = build_distillation(material.model_path, settings, world, material)
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].imitate][:4]
    return state, prompts


def roll_out(state, prompts):
    """Return the groups of a step."""
    rollouts, _ = distill.roll_out(state, prompts, 0)
    pairs = zip(prompts, rollouts, strict=True)
    return [make_group(p, own, state.targets[p.question.id], state.settings, step=0) for p, own in pairs]


def weights(state):
    return {name: p.detach().clone() for name, p in state.policy.module.named_parameters()}


def same(a, b, tolerance=0.0):
    return all(float((a[name] - b[name]).abs().max()) <= tolerance for name in a)


MODES = [
    (),
    ("distill.kl=full", "reward.kl_in_reward=0.1"),
    # The caps take effect, because these steps have log-probs that differ from the trainer's.
    (
        "distill.kl=k2",
        "distill.aggregation=sequence_mean",
        "distill.tis_cap=0.98",
        "distill.sequence_mask_cap=0.985",
        "rollout.temperature=0.8",
        "rollout.parity_every=0",
    ),
    ("discriminator.pairing=sampled", "discriminator.normalizer=quality"),
    ("reward.kl_in_reward=0.1", "reward.normalization=sum_then_gn", "distill.kl_coef=0"),
    ("distill.train_vision=true",),
    ("discriminator.order_weight=2", "discriminator.head=random", "teacher.filter=none", "teacher.weighting=uniform"),
]


def step_gradients(folder, material, world, monkeypatch, *overrides, room=None):
    """Return the metrics and the gradients of policy and discriminator of one step without applying them."""
    overrides = ("runtime.zero_stage=0", "rollout.max_new_tokens=30", *overrides)
    state, prompts = build(folder, material, world, *overrides)
    if room is not None:
        state.settings.micro_tokens = max(len(p.input_ids) for p in prompts) + room
    found = {}

    def keep(engines):
        for engine in engines:
            found.update(
                {(len(found), n): p.grad.clone() for n, p in engine.module.named_parameters() if p.grad is not None}
            )
        for engine in engines:
            engine.discard()
        return [0.0] * len(engines), False

    monkeypatch.setattr(distill, "apply_or_discard", keep)
    if "distill.tis_cap=0.98" in overrides:
        monkeypatch.setattr(state.rollouts, "generate", misreported(state.rollouts.generate))
    metrics = distill.step(state, prompts, 0).metrics
    return metrics, found


def misreported(generate):
    """Return `generate` with log-probs that are wrong by -0.01 to 0.05, depending on the rollout and on the token."""

    def wrong(*args, **options):
        return [
            [replace(r, logp=r.logp + 0.01 * (r.index - 1) + 0.02 * (r.token_ids % 3)) for r in drawn]
            for drawn in generate(*args, **options)
        ]

    return wrong


@pytest.mark.parametrize("overrides", MODES, ids=" ".join)
def test_packing_and_micro_batches_do_not_change_a_step(folder, material, world, monkeypatch, overrides):
    """Compare several groups in a forward pass, parts of one group, and a padded row for each response."""
    expected, gradients = step_gradients(folder, material, world, monkeypatch, *overrides, "micro_tokens=4000")
    if "distill.tis_cap=0.98" in overrides:
        assert 0.1 < expected["policy/tis_capped_fraction"] < 0.95
        assert 0.1 < expected["policy/sequence_masked_fraction"] < 0.9
    # Rollouts have 30 tokens, of which three do not fit, and teacher responses have at most 35.
    for other, room in ((("micro_tokens=4000",), 36), (("micro_tokens=4000", "packing=padded"), None)):
        metrics, found = step_gradients(folder, material, world, monkeypatch, *overrides, *other, room=room)
        assert metrics["tokens_computed"] > 1.3 * expected["tokens_computed"]
        assert metrics.keys() == expected.keys() and found.keys() == gradients.keys()
        for key in metrics.keys() - {"tokens_computed"}:
            value = expected[key]
            assert metrics[key] == (value if value is None else pytest.approx(value, rel=2e-4, abs=2e-5)), key
        for name, gradient in gradients.items():
            assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-7, name


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("imitated", ["best", "all"])
def test_sft_loss_is_the_mean_over_all_response_tokens(folder, material, world, packing, imitated):
    state, prompts = build(folder, material, world, f"packing={packing}", f"sft.responses={imitated}")
    own = [state.targets[p.question.id] for p in prompts]
    responses = [[state.builder.encode_response(t.answers[k].text) for k in t.imitate] for t in own]
    assert (max(map(len, responses)) > 1) == (imitated == "all")
    rows = make_rows(packing, prompts, responses, pad_id=0)
    with torch.no_grad():
        logp = state.policy.module(prompts, rows, None, linear_logprob)
    before = weights(state)
    result = sft.step(state, prompts, 0)
    assert result.metrics["loss"] == pytest.approx(-float(logp.mean()), rel=1e-5)
    assert not same(before, weights(state))


@pytest.mark.parametrize(
    "overrides",
    [
        ("distill.kl=full",),
        ("distill.kl=k2", "distill.aggregation=sequence_mean", "distill.tis_cap=2", "distill.sequence_mask_cap=3"),
        ("discriminator.pairing=sampled", "discriminator.normalizer=quality"),
        ("reward.kl_in_reward=0.1", "reward.normalization=sum_then_gn", "reward.score_clip=10"),
        ("distill.train_vision=true",),
        ("distill.kl_coef=0", "runtime.zero_stage=0"),
    ],
    ids=lambda o: " ".join(o),
)
def test_every_mode_takes_a_step(folder, material, world, overrides):
    state, prompts = build(folder, material, world, *overrides)
    before = weights(state)
    assert not distill.warm_up_step(state, prompts, 9).skipped
    for number in range(2):
        result = distill.step(state, prompts, number)
        assert not result.skipped
        assert all(value == value for value in result.metrics.values())
    after = weights(state)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("language_model" in name for name in moved)
    assert any("visual" in name for name in moved) == state.settings.distill.train_vision


def test_passes_read_each_response_once(folder, material, world):
    state, prompts = build(folder, material, world)
    state.settings.micro_tokens = max(len(prompt.input_ids) for prompt in prompts) + 12
    responses = [[torch.tensor([5 + r] * 4) for r in range(5)] for _ in prompts]
    parts = list(passes(state, prompts, responses, None))
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True] and len(parts) > len(prompts)
    read = [(i, r) for p in parts for i, own in zip(p.batch.prompts, p.batch.responses, strict=True) for r in own]
    assert sorted(read) == [(i, r) for i in range(len(prompts)) for r in range(5)]
    assert [ids for part in parts for ids in part.rows.targets[::4].tolist()] == [5 + r for _, r in read]
    calls = []
    engine = SimpleNamespace(backward=lambda loss, last: calls.append((float(loss), last)))
    parts[-1].backward(engine, torch.tensor(3.0))
    filler = replace(parts[0], batch=replace(parts[0].batch, filler=True))
    filler.backward(engine, torch.tensor(3.0))
    assert calls == [(3.0, True), (0.0, False)]


def test_metrics_are_sums_or_functions_of_sums(world):
    record = {
        "sum": torch.tensor(2),
        "mean": (mean, torch.tensor(1.0), 4),
        "none": (mean, 0.0, 0),
        "max": (max, 1, 2),
    }
    assert global_metrics(record, world) == {"sum": 2.0, "mean": 0.25, "none": None, "max": 2.0}


@pytest.mark.parametrize(
    "overrides",
    [(), ("reward.alpha=0", "stages=[sft,distill]", "distill.sft_coef=0.1", "teacher.selection=aligned")],
    ids=["discriminator", "none"],
)
def test_no_collective_between_reference_and_policy(folder, material, world, monkeypatch, overrides):
    """A sum over the processes waits for the device, so counts that the host knows are summed before its work."""
    state, prompts = build(folder, material, world, *overrides)
    phases, summed = [], []

    @contextmanager
    def timer(phase):
        phases.append(phase)
        yield
        phases.pop()

    def counted(values, world, op):
        summed.append((phases[-1] if phases else None, sorted(values)))
        return reduce(values, world, op)

    reduce = process_group._reduce
    monkeypatch.setattr(process_group, "_reduce", counted)
    state.timer = timer
    assert not distill.step(state, prompts, 0).skipped
    assert (None, ["imitated", "sequences", "tokens"]) in summed
    # These keys belong to the plan of the micro-batches, which is agreed on before the reference's first pass.
    assert [keys for phase, keys in summed if phase == "reference"] == [["count", "fault"]]
    assert not [keys for phase, keys in summed if phase == "policy"]
    assert len([keys for phase, keys in summed if phase == "optimizer"]) == 1


def test_reference_equals_the_policy_before_the_first_update(folder, material, world):
    # With a zero head, hardly any reward would differ before the first update.
    overrides = ("distill.kl=full", "discriminator.head=random", "reward.score_sd_offset=0")
    state, prompts = build(folder, material, world, *overrides)
    first = distill.step(state, prompts, 0).metrics
    assert first["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    # Rollouts exclude banned ids, which have about 1.3% of an untrained student's mass, but their log-probs count them.
    assert first["policy/importance_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert 0.005 < first["rollout/banned_mass"] < 0.05
    second = distill.step(state, prompts, 1).metrics
    assert second["policy/kl"] > 1e-7


def test_warm_up_trains_only_the_discriminator(folder, material, world):
    state, prompts = build(folder, material, world, "discriminator.warm_up_lr=1e-3")
    state.discriminator.set_lr(1e-3)
    before = weights(state)
    losses = [distill.warm_up_step(state, prompts, 0).metrics for _ in range(6)]
    assert same(before, weights(state))
    assert losses[-1]["discriminator/loss"] < losses[0]["discriminator/loss"]
    assert losses[-1]["discriminator/margin"] > losses[0]["discriminator/margin"]


def test_a_question_without_teacher_gives_no_pair_and_no_d_reward(folder, material, world):
    state, prompts = build(folder, material, world)
    for prompt in prompts[:2]:
        targets = state.targets[prompt.question.id]
        state.targets[prompt.question.id] = replace(targets, p=torch.zeros_like(targets.p))
    metrics = distill.step(state, prompts, 0).metrics
    assert metrics["teacher/empty_share"] == 0.5
    groups = roll_out(state, prompts)
    assert make_pairs(groups, state.settings).normalizer == 2 * state.settings.rollout.n
    for prompt in prompts[2:]:
        targets = state.targets[prompt.question.id]
        state.targets[prompt.question.id] = replace(targets, p=torch.zeros_like(targets.p))
    none = distill.step(state, prompts, 1).metrics
    assert none["teacher/empty_share"] == 1 and none["reward/discriminator/raw"] == 0
    # Without a pair only the score L2 remains, which is a mean square times 1e-3.
    assert none["discriminator/pair_accuracy"] is None and none["discriminator/score_teacher"] is None
    assert 0 < none["discriminator/loss"] < 1e-3 * 100


def test_truncated_rollouts_look_complete_to_the_discriminator(folder, material, world):
    state, prompts = build(folder, material, world)
    groups = roll_out(state, prompts)
    assert any(r.truncated for g in groups for r in g.rollouts)
    for group in groups:
        judged = distinct_texts(group, state.builder)
        assert all(ids[-1] == state.builder.eos_id for ids in judged.responses)
        assert len(judged.students) == len(group.rollouts) and len(judged.teachers) == len(group.kept)


def test_equal_texts_are_scored_once(folder, material, world):
    state, prompts = build(folder, material, world)
    groups = roll_out(state, prompts[:1])
    one, *_, last = groups[0].rollouts
    targets = state.targets[prompts[0].question.id]
    twice = replace(targets, answers=(targets.answers[0],) * 2, quality=torch.ones(2), p=torch.full((2,), 0.5))
    group = make_group(prompts[0], [one, last, one], replace(twice, valid=(True, True)), state.settings, step=0)
    judged = distinct_texts(group, state.builder)
    assert judged.students == [0, 1, 0] and judged.teachers == [2, 2] and len(judged.responses) == 3
    assert torch.equal(judged.responses[2], state.builder.encode_response(targets.answers[0].text))


@pytest.mark.parametrize("overrides", [(), ("reward.alpha=0", "stages=[sft,distill]")], ids=["discriminator", "none"])
def test_tokens_count_each_text_with_its_own_prompt(folder, material, world, overrides):
    """The policy reads the rollouts; the discriminator reads rollouts and kept responses, including repeated ones."""
    state, prompts = build(folder, material, world, *overrides)
    warm_up = 0 if overrides else state.settings.discriminator.warm_up_steps
    drawn, _ = distill.roll_out(state, prompts, warm_up)
    rollouts = sum(len(p.input_ids) + len(r.token_ids) for p, own in zip(prompts, drawn, strict=True) for r in own)
    teachers = sum(
        len(prompt.input_ids) + len(state.builder.encode_response(targets.answers[k].text))
        for prompt in prompts
        for targets in [state.targets[prompt.question.id]]
        for k in torch.nonzero(targets.p > 0).flatten().tolist()
    )
    if not overrides:
        assert distill.warm_up_step(state, prompts, warm_up).metrics["tokens"] == rollouts + teachers
    expected = rollouts if overrides else 2 * rollouts + teachers
    assert distill.step(state, prompts, 0).metrics["tokens"] == expected


def test_a_rollout_that_spells_a_special_token_is_scored_by_its_own_ids(folder, material, world):
    state, prompts = build(folder, material, world)
    groups = roll_out(state, prompts[:1])
    spelled = [replace(groups[0].rollouts[0], text="a <|video_pad|>")]
    group = make_group(prompts[0], spelled, replace(groups[0].targets, p=torch.zeros(4)), state.settings, step=0)
    ids = distinct_texts(group, state.builder).responses[0].tolist()
    sampled = spelled[0].token_ids.tolist()
    assert ids == sampled + [state.builder.eos_id] * spelled[0].truncated


def test_a_thinking_student_learns_its_tag_once(folder, material, world, tmp_path):
    """The chat template opens <think>, so the tag is in the prompt and in no response that a model receives."""
    path = tmp_path / "thinking"
    shutil.copytree(material.model_path, path)
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(template.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    settings = tiny_settings(folder, *SMALL)
    state = build_distillation(str(path), settings, world, material)
    opened = state.builder.tokenizer.encode("<think>")
    prompts = [state.builder.build(q) for q in material.train if state.targets[q.id].imitate][:2]
    assert all(state.builder.decode_response(prompt.input_ids[-2:]).endswith("<think>\n") for prompt in prompts)
    imitated = [state.builder.encode_response(a.text) for a in state.targets[prompts[0].question.id].answers if a.valid]
    groups = roll_out(state, prompts)
    judged = [distinct_texts(group, state.builder) for group in groups]
    teachers = [own.responses[place] for own in judged for place in own.teachers]
    assert imitated and teachers
    assert not any(set(opened) & set(ids.tolist()) for ids in (*imitated, *teachers))
    # Texts stay complete, because the outer format is judged on the text that a user would see.
    assert all(rollout.text.startswith("<think>\n") for group in groups for rollout in group.rollouts)
    whole = replace(groups[0].rollouts[0], text="<think>\na</think><answer>B</answer>")
    assert make_group(prompts[0], [whole], groups[0].targets, settings, step=0).outer.tolist() == [1.0]
    sft.step(state, prompts, 0)
    distill.step(state, prompts, 0)


def test_answers_that_do_not_fit_the_student_are_excluded(folder, material, world, caplog):
    """A single answer of 2 MB once ended a run after its first evaluation."""
    question = material.train[0]
    long = "<think>" + "a b " * 2000 + "</think><answer>B</answer>"
    answers = [
        replace_answer(a, text) for a, text in zip(material.scores[question.id], (long, "<|im_end|>"), strict=False)
    ]
    answers += material.scores[question.id][2:]
    spoiled = replace(material, scores={**material.scores, question.id: answers})
    settings = tiny_settings(folder, *SMALL)
    state = build_distillation(material.model_path, settings, world, spoiled)
    targets = state.targets[question.id]
    assert targets.quality[:2].tolist() == [0, 0] and targets.p[:2].tolist() == [0, 0]
    assert not {0, 1} & set(targets.imitate) and targets.valid[:2] == (False, False)
    assert "1 answer left out: prompt and response together do not fit" in caplog.text
    assert "1 answer left out: the text contains a special token" in caplog.text
    # If almost no answers fit, the settings are wrong, not the answers.
    everything = {name: [replace_answer(a, long) for a in own] for name, own in material.scores.items()}
    with pytest.raises(SettingsError, match="micro_tokens: expected room for .* and the longest teacher response"):
        build_distillation(material.model_path, settings, world, replace(material, scores=everything))


def test_a_pool_that_cannot_be_taught_is_refused_with_its_reason(folder, material, world, tmp_path, caplog):
    path = tmp_path / "thinking"
    shutil.copytree(material.model_path, path)
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(template.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    settings = tiny_settings(folder, *SMALL)

    def targets_of(model: str | Path, *texts: str):
        """Return the targets of answers that take these texts in turn."""
        every = [answer for answers in material.scores.values() for answer in answers]
        turn = iter(replace_answer(answer, texts[number % len(texts)]) for number, answer in enumerate(every))
        scores = {name: [next(turn) for _ in answers] for name, answers in material.scores.items()}
        return read_targets(
            replace(material, scores=scores),
            PromptBuilder(load(str(model), settings, world), settings.video),
            settings,
            world,
        )

    # The responses of servers of Thinking models are an ordinary pool.
    sent = "\n<think>\nWhite.\n</think>\n\n<answer>B</answer>"
    assert all(all(targets.valid) for targets in targets_of(path, sent).values()) and not caplog.records
    with pytest.raises(DataError) as caught:
        targets_of(path, "<answer>B</answer>")
    assert "144 of 144 answers cannot be used to train this student: no_think 144 (no_think: the" in str(caught.value)
    # Every reason counts toward the share of answers that may be excluded.
    with pytest.raises(DataError, match=r"36 of 144 answers .*: not_unicode 36 \(not_unicode: the text contains"):
        targets_of(material.model_path, sent, sent, sent, "a\ud800b")
    with pytest.raises(DataError, match=r"72 of 144 answers cannot .*: special_token 36, not_unicode 36 "):
        targets_of(material.model_path, sent, sent, "<|im_end|>", "a\ud800b")


def replace_answer(answer, text):
    return answer._replace(text=text, valid=True, quality=1.0, reason=None)


def test_rewards_and_advantages_by_hand(folder, material, world):
    state, _ = build(folder, material, world, "reward.normalization=sum_then_gn")
    question = next(q for q in material.train if q.task_type == "mcq")
    prompt = state.builder.build(question)
    groups = roll_out(state, [prompt])
    right = f"<think>a</think><answer>{question.answer}</answer>"
    texts = [right, right.replace("<think>a</think>", ""), "nothing"]
    rollouts = [replace(r, text=text) for r, text in zip(groups[0].rollouts, texts, strict=True)]
    group = make_group(prompt, rollouts, state.targets[question.id], state.settings, step=0)
    assert group.outer.tolist() == [1, 0, 0]
    assert group.task.tolist() == [1, 1, 0]
    assert group.content.tolist() == [1, 0, 0]
    opened = replace(prompt, question=replace(question, task_type="open", options=()))
    assert make_group(opened, rollouts, group.targets, state.settings, step=0).content.tolist() == [0, 0, 0]
    group.d_score = torch.tensor([1.0, -1.0, 0.0])
    set_advantages(group, state.settings)
    # The reward is 0.4 D + 0.1 outer + 0.1 task + 0.4 content.
    assert group.reward.tolist() == pytest.approx([1.0, -0.3, 0.0])
    average = 0.7 / 3
    sd = (sum((r - average) ** 2 for r in (1.0, -0.3, 0.0)) / 2) ** 0.5
    assert group.advantages.tolist() == pytest.approx([(r - average) / sd for r in (1.0, -0.3, 0.0)], rel=1e-4)


def test_rollouts_without_ground_truth_by_hand(folder, material, world):
    state, _ = build(folder, material, world)
    question = next(q for q in material.train if q.task_type == "mcq")
    prompt = state.builder.build(question)
    (drawn,) = roll_out(state, [prompt])
    texts = [f"<think>a</think><answer>{question.answer}</answer>", "<think>a</think><answer>.</answer>", ""]
    rollouts = [replace(r, text=text) for r, text in zip(drawn.rollouts, texts, strict=True)]
    bare = replace(prompt, question=replace(question, answer=None))
    quality = torch.tensor([1 / 3, 1 / 3, 0, 2 / 3])
    targets = replace(state.targets[question.id], quality=quality, p=quality / quality.sum(), weight=quality)
    known, unknown = (make_group(p, rollouts, targets, state.settings, step=0) for p in (prompt, bare))
    assert known.content.tolist() == [1, 0, 0] and unknown.content.tolist() == [0, 0, 0]
    assert unknown.outer.tolist() == [1, 1, 0] and unknown.task.tolist() == [1, 0, 0] and unknown.valid == 1
    # Its agreement weights the pairs, but accuracy metrics leave it out.
    assert unknown.kept == [0, 1, 3] and make_pairs([unknown], state.settings).quality.sum() == pytest.approx(4)
    assert len(make_order_pairs([unknown]).quality) == 0 < len(make_order_pairs([known]).quality)
    alone = global_metrics(quality_record([known]), world)
    assert alone == global_metrics(quality_record([known, unknown]), world)
    assert alone["rollout/quality"] == pytest.approx(1 / 3) and alone["teacher/best_quality"] == pytest.approx(2 / 3)
    assert set(global_metrics(quality_record([unknown]), world).values()) == {None}
    for group in (known, unknown):
        group.d_score = torch.tensor([1.0, -1.0, 0.0])
    assert [float(x) for x in _content_sums([known, unknown])] == [float(x) for x in _content_sums([known])]
    assert _content_sums([unknown])[3] == 0
    # 0.4 D + 0.1 outer + 0.1 task
    set_advantages(unknown, state.settings)
    assert unknown.reward.tolist() == pytest.approx([0.6, -0.3, 0.0])


def test_questions_without_ground_truth_take_every_step(folder, world):
    changes = ("made.label_share=0", "teacher.unlabeled=agreement", "teacher.min_quality=0.1")
    unlabeled = prepare_material(tiny_settings(folder, *changes), world)
    state, prompts = build(folder, unlabeled, world, *changes, "discriminator.order_weight=1")
    prompts = [prompt for prompt in prompts if prompt.question.is_unlabeled]
    assert len(prompts) >= 2
    before = weights(state)
    assert not sft.step(state, prompts, 0).skipped and not distill.warm_up_step(state, prompts, 9).skipped
    metrics = distill.step(state, prompts, 0).metrics
    assert metrics["reward/content/raw"] == 0 < metrics["teacher/quality"] and metrics["teacher/empty_share"] == 0
    assert metrics["rollout/quality"] is None and metrics["discriminator/content_correlation"] is None
    assert metrics["discriminator/pair_accuracy"] is not None and not same(before, weights(state))


def test_shares_of_rollouts_by_hand(folder, material, world):
    state, _ = build(folder, material, world)
    question = next(q for q in material.train if q.task_type == "mcq")
    groups = roll_out(state, [state.builder.build(question)])
    texts = [f"<think>a</think><answer>{question.answer}</answer>", "<think>a</think><answer> </answer>", ""]
    rollouts = [
        replace(r, text=text, truncated=cut, token_ids=r.token_ids[:length], banned_mass=mass)
        for r, text, cut, length, mass in zip(
            groups[0].rollouts, texts, (False, False, True), (1, 2, 3), (0.6, 0.0, 0.2), strict=True
        )
    ]
    group = make_group(groups[0].prompt, rollouts, state.targets[question.id], state.settings, step=0)
    metrics = global_metrics(group_record([group], state.settings), world)
    assert metrics["rollout/empty_share"] == pytest.approx(2 / 3)
    assert metrics["rollout/valid_share"] == pytest.approx(1 / 3)
    assert metrics["rollout/truncated_share"] == pytest.approx(1 / 3)
    # (1 * 0.6 + 2 * 0 + 3 * 0.2) / 6 tokens
    assert metrics["rollout/banned_mass"] == pytest.approx(0.2)
    # An engine that does not know the mass reports none.
    group.rollouts[1] = replace(group.rollouts[1], banned_mass=None)
    assert "rollout/banned_mass" not in group_record([group], state.settings)


def test_a_non_finite_step_changes_nothing(folder, material, world):
    state, prompts = build(folder, material, world)
    distill.step(state, prompts, 0)
    before = weights(state)
    judge = copy.deepcopy(dict(state.discriminator.module.named_parameters()))
    hook = state.discriminator.module.register_forward_hook(lambda module, given, scores: scores * torch.nan)
    for number in (1, 2):
        assert distill.step(state, prompts, number).skipped
    assert same(before, weights(state))
    assert same(judge, dict(state.discriminator.module.named_parameters()))
    hook.remove()
    assert not distill.step(state, prompts, 4).skipped
    assert not same(before, weights(state))


@pytest.mark.parametrize("engine", ["policy", "discriminator"])
def test_a_norm_that_overflows_skips_both_optimizers(folder, material, world, engine):
    """The gradients of one engine are finite, but their squares are not finite in float32."""
    # With a zero head, the first rewards of an untrained student would be equal and its gradient zero.
    state, prompts = build(folder, material, world, "discriminator.head=random")
    before = weights(state)
    judge = copy.deepcopy(dict(state.discriminator.module.named_parameters()))
    backward = getattr(state, engine).backward
    getattr(state, engine).backward = lambda loss, last: backward(1e25 * loss, last=last)
    assert distill.step(state, prompts, 0).skipped
    assert same(before, weights(state))
    assert same(judge, dict(state.discriminator.module.named_parameters()))
    getattr(state, engine).backward = backward
    assert not distill.step(state, prompts, 1).skipped
    counts = {
        int(s["step"]) for e in (state.policy, state.discriminator) for s in e.engine.basic_optimizer.state.values()
    }
    assert counts == {1}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("stage", ["warm_up_step", "step"])
def test_non_finite_logits_skip_the_step(folder, material, world, value, stage):
    state, prompts = build(folder, material, world)
    before = weights(state)
    judge = copy.deepcopy(dict(state.discriminator.module.named_parameters()))

    def spoil(module, given, logits):
        logits[-1, 7] = value
        return logits

    hook = state.student.model.lm_head.register_forward_hook(spoil)
    rollouts = state.rollouts.generate(
        state.student.model, prompts, Sampling(n=2, temperature=1.0, max_new_tokens=4, seed=0, step=0)
    )
    # The last row is corrupted at its first token, so it ends there and reports this.
    assert rollouts[-1][-1].token_ids.tolist() == [state.builder.eos_id]
    assert not rollouts[-1][-1].finite and rollouts[0][0].finite
    result = getattr(distill, stage)(state, prompts, 0)
    hook.remove()
    assert result.skipped and result.metrics == {"tokens": 0}
    assert same(before, weights(state))
    assert same(judge, dict(state.discriminator.module.named_parameters()))


def test_skipped_steps_in_a_row_end_the_run(folder, material, world):
    state, _ = build(folder, material, world)
    state.settings.runtime.max_skipped_steps = 3
    for skipped in (True, True, False, True, True):
        count_skipped(state, skipped)
    with pytest.raises(NonFiniteRun, match="3 steps in a row"):
        count_skipped(state, True)
