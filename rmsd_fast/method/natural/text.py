"""Remove markup, labels, quotation marks and invisible characters around an answer."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Sequence

from .doubts import is_doubted
from .reasons import Unreadable

# JSON keys next to an answer that do not affect its value.
REASONING_KEYS = ("think", "thinking", "thought", "reasoning", "reason", "analysis", "explanation", "rationale")
REMARK_KEYS = {
    *REASONING_KEYS,
    "confidence",
    "description",
    "evidence",
    "question",
    "label",
    "event",
    "action",
    "caption",
    "object",
    "objects",
    "item",
    "items",
}

# Zero-width spaces and joiners, direction marks, byte order marks, soft hyphens.
_UNSEEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff\u00ad]")
_DASHES = re.compile("[\u2010-\u2015\u2212\ufe58\ufe63]")
_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n?(.*?)\n?[ \t]*```", re.DOTALL)
_FENCE_MARK = re.compile(r"^[ \t]*```[ \t]*\w*[ \t]*$", re.MULTILINE)
_JSON_START = re.compile(r"^[ \t]*[{\[]", re.MULTILINE)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|operatorname|boxed|fbox)\s*\{([^{}]*)\}")
_LATEX_WHOLE = re.compile(r"\$*\s*(\\(?:text|boxed|fbox|mathrm|textbf)\s*\{.*\})\s*\$*", re.DOTALL)
_LATEX_MARKS = re.compile(r"\\[()\[\]]|\\[,;:! ]|\\(?:quad|qquad|left|right)\b|(?<!\\)\$")
_LATEX_PERCENT = re.compile(r"\\([%$])")
_LATEX_ESCAPE = re.compile(r"\\([%$&#_{} ])")
_HTML = re.compile(r"</?(?:b|strong|i|em|u|p|br|span|div|code|pre|h[1-6])\s*/?>", re.IGNORECASE)
# A dash before a number may be a minus sign, and ">" may be a bound.
_LINE_MARK = re.compile(
    r"^\s*(?:#{1,6}\s+|[*•]\s+|[>-]\s+(?![$€£¥]?\s*[.0-9]|(?:one|two|three|four|five|six|seven|eight|nine|ten)\b))",
    re.MULTILINE | re.IGNORECASE,
)
_STRUCK_OUT = re.compile(r"~~[^~\n]+~~|<(s|del|strike)>")
_SUPERSCRIPT = re.compile("(?<=[0-9)])[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# In "3 * 4" and "10**5" the stars are not emphasis.
_EMPHASIS = re.compile(
    r"(?<![0-9)*])(?<![0-9)] )\*{1,3}(?!\*)|\*{1,3}(?!\*)(?! ?[0-9(])|(?<!\w)_{1,2}|_{1,2}(?!\w)|`+|~~"
)
_QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "「」", "『』", "《》", "``")
# This allows apostrophes inside words: 'It's now or never'.
_SINGLE_QUOTES = re.compile(r"[‘']((?:[^‘’'\n]|(?<=\w)[’'](?=\w))+)[’']")
_LABEL = re.compile(
    r"(?:(?:so|thus|therefore|hence)[,\s]+)?(?:(?:the|my|its)\s+)?(?:(?:final|correct|best|right|most\s+likely)\s+)*"
    r"(?:answer|option|choice|result|response|ans|antwort|respuesta|réponse)(?:\s+is\b|\s*[:：=])(?:\s*[:：=])?\s*"
    r"|(?:最终|最後の?|正确|正確な?|正しい)?的?(?:答案|选项|答え|回答|解答)(?:应该|应当)?\s*[是为選选:：=は]+\s*",
    re.IGNORECASE,
)
# "Let me know if you need more detail!" after an answer. A sentence with a number may be an answer itself.
_COURTESY = re.compile(
    r"(?<=[.!?)*”\"\]\n。！])\s*(?:please )?(?:let me know|do let me know|feel free|tell me|i hope (?:this|that)"
    r"|hope (?:this|that)"
    r"|(?:i['’]m |i am )?happy to|if you(?:['’]d| would)? (?:need|want|have|like)|would you like|do you want"
    r"|is there anything|don['’]t hesitate|如果[您你]|希望(?:这|对)|需要我)[^\n0-9.!?。！？]*[.!?。！？]*\s*$",
    re.IGNORECASE,
)
# "<45.0> to <52.0>": placeholder marks of the format in the prompt.
_TEMPLATE_MARK = re.compile(r"<([0-9][0-9.,:]*)>")
# "Bです" ("it is B") is B.
_POLITE_END = re.compile(r"(?:です|である|になります|だ)$")


def visible(text: str) -> str:
    """Return the text without invisible characters, in Unicode's composed form."""
    return text if text.isascii() else unicodedata.normalize("NFC", _UNSEEN.sub("", text))


def strip_outside(text: str) -> str:
    """Return the text without outer white space and an outer code fence."""
    text = text.strip()
    if text.startswith("```") and (fenced := _FENCE.fullmatch(text)):
        text = fenced[1].strip()
    return text


def without_courtesy(text: str) -> str:
    """Return the text without a final polite sentence that offers more help."""
    # There may be two such sentences.
    return _COURTESY.sub("", _COURTESY.sub("", text))


def unquoted(text: str) -> str:
    """Return a text that was read in a picture, without outer emphasis and quotation marks."""
    text = strip_outside(text)
    if whole := _LATEX_WHOLE.fullmatch(text):
        text = _LATEX_ESCAPE.sub(r"\1", strip_latex_text(whole[1])).strip()
    while True:
        before = text
        for mark in ("***", "**", "__", "`"):
            if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)].strip()
        # The period of a sentence that ends with a quotation.
        sentence = text[:-1].rstrip() if text[-1:] in (".", "。") else text
        if (inside := _unwrapped(sentence, _QUOTES)) != sentence:
            text = inside
        elif apostrophes := _SINGLE_QUOTES.fullmatch(sentence):
            text = apostrophes[1].strip()
        if text == before:
            return text


def plain(body: str) -> str:
    """Return a short answer in compatibility characters (`Ｂ` is `B`), without markup, label and final punctuation.

    Raises:
        Unreadable: the answer is a question or struck out.
    """
    # The full-width comma of Chinese is not part of a number.
    text = compatible(html.unescape(strip_outside(body)).replace("，", "， "))
    if _STRUCK_OUT.search(text):
        raise Unreadable("no_answer")
    text = _LATEX_PERCENT.sub(r"\1", _LATEX_MARKS.sub(" ", strip_latex_text(text)))
    text = _LINE_MARK.sub("", _HTML.sub(" ", text))
    text = _TEMPLATE_MARK.sub(r"\1", " ".join(_EMPHASIS.sub("", text).split()))
    for _ in range(3):
        if label := _LABEL.match(text):
            text = text[label.end() :]
    if text.endswith("?"):
        raise Unreadable("no_answer")
    text = _POLITE_END.sub("", text.rstrip("。.!！;； "))
    return _unwrapped(text, _QUOTES)


def compatible(text: str) -> str:
    """Return the text in compatibility characters, with one kind of dash and exponents as 10^5 for 10⁵."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    return _DASHES.sub("-", unicodedata.normalize("NFKC", text))


def strip_latex_text(text: str) -> str:
    r"""Replace `\text{B}` by `B`, also if it is nested."""
    while (inner := _LATEX_TEXT.sub(r"\1", text)) != text:
        text = inner
    return text


def json_value(text: str) -> object | None:
    """Return the value of a JSON text, with numbers as written and keys in lower case; None for any other text.

    Raises:
        Unreadable: an object has the same key twice.
    """
    try:
        return _DECODER.decode(text)
    except Unreadable:
        raise
    except (ValueError, RecursionError):
        return None


def json_object(text: str) -> dict[str, object]:
    """Return the object in a JSON text, or the only object of a list; {} for other texts."""
    value = json_value(text) if text.startswith(("{", "[")) else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value if isinstance(value, dict) else {}


def without_remarks(record: dict[str, object]) -> dict[str, object]:
    """Return the keys of an object that may contain or affect an answer.

    These are all keys outside REMARK_KEYS, since a key may specify another unit, sign or order.
    """
    if any(is_doubted(f"{item} confidence") for key, item in record.items() if key == "confidence"):
        raise Unreadable("no_answer")
    return {key: item for key, item in record.items() if key not in REMARK_KEYS}


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = {key.lower().strip().replace(" ", "_"): item for key, item in pairs}
    if len(record) < len(pairs):
        raise Unreadable("two_answers")
    return record


_DECODER = json.JSONDecoder(parse_float=str, parse_int=str, object_pairs_hook=_unique_keys)


def find_json(text: str) -> tuple[str, object, str] | None:
    """Return the text before the first JSON object or list that begins a line, its value, and the text after it."""
    for match in list(_JSON_START.finditer(text))[:5]:
        try:
            value, end = _DECODER.raw_decode(text, match.end() - 1)
        except Unreadable:
            raise
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) or any(isinstance(item, dict) for item in value):
            before, after = text[: match.start()], text[end:]
            return _FENCE_MARK.sub("", before).strip(), value, _FENCE_MARK.sub("", after).strip()
    return None


def _unwrapped(text: str, pairs: Sequence[str]) -> str:
    """Return the text without an outer pair of marks."""
    for left, right in pairs:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == left and text[-1] == right and left not in inner and right not in inner:
            return inner.strip()
    return text
