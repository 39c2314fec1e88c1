"""Distill the self-teacher's distributions over the vocabulary into the student, within the passes of stage 2's policy.

    loss = policy loss + kd.coef * sum over tokens of w_t * divergence(teacher, student) / normalizer

w_t is the token's weight (`credit.*`), 0 for rollouts without a hint, and divided by the length of the rollout with
`distill.aggregation=sequence_mean`. The normalizer is that of the policy loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rmsd_fast.data.transfer import to_device
from rmsd_fast.losses import PolicyLoss, linear_divergence
from rmsd_fast.setting_rules.uses import has_policy_gradient
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.state import StageState


class Distilled(NamedTuple):
    """A policy loss with the divergence added, and the sums over tokens of w_t * divergence and of w_t, detached."""

    result: PolicyLoss
    divergence: Tensor
    weight: Tensor


def add_divergence(
    state: StageState,
    groups: list[RolloutGroup],
    rollouts: list[tuple[int, int]],
    loss: Callable[[Tensor, Tensor, Tensor], PolicyLoss],
    *,
    teacher_head: Tensor | None,
    normalizer: float,
) -> Callable[[Tensor, Tensor, Tensor], Distilled]:
    """Return a loss for a pass of the policy that adds the divergence to `loss`.

    Args:
        state: state of the stage.
        groups: groups of this process, with hidden states of the self-teacher.
        rollouts: group and index in it of each rollout of the pass, in the order of its rows.
        loss: the policy loss of hidden states [S, D], head [V, D] and targets [S].
        teacher_head: the self-teacher's head, [V, D]; None = the policy's.
        normalizer: divisor of the policy loss.
    """
    settings, kd = state.settings, state.settings.kd
    width, dtype = state.student.model.config.text_config.hidden_size, state.student.model.dtype
    states, weights = [], []
    for i, r in rollouts:
        group, length = groups[i], len(groups[i].rollouts[r].token_ids)
        weight = group.token_weights[r] if group.token_weights else torch.ones(length)
        if settings.distill.aggregation == "sequence_mean":
            weight = weight / length
        # Rows without a hint are skipped, so their hidden states are not read.
        hinted = bool(group.teacher_hidden)
        states.append(group.teacher_hidden[r] if hinted else torch.zeros(length, width, dtype=dtype))
        weights.append(weight.float() if hinted else torch.zeros(length))
    teacher_hidden, token_weights = to_device([torch.cat(states), torch.cat(weights)], state.world.device)
    learns = has_policy_gradient(settings)

    def add(hidden: Tensor, weight: Tensor, targets: Tensor) -> Distilled:
        # Without rewards, all advantages are 0, and the policy loss is computed only for its metrics.
        result = loss(hidden, weight, targets) if learns else loss(hidden.detach(), weight.detach(), targets)
        divergence = linear_divergence(
            hidden,
            weight,
            teacher_hidden=teacher_hidden,
            teacher_weight=weight if teacher_head is None else teacher_head,
            kind=kd.kind,
            vocab_clip=kd.vocab_clip,
            temperature=settings.rollout.temperature if kd.temperature is None else kd.temperature,
            token_weights=token_weights,
            normalizer=normalizer,
        )
        total = result._replace(loss=result.loss + kd.coef * divergence)
        return Distilled(total, divergence.detach() * normalizer, token_weights.sum())

    return add
