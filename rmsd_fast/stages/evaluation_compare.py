"""Compare finished evaluations: paired differences with clustered intervals, and what was evaluated differently."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmsd_fast.data.errors import counted
from rmsd_fast.stages.evaluation_checks import EvaluationError, check_predictions
from rmsd_fast.stages.evaluation_table import benchmark_lines, is_blind
from rmsd_fast.stages.paper_numbers import paper_lines
from rmsd_fast.stages.protocol import differences_of
from rmsd_fast.stages.summaries import READINGS, compare, difference_entry, summarize
from rmsd_fast.stages.summary_rows import Row, detail_rows, entry_at

# Students of a run folder, the last one of a run first.
_LAST_FIRST = ("stage2", "control", "stage1", "untrained")
# Most questions that a message names.
_MOST_NAMED = 5


@dataclass(frozen=True)
class Evaluation:
    """The answers of one student.

    Attributes:
        name: the file that the user gave, or a run folder with its student, such as `runs/x:control`.
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
        EvaluationError: files are missing or damaged, were written by an earlier version, or have other names.
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
        name = f"{path}:{chosen}"
    elif student:
        raise EvaluationError(f"{name}: expected a run folder before the colon, got {given}; leave {student!r} out")
    elif path.suffix != ".json":
        raise EvaluationError(f"{name}: expected a file that ends with .json, or a run folder; fix the path")
    else:
        facts, predictions = path, path.with_suffix(".predictions.jsonl")
    try:
        read = json.loads(facts.read_text(encoding="utf-8"))
        records = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise EvaluationError(f"{error.filename}: no such file; evaluate {name} first, or fix the path") from error
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{name}: the evaluation cannot be read ({error}); evaluate it again") from error
    if not isinstance(read, dict):
        raise EvaluationError(f"{facts}: expected an object, got {type(read).__name__}; evaluate again")
    check_predictions(records, str(predictions))
    return Evaluation(name, records, read)


def compare_evaluations(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Return the scores of all evaluations, and the differences of the others from the first one.

    Scores are over all questions of an evaluation, and differences over the common ones.

    Raises:
        EvaluationError: two evaluations are of different benchmarks, have no question in common, or the same id stands
            for different questions.
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
    blind = [evaluation.name for evaluation in evaluations if is_blind(evaluation.facts)]
    if blind:
        result["without_video"] = blind
    for other in others:
        before, after = ({record["id"]: record for record in e.records} for e in (base, other))
        common = [name for name in before if name in after]
        _check_same_questions(base, other, [(before[name], after[name]) for name in common])
        result["differences"][other.name] = {
            **compare(other.records, base.records),
            "common": len(common),
            "only_before": [name for name in before if name not in after],
            "only_after": [name for name in after if name not in before],
            "protocol": _protocol_differences(base, other),
        }
        if base.name in blind and other.name not in blind and base.facts.get("benchmark") == "videommmu":
            result["differences"][other.name]["knowledge_gain"] = knowledge_gain(
                [(before[name], after[name]) for name in common]
            )
    return result


def knowledge_gain(pairs: Sequence[tuple[dict, dict]]) -> dict[str, Any] | None:
    """Return Video-MMMU's knowledge gain, (after - before) / (1 - before) of the accuracies of adaptation.

    Args:
        pairs: predictions without and with the video for each question.
    Returns:
        `mean` (the gain), `low` and `high` (its 95% interval, clustered by video), `before`, `after`, `n` and
        `clusters`; None without questions of adaptation, or if all of them were right before. The interval is that of
        the mean of the gain's linearization (delta method).
    Source: Video-MMMU (arXiv 2501.13826), delta knowledge.
    """
    pairs = [pair for pair in pairs if pair[1].get("groups", {}).get("track") == "adaptation"]
    before, after = ([pair[side]["score"] for pair in pairs] for side in (0, 1))
    if not pairs or (wrong := 1 - sum(before) / len(before)) <= 0:
        return None
    gain = 1 - (1 - sum(after) / len(after)) / wrong
    # The derivatives of 1 - (1 - after) / (1 - before) are 1 / wrong and (gain - 1) / wrong.
    linear = [
        gain + (a - (1 - wrong * (1 - gain)) + (gain - 1) * (b - (1 - wrong))) / wrong
        for b, a in zip(before, after, strict=True)
    ]
    rows = [{"score": value, "cluster": record["cluster"]} for value, (_, record) in zip(linear, pairs, strict=True)]
    return {**difference_entry(rows), "before": 1 - wrong, "after": sum(after) / len(after)}


def _check_same_questions(base: Evaluation, other: Evaluation, common: Sequence[tuple[dict, dict]]) -> None:
    """Raise EvaluationError if two evaluations cannot be paired.

    Args:
        base, other: the evaluations.
        common: the predictions of both for each id that both have.
    """
    asked = [evaluation.facts.get("benchmark") or "a question file" for evaluation in (base, other)]
    changed = [(before, after) for before, after in common if before["asked_hash"] != after["asked_hash"]]
    if asked[0] != asked[1]:
        got = f"questions of {asked[1]} instead of {asked[0]}"
    elif changed:
        before, after = changed[0]
        tasks = before["task_type"], after["task_type"]
        how = "is {} and {}".format(*tasks) if tasks[0] != tasks[1] else "has another text, other options or answer"
        got = f"question {before['id']!r}, which {how} (and {len(changed) - 1} more)"
    elif not common:
        got = "none"
    else:
        return
    raise EvaluationError(
        f"{other.name}: expected questions in common with {base.name}, got {got}; compare evaluations of the same "
        "questions"
    )


def _protocol_differences(base: Evaluation, other: Evaluation) -> list[str]:
    protocols = [evaluation.facts.get("protocol") for evaluation in (base, other)]
    unknown = [e.name for e, value in zip((base, other), protocols, strict=True) if not isinstance(value, dict)]
    if unknown:
        return [f"unknown, because {' and '.join(unknown)} recorded no protocol"]
    return differences_of(*protocols)


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
            if not (entry := entry_at(student, path)):
                continue
            change = entry_at(difference, path) if difference else None
            text = f"{100 * entry['mean']:5.1f}{_bounds(entry)}  n={entry['n']}, videos={entry['clusters']}"
            lines.append(f"  {label:<{width}}  {text}" + (f"  {_points(change)}" if change else ""))
        if difference:
            lines += _remarks(base, name, difference)
        if gain := (difference or {}).get("knowledge_gain"):
            text = f"adaptation {100 * gain['before']:.1f} without the video, {100 * gain['after']:.1f} with it"
            lines.append(f"  knowledge gain of Video-MMMU: {_points(gain)} percent ({text}; n={gain['n']})")
        if name in result.get("without_video", ()):
            lines.append(f"  WITHOUT VIDEO: {name} was evaluated with evaluate.without_video=true")
    readings = set(result["parse"].values())
    if len(readings) > 1:
        lines.append(
            "WARNING: the evaluations read answers differently (evaluate.parse: "
            + ", ".join(f"{name} {reading}" for name, reading in result["parse"].items())
            + "); compare the rows strict and lenient"
        )
    if len({"judged" in student for student in students.values()}) > 1:
        named = ", ".join(name for name, student in students.items() if "judged" in student)
        lines.append(f"WARNING: only {named} had a judge (evaluate.judge); compare the rows strict and lenient")
    for name, student in students.items():
        lines += benchmark_lines(name, result["benchmark"], student)
    numbers = [student["all"]["n"] for student in students.values()]
    judged = all("judged" in student for student in students.values())
    if set(students) <= set(result.get("without_video", ())):
        return "\n".join(lines)
    return "\n".join([*lines, *paper_lines(result["benchmark"], numbers, judged=judged)])


def _rows(students: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows: dict[tuple[str, ...], str] = {("all",): "all", ("closed",): "closed"}
    rows |= {(reading, "closed"): f"closed, {reading}" for reading in READINGS}
    rows |= {("sampled", "closed"): "closed, sampled", ("meaning",): "meaning"}
    for student in students.values():
        rows |= {("tasks", task): task for task in student["tasks"]}
    return [*((label, path) for path, label in rows.items()), *detail_rows(students.values())]


def _remarks(base: str, name: str, difference: Mapping[str, Any]) -> list[str]:
    lines = []
    for questions, owner in ((difference["only_before"], base), (difference["only_after"], name)):
        if questions:
            shown = ", ".join(questions[:_MOST_NAMED]) + (", …" if len(questions) > _MOST_NAMED else "")
            number = f"{counted(len(questions), 'question')} {'is' if len(questions) == 1 else 'are'}"
            lines.append(f"  {number} only in {owner}, and not in the difference: {shown}")
    lines += [f"  evaluated differently: {change}" for change in difference["protocol"]]
    return lines


def _points(change: Mapping[str, Any]) -> str:
    bounds = "" if change["low"] is None else f" [{100 * change['low']:+.1f}, {100 * change['high']:+.1f}]"
    return f"{100 * change['mean']:+.1f}{bounds}"


def _bounds(entry: Mapping[str, Any]) -> str:
    return "" if entry["low"] is None else f" [{100 * entry['low']:5.1f}, {100 * entry['high']:5.1f}]"
