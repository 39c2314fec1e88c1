"""The passes of stage 2's policy: the reference's log-probs for them, and forward and backward of the losses.

A pass reads rollouts and, with `distill.sft_coef`, imitated teacher responses. The losses on sampled tokens are
the policy loss and, with a divergence of `kd.kind`, that of `stages.vocabulary`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rmsd_fast.data.transfer import to_device
from rmsd_fast.losses import PolicyLoss, linear_logprob, linear_policy_loss
from rmsd_fast.models.students import MediaFeatures, encode_media
from rmsd_fast.setting_rules.uses import imitates_in_stage2, samples_reference, weights_tokens
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.imitation import PolicyHead, with_imitation
from rmsd_fast.stages.passes import Pass, passes
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_metrics import Metric, mean
from rmsd_fast.stages.uncertainty import WeighedStep, add_answer_values
from rmsd_fast.stages.vocabulary import Distilled, add_divergence


@dataclass
class PolicyPass:
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
def reference_pass(state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None) -> list[PolicyPass]:
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
    scores = samples_reference(state.settings) and not scored
    keeps_features = distill.kl_coef > 0 and distill.kl == "full"
    policy_passes = []
    for read in passes(state, [group.prompt for group in groups], responses, features):
        indices = rollout_indices(read, groups)
        logp = _joined([groups[i].rollouts[r].logp for i, r in indices])
        ref_features = read.features
        if (keeps_features or scores) and ref_features is None:
            # The tower is trained, so there are no adapters, and the reference is a model of its own.
            ref_features = encode_media(state.reference.model, read.prompts)
        rollout_logp, *places = _places(read, indices, logp, state.world.device)
        policy_pass = PolicyPass(read, ref_features if keeps_features else None, rollout_logp, *places)
        if samples_reference(state.settings) and scored:
            logp = _joined([groups[i].ref_logp[r] for i, r in indices])
            (policy_pass.ref_logp,) = to_device([logp], state.world.device)
        elif scores:
            head = policy_pass.of_rollouts(score)
            policy_pass.ref_logp = state.reference(read.prompts, read.rows, ref_features, head)
        policy_passes.append(policy_pass)
    if kl_in_reward:
        _set_log_ratios(groups, policy_passes)
    return policy_passes


def rollout_indices(read: Pass, groups: list[RolloutGroup]) -> list[tuple[int, int]]:
    """Return the group and the index in it of each rollout of a pass, in the order of its rows."""
    return [(i, r) for i, r in read.indices if r < len(groups[i].rollouts)]


def _places(
    read: Pass, indices: list[tuple[int, int]], rollout_logp: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return rollout_logp, lengths, sampled and imitated of a `PolicyPass`, on the device."""
    every, lengths = read.indices, read.rows.lengths
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


def _set_log_ratios(groups: list[RolloutGroup], policy_passes: list[PolicyPass]) -> None:
    """Store k1, averaged over the tokens of each rollout, in the groups."""
    means = []
    for policy_pass in policy_passes:
        log_ratio = policy_pass.rollout_logp - policy_pass.ref_logp
        drawn = [len(groups[i].rollouts[r].token_ids) for i, r in rollout_indices(policy_pass.read, groups)]
        means += [of_rollout.mean()[None] for of_rollout in log_ratio.split(drawn)] if drawn else []
    every_mean = iter(torch.cat(means).cpu())
    for group in groups:
        group.log_ratio = torch.zeros(len(group.rollouts))
    for policy_pass in policy_passes:
        for i, rollout in rollout_indices(policy_pass.read, groups):
            groups[i].log_ratio[rollout] = next(every_mean)


def policy_pass(
    state: StageState,
    groups: list[RolloutGroup],
    policy_passes: list[PolicyPass],
    counts: dict[str, float],
    weighed: WeighedStep | None,
    distilled: Distilled | None = None,
) -> tuple[dict[str, Metric], int]:
    """Run forward and backward of the policy loss. The gradients are then complete but not applied.

    Args:
        state: state of the stage.
        groups: groups of this process, with their advantages.
        policy_passes: passes over these groups.
        counts: tokens and sequences of the rollouts, and tokens of the imitated responses, in the global batch: the
            normalizers of the loss.
        weighed: terms of the loss to which the imitated responses are added; None without `credit.uncertainty`.
        distilled: the self-teacher's distributions, for a divergence; None = there is no divergence.
    Returns:
        This process's part of the metrics, and the number of tokens that the model processed.
    """
    sums = _Sums()
    for read_pass in policy_passes:
        read = read_pass.read
        head = read_pass.of_rollouts(_rollout_head(state, groups, read_pass, counts, distilled))
        if read_pass.imitated is not None:
            head = _with_answers(state, groups, read_pass, head, counts, weighed)
        result = state.policy(read.prompts, read.rows, read.features, head)
        read.backward(state.policy, result.loss)
        if not read.filler:
            sums.add(read_pass, result)
    if weighed is not None:
        kept = [read_pass for read_pass in policy_passes if not read_pass.read.filler]
        owners = [i for read_pass in kept for i in _answered(read_pass, groups) for _ in groups[i].imitated]
        add_answer_values(state, weighed, owners, sums.answer_parts)
    if distilled is not None:
        for group in groups:
            group.teacher_hidden = []
    record = sums.record()
    if distilled is not None:
        record["kd/divergence"] = (mean, sums.divergence, sums.divergence_weight)
    if imitates_in_stage2(state.settings):
        record["policy/sft_loss"] = (mean, sums.sft_loss * counts["imitated"], sums.imitated)
    return record, sum(read_pass.read.rows.input_ids.numel() for read_pass in policy_passes)


def _rollout_head(
    state: StageState,
    groups: list[RolloutGroup],
    read_pass: PolicyPass,
    counts: dict[str, float],
    distilled: Distilled | None,
) -> PolicyHead:
    """Return the head with the losses on the sampled tokens of a pass, see `policy_pass`."""
    settings, distill = state.settings, state.settings.distill
    token_mean, lora = distill.aggregation == "token_mean", settings.model.adapter == "lora"
    exact_kl = distill.kl_coef and distill.kl == "full"
    # With kl_coef = 0, the KL is measured only if the reward needs the reference's log-probs anyway. "full" would need
    # the reference's hidden states, so k3 is used instead.
    kl = {} if distill.kl == "full" and not exact_kl else {"kl": distill.kl, "kl_coef": distill.kl_coef}
    normalizer = counts["tokens"] if token_mean else counts["sequences"]
    read, rows = read_pass.read, read_pass.read.rows
    indices, sampled = rollout_indices(read, groups), len(read_pass.rollout_logp)
    each_token = partial(torch.repeat_interleave, repeats=read_pass.lengths, output_size=sampled)
    if weights_tokens(settings):
        advantages = _joined([groups[i].token_advantages[r] for i, r in indices])
        (advantages,) = to_device([advantages], state.world.device)
    else:
        advantages = _joined([groups[i].advantages[r, None] for i, r in indices])
        (advantages,) = to_device([advantages], state.world.device)
        advantages = each_token(advantages)
    reference = {} if read_pass.ref_logp is None else {"ref_logp": read_pass.ref_logp}
    if exact_kl:
        with torch.no_grad():
            # With adapters, the reference has the policy's head, whose weight ZeRO-3 gathers only inside a forward.
            read_out = read_pass.of_rollouts(_hidden if lora else _hidden_and_head)
            reference = state.reference(read.prompts, rows, read_pass.ref_features, read_out)
    head = partial(
        linear_policy_loss,
        advantages=advantages,
        token_weights=None if token_mean else each_token(1.0 / read_pass.lengths),
        normalizer=normalizer,
        temperature=settings.rollout.temperature,
        ignore_index=None,
        rollout_logp=read_pass.rollout_logp,
        tis_cap=distill.tis_cap,
        sequence_mask_cap=distill.sequence_mask_cap,
        cu_seqlens=F.pad(read_pass.lengths.cumsum(0), (1, 0)) if distill.sequence_mask_cap else None,
        **kl,
        **reference,
    )
    head = _own_head(head) if exact_kl and lora else head
    if distilled is not None and sampled:
        head = add_divergence(state, groups, indices, head, distilled=distilled, normalizer=normalizer)
    return head


def _with_answers(
    state: StageState,
    groups: list[RolloutGroup],
    read_pass: PolicyPass,
    head: PolicyHead,
    counts: dict[str, float],
    weighed: WeighedStep | None,
) -> PolicyHead:
    """Add the cross entropy of the imitated responses of a pass to its head."""
    weights = None
    if weighed is not None:
        answered = _answered(read_pass, groups)
        each = [torch.full(groups[i].imitated.shape, groups[i].sft_weight) for i in answered]
        (weights,) = to_device([torch.cat(each)], state.world.device)
    return with_imitation(
        head if len(read_pass.rollout_logp) else None,
        read_pass.imitated,
        state.settings.distill.sft_coef,
        normalizer=counts["imitated"],
        weights=weights,
    )


def _answered(read_pass: PolicyPass, groups: list[RolloutGroup]) -> list[int]:
    """Return the group of each imitated response of a pass, in the order of its rows."""
    return [i for i, r in read_pass.read.indices if r >= len(groups[i].rollouts)]


# Means over tokens that the loss reports, depending on its settings. importance_ratio is the trainer's probability
# of the sampled tokens divided by the rollout engine's; it is 1 if both compute the same.
_MEANS = {"kl", "kl_k1", "entropy", "logp", "importance_ratio", "tis_capped_fraction", "sequence_masked_fraction"}


@dataclass
class _Sums:
    """Sums over the passes of a step on this process.

    Attributes:
        tokens, imitated: sampled tokens, and tokens of imitated responses.
        totals: sums of the loss, and over sampled tokens of what it reports.
        sft_loss: part of this process in the mean cross entropy of the imitated responses.
        answer_parts: parts of their tokens in it, with `credit.uncertainty`.
        divergence, divergence_weight: sums over tokens of w_t * divergence and of w_t, see `stages.vocabulary`.
    """

    tokens: int = 0
    imitated: int = 0
    totals: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(("loss", "engine_logp", "logp"), 0.0))
    sft_loss: Any = 0.0
    answer_parts: list[torch.Tensor] = field(default_factory=list)
    divergence: Any = 0.0
    divergence_weight: Any = 0.0

    def add(self, read_pass: PolicyPass, result: PolicyLoss) -> None:
        """Add the result of a pass."""
        metrics, sampled = result.metrics, len(read_pass.rollout_logp)
        if read_pass.imitated is not None:
            self.imitated += len(read_pass.imitated)
            self.sft_loss = self.sft_loss + metrics["sft_loss"]
            self.answer_parts += [metrics["sft_parts"]] if "sft_parts" in metrics else []
        if not sampled:
            return
        self.tokens += sampled
        self.divergence = self.divergence + metrics.get("divergence", 0.0)
        self.divergence_weight = self.divergence_weight + metrics.get("divergence_weight", 0.0)
        sums = {"loss": metrics.get("policy_loss", result.loss.detach()), "engine_logp": read_pass.rollout_logp.sum()}
        sums |= {name: metrics[name] * sampled for name in _MEANS & metrics.keys()}
        for name, value in sums.items():
            self.totals[name] = self.totals.get(name, 0.0) + value

    def record(self) -> dict[str, Metric]:
        """Return the metrics of the sampled tokens."""
        totals = dict(self.totals)
        # The expected importance ratio is 1 for any engine that reports its own probabilities. The KL is 0 only if
        # engine and trainer agree.
        drift = totals.pop("engine_logp") - totals["logp"]
        record = {"policy/loss": totals.pop("loss"), "policy/engine_kl": (mean, drift, self.tokens)}
        return record | {f"policy/{name}": (mean, total, self.tokens) for name, total in sorted(totals.items())}


def _hidden_and_head(hidden, weight, targets):
    return {"ref_hidden": hidden, "ref_weight": weight}


def _hidden(hidden, weight, targets):
    return {"ref_hidden": hidden}


def _own_head(loss):
    """Let a loss use the policy's head for the reference, too."""
    return lambda hidden, weight, targets: loss(hidden, weight, targets, ref_weight=weight)
