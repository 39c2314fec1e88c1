"""What the answers of a pool cost: in all, per usable answer, and for each K."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.pool_estimates import MOST_K, common_count, estimates
from rmsd_fast.teacher.pool_rows import PoolRows
from rmsd_fast.teacher.scores import Pool
from rmsd_fast.teacher.usage import WITH, Prices, Usage, read_usage


def usage_per_answer(rows: PoolRows, tau: float) -> dict | None:
    """Return tokens and costs per answer and per usable answer, over the answers that have them.

    Args:
        rows: the answers.
        tau: least quality of a kept answer.
    """
    kept = _kept(rows, tau)
    result = {}
    for name, values in rows.usage.items():
        reported = np.isfinite(values)
        if not reported.any():
            continue
        total = float(values[reported].sum())
        valid, passing = int((reported & rows.valid).sum()), int((reported & kept).sum())
        result[name] = {
            "answers": int(reported.sum()),
            "total": total,
            "per_answer": total / int(reported.sum()),
            "per_valid": total / valid if valid else None,
            "per_kept": total / passing if passing else None,
        }
    return result or None


def whole_usage(pool: Pool, prices: Prices | None) -> dict[str, float]:
    """Return what all answers of a pool have used together, by field of Usage, without fields that none reports.

    Args:
        pool: all answers, including those that no other number includes.
        prices: prices of the tokens; with them, `priced` is the cost at these prices, and `unpriced_answers` is the
            number of answers without token counts, whose cost is missing in it (absent if there are none).
    """
    responses: Sequence[TeacherResponse] = [response for answers in pool.values() for response in answers]
    used = np.array([read_usage(response.usage) for response in responses], dtype=np.float64)
    columns = dict(zip(Usage._fields, used.T, strict=True))
    if prices is not None:
        columns["priced"] = prices.cost(columns["prompt_tokens"], columns["completion_tokens"])
    totals = {name: float(np.nansum(values)) for name, values in columns.items() if np.isfinite(values).any()}
    if "priced" in totals:
        # An answer whose reply is priced with another answer is not missing.
        alone = np.array([WITH not in response.usage for response in responses])
        missing = int((alone & ~np.isfinite(columns["priced"])).sum())
        totals |= {"unpriced_answers": missing} if missing else {}
    return totals


def cost_of_k(rows: PoolRows, prices: Prices, tau: float) -> dict | None:
    """Return what the first K answers to a question cost, for K = 1 up to what at least half of the questions have.

    The cost of K answers is that of the prompts of their replies, and of their shares of the completions. A prompt is
    paid once, however many of the answers of its reply are among the first K.

    Args:
        rows: the answers.
        prices: prices of the tokens.
        tau: least quality of a kept answer.
    Returns:
        {"questions", "per_question", "per_valid", "per_kept"}: the number of questions that have enough answers and all
        of their token counts, and lists over K: the mean cost of a question with its interval, and the cost per valid
        and per kept answer (None if there are none). None if there is no such question.
    """
    most = min(common_count(rows.counts), MOST_K)
    added = prices.cost(rows.prompt_added, rows.usage["completion_tokens"])
    enough = np.flatnonzero(rows.counts >= most)
    # Answers to each question, [questions, K].
    first = rows.start[enough][:, None] + np.arange(most)
    first = first[np.isfinite(added[first]).all(1)]
    if not len(first):
        return None
    cost, valid, kept = (values[first].cumsum(1) for values in (added, rows.valid, _kept(rows, tau)))
    return {
        "questions": len(first),
        "per_question": list(estimates(dict(enumerate(cost.T))).values()),
        "per_valid": _ratios(cost, valid),
        "per_kept": _ratios(cost, kept),
    }


def _kept(rows: PoolRows, tau: float) -> np.ndarray:
    return (rows.quality >= tau) & (rows.quality > 0)


def _ratios(costs: np.ndarray, counts: np.ndarray) -> list[float | None]:
    pairs = zip(costs.sum(0).tolist(), counts.sum(0).tolist(), strict=True)
    return [cost / count if count else None for cost, count in pairs]
