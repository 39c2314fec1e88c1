"""Write `rollouts.jsonl`: the student's rollouts during training and the teacher's answers, with their scores.

The file has one line per question of a logged step, in the order of the step. `null` represents a score that was not
computed (no discriminator, no usable teacher answer, no reward in the warm-up) or for a number that was not finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rmsd_fast.config import RolloutConfig
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.stages.groups import RolloutGroup


def log_rollouts(
    log: JsonLines,
    groups: Sequence[RolloutGroup],
    settings: RolloutConfig,
    *,
    builder: PromptBuilder | None,
    stage: str,
    step: int,
    total: int,
) -> list[dict[str, Any]]:
    """Append the first questions of a step if the step is the stage's first, its last, or every n-th in between.

    Return what was appended: one record per question.

    Args:
        log: file to append to.
        groups: groups of this process. Their tensors are on the CPU, so logging does not wait for the device.
        settings: rollout settings of the run.
        builder: splits rollouts into pieces of text, which are logged with the advantages of their tokens if the step
            has token credit; None leaves them out.
        stage: name of the stage.
        step: step within the stage, counted from 1.
        total: number of steps of the stage.
    """
    every = settings.log_every_steps
    if not every or ((step - 1) % every and step != total):
        return []
    records = [{"stage": stage, "step": step, **_record(group, builder)} for group in groups[: settings.log_questions]]
    for record in records:
        log.append(record)
    return records


def rollout_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return logged questions as rows of one table, for trackers: one row per rollout and per teacher answer.

    All rows have the same keys. A value that an answer does not have is None.
    """
    rows = []
    for record in records:
        question = {"id": record["id"], "question": record["question"], "truth": record["answer"]}
        answers = [(f"rollout {number}", rollout) for number, rollout in enumerate(record["rollouts"])]
        answers += [(f"teacher {answer['k']}", answer) for answer in record["teacher"]]
        for source, answer in answers:
            rows.append({**question, "source": source, **{column: answer.get(column) for column in _COLUMNS}})
    return rows


# Values of a rollout or a teacher answer in the table for trackers.
_COLUMNS = ("text", "d_score", "reward", "advantage", "outer", "task", "content", "quality", "p")


def _record(group: RolloutGroup, builder: PromptBuilder | None) -> dict[str, Any]:
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
        "duration": group.prompt.media[0].duration_s if group.prompt.media else None,
        "teacher": _teacher(group),
        "rollouts": [_rollout(group, index, builder) for index in range(len(group.rollouts))],
    }


def _teacher(group: RolloutGroup) -> list[dict[str, Any]]:
    """Return the question's K answers. Answers that matching cannot choose have p = 0 and no score."""
    quality, p = group.targets.quality.tolist(), group.targets.p.tolist()
    # Without a discriminator there are no scores.
    scores = dict(zip(group.kept, group.teacher_d_score.tolist(), strict=False))
    return [
        {"k": answer.k, "text": answer.text, "quality": quality[i], "p": p[i], "d_score": scores.get(i)}
        for i, answer in enumerate(group.targets.answers)
    ]


def _rollout(group: RolloutGroup, index: int, builder: PromptBuilder | None) -> dict[str, Any]:
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
    if builder is not None and group.token_advantages:
        record["token_credit"] = _token_credit(group, index, builder)
    return record


def _token_credit(group: RolloutGroup, index: int, builder: PromptBuilder) -> list[list[Any]]:
    """Return the text of a rollout in pieces, each with the mean advantage of its tokens.

    The opening of a response by the chat template is a piece with advantage 0, because it was not sampled.
    """
    credit: list[list[Any]] = [[builder.opening, 0.0]] if builder.opening else []
    advantages, start = group.token_advantages[index].double(), 0
    for text, tokens in builder.pieces(group.rollouts[index].token_ids):
        value = float(advantages[start : start + tokens].mean())
        credit += [[text, float(f"{value:.4g}")]] if text else []
        start += tokens
    return credit


def _value(values: torch.Tensor, index: int) -> float | None:
    return float(values[index]) if len(values) else None
