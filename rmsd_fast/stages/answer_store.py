"""Keep the answers of an evaluation while it runs, so that a killed one continues instead of starting over.

Each process appends its answers to a file of its own, `<predictions>.part<rank>`, whose first line identifies model,
settings and questions. The files are read by any number of processes, and deleted once all answers are written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from rmsd_fast.config import UserError
from rmsd_fast.data.records import Question
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import World, on_main
from rmsd_fast.stages.answer_records import asked_hash
from rmsd_fast.stages.protocol import differences_of, identity_hash

log = logging.getLogger("rmsd_fast")


class OtherAnswers(UserError, RuntimeError):
    """Answers of an interrupted evaluation that had another model, other settings or other questions."""


def finished_answers(
    output: Path, path: Path, identity: dict[str, Any], questions: Sequence[Question]
) -> list[dict] | None:
    """Return the predictions of a finished evaluation, or None if there is none with the same identity.

    Args:
        output: its `evaluation.json`.
        path: its predictions.
        identity: what the answers depend on, in JSON types.
        questions: the questions, in order.
    """
    try:
        result = json.loads(output.read_text(encoding="utf-8"))
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [(record["id"], record["asked_hash"]) for record in records]
        # The predictions may be older or newer than the evaluation.
        is_same = result["answers_of"] == identity_hash(identity) and all("truncated" in record for record in records)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return records if is_same and asked == [(q.id, asked_hash(q)) for q in questions] else None


def delete_parts(path: Path, world: World) -> None:
    """Delete the answers so far. Call it on all processes, after all answers are in `path` and stores are closed.

    One process of each node deletes the files that it sees, because the folder may not be shared between nodes.
    """
    if world.local_rank == 0:
        for part in _parts(path):
            part.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{escape(path.name)}.part*"))


class AnswerStore:
    """Answers so far. All processes create it together; close it at the end, or use it as a context manager.

    Args:
        path: the file of all predictions. The parts are next to it.
        identity: what the answers depend on, in JSON types.
        world: this process in the run.
        discard: whether answers with another identity are deleted with a warning. Otherwise they are an error.
    Raises:
        OtherAnswers: there are answers with another identity, and `discard` is not set.
    Attributes:
        done: the answers of earlier, interrupted evaluations by question id, equal on every process. Questions that
            could not be used are not among them, because a missing file may be there now.
    """

    def __init__(self, path: Path, identity: dict[str, Any], world: World, *, discard: bool = False) -> None:
        self._path, self._identity = path, json.loads(json.dumps(identity))
        self.done: dict[str, dict] = on_main(world, lambda: self._read_all(discard))
        # The folder may not be shared between nodes.
        path.parent.mkdir(parents=True, exist_ok=True)
        own = self._part(world.rank)
        # The main process cannot see this file if it is on another node.
        lines = self._read(own) if own.exists() else []
        continued = bool(lines) and lines[0] == {"answers_of": self._identity}
        self._lines = JsonLines(own, keep=len(lines) if continued else 0)
        if not continued:
            self._lines.append({"answers_of": self._identity})
        if self.done and world.is_main:
            log.warning("%s: continuing an interrupted evaluation, %d questions are answered", path, len(self.done))

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()

    def append(self, records: list[dict]) -> None:
        """Write the records of a batch. They are in the file when this method returns."""
        for record in records:
            self._lines.append(record)

    def _part(self, rank: int) -> Path:
        return self._path.with_name(f"{self._path.name}.part{rank}")

    def _read_all(self, discard: bool) -> dict[str, dict]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        done: dict[str, dict] = {}
        for part in _parts(self._path):
            head, *records = self._read(part) or [{}]
            if not head:
                # The process was killed while it wrote the first line, or that line is damaged.
                part.unlink()
                continue
            if head != {"answers_of": self._identity}:
                # A file without answers is of a process that ended before its first batch.
                if records:
                    self._refuse(part, head.get("answers_of"), discard)
                part.unlink()
                continue
            for record in records:
                if "error" not in record:
                    done.setdefault(record["id"], record)
        return done

    def _refuse(self, part: Path, other: object, discard: bool) -> None:
        differences = differences_of(self._identity, other if isinstance(other, dict) else {})
        text = "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
        if not discard:
            raise OtherAnswers(
                f"{part}: expected answers of an interrupted evaluation with the same model, settings and questions, "
                f"got other ones ({text}); continue with those settings, write to another --output, or delete the file"
            )
        log.warning("%s: these answers have other settings (%s); the questions will be answered again", part, text)

    def _read(self, part: Path) -> list[dict]:
        """Return the complete lines of a file up to the first damaged one."""
        lines: list[dict] = []
        for line in part.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            name = "id" if lines else "answers_of"
            if not isinstance(record, dict) or name not in record:
                # The line was being written when the process was killed, or it was damaged later.
                log.warning("%s: line %d is damaged; it and the following lines are dropped", part, len(lines) + 1)
                break
            lines.append(record)
        return lines
