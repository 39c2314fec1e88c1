"""SIGTERM and Ctrl-C, sent to this very process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rmsd_fast.runtime.stop_signal import Stopped, StopSignal


@pytest.fixture
def stop():
    signals = StopSignal()
    yield signals
    signals.restore()


def test_sigterm_ends_at_once_where_nothing_is_lost(stop):
    stop.run_folder = Path("runs/x")
    with pytest.raises(Stopped, match="--resume runs/x"):
        os.kill(os.getpid(), signal.SIGTERM)
    # The second one, of torchrun, must not break what closes files.
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped), stop.deferred():
        pytest.fail("steps began after the signal")


def test_sigterm_waits_for_the_step(stop, capfd):
    with stop.deferred():
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    assert capfd.readouterr().err.count("the run ends after this step") == 1


def test_an_interrupt_that_python_ignored_is_raised_again(stop):
    class Deleted:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    Deleted()
    with pytest.raises(KeyboardInterrupt):
        assert stop.asked


def test_handlers_are_put_back():
    former = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    StopSignal().restore()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == former
