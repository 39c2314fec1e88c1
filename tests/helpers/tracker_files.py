"""Read what wandb (offline) and trackio (local) have stored, to compare it with what was sent."""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

# wandb's process still writes to the file after its run was finished, usually for less than 0.1 s.
LONGEST_WRITE_S = 10.0
# wandb's file is a log of LevelDB: a header of 7 bytes, then blocks. A record is split where a block ends.
HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7


def wandb_records(path: Path) -> list:
    from wandb.proto import wandb_internal_pb2

    content, records, parts, at = path.read_bytes(), [], b"", HEADER
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if at + RECORD_HEADER + size > len(content):
            break  # The rest of the record is still being written.
        parts += content[at + RECORD_HEADER : at + RECORD_HEADER + size]
        at += RECORD_HEADER + size
        if kind in (1, 4):  # A whole record, or the last part of one.
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def _finished(folder: Path, run_id: str) -> list:
    """Return the records of a run, in order, over all its folders, once all of them were finished."""
    end = time.monotonic() + LONGEST_WRITE_S
    while True:
        paths = sorted(folder.glob(f"wandb/offline-run-*-{run_id}*/*.wandb"))
        files = [wandb_records(path) for path in paths]
        ended = [any(record.WhichOneof("record_type") == "exit" for record in records) for records in files]
        if all(ended) or time.monotonic() > end:
            return [record for records in files for record in records]
        time.sleep(0.02)


def wandb_run(folder: Path, run_id: str) -> tuple[list[tuple[int, dict]], list]:
    """Return the steps of a run, in order, as (step, values), and its records about itself, over all its folders."""
    steps, about = [], []
    for record in _finished(folder, run_id):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            about.append(record.run)
        if kind == "history":
            values: dict = {}
            for item in record.history.item:
                # An object, such as a table, is stored as one item for each of its fields.
                *outer, last = list(item.nested_key) or [item.key]
                target = values.setdefault(outer[0], {}) if outer else values
                target[last] = json.loads(item.value_json)
            steps.append((values["_step"], {k: v for k, v in values.items() if not k.startswith("_")}))
    return steps, about


def wandb_exit_codes(folder: Path, run_id: str) -> list[int]:
    """Return the exit codes with which a run was finished. A run that was not finished has none."""
    records = _finished(folder, run_id)
    return [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]


def trackio_run(folder: Path, project: str, name: str) -> tuple[list[tuple[int, dict]], list[dict]]:
    """Return the steps of a run, in order, as (step, values), and its configs."""
    with sqlite3.connect(folder / f"{project}.db") as db:
        rows = db.execute("select step, metrics from metrics where run_name = ? order by id", (name,)).fetchall()
        configs = db.execute("select config from configs where run_name = ?", (name,)).fetchall()
    return [(step, json.loads(metrics)) for step, metrics in rows], [json.loads(config) for (config,) in configs]
