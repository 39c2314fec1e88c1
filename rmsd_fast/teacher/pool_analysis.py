"""Analyze a teacher pool: the numbers of the pool report, as they are written to its JSON file.

Qualities of questions with ground truth, with agreement in place of it, and of open questions are never mixed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES
from rmsd_fast.teacher.agreement_check import agreement_check
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.pool_costs import cost_of_k, usage_per_answer, whole_usage
from rmsd_fast.teacher.pool_estimates import (
    MOST_K,
    best_of,
    common_count,
    correlation,
    estimate,
    estimates,
    kept_questions,
    ratio,
    spread,
)
from rmsd_fast.teacher.pool_gain import stage2_gain
from rmsd_fast.teacher.pool_rows import PoolRows, pool_rows
from rmsd_fast.teacher.scores import Pool, Scores, score_pool
from rmsd_fast.teacher.usage import Prices

TAUS = tuple(step / 20 for step in range(21))
# The estimates that score answers again use at most this many questions of each task type, drawn at random.
MOST_SCORED = 2500
# Teacher settings that change the numbers.
SETTINGS = ("responses", "min_quality", "parse", "unlabeled", "numeric_metric", "numeric_eps", "ocr_metric")
MOST_MODELS = 8
EXAMPLES, SHOWN_IDS, SHOWN_CHARACTERS = 2, 5, 300
PERCENTILES = (5, 50, 95)


def analyze_pool(
    pool: Pool,
    questions: Sequence[Question],
    cfg: TeacherConfig,
    *,
    simulated: bool,
    prices: Prices | None = None,
) -> dict:
    """Return all numbers of the pool report.

    Args:
        pool: all answers, checked against the questions. Those that were drawn adaptively, or with a hint, are only
            counted, because they depend on the quality of others.
        questions: all questions; at least one has an answer.
        cfg: teacher settings. `responses` is K: what training would use. All other statistics use all answers.
        simulated: whether a simulated teacher wrote the pool.
        prices: prices of the teacher's tokens, if they are known.
    Returns:
        A dict that can be written as JSON; docs/pool_report.md describes it.
    Raises:
        DataError: all answers were drawn adaptively, or with a hint.
    """
    whole = pool
    pool = {name: kept for name, responses in whole.items() if (kept := [r for r in responses if r.is_counted])}
    answered = [question for question in questions if question.id in pool]
    if not answered:
        raise DataError("teacher pool: expected answers that depend on no others, got only adaptive or hinted ones")
    most = max(len(pool[question.id]) for question in answered)
    every = replace(cfg, responses=most)
    scores = score_pool(pool, answered, every)
    rows = pool_rows(pool, answered, scores, prices)
    groups = _groups(rows)
    unlabeled = [question for question in answered if question.is_unlabeled]
    others = [question for question in answered if not question.is_unlabeled]
    used = replace(cfg, responses=min(cfg.responses, most))
    sampled = _sample(answered)
    return {
        "teacher_simulated": simulated,
        "settings": {name: getattr(cfg, name) for name in SETTINGS},
        "counts": _counts(pool, questions, answered, rows)
        | {"marked": sum(not response.is_counted for question in questions for response in whole.get(question.id, []))},
        "quality": pool_statistics(scores, others, every, simulated=simulated) if others else None,
        "agreement_quality": pool_statistics(scores, unlabeled, every, simulated=simulated) if unlabeled else None,
        "means": {
            name: estimate(np.array([quality.mean() for quality in _qualities(rows, members)]))
            for name, members in groups.items()
        },
        "spread": {name: spread(_qualities(rows, members)) for name, members in groups.items()},
        "kept": _kept(rows, groups, used),
        "best_of": _best_of(rows, groups),
        "format": _format(rows),
        "texts": _texts(rows),
        "usage": usage_per_answer(rows, cfg.min_quality),
        "pool_usage": whole_usage(whole, prices),
        "prices": prices._asdict() if prices else None,
        "cost_of_k": cost_of_k(rows, prices, cfg.min_quality) if prices else None,
        "models": _models(rows, cfg.min_quality) if len(rows.models) > 1 else None,
        "scored_questions": len(sampled),
        "agreement": agreement_check(sampled, scores, used),
        "stage2": stage2_gain(sampled, scores, used),
        "examples": _examples(pool, answered, scores),
    }


def _groups(rows: PoolRows) -> dict[str, np.ndarray]:
    """Return indices of the questions by group: the closed tasks and `closed` (metric), and `unlabeled` (agreement)."""
    truth = np.array([question.has_truth for question in rows.questions])
    task = np.array([question.task_type for question in rows.questions])
    groups = {name: np.flatnonzero(truth & (task == name)) for name in CLOSED_TASKS}
    groups["closed"] = np.flatnonzero(truth)
    groups["unlabeled"] = np.flatnonzero([question.is_unlabeled for question in rows.questions])
    return {name: members for name, members in groups.items() if len(members)}


def _qualities(rows: PoolRows, members: np.ndarray) -> list[np.ndarray]:
    return [rows.quality[rows.start[q] : rows.start[q + 1]] for q in members]


def _sample(questions: Sequence[Question]) -> list[Question]:
    sampled = []
    for task in CLOSED_TASKS:
        labeled = [question for question in questions if question.task_type == task and question.has_truth]
        # A random sample, because files often have a periodic order.
        sampled += random.Random(0).sample(labeled, min(MOST_SCORED, len(labeled)))
    return sampled


def _counts(pool: Pool, questions: Sequence[Question], answered: Sequence[Question], rows: PoolRows) -> dict:
    asked = {question.id for question in questions}
    foreign = [identity for identity in pool if identity not in asked]
    without = [question.id for question in questions if question.id not in pool]
    per_question = Counter(rows.counts.tolist())
    return {
        "questions": len(questions),
        "answered": len(answered),
        "unanswered": len(without),
        "unanswered_ids": without[:SHOWN_IDS],
        "answers": len(rows.quality),
        "answers_per_question": {str(k): per_question[k] for k in sorted(per_question, reverse=True)},
        "foreign_ids": len(foreign),
        "foreign_answers": sum(len(pool[identity]) for identity in foreign),
        "unlabeled": sum(question.is_unlabeled for question in answered),
        "open": sum(question.task_type == "open" for question in answered),
    }


def _kept(rows: PoolRows, groups: dict[str, np.ndarray], used: TeacherConfig) -> dict:
    """Return the shares of answers, and of questions with a kept answer among K, for each tau.

    Those at `min_quality` have intervals, under `at`, and the shares of answers at its default under `at_default`.
    """
    taus = sorted({*TAUS, used.min_quality})
    shares: dict[str, dict[str, list[float]]] = {name: {"answers": [], "questions": []} for name in groups}
    at, at_default = {}, {}
    for tau in taus:
        # The filter of method.matching.passes_filter, for all answers at once.
        kept = rows.per_question((rows.quality >= tau) & (rows.quality > 0))
        for name, members in groups.items():
            counts = rows.counts[members]
            covered = kept_questions(kept[members], counts, used.responses)
            shares[name]["answers"].append(float(kept[members].sum() / counts.sum()))
            shares[name]["questions"].append(float(covered.mean()))
            if tau == TeacherConfig.min_quality:
                at_default[name] = ratio(kept[members], counts)
            if tau == used.min_quality:
                at[name] = {"answers": ratio(kept[members], counts), "questions": estimate(covered)}
    return {"responses": used.responses, "tau": taus, "groups": shares, "at": at, "at_default": at_default}


def _best_of(rows: PoolRows, groups: dict[str, np.ndarray]) -> dict | None:
    """Return the expected best quality of K answers by group, for questions with ground truth.

    K ends at the largest number of answers that at least half of the questions have, and all K use the same questions:
    those with at least so many answers.
    """
    if "closed" not in groups:
        return None
    most = min(common_count(rows.counts[groups["closed"]]), MOST_K)
    doublings = [(2**power, 2 ** (power + 1)) for power in range(MOST_K) if 2 ** (power + 1) <= most]
    result: dict[str, dict] = {}
    for name, members in groups.items():
        members = members[rows.counts[members] >= most]
        if name == "unlabeled" or not len(members):
            continue
        of_k = dict(enumerate(best_of(_qualities(rows, members), most).T, start=1))
        measured = estimates(of_k | {(k, twice): of_k[twice] - of_k[k] for k, twice in doublings})
        result[name] = {
            "questions": len(members),
            "quality": [measured[k] for k in of_k],
            "steps": [{"from": k, "to": twice, **measured[k, twice]} for k, twice in doublings],
        }
    if "mcq" in result:
        result["mcq"]["chance"] = _chance([rows.questions[q] for q in groups["mcq"]], most)
    left_out = int((rows.counts[groups["closed"]] < most).sum())
    return {"most": most, "left_out": left_out, "groups": result}


def _format(rows: PoolRows) -> dict[str, dict]:
    """Return the shares of answers that are valid, and that were valid as sent, by task type and over all."""
    valid, as_sent = rows.per_question(rows.valid), rows.per_question(rows.as_sent)
    return {
        name: {
            "valid": ratio(valid[members], rows.counts[members]),
            "as_sent": ratio(as_sent[members], rows.counts[members]),
        }
        for name, members in _by_task(rows).items()
    }


def _by_task(rows: PoolRows) -> dict[str, np.ndarray]:
    """Return indices of the questions by task type, and those of all questions as `all`."""
    task = np.array([question.task_type for question in rows.questions])
    groups = {name: np.flatnonzero(task == name) for name in TASK_TYPES} | {"all": np.arange(len(task))}
    return {name: members for name, members in groups.items() if len(members)}


def _chance(questions: Sequence[Question], most: int) -> list[float] | None:
    """Return the probability that K random guesses contain the right option, for K = 1 to `most`.

    Questions whose options are only in their text are left out; None if there are no others.
    """
    wrong = np.array([1 - 1 / len(question.options) for question in questions if question.options])
    return [float(1 - (wrong**k).mean()) for k in range(1, most + 1)] if len(wrong) else None


def _texts(rows: PoolRows) -> dict[str, dict]:
    """Return lengths, repetitions and different answers by task type, and over all."""
    owner, groups = rows.owner, {}
    valid = rows.per_question(rows.valid)
    for name, chosen in _by_task(rows).items():
        answers = np.isin(owner, chosen)
        several = chosen[valid[chosen] > 1]
        ratable = answers & np.array([question.has_truth for question in rows.questions])[owner] & rows.valid
        lengths = np.percentile(rows.characters[answers], PERCENTILES)
        groups[name] = {
            "answers": int(answers.sum()),
            "characters": dict(zip(map(str, PERCENTILES), lengths.tolist(), strict=True)),
            "repeated_share": float(rows.repeated[answers].mean()),
            "elsewhere_share": float(rows.elsewhere[answers].mean()),
            # Of the valid answers to a question with at least two of them.
            "valid_answers": float(valid[several].mean()) if len(several) else None,
            "different_answers": float(rows.distinct[several].mean()) if len(several) else None,
            "length_correlation": correlation(
                rows.characters[ratable], rows.quality[ratable], owner[ratable], within=True
            ),
        }
    return groups


def _models(rows: PoolRows, tau: float) -> list[dict]:
    """Return quality and costs by teacher, most answers first, and paired differences from the first one."""
    owner = rows.owner
    truth = np.array([question.has_truth for question in rows.questions])
    first: np.ndarray | None = None
    result = []
    for index, name in enumerate(rows.models[:MOST_MODELS]):
        answers = rows.model == index
        counts = np.bincount(owner[answers], minlength=len(truth))
        sums = np.bincount(owner[answers], rows.quality[answers], minlength=len(truth))
        means = np.where(truth & (counts > 0), sums / np.maximum(counts, 1), np.nan)
        rated = np.isfinite(means)
        both = rated & np.isfinite(first) if first is not None else np.zeros_like(rated)
        first = means if first is None else first
        usage = {key: values[answers & np.isfinite(values)] for key, values in rows.usage.items()}
        result.append(
            {
                "model": name,
                "answers": int(answers.sum()),
                "questions": int((counts > 0).sum()),
                "quality": estimate(means[rated]) if rated.any() else None,
                "difference": estimate(means[both] - first[both]) if both.any() else None,
                "valid_share": float(rows.valid[answers].mean()),
                "as_sent_share": float(rows.as_sent[answers].mean()),
                "kept_share": float(((rows.quality >= tau) & (rows.quality > 0))[answers].mean()),
                **{key: float(values.mean()) if len(values) else None for key, values in usage.items()},
            }
        )
    return result


def _examples(pool: Pool, questions: Sequence[Question], scores: Scores) -> dict[str, list[dict]]:
    """Return a few invalid answers of each reason: question id, k, and the beginning of the text as sent."""
    examples: dict[str, list[dict]] = {}
    for question in questions:
        for answer, response in zip(scores[question.id], pool[question.id], strict=True):
            shown = examples.setdefault(answer.reason, []) if answer.reason else None
            if shown is not None and len(shown) < EXAMPLES:
                text = response.text if response.raw is None else response.raw
                shown.append({"id": question.id, "k": answer.k, "text": text[:SHOWN_CHARACTERS]})
    return examples
