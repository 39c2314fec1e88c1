"""Rows of the breakdowns in a summary of scores, for the table, the comparison and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = tuple[str, tuple[str, ...]]


def detail_rows(students: Iterable[object]) -> list[Row]:
    """Return label and keys of each value of each group, in order of appearance, and of majority@k, best@k
    and pass@k, the upper bound of the others.

    Args:
        students: results of `stages.summaries.summarize`, also from files of earlier versions.
    """
    students = list(students)
    rows: dict[tuple[str, ...], str] = {}
    for student in students:
        for name, values in _mapping(entry_at(student, ("groups",))).items():
            rows |= {("groups", name, value): f"{name}: {value}" for value in _mapping(values)}
    for kind in ("majority", "best", "pass"):
        for student in students:
            rows |= {("sampled", kind, k): f"{kind}@{k}" for k in _mapping(entry_at(student, ("sampled", kind)))}
    return [(label, path) for path, label in rows.items()]


def entry_at(result: object, path: Sequence[str]) -> Any:
    """Return the item of nested dicts at the keys of a path, or None if it is missing."""
    for key in path:
        result = _mapping(result).get(key)
    return result


def _mapping(item: object) -> Mapping[str, Any]:
    return item if isinstance(item, Mapping) else {}
