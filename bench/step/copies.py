"""A stage-2 step with a copy of prompt and video for each response, as in trainers whose batch is a list of samples.

It is our code all the same: such trainers have no discriminator. trl_peer.py compares with one that is not ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from bench.prefix.groups import media_each
from rmsd_fast.data.packing import pad
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob, linear_policy_loss, pairwise_discriminator_loss
from rmsd_fast.models.students import encode_media
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.stages.groups import RolloutGroup, distinct_texts, make_group, make_pairs, set_advantages
from rmsd_fast.stages.state import StageState, StepResult, apply_or_discard

_encode_each = partial(encode_media, distinct=False)


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
        for group in groups:
            loss = _discriminator_loss(state, group, len(groups))
            state.discriminator.backward(loss, last=group is groups[-1])
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
        for group, own, logp in zip(groups, rows, reference, strict=True):
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
            state.policy.backward(loss, last=group is groups[-1])
    with state.timer("optimizer"):
        norms, skipped = apply_or_discard([state.policy, state.discriminator])
    return StepResult({"policy/grad_norm": norms[0], "discriminator/grad_norm": norms[1]}, skipped)


def _renamed(prompt: Prompt, index: int) -> Prompt:
    """A copy under a name of its own, from which its sampling noise is drawn."""
    return replace(prompt, question=replace(prompt.question, id=f"{prompt.question.id}/{index}"))


def _discriminator_loss(state: StageState, group: RolloutGroup, groups: int) -> torch.Tensor:
    """L_D of a group; leaves the scores in it."""
    n = len(group.rollouts)
    distinct = distinct_texts(group, state.builder)
    texts = [distinct.responses[place] for place in (*distinct.students, *distinct.teachers)]
    copies = [group.prompt] * len(texts)
    rows = media_each(pad([group.prompt], [texts], pad_id=0)).to(state.world.device)
    scores = state.discriminator(copies, rows, _encode_each(state.discriminator.module.model, copies))
    group.d_score = scores.detach()[:n].float().cpu()
    pairs = make_pairs([group], state.settings)
    on_device = [field.to(scores.device) for field in pairs[:4]]
    return pairwise_discriminator_loss(
        scores[:n],
        scores[n:],
        *on_device[:3],
        pair_weight=on_device[3],
        normalizer=n * groups,
        score_l2=state.settings.discriminator.score_l2,
        l2_normalizer=len(texts) * groups,
    ).loss
