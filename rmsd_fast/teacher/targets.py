"""What training uses of the pool: per question the teacher's responses, their quality and matching probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.prompts import PromptBuilder, ResponseError
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.matching import best_response, matching_probabilities, uniform
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.diagnostics import score_pool
from rmsd_fast.teacher.pool import TeacherResponse


@dataclass(frozen=True)
class Targets:
    """Teacher side of one question.

    token_ids: K tensors int64 [R_k], end token included; None where the text may not enter the model. quality, p:
    float32 [K], p = matching probabilities, all zero where nothing is kept. valid: K flags. imitate: indices of the
    responses that stage 1 imitates; empty where there is none.
    """

    token_ids: tuple[torch.Tensor | None, ...]
    quality: torch.Tensor
    p: torch.Tensor
    valid: tuple[bool, ...]
    imitate: tuple[int, ...]

    @property
    def has_teacher(self) -> bool:
        return bool((self.p > 0).any())


def quality_settings(teacher: TeacherConfig) -> dict:
    """Metric settings as `method.quality.quality_score` takes them."""
    return {
        "numeric_metric": teacher.numeric_metric,
        "numeric_eps": teacher.numeric_eps,
        "ocr_metric": teacher.ocr_metric,
        "spatial_format": teacher.spatial_format,
    }


def content_score(text: str, question: Question, teacher: TeacherConfig) -> float:
    """R_content of a response: the task's metric; 0 for open questions, which have none (arXiv 2603.11423)."""
    if question.task_type not in CLOSED_TASKS:
        return 0.0
    return quality_score(
        text, question.task_type, question.answer, options=question.options, **quality_settings(teacher)
    )


def build_targets(
    questions: list[Question],
    pool: dict[str, list[TeacherResponse]],
    teacher: TeacherConfig,
    builder: PromptBuilder,
    *,
    seed: int,
    imitate: str,
) -> dict[str, Targets]:
    """Targets of every question; a question that the pool does not know gets empty ones.

    imitate: `best`, `all` or `random`, see `sft.responses`.
    """
    return {
        question.id: _targets_of(
            question, pool.get(question.id, [])[: teacher.responses], teacher, builder, seed, imitate
        )
        for question in questions
    }


def _targets_of(
    question: Question,
    responses: list[TeacherResponse],
    teacher: TeacherConfig,
    builder: PromptBuilder,
    seed: int,
    imitate: str,
) -> Targets:
    closed = question.task_type in CLOSED_TASKS and teacher.quality == "metric"
    token_ids, quality, valid = [], [], []
    for response, (is_valid, score) in zip(responses, _scores(question, responses, teacher), strict=True):
        try:
            ids = builder.encode_response(response.text)
        except ResponseError:
            # A vision token in a response would be taken for pixels: such a text is never shown to a model.
            ids, is_valid, score = None, False, 0.0
        token_ids.append(ids)
        valid.append(is_valid)
        quality.append(score)
    q = torch.tensor(quality, dtype=torch.float32)
    p = matching_probabilities(q, closed_ended=closed, min_quality=teacher.min_quality)
    return Targets(tuple(token_ids), q, p, tuple(valid), _imitated(token_ids, q, closed, question.id, seed, imitate))


def _scores(question: Question, responses: list[TeacherResponse], teacher: TeacherConfig) -> list[tuple[bool, float]]:
    return score_pool({question.id: responses}, [question], teacher)[question.id]


def _imitated(
    token_ids, quality: torch.Tensor, closed: bool, question_id: str, seed: int, imitate: str
) -> tuple[int, ...]:
    if imitate == "all":
        return tuple(k for k, ids in enumerate(token_ids) if ids is not None and quality[k] > 0)
    if imitate == "best":
        best = best_response(quality, closed_ended=closed, seed=seed, question_id=question_id)
        return () if best is None else (best,)
    usable = [k for k, ids in enumerate(token_ids) if ids is not None]
    if not usable:
        return ()
    return (usable[int(uniform("imitate", seed, 0, question_id, index=0) * len(usable))],)
