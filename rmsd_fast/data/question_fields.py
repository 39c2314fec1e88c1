"""Check the fields of a question in this package's schema.

`fail` returns the error for a field from its name, what was expected, what it is, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from rmsd_fast.data.errors import DataError
from rmsd_fast.data.ground_truths import GroundTruthError, check_times, read_ground_truth
from rmsd_fast.data.marks import SPECIAL_TOKEN, is_unicode
from rmsd_fast.data.media_paths import Span, is_number
from rmsd_fast.data.option_lists import MOST_OPTIONS, OptionsError, check_options, without_options
from rmsd_fast.method.answers import (
    BENCHMARK_TASKS,
    CLOSED_TASKS,
    EXPECTED_FORMAT,
    TASK_TYPES,
    option_letters,
    parse_answer_body,
)

_FIELDS = (
    *("id", "videos", "images", "question", "task_type", "options", "answer", "system", "duration"),
    *("hints", "meta"),
)


def check_fields(raw: dict[str, Any], fail) -> None:
    """Raise DataError if a field is unknown."""
    for key in raw:
        if key not in _FIELDS:
            close = difflib.get_close_matches(str(key), _FIELDS, n=1, cutoff=0.8)
            todo = f"did you mean {close[0]!r}? If not, " if close else ""
            raise fail(key, f"one of the fields {', '.join(_FIELDS)}", key, f"{todo}remove it or put it under 'meta'")


def read_task_type(task: object, fail) -> str:
    """Return the task type of a question. Raise DataError if it is none, or one that only benchmarks have."""
    todo = "name the type of the answer"
    if task in BENCHMARK_TASKS:
        todo = "only the readers of evaluate.benchmark make such questions; choose another task_type"
    if task in BENCHMARK_TASKS or task not in TASK_TYPES:
        raise fail("task_type", f"one of {', '.join(TASK_TYPES)}", task, todo)
    return task


def check_shown(task: str, videos: Sequence[str], images: Sequence[str], fail) -> None:
    """Raise DataError if the answers of a task type are about media that the question does not have."""
    if task == "temporal" and not videos:
        raise fail("videos", "a video, since temporal answers are times in one", None, "add it or change the task type")
    if task == "spatial" and not videos and not images:
        raise fail("task_type", "a type other than spatial, whose answers are boxes in a picture", task, "change it")


def read_options(value: object, task: str, fail, *, fewest: int) -> tuple[str, ...] | None:
    """Return the options, or None without any. Raise DataError unless they are `fewest` to 26 texts, for mcq."""
    if value is None or value == [] or value == {}:
        return None
    if task != "mcq":
        raise fail("options", "none, since only mcq questions have options", value, "remove it or set task_type to mcq")
    if isinstance(value, dict):
        value = {key: option for key, option in value.items() if option is not None}
        letters = [str(key).strip().strip("().").upper() for key in value]
        if not fewest <= len(value) <= MOST_OPTIONS or letters != list(option_letters(list(value))):
            raise fail("options", "the letters A, B, C, … in order as keys", value, 'write ["red", "green"]')
        value = list(value.values())
    if isinstance(value, list):
        value = [str(item) if is_number(item) else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise fail("options", "a list of non-empty texts", value, 'write ["red", "green"]')
    if not fewest <= len(value) <= MOST_OPTIONS:
        raise fail("options", f"{fewest} to 26 options", value, "fix the list")
    return tuple(value)


def read_answer(value: object, task: str, options: Sequence[str] | None, required: bool, fail) -> str | None:
    """Return the ground truth, or None without one. Raise DataError if it is malformed, or missing but required."""
    if value is None or (isinstance(value, str) and not value.strip()):
        if required and task in CLOSED_TASKS:
            todo = (
                "add the ground truth, set task_type to open, or, for training questions only, set "
                "teacher.unlabeled=agreement"
            )
            raise fail("answer", f"{EXPECTED_FORMAT[task]}, since {task} is a closed task", value, todo)
        return None
    expected = EXPECTED_FORMAT[task]
    if task == "mcq" and options is not None:
        expected += f" among {option_letters(options)}"
    try:
        text = read_ground_truth(value, task, options)
    except GroundTruthError as error:
        raise fail("answer", expected, value, str(error)) from None
    check_text("answer", text, fail)
    parsed = parse_answer_body(text, task, options)
    # A number larger than the largest float.
    if parsed is None:
        raise fail("answer", expected, value, "write it as it belongs inside <answer>")
    if task == "temporal" and parsed[1] <= parsed[0]:
        raise fail("answer", "an end after the start", value, "no answer could score above 0; fix it")
    if task == "spatial" and (parsed[2] <= parsed[0] or parsed[3] <= parsed[1]):
        raise fail("answer", "x1 < x2 and y1 < y2", value, "no answer could score above 0; fix it")
    return text


def check_interval(interval: tuple[float, float], duration: float | None, spans: Sequence[Span]) -> None:
    """Raise GroundTruthError if none of the videos can contain the interval. It may refer to any of several."""
    faults = []
    for span in spans:
        try:
            check_times(*interval, duration=duration, span=span)
        except GroundTruthError as error:
            faults.append(error)
    if len(faults) == len(spans):
        raise faults[0]


def check_hint_times(hints: dict[str, Any], duration: float | None, spans: Sequence[Span], fail) -> None:
    """Raise DataError if none of the videos can contain the times of hints."""
    intervals = [("window", *hints["window"])] if "window" in hints else []
    intervals += [("keyframes", time, time) for time in hints.get("keyframes", ())]
    for name, start, end in intervals:
        if not spans:
            raise fail(f"hints.{name}", "a video, since hints of this kind are times in one", hints[name], "remove it")
        try:
            check_interval((start, end), duration, spans)
        except GroundTruthError as error:
            raise fail(f"hints.{name}", "times in the video", hints[name], str(error)) from None


def read_texts(marked: list[str], where: str, names: dict[str, str], fail, *, distinct: bool) -> tuple[str, list[str]]:
    """Return the question without the options that it repeats, and the options, as the student reads them.

    Args:
        marked: question and options, with marks for the media.
        where, names, fail: as in parse_question.
        distinct: whether the options must differ.
    Raises:
        DataError: a text is malformed, or the options do not fit the question.
    """
    question, *options = marked
    checked = "options"
    try:
        check_options(options, distinct=distinct)
        checked = "question"
        question = without_options(question, options)
    except OptionsError as error:
        raise DataError(f"{where}: field '{names.get(checked, checked)}': {error}") from None
    for text in (question, *options):
        check_text("question" if text is question else "options", text, fail)
        if token := SPECIAL_TOKEN.search(text):
            raise fail(
                "question", "plain text", token[0], "remove special tokens of the model from question and options"
            )
    return question, options


def read_system(system: object, fail) -> str | None:
    """Return the system prompt, or None without one. Raise DataError if it is empty or has special tokens."""
    if system is None:
        return None
    if not isinstance(system, str) or not system.strip() or SPECIAL_TOKEN.search(system):
        raise fail("system", "non-empty plain text", system, "fix it or leave it out")
    check_text("system", system, fail)
    return system


def read_duration(value: object, fail) -> float | None:
    """Return the duration in seconds, or None without one. Raise DataError if it is not a number above 0."""
    if value is None:
        return None
    if not is_number(value) or value <= 0:
        raise fail("duration", "a number of seconds above 0", value, "fix it or leave it out")
    return float(value)


def check_text(name: str, text: str, fail) -> None:
    """Raise DataError if text cannot be tokenized or written as UTF-8."""
    if not is_unicode(text):
        raise fail(name, "Unicode text", text, "it contains a lone surrogate; fix the escape")
