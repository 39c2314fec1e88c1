"""Test that metrics.jsonl survives kills and full disks, and test progress lines and phase times."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty

import pytest
import torch

from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.metrics import MetricsLog, PhaseTimer, fit_line, peak_mib, progress_parts
from rmsd_fast.runtime.process_group import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def make(folder, **options) -> MetricsLog:
    return MetricsLog(folder, ALONE, **({"trackers": (), "stream": io.StringIO()} | options))


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_valid_json_line_per_step(tmp_path):
    metrics = make(tmp_path)
    values = {
        "loss": torch.tensor(0.1, dtype=torch.float64),
        "bad": float("nan"),
        "inf": torch.tensor(-math.inf),
        "n": 3,
    }
    metrics.log("sft", 1, values)
    text = (tmp_path / "metrics.jsonl").read_text()  # The lines are there without close, because every line is flushed.
    assert text == '{"stage": "sft", "step": 1, "loss": 0.1, "bad": null, "inf": null, "n": 3}\n'
    with pytest.raises(TypeError, match="metric 'x': expected a number or a scalar tensor, got list"):
        metrics.log("sft", 2, {"x": [1]})
    metrics.sync()
    assert metrics.lines == 1
    metrics.close()


def test_only_rank_0_writes(tmp_path):
    metrics = MetricsLog(tmp_path / "run", World(1, 2, 1, torch.device("cpu")))
    metrics.begin("sft", 2)
    metrics.log("sft", 1, {"loss": 1.0})
    metrics.message("hello")
    metrics.sync()
    assert metrics.lines == 0 and not (tmp_path / "run").exists()
    metrics.close()


@pytest.mark.parametrize("torn", [b"", b'{"stage": "sft", "st'])
def test_resume_equals_an_uninterrupted_run(tmp_path, torn):
    whole, cut = make(tmp_path / "whole"), make(tmp_path / "cut")
    steps = [("sft", 1), ("sft", 2), ("warm_up", 1), ("warm_up", 2), ("distill", 1)]
    for stage, step in steps:
        whole.log(stage, step, {"loss": step / 7})
    for stage, step in steps[:3]:
        cut.log(stage, step, {"loss": step / 7})
    cut.sync()
    saved = cut.lines
    cut.log("warm_up", 2, {"loss": 99.0})  # This line is after the checkpoint and is lost with the kill.
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    again = make(tmp_path / "cut", resume_lines=saved)
    for stage, step in steps[3:]:
        again.log(stage, step, {"loss": step / 7})
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    again.sync()
    assert again.lines == 5


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    metrics = make(tmp_path)
    metrics.log("sft", 1, {"loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(JsonLines, "_write", lambda self, line: OSError(errno.ENOSPC, "full"))
        metrics.log("sft", 2, {"loss": 2.0})
        metrics.sync()
        assert metrics.lines == 1 and len(metrics.waiting) == 1
    metrics.log("sft", 3, {"loss": 3.0})
    metrics.sync()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3] and metrics.lines == 3


def test_an_alarm_is_printed_once_per_run(tmp_path):
    def steps(metrics, first, last):
        for step in range(first, last + 1):
            metrics.log("distill", step, {"rollout/truncated_share": 0.5})

    streams = [io.StringIO() for _ in range(3)]
    whole = make(tmp_path, stream=streams[0])
    steps(whole, 1, 19)
    whole.sync()
    before = whole.lines
    steps(whole, 20, 22)
    whole.sync()
    after = whole.lines
    steps(whole, 23, 50)
    assert streams[0].getvalue().count("ALARM: many rollouts are truncated (distill step 20)") == 1
    assert f"python -m rmsd_fast.report {tmp_path}" in streams[0].getvalue()
    # A run that continues from a checkpoint after the alarm is silent; from a checkpoint before it, the alarm is raised
    # again.
    steps(make(tmp_path, stream=streams[1], resume_lines=after), 23, 50)
    assert "ALARM" not in streams[1].getvalue()
    steps(make(tmp_path, stream=streams[2], resume_lines=before), 20, 50)
    assert streams[2].getvalue().count("ALARM") == 1


def test_tensorboard_continues_per_stage(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = make(tmp_path, trackers=("tensorboard",))
    for stage, step in (("sft", 1), ("sft", 2), ("distill", 1)):
        metrics.log(stage, step, {"loss": float(step), "note": "text"})
    metrics.sync()
    saved = metrics.lines
    metrics.log("distill", 2, {"loss": 99.0})
    metrics.log("distill", 3, {"loss": 99.0})
    metrics.close()
    again = make(tmp_path, trackers=("tensorboard",), resume_lines=saved)
    again.log("distill", 2, {"loss": 2.0})
    again.close()

    def points(stage):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        return [(e.step, e.value) for e in events.Scalars("loss")]

    assert points("sft") == [(1, 1.0), (2, 2.0)]
    assert points("distill") == [(1, 1.0), (2, 2.0)]


def test_progress_line():
    values = {"policy/kl": 0.0125, "reward/total": None, "rate/tokens_per_s": 12345.6, "other": 1.0}
    parts = progress_parts("distill", 37, 468, values, [(35, 100.0), (36, 103.0), (37, 106.4)])
    # (106.4 - 100) / 2 = 3.2 s per step, and the remaining 431 steps take 1379 s.
    assert fit_line(parts, 100) == "distill 37/468  3.20 s/step  left 0:22:59  KL 0.0125  tokens/s 12.3k"
    assert progress_parts("sft", 1, 9, {}, [(1, 5.0)]) == ["sft 1/9"]
    assert progress_parts("sft", 2, 0, {}, [(1, 5.0), (2, 6.0)]) == ["sft 2", "1.00 s/step"]


def test_a_progress_line_shows_only_complete_fields():
    parts = ["distill 1/9", "KL 0.01", "reward 0.5"]
    assert fit_line(parts, 32) == "distill 1/9  KL 0.01  reward 0.5"
    assert fit_line(parts, 31) == "distill 1/9  KL 0.01"
    assert fit_line(parts, 31, "[policy]") == "distill 1/9  KL 0.01  [policy]"
    assert fit_line(parts, 20, "[policy]") == "distill 1/9"
    assert fit_line(parts, 8, "[policy]") == "distill "


# The worst case has the longest numbers of every field and a run of several days.
WORST = {
    "discriminator/pair_accuracy": 0.051234,
    "reward/total": -0.012345,
    "policy/kl": 1.2345e-05,
    "reward/content/raw": 0.012345,
    "rate/tokens_per_s": 123456.7,
    "policy/loss": -1.2345e-05,
    "discriminator/loss": 0.69312,
}


@pytest.mark.parametrize("phase", ["", "[discriminator]", "[forward_backward]"])
@pytest.mark.parametrize("columns", [60, 79, 99, 100, 120, 200])
def test_the_progress_line_fits_common_terminal_widths(columns, phase):
    # The remaining 3672 steps at 123.45 s each take 125 hours.
    parts = progress_parts("distill", 43128, 46800, WORST, [(43127, 0.0), (43128, 123.45)])
    assert parts[:3] == ["distill 43128/46800", "123.45 s/step", "left 125:55:08"]
    line = fit_line(parts, columns, phase)
    assert len(line) <= columns
    fields = line.removesuffix(phase).strip().split("  ")
    assert fields == parts[: len(fields)]
    if columns >= 99:
        assert "D pairs 0.0512" in line and line.endswith(phase)


def test_the_main_numbers_of_stage_2_fit_100_columns():
    values = {**WORST, "discriminator/pair_accuracy": 0.7123, "reward/total": 0.4123, "policy/kl": 0.01234}
    parts = progress_parts("distill", 100, 3770, values, [(99, 0.0), (100, 12.34)])
    line = "distill 100/3770  12.34 s/step  left 12:34:48  D pairs 0.712  reward 0.412  KL 0.0123"
    assert fit_line(parts, 100) == line
    assert fit_line(parts, 100, "[policy]") == f"{line}  [policy]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.01234, "0.0123"), (-1.236, "-1.24"), (123.4, "123"), (1e-7, "1e-07")),
        *((999.7, "1k"), (12346.0, "12.3k"), (999600.0, "1M"), (2.5e9, "2.5G")),
        *((math.nan, "nan"), (-math.inf, "-inf")),
    ],
)
def test_number_format_of_the_progress_line(value, text):
    assert progress_parts("sft", 1, 0, {"loss": value}, [(1, 0.0)])[1] == f"loss {text}"


def test_plain_lines_without_a_terminal(tmp_path):
    stream = io.StringIO()
    metrics = make(tmp_path, stream=stream)
    metrics.begin("sft", 100, done=40)
    for step in range(41, 101):
        metrics.log("sft", step, {"loss": 1.0})
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [
        41,
        *range(46, 100, 5),
        100,
    ]  # These are the first step, each 1/20 of the stage, and the last step.
    assert "\r" not in stream.getvalue()


def test_one_updating_line_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        metrics = make(tmp_path, stream=stream)
        metrics.begin("distill", 2)
        metrics.log("distill", 1, {"policy/loss": 0.5})
        metrics.phase("rollout")
        metrics.log("distill", 2, {"policy/loss": 0.25})
        metrics.message("saved")
        text = ""
        while "saved" not in text:
            text += os.read(ours, 65536).decode()
    os.close(ours)
    frames = text.split("\r\x1b[K")
    assert frames[1].startswith("distill 1/2  ") and "policy loss 0.5" in frames[1]
    assert frames[2].endswith("[rollout]") and "\n" not in frames[1] + frames[2]
    assert frames[3].startswith("distill 2/2  ") and frames[3].endswith("\n") and "policy loss 0.25" in frames[3]
    assert frames[4].strip() == "saved"


def test_phase_timer_adds_up(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 5.0, 5.5, 10.0, 11.0, 12.0])
    monkeypatch.setattr("rmsd_fast.runtime.metrics.time.perf_counter", lambda: next(clock))
    timer = PhaseTimer(torch.device("cpu"))  # The clock reads 0.
    with timer("rollout"):  # The clock goes from 1 to 3.
        pass
    with (
        pytest.raises(ValueError),
        timer("rollout"),
    ):  # The clock goes from 5 to 5.5, which counts although the block failed.
        raise ValueError
    assert timer.take() == {"seconds/rollout": 2.5, "seconds/step": 10.0}
    assert timer.take() == {"seconds/step": 1.0}


def test_peak_memory():
    assert peak_mib(torch.device("cpu")) > 10


@pytest.mark.cuda
def test_phase_timer_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    timer = PhaseTimer(torch.device("cuda"))
    with timer("matmul"):
        x = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            x = (x @ x).clamp(-1, 1)
    seconds = timer.take()
    assert 0 < seconds["seconds/matmul"] <= seconds["seconds/step"] * 1.05
