"""Draw answers: boxes over the frames of a question's video, and intervals on a timeline below them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rmsd_fast.method.answers import answer_body, parse_answer_body
from rmsd_fast.report_page.svg import number, ticks
from rmsd_fast.report_page.text import visible

# Coordinates of boxes are in thousandths of the frame.
_WHOLE = 1000
TRUTH = "truth"


@dataclass(frozen=True)
class Mark:
    """One box `(x1, y1, x2, y2)` or interval `(start, end)`: its short name, and `truth` or a series color 1-8."""

    name: str
    color: str
    values: tuple[float, ...]


def truth_mark(task_type: str, answer: object) -> list[Mark]:
    """Return the mark of a ground truth, or an empty list if it cannot be drawn."""
    return _mark("ground truth", TRUTH, task_type, str(answer or ""))


def response_mark(name: str, color: int, task_type: str, text: object) -> list[Mark]:
    """Return the mark of a response's answer, even if the format around the answer is broken."""
    return _mark(name, str(color), task_type, answer_body(str(text or "")))


def _mark(name: str, color: str, task_type: str, body: str | None) -> list[Mark]:
    if task_type not in ("spatial", "temporal") or body is None:
        return []
    values = parse_answer_body(body, task_type)
    # Boxes and intervals without an extent score 0 and would be invisible.
    half = len(values or ()) // 2
    if values is None or any(end <= start for start, end in zip(values[:half], values[half:], strict=True)):
        return []
    return [Mark(name, color, values)]


def _merged(marks: Sequence[Mark], *, values: int) -> list[Mark]:
    """Return the marks with this number of values; equal answers share a mark with all their names."""
    names: dict[tuple[str, tuple[float, ...]], list[str]] = {}
    for mark in marks:
        if len(mark.values) == values:
            names.setdefault((mark.color, mark.values), []).append(mark.name)
    return [Mark(", ".join(agreeing), *key) for key, agreeing in names.items()]


def box_overlay(marks: Sequence[Mark]) -> str:
    """Return the boxes as an SVG that can be placed over a frame of any size."""
    marks = _merged(marks, values=4)
    if not marks:
        return ""
    boxes = []
    for mark in marks:
        x1, y1, x2, y2 = (min(max(value, 0.0), _WHOLE) for value in mark.values)
        title = f"{mark.name}: {','.join(number(v, 4) for v in mark.values)}"
        boxes.append(
            f'<rect class="m-{mark.color}" x="{x1:g}" y="{y1:g}" width="{x2 - x1:g}" height="{y2 - y1:g}">'
            f"<title>{visible(title)}</title></rect>"
        )
    view = f"0 0 {_WHOLE} {_WHOLE}"
    return f'<svg class="boxes" viewBox="{view}" preserveAspectRatio="none" aria-hidden="true">{"".join(boxes)}</svg>'


def time_line(
    marks: Sequence[Mark], seconds: float | None, span: tuple[float | None, float | None] | None = None
) -> str:
    """Return one lane per interval, with a bar on a timeline of the clip; "" without intervals.

    Args:
        marks: the answers to draw; marks of boxes are ignored.
        seconds: length of the clip; None = unknown, the axis then ends with the last interval.
        span: the part of the clip that the question shows, in seconds; it is shaded.
    """
    marks = _merged(marks, values=2)
    if not marks:
        return ""
    end = max(mark.values[1] for mark in marks) if seconds is None else seconds
    # A clip is at least as long as a frame; a shorter scale could not be drawn.
    if not 1e-3 < end < math.inf:
        return ""

    def bar_style(start: float, stop: float) -> str:
        left, right = (100 * min(max(at / end, 0.0), 1.0) for at in (start, stop))
        return f"left:{left:.2f}%;width:{right - left:.2f}%"

    shown = ""
    if span is not None:
        shown = f'<i class="span" style="{bar_style(span[0] or 0.0, end if span[1] is None else span[1])}"></i>'
    lanes = [
        f'<div class="lane"><span>{visible(mark.name)}</span><div class="track">{shown}'
        f'<b class="m-{mark.color}" style="{bar_style(*mark.values)}"></b></div>'
        f"<span>{number(mark.values[0], 4)} to {number(mark.values[1], 4)} s</span></div>"
        for mark in marks
    ]
    scale = "".join(f'<i style="left:{100 * at / end:.2f}%">{number(at, 4)}</i>' for at in ticks(0.0, end, 5))
    length = "" if seconds is None else f"clip of {number(end, 4)} s"
    axis = f'<div class="lane axis"><span>seconds</span><div class="track">{scale}</div><span>{length}</span></div>'
    return f'<div class="times" role="group" aria-label="Intervals in seconds">{"".join(lanes)}{axis}</div>'


def mark_key(marks: Sequence[Mark], names: Mapping[str, str]) -> str:
    """Return the legend of the boxes. names: name of each color."""
    colors = [color for color in names if any(mark.color == color and len(mark.values) == 4 for mark in marks)]
    items = "".join(f'<li><i class="swatch m-{color}"></i>{visible(names[color])}</li>' for color in colors)
    return f'<ul class="legend">{items}</ul>' if items else ""
