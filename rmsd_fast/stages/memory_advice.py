"""Compare the memory plan of a run with the memory of its GPU, and name settings that would make it fit."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
import yaml

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.models.families import family_of
from rmsd_fast.models.pass_memory import complete_config
from rmsd_fast.rollout.vllm import check_length
from rmsd_fast.rollout.vllm_group import check_groups, check_split
from rmsd_fast.setting_rules.training import check_together
from rmsd_fast.setting_rules.uses import uses_discriminator, uses_vllm
from rmsd_fast.stages.memory import CONTEXT_BYTES, GIB, MemoryPlan, plan_memory

log = logging.getLogger("rmsd_fast")
# Advice for micro_tokens leaves room for teacher answers of so many tokens, whose lengths are not settings.
_TEACHER_TOKENS = 1024


def fit_lines(settings: RunConfig, config: dict[str, Any], plan: MemoryPlan, room: int, processes: int) -> list[str]:
    """Return lines that say whether a plan fits into `room` bytes and, if not, which settings would make it fit.

    The list is empty if it fits with at least a tenth to spare.

    Args:
        settings: settings of the plan.
        config: contents of the student's config.json.
        plan: the plan.
        room: bytes of the device.
        processes: number of processes.
    """
    planned = f"{plan.total / GIB:.1f} GiB of {room / GIB:.1f} GiB"
    if plan.total <= 0.9 * room:
        return []
    if plan.total <= room:
        return [f"memory: {planned} are planned; less than a tenth is left for fragments and longer peaks"]
    lines = [f"memory: expected at most {room / GIB:.1f} GiB per process, got a plan of {plan.total / GIB:.1f} GiB"]
    changes = [*_of_vllm(settings, config, processes), *_changes(settings)]
    alone = []
    for change in changes:
        total = _total(settings, config, plan.device, processes, change)
        if total is not None and total <= room:
            alone.append(f"set {' '.join(change)}, planned {total / GIB:.1f} GiB")
    if alone:
        return [*lines, *alone]
    together: tuple[str, ...] = ()
    best = plan.total
    # A single pass: each plan can take seconds, and all combinations would take minutes.
    for change in changes:
        keys = {setting.partition("=")[0] for setting in change}
        tried = (*(s for s in together if s.partition("=")[0] not in keys), *change)
        total = _total(settings, config, plan.device, processes, tried)
        if total is not None and total < best:
            together, best = tried, total
        if best <= room:
            return [*lines, f"set {' '.join(together)}, planned {best / GIB:.1f} GiB"]
    tail = f"the smallest plan found has {best / GIB:.1f} GiB, with {' '.join(together)}; " if together else ""
    return [*lines, f"{tail}use a smaller model, a larger GPU, or more GPUs"]


def _changes(settings: RunConfig) -> Iterator[tuple[str, ...]]:
    """Yield changes of settings that may lower the plan, cheapest first."""
    longest = settings.data.max_prompt_tokens + max(settings.rollout.max_new_tokens + 1, _TEACHER_TOKENS)
    if not settings.model.gradient_checkpointing:
        yield ("model.gradient_checkpointing=true",)
    prompts = settings.rollout.prompts_per_batch
    while prompts > 1:
        prompts //= 2
        yield (f"rollout.prompts_per_batch={prompts}",)
    tokens = settings.micro_tokens
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        yield (f"micro_tokens={tokens}",)
    if settings.data.decoder != "cpu":
        yield ("data.decoder=cpu",)
    for stage in (1, 2, 3):
        if stage > settings.runtime.zero_stage:
            yield (f"runtime.zero_stage={stage}",)
    if not settings.runtime.offload_optimizer:
        yield ("runtime.optimizer=adamw_8bit",)
        stage = max(2, settings.runtime.zero_stage)
        yield ("runtime.offload_optimizer=true", f"runtime.zero_stage={stage}")
    yield ("model.quantize=nf4",)
    if settings.model.adapter == "none":
        mode = ("discriminator.mode=shared",) if uses_discriminator(settings) else ()
        frozen = [f"{name}.train_vision=false" for name in ("sft", "distill") if getattr(settings, name).train_vision]
        stage = min(2, max(1, settings.runtime.zero_stage))
        yield ("model.adapter=lora", *mode, f"runtime.zero_stage={stage}", *frozen)


def _of_vllm(settings: RunConfig, config: dict[str, Any], processes: int) -> Iterator[tuple[str, ...]]:
    """Yield smaller caches of vLLM, and larger numbers of processes that can hold its copy of the model together."""
    if not uses_vllm(settings):
        return
    model, rollout = family_of(config).config_class(**complete_config(config)), settings.rollout
    max_tokens = settings.data.max_prompt_tokens + rollout.max_new_tokens
    cache = rollout.vllm_kv_cache_gib / 2
    while cache >= 0.25:
        try:
            check_length(
                model.text_config,
                dtype=settings.model.dtype,
                max_tokens=max_tokens,
                kv_cache_gib=cache,
                tensor_parallel=rollout.tensor_parallel,
            )
        except SettingsError:
            break
        yield (f"rollout.vllm_kv_cache_gib={cache:g}",)
        cache /= 2
    for size in range(settings.rollout.tensor_parallel + 1, processes + 1):
        try:
            check_groups(size, processes)
            check_split(model, size, processes)
        except SettingsError:
            continue
        yield (f"rollout.tensor_parallel={size}",)


def _total(
    settings: RunConfig, config: dict[str, Any], device: str, processes: int, change: tuple[str, ...]
) -> int | None:
    """Return the total of the plan with changed settings, or None if they conflict."""
    changed = copy.deepcopy(settings)
    for setting in change:
        key, _, value = setting.partition("=")
        section, _, name = key.rpartition(".")
        setattr(getattr(changed, section) if section else changed, name, yaml.safe_load(value))
    try:
        check_together(changed)
    except SettingsError:
        return None
    return plan_memory(changed, config, processes=processes, device=device).total


def device_room(device: torch.device) -> tuple[int, str]:
    """Return the bytes that this process can use of a CUDA device, and a text about how much of it is free.

    The process can use what is free, and its own context.
    """
    free, size = torch.cuda.mem_get_info(device)
    return free + CONTEXT_BYTES, f"{free / GIB:.1f} GiB of the GPU's {size / GIB:.1f} GiB are free"


def check_memory(settings: RunConfig, config: dict[str, Any], *, processes: int, device: torch.device) -> list[str]:
    """Return lines about the plan of a run that is about to start.

    Raises:
        SettingsError: the plan exceeds the memory of the CUDA device.
        ModelError: the family is not supported.
    """
    plan = plan_memory(settings, config, processes=processes, device=device.type)
    lines = [f"memory planned per process: {plan.total / GIB:.2f} GiB"]
    if device.type != "cuda":
        return lines
    room, free = device_room(device)
    if plan.total > room:
        planned = f"{plan.total / GIB:.1f} GiB exceeds {room / GIB:.1f} GiB"
        log.warning("memory: the plan of %s; looking for settings that fit", planned)
    exceeds, *advice = fit_lines(settings, config, plan, room, processes) or [""]
    if plan.total > room:
        start = "or set runtime.check_memory=false to start anyway"
        raise SettingsError("; ".join([f"{exceeds} ({free})", *advice, start]))
    return [*lines, exceeds] if exceeds else lines
