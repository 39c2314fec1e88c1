"""Draw dots with 95% intervals, one row per task, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rmsd_fast.report_page.svg import number, ticks


@dataclass(frozen=True)
class Mark:
    """One dot with its 95% interval; `color` 1-8, `shape` circle, square or diamond, `text` of the tooltip."""

    mean: float
    low: float
    high: float
    color: int
    shape: str
    text: str


@dataclass(frozen=True)
class IntervalRow:
    """One line of an interval chart: label, dots and optionally the floor."""

    label: str
    marks: tuple[Mark, ...]
    floor: float | None = None


def _dot(mark: Mark, x: Callable[[float], float], y: float) -> str:
    shapes = {
        "circle": lambda cx: f'<circle class="f{mark.color}" cx="{cx:.1f}" cy="{y:.1f}" r="4.5"/>',
        "square": lambda cx: (
            f'<rect class="f{mark.color}" x="{cx - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"/>'
        ),
        "diamond": lambda cx: f'<path class="f{mark.color}" d="M{cx - 5.6:.1f} {y:.1f}l5.6 -5.6l5.6 5.6l-5.6 5.6Z"/>',
    }
    line = f"M{x(mark.low):.1f} {y:.1f}H{x(mark.high):.1f}"
    caps = f"M{x(mark.low):.1f} {y - 3:.1f}v6M{x(mark.high):.1f} {y - 3:.1f}v6"
    return (
        f"<g><title>{escape(mark.text)}</title>"
        f'<path class="i{mark.color}" d="{line}{caps}"/>{shapes[mark.shape](x(mark.mean))}</g>'
    )


def interval_svg(
    rows: Sequence[IntervalRow],
    label: str,
    *,
    domain: tuple[float, float],
    tick_text: Callable[[float], str] = number,
    zero: bool = False,
    width: int = 360,
    left: int = 74,
) -> tuple[str, int]:
    """Return markup and height of a chart of dots with intervals, one line per entry of `rows`, floors dashed."""
    lane, gap, top, bottom = 15, 12, 8, 26
    low, high = domain
    span = width - left - 16

    def x(value: float) -> float:
        return left + min(max((value - low) / (high - low), 0.0), 1.0) * span

    height = top + bottom + sum(max(len(r.marks), 1) * lane + gap for r in rows)
    floor_y = height - bottom
    body = []
    for value in ticks(low, high, 5):
        body.append(f'<path class="g" d="M{x(value):.1f} {top}V{floor_y}"/>')
        text = escape(tick_text(value))
        body.append(f'<text class="t" x="{x(value):.1f}" y="{floor_y + 16}" text-anchor="middle">{text}</text>')
    if zero:
        body.append(f'<path class="fl" d="M{x(0.0):.1f} {top}V{floor_y}"/>')
    y = top + gap / 2
    for index, row in enumerate(rows):
        tall = max(len(row.marks), 1) * lane
        if index:
            body.append(f'<path class="a" d="M0 {y - gap / 2:.1f}H{width}"/>')
        body.append(f'<text class="tb" x="0" y="{y + tall / 2 + 4:.1f}">{escape(row.label)}</text>')
        if row.floor is not None and math.isfinite(row.floor):
            body.append(
                f"<g><title>{escape(row.label)}: best constant answer {escape(tick_text(row.floor))}</title>"
                f'<path class="fl" d="M{x(row.floor):.1f} {y - 2:.1f}v{tall + 4}"/></g>'
            )
        for lane_index, mark in enumerate(row.marks):
            if math.isfinite(mark.mean):
                body.append(_dot(mark, x, y + lane * (lane_index + 0.5)))
        y += tall + gap
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">'
    return f"{svg}{''.join(body)}</svg>", height


def mark_legend(entries: Sequence[tuple[str, int, str]], floor: bool) -> str:
    """Return the legend of an interval chart: (name, color, shape) of each student, and the floor's dashed tick."""
    items = []
    for name, color, shape in entries:
        dot = _dot(Mark(11.0, 1.0, 21.0, color, shape, name), lambda v: v, 6.0)
        items.append(f'<li><svg viewBox="0 0 22 12" style="height:12px">{dot}</svg>{escape(name)}</li>')
    if floor:
        items.append(
            '<li><svg viewBox="0 0 22 12" style="height:12px"><path class="fl" d="M11 0v12"/></svg>'
            "best constant answer (floor)</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def interval_figure(
    title: str,
    hint: str,
    rows: Sequence[IntervalRow],
    legend: str,
    domain: tuple[float, float],
    *,
    tick_text: Callable[[float], str] = number,
    zero: bool = False,
) -> str:
    """Return a card with two drawings, for wide and narrow windows, so that the text keeps its size."""
    drawings = []
    for kind, width in (("wide", 560), ("narrow", 350)):
        svg, _ = interval_svg(rows, title, domain=domain, tick_text=tick_text, zero=zero, width=width)
        drawings.append(f'<div class="{kind}">{svg}</div>')
    return (
        f'<figure class="card"><figcaption>{escape(title)}<span>{escape(hint)}</span></figcaption>'
        f"{legend}{''.join(drawings)}</figure>"
    )
