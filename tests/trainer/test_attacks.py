"""Run a small part of each attack; `make attack` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import environment

# The outputs of a run are lost in three ways. test_train_run.py sends SIGTERM and waits for the decoders.
ATTACKS = {
    "kills": ["--random", "0", "--operations", "1", "--full", "1", "--writers", "1"],
    "damage": ["--every", "60"],
    "signals": ["--only", "^sft: INT$"],
    "streams": ["--only", "^1 (all closed|reader gone|/dev/full)"],
    "not_finite": ["--only", "^rollouts.one.nan|^both.loss.nan in every step"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    program = Path(__file__).parents[1] / "attack" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(program), *ATTACKS[name]],
        env=environment() | {"ATTACK_FORKS": "1"},
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Every word must name a case and every phase must occur, because otherwise nothing is tested.
    cases = [line for line in done.stdout.splitlines() if ": equal" in line or ": right" in line or ": refused" in line]
    assert cases and "missed" not in "".join(cases)
