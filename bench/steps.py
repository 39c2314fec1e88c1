"""Whole stage-2 steps of a small student for bench_step: the state, and the step of trainers that copy prompts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bench.groups import HIDDEN, LAYERS, make_prompt, make_responses, make_texts, media_each, student_folder
from rmsd_fast.config import RunConfig
from rmsd_fast.data.packing import pad
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob, linear_policy_loss, pairwise_discriminator_loss
from rmsd_fast.models.students import encode_media
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_fast.rollout.base import Rollout, Sampling
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.build import build_distillation
from rmsd_fast.stages.groups import RolloutGroup, distinct_texts, make_group, make_pairs, set_advantages
from rmsd_fast.stages.material import Material
from rmsd_fast.stages.state import StageState, StepResult, apply_or_discard
from rmsd_fast.teacher.scores import ScoredResponse
from rmsd_fast.teacher.summary import Summary
from rmsd_fast.teacher.targets import Targets

_encode_each = partial(encode_media, distinct=False)


def settings_of(packing: str, prefix: int, response: int, n: int, dtype: str) -> RunConfig:
    """Stage 2 with all its parts: discriminator on all pairs, k3 against the reference; no group is split."""
    return load_settings(
        "quickstart",
        [
            f"packing={packing}",
            f"model.dtype={dtype}",
            f"rollout.n={n}",
            f"rollout.max_new_tokens={response}",
            f"data.max_prompt_tokens={prefix + 512}",
            f"micro_tokens={40 * (prefix + 512 + response)}",
        ],
    )


def make_state(settings: RunConfig, world: World) -> StageState:
    """Policy, discriminator and reference. No rollout ends by itself: each has `max_new_tokens` tokens."""
    folder = str(student_folder(HIDDEN, LAYERS))
    state = build_distillation(folder, settings, world, Material([], [], {}, True, {}, Summary(), folder, {}))
    if settings.packing == "padded":
        # The tower's attention is the same in all variants; what is compared is the sharing.
        for module in (state.student.model, state.reference.model, state.discriminator.module.model):
            module.set_attn_implementation({"vision_config": vision_implementation(module)})
    banned = state.rollouts.banned_ids
    state.rollouts.banned_ids = torch.cat([banned, banned.new_tensor([state.builder.eos_id])])
    return state


def make_prompts(state: StageState, prefix: int, groups: int) -> list[Prompt]:
    return [make_prompt(state.builder, prefix, number) for number in range(groups)]


def set_teacher(state: StageState, prompts: list[Prompt], response: int, k: int) -> None:
    """K responses for each prompt, all of quality 1, where the step looks for them."""
    for number, prompt in enumerate(prompts):
        texts = make_texts(state.builder, k, response, seed=100 + number)
        answers = tuple(ScoredResponse(index, text, True, 1.0) for index, text in enumerate(texts))
        ones = torch.ones(k)
        state.targets[prompt.question.id] = Targets(answers, ones, ones / k, (True,) * k, (0,))


class Given:
    """A rollout engine that returns the same random responses whatever the model, by the question's name."""

    def __init__(self, builder, response: int):
        self.builder, self.response = builder, response

    def generate(self, model, prompts, sampling, *, features=None, policy_version=0) -> list[list[Rollout]]:
        groups = []
        for prompt in prompts:
            name, _, copy = prompt.question.id.partition("/")
            chosen = [int(copy)] if copy else range(sampling.n)
            ids = self.responses(max(8, len(chosen)), seed=int(name.removeprefix("q")))
            groups.append([self._rollout(prompt, i, ids[i]) for i in chosen])
        return groups

    def responses(self, count: int, seed: int) -> list[torch.Tensor]:
        return make_responses(self.builder, count, self.response, seed)

    def _rollout(self, prompt: Prompt, index: int, ids: torch.Tensor) -> Rollout:
        logp = torch.full((len(ids),), -6.0)
        return Rollout(prompt.question.id, index, ids, self.builder.decode_response(ids), logp, False, 0)


def copying_step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """The step with a copy of prompt and video for each response, in generation and in all three models.

    The same objective, losses and optimisers as `stages.distill.step`; what differs is that a batch is a list of
    samples. One group per forward pass. The discriminator reads N + K rows; one pair per rollout would be 2N.
    """
    settings = state.settings
    n, temperature, device = settings.rollout.n, settings.rollout.temperature, state.world.device
    copies = [_renamed(prompt, i) for prompt in prompts for i in range(n)]
    sampling = Sampling(n=1, temperature=temperature, max_new_tokens=settings.rollout.max_new_tokens)
    with state.timer("rollout"), torch.no_grad():
        features = _encode_each(state.student.model, copies)
        rollouts = [one for (one,) in state.rollouts.generate(state.student.model, copies, sampling, features=features)]
    groups = [
        make_group(p, rollouts[i * n : (i + 1) * n], state.targets[p.question.id], settings, step=number)
        for i, p in enumerate(prompts)
    ]
    with state.timer("discriminator"):
        for number, group in enumerate(groups):
            loss = _judge(state, group, len(groups), settings)
            state.discriminator.backward(loss, last=number == len(groups) - 1)
    for group in groups:
        set_advantages(group, settings)
    rows = [media_each(pad([g.prompt], [[r.token_ids for r in g.rollouts]], pad_id=0)).to(device) for g in groups]
    with state.timer("reference"), torch.no_grad():
        score = partial(linear_logprob, temperature=temperature, ignore_index=None)
        reference = [
            state.reference([g.prompt] * n, own, _encode_each(state.reference.model, [g.prompt] * n), score)
            for g, own in zip(groups, rows, strict=True)
        ]
    with state.timer("policy"):
        for number, (group, own, logp) in enumerate(zip(groups, rows, reference, strict=True)):
            head = partial(
                linear_policy_loss,
                advantages=group.advantages.to(device).repeat_interleave(own.lengths),
                normalizer=sum(len(r.targets) for r in rows),
                temperature=temperature,
                ignore_index=None,
                rollout_logp=torch.cat([r.logp for r in group.rollouts]).to(device),
                kl=settings.distill.kl,
                kl_coef=settings.distill.kl_coef,
                ref_logp=logp,
            )
            features = _encode_each(state.student.model, [group.prompt] * n)
            loss = state.policy([group.prompt] * n, own, features, head).loss
            state.policy.backward(loss, last=number == len(groups) - 1)
    with state.timer("optimizer"):
        norms, skipped = apply_or_discard([state.policy, state.discriminator])
    return StepResult({"policy/grad_norm": norms[0], "discriminator/grad_norm": norms[1]}, skipped)


def _renamed(prompt: Prompt, index: int) -> Prompt:
    """A copy under a name of its own, from which its sampling noise is drawn."""
    return replace(prompt, question=replace(prompt.question, id=f"{prompt.question.id}/{index}"))


def _judge(state: StageState, group: RolloutGroup, groups: int, settings: RunConfig) -> torch.Tensor:
    """L_D of a group; leaves the scores in it."""
    n = len(group.rollouts)
    judged = distinct_texts(group, state.builder)
    texts = [judged.responses[place] for place in (*judged.students, *judged.teachers)]
    copies = [group.prompt] * len(texts)
    rows = media_each(pad([group.prompt], [texts], pad_id=0)).to(state.world.device)
    scores = state.discriminator(copies, rows, _encode_each(state.discriminator.module.model, copies))
    group.d_score = scores.detach()[:n].float().cpu()
    pairs = make_pairs([group], settings)
    on_device = [field.to(scores.device) for field in pairs[:4]]
    return pairwise_discriminator_loss(
        scores[:n],
        scores[n:],
        *on_device[:3],
        pair_weight=on_device[3],
        normalizer=n * groups,
        score_l2=settings.discriminator.score_l2,
        l2_normalizer=len(texts) * groups,
    ).loss
