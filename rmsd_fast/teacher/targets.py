"""Select the part of the pool that training uses: answers, their quality and their matching probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.matching import draw_response, matching_probabilities, passes_filter, top_responses, uniform
from rmsd_fast.teacher.scores import ScoredResponse, Scores

# Reasons of invalid answers that no setting makes usable: their text is incomplete, or a tokenizer cannot encode it.
# Imitating a truncated answer would teach the student to stop in the middle of a sentence.
UNUSABLE = frozenset({"truncated", "filtered", "empty", "special_token", "not_unicode"})


@dataclass(frozen=True)
class Targets:
    """The teacher answers to one question. Texts are tokenized when a step uses them, because 200,000 would take
    minutes.

    Fields:
        answers: the K answers.
        quality: q_k, float32 [K]; 0 for unusable answers.
        p: matching probabilities, float32 [K]; all zero if no answer is kept.
        weight: weight of each answer's pairs in the discriminator loss, float32 [K].
        valid: K flags.
        imitate: indices of the answers that stage 1 imitates; empty if there are none.
        top: indices of the answers of highest quality among those that may be imitated, from which
            `teacher.selection` chooses T_sel; empty if there are none.
    """

    answers: tuple[ScoredResponse, ...]
    quality: torch.Tensor
    p: torch.Tensor
    weight: torch.Tensor
    valid: tuple[bool, ...]
    imitate: tuple[int, ...]
    top: tuple[int, ...]

    @property
    def has_teacher(self) -> bool:
        return bool((self.p > 0).any())

    @property
    def target_quality(self) -> float | None:
        """The quality to which the discriminator leads: mean q_k, weighted by p_k and by the weight in its loss.

        A discriminator that is trained to convergence rewards responses that resemble this mixture of the teacher's
        answers. It can therefore raise the quality of a student only up to this value. None if no answer is kept.
        """
        weight = (self.p * self.weight).double()
        total = float(weight.sum())
        return float((weight * self.quality).sum()) / total if total else None


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
        refuse: function that returns why a text cannot be trained on, or None. An answer with a reason is treated as
            invalid. The function is called only for usable answers.
        imitate: `best`, `all` or `random`, see `sft.responses`.
    """
    return {
        question.id: _targets_of(question, scores.get(question.id, ()), teacher, refuse, seed, imitate)
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
    weighted = teacher.weighting == "quality"
    complete = [answer.reason not in UNUSABLE for answer in answers]
    good = [passes_filter(answer.quality, teacher.min_quality) for answer in answers]
    # An answer of quality 0 has no weight, so only uniform weights can match it.
    matched = good if teacher.filter in ("both", "matching") else [a.quality > 0 or not weighted for a in answers]
    imitated = good if teacher.filter in ("both", "imitation") else complete
    usable = [
        whole and not ((match or imitation) and refuse(answer.text))
        for answer, whole, match, imitation in zip(answers, complete, matched, imitated, strict=True)
    ]
    quality = torch.tensor([a.quality * use for a, use in zip(answers, usable, strict=True)], dtype=torch.float32)
    weight = quality**teacher.weight_power if weighted else torch.ones_like(quality)
    imitable = [use and imitation for use, imitation in zip(usable, imitated, strict=True)]
    return Targets(
        answers=tuple(answers),
        quality=quality,
        p=matching_probabilities(
            quality,
            closed_ended=weighted and (question.task_type in CLOSED_TASKS or teacher.open_quality == "lexical"),
            # A high power can round the weight of a poor answer to 0.
            kept=[use and match and w > 0 for use, match, w in zip(usable, matched, weight.tolist(), strict=True)],
            power=teacher.weight_power,
        ),
        weight=weight,
        valid=tuple(answer.valid and use for answer, use in zip(answers, usable, strict=True)),
        imitate=_imitated(quality, imitable, question.id, seed, imitate),
        top=tuple(top_responses(quality, imitable)),
    )


def _imitated(
    quality: torch.Tensor, imitable: list[bool], question_id: str, seed: int, imitate: str
) -> tuple[int, ...]:
    candidates = [k for k, use in enumerate(imitable) if use]
    if imitate == "all" or not candidates:
        return tuple(candidates)
    if imitate == "best":
        return (draw_response(top_responses(quality, imitable), seed=seed, question_id=question_id),)
    return (candidates[int(uniform("imitate", seed, 0, question_id, index=0) * len(candidates))],)
