"""Parse ground truths in a few strict spellings, and rewrite them to the text that belongs inside `<answer>`.

A teacher's prose is parsed leniently (`method.natural`). A ground truth defines what is correct, so it is never
guessed: any other spelling, and any ambiguous text, is rejected with advice on what to write instead. Closed answers
may be wrapped in `\\boxed{}` or preceded by `Answer:`.

========  ==============================================================================================
task      written as
========  ==============================================================================================
mcq       `B`, `b`, `(B)`, `[B]`, `B.`; a letter with the text of its option: `B. milk`; the text alone
temporal  `3.5 to 10`, `3.5 - 10`, `from 3s to 5 seconds`, `00:12-00:20`, `1:00:03 to 1:00:05`, `[3.5, 10]`,
          `{"start": 3.5, "end": 10}`, `{"time": [3.5, 10]}`
spatial   `100,200,300,400`, in brackets too, `{"boxes": […]}`, `{"bbox_2d": […]}`, `{"x1": …}`
numeric   `3`, `-2.5`, `1e3`, `1,200`
ocr       any text
open      any text
========  ==============================================================================================
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rmsd_fast.data.media_paths import Span, is_number
from rmsd_fast.method.answers import bare_options, option_letters, parse_answer_body
from rmsd_fast.method.folding import fold_text

# "\boxed{B}", "Answer: B", "答案：B".
_WRAPPED = re.compile(
    r"\$?\\boxed\s*\{([^{}]*)\}\$?|(?:(?:the\s+)?(?:final\s+|correct\s+)?answer|答案)\s*[:：]\s*(\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_LABEL = r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\s*[.:)、。]?)"
_LETTER = re.compile(_LABEL)
_LETTER_AND_TEXT = re.compile(rf"{_LABEL}(?:\s+|(?<=[)\].:、。]))(?:[-–—]\s+)?(\S.*)", re.DOTALL)
_DIGITS = re.compile(r"[(\[]?\s*([0-9]+)\s*[)\].:]?")
# In "0,125" the comma is a decimal comma.
_GROUPED = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_CLOCK = r"(?:[0-9]{1,2}:[0-5][0-9]:[0-5][0-9]|[0-9]{1,3}:[0-5][0-9])(?:\.[0-9]+)?"
_TIME = rf"({_CLOCK})|([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:\s*(?:seconds?|secs?|s|秒))?"
_ONE_TIME = re.compile(_TIME, re.IGNORECASE)
_INTERVAL = re.compile(rf"(?:from\s+|从\s*)?(?:{_TIME})\s*(?:to|[-–—~]|到|至)\s*(?:{_TIME})", re.IGNORECASE)
_START_END = (("start", "end"), ("start_time", "end_time"))
_CORNERS = ("x1", "y1", "x2", "y2")
_BRACKETS = {"[": "]", "(": ")"}


class GroundTruthError(ValueError):
    """A ground truth that is not exactly one unambiguous answer. The message says what to do."""


class CoordinatesError(GroundTruthError):
    """A box in a valid spelling whose coordinates are not from 0 to 1000."""


def read_ground_truth(value: object, task: str, options: Sequence[str] | None = None) -> str:
    """Return a ground truth as it belongs inside `<answer>`.

    Args:
        value: the value in the record: a text, a number, a list or an object.
        task: one of TASK_TYPES.
        options: options of an mcq question in order, bare or labeled; None means that only a letter is accepted.
    Raises:
        GroundTruthError: the spelling is not in the table above, or is ambiguous.
    """
    if task not in ("ocr", "open") and isinstance(value, str) and (wrapped := _WRAPPED.fullmatch(value.strip())):
        value = wrapped[1] or wrapped[2]
    if task == "mcq":
        return _letter(value, options)
    if task == "numeric":
        return _number(value)
    if task == "temporal":
        return _interval(_parsed_json(value))
    if task == "spatial":
        return _box(_parsed_json(value))
    if isinstance(value, str) and value.strip():
        return value.strip()
    if is_number(value):
        return str(value)
    raise GroundTruthError("write a text")


def check_times(start: float, end: float, *, duration: float | None, span: Span) -> None:
    """Raise GroundTruthError for an interval that the video cannot contain.

    Args:
        duration: duration of the video in seconds, if the record states it.
        span: the displayed part of the video. Its bounds replace the duration, which might refer to the part.
    Raises:
        GroundTruthError: the interval exceeds the video or its part by more than 1 s or 5%, whichever is more.
    """
    if start < 0:
        raise GroundTruthError("times count from 0 at the start of the video")
    low, high = span or (0.0, duration)
    low = low or 0.0
    slack = 1.0 if high is None else max(1.0, 0.05 * (high - low))
    if span and (start < low - slack or (high is not None and end > high + slack)):
        shown = f"{low:g} s to {'its end' if high is None else f'{high:g} s'}"
        raise GroundTruthError(f"the part shown is {shown}; write times that count from the start of the whole file")
    if not span and high is not None and end > high + slack:
        raise GroundTruthError(f"the video has a duration of {high:g} s: write seconds, not frames or milliseconds")


# --- mcq -------------------------------------------------------------------------------------------------------------


def _letter(value: object, options: Sequence[str] | None) -> str:
    is_text = isinstance(value, str)
    if not is_text and not is_number(value):
        raise GroundTruthError("write the letter of the option")
    text = unicodedata.normalize("NFKC", str(value)).strip()
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if options is None else option_letters(options)
    texts = [fold_text(option) for option in bare_options(options)] if options else []
    readings = {letter for letter, option in zip(letters, texts, strict=False) if option == fold_text(text)}
    if (alone := _LETTER.fullmatch(text)) and _upper(alone) in letters:
        readings.add(_upper(alone))
    if led := _LETTER_AND_TEXT.fullmatch(text):
        letter, words = _upper(led), fold_text(led[4])
        if letter in letters[: len(texts)] and texts[letters.index(letter)] == words:
            readings.add(letter)
    if digits := _DIGITS.fullmatch(text):
        # A number that is also the text of an option might be an index that counts from 0 or from 1.
        indices = [int(digits[1]) - first for first in (0, 1)] if len(digits[1]) <= 2 else []
        by_index = {letters[index] for index in indices if 0 <= index < len(texts)}
        if not readings or by_index - readings:
            raise GroundTruthError("an index may count from 0 or from 1; write the letter")
    if len(readings) == 1:
        return readings.pop()
    if not readings:
        raise GroundTruthError("write the letter of the option" + ("" if options else ", and nothing else"))
    first = sorted(readings)[0]
    example = f"{first}. {bare_options(options)[letters.index(first)]}"
    raise GroundTruthError(f"it may mean {' or '.join(sorted(readings))}; write the letter with its text: {example!r}")


def _upper(label: re.Match[str]) -> str:
    return next(group for group in label.groups()[:3] if group).upper()


# --- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: object) -> str:
    if is_number(value):
        return str(value)
    text = value.strip() if isinstance(value, str) else ""
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if parse_answer_body(text, "numeric") is None:
        raise GroundTruthError("write the number alone, in digits")
    return text


def _interval(value: object) -> str:
    todo = "write '<start> to <end>' in seconds, or times as mm:ss or hh:mm:ss"
    if isinstance(value, dict):
        # EasyVideoR1 writes {"time": [3.5, 10], "boxes": {}}.
        value = {key: item for key, item in value.items() if key != "boxes" or item}
        names = [names for names in (*_START_END, ("time",)) if set(value) == set(names)]
        if not names:
            raise GroundTruthError(todo)
        value = value["time"] if names[0] == ("time",) else [value[name] for name in names[0]]
    if isinstance(value, list):
        value = _inner(value)
        times = [_ONE_TIME.fullmatch(str(item).strip()) for item in value] if len(value) == 2 else []
        if all(is_number(item) for item in value) and len(value) == 2:
            return f"{value[0]} to {value[1]}"
        if len(times) != 2 or not all(times):
            raise GroundTruthError(todo)
        return _joined(*(time.groups() for time in times), todo)
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if parse_answer_body(text, "temporal") is not None:
        return text
    interval = _INTERVAL.fullmatch(text)
    if interval is None:
        raise GroundTruthError(todo)
    return _joined(interval.groups()[:2], interval.groups()[2:], todo)


def _joined(first: tuple[str | None, ...], last: tuple[str | None, ...], todo: str) -> str:
    """Join two times, each in clock format or in seconds. In "3 to 0:05", the 3 might be minutes."""
    if (first[0] is None) != (last[0] is None):
        raise GroundTruthError(todo)
    return f"{_seconds(*first)} to {_seconds(*last)}"


def _seconds(clock: str | None, seconds: str | None) -> str:
    if clock is None:
        return seconds
    total = Decimal(0)
    for part in clock.split(":"):
        total = total * 60 + Decimal(part)
    return str(total)


def _box(value: object) -> str:
    todo = "write x1,y1,x2,y2, from 0 to 1000 of the picture's width and height"
    if isinstance(value, dict):
        keys = set(value) - {"label"}
        if keys == set(_CORNERS):
            value = [value[name] for name in _CORNERS]
        elif keys in ({"boxes"}, {"box"}, {"bbox_2d"}):
            value = value[keys.pop()]
        else:
            raise GroundTruthError(
                todo + ("; a 'bbox' may hold x, y, width, height" if "bbox" in keys or "format" in keys else "")
            )
    if isinstance(value, list):
        value = ",".join(map(str, _inner(value)))
    text = value.strip() if isinstance(value, str) else ""
    if text[:1] in _BRACKETS and text.endswith(_BRACKETS[text[0]]):
        text = text[1:-1]
    box = parse_answer_body(text, "spatial")
    if box is None:
        raise GroundTruthError(todo)
    if max(box) <= 1:
        raise CoordinatesError("the coordinates seem to be from 0 to 1; multiply them by 1000")
    if max(box) > 1000 or min(box) < 0:
        raise CoordinatesError(f"{todo}: 1000 * pixels / width, 1000 * pixels / height")
    return ",".join(part.strip() for part in text.split(","))


def _parsed_json(value: Any) -> Any:
    """Return the value of a text that is a JSON list or object; anything else unchanged."""
    if isinstance(value, str) and value.strip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _inner(value: list[Any]) -> list[Any]:
    """`[[3, 5]]` as `[3, 5]`."""
    return value[0] if len(value) == 1 and isinstance(value[0], list) else value
