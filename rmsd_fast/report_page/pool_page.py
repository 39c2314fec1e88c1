"""Render the report of a teacher pool: recommendations first, then the numbers behind them.

All texts, ids and names come from data files and are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rmsd_fast.data.errors import counted
from rmsd_fast.method.answers import TASK_TYPES
from rmsd_fast.method.natural import REASONS
from rmsd_fast.report_page.evaluation import SIMULATED, in_order, percent
from rmsd_fast.report_page.layout import document, table, tile
from rmsd_fast.report_page.pool_costs import USAGE_NAMES, cost_section
from rmsd_fast.report_page.pool_sections import agreement_section, best_of_section, gain_section, tau_section
from rmsd_fast.report_page.svg import number
from rmsd_fast.report_page.teacher import PAPER, quality_chart, quality_table
from rmsd_fast.report_page.text import visible
from rmsd_fast.teacher.pool_advice import UNKNOWN, Advice, percent_with_interval, with_interval

_LINKS = (
    ("advice", "Recommendations"),
    ("quality", "Quality"),
    ("tau", "Filter"),
    ("best", "Best of K"),
    ("gain", "Stage 2"),
    ("agreement", "Agreement"),
    ("invalid", "Invalid answers"),
    ("texts", "Texts"),
    ("usage", "Cost"),
    ("models", "Teachers"),
)
_NOT_BELOW = "The numbers below do not include this."


def render_pool(analysis: Mapping[str, Any], advice: Sequence[Advice], pool: Path, questions: Path) -> str:
    """Return the report of a pool as one self-contained HTML document.

    Args:
        analysis: result of teacher.pool_analysis.analyze_pool.
        advice: result of teacher.pool_advice.advise.
        pool, questions: the files, whose names the page shows.
    """
    nav = "".join(f'<a href="#{anchor}">{text}</a>' for anchor, text in _LINKS)
    body = [
        f'<header><p class="muted small">rmsd_fast pool report</p><h1>{visible(pool.name)}</h1>'
        f"{_facts(analysis, pool, questions)}<nav>{nav}</nav></header>",
        _notes(analysis),
        _tiles(analysis),
        _advice(advice),
        _quality(analysis),
        tau_section(analysis["kept"], analysis["settings"]["min_quality"]),
        best_of_section(analysis["best_of"]),
        gain_section(analysis["stage2"]),
        agreement_section(analysis["agreement"], analysis["counts"]["unlabeled"]),
        _invalid(analysis),
        _texts(analysis["texts"]),
        cost_section(analysis),
        _models(analysis["models"]),
    ]
    return document(f"{visible(pool.name)} · rmsd_fast pool report", "".join(body))


def _facts(analysis: Mapping[str, Any], pool: Path, questions: Path) -> str:
    counts, settings = analysis["counts"], analysis["settings"]
    per_question = [
        f"{counted(int(k), 'answer')}: {counted(n, 'question')}" for k, n in counts["answers_per_question"].items()
    ]
    facts = [
        ("Pool", pool),
        ("Questions", questions),
        ("Answers", f"{counts['answers']:,}"),
        ("Questions with an answer", f"{counts['answered']:,} of {counts['questions']:,}"),
        ("Answers per question", "; ".join(per_question[:4]) + ("; …" if len(per_question) > 4 else "")),
        ("Without ground truth", f"{counts['unlabeled']:,} closed, {counts['open']:,} open"),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{visible(value)}</dd></div>" for name, value in facts)
    set_to = ", ".join(f"teacher.{name}={value}" for name, value in settings.items())
    return f'<dl class="facts">{shown}</dl><p class="muted small">{visible(set_to)}</p>'


def _notes(analysis: Mapping[str, Any]) -> str:
    counts, notes = analysis["counts"], []
    if analysis["teacher_simulated"]:
        notes.append(
            f"{SIMULATED}: the answers were written by a program that knows the ground truth. These numbers "
            "describe the simulation, and say nothing about a real teacher."
        )
    if counts["unanswered"]:
        ids = ", ".join(counts["unanswered_ids"]) + (
            ", …" if counts["unanswered"] > len(counts["unanswered_ids"]) else ""
        )
        notes.append(f"The pool has no answer to {counted(counts['unanswered'], 'question')} ({ids}). {_NOT_BELOW}")
    if counts["marked"]:
        notes.append(
            f"The pool has {counted(counts['marked'], 'answer')} drawn adaptively or with a hint. {_NOT_BELOW}"
        )
    if counts["foreign_ids"]:
        notes.append(
            f"The pool has {counted(counts['foreign_answers'], 'answer')} to {counted(counts['foreign_ids'], 'id')} "
            f"that no question has. {_NOT_BELOW}"
        )
    return (
        f'<div class="note" role="note">{"".join(f"<p>{visible(note)}</p>" for note in notes)}</div>' if notes else ""
    )


def _tiles(analysis: Mapping[str, Any]) -> str:
    tiles, means = [], analysis["means"]
    for name, title in (("closed", "Mean quality, closed tasks"), ("unlabeled", "Mean agreement, no ground truth")):
        if name in means:
            low, high = means[name]["low"], means[name]["high"]
            below = "one question" if low is None else f"95% interval {number(low)} to {number(high)}"
            tiles.append(tile(title, number(means[name]["mean"]), f"{below}, n = {means[name]['n']:,}"))
    groups = [group for key in ("quality", "agreement_quality") if analysis[key] and (group := analysis[key]["all"])]
    responses = sum(group["responses"] for group in groups)
    for key, title, below in (
        ("valid_share", "Valid answers", f"of {responses:,}"),
        ("as_sent_share", "In the format as sent", "the others are format violations"),
    ):
        share = sum(group[key] * group["responses"] for group in groups) / responses
        tiles.append(tile(title, f"{percent(share)}%", below))
    if priced := (analysis["usage"] or {}).get("priced"):
        below, missing = (
            f"{number(priced['per_valid'])} per valid answer",
            analysis["pool_usage"].get("unpriced_answers"),
        )
        if missing:
            below += f"; {missing:,} answers without token counts are not included"
        tiles.append(tile("Cost of the pool", number(analysis["pool_usage"]["priced"]), below))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _advice(advice: Sequence[Advice]) -> str:
    items = []
    for entry in advice:
        shown = f": {visible(entry.value)}" if entry.value else ""
        items.append(f"<h3>{visible(entry.subject)}{shown}</h3><p>{visible(entry.reason)}</p>")
    unknown = "".join(f"<li>{visible(text)}</li>" for text in UNKNOWN)
    return (
        f'<h2 id="advice">Recommendations</h2><div class="split"><article class="card">{"".join(items)}</article>'
        f'<article class="card"><h3>What a pool cannot show</h3><ul>{unknown}</ul></article></div>'
    )


def _quality(analysis: Mapping[str, Any]) -> str:
    out = ['<h2 id="quality">Quality</h2>']
    statistics = analysis["quality"]
    if statistics:
        tasks = [(task, statistics["tasks"][task]) for task in in_order(list(statistics["tasks"]), TASK_TYPES)]
        totals = [
            (name, statistics[key]) for key, name in (("closed", "all closed"), ("all", "all")) if statistics[key]
        ]
        out.append(
            '<p class="muted">Compared with the ground truth. Invalid answers count as 0. Open questions have no '
            f"metric: a valid answer counts as 1.</p>{quality_table(tasks, totals)}"
        )
        closed = [(task, group) for task, group in tasks if task != "open"]
        chart = quality_chart(closed) if closed else ""
        out.append(f'<div class="split">{chart}</div><p class="muted small">{PAPER}</p>')
    if analysis["agreement_quality"]:
        tasks = list(analysis["agreement_quality"]["tasks"].items())
        out.append(
            "<h3>Agreement in place of quality</h3>"
            '<p class="muted">These questions have no ground truth. The quality of an answer is its agreement with the '
            "other valid answers to the question: how consistent the teacher is, not whether it is right.</p>"
            f"{quality_table(tasks, [])}"
        )
    rows = [
        (
            _group_name(name),
            with_interval(analysis["means"][name]),
            *(
                (
                    number(part["within"]),
                    number(part["between"]),
                    percent(part["between_share"]) if part["between_share"] is not None else "–",
                    f"{part['questions']:,}",
                )
                if part
                else ("–",) * 4
            ),
        )
        for name, part in analysis["spread"].items()
    ]
    if rows:
        head = (
            "group",
            "mean [95% interval]",
            "variance within a question",
            "variance between questions",
            "between %",
            "questions",
        )
        out.append(
            f'<h3>Where the spread comes from</h3>{table("Spread", head, rows)}<p class="muted small">Over questions '
            "with at least two answers. Both variances are unbiased: the chance variation of a mean of few answers is "
            "not counted as a difference between questions. The more of the variance is within questions, the more the "
            "choice among K answers matters.</p>"
        )
    return "".join(out)


def _group_name(name: str) -> str:
    return {"closed": "all closed", "unlabeled": "no ground truth (agreement)"}.get(name, name)


def _invalid(analysis: Mapping[str, Any]) -> str:
    reasons: dict[str, dict[str, int]] = {}
    for key in ("quality", "agreement_quality"):
        for task, group in (analysis[key] or {"tasks": {}})["tasks"].items():
            for reason, count in group["reasons"].items():
                by_task = reasons.setdefault(reason, {})
                by_task[task] = by_task.get(task, 0) + count
    shares = [
        (name, *(percent_with_interval(group[key]) for key in ("valid", "as_sent")))
        for name, group in analysis["format"].items()
    ]
    head = (
        f'<h2 id="invalid">Format and invalid answers</h2>{table("Format", ("task", "valid", "valid as sent"), shares)}'
        '<p class="muted small">The paper counts all answers that are not valid as sent as format violations. With '
        "teacher.parse=natural, many of them can be read and are valid.</p>"
    )
    if not reasons:
        return f'{head}<p class="muted">All answers are valid.</p>'
    tasks = in_order(sorted({task for by_task in reasons.values() for task in by_task}), TASK_TYPES)
    rows = [
        (reason, REASONS[reason], *(f"{by_task.get(task, 0):,}" for task in tasks), f"{sum(by_task.values()):,}")
        for reason, by_task in sorted(reasons.items(), key=lambda item: -sum(item[1].values()))
    ]
    examples = "".join(
        f"<h4>{visible(reason)}</h4>"
        + "".join(
            f'<p class="muted small">{visible(shown["id"])}, k = {shown["k"]}</p>'
            f'<pre class="text">{visible(shown["text"])}</pre>'
            for shown in analysis["examples"].get(reason, [])
        )
        for reason, *_ in rows
    )
    return (
        f'{head}<p class="muted">Answers by reason, with teacher.parse={visible(analysis["settings"]["parse"])}.</p>'
        f"{table('Reasons', ('reason', 'meaning', *tasks, 'all'), rows)}"
        f'<details class="card"><summary>Examples</summary>{examples}</details>'
    )


def _texts(texts: Mapping[str, Any]) -> str:
    rows = []
    for name, group in texts.items():
        lengths = group["characters"]
        answers = "–"
        if group["different_answers"] is not None:
            answers = f"{group['different_answers']:.2f} of {group['valid_answers']:.2f}"
        shown = with_interval(group["length_correlation"], sign=True) if group["length_correlation"] else "–"
        rows.append(
            (
                name,
                *(f"{lengths[key]:,.0f}" for key in lengths),
                percent(group["repeated_share"]),
                percent(group["elsewhere_share"]),
                answers,
                shown,
            )
        )
    head = (
        "task",
        "characters, 5th percentile",
        "median",
        "95th percentile",
        "repeats an answer to its question %",
        "same text for another question %",
        "different answers per question",
        "correlation of length and quality",
    )
    return (
        f'<h2 id="texts">Lengths and repetitions</h2>{table("Texts", head, rows)}<p class="muted small">Texts as sent. '
        "Different answers: mean number of different final answers among the valid answers to a question with at least "
        "two of them. The correlation compares answers to the same question that have a ground truth; far from 0, a "
        "discriminator can use the length in place of the content.</p>"
    )


def _models(models: Sequence[Mapping[str, Any]] | None) -> str:
    head = '<h2 id="models">Teachers</h2>'
    if not models:
        return f'{head}<p class="muted">All answers have the same `model`.</p>'
    costs = [key for key in USAGE_NAMES if any(model.get(key) is not None for model in models)]
    rows = [
        (
            model["model"] or "not named",
            f"{model['answers']:,}",
            f"{model['questions']:,}",
            with_interval(model["quality"]) if model["quality"] else "–",
            with_interval(model["difference"], sign=True) if model["difference"] else "–",
            *(percent(model[key]) for key in ("valid_share", "as_sent_share", "kept_share")),
            *(number(model[key], 4) for key in costs),
        )
        for model in models
    ]
    columns = (
        "model",
        "answers",
        "questions",
        "quality",
        "difference from the first",
        "valid %",
        "as sent %",
        "kept %",
        *(USAGE_NAMES[key] for key in costs),
    )
    return (
        f'{head}{table("Teachers", columns, rows)}<p class="muted small">Quality: mean over questions with ground '
        "truth, with 95% intervals. Differences are paired: they use the questions that both teachers answered. Tokens "
        "and cost are per answer.</p>"
    )
