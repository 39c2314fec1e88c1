"""Measure whether rollouts degenerate: whether they repeat themselves, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence

from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.step_metrics import Metric, mean


def repeated_4grams(ids: Sequence[int]) -> float:
    """Return the share of the 4-grams of a token sequence that occurred before in it; 0 if there are none."""
    grams = list(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def degeneration_record(groups: list[RolloutGroup], builder: PromptBuilder) -> dict[str, Metric]:
    """Return this process's part of the metrics that show whether rollouts degenerate.

    Lengths are compared on the questions that have a kept teacher response, each with the same weight.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    taught = [group for group in groups if group.kept]
    ours = sum(_mean([len(rollout.token_ids) for rollout in group.rollouts]) for group in taught)
    theirs = sum(_mean(_teacher_tokens(group, builder)) for group in taught)
    repeated = sum(repeated_4grams(rollout.token_ids.tolist()) for rollout in rollouts)
    return {
        "rollout/repeated_4grams": (mean, repeated, len(rollouts)),
        "rollout/length_ratio": (mean, ours, theirs),
    }


def _teacher_tokens(group: RolloutGroup, builder: PromptBuilder) -> list[int]:
    return [len(builder.encode_response(group.targets.answers[k].text)) for k in group.kept]


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values)
