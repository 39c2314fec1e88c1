"""Run a small part of each attack; `make attack` runs more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import environment

ATTACKS = {
    "kills": ["--random", "0", "--operations", "1", "--full", "1", "--writers", "1"],
    "damage": ["--every", "180"],
    "signals": ["--only", "^sft: (TERM|INT)$"],
    "streams": ["--only", "^1 (all closed|/dev/full)"],
    "not_finite": ["--only", "rollouts.one.nan"],
    "not_finite, to the end": ["--only", "both.loss.nan in every step"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    program = Path(__file__).parents[1] / "attack" / f"{name.split(',')[0]}.py"
    done = subprocess.run(
        [sys.executable, str(program), *ATTACKS[name]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Every word must name a case and every phase must occur, because otherwise nothing is tested.
    cases = [line for line in done.stdout.splitlines() if ": equal" in line or ": right" in line or ": refused" in line]
    assert cases and "missed" not in "".join(cases)
