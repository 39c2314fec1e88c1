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
from rmsd_fast.rollout.vllm_process import check_vllm
from rmsd_fast.settings import settings_as_dict
from rmsd_fast.stages.judge import prompts_hash
from rmsd_fast.teacher.scores import quality_settings

# Packages whose versions can change an answer.
PACKAGES = ("rmsd-fast", "torch", "transformers", "torchcodec")
# Settings of evaluate that do not change answers or scores.
_NEUTRAL = ("every_steps", "prompts_per_batch", "samples", "judge")
# Settings of the judge that can change a verdict.
_OF_JUDGE = ("model", "temperature", "max_tokens", "extra_body")
# Settings of data and model that can change an answer: what is shown, and how it is computed.
_OF_MEDIA = ("max_prompt_tokens", "decoder", "check_frames", "max_file_mib")
_OF_MODEL = ("dtype", "quantize", "attention", "liger")
# In the place of a value that only one of two records has.
_ABSENT = "absent"


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
    judge = settings_as_dict(settings)["evaluate"]["judge"]
    judged = {name: judge[name] for name in _OF_JUDGE} | {"prompts": prompts_hash()} if judge["endpoint"] else None
    vllm = {"vllm": check_vllm(section="evaluate")} if settings.evaluate.engine == "vllm" else {}
    return {
        "decoding": "greedy",
        **sampled,
        "seed": settings.seed,
        "evaluate": evaluate,
        **({"judge": judged} if judged else {}),
        "video": dataclasses.asdict(video_of(settings)),
        **{name: getattr(settings.data, name) for name in _OF_MEDIA},
        "packing": settings.packing,
        "model": {name: getattr(settings.model, name) for name in _OF_MODEL},
        "metrics": quality_settings(settings.teacher),
        "versions": {name: version_of(name) for name in PACKAGES} | vllm,
    }


def model_identity(path: str) -> dict[str, str]:
    """Return path and hash of a model. The hash covers weights, settings, tokenizer, template and preprocessors."""
    return {"path": path, "hash": _digest(model_digests(resolve_folder(path)))}


def questions_digest(questions: Sequence[Question]) -> str:
    """Return a hash of all that is asked, and of the ground truths."""
    return _digest([dataclasses.asdict(question) for question in questions])


def evaluation_identity(settings: RunConfig, questions: Sequence[Question], model: dict[str, str]) -> dict[str, Any]:
    """Return what the answers of `rmsd_fast.evaluate` depend on, so that it continues only its own.

    Args:
        settings: settings of the evaluation.
        questions: the questions.
        model: result of `model_identity`.
    """
    return {
        "model": model,
        # A judge does not change the answers, and its verdicts have a file of their own.
        "protocol": {name: value for name, value in protocol_of(settings).items() if name != "judge"},
        "questions": questions_digest(questions),
        # Other batches, and other calls of the vision tower, can change an answer by rounding.
        "prompts_per_batch": settings.evaluate.prompts_per_batch,
        "micro_tokens": settings.micro_tokens,
        # The requests that fit into vLLM's cache are computed together.
        **({"vllm_kv_cache_gib": settings.rollout.vllm_kv_cache_gib} if settings.evaluate.engine == "vllm" else {}),
    }


def identity_hash(identity: dict[str, Any]) -> str:
    """Return a hash of the result of `evaluation_identity`, as `answers_of` of an `evaluation.json` has it."""
    return _digest(identity)


def run_identity(settings: RunConfig, name: str) -> dict[str, str]:
    """Return what identifies a student of a training run in its folder: its name, and a hash of all settings."""
    return {"student": name, "settings": _digest(settings_as_dict(settings))}


def differences_of(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Return one text per value that differs between two nested dicts: `evaluate.max_new_tokens: 64, not 32`.

    A value that only one of them has is `absent` in the other, and so are all values of a dict that is missing.
    """
    if isinstance(ours, dict) or isinstance(theirs, dict):
        ours, theirs = (value if isinstance(value, dict) else {} for value in (ours, theirs))
        keys = [*ours, *(key for key in theirs if key not in ours)]
        prefix = f"{name}." if name else ""
        pairs = ((f"{prefix}{key}", ours.get(key, _ABSENT), theirs.get(key, _ABSENT)) for key in keys)
        return [line for path, mine, other in pairs for line in differences_of(mine, other, path)]
    return [] if ours == theirs else [f"{name}: {theirs}, not {ours}"]


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
