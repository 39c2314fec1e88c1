"""The text of one answer in the form that `method.answers` parses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..answers import TASK_TYPES
from .numbers import read_box, read_interval, read_number
from .options import read_letter
from .reasons import Unreadable, the_only
from .text import json_object, strip_latex_text, strip_outside, unquoted

# What announces a text that was read, in front of a quotation or behind it, and what does so without one.
_READS = re.compile(
    r"\b(?:reads?|says?|is|are|shows?|displays?|spells?|reading|saying|see|dice|pone|steht|lautet|indique)\b"
    r"|写着|写的是|写有|显示|文字是|文字为|内容是|内容为|字是",
    re.IGNORECASE,
)
_READ_AFTER = re.compile(r"\s*(?:と書|と読|と表示|とあり|と出)")
_THING = r"(?:text|sign|caption|subtitle|title|label|word|words|banner|display|screen|board|plate)"
_SAYS = re.compile(
    rf"(?:the|this|its|on-?screen)\s+(?:[\w-]+\s+){{0,4}}?{_THING}\s+(?:[\w-]+\s+){{0,6}}?(?:(?:reads?|says?)\b\s*[:：]?|is\s*[:：])\s*"
    r"|.{0,12}(?:写着|写的是|文字是|文字为|内容是)\s*[:：]?\s*",
    re.IGNORECASE,
)
_QUOTED = re.compile(
    r"[\"“「『«„]([^\"”“」』»]+)[\"”“」』»]|(?<!\w)[‘']([^’'\n]+)[’'](?!\w)|\*\*([^*\n]+)\*\*|`([^`\n]+)`"
)
_DENIED = re.compile(r"\b(?:not|never|cannot)\b|n['’]t\b|不|没", re.IGNORECASE)
_TEXT_KEYS = ("text", "text_content", "answer", "ocr", "content", "transcription")
_ILLEGIBLE = re.compile(
    rf"(?:(?:the|this|its|any)\s+)?(?:[\w-]+\s+){{0,3}}{_THING}\s+(?:[\w-]+\s+){{0,5}}?"
    r"(?:illegible|unreadable|unclear|(?:not|n['’]t)\s+(?:be\s+)?(?:legible|readable|clear|visible|read)|too\s+(?:blur|small|far)\w*)\b",
    re.IGNORECASE,
)


def canonical_body(body: str, task_type: str, options: Sequence[str] | None = None) -> str:
    """The answer as it should stand inside `<answer>`, so that `parse_answer_body` takes it.

    Args:
        body: the text of the answer alone, without reasoning.
        task_type: one of TASK_TYPES.
        options: choices of an `mcq` question in order, bare or labelled.
    Raises:
        Unreadable: there is no answer, more than one, or one that can be read in two ways.
        ValueError: unknown task type, or a number of options outside 1..26.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"task_type: expected one of {', '.join(TASK_TYPES)}, got {task_type!r}")
    if not body.strip():
        raise Unreadable("no_answer")
    if task_type == "mcq":
        return read_letter(body, options)
    if task_type == "open":
        text = strip_outside(body)
    elif task_type == "ocr":
        text = _text_read(body)
    else:
        text = {"temporal": read_interval, "spatial": read_box, "numeric": read_number}[task_type](body)
    if not text:
        raise Unreadable("no_answer")
    return text


def is_text_read(text: str) -> bool:
    """Whether a sentence says what a picture reads, and quotes it or ends with it."""
    quotation = _QUOTED.search(text)
    return bool(_SAYS.match(text) or (quotation and _READS.search(text, 0, quotation.start())))


def _text_read(body: str) -> str:
    """The text that an ocr answer quotes, where it is a sentence around one quotation; else the answer itself."""
    text = strip_outside(strip_latex_text(body))
    if _ILLEGIBLE.match(text):
        raise Unreadable("no_answer")
    texts = [value for key, value in json_object(text).items() if key in _TEXT_KEYS]
    if len(texts) == 1 and isinstance(texts[0], str):
        text = texts[0]
    if quotations := list(_QUOTED.finditer(text)):
        first, last = quotations[0].start(), quotations[-1].end()
        if _READS.search(text, 0, first) or _READ_AFTER.match(text, last):
            if _DENIED.search(text, 0, first):
                raise Unreadable("no_answer")
            return unquoted(the_only([found[found.lastindex].strip() for found in quotations]))
    if says := _SAYS.match(text):
        text = text[says.end() :]
    return unquoted(text)
