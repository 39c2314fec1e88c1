"""What a run would do, for `--dry-run`: inputs, steps and an estimate of memory, without training anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.data.records import load_questions
from rmsd_fast.settings import uses_discriminator, uses_reference
from rmsd_fast.stages.material import check_usable
from rmsd_fast.teacher.pool import check_pool, load_pool

GIB = 2**30


def describe_plan(settings: RunConfig) -> str:
    """Steps, inputs and memory as text. Inputs that are there are read and checked; those that are missing are listed.

    Raises:
        DataError, ValueError: an input is there and damaged, or the pool belongs to other questions.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    lines = [
        f"run {settings.name}: settings are consistent; {processes} process(es), ZeRO-{settings.runtime.zero_stage}"
    ]
    lines += _stage_lines(settings, processes)
    if "sft" in settings.stages or settings.distill.objective == "sft":
        lines.append(f"  imitated responses: {settings.sft.responses}")
    data = settings.data
    kept = f"{data.cache_mib} MiB of frames and {data.embedding_cache_mib} MiB of embeddings per process"
    kept += f", {data.disk_cache_gib:g} GiB in {data.disk_cache}" if data.disk_cache else ""
    lines.append(f"  media: {data.decoder} decoder, {data.decode_threads} threads, {data.decode_ahead} step(s) ahead")
    lines.append(f"  media kept: {kept}")
    frames = f"{settings.video.num_frames} frames" if settings.video.num_frames else f"{settings.video.fps:g} frames/s"
    later = settings.evaluate.num_frames
    lines.append(f"  videos: {frames}" + (f", {later} frames in evaluation" if later else ""))
    lines.append(f"  prompts {settings.packing}, at most {settings.micro_tokens} tokens in a forward pass")
    found, missing = _inputs(settings)
    lines += [f"  {line}" for line in found]
    lines += [f"  NOT THERE YET: {line}" for line in missing]
    lines += _memory_lines(settings, processes)
    lines.append("not ready: give what is missing above" if missing else "ready")
    return "\n".join(lines)


def _stage_lines(settings: RunConfig, processes: int) -> list[str]:
    lines = []
    late = settings.distill
    for stage, steps, batch in (
        ("sft", settings.sft.steps, settings.sft.batch_size),
        ("warm_up", settings.discriminator.warm_up_steps, late.batch_size),
        ("distill", late.steps, late.batch_size),
    ):
        if stage not in settings.stages:
            continue
        if batch % processes:
            raise SettingsError(
                f"batch_size of stage {stage}: expected a multiple of {processes} (processes), got {batch}"
            )
        what = f"{steps} steps of {batch} questions"
        if stage != "sft" and late.objective == "policy":
            what += f", {settings.rollout.n} rollouts each of at most {settings.rollout.max_new_tokens} tokens"
        lines.append(f"  {stage}: {what}")
    if "distill" in settings.stages and late.objective == "policy":
        judge = "with a discriminator" if uses_discriminator(settings) else "without a discriminator"
        lines.append(f"  reward {judge}, K={settings.teacher.responses}, tau={settings.teacher.min_quality}")
    return lines


def _inputs(settings: RunConfig) -> tuple[list[str], list[str]]:
    found, missing = [], []
    made = settings.made.enabled
    root = settings.data.media_root or None
    questions = pool = None
    for key, path in (("data.train", settings.data.train), ("data.heldout", settings.data.heldout)):
        if not path:
            text = "made by the run" if made else "not given, no evaluation" if key == "data.heldout" else ""
            (found if text else missing).append(f"{key}: {text or 'expected a JSONL file with questions'}")
        elif not Path(path).is_file():
            missing.append(f"{key}: {path}")
        else:
            read = load_questions(path, media_root=root, format=settings.data.format)
            questions = read if key == "data.train" else questions
            absent = sorted({p for q in read for p in (*q.videos, *q.images) if not Path(p).exists()})
            missing_media = f", {len(absent)} media files missing, first {absent[0]}" if absent else ""
            missing_media += " (media are not opened)"
            found.append(f"{key}: {len(read)} questions{missing_media}")
    if not settings.teacher.pool:
        (found if made else missing).append(
            "teacher.pool: " + ("made by the run, simulated" if made else "expected JSONL")
        )
    elif not Path(settings.teacher.pool).is_file():
        missing.append(f"teacher.pool: {settings.teacher.pool}")
    else:
        pool = load_pool(settings.teacher.pool)
        found.append(f"teacher.pool: {sum(map(len, pool.values()))} responses to {len(pool)} questions")
    if pool is not None and questions is not None:
        check_pool(pool, questions)
        check_usable(pool, questions, settings)
    if settings.data.decoder == "cuda" and not torch.cuda.is_available():
        missing.append("data.decoder=cuda: a CUDA device")
    if not settings.model.path:
        (found if made else missing).append(
            "model.path: " + ("a tiny student made by the run" if made else "expected one")
        )
    elif not (Path(settings.model.path) / "config.json").is_file():
        missing.append(
            f"model.path: {settings.model.path} is no local directory; it is fetched from the hub if it can be"
        )
    else:
        found.append(f"model.path: {settings.model.path}")
    return found, missing


def _memory_lines(settings: RunConfig, processes: int) -> list[str]:
    """States of the models per process; activations come on top."""
    path = Path(settings.model.path) / "config.json"
    if not settings.model.path or not path.is_file():
        return []
    total, vision = count_parameters(json.loads(path.read_text()))
    trained = total if settings.distill.train_vision or settings.sft.train_vision else total - vision
    width = 2 if settings.model.dtype == "bfloat16" else 4
    zero = settings.runtime.zero_stage
    engines = 1 + uses_discriminator(settings)
    weights = total * width / (processes if zero == 3 else 1)
    gradients = trained * 4 / (processes if zero >= 2 else 1)
    optimizer = trained * (12 if width == 2 else 8) / (processes if zero >= 1 else 1)
    host = " (optimiser states in host memory)" if settings.runtime.offload_optimizer else ""
    reference = total * width if uses_reference(settings) else 0
    states = engines * (weights + gradients + (0 if host else optimizer)) + reference
    return [
        f"  memory per process, estimated: {states / GIB:.1f} GiB for {engines} trained model(s) of {total / 1e6:.1f}M "
        f"parameters{' and the reference' if reference else ''}{host}; activations come on top"
    ]


def count_parameters(config: dict) -> tuple[int, int]:
    """Parameters of a Qwen3-VL configuration, and of its vision tower alone, without making the weights."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config))
    total = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    return total, sum(p.numel() for p in model.model.visual.parameters())
