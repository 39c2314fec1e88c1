"""The task type that a record's answer speaks for, where the record names none."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rmsd_fast.data.ground_truths import CoordinatesError, GroundTruthError, read_ground_truth
from rmsd_fast.data.option_lists import MOST_OPTIONS
from rmsd_fast.method.answers import bare_options, option_letters
from rmsd_fast.method.quality import fold_text

_LETTER = re.compile(r"[(\[]?[A-Z][)\]]?\.?")
_LED_BY_LETTER = re.compile(r"\(?([A-Z])[.):]\s*(\S.*)|\(([A-Z])\)\s*(\S.*)", re.DOTALL)
_DENIED = re.compile(r"\b(?:not|wrong|incorrect|false)\b|n['’]t\b", re.IGNORECASE)
# "3-5" may be a score, a range or a pair of years.
_RANGE = re.compile(r"[0-9]+\s*[-–—~]\s*[0-9]+")
# How answers to closed questions begin: a letter with its sign, JSON; a number, in a short answer.
_CLOSED_START = re.compile(r"[(\[]?[A-Za-z][)\].:](?:\s|$)|[\[{]")
_NUMBER_FIRST = re.compile(r"\(?[-+]?[.]?[0-9]")
SHORT_WORDS, SHORT_NUMBERS = 2, 5


def infer_task(answer: object) -> str:
    """`temporal`, `spatial` or `numeric` for an answer that is written as such, otherwise `open`."""
    for task in ("temporal", "spatial", "numeric"):
        try:
            read_ground_truth(answer, task)
        # A box all the same, which is refused when the record is read.
        except CoordinatesError:
            return task
        except GroundTruthError:
            continue
        return "open" if task == "temporal" and _RANGE.fullmatch(str(answer).strip()) else task
    return "open"


def looks_like_a_letter(answer: object) -> bool:
    """Whether an answer is one capital letter."""
    return isinstance(answer, str) and bool(_LETTER.fullmatch(answer.strip()))


def looks_closed(answer: str) -> bool:
    """Whether the answer to an open question looks like that to a closed one, which a metric could grade."""
    words = len(answer.split())
    if words <= SHORT_WORDS or _CLOSED_START.match(answer.strip()):
        return True
    return words <= SHORT_NUMBERS and bool(_NUMBER_FIRST.match(answer.strip()))


def is_yes_or_no(answer: object) -> bool:
    """Whether an answer is Yes or No, in any case."""
    return isinstance(answer, str) and fold_text(answer.strip()) in ("yes", "no")


def names_an_option(answer: object, options: Sequence[str]) -> bool:
    """Whether an answer is an option of a list: by its letter, its text, or a reply that begins with its letter."""
    try:
        read_ground_truth(answer, "mcq", options)
    except GroundTruthError:
        return letter_of_reply(answer, options) is not None
    return True


def letter_of_reply(answer: object, options: Sequence[object]) -> str | None:
    """The letter of a reply such as "B. milk" or "B. Milk is poured in."; None where it does not begin with one.

    None also where the words behind the letter are those of another option, or deny something.
    """
    led = _LED_BY_LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    if led is None or len(options) > MOST_OPTIONS or not all(isinstance(option, str) for option in options):
        return None
    letter, words = led[1] or led[3], fold_text(led[2] or led[4])
    letters = option_letters(options) if options else ""
    if letter not in letters:
        return None
    texts = dict(zip(letters, map(fold_text, bare_options(options)), strict=True))
    its_text = texts.pop(letter)
    begun = [option for option in (its_text, *texts.values()) if option and words.startswith(option)]
    if begun:
        # "red truck" begins with "red" too.
        return letter if max(begun, key=len) == its_text else None
    named = any(option and option in words for option in texts.values())
    return None if named or _DENIED.search(words) else letter
