"""Statistics of a pool: quality by task across and within inputs, validity and its reasons, and the kept responses.

Source: R-MSD (arXiv 2603.11423), teacher statistics and filter.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES
from rmsd_fast.method.matching import passes_filter
from rmsd_fast.teacher.scores import ScoredResponse, Scores

_EMPTY_THINK = re.compile(r"\s*<think>\s*</think>")


def pool_statistics(scores: Scores, questions: Sequence[Question], cfg: TeacherConfig, *, simulated: bool) -> dict:
    """Return teacher statistics by task type, over closed tasks and over all questions.

    Quality here always uses the metric, even in a run with uniform quality. Invalid answers count as 0. Open questions
    have no metric, and their quality only shows how many answers are valid. They are therefore included in the shares
    of "all", but not in "closed". The quality of answers to closed questions without ground truth is their agreement.
    Answers that were drawn adaptively, or with a hint, are left out, because they depend on the quality of others.

    Args:
        scores: result of score_pool.
        questions: the questions to include.
        cfg: teacher settings.
        simulated: whether a simulated teacher wrote the pool.
    Returns:
        {"teacher_simulated": bool, "responses": maximum K, "min_quality": tau, "parse": teacher.parse,
         "tasks": {task: group}, "closed": group, "all": group}. A group without answers is None. Any other group is
        {"questions", "unlabeled", "responses", "mean", "sd_across", "sd_within", "low", "high", "valid_share",
         "as_sent_share", "kept_share", "truncated_share", "reasoned_share", "empty_share", "best_share", "reasons"}:

        - unlabeled: number of closed questions without ground truth;
        - mean, sd_across, low, high: mean, sd, minimum and maximum of the inputs' mean quality;
        - sd_within: mean over inputs of the sd among their answers;
        - valid_share, as_sent_share, kept_share, truncated_share: shares of answers that are valid, valid as sent, kept
          at tau, truncated;
        - reasoned_share: share of valid answers with reasoning;
        - empty_share, best_share: shares of questions with no answer kept, and with an answer of quality above 0;
        - reasons: number of invalid answers by reason.

        Both sd are population values (divided by n).
    """
    groups = {task: [question for question in questions if question.task_type == task] for task in TASK_TYPES}
    closed = [question for question in questions if question.task_type in CLOSED_TASKS]
    return {
        "teacher_simulated": simulated,
        "responses": cfg.responses,
        "min_quality": cfg.min_quality,
        "parse": cfg.parse,
        "tasks": {task: _group(scores, members, cfg) for task, members in groups.items() if members},
        "closed": _group(scores, closed, cfg),
        "all": _group(scores, questions, cfg),
    }


def _group(scores: Scores, questions: Sequence[Question], cfg: TeacherConfig) -> dict | None:
    counted = ([answer for answer in scores[question.id] if answer.is_counted] for question in questions)
    rows: list[list[ScoredResponse]] = [row for row in counted if row]
    if not rows:
        return None
    flat = [answer for row in rows for answer in row]
    qualities = [[answer.quality for answer in row] for row in rows]
    means = [statistics.fmean(row) for row in qualities]
    kept = [[passes_filter(quality, cfg.min_quality) for quality in row] for row in qualities]
    return {
        "questions": len(questions),
        "unlabeled": sum(question.is_unlabeled for question in questions),
        "responses": len(flat),
        "mean": statistics.fmean(means),
        "sd_across": statistics.pstdev(means),
        "sd_within": statistics.fmean(statistics.pstdev(row) for row in qualities),
        "low": min(means),
        "high": max(means),
        "valid_share": _share(answer.valid for answer in flat),
        "as_sent_share": _share(answer.as_sent for answer in flat),
        "kept_share": _share(flag for row in kept for flag in row),
        "truncated_share": _share(answer.reason == "truncated" for answer in flat),
        "reasoned_share": _share(_EMPTY_THINK.match(answer.text) is None for answer in flat if answer.valid),
        "empty_share": 1 - sum(any(row) for row in kept) / len(questions),
        "best_share": sum(any(quality > 0 for quality in row) for row in qualities) / len(questions),
        "reasons": dict(Counter(answer.reason for answer in flat if answer.reason).most_common()),
    }


def _share(flags: Iterable[bool]) -> float:
    """Return the share of flags that are set; 0 if there are none."""
    values = [float(flag) for flag in flags]
    return statistics.fmean(values) if values else 0.0
