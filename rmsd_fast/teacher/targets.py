"""Select the part of the pool that training uses: answers, their quality and their matching probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.matching import best_response, matching_probabilities, uniform
from rmsd_fast.teacher.scores import ScoredResponse, Scores


@dataclass(frozen=True)
class Targets:
    """The teacher answers to one question. Texts are tokenized when a step uses them, because 200,000 would take
    minutes.

    Fields:
        answers: the K answers.
        quality: float32 [K].
        p: matching probabilities, float32 [K]; all zero if no answer is kept.
        valid: K flags.
        imitate: indices of the answers that stage 1 imitates; empty if there are none.
    """

    answers: tuple[ScoredResponse, ...]
    quality: torch.Tensor
    p: torch.Tensor
    valid: tuple[bool, ...]
    imitate: tuple[int, ...]

    @property
    def has_teacher(self) -> bool:
        return bool((self.p > 0).any())


def build_targets(
    questions: Sequence[Question],
    scores: Scores,
    teacher: TeacherConfig,
    refuse: Callable[[str], str | None],
    *,
    seed: int,
    imitate: str,
) -> dict[str, Targets]:
    """Return the targets of every question. A question without answers gets empty targets.

    Args:
        refuse: function that returns why a text cannot be trained on, or None. An answer with a reason counts as
            invalid. The function is called only for usable answers.
        imitate: `best`, `all` or `random`, see `sft.responses`.
    """
    return {
        question.id: _targets_of(question, scores[question.id], teacher, refuse, seed, imitate)
        for question in questions
    }


def _targets_of(
    question: Question,
    answers: Sequence[ScoredResponse],
    teacher: TeacherConfig,
    refuse: Callable[[str], str | None],
    seed: int,
    imitate: str,
) -> Targets:
    closed = question.task_type in CLOSED_TASKS and teacher.quality == "metric"
    # Invalid answers have quality 0, but uniform quality and random imitation use them unchanged.
    takes_invalid = teacher.quality == "uniform" or imitate == "random"
    uses = [(answer.valid or takes_invalid) and refuse(answer.text) is None for answer in answers]
    quality = [1.0 if teacher.quality == "uniform" else answer.quality for answer in answers]
    q = torch.tensor([score * use for score, use in zip(quality, uses, strict=True)], dtype=torch.float32)
    return Targets(
        answers=tuple(answers),
        quality=q,
        p=matching_probabilities(q, closed_ended=closed, min_quality=teacher.min_quality),
        valid=tuple(answer.valid and use for answer, use in zip(answers, uses, strict=True)),
        imitate=_imitated(uses, q, closed, question.id, seed, imitate),
    )


def _imitated(
    uses: list[bool], quality: torch.Tensor, closed: bool, question_id: str, seed: int, imitate: str
) -> tuple[int, ...]:
    if imitate == "all":
        return tuple(k for k, use in enumerate(uses) if use and quality[k] > 0)
    if imitate == "best":
        best = best_response(quality, closed_ended=closed, seed=seed, question_id=question_id)
        return () if best is None else (best,)
    usable = [k for k, use in enumerate(uses) if use]
    if not usable:
        return ()
    return (usable[int(uniform("imitate", seed, 0, question_id, index=0) * len(usable))],)
