"""Read, validate and write questions in their JSONL schema.

One JSON object per line:
``{"id", "videos": [path], "images": [path], "question", "task_type",
"options"?, "answer"?, "system"?, "duration"?, "hints"?, "meta"?}``
A question has at least one video or image. If it is about text alone, both lists are there and empty. `video` and
`image` are also accepted, and null is treated as a missing key.

`<video>` and `<image>` in the question or its options mark the positions of the media. Without such marks, media come
before the text. A part of a video is written `{"path": "a.mp4", "start": 3.5, "end": 10}` instead of the path (in
seconds; either bound may be omitted). Frames are taken from this part, while stamps and answers use the times of the
whole file.

`hints` is what a self-teacher may be told and the student is not: `{"answer", "reasoning", "cue", "feedback",
"context"}` are texts, `"window": [start, end]` and `"keyframes": [time, …]` are in seconds of the whole file, and
`"media": {"videos", "images"}` are files that it is shown instead of those of the question. All of them are optional.

`converters` reads files of other trainers, and `ground_truths` reads ground truths. Relative paths are relative to the
media root, and every path must be inside it after symbolic links are resolved. Media files do not have to exist on this
machine: a run counts missing files before it starts, and replaces samples that it cannot use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rmsd_fast.config import FORMATS, SettingsError
from rmsd_fast.data import converters
from rmsd_fast.data.errors import DataError, OtherFileError, several_faults
from rmsd_fast.data.ground_truths import GroundTruthError
from rmsd_fast.data.hint_records import check_hint_media, hints_record, read_hints
from rmsd_fast.data.json_records import read_records
from rmsd_fast.data.marks import MARK, MarkError, place_marks, without_marks
from rmsd_fast.data.media_paths import Span, media_paths, split_spans, with_span
from rmsd_fast.data.option_lists import shows_options
from rmsd_fast.data.question_fields import (
    check_fields,
    check_hint_times,
    check_interval,
    check_shown,
    check_text,
    read_answer,
    read_duration,
    read_options,
    read_system,
    read_task_type,
    read_texts,
)
from rmsd_fast.files import write_text_atomic
from rmsd_fast.method.answers import (
    CLOSED_TASKS,
    GRADED_TASKS,
    parse_answer_body,
)
from rmsd_fast.method.hints import MEDIA_VIEW


@dataclass(frozen=True)
class Question:
    """One question about videos or images."""

    id: str
    question: str
    """The text. `<video>` and `<image>` in it and in the options mark the positions of the media."""
    task_type: str
    """One of TASK_TYPES, or of BENCHMARK_TASKS for questions of a benchmark."""
    videos: tuple[str, ...] = ()
    """Absolute paths inside the media root after loading."""
    images: tuple[str, ...] = ()
    """Absolute paths inside the media root after loading."""
    spans: tuple[Span, ...] = ()
    """Start and end in seconds of the part of each video that is shown (None = open); None or () shows whole videos."""
    options: tuple[str, ...] | None = None
    """Options of an mcq question in order, bare or written `A. x`; None means that the question's text shows them."""
    answer: str | None = None
    """Ground truth as it belongs inside `<answer>`; for open questions, a reference text."""
    system: str | None = None
    """Text of a system turn before the question."""
    duration: float | None = None
    """Duration of the video in seconds; if there are several videos, of the longest one."""
    hints: dict[str, Any] = field(default_factory=dict)
    """What a self-teacher may be told, by name (`method.hints.FILE_HINTS`). Times are lists of seconds. `media` has the
    lists `videos`, `images` and `spans`, with the meaning of the question's own fields."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Any other data. Training does not read it. For questions of a benchmark, `benchmark` is its name, and `groups`
    has the values of its breakdowns by name, such as {"duration": "short"}. `cluster` names questions that are not
    independent although their media differ. `subtitles` names the file that the mark in `prompt` stands for, see
    `data.subtitles.with_subtitles`, and `subtitles_missing` a file that the folder lacks."""
    prompt: str | None = None
    """The benchmark's own prompt, which `evaluate.prompt=benchmark` shows in place of question, options and answer
    format. Marks of media have the same meaning as in `question`. Question files do not contain it."""

    @property
    def has_truth(self) -> bool:
        """Return whether a metric can compare answers with a ground truth: the task is graded, and has an answer."""
        return self.task_type in GRADED_TASKS and self.answer is not None

    @property
    def is_unlabeled(self) -> bool:
        """Return whether the ground truth of a closed task is missing, as `teacher.unlabeled=agreement` allows."""
        return self.task_type in CLOSED_TASKS and self.answer is None

    def with_hint_media(self) -> Question:
        """Return the question with the media of `hints.media` in place of its own, and without hints.

        If the numbers of videos and images differ, the marks in the question are removed, and media come first.
        """
        shown = self.hints[MEDIA_VIEW]
        videos, images = tuple(shown["videos"]), tuple(shown["images"])
        same = (len(videos), len(images)) == (len(self.videos), len(self.images))
        return replace(
            self,
            id=f"{self.id} (hints.media)",
            question=self.question if same else without_marks(self.question),
            videos=videos,
            images=images,
            spans=tuple(shown["spans"]),
            hints={},
        )

    @property
    def media(self) -> list[tuple[str, str, Span]]:
        """Return kind, path and span of each medium, in the order in which the prompt shows them."""
        return self.media_in("\n".join((self.question, *(self.options or ()))))

    def media_in(self, text: str) -> list[tuple[str, str, Span]]:
        """Return kind, path and span of each medium, in the order of the marks in a text."""
        spans = self.spans or (None,) * len(self.videos)
        by_kind = {
            "video": [("video", path, span) for path, span in zip(self.videos, spans, strict=True)],
            "image": [("image", path, None) for path in self.images],
        }
        marks = MARK.findall(text)
        if not marks:
            return by_kind["video"] + by_kind["image"]
        return [by_kind[kind].pop(0) for kind in marks]


def groups_of(question: Question) -> dict[str, str]:
    """Return the groups of a question's breakdowns, or none if `meta.groups` is not an object of texts."""
    groups = question.meta.get("groups")
    return groups if isinstance(groups, dict) and all(isinstance(value, str) for value in groups.values()) else {}


def load_questions(
    path: str | os.PathLike,
    *,
    media_root: str | os.PathLike | None = None,
    format: str = "auto",
    task_type: str = "auto",
    require_answer: bool = True,
    follow_symlinks: bool = False,
    held_out: bool = False,
) -> list[Question]:
    """Read and validate a question file.

    Args:
        path: JSONL, or a JSON list of the same objects.
        media_root: folder that must contain every media path; None or "" means the folder of the file.
        format: one of FORMATS; "auto" infers it from the keys of the first record.
        task_type: task type of records in other formats that do not specify it; "auto" infers it from options and
            answer.
        require_answer: whether to reject closed tasks without ground truth.
        follow_symlinks: whether symbolic links in the media root may point outside it.
        held_out: whether the questions are only for evaluation. Published benchmarks have a few questions with equal
            options or only one; they are accepted, because the letter of the answer decides.
    Raises:
        DataError: the message names the file, the line, the field, the expected and the actual value. Several errors in
            a file are reported together.
        SettingsError: the format is unknown.
    """
    if format not in FORMATS:
        raise SettingsError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    path = Path(path)
    # absolute() comes first: resolve() of a missing relative path gives the right path, but a wrong message.
    root = (Path(media_root) if media_root else path.parent).absolute()
    questions: list[Question] = []
    faults: list[DataError] = []
    seen: dict[str, str] = {}
    named = format != "auto"
    for index, (where, record) in enumerate(read_records(path)):
        try:
            if isinstance(record, DataError):
                raise record
            _refuse_teacher_answer(record, where)
            if format == "auto":
                format = converters.detect_format(record, where)
            converters.check_format(record, format, where, named=named)
            record = converters.without_nulls(record)
            raw, names = converters.convert(record, format, where, f"{path.stem}-{index}", task_type)
            question = parse_question(
                raw,
                where,
                media_root=root,
                require_answer=require_answer,
                follow_symlinks=follow_symlinks,
                held_out=held_out,
                names=names,
                inferred=format != "rmsd" and "inferred" in raw["meta"],
            )
            if question.id in seen:
                todo = f"it was already used at {seen[question.id]}; give every question its own id"
                raise DataError.at(where, names.get("id", "id"), "an id that occurs once", question.id, todo)
        except OtherFileError:
            raise
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


def _refuse_teacher_answer(record: dict[str, Any], where: str) -> None:
    if {"k", "text"} <= set(record) and not set(record) & set(converters.RECORD_KEYS):
        raise OtherFileError(
            f"{where}: expected a question, got the keys {', '.join(map(repr, record))} of a teacher answer; if this "
            "is the pool, swap the two files or name the question file here"
        )


def question_format(path: str | os.PathLike) -> str:
    """Return the format that the first record of a file belongs to, one of FORMATS except "auto".

    Raises:
        DataError: the file cannot be read, or its first record belongs to no format.
    """
    for where, record in read_records(Path(path)):
        if isinstance(record, DataError):
            raise record
        return converters.detect_format(record, where)
    raise DataError(f"{path}: expected at least one question, got an empty file; check that the path is right")


def parse_question(
    raw: dict[str, Any],
    where: str,
    *,
    media_root: Path,
    require_answer: bool = True,
    follow_symlinks: bool = False,
    held_out: bool = False,
    names: dict[str, str] | None = None,
    inferred: bool = False,
) -> Question:
    """Validate one record in this package's schema.

    Args:
        raw: the record.
        where: "<file>:<line>".
        media_root: absolute path of the folder that must contain the media.
        require_answer, follow_symlinks, held_out: as in load_questions.
        names: field names of the source, for messages.
        inferred: whether the task type was inferred from the answer. It may be wrong if the answer is wrong.
    """
    names = names or {}

    def fail(name: str, expected: str, got: object, todo: str) -> DataError:
        if inferred and name == "answer":
            todo += f"; or set the record's task_type, which was inferred from the answer as {raw['task_type']}"
        return DataError.at(where, names.get(name, name), expected, got, todo)

    check_fields(raw, fail)
    identity = parse_id(raw.get("id"))
    for name, value in (("id", identity), ("question", raw.get("question"))):
        if not isinstance(value, str) or not value.strip():
            raise fail(name, "non-empty text", value, "add it")
    check_text("id", identity, fail)
    task = read_task_type(raw.get("task_type"), fail)
    listed, spans = split_spans(raw.get("videos"), fail)
    videos, images = (
        media_paths(value, name, media_root, follow_symlinks, fail)
        for name, value in (("videos", listed), ("images", raw.get("images")))
    )
    if not videos and not images and not (raw.get("videos") == [] == raw.get("images")):
        todo = "add it, or use this package's own format with both lists empty for a question about text alone"
        raise fail("videos", "at least one path under 'videos' or 'images'", raw.get("videos"), todo)
    options = read_options(raw.get("options"), task, fail, fewest=1 if held_out else 2)
    if task == "mcq" and options is None and not shows_options(raw["question"]):
        expected = "the options of an mcq question, here or as a list 'A. …', 'B. …' in the question"
        todo = 'add them, or choose another task_type; write ["A", "B"] if the picture shows the letters'
        raise fail("options", expected, raw.get("options"), todo)
    duration = read_duration(raw.get("duration"), fail)
    answer = read_answer(raw.get("answer"), task, options, require_answer, fail)
    check_shown(task, videos, images, fail)
    if task == "temporal" and answer is not None:
        try:
            check_interval(parse_answer_body(answer, task), duration, spans or (None,) * len(videos))
        except GroundTruthError as error:
            raise fail("answer", "an interval of the video", raw["answer"], str(error)) from None
    hints = read_hints(raw.get("hints"), media_root, follow_symlinks, fail)
    check_hint_times(hints, duration, spans or (None,) * len(videos), fail)
    meta = raw.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise fail("meta", "a JSON object", meta, "write {…} or leave it out")
    try:
        marked = place_marks([raw["question"], *(options or ())], videos=len(videos), images=len(images))
    except MarkError as error:
        raise DataError(f"{where}: field '{names.get('question', 'question')}': {error}") from None
    question, options = read_texts(marked, where, names, fail, distinct=not held_out)
    system = read_system(raw.get("system"), fail)
    if MEDIA_VIEW in hints:
        check_hint_media(hints[MEDIA_VIEW], options, videos=len(videos), images=len(images), fail=fail)
    return Question(
        id=identity,
        question=question,
        task_type=task,
        videos=videos,
        images=images,
        spans=spans,
        options=tuple(options) or None,
        answer=answer,
        system=system,
        duration=duration,
        hints=hints,
        meta=meta or {},
    )


def parse_id(value: object) -> object:
    """Return an id as text if it is a number. 12.0 becomes 12, because tables may store integers as floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else value
    return str(value)


def write_questions(path: str | os.PathLike, questions: Iterable[Question], *, media_root: str | os.PathLike) -> None:
    """Write questions in this package's schema with media paths relative to `media_root`. The write is atomic."""
    root = Path(media_root).absolute().resolve()
    lines = []
    for question in questions:
        record: dict[str, Any] = {"id": question.id}
        for name in ("videos", "images"):
            # Both are written for a question about text alone.
            if (paths := getattr(question, name)) or not question.media:
                record[name] = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
        if any(question.spans):
            record["videos"] = [with_span(*video) for video in zip(record["videos"], question.spans, strict=True)]
        record |= {"question": question.question, "task_type": question.task_type}
        for name in ("options", "answer", "system", "duration"):
            if (value := getattr(question, name)) is not None:
                record[name] = list(value) if isinstance(value, tuple) else value
        if question.hints:
            record["hints"] = hints_record(question.hints, root)
        if question.meta:
            record["meta"] = question.meta
        lines.append(json.dumps(record, ensure_ascii=False))
    write_text_atomic(path, "".join(line + "\n" for line in lines))
