"""Compare stage 2 with its control after equal numbers of steps, from the held-out answers of a run so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rmsd_fast.config import MEASURES
from rmsd_fast.stages.summaries import compare, signed_interval, summarize

# Name of the student that a stage trains.
STUDENT_OF = {"distill": "stage2", "control": "control"}


def interim_name(stage: str, step: int) -> str:
    """Return the name of a student in training, which is the stem of the file with its answers."""
    return f"{STUDENT_OF[stage]}@{step}"


def interim_steps(run_folder: Path) -> list[int]:
    """Return the steps after which a student in training has answered the held-out questions, ascending."""
    stems = [path.stem for path in (run_folder / "predictions").glob("*@*.jsonl")]
    return sorted({int(stem.partition("@")[2]) for stem in stems if stem.partition("@")[2].isdecimal()})


def measure_progress(steps: Sequence[int], last: int, read: Callable[[str], list[dict] | None]) -> list[dict[str, Any]]:
    """Return the scores of stage 2 and its control by step, with their paired differences.

    Args:
        steps: steps after which a student in training was evaluated.
        last: number of steps of stage 2 and of the control.
        read: function that returns the answers of a student by its name, or None.
    Returns:
        One entry per step, from 0 (the stage-1 student) to `last`: {"step", "students", "differences"}, each in the
        form of `summarize` and `compare`. It is empty without answers of a student in training.
    """
    if not steps:
        return []
    start = read("stage1")
    entries = []
    for step in (0, *steps, last):
        answers = {}
        for student in STUDENT_OF.values():
            records = start if step == 0 else read(student if step == last else f"{student}@{step}")
            if records is not None:
                answers[student] = records
        if not answers:
            continue
        differences = {}
        if step and "stage2" in answers and "control" in answers:
            differences["stage2-control"] = _compare(answers["stage2"], answers["control"])
        if step and start is not None:
            differences |= {f"{name}-stage1": _compare(records, start) for name, records in answers.items()}
        students = {name: summarize(records, details=False) for name, records in answers.items()}
        entries.append({"step": step, "students": students, "differences": differences})
    return entries


def _compare(after: list[dict], before: list[dict]) -> dict:
    return compare(after, before, details=False)


def measured(result: Mapping[str, Any]) -> dict[str, dict]:
    """Return the entries that measure a student, or a difference: of greedy and, if there are any, sampled answers."""
    entries = {}
    for answers, scores in (("greedy", result), ("sampled", result.get("sampled", {}))):
        key = next((key for key in MEASURES if key in scores), None)
        if key is not None:
            entries[answers] = scores[key]
    return entries


def describe_progress(entries: Sequence[Mapping[str, Any]], stage: str, step: int, *, judged: bool) -> list[str]:
    """Return lines about a student in training: its score, and its differences from stage 1 and the control.

    Args:
        entries: result of `measure_progress`.
        stage: stage that trains the student.
        step: number of its steps so far.
        judged: whether a discriminator is trained.
    """
    entry = next((entry for entry in entries if entry["step"] == step), None)
    student = STUDENT_OF[stage]
    if entry is None or not (scores := measured(entry["students"].get(student, {}))):
        return []
    shown = ", ".join(f"{name} {score['mean']:.3f}" for name, score in scores.items())
    lines = [f"{stage} step {step}, held-out: {shown}"]
    for key, difference in entry["differences"].items():
        if key.startswith(f"{student}-"):
            shown = [f"{name} {signed_interval(d)}" for name, d in measured(difference).items()]
            lines.append(f"  {key}: {', '.join(shown)}")
    return lines + warn_if_behind(entry["differences"], judged=judged)


def warn_if_behind(differences: Mapping[str, Any], *, judged: bool) -> list[str]:
    """Return a warning if stage 2 is worse than its control or stage 1, by an interval over questions."""
    lines = []
    advice = "Lower distill.lr, raise distill.kl_coef, or continue with imitation"
    if judged:
        advice = (
            "Compare teacher/headroom and discriminator/content_correlation in the report; lower reward.alpha or "
            "distill.lr, or continue with imitation"
        )
    for key, baseline in (("stage2-control", "more imitation (the control)"), ("stage2-stage1", "the stage-1 student")):
        behind = [name for name, d in measured(differences.get(key, {})).items() if (d["high"] or 0) < 0]
        if behind:
            answers = " and ".join(behind)
            lines.append(f"WARNING: stage 2 is behind {baseline} in {answers} answers. {advice}")
    return lines
