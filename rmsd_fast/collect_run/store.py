"""The pool file of a collection: one writer at a time, an index of its answers, and the file of rejected requests.

The files next to `pool.jsonl` are `pool.failed.jsonl` (requests that can never succeed) and `pool.replaced.jsonl`
(answers to earlier requests, which were collected again).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rmsd_fast.collect_run.config import CollectionConfig, Teacher
from rmsd_fast.collect_run.replies import REFUSALS, tokens_of
from rmsd_fast.collect_run.requests import answer_key, sampling_of
from rmsd_fast.config import SettingsError
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.json_records import read_records
from rmsd_fast.data.records import Question
from rmsd_fast.files import FolderLock, remove_leftovers, replacing, sync_folder, write_all, write_text_atomic
from rmsd_fast.method.answers import answer_body
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.teacher.pool import (
    HINT_K,
    HINTED,
    MARKS,
    TeacherResponse,
    as_record,
    media_digest,
    parse_line,
    read_pool,
)
from rmsd_fast.teacher.scores import repaired
from rmsd_fast.teacher.usage import WITH

log = logging.getLogger("rmsd_fast")
BLOCK_BYTES = 1 << 20


class Answer(NamedTuple):
    """What a collection keeps in memory about an answer in the pool."""

    k: int
    quality: float | None
    valid: bool
    body: str = ""
    """The text inside `<answer>` with `collect.adaptive`, otherwise empty."""
    hinted: bool = False


class PoolStore:
    """The pool file. Close it at the end, or use it as a context manager.

    Args:
        path: the pool; created if it does not exist.
        questions: the questions of the collection.
        settings: settings of the collection.
        teachers: models of the collection.
        family: family of the student's preprocessing.
        dry: whether nothing will be written.
    Attributes:
        answers: answers by question id, of the questions of the collection.
        failed: reason of each rejected request, by question id and key.
        spent: prompt and completion tokens of all answers in the pool and in the file of replaced answers.
        metered: number of these answers, without those for which the server reported no token counts.
        models: names of the models that have answered.
    Raises:
        Locked: another program is writing to the pool.
        DataError: the pool is damaged.
        SettingsError: the pool cannot be written, or has answers to other requests (`collect.changed`).
    """

    def __init__(
        self,
        path: Path,
        questions: Sequence[Question],
        settings: CollectionConfig,
        teachers: Sequence[Teacher],
        family: str,
        *,
        dry: bool = False,
    ) -> None:
        self.path, self._settings, self._teachers, self._family = path, settings, teachers, family
        self._questions = {question.id: question for question in questions}
        self.answers: dict[str, list[Answer]] = defaultdict(list)
        self.failed: dict[tuple[str, str], str] = {}
        self.spent = [0, 0]
        self.metered = 0
        self.models: set[str] = set()
        self._failed_path = path.with_name(f"{path.stem}.failed.jsonl")
        self._replaced_path = path.with_name(f"{path.stem}.replaced.jsonl")
        self._lock: FolderLock | None = None
        if dry:
            _check_file(path)
            self._read(skip_torn=True)
            self._read_failed(skip_torn=True)
            return
        self._lock = lock_pool(path)
        try:
            for written in (path, self._failed_path):
                remove_leftovers(path.parent, of=written.name)
                repair_tail(written)
            replaced = self._read()
            kept = self._read_failed()
            self._replace(replaced)
            if self._failed_path.exists():
                write_text_atomic(self._failed_path, "".join(kept))
            self._file = JsonLines(path, keep=None)
            self._failed_file = JsonLines(self._failed_path, keep=None)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> PoolStore:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def expected_key(self, question: Question, k: int, *, digest: str = "", hinted: bool | None = None) -> str:
        """Return the key of answer k to a question; without the digest of its media, the second part differs.

        By default, the answer is hinted if its number is HINT_K.
        """
        sampling = sampling_of(self._settings, question, self._family)
        if k == HINT_K if hinted is None else hinted:
            sampling[HINTED] = True
        return answer_key(question, self._teachers[k % len(self._teachers)].model, sampling, digest)

    def _read(self, *, skip_torn: bool = False) -> set[tuple[str, int]]:
        """Fill the index. Return (id, k) of the answers to replace."""
        self._meter_replaced()
        edited, changed, media = set(), {}, set()
        collect = self._settings.collect
        for response in read_pool(self.path, skip_torn=skip_torn) if self.path.exists() else ():
            self._meter(response.usage)
            self.models.add(response.model)
            question = self._questions.get(response.id)
            if question is None:
                continue
            place = (response.id, response.k)
            if response.key:
                ours = self._parts(question, response)
                parts = response.key.split("-")
                if parts[0] != ours[0]:
                    edited.add(place)
                    continue
                if collect.check_media and parts[1] != ours[1]:
                    media.add(place)
                    continue
                if parts[-1] != ours[-1]:
                    changed[place] = response
            if place not in changed or collect.changed != "replace":
                self._note(response)
        if changed and collect.changed == "refuse":
            self._refuse(changed)
        for places, what in ((edited, "questions that were edited"), (media, "media that have changed")):
            if places:
                log.warning("%s: collecting %s again about %s", self.path, counted(len(places), "answer"), what)
        return edited | media | (set(changed) if collect.changed == "replace" else set())

    def _parts(self, question: Question, response: TeacherResponse) -> list[str]:
        digest = media_digest(question) if self._settings.collect.check_media else ""
        return self.expected_key(question, response.k, digest=digest, hinted=response.is_hinted).split("-")

    def _refuse(self, changed: dict[tuple[str, int], TeacherResponse]) -> None:
        response = next(iter(changed.values()))
        now = sampling_of(self._settings, self._questions[response.id], self._family)
        now["model"] = self._teachers[response.k % len(self._teachers)].model
        then = {name: value for name, value in response.sampling.items() if name not in MARKS}
        then["model"] = response.model
        names = sorted(name for name in {*now, *then} if now.get(name) != then.get(name))
        shown = "; ".join(f"{name}: {then.get(name)} in the pool, now {now.get(name)}" for name in names[:4])
        raise SettingsError(
            f"--out {self.path}: expected answers to the same requests, got {counted(len(changed), 'answer')} to "
            f"others ({shown or 'the request has changed'}); restore the settings, choose another file, or set "
            "collect.changed=keep or replace"
        )

    def _note(self, response: TeacherResponse) -> None:
        question = self._questions[response.id]
        # Other programs may have written the answer without its scores.
        if response.valid is None or (response.quality is None and question.answer is not None):
            response = repaired(response, question, self._settings.teacher)
        body = (answer_body(response.text) or "") if self._settings.collect.adaptive and response.valid else ""
        answer = Answer(response.k, response.quality, bool(response.valid), body, response.is_hinted)
        self.answers[response.id].append(answer)

    def _meter_replaced(self) -> None:
        """Count the tokens of answers that were replaced, because they had a price too."""
        if not self._replaced_path.exists():
            return
        with self._replaced_path.open("rb") as file:
            for line in file:
                # The last line may be incomplete.
                with suppress(DataError):
                    usage = parse_line(line, str(self._replaced_path)).get("usage")
                    self._meter(usage if isinstance(usage, dict) else {})

    def _meter(self, usage: Mapping[str, Any]) -> None:
        if tokens := tokens_of(usage):
            self.spent = [spent + new for spent, new in zip(self.spent, tokens, strict=True)]
        self.metered += tokens is not None or WITH in usage

    def _replace(self, places: set[tuple[str, int]]) -> None:
        """Move answers from the pool to the file of replaced answers. A kill between the two writes loses nothing."""
        if not places:
            return
        aside = JsonLines(self._replaced_path, keep=None)
        with replacing(self.path) as file:
            for response in read_pool(self.path):
                if (response.id, response.k) in places:
                    aside.append(as_record(response))
                else:
                    write_all(file, json.dumps(as_record(response)).encode() + b"\n")
            aside.close()

    def _read_failed(self, *, skip_torn: bool = False) -> list[str]:
        """Return the lines of the rejected requests, without those that this collection sends again."""
        kept: list[str] = []
        if not self._failed_path.exists():
            return kept
        for where, record in read_records(self._failed_path):
            if isinstance(record, DataError) and skip_torn:
                continue
            if isinstance(record, DataError) or record.get("reason") not in REFUSALS:
                raise DataError(f"{where}: expected a rejected request, got another record; delete this file")
            question = self._questions.get(record.get("id"))
            if question is not None:
                key = _without_media(str(record.get("key")))
                numbers = [*range(len(self._teachers)), HINT_K]
                keys = {_without_media(self.expected_key(question, k)) for k in numbers}
                # Media are checked again by each collection, at no cost.
                if self._settings.collect.retry_failed or record["reason"] == "media" or key not in keys:
                    continue
                self.failed[question.id, key] = record["reason"]
            kept.append(json.dumps(record) + "\n")
        return kept

    def is_failed(self, question: Question, k: int) -> bool:
        """Return whether the server has rejected the request for answer k."""
        if not self.failed:
            return False
        return (question.id, _without_media(self.expected_key(question, k))) in self.failed

    def add(self, response: TeacherResponse) -> None:
        """Append an answer."""
        self._file.append(as_record(response))
        self._meter(response.usage)
        self.models.add(response.model)
        self._note(response)

    def fail(self, question: Question, ks: Sequence[int], model: str, digest: str, reason: str, error: str) -> None:
        """Note a request that can never succeed."""
        key = self.expected_key(question, ks[0], digest=digest)
        if (question.id, _without_media(key)) in self.failed:
            return
        self.failed[question.id, _without_media(key)] = reason
        record: dict[str, Any] = {"id": question.id, "k": list(ks), "key": key, "model": model}
        self._failed_file.append(record | {"reason": reason, "error": error, "todo": REFUSALS[reason]})

    @property
    def waiting(self) -> int:
        """Number of answers that are kept in memory because the disk is full or fails."""
        return len(self._file.waiting)

    def sync(self) -> None:
        """Write and sync the answers that the disk has room for."""
        self._file.sync()
        self._failed_file.sync()

    def close(self) -> None:
        """Close the files. Answers that cannot be written go to a file in the folder for temporary files.

        Raises:
            SettingsError: some answers are not in the pool; the message names the file that has them.
        """
        if self._lock is None:
            return
        try:
            self.sync()
            lines = self._file.waiting
            if lines:
                handle, name = tempfile.mkstemp(prefix="rmsd_fast-answers-", suffix=".jsonl")
                with open(handle, "w", encoding="ascii") as file:
                    file.write("".join(f"{line}\n" for line in lines))
                raise SettingsError(
                    f"--out {self.path}: expected space for {counted(len(lines), 'more answer')}, got a full disk; "
                    f"free some space, then append them: cat {name} >> {self.path}"
                )
            self._file.close()
            self._failed_file.close()
            if self._failed_path.exists() and not self._failed_path.stat().st_size:
                self._failed_path.unlink()
        finally:
            self._lock.close()


def _without_media(key: str) -> str:
    first, _, last = key.split("-") if key.count("-") == 2 else (key, "", "")
    return f"{first}-{last}"


def lock_pool(path: Path) -> FolderLock:
    """Lock a pool for this process, and create its folder.

    Raises:
        Locked: another program is writing to the pool.
        SettingsError: the folder cannot be created or written to, or the path is a folder.
    """
    _check_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        return FolderLock(path.parent, file=path.name)
    except OSError as error:
        raise SettingsError(
            f"--out {path}: cannot be written ({error.strerror or error}); choose a folder that you can write to"
        ) from error


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise SettingsError(f"--out {path}: expected a file, got a folder; name a file in it")


def repair_tail(path: Path) -> None:
    """Make a file end with a complete line: add a missing newline to a complete last line, or remove a torn one."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        tail, start = b"", end
        while start and b"\n" not in tail:
            start = max(0, start - BLOCK_BYTES)
            file.seek(start)
            tail = file.read(end - start)
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        try:
            parse_line(last, f"{path}: last line")
        except DataError:
            file.truncate(end - len(last))
            log.warning("%s: the last line was incomplete, because an append was interrupted; it was removed", path)
        else:
            file.seek(end)
            write_all(file, b"\n")
            log.warning("%s: the last line had no newline, which was added", path)
        os.fsync(file.fileno())
    sync_folder(path.parent)
