"""Test SIGTERM and Ctrl-C sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_runs import environment

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


# A program that gets SIGTERM when DeepSpeed imports the module of its engine.
DURING_AN_IMPORT = """
import os, signal, sys
from rmsd_fast.program import run_program
from rmsd_fast.settings import load_settings

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed.runtime.engine":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Finder())
settings = load_settings("quickstart", [])
sys.exit(run_program("it", settings, lambda world, stop: print("not stopped"), trains=True))
"""


def test_sigterm_while_deepspeed_is_imported_ends_with_a_line():
    done = subprocess.run([sys.executable, "-c", DURING_AN_IMPORT], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "stopped by SIGTERM: nothing was written" in done.stderr and "Traceback" not in done.stderr
