"""Report the progress of training: metrics.jsonl, alarms, trackers, the progress line, and seconds per phase."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from rmsd_fast.config import CheckpointError
from rmsd_fast.runtime.alarms import AlarmWatch
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.trackers import Trackers

# Metrics of the progress line, if the stage has them. If they do not all fit, the first ones are shown.
MAIN_NUMBERS = {
    "loss": "loss",
    "discriminator/pair_accuracy": "D pairs",
    "reward/total": "reward",
    "policy/kl": "KL",
    "reward/content/raw": "content",
    "self_teacher/gap": "gap",
    "kd/divergence": "divergence",
    "policy/sft_loss": "sft loss",
    "rate/tokens_per_s": "tokens/s",
    "policy/loss": "policy loss",
    "discriminator/loss": "D loss",
}
# Width of the progress line in columns without a terminal, or if the terminal's width is unknown.
PLAIN_WIDTH = 100
# Without a terminal, a line is printed after this many seconds or this fraction of the stage, whichever comes first.
PLAIN_SECONDS, PLAIN_SHARE = 10.0, 1 / 20


class MetricsLog:
    """Write metrics on rank 0. On the other ranks, every method does nothing.

    Args:
        run_folder: folder for `metrics.jsonl`, `tensorboard/<stage>/` and `trackers.json`.
        world: this process in the run.
        resume_lines: `lines` from the checkpoint. Later lines and an unfinished line are removed, and later TensorBoard
            points are hidden. None means a new run.
        resume_waiting: `waiting` from the checkpoint.
        totals: number of steps of each stage, for alarms that are checked only late in a stage.
        dtype: `model.dtype` of the run, for alarms about differences of log-probs.
        trackers: names of the trackers that also get the metrics, see `runtime.trackers`.
        project: name of the project in the trackers.
        config: settings of the run, for the trackers.
        stream: stream for the progress line; stderr by default.
    """

    def __init__(
        self,
        run_folder: str | Path,
        world: World,
        *,
        resume_lines: int | None = None,
        resume_waiting: Sequence[str] = (),
        totals: Mapping[str, int] | None = None,
        dtype: str = "float32",
        trackers: Sequence[str] = ("tensorboard",),
        project: str = "",
        config: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._on = world.is_main
        self._folder = Path(run_folder)
        self._stream = stream or sys.stderr
        self._live = self._on and self._stream.isatty()
        self._alarms = AlarmWatch(totals or {}, dtype)
        self._total, self._stage = 0, ""
        self._parts: list[str] = []
        self._ends: deque[tuple[int, float]] = deque(maxlen=21)
        self._shown_step, self._shown_at = 0, -math.inf
        if self._on:
            self._folder.mkdir(parents=True, exist_ok=True)
            last_steps: dict[str, int] = {}
            self._file = JsonLines(self._folder / "metrics.jsonl", resume_lines or 0, resume_waiting)
            for record in self._file.records():
                if not isinstance(record.get("stage"), str) or not isinstance(record.get("step"), int):
                    raise CheckpointError(
                        f"{self._folder / 'metrics.jsonl'}: expected stage and step, got {record}; restore the file"
                    )
                last_steps[record["stage"]] = record["step"]
                # Alarms raised before the checkpoint must not be raised again.
                self._alarms.see(record["stage"], record["step"], record)
            self._trackers = Trackers(trackers, self._folder, project=project, config=config, last_steps=last_steps)

    def start(self, stage: str) -> None:
        """Start the trackers with the first stage that is left to run.

        Raises:
            SettingsError: a tracker cannot start.
        """
        if self._on:
            self._trackers.start(stage)

    @property
    def lines(self) -> int:
        """Number of lines synced to disk. Save it in a checkpoint's state and pass it as `resume_lines` on resume."""
        return self._file.lines if self._on else 0

    @property
    def waiting(self) -> list[str]:
        """Lines that the last `sync` could not write. Also save them in the checkpoint's state."""
        return self._file.waiting if self._on else []

    def sync(self) -> None:
        """Write and sync all lines that the disk has room for."""
        if self._on:
            self._file.sync()

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Start the progress of a stage of `total` steps, or continue it after `done` steps."""
        self._stage, self._total, self._parts = stage, total, [f"{stage} {done}/{total}"]
        self._ends.clear()
        self._ends.append((done, time.monotonic()))
        self._shown_step, self._shown_at = done, -math.inf

    def log(self, stage: str, step: int, values: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write one line for one optimizer step, and print the alarms that it raises.

        Args:
            stage: name of the stage.
            step: step within the stage, counted from 1.
            values: numbers or scalar tensors by flat key. Values that are not finite become null in JSON.
            rollouts: rows of a table of sample rollouts, for the trackers.
        Raises:
            TypeError: a value is neither a number, a scalar tensor, a string nor None.
        """
        if not self._on:
            return
        clean = {key: _plain(key, value) for key, value in values.items()}
        self._file.append({"stage": stage, "step": step} | clean)
        for alarm in self._alarms.see(stage, step, clean):
            self.message(f"{alarm.text()}\n  For details, write the report: python -m rmsd_fast.report {self._folder}")
        self._trackers.log(stage, step, clean, rollouts)
        self._progress(stage, step, clean)

    def phase(self, name: str) -> None:
        """Show the current phase of the step on a terminal."""
        if self._live and self._parts:
            self._draw(f"[{name}]" if name else "")

    def message(self, text: str) -> None:
        """Print a permanent line above the progress line."""
        if self._on:
            print(("\r\x1b[K" if self._live else "") + text, file=self._stream, flush=True)

    def _progress(self, stage: str, step: int, values: dict[str, Any]) -> None:
        if stage != self._stage:
            self.begin(stage, 0, step - 1)
        now = time.monotonic()
        self._ends.append((step, now))
        self._parts = progress_parts(stage, step, self._total, values, list(self._ends))
        due = now - self._shown_at >= PLAIN_SECONDS
        due |= self._total > 0 and step - self._shown_step >= self._total * PLAIN_SHARE
        finished = 0 < self._total <= step
        if self._live:
            self._draw()
            if finished:
                print(file=self._stream, flush=True)
        elif due or finished:
            print(fit_line(self._parts, PLAIN_WIDTH), file=self._stream, flush=True)
            self._shown_step, self._shown_at = step, now

    def _draw(self, phase: str = "") -> None:
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or PLAIN_WIDTH
        except (OSError, ValueError):
            width = PLAIN_WIDTH
        # A line that is wider than the terminal would wrap, and the next line would not overwrite it.
        print("\r\x1b[K" + fit_line(self._parts, width - 1, phase), end="", file=self._stream, flush=True)

    def close(self, *, failed: bool = False) -> None:
        """Flush and close the files.

        Args:
            failed: whether the run ends with an error, for the trackers.
        Raises:
            OSError: lines could not be written to metrics.jsonl, because the disk is full or fails.
        """
        if not self._on:
            return
        self._trackers.close(failed=failed)
        self._file.close()


def progress_parts(
    stage: str, step: int, total: int, values: Mapping[str, Any], ends: list[tuple[int, float]]
) -> list[str]:
    """Return the fields of the progress line, most important first: `distill 37/468`, `3.20 s/step`, `KL 0.012`.

    Args:
        stage: name of the stage.
        step: step within the stage, counted from 1.
        total: number of steps of the stage; 0 if unknown.
        values: metrics of the step.
        ends: (step, seconds) at the ends of the last steps.
    """
    parts = [f"{stage} {step}/{total}" if total else f"{stage} {step}"]
    (first, began), (last, ended) = ends[0], ends[-1]
    if last > first:
        seconds_per_step = (ended - began) / (last - first)
        left = round(seconds_per_step * max(total - step, 0))
        parts.append(f"{seconds_per_step:.2f} s/step")
        if total:
            parts.append(f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
    for key, name in MAIN_NUMBERS.items():
        value = values.get(key)
        if isinstance(value, (int, float)):
            parts.append(f"{name} {_short_number(value)}")
    return parts


def fit_line(parts: list[str], width: int, phase: str = "") -> str:
    """Join the fields that fit into `width` columns together with the phase. Only the first may be truncated."""
    room = width - (len(phase) + 2 if phase else 0)
    # The first field is always shown, even if the terminal is too narrow for it.
    line = parts[0]
    for part in parts[1:]:
        if len(line) + 2 + len(part) > room:
            break
        line += f"  {part}"
    if phase and len(line) <= room:
        line += f"  {phase}"
    return line[:width]


def _short_number(value: float) -> str:
    """Format a number with three significant digits: `0.0123`, `-1.23`, `123`, `12.3k`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # Rounding to three digits can reach the next unit although the value does not.
        if size * 0.9995 <= abs(value) < math.inf:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return float(value)  # Scalars of numpy.
    except (TypeError, ValueError):
        raise TypeError(f"metric '{key}': expected a number or a scalar tensor, got {type(value).__name__}") from None


class PhaseTimer:
    """Measure the seconds of each phase of a step: `with timer("rollout"): ...`, then `timer.take()`.

    On CUDA, the timer records events and waits for the device only once, in `take`. The time of a phase extends until
    its own kernels have ended, and includes host work, without a synchronization after each phase. The times of a
    repeated phase are added, and a nested phase is also counted in the outer phase.

    Args:
        device: device of this process.
        metrics: log whose progress line shows the current phase.
    """

    def __init__(self, device: torch.device, metrics: MetricsLog | None = None) -> None:
        self._cuda, self._metrics = device.type == "cuda", metrics
        self._marks: list[tuple[str, Any, Any]] = []
        self._began = time.perf_counter()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._metrics is not None:
            self._metrics.phase(phase)
        began = self._now()
        try:
            yield
        finally:
            self._marks.append((phase, began, self._now()))

    def take(self) -> dict[str, float]:
        """Return `seconds/<phase>` and `seconds/step` since the last `take`, and reset the timer."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for phase, began, ended in self._marks:
            spent = began.elapsed_time(ended) / 1000 if self._cuda else ended - began
            seconds[f"seconds/{phase}"] = seconds.get(f"seconds/{phase}", 0.0) + spent
        now = time.perf_counter()
        seconds["seconds/step"] = now - self._began
        self._marks, self._began = [], now
        return seconds


def peak_mib(device: torch.device) -> float:
    """Return the peak memory of this process in MiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
