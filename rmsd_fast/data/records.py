"""Questions: the JSONL schema, reading, checking, writing.

One JSON object per line:
``{"id", "videos": [path] | "images": [path], "question", "task_type", "options"?, "answer"?, "duration"?, "meta"?}``
A part of a video is written `{"path": "a.mp4", "start": 3.5, "end": 10}` in place of the path (seconds; either may be
left out): frames are taken from it, and stamps and answers keep the times of the whole file.
Files of other trainers are read through `converters`. Relative paths start at the media root, and every path has to
lie in it after symbolic links are followed. A media file that is missing or damaged is no error here: that is found,
replaced and counted per sample while training.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsd_fast.config import SettingsError, UserError
from rmsd_fast.method.answers import CLOSED_TASKS, EXPECTED_FORMAT, TASK_TYPES, option_letters, parse_answer_body

FORMATS = ("auto", "rmsd", "ms-swift", "llava", "video-r1")
_FIELDS = ("id", "videos", "images", "question", "task_type", "options", "answer", "duration", "meta")


class DataError(UserError, ValueError):
    """Data that the user can mend: `<file>:<line>: field 'x': expected …, got …; what to do`."""

    @classmethod
    def at(cls, where: str, name: str, expected: str, got: object, todo: str) -> DataError:
        """The error in its usual words; `got` is shown shortened."""
        shown = got if isinstance(got, str) and got.startswith("nothing") else _short(got)
        return cls(f"{where}: field '{name}': expected {expected}, got {shown}; {todo}")


@dataclass(frozen=True)
class Question:
    """One question about videos or images."""

    id: str
    question: str
    task_type: str
    """One of TASK_TYPES."""
    videos: tuple[str, ...] = ()
    """Absolute paths inside the media root once loaded."""
    images: tuple[str, ...] = ()
    """Absolute paths inside the media root once loaded."""
    spans: tuple[tuple[float | None, float | None] | None, ...] = ()
    """Per video the start and end in seconds (None = open) of the part that is shown, None = all of it; () = all."""
    options: tuple[str, ...] | None = None
    """Choices of an mcq question in order, bare or written `A. x`; None = letters stand in the question text."""
    answer: str | None = None
    """Ground truth as it stands inside `<answer>`; a reference text for open questions."""
    duration: float | None = None
    """Length of the video in seconds."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything else; training reads none of it."""


def load_questions(
    path: str | os.PathLike,
    *,
    media_root: str | os.PathLike | None = None,
    format: str = "auto",
    require_answer: bool = True,
) -> list[Question]:
    """Read and check a question file.

    Args:
        path: JSONL, or a JSON list of the same objects.
        media_root: folder that every media path has to lie in; None or "" = the folder of the file.
        format: one of FORMATS; "auto" goes by the keys of the first record.
        require_answer: refuse closed tasks without ground truth.
    Raises:
        DataError: names file, line, field, what was expected, what was found.
        ValueError: unknown format.
    """
    # converters imports DataError from here.
    from rmsd_fast.data import converters

    if format not in FORMATS:
        raise SettingsError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    root = Path(media_root) if media_root else path.parent
    # absolute() first: resolve() of a relative path that does not exist would still be right, its message would not.
    root = root.absolute()
    questions: list[Question] = []
    seen: dict[str, str] = {}
    for index, (where, record) in enumerate(read_records(path)):
        if format == "auto":
            format = converters.detect_format(record, where)
        fallback_id = f"{path.stem}-{index}"
        raw, names = converters.convert(record, format, where, fallback_id)
        question = parse_question(raw, where, media_root=root, require_answer=require_answer, names=names)
        if question.id in seen:
            todo = f"it was used at {seen[question.id]} already, give every question its own id"
            raise DataError.at(where, names.get("id", "id"), "an id that occurs once", question.id, todo)
        seen[question.id] = where
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: expected at least one question, got an empty file; check that the path is right")
    return questions


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a JSONL file or of a JSON list, each with the place that an error about it names."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}; convert it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if text.lstrip().startswith("["):
        yield from _read_list(path, text)
        return
    # Not splitlines(): that would also cut at U+2028, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", parse_record(line, f"{path}:{number}")


def _read_list(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        items = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(
            f"{path}:{line}: expected a JSON list, got text that does not parse ({error}); mend it"
        ) from error
    for index, item in enumerate(items):
        where = f"{path}: item {index + 1}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: expected a JSON object, got {_short(item)}; write one object per question")
        yield where, item


def parse_record(line: str, where: str) -> dict[str, Any]:
    """One line of JSONL as a dict; DataError otherwise."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object per line, got text that does not parse ({error}); mend it"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {_short(record)}; write one object per line")
    return record


def parse_question(
    raw: dict[str, Any],
    where: str,
    *,
    media_root: Path,
    require_answer: bool = True,
    names: dict[str, str] | None = None,
) -> Question:
    """Check one record of our schema.

    Args:
        raw: the record.
        where: "<file>:<line>".
        media_root: absolute folder that media lie in.
        names: what a converter's source calls our fields, for the messages.
    """
    names = names or {}

    def fail(name: str, expected: str, got: object, todo: str) -> DataError:
        return DataError.at(where, names.get(name, name), expected, got, todo)

    for key in raw:
        if key not in _FIELDS:
            raise fail(key, f"one of the fields {', '.join(_FIELDS)}", key, "remove it or put it under 'meta'")
    identity = raw.get("id")
    if isinstance(identity, int) and not isinstance(identity, bool):
        identity = str(identity)
    for name, value in (("id", identity), ("question", raw.get("question"))):
        if not isinstance(value, str) or not value.strip():
            raise fail(name, "text that is not empty", value, "add it")
    task = raw.get("task_type")
    if task not in TASK_TYPES:
        raise fail("task_type", f"one of {', '.join(TASK_TYPES)}", task, "name the type that the answer has")
    listed, spans = _split_spans(raw.get("videos"), fail)
    videos, images = _media(listed, "videos", media_root, fail), _media(raw.get("images"), "images", media_root, fail)
    if bool(videos) == bool(images):
        raise fail(
            "videos", "paths under either 'videos' or 'images'", raw.get("videos"), "give exactly one of the two"
        )
    options = _options(raw.get("options"), task, fail)
    answer = _answer(raw.get("answer"), task, options, require_answer, fail)
    meta = raw.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise fail("meta", "a JSON object", meta, "write {…} or leave it out")
    return Question(
        id=identity,
        question=raw["question"],
        task_type=task,
        videos=videos,
        images=images,
        spans=spans,
        options=options,
        answer=answer,
        duration=_duration(raw.get("duration"), fail),
        meta=meta or {},
    )


def write_questions(path: str | os.PathLike, questions: Iterable[Question], *, media_root: str | os.PathLike) -> None:
    """Write our schema with media paths relative to `media_root`; the file appears whole or not at all."""
    root = Path(media_root).absolute().resolve()
    lines = []
    for question in questions:
        record: dict[str, Any] = {"id": question.id}
        for name in ("videos", "images"):
            if paths := getattr(question, name):
                record[name] = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
        if any(question.spans):
            record["videos"] = [_with_span(*one) for one in zip(record["videos"], question.spans, strict=True)]
        record |= {"question": question.question, "task_type": question.task_type}
        for name in ("options", "answer", "duration"):
            if (value := getattr(question, name)) is not None:
                record[name] = list(value) if isinstance(value, tuple) else value
        if question.meta:
            record["meta"] = question.meta
        lines.append(json.dumps(record, ensure_ascii=False))
    write_text_atomic(path, "".join(line + "\n" for line in lines))


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write, flush to disk, rename: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def normalize_answer(value: object, task_type: str) -> str | None:
    """A ground truth as the text inside `<answer>`; numbers and lists are accepted, anything else gives None."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str):
        return value.strip() or None
    if number and task_type in ("numeric", "ocr", "open"):
        return repr(value)
    sizes = {"temporal": 2, "spatial": 4}
    if not isinstance(value, list | tuple) or len(value) != sizes.get(task_type):
        return None
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        return None
    return (" to " if task_type == "temporal" else ",").join(repr(item) for item in value)


def _split_spans(value: object, fail) -> tuple[object, tuple[tuple[float | None, float | None] | None, ...]]:
    """The paths alone, and the span of each where any is given; what is no list is left to `_media`."""
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return value, ()
    paths, spans = [], []
    for item in value:
        given = item if isinstance(item, dict) else {"path": item}
        if unknown := sorted(set(given) - {"path", "start", "end"}):
            raise fail("videos", "path, start and end", unknown[0], 'write {"path": "a.mp4", "start": 3.5, "end": 10}')
        start, end = given.get("start"), given.get("end")
        for bound in (start, end):
            if bound is not None and not (_is_number(bound) and bound >= 0):
                raise fail("videos", "start and end in seconds from 0", bound, "mend it or leave it out")
        if end is not None and end <= (start or 0):
            raise fail("videos", "an end after the start", [start, end], "mend it")
        paths.append(given.get("path"))
        times = tuple(None if bound is None else float(bound) for bound in (start, end))
        spans.append(None if times == (None, None) else times)
    return paths, tuple(spans)


def _with_span(path: str, span: tuple[float | None, float | None] | None) -> object:
    if span is None:
        return path
    return {"path": path} | {name: at for name, at in zip(("start", "end"), span, strict=True) if at is not None}


def _media(value: object, name: str, root: Path, fail) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fail(name, "a list of paths", value, f'write "{name}": ["clip.mp4"]')
    return tuple(_media_path(item, name, root, fail) for item in value)


def _media_path(item: object, name: str, root: Path, fail) -> str:
    if not isinstance(item, str) or not item.strip() or "\0" in item:
        raise fail(name, "paths (text)", item, "name a file in the media root")
    if "://" in item:
        raise fail(name, "a local path", item, "download the file into the media root first")
    resolved = (root / item).resolve()
    if not resolved.is_relative_to(root.resolve()):
        todo = f"move the file there or set data.media_root (now {root})"
        raise fail(name, "a path inside the media root, also after symbolic links", item, todo)
    return str(resolved)


def _options(value: object, task: str, fail) -> tuple[str, ...] | None:
    if value is None or value == []:
        return None
    if task != "mcq":
        raise fail("options", "none, since only mcq questions have options", value, "remove it or set task_type to mcq")
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise fail("options", "a list of texts that are not empty", value, 'write ["red", "green"]')
    if not 2 <= len(value) <= 26:
        raise fail("options", "2 to 26 choices", value, "mend the list")
    return tuple(value)


def _answer(value: object, task: str, options: Sequence[str] | None, required: bool, fail) -> str | None:
    if value is None:
        if required and task in CLOSED_TASKS:
            todo = "add the ground truth, or set task_type to open"
            raise fail("answer", f"{EXPECTED_FORMAT[task]}, since {task} is a closed task", "nothing", todo)
        return None
    expected = EXPECTED_FORMAT[task]
    if task == "mcq" and options is not None:
        expected += f" among {option_letters(options)}"
    text = normalize_answer(value, task)
    parsed = None if text is None else parse_answer_body(text, task, options)
    if parsed is None:
        raise fail("answer", expected, value, "write it as it should stand inside <answer>")
    if task == "temporal" and parsed[1] <= parsed[0]:
        raise fail("answer", "an end after the start", value, "no answer could score above 0, mend it")
    if task == "spatial" and (parsed[2] <= parsed[0] or parsed[3] <= parsed[1]):
        raise fail("answer", "x1 < x2 and y1 < y2", value, "no answer could score above 0, mend it")
    return parsed if task == "mcq" else text


def _duration(value: object, fail) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise fail("duration", "seconds above 0", value, "mend it or leave it out")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
