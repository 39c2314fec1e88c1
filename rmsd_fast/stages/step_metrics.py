"""Compute the metrics of a step over the global batch. Each is defined in one place, by the sums that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rmsd_fast.runtime.process_group import World, global_sum

Number = float | Tensor
# A metric is either a sum over the processes, or a function followed by its arguments, e.g. (mean, total, count).
Metric = Number | tuple[Any, ...]


def mean(total: float, count: float) -> float | None:
    """Return the mean, or None if count is 0."""
    return total / count if count else None


def global_metrics(record: Mapping[str, Metric], world: World) -> dict[str, float | None]:
    """Return the metrics over all processes, computed with one collective.

    Args:
        record: this process's part of each metric, by name as in metrics.jsonl. All processes pass the same names.
        world: this process in the run.
    """
    formulas = {name: metric if isinstance(metric, tuple) else (float, metric) for name, metric in record.items()}
    named = {f"{name} {i}": part for name, (_, *parts) in formulas.items() for i, part in enumerate(parts)}
    sums = global_sum(named, world)
    metrics: dict[str, float | None] = {}
    for name, (formula, *parts) in formulas.items():
        metrics[name] = formula(*(sums[f"{name} {i}"] for i in range(len(parts))))
    return metrics
