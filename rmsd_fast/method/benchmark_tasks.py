"""Task types that occur only in benchmarks: `exact` answers, and `boxes` by second.

========  ==================================================  ========================================
task      content of ``<answer>``                             parsed value
========  ==================================================  ========================================
exact     a short text or a number                            the text
boxes     JSON of seconds and boxes, ``{"3": [1, 2, 3, 4]}``  ``{"3": ((1.0, 2.0, 3.0, 4.0),)}``
========  ==================================================  ========================================

Coordinates are from 0 to 1000 of the picture's width and height, as everywhere in this package. Training refuses these
task types, since no teacher answer in them was ever graded.

Source of `boxes`: V-STaR (arXiv 2503.11495).
"""

from __future__ import annotations

import json
import math

BENCHMARK_FORMAT = {
    "exact": "a short text or one number",
    "boxes": """seconds and boxes such as '{"3": [100, 200, 300, 400]}'""",
}

# Boxes (x1, y1, x2, y2) by second; the second is text, as in JSON.
Boxes = dict[str, tuple[tuple[float, ...], ...]]


def parse_boxes(body: str) -> Boxes | None:
    """Return the boxes of a JSON object, or None if the text is not one.

    A second may have one box or a list of boxes.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return boxes_of(value) if isinstance(value, dict) else None


def boxes_of(value: dict) -> Boxes | None:
    """Return the boxes of an object; None if it is empty or one of its values is not a box or a list of boxes."""
    result: Boxes = {}
    for second, item in value.items():
        boxes = item if isinstance(item, list) and item and isinstance(item[0], list) else [item]
        if not all(map(_is_box, boxes)):
            return None
        result[second] = tuple(tuple(map(float, box)) for box in boxes)
    return result or None


def _is_box(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
        and all(abs(item) < 1e300 and math.isfinite(item) for item in value)
    )
