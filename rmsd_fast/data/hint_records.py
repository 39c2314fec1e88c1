"""Check the field `hints` of a question: what a self-teacher may be told and the student is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.marks import SPECIAL_TOKEN, is_unicode
from rmsd_fast.data.media_paths import is_number
from rmsd_fast.method.hints import FILE_HINTS

_ADVICE = "fix it or leave it out"


def read_hints(value: object, fail: Callable[[str, str, object, str], DataError]) -> dict[str, Any]:
    """Return the hints of a record, without those that are null.

    Args:
        value: the field, or None.
        fail: function that returns the error of a field: its name, what was expected, what was found, what to do.
    Raises:
        DataError: a name is unknown, a text is empty or contains a special token, or times are invalid.
    """
    if value is None:
        return {}
    if not isinstance(value, dict) or not set(value) <= set(FILE_HINTS):
        raise fail("hints", f"an object with some of {', '.join(FILE_HINTS)}", value, "fix the names")
    hints = {name: hint for name, hint in value.items() if hint is not None}
    for name, hint in hints.items():
        if name in ("window", "keyframes"):
            if not isinstance(hint, list) or not hint or not all(is_number(time) and time >= 0 for time in hint):
                raise fail(f"hints.{name}", "a list of times in seconds", hint, _ADVICE)
            if name == "window" and (len(hint) != 2 or hint[1] <= hint[0]):
                raise fail("hints.window", "[start, end] with an end after the start", hint, _ADVICE)
        elif not isinstance(hint, str) or not hint.strip() or not is_unicode(hint) or SPECIAL_TOKEN.search(hint):
            raise fail(f"hints.{name}", "non-empty plain text", hint, _ADVICE)
    return hints
