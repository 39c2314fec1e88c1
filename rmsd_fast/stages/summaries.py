"""Summarize the scores of held-out answers: means and paired differences by task type, with 95% intervals.

The intervals are clustered by video (`rmsd_fast.bootstrap`). If all questions are about one video, they are None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from rmsd_fast.bootstrap import mean_interval, score_interval
from rmsd_fast.data.benchmarks import aggregate
from rmsd_fast.method.answers import ALL_TASKS, GRADED_TASKS
from rmsd_fast.stages.sample_estimates import best_at_k, majority_at_k, pass_at_k, sizes_of

# Ways to read an answer; `evaluate.parse` chooses the one of `score`. With a judge, `judged` is the lenient reading
# with the judge's verdicts, and that of `score`.
READINGS = ("strict", "lenient", "judged")
# Most unusable questions that evaluation.json names.
MOST_NAMED = 50


def summarize(records: list[dict], *, details: bool = True) -> dict:
    """Return means with 95% intervals: per task type, over the closed task types, and over all.

    Open questions have no metric; their score is the share of valid answers. If some of them are about generated clips,
    `meaning` is the share of correct answers to them. If the records have scores of sampled responses, `sampled` holds
    the same means for these scores, and `pass` and `majority` by k over closed questions. If a reranker scored the
    sampled responses, it also holds `best` by k, and in `best_gain` the paired differences of the best of all from the
    greedy answer, the mean and the majority.

    Args:
        records: the answers, as `stages.answer_records` writes them.
        details: whether to add the scores of all readings (`strict`, `lenient`, and `judged` with a judge), those of
            `groups` over the closed questions, or over all if none is closed, those over the `usable` questions, if
            some were not, for the questions of a benchmark its own numbers by reading (`benchmark`), and who `decided`
            about answers that the field scores with a language model.
    """
    result = _measure(records, _mean_with_shares)
    if sampled := _of_samples(records):
        result["sampled"] = _measure(sampled, mean_entry) | _estimates(records)
    if not details:
        return result
    for reading in READINGS:
        if rows := _read_as(records, reading):
            result[reading] = _by_task(rows, mean_entry)
    if groups := _by_group(records, mean_entry):
        result["groups"] = groups
    if len(names := {record.get("benchmark") for record in records}) == 1 and (name := names.pop()):
        result["benchmark"] = {
            reading: aggregate(name, [(record.get("groups", {}), record[reading]) for record in records])
            for reading in READINGS
            if all(reading in record for record in records)
        }
    if decided := _decided(records):
        result["decided"] = decided
    usable = [record for record in records if "error" not in record]
    if len(usable) < len(records):
        result["usable"] = _by_task(usable, mean_entry) if usable else {"tasks": {}}
    return result


def compare(after: list[dict], before: list[dict], *, seed: int = 0, details: bool = True) -> dict:
    """Return paired differences after - before with 95% bootstrap intervals, clustered by video.

    As in `summarize`, `meaning` compares the correctness of open answers about generated clips, and `sampled` the
    scores of sampled responses, if both students have them. With `details`, it also compares both readings and groups.
    """

    difference = partial(difference_entry, seed=seed)

    result = _compare(after, before, difference)
    samples = _of_samples(after), _of_samples(before)
    if all(samples):
        result["sampled"] = _compare(*samples, difference)
    if not details:
        return result
    for reading in READINGS:
        if rows := _paired(after, before, reading):
            result[reading] = _by_task(rows, difference)
    if groups := _by_group(_paired(after, before, "score"), difference):
        result["groups"] = groups
    return result


def mean_entry(rows: list[dict]) -> dict:
    """Return {"mean", "low", "high", "n", "clusters"} of the rows' scores; see `bootstrap.score_interval`."""
    return _entry(rows, score_interval([row["score"] for row in rows], [row["cluster"] for row in rows]))


def difference_entry(rows: list[dict], *, seed: int = 0) -> dict:
    """Return the same of rows whose scores are paired differences; see `bootstrap.mean_interval`."""
    bounds = mean_interval([row["score"] for row in rows], [row["cluster"] for row in rows], seed=seed)
    return _entry(rows, bounds)


def count_unusable(records: list[dict]) -> dict:
    """Return the number of questions that could not be used, their number by reason, and the first of them."""
    faults = [record for record in records if "error" in record]
    listed = [{name: fault[name] for name in ("id", "reason", "error")} for fault in faults[:MOST_NAMED]]
    return {"count": len(faults), "reasons": dict(Counter(fault["reason"] for fault in faults)), "questions": listed}


def signed_interval(difference: dict) -> str:
    """Return a difference as text: `+0.123 [+0.100, +0.146]`."""
    if difference["low"] is None:
        return "{mean:+.3f} (one video, no interval)".format_map(difference)
    return "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format_map(difference)


def _entry(rows: list[dict], bounds: tuple[float, float] | None) -> dict:
    low, high = bounds or (None, None)
    n, clusters = len(rows), len({row["cluster"] for row in rows})
    return {"mean": sum(row["score"] for row in rows) / n, "low": low, "high": high, "n": n, "clusters": clusters}


def _mean_with_shares(rows: list[dict]) -> dict:
    entry = {**mean_entry(rows), "valid_share": sum(row["valid"] for row in rows) / len(rows)}
    only = sum(row["readable"] and not row["valid"] for row in rows)
    return {**entry, "only_lenient_share": only / len(rows)}


def _measure(records: list[dict], measure: Callable[[list[dict]], dict]) -> dict:
    meanings = _read_as([record for record in records if "meaning" in record], "meaning")
    return _by_task(records, measure) | ({"meaning": mean_entry(meanings)} if meanings else {})


def _compare(after: list[dict], before: list[dict], difference: Callable[[list[dict]], dict]) -> dict:
    result = _by_task(_paired(after, before, "score"), difference)
    if meanings := _paired(after, before, "meaning"):
        result["meaning"] = difference(meanings)
    return result


def _paired(after: list[dict], before: list[dict], key: str) -> list[dict]:
    """Return the later records, with the difference of a value as their score, if both records have the value."""
    earlier = {record["id"]: record[key] for record in before if key in record}
    both = [record for record in after if key in record and record["id"] in earlier]
    return [{**record, "score": record[key] - earlier[record["id"]]} for record in both]


def _read_as(records: list[dict], key: str) -> list[dict]:
    """Return the records with another value as their score; none if any lacks it."""
    return [{**record, "score": record[key]} for record in records] if all(key in r for r in records) else []


def _of_samples(records: list[dict]) -> list[dict]:
    """Return the records with the means over sampled responses as their scores; none if any lacks them."""
    samples = []
    for sample in _read_as(records, "sampled"):
        sample.pop("meaning", None)
        if "sampled_meaning" in sample:
            sample["meaning"] = sample["sampled_meaning"]
        samples.append(sample)
    return samples


def _decided(records: list[dict]) -> dict:
    """Return who decided about the answers that the field scores with a language model; {} without such answers.

    Returns:
        The number of `answers`, of those decided by `rules`, and `rules_share`. With a judge, its `model`, the number
        of answers that it judged (`judge`), and the ids of those about which it gave no readable reply (`unclear`).
    """
    answers = [record for record in records if "decided" in record]
    if not answers:
        return {}
    verdicts = [record["judge"] for record in answers if "judge" in record]
    rules = sum(record["decided"] and "judge" not in record for record in answers)
    result = {"answers": len(answers), "rules": rules, "rules_share": rules / len(answers)}
    if all("judged" in record for record in records):
        result["model"] = ", ".join(sorted({str(verdict["model"]) for verdict in verdicts}))
        result["judge"] = len(verdicts)
        result["unclear"] = [record["id"] for record in answers if record.get("judge", {}).get("unclear")]
    return result


def _estimates(records: list[dict]) -> dict:
    """Return `pass`, `majority` and `best` by k over the closed questions, as read by `evaluate.parse`."""
    rows = [record for record in records if record["task_type"] in GRADED_TASKS]
    # Predictions of earlier versions have no scores of single responses.
    if not rows or not all("samples" in row for row in rows):
        return {}
    scores = [row["samples"]["score"] for row in rows]
    answers = [row["samples"]["answers"] for row in rows]
    result: dict[str, dict[str, dict]] = {"pass": {}, "majority": {}}
    for k in sizes_of(min(map(len, scores))):
        passed = [{**row, "score": pass_at_k(s, k)} for row, s in zip(rows, scores, strict=True)]
        result["pass"][str(k)] = mean_entry(passed)
        voted = [majority_at_k(s, a, k) for s, a in zip(scores, answers, strict=True)]
        result["majority"][str(k)] = mean_entry([{**row, "score": v} for row, v in zip(rows, voted, strict=True)])
    if all("reranker" in row["samples"] for row in rows):
        result |= _of_best(rows)
    return result


def _of_best(rows: list[dict]) -> dict:
    """Return the scores of the responses that a reranker prefers, by k, and what they gain."""
    samples = [row["samples"] for row in rows]
    n = min(len(sample["score"]) for sample in samples)
    by_k = {k: [best_at_k(sample["score"], sample["reranker"], k) for sample in samples] for k in sizes_of(n)}
    others = {
        "greedy": [row["score"] for row in rows],
        "sampled": [row["sampled"] for row in rows],
        "majority": [majority_at_k(sample["score"], sample["answers"], n) for sample in samples],
    }
    gains = {
        name: [{**row, "score": best - other} for row, best, other in zip(rows, by_k[n], values, strict=True)]
        for name, values in others.items()
    }
    return {
        "best": {
            str(k): mean_entry([{**row, "score": score} for row, score in zip(rows, best, strict=True)])
            for k, best in by_k.items()
        },
        "best_gain": {name: difference_entry(gain) for name, gain in gains.items()},
    }


def _by_task(records: list[dict], measure: Callable[[list[dict]], dict]) -> dict:
    tasks = {task: [r for r in records if r["task_type"] == task] for task in ALL_TASKS}
    closed = [r for r in records if r["task_type"] in GRADED_TASKS]
    result = {"tasks": {task: measure(rows) for task, rows in tasks.items() if rows}, "all": measure(records)}
    if closed:
        result["closed"] = measure(closed)
    return result


def _by_group(records: list[dict], measure: Callable[[list[dict]], dict]) -> dict[str, dict[str, dict]]:
    """Return the measure of each value of each breakdown, such as `duration` and `short`, in order of appearance."""
    rows = [record for record in records if record["task_type"] in GRADED_TASKS] or records
    groups: dict[str, dict[str, list[dict]]] = {}
    for row in rows:
        for name, value in row.get("groups", {}).items():
            groups.setdefault(name, {}).setdefault(value, []).append(row)
    return {name: {value: measure(of) for value, of in values.items()} for name, values in groups.items()}
