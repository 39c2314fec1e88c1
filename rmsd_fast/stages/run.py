"""Open a run with its inputs, logs and checkpoints, and run the training loop that every stage uses."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import STAGES, CheckpointError, RunConfig, SettingsError, UserError
from rmsd_fast.data.errors import counted
from rmsd_fast.data.loader import PromptLoader, TooManyBadSamples
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.records import Question
from rmsd_fast.files import write_text_atomic
from rmsd_fast.models.discriminator_folder import export_discriminator
from rmsd_fast.models.export import export_student, fill_export
from rmsd_fast.models.folders import model_digests
from rmsd_fast.models.liger import describe_liger
from rmsd_fast.models.students import Student
from rmsd_fast.rollout.vllm_process import check_vllm
from rmsd_fast.runtime.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.metrics import MetricsLog, PhaseTimer, peak_mib
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.runtime.process_group import World, all_gather_objects, any_rank, global_max, global_sum, on_main
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.runtime.term_weights import TermWeights
from rmsd_fast.setting_rules.uses import teaches, uses_vllm
from rmsd_fast.settings import settings_as_dict
from rmsd_fast.stages import held_out
from rmsd_fast.stages.material import Material, losses_of
from rmsd_fast.stages.protocol import version_of
from rmsd_fast.stages.rollout_log import log_rollouts, rollout_rows
from rmsd_fast.stages.run_folder import check_changes, digests_of_all_nodes, stage_steps, write_fingerprints
from rmsd_fast.stages.state import NonFiniteRun, StageState, StepResult, count_skipped, learning_rate
from rmsd_kernels import native

log = logging.getLogger("rmsd_fast")

LOGS = ("rollouts", "bad_media", "skipped")
# What a checkpoint contains, by name. The average has no learning rate.
Saved = Engine | MovingAverage | TermWeights
# A stage's step takes the state, this process's prompts, and the step within the stage, counted from 0.
Step = Callable[[StageState, list[Prompt], int], StepResult]
PACKAGES = (
    *("rmsd-fast", "torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "deepspeed"),
    "torchcodec",
)


@dataclass
class TrainingRun:
    """One run.

    Attributes:
        settings: settings of the run.
        world: this process in the run.
        folder: the run folder.
        material: checked inputs of the run.
        media: reader of the videos and images.
        metrics: log of the metrics.
        logs: `rollouts.jsonl`, `bad_media.jsonl` and `skipped.jsonl`, by name; empty except on the main process.
        stop: stop signal of the program.
        fingerprints: settings and hashes of all input files, including `stage1` once stage 1 is complete.
        checkpoint: the checkpoint that the run continues from; None for a new run.
        skipped: number of skipped steps.
        bad: number of samples that could not be used, or not with their `hints.media`.
        seen: number of samples so far.
        servers: a line about each rollout server at the start, with its version of vLLM.
        listed: (stage, question id) of the questions in `bad_media.jsonl`.
    """

    settings: RunConfig
    world: World
    folder: Path
    material: Material
    media: MediaReader
    metrics: MetricsLog
    logs: dict[str, JsonLines]
    stop: StopSignal
    fingerprints: dict
    checkpoint: Checkpoint | None = None
    skipped: int = 0
    bad: float = 0.0
    seen: float = 0.0
    servers: list[str] = field(default_factory=list)
    listed: set[tuple[str, str]] = field(default_factory=set)

    @property
    def stage1(self) -> str:
        """Folder of the stage-1 student, from which discriminator, reference and stage 2 start."""
        return str(self.folder / "stage1") if "sft" in self.settings.stages else self.material.model_path


def open_run(
    settings: RunConfig,
    world: World,
    folder: Path,
    material: Material,
    media: MediaReader,
    stop: StopSignal,
    *,
    resumed: bool,
    allow_changes: bool,
) -> TrainingRun:
    """Start a new run in its folder, or check and reopen an existing run.

    Args:
        settings: settings of the run.
        world: this process in the run.
        folder: the run folder.
        material: checked inputs of the run.
        media: reader of the videos and images.
        stop: stop signal of the program.
        resumed: whether the folder holds a run to continue.
        allow_changes: whether settings and inputs may differ from those of the run to continue.
    Raises:
        CheckpointError: the run differs from the run to continue, or none of its checkpoints can be loaded.
        SettingsError: a changed setting has no effect.
    """
    fingerprints = {"settings": settings_as_dict(settings), "files": digests_of_all_nodes(material, world)}
    checkpoint = None
    if resumed:
        checkpoint = find_checkpoint(folder, world=world)
        fingerprints = on_main(world, lambda: check_changes(settings, folder, checkpoint, fingerprints, allow_changes))
    saved = checkpoint.state if checkpoint else {}
    totals = {stage: stage_steps(settings, stage) for stage in settings.stages}
    metrics: MetricsLog | None = None
    logs: dict[str, JsonLines] = {}
    listed: set[tuple[str, str]] = set()

    def open_logs() -> None:
        nonlocal metrics
        write_fingerprints(folder, fingerprints)
        # These lines could not be written to disk before the checkpoint was saved.
        waiting = saved.get("waiting", {})
        metrics = MetricsLog(
            folder,
            world,
            resume_lines=saved.get("metrics_lines", 0),
            resume_waiting=waiting.get("metrics", ()),
            totals=totals,
            dtype=settings.model.dtype,
            trackers=settings.runtime.trackers,
            project=settings.name,
            config=fingerprints["settings"],
        )
        # Checkpoints of earlier versions do not count the lines of every log; logs without a count keep all lines.
        kept = saved.get("log_lines", {}) if checkpoint else dict.fromkeys(LOGS, 0)
        logs.update({name: JsonLines(folder / f"{name}.jsonl", kept.get(name), waiting.get(name, ())) for name in LOGS})
        listed.update((record.get("stage"), record.get("id")) for record in logs["bad_media"].records())

    # If the main process cannot open a file, the error ends all processes.
    on_main(world, open_logs)
    metrics = metrics or MetricsLog(folder, world, totals=totals)
    run = TrainingRun(
        settings, world, folder, material, media, metrics, logs, stop, fingerprints, checkpoint, listed=listed
    )
    if resumed and checkpoint is None:
        metrics.message("no checkpoint yet: the run starts from the beginning")
    if checkpoint:
        run.skipped, run.bad, run.seen = (checkpoint.state[name] for name in ("skipped", "bad", "seen"))
    left = [stage for stage in settings.stages if first_step(run, stage) < totals[stage]]
    if left:
        # Models take long to load, so a tracker that cannot start must end the run before.
        on_main(world, lambda: metrics.start(left[0]))
    return run


def close_logs(run: TrainingRun, *, failed: bool = False) -> None:
    """Close the log files of the run.

    Args:
        run: the run.
        failed: whether the run ends with an error, for the trackers.
    Raises:
        OSError: lines could not be written to a file; raised after all files are closed.
    """
    faults = []
    for close in (partial(run.metrics.close, failed=failed), *(file.close for file in run.logs.values())):
        try:
            close()
        except (OSError, UserError) as error:
            faults.append(error)
    if faults:
        raise faults[0]


def write_facts(run: TrainingRun, *, finished: bool) -> None:
    """Write `run.json`: time, hardware and versions of the run. A resumed run keeps its original start time."""
    path = run.folder / "run.json"
    facts = _facts(path)
    facts.pop("finished", None)
    facts |= {
        "recipe": run.settings.name,
        "world_size": run.world.size,
        "hardware": _hardware(run.world),
        "versions": {
            **{name: version_of(name) for name in PACKAGES},
            **({"vllm": check_vllm()} if uses_vllm(run.settings) else {}),
        },
        "decoder": run.media.decoder + (f" ({run.media.decoder_reason})" if run.media.decoder_reason else ""),
        "liger": describe_liger(run.settings.model.liger, run.world.device),
        "losses": _losses(run),
    }
    facts.pop("rollout_servers", None)
    if run.servers:
        facts["rollout_servers"] = run.servers
    if finished:
        facts["finished"] = _now()
    write_text_atomic(path, json.dumps(facts, indent=2) + "\n")


def _facts(path: Path) -> dict:
    """Read `run.json`. Only the start time is needed, so a damaged file is simply replaced."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return facts if isinstance(facts.get("started"), str) else {"started": _now()}
    except FileNotFoundError:
        return {"started": _now()}
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s: cannot be read (%s); the current time is recorded as the start of the run", path, error)
        return {"started": _now()}


def _losses(run: TrainingRun) -> str:
    """Return the implementation of the heads that `auto` resolves to, with a reason for the slow CPU fallback."""
    chosen = losses_of(run.settings, run.world)
    return f"torch ({native.why_not()})" if chosen == "torch" and not native.available() else chosen


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def _hardware(world: World) -> str:
    if world.device.type == "cuda":
        return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads per process"


def first_step(run: TrainingRun, stage: str) -> int:
    """Return the number of steps of a stage that the continued run has already done."""
    if run.checkpoint is None:
        return 0
    saved = run.checkpoint.state
    if STAGES.index(saved["stage"]) < STAGES.index(stage):
        return 0
    unfinished = saved["stage"] == stage and not saved.get("finished", False)
    return saved["step"] if unfinished else stage_steps(run.settings, stage)


def restore(run: TrainingRun, stages: tuple[str, ...], state: StageState, engines: dict[str, Saved]) -> None:
    """Load the checkpoint of the run to continue if it was written in one of these stages."""
    if run.checkpoint is not None and run.checkpoint.state["stage"] in stages:
        load_checkpoint(run.checkpoint, world=run.world, engines=engines)
        saved = run.checkpoint.state.get("processes", run.world.size)
        if saved != run.world.size:
            run.metrics.message(
                f"the checkpoint was saved by {counted(saved, 'process', 'processes')} and is continued by "
                f"{run.world.size}; later numbers equal those of an unchanged run up to rounding"
            )
        state.skipped_in_a_row = run.checkpoint.state["skipped_in_a_row"]
        state.accuracies = run.checkpoint.state.get("accuracies", [])


def open_loader(
    run: TrainingRun,
    state: StageState,
    stage: str,
    questions: list[Question],
    batch_size: int,
    *,
    imitates: bool = False,
) -> PromptLoader:
    """Return the loader of a stage. If the stage imitates, it replaces questions with nothing to imitate by others."""
    data, world = run.settings.data, run.world

    def is_wanted(question: Question) -> bool:
        return bool(state.targets[question.id].imitate) or not imitates

    if not any(map(is_wanted, questions)):
        raise SettingsError(
            f"stage {stage}: expected questions with a usable response, got none: the pool has no usable response for "
            f"any of {len(run.material.train)} questions that passes teacher.filter={run.settings.teacher.filter} with "
            f"teacher.min_quality={run.settings.teacher.min_quality:g}; check the pool with python -m rmsd_fast.pool "
            "check, or lower teacher.min_quality"
        )

    def shows_media(question: Question, step: int) -> bool:
        shown = any(hint.media for hint in state.hints.get(question.id, ()))
        return shown and stage == "distill" and teaches(run.settings, step)

    return PromptLoader(
        state.builder,
        questions,
        stage=stage,
        # The control draws the questions of stage 2 in the same order.
        order="distill" if stage == "control" else stage,
        seed=run.settings.seed,
        positions_per_step=batch_size,
        rank=world.rank,
        size=world.size,
        threads=data.decode_threads,
        ahead=data.decode_ahead,
        max_prompt_tokens=data.max_prompt_tokens,
        is_wanted=is_wanted,
        shows_media=shows_media,
    )


def run_steps(
    run: TrainingRun,
    stage: str,
    state: StageState,
    loader: PromptLoader,
    engines: dict[str, Saved],
    step: Step,
    rates: dict[str, Callable[[int], float]],
) -> None:
    """Run the training loop of a stage: data, learning rates, step, metrics, checkpoint.

    Args:
        run: the run.
        stage: name of the stage.
        state: state of the stage.
        loader: loader of the stage's prompts.
        engines: all engines, by name, which checkpoints contain.
        step: the stage's step.
        rates: learning rate as a function of the step, for each engine that this stage trains.
    Raises:
        Stopped: SIGTERM was received; the state is saved.
        NonFiniteRun: too many consecutive steps were skipped.
    """
    total = stage_steps(run.settings, stage)
    every = run.settings.checkpoint.every_steps
    first = first_step(run, stage)
    state.timer = PhaseTimer(run.world.device, run.metrics)
    run.metrics.begin(stage, total, first)
    run.media.take_counts()  # Discards the counts of the evaluation.
    try:
        with run.stop.deferred():
            for number in range(first, total):
                if held_out.is_due(run, stage, number):
                    held_out.evaluate_step(run, stage, number, state)
                state.timer.take()
                with state.timer("data"):
                    prompts = next_prompts(run, loader, number, total)
                for name, rate in rates.items():
                    engines[name].set_lr(rate(number))
                result = step(state, prompts, number)
                run.skipped += result.skipped
                if result.skipped:
                    _note_skipped(run, stage, number + 1, prompts)
                metrics = {**result.metrics, "lr": next(iter(rates.values()))(number), **_cost(run, state, result)}
                records = (
                    log_rollouts(
                        run.logs["rollouts"],
                        result.groups,
                        run.settings.rollout,
                        builder=state.builder,
                        stage=stage,
                        step=number + 1,
                        total=total,
                    )
                    if "rollouts" in run.logs
                    else []
                )
                run.metrics.log(stage, number + 1, metrics, rollout_rows(records))
                try:
                    count_skipped(state, result.skipped)
                except NonFiniteRun as error:
                    raise NonFiniteRun(f"{error}; {run.stop.advice}") from None
                finished = result.finished
                # The groups hold the frames of the step, which must be freed before the next step.
                del result
                stopping = any_rank(run.stop.asked, run.world)
                saved = False
                # A run that is stopped during an evaluation continues with it.
                due = (every and (number + 1) % every == 0) or held_out.is_due(run, stage, number + 1)
                if number + 1 == total or finished or stopping or due:
                    saved = save(run, stage, number + 1, state, engines, finished=finished)
                if stopping and not saved:
                    raise CheckpointError(f"stopped by SIGTERM; the last steps are not saved; {run.stop.advice}")
                if stopping:
                    raise run.stop.stopped(f"step {number + 1} of {stage} is saved", together=True)
                if finished:
                    if number + 1 < total:
                        run.metrics.message(f"{stage}: goal reached after {number + 1} of {total} steps")
                    break
    finally:
        loader.close()
    run.stop.check()
    if run.listed:
        run.metrics.message(
            f"{run.bad:.0f} of {run.seen:.0f} samples so far could not be used and were replaced, or lack hints.media; "
            f"{len({question_id for _, question_id in run.listed})} questions are listed in "
            f"{run.folder / 'bad_media.jsonl'}"
        )


def next_prompts(run: TrainingRun, loader: PromptLoader, number: int, total: int) -> list[Prompt]:
    """Return this process's prompts of a step. An error on one process, or too many bad samples, ends all processes."""
    prompts, fault = [], None
    try:
        prompts = loader.step(number, total)
    except UserError as error:
        fault = error
    counts = global_sum({"bad": len(loader.faults), "seen": len(prompts)}, run.world)
    if counts["bad"]:
        _note_bad(run, loader)
    listed = f"see {run.folder / 'bad_media.jsonl'}"
    if any_rank(fault is not None, run.world):
        if fault is not None and not isinstance(fault, TooManyBadSamples):
            raise fault
        raise TooManyBadSamples(f"{fault or 'another process could not load its samples'}; {listed}") from fault
    run.bad, run.seen = run.bad + counts["bad"], run.seen + counts["seen"]
    share = run.settings.data.max_bad_share
    if run.bad > share * max(run.seen, 50):
        raise TooManyBadSamples(
            f"{run.bad:.0f} of {run.seen:.0f} samples, or their hints.media, could not be used "
            f"(data.max_bad_share={share}); {listed}; repair the files or raise data.max_bad_share"
        )
    return prompts


def _note_bad(run: TrainingRun, loader: PromptLoader) -> None:
    """Log the questions that could not be used, or not with their hints, once per stage."""
    faults = [fault for part in all_gather_objects(loader.faults, run.world) for fault in part]
    for question_id, reason in faults if run.world.is_main else ():
        if (loader.stage, question_id) not in run.listed:
            if not run.listed:
                run.metrics.message(f"a bad sample ({question_id}: {reason})")
            run.listed.add((loader.stage, question_id))
            run.logs["bad_media"].append({"id": question_id, "stage": loader.stage, "reason": reason})


def _note_skipped(run: TrainingRun, stage: str, step: int, prompts: list[Prompt]) -> None:
    """Log the questions of a step whose loss or gradient was not finite."""
    ids = [i for part in all_gather_objects([prompt.question.id for prompt in prompts], run.world) for i in part]
    if run.world.is_main:
        run.logs["skipped"].append({"stage": stage, "step": step, "questions": ids})


def _cost(run: TrainingRun, state: StageState, result: StepResult) -> dict[str, float]:
    """Return time, rates, memory and error counts of a step."""
    cost = global_max(state.timer.take(), run.world)
    seconds, tokens, computed = (
        cost["seconds/step"],
        result.metrics["tokens"],
        result.metrics.get("tokens_computed"),
    )
    cost["rate/tokens_per_s"] = tokens / seconds
    if computed:
        cost["rate/computed_tokens_per_s"] = computed / seconds
        cost["rate/shared_prefix_ratio"] = tokens / computed
    return {
        **cost,
        "memory/peak_mib": peak_mib(run.world.device),
        "samples/bad": run.bad,
        "samples/skipped_steps": run.skipped,
        **{f"media/{name}": count for name, count in global_sum(run.media.take_counts(), run.world).items()},
    }


def save(
    run: TrainingRun,
    stage: str,
    step: int,
    state: StageState,
    engines: dict[str, Saved],
    *,
    finished: bool = False,
) -> bool:
    """Save a checkpoint that contains an export of the student. Return False if the disk is full or fails."""
    done = STAGES.index(stage)
    before = sum(stage_steps(run.settings, s) for s in STAGES[:done] if s in run.settings.stages)
    on_main(run.world, lambda: [file.sync() for file in (run.metrics, *run.logs.values())])
    with state.policy.full_weights():
        return save_checkpoint(
            run.folder,
            before + step,
            engines=engines,
            state={
                "stage": stage,
                "step": step,
                "processes": run.world.size,
                "finished": finished,
                "accuracies": state.accuracies,
                "skipped": run.skipped,
                "bad": run.bad,
                "seen": run.seen,
                "skipped_in_a_row": state.skipped_in_a_row,
                "metrics_lines": run.metrics.lines,
                "log_lines": {name: file.lines for name, file in run.logs.items()},
                "waiting": {name: file.waiting for name, file in {"metrics": run.metrics, **run.logs}.items()},
                "fingerprints": run.fingerprints,
            },
            writers={"export": lambda folder: fill_export(state.student, folder, **_origin(run, stage))},
            keep=run.settings.checkpoint.keep,
            world=run.world,
        )


def record_stage1(run: TrainingRun) -> None:
    """Record that `stage1/` is complete, with its hashes. Later checkpoints contain this record."""
    run.fingerprints["stage1"] = on_main(run.world, lambda: model_digests(run.folder / "stage1"))
    on_main(run.world, lambda: write_fingerprints(run.folder, run.fingerprints))


def forget_stage1(run: TrainingRun) -> None:
    """Remove the record of an earlier `stage1/`, because the following steps will write a new one."""
    if run.fingerprints.pop("stage1", None) is not None:
        on_main(run.world, lambda: write_fingerprints(run.folder, run.fingerprints))


def export(run: TrainingRun, student: Student, engine: Engine, folder: Path, stage: str) -> None:
    """Write the student in Hugging Face format. All processes wait until it is written."""
    with engine.full_weights():
        on_main(run.world, lambda: export_student(student, folder, **_origin(run, stage)))


def write_discriminator(run: TrainingRun, state: StageState) -> None:
    """Write the discriminator to `discriminator/`. All processes wait until it is written."""
    engine, folder, base = state.discriminator, run.folder / "discriminator", run.settings.model.path
    with engine.full_weights():
        on_main(run.world, lambda: export_discriminator(engine.module, state.student, folder, base_model=base))


def _origin(run: TrainingRun, stage: str) -> dict[str, Any]:
    """Return the arguments of an export that describe the training."""
    start = run.material.model_path if stage == "sft" else run.stage1
    return {
        "base_model": run.settings.model.path,
        "stage": stage,
        "video": run.settings.video,
        "adapter_base": start,
    }


def rate_of(stage_settings, *, steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, for `sft` or `distill` settings."""
    return lambda step: learning_rate(
        step,
        steps=steps,
        lr=stage_settings.lr,
        warmup_steps=stage_settings.warmup_steps,
        schedule=stage_settings.schedule,
    )
