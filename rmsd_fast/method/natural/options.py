"""The letter of an option, from its letter, its words or both."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

from ..answers import bare_options, option_letters
from .reasons import Unreadable, the_only
from .text import json_value, plain

_ONE_LETTER = re.compile(r"[(\[{<【「]?\s*([A-Za-z])\s*[)\]}>】」]?\s*[.:、,)]?")
# "B. milk", "(b) milk", "B - milk", "B, milk". Behind a blank alone the rest has to tell: "A man" begins with a word.
_LED = re.compile(
    r"(?:[(\[]\s*([A-Za-z])\s*[)\]]\s*[.:、,-]?|([A-Za-z])\s*[.:、)]|([A-Z])\s*-+(?=\s)|([A-Z])\s*[,;(])\s*(.+)",
    re.DOTALL,
)
_LED_BY_BLANK = re.compile(r"([A-Z])(?:\s+|(?=[^\x00-\x7f]))(.+)", re.DOTALL)
# Words in front of an answer that say nothing about it.
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence|then|yes|well|ok|okay|no|sorry|correction|rather|or|oh|and|wait|actually|probably|likely"
    r"|most likely|definitely|clearly|obviously|surely|on reflection|i mean|i(?: would|['’]d|['’]ll| will)? "
    r"(?:think|believe|say|guess|choose|pick|select|go with|opt for)(?: that)?|my (?:final )?(?:answer|choice) is"
    r"|(?:it|that|this)(?:['’]s| is| was| must be| would be| should be| has to be)|(?:the )?(?:correct |best |right )?"
    r"(?:answer|option|choice|letter)(?: is| must be| should be| would be)?)\b"
    r"|应该|应当|应|我认为|我觉得|所以|因此|故|即|选项|选择|选|答案|是|为)[\s,:;.—-]*",
    re.IGNORECASE,
)
_AFFIRMED = re.compile(
    r"(?:(?:is|was|seems|looks|appears|would be|must be|should be|has to be)(?: to be)?\s+)?(?:the\s+)?"
    r"(?:(?:most|only|clearly|definitely|obviously|likely)\s+)*"
    r"(?:correct|right|best|true|accurate|answer|one|option|choice|likely|plausible|fits?|fitting|matche?s?)\b"
    r"|(?:because|since|as|given|due to|based on)\b|是?(?:最|更)?(?:正确|符合|合适|准确|对)|因为|由于",
    re.IGNORECASE,
)
# Capitals alone, or any letter in brackets, inside a sentence.
_MENTION = re.compile(r"[(\[]([A-Za-z])[)\]]|(?<![A-Za-z0-9_'’.-])([A-Z])(?![A-Za-z0-9_'’-]|\.[A-Za-z0-9])")
_A_WORD = re.compile(r"\s+(?!(?:or|and|is|nor|vs)\b)[a-z]")
_NAMED = re.compile(
    r"(?:option|choice|answer|letter|选项|选择|选|答案)\s*(?:is|是|为|:)?\s*[(\[]?([A-Za-z])(?![A-Za-z'’-])[)\]]?"
    r"|[(\[]([A-Za-z])[)\]]|(?:\b(?:is|be)|:|→|=|是|为)\s*([A-Z])(?=\s*[.。]?$)",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|none|without|except|cannot|wrong|incorrect|false|unlikely|least|rather than"
    r"|instead of|rul(?:e[sd]?|ing) out|eliminat\w*|exclud\w*|discard\w*|reject\w*|ignor\w*|impossible)\b"
    r"|n['’]t\b|不|没|非|错|排除|无法",
    re.IGNORECASE,
)
_DOUBTED = re.compile(
    r"\b(?:plausible|might|may|could|maybe|perhaps|possib\w*|unclear|unsure|uncertain|either|but|however|guessing"
    r"|if|unless|tempting|whether)\b|可能|也许|或许|但|如果|是否",
    re.IGNORECASE,
)
_EXPLAINED = re.compile(r"\b(?:because|since|as|given|due to)\b|因为|由于", re.IGNORECASE)
_ARTICLE = re.compile(r"^(?:the|a|an)\s+")
_KEYS = ("answer", "option", "choice", "letter")
_ALL_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_letter(body: str, options: Sequence[str] | None) -> str:
    """The letter of the one option that an answer names; raises Unreadable otherwise.

    Without options a letter has to stand alone, or to be named as the answer: a capital in a sentence is a word.
    """
    text = plain(_inside_json(body))
    if not text:
        raise Unreadable("no_answer")
    letters = _ALL_LETTERS if options is None else option_letters(options)
    if letter := _as_a_whole(text, options, letters):
        return letter
    texts = comparable_options(options)
    # A sentence: one option named by its letter or in its own words, nothing denied and nothing doubted.
    named = {next(group for group in match.groups() if group).upper() for match in _NAMED.finditer(text)}
    named |= _quoted(text, texts, letters)
    mentioned = named | _mentioned(text, letters)
    if len(mentioned) > 1:
        raise Unreadable("two_answers")
    # An option's own "not" denies nothing.
    around = text
    for words in bare_options(options or ()) if texts else ():
        around = re.sub(re.escape(words), " ", around, flags=re.IGNORECASE)
    if not named or _DENIED.search(around) or _DOUBTED.search(around):
        raise Unreadable("not_an_option")
    return _among(the_only(sorted(named)), letters)


def whole_option(text: str, options: Sequence[str] | None) -> str | None:
    """The letter of a text that is an option as a whole: its letter, its words, or both, also with an explanation.

    Raises:
        Unreadable: it names two.
    """
    letters = _ALL_LETTERS if options is None else option_letters(options)
    return _as_a_whole(plain(text), options, letters)


def comparable_options(options: Sequence[str] | None) -> Sequence[str]:
    """The options' words without their letters, for comparison."""
    return () if options is None else _comparable_options(tuple(options))


@functools.lru_cache(maxsize=64)
def _comparable_options(options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(comparable(option) for option in bare_options(options))


def comparable(text: str) -> str:
    """Words of an option or answer for comparison: case, punctuation and articles make no difference."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = " ".join(re.sub(r"[^\w\s.%+-]|[.](?!\d)", " ", text).split())
    return _ARTICLE.sub("", text)


def _as_a_whole(text: str, options: Sequence[str] | None, letters: str) -> str | None:
    texts = comparable_options(options)
    for _ in range(5):
        if len(text) > 3 and text[0] in "([" and text[-1] in ")]" and text.count(text[0]) == 1:
            text = text[1:-1].strip()
        if letter := _ONE_LETTER.fullmatch(text):
            return _among(letter[1].upper(), letters)
        # Before the words are compared: in "A. milk" the A is no article.
        if led := _LED.fullmatch(text):
            return _followed(next(group for group in led.groups()[:4] if group).upper(), led[5], texts, letters)
        if same := _equal(text, texts, letters):
            return the_only(same)
        if led := _LED_BY_BLANK.fullmatch(text):
            letter, rest = led.groups()
            affirmed = _AFFIRMED.match(rest) and (
                letter not in "AI" or not _A_WORD.match(" " + rest) or "correct" in rest
            )
            if affirmed or letter in _equal(rest, texts, letters):
                return _followed(letter, rest, texts, letters)
        lead = _LEAD_IN.match(text)
        # "Yes and no" where these are options.
        if not lead or lead.end() == len(text) or _equal(lead[0], texts, letters):
            return None
        text = text[lead.end() :].strip()
    return None


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


def _followed(letter: str, rest: str, texts: Sequence[str], letters: str) -> str:
    """A letter that is followed by words: its option's own, or an explanation that names no other option."""
    _among(letter, letters)
    same = _equal(rest, texts, letters)
    if letter in same:
        return letter
    if same or (_mentioned(rest, letters) | _quoted(rest, texts, letters)) - {letter}:
        raise Unreadable("two_answers")
    # "B is wrong", "B, maybe"; but "B, because it is not brown".
    claim = _EXPLAINED.split(rest)[0].partition(".")[0]
    own = letter in _quoted(claim, texts, letters)
    if not own and (_DENIED.search(claim) or _DOUBTED.search(claim)):
        raise Unreadable("two_answers")
    return letter


def _equal(text: str, texts: Sequence[str], letters: str) -> list[str]:
    words = comparable(text)
    return [letters[index] for index, option in enumerate(texts) if option and option == words]


def _mentioned(text: str, letters: str) -> set[str]:
    """Letters that stand for options in a sentence; an A or I that is a word does not count."""
    mentioned = set()
    for match in _MENTION.finditer(text):
        letter = (match[1] or match[2]).upper()
        is_word = match[2] in ("A", "I") and _A_WORD.match(text, match.end())
        if not is_word and (letter in letters or match[1] is None):
            mentioned.add(letter)
    return mentioned


def _quoted(text: str, texts: Sequence[str], letters: str) -> set[str]:
    """Options whose words occur in a sentence; where the words of one hold another's, only the longer one."""
    text = f" {comparable(text)} "
    quoted = set()
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        # Scripts that write no blanks have no word boundary to look for.
        words = f" {texts[index]} " if texts[index].isascii() else texts[index]
        if words.strip() and words in text:
            quoted.add(letters[index])
            text = text.replace(words, " | ")
    return quoted


def _among(letter: str, letters: str) -> str:
    if letter not in letters:
        raise Unreadable("not_an_option")
    return letter
