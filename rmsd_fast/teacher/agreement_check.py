"""Compare agreement with the metric on questions that have a ground truth: can agreement stand in for labels?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.matching import passes_filter
from rmsd_fast.method.quality import agreement
from rmsd_fast.teacher.pool_estimates import correlation, estimates, ratio
from rmsd_fast.teacher.scores import ScoredResponse, Scores, quality_settings

# Agreement sums over products of floats, so equal agreements may differ by rounding.
_EQUAL = 1e-9
_CHOICE = ("top_best", "random_best")
_QUALITY = ("random_quality", "top_quality", "best_quality")


def agreement_check(questions: Sequence[Question], scores: Scores, cfg: TeacherConfig) -> dict | None:
    """Return how well agreement and metric rank the valid answers to questions with ground truth.

    Each question counts with its first `cfg.responses` answers, as in training. Invalid answers have quality 0 in both,
    and are left out; so are questions with fewer than two valid answers.

    Args:
        questions: questions; those without ground truth are left out.
        scores: result of score_pool; its qualities are those of the metric.
        cfg: teacher settings.
    Returns:
        {"responses": K, "min_quality": tau, "tasks": {task: group}, "closed": group}, or None without such questions. A
        group is {"questions", "answers", "across", "within", "top_best", "random_best", "differing", "random_quality",
        "top_quality", "best_quality", "recovered", "precision", "recall"}:

        - across, within: correlation over answers, and within questions, see pool_estimates.correlation;
        - top_best: estimate of how often the answer of highest agreement has the highest quality, over the `differing`
          questions, whose answers differ in quality; ties count by their share, as T_best is drawn among them;
        - random_best: the same for a random valid answer;
        - random_quality, top_quality, best_quality: estimates of the mean quality of a random valid answer, of the
          answer of highest agreement, and of the best answer;
        - recovered: (top - random) / (best - random) quality, {"value", "low", "high"}; None if both are equal;
        - precision: share of the answers that agreement keeps at tau which the metric keeps too; recall: share of the
          answers that the metric keeps which agreement keeps too. Both are None without such answers.
    """
    rows: dict[str, list[np.ndarray]] = {}
    for question in questions:
        if not question.has_truth:
            continue
        valid = [answer for answer in scores[question.id][: cfg.responses] if answer.valid]
        if len(valid) > 1:
            rows.setdefault(question.task_type, []).append(_pairs(valid, question, cfg))
    if not rows:
        return None
    tasks = {task: _group(rows[task], cfg.min_quality) for task in CLOSED_TASKS if task in rows}
    closed = _group([pair for pairs in rows.values() for pair in pairs], cfg.min_quality)
    return {"responses": cfg.responses, "min_quality": cfg.min_quality, "tasks": tasks, "closed": closed}


def _pairs(valid: Sequence[ScoredResponse], question: Question, cfg: TeacherConfig) -> np.ndarray:
    """Return agreement and quality of the valid answers to a question, float64 [answers, 2]."""
    texts = [answer.text for answer in valid]
    agreements = agreement(texts, question.task_type, options=question.options, **quality_settings(cfg))
    return np.array([agreements, [answer.quality for answer in valid]]).T


def _group(pairs: Sequence[np.ndarray], tau: float) -> dict:
    owner = np.repeat(np.arange(len(pairs)), [len(pair) for pair in pairs])
    agreed, quality = np.concatenate(pairs).T
    choices = [choice for pair in pairs if (choice := _choice(pair)) is not None]
    chosen = np.array([_chosen_quality(pair) for pair in pairs])
    kept = np.array([_kept(pair, tau) for pair in pairs], dtype=np.float64)
    return {
        "questions": len(pairs),
        "answers": len(owner),
        "across": correlation(agreed, quality, owner, within=False),
        "within": correlation(agreed, quality, owner, within=True),
        "differing": len(choices),
        **(estimates(dict(zip(_CHOICE, np.array(choices).T, strict=True))) if choices else dict.fromkeys(_CHOICE)),
        **estimates(dict(zip(_QUALITY, chosen.T, strict=True))),
        "recovered": ratio(chosen[:, 1] - chosen[:, 0], chosen[:, 2] - chosen[:, 0]),
        "precision": ratio(kept[:, 0], kept[:, 1]),
        "recall": ratio(kept[:, 0], kept[:, 2]),
    }


def _choice(pair: np.ndarray) -> tuple[float, float] | None:
    """Return the probability that an answer of highest agreement, or any answer, is a best one.

    Return None if all answers have the same quality.
    """
    agreed, quality = pair.T
    best = quality >= quality.max() - _EQUAL
    if best.all():
        return None
    return float(best[agreed >= agreed.max() - _EQUAL].mean()), float(best.mean())


def _chosen_quality(pair: np.ndarray) -> tuple[float, float, float]:
    agreed, quality = pair.T
    return quality.mean(), quality[agreed >= agreed.max() - _EQUAL].mean(), quality.max()


def _kept(pair: np.ndarray, tau: float) -> tuple[int, int, int]:
    """Return how many answers both keep, how many agreement keeps, and how many the metric keeps."""
    by_agreement, by_metric = ([passes_filter(value, tau) for value in column] for column in pair.T.tolist())
    both = sum(a and b for a, b in zip(by_agreement, by_metric, strict=True))
    return both, sum(by_agreement), sum(by_metric)
