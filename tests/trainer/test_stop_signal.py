"""Test SIGTERM and Ctrl-C sent to this process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from rmsd_fast.runtime.stop_signal import Stopped, StopSignal


@pytest.fixture
def stop():
    signals = StopSignal()
    yield signals
    signals.restore()


def test_sigterm_ends_at_once_if_nothing_is_lost(stop, monkeypatch):
    stop.run_folder = Path("runs/x")
    with pytest.raises(Stopped, match="--resume runs/x"):
        os.kill(os.getpid(), signal.SIGTERM)
    # A second signal right after the first must not interrupt the cleanup. A later signal is a new request.
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    with pytest.raises(Stopped):
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_waits_for_the_step(stop, capfd):
    with stop.deferred():
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    # Code that deferred the signal checks it at the end.
    with pytest.raises(Stopped):
        stop.check()
    assert capfd.readouterr().err.count("the run ends after this step") == 1


def test_sighup_acts_as_sigterm_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    stop = StopSignal()
    try:
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        stop.restore()


def test_an_interrupt_that_python_ignored_is_raised_again(stop):
    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    Deleted()
    with pytest.raises(KeyboardInterrupt):
        stop.check()


def test_handlers_are_restored():
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    StopSignal().restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former
