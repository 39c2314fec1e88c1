"""Check whether this Python can run the programs, before any heavy import."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 10)
PACKAGES = ("torch", "omegaconf", "transformers", "deepspeed", "rmsd_kernels")


def why_not(packages: tuple[str, ...] = PACKAGES, extras: str = "train,video") -> str:
    """Return what is missing and what to run, or an empty string if this Python can run the programs."""
    version = ".".join(map(str, sys.version_info[:3]))
    here = f"this Python ({sys.executable}, {version})"
    beside = Path(__file__).resolve().parent.parent / ".venv" / "bin" / "python"
    todo = f"run {beside} -m …" if beside.is_file() else f"run `make setup`, or pip install 'rmsd-fast[{extras}]'"
    if sys.version_info < OLDEST_PYTHON:
        return f"{here} is too old: expected {'.'.join(map(str, OLDEST_PYTHON))} or later; {todo}"
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{here} has no {', '.join(missing)}; {todo}" if missing else ""
