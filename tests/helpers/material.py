"""Generate material of the smallest useful size, for tests that need a student, questions and a pool."""

from __future__ import annotations

from pathlib import Path

import torch
from train_runs import SIX_TASKS

from rmsd_fast.config import RunConfig
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import Material, prepare_material

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def tiny_settings(folder: Path, *overrides: str) -> RunConfig:
    """Return quickstart settings over 12 clips and all kinds of questions."""
    sizes = ["made.train_clips=12", "made.heldout_clips=3", "made.student_layers=2", "rollout.max_new_tokens=10"]
    return load_settings("quickstart", [f"made.folder={folder}", *SIX_TASKS, *sizes, *overrides])


def tiny_material(folder: Path) -> Material:
    return prepare_material(tiny_settings(folder), WORLD)
