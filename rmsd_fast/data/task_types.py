"""Infer the task type of a record without one from its answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rmsd_fast.data.ground_truths import CoordinatesError, GroundTruthError, read_ground_truth
from rmsd_fast.data.option_lists import MOST_OPTIONS
from rmsd_fast.method.answers import bare_options, option_letters
from rmsd_fast.method.folding import fold_text, words_of

_LETTER = re.compile(r"[(\[]?[A-Z][)\]]?\.?")
_LED_BY_LETTER = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)|\(([A-Z])\)\s*(\S.*)", re.DOTALL)
# Words that join a second answer, deny the first one or express doubt. Some clear replies also contain them. If a clear
# reply is rejected, the error tells the user to write the letter alone, but an unclear reply could give a wrong ground
# truth.
_UNCLEAR = re.compile(
    r"\b(?:or|and|nor|also|all|any|everything|either|neither|both|not|cannot|never|no|none|wrong|incorrect|false|"
    r"untrue|but|however|although|though|unless|except|instead|rather|otherwise|alternatively|maybe|perhaps|possibly|"
    r"possible|probably|probable|presumably|likely|unlikely|apparently|unclear|unsure|uncertain|unknown|ambiguous|"
    r"might|may|could|seems?|appears?|guess|guessing|think|believe|suppose|assume|depends?|doubt|doubtful|"
    r"(?:hard|difficult|impossible) to)\b"
    r"|n['’]t\b|[?&/+]|或|和|与|及|不|没|可能|也许|大概|但",
    re.IGNORECASE,
)
# The letter of an option: a capital letter on its own, or any letter with a label's punctuation.
_ANY_LETTER = re.compile(
    r"(?<![A-Za-z0-9'’])(?:([A-Z])(?![A-Za-z0-9'’])|[(\[]([a-z])[)\]]|([a-z])[.):](?![A-Za-z0-9]))"
)
# "3-5" may be a score, a range or a pair of years.
_RANGE = re.compile(r"[0-9]+\s*[-–—~]\s*[0-9]+")
# Complete answers to closed questions, in case-folded text: one word, or a few Chinese answers, written without spaces.
_ONE_WORD = re.compile(r"[a-z0-9][a-z0-9'%°/–-]*[!?]?|是的?|不是|不|否|对|错|有|没有|[一二三四五六七八九十]")
# How answers to closed questions begin: a letter with its punctuation, or JSON; in a short answer, also a number.
_CLOSED_START = re.compile(r"[(\[]?[A-Za-z][)\].:](?:\s|$)|[\[{]")
_NUMBER_FIRST = re.compile(r"\(?[-+]?[.]?[0-9]")
SHORT_NUMBERS = 5


def infer_task(answer: object) -> str:
    """Return `temporal`, `spatial` or `numeric` for an answer in the form of one, otherwise `open`."""
    for task in ("temporal", "spatial", "numeric"):
        try:
            read_ground_truth(answer, task)
        # This is still a box. It is rejected when the record is read.
        except CoordinatesError:
            return task
        except GroundTruthError:
            continue
        return "open" if task == "temporal" and _RANGE.fullmatch(str(answer).strip()) else task
    return "open"


def looks_like_a_letter(answer: object) -> bool:
    """Return whether an answer is a single capital letter."""
    return isinstance(answer, str) and bool(_LETTER.fullmatch(answer.strip()))


def looks_closed(answer: str) -> bool:
    """Return whether the answer to an open question looks like an answer to a closed question.

    A single word looks like one, but a phrase such as "a thing" does not.
    """
    if _ONE_WORD.fullmatch(fold_text(answer)) or _CLOSED_START.match(answer.strip()):
        return True
    return len(words_of(answer)) <= SHORT_NUMBERS and bool(_NUMBER_FIRST.match(answer.strip()))


def is_yes_or_no(answer: object) -> bool:
    """Return whether an answer is Yes or No, in upper or lower case."""
    return isinstance(answer, str) and fold_text(answer.strip()) in ("yes", "no")


def names_an_option(answer: object, options: Sequence[str]) -> bool:
    """Return whether an answer names a listed option: by letter, by text, or in a reply that begins with its letter."""
    try:
        read_ground_truth(answer, "mcq", options)
    except GroundTruthError:
        return letter_of_reply(answer, options) is not None
    return True


def letter_of_reply(answer: object, options: Sequence[object]) -> str | None:
    """Return the letter of a reply such as "B. milk" or "B. Milk is poured in."; None if it does not begin with one.

    Also return None unless the words after the letter, and after the text of its option, support only this option: they
    must not name another option by letter or text, join a second answer, deny the first one, or express doubt.
    """
    led = _LED_BY_LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    if led is None or len(options) > MOST_OPTIONS or not all(isinstance(option, str) for option in options):
        return None
    letter, reply = led[1] or led[3], led[2] or led[4]
    letters = option_letters(options) if options else ""
    if letter not in letters:
        return None
    bare = dict(zip(letters, bare_options(options), strict=True))
    its_text, words = fold_text(bare[letter]), fold_text(reply)
    if words == its_text:
        return letter
    texts = [text for other, option in bare.items() if other != letter and (text := fold_text(option))]
    begun = [text for text in (its_text, *texts) if text and words.startswith(text)]
    # "red truck" also begins with "red".
    if begun and max(begun, key=len) != its_text:
        return None
    rest = words[len(its_text) :] if begun else words
    # The text of an option may contain letters: "Vitamin C".
    named = (_letters_in(reply) - _letters_in(bare[letter]) - {letter}) & set(letters)
    unclear = named or _UNCLEAR.search(rest) or any(text in rest for text in texts)
    return None if unclear else letter


def _letters_in(text: str) -> set[str]:
    """Return the letters of options that a text names."""
    found = _ANY_LETTER.finditer(unicodedata.normalize("NFKC", text))
    return {next(filter(None, match.groups())).upper() for match in found}
