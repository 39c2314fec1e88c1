"""Read one box in the common notations of models."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from .doubts import contrast, is_absent, is_denied, is_doubted
from .numbers import decimal_text, strict
from .reasons import Unreadable, the_only
from .text import json_value, plain, strip_outside, without_remarks

_N = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
_COORDINATE = re.compile(rf"(?<![A-Za-z0-9_.]){_N}(?![\w%]|\.[0-9])")
_COMMA = r"\s*,\s*"
_FOUR = re.compile(rf"[\[(]\s*{_N}(?:{_COMMA}{_N}){{3}}\s*[\])]")
_TWO_CORNERS = re.compile(
    rf"[\[(]\s*{_N}{_COMMA}{_N}\s*[\])]\s*(?:[,;-]|to|and|->|→|到|至)?\s*[\[(]\s*{_N}{_COMMA}{_N}\s*[\])]"
)
_BARE = re.compile(rf"{_N}(?:(?:\s*[,;]\s*|\s+){_N}){{3}}")
_BOX_TAGS = re.compile(
    r"<ref>.*?</ref>|<\|ref\|>.*?<\|/ref\|>|<\|/?det\|>|<\|object_ref_start\|>.*?<\|object_ref_end\|>"
    r"|<\|(?:box_start|box_end)\|>|</?(?:box|bbox|bounding_box)>",
    re.IGNORECASE | re.DOTALL,
)
# "(coordinates from 0 to 1000)", "normalized to 0-1000".
_SCALE = re.compile(r"\(?[a-z ,]{0,60}\b0\s*(?:-|to|~)\s*1,?000\b[a-z ]{0,30}\)?", re.IGNORECASE)
# The names of the corners in the required order, if they only announce the numbers.
_NAMES_IN_ORDER = re.compile(
    r"[\[(]?\b(?:x1[\s,]+y1[\s,]+x2[\s,]+y2|x_?min[\s,]+y_?min[\s,]+x_?max[\s,]+y_?max"
    r"|left[\s,]+top[\s,]+right[\s,]+bottom|xyxy)\b\s*[\])]?(?!\s*[=:]\s*-?[0-9.]+\s*(?:$|[;,]\s*[a-z]))",
    re.IGNORECASE,
)
# Pixels, sizes, centers, other orders; Gemini's box_2d names y first.
_OTHER_BOX = re.compile(
    r"\b(?:px|pixels?|width|height|wide|high|tall|size|w|h|cx|cy|cxcywh|[xy]_?c|xywh|yxyx|yxhw|ltwh|tlbr"
    r"|[xy]_?cent(?:er|re)"
    r"|cent(?:er|re)(?:ed)?|box_2d|radius|polygon|points?|lines?|vector|path|moves?|moved|moving|coco|yolo|voc"
    r"|percent\w*|normali[sz]ed|scaled|relative|[xy][12]|[xy]_?(?:min|max))\b|%|±|像素|中心|百分",
    re.IGNORECASE,
)
# Allowed directly before a box: nothing, a colon, or a word that announces it.
_BEFORE = re.compile(
    r"(?:^|[:：=(,，、]|\.\s|(?<![a-z])(?:is|are|was|at|in|to be|box|bbox|bbox_2d|bounding[ _]box|boxes|coordinates?"
    r"|coords|region"
    r"|area|rectangle|location|position|approximately|approx|about|roughly|around|within|inside|lauten|ist|sind|est"
    r"|es|sont|son|boîte|caja|the|with|by|as|covers|occupies|spans|answer|here|corner|corners|has|det|object)"
    r"|[是为為在はがの的]|约|大约|位于)\s*$",
    re.IGNORECASE,
)
# Allowed after a box: the end, or words about location and time.
_AFTER = re.compile(
    r"(?:[\s.,;:!)\]”\"。，、|]|\b(?:in|on|of|at|the|this|that|image|picture|frame|frames|video|scene|photo"
    r"|respectively|as|shown"
    r"|asked|requested|described|for|bounding|box|corners?|coordinates?|time|t|second|s|moment|where|it|is|visible"
    r"|dog|object)\b|です|でした|处|位置|坐标|[-+]?[0-9]+(?:\.[0-9]+)?\s*(?:s|sec|seconds?|秒)(?![a-z]))*",
    re.IGNORECASE,
)
# "dog 2", "player 23", "At 5.0 s": numbers of an object or a moment.
_NUMBERED = re.compile(
    r"\b(?!from\b|to\b|by\b|and\b|of\b|x\b|y\b)[a-z]{2,}\s+(?:no\.?\s*)?[0-9]{1,4}(?![0-9.x×%:/])|[0-9]{1,4}(?:st|nd"
    r"|rd|th)\b|[0-9]{1,4}号"
    r"|(?<![0-9.])[0-9]{1,4}(?:\.[0-9]+)?\s*(?:s|sec|seconds?|秒)(?![a-z])|[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?",
    re.IGNORECASE,
)
_TOP_LEFT = r"(?:top|upper)[- ]left(?:[- ]corner)?|左上角?"
_BOTTOM_RIGHT = r"(?:bottom|lower)[- ]right(?:[- ]corner)?|右下角?"
_POINT = rf"[^0-9()\[\]]{{0,30}}[\[(]?\s*({_N}){_COMMA}({_N})\s*[\])]?"
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
_KEYS = ("bbox_2d", "bbox", "box", "boxes", "bounding_box", "boundingbox", "coordinates", "answer", "final_answer")
# Next to a box, these keys specify the object or the moment.
_REMARKS = ("category", "class", "name", "object", "score", "time", "timestamp", "frame", "id", "object_name", "color")


def read_box(body: str) -> str:
    """Return an answer as `x1,y1,x2,y2`. Raise Unreadable if it is not one box."""
    if as_it_is := strict(body, "spatial"):
        return as_it_is
    text = plain(_BOX_TAGS.sub(" ", strip_outside(body)))
    if text.startswith(("{", "[")) and (value := json_value(text)) is not None:
        return _checked(_box_in_json(value))
    if (sides := contrast(text)) and len(_COORDINATE.findall(sides[1])) == 4:
        text = sides[0]
    if is_denied(text) or is_doubted(text) or is_absent(text):
        raise Unreadable("not_a_box")
    text = _NAMES_IN_ORDER.sub(" ", _SCALE.sub(" ", text))
    boxes, (before, after) = _boxes(text)
    if _OTHER_BOX.search(before) or _OTHER_BOX.search(after) or _CORNER_WORD.search(before + " | " + after):
        raise Unreadable("not_a_box")
    if not _BEFORE.search(before[-60:] if len(before) > 60 else before) or not _AFTER.fullmatch(after):
        raise Unreadable("not_a_box")
    if re.search("[0-9]", _NUMBERED.sub(" ", before.replace("bbox_2d", " "))):
        raise Unreadable("not_a_box")
    return _checked(the_only(boxes))


def boxes_in(text: str) -> set[str]:
    """Return all boxes in a sentence that follows an answer."""
    return {_listed(match[0]) for pattern in (_BARE, _TWO_CORNERS) for match in pattern.finditer(text)}


def _boxes(text: str) -> tuple[list[str], tuple[str, str]]:
    """Return the boxes of a sentence, and the text before and after them."""
    if four := list(_FOUR.finditer(text)):
        return [_listed(box[0]) for box in four], _around(text, four)
    if corners := list(_TWO_CORNERS.finditer(text)):
        before, after = _around(text, corners)
        before, after = (re.sub(rf"(?:{_TOP_LEFT}|{_BOTTOM_RIGHT})", " ", side, flags=re.I) for side in (before, after))
        return [_listed(box[0]) for box in corners], (before, after)
    for pattern, order in zip(_FROM_CORNERS, ((1, 2, 3, 4), (3, 4, 1, 2)), strict=True):
        if match := pattern.search(text):
            return [",".join(match[i] for i in order)], _around(text, [match])
    if named := list(_NAMED.finditer(text)):
        names = [match[1].lower() for match in named]
        order = next((corners for corners in _CORNERS if sorted(corners) == sorted(names)), None)
        if order is None:
            raise Unreadable("two_answers" if len(named) > 4 else "not_a_box")
        return [",".join(named[names.index(name)][2] for name in order)], _around(text, named)
    numbers = _COORDINATE.findall(text)
    if len(numbers) != 4 or not (match := _BARE.search(text)):
        raise Unreadable("two_answers" if numbers and len(numbers) > 4 and len(numbers) % 4 == 0 else "not_a_box")
    return [_listed(match[0])], _around(text, [match])


def _around(text: str, matches: list[re.Match[str]]) -> tuple[str, str]:
    """Return the text before the first and after the last match. Raise if other text separates two matches."""
    for first, last in zip(matches, matches[1:], strict=False):
        if not re.fullmatch(
            r"[\s,;|()\[\]、，]*(?:and|und|y|et|和|=)?[\s,;|()\[\]、，]*", text[first.end() : last.start()]
        ):
            raise Unreadable("two_answers")
    return text[: matches[0].start()], text[matches[-1].end() :]


def _listed(text: str) -> str:
    return ",".join(number.lstrip("+") for number in _COORDINATE.findall(text))


def _checked(box: str) -> str:
    """Return the box. Raise if its coordinates range from 0 to 1 instead of 0 to 1000."""
    if max(map(Decimal, box.split(","))) <= 1:
        raise Unreadable("not_a_box")
    return box


def _box_in_json(value: object) -> str:
    """Read a box in JSON: four numbers, two corners, `{"bbox_2d": […], "label": …}`, `{"x1": …}`, corner and size."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        return read_box(value)
    if isinstance(value, dict):
        return _box_of_object({key: item for key, item in without_remarks(value).items() if key not in _REMARKS})
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
    if corners := next((corners for corners in _CORNERS if set(corners) == set(names)), None):
        return _box_in_json([names[corner] for corner in corners])
    for size in (("x", "y", "width", "height"), ("x", "y", "w", "h")):
        if set(size) == set(names):
            return _sized_box([names[key] for key in size])
    # An unknown key may mean another order or another scale.
    if len(names) != 1 or not set(names) <= set(_KEYS):
        raise Unreadable("not_a_box")
    (box,) = names.values()
    return _box_in_json(box)


def _sized_box(values: list[object]) -> str:
    """Return the box with a top left corner, a width and a height."""
    try:
        x, y, width, height = (Decimal(str(value)) for value in values)
    except InvalidOperation:
        raise Unreadable("not_a_box") from None
    return ",".join(map(decimal_text, (x, y, x + width, y + height)))
