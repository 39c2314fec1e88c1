"""Compute the advantages of tokens in stage 2 from those of their rollouts, see `method.credit`."""

from __future__ import annotations

import torch

from rmsd_fast.config import CreditConfig, RunConfig
from rmsd_fast.method.credit import (
    avsd_advantages,
    k1_advantages,
    magnitude_mix,
    magnitude_weights,
    overlap_shares,
    position_weights,
    prune_weights,
    renormalized_gap,
)
from rmsd_fast.setting_rules.uses import teaches
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.step_metrics import Metric, mean


def set_token_advantages(groups: list[RolloutGroup], settings: RunConfig, *, step: int) -> dict[str, Metric]:
    """Store the advantage of each token in the groups, from their advantages and the self-teacher's log-probs.

    A rollout without a hint, and every rollout of a step without the self-teacher, keeps the advantage of the rewards.

    Args:
        groups: groups of this process, with their advantages.
        settings: settings of the run.
        step: step within stage 2, counted from 0.
    Returns:
        This process's part of the metrics. Those of the self-teacher are means over the tokens that it has scored.
    """
    credit, kd = settings.credit, settings.kd
    mix = magnitude_mix(step, mix=credit.magnitude_mix, steps=credit.magnitude_steps)
    # With a share of 0, all weights are 1, clipped or not.
    weighs = credit.magnitude == "teacher" and mix > 0
    names = ("gap", "size", "clipped", "weighted", "limited", "tokens", "hinted", "overlap", "prune")
    totals = dict.fromkeys(names, 0.0)
    for group in groups:
        group.token_advantages, group.token_terms, group.token_weights = [], [], []
        for i, rollout in enumerate(group.rollouts):
            advantage, distilled = group.advantages[i].expand(len(rollout.token_ids)), None
            if i < len(group.teacher_logp) and len(group.teacher_logp[i]):
                teacher_logp = group.teacher_logp[i]
                gap = (teacher_logp - rollout.logp).mean(dim=0)
                added = torch.zeros_like(gap)
                if kd.kind == "k1":
                    added = k1_advantages(gap, clip=kd.gap_clip)
                elif kd.kind == "avsd":
                    added = avsd_advantages(teacher_logp, rollout.logp, clip=kd.gap_clip)
                if weighs:
                    compared = _renormalized_gap(group, i, credit.magnitude_topk) if credit.magnitude_topk else gap
                    weights, clipped = magnitude_weights(advantage, compared, clip=credit.magnitude_clip, mix=mix)
                    totals["clipped"] += float(clipped[advantage != 0].sum())
                    totals["weighted"] += float((advantage != 0).sum())
                    advantage = advantage * weights
                if kd.kind in ("k1", "avsd"):
                    distilled = kd.coef * added
                totals["limited"] += float((added.abs() == kd.gap_clip).sum())
                totals["gap"] += float(gap.double().sum())
                totals["size"] += float(gap.double().abs().sum())
                totals["tokens"] += len(gap)
                totals["hinted"] += 1
            terms = {"pg": advantage} if distilled is None else {"pg": advantage, "kd": distilled}
            advantage, weights = sum(terms.values()), _token_weights(group, i, credit, totals)
            if weights is not None:
                advantage, terms = advantage * weights, {name: term * weights for name, term in terms.items()}
                group.token_weights.append(weights)
            group.token_advantages.append(advantage)
            group.token_terms.append(terms)
    # A step without the self-teacher has no share of hinted rollouts.
    asked = sum(len(group.rollouts) for group in groups) if teaches(settings, step) else 0
    return _record(totals, asked, settings)


def _renormalized_gap(group: RolloutGroup, i: int, k: int) -> torch.Tensor:
    """Return the gaps of a rollout's tokens among the self-teacher's k most probable tokens and the token itself."""
    teacher, student, own = group.teacher_top[i], group.student_top[i], group.rollouts[i].token_ids
    among = (teacher.ids[:, :k] == own.unsqueeze(1)).any(dim=1)
    of_student = student.at_ids
    return renormalized_gap(
        *(teacher.logp[:, :k], of_student[:, :k]), *(group.teacher_logp[i][0], of_student[:, -1]), among
    )


def _token_weights(group: RolloutGroup, i: int, credit: CreditConfig, totals: dict[str, float]) -> torch.Tensor | None:
    """Return the weights of a rollout's tokens, and add what was compared to totals; None if all of them are 1."""
    weights, length = None, len(group.rollouts[i].token_ids)
    if credit.position == "sigmoid":
        weights = position_weights(
            length,
            least=credit.position_least,
            start=credit.position_start,
            width=credit.position_width,
        ).to(group.advantages.dtype)
    if credit.prune == "none":
        return weights
    weights = torch.ones(length) if weights is None else weights
    if group.teacher_top and group.teacher_top[i] is not None:
        k = credit.prune_topk
        overlap = overlap_shares(group.student_top[i].ids, group.teacher_top[i].ids[:, :k])
        pruned = prune_weights(
            overlap, threshold=credit.prune_overlap, decay=credit.prune_decay, floor=credit.prune_floor
        )
        totals["overlap"] += float(overlap.double().sum())
        totals["prune"] += float(pruned.double().sum())
        weights = weights * pruned
    return weights


def _record(totals: dict[str, float], asked: int, settings: RunConfig) -> dict[str, Metric]:
    if settings.self_teacher.kind == "none":
        return {}
    tokens = totals["tokens"]
    record: dict[str, Metric] = {
        "self_teacher/gap": (mean, totals["gap"], tokens),
        "self_teacher/gap_size": (mean, totals["size"], tokens),
        "self_teacher/hinted_share": (mean, totals["hinted"], asked),
    }
    if settings.credit.magnitude == "teacher":
        record["credit/clipped_share"] = (mean, totals["clipped"], totals["weighted"])
    if settings.credit.prune == "overlap":
        record["credit/overlap"] = (mean, totals["overlap"], tokens)
        record["credit/prune_weight"] = (mean, totals["prune"], tokens)
    if settings.kd.kind in ("k1", "avsd"):
        record["kd/clipped_share"] = (mean, totals["limited"], tokens)
    return record
