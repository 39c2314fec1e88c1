"""metrics.jsonl survives kills and full disks and continues exactly; progress lines; phase times."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty

import pytest
import torch

from rmsd_fast.runtime.metrics import MetricsLog, PhaseTimer, peak_mib, progress_line
from rmsd_fast.runtime.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def make(folder, **options) -> MetricsLog:
    return MetricsLog(folder, ALONE, **({"tensorboard": False, "stream": io.StringIO()} | options))


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
    text = (tmp_path / "metrics.jsonl").read_text()  # there without close: every line is flushed
    assert text == '{"stage": "sft", "step": 1, "loss": 0.1, "bad": null, "inf": null, "n": 3}\n'
    with pytest.raises(TypeError, match="metric 'x': expected a number or a scalar tensor, got list"):
        metrics.log("sft", 2, {"x": [1]})
    assert metrics.lines == 1
    metrics.close()


def test_only_rank_0_writes(tmp_path):
    metrics = MetricsLog(tmp_path / "run", World(1, 2, 1, torch.device("cpu")))
    metrics.begin("sft", 2)
    metrics.log("sft", 1, {"loss": 1.0})
    metrics.message("hello")
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
    saved = cut.lines
    cut.log("warm_up", 2, {"loss": 99.0})  # after the checkpoint, lost with the kill
    with (tmp_path / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    again = make(tmp_path / "cut", resume_lines=saved)
    for stage, step in steps[3:]:
        again.log(stage, step, {"loss": step / 7})
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert again.lines == 5


def test_resume_with_lost_lines_warns(tmp_path, caplog):
    make(tmp_path).log("sft", 1, {"loss": 1.0})
    again = make(tmp_path, resume_lines=3)
    assert "has 1 lines, the checkpoint was saved after 3" in caplog.text
    again.log("sft", 4, {"loss": 2.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 4]


def test_full_disk_keeps_lines_until_there_is_space(tmp_path, caplog):
    metrics = make(tmp_path)
    metrics.log("sft", 1, {"loss": 1.0})
    real = metrics._file

    class Full:
        """Writes a few bytes, then nothing: what a full disk does."""

        def write(self, data):
            real.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(real, name)

    metrics._file = Full()
    metrics.log("sft", 2, {"loss": 2.0})
    metrics.log("sft", 3, {"loss": 3.0})
    assert [r["step"] for r in records(tmp_path)] == [1]
    assert caplog.text.count("disk is full") == 1
    metrics._file = real
    metrics.log("sft", 4, {"loss": 4.0})
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4] and metrics.lines == 4


def test_tensorboard_continues_per_stage(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = make(tmp_path, tensorboard=True)
    for stage, step in (("sft", 1), ("sft", 2), ("distill", 1)):
        metrics.log(stage, step, {"loss": float(step), "note": "text"})
    saved = metrics.lines
    metrics.log("distill", 2, {"loss": 99.0})
    metrics.log("distill", 3, {"loss": 99.0})
    metrics.close()
    again = make(tmp_path, tensorboard=True, resume_lines=saved)
    again.log("distill", 2, {"loss": 2.0})
    again.close()

    def points(stage):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        return [(e.step, e.value) for e in events.Scalars("loss")]

    assert points("sft") == [(1, 1.0), (2, 2.0)]
    assert points("distill") == [(1, 1.0), (2, 2.0)]


def test_progress_line():
    values = {"policy/kl": 0.0125, "reward/total": None, "rate/tokens_per_s": 12345.6, "other": 1.0}
    line = progress_line("distill", 37, 468, values, [(35, 100.0), (36, 103.0), (37, 106.4)])
    # (106.4 - 100) / 2 = 3.2 s per step; 431 steps left = 1379 s
    assert line == "distill 37/468  3.20 s/step  left 0:22:59  KL 0.0125  tokens/s 12346"
    assert progress_line("sft", 1, 9, {}, [(1, 5.0)]) == "sft 1/9"
    assert progress_line("sft", 2, 0, {}, [(1, 5.0), (2, 6.0)]) == "sft 2  1.00 s/step"


def test_plain_lines_without_a_terminal(tmp_path):
    stream = io.StringIO()
    metrics = make(tmp_path, stream=stream)
    metrics.begin("sft", 100, done=40)
    for step in range(41, 101):
        metrics.log("sft", step, {"loss": 1.0})
    shown = [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == [41, *range(46, 100, 5), 100]  # the first, each 1/20 of the stage, the last
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
    timer = PhaseTimer(torch.device("cpu"))  # 0
    with timer("rollout"):  # 1 to 3
        pass
    with pytest.raises(ValueError), timer("rollout"):  # 5 to 5.5, counted although it failed
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
