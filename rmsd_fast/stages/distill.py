"""Stage 2 (adversarial distillation) and the discriminator's warm-up before it (arXiv 2603.11423).

One step: vision once per video -> rollouts -> matching -> one discriminator forward for rewards and L_D -> log-probs
under self-teacher and reference -> policy forward and backward -> both optimizer steps, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rmsd_fast.config import ACCURACY_STEPS
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.transfer import to_device
from rmsd_fast.losses import linear_logprob, linear_policy_loss
from rmsd_fast.models.students import MediaFeatures, encode_media
from rmsd_fast.rollout.base import Rollout, Sampling
from rmsd_fast.runtime.process_group import any_rank, global_sum
from rmsd_fast.setting_rules.uses import (
    compared_tokens,
    distills_vocabulary,
    imitates_in_stage2,
    samples_reference,
    teaches,
    uses_discriminator,
    warm_up_steps,
    weights_tokens,
)
from rmsd_fast.stages.degeneration import degeneration_record
from rmsd_fast.stages.discriminator_pass import discriminator_pass
from rmsd_fast.stages.feedback import set_hints
from rmsd_fast.stages.groups import RolloutGroup, group_record, make_group, quality_record, set_advantages
from rmsd_fast.stages.imitation import imitated_tokens, set_imitated, with_imitation
from rmsd_fast.stages.parity import check_parity
from rmsd_fast.stages.passes import Pass, passes
from rmsd_fast.stages.state import StageState, StepResult, apply_or_discard, encode_step
from rmsd_fast.stages.step_metrics import Metric, global_metrics, mean
from rmsd_fast.stages.teach import teach
from rmsd_fast.stages.token_credit import set_token_advantages
from rmsd_fast.stages.top_tokens import read_top_tokens
from rmsd_fast.stages.uncertainty import WeighedStep, add_answer_values, learn_weights, weigh_terms
from rmsd_fast.stages.vocabulary import add_divergence


def warm_up_step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run one optimizer step of the discriminator on rollouts of a fixed policy.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        number: step within the warm-up, counted from 0.
    """
    settings = state.settings
    rollouts, features = roll_out(state, prompts, number)
    if rollouts is None:
        return StepResult({"tokens": 0}, skipped=True)
    parity = check_parity(state, prompts, rollouts, features, number)
    with state.timer("matching"):
        groups = [
            make_group(prompt, drawn, state.targets[prompt.question.id], settings, step=number)
            for prompt, drawn in zip(prompts, rollouts, strict=True)
        ]
    with state.timer("discriminator"):
        scored, teacher_tokens, computed = discriminator_pass(state, groups, features)
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard([state.discriminator])
    work = {"tokens": _rollout_tokens(groups) + teacher_tokens, "tokens_computed": computed}
    described = {**group_record(groups, settings), **degeneration_record(groups, state.builder)}
    metrics = global_metrics({**scored, **described, **work}, state.world)
    finished = _has_learned(state, metrics["discriminator/pair_accuracy"])
    return StepResult({**metrics, **parity, "discriminator/grad_norm": norm}, skipped, groups, finished)


def forecast(state: StageState, prompts: list[Prompt]) -> dict[str, float | None] | None:
    """Return the metrics that show what stage 2 can gain, from the rollouts of one batch and without training.

    Args:
        state: state of the stage.
        prompts: prompts of this process, for instance those of the first step.
    Returns:
        The metrics over all processes; None if the student's logits are not finite.
    """
    rollouts, _ = roll_out(state, prompts, 0)
    if rollouts is None:
        return None
    groups = [
        make_group(prompt, drawn, state.targets[prompt.question.id], state.settings, step=0)
        for prompt, drawn in zip(prompts, rollouts, strict=True)
    ]
    return global_metrics(quality_record(groups), state.world)


def _has_learned(state: StageState, accuracy: float | None) -> bool:
    """Return whether the pair accuracy, averaged over the latest steps, has reached `discriminator.warm_up_accuracy`.

    Each step measures it before the update, on questions that the discriminator has not been trained on in this epoch.
    """
    enough = state.settings.discriminator.warm_up_accuracy
    if enough is None or accuracy is None:
        return False
    state.accuracies = [*state.accuracies, accuracy][-ACCURACY_STEPS:]
    return len(state.accuracies) == ACCURACY_STEPS and sum(state.accuracies) / ACCURACY_STEPS >= enough


def step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run one optimizer step of policy and discriminator.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        number: step within stage 2, counted from 0.
    """
    settings = state.settings
    # The step number that seeds rollouts and matches continues from the warm-up, so that no draws are repeated.
    rollout_step = warm_up_steps(settings) + number
    rollouts, features = roll_out(state, prompts, rollout_step)
    if rollouts is None:
        return StepResult({"tokens": 0}, skipped=True)
    parity = check_parity(state, prompts, rollouts, features, number)
    with state.timer("matching"):
        groups = [
            make_group(prompt, drawn, state.targets[prompt.question.id], settings, step=rollout_step)
            for prompt, drawn in zip(prompts, rollouts, strict=True)
        ]
    selected = set_imitated(state, groups, features) if imitates_in_stage2(settings) else {}
    # Sum here, while the device is idle. Between reference and policy, the sum would wait for the reference's passes.
    counts = global_sum(
        {
            "tokens": sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts),
            "sequences": sum(len(group.rollouts) for group in groups),
            "imitated": sum(len(group.imitated) for group in groups if group.imitated is not None),
        },
        state.world,
    )
    engines, scored = [state.policy], {}
    tokens, computed = _rollout_tokens(groups) + imitated_tokens(groups), 0
    if uses_discriminator(settings):
        with state.timer("discriminator"):
            scored, teacher_tokens, computed = discriminator_pass(state, groups, features)
        # The discriminator reads the rollouts again.
        tokens += _rollout_tokens(groups) + teacher_tokens
        engines.append(state.discriminator)
    hinted = set_hints(state, groups, step=number)
    teacher_head, distills = None, distills_vocabulary(settings, number)
    if teaches(settings, number):
        with state.timer("teacher"):
            top, student_top = compared_tokens(settings, number)
            teacher_head = teach(state, groups, features, top=top)
            if top:
                read_top_tokens(state, groups, features, top=top, student_top=student_top)
    with state.timer("reference"):
        policy_passes = _reference_pass(state, groups, features)
    for group in groups:
        set_advantages(group, settings)
    credited = set_token_advantages(groups, settings, step=number) if weights_tokens(settings) else {}
    weighed = None if state.term_weights is None else weigh_terms(state, groups, features, counts)
    with state.timer("policy"):
        distilled = (teacher_head,) if distills else None
        trained, trained_tokens = _policy_pass(state, groups, policy_passes, counts, weighed, distilled)
    with state.timer("optimizer"):
        norms, skipped = apply_or_discard(engines)
        if weighed is not None and not skipped:
            learn_weights(state, weighed)
        # After the last step with the self-teacher, nothing reads the average.
        due = (number + 1) % settings.self_teacher.ema_every == 0 and teaches(settings, number + 1)
        if state.average is not None and due and not skipped:
            state.average.update()
    work = {"tokens": tokens, "tokens_computed": computed + trained_tokens}
    described = {**group_record(groups, settings), **degeneration_record(groups, state.builder)}
    learned = {} if weighed is None else weighed.record
    record = {**described, **trained, **hinted, **credited, **selected, **learned, **work, **scored}
    metrics = global_metrics(record, state.world)
    metrics["policy/grad_norm"] = norms[0]
    if scored:
        metrics["discriminator/grad_norm"] = norms[1]
    return StepResult({**metrics, **parity}, skipped, groups)


def roll_out(
    state: StageState, prompts: list[Prompt], rollout_step: int
) -> tuple[list[list[Rollout]] | None, MediaFeatures | None]:
    """Return the rollouts of each prompt, and the vision features that all three models share.

    The features are None if each model encodes its own. If the policy's logits were not finite on any process, both
    results are None on all processes.
    """
    settings = state.settings
    sampling = Sampling(
        n=settings.rollout.n,
        temperature=settings.rollout.temperature,
        max_new_tokens=settings.rollout.max_new_tokens,
        seed=settings.seed,
        step=rollout_step,
    )
    state.policy.module.activate()
    with state.timer("sync"):
        state.rollouts.update(state.policy, rollout_step)
    # An engine with its own weights needs only the vision features of the training model.
    with state.policy.full_weights(None if state.rollouts.runs_policy else state.student.model.model.visual):
        features = encode_step(state, prompts)
        with state.timer("rollout"):
            rollouts = state.rollouts.generate(
                state.student.model, prompts, sampling, features=features, policy_version=rollout_step
            )
    if state.dump is not None:
        with state.timer("rollout"):
            # The rollouts of the forecast are those of the first step, which writes them again.
            state.dump.write(rollouts, rollout_step)
    if any_rank(not all(rollout.finite for drawn in rollouts for rollout in drawn), state.world):
        return None, None
    return rollouts, None if state.train_vision else features


@dataclass
class _PolicyPass:
    """A pass of the policy, with the additional inputs of its loss.

    The rows contain rollouts and, with `distill.sft_coef`, imitated responses. S is the number of sampled tokens.

    Attributes:
        read: prompts, rows and features. While the vision tower is frozen, the reference shares the features.
        ref_features: vision features for the reference, kept if the exact KL in the loss reads them again.
        rollout_logp: log-probs of the sampled tokens from the rollout engine, float32 [S], in the order of the rows.
        lengths: tokens of each rollout in the rows, int64 on the device.
        sampled: places of the sampled tokens among the scored tokens of the rows, int64 [S] on the device; None if all
            of them are sampled.
        imitated: places of the tokens of imitated responses, in the same way; None if there are none.
        ref_logp: log-probs of the sampled tokens under the reference; None if no KL on the sampled tokens is computed.
    """

    read: Pass
    ref_features: MediaFeatures | None
    rollout_logp: torch.Tensor
    lengths: torch.Tensor
    sampled: torch.Tensor | None
    imitated: torch.Tensor | None
    ref_logp: torch.Tensor | None = None

    def of_rollouts(self, head: Callable[..., Any]) -> Callable[..., Any]:
        """Return a head that reads only the sampled tokens."""
        if self.sampled is None:
            return head
        return lambda hidden, weight, targets: head(hidden[self.sampled], weight, targets[self.sampled])


@torch.no_grad()
def _reference_pass(state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None) -> list[_PolicyPass]:
    """Return the policy's passes with the reference's log-probs of the sampled tokens.

    If the reward contains a KL penalty, also store the k1 estimates in the groups.
    """
    distill, kl_in_reward = state.settings.distill, state.settings.reward.kl_in_reward
    scored = all(group.ref_logp for group in groups)
    score = partial(linear_logprob, temperature=state.settings.rollout.temperature, ignore_index=None)
    responses = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
    for of_group, group in zip(responses, groups, strict=True):
        # It is the last response, after the rollouts.
        of_group += [] if group.imitated is None else [group.imitated]
    policy_passes = []
    for read in passes(state, [group.prompt for group in groups], responses, features):
        indices = _rollout_indices(read, groups)
        logp = _joined([groups[i].rollouts[r].logp for i, r in indices])
        ref_features = read.features
        if state.reference is not None and ref_features is None:
            # The tower is trained, so there are no adapters, and the reference is a model of its own.
            ref_features = encode_media(state.reference.model, read.prompts)
        keep_features = distill.kl_coef and distill.kl == "full"
        rollout_logp, *places = _places(read, indices, logp, state.world.device)
        policy_pass = _PolicyPass(read, ref_features if keep_features else None, rollout_logp, *places)
        if samples_reference(state.settings) and scored:
            logp = _joined([groups[i].ref_logp[r] for i, r in indices])
            (policy_pass.ref_logp,) = to_device([logp], state.world.device)
        elif samples_reference(state.settings):
            head = policy_pass.of_rollouts(score)
            policy_pass.ref_logp = state.reference(read.prompts, read.rows, ref_features, head)
        policy_passes.append(policy_pass)
    if kl_in_reward:
        _set_log_ratios(groups, policy_passes)
    return policy_passes


def _rollout_indices(read: Pass, groups: list[RolloutGroup]) -> list[tuple[int, int]]:
    """Return the group and the index in it of each rollout of a pass, in the order of its rows."""
    return [(i, r) for i, r in _response_indices(read) if r < len(groups[i].rollouts)]


def _response_indices(read: Pass) -> list[tuple[int, int]]:
    pairs = zip(read.batch.prompts, read.batch.responses, strict=True)
    return [(i, r) for i, chosen in pairs for r in chosen]


def _places(
    read: Pass, indices: list[tuple[int, int]], rollout_logp: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return rollout_logp, lengths, sampled and imitated of a `_PolicyPass`, on the device."""
    every, lengths = _response_indices(read), read.rows.lengths
    if indices == every:
        (rollout_logp,) = to_device([rollout_logp], device)
        return rollout_logp, lengths, None, None
    rollouts = set(indices)
    is_rollout = torch.tensor([index in rollouts for index in every])
    counts = torch.tensor(read.rows.lengths_list)
    is_sampled = is_rollout.repeat_interleave(counts)
    places = (counts[is_rollout], is_sampled.nonzero()[:, 0], (~is_sampled).nonzero()[:, 0])
    return tuple(to_device([rollout_logp, *places], device))


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the parts one after the other. A pass may contain no rollout, but only imitated responses."""
    return torch.cat(parts) if parts else torch.zeros(0)


def _set_log_ratios(groups: list[RolloutGroup], policy_passes: list[_PolicyPass]) -> None:
    """Store k1, averaged over the tokens of each rollout, in the groups."""
    means = []
    for policy_pass in policy_passes:
        log_ratio = policy_pass.rollout_logp - policy_pass.ref_logp
        drawn = [len(groups[i].rollouts[r].token_ids) for i, r in _rollout_indices(policy_pass.read, groups)]
        means += [of_rollout.mean()[None] for of_rollout in log_ratio.split(drawn)] if drawn else []
    every_mean = iter(torch.cat(means).cpu())
    for group in groups:
        group.log_ratio = torch.zeros(len(group.rollouts))
    for policy_pass in policy_passes:
        for i, rollout in _rollout_indices(policy_pass.read, groups):
            groups[i].log_ratio[rollout] = next(every_mean)


def _policy_pass(
    state: StageState,
    groups: list[RolloutGroup],
    policy_passes: list[_PolicyPass],
    counts: dict[str, float],
    weighed: WeighedStep | None,
    distilled: tuple[torch.Tensor | None] | None = None,
) -> tuple[dict[str, Metric], int]:
    """Run forward and backward of the policy loss. The gradients are then complete but not applied.

    Args:
        state: state of the stage.
        groups: groups of this process, with their advantages.
        policy_passes: passes over these groups.
        counts: tokens and sequences of the rollouts, and tokens of the imitated responses, in the global batch: the
            normalizers of the loss.
        weighed: terms of the loss to which the imitated responses are added; None without `credit.uncertainty`.
        distilled: the self-teacher's head for a divergence from its distributions, see `stages.vocabulary`, or (None,)
            if it is the policy's; None = there is no divergence.
    Returns:
        This process's part of the metrics, and the number of tokens that the model processed.
    """
    distill = state.settings.distill
    token_mean, lora = distill.aggregation == "token_mean", state.settings.model.adapter == "lora"
    exact_kl = distill.kl_coef and distill.kl == "full"
    # With kl_coef = 0, the KL is measured only if the reward needs the reference's log-probs anyway. "full" would need
    # the reference's hidden states, so k3 is used instead.
    kl = {} if distill.kl == "full" and not exact_kl else {"kl": distill.kl, "kl_coef": distill.kl_coef}
    normalizer = counts["tokens"] if token_mean else counts["sequences"]
    totals: dict[str, torch.Tensor] = {}
    tokens, imitated, sft_loss = 0, 0, 0.0
    owners, parts = [], []
    divergences: list[tuple[torch.Tensor, torch.Tensor]] = []
    for policy_pass in policy_passes:
        read, rows = policy_pass.read, policy_pass.read.rows
        indices, sampled = _rollout_indices(read, groups), len(policy_pass.rollout_logp)
        each_token = partial(torch.repeat_interleave, repeats=policy_pass.lengths, output_size=sampled)
        if weights_tokens(state.settings):
            advantages = _joined([groups[i].token_advantages[r] for i, r in indices])
            (advantages,) = to_device([advantages], state.world.device)
        else:
            advantages = _joined([groups[i].advantages[r, None] for i, r in indices])
            (advantages,) = to_device([advantages], state.world.device)
            advantages = each_token(advantages)
        reference = {} if policy_pass.ref_logp is None else {"ref_logp": policy_pass.ref_logp}
        if exact_kl:
            with torch.no_grad():
                # With adapters, the reference has the policy's head, whose weight ZeRO-3 gathers only inside a forward.
                read_out = _hidden if lora else _hidden_and_head
                read_out = policy_pass.of_rollouts(read_out)
                reference = state.reference(read.prompts, rows, policy_pass.ref_features, read_out)
        head = partial(
            linear_policy_loss,
            advantages=advantages,
            token_weights=None if token_mean else each_token(1.0 / policy_pass.lengths),
            normalizer=normalizer,
            temperature=state.settings.rollout.temperature,
            ignore_index=None,
            rollout_logp=policy_pass.rollout_logp,
            tis_cap=distill.tis_cap,
            sequence_mask_cap=distill.sequence_mask_cap,
            cu_seqlens=F.pad(policy_pass.lengths.cumsum(0), (1, 0)) if distill.sequence_mask_cap else None,
            **kl,
            **reference,
        )
        head = _own_head(head) if exact_kl and lora else head
        if distilled is not None and sampled:
            head = add_divergence(state, groups, indices, head, teacher_head=distilled[0], normalizer=normalizer)
        head = policy_pass.of_rollouts(head)
        if policy_pass.imitated is not None:
            loss, more = head if sampled else None, {}
            answered = [i for i, r in _response_indices(read) if r >= len(groups[i].rollouts)]
            if weighed is not None:
                each = [torch.full(groups[i].imitated.shape, groups[i].sft_weight) for i in answered]
                (more["weights"],) = to_device([torch.cat(each)], state.world.device)
            head = with_imitation(loss, policy_pass.imitated, distill.sft_coef, normalizer=counts["imitated"], **more)
        result = state.policy(read.prompts, rows, read.features, head)
        read.backward(state.policy, result.loss)
        if read.filler:
            continue
        if policy_pass.imitated is not None:
            imitated += len(policy_pass.imitated)
            sft_loss = sft_loss + result.metrics["sft_loss"]
            if weighed is not None:
                owners += [i for i in answered for _ in groups[i].imitated]
                parts.append(result.metrics["sft_parts"])
        if not sampled:
            continue
        if distilled is not None:
            divergences.append((result.metrics["divergence"], result.metrics["divergence_weight"]))
        tokens += sampled
        totals["loss"] = totals.get("loss", 0) + result.metrics.get("policy_loss", result.loss.detach())
        totals["engine_logp"] = totals.get("engine_logp", 0) + policy_pass.rollout_logp.sum()
        for name in _MEANS & result.metrics.keys():
            totals[name] = totals.get(name, 0) + result.metrics[name] * sampled
    if weighed is not None:
        add_answer_values(state, weighed, owners, parts)
    # The expected importance ratio is 1 for any engine that reports its own probabilities. The KL is 0 only if engine
    # and trainer agree.
    drift = totals.pop("engine_logp") - totals["logp"]
    record: dict[str, Metric] = {"policy/loss": totals.pop("loss"), "policy/engine_kl": (mean, drift, tokens)}
    record |= {f"policy/{name}": (mean, total, tokens) for name, total in sorted(totals.items())}
    if distilled is not None:
        record["kd/divergence"] = (mean, *(sum(column) for column in zip(*divergences, strict=True)))
        for group in groups:
            group.teacher_hidden = []
    if imitates_in_stage2(state.settings):
        record["policy/sft_loss"] = (mean, sft_loss * counts["imitated"], imitated)
    return record, sum(policy_pass.read.rows.input_ids.numel() for policy_pass in policy_passes)


# Means over tokens that the loss reports, depending on its settings. importance_ratio is the trainer's probability
# of the sampled tokens divided by the rollout engine's; it is 1 if both compute the same.
_MEANS = {"kl", "kl_k1", "entropy", "logp", "importance_ratio", "tis_capped_fraction", "sequence_masked_fraction"}


def _hidden_and_head(hidden, weight, targets):
    return {"ref_hidden": hidden, "ref_weight": weight}


def _hidden(hidden, weight, targets):
    return {"ref_hidden": hidden}


def _own_head(loss):
    """Let a loss use the policy's head for the reference, too."""
    return lambda hidden, weight, targets: loss(hidden, weight, targets, ref_weight=weight)


def _rollout_tokens(groups: list[RolloutGroup]) -> int:
    """Count the tokens of the rollouts without sharing: each rollout with its own prompt."""
    return sum(len(group.prompt.input_ids) + len(rollout.token_ids) for group in groups for rollout in group.rollouts)
