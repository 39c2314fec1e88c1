"""Render the evaluation section of the report, and the picture for a README."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rmsd_fast.config import DIFFERENCES
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.report_page.curves import PAIR_ACCURACY
from rmsd_fast.report_page.intervals import IntervalRow, Mark, interval_figure, interval_svg, mark_legend
from rmsd_fast.report_page.run_folder import ReportedRun, ReportError
from rmsd_fast.report_page.samples import STUDENT_ORDER
from rmsd_fast.report_page.style import svg_style
from rmsd_fast.report_page.svg import curve_svg
from rmsd_fast.report_page.text import visible
from rmsd_fast.stages.summary_rows import detail_rows, entry_at

STYLES = {"untrained": (6, "circle"), "stage1": (1, "square"), "stage2": (2, "diamond"), "control": (4, "circle")}
_MORE_STYLES = ((5, "square"), (3, "circle"), (7, "diamond"), (8, "circle"))
# Size of a curve in the picture.
_PLOT_WIDTH, _PLOT_HEIGHT = 288, 180
SIMULATED = "The teacher was simulated"
# Rows in addition to the task types, and their labels.
_TOTALS = {"meaning": "meaning", "closed": "all closed", "all": "all"}


def student_names(run: ReportedRun) -> dict[str, str]:
    """Return the students' names on the page."""
    names = {"untrained": "untrained", "stage1": "stage 1", "stage2": "stage 2", "control": "control"}
    for key in (run.evaluation or {}).get("students", {}):
        names.setdefault(str(key), str(key))
    return names


def in_order(keys: Sequence[str], order: Sequence[str]) -> list[str]:
    """Return known keys in the given order, then unknown keys."""
    return [k for k in order if k in keys] + [k for k in keys if k not in order]


def value(entry: Mapping[str, Any] | None, key: str) -> float:
    """Return a number of an evaluation entry, or NaN if it has none."""
    item = (entry or {}).get(key)
    is_numeric = isinstance(item, int | float) and not isinstance(item, bool)
    return float(item) if is_numeric else math.nan


def percent(share: float, sign: bool = False) -> str:
    if not math.isfinite(share):
        return "–"
    text = f"{100 * share:{'+' if sign else ''}.1f}"
    return text.replace("-", "−")


def interval(entry: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Return `62.1 [55.0, 69.2]` in percent, or a dash if nothing was measured."""
    mean, low, high = (value(entry, key) for key in ("mean", "low", "high"))
    if not math.isfinite(mean):
        return "–"
    if not (math.isfinite(low) and math.isfinite(high)):
        return percent(mean, sign)
    return f"{percent(mean, sign)} [{percent(low, sign)}, {percent(high, sign)}]"


def verdict(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return CSS class and words for the position of a difference's interval relative to 0."""
    low, high = value(entry, "low"), value(entry, "high")
    if not (math.isfinite(low) and math.isfinite(high)):
        return "same", "no interval"
    if low > 0:
        return "up", "above 0"
    if high < 0:
        return "down", "below 0"
    return "same", "contains 0"


def difference_name(key: str, names: Mapping[str, str]) -> str:
    """Return `stage1-untrained` as `stage 1 − untrained`."""
    left, _, right = key.partition("-")
    return f"{names.get(left, left)} − {names.get(right, right)}" if right else key


def _tasks(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    seen: list[str] = []
    for result in results.values():
        seen.extend(task for task in result.get("tasks", {}) if task not in seen)
    return in_order(seen, ALL_TASKS)


def _entry(result: Mapping[str, Any], task: str) -> Mapping[str, Any] | None:
    entry = result.get(task) if task in _TOTALS else result.get("tasks", {}).get(task)
    return entry if isinstance(entry, Mapping) else None


def _rows(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    totals = [t for t in _TOTALS if any(isinstance(r.get(t), Mapping) for r in results.values())]
    return [*_tasks(results), *totals]


def _labels(task: str) -> str:
    return _TOTALS.get(task, task)


def _style(key: str, keys: Sequence[str]) -> tuple[int, str]:
    if key in STYLES:
        return STYLES[key]
    return _MORE_STYLES[[k for k in keys if k not in STYLES].index(key) % len(_MORE_STYLES)]


def _mark(entry: Mapping[str, Any], style: tuple[int, str], text: str, sign: bool = False) -> Mark:
    mean, low, high = (value(entry, key) for key in ("mean", "low", "high"))
    low, high = (low if math.isfinite(low) else mean), (high if math.isfinite(high) else mean)
    return Mark(mean, low, high, *style, f"{text}: {interval(entry, sign)}")


def score_rows(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> list[IntervalRow]:
    """Return the rows of the score chart: one per task, then all closed tasks."""
    students = evaluation["students"]
    keys = in_order(list(students), STUDENT_ORDER)
    rows = []
    for task in [t for t in _rows(students) if t != "all"]:
        marks = []
        for key in keys:
            entry = _entry(students[key], task)
            if entry is not None:
                marks.append(_mark(entry, _style(key, keys), f"{_labels(task)}, {names[key]}"))
        floor = value(evaluation["floors"].get(task), "score")
        rows.append(IntervalRow(_labels(task), tuple(marks), floor if math.isfinite(floor) else None))
    return rows


def _score_table(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> str:
    students, floors = evaluation["students"], evaluation["floors"]
    keys = in_order(list(students), STUDENT_ORDER)
    head = "".join(f"<th>{visible(names[key])}</th>" for key in keys)
    body = []
    for task in _rows(students):
        entries = [_entry(students[key], task) for key in keys]
        n = next((int(value(e, "n")) for e in entries if math.isfinite(value(e, "n"))), None)
        floor = floors.get(task)
        always = f"<small>always “{visible(str(floor['answer'])[:24])}”</small>" if floor and "answer" in floor else ""
        cells = []
        for entry in entries:
            valid = value(entry, "valid_share")
            extra = f"<small>valid format {percent(valid)}</small>" if math.isfinite(valid) else ""
            cells.append(f"<td>{interval(entry)}{extra}</td>")
        total = ' class="sum"' if task == "closed" else ""
        body.append(
            f'<tr{total}><th scope="row">{visible(_labels(task))}</th><td>{n if n is not None else "–"}</td>'
            f"<td>{percent(value(floor, 'score'))}{always}</td>{''.join(cells)}</tr>"
        )
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Scores"><table><thead><tr><th>task</th>'
        f"<th>n</th><th>floor</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


# Further scores of closed questions, before those of groups and samples.
_READINGS = (
    ("closed, strict format", ("strict", "closed")),
    ("closed, any clear statement", ("lenient", "closed")),
    ("closed, only questions that could be used", ("usable", "closed")),
)


def _detail_table(evaluation: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return a table of readings, usable questions, groups and samples, or "" without them (earlier versions)."""
    students = evaluation["students"]
    keys = in_order(list(students), STUDENT_ORDER)
    body = []
    for label, path in (*_READINGS, *detail_rows(students.values())):
        found = [entry_at(students[key], path) for key in keys]
        entries = [entry if isinstance(entry, Mapping) else {} for entry in found]
        if any(entries):
            n = next((int(value(e, "n")) for e in entries if math.isfinite(value(e, "n"))), "–")
            cells = "".join(f"<td>{interval(entry)}</td>" for entry in entries)
            body.append(f'<tr><th scope="row">{visible(label)}</th><td>{n}</td>{cells}</tr>')
    if not body:
        return ""
    head = "".join(f"<th>{visible(names[key])}</th>" for key in keys)
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Further scores"><table><thead><tr>'
        f"<th>questions</th><th>n</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _difference_table(differences: Mapping[str, Any], names: Mapping[str, str]) -> str:
    head = "".join(f"<th>{visible(difference_name(key, names))}</th>" for key in differences)
    body = []
    for task in _rows(differences):
        cells = []
        for difference in differences.values():
            entry = _entry(difference, task)
            kind, words = verdict(entry)
            extra = f'<small class="{kind}">{words}</small>' if entry is not None else ""
            cells.append(f"<td>{interval(entry, sign=True)}{extra}</td>")
        total = ' class="sum"' if task == "closed" else ""
        body.append(f'<tr{total}><th scope="row">{visible(_labels(task))}</th>{"".join(cells)}</tr>')
    return (
        '<div class="card scroll" tabindex="0" role="region" aria-label="Differences"><table><thead><tr><th>task</th>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _difference_chart(differences: Mapping[str, Any], names: Mapping[str, str]) -> str:
    keys = list(differences)
    styles = {f"{after}-{before}": STYLES[after] for after, before in DIFFERENCES if before != "control"}
    rows, ends = [], [-0.05, 0.05]
    for task in [t for t in _rows(differences) if t != "all"]:
        marks = []
        for i, key in enumerate(keys):
            entry = _entry(differences[key], task)
            if entry is None:
                continue
            style = styles.get(key, _MORE_STYLES[i % len(_MORE_STYLES)])
            mark = _mark(entry, style, f"{_labels(task)}, {difference_name(key, names)}", sign=True)
            ends.extend(v for v in (mark.low, mark.high) if math.isfinite(v))
            marks.append(mark)
        rows.append(IntervalRow(_labels(task), tuple(marks)))
    domain = (math.floor(min(ends) * 20) / 20, math.ceil(max(ends) * 20) / 20)
    legend = mark_legend(
        [(difference_name(k, names), *styles.get(k, _MORE_STYLES[i % 4])) for i, k in enumerate(keys)], floor=False
    )
    return interval_figure(
        "Differences between students",
        "percentage points on the same questions, 95% intervals; the dashed line marks no difference",
        rows,
        legend,
        domain,
        tick_text=_signed_percent,
        zero=True,
    )


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _signed_percent(share: float) -> str:
    return f"{100 * share:+.0f}".replace("-", "−") if share else "0"


def evaluation_section(run: ReportedRun) -> str:
    """Return scores and differences, as tables and as charts."""
    evaluation, names = run.evaluation, student_names(run)
    head = '<h2 id="evaluation">Evaluation on held-out questions</h2>'
    if evaluation is None or not evaluation["students"]:
        return f'{head}<p class="muted">This run has not been evaluated (no evaluation.json).</p>'
    keys = in_order(list(evaluation["students"]), STUDENT_ORDER)
    legend = mark_legend([(names[k], *_style(k, keys)) for k in keys], floor=bool(evaluation["floors"]))
    lead = (
        f"{visible(evaluation.get('questions', '?'))} questions, greedy answers, score in percent with 95% intervals"
        f"{', clustered by video' if 'videos' in evaluation else ''}. "
        "The floor is the best score of a constant answer to all questions. Open questions have no metric; their score "
        "is the share of valid answers."
    )
    if any("meaning" in student for student in evaluation["students"].values()):
        lead += (
            " “Meaning” is the share of open answers about generated clips that state color, shape and place "
            "correctly. Training does not use it."
        )
    rows = score_rows(evaluation, names)
    hint = "percent, 95% intervals"
    chart = interval_figure("Score by task", hint, rows, legend, (0.0, 1.0), tick_text=_whole_percent)
    differences = evaluation["differences"]
    charts = chart + (_difference_chart(differences, names) if differences else "")
    out = [head, f'<p class="muted">{lead}</p><div class="split">{charts}</div>', _score_table(evaluation, names)]
    out.append(_detail_table(evaluation, names))
    if differences:
        out.append(_difference_table(differences, names))
        out.append(
            '<p class="muted small">Differences are paired: both students answered the same questions. An interval '
            "that contains 0 means that this number of questions shows no difference, not that there is none.</p>"
        )
    return "".join(out)


def evaluation_picture(run: ReportedRun) -> str:
    """Return an SVG for a README: scores by task, stage-1 loss and pair accuracy, on a card.

    Raises:
        ReportError: the run has no evaluation.
    """
    if run.evaluation is None or not run.evaluation["students"]:
        raise ReportError(f"{run.folder}: expected an evaluation.json with students, got none; evaluate the run first")
    names = student_names(run)
    keys = in_order(list(run.evaluation["students"]), STUDENT_ORDER)
    curves = _picture_curves(run)
    width, pad, top = 840, 24, 104
    chart_width = 500 if curves else width - 2 * pad
    rows = score_rows(run.evaluation, names)
    svg, tall = interval_svg(rows, "Score by task", domain=(0.0, 1.0), tick_text=_whole_percent, width=chart_width)
    height = top + max(tall, 210 * len(curves)) + 16
    simulated = f" {SIMULATED}." if run.evaluation.get("teacher_simulated") else ""
    questions = visible(run.evaluation.get("questions", "?"))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="Held-out scores by task"><style>{svg_style()}</style>',
        f'<rect class="board" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="12"/>',
        f'<text class="th" x="{pad}" y="34">Held-out score by task, percent, 95% intervals</text>',
        f'<text class="t" x="{pad}" y="54">{questions} questions, run {visible(run.folder.name)}.{simulated}</text>',
        _picture_legend([(names[k], *_style(k, keys)) for k in keys], pad, 80, bool(run.evaluation["floors"])),
        _place(svg, pad, top, chart_width, tall),
    ]
    left = pad + chart_width + 12
    for index, (title, plot) in enumerate(curves):
        y = top - 20 + index * 212
        out.append(f'<text class="tb" x="{left + 10}" y="{y}">{title}</text>')
        out.append(_place(plot, left, y + 8, _PLOT_WIDTH, _PLOT_HEIGHT))
    return "".join(out) + "</svg>\n"


def _picture_curves(run: ReportedRun) -> list[tuple[str, str]]:
    """Return (title, drawing) of the curves next to the scores, if the run has them."""
    out = []
    loss = run.metrics.get("sft", {}).get("loss")
    pairs = run.metrics.get("distill", {}).get("discriminator/pair_accuracy")
    size = {"width": _PLOT_WIDTH, "height": _PLOT_HEIGHT}
    if loss:
        out.append(("Stage 1: loss by step", curve_svg([loss], "Loss", include=(0.0,), **size)[0]))
    if pairs:
        drawn, _ = curve_svg([pairs], "Pair accuracy", y_range=(0.0, 1.0), warn=PAIR_ACCURACY.warn, **size)
        out.append(("Stage 2: discriminator pair accuracy", drawn))
    # A picture has no script, so the script's data are removed.
    strip = re.compile(r' data-plot="[^"]*"|<line class="cursor"[^>]*/>')
    return [(title, strip.sub("", drawn)) for title, drawn in out]


def _place(svg: str, x: float, y: float, width: float, height: float) -> str:
    """Return a drawing with a position and size inside another drawing."""
    return svg.replace("<svg ", f'<svg x="{x}" y="{y}" width="{width}" height="{height}" overflow="visible" ', 1)


def _picture_legend(entries: Sequence[tuple[str, int, str]], x: float, y: float, floor: bool) -> str:
    out = []
    for name, color, shape in entries:
        shapes = {
            "circle": f'<circle class="f{color}" cx="{x + 6}" cy="{y}" r="5"/>',
            "square": f'<rect class="f{color}" x="{x + 1.5}" y="{y - 4.5}" width="9" height="9"/>',
            "diamond": f'<path class="f{color}" d="M{x} {y}l6 -6l6 6l-6 6Z"/>',
        }
        out.append(f'{shapes[shape]}<text class="tb" x="{x + 17}" y="{y + 4}">{visible(name)}</text>')
        x += 34 + 7 * len(name)
    if floor:
        out.append(f'<path class="fl" d="M{x + 6} {y - 8}v16"/><text class="t" x="{x + 15}" y="{y + 4}">')
        out.append("best constant answer</text>")
    return "".join(out)
