"""Compare finished evaluations: paired differences with clustered intervals, and what was evaluated differently."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsd_fast.config import UserError
from rmsd_fast.stages.evaluation_table import benchmark_lines
from rmsd_fast.stages.paper_numbers import paper_lines
from rmsd_fast.stages.protocol import differences_of
from rmsd_fast.stages.summaries import READINGS, compare, summarize

# Students of a run folder, the last one of a run first.
_LAST_FIRST = ("stage2", "control", "stage1", "untrained")
# Most questions that a message names.
_MOST_NAMED = 5


class EvaluationError(UserError, ValueError):
    """An evaluation that cannot be compared."""


@dataclass(frozen=True)
class Evaluation:
    """The answers of one student.

    Attributes:
        name: the name that the user gave.
        records: the predictions.
        facts: content of `evaluation.json`.
    """

    name: str
    records: list[dict]
    facts: dict[str, Any]


def read_evaluation(name: str) -> Evaluation:
    """Read an evaluation with its predictions.

    Args:
        name: a JSON file of `rmsd_fast.evaluate`, with the predictions next to it, or a run folder. `:student` at its
            end names a student of the run; without it, the last one is read.
    Raises:
        EvaluationError: files are missing or damaged, or were written by an earlier version.
    """
    given, _, student = name.rpartition(":")
    path = Path(given if given and not Path(name).exists() else name)
    student = student if given and path == Path(given) else ""
    if path.is_dir():
        there = {file.stem for file in (path / "predictions").glob("*.jsonl")}
        chosen = student or next((one for one in _LAST_FIRST if one in there), "")
        if chosen not in there:
            raise EvaluationError(
                f"{name}: expected predictions of {chosen or 'a student'}, got {', '.join(sorted(there)) or 'none'}; "
                "evaluate the run first, or name one of its students after a colon"
            )
        facts, predictions = path / "evaluation.json", path / "predictions" / f"{chosen}.jsonl"
    elif student:
        raise EvaluationError(f"{name}: expected a run folder before the colon, got {given}; leave {student!r} out")
    else:
        facts, predictions = path, path.with_suffix(".predictions.jsonl")
    try:
        read = json.loads(facts.read_text(encoding="utf-8"))
        records = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise EvaluationError(f"{error.filename}: no such file; evaluate {name} first, or fix the path") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{name}: the evaluation cannot be read ({error}); evaluate it again") from error
    needed = {"id", "task_type", "cluster", "score", "strict", "lenient"}
    if not records or not isinstance(read, dict) or not all(isinstance(r, dict) and needed <= set(r) for r in records):
        raise EvaluationError(
            f"{predictions}: expected predictions with {', '.join(sorted(needed))}; evaluate again with this version"
        )
    return Evaluation(name, records, read)


def compare_evaluations(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the scores of all evaluations, and the differences of the others from the first one.

    Scores are over all questions of an evaluation, and differences over the common ones.

    Raises:
        EvaluationError: two evaluations have no question in common, or the same id stands for other task types.
    """
    base, *others = evaluations
    names = [evaluation.name for evaluation in evaluations]
    if len(set(names)) < len(names):
        raise EvaluationError(f"--compare: expected different evaluations, got {', '.join(names)}; name each once")
    result: dict[str, Any] = {
        "benchmark": base.facts.get("benchmark"),
        "parse": {evaluation.name: evaluation.facts.get("parse") for evaluation in evaluations},
        "students": {evaluation.name: summarize(evaluation.records) for evaluation in evaluations},
        "differences": {},
    }
    for other in others:
        tasks, others_tasks = ({r["id"]: r["task_type"] for r in e.records} for e in (base, other))
        common = [name for name in tasks if name in others_tasks]
        changed = [name for name in common if tasks[name] != others_tasks[name]]
        if not common or changed:
            what = (
                f"question {changed[0]!r} is {tasks[changed[0]]} and {others_tasks[changed[0]]}" if changed else "none"
            )
            raise EvaluationError(
                f"{other.name}: expected questions in common with {base.name}, got {what}; compare evaluations of the "
                "same questions"
            )
        result["differences"][other.name] = {
            **compare(other.records, base.records),
            "common": len(common),
            "only_before": [name for name in tasks if name not in others_tasks],
            "only_after": [name for name in others_tasks if name not in tasks],
            "protocol": differences_of(base.facts.get("protocol"), other.facts.get("protocol")),
        }
    return result


def format_comparison(result: Mapping[str, Any]) -> str:
    """Return the scores, the differences from the first evaluation, and the paper's scores, as text."""
    students, (base, *_) = result["students"], result["students"]
    rows = _rows(students)
    width = max(len(label) for label, _ in rows)
    lines = []
    for number, (name, student) in enumerate(students.items()):
        lines.append(f"{name}{'' if number == 0 else f', and its difference from {base}'}")
        difference = result["differences"].get(name)
        for label, path in rows:
            if not (entry := _at(student, path)):
                continue
            change = _at(difference, path) if difference else None
            text = f"{100 * entry['mean']:5.1f}{_bounds(entry)}  n={entry['n']}, videos={entry['clusters']}"
            lines.append(f"  {label:<{width}}  {text}" + (f"  {_points(change)}" if change else ""))
        if difference:
            lines += _remarks(base, name, difference)
    readings = set(result["parse"].values())
    if len(readings) > 1:
        lines.append(
            "WARNING: the evaluations read answers differently (evaluate.parse: "
            + ", ".join(f"{name} {reading}" for name, reading in result["parse"].items())
            + "); compare the rows strict and lenient"
        )
    for name, student in students.items():
        lines += benchmark_lines(name, result["benchmark"], student)
    return "\n".join([*lines, *paper_lines(result["benchmark"])])


def _rows(students: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    rows: dict[tuple[str, ...], str] = {("all",): "all", ("closed",): "closed"}
    rows |= {(reading, "closed"): f"closed, {reading}" for reading in READINGS}
    rows |= {("sampled", "closed"): "closed, sampled", ("meaning",): "meaning"}
    for student in students.values():
        rows |= {("tasks", task): task for task in student["tasks"]}
        for name, values in student.get("groups", {}).items():
            rows |= {("groups", name, value): f"{name}: {value}" for value in values}
    return [(label, path) for path, label in rows.items()]


def _remarks(base: str, name: str, difference: Mapping[str, Any]) -> list[str]:
    lines = []
    for questions, owner in ((difference["only_before"], base), (difference["only_after"], name)):
        if questions:
            shown = ", ".join(questions[:_MOST_NAMED]) + (", …" if len(questions) > _MOST_NAMED else "")
            lines.append(f"  {len(questions)} questions are only in {owner}, and not in the difference: {shown}")
    lines += [f"  evaluated differently: {change}" for change in difference["protocol"]]
    return lines


def _at(result: Any, path: Sequence[str]) -> Any:
    for key in path:
        result = (result or {}).get(key)
    return result


def _points(change: Mapping[str, Any]) -> str:
    bounds = "" if change["low"] is None else f" [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
    return f"{100 * change['mean']:+.1f}{bounds}"


def _bounds(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f" [{100 * entry['low']:5.1f}, {100 * entry['high']:5.1f}]"
