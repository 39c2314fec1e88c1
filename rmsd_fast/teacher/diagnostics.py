"""What a pool's numbers say: quality by task across and within inputs, validity, what the filter keeps; and the floors.

Source: R-MSD (arXiv 2603.11423), teacher statistics and filter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import product

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES, option_letters, parse_answer, parse_answer_body
from rmsd_fast.method.quality import quality_score
from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.simulated import is_simulated

Pool = dict[str, list[TeacherResponse]]


def score_pool(pool: Pool, questions: Sequence[Question], cfg: TeacherConfig) -> dict[str, list[tuple[bool, float]]]:
    """(valid, quality) of the first `cfg.responses` responses by question id, in order of k.

    Truncated responses (`finish_reason` "length") are invalid. Quality is 0 where the response is invalid, and 1 for
    every response where `cfg.quality` is "uniform". A question that the pool does not know gets an empty list.
    """
    return {
        question.id: [_score(response, question, cfg) for response in pool.get(question.id, [])[: cfg.responses]]
        for question in questions
    }


def pool_statistics(pool: Pool, questions: Sequence[Question], cfg: TeacherConfig) -> dict:
    """Teacher statistics by task type, over closed tasks and over all questions.

    Quality here is always that of the metric, so that a run with uniform quality can still be judged. Invalid responses
    count as 0. Open questions have no metric: their quality only says how many responses are valid, so they enter "all"
    for shares but are left out of "closed".

    Returns:
        {"teacher_simulated": bool, "responses": K used at most, "min_quality": tau,
         "tasks": {task: group}, "closed": group, "all": group}; a group without responses is None, any other is
        {"questions", "responses", "mean", "sd_across", "sd_within", "low", "high", "valid_share", "kept_share",
         "truncated_share", "empty_share"}: mean, sd, lowest and highest of the inputs' mean quality; the mean over
        inputs of the sd among their responses; shares of responses that are valid, kept at tau, truncated; share of
        questions with nothing kept. Both sd are those of the whole population (divided by n).
    """
    metric = TeacherConfig(**{**vars(cfg), "quality": "metric"})
    scores = score_pool(pool, questions, metric)
    groups = {task: [question for question in questions if question.task_type == task] for task in TASK_TYPES}
    closed = [question for question in questions if question.task_type in CLOSED_TASKS]

    def group(members: Sequence[Question]) -> dict | None:
        return _group(pool, members, scores, cfg)

    return {
        "teacher_simulated": is_simulated(pool),
        "responses": cfg.responses,
        "min_quality": cfg.min_quality,
        "tasks": {task: group(members) for task, members in groups.items() if members},
        "closed": group(closed),
        "all": group(questions),
    }


def best_constant_floor(
    questions: Sequence[Question], cfg: TeacherConfig | None = None
) -> dict[str, tuple[float, str]]:
    """By task type, the best mean score of one and the same answer to all questions, and that answer.

    Tried are all ground truths of the questions, every letter (mcq), a grid of intervals (temporal: tenths of the
    latest end) and of boxes (spatial: fifths of the picture). Open questions score 1 for any text. Questions without
    ground truth are left out.

    Args:
        questions: those that are evaluated.
        cfg: metric settings; None = the defaults.
    """
    cfg = cfg or TeacherConfig()
    floors = {}
    for task in TASK_TYPES:
        members = [q for q in questions if q.task_type == task and (q.answer is not None or task not in CLOSED_TASKS)]
        if not members:
            continue
        if task == "open":
            floors[task] = (1.0, "any text")
            continue
        scores = {answer: _constant_score(answer, members, cfg) for answer in _candidates(task, members)}
        # Of equals the one first in the alphabet, whatever the order of the questions.
        answer = min(scores, key=lambda candidate: (-scores[candidate], candidate))
        floors[task] = (scores[answer], answer)
    return floors


def _score(response: TeacherResponse, question: Question, cfg: TeacherConfig) -> tuple[bool, float]:
    truncated = response.finish_reason == "length"
    valid = not truncated and parse_answer(response.text, question.task_type, question.options) is not None
    if cfg.quality == "uniform":
        return valid, 1.0
    return valid, _quality(response.text, question, cfg) if valid else 0.0


def _quality(text: str, question: Question, cfg: TeacherConfig) -> float:
    return quality_score(
        text,
        question.task_type,
        question.answer,
        options=question.options,
        numeric_metric=cfg.numeric_metric,
        numeric_eps=cfg.numeric_eps,
        ocr_metric=cfg.ocr_metric,
        spatial_format=cfg.spatial_format,
    )


def _group(
    pool: Pool, questions: Sequence[Question], scores: dict[str, list[tuple[bool, float]]], cfg: TeacherConfig
) -> dict | None:
    rows = [[quality for _, quality in scores[question.id]] for question in questions if scores[question.id]]
    if not rows:
        return None
    flat = [quality for row in rows for quality in row]
    valid = [flag for question in questions for flag, _ in scores[question.id]]
    cut = [
        response.finish_reason == "length"
        for question in questions
        for response in pool.get(question.id, [])[: cfg.responses]
    ]
    means = [statistics.fmean(row) for row in rows]
    # What matching keeps: q >= tau, and never q = 0.
    kept = [[quality >= cfg.min_quality and quality > 0 for quality in row] for row in rows]
    return {
        "questions": len(questions),
        "responses": len(flat),
        "mean": statistics.fmean(means),
        "sd_across": statistics.pstdev(means),
        "sd_within": statistics.fmean(statistics.pstdev(row) for row in rows),
        "low": min(means),
        "high": max(means),
        "valid_share": _share(valid),
        "kept_share": _share(flag for row in kept for flag in row),
        "truncated_share": _share(cut),
        "empty_share": 1 - sum(any(row) for row in kept) / len(questions),
    }


def _share(flags: Iterable[bool]) -> float:
    return statistics.fmean(float(flag) for flag in flags)


def _candidates(task: str, questions: Sequence[Question]) -> set[str]:
    truths = {question.answer for question in questions}
    if task == "mcq":
        return set("".join(option_letters(q.options) if q.options else q.answer for q in questions))
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


def _constant_score(answer: str, questions: Sequence[Question], cfg: TeacherConfig) -> float:
    text = f"<think>-</think><answer>{answer}</answer>"
    return statistics.fmean(_quality(text, question, cfg) for question in questions)
