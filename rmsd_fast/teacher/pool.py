"""The teacher pool: JSONL with one line per (question id, k), which is appended to and never rewritten in place.

``{"id","k","key","text","finish_reason","usage","model","sampling","valid"?,"quality"?,"raw"?,"reason"?}``

`key` identifies everything that determines the request: three digests of 16 hex digits, `<question>-<media>-<request>`,
made by `request_key`. A pool is checked against its questions by the first digest, and on request by the second. This
detects a pool that was collected for other questions, or before a question was edited. The third digest shows a resumed
collection whether sampling or frames have changed. An empty key means that the origin is unknown; the line is then
matched by id only.

Invalid and truncated responses are ordinary lines with quality 0. A null `text`, which servers send if a filter stopped
the answer, is an empty answer. A repaired pool keeps the text as sent under `raw`, and the reason why an answer cannot
be used under `reason`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rmsd_fast.data.converters import RECORD_KEYS
from rmsd_fast.data.errors import DataError, OtherFileError, counted, several_faults
from rmsd_fast.data.json_records import parse_record
from rmsd_fast.data.records import Question, parse_id
from rmsd_fast.files import file_sha256, write_text_atomic

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{16}")
_REQUIRED = ("id", "k", "text")
_FIELDS = (*_REQUIRED, "key", "finish_reason", "usage", "model", "sampling", "valid", "quality", "raw", "reason")
# Marks in `sampling`: an answer that was drawn because the first ones did not settle the question, and an answer to a
# request that showed the ground truth. Statistics of the teacher leave them out.
ADAPTIVE, HINTED = MARKS = ("adaptive", "hinted")
# Number of the hinted answer to a question. It is larger than any K, so that K can be raised later.
HINT_K = 1_000_000
# Field names under which servers and other programs store the reasoning and the required fields.
_REASONING = ("reasoning_content", "reasoning", "thinking", "think")
_OTHER_NAMES = {
    "id": ("question_id", "qid", "custom_id"),
    "k": ("index", "sample", "sample_id"),
    "text": ("response", "content", "answer", "output", "completion", "prediction", "generated_text"),
}
# Fields that identify a question in any format.
_OF_QUESTIONS = (*RECORD_KEYS, "task_type", "options", "videos", "video", "images", "image")


@dataclass(frozen=True, slots=True)
class TeacherResponse:
    """One response of the teacher to one question."""

    id: str
    """Question id."""
    k: int
    """Index of the response, from 0."""
    key: str
    """Result of request_key for the request; "" means unknown, and the line is matched by id only."""
    text: str
    """The full response as sent, or its canonical form if `raw` is set."""
    finish_reason: str | None = None
    """The server's finish reason, which `method.finish_reasons` interprets; None means unknown. If the server sent an
    object, this is its `type`."""
    usage: dict[str, Any] = field(default_factory=dict)
    """Token counts as the server reported them."""
    model: str = ""
    """The teacher's name; `simulated` for simulated responses."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling parameters of the request."""
    valid: bool | None = None
    """Validity determined at collection. Training computes it again."""
    quality: float | None = None
    """Quality determined at collection. Training computes it again."""
    raw: str | None = None
    """The original text if `text` is its canonical form; None if `text` is the original."""
    reason: str | None = None
    """Why the answer is invalid, a key of `method.natural.REASONS`."""

    @property
    def is_hinted(self) -> bool:
        """Whether the request showed the ground truth."""
        return bool(self.sampling.get(HINTED))

    @property
    def is_counted(self) -> bool:
        """Whether statistics of the teacher include it: it was neither drawn adaptively nor hinted."""
        return not any(map(self.sampling.get, MARKS))


def load_pool(path: str | os.PathLike) -> dict[str, list[TeacherResponse]]:
    """Return the responses by question id, each list sorted by k.

    Args:
        path: the pool file.
    Raises:
        DataError: the message names the file, the line, the field, the expected value and the actual value.
    """
    pool: dict[str, list[TeacherResponse]] = {}
    for response in read_pool(path):
        pool.setdefault(response.id, []).append(response)
    if not pool:
        raise DataError(f"{path}: expected at least one teacher response, got an empty file; check teacher.pool")
    return {identity: sorted(responses, key=lambda response: response.k) for identity, responses in pool.items()}


def read_pool(path: str | os.PathLike, *, skip_torn: bool = False) -> Iterator[TeacherResponse]:
    """Yield the responses of a pool in the order of the file, without keeping them in memory.

    Args:
        path: the pool file.
        skip_torn: whether a damaged last line without a newline, as an interrupted append leaves it, is left out.
    Raises:
        DataError: as load_pool, at the end of the file, with all damaged lines.
    """
    path = Path(path)
    places: dict[tuple[str, int], int] = {}
    faults: list[DataError] = []
    number = 0
    # The same few settings occur in every line, so they are stored only once.
    shared: dict[str, Any] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            response = _parse_response(parse_line(line, where), where, shared)
            first = places.setdefault((response.id, response.k), number)
            if first != number:
                todo = f"it is already at {path}:{first}; remove one of the two lines"
                raise DataError.at(where, "k", f"each (id, k) once, here id {response.id!r}", response.k, todo)
        except OtherFileError:
            raise
        except DataError as error:
            # Only the last line can be incomplete, and only if its newline is missing.
            if line.endswith(b"\n"):
                faults.append(error)
            elif not skip_torn:
                torn = "the last line has no newline: an append was interrupted; remove the line"
                faults.append(DataError(f"{error} ({torn})"))
            continue
        yield response
    if faults:
        raise several_faults(path, faults, number)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check teacher.pool") from error


def write_pool(path: str | os.PathLike, responses: Iterable[TeacherResponse]) -> None:
    """Write a whole pool atomically."""
    # ASCII escapes are needed because a lone surrogate in a response cannot be written as UTF-8.
    write_text_atomic(path, "".join(json.dumps(as_record(response)) + "\n" for response in responses))


def as_record(response: TeacherResponse) -> dict[str, Any]:
    """Return a response as the object of its line, without fields that are unknown."""
    record = {name: getattr(response, name) for name in _FIELDS}
    return {name: value for name, value in record.items() if value is not None}


def request_key(
    question: Question, *, sampling: dict[str, Any], frame_indices: Sequence[int] | None, media_digest: str
) -> str:
    """Return the key of a request: `<question>-<media>-<request>`, 16 hex digits each.

    K is not part of it, because asking for more responses later continues the same request. Neither are ground truth,
    `meta` and the media's paths, which the teacher never sees.

    Args:
        question: the question; its text, task type, options and kinds of media are part of the key.
        sampling: sampling parameters, and everything else that determines the request (system prompt, template).
        frame_indices: frames that were sent; None if the media were sent as a whole, or if `sampling` has the rule that
            chose them.
        media_digest: result of media_digest.
    """
    request = {"sampling": sampling, "frame_indices": None if frame_indices is None else list(frame_indices)}
    return f"{_question_digest(question)}-{_digest(media_digest)}-{_digest(request)}"


def media_digest(question: Question) -> str:
    """Return the SHA-256 of the contents of the question's media, in order.

    Raises:
        DataError: a file cannot be read.
    """
    digests = []
    for path in (*question.videos, *question.images):
        try:
            stat = os.stat(path)
            digests.append(_cached_sha256(path, stat.st_mtime_ns, stat.st_size))
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"question {question.id!r}: {path} cannot be read ({reason}); check the media root"
            ) from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_pool(
    pool: dict[str, list[TeacherResponse]],
    questions: Sequence[Question],
    *,
    max_unanswered_share: float = 0.0,
    check_media: bool = False,
) -> list[str]:
    """Reject a pool that belongs to other questions. The pool may contain more ids, if training uses a subset.

    Args:
        pool: result of load_pool.
        questions: the questions to train on.
        max_unanswered_share: largest share of questions that may have no response. It is always an error if no question
            has one.
        check_media: also compare the contents of the media files, which reads all of them.
    Returns:
        Ids of the questions that have no response.
    Raises:
        DataError: the message says which ids, and what to do.
    """
    missing = check_answered(pool, questions, max_unanswered_share=max_unanswered_share)
    check_keys(pool, questions, check_media=check_media)
    return missing


def check_answered(
    pool: dict[str, list[TeacherResponse]], questions: Sequence[Question], *, max_unanswered_share: float
) -> list[str]:
    """Return the ids of the questions that have no response.

    Raises:
        DataError: their share exceeds `max_unanswered_share`, or they are all of the questions.
    """
    missing = [question.id for question in questions if question.id not in pool]
    if missing and (len(missing) > max_unanswered_share * len(questions) or len(missing) == len(questions)):
        common = len(questions) - len(missing)
        raise DataError(
            f"teacher pool: expected responses to all questions, got them for {common:,} of {len(questions):,} "
            f"(missing: {_some(missing)}; the pool has {_some(list(pool))}); set teacher.pool to the pool of these "
            "questions, collect the missing ones, or leave them out with teacher.max_unanswered_share (now "
            f"{max_unanswered_share:g})"
        )
    return missing


def check_keys(
    pool: dict[str, list[TeacherResponse]], questions: Sequence[Question], *, check_media: bool = False
) -> None:
    """Reject responses to other questions, or to other texts or media of these questions. Empty keys are not checked.

    Raises:
        DataError: the message says which ids, and what to do.
    """
    changed, foreign, moved, without_key = [], [], [], 0
    for question in questions:
        expected = _question_digest(question)
        keys = {response.key for response in pool.get(question.id, [])}
        without_key += "" in keys
        for key in sorted(keys - {""}):
            if not _KEY.fullmatch(key):
                foreign.append(question.id)
            elif key[:16] != expected:
                changed.append(question.id)
            elif check_media and key[17:33] != _digest(media_digest(question)):
                moved.append(question.id)
    for ids, what, todo in (
        (foreign, "keys made by request_key (or empty ones)", "collect again, or empty the keys to match by id only"),
        (
            changed,
            "responses to the questions as they are now",
            "their text, options or type differ: collect these again",
        ),
        (moved, "responses about the media as they are now", "the files' contents differ: collect these again"),
    ):
        if ids:
            got = f"others for {counted(len(ids), 'question')} (ids: {_some(ids)})"
            raise DataError(f"teacher pool: expected {what}, got {got}; {todo}")
    if without_key:
        shown = counted(without_key, "question")
        logger.info("teacher pool: responses to %s have no key and are matched by id only", shown)


def _parse_response(record: dict[str, Any], where: str, shared: dict[str, Any]) -> TeacherResponse:
    if not {"k", "text"} & set(record) and (asked := [name for name in _OF_QUESTIONS if name in record]):
        raise OtherFileError(
            f"{where}: expected a teacher answer with {', '.join(_REQUIRED)}, got the keys "
            f"{', '.join(map(repr, record))}, and {asked[0]!r} belongs to a question; if this is the question file, "
            "swap the two files or name the pool here"
        )
    for name in record:
        if name not in _FIELDS:
            raise DataError.at(where, name, f"one of the fields {', '.join(_FIELDS)}", name, _advice(name, record))
    for name in _REQUIRED:
        if name not in record:
            raise DataError.at(
                where,
                name,
                "a value",
                None,
                f"a pool line needs {', '.join(_REQUIRED)}",
            )
    record["id"] = parse_id(record["id"])
    if not isinstance(record["id"], str) or not record["id"]:
        raise DataError.at(where, "id", "non-empty text", record["id"], "write the question's id")
    if isinstance(record["k"], float) and record["k"].is_integer():
        record["k"] = int(record["k"])
    if type(record["k"]) is not int or record["k"] < 0:
        raise DataError.at(where, "k", "an integer from 0", record["k"], "number the responses of a question")
    # Servers send no text if a filter stopped the answer, or a tool was called. This is an empty answer, and invalid.
    if record["text"] is None:
        record["text"] = ""
    ending = record.get("finish_reason")
    # SGLang's format: {"type": "length", "length": 512}.
    if isinstance(ending, dict) and isinstance(ending.get("type"), str):
        record["finish_reason"] = ending["type"]
    for name, kind, shown in (
        ("key", str, "text"),
        ("text", str, "text"),
        ("finish_reason", str, "text such as 'stop', or an object with it under 'type'"),
        ("usage", dict, "a JSON object"),
        ("model", str, "text"),
        ("sampling", dict, "a JSON object"),
        ("valid", bool, "true or false"),
        ("raw", str, "text"),
        ("reason", str, "text"),
    ):
        value = record.get(name)
        # Servers write null for values that they do not report. Required fields must not be null.
        if not isinstance(value, kind) and (value is not None or name in _REQUIRED):
            raise DataError.at(where, name, shown, value, "fix the line")
    quality = record.get("quality")
    if quality is not None and not (type(quality) in (int, float) and math.isfinite(quality) and 0 <= quality <= 1):
        raise DataError.at(where, "quality", "a number in [0, 1]", quality, "fix the line")
    fields = {name: value for name, value in record.items() if value is not None}
    for name in ("finish_reason", "model", "sampling"):
        if name in fields:
            fields[name] = shared.setdefault(repr(fields[name]), fields[name])
    return TeacherResponse(**{"key": "", **fields})


def _advice(name: str, record: dict[str, Any]) -> str:
    """Return advice about a field that pool lines do not have."""
    if name in _REASONING:
        return "put it into 'text', as <think>…</think> before the answer, and remove the field"
    ours = next((ours for ours, theirs in _OTHER_NAMES.items() if name in theirs), None)
    return f"rename it to {ours!r}" if ours and ours not in record else "remove it"


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return the object of one line of a pool. Raise DataError if the line is not a JSON object in UTF-8."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, got {error.reason} at byte {error.start}; fix it") from error
    return parse_record(text, where)


def _question_digest(question: Question) -> str:
    asked = {
        "question": question.question,
        "task_type": question.task_type,
        "options": question.options,
        "media": [len(question.videos), len(question.images)],
    }
    # Spans are added only if there are any, so that keys made before spans existed remain valid.
    asked |= {"spans": question.spans} if any(question.spans) else {}
    asked |= {"system": question.system} if question.system else {}
    return _digest(asked)


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Questions share clips, so each file is read only once per process unless it changes.
@lru_cache(maxsize=65536)
def _cached_sha256(path: str, mtime_ns: int, size: int) -> str:
    return file_sha256(path)


def _some(ids: Sequence[str], shown: int = 5) -> str:
    listed = ", ".join(repr(identity) for identity in ids[:shown])
    return listed + (f" and {len(ids) - shown} more" if len(ids) > shown else "")
