"""What a run reports while it goes: metrics.jsonl, TensorBoard, the progress line, and seconds per phase."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from rmsd_fast.runtime.world import World

log = logging.getLogger("rmsd_fast")

# Shown in the progress line where a stage has them, in this order.
MAIN_NUMBERS = {
    "loss": "loss",
    "policy/loss": "policy loss",
    "policy/kl": "KL",
    "reward/total": "reward",
    "reward/content/raw": "content",
    "discriminator/loss": "D loss",
    "discriminator/pair_accuracy": "D pairs",
    "rate/tokens_per_s": "tokens/s",
}
# Without a terminal: a line after so many seconds or such a share of the stage, whichever comes first.
PLAIN_SECONDS, PLAIN_SHARE = 10.0, 1 / 20


class MetricsLog:
    """Writes metrics on rank 0; on the other ranks every method does nothing.

    Args:
        run_folder: gets `metrics.jsonl` and `tensorboard/<stage>/`.
        resume_lines: `lines` as the checkpoint has it; later lines (and a torn one) are cut off, later TensorBoard
            points are hidden. None = a new run.
        tensorboard: also write TensorBoard files.
        stream: where progress goes.
    """

    def __init__(
        self,
        run_folder: str | Path,
        world: World,
        *,
        resume_lines: int | None = None,
        tensorboard: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._on = world.is_main
        self._folder, self._tensorboard = Path(run_folder), tensorboard
        self._stream = stream or sys.stderr
        self._live = self._on and self._stream.isatty()
        self._lines, self._pending, self._writers = 0, [], {}  # type: ignore[var-annotated]
        self._last_step: dict[str, int] = {}
        self._total, self._stage, self._phase, self._line = 0, "", "", ""
        self._ends: deque[tuple[int, float]] = deque(maxlen=21)
        self._shown_step, self._shown_at = 0, -math.inf
        if self._on:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "metrics.jsonl"
            self._keep(path, resume_lines or 0)
            # Unbuffered: a kill loses no line that `log` has returned from. Appending, as `_write_pending` may cut it.
            self._file = path.open("ab", buffering=0)

    def _keep(self, path: Path, lines: int) -> None:
        found = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in found[:lines] if line.endswith(b"\n")]
        if len(kept) < lines:
            log.warning(
                "%s has %d lines, the checkpoint was saved after %d; earlier metrics are lost", path, len(kept), lines
            )
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(sum(map(len, kept)))
        for line in kept:
            record = json.loads(line)
            self._last_step[record["stage"]] = record["step"]
        self._lines = len(kept)

    @property
    def lines(self) -> int:
        """Lines written, brought to disk: put it into a checkpoint's state and give it back as `resume_lines`."""
        if self._on:
            self._write_pending()
            os.fsync(self._file.fileno())
        return self._lines

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """A stage of `total` steps starts, or continues after `done` of them."""
        self._stage, self._total, self._line = stage, total, f"{stage} {done}/{total}"
        self._ends.clear()
        self._ends.append((done, time.monotonic()))
        self._shown_step, self._shown_at = done, -math.inf

    def log(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """One line for one optimiser step.

        Args:
            stage, step: 1-based step within the stage.
            values: numbers or scalar tensors by flat key; not finite ones become null in JSON.
        Raises:
            TypeError: a value that is neither a number, a scalar tensor, a string nor None.
        """
        if not self._on:
            return
        clean = {key: _plain(key, value) for key, value in values.items()}
        record = {"stage": stage, "step": step} | {k: _finite(v) for k, v in clean.items()}
        self._pending.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._write_pending()
        self._to_tensorboard(stage, step, clean)
        self._progress(stage, step, clean)

    def _write_pending(self) -> None:
        """A full disk keeps lines in memory until there is space; it never leaves half a line."""
        while self._pending:
            size = os.fstat(self._file.fileno()).st_size
            try:
                written = self._file.write(self._pending[0])
                if written != len(self._pending[0]):
                    raise OSError(ENOSPC, "No space left on device")
            except OSError as error:
                self._file.truncate(size)
                if error.errno not in (ENOSPC, EDQUOT):
                    raise
                if len(self._pending) == 1:
                    log.warning("metrics.jsonl: the disk is full; lines are kept in memory until there is space")
                return
            self._pending.pop(0)
            self._lines += 1

    def _to_tensorboard(self, stage: str, step: int, values: dict[str, Any]) -> None:
        if not self._tensorboard:
            return
        try:
            if stage not in self._writers:
                from torch.utils.tensorboard import SummaryWriter

                # One folder per stage: purging goes by step, and every stage counts its own.
                purge = self._last_step.get(stage, 0) + 1
                folder = str(self._folder / "tensorboard" / stage)
                self._writers[stage] = SummaryWriter(folder, purge_step=purge, flush_secs=10)
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writers[stage].add_scalar(key, value, step)
        except OSError as error:
            self._tensorboard = False
            log.warning("TensorBoard files are not written any more: %s; metrics.jsonl has all numbers", error)

    def phase(self, name: str) -> None:
        """Name what the step is doing now, on a terminal."""
        self._phase = name
        if self._live and self._line:
            self._draw(f"{self._line}  [{name}]" if name else self._line)

    def message(self, text: str) -> None:
        """Print a line that stays, above the progress."""
        if self._on:
            print(("\r\x1b[K" if self._live else "") + text, file=self._stream, flush=True)

    def _progress(self, stage: str, step: int, values: dict[str, Any]) -> None:
        if stage != self._stage:
            self.begin(stage, 0, step - 1)
        now = time.monotonic()
        self._ends.append((step, now))
        self._line = progress_line(stage, step, self._total, values, list(self._ends))
        due = now - self._shown_at >= PLAIN_SECONDS
        due |= self._total > 0 and step - self._shown_step >= self._total * PLAIN_SHARE
        finished = 0 < self._total <= step
        if self._live:
            self._draw(self._line)
            if finished:
                print(file=self._stream, flush=True)
        elif due or finished:
            print(self._line, file=self._stream, flush=True)
            self._shown_step, self._shown_at = step, now

    def _draw(self, text: str) -> None:
        try:
            width = os.get_terminal_size(self._stream.fileno()).columns or 120
        except (OSError, ValueError):
            width = 120
        # A line longer than the terminal would wrap, and the next one would not overwrite it.
        print("\r\x1b[K" + text[: max(width - 1, 20)], end="", file=self._stream, flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if not self._on:
            return
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
        if not self._file.closed:
            self._file.close()


def progress_line(stage: str, step: int, total: int, values: Mapping[str, Any], ends: list[tuple[int, float]]) -> str:
    """`distill 37/468  3.20 s/step  left 0:22:59  KL 0.012`.

    `ends` are (step, seconds) of the ends of the last steps; a total of 0 is unknown.
    """
    parts = [f"{stage} {step}/{total}" if total else f"{stage} {step}"]
    # First what a narrow terminal must not cut off.
    (first, began), (last, ended) = ends[0], ends[-1]
    if last > first:
        each = (ended - began) / (last - first)
        left = round(each * max(total - step, 0))
        parts.append(f"{each:.2f} s/step")
        if total:
            parts.append(f"left {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
    for key, name in MAIN_NUMBERS.items():
        value = values.get(key)
        if isinstance(value, (int, float)):
            parts.append(f"{name} {value:.0f}" if abs(value) >= 1000 else f"{name} {value:.4g}")
    return "  ".join(parts)


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    try:
        return float(value)  # numpy's scalars
    except (TypeError, ValueError):
        raise TypeError(f"metric '{key}': expected a number or a scalar tensor, got {type(value).__name__}") from None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PhaseTimer:
    """Seconds per phase of a step: `with timer("rollout"): ...`, then `timer.take()`.

    On CUDA it records events and waits for the device once, in `take`: a phase counts the time until its own kernels
    have ended, host work included, without stopping the host after each phase. Phases may repeat (times add up); one
    inside another counts in both.

    Args:
        device: of `World`.
        metrics: told the current phase, for the progress line.
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
        """`seconds/<phase>` and `seconds/step` since the last `take`, and start again."""
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
    """Peak memory of this process in MiB: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
