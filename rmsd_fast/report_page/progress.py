"""Render the held-out scores of stage 2 and its control during training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rmsd_fast.config import MEASURES
from rmsd_fast.report_page.evaluation import interval, value, verdict
from rmsd_fast.report_page.svg import Series, curve_chart

_NAMES = {"stage2": "stage 2", "control": "control"}
_TITLE = "Held-out score during stage 2"


def progress_section(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return charts and a table of scores by step, or "" if the run was not evaluated during training."""
    if not entries:
        return ""
    charts, rows = [], []
    for answers in ("greedy", "sampled"):
        series = []
        for student, name in _NAMES.items():
            scores = [(int(e["step"]), _measured(e["students"].get(student), answers)) for e in entries]
            points = [(step, value(score, "mean")) for step, score in scores if score is not None]
            if points:
                series.append(Series(name, *map(tuple, zip(*points, strict=True))))
        if series:
            charts.append(
                curve_chart(
                    f"{answers.capitalize()} answers",
                    "mean score; step 0 is the stage-1 student",
                    series,
                    smoothed=False,
                )
            )
    for entry in entries:
        for answers in ("greedy", "sampled"):
            scores = [_measured(entry["students"].get(student), answers) for student in _NAMES]
            if not any(scores):
                continue
            difference = _measured(entry["differences"].get("stage2-control"), answers)
            kind, words = verdict(difference) if difference else ("", "")
            remark = f'<small class="{kind}">{words}</small>' if words else ""
            cells = "".join(f"<td>{interval(score)}</td>" for score in scores)
            rows.append(
                f'<tr><th scope="row">{int(entry["step"])}</th><td>{answers}</td>{cells}'
                f"<td>{interval(difference, sign=True)}{remark}</td></tr>"
            )
    head = "".join(f"<th>{name}</th>" for name in _NAMES.values())
    return (
        f'<h3>{_TITLE}</h3><p class="muted">Stage 2 and its control started from the same student and are compared '
        "after equal numbers of steps. If stage 2 stays below the control, more imitation is the better use of the "
        "time.</p>"
        f'<div class="charts">{"".join(charts)}</div>'
        '<div class="card scroll" tabindex="0" role="region" aria-label="Scores by step"><table><thead><tr>'
        f"<th>step</th><th>answers</th>{head}<th>stage 2 − control</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _measured(result: Mapping[str, Any] | None, answers: str) -> Mapping[str, Any] | None:
    """Return the entry over closed questions or, without any, of the meaning of open answers."""
    part = (result or {}).get("sampled", {}) if answers == "sampled" else (result or {})
    entry = next((part[key] for key in MEASURES if key in part), None)
    return entry if entry and math.isfinite(value(entry, "mean")) else None
