"""Examine a recipe on this machine: packages, devices, inputs, prompts, videos, log-probs, and seconds per step.

Nothing is written except generated material. Every check is a `Finding`, and a check that depends on a failed one is
skipped.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from rmsd_fast.config import RunConfig, SettingsError, UserError, first_line
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import PromptError
from rmsd_fast.models.folders import resolve_folder
from rmsd_fast.rollout.vllm_process import PACKAGES as VLLM_PACKAGES
from rmsd_fast.runtime.engine import release_memory
from rmsd_fast.runtime.process_group import World, global_max, global_sum, on_main
from rmsd_fast.setting_rules.uses import makes_rollouts, uses_servers
from rmsd_fast.stages.build import build_distillation, build_imitation
from rmsd_fast.stages.evaluation_forecast import duration
from rmsd_fast.stages.findings import Finding, Sample, Show
from rmsd_fast.stages.material import Material, losses_of, prepare_material
from rmsd_fast.stages.memory import GIB, OPTIMIZER, WEIGHTS, plan_memory
from rmsd_fast.stages.memory_advice import check_memory
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.protocol import version_of
from rmsd_fast.stages.rollout_checks import after_update, examine_rollouts
from rmsd_fast.stages.rollout_servers import check_servers
from rmsd_fast.stages.run_facts import RUN_PACKAGES
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_times import time_distillation, time_evaluation, time_imitation


def examine(settings: RunConfig, world: World, questions: int | None, show: Show) -> None:
    """Make all checks, in order. All processes call it together, and each gets the same findings.

    Args:
        settings: settings of the recipe.
        world: this process in the run.
        questions: number of questions per process; None = those of a batch of rollouts, or of a step if they are fewer.
        show: called with each finding.
    Raises:
        SettingsError: the recipe replays rollouts.
    """
    if settings.rollout.engine == "replay":
        raise SettingsError(
            "rollout.engine: expected an engine that samples rollouts, which the doctor compares with the trainer, got "
            "replay; set rollout.engine=hf and leave out rollout.replay"
        )
    # A difference of log-probs is a finding here, and must not end the examination.
    settings = copy.deepcopy(settings)
    settings.rollout.parity_every = 0
    show(_packages())
    show(_device(settings, world))
    ready = _plan(settings, world)
    show(ready)
    if ready.status == "fault":
        show(Finding("the rest", "skipped", "the plan has a fault"))
        return
    material = prepare_material(settings, world)
    if uses_servers(settings):
        servers = _servers(settings, world, material)
        show(servers)
        if servers.status == "fault":
            show(Finding("the rest", "skipped", "a rollout server cannot be used"))
            return
    memory = _memory(settings, world, material)
    show(memory)
    show(_disk(settings, int(memory.numbers["states_bytes"] or 0)))
    if memory.status == "fault":
        show(Finding("the rest", "skipped", "it would run out of memory"))
        return
    with MediaReader(settings.data, world.device) as media:
        show(_decoder(media))
        count = questions or min(settings.rollout.prompts_per_batch, settings.distill.batch_size // world.size)
        _examine_training(settings, world, material, media, count, show)


def _servers(settings: RunConfig, world: World, material: Material) -> Finding:
    """Return whether the rollout servers answer, fit the recipe and serve no other run."""

    def check() -> Finding:
        try:
            return Finding("servers", "ok", "\n".join(check_servers(settings, material.model_path)))
        except UserError as error:
            return Finding("servers", "fault", str(error))

    return on_main(world, check)


def _packages() -> Finding:
    versions = {name: version_of(name) for name in (*RUN_PACKAGES, "flash-attn")}
    # vLLM's builds for GPUs and CPUs are different packages.
    vllm = [version_of(name) for name in VLLM_PACKAGES if version_of(name) != "not installed"]
    versions["vllm"] = vllm[0] if vllm else "not installed"
    there = ", ".join(f"{name} {version}" for name, version in versions.items() if version != "not installed")
    missing = [name for name, version in versions.items() if version == "not installed"]
    text = f"Python {platform.python_version()}, {there}"
    return Finding(
        "packages", "ok", text + (f"\nnot installed: {', '.join(missing)} (optional)" if missing else ""), versions
    )


def _device(settings: RunConfig, world: World) -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    host = f"{counted(os.cpu_count() or 1, 'core')}, {memory / 2**30:.0f} GiB of memory"
    heads = f"fused losses: {losses_of(settings, world)}"
    if world.device.type != "cuda":
        return Finding(
            "device",
            "ok",
            f"CPU, {host}; {counted(world.size, 'process', 'processes')}, {heads}",
            {"processes": world.size, "cores": os.cpu_count(), "memory_bytes": memory},
        )
    properties = torch.cuda.get_device_properties(world.device)
    capability = f"{properties.major}.{properties.minor}"
    text = (
        f"{world.size} x {properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB "
        f"each, CUDA {torch.version.cuda}; {host}; {heads}"
    )
    numbers = {"processes": world.size, "cores": os.cpu_count(), "memory_bytes": memory}
    numbers |= {"gpu": properties.name, "capability": capability, "gpu_bytes": properties.total_memory}
    return Finding("device", "ok", text, numbers)


def _disk(settings: RunConfig, states: int) -> Finding:
    """Check the disk of the run folder. `states` is the size of weights and optimizer states, roughly a checkpoint."""
    folder = Path(settings.output).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"output={settings.output}: {folder} cannot be written ({error.strerror}); choose another folder"
        return Finding("disk", "fault", text)
    free = shutil.disk_usage(folder).free
    text = f"{free / GIB:.0f} GiB free for {settings.output}, and a checkpoint takes about {states / GIB:.2g} GiB"
    numbers = {"free_bytes": free, "checkpoint_bytes": states}
    # The former checkpoint is deleted after the next one is written, and exports take weights too.
    if free < 3 * states:
        return Finding("disk", "warning", f"{text}; a run needs two checkpoints and its exports at once", numbers)
    return Finding("disk", "ok", text, numbers)


def _plan(settings: RunConfig, world: World) -> Finding:
    """Return the plan of the dry run: inputs, steps and memory."""

    def plan() -> tuple[str, bool]:
        try:
            return describe_plan(settings)
        except UserError as error:
            return str(error), False

    text, ready = on_main(world, plan)
    # The memory of a generated student is planned in the next check.
    lines = [line for line in text.splitlines() if not line.startswith("  memory: planned when the run starts")]
    return Finding("plan", "ok" if ready else "fault", "\n".join(lines))


def _decoder(media: MediaReader) -> Finding:
    text = f"videos are decoded on {media.decoder}"
    text += f": {media.decoder_reason}" if media.decoder_reason else ""
    status = "warning" if media.decoder_reason else "ok"
    try:
        import torchcodec
    # A missing FFmpeg is a RuntimeError. Recipes with images alone need neither.
    except (ImportError, RuntimeError, OSError) as error:
        return Finding("decoder", "warning", f"{text}; torchcodec cannot be loaded ({first_line(error)})")
    ffmpeg = getattr(torchcodec, "ffmpeg_major_version", None)
    return Finding("decoder", status, f"{text}; FFmpeg {ffmpeg}" if ffmpeg else text, {"ffmpeg": ffmpeg})


def _memory(settings: RunConfig, world: World, material: Material) -> Finding:
    """Return the memory plan of the model, which the dry run may not have had yet."""
    config = json.loads((resolve_folder(material.model_path) / "config.json").read_text())
    sizes = {"processes": world.size}

    def plan() -> Finding:
        found = plan_memory(settings, config, **sizes, device=world.device.type)
        text = "\n".join(["planned for the longest prompts and responses", *found.table()])
        states = max(stage.parts.get(WEIGHTS, 0) + stage.parts.get(OPTIMIZER, 0) for stage in found.stages.values())
        numbers = {"planned_bytes": found.total, "states_bytes": world.size * states}
        for name, stage in found.stages.items():
            numbers |= {f"{name}_{part.replace(' ', '_')}_bytes": size for part, size in stage.parts.items()}
        try:
            lines = check_memory(settings, config, **sizes, device=world.device)
        except SettingsError as error:
            # `runtime.check_memory=false` starts a run whose plan does not fit.
            status = "fault" if settings.runtime.check_memory else "warning"
            return Finding("memory", status, f"{error}\n{text}", numbers)
        return Finding("memory", "ok", "\n".join([text, *lines]), numbers)

    return on_main(world, plan)


def _examine_training(
    settings: RunConfig, world: World, material: Material, media: MediaReader, count: int, show: Show
) -> None:
    hours: dict[str, float] = {}

    def show_time(finding: Finding) -> None:
        hours[finding.name] = float(finding.numbers["hours"] or 0)
        show(finding)

    sample = None
    if {"sft", "control"} & set(settings.stages):
        state = build_imitation(material.model_path, settings, world, material, media, stage="sft")
        sample, finding = _sample(state, material, count)
        show(finding)
        if sample:
            show_time(time_imitation(state, sample))
            if not makes_rollouts(settings):
                show_time(time_evaluation(state, material, media))
        state.policy.close()
        del state
        release_memory()
        if sample is None:
            return
    if makes_rollouts(settings):
        state = build_distillation(material.model_path, settings, world, material, media)
        with closing(state.rollouts):
            if sample is None:
                sample, finding = _sample(state, material, count)
                show(finding)
            if sample:
                examine_rollouts(state, sample, show)
                show_time(time_distillation(state, sample))
                show_time(time_evaluation(state, material, media))
                show(after_update(state, sample))
        state.policy.close()
        if state.discriminator is not None:
            state.discriminator.close()
    if stages_timed := [name for name in ("imitation", "stage 2") if name in hours and hours[name] == 0]:
        show(Finding("whole run", "skipped", f"{', '.join(stages_timed)} could not be timed"))
    elif hours:
        parts = ", ".join(f"{name} {duration(of_part)}" for name, of_part in hours.items())
        total = sum(hours.values())
        show(Finding("whole run", "ok", f"about {duration(total)}: {parts}", {"hours": total}))


def _sample(state: StageState, material: Material, count: int) -> tuple[Sample | None, Finding]:
    """Build the prompts of some training questions with a usable teacher answer, spread over the file."""
    world, data = state.world, state.settings.data
    wanted = [question for question in material.train if state.targets[question.id].imitate]
    share = wanted[:: max(1, len(wanted) // (4 * count * world.size))][world.rank :: world.size]
    prompts, faults = [], []
    began = time.perf_counter()
    for question in share:
        if len(prompts) == count:
            break
        try:
            prompts.append(state.builder.build(question, max_tokens=data.max_prompt_tokens))
        except (MediaError, PromptError) as error:
            faults.append(str(error))
    spent = time.perf_counter() - began
    usable = -int(global_max({"prompts": -len(prompts)}, world)["prompts"])
    totals = global_sum({"bad": len(faults), "read": len(prompts) + len(faults), "seconds": spent}, world)
    if not usable:
        what = f": {faults[0]}" if faults else "; provide more questions"
        where = " on at least one process" if world.size > 1 else ""
        return None, Finding("prompts", "fault", f"no question could be read{where}{what}")
    prompts = prompts[:usable]
    seconds = totals["seconds"] / totals["read"]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    tokens = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else f"{max(lengths)}"
    text = f"{totals['read']:.0f} questions read, {tokens} tokens, {seconds:.2g} s each"
    if not any(prompt.media for prompt in prompts):
        text += ", without media"
    status = "ok"
    if totals["bad"]:
        first = f"; first: {faults[0]}" if faults else ""
        status, text = "warning", f"{text}; {totals['bad']:.0f} of them cannot be used{first}"
    # The rule by which a run ends.
    if totals["bad"] > data.max_bad_share * max(totals["read"], 50):
        status, text = "fault", f"{text}\na run accepts a share of data.max_bad_share={data.max_bad_share:g}"
    numbers = {
        "questions": int(totals["read"]),
        "unusable": int(totals["bad"]),
        "longest_tokens": max(lengths),
        "seconds_per_question": seconds,
    }
    return Sample(prompts, seconds), Finding("prompts", status, text, numbers)
