"""Test that the scripts of examples/ run on a CPU as a user would run them and reach their results."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 119
NUMBER = r"-?[\d.]+(?:e-?\d+)?"


def last_line(name: str, tmp_path: Path) -> str:
    """Run an example from another folder, without a GPU or a network, and return its last line."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_every_example_is_tested_and_short() -> None:
    source = Path(__file__).read_text()
    for script in SCRIPTS:
        assert f'last_line("{script.stem}"' in source, script.name
        assert len(script.read_text().splitlines()) <= MOST_LINES, script.name


def test_readme_names_every_example() -> None:
    text = (ROOT / "README.md").read_text()
    for script in SCRIPTS:
        assert f"examples/{script.name}" in text, script.name


def test_grpo_loop_learns(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (extra: train)")
    first, last = map(float, re.findall(r"\d\.\d{3}", last_line("grpo_loop", tmp_path)))
    # Half of the vocabulary is even.
    assert first < 0.65 and last > 0.85


def test_shared_prefix_agrees_with_separate_rows(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers (extra: train)")
    difference = float(re.findall(NUMBER, last_line("shared_prefix", tmp_path))[-1])
    # Float32 sums are computed in another order.
    assert 0 < difference < 1e-5


def test_shared_prefix_text_learns_and_agrees_with_separate_rows(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft (extra: test)")
    first, last, difference = map(float, re.findall(NUMBER, last_line("shared_prefix_text", tmp_path)))
    assert first > 4 and last < 2
    # Float32 sums are computed in another order.
    assert 0 < difference < 1e-4


def test_fused_grpo_trainer_learns(tmp_path: Path) -> None:
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl (extra: test, Python 3.11 or later)")
    first, last = map(float, re.findall(r"-\d+\.\d\d", last_line("fused_grpo_trainer", tmp_path)))
    assert first < -8 and last > -3
