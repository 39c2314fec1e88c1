"""Describe what a run would do, for `--dry-run`: inputs, steps and a memory estimate, without training anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from rmsd_fast.config import ModelError, RunConfig
from rmsd_fast.data.errors import counted
from rmsd_fast.models.folders import find_folder, open_folder
from rmsd_fast.setting_rules import uses_discriminator, uses_reference
from rmsd_fast.stages.inputs import read_inputs
from rmsd_fast.stages.material import check_batches

GIB = 2**30


def describe_plan(settings: RunConfig) -> tuple[str, bool]:
    """Return a text about steps, inputs and memory, and whether a run could start.

    Inputs that exist are read and checked; missing inputs are listed.

    Raises:
        UserError: an existing input is damaged, the pool belongs to other questions, or the batches cannot be divided
            among the processes that torchrun has started.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_batches(settings, processes)
    launch = "" if "WORLD_SIZE" in os.environ else " (start the dry run with torchrun to count processes)"
    lines = [
        f"run {settings.name}: settings are consistent; {counted(processes, 'process', 'processes')}{launch}, "
        f"ZeRO-{settings.runtime.zero_stage}"
    ]
    lines += _stage_lines(settings)
    if {"sft", "control"} & set(settings.stages):
        lines.append(f"  imitated responses: {settings.sft.responses}")
    data = settings.data
    kept = f"{data.cache_mib} MiB of frames and {data.embedding_cache_mib} MiB of embeddings per process"
    kept += f", {data.disk_cache_gib:g} GiB in {data.disk_cache}" if data.disk_cache else ""
    threads, steps = counted(data.decode_threads, "thread"), counted(data.decode_ahead, "step")
    lines.append(f"  media: {data.decoder} decoder, {threads}, decoding {steps} ahead")
    lines.append(f"  media caches: {kept}")
    frames = f"{settings.video.num_frames} frames" if settings.video.num_frames else f"{settings.video.fps:g} frames/s"
    later = settings.evaluate.num_frames
    lines.append(f"  videos: {frames}" + (f", {later} frames in evaluation" if later else ""))
    lines.append(f"  prompts {settings.packing}, at most {settings.micro_tokens} tokens in a forward pass")
    present, missing = _inputs(settings)
    folder, about_model, fault = _model(settings)
    present += [about_model] if about_model else []
    missing += [fault] if fault else []
    lines += [f"  {line}" for line in present]
    lines += [f"  MISSING: {line}" for line in missing]
    lines += _memory_lines(settings, folder, processes)
    lines.append("not ready: provide what is missing above" if missing else "ready")
    return "\n".join(lines), not missing


def _stage_lines(settings: RunConfig) -> list[str]:
    lines = []
    late = settings.distill
    for stage, steps, batch in (
        ("sft", settings.sft.steps, settings.sft.batch_size),
        ("warm_up", settings.discriminator.warm_up_steps, late.batch_size),
        ("distill", late.steps, late.batch_size),
        ("control", late.steps, late.batch_size),
    ):
        if stage not in settings.stages:
            continue
        what = f"{steps} steps of {batch} questions"
        if stage in ("warm_up", "distill"):
            what += f", {settings.rollout.n} rollouts each of at most {settings.rollout.max_new_tokens} tokens"
        lines.append(f"  {stage}: {what}")
    if "distill" in settings.stages:
        rewarded_by = "with a discriminator" if uses_discriminator(settings) else "without a discriminator"
        lines.append(f"  reward {rewarded_by}, K={settings.teacher.responses}, tau={settings.teacher.min_quality}")
    return lines


def _inputs(settings: RunConfig) -> tuple[list[str], list[str]]:
    """Return lines about the questions and answers that were read, and lines about missing inputs."""
    present, missing = [], []
    made = settings.made.enabled
    named = {"train": settings.data.train, "heldout": settings.data.heldout, "pool": settings.teacher.pool}
    for role, key, expected in (
        ("train", "data.train", "a JSONL file with questions"),
        ("heldout", "data.heldout", ""),
        ("pool", "teacher.pool", "a JSONL file with teacher answers"),
    ):
        if named[role] and not os.path.isfile(named[role]):
            missing.append(f"{key}: {os.path.abspath(named[role])}")
        elif not named[role] and made:
            present.append(f"{key}: made by the run{', simulated' if role == 'pool' else ''}")
        elif not named[role]:
            (missing if expected else present).append(
                f"{key}: " + (f"expected {expected}" if expected else "no evaluation")
            )
    files = {role: path for role, path in named.items() if path and os.path.isfile(path)}
    if files:
        inputs = read_inputs(settings, files, dict.fromkeys(files, settings.data.media_root))
        present += inputs.summary.text().splitlines()
        media = {path for q in (*inputs.train, *inputs.heldout) for path in (*q.videos, *q.images)}
        absent = sorted(path for path in media if not os.path.exists(path))
        if media:
            gone = f", {len(absent):,} of them missing, first {absent[0]}" if absent else ""
            present.append(f"media: {counted(len(media), 'file')}{gone} (not opened yet)")
    if settings.data.decoder == "cuda" and not torch.cuda.is_available():
        missing.append("data.decoder=cuda: a CUDA device")
    return present, missing


def _model(settings: RunConfig) -> tuple[Path | None, str, str]:
    """Return the model's folder if it is local, a line that describes it, and a problem; both texts may be empty."""
    path = settings.model.path
    if not path:
        made = settings.made.enabled
        return (
            None,
            "model.path: a tiny student made by the run" if made else "",
            "" if made else "model.path: expected a model folder or a Hub name",
        )
    try:
        folder = find_folder(path)
        if folder is None:
            where = "not a local folder; if it is a Hub name, the run downloads it from the Hub"
            return None, f"model.path: {path}, {where}", ""
        opening = open_folder(folder).response_opening
    except ModelError as error:
        return None, "", str(error)
    opened = ", its prompts end with <think>" if opening else ""
    return folder, f"model.path: {path}{opened}", ""


def _memory_lines(settings: RunConfig, folder: Path | None, processes: int) -> list[str]:
    """Return a line with the memory of the models' states per process, without activations."""
    if folder is None:
        return []
    total, vision = count_parameters(json.loads((folder / "config.json").read_text()))
    trained = total if settings.distill.train_vision or settings.sft.train_vision else total - vision
    width = 2 if settings.model.dtype == "bfloat16" else 4
    zero = settings.runtime.zero_stage
    engines = 1 + uses_discriminator(settings)
    weights = total * width / (processes if zero == 3 else 1)
    gradients = trained * 4 / (processes if zero >= 2 else 1)
    optimizer = trained * (12 if width == 2 else 8) / (processes if zero >= 1 else 1)
    host = " (optimizer states in host memory)" if settings.runtime.offload_optimizer else ""
    reference = total * width if uses_reference(settings) else 0
    states = engines * (weights + gradients + (0 if host else optimizer)) + reference
    models = counted(engines, "trained model")
    return [
        f"  memory per process, estimated: {states / GIB:.1f} GiB for {models} of {total / 1e6:.1f}M "
        f"parameters{' and the reference' if reference else ''}{host}; activations not included"
    ]


def count_parameters(config: dict) -> tuple[int, int]:
    """Count the parameters of a Qwen3-VL configuration, and of its vision tower alone, without allocating weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return total, sum(p.numel() for p in model.model.visual.parameters())
