"""Hints: what a self-teacher is told about a question that the student is not, as texts after the question.

A view is one kind of hint. The text of each view is fixed here; what it says comes from the question and the pool.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Facts that a question file can state under `hints`.
FILE_HINTS = ("answer", "reasoning", "window", "keyframes", "cue", "feedback")
VIEWS = (*FILE_HINTS, "half_reasoning", "best_answer")


def view_text(view: str, facts: Mapping[str, Any]) -> str | None:
    """Return the text of a view, or None if a question does not have its fact.

    Args:
        view: one of VIEWS.
        facts: what is known of the question: `answer`, `reasoning`, `cue`, `feedback` and `best_answer` as texts,
            `window` as (start, end) and `keyframes` as a list, both in seconds.
    Raises:
        ValueError: the view is unknown.
    """
    if view not in VIEWS:
        raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
    fact = facts.get("reasoning" if view == "half_reasoning" else view)
    if fact is None:
        return None
    if view == "window":
        return f"The answer is visible from {fact[0]:g} to {fact[1]:g} seconds."
    if view == "keyframes":
        return f"Frames that show the answer, in seconds: {', '.join(f'{time:g}' for time in fact)}."
    if view == "half_reasoning":
        half = first_half(fact)
        return half and f"A correct solution begins: {half}"
    opening = {
        "answer": "The correct answer: ",
        "reasoning": "A correct solution: ",
        "cue": "What to look at: ",
        "feedback": "Advice: ",
        "best_answer": "A good response: ",
    }
    return opening[view] + fact


def first_half(text: str) -> str | None:
    """Return the first half of a text, up to the white space nearest to its middle; None for a single character.

    Without white space in the second and third quarter, as in Chinese or Japanese, the text is cut at its middle.
    """
    text = text.strip()
    middle = len(text) / 2
    spaces = [i for i, character in enumerate(text) if character.isspace() and abs(i - middle) <= len(text) / 4]
    cut = min(spaces, key=lambda i: abs(i - middle), default=len(text) // 2)
    # A letter keeps its accents and vowel signs.
    while cut > 0 and unicodedata.category(text[cut])[0] == "M":
        cut -= 1
    return text[:cut].rstrip() or None


def hint_texts(views: Sequence[str], facts: Mapping[str, Any], *, together: bool) -> list[str]:
    """Return the hints of a question: one with all views that it has, or one for each of them.

    Args:
        views: some of VIEWS.
        facts: see `view_text`.
        together: whether one teacher reads all views.
    Returns:
        The hints in the order of the views; empty if the question has none of them.
    """
    texts = [text for view in views if (text := view_text(view, facts)) is not None]
    return ["\n".join(texts)] if together and texts else texts
