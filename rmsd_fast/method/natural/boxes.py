"""One box, as models write it."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from .numbers import decimal_text, strict
from .reasons import Unreadable, the_only
from .text import json_value, plain, strip_outside

_N = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_COORDINATE = re.compile(rf"(?<![A-Za-z0-9_.]){_N}(?![\w%]|\.[0-9])")
_COMMA = r"\s*,\s*"
_FOUR = re.compile(rf"[\[(]\s*{_N}(?:{_COMMA}{_N}){{3}}\s*[\])]")
_TWO_CORNERS = re.compile(
    rf"[\[(]\s*{_N}{_COMMA}{_N}\s*[\])]\s*(?:[,;-]|to|and|->|→|到|至)?\s*[\[(]\s*{_N}{_COMMA}{_N}\s*[\])]"
)
_BARE = re.compile(rf"{_N}(?:(?:\s*[,;]\s*|\s+){_N}){{3}}")
_BOX_TAGS = re.compile(
    r"<ref>.*?</ref>|<\|object_ref_start\|>.*?<\|object_ref_end\|>|<\|(?:box_start|box_end)\|>"
    r"|</?(?:box|bbox|bounding_box)>",
    re.IGNORECASE | re.DOTALL,
)
# "(coordinates from 0 to 1000)", "normalized to 0-1000".
_SCALE = re.compile(r"\(?[a-z ,]{0,60}\b0\s*(?:-|to|~)\s*1,?000\b[a-z ]{0,30}\)?", re.IGNORECASE)
# The names of the corners in the order that is asked for, where they only announce the numbers.
_NAMES_IN_ORDER = re.compile(
    r"[\[(]?\b(?:x1[\s,]+y1[\s,]+x2[\s,]+y2|x_?min[\s,]+y_?min[\s,]+x_?max[\s,]+y_?max|left[\s,]+top[\s,]+right[\s,]+bottom"
    r"|xyxy)\b\s*[\])]?(?!\s*[=:]\s*-?[0-9.]+\s*(?:$|[;,]\s*[a-z]))",
    re.IGNORECASE,
)
# Pixels, sizes, centres, other orders; Gemini's box_2d names y first.
_OTHER_BOX = re.compile(
    r"\b(?:not|px|pixels?|width|height|wide|high|tall|size|w|h|cx|cy|cxcywh|[xy]_?c|xywh|yxyx|yxhw|[xy]_?cent(?:er|re)"
    r"|cent(?:er|re)(?:ed)?|box_2d|or|radius|polygon|points?|[xy][12]|[xy]_?(?:min|max))\b|n['’]t\b|不|像素|中心|或",
    re.IGNORECASE,
)
_TOP_LEFT = r"(?:top|upper)[- ]left(?:[- ]corner)?|左上角?"
_BOTTOM_RIGHT = r"(?:bottom|lower)[- ]right(?:[- ]corner)?|右下角?"
_POINT = rf"[^0-9()\[\]]{{0,20}}[\[(]?\s*({_N}){_COMMA}({_N})\s*[\])]?"
_FROM_CORNERS = [
    re.compile(rf"(?:{first}){_POINT}[^0-9()\[\]]{{0,20}}?(?:{last}){_POINT}", re.IGNORECASE)
    for first, last in ((_TOP_LEFT, _BOTTOM_RIGHT), (_BOTTOM_RIGHT, _TOP_LEFT))
]
_CORNER_WORD = re.compile(r"\b(?:top|upper|bottom|lower)[- ](?:left|right)\b|[左右][上下]|[上下][左右]", re.IGNORECASE)
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_NAMED = re.compile(
    rf"\b(x1|y1|x2|y2|[xy]_?min|[xy]_?max|left|top|right|bottom)\b\s*[:=]\s*({_N})(?![\w%])", re.IGNORECASE
)
_KEYS = ("bbox_2d", "bbox", "box", "boxes", "bounding_box", "boundingbox", "coordinates", "answer")
_REMARKS = ("label", "category", "class", "name", "object", "description", "reason", "reasoning", "explanation")
_REMARKS += ("confidence", "score", "time", "timestamp", "frame")


def read_box(body: str) -> str:
    """`x1,y1,x2,y2`; raises Unreadable where an answer is not one box."""
    if as_it_is := strict(body, "spatial"):
        return as_it_is
    text = plain(_BOX_TAGS.sub(" ", strip_outside(body)))
    if text.startswith(("{", "[")) and (value := json_value(text)) is not None:
        return _checked(_box_in_json(value))
    text = _NAMES_IN_ORDER.sub(" ", _SCALE.sub(" ", text))
    boxes, outside = _boxes(text)
    if not boxes:
        raise Unreadable("not_a_box")
    if _OTHER_BOX.search(outside) or _CORNER_WORD.search(outside):
        raise Unreadable("not_a_box")
    return _checked(the_only(boxes))


def _boxes(text: str) -> tuple[list[str], str]:
    """The boxes of a sentence and what stands around them."""
    # Four numbers in brackets are the box, whatever other numbers the sentence holds.
    if four := _FOUR.findall(text):
        outside = _FOUR.sub(" ", text)
        if len(_COORDINATE.findall(outside)) > 3:
            raise Unreadable("two_answers")
        return [_listed(box) for box in four], outside
    if corners := _TWO_CORNERS.findall(text):
        outside = re.sub(rf"(?:{_TOP_LEFT}|{_BOTTOM_RIGHT})", " ", _TWO_CORNERS.sub(" ", text), flags=re.IGNORECASE)
        return [_listed(box) for box in corners], outside
    for pattern, order in zip(_FROM_CORNERS, ((1, 2, 3, 4), (3, 4, 1, 2)), strict=True):
        if match := pattern.search(text):
            return [",".join(match[i] for i in order)], _alone(text[: match.start()] + " " + text[match.end() :])
    if named := _NAMED.findall(text):
        names = [name.lower() for name, _ in named]
        order = next((corners for corners in _CORNERS if sorted(corners) == sorted(names)), None)
        if order is None:
            raise Unreadable("two_answers" if len(named) > 4 else "not_a_box")
        return [",".join(named[names.index(name)][1] for name in order)], _alone(_NAMED.sub(" ", text))
    numbers = _COORDINATE.findall(text)
    if len(numbers) != 4 or not (match := _BARE.search(text)):
        raise Unreadable("two_answers" if numbers and len(numbers) > 4 and len(numbers) % 4 == 0 else "not_a_box")
    return [_listed(match[0])], _alone(text[: match.start()] + " " + text[match.end() :])


def _listed(text: str) -> str:
    return ",".join(number.lstrip("+") for number in _COORDINATE.findall(text))


def _alone(outside: str) -> str:
    """What stands around a box without brackets: no other number."""
    if re.search(r"[0-9]", re.sub(r"bbox_2d", " ", outside, flags=re.IGNORECASE)):
        raise Unreadable("not_a_box")
    return outside


def _checked(box: str) -> str:
    """The box, unless its coordinates are shares of the frame, 0 to 1, where thousandths are asked for."""
    if max(map(Decimal, box.split(","))) <= 1:
        raise Unreadable("not_a_box")
    return box


def _box_in_json(value: object) -> str:
    """A box in JSON: four numbers, two corners, `{"bbox_2d": […], "label": …}`, `{"x1": …}`, corner and size."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        return read_box(value)
    if isinstance(value, dict):
        return _box_of_object({str(key).lower(): item for key, item in value.items()})
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, list) and len(item) == 2 for item in value):
        value = [*value[0], *value[1]]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict | list) for item in value):
        return the_only([_box_in_json(item) for item in value])
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(item, str) for item in value):
        raise Unreadable("not_a_box")
    if not all(_COORDINATE.fullmatch(item.strip()) for item in value):
        raise Unreadable("not_a_box")
    return ",".join(item.strip() for item in value)


def _box_of_object(names: dict[str, object]) -> str:
    names = {key: item for key, item in names.items() if key not in _REMARKS}
    if corners := next((corners for corners in _CORNERS if set(corners) == set(names)), None):
        return _box_in_json([names[corner] for corner in corners])
    for size in (("x", "y", "width", "height"), ("x", "y", "w", "h")):
        if set(size) == set(names):
            return _sized_box([names[key] for key in size])
    # A key that is not known may name another order, or another scale.
    if len(names) != 1 or not set(names) <= set(_KEYS):
        raise Unreadable("not_a_box")
    (box,) = names.values()
    return _box_in_json(box)


def _sized_box(values: list[object]) -> str:
    """The box of a top left corner, a width and a height."""
    try:
        x, y, width, height = (Decimal(str(value)) for value in values)
    except InvalidOperation:
        raise Unreadable("not_a_box") from None
    return ",".join(map(decimal_text, (x, y, x + width, y + height)))
