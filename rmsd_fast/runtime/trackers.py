"""Send metrics and sample rollouts to TensorBoard, Weights & Biases and Trackio, each through its own package.

Each stage is a run of its own in every tracker, because every stage counts its own steps. Names and steps are then
those of `metrics.jsonl`. `trackers.json` in the run folder holds the ids of these runs and the last step that each of
them got, so that a resumed run continues them and does not send a step twice.
"""

from __future__ import annotations

import html
import importlib.util
import json
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rmsd_fast.config import TRACKERS, CheckpointError, NotInstalled, SettingsError, first_line
from rmsd_fast.files import replacing, write_all

log = logging.getLogger("rmsd_fast")

STATE = "trackers.json"
# Seconds to wait at the end of a stage until wandb has uploaded everything. Without a network it would wait forever.
UPLOAD_S = 60.0


class Trackers:
    """Write to the trackers of a run. A tracker that fails is left out from then on, with one warning.

    Args:
        names: trackers of the run, some of `TRACKERS`.
        folder: the run folder.
        project: name of the project in wandb and trackio.
        config: settings of the run, for wandb and trackio.
        last_steps: last step of each stage that the resumed run keeps, for TensorBoard, which hides later points.
    Raises:
        NotInstalled: the package of a tracker is missing.
        CheckpointError: `trackers.json` is damaged.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        project: str = "",
        config: Mapping[str, Any] | None = None,
        last_steps: Mapping[str, int] | None = None,
    ) -> None:
        check_trackers(names)
        self._names, self._folder, self._project = list(names), folder, project
        self._config, self._last_steps = dict(config or {}), dict(last_steps or {})
        self._stage = ""
        self._open: dict[str, TensorBoardRun | WandbRun | TrackioRun] = {}
        self._state = _read_state(folder / STATE) if set(names) - {"tensorboard"} else {}
        # Whether the state is not on disk yet, and whether the user has been told why.
        self._unsaved = self._warned = False

    def start(self, stage: str) -> None:
        """Start the runs of a stage before the models are loaded.

        Raises:
            SettingsError: wandb or trackio cannot start.
        """
        self._begin(stage, strict=True)

    def log(self, stage: str, step: int, values: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        """Send one step.

        Args:
            stage: name of the stage.
            step: step within the stage, counted from 1.
            values: metrics by name. Only numbers are sent.
            rollouts: rows of a table of sample rollouts, all with the same keys.
        """
        if stage != self._stage:
            self._begin(stage)
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        # An error in our own table is not a failure of a tracker, so the table is made outside `try`.
        table = rollout_table(rollouts) if rollouts else None
        # Record the step before it is sent: a run that is killed in between must not send it twice.
        getting = [name for name in self._open if name == "tensorboard" or self._is_new(name, stage, step)]
        self._save_state()
        for name in getting:
            try:
                self._open[name].log(step, numbers, table)
            except Exception as error:
                self._drop(name, error)

    def close(self, *, failed: bool = False) -> None:
        """Finish the runs of the current stage.

        Args:
            failed: whether the training ends with an error, which wandb shows as the state of the run.
        """
        for name, run in list(self._open.items()):
            try:
                run.close(failed=failed)
            except Exception as error:
                # TensorBoard's thread may report a full disk even if there is space again.
                log.warning("%s: the data are incomplete: %s; metrics.jsonl has all numbers", name, first_line(error))
        self._open, self._stage = {}, ""
        self._save_state()

    def _begin(self, stage: str, *, strict: bool = False) -> None:
        if stage == self._stage:
            return
        self.close()
        self._stage = stage
        for name in list(self._names):
            try:
                self._open[name] = self._new_run(name, stage)
            except Exception as error:
                # TensorBoard only needs a folder, and a full disk must not keep a run from being resumed.
                if strict and name != "tensorboard":
                    self.close(failed=True)
                    raise SettingsError(
                        f"runtime.trackers: expected {name} to start, got {type(error).__name__}: {first_line(error)}; "
                        f"{_ADVICE[name]}, or leave {name} out of runtime.trackers"
                    ) from error
                self._drop(name, error)
        self._save_state()

    def _new_run(self, name: str, stage: str) -> TensorBoardRun | WandbRun | TrackioRun:
        if name == "tensorboard":
            return TensorBoardRun(self._folder / "tensorboard" / stage, self._last_steps.get(stage, 0))
        runs = self._state.setdefault(name, {})
        entry = runs.setdefault(stage, {"id": uuid.uuid4().hex[:8], "step": 0})
        kind = {"wandb": WandbRun, "trackio": TrackioRun}[name]
        run = kind(self._folder, stage, entry["id"], self._project, {**self._config, "stage": stage})
        self._unsaved = True
        return run

    def _is_new(self, name: str, stage: str, step: int) -> bool:
        """Return whether a tracker has not had this step yet, and record that it gets it now."""
        entry = self._state[name][stage]
        if step <= entry["step"]:
            return False
        entry["step"] = step
        self._unsaved = True
        return True

    def _save_state(self) -> None:
        """Write `trackers.json` if it has changed. If that fails, warn once and try again at the next step."""
        if not self._unsaved:
            return
        try:
            # The file must survive a killed process, which needs no sync. A sync would add 10 ms and more to each step.
            with replacing(self._folder / STATE, sync=False) as file:
                write_all(file, json.dumps(self._state, indent=1).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                reason = error.strerror or first_line(error)
                log.warning("%s: %s; it is kept in memory until it can be written", STATE, reason)
            self._warned = True
            return
        self._unsaved = self._warned = False

    def _drop(self, name: str, error: Exception) -> None:
        run = self._open.pop(name, None)
        self._names.remove(name)
        log.warning("%s: no longer written: %s; metrics.jsonl has all numbers", name, first_line(error))
        if run is not None:
            # What wandb has buffered can often still be sent. The run lacks steps, so it is not complete.
            with suppress(Exception):
                run.close(failed=True)


def missing_trackers(names: Sequence[str]) -> list[str]:
    """Return a message for each of these trackers whose package is missing."""
    messages = []
    for name in names:
        spec = importlib.util.find_spec(name)
        # A folder of this name, such as one that wandb wrote, is found too, but has no origin.
        if spec is None or spec.origin is None:
            # tensorboard belongs to the extra `train`.
            extra = "train" if name == "tensorboard" else name
            messages.append(
                f"runtime.trackers: expected the package {name}, got none; run pip install 'rmsd-fast[{extra}]', or "
                f"leave {name} out of runtime.trackers"
            )
    return messages


def check_trackers(names: Sequence[str]) -> None:
    """Raise NotInstalled if the package of a tracker is missing."""
    if messages := missing_trackers(names):
        raise NotInstalled("\n".join(messages))


_ADVICE = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "trackio": "check the folder TRACKIO_DIR and the project's name",
}


class RolloutTable(NamedTuple):
    """A table of sample rollouts, as columns and rows and as a text in Markdown."""

    columns: list[str]
    rows: list[list[Any]]
    markdown: str


class TensorBoardRun:
    """The event files of one stage. Points after `last_step`, of steps that are repeated, are hidden."""

    def __init__(self, folder: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)

    def log(self, step: int, numbers: Mapping[str, float], table: RolloutTable | None) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        if table is not None:
            self._writer.add_text("rollouts", table.markdown, step)

    def close(self, *, failed: bool) -> None:
        # Event files have no state.
        self._writer.close()


class WandbRun:
    """The wandb run of one stage. wandb's own variables choose server, account, mode and folder."""

    def __init__(self, folder: Path, stage: str, run_id: str, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or project,
            id=run_id,
            name=f"{folder.name}-{stage}",
            group=folder.name,
            job_type=stage,
            dir=os.environ.get("WANDB_DIR") or str(folder),
            config=dict(config),
            resume="allow",
            allow_val_change=True,
            # The console holds the progress line, which redraws itself.
            settings=wandb.Settings(console="off", quiet=True, finish_timeout=UPLOAD_S),
        )

    def log(self, step: int, numbers: Mapping[str, float], table: RolloutTable | None) -> None:
        values: dict[str, Any] = dict(numbers)
        if table is not None:
            # Scores that were not computed are None.
            values["rollouts"] = self._wandb.Table(columns=table.columns, data=table.rows, allow_mixed_types=True)
        # The row of a step would otherwise wait for the next step, and be lost if the run is killed.
        self._run.log(values, step=step, commit=True)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class TrackioRun:
    """The trackio run of one stage, in the folder TRACKIO_DIR or, with trackio's own variables, on a server."""

    def __init__(self, folder: Path, stage: str, run_id: str, project: str, config: Mapping[str, Any]) -> None:
        import trackio

        # trackio reports a folder that it cannot write to only in a warning of its thread.
        os.makedirs(trackio.TRACKIO_DIR, exist_ok=True)
        if not os.access(trackio.TRACKIO_DIR, os.W_OK | os.X_OK):
            raise PermissionError(f"{trackio.TRACKIO_DIR} is not writable")
        self._table = trackio.Table
        self._run = trackio.init(
            project=project,
            # trackio finds a run by its name, so the name must be unique.
            name=f"{folder.name}-{stage}-{run_id}",
            group=folder.name,
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, numbers: Mapping[str, float], table: RolloutTable | None) -> None:
        values: dict[str, Any] = dict(numbers)
        if table is not None:
            values["rollouts"] = self._table(columns=table.columns, data=table.rows)
        self._run.log(values, step=step)

    def close(self, *, failed: bool) -> None:
        # Runs of trackio have no state.
        self._run.finish()


def rollout_table(rollouts: Sequence[Mapping[str, Any]]) -> RolloutTable:
    """Return rows with the same keys as a table."""
    columns = list(rollouts[0])
    return RolloutTable(columns, [[row[column] for column in columns] for row in rollouts], markdown_table(rollouts))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as a table in Markdown. Angle brackets and bars in texts stay visible."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.4g}"
        return html.escape(str(value), quote=False).replace("|", "&#124;").replace("\n", "<br>")

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _read_state(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {tracker: {stage: {"id", "step"}}}; an empty dict if there is no file yet."""
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        for name, runs in state.items():
            for entry in runs.values():
                if name not in TRACKERS or not isinstance(entry["id"], str) or not isinstance(entry["step"], int):
                    raise ValueError(f"got {name}: {entry}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected the id and the last step of each tracker's runs ({first_line(error)}); restore the "
            "file, or delete it, and the trackers start new runs"
        ) from error
    return state
