"""Find option lists inside a question's text: lines `A. tea`, `B. milk`, … in the order of their letters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rmsd_fast.data.marks import MARK
from rmsd_fast.method.answers import bare_options, option_letters, own_letter
from rmsd_fast.method.folding import fold_text

_HEADING = re.compile(r"(?:answer )?(?:options|choices)(?: are)?\s*[:：]?|选项\s*[:：]?", re.IGNORECASE)
MOST_OPTIONS = 26
# A letter, an option's text and what may follow it, in case-folded text: "(b) tea", "which? a. tea b. milk".
_LABELED = r"(?<![^\W_])(?:\(([a-z])\)|\[([a-z])\]|([a-z])[.:)、])\s*%s(?=\s*(?:$|[;,.。、?]|[(\[]?[a-z][\])、.:]))"
# The first letter of "a.m.", "B.C." or "J.S. Bach" is not the letter of an option.
_ABBREVIATION = re.compile(r"\s*(?:[A-Za-z]\.){2}")
# Matches the first two letters and their delimiters, each followed by a text: "(A) tea (B) milk", "A. tea B. milk".
# Does not match "U.S.A. or B.C." and "f(a)". Lower-case letters need a bracket, because "a." may end a word.
_BEFORE, _AFTER = r"(?<![^\W_])(?<![^\W_]\.)", r"\s*(?![A-Za-z]\.)(?=[^\s)\]?!.,;:])"
_SET_OFF = rf"{_BEFORE}(?:\({{0}}\)|\[{{0}}\]|(?<![(\[]){{0}}(?:[.:)、]|\s+[-–—]\s)){_AFTER}"
_SMALL = rf"{_BEFORE}(?:\({{0}}\)|\[{{0}}\]|(?<![(\[]){{0}}\)){_AFTER}"
_WITHIN_A_LINE = [
    re.compile(f"{label.format(first)}.*?{label.format(second)}", re.DOTALL)
    for label, first, second in ((_SET_OFF, "A", "B"), (_SMALL, "a", "b"))
]


class OptionsError(ValueError):
    """Ambiguous options. The message gives the expected value, the actual value and what to do."""


def check_options(options: Sequence[str], *, distinct: bool = True) -> None:
    """Reject options if a letter could refer to two of them, or if two of them are equal.

    distinct: whether equal texts are rejected.

    Raises:
        OptionsError: the options' letters contradict their order, two options have the same text, or one option is only
            a letter while others have a text.
    """
    if not options:
        return
    letters = option_letters(options)
    written, texts = zip(
        *(("", option) if _ABBREVIATION.match(option) else own_letter(option) for option in options), strict=True
    )
    misplaced = [letter for letter, place in zip(written, letters, strict=True) if letter and letter != place]
    # "A. Lincoln" and "G. Washington" are names, so G is not an option's letter. After A and B, a D is one.
    if set(misplaced) & set(letters) or (misplaced and all(written) and written[:2] == ("A", "B")):
        todo = "put the options in the order of their letters; if the letters belong to the texts, reword these"
        raise OptionsError(
            f"expected letters in the order {', '.join(letters)}, got {', '.join(filter(None, written))}; {todo}"
        )
    if not all(texts) and any(texts):
        index = texts.index("")
        raise OptionsError(f"expected a text after each letter, got {options[index]!r}; add it or remove the option")
    bare = [" ".join(option.split()) for option in bare_options(options)]
    # Media options differ although their marks are the same.
    if distinct and (repeated := [option for option in bare if bare.count(option) > 1 and not MARK.search(option)]):
        raise OptionsError(f"expected different options, got {repeated[0]!r} twice; remove one of the two")


def find_options(question: str) -> tuple[str, list[str]] | None:
    """Return a question without its list of options, and the options without letters.

    Return None if there is no such list, or more than one, because then it is unclear which list is meant.
    """
    lists = _lists(question.split("\n"))
    return _cut(question, *lists[0]) if len(lists) == 1 else None


def shows_options(question: str) -> bool:
    """Return whether a question contains lettered options: one per line, or A and B within a line."""
    text = unicodedata.normalize("NFKC", question)
    return bool(_lists(question.split("\n"))) or any(pattern.search(text) for pattern in _WITHIN_A_LINE)


def without_options(question: str, options: Sequence[str]) -> str:
    """Return the question without a list of its own options, which the prompt would otherwise show twice.

    Raises:
        OptionsError: the question gives an option a different letter from the prompt, or lists other options in
            addition to some of these.
    """
    if not options:
        return question
    own = [fold_text(option) for option in bare_options(options)]
    _check_letters(question, own)
    lines = question.split("\n")
    repeated = []
    for start, end in _lists(lines):
        listed = [line.strip() for line in lines[start : end + 1] if line.strip()]
        texts = [fold_text(option) for option in bare_options(listed)]
        if texts == own:
            repeated.append((start, end))
        elif set(texts) & set(own):
            raise OptionsError(
                f"expected the list in the question to be the same as 'options', got {listed!r:.80}; remove one of "
                "the two"
            )
    cut = _cut(question, *repeated[-1]) if repeated else None
    return cut[0] if cut else question


def _check_letters(question: str, options: Sequence[str]) -> None:
    """Reject a question that lists at least two of its options and gives one of them a different letter."""
    letters = option_letters(options).lower()
    folded = [fold_text(line) for line in question.split("\n")]
    labeled = {
        text: [match for line in folded for match in re.finditer(_LABELED % re.escape(text), line)]
        for text in filter(None, options)
    }
    if sum(map(bool, labeled.values())) < 2:
        return
    for text, matches in labeled.items():
        own = [letter for letter, option in zip(letters, options, strict=True) if option == text]
        for match in matches:
            if next(filter(None, match.groups())) not in own:
                raise OptionsError(
                    f"expected {text!r} after {' or '.join(own).upper()}, its letter in 'options', got {match[0]!r}; "
                    "use the same order in both, or remove the list from the question"
                )


def _lists(lines: Sequence[str]) -> list[tuple[int, int]]:
    """Return the first and last line of every list of at least two options. Empty lines may separate its lines."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    lists = []
    first = 0
    while first < len(filled):
        end = first
        while end < min(len(filled), first + MOST_OPTIONS) and _are_labeled(lines, filled[first : end + 1]):
            end += 1
        if end - first >= 2:
            lists.append((filled[first], filled[end - 1]))
        first = max(end, first + 1)
    return lists


def _are_labeled(lines: Sequence[str], numbers: Sequence[int]) -> bool:
    """Return whether these lines have the letters A, B, … in this order, each followed by a text."""
    listed = [lines[number] for number in numbers]
    return bare_options(listed) != [line.strip() for line in listed]


def _cut(question: str, start: int, end: int) -> tuple[str, list[str]] | None:
    """Return the question without these lines and the heading above, and their texts; None if nothing remains."""
    lines = question.split("\n")
    before = lines[:start]
    while before and (not before[-1].strip() or _HEADING.fullmatch(before[-1].strip())):
        before.pop()
    text = "\n".join([*before, *lines[end + 1 :]]).strip()
    return (text, bare_options([line for line in lines[start : end + 1] if line.strip()])) if text else None
