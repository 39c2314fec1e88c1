"""Render the teacher section of the report: how quality varies across and within questions, by task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from rmsd_fast.method.answers import TASK_TYPES
from rmsd_fast.method.natural import REASONS
from rmsd_fast.report_page.evaluation import SIMULATED, in_order, percent, value
from rmsd_fast.report_page.intervals import IntervalRow, Mark, interval_figure, mark_legend
from rmsd_fast.report_page.svg import number
from rmsd_fast.report_page.text import visible

_COLUMNS = (
    ("mean", "quality, mean", number),
    ("sd_across", "sd across questions", number),
    ("sd_within", "sd within a question", number),
    ("low", "lowest", number),
    ("high", "highest", number),
    ("valid_share", "valid %", percent),
    ("as_sent_share", "valid as sent %", percent),
    ("kept_share", "kept %", percent),
    ("truncated_share", "cut %", percent),
    ("empty_share", "questions left empty %", percent),
)
PAPER = (
    "For comparison, the teacher of arXiv 2603.11423 on 200 inputs: mean 0.75, sd 0.22 across inputs; multiple "
    "choice 0.96, visual question answering 0.64; sd within an input 0.07 to 0.15; broken formats 1%, up to 10% on "
    "temporal questions; 72% kept at 0.3."
)
_LANES = (("sd_across", "sd across questions", 1, "square"), ("sd_within", "sd within a question", 2, "diamond"))


def teacher_section(statistics: Mapping[str, Any] | None) -> str:
    """Return the table and chart of `teacher.diagnostics.pool_statistics`, or a sentence if the run has none."""
    head = '<h2 id="teacher">Teacher responses</h2>'
    tasks = (statistics or {}).get("tasks")
    if not isinstance(tasks, Mapping) or not any(tasks.values()):
        return f'{head}<p class="muted">This run has no statistics of the teacher pool (no teacher.json).</p>'
    groups = [(task, tasks[task]) for task in in_order(list(tasks), TASK_TYPES) if isinstance(tasks[task], Mapping)]
    totals = [
        (name, statistics[key]) for key, name in (("closed", "all closed"), ("all", "all")) if statistics.get(key)
    ]
    lead = (
        f"Quality of the first {visible(statistics.get('responses', '?'))} responses per training question. Invalid "
        f"responses count as 0; responses of at least {visible(statistics.get('min_quality', '?'))} are kept. Open "
        "questions have no metric: a valid answer counts as 1. "
        + _unlabeled_words(statistics)
        + _parse_words(statistics)
    )
    simulated = f"<p><b>{SIMULATED}: these numbers describe the simulation.</b></p>" if is_simulated(statistics) else ""
    return (
        f'{head}{simulated}<p class="muted">{lead}</p>{quality_table(groups, totals)}'
        f'<div class="split">{quality_chart(groups)}</div>'
        f'<p class="muted small">{PAPER}</p>'
    )


def _unlabeled_words(statistics: Mapping[str, Any]) -> str:
    """Return how many questions lack a ground truth; "" if none does."""
    count = value(statistics.get("all") or {}, "unlabeled")
    if not count > 0:
        return ""
    return (
        f"Closed questions without ground truth: {count:.0f}. The quality of a response to them is its agreement with "
        "the other responses. "
    )


def _parse_words(statistics: Mapping[str, Any]) -> str:
    """Return how answers were parsed, and why some could not be used; "" for runs of earlier versions."""
    parse, reasons = statistics.get("parse"), (statistics.get("all") or {}).get("reasons")
    words = f"Read with teacher.parse={visible(parse)}." if parse else ""
    if isinstance(reasons, Mapping) and reasons:
        counts = ", ".join(f"{visible(REASONS.get(reason, reason))}: {visible(n)}" for reason, n in reasons.items())
        words += f" Why answers could not be used: {counts}."
    return words


def is_simulated(statistics: Mapping[str, Any] | None) -> bool:
    return bool((statistics or {}).get("teacher_simulated"))


def quality_chart(groups: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the chart of mean and spread by task; `groups` has the names and statistics of the tasks."""
    rows = []
    for task, group in groups:
        mean = value(group, "mean")
        marks = []
        for key, name, color, shape in _LANES:
            sd = value(group, key)
            if math.isfinite(mean) and math.isfinite(sd):
                text = f"{task}: mean {number(mean)}, {name} {number(sd)}"
                marks.append(Mark(mean, mean - sd, mean + sd, color, shape, text))
        rows.append(IntervalRow(task, tuple(marks)))
    legend = mark_legend([(f"mean ± {name}", color, shape) for _, name, color, shape in _LANES], floor=False)
    hint = "spread between questions, and between the answers to one question"
    return interval_figure("Quality by task", hint, rows, legend, (0.0, 1.0))


def quality_table(groups: list[tuple[str, Mapping[str, Any]]], totals: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Return the table of the statistics by task, followed by those over several tasks."""
    head = "".join(f'<th class="fold">{escape(name)}</th>' for _, name, _ in _COLUMNS)
    body = []
    for index, (name, group) in enumerate([*groups, *totals]):
        cells = "".join(f"<td>{form(value(group, key))}</td>" for key, _, form in _COLUMNS)
        n = value(group, "questions")
        count = f"{n:.0f}" if math.isfinite(n) else "–"
        kind = ' class="sum"' if index == len(groups) else ""
        body.append(f'<tr{kind}><th scope="row">{visible(name)}</th><td>{count}</td>{cells}</tr>')
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Teacher statistics"><table><thead><tr>'
        f'<th>task</th><th class="fold">questions</th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
