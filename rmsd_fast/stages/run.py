"""Open a run with its inputs, logs and checkpoints, and save what it has trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rmsd_fast.config import STAGES, RunConfig, UserError
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.models.discriminator_folder import export_discriminator
from rmsd_fast.models.export import export_student, fill_export
from rmsd_fast.models.folders import model_digests
from rmsd_fast.models.students import Student
from rmsd_fast.runtime.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.metrics import MetricsLog
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.runtime.process_group import World, on_main
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.runtime.term_weights import TermWeights
from rmsd_fast.settings import settings_as_dict
from rmsd_fast.stages.material import Material
from rmsd_fast.stages.run_folder import check_changes, digests_of_all_nodes, stage_steps, write_fingerprints
from rmsd_fast.stages.state import StageState

LOGS = ("rollouts", "bad_media", "skipped")
# What a checkpoint contains, by name. The average has no learning rate.
Saved = Engine | MovingAverage | TermWeights


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
