"""How programs end: exit codes and messages, without a process group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rmsd_fast import program, train_run
from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.program import run_program
from rmsd_fast.report import ReportError
from rmsd_fast.runtime.stop_signal import Stopped


@pytest.fixture(autouse=True)
def group(monkeypatch):
    """Notes whether the process group was left."""
    left = []
    monkeypatch.setattr(program, "start", lambda: "world")
    monkeypatch.setattr(program, "stop", lambda: left.append(True))
    return left


def end(error=None, *, trains=True, settings=None):
    def work(world, stop):
        assert world == "world"
        if error is not None:
            raise error

    return run_program("rmsd_fast.x", settings or RunConfig(), work, trains=trains)


@pytest.mark.parametrize(
    ("error", "code", "leaves", "words"),
    [
        (None, 0, True, ""),
        (Stopped("step 3 is saved"), 0, True, "stopped by SIGTERM: step 3 is saved"),
        (SettingsError("x: expected 1"), 2, True, "rmsd_fast.x: x: expected 1"),
        (KeyboardInterrupt(), 130, False, "interrupted: nothing was written"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, False, "micro_tokens=16384 (tokens of one forward"),
    ],
)
def test_each_end_has_its_code_and_its_message(group, capsys, error, code, leaves, words):
    settings = RunConfig()
    settings.micro_tokens = 16384
    assert end(error, settings=settings) == code
    assert bool(group) == leaves
    assert words in capsys.readouterr().err


def test_an_evaluation_has_nothing_to_continue(capsys):
    assert end(KeyboardInterrupt(), trains=False) == 130
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert end(torch.OutOfMemoryError("full"), trains=False) == 2
    told = capsys.readouterr().err
    assert "evaluate.prompts_per_batch=" in told and "micro_tokens" not in told and "--resume" not in told


def test_errors_of_the_program_are_not_swallowed(group):
    with pytest.raises(ZeroDivisionError):
        end(ZeroDivisionError())
    assert not group


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ReportError("samples.jsonl:1: expected x"), "samples.jsonl:1: expected x"),
        (RuntimeError("a fault"), "RuntimeError: a fault"),
    ],
)
def test_a_report_that_cannot_be_written_fails_no_run(tmp_path, monkeypatch, capsys, error, words):
    def fail(_):
        raise error

    monkeypatch.setattr(train_run, "write_facts", lambda run, *, finished: None)
    monkeypatch.setattr(train_run, "write_report", fail)
    train_run.finish(SimpleNamespace(folder=tmp_path))
    told = capsys.readouterr().err
    assert f"report not written: {words}" in told and f"python -m rmsd_fast.report {tmp_path}" in told
