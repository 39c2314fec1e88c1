"""Intervals, boxes and numbers as people write them, in decimals that `method.answers` parses."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from ..answers import parse_answer_body
from .reasons import Unreadable, the_only
from .text import json_object, json_value, plain, strip_outside

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
# "i.e. 7 to 10 seconds": what stands behind explains what stands before.
_THAT_IS = re.compile(r"\bi\.e\.,?|\bthat is,?\s|即")
_TO_SQUARE = str.maketrans("()", "[]")

_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_TEENS = ("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: number for number, word in enumerate((*_ONES, *_TEENS))}
_WORDS |= {word: 10 * ten for ten, word in enumerate(_TENS, start=2)}
_WORDS |= {f"{word}-{_ONES[one]}": 10 * ten + one for ten, word in enumerate(_TENS, start=2) for one in range(1, 10)}
_WORD = re.compile(rf"\b(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})\b", re.IGNORECASE)
_HAN_BY_VALUE = ("零〇", "一", "二两兩", "三", "四", "五", "六", "七", "八", "九")
_HAN_DIGITS = {digit: value for value, digits in enumerate(_HAN_BY_VALUE) for digit in digits}
# A whole answer: "三个", "大约十五本", "二十三".
_HAN = re.compile(
    rf"(?:大约|大概|约|共|一共|总共)?([{''.join(_HAN_DIGITS)}]?十?[{''.join(_HAN_DIGITS)}]?)\s*"
    "[个個只名人次辆件张条位种本杯台朵棵块米秒岁层つ匹]?"
)


def _strict(text: str, task: str) -> str | None:
    """What parses as it stands, with its white space made regular."""
    text = " ".join(text.split())
    return text if parse_answer_body(text, task) is not None else None


def _text(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


# --- temporal --------------------------------------------------------------------------------------------------------

_CLOCK = r"\d{1,2}:[0-5]?\d(?::[0-5]?\d)?(?:\.\d+|,\d{3}(?!\d))?"
_HOUR, _MINUTE = r"(?:h|hrs?|hours?|小时|时间|時間)(?![a-z])", r"(?:m|mins?|minutes?|分钟|分鐘|分)(?![a-z])"
_SECOND = r"(?:s|secs?|seconds?|秒钟|秒鐘|秒|segundos?|sekunden?|secondes?)(?![a-z])"
_TIME = re.compile(
    rf"(?P<clock>{_CLOCK})(?:\s*{_SECOND})?"
    rf"|(?:(?P<h>\d+)\s*{_HOUR}\s*(?:and\s+)?)?(?P<m>\d+(?:\.\d+)?)\s*{_MINUTE}(?:\s*(?:and\s+)?(?P<s>\d+(?:\.\d+)?)\s*{_SECOND})?"
    rf"|(?P<number>{_DECIMAL})(?P<unit>\s*{_SECOND})?",
    re.IGNORECASE,
)
_JOINED = re.compile(
    r"\b(?:to|until|till|through|thru|bis|hasta|a|à|ends?|ending|end_time|finish(?:es)?|stops?)\b|-|~|→|到|至|から|结束",
    re.IGNORECASE,
)
_OPENED = re.compile(
    r"\b(?:between|entre|zwischen|starts?|begins?|starting|beginning|start_time)\b|开始", re.IGNORECASE
)
_PAIRED = re.compile(r"\b(?:and|y|und|et)\b|[,，和]", re.IGNORECASE)
_NOT_SECONDS = re.compile(r"\bframes?\b|帧|コマ|\bnot\b|不|%|\bms\b|milli|\bpercent", re.IGNORECASE)
_OR = re.compile(r"\b(?:or|either|oder)\b|或", re.IGNORECASE)
_WORD_BETWEEN = re.compile(r"\d\s*(?:\bto\b|bis|hasta|à|-)\s*\d", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"(?<![\d,:])(\d+),(\d{1,2})(?![\d,])")
_START = ("start", "start_time", "begin", "from", "start_s", "start_sec", "t_start", "starttime")
_END = ("end", "end_time", "stop", "to", "end_s", "end_sec", "t_end", "endtime")


def read_interval(body: str) -> str:
    """`<start> to <end>` in seconds; raises Unreadable where an answer is not one interval."""
    if strict := _strict(body, "temporal"):
        return strict
    text = plain(body)
    if text.startswith(("{", "[", "(")) and (value := json_value(text.translate(_TO_SQUARE))) is not None:
        return _interval_of(value)
    text = _THAT_IS.split(text)[-1]
    if _OR.search(text):
        raise Unreadable("two_answers")
    if _NOT_SECONDS.search(text):
        raise Unreadable("not_an_interval")
    text = _WORD.sub(lambda word: str(_WORDS[word[0].lower()]), text)
    if _WORD_BETWEEN.search(text):
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    times = list(_TIME.finditer(text))
    # A digit that no time has taken would be dropped without a word.
    if len(times) < 2 or len(times) % 2 or re.search(r"\d", _TIME.sub(" ", text)):
        raise Unreadable("not_an_interval")
    intervals = [_interval_between(text, *times[index : index + 2]) for index in range(0, len(times), 2)]
    if len({(Decimal(start), Decimal(end)) for start, end in intervals}) != 1:
        raise Unreadable("two_answers")
    return " to ".join(intervals[0])


def _interval_between(text: str, first: re.Match[str], last: re.Match[str]) -> tuple[str, str]:
    between, before = text[first.end() : last.start()], text[: first.start()].rstrip()
    joined = _JOINED.search(between) or (_PAIRED.search(between) and _OPENED.search(before))
    # "[3, 5]" inside a sentence, "3, 5"; but "3,5" is one number in half of the world.
    joined = joined or (between.strip() == "," and (before.endswith(("[", "(")) or between != ","))
    if not joined or before.endswith("-"):
        raise Unreadable("not_an_interval")
    start, end = _seconds(first), _seconds(last)
    # "1 to 2 minutes": a unit that only the end has counts for both.
    if first["number"] and not first["unit"] and last["m"] and not last["s"]:
        start = _text(60 * Decimal(start))
    return start, end


def _seconds(time: re.Match[str]) -> str:
    if time["number"]:
        return time["number"].replace(",", "")
    if time["clock"]:
        total = Decimal(0)
        for part in time["clock"].replace(",", ".").split(":"):
            total = total * 60 + Decimal(part)
        return _text(total)
    return _text(3600 * Decimal(time["h"] or 0) + 60 * Decimal(time["m"]) + Decimal(time["s"] or 0))


def _interval_of(value: object) -> str:
    """An interval in JSON: `[3, 5]`, `[[3, 5]]`, `{"start": 3, "end": 5}`, `{"time": [3, 5]}`."""
    while isinstance(value, list | dict) and len(value) == 1:
        (value,) = value.values() if isinstance(value, dict) else value
    if isinstance(value, str):
        return read_interval(value)
    if isinstance(value, dict):
        names = {str(key).lower(): item for key, item in value.items()}
        value = [names[key] for keys in (_START, _END) for key in keys if key in names]
    if not isinstance(value, list) or len(value) < 2:
        raise Unreadable("not_an_interval")
    if len(value) > 2 or all(isinstance(item, list) for item in value):
        raise Unreadable("two_answers")
    times = [_TIME.fullmatch(item.strip()) if isinstance(item, str) else None for item in value]
    if not all(times):
        raise Unreadable("not_an_interval")
    return " to ".join(map(_seconds, times))


# --- spatial ---------------------------------------------------------------------------------------------------------

_COORDINATE = re.compile(r"(?<![A-Za-z0-9_.])[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?![\w%]|\.\d)")
_FOUR = re.compile(r"[\[(]\s*[-+\d.]+(?:\s*,\s*[-+\d.]+){3}\s*[\])]")
_BOX_TAGS = re.compile(
    r"<ref>.*?</ref>|<\|object_ref_start\|>.*?<\|object_ref_end\|>|<\|(?:box_start|box_end)\|>|</?(?:box|bbox|bounding_box)>",
    re.IGNORECASE | re.DOTALL,
)
_SCALE = re.compile(r"\(?[^()\[\]\d]*\b0\s*(?:-|to|~)\s*1,?000\b[^()\[\]\d]*\)?", re.IGNORECASE)
# Pixels, sizes, and Gemini's box_2d, which names y first.
_OTHER_BOX = re.compile(r"\b(?:not|px|pixels?|width|height|w|h|cx|cy|x_?cent(?:er|re)|box_2d)\b|不|像素", re.IGNORECASE)
_TOP_LEFT = re.compile(r"\b(?:top|upper)[- ]left|左上", re.IGNORECASE)
_BOTTOM_RIGHT = re.compile(r"\b(?:bottom|lower)[- ]right|右下", re.IGNORECASE)
_OTHER_CORNER = re.compile(r"\b(?:top|upper)[- ]right|\b(?:bottom|lower)[- ]left|右上|左下", re.IGNORECASE)
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("left", "top", "right", "bottom"),
)
_CORNER = re.compile(r"\b(x1|y1|x2|y2|[xy]_?min|[xy]_?max|left|top|right|bottom)\b\s*[:=]", re.IGNORECASE)
_BOX_KEYS = ("bbox_2d", "bbox", "box", "boxes", "bounding_box", "boundingbox", "coordinates", "answer")


def read_box(body: str) -> str:
    """`x1,y1,x2,y2`; raises Unreadable where an answer is not one box."""
    if strict := _strict(body, "spatial"):
        return strict
    text = plain(_BOX_TAGS.sub(" ", strip_outside(body)))
    if text.startswith(("{", "[")) and (value := json_value(text)) is not None:
        return _box_of(value)
    if _OR.search(text):
        raise Unreadable("two_answers")
    text = _SCALE.sub(" ", text)
    if _OTHER_BOX.search(text) or _OTHER_CORNER.search(text):
        raise Unreadable("not_a_box")
    # Four numbers in brackets are the box, whatever other numbers the sentence holds.
    if groups := _FOUR.findall(text):
        return the_only([",".join(_COORDINATE.findall(group)) for group in groups])
    numbers, corners = _COORDINATE.findall(text), [name.lower() for name in _CORNER.findall(text)]
    if len(numbers) != 4 or re.search(r"\d", re.sub(r"\b[xy][12]\b|bbox_2d", " ", _COORDINATE.sub(" ", text))):
        raise Unreadable("two_answers" if numbers and len(numbers) % 4 == 0 and len(numbers) > 4 else "not_a_box")
    low, high = _TOP_LEFT.search(text), _BOTTOM_RIGHT.search(text)
    if low and high and low.start() > high.start():
        numbers = numbers[2:] + numbers[:2]
    if corners:
        order = next((names for names in _CORNERS if sorted(names) == sorted(corners)), None)
        if order is None:
            raise Unreadable("not_a_box")
        numbers = [numbers[corners.index(name)] for name in order]
    return ",".join(number.lstrip("+") for number in numbers)


def _box_of(value: object) -> str:
    """A box in JSON: four numbers, two corners, `{"bbox_2d": […], "label": …}`, `{"x1": …}`, corner and size."""
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    if isinstance(value, str):
        return read_box(value)
    if isinstance(value, dict):
        names = {str(key).lower(): item for key, item in value.items()}
        if corners := next((corners for corners in _CORNERS if set(corners) <= set(names)), None):
            value = [names[corner] for corner in corners]
        elif {"x", "y"} <= set(names) and ({"width", "height"} <= set(names) or {"w", "h"} <= set(names)):
            return _sized_box([names.get(key, names.get(key[0])) for key in ("x", "y", "width", "height")])
        else:
            boxes = [names[key] for key in _BOX_KEYS if key in names]
            if len(boxes) != 1:
                raise Unreadable("not_a_box")
            return _box_of(boxes[0])
    if isinstance(value, list) and len(value) == 2 and all(isinstance(item, list) and len(item) == 2 for item in value):
        value = [*value[0], *value[1]]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(item, dict | list) for item in value):
        return the_only([_box_of(item) for item in value])
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(item, str) for item in value):
        raise Unreadable("not_a_box")
    if not all(_COORDINATE.fullmatch(item.strip()) for item in value):
        raise Unreadable("not_a_box")
    return ",".join(item.strip() for item in value)


def _sized_box(values: list[object]) -> str:
    """The box of a top left corner, a width and a height."""
    try:
        x, y, width, height = (Decimal(str(value)) for value in values)
    except InvalidOperation:
        raise Unreadable("not_a_box") from None
    return ",".join(map(_text, (x, y, x + width, y + height)))


# --- numeric ---------------------------------------------------------------------------------------------------------

_COUNTED = re.compile(rf"(?<![A-Za-z0-9_.,:/^])[+-]?(?:{_DECIMAL})(?![\d:/])")
_FRACTION = re.compile(r"[\s$]*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}[\s$.]*")
_POWER = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*(?:\*|×|x|\\times|·)\s*10\s*(?:\^|\*\*)\s*[({]?\s*([+-]?\d{1,2})\s*[)}]?")
_BOUND = re.compile(
    r"\b(?:at (?:least|most)|(?:no )?(?:more|less|fewer) than|over|under|above|below|up to|or|between)\b"
    r"|\b(?:minimum|maximum)\b"
    r"|[<>≥≤±]|\d\s*\+(?!\s*\d)|至少|至多|最多|最少|以上|以下|超过|不到|或",
    re.IGNORECASE,
)
_RANGE = re.compile(rf"(?:{_DECIMAL})\s*(?:-|~|\bto\b|到|至)\s*(?:{_DECIMAL})", re.IGNORECASE)
# Sums, fractions, ordinals, denials. A unit such as km/h is none of them.
_NO_COUNT = re.compile(
    r"\d\s*[*/^:√×÷\\+-]|[*/^√×÷\\]\s*\d|\bnot\b|n['’]t\b|不是|\d(?:st|nd|rd|th)\b|第", re.IGNORECASE
)
_ASIDE = re.compile(r"(?<=\S)\s*\([^()]*\)")
_SCALED = re.compile(
    r"(?:\d\s*|\b)(hundred|thousand|million|billion|dozen|(?<=\d)k|百|千|万|亿)(?![a-z])", re.IGNORECASE
)
_POWERS_OF_TEN = {"hundred": 2, "thousand": 3, "k": 3, "million": 6, "billion": 9, "百": 2, "千": 3, "万": 4, "亿": 8}
_NUMBER_KEYS = ("answer", "count", "number", "value", "result", "total")


def read_number(body: str) -> str:
    """A decimal number; raises Unreadable where an answer is not one number."""
    if strict := _strict(body, "numeric"):
        return strict
    if (fraction := _FRACTION.fullmatch(body)) and int(fraction[2]):
        return _text(round(Decimal(fraction[1]) / Decimal(fraction[2]), 9))
    text = plain(body)
    if record := json_object(text):
        values = [record[key] for key in _NUMBER_KEYS if key in record]
        if len(values) != 1 or not isinstance(values[0], str):
            raise Unreadable("not_a_number")
        return read_number(values[0])
    # "x = 3", "2 + 1 = 3": what stands behind the last sign of equality.
    text = re.split(r"[=≈]", _THAT_IS.split(text)[-1])[-1].strip()
    if power := _POWER.fullmatch(text):
        return _text(Decimal(power[1]).scaleb(int(power[2])))
    if _BOUND.search(text) or _RANGE.search(text):
        raise Unreadable("a_range")
    # "2 times (at 0:03 and 0:09)": an aside explains the number that stands before it.
    outside = _ASIDE.sub("", text)
    text = outside if re.search(r"\d", outside) or _WORD.search(outside) else text
    if _NO_COUNT.search(text):
        raise Unreadable("not_a_number")
    numbers = [number.replace(",", "") for number in _COUNTED.findall(text)]
    rest = _COUNTED.sub(" ", text)
    words = [str(_WORDS[word.lower()]) for word in _WORD.findall(rest)]
    if (han := _HAN.fullmatch(text)) and han[1]:
        words.append(str(_han_number(han[1])))
    # With digits at hand, "one" is mostly a pronoun.
    values = numbers + [word for word in words if not numbers or word != "1"]
    if not values or re.search(r"(?<![A-Za-z])\d", rest):
        raise Unreadable("not_a_number")
    if len({Decimal(value) for value in values}) != 1:
        raise Unreadable("two_answers")
    if scale := _SCALED.search(text):
        if scale[1].lower() == "dozen":
            raise Unreadable("not_a_number")
        values[0] = _text(Decimal(values[0]).scaleb(_POWERS_OF_TEN[scale[1].lower()]))
    return values[0].lstrip("+")


def _han_number(text: str) -> int:
    """A number below 100 in Chinese numerals."""
    tens, ten, ones = text.rpartition("十")
    if not ten:
        return int("".join(str(_HAN_DIGITS[digit]) for digit in text))
    return 10 * (_HAN_DIGITS[tens] if tens else 1) + (_HAN_DIGITS[ones] if ones else 0)
