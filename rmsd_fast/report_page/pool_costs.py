"""Render the section of a pool report on tokens and costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rmsd_fast.data.errors import counted
from rmsd_fast.report_page.layout import table
from rmsd_fast.report_page.svg import number
from rmsd_fast.report_page.text import visible

USAGE_NAMES = {
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "cost": "cost, as the server reported it",
    "priced": "cost at the prices",
}
# The table of costs has each K up to this number, then its doublings.
EACH_K = 8


def cost_section(analysis: Mapping[str, Any]) -> str:
    """Return what the pool, an answer, a usable answer, and K answers to a question cost.

    Args:
        analysis: result of teacher.pool_analysis.analyze_pool.
    """
    head, usage = '<h2 id="usage">Cost</h2>', analysis["usage"]
    if not usage and not analysis["pool_usage"]:
        return f'{head}<p class="muted">No answer has token counts or a cost in its `usage`.</p>'
    rows = [
        (
            USAGE_NAMES[name],
            f"{group['answers']:,}",
            number(group["total"], 4),
            *(number(group[key], 4) for key in ("per_answer", "per_valid", "per_kept")),
            number(analysis["pool_usage"].get(name), 4),
        )
        for name, group in (usage or {}).items()
    ]
    columns = (
        "",
        "answers that report it",
        "total of these",
        "per answer",
        "per valid answer",
        "per kept answer",
        "whole pool",
    )
    return (
        f'{head}<p class="muted">{visible(_lead(analysis))}</p>{table("Cost", columns, rows)}<p class="muted small">A '
        "kept answer has at least quality tau. A reply of rmsd_fast.collect with several answers is divided equally "
        "among them. Other programs may repeat the tokens of a prompt in the line of each answer; they are then "
        "counted once per answer. The whole pool includes answers that no other number includes.</p>"
        f"{_cost_of_k(analysis)}"
    )


def _lead(analysis: Mapping[str, Any]) -> str:
    prices = analysis["prices"]
    if prices is None:
        return (
            "Tokens as the server reported them. Set collect.input_price and collect.output_price, the prices of a "
            "million tokens, to see costs, also for each K."
        )
    lead = (
        f"Tokens as the server reported them, at {prices['prompt']:g} for a million prompt tokens and "
        f"{prices['completion']:g} for a million completion tokens"
    )
    lead += ", the same for all teachers. " if analysis["models"] else ". "
    return lead + "Discounts, such as those for cached prompts, are not known."


def _cost_of_k(analysis: Mapping[str, Any]) -> str:
    costs, best = analysis["cost_of_k"], analysis["best_of"]
    if costs is None:
        return ""
    most = len(costs["per_question"])
    asked = analysis["counts"]["questions"]
    quality = [point["mean"] for point in best["groups"]["closed"]["quality"]] if best else []
    rows = []
    for k in range(1, most + 1):
        if k > EACH_K and k & (k - 1) and k != most:
            continue
        each = costs["per_question"][k - 1]
        shown = number(each["mean"], 4)
        if each["low"] is not None:
            shown += f" [{number(each['low'], 4)}, {number(each['high'], 4)}]"
        usable = (number(costs[key][k - 1], 4) for key in ("per_valid", "per_kept"))
        best_of_k = number(quality[k - 1]) if k <= len(quality) else "–"
        rows.append((f"K = {k}", shown, number(each["mean"] * asked, 4), *usable, best_of_k))
    columns = (
        "first K answers",
        "cost per question",
        f"all {counted(asked, 'question')}",
        "per valid answer",
        "per kept answer",
        "expected quality of the best",
    )
    return (
        f'<h3>Cost of K answers</h3>{table("Cost of K", columns, rows)}<p class="muted small">Mean over '
        f"{counted(costs['questions'], 'question')} with at least {counted(most, 'answer')} and their token counts. A "
        "prompt counts once for all answers of its reply, so K answers in one request cost less than K requests.</p>"
    )
