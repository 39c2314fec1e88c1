"""Read the media paths of a question's record, check them against the media root, and read the spans of videos."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from rmsd_fast.data.errors import DataError

Span = tuple[float | None, float | None] | None
# Returns the error for (field, expected, got, what to do).
Fail = Callable[[str, str, object, str], DataError]


def split_spans(value: object, fail: Fail) -> tuple[object, tuple[Span, ...]]:
    """Return the paths of `videos`, and the span of each if any item has one. Return non-lists unchanged."""
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return value, ()
    paths, spans = [], []
    for item in value:
        video = item if isinstance(item, dict) else {"path": item}
        if unknown := sorted(set(video) - {"path", "start", "end"}):
            raise fail("videos", "path, start and end", unknown[0], 'write {"path": "a.mp4", "start": 3.5, "end": 10}')
        start, end = video.get("start"), video.get("end")
        for bound in (start, end):
            if bound is not None and not (is_number(bound) and bound >= 0):
                raise fail("videos", "start and end in seconds from 0", bound, "fix it or leave it out")
        if end is not None and end <= (start or 0):
            raise fail("videos", "an end after the start", [start, end], "fix it")
        paths.append(video.get("path"))
        times = tuple(None if bound is None else float(bound) for bound in (start, end))
        spans.append(None if times == (None, None) else times)
    return paths, tuple(spans)


def with_span(path: str, span: Span) -> object:
    """Return a video in the form that records use."""
    if span is None:
        return path
    return {"path": path} | {name: at for name, at in zip(("start", "end"), span, strict=True) if at is not None}


def media_paths(value: object, name: str, root: Path, follow_symlinks: bool, fail: Fail) -> tuple[str, ...]:
    """Return absolute paths of one kind of media. They do not have to exist, but must be inside the media root."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fail(name, "a list of paths", value, f'write "{name}": ["clip.mp4"]')
    return tuple(_media_path(item, name, root, follow_symlinks, fail) for item in value)


def _media_path(item: object, name: str, root: Path, follow_symlinks: bool, fail: Fail) -> str:
    if isinstance(item, dict) and set(item) == {"path"}:
        item = item["path"]
    encode = "encode them: ffmpeg -framerate 2 -pattern_type glob -i 'frames/*.jpg' -pix_fmt yuv420p clip.mp4"
    if isinstance(item, list):
        raise fail(name, "paths of files", "a list of frames" if item else item, encode)
    if not isinstance(item, str) or not item.strip() or "\0" in item:
        raise fail(name, "paths (text)", item, "name a file in the media root")
    if item.startswith("file://"):
        item = unquote(item.removeprefix("file://"))
    if "://" in item or item.startswith("data:"):
        raise fail(name, "a local path", item, "download the file into the media root first")
    if item.startswith("~") and not (root / item).exists():
        todo = "'~' is not expanded; write the full path, or a path relative to the media root"
        raise fail(name, "a path", item, todo)
    try:
        if "\\" in item and not (root / item).exists():
            item = item.replace("\\", "/")
        path = Path(os.path.normpath(root / item)) if follow_symlinks else (root / item).resolve()
        inside = path.is_relative_to(root if follow_symlinks else root.resolve())
        is_folder = _is_folder(path)
    # A name that is too long, a loop of symbolic links, a folder without permission, or a lone surrogate.
    except (OSError, RuntimeError, ValueError) as error:
        raise fail(name, "a path that can be looked up", item, f"{error}; fix it") from None
    if not inside:
        todo = f"move the file there or set data.media_root (now {root})"
        todo += "" if follow_symlinks else "; data.follow_symlinks=true allows links that lead out of it"
        raise fail(name, "a path inside the media root, with symbolic links resolved", item, todo)
    if is_folder:
        raise fail(name, "a file", f"{item} (a folder)", f"name the file in it; if it holds frames, {encode}")
    return str(path)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number that a float can represent."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    # An integer larger than the largest float.
    except OverflowError:
        return False
