"""Group the questions of an evaluation into batches, and choose batches that stand for all."""

from __future__ import annotations

from collections.abc import Sequence

from rmsd_fast.data.records import Question
from rmsd_fast.stages.memory import EvaluatedBatches


def plan_batches(questions: Sequence[Question], batch_size: int, processes: int) -> list[list[Question]]:
    """Return batches in which questions about the same media are adjacent, and in one batch where they fit.

    Args:
        questions: the questions.
        batch_size: maximum number of questions per batch.
        processes: number of processes. If there are not enough questions, batches are smaller so that all have one.
    """
    size = max(1, min(batch_size, -(-len(questions) // processes)))
    groups: dict[object, list[Question]] = {}
    for question in questions:
        # Questions about text alone share nothing.
        groups.setdefault(tuple(question.media) or question.id, []).append(question)
    batches: list[list[Question]] = []
    for group in groups.values():
        if not batches or len(batches[-1]) + min(len(group), size) > size:
            batches.append([])
        for question in group:
            if len(batches[-1]) == size:
                batches.append([])
            batches[-1].append(question)
    return batches


def largest_batches(batches: Sequence[Sequence[Question]]) -> EvaluatedBatches:
    """Return how many questions, and questions about different media, the largest batches have."""
    media = [{tuple(question.media) for question in batch if question.media} for batch in batches]
    return EvaluatedBatches(
        questions=max(map(len, batches), default=0),
        media=max(map(len, media), default=0),
        images=any(question.images for batch in batches for question in batch),
    )


def spread(items: Sequence, count: int) -> list:
    """Return `count` items that are evenly spaced, or all if there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)]
