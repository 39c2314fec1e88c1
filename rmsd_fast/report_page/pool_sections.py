"""Render the sections of a pool report that have charts over tau or K, and those on agreement and stage 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmsd_fast.report_page.evaluation import percent
from rmsd_fast.report_page.intervals import IntervalRow, Mark, interval_figure, mark_legend
from rmsd_fast.report_page.layout import table
from rmsd_fast.report_page.svg import Series, curve_chart, number
from rmsd_fast.report_page.text import visible
from rmsd_fast.teacher.pool_advice import LEAST_GAIN, percent_with_interval, with_interval

_NAMES = {"closed": "all closed", "unlabeled": "agreement"}
# Columns of the section on stage 2: key, heading, color and shape in the chart.
_GAIN = (
    ("random", "one random answer", 6, "circle"),
    ("uniform", "uniform", 3, "square"),
    ("power_1", "power 1", 1, "square"),
    ("power_2", "power 2", 8, "diamond"),
    ("power_4", "power 4", 2, "diamond"),
    ("best", "best of K", 4, "circle"),
)


def tau_section(kept: Mapping[str, Any], tau: float) -> str:
    """Return the charts of the shares that pass the filter, against tau."""
    head = '<h2 id="tau">Share kept by the filter</h2>'
    groups, k = kept["groups"], kept["responses"]
    if not groups:
        return f'{head}<p class="muted">All questions are open: every valid answer has quality 1, whatever tau is.</p>'
    cards = []
    for key, title, hint in (
        ("answers", "Answers kept", "share of the answers with quality of at least tau, and above 0"),
        ("questions", "Questions with a kept answer", f"share of the questions, expected for K = {k} of their answers"),
    ):
        series = [
            Series(_NAMES.get(name, name), tuple(kept["tau"]), tuple(shares[key])) for name, shares in groups.items()
        ]
        cards.append(curve_chart(title, hint, series, y_range=(0.0, 1.0), smoothed=False, x_name="tau", legend_at=tau))
    shown = [step for step in kept["tau"] if step in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, tau)]
    places = [kept["tau"].index(step) for step in shown]
    rows = [
        (_NAMES.get(name, name), *(f"{percent(s['answers'][at])} / {percent(s['questions'][at])}" for at in places))
        for name, s in groups.items()
    ]
    exact = [
        (_NAMES.get(name, name), *(percent_with_interval(values[key]) for key in ("answers", "questions")))
        for name, values in kept["at"].items()
    ]
    head_at = (f"at tau = {tau:g}", "answers kept", f"questions with a kept answer among K = {k}")
    columns = ("kept answers % / questions %", *(f"tau = {step:g}" for step in shown))
    note = "Agreement: questions without ground truth. " if "unlabeled" in groups else ""
    return (
        f'{head}<p class="muted">The legends have the values at tau = {tau:g}. {note}Open questions are left out.</p>'
        f'<div class="charts">{"".join(cards)}</div>{table("Kept at tau", head_at, exact)}'
        f"{table('Kept', columns, rows)}"
    )


def best_of_section(best: Mapping[str, Any] | None) -> str:
    """Return the expected best quality of K answers, and what each doubling of K adds."""
    head = '<h2 id="best">Best of K answers</h2>'
    if best is None:
        return f'{head}<p class="muted">No question has a ground truth, so it is not known which answer is best.</p>'
    groups = best["groups"]
    if best["most"] == 1:
        return f'{head}<p class="muted">Most questions have one answer, so nothing is known about more.</p>'
    series = [
        Series(
            _NAMES.get(name, name),
            tuple(range(1, best["most"] + 1)),
            tuple(point["mean"] for point in group["quality"]),
        )
        for name, group in groups.items()
    ]
    if chance := groups.get("mcq", {}).get("chance"):
        series.append(Series("mcq, random guesses", tuple(range(1, best["most"] + 1)), tuple(chance)))
    chart = curve_chart(
        "Expected quality of the best of K answers",
        "mean over all choices of K of the answers; what stage 1 imitates",
        series,
        include=(1.0,),
        smoothed=False,
        x_name="K",
    )
    steps = groups["closed"]["steps"]
    rows = [
        (
            _NAMES.get(name, name),
            f"{group['questions']:,}",
            with_interval(group["quality"][0]),
            *(with_interval(step, sign=True) for step in group["steps"]),
        )
        for name, group in groups.items()
    ]
    columns = ("task", "questions", "K = 1", *(f"K = {step['from']} → {step['to']}" for step in steps))
    left_out = ""
    if best["left_out"]:
        left_out = f" {best['left_out']:,} questions with fewer than {best['most']} answers are left out."
    return (
        f'{head}<p class="muted">Unbiased estimates with 95% intervals over questions. The same questions are used '
        f'for all K.{left_out}</p><div class="charts">{chart}</div>{table("Best of K", columns, rows)}'
        f'<p class="muted small">A doubling of K doubles the cost of collecting. The recommendation counts it as '
        f"worth it if the whole interval for all closed questions is at least {LEAST_GAIN}.</p>"
    )


def gain_section(gain: Mapping[str, Any] | None) -> str:
    """Return the quality that the discriminator leads to, by weighting, next to single answers and the best of K."""
    head = '<h2 id="gain">What stage 2 can gain from this pool</h2>'
    if gain is None:
        return f'{head}<p class="muted">No question has both a ground truth and a kept answer.</p>'
    entries = [*gain["tasks"].items(), ("closed", gain["closed"])]
    rows = [
        (
            _NAMES.get(name, name),
            f"{group['questions']:,}",
            f"{group['without']:,}",
            *(number(group[key]["mean"]) for key, *_ in _GAIN),
            *(with_interval(group[key], sign=True) for key in ("power_1-uniform", "power_4-power_1", "best-power_1")),
        )
        for name, group in entries
    ]
    columns = ("task", "questions", "without a kept answer", *(title for _, title, *_ in _GAIN))
    columns += ("power 1 − uniform", "power 4 − power 1", "best of K − power 1")
    drawn = []
    for name, group in entries:
        marks = []
        for key, title, color, shape in _GAIN:
            point = group[key]
            low, high = (point["mean"] if point[end] is None else point[end] for end in ("low", "high"))
            marks.append(Mark(point["mean"], low, high, color, shape, f"{name}, {title}: {with_interval(point)}"))
        drawn.append(IntervalRow(_NAMES.get(name, name), tuple(marks)))
    legend = mark_legend([(title, color, shape) for _, title, color, shape in _GAIN], floor=False)
    chart = interval_figure(
        "Quality that the discriminator leads to", "by weighting, with 95% intervals", drawn, legend, (0.0, 1.0)
    )
    lead = (
        f"With K = {gain['responses']} and tau = {gain['min_quality']:g}, over questions with ground truth and a kept "
        "answer. A perfect discriminator leads a student to the mean quality of the kept answers, weighted by p_k·w_k "
        "(teacher.weighting and teacher.weight_power). It helps a student only below this value. Stage 1 imitates the "
        "best of K. One random answer has the mean quality of all answers."
    )
    return f'{head}<p class="muted">{lead}</p><div class="split">{chart}</div>{table("Stage 2", columns, rows)}'


def agreement_section(check: Mapping[str, Any] | None, unlabeled: int) -> str:
    """Return how well agreement and the metric rank the same answers."""
    head = '<h2 id="agreement">Can agreement stand in for labels?</h2>'
    if check is None:
        reason = "No question has both a ground truth and two valid answers, so the two cannot be compared."
        return f'{head}<p class="muted">{reason}</p>'
    rows = []
    for name, group in [*check["tasks"].items(), ("closed", check["closed"])]:
        rows.append(
            (
                _NAMES.get(name, name),
                f"{group['questions']:,}",
                *(_estimated(group[key], sign=True) for key in ("across", "within")),
                f"{_estimated(group['top_best'])} / {_share(group['random_best'])}",
                *(number(group[key]["mean"]) for key in ("random_quality", "top_quality", "best_quality")),
                *(_estimated(group[key]) for key in ("recovered", "precision", "recall")),
            )
        )
    columns = (
        "task",
        "questions",
        "correlation over answers",
        "correlation within questions",
        "the top answer is a best one / by chance",
        "quality: random",
        "top",
        "best",
        "recovered",
        "precision at tau",
        "recall at tau",
    )
    lead = (
        f"Both are computed for the first K = {check['responses']} answers to questions with ground truth and at least "
        "two valid answers. The top answer is the one of highest agreement. Precision: share of the answers that "
        f"agreement keeps at tau = {check['min_quality']:g} which the metric keeps too; recall: share of those that "
        "the metric keeps which agreement keeps too."
    )
    note = (
        "How often the top answer is a best one: over the questions whose answers differ in quality. Recovered: (top − "
        "random) / (best − random). Answers with the same error agree with each other, so agreement cannot detect "
        "systematic errors. Set teacher.responses to compare with another K."
    )
    if unlabeled:
        note += f" The pool has {unlabeled:,} closed questions without ground truth."
    return (
        f'{head}<p class="muted">{visible(lead)}</p>{table("Agreement", columns, rows)}'
        f'<p class="muted small">{visible(note)}</p>'
    )


def _estimated(value: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    return with_interval(value, sign=sign) if value else "–"


def _share(value: Mapping[str, Any] | None) -> str:
    return number(value["mean"]) if value else "–"
