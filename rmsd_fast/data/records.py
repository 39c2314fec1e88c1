"""Questions: the JSONL schema, reading, checking, writing.

One JSON object per line:
``{"id", "videos": [path], "images": [path], "question", "task_type",
"options"?, "answer"?, "system"?, "duration"?, "meta"?}``
with at least one video or image; `video` and `image` are understood too, and null is the same as a missing key.
`<video>` and `<image>` in the question or its options stand where the media do; without such marks media stand in
front.
A part of a video is written `{"path": "a.mp4", "start": 3.5, "end": 10}` in place of the path (seconds; either may be
left out): frames are taken from it, and stamps and answers keep the times of the whole file.
Files of other trainers are read through `converters`. Relative paths start at the media root, and every path has to
lie in it after symbolic links are followed. A media file that is missing or damaged is no error here: that is found,
replaced and counted per sample while training.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from rmsd_fast.config import FORMATS, SettingsError, UserError
from rmsd_fast.data.marks import MARK, MarkError, place_marks
from rmsd_fast.method.answers import (
    CLOSED_TASKS,
    EXPECTED_FORMAT,
    TASK_TYPES,
    bare_options,
    option_letters,
    parse_answer_body,
)
from rmsd_fast.method.natural import Unreadable, canonical_body

_FIELDS = ("id", "videos", "images", "question", "task_type", "options", "answer", "system", "duration", "meta")
# Faults of one file that a report lists.
SHOWN_FAULTS = 20
_SPECIAL_TOKEN = re.compile(r"<\|[a-z_]+\|>")
_OPTIONS_HEADING = re.compile(r"(?:answer )?(?:options|choices)(?: are)?\s*[:：]?|选项\s*[:：]?", re.IGNORECASE)


class DataError(UserError, ValueError):
    """Data that the user can fix: `<file>:<line>: field 'x': expected …, got …; what to do`."""

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
    """The text; `<video>` and `<image>` in it, and in the options, stand where the media do."""
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
    system: str | None = None
    """Text of a system turn in front of the question."""
    duration: float | None = None
    """Length of the video in seconds."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Anything else; training reads none of it."""

    @property
    def media(self) -> list[tuple[str, str, tuple[float | None, float | None] | None]]:
        """Kind, path and span of each medium, in the order in which the prompt shows them."""
        spans = self.spans or (None,) * len(self.videos)
        by_kind = {
            "video": [("video", path, span) for path, span in zip(self.videos, spans, strict=True)],
            "image": [("image", path, None) for path in self.images],
        }
        marks = MARK.findall("\n".join((self.question, *(self.options or ()))))
        if not marks:
            return by_kind["video"] + by_kind["image"]
        return [by_kind[kind].pop(0) for kind in marks]


def load_questions(
    path: str | os.PathLike,
    *,
    media_root: str | os.PathLike | None = None,
    format: str = "auto",
    task_type: str = "auto",
    require_answer: bool = True,
    follow_symlinks: bool = False,
) -> list[Question]:
    """Read and check a question file.

    Args:
        path: JSONL, or a JSON list of the same objects.
        media_root: folder that every media path has to lie in; None or "" = the folder of the file.
        format: one of FORMATS; "auto" goes by the keys of the first record.
        task_type: of records of other formats that name none; "auto" = by their options and answer.
        require_answer: refuse closed tasks without ground truth.
        follow_symlinks: let symbolic links in the media root lead out of it.
    Raises:
        DataError: names file, line, field, what was expected, what was found; several faults of a file in one report.
        SettingsError: unknown format.
    """
    # converters imports DataError from here.
    from rmsd_fast.data import converters

    if format not in FORMATS:
        raise SettingsError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    # absolute() first: resolve() of a relative path that does not exist would still be right, its message would not.
    root = (Path(media_root) if media_root else path.parent).absolute()
    questions: list[Question] = []
    faults: list[DataError] = []
    seen: dict[str, str] = {}
    for index, (where, record) in enumerate(read_records(path)):
        try:
            if isinstance(record, DataError):
                raise record
            if format == "auto":
                format = converters.detect_format(record, where)
            raw, names = converters.convert(record, format, where, f"{path.stem}-{index}", task_type)
            question = parse_question(
                raw,
                where,
                media_root=root,
                require_answer=require_answer,
                follow_symlinks=follow_symlinks,
                names=names,
            )
            if question.id in seen:
                todo = f"it was used at {seen[question.id]} already, give every question its own id"
                raise DataError.at(where, names.get("id", "id"), "an id that occurs once", question.id, todo)
        except DataError as error:
            faults.append(error)
            continue
        seen[question.id] = where
        questions.append(question)
    if faults:
        raise several_faults(path, faults, len(questions) + len(faults))
    if not questions:
        raise DataError(f"{path}: expected at least one question, got an empty file; check that the path is right")
    return questions


def several_faults(path: Path, faults: list[DataError], records: int) -> DataError:
    """One error for all that is wrong with a file."""
    if len(faults) == 1:
        return faults[0]
    shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
    more = f"\n  and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return DataError(f"{path}: {len(faults)} of {records} records cannot be used:{shown}{more}")


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Objects of a JSONL file or of a JSON list, each with the place that an error about it names.

    A line that does not parse comes as its error. A list may stand alone in an object: `{"data": []}`.
    """
    text = _read_text(path)
    if text.lstrip().startswith("["):
        yield from _items(path, _parse_whole(path, text))
        return
    lines = text.split("\n")  # not splitlines(): that would also cut at U+2028, which JSON strings may hold
    if text.lstrip().startswith("{") and not _parses(next(line for line in lines if line.strip())):
        # An object over several lines.
        whole = _parse_whole(path, text)
        lists = [value for value in whole.values() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path}: expected JSONL (one object per line) or a JSON list, got one object with the keys "
                f"{', '.join(map(repr, whole))}; write the records one per line"
            )
        yield from _items(path, lists[0])
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, parse_record(line, where)
            except DataError as error:
                yield where, error


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        todo = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new.jsonl"
        raise DataError(f"{path}: expected UTF-8 text, got UTF-16; {todo}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        todo = f"convert it from its own encoding, e.g. iconv -f GB18030 -t UTF-8 {path.name} > new.jsonl"
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start} ({error.reason}); {todo}"
        ) from error


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_whole(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: expected JSON, got text that does not parse ({error}); fix it") from error


def _items(path: Path, items: list[Any]) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for index, item in enumerate(items):
        where = f"{path}: item {index + 1}"
        if isinstance(item, dict):
            yield where, item
        else:
            yield (
                where,
                DataError(f"{where}: expected a JSON object, got {_short(item)}; write one object per question"),
            )


def parse_record(line: str, where: str) -> dict[str, Any]:
    """One line of JSONL as a dict; DataError otherwise."""
    try:
        record = json.loads(line)
    # ValueError: JSON that does not parse, or a number of more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object per line, got text that does not parse ({error}); fix it"
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
    follow_symlinks: bool = False,
    names: dict[str, str] | None = None,
) -> Question:
    """Check one record of our schema.

    Args:
        raw: the record.
        where: "<file>:<line>".
        media_root: absolute folder that media lie in.
        require_answer, follow_symlinks: as for load_questions.
        names: what a converter's source calls our fields, for the messages.
    """
    names = names or {}

    def fail(name: str, expected: str, got: object, todo: str) -> DataError:
        return DataError.at(where, names.get(name, name), expected, got, todo)

    for key in raw:
        if key not in _FIELDS:
            raise fail(key, f"one of the fields {', '.join(_FIELDS)}", key, "remove it or put it under 'meta'")
    identity = parse_id(raw.get("id"))
    for name, value in (("id", identity), ("question", raw.get("question"))):
        if not isinstance(value, str) or not value.strip():
            raise fail(name, "text that is not empty", value, "add it")
        _check_text(name, value, fail)
    task = raw.get("task_type")
    if task not in TASK_TYPES:
        raise fail("task_type", f"one of {', '.join(TASK_TYPES)}", task, "name the type that the answer has")
    listed, spans = _split_spans(raw.get("videos"), fail)
    videos, images = (
        _media(value, name, media_root, follow_symlinks, fail)
        for name, value in (("videos", listed), ("images", raw.get("images")))
    )
    if not videos and not images:
        raise fail("videos", "at least one path under 'videos' or 'images'", raw.get("videos"), "add it")
    options = _options(raw.get("options"), task, fail)
    answer = _answer(raw.get("answer"), task, options, require_answer, fail)
    meta = raw.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise fail("meta", "a JSON object", meta, "write {…} or leave it out")
    try:
        question, *marked = place_marks([raw["question"], *(options or ())], videos=len(videos), images=len(images))
    except MarkError as error:
        raise DataError(f"{where}: field '{names.get('question', 'question')}': {error}") from None
    for text in (question, *marked):
        if token := _SPECIAL_TOKEN.search(text):
            raise fail(
                "question", "plain text", token[0], "remove special tokens of the model from question and options"
            )
    system = raw.get("system")
    if system is not None:
        if not isinstance(system, str) or not system.strip() or _SPECIAL_TOKEN.search(system):
            raise fail("system", "plain text that is not empty", system, "fix it or leave it out")
        _check_text("system", system, fail)
    return Question(
        id=identity,
        question=_without_options(question, marked),
        task_type=task,
        videos=videos,
        images=images,
        spans=spans,
        options=tuple(marked) or None,
        answer=answer,
        system=system,
        duration=_duration(raw.get("duration"), fail),
        meta=meta or {},
    )


def parse_id(value: object) -> object:
    """An id as text where it is a number; 12.0, as tables write whole numbers beside empty cells, is 12."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else value
    return str(value)


def _check_text(name: str, text: str, fail) -> None:
    """Refuse text that could be neither tokenised nor written as UTF-8."""
    if re.search("[\ud800-\udfff]", text):
        raise fail(name, "Unicode text", text, "it holds a lone surrogate, fix the escape")


def _without_options(question: str, options: Sequence[str]) -> str:
    """The question without a list of its options at its end, which the prompt would show a second time."""
    lines = question.rstrip().split("\n")
    if not options or len(lines) <= len(options):
        return question
    listed = [line.strip() for line in lines[-len(options) :]]
    if bare_options(listed) == listed or bare_options(listed) != bare_options(options):
        return question
    lines = lines[: -len(options)]
    while lines and (not lines[-1].strip() or _OPTIONS_HEADING.fullmatch(lines[-1].strip())):
        lines.pop()
    return "\n".join(lines) if lines else question


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
        for name in ("options", "answer", "system", "duration"):
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
                raise fail("videos", "start and end in seconds from 0", bound, "fix it or leave it out")
        if end is not None and end <= (start or 0):
            raise fail("videos", "an end after the start", [start, end], "fix it")
        paths.append(given.get("path"))
        times = tuple(None if bound is None else float(bound) for bound in (start, end))
        spans.append(None if times == (None, None) else times)
    return paths, tuple(spans)


def _with_span(path: str, span: tuple[float | None, float | None] | None) -> object:
    if span is None:
        return path
    return {"path": path} | {name: at for name, at in zip(("start", "end"), span, strict=True) if at is not None}


def _media(value: object, name: str, root: Path, follow_symlinks: bool, fail) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise fail(name, "a list of paths", value, f'write "{name}": ["clip.mp4"]')
    return tuple(_media_path(item, name, root, follow_symlinks, fail) for item in value)


def _media_path(item: object, name: str, root: Path, follow_symlinks: bool, fail) -> str:
    if isinstance(item, dict) and set(item) == {"path"}:
        item = item["path"]
    if isinstance(item, list):
        todo = "encode them: ffmpeg -framerate 2 -pattern_type glob -i 'frames/*.jpg' -pix_fmt yuv420p clip.mp4"
        raise fail(name, "paths of files", "a list of frames" if item else item, todo)
    if not isinstance(item, str) or not item.strip() or "\0" in item:
        raise fail(name, "paths (text)", item, "name a file in the media root")
    if item.startswith("file://"):
        item = unquote(item.removeprefix("file://"))
    if "://" in item or item.startswith("data:"):
        raise fail(name, "a local path", item, "download the file into the media root first")
    try:
        if "\\" in item and not (root / item).exists():
            item = item.replace("\\", "/")
        path = Path(os.path.normpath(root / item)) if follow_symlinks else (root / item).resolve()
        inside = path.is_relative_to(root if follow_symlinks else root.resolve())
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    # A name that is too long, a circle of links, a folder that may not be entered, a lone surrogate.
    except (OSError, RuntimeError, ValueError) as error:
        raise fail(name, "a path that can be looked up", item, f"{error}; fix it") from None
    if not inside:
        todo = f"move the file there or set data.media_root (now {root})"
        todo += "" if follow_symlinks else "; links that lead out of it are followed with data.follow_symlinks=true"
        raise fail(name, "a path inside the media root, also after symbolic links", item, todo)
    return str(path)


def _options(value: object, task: str, fail) -> tuple[str, ...] | None:
    if value is None or value == [] or value == {}:
        return None
    if task != "mcq":
        raise fail("options", "none, since only mcq questions have options", value, "remove it or set task_type to mcq")
    if isinstance(value, dict):
        value = {key: option for key, option in value.items() if option is not None}
        letters = [str(key).strip().strip("().").upper() for key in value]
        if not 2 <= len(value) <= 26 or letters != list(option_letters(list(value))):
            raise fail("options", "the letters A, B, C, … in order as keys", value, 'write ["red", "green"]')
        value = list(value.values())
    if isinstance(value, list):
        value = [str(item) if _is_number(item) else item for item in value]
    if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
        raise fail("options", "a list of texts that are not empty", value, 'write ["red", "green"]')
    if not 2 <= len(value) <= 26:
        raise fail("options", "2 to 26 choices", value, "fix the list")
    return tuple(value)


def _answer(value: object, task: str, options: Sequence[str] | None, required: bool, fail) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        if required and task in CLOSED_TASKS:
            todo = "add the ground truth, or set task_type to open"
            raise fail("answer", f"{EXPECTED_FORMAT[task]}, since {task} is a closed task", value, todo)
        return None
    expected = EXPECTED_FORMAT[task]
    if task == "mcq" and options is not None:
        expected += f" among {option_letters(options)}"
    if task == "mcq" and _is_number(value):
        raise fail("answer", expected, value, "an index may count from 0 or from 1, write the letter")
    try:
        text = answer_text(value, task, options)
    except Unreadable as error:
        raise fail("answer", expected, value, f"{error}; write it as it should stand inside <answer>") from None
    parsed = parse_answer_body(text, task, options)
    if parsed is None:
        raise fail("answer", expected, value, "write it as it should stand inside <answer>")
    if task == "temporal" and parsed[1] <= parsed[0]:
        raise fail("answer", "an end after the start", value, "no answer could score above 0, fix it")
    if task == "spatial" and (parsed[2] <= parsed[0] or parsed[3] <= parsed[1]):
        raise fail("answer", "x1 < x2 and y1 < y2", value, "no answer could score above 0, fix it")
    return text


def answer_text(value: object, task: str, options: Sequence[str] | None = None) -> str:
    """A ground truth as it should stand inside `<answer>`: numbers, lists and every clear spelling are accepted.

    Texts of ocr and open questions stay as they are.

    Raises:
        Unreadable: it is not one clear answer.
    """
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, list | dict) and task in ("mcq", "temporal", "spatial", "numeric"):
        text = json.dumps(value)
    elif _is_number(value) and task in ("numeric", "ocr", "open"):
        text = repr(value)
    else:
        raise Unreadable("no_answer")
    return text if task in ("ocr", "open") else canonical_body(text, task, options)


def _duration(value: object, fail) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise fail("duration", "seconds above 0", value, "fix it or leave it out")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
