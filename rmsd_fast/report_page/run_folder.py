"""Read a run folder for the report. Missing files are left out; damaged files raise an error that names them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsd_fast.config import MEASURES, ModelConfig
from rmsd_fast.data.option_lists import MOST_OPTIONS
from rmsd_fast.report_page.svg import Series
from rmsd_fast.runtime.alarms import Alarm, find_alarms


class ReportError(ValueError):
    """The folder is not a run, or a file in it is damaged. The message says which file and line, and what to do."""


@dataclass(frozen=True)
class ReportedRun:
    """The content of a run folder.

    Attributes:
        folder: the run folder.
        settings: content of config.yaml.
        settings_text: text of config.yaml.
        metrics: curves over the optimizer steps, by stage and metric key.
        alarms: alarms that the metrics raise, in the order of the run.
        rollouts: lines of rollouts.jsonl.
        evaluation: content of evaluation.json, or None without an evaluation.
        samples: lines of samples.jsonl.
        teacher: content of teacher.json (statistics of the pool), or None.
        info: content of run.json (`started`, `finished` as ISO 8601, `recipe`, `hardware`, `world_size`, `versions` by
            name); may be empty.
        notes: notes on the files, shown on the page.
    """

    folder: Path
    settings: dict[str, Any]
    settings_text: str
    metrics: dict[str, dict[str, Series]]
    alarms: list[Alarm]
    rollouts: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    samples: list[dict[str, Any]]
    teacher: dict[str, Any] | None
    info: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def load_run(folder: str | Path) -> ReportedRun:
    """Read a run folder.

    Args:
        folder: folder that training created.
    Returns:
        The content of the folder.
    Raises:
        ReportError: there is no config.yaml, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "no such folder"
        raise ReportError(f"{folder}: expected a run folder, got {kind}; give a folder such as runs/<name>-<time>")
    config = folder / "config.yaml"
    if not config.is_file():
        raise ReportError(
            f"{folder}: expected a run folder with a config.yaml, got none; give the folder that training created, "
            "such as runs/<name>-<time>, not its parent"
        )
    notes: list[str] = []
    settings, text = _settings(config)
    logged = _lines(folder / "metrics.jsonl", notes)
    return ReportedRun(
        folder=folder,
        settings=settings,
        settings_text=text,
        metrics=curves(logged, folder / "metrics.jsonl"),
        alarms=find_alarms((row for _, row in logged), _totals(settings), _dtype(settings)),
        rollouts=_rollouts(folder / "rollouts.jsonl", notes),
        evaluation=_evaluation(folder / "evaluation.json"),
        samples=_samples(folder / "samples.jsonl", notes),
        teacher=_teacher(folder / "teacher.json"),
        info=_object(folder / "run.json") or {},
        notes=notes,
    )


def _settings(path: Path) -> tuple[dict[str, Any], str]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        settings = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: expected YAML settings: {error}; restore the file of the run") from error
    if not isinstance(settings, dict):
        raise ReportError(f"{path}: expected a mapping of settings, got {type(settings).__name__}; restore the file")
    return settings, text


def _totals(settings: dict[str, Any]) -> dict[str, int]:
    """Return the number of steps of each stage that is in the settings."""
    keys = {"sft": ("sft", "steps"), "warm_up": ("discriminator", "warm_up_steps"), "distill": ("distill", "steps")}
    keys["control"] = keys["distill"]
    totals = {stage: (settings.get(section) or {}).get(key) for stage, (section, key) in keys.items()}
    return {stage: total for stage, total in totals.items() if isinstance(total, int)}


def _dtype(settings: dict[str, Any]) -> str:
    """Return `model.dtype`, or its default if a file of another version lacks it."""
    model = settings.get("model")
    return str(model.get("dtype", ModelConfig.dtype)) if isinstance(model, Mapping) else ModelConfig.dtype


def _object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: expected a JSON object: {error}; restore or delete the file") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: expected a JSON object, got {type(value).__name__}; restore or delete the file")
    return value


def _evaluation(path: Path) -> dict[str, Any] | None:
    """Read evaluation.json and check the structure that the page relies on."""
    value = _object(path)
    if value is None:
        return None
    for key in ("students", "floors", "differences"):
        entries = value.setdefault(key, {})
        if not isinstance(entries, dict) or not all(isinstance(v, dict) for v in entries.values()):
            raise ReportError(f"{path}: field {key!r}: expected an object of objects; evaluate the run again")
    for name, result in [*value["students"].items(), *value["differences"].items()]:
        tasks = result.setdefault("tasks", {})
        if not isinstance(tasks, dict) or not all(isinstance(v, dict) for v in tasks.values()):
            raise ReportError(f"{path}: field 'tasks' of {name!r}: expected an object per task; evaluate the run again")
    progress = value.setdefault("progress", [])
    if not isinstance(progress, list) or not all(map(_is_progress, progress)):
        raise ReportError(f"{path}: field 'progress': expected a list of scores by step; evaluate the run again")
    return value


def _is_progress(entry: object) -> bool:
    """Return whether an entry has a step, and results of students and differences."""
    if not isinstance(entry, dict) or type(entry.get("step")) is not int:
        return False
    parts = [entry.get(key) for key in ("students", "differences")]
    if not all(isinstance(part, dict) for part in parts):
        return False
    results = [result for part in parts for result in part.values()]
    sampled = [result.get("sampled", {}) for result in results if isinstance(result, dict)]
    entries = [part.get(key, {}) for part in (*results, *sampled) if isinstance(part, dict) for key in MEASURES]
    return all(isinstance(part, dict) for part in (*results, *sampled, *entries))


def _whole(digits: str) -> float:
    """Return an integer, or infinity if it is too large for a float."""
    return int(digits) if len(digits) < 300 else float(digits)


def _teacher(path: Path) -> dict[str, Any] | None:
    """Read teacher.json and check the structure that the page relies on."""
    value = _object(path)
    for key in ("tasks", "all", "closed") if value else ():
        if not isinstance(value.get(key), dict | None):
            raise ReportError(f"{path}: field {key!r}: expected an object or null; restore or delete the file")
    return value


def _lines(path: Path, notes: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """Return (line number, object) of each line of a JSONL file; skip an unfinished last line with a note.

    A run that is still writing, or was killed while writing, ends in such a line. Any other invalid line is an error.
    """
    if not path.is_file():
        return []
    rows = []
    data = path.read_bytes()
    lines = data.split(b"\n")
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_int=_whole)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            if index == len(lines):
                notes.append(f"{path.name}: the last line ({index}) is unfinished and was left out.")
                continue
            raise ReportError(f"{path}:{index}: expected a JSON object: {error}; delete or fix that line") from error
        if not isinstance(row, dict):
            raise ReportError(f"{path}:{index}: expected a JSON object, got {type(row).__name__}; delete that line")
        rows.append((index, row))
    return rows


def _samples(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the lines of samples.jsonl and check the structure that the page relies on."""
    rows = _lines(path, notes)
    for index, row in rows:
        _check_lists(row, f"{path}:{index}")
    return [row for _, row in rows]


def _rollouts(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the lines of rollouts.jsonl and check the structure that the page relies on."""
    rows = _lines(path, notes)
    for index, row in rows:
        where = f"{path}:{index}"
        _check_stage_and_step(row, where)
        for key in ("teacher", "rollouts"):
            if not isinstance(row.get(key), list) or not all(isinstance(item, dict) for item in row[key]):
                raise ReportError(f"{where}: field {key!r}: expected a list of objects; delete or fix that line")
        _check_lists(row, where)
    return [row for _, row in rows]


def _check_lists(row: dict[str, Any], where: str) -> None:
    for key in ("videos", "images", "options"):
        if not isinstance(row.get(key), list | None):
            raise ReportError(f"{where}: field {key!r}: expected a list or null; delete or fix that line")
    if len(row.get("options") or ()) > MOST_OPTIONS:
        raise ReportError(f"{where}: field 'options': expected at most {MOST_OPTIONS}; delete or fix that line")


def _check_stage_and_step(row: dict[str, Any], where: str) -> None:
    stage, step = row.get("stage"), row.get("step")
    if not isinstance(stage, str) or not isinstance(step, int) or isinstance(step, bool):
        raise ReportError(
            f"{where}: expected a string 'stage' and an integer 'step', got {stage!r} and {step!r}; "
            "delete or fix that line"
        )


def curves(rows: list[tuple[int, dict[str, Any]]], path: Path) -> dict[str, dict[str, Series]]:
    """Return the curves by stage and key. If a step was logged twice (before and after a resume), the last line counts.

    Raises:
        ReportError: a line has no valid `stage` or `step`; the message names the line.
    """
    table: dict[str, dict[int, dict[str, float]]] = {}
    for index, row in rows:
        _check_stage_and_step(row, f"{path}:{index}")
        values = {}
        for key, value in row.items():
            if key == "step" or isinstance(value, bool):
                continue
            # null represents a value that was not finite, because strict JSON has no NaN.
            if value is None:
                values[key] = math.nan
            elif isinstance(value, int | float):
                values[key] = float(value)
        table.setdefault(row["stage"], {})[row["step"]] = values
    out: dict[str, dict[str, Series]] = {}
    for stage, by_step in table.items():
        keys: dict[str, list[tuple[int, float]]] = {}
        for step in sorted(by_step):
            for key, value in by_step[step].items():
                keys.setdefault(key, []).append((step, value))
        out[stage] = {
            key: Series(key, tuple(step for step, _ in points), tuple(value for _, value in points))
            for key, points in keys.items()
        }
    return out
