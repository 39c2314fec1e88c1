"""Compute the score of the best constant answer to all questions: the floor that a student has to beat.

A search over all answers would be quadratic in the number of questions. The number of candidates is therefore limited
(ground truths, and a grid), graded tasks are scored in floating point, and only the best candidate is scored exactly.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import product

import numpy as np

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import TASK_TYPES, option_letters, parse_answer_body
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.scores import quality_settings

# Limits on the number of candidates: the most frequent ground truths, and a sample of the others. Texts are compared in
# pairs, so there are fewer candidates, and the sample of questions shrinks as texts get longer (this takes a second or
# two).
MOST_TRUTHS, MOST_TEXTS, MOST_QUESTIONS, MOST_CHARACTERS = 1000, 50, 500, 3_000_000
LEAST_QUESTIONS = 10


def best_constant_floor(
    questions: Sequence[Question], cfg: TeacherConfig | None = None
) -> dict[str, tuple[float, str]]:
    """Return, by task type, the best mean score of a constant answer to all questions, and that answer.

    Candidates are every letter (mcq), up to 1,000 ground truths (ocr: 50), a grid of intervals (temporal: tenths of the
    latest end) and a grid of boxes (spatial: fifths of the picture). The score of the returned answer is exact. Open
    questions score 1 for any text. Questions without ground truth are left out.

    Args:
        questions: the evaluated questions.
        cfg: metric settings; None means the defaults.
    """
    cfg = cfg or TeacherConfig()
    floors = {}
    for task in TASK_TYPES:
        members = [q for q in questions if q.task_type == task and not q.is_unlabeled]
        if not members:
            continue
        if task == "open":
            floors[task] = (1.0, "any text")
            continue
        candidates = sorted(_candidates(task, members))
        scores = np.round(_mean_scores(task, candidates, members, cfg), 9)
        # Resolve ties by alphabetical order, so that the result does not depend on the order of the questions.
        answer = candidates[int(scores.argmax())]
        floors[task] = (_constant_score(answer, members, cfg), answer)
    return floors


def _candidates(task: str, questions: Sequence[Question]) -> set[str]:
    if task == "mcq":
        return set("".join(option_letters(q.options) if q.options else q.answer for q in questions))
    truths = _some_truths(task, Counter(question.answer for question in questions))
    if task == "temporal":
        longest = max(parse_answer_body(question.answer, task)[1] for question in questions)
        ends = [longest * step / 10 for step in range(11)]
        return truths | {f"{a:.2f} to {b:.2f}" for a, b in product(ends, ends) if a < b}
    if task == "spatial":
        boxes = [parse_answer_body(question.answer, task) for question in questions]
        sides = [max(1000.0, *(max(box[axis], box[axis + 2]) for box in boxes)) for axis in (0, 1)]
        lines = [(a, b) for a, b in product(range(0, 11, 2), range(0, 11, 2)) if a < b]
        return truths | {
            ",".join(
                f"{edge / 10 * side:.0f}"
                for edge, side in ((x1, sides[0]), (y1, sides[1]), (x2, sides[0]), (y2, sides[1]))
            )
            for (x1, x2), (y1, y2) in product(lines, lines)
        }
    return truths


def _some_truths(task: str, counts: Counter) -> set[str]:
    most = MOST_TEXTS if task == "ocr" else MOST_TRUTHS
    if len(counts) <= most:
        return set(counts)
    frequent = sorted(counts, key=lambda answer: (-counts[answer], answer))[: most // 5]
    others = sorted(set(counts) - set(frequent))
    return {*frequent, *random.Random(0).sample(others, most - len(frequent))}


def _mean_scores(task: str, candidates: list[str], questions: Sequence[Question], cfg: TeacherConfig) -> np.ndarray:
    """Return the mean score of each candidate in floating point. Texts are scored on a sample of the questions."""
    if task in ("mcq", "ocr"):
        if task == "mcq":
            counts = Counter(question.answer for question in questions)
            return np.array([counts[letter] / len(questions) for letter in candidates])
        enough = max(LEAST_QUESTIONS, MOST_CHARACTERS // sum(map(len, candidates)))
        # A random sample rather than every n-th question, because files often have a periodic order.
        sample = random.Random(0).sample(list(questions), min(MOST_QUESTIONS, enough, len(questions)))
        return np.array([_constant_score(text, sample, cfg) for text in candidates])
    truths = np.array([np.atleast_1d(parse_answer_body(q.answer, task)) for q in questions], dtype=np.float64)
    values = np.array([np.atleast_1d(parse_answer_body(text, task)) for text in candidates], dtype=np.float64)
    score = _number_scores if task == "numeric" else _overlaps
    return np.array([score(value, truths, cfg).mean() for value in values])


def _overlaps(value: np.ndarray, truths: np.ndarray, cfg: TeacherConfig) -> np.ndarray:
    """Return the intersection over union of one interval or box with each ground truth."""
    axes = len(value) // 2
    low, high = np.maximum(value[:axes], truths[:, :axes]), np.minimum(value[axes:], truths[:, axes:])
    overlap = np.clip(high - low, 0, None).prod(1)
    size, sizes = (value[axes:] - value[:axes]).clip(0).prod(), (truths[:, axes:] - truths[:, :axes]).clip(0).prod(1)
    union = size + sizes - overlap
    return np.where((size > 0) & (sizes > 0), overlap / np.where(union > 0, union, 1), 0.0)


def _number_scores(value: np.ndarray, truths: np.ndarray, cfg: TeacherConfig) -> np.ndarray:
    """Return the epsilon accuracy, or the mean relative accuracy, of one number for each ground truth."""
    error, size = np.abs(truths[:, 0] - value[0]), np.abs(truths[:, 0])
    if cfg.numeric_metric == "epsilon":
        return (error <= cfg.numeric_eps * np.maximum(1, size) + 1e-12).astype(np.float64)
    relative = np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error > 0, np.inf, 0))
    return np.mean([relative < 1 - step / 20 for step in range(10, 20)], axis=0)


def _constant_score(answer: str, questions: Sequence[Question], cfg: TeacherConfig) -> float:
    text, settings = f"<think>-</think><answer>{answer}</answer>", quality_settings(cfg)
    return statistics.fmean(
        quality_score(text, question.task_type, question.answer, options=question.options, **settings)
        for question in questions
    )
