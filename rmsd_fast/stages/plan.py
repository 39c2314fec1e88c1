"""Describe what a run would do, for `--dry-run`: inputs, steps and memory, without training anything."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from rmsd_fast.config import ModelError, NotInstalled, RunConfig, SettingsError, UserError, first_line
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.files import file_digest
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import find_folder, open_folder
from rmsd_fast.models.pass_memory import complete_config
from rmsd_fast.models.teacher_folder import check_teacher
from rmsd_fast.rollout.vllm_group import check_groups, check_split
from rmsd_fast.runtime.trackers import missing_trackers
from rmsd_fast.setting_rules.evaluation import refuse_evaluation_only
from rmsd_fast.setting_rules.uses import (
    aligns_imitation,
    asks_judge,
    has_pool,
    imitates_in_stage2,
    loss_terms,
    quotes_pool,
    rewards_rollouts,
    shows_hints,
    stage_sizes,
    uses_discriminator,
    uses_other_teacher,
    uses_pool,
    uses_servers,
    uses_vllm,
)
from rmsd_fast.stages.hints import plan_hints
from rmsd_fast.stages.inputs import read_inputs
from rmsd_fast.stages.material import check_batches, check_model, check_packages
from rmsd_fast.stages.memory import GIB, plan_memory, teacher_config
from rmsd_fast.stages.memory_advice import device_room, fit_lines
from rmsd_fast.stages.rollout_dump import plan_rollout_files
from rmsd_fast.stages.rollout_servers import describe_servers


def describe_plan(settings: RunConfig, gpu_gib: float | None = None, resume: Path | None = None) -> tuple[str, bool]:
    """Return a text about steps, inputs and memory, and whether a run could start.

    Inputs that exist are read and checked; missing inputs are listed.

    Args:
        settings: settings of the run.
        gpu_gib: memory of the GPU to plan for, in GiB; None = the GPU of this machine, or its CPU.
        resume: folder of the run to continue; None for a new run.
    Raises:
        UserError: an existing input is damaged, the pool belongs to other questions, or the batches cannot be divided
            or the groups of `rollout.tensor_parallel` formed among the processes that torchrun has started.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Without torchrun, a dry run does not know the number of processes.
    launched = processes if "WORLD_SIZE" in os.environ else None
    refuse_evaluation_only(settings)
    check_batches(settings, processes)
    if uses_vllm(settings) and launched:
        check_groups(settings.rollout.tensor_parallel, launched)
    launch = "" if launched else " (start the dry run with torchrun to count processes)"
    lines = [
        f"run {settings.name}: settings are consistent; {counted(processes, 'process', 'processes')}{launch}, "
        f"ZeRO-{settings.runtime.zero_stage}"
    ]
    lines += _stage_lines(settings)
    if {"sft", "control"} & set(settings.stages):
        aligned = ", those of largest overlap with the student" if aligns_imitation(settings) else ""
        lines.append(f"  imitated responses: {settings.sft.responses}{aligned}")
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
    folder, about_model, fault = _model(settings, launched)
    present += [about_model] if about_model else []
    missing += [fault] if fault else []
    about_teacher, no_teacher = _other_teacher(settings, folder if not fault else None)
    present, missing = [*present, *about_teacher], [*missing, *no_teacher]
    train = settings.data.train
    about_dump, no_dump = plan_rollout_files(
        settings, folder, file_digest(train) if os.path.isfile(train) else "", resume
    )
    present, missing = [*present, *about_dump], [*missing, *no_dump]
    if uses_servers(settings) and folder is not None:
        try:
            present += describe_servers(settings, folder)
        except UserError as error:
            missing.append(str(error))
    if fault and folder is not None and uses_vllm(settings):
        # Without weights, the model was not checked, but its shape is known.
        missing += [text for text in [_fault_of_vllm(settings, folder, launched)] if text and text != fault]
    if gpu_gib is not None and folder is None:
        missing.append("--gpu-gib: a model.path whose config.json is here; without one, the memory is not planned")
    lines += [f"  {line}" for line in present]
    lines += [f"  MISSING: {line}" for line in missing]
    memory, too_large = [], []
    try:
        if folder is not None or not fault:
            memory, too_large = _memory_lines(settings, folder, processes, gpu_gib)
    except Exception as error:
        # A missing package is already listed.
        if isinstance(error, UserError) and not isinstance(error, NotInstalled) and not fault:
            raise
        memory = [f"memory: could not be planned ({type(error).__name__}: {first_line(error)})"]
    lines += [f"  {line}" for line in memory]
    lines += [f"  DOES NOT FIT: {too_large[0]}", *(f"    {line}" for line in too_large[1:])] if too_large else []
    faults = ["provide the missing inputs above"] if missing else []
    faults += ["change the settings above so that the run fits"] if too_large else []
    lines.append(f"not ready: {' and '.join(faults)}" if faults else "ready")
    return "\n".join(lines), not faults


def _stage_lines(settings: RunConfig) -> list[str]:
    lines = []
    for stage, (steps, batch) in stage_sizes(settings).items():
        what = f"{steps} steps of {batch} questions"
        if stage == "sft" and settings.sft.hinted_share:
            what += f", a share of {settings.sft.hinted_share:g} with hints ({', '.join(settings.self_teacher.views)})"
        if stage in ("control", "distill") and settings.evaluate.every_steps:
            what += f", evaluated every {settings.evaluate.every_steps} steps"
        if stage in ("warm_up", "distill"):
            read = " read from a dump" if settings.rollout.engine == "replay" else ""
            drawn = counted(settings.rollout.n, "rollout")
            what += f", {drawn}{read} each of at most {settings.rollout.max_new_tokens} tokens"
        lines.append(f"  {stage}: {what}")
    if "distill" in settings.stages:
        rewarded_by = "with a discriminator" if uses_discriminator(settings) else "without a discriminator"
        pool = f", K={settings.teacher.responses}, tau={settings.teacher.min_quality}" if has_pool(settings) else ""
        lines.append(f"  reward {rewarded_by}{pool}" if rewards_rollouts(settings) else "  no rewards")
        if imitates_in_stage2(settings):
            coef, selection = settings.distill.sft_coef, settings.teacher.selection
            lines.append(f"  imitates one best answer per question ({selection}), with weight {coef:g}")
        teacher, kd, credit = settings.self_teacher, settings.kd, settings.credit
        if credit.uncertainty != "none":
            terms = ", ".join(loss_terms(settings))
            lines.append(f"  learned weights of the terms {terms}, by {credit.uncertainty}")
        if teacher.kind != "none":
            told = f"told {', '.join(teacher.views)}; hints of at most {teacher.max_hint_tokens} tokens"
            told = told if teacher.views else "told nothing"
            until = f", for {teacher.until_step} steps" if teacher.until_step else ""
            lines.append(f"  self-teacher: {teacher.kind}{until}, {told}")
            if asks_judge(settings):
                requests = settings.distill.batch_size * settings.rollout.n
                lines.append(
                    f"  judge: {teacher.judge.model} at {teacher.judge.endpoint} (not asked yet), up to {requests:,} "
                    "requests in each step"
                )
        changed = [
            f"{section}.{name}={value}"
            for section, chosen in (("kd", kd), ("credit", credit))
            for name, value in vars(chosen).items()
            if value != getattr(type(chosen)(), name)
        ]
        lines += [f"  token credit: {', '.join(changed)}"] if changed else []
    return lines


def _inputs(settings: RunConfig) -> tuple[list[str], list[str]]:
    """Return lines about the questions and answers that were read, and lines about missing inputs."""
    present, missing = [], []
    made = settings.made.enabled
    named = {"train": settings.data.train, "heldout": settings.data.heldout, "pool": settings.teacher.pool}
    # Only a benchmark's annotation may be a folder.
    benchmark = settings.evaluate.benchmark
    files = {
        role: path
        for role, path in named.items()
        if os.path.isfile(path) or (role == "heldout" and benchmark and os.path.isdir(path))
    }
    for role, key, expected in (
        ("train", "data.train", "a JSONL file with questions"),
        ("heldout", "data.heldout", ""),
        ("pool", "teacher.pool", "a JSONL file with teacher answers" if uses_pool(settings) else ""),
    ):
        if named[role] and role not in files:
            missing.append(f"{key}: {os.path.abspath(named[role])}")
        elif not named[role] and made:
            present.append(f"{key}: generated by the run{', simulated' if role == 'pool' else ''}")
        elif not named[role]:
            unused = "no evaluation" if role == "heldout" else "none, and nothing needs one"
            (missing if expected else present).append(f"{key}: " + (f"expected {expected}" if expected else unused))
    if files:
        inputs = read_inputs(settings, files, dict.fromkeys(files, settings.data.media_root))
        present += inputs.summary.text().splitlines()
        # A missing pool is listed above, and the best answers come from it.
        if shows_hints(settings) and inputs.train and ("pool" in files or not quotes_pool(settings)):
            try:
                present.append(plan_hints(inputs, settings))
            except (SettingsError, DataError) as error:
                missing.append(str(error))
        media = {path for q in (*inputs.train, *inputs.heldout) for path in (*q.videos, *q.images)}
        absent = sorted(path for path in media if not os.path.exists(path))
        if media:
            gone = f", {len(absent):,} of them missing, first {absent[0]}" if absent else ""
            present.append(f"media: {counted(len(media), 'file')}{gone} (not opened yet)")
    if settings.data.decoder == "cuda" and not torch.cuda.is_available():
        missing.append("data.decoder=cuda: a CUDA device")
    missing += missing_trackers(settings.runtime.trackers)
    try:
        check_packages(settings, training=True)
    except NotInstalled as error:
        missing.append(str(error))
    return present, missing


def _model(settings: RunConfig, processes: int | None) -> tuple[Path | None, str, str]:
    """Return the model's folder, a line that describes it, and a problem; both texts may be empty.

    The folder is None if it is not local. If there is a problem, it is None unless config.json is there.
    """
    path = settings.model.path
    if not path:
        made = settings.made.enabled
        return (
            None,
            "model.path: a tiny student generated by the run" if made else "",
            "" if made else "model.path: expected a model folder or a Hub name",
        )
    folder = None
    try:
        folder = find_folder(path)
        if folder is None:
            where = "not a local folder; if it is a Hub name, the run downloads it from the Hub"
            return None, f"model.path: {path}, {where}", ""
        opening = check_model(folder, settings, training=True, processes=processes).response_opening
    except (ModelError, SettingsError) as error:
        # The plan of the memory needs no weights.
        return folder if folder and (folder / "config.json").is_file() else None, "", str(error)
    opened = ", its prompts end with <think>" if opening else ""
    return folder, f"model.path: {path}{opened}", ""


def _fault_of_vllm(settings: RunConfig, folder: Path, processes: int | None) -> str:
    """Return why vLLM cannot split a model whose config.json is in this folder, or ""."""
    try:
        config = complete_config(json.loads((folder / "config.json").read_text()))
        check_split(family_of(config).config_class(**config), settings.rollout.tensor_parallel, processes)
    except UserError as error:
        return str(error)
    return ""


def _other_teacher(settings: RunConfig, student: Path | None) -> tuple[list[str], list[str]]:
    """Return a line that describes the model of `self_teacher.path`, and its problem; both lists may be empty.

    Args:
        settings: settings of the run.
        student: folder of the student; None if it is not local or has a problem.
    """
    if not uses_other_teacher(settings):
        return [], []
    path = settings.self_teacher.path
    try:
        folder = find_folder(path, setting="self_teacher.path")
        if folder is None:
            where = "not a local folder; if it is a Hub name, the run downloads it from the Hub"
            return [f"self_teacher.path: {path}, {where}"], []
        model = open_folder(folder)
        if student is None:
            return [f"self_teacher.path: {path}, to be compared with the student when the run starts"], []
        check_teacher(model, open_folder(student), settings)
    except (ModelError, SettingsError) as error:
        return [], [str(error)]
    return [f"self_teacher.path: {path}"], []


def _memory_lines(
    settings: RunConfig, folder: Path | None, processes: int, gpu_gib: float | None
) -> tuple[list[str], list[str]]:
    """Return lines about the memory plan, and lines about why it does not fit. gpu_gib: see `describe_plan`."""
    if folder is None:
        path = settings.model.path
        if not path:
            return ["memory: planned when the run starts, after it has generated the student"], []
        return [
            f"memory: cannot be planned before {path} is downloaded; for the plan alone, run "
            f'hf download {path} --exclude "*.safetensors"'
        ], []
    if uses_other_teacher(settings) and not teacher_config(settings):
        path = settings.self_teacher.path
        return [f"memory: cannot be planned before {path} (self_teacher.path) is here with its config.json"], []
    config = json.loads((folder / "config.json").read_text())
    here = torch.cuda.is_available() and gpu_gib is None
    device = "cuda" if here or gpu_gib is not None else "cpu"
    plan = plan_memory(settings, config, processes=processes, device=device)
    room, free = device_room(torch.device("cuda")) if here else (int((gpu_gib or 0) * GIB), "")
    what = "GPU" if device == "cuda" else "process, on CPU"
    lines = [f"memory per {what}, planned for the longest prompts and responses:", *(f"  {r}" for r in plan.table())]
    if device == "cpu":
        return [*lines, "for a GPU that is not here, add --gpu-gib 24"], []
    found = fit_lines(settings, config, plan, room, processes)
    if plan.total > room:
        return lines, [f"{found[0]} ({free})" if free else found[0], *found[1:]]
    return [*lines, f"fits in {room / GIB:.1f} GiB", *found], []
