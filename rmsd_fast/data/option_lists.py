"""Lists of options inside a question's text: lines `A. tea`, `B. milk`, … in the order of their letters."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rmsd_fast.method.answers import bare_options

_HEADING = re.compile(r"(?:answer )?(?:options|choices)(?: are)?\s*[:：]?|选项\s*[:：]?", re.IGNORECASE)
MOST_OPTIONS = 26


def find_options(question: str) -> tuple[str, list[str]] | None:
    """Return a question without the list of options in it, and the options without letters.

    None where there is no such list, or more than one: then nothing says which of them is meant.
    """
    lists = _lists(question.split("\n"))
    return _cut(question, *lists[0]) if len(lists) == 1 else None


def without_options(question: str, options: Sequence[str]) -> str:
    """The question without a list of its own options, which the prompt would show a second time."""
    for start, end in reversed(_lists(question.split("\n")) if options else []):
        cut = _cut(question, start, end)
        if cut and cut[1] == bare_options(options):
            return cut[0]
    return question


def _lists(lines: Sequence[str]) -> list[tuple[int, int]]:
    """First and last line of every list of two options or more. Empty lines may stand between its lines."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    lists = []
    first = 0
    while first < len(filled):
        end = first
        while end < min(len(filled), first + MOST_OPTIONS) and _are_labelled(lines, filled[first : end + 1]):
            end += 1
        if end - first >= 2:
            lists.append((filled[first], filled[end - 1]))
        first = max(end, first + 1)
    return lists


def _are_labelled(lines: Sequence[str], numbers: Sequence[int]) -> bool:
    """Whether these lines carry the letters A, B, … in this order, each with a text behind it."""
    listed = [lines[number] for number in numbers]
    return bare_options(listed) != [line.strip() for line in listed]


def _cut(question: str, start: int, end: int) -> tuple[str, list[str]] | None:
    """The question without these lines and the heading above them, and their texts; None where nothing is left."""
    lines = question.split("\n")
    before = lines[:start]
    while before and (not before[-1].strip() or _HEADING.fullmatch(before[-1].strip())):
        before.pop()
    text = "\n".join([*before, *lines[end + 1 :]]).strip()
    return (text, bare_options([line for line in lines[start : end + 1] if line.strip()])) if text else None
