"""Record how answers were made, and identify the answers of an evaluation that was interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

from rmsd_fast.config import RunConfig, VideoConfig
from rmsd_fast.data.records import Question
from rmsd_fast.models.folders import model_digests, resolve_folder
from rmsd_fast.settings import settings_as_dict
from rmsd_fast.teacher.scores import quality_settings

# Packages whose versions can change an answer.
PACKAGES = ("rmsd-fast", "torch", "transformers", "torchcodec")
# Settings of evaluate that do not change answers or scores.
_NEUTRAL = ("every_steps", "prompts_per_batch", "samples")


def version_of(name: str) -> str:
    """Return the version of a package, or `not installed`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def video_of(settings: RunConfig) -> VideoConfig:
    """Return the frames and pixel budgets of evaluations."""
    if settings.evaluate.num_frames is None:
        return settings.video
    return dataclasses.replace(settings.video, num_frames=settings.evaluate.num_frames, fps=None)


def protocol_of(settings: RunConfig) -> dict[str, Any]:
    """Return the settings and versions that determine answers and scores, apart from the model and the questions."""
    evaluate = {name: value for name, value in settings_as_dict(settings)["evaluate"].items() if name not in _NEUTRAL}
    sampled = {"temperature": settings.rollout.temperature} if settings.evaluate.rollouts else {}
    return {
        "decoding": "greedy",
        **sampled,
        "seed": settings.seed,
        "evaluate": evaluate,
        "video": dataclasses.asdict(video_of(settings)),
        "max_prompt_tokens": settings.data.max_prompt_tokens,
        "model": {"dtype": settings.model.dtype, "quantize": settings.model.quantize},
        "metrics": quality_settings(settings.teacher),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def model_identity(path: str) -> dict[str, str]:
    """Return path and hash of a model. The hash covers weights, settings, tokenizer, template and preprocessors."""
    return {"path": path, "hash": _digest(model_digests(resolve_folder(path)))}


def questions_digest(questions: Sequence[Question]) -> str:
    """Return a hash of all that is asked, and of the ground truths."""
    return _digest([dataclasses.asdict(question) for question in questions])


def run_identity(settings: RunConfig, name: str) -> dict[str, str]:
    """Return what identifies a student of a training run in its folder: its name, and a hash of all settings."""
    return {"student": name, "settings": _digest(settings_as_dict(settings))}


def differences_of(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Return one text per value that differs between two nested dicts: `evaluate.max_new_tokens: 64, not 32`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        prefix = f"{name}." if name else ""
        return [line for key in keys for line in differences_of(ours.get(key), theirs.get(key), f"{prefix}{key}")]
    return [] if ours == theirs else [f"{name}: {theirs}, not {ours}"]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
