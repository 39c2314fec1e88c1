"""Meaning of open answers about generated clips: whether color, shape and place are all right.

Training never uses this score: it is only used in evaluations. It looks for single words, and knows only the words that
describe generated clips. It is strict: an answer that names a second color, shape or place, or that contains a word of
denial or doubt, scores 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rmsd_fast.data.records import Question
from rmsd_fast.made.clips import COLORS, SHAPES

_COLOR_WORDS = {color: color for color in COLORS} | {"turquoise": "cyan", "magenta": "pink"}
_SHAPE_WORDS = {shape: shape for shape in SHAPES} | {
    "square": "block",
    "rectangle": "block",
    "ellipse": "oval",
    "circle": "oval",
    "plus": "cross",
}
_PLACE_WORDS = {
    "top": "top",
    "upper": "top",
    "bottom": "bottom",
    "lower": "bottom",
    "left": "left",
    "right": "right",
    "center": "center",
    "centre": "center",
    "central": "center",
    "middle": "center",
}
_DENIALS = {"not", "no", "never", "neither", "nor", "or", "either", "without", "maybe", "perhaps", "cannot"}
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def has_content(question: Question) -> bool:
    """Return whether the question records what its clip shows, as questions about generated clips do."""
    made = question.meta.get("made")
    return isinstance(made, Mapping) and {"color", "shape", "place"} <= set(made)


def meaning_score(text: str, made: Mapping[str, Any]) -> float:
    """Return 1.0 if an answer states the right color, shape and place, and nothing that contradicts them.

    "top center" is read as "top", and "middle left" as "left".

    Args:
        text: the answer, without tags.
        made: content of the clip, `meta["made"]` of the question.
    Returns:
        1.0 or 0.0.
    """
    words = _WORD.findall(text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    if any(word in _DENIALS or word.endswith("n't") for word in words):
        return 0.0
    colors, shapes, places = (
        {known[word] for word in words if word in known} for known in (_COLOR_WORDS, _SHAPE_WORDS, _PLACE_WORDS)
    )
    right_place = {_PLACE_WORDS[word] for word in made["place"].split()}
    # At the middle of an edge, "center" adds nothing.
    if len(right_place) == 1:
        places -= {"center"} - right_place
    return float(colors == {made["color"]} and shapes == {made["shape"]} and places == right_place)
