"""A small part of each attack on whole runs; `make attack` runs more of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import environment

ATTACKS = [
    "kills.py --random 0 --operations 1 --full 1 --writers 1",
    "damage.py --every 50",
    "signals.py --only ^sft:.(TERM|INT)$",
    "streams.py --only ^1.(all.closed|stdout.*full)",
    "not_finite.py --only rollouts.one.nan",
]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.split()[0])
def test_attack(attack):
    program, *arguments = attack.split()
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "attack" / program), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
