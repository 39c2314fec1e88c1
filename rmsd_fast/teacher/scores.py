"""What each teacher answer is worth to training: its text in canonical form, whether it is valid, its quality."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import has_outer_format, parse_answer
from rmsd_fast.method.natural import Unreadable, read_response
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.pool import TeacherResponse

Pool = dict[str, list[TeacherResponse]]
Scores = dict[str, list["ScoredResponse"]]

_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
# Why the text inside <answer> does not parse, by task type.
_NOT_PARSED = {
    "mcq": "not_an_option",
    "temporal": "not_an_interval",
    "spatial": "not_a_box",
    "numeric": "not_a_number",
    "ocr": "no_answer",
    "open": "no_answer",
}


class ScoredResponse(NamedTuple):
    """One teacher answer as training uses it."""

    k: int
    """Its number in the pool."""
    text: str
    """The whole text: canonical with `teacher.parse=natural` where that could read it, else as sent."""
    valid: bool
    quality: float
    """The task's metric in [0, 1]; 0 where the answer is invalid, 1 for valid answers to open questions."""
    reason: str | None = None
    """Why it is invalid, a key of `method.natural.REASONS`; None where it is valid."""
    as_sent: bool = True
    """Whether the text as sent keeps the format (arXiv 2603.11423 counts the others as format violations)."""


def score_pool(pool: Pool, questions: Sequence[Question], cfg: TeacherConfig) -> Scores:
    """The first `cfg.responses` answers by question id, in order of k; a question that the pool lacks gets none."""
    return {
        question.id: [
            score_response(response, question, cfg) for response in pool.get(question.id, [])[: cfg.responses]
        ]
        for question in questions
    }


def score_response(response: TeacherResponse, question: Question, cfg: TeacherConfig) -> ScoredResponse:
    """Validity, reason and quality of one answer. Truncated and filtered answers are invalid whatever they say."""
    text, task, options = response.text, question.task_type, question.options
    strict = _strict_reason(response, question)
    if cfg.parse == "natural":
        try:
            text, reason = read_response(text, task, options, response.finish_reason), None
        except Unreadable as error:
            reason = error.reason
    else:
        reason = strict
    if reason is None and _SPECIAL_TOKEN.search(text):
        reason = "special_token"
    quality = 0.0
    if reason is None:
        quality = quality_score(text, task, question.answer, options=options, **quality_settings(cfg))
    return ScoredResponse(response.k, text, reason is None, quality, reason, strict is None)


def quality_settings(teacher: TeacherConfig) -> dict:
    """Metric settings as `method.quality.quality_score` takes them."""
    return {
        "numeric_metric": teacher.numeric_metric,
        "numeric_eps": teacher.numeric_eps,
        "ocr_metric": teacher.ocr_metric,
        "spatial_format": teacher.spatial_format,
    }


def _strict_reason(response: TeacherResponse, question: Question) -> str | None:
    """Why an answer as sent is not valid, judged by the format alone."""
    if response.finish_reason == "length":
        return "truncated"
    if response.finish_reason == "content_filter":
        return "filtered"
    if not response.text.strip():
        return "empty"
    if not has_outer_format(response.text):
        return "format"
    parsed = parse_answer(response.text, question.task_type, question.options)
    return _NOT_PARSED[question.task_type] if parsed is None else None
