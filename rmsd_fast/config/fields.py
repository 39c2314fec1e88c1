"""Defaults of settings with bounds or allowed values, and lists of these values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from pathlib import Path
from typing import Any

from rmsd_fast.method import hints

RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = ("sft", "control", "warm_up", "distill")
# Students that a run evaluates, and the differences between them that it reports: after, before.
STUDENTS = ("untrained", "stage1", "stage2", "control")
# Results that measure a student; the first available one counts.
MEASURES = ("closed", "meaning")
DIFFERENCES = (("stage1", "untrained"), ("stage2", "stage1"), ("control", "stage1"), ("stage2", "control"))
# Steps over which `discriminator.warm_up_accuracy` averages.
ACCURACY_STEPS = 8
# Benchmarks of which some answers are scored by a language model in the field.
JUDGED = ("mathvista", "mathverse", "vstar")
# `kd.kind` with the divergence of whole distributions, in place of an advantage for the sampled token.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
# Fields of a request to a server that settings of their own determine.
REQUEST_FIELDS = ("messages", "model", "n", "stream", "temperature", "max_tokens", "max_completion_tokens")
# Benchmarks about images.
OF_IMAGES = ("mathvista", "mathverse")
# Benchmarks with subtitles.
SUBTITLED = ("videomme", "longvideobench", "worldsense")
BENCHMARKS = (
    "videomme",
    "videommmu",
    "worldsense",
    "longvideobench",
    "mlvu",
    "mathvista",
    "mathverse",
    "vstar",
)
FORMATS = ("auto", "rmsd", "ms-swift", "llava", "video-r1")
TEACHERS = ("noisy", "reported", "biased", "imprecise", "blind")
WORDINGS = ("reference", "paraphrased")
VIEWS, MEDIA_VIEW = hints.VIEWS, hints.MEDIA_VIEW
TRACKERS = ("tensorboard", "wandb", "trackio")


def number(default: float | None, *, least: float | None = None, above: float | None = None, most: float | None = None):
    """Return a field for a number that is at least `least`, above `above` and at most `most`; None = no bound."""
    return field(default=default, metadata={"least": least, "above": above, "most": most})


def choice(default: Any, *, of: Iterable[Any]):
    """Return a field whose value must be one of the values in `of`."""
    return field(default=default, metadata={"choices": tuple(of)})
