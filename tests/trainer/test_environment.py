"""Test that a program reports missing requirements of this Python before it fails on an import."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from rmsd_fast import environment, evaluate, pool, train


def test_this_python_meets_the_requirements():
    assert environment.why_not() == ""


def test_missing_requirements_are_reported_with_a_command(monkeypatch):
    reason = environment.why_not(("torch", "no_such_package"))
    assert f"this Python ({sys.executable}, " in reason and "has no no_such_package; run " in reason
    monkeypatch.setattr(environment, "sys", SimpleNamespace(executable="/usr/bin/python3", version_info=(3, 9, 2)))
    assert environment.why_not().startswith("this Python (/usr/bin/python3, 3.9.2) is too old: expected 3.10 or later")


@pytest.mark.parametrize(
    ("program", "arguments"),
    [(train, ["quickstart"]), (evaluate, ["quickstart", "--output", "x.json"]), (pool, ["check", "a", "b"])],
)
def test_programs_end_with_2_and_the_reason(program, arguments, monkeypatch, capsys):
    monkeypatch.setattr(environment, "why_not", lambda *_: "this Python has no torch; run another")
    assert program.main(arguments) == 2
    assert f"{program.__name__}: this Python has no torch; run another" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys; from rmsd_fast import train\ntry: train.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "set()"
    assert "temporal  Reply as <think>reasoning</think><answer>start to end</answer>, in seconds" in done.stdout
