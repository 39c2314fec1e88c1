"""Parse responses: the outer format, and the content of ``<answer>`` for each task type.

A response is ``<think>…</think><answer>…</answer>``. Each of the four tags occurs exactly once and in this order. White
space is allowed around the response and between the two blocks. The content of ``<answer>``, after stripping:

========  ==========================================  =====================
task      content                                     parsed value
========  ==========================================  =====================
mcq       ``B``, ``B.``, ``(B)``, ``[B]``, any case   ``"B"``
temporal  ``12.5 to 20.0`` (seconds)                  ``(12.5, 20.0)``
spatial   ``x1,y1,x2,y2``                             four floats
numeric   a decimal number                            float
ocr       text                                        the text
open      text                                        the text
========  ==========================================  =====================

Benchmarks have two more task types (`method.benchmark_tasks`): `exact`, a short text or number, and `boxes`, a JSON
object of seconds and boxes such as ``{"3": [x1, y1, x2, y2]}``.

Parsing is strict: the whole content must match, and answers inside sentences are not found. Numbers are ASCII decimals
(``3``, ``-2.5``, ``.5``, ``1e3``). Units, percent signs, thousands separators, underscores, hexadecimal, digits of
other scripts, ``nan``, ``inf`` and numbers that overflow to infinity (``1e400``) do not parse.

Source: R-MSD (arXiv 2603.11423), response format and task types.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

from .benchmark_tasks import BENCHMARK_FORMAT, Boxes, parse_boxes

TASK_TYPES = ("mcq", "temporal", "spatial", "numeric", "ocr", "open")
CLOSED_TASKS = ("mcq", "temporal", "spatial", "numeric", "ocr")

# Task types of benchmark questions only; training refuses them.
BENCHMARK_TASKS = tuple(BENCHMARK_FORMAT)
ALL_TASKS = (*TASK_TYPES, *BENCHMARK_TASKS)
# Tasks whose answers a metric compares with a ground truth.
GRADED_TASKS = (*CLOSED_TASKS, *BENCHMARK_TASKS)

ParsedAnswer = str | float | tuple[float, ...] | Boxes

EXPECTED_FORMAT = {
    "mcq": "one option letter such as 'B'",
    "temporal": "'<start> to <end>' in seconds such as '12.5 to 20.0'",
    "spatial": "'x1,y1,x2,y2' such as '100,200,300,400'",
    "numeric": "one finite number such as '3' or '2.5'",
    "ocr": "text that is not empty",
    "open": "text that is not empty",
    **BENCHMARK_FORMAT,
}

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Spellings of an option's letter: "A. x", "A) x", "(A) x", "[A] x", "A: x", "A - x", "A、x", "a) x".
_OPTION_LABEL = re.compile(
    r"\s*(?:[(\[（【]\s*([A-Za-zＡ-Ｚ])\s*[)\]）】]|([A-Za-zＡ-Ｚ])\s*(?:[.．。:：、)）]|[-–—]\s))\s*"
)
# [A-Za-z] and [0-9] are explicit because re.IGNORECASE would match the Kelvin sign as K, and \d digits of all scripts.
_LETTER = re.compile(r"([A-Za-z])\.?|\(([A-Za-z])\)|\[([A-Za-z])\]")
_NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_NUMERIC = re.compile(rf"({_NUMBER})")
_TEMPORAL = re.compile(rf"({_NUMBER})\s+to\s+({_NUMBER})")
_SPATIAL = re.compile(r"\s*,\s*".join([rf"({_NUMBER})"] * 4))


def parse_answer(text: str, task_type: str, options: Sequence[str] | None = None) -> ParsedAnswer | None:
    """Return the answer of a whole response, or None if the response is not valid.

    A response is valid if it has the outer format and the whole text inside ``<answer>`` parses.

    Args:
        text: the whole response.
        task_type: one of ALL_TASKS.
        options: the choices of an ``mcq`` question in order; a letter outside them does not parse. None allows any
            letter.
    Returns:
        The parsed value, or None.
    Raises:
        ValueError: the task type is unknown, or the number of options is outside 1..26.
        TypeError: text is not a str, or options is a single str.
    """
    _check_arguments(text, task_type, options)
    if not has_outer_format(text):
        return None
    return parse_answer_body(answer_body(text), task_type, options)


def parse_answer_body(body: str, task_type: str, options: Sequence[str] | None = None) -> ParsedAnswer | None:
    """Return the value of the text inside ``<answer>``, or of a ground truth; None if it does not parse.

    Args:
        body: the text without tags.
        task_type: one of ALL_TASKS.
        options: as in parse_answer.
    Returns:
        The parsed value, or None.
    Raises:
        ValueError, TypeError: as in parse_answer.
    """
    _check_arguments(body, task_type, options)
    body = body.strip()
    if task_type == "mcq":
        match = _LETTER.fullmatch(body)
        if match is None:
            return None
        letter = next(group for group in match.groups() if group).upper()
        return letter if options is None or letter in option_letters(options) else None
    if task_type == "temporal":
        return _numbers(_TEMPORAL.fullmatch(body))
    if task_type == "spatial":
        return _numbers(_SPATIAL.fullmatch(body))
    if task_type == "numeric":
        values = _numbers(_NUMERIC.fullmatch(body))
        return None if values is None else values[0]
    if task_type == "boxes":
        return parse_boxes(body)
    return body or None


def has_outer_format(text: str) -> bool:
    """Return whether the whole response has the form ``<think>…</think><answer>…</answer>`` (R_outer)."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    think_open, think_close, answer_open, answer_close = (text.index(tag) for tag in _TAGS)
    return (
        think_open == 0
        and think_close < answer_open < answer_close
        and answer_close + len("</answer>") == len(text)
        and not text[think_close + len("</think>") : answer_open].strip()
    )


def has_task_format(text: str, task_type: str, options: Sequence[str] | None = None) -> bool:
    """Return whether the response has exactly one ``<answer>…</answer>`` whose content parses for the task (R_task).

    The rest of the outer format is not required, because R_outer rewards it and the two rewards are separate.
    """
    _check_arguments(text, task_type, options)
    body = answer_body(text)
    return body is not None and parse_answer_body(body, task_type, options) is not None


def answer_body(text: str) -> str | None:
    """Return the text inside a response's only ``<answer>…</answer>``; None if there is none, or more than one."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    start, end = text.index("<answer>") + len("<answer>"), text.index("</answer>")
    return text[start:end] if start <= end else None


def is_empty_answer(text: str) -> bool:
    """Return whether a response gives no answer: it has no text, or only white space inside its one `<answer>` block.

    If a response does not have exactly one such block, its whole text is tested, so a missing block is not an empty
    answer.
    """
    body = answer_body(text)
    return not (text if body is None else body).strip()


def option_letters(options: Sequence[str]) -> str:
    """Return the letters of the options in order, "ABC…", whether the options are labeled (``A. x``) or bare."""
    if isinstance(options, str):
        raise TypeError(f"options: expected a sequence of strings, got the single string {options!r}; pass a list")
    if not 1 <= len(options) <= 26:
        raise ValueError(f"options: expected 1 to 26 choices (letters A to Z), got {len(options)}")
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]


def bare_options(options: Sequence[str]) -> list[str]:
    """Return the texts of the options without their letters.

    Letters are removed only if every option has its letter, in order, followed by a text. "I. Newton" alone is a text,
    and so are the options "A", "B".
    """
    labels = [_OPTION_LABEL.match(option) for option in options]
    if "".join(map(_letter_of, labels)) != option_letters(options):
        return [option.strip() for option in options]
    texts = [option[label.end() :].strip() for option, label in zip(options, labels, strict=True)]
    return texts if all(texts) else [option.strip() for option in options]


def own_letter(option: str) -> tuple[str, str]:
    """Return the letter of a labeled option and the text after it, or ("", the option) if it has no letter."""
    label = _OPTION_LABEL.match(option)
    return (_letter_of(label), option[label.end() :].strip()) if label else ("", option.strip())


def _letter_of(label: re.Match[str] | None) -> str:
    return unicodedata.normalize("NFKC", label[1] or label[2]).upper() if label else ""


def _numbers(match: re.Match[str] | None) -> tuple[float, ...] | None:
    if match is None:
        return None
    values = tuple(float(group) for group in match.groups())
    return values if all(math.isfinite(value) for value in values) else None


def _check_arguments(text: str, task_type: str, options: Sequence[str] | None) -> None:
    if not isinstance(text, str):
        raise TypeError(f"response text: expected str, got {type(text).__name__}")
    if task_type not in ALL_TASKS:
        raise ValueError(f"task_type: expected one of {', '.join(ALL_TASKS)}, got {task_type!r}")
    if options is not None and task_type == "mcq":
        option_letters(options)
