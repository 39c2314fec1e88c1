"""Summarize the scores of held-out answers: means and paired differences by task type, with 95% intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rmsd_fast.bootstrap import mean_interval
from rmsd_fast.method.answers import ALL_TASKS, GRADED_TASKS


def summarize(records: list[dict]) -> dict:
    """Return means with 95% intervals: per task type, over the closed task types, and over all.

    The interval is Wilson's. For graded scores in [0, 1] it is conservative, because their variance is at most that of
    a 0/1 score with the same mean. Open questions have no metric; their score is the share of valid answers. If some of
    them are about generated clips, `meaning` is the share of correct answers to them. If the records have scores of
    sampled responses, `sampled` holds the same means for these scores.
    """
    result = _measure(records, _mean_with_interval)
    if sampled := _of_samples(records):
        result["sampled"] = _measure(sampled, _wilson)
    return result


def _measure(records: list[dict], measure: Callable[[list[dict]], dict]) -> dict:
    meanings = [{"score": record["meaning"]} for record in records if "meaning" in record]
    return _by_task(records, measure) | ({"meaning": _wilson(meanings)} if meanings else {})


def compare(after: list[dict], before: list[dict], *, seed: int = 0) -> dict:
    """Return paired differences after - before with 95% bootstrap intervals over questions.

    As in `summarize`, `meaning` compares the correctness of open answers about generated clips, and `sampled` the
    scores of sampled responses, if both students have them.
    """
    result = _compare(after, before, seed)
    samples = _of_samples(after), _of_samples(before)
    if all(samples):
        result["sampled"] = _compare(*samples, seed)
    return result


def _compare(after: list[dict], before: list[dict], seed: int) -> dict:
    result = _by_task(_paired(after, before, "score"), lambda rows: _bootstrap(rows, seed))
    if meanings := _paired(after, before, "meaning"):
        result["meaning"] = _bootstrap(meanings, seed)
    return result


def _paired(after: list[dict], before: list[dict], key: str) -> list[dict]:
    """Return the later records, with the difference of a value as their score, if both records have the value."""
    earlier = {record["id"]: record[key] for record in before if key in record}
    both = [record for record in after if key in record and record["id"] in earlier]
    return [{**record, "score": record[key] - earlier[record["id"]]} for record in both]


def _of_samples(records: list[dict]) -> list[dict]:
    """Return the records with the means over sampled responses as their scores; none if any lacks them."""
    if not all("sampled" in record for record in records):
        return []
    samples = []
    for record in records:
        sample = {**record, "score": record["sampled"]}
        sample.pop("meaning", None)
        if "sampled_meaning" in record:
            sample["meaning"] = record["sampled_meaning"]
        samples.append(sample)
    return samples


def _by_task(records: list[dict], measure: Callable[[list[dict]], dict]) -> dict:
    tasks = {task: [r for r in records if r["task_type"] == task] for task in ALL_TASKS}
    closed = [r for r in records if r["task_type"] in GRADED_TASKS]
    result = {"tasks": {task: measure(rows) for task, rows in tasks.items() if rows}, "all": measure(records)}
    if closed:
        result["closed"] = measure(closed)
    return result


def _mean_with_interval(rows: list[dict]) -> dict:
    return {**_wilson(rows), "valid_share": sum(row["valid"] for row in rows) / len(rows)}


def _wilson(rows: list[dict]) -> dict:
    n, z = len(rows), 1.959963984540054
    mean = sum(row["score"] for row in rows) / n
    center = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (mean * (1 - mean) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return {"mean": mean, "low": max(0.0, center - half), "high": min(1.0, center + half), "n": n}


def _bootstrap(rows: list[dict], seed: int) -> dict:
    scores = [row["score"] for row in rows]
    low, high = mean_interval(scores, seed=seed)
    return {"mean": float(np.mean(scores)), "low": low, "high": high, "n": len(rows)}


def signed_interval(difference: dict) -> str:
    """Return a difference as text: `+0.123 [+0.100, +0.146]`."""
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format_map(difference)
