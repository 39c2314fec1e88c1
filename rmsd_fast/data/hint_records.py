"""Check the field `hints` of a question: what a self-teacher may be told and the student is not."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rmsd_fast.data.marks import MARK, SPECIAL_TOKEN, is_unicode
from rmsd_fast.data.media_paths import Fail, is_number, media_paths, split_spans, with_span
from rmsd_fast.method.hints import FILE_HINTS, MEDIA_VIEW

_ADVICE = "fix it or leave it out"
_NAMES = (*FILE_HINTS, MEDIA_VIEW)


def read_hints(value: object, root: Path, follow_symlinks: bool, fail: Fail) -> dict[str, Any]:
    """Return the hints of a record, without those that are null.

    Args:
        value: the field, or None.
        root: folder that must contain media.
        follow_symlinks: whether symbolic links in it may point outside.
        fail: function that returns the error of a field: its name, what was expected, what was found, what to do.
    Raises:
        DataError: a name is unknown, a text is empty or contains a special token, times are invalid, or a path of media
            cannot be used.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise fail("hints", "an object", value, 'write e.g. {"cue": "the car that turns left"}')
    for name in value:
        if name not in _NAMES:
            close = difflib.get_close_matches(str(name), _NAMES, n=1)
            todo = f"did you mean {close[0]!r}?" if close else "remove it"
            raise fail("hints", f"some of the names {', '.join(_NAMES)}", name, todo)
    hints = {name: hint for name, hint in value.items() if hint is not None}
    for name, hint in hints.items():
        if name == MEDIA_VIEW:
            hints[name] = _read_media(hint, root, follow_symlinks, fail)
        elif name in ("window", "keyframes"):
            if not isinstance(hint, list) or not hint or not all(is_number(time) and time >= 0 for time in hint):
                raise fail(f"hints.{name}", "a list of times in seconds", hint, _ADVICE)
            if name == "window" and (len(hint) != 2 or hint[1] <= hint[0]):
                raise fail("hints.window", "[start, end] with an end after the start", hint, _ADVICE)
        elif isinstance(hint, str) and (token := SPECIAL_TOKEN.search(hint)):
            raise fail(f"hints.{name}", "plain text", f"the special token {token[0]}", "remove it from the text")
        elif not isinstance(hint, str) or not hint.strip() or not is_unicode(hint):
            raise fail(f"hints.{name}", "non-empty plain text", hint, _ADVICE)
    return hints


def _read_media(value: object, root: Path, follow_symlinks: bool, fail: Fail) -> dict[str, list]:
    """Return `videos` and `images` as absolute paths, and `spans` of the videos, as in a question."""
    if not isinstance(value, dict) or not set(value) <= {"videos", "images"}:
        todo = 'write {"videos": [{"path": "a.mp4", "start": 3, "end": 5}]}'
        raise fail("hints.media", "an object with the lists videos, images or both", value, todo)

    def fail_in_media(name: str, expected: str, got: object, todo: str) -> Exception:
        return fail(f"hints.media.{name}", expected, got, todo)

    listed, spans = split_spans(value.get("videos"), fail_in_media)
    videos = media_paths(listed, "videos", root, follow_symlinks, fail_in_media)
    images = media_paths(value.get("images"), "images", root, follow_symlinks, fail_in_media)
    if not videos and not images:
        raise fail("hints.media", "at least one path under 'videos' or 'images'", value, _ADVICE)
    return {"videos": list(videos), "images": list(images), "spans": list(spans)}


def check_hint_media(media: dict[str, list], options: Sequence[str], *, videos: int, images: int, fail: Fail) -> None:
    """Raise DataError if other media cannot take the place of those of a question.

    Args:
        media: result of `read_hints` for `media`.
        options: options of the question, in which marks show the places of media.
        videos, images: number of files of the question.
        fail: as in `read_hints`.
    """
    got = (len(media["videos"]), len(media["images"]))
    if got != (videos, images) and any(MARK.search(option) for option in options):
        expected = f"{videos} videos and {images} images, since options have marks for them"
        raise fail("hints.media", expected, f"{got[0]} videos and {got[1]} images", "list as many files")


def hints_record(hints: dict[str, Any], root: Path) -> dict[str, Any]:
    """Return hints in the form that records use, with media paths relative to `root`."""
    if MEDIA_VIEW not in hints:
        return hints
    media = hints[MEDIA_VIEW]
    relative = {
        name: [Path(os.path.relpath(path, root)).as_posix() for path in media[name]] for name in ("videos", "images")
    }
    if any(media["spans"]):
        relative["videos"] = [with_span(*video) for video in zip(relative["videos"], media["spans"], strict=True)]
    return {**hints, MEDIA_VIEW: {name: paths for name, paths in relative.items() if paths}}
