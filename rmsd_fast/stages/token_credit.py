"""Compute the advantages of tokens in stage 2 from those of their rollouts, see `method.credit`."""

from __future__ import annotations

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.method.credit import (
    avsd_advantages,
    k1_advantages,
    magnitude_mix,
    magnitude_weights,
    position_weights,
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
    totals = dict.fromkeys(("gap", "size", "clipped", "weighted", "limited", "tokens", "hinted"), 0.0)
    for group in groups:
        group.token_advantages, group.token_terms = [], []
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
                    weights, clipped = magnitude_weights(advantage, gap, clip=credit.magnitude_clip, mix=mix)
                    totals["clipped"] += float(clipped[advantage != 0].sum())
                    totals["weighted"] += float((advantage != 0).sum())
                    advantage = advantage * weights
                if kd.kind != "none":
                    distilled = kd.coef * added
                totals["limited"] += float((added.abs() == kd.gap_clip).sum())
                totals["gap"] += float(gap.double().sum())
                totals["size"] += float(gap.double().abs().sum())
                totals["tokens"] += len(gap)
                totals["hinted"] += 1
            terms = {"pg": advantage} if distilled is None else {"pg": advantage, "kd": distilled}
            advantage = sum(terms.values())
            if credit.position == "sigmoid":
                weights = position_weights(
                    len(advantage),
                    least=credit.position_least,
                    start=credit.position_start,
                    width=credit.position_width,
                ).to(advantage.dtype)
                advantage, terms = advantage * weights, {name: term * weights for name, term in terms.items()}
            group.token_advantages.append(advantage)
            group.token_terms.append(terms)
    # A step without the self-teacher has no share of hinted rollouts.
    asked = sum(len(group.rollouts) for group in groups) if teaches(settings, step) else 0
    return _record(totals, asked, settings)


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
    if settings.kd.kind != "none":
        record["kd/clipped_share"] = (mean, totals["limited"], tokens)
    return record
