"""Markup, labels, quotation marks and unseen characters around an answer."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence

from .reasons import Unreadable

# Zero-width spaces and joiners, marks of direction, byte order marks, soft hyphens.
_UNSEEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\u00ad]")
_DASHES = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63]")
_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)\n?[ \t]*```", re.DOTALL)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
_LATEX_MARKS = re.compile(r"\\[()\[\]]|\\[,;:! ]|\\(?:quad|qquad|left|right)\b|(?<!\\)\$")
_HTML = re.compile(r"</?(?:b|strong|i|em|u|p|br|span|div|code|pre|h[1-6])\s*/?>", re.IGNORECASE)
_LINE_MARK = re.compile(r"^\s*(?:#{1,6}\s+|>\s+|[-*•]\s+)", re.MULTILINE)
_EMPHASIS = re.compile(r"\*{1,3}|(?<!\w)_{1,2}|_{1,2}(?!\w)|`+|~~")
_QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "「」", "『』", "《》", "``")
_LABEL = re.compile(
    r"(?:(?:so|thus|therefore|hence)[,\s]+)?(?:(?:the|my|its)\s+)?(?:(?:final|correct|best|right|most\s+likely)\s+)*"
    r"(?:answer|option|choice|result|response|ans|antwort|respuesta|réponse)(?:\s+is\b|\s*[:：=])(?:\s*[:：=])?\s*"
    r"|(?:最终|最後の?|正确|正確な?|正しい)?的?(?:答案|选项|答え|回答|解答)(?:应该|应当)?\s*[是为選选:：=は]+\s*",
    re.IGNORECASE,
)
# "Bです" is B; and in "B, not A" the second part takes nothing back.
_POLITE_END = re.compile(r"(?:です|である|になります|だ)$")
_CONTRAST = re.compile(r"\s*[,，(]\s*(?:and |but )?(?:not|rather than|instead of)\b[^,，]*$", re.IGNORECASE)


def visible(text: str) -> str:
    """The text without characters that are not seen, in Unicode's composed form."""
    return unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def strip_outside(text: str) -> str:
    """The text without what only wraps it as a whole: white space, a code fence, a label `Answer:`."""
    text = text.strip()
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    bold = text.startswith("**")
    inside = text.removeprefix("**").lstrip()
    label = _LABEL.match(inside)
    if label and label[0].rstrip().endswith((":", "：")):
        rest = inside[label.end() :].lstrip()
        text = (rest.removeprefix("**") if bold else rest).strip()
    return text


def unquoted(text: str) -> str:
    """A text that was read in a picture, without emphasis, quotation marks and the stop of the sentence around it."""
    text = strip_outside(strip_latex_text(text))
    while True:
        before = text
        for mark in ("***", "**", "__", "`"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)].strip()
        text = _unwrapped(text, _QUOTES)
        # "Dr. No." keeps its stop: one text may have several.
        if (
            len(text) > 1
            and text[-1] in ".。"
            and "." not in text[:-1]
            and (text[-2].isalnum() or text[-2] in "\"'”’»」』")
        ):
            text = text[:-1].strip()
        if text == before:
            return text


def plain(body: str) -> str:
    """A short answer in compatibility characters (`Ｂ` is `B`), without markup, label and closing punctuation.

    Raises:
        Unreadable: it is a question.
    """
    text = _DASHES.sub("-", unicodedata.normalize("NFKC", strip_outside(body)))
    text = _LINE_MARK.sub("", _HTML.sub(" ", _LATEX_MARKS.sub(" ", strip_latex_text(text))))
    text = " ".join(_EMPHASIS.sub("", text).split())
    while label := _LABEL.match(text):
        text = text[label.end() :]
    if text.endswith("?"):
        raise Unreadable("no_answer")
    text = _POLITE_END.sub("", text.rstrip("。.!！;； "))
    return _unwrapped(_CONTRAST.sub("", text), _QUOTES)


def strip_latex_text(text: str) -> str:
    r"""`\text{B}` as `B`, also where it is nested."""
    while (inner := _LATEX_TEXT.sub(r"\1", text)) != text:
        text = inner
    return text


def json_value(text: str) -> object | None:
    """What a text is as JSON, numbers as they are written; None where it is not JSON."""
    try:
        return json.loads(text, parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        return None


def json_object(text: str) -> dict[str, object]:
    """The object that a text is as JSON, or a list of just one; its keys in lower case; empty where it is none."""
    value = json_value(text) if text.startswith(("{", "[")) else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return {str(key).lower().replace(" ", "_"): item for key, item in value.items()} if isinstance(value, dict) else {}


def _unwrapped(text: str, pairs: Sequence[str]) -> str:
    """The text without a pair of marks around the whole of it."""
    for left, right in pairs:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            return inner.strip()
    return text
