"""Stage 2 (adversarial distillation) and the discriminator's warm-up before it (arXiv 2603.11423).

One step: rollouts -> matching -> vision once per video -> one discriminator forward for rewards and L_D -> reference
log-probs -> policy forward and backward -> both optimiser steps, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from rmsd_fast.config import RunConfig
from rmsd_fast.data.packing import Rows
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob, linear_policy_loss
from rmsd_fast.models.students import MediaFeatures, encode_media
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.runtime.distributed import any_rank, global_sum
from rmsd_fast.setting_rules import uses_discriminator
from rmsd_fast.stages.groups import Group, group_metrics, group_sums, make_group, set_advantages
from rmsd_fast.stages.judge import judge, judge_metrics
from rmsd_fast.stages.state import (
    RunState,
    StepResult,
    apply_or_discard,
    encode_step,
    micro_batches,
    rows_of,
    select_features,
)


def warm_up_step(state: RunState, prompts: list[Prompt], settings: RunConfig, *, rollout_step: int) -> StepResult:
    """One optimiser step of the discriminator on rollouts of a policy that stands still."""
    groups, features = _roll_out(state, prompts, settings, rollout_step)
    if groups is None:
        return StepResult({"tokens": 0}, skipped=True)
    with state.timer("discriminator"):
        sums = judge(state, groups, features, settings)
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard([state.discriminator])
    samples = _samples(groups, judged=True, trained=False)
    sums = global_sum({**sums, **group_sums(groups, settings), **samples}, state.world)
    metrics = {**judge_metrics(sums), **group_metrics(sums), **_work(sums), "discriminator/grad_norm": norm}
    return StepResult(metrics, skipped, groups)


def step(state: RunState, prompts: list[Prompt], settings: RunConfig, *, rollout_step: int) -> StepResult:
    """One optimiser step of policy and discriminator."""
    groups, features = _roll_out(state, prompts, settings, rollout_step)
    if groups is None:
        return StepResult({"tokens": 0}, skipped=True)
    engines = [state.policy]
    sums: dict[str, float] = {}
    if uses_discriminator(settings):
        with state.timer("discriminator"):
            sums = judge(state, groups, features, settings)
        engines.append(state.discriminator)
    with state.timer("reference"):
        batches = _policy_batches(state, groups, features, settings)
    for group in groups:
        set_advantages(group, settings)
    with state.timer("policy"):
        sums |= _policy_pass(state, batches, settings)
    with state.timer("optimizer"):
        norms, skipped = apply_or_discard(engines)
    samples = _samples(groups, judged=uses_discriminator(settings), trained=True)
    sums = global_sum({**sums, **group_sums(groups, settings), **samples}, state.world)
    metrics = {**group_metrics(sums), **_policy_metrics(sums), **_work(sums), "policy/grad_norm": norms[0]}
    if uses_discriminator(settings):
        metrics |= {**judge_metrics(sums), "discriminator/grad_norm": norms[1]}
    return StepResult(metrics, skipped, groups)


def _roll_out(
    state: RunState, prompts: list[Prompt], settings: RunConfig, rollout_step: int
) -> tuple[list[Group] | None, MediaFeatures | None]:
    """Groups of the step and the vision features that all three models share; None where each encodes its own.

    No groups on any process where the policy's logits were not finite on one of them.
    """
    rollout = settings.rollout
    sampling = Sampling(
        n=rollout.n,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        seed=settings.seed,
        step=rollout_step,
    )
    model = state.student.model
    with state.policy.full_weights():
        features = encode_step(state, prompts, settings)
        with state.timer("rollout"):
            responses = state.rollouts.generate(
                model, prompts, sampling, features=features, policy_version=rollout_step
            )
    if any_rank(not all(rollout.finite for own in responses for rollout in own), state.world):
        return None, None
    with state.timer("matching"):
        groups = [
            make_group(prompt, own, state.targets[prompt.question.id], settings, step=rollout_step)
            for prompt, own in zip(prompts, responses, strict=True)
        ]
    return groups, None if settings.distill.train_vision else features


@dataclass
class _PolicyBatch:
    """One micro-batch of the policy loss; log-probs [S] over the tokens of `rows`, in their order.

    features, ref_features: of policy and reference, the same while the tower is frozen; None: the policy encodes.
    """

    parts: list[tuple[Group, list[int]]]
    prompts: list[Prompt]
    features: MediaFeatures | None
    ref_features: MediaFeatures | None
    rows: Rows
    rollout_logp: torch.Tensor
    filler: bool
    ref_logp: torch.Tensor | None = None


@torch.no_grad()
def _policy_batches(
    state: RunState, groups: list[Group], features: MediaFeatures | None, settings: RunConfig
) -> list[_PolicyBatch]:
    """Micro-batches with the reference's log-probs of the sampled tokens, and k1 where the reward takes it."""
    distill, device = settings.distill, state.world.device
    score = partial(linear_logprob, temperature=settings.rollout.temperature, ignore_index=None)
    prompts = [group.prompt for group in groups]
    responses = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
    batches = []
    for planned in micro_batches(state, prompts, responses, settings):
        parts = [(groups[i], own) for i, own in zip(planned.prompts, planned.responses, strict=True)]
        batch = _PolicyBatch(
            parts=parts,
            prompts=[prompts[i] for i in planned.prompts],
            features=select_features(features, planned.prompts),
            ref_features=select_features(features, planned.prompts),
            rows=rows_of(state, planned, prompts, responses, settings),
            rollout_logp=torch.cat([group.rollouts[r].logp for group, own in parts for r in own]).to(device),
            filler=planned.filler,
        )
        if state.reference is not None and batch.ref_features is None:
            batch.ref_features = encode_media(state.reference.model, batch.prompts)
        if (distill.kl_coef and distill.kl != "full") or settings.reward.kl_in_reward:
            batch.ref_logp = state.reference(batch.prompts, batch.rows, batch.ref_features, score)
        batches.append(batch)
    if settings.reward.kl_in_reward:
        _set_log_ratios(groups, batches)
    return batches


def _set_log_ratios(groups: list[Group], batches: list[_PolicyBatch]) -> None:
    """k1 of each rollout, mean over its tokens."""
    found = []
    for batch in batches:
        log_ratio = (batch.rollout_logp - batch.ref_logp).split(batch.rows.lengths_list)
        found.append(torch.stack([part.mean() for part in log_ratio]))
    means = iter(torch.cat(found).cpu())
    for group in groups:
        group.log_ratio = torch.zeros(len(group.rollouts))
    for batch in batches:
        for group, own in batch.parts:
            for rollout in own:
                group.log_ratio[rollout] = next(means)


def _policy_pass(state: RunState, batches: list[_PolicyBatch], settings: RunConfig) -> dict[str, torch.Tensor]:
    """Forward and backward of the policy loss; the gradients are complete afterwards and not applied."""
    distill, device = settings.distill, state.world.device
    real = [batch for batch in batches if not batch.filler]
    tokens = sum(len(batch.rows.targets) for batch in real)
    sequences = sum(len(batch.rows.lengths_list) for batch in real)
    counts = global_sum({"tokens": tokens, "sequences": sequences}, state.world)
    token_mean = distill.aggregation == "token_mean"
    normalizer = counts["tokens"] if token_mean else counts["sequences"]
    # With kl_coef = 0 k3 is only measured; "full" would need the reference's hidden states for that.
    kl = {"kl": distill.kl, "kl_coef": distill.kl_coef} if distill.kl_coef else {}
    sums: dict[str, torch.Tensor] = {}
    for number, batch in enumerate(batches):
        lengths = batch.rows.lengths
        advantages = torch.cat([group.advantages[own] for group, own in batch.parts]).to(device)
        each = 1.0 / lengths
        # A reference that was scored for the reward is measured too, also where the loss has no KL.
        reference = {} if batch.ref_logp is None else {"ref_logp": batch.ref_logp}
        if kl and distill.kl == "full":
            with torch.no_grad():
                hidden, weight = state.reference(batch.prompts, batch.rows, batch.ref_features, _hidden_and_head)
            reference = {"ref_hidden": hidden, "ref_weight": weight}
        head = partial(
            linear_policy_loss,
            advantages=advantages.repeat_interleave(lengths, output_size=len(batch.rows.targets)),
            token_weights=None if token_mean else each.repeat_interleave(lengths, output_size=len(batch.rows.targets)),
            normalizer=normalizer,
            temperature=settings.rollout.temperature,
            ignore_index=None,
            rollout_logp=batch.rollout_logp,
            tis_cap=distill.tis_cap,
            sequence_mask_cap=distill.sequence_mask_cap,
            cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)) if distill.sequence_mask_cap else None,
            **kl,
            **reference,
        )
        result = state.policy(batch.prompts, batch.rows, batch.features, head)
        state.policy.backward(0.0 * result.loss if batch.filler else result.loss, last=number == len(batches) - 1)
        sums["p_computed"] = sums.get("p_computed", 0) + batch.rows.input_ids.numel()
        if batch.filler:
            continue
        measured = {"loss": result.loss.detach(), "tokens": len(batch.rollout_logp)}
        measured |= {name: value * len(batch.rollout_logp) for name, value in result.metrics.items() if name in _MEANS}
        for name, value in measured.items():
            sums[f"p_{name}"] = sums.get(f"p_{name}", 0) + value
    return sums


# Means over tokens that the loss reports, those of them that the chosen mode has.
_MEANS = ("kl", "kl_k1", "entropy", "logp", "importance_ratio", "tis_capped_fraction", "sequence_masked_fraction")


def _hidden_and_head(hidden, weight, targets):
    return hidden, weight


def _policy_metrics(sums: dict[str, float]) -> dict[str, float]:
    # importance_ratio = trainer's over engine's probability of the sampled tokens: 1 where both compute the same.
    means = {f"policy/{name}": sums[f"p_{name}"] / sums["p_tokens"] for name in _MEANS if f"p_{name}" in sums}
    return {"policy/loss": sums["p_loss"], **means}


def _samples(groups: list[Group], *, judged: bool, trained: bool) -> dict[str, float]:
    """Tokens of the step as a list of samples: each response with a prompt of its own, in each model with gradients."""
    tokens = 0
    for group in groups:
        prompt = len(group.prompt.input_ids)
        tokens += (judged + trained) * sum(prompt + len(rollout.token_ids) for rollout in group.rollouts)
        tokens += judged * sum(prompt + len(ids) for ids in group.teacher_ids)
    return {"samples": tokens}


def _work(sums: dict[str, float]) -> dict[str, float]:
    """`tokens` as samples; `tokens_computed` went through policy and discriminator, also those of fillers and of the
    pass that precedes where a group was split.
    """
    return {"tokens": sums["samples"], "tokens_computed": sums.get("computed", 0) + sums.get("p_computed", 0)}
