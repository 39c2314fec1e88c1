"""Hints: what a self-teacher is told about a question that the student is not, as texts after the question.

A view is one kind of hint. The text of each view is fixed here; what it says comes from the question and the pool.
"""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Facts that a question file can state under `hints`.
FILE_HINTS = ("answer", "reasoning", "window", "keyframes", "cue", "feedback", "context")
# The view that shows other media instead of adding a text. A question file states it under `hints`, too.
MEDIA_VIEW = "media"
VIEWS = (*FILE_HINTS, "half_reasoning", "best_answer", MEDIA_VIEW)


def view_text(view: str, facts: Mapping[str, Any]) -> str | None:
    """Return the text of a view, or None if a question does not have its fact.

    Args:
        view: one of VIEWS, except MEDIA_VIEW, which has no text.
        facts: what is known of the question: `answer`, `reasoning`, `cue`, `feedback`, `context` and `best_answer` as
            texts, `window` as (start, end) and `keyframes` as a list, both in seconds.
    Raises:
        ValueError: the view is unknown or has no text.
    """
    if view not in VIEWS or view == MEDIA_VIEW:
        raise ValueError(f"view: expected one of {', '.join(VIEWS[:-1])}, got {view!r}")
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
        "context": "",
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


@dataclass(frozen=True)
class Hint:
    """What a self-teacher is told, in addition to the student's prompt or in its place.

    Attributes:
        text: lines after the question; "" = none.
        media: whether its prompt shows the media of `hints.media` in place of the student's.
    """

    text: str
    media: bool = False


def make_hints(
    views: Sequence[str], facts: Mapping[str, Any], *, together: bool, refuse: Callable[[str], bool]
) -> list[Hint]:
    """Return the hints of a question: one with all views that it has, or one for each of them.

    Args:
        views: some of VIEWS.
        facts: see `view_text`; MEDIA_VIEW is a fact if the question has other media that can be shown.
        together: whether one teacher reads all views.
        refuse: function that returns whether the self-teacher cannot read a text, which is then left out.
    Returns:
        The hints in the order of the views; empty if the question has none of them.
    """
    shown = MEDIA_VIEW in views and MEDIA_VIEW in facts
    texts = {view: view_text(view, facts) for view in views if view != MEDIA_VIEW}
    if together:
        text = "\n".join(text for text in texts.values() if text is not None)
        text = "" if text and refuse(text) else text
        return [Hint(text, shown)] if text or shown else []
    hints = []
    for view in views:
        if view == MEDIA_VIEW:
            hints += [Hint("", media=True)] if shown else []
        elif texts[view] is not None and not refuse(texts[view]):
            hints.append(Hint(texts[view]))
    return hints


def without_media(hints: Sequence[Hint]) -> list[Hint]:
    """Return the hints of a question whose other media cannot be shown, which leaves only texts."""
    return [Hint(hint.text) for hint in hints if hint.text or not hint.media]


def with_advice(hints: Sequence[Hint], advice: str | None, *, together: bool) -> list[Hint]:
    """Return the hints of a question with the advice about one rollout, as the last line or as a hint of its own.

    Args:
        hints: result of `make_hints`.
        advice: text of the view "feedback"; None = no advice.
        together: whether one teacher reads all views.
    """
    if advice is None:
        return list(hints)
    if not together:
        return [*hints, Hint(advice)]
    (told,) = hints or [Hint("")]
    return [Hint("\n".join(filter(None, (told.text, advice))), told.media)]
