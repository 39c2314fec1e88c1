"""The letter of an option, from its letter, its words or both."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ..answers import bare_options, option_letters
from .reasons import Unreadable, the_only
from .text import json_value, plain

_ONE_LETTER = re.compile(r"[(\[{<]?\s*([A-Za-z])\s*[)\]}>]?\s*[.:、,)]?")
# "B. milk", "(b) milk", "B - milk", "B, milk". Behind a blank alone the rest has to tell: "A man" begins with a word.
_LED = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:、,-]?|([A-Za-z])\s*[.:、)]|([A-Z])\s*-(?=\s)|([A-Z])\s*,)\s*(.+)", re.DOTALL
)
_LED_BY_BLANK = re.compile(r"([A-Z])\s+(.+)", re.DOTALL)
# Capitals alone, or any letter in brackets, inside a sentence.
_MENTION = re.compile(r"[(\[]([A-Za-z])[)\]]|(?<![A-Za-z0-9_'’.])([A-Z])(?![A-Za-z0-9_'’]|\.[A-Za-z0-9])")
_A_WORD = re.compile(r"\s+(?!(?:or|and|is|nor|vs)\b)[a-z]")
_NAMED = re.compile(
    r"(?:option|choice|answer|letter|选项|选择|选|答案)\s*(?:is|是|为|:)?\s*[(\[]?([A-Za-z])(?![A-Za-z'’])[)\]]?",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?:is|it is|seems|would be|looks|fits|matches|because|since|as)\b|是正确|正确|对", re.IGNORECASE
)
_DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|none|without|except|cannot|wrong|incorrect|rather than|instead of)\b"
    r"|n['’]t\b|不|没|非|错",
    re.IGNORECASE,
)
_DOUBTED = re.compile(
    r"\b(?:plausible|might|may|could|maybe|perhaps|possib\w*|unclear|unsure|uncertain|either|but|however|guessing)\b"
    r"|可能|也许|或许|但",
    re.IGNORECASE,
)
_ARTICLE = re.compile(r"^(?:the|a|an)\s+")
_KEYS = ("answer", "option", "choice", "letter")


def read_letter(body: str, options: Sequence[str] | None) -> str:
    """The letter of the one option that an answer names; raises Unreadable otherwise."""
    text = plain(_inside_json(body))
    if not text:
        raise Unreadable("no_answer")
    texts = comparable_options(options)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if options is None else option_letters(options)
    if letter := _ONE_LETTER.fullmatch(text):
        return _among(letter[1].upper(), letters)
    if same := _equal(text, texts, letters):
        return the_only(same)
    if led := _LED.fullmatch(text):
        return _followed(next(group for group in led.groups()[:4] if group).upper(), led[5], texts, letters)
    if led := _LED_BY_BLANK.fullmatch(text):
        letter, rest = led.groups()
        judged = _IS_RIGHT.match(rest) and (letter not in "AI" or "right" in rest or "correct" in rest)
        if judged or _equal(rest, texts, letters):
            return _followed(letter, rest, texts, letters)
    # A sentence: one option named by its letter or in its own words, nothing denied and nothing doubted.
    named = (
        {found[1].upper() for found in _NAMED.finditer(text)}
        | _mentioned(text, letters)
        | _quoted(text, texts, letters)
    )
    if not named or _DENIED.search(text) or _DOUBTED.search(text):
        raise Unreadable("two_answers" if len(named) > 1 else "not_an_option")
    return _among(the_only(sorted(named)), letters)


def is_whole_option(text: str, options: Sequence[str] | None) -> bool:
    """Whether a text is an option as a whole: its letter, its words, or both."""
    text = plain(text)
    texts = comparable_options(options)
    led = _LED.fullmatch(text) or _LED_BY_BLANK.fullmatch(text)
    return bool(_ONE_LETTER.fullmatch(text)) or any(
        part and part in texts for part in (comparable(text), comparable(led[led.lastindex]) if led else "")
    )


def comparable_options(options: Sequence[str] | None) -> list[str]:
    """The options' words without their letters, for comparison."""
    return [] if options is None else [comparable(option) for option in bare_options(options)]


def comparable(text: str) -> str:
    """Words of an option or answer for comparison: case, punctuation and articles make no difference."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(re.sub(r"[^\w\s.%+-]|[.](?!\d)", " ", text).split())
    return _ARTICLE.sub("", text)


def _inside_json(body: str) -> str:
    """The answer of `{"answer": "B"}` or `["B"]`; any other text as it is."""
    text = body.strip()
    value = json_value(text) if text.startswith(("{", "[")) else None
    if isinstance(value, dict):
        named = [value[key] for key in _KEYS if key in value]
        value = named[0] if len(named) == 1 else {}
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise Unreadable("not_an_option")
    return text if value is None else value


def _followed(letter: str, rest: str, texts: list[str], letters: str) -> str:
    """A letter that is followed by words: its option's own, or an explanation that names no other option."""
    _among(letter, letters)
    same = _equal(rest, texts, letters)
    if letter in same:
        return letter
    if same or (_mentioned(rest, letters) | _quoted(rest, texts, letters)) - {letter}:
        raise Unreadable("two_answers")
    return letter


def _equal(text: str, texts: list[str], letters: str) -> list[str]:
    words = comparable(text)
    return [letters[index] for index, option in enumerate(texts) if option and option == words]


def _mentioned(text: str, letters: str) -> set[str]:
    """Letters that stand for options in a sentence; an A or I that is a word does not count."""
    found = set()
    for match in _MENTION.finditer(text):
        letter = (match[1] or match[2]).upper()
        is_word = match[2] in ("A", "I") and _A_WORD.match(text, match.end())
        if not is_word and (letter in letters or match[1] is None):
            found.add(letter)
    return found


def _quoted(text: str, texts: list[str], letters: str) -> set[str]:
    """Options whose words occur in a sentence; where the words of one hold another's, only the longer one."""
    text = f" {comparable(text)} "
    found = set()
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        # Scripts that write no blanks have no word boundary to look for.
        words = f" {texts[index]} " if texts[index].isascii() else texts[index]
        if words.strip() and words in text:
            found.add(letters[index])
            text = text.replace(words, " | ")
    return found


def _among(letter: str, letters: str) -> str:
    if letter not in letters:
        raise Unreadable("not_an_option")
    return letter
