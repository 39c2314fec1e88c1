"""`rollouts.jsonl`: what the student wrote while it trained, what the teacher wrote, and what each was worth.

One line per question of a logged step, in the order of the step. `null` stands for a score that was not computed (no
discriminator, no usable teacher answer, no reward in the warm-up) and for a number that was not finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rmsd_fast.config import RolloutConfig
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.stages.groups import RolloutGroup


def log_rollouts(
    log: JsonLines,
    groups: Sequence[RolloutGroup],
    settings: RolloutConfig,
    *,
    stage: str,
    step: int,
    total: int,
) -> None:
    """Append the first questions of a step, if it is the stage's first or last, or one of every n in between.

    Args:
        groups: of this process; their tensors are on the CPU, so nothing here waits for the device.
        step, total: 1-based step, and the steps of the stage.
    """
    every = settings.log_every_steps
    if every and ((step - 1) % every == 0 or step == total):
        for group in groups[: settings.log_questions]:
            log.append({"stage": stage, "step": step, **_record(group)})


def _record(group: RolloutGroup) -> dict[str, Any]:
    question = group.prompt.question
    return {
        "id": question.id,
        "task_type": question.task_type,
        "question": question.question,
        "options": question.options,
        "answer": question.answer,
        "videos": question.videos,
        "images": question.images,
        "spans": question.spans,
        "duration": group.prompt.media[0].duration_s,
        "teacher": _teacher(group),
        "rollouts": [_rollout(group, index) for index in range(len(group.rollouts))],
    }


def _teacher(group: RolloutGroup) -> list[dict[str, Any]]:
    """The question's K answers; those that matching cannot choose have p = 0 and no score."""
    quality, p = group.targets.quality.tolist(), group.targets.p.tolist()
    # Without a discriminator there are no scores.
    scores = dict(zip(group.kept, group.teacher_d_score.tolist(), strict=False))
    return [
        {"k": answer.k, "text": answer.text, "quality": quality[i], "p": p[i], "d_score": scores.get(i)}
        for i, answer in enumerate(group.targets.answers)
    ]


def _rollout(group: RolloutGroup, index: int) -> dict[str, Any]:
    rollout = group.rollouts[index]
    record = {
        "text": rollout.text,
        "tokens": len(rollout.token_ids),
        "truncated": rollout.truncated,
        "outer": _value(group.outer, index),
        "task": _value(group.task, index),
        "content": _value(group.content, index),
        "d_score": _value(group.d_score, index) if group.kept else None,
        "reward": _value(group.reward, index),
        "advantage": _value(group.advantages, index),
    }
    if len(group.log_ratio):
        record["log_ratio"] = _value(group.log_ratio, index)
    if group.matches is not None:
        record["match"] = group.targets.answers[int(group.matches[index])].k
    return record


def _value(values: torch.Tensor, index: int) -> float | None:
    return float(values[index]) if len(values) else None
