"""Aggregate the scores of a benchmark's questions to the number that its authors report.

Every result has `score`, that number, unless a group that it needs has no question, or a question has no group. All
scores are shares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rmsd_fast.config import BENCHMARKS, SettingsError
from rmsd_fast.data.benchmarks.mathverse import VERSIONS
from rmsd_fast.data.benchmarks.mlvu import TASKS as MLVU_DEV
from rmsd_fast.data.benchmarks.videommmu import TRACKS
from rmsd_fast.data.benchmarks.vstar import ASKS

# MLVU's test has two more tasks with options than its dev.
MLVU_TEST = (*MLVU_DEV, "sportsQA", "tutorialQA")
# Groups and score of each question.
Rows = Sequence[tuple[Mapping[str, str], float]]


def aggregate(name: str, rows: Rows) -> dict[str, float | dict]:
    """Return a benchmark's own aggregate.

    Args:
        name: one of BENCHMARKS.
        rows: `meta["groups"]` and score of each question of the benchmark; scores are in [0, 1].
    Returns:
        `mean`, the mean over all questions, and `score`, the benchmark's number. For most benchmarks, the two are
        equal. MLVU: `score` is M-Avg, the mean over the accuracies of `tasks`. Video-MMMU: the mean over its three
        `tracks`. MathVerse: the mean over its five `versions`. V-STaR: `score` is mLGM; see `vstar`.
    Raises:
        SettingsError: the benchmark is unknown.
        ValueError: there are no rows.
    """
    if name not in BENCHMARKS:
        raise SettingsError(f"evaluate.benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    if not rows:
        raise ValueError("rows: expected at least one question, got none")
    mean = _mean([score for _, score in rows])
    if name == "vstar":
        return vstar(rows)
    if name in _PARTS:
        part, group, complete = _PARTS[name]
        parts = _by_group(rows, group, complete[0])
        whole = any(set(map(_spelled, parts)) == set(map(_spelled, needed)) for needed in complete)
        if whole and all(groups.get(group) for groups, _ in rows):
            return {"mean": mean, "score": _mean(list(parts.values())), part: parts}
        return {"mean": mean, part: parts} if parts else {"mean": mean}
    return {"mean": mean, "score": mean}


# Benchmarks whose number is the mean over groups: name of the result, group, and the sets of groups that it needs.
_PARTS = {
    "mlvu": ("tasks", "task", (MLVU_DEV, MLVU_TEST)),
    "videommmu": ("tracks", "track", (TRACKS,)),
    "mathverse": ("versions", "version", (VERSIONS,)),
}


def vstar(rows: Rows) -> dict[str, float | dict]:
    """Return V-STaR's numbers: accuracy of what, tIoU and vIoU of both chains, and their means.

    `am` is the arithmetic mean of accuracy, tIoU and vIoU of a chain, and `lgm` the mean of -ln(1 - x) over the
    three, with x at most 1 - 1e-9. `mam` and `mlgm` are the means over the chains. `score` is mLGM, unless one of
    the five asks has no question, or a question has another ask. Unlike the published script, an item whose answer
    to what is empty still counts in the others.
    """
    asked = {ask: [score for groups, score in rows if groups.get("ask") == ask] for ask in ASKS}
    means = {ask: _mean(scores) for ask, scores in asked.items() if scores}
    result: dict[str, float | dict] = {"mean": _mean([score for _, score in rows])}
    if "what" in means:
        result["accuracy"] = means["what"]
    chains = {}
    for chain in (1, 2):
        parts = {"tiou": means.get(f"when{chain}"), "viou": means.get(f"where{chain}")}
        values = {key: value for key, value in parts.items() if value is not None}
        if len(values) == 2 and "what" in means:
            three = (means["what"], *values.values())
            values["am"] = _mean(list(three))
            values["lgm"] = _mean([math.log(1 / (1 - min(value, 1 - 1e-9))) for value in three])
        if values:
            chains[f"chain{chain}"] = values
    result |= chains
    if len(means) == len(ASKS) and sum(map(len, asked.values())) == len(rows):
        result["mam"] = _mean([chain["am"] for chain in chains.values()])
        result["mlgm"] = result["score"] = _mean([chain["lgm"] for chain in chains.values()])
    return result


def _by_group(rows: Rows, group: str, order: Sequence[str]) -> dict[str, float]:
    """Return the mean score of each value of a group, those of `order` first."""
    values: dict[str, list[float]] = {}
    for groups, score in rows:
        if (value := groups.get(group)) is not None:
            values.setdefault(value, []).append(score)
    places = {_spelled(name): place for place, name in enumerate(order)}
    names = sorted(values, key=lambda name: (places.get(_spelled(name), len(places)), name))
    return {name: _mean(values[name]) for name in names}


def _spelled(name: str) -> str:
    """Return the name of a group in one spelling: needle, needleQA; topic_reasoning, topicReasoning."""
    return name.lower().replace("_", "").replace(" ", "").removesuffix("qa")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
