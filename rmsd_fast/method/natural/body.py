"""Convert the text of one answer to the form that `method.answers` parses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..answers import TASK_TYPES
from .boxes import read_box
from .numbers import read_number
from .options import read_letter
from .readings import THING
from .reasons import Unreadable
from .text import json_object, strip_outside, unquoted, visible
from .times import read_interval

# Longer texts are not answers to closed questions, and some searches take quadratic time.
MOST_CHARACTERS = 2_000

_THING = rf"(?:{THING}|it)"
_ARTICLE = r"(?:so\s+)?(?:(?:the|this|that|its|a|on-?screen)\s+)?"
# A sentence about a text, up to the start of the text. The word "says" may also introduce speech.
_SAYS = re.compile(
    rf"{_ARTICLE}(?:[\w-]+\s+){{0,4}}?{_THING}\s+(?:[\w-]+\s+){{0,6}}?"
    r"(?:(?:reads?|says?|spells?|shows?|displays?)\b"
    r"(?!\s+(?:is|reads?|says?|shows?|displays?)\b)(?:\s+as)?"
    r"(?:\s*[:：]|\s+(?:the\s+)?(?:[\w-]+\s+){1,2}(?=[\"“「『«„*]))?|is\s*[:：]|is\s+(?=[\"“「『«„])"
    r"|is\s+(?-i:(?=[A-Z0-9$€£¥][A-Z0-9 .,:-]*[.]?$)))\s*"
    rf"|(?:{_ARTICLE}(?:[\w-]+\s+){{1,5}}?(?:reads?|shows?|displays?|bears?)\s+(?:the\s+)?(?:[\w-]+\s+)?"
    r"|(?:i (?:can )?(?:see|read)|there is|it is|el letrero dice|das schild (?:sagt|zeigt)|auf dem schild steht"
    r"|la placa pone"
    r"|(?:le panneau|l['’]enseigne|l['’]écran|la pancarte) (?:indique|affiche)"
    r"|(?:the|el|la|le|der|die|das) [^:\"“]{0,60}[:：])\s*[:：]?\s*)(?=[\"“「『«„])"
    r"|.{0,20}?(?:写着|写的是|写有|显示|文字是|文字为|内容是|内容为|字是)\s*(?:的是)?\s*[:：]?\s*",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(?:not|never|cannot)\b|n['’]t\b|不|没", re.IGNORECASE)
# "It might say EXIT". The text itself may also begin with "It might be".
_HEDGED = re.compile(
    rf"(?:maybe|perhaps|possibly)[,\s]+(?:it|{_ARTICLE}{_THING})\s+(?:says|reads)\b"
    rf"|{_ARTICLE}(?:[\w-]+\s+){{0,3}}?{_THING}\s+(?:[\w-]+\s+){{0,3}}?(?:could|might|may)\s+(?:[\w-]+\s+)?(?:say"
    rf"|read)\b"
    r"|it (?:could|might|may) (?:say|read|be)\s+(?:either\b|[\"“]|(?-i:[A-Z]{2,}))",
    re.IGNORECASE,
)
_MAYBE = re.compile(r"\b(?:might|may|could|possibly|perhaps|maybe)\b|可能|也许", re.IGNORECASE)
_SAYS_AGAIN = re.compile(r"[.!?;]\s+.*\b(?:says?|reads?|shows?)\b", re.IGNORECASE | re.DOTALL)
# After "the text is:", the rest of the answer is the text. "The title is: Dune" may itself be the text.
_TEXT_IS = re.compile(
    r"(?:(?:the|this)\s+(?:\w+\s+){0,2}?(?:text|words?|writing|inscription)\b|.{0,20}?文字).*[:：]\s*", re.IGNORECASE
)
_READ_AFTER = re.compile(r"\s*(?:と書|と読|と表示|とあり|と出).{0,12}")
_QUOTED = re.compile(
    r"[\"“「『«„]([^\"”“」』»]+)[\"”“」』»]|(?<!\w)[‘']([^’'\n]+)[’'](?!\w)|\*\*([^*\n]+)\*\*|`([^`\n]+)`"
)
_ILLEGIBLE = re.compile(
    r"(?:(?:the|this|its|any)\s+)?(?:[\w-]+\s+){0,3}(?:text|words?|writing|letter(?:ing|s)?|it)\s+(?:[\w-]+\s+){0,5}?"
    r"(?:illegible|unreadable|unclear|(?:not|n['’]t)\s+(?:be\s+)?(?:legible|readable|clear|visible|read)"
    r"|too\s+(?:blur|small|far)\w*)\b(?!\s+(?:who|what|why|how|if|whether|when))[^.]*\.?"
    rf"|(?:the|this)\s+{_THING}\s+is\s+(?:illegible|unreadable|not\s+(?:legible|readable))\b.*"
    r"|there (?:is|are) no (?:[a-z]+ )?(?:text|words?|writing|letters)"
    r"(?: (?:visible|present|shown|readable|legible|to (?:read|see)|(?:in|on) (?:the|this)\b).*)?[.]?"
    r"|(?:.{0,30}[字牌本容].{0,8})?(?:无法|不能|难以)(?:辨认|看清|识别)(?:.{0,8}[字牌本容].{0,6})?[。.]?|.{0,12}看不清(?:楚)?(?:文字|内容|字)?[。.]?",
    re.IGNORECASE | re.DOTALL,
)
# "AB1? C?E", but not the query string of a URL.
_UNKNOWN_CHARACTER = re.compile(
    r"(?:^|\s)[A-Za-z0-9]+\?[A-Za-z0-9]+[?]?(?=\s|$)|[□▯▢\ufffd]|\[(?:illegible|unreadable|unclear)\]", re.IGNORECASE
)
# Words that describe a text but are not part of it: "EXIT in green letters".
_DESCRIBES = re.compile(
    r"[,;]\s|\b(?:letters|lettering|font|background|frames?|video|clip|seconds?|visible|written|printed|capitals"
    r"|throughout|colou?rs?|corner|beginning|which|when|while)\b",
    re.IGNORECASE,
)
_UNITS = re.compile(r"\b(?:km/?h|mph|am|pm|kg|g|m|cm|mm|km|ml|l|s|min|h|x|of|and|the|to)\b")
_TEXT_KEYS = ("text", "text_content", "answer", "ocr", "content", "transcription")
_READERS = {"temporal": read_interval, "spatial": read_box, "numeric": read_number}


def canonical_body(body: str, task_type: str, options: Sequence[str] | None = None, *, as_sent: bool = False) -> str:
    """Return the answer in the form that belongs inside `<answer>` and that `parse_answer_body` parses.

    Args:
        body: the text of the answer, without reasoning.
        task_type: one of TASK_TYPES.
        options: choices of an `mcq` question in order, bare or labeled.
        as_sent: the response already has the canonical format, so an ocr text is rewritten only if a sentence clearly
            quotes it.
    Returns:
        The canonical answer.
    Raises:
        Unreadable: there is no answer, more than one, or an ambiguous one.
        ValueError: the task type is unknown, or the number of options is outside 1..26.
    """
    if task_type not in TASK_TYPES:
        raise ValueError(f"task_type: expected one of {', '.join(TASK_TYPES)}, got {task_type!r}")
    body = body.strip()
    if not body or (task_type != "open" and len(body) > MOST_CHARACTERS):
        raise Unreadable("no_answer")
    if task_type == "mcq":
        return read_letter(body, options)
    text = (
        strip_outside(body) if task_type == "open" else read_text(body, as_sent=as_sent) if task_type == "ocr" else None
    )
    text = _READERS[task_type](body) if text is None else text
    if not text:
        raise Unreadable("no_answer")
    return text


def read_text(body: str, *, as_sent: bool = False) -> str:
    """Return the text of an ocr answer: without outer marks, or the quotation if the answer is a sentence about a sign.

    as_sent: as in `canonical_body`.
    """
    text = visible(strip_outside(body))
    if _ILLEGIBLE.fullmatch(text) or not is_legible(text):
        raise Unreadable("no_answer")
    if re.fullmatch(rf"(?:{_QUOTED.pattern})(?:\s*(?:,|or|或者?|and)\s*(?:{_QUOTED.pattern}))+[.。]?", text):
        raise Unreadable("two_answers")
    if _HEDGED.match(text):
        raise Unreadable("two_answers")
    if (said := said_text(text, quoted_only=as_sent)) is not None:
        return said
    texts = [value for key, value in json_object(text).items() if key in _TEXT_KEYS]
    if len(texts) == 1 and isinstance(texts[0], str):
        text = texts[0]
    return unquoted(text)


def is_legible(text: str) -> bool:
    """Return whether a text has no marks for illegible characters."""
    return not _UNKNOWN_CHARACTER.search(text)


def said_text(sentence: str, *, quoted_only: bool = False) -> str | None:
    """Return the text of a sign from a sentence about it, such as `The sign reads "EXIT".`; None for any other text.

    quoted_only: accept only quotations, and the text after "The text is:".
    """
    if says := _SAYS.match(sentence):
        rest = sentence[says.end() :].strip()
        quotation = _QUOTED.match(rest)
        if quoted_only and not (quotation or _TEXT_IS.fullmatch(says[0])):
            return None
        if _DENIED.search(says[0]):
            raise Unreadable("no_answer")
        if _MAYBE.search(says[0]):
            raise Unreadable("two_answers")
        if quotation and rest[quotation.end() :].strip() in ("", ".", "。"):
            return unquoted(quotation[quotation.lastindex])
        if len(_QUOTED.findall(rest)) > 1 or _SAYS_AGAIN.search(rest):
            raise Unreadable("two_answers")
        # Without a quotation, accept only sentences that are certainly about a text.
        if not quotation and re.match(r"(?:the|this|it|its|on-?screen)\b|[^\x00-\x7f]", sentence, re.IGNORECASE):
            return _unquoted_value(rest, says[0])
    quotation = _QUOTED.search(sentence)
    if quotation and quotation.start() < 20 and _READ_AFTER.fullmatch(sentence[quotation.end() :]):
        return unquoted(quotation[quotation.lastindex])
    return None


def _unquoted_value(rest: str, says: str) -> str | None:
    """Return the unquoted text after "The clock shows"; None if it may not be a text, such as "the time".

    Raises:
        Unreadable: words that describe the text cannot be distinguished from it.
    """
    rest = rest.rstrip(".。")
    if not rest or (rest[0].islower() and rest[0].isascii() and not says.rstrip().endswith((":", "："))):
        return None
    if re.match(r"[\"“”„«]", rest):
        raise Unreadable("no_answer")
    first, *later_words = rest.split()
    capital = not re.search(r"[a-z]", first) and len(first) > 1
    words = _UNITS.sub("", " ".join(later_words)).split()
    lower = capital and any(word.islower() and word.isascii() for word in words)
    if "\n" not in rest and ((lower and not first.endswith(":")) or _DESCRIBES.search(rest)):
        raise Unreadable("no_answer")
    return unquoted(rest)
