"""Read subtitle files, and choose the cues that are spoken at the times of a video's frames.

Files are SubRip (`.srt`), or the JSON of LongVideoBench: a list of `{"start", "end", "line"}` with times as texts, or
of `{"timestamp": [start, end], "text"}` with times in seconds, where an end of null is that of the video. Damaged cues
are left out and named with their line, since transcripts of hours often have some.
"""

from __future__ import annotations

import functools
import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rmsd_fast.data.errors import DataError, short
from rmsd_fast.data.media_paths import is_number

# Stands in a prompt where the cues are shown, which depend on the chosen frames.
MARK = "<subtitles>"
# What lmms-eval writes instead if there is no file.
NO_SUBTITLES = "No subtitles available"
_CLOCK = r"(?:(\d{1,3}):)?(\d{1,3}):(\d{1,2})(?:[.,](\d{1,9}))?"
_TIMES = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}(?:\s.*)?")
_TIME = re.compile(rf"\s*{_CLOCK}\s*")
# Tags such as <i>, <font color="red"> and <v Name>, but not "<b and c>" of "a<b and c>d". Marks of media and special
# tokens have the same form, and must not reach the prompt.
_ATTRIBUTE = r"\s+[\w-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s<>]+)"
_TAG = re.compile(
    rf"</?[A-Za-z][\w.:-]*(?:{_ATTRIBUTE})*\s*/?>|<v(?:\.\w+)*\s[^<>]*>|<[A-Za-z]+\s\d+/?>|<[|!][^<>]*>|"
    r"\{\\[^{}]*\}"
)
_MOST_BYTES = 64 * 2**20


class Cue(NamedTuple):
    """A text and the time at which it is spoken, in seconds on the clock of its file."""

    start_s: float
    end_s: float
    text: str


class Subtitles(NamedTuple):
    """The cues of a file in order, and a text about each damaged one, with its line."""

    cues: tuple[Cue, ...]
    faults: tuple[str, ...]


@functools.lru_cache(maxsize=64)
def read_subtitles(path: str) -> Subtitles:
    """Return the cues of a file.

    Raises:
        DataError: the file cannot be read, is larger than 64 MiB, or has no cue at all.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: the subtitles cannot be read ({error.strerror}); download the file again") from error
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path}: expected subtitles of at most 64 MiB, got more; download the file again")
    faults = []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}, line {line}: expected UTF-8, got other bytes")
        text = data.decode("utf-8-sig", "replace")
    is_json = os.path.splitext(path)[1].lower() == ".json"
    cues, damaged = _read_json(path, text) if is_json else _read_srt(path, text)
    faults += damaged
    if faults and not cues:
        raise DataError(f"{faults[0]}; the file has no usable cue: download it again")
    return Subtitles(tuple(sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))), tuple(faults))


def spoken_at(
    cues: Iterable[Cue], times_s: Sequence[float], *, shift_s: float = 0.0, least_s: float = 0.0
) -> list[str]:
    """Return the texts of the cues during which at least one frame is shown, in order.

    Args:
        cues: the cues.
        times_s: times of the frames on the video's clock.
        shift_s: time of the subtitles' clock at which the video begins.
        least_s: shorter cues are widened to this duration around their middle.
    """
    texts = []
    for start_s, end_s, text in cues:
        if end_s - start_s < least_s:
            middle_s = (start_s + end_s) / 2
            start_s, end_s = middle_s - least_s / 2, middle_s + least_s / 2
        if any(start_s <= time_s + shift_s < end_s for time_s in times_s):
            texts.append(text)
    return texts


def with_subtitles(prompt: str, meta: Mapping[str, Any], times_s: Sequence[float]) -> str:
    """Return a prompt with the cues in place of its mark, or unchanged if the question has no subtitles.

    Args:
        prompt: text with MARK.
        meta: `Question.meta`; `subtitles` has `path`, `shift_s` and `least_s`.
        times_s: times of the frames.
    """
    source = meta.get("subtitles")
    if source is None:
        return prompt
    cues = read_subtitles(source["path"]).cues
    texts = spoken_at(cues, times_s, shift_s=source["shift_s"], least_s=source["least_s"])
    # The mark comes before the question, which may contain the same text.
    return prompt.replace(MARK, "\n".join(texts), 1)


def _read_srt(path: str, text: str) -> tuple[list[Cue], list[str]]:
    cues: list[Cue] = []
    faults: list[str] = []
    times: tuple[float, float] | None = None
    shown: list[str] = []
    # Most files number their cues. In the others, a number is the text of a cue.
    numbered = text.partition("-->")[0].rpartition("\n")[0].rstrip().rpartition("\n")[2].strip().isdecimal()

    def end_cue(next_follows: bool) -> None:
        # The number of the next cue stands before its times.
        after_empty_line = len(shown) > 1 and not shown[-2].strip()
        if next_follows and shown and shown[-1].strip().isdecimal() and (numbered or after_empty_line):
            shown.pop()
        words = _plain(" ".join(shown))
        if times is not None and words:
            cues.append(Cue(*times, words))
        shown.clear()

    for number, line in enumerate(text.splitlines(), 1):
        if "-->" not in line:
            shown.append(line)
            continue
        end_cue(next_follows=True)
        match = _TIMES.fullmatch(line)
        times = (_seconds(match.groups()[:4]), _seconds(match.groups()[4:])) if match else None
        if times is None or times[1] < times[0]:
            expected = "times such as '00:01:02,500 --> 00:01:04,000'"
            faults.append(f"{path}, line {number}: expected {expected}, got {short(line.strip())}")
            times = None
    if text.strip() and "-->" not in text:
        faults.append(f"{path}: expected lines such as '00:01:02,500 --> 00:01:04,000', got none")
    end_cue(next_follows=False)
    return cues, faults


def _read_json(path: str, text: str) -> tuple[list[Cue], list[str]]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected subtitles in JSON, got another text ({error}); download it again") from None
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list of cues, got {type(items).__name__}; download the file again")
    cues: list[Cue] = []
    faults: list[str] = []
    for number, item in enumerate(items, 1):
        cue = _cue_of(item) if isinstance(item, dict) else None
        if cue is None:
            faults.append(f"{path}, cue {number}: expected times and a text, got {short(item)}")
        elif cue.text:
            cues.append(cue)
    return cues, faults


def _cue_of(item: Mapping[str, Any]) -> Cue | None:
    if "timestamp" in item:
        times, text = item["timestamp"], item.get("text")
        if not isinstance(times, list) or len(times) != 2 or not is_number(times[0]):
            return None
        start_s, end_s = times[0], math.inf if times[1] is None else times[1]
    else:
        text = item.get("line")
        matches = [_TIME.fullmatch(str(item.get(name))) for name in ("start", "end")]
        if not all(matches):
            return None
        start_s, end_s = (_seconds(match.groups()) for match in matches)
    usable = isinstance(text, str) and (is_number(end_s) or end_s == math.inf)
    return Cue(float(start_s), float(end_s), _plain(text)) if usable and end_s >= start_s else None


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = parts
    return int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction or 0}")


def _plain(text: str) -> str:
    """Return a text on one line without tags."""
    text = html.unescape(text).replace("\\N", " ")
    # Removing a tag can make another one of the text around it.
    while (bare := _TAG.sub("", text)) != text:
        text = bare
    return " ".join(text.split())
