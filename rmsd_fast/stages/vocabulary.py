"""Distill the self-teacher's distributions over the vocabulary into the student, within the passes of stage 2's policy.

    loss = policy loss + kd.coef * sum over tokens of w_t * divergence(teacher, student) / normalizer

w_t is the token's weight (`credit.*`), 0 for rollouts without a hint, and divided by the length of the rollout with
`distill.aggregation=sequence_mean`. The normalizer is that of the policy loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rmsd_fast.data.transfer import to_device
from rmsd_fast.losses import PolicyLoss, linear_divergence
from rmsd_fast.setting_rules.uses import has_policy_gradient
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.state import StageState


@dataclass(frozen=True)
class Distilled:
    """The distributions that a step of stage 2 distills, besides the hidden states in its groups.

    Attributes:
        head: the self-teacher's head, [V, D]; None = the policy's.
    """

    head: Tensor | None


def add_divergence(
    state: StageState,
    groups: list[RolloutGroup],
    rollouts: list[tuple[int, int]],
    loss: Callable[[Tensor, Tensor, Tensor], PolicyLoss],
    *,
    distilled: Distilled,
    normalizer: float,
) -> Callable[[Tensor, Tensor, Tensor], PolicyLoss]:
    """Return a loss for a pass of the policy that adds the divergence to `loss`.

    Its metrics have two more sums over tokens, of w_t * divergence (`divergence`) and of w_t (`divergence_weight`), and
    `loss` itself as `policy_loss`.

    Args:
        state: state of the stage.
        groups: groups of this process, with hidden states of the self-teacher.
        rollouts: group and index in it of each rollout of the pass, in the order of its rows.
        loss: the policy loss of hidden states [S, D], head [V, D] and targets [S].
        distilled: the self-teacher's head.
        normalizer: divisor of the policy loss.
    """
    settings, kd = state.settings, state.settings.kd
    teacher_head, dtype = distilled.head, state.student.model.dtype
    width = state.student.model.config.text_config.hidden_size if teacher_head is None else teacher_head.shape[1]
    states, weights = [], []
    for i, r in rollouts:
        group, length = groups[i], len(groups[i].rollouts[r].token_ids)
        weight = group.token_weights[r] if group.token_weights else torch.ones(length)
        if settings.distill.aggregation == "sequence_mean":
            weight = weight / length
        # Rows without a hint are skipped, so their hidden states are not read.
        told = group.teacher_hidden[r] if group.teacher_hidden else None
        states.append(torch.zeros(length, width, dtype=dtype) if told is None else told)
        weights.append(torch.zeros(length) if told is None else weight.float())
    teacher_hidden, token_weights = to_device([torch.cat(states), torch.cat(weights)], state.world.device)
    learns = has_policy_gradient(settings)

    def add(hidden: Tensor, weight: Tensor, targets: Tensor) -> PolicyLoss:
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
        sums = {"divergence": divergence.detach() * normalizer, "divergence_weight": token_weights.sum()}
        metrics = {**result.metrics, **sums, "policy_loss": result.loss.detach()}
        return PolicyLoss(result.loss + kd.coef * divergence, metrics)

    return add
