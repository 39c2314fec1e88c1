"""Show the result of an evaluation as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmsd_fast.data.errors import counted
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.stages.answer_records import REASONS
from rmsd_fast.stages.paper_numbers import paper_lines, scoring_mark
from rmsd_fast.stages.summaries import READINGS, signed_interval
from rmsd_fast.stages.summary_rows import detail_rows, entry_at

Entry = Mapping[str, Any]


def format_table(result: Mapping[str, Any]) -> str:
    """Return the scores as text.

    There is one line per task type, then the meaning of open answers, all closed questions, the closed questions of
    sampled answers, both readings of the closed questions, and those that could be used. Groups, pass@k and the
    differences follow.
    """
    students = result["students"]
    rows = detail_rows(students.values())
    width = max([9, *(len(label) for label, _ in rows)])
    lines = [f"{'task':<{width}} floor  " + "  ".join(f"{name:>20}" for name in students)]

    def add(label: str, entries: list[Entry | None], floor: float | None = None) -> None:
        if any(entries):
            shown = "-" if floor is None else f"{floor:.3f}"
            lines.append(f"{label:<{width}} {shown:>5}  " + "  ".join(f"{_cell(entry):>20}" for entry in entries))

    for task in [*ALL_TASKS, "meaning", "closed", "sampled", *READINGS, "usable"]:
        floor = result["floors"].get(task, {}).get("score")
        add(task, [row_of(student, task) for student in students.values()], floor)
    for label, path in rows:
        add(label, [entry_at(student, path) for student in students.values()])
    for name, student in students.items():
        lines += _remarks(name, student, result.get("unusable", {}).get(name))
        lines += benchmark_lines(name, result.get("benchmark"), student)
    for name, difference in result["differences"].items():
        for row, label in (("closed", "closed tasks"), ("sampled", "closed tasks, sampled"), ("meaning", "meaning")):
            if entry := row_of(difference, row):
                lines.append(f"{name}, {label}: {signed_interval(entry)}")
    if is_blind(result):
        lines.append("WITHOUT VIDEO: the questions were asked without their videos (evaluate.without_video=true)")
    if subtitles := result.get("subtitles"):
        lost, files = counted(subtitles["missing"], "question"), counted(len(subtitles["missing_files"]), "file")
        missing = f"; {files} missing, so {lost} had none" if subtitles["missing"] else ""
        lines.append(f"subtitles: {counted(subtitles['questions'], 'question')} with subtitles{missing}")
    numbers = (student["all"]["n"] for student in students.values())
    judged = all("judged" in student for student in students.values())
    paper = [] if is_blind(result) else paper_lines(result.get("benchmark"), numbers, judged=judged)
    return "\n".join([*lines, *paper])


def is_blind(result: Mapping[str, Any]) -> bool:
    """Return whether the questions of an `evaluation.json` were asked without their videos."""
    return entry_at(result, ("protocol", "evaluate", "without_video")) is True


def benchmark_lines(name: str, benchmark: str | None, student: Entry) -> list[str]:
    """Return a line per reading with a benchmark's own numbers, or nothing for other questions.

    They are in percent, as the paper's scores below them; the logarithms of V-STaR's LGM are times 100 too.
    """
    return [
        f"{name}, {benchmark}{scoring_mark(benchmark, reading, student.get('decided'))}, {reading}, in percent: "
        f"{_numbers(own)}"
        for reading, own in student.get("benchmark", {}).items()
    ]


def _numbers(own: Mapping[str, Any]) -> str:
    """Return the numbers of `benchmarks.aggregate` as text, those of its parts after a semicolon."""
    single = ", ".join(f"{key} {100 * value:.1f}" for key, value in own.items() if not isinstance(value, Mapping))
    parts = (f"{key}: {_numbers(value)}" for key, value in own.items() if isinstance(value, Mapping))
    return "; ".join(filter(None, [single, *parts]))


def row_of(result: Entry, row: str) -> Entry | None:
    """Return the numbers of one line of the table: a task type, `closed`, `meaning`, or those of closed tasks in
    another part of the result: `sampled`, `strict`, `lenient` or `usable`."""
    if row in ("sampled", "usable", *READINGS):
        return result.get(row, {}).get("closed")
    return result.get(row) if row in ("closed", "meaning") else result["tasks"].get(row)


def _remarks(name: str, student: Entry, unusable: Entry | None) -> list[str]:
    lines = []
    entry = student.get("closed") or student["all"]
    if share := entry.get("only_lenient_share"):
        lines.append(f"{name}: {share:.1%} of the answers could only be read leniently")
    for other, gain in student.get("sampled", {}).get("best_gain", {}).items():
        what = {"greedy": "the greedy answer", "sampled": "the mean", "majority": "the majority"}[other]
        lines.append(f"{name}, best of the samples minus {what}: {signed_interval(gain)}")
    if entry["low"] is None:
        reason = "there is only one question" if entry["n"] == 1 else f"all {entry['n']} questions are about one video"
        lines.append(f"{name}: there is no interval, because {reason}")
    if unusable and unusable["count"]:
        reasons = ", ".join(f"{count} because {REASONS[reason]}" for reason, count in unusable["reasons"].items())
        number = counted(unusable["count"], "question")
        lines.append(f"{name}: {number} could not be used and got score 0 ({reasons})")
    return lines


def _cell(entry: Entry | None) -> str:
    if not entry:
        return "-"
    if entry["low"] is None:
        return f"{entry['mean']:.3f}"
    return f"{entry['mean']:.3f} [{entry['low']:.2f}, {entry['high']:.2f}]"
