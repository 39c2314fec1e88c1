"""Run all stages in order, each followed by an evaluation, from the settings to the report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast.config import (
    STAGES,
    CheckpointError,
    DistillConfig,
    RunConfig,
    SettingsError,
    SftConfig,
    UserError,
    first_line,
)
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.records import Question
from rmsd_fast.files import write_text_atomic
from rmsd_fast.models.folders import resolve_folder
from rmsd_fast.report import ReportError, write_report
from rmsd_fast.runtime.engine import release_memory
from rmsd_fast.runtime.process_group import World, on_main
from rmsd_fast.runtime.stop_signal import Stopped, StopSignal
from rmsd_fast.setting_rules.uses import asks_judge, has_pool, shows_hints, uncertainty_lr_factor, uses_discriminator
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.build import build_distillation, build_imitation
from rmsd_fast.stages.held_out import evaluate
from rmsd_fast.stages.hints import plan_hints
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.memory_advice import check_memory
from rmsd_fast.stages.rollout_dump import begin_dump, check_replay_start, dump_folder
from rmsd_fast.stages.rollout_servers import check_servers
from rmsd_fast.stages.run import (
    Saved,
    TrainingRun,
    close_logs,
    export,
    first_step,
    forget_stage1,
    open_run,
    record_stage1,
    restore,
    write_discriminator,
)
from rmsd_fast.stages.run_facts import write_facts
from rmsd_fast.stages.run_folder import run_folder
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.training_loop import Step, next_prompts, open_loader, rate_of, run_steps

if TYPE_CHECKING:
    from rmsd_fast.train_feedback import Feedback

log = logging.getLogger("rmsd_fast")
# Below this share of groups whose rollouts differ in content, the forecast warns.
LEAST_SIGNAL = 0.05


def train(
    settings: RunConfig, world: World, stop: StopSignal, resume: Path | None = None, allow_changes: bool = False
) -> Path:
    """Run all stages and return the run folder.

    Args:
        settings: settings of the run.
        world: this process in the run.
        stop: stop signal of the program.
        resume: folder of the run to continue; None for a new run.
        allow_changes: whether settings and inputs may differ from those of the run to continue.
    """
    material = prepare_material(settings, world)
    notes = on_main(world, lambda: check_replay_start(settings, material, resume))
    servers = on_main(world, lambda: check_servers(settings, material.model_path))
    on_main(world, lambda: check_judge(settings))
    if shows_hints(settings):
        # Building the models and evaluating the first student takes long, so too few hints are reported before.
        on_main(world, lambda: bool(plan_hints(material, settings)))
    notes += on_main(world, lambda: _plan_memory(settings, material.model_path, world))
    with dump_folder(settings, world, resume), run_folder(settings, world, resume) as folder:
        stop.run_folder = folder
        on_main(world, lambda: check_judge(settings, folder))
        with MediaReader(settings.data, world.device) as media:
            resumed = resume is not None
            run = open_run(settings, world, folder, material, media, stop, resumed=resumed, allow_changes=allow_changes)
            run.servers = servers
            for line in (*servers, *notes):
                run.metrics.message(line)
            run_stages(run)
        on_main(world, lambda: finish(run))
        # A library may have converted an interrupt to an error, in which case no report was written.
        stop.check()
    return folder


def _plan_memory(settings: RunConfig, model_path: str, world: World) -> list[str]:
    """Return lines about the memory plan. Raise SettingsError if it exceeds the memory of the GPU."""
    if not settings.runtime.check_memory:
        return []
    config = json.loads((resolve_folder(model_path) / "config.json").read_text())
    try:
        return check_memory(settings, config, processes=world.size, device=world.device)
    except UserError:
        raise
    # A fault of the plan is no reason not to train.
    except Exception as error:
        log.warning("memory: not planned (%s: %s)", type(error).__name__, first_line(error))
        return []


def run_stages(run: TrainingRun) -> None:
    """Run every stage, each followed by its evaluation."""
    try:
        _run_stages(run)
    except BaseException as error:
        # The program ends with code 0 after these stops. Ctrl-C can lose steps, so the program ends with another code.
        stopped = isinstance(error, Stopped) and (error.together or run.world.size == 1)
        # Report the original error, not an error of closing the logs.
        with suppress(OSError, UserError):
            close_logs(run, failed=not stopped)
        raise
    on_main(run.world, lambda: close_logs(run))


def _run_stages(run: TrainingRun) -> None:
    settings = run.settings
    saved = run.checkpoint.state if run.checkpoint else None
    where = f", continuing after step {saved['step']} of {saved['stage']}" if saved else ""
    run.metrics.message(f"run folder: {run.folder}{where}")
    if run.media.decoder_reason:
        run.metrics.message(f"videos are decoded on the CPU: {run.media.decoder_reason}")
    on_main(run.world, lambda: describe_run(run))
    if asks_judge(settings):
        try_judge(run)
    evaluate(run, run.material.model_path, "untrained" if "sft" in settings.stages else "stage1")
    if "sft" in settings.stages:
        imitate(run)
        release_memory()
        evaluate(run, run.stage1, "stage1")
    if "control" in settings.stages:
        control(run)
        release_memory()
        evaluate(run, str(run.folder / "control"), "control")
    if set(settings.stages) & {"warm_up", "distill"}:
        distillation(run)
        release_memory()
        if "distill" in settings.stages:
            evaluate(run, str(run.folder / "export"), "stage2")


def finish(run: TrainingRun) -> None:
    """Write the report. The run is complete at this point, so a failure here is not an error of the run."""
    write_facts(run, finished=True)
    try:
        write_report(run.folder)
    except Exception as error:
        what = f"{error}" if isinstance(error, OSError | ReportError) else f"{type(error).__name__}: {error}"
        print(f"report not written: {what}\nwrite it with: python -m rmsd_fast.report {run.folder}", file=sys.stderr)


def imitate(run: TrainingRun) -> None:
    """Run stage 1: SFT on teacher responses. It ends by writing `stage1/`."""
    settings, final = run.settings, run.folder / "stage1"
    if first_step(run, "sft") == settings.sft.steps and "stage1" in run.fingerprints:
        return
    forget_stage1(run)
    if run.checkpoint is not None and run.checkpoint.state["stage"] != "sft":
        raise CheckpointError(f"{final} is missing, but the checkpoint is later than stage 1; restore the folder")
    state = build_imitation(run.material.model_path, settings, run.world, run.material, run.media, stage="sft")
    questions = [q for q in run.material.train if state.targets[q.id].imitate]
    _imitation_steps(run, state, "sft", settings.sft, questions, final)
    record_stage1(run)


def control(run: TrainingRun) -> None:
    """Run the control of stage 2: imitation with the same steps, batch size, learning rate and order of questions.

    It runs before stage 2, which can then be compared with it in time. It ends by writing `control/`.
    """
    final = run.folder / "control"
    if run.checkpoint is not None and STAGES.index(run.checkpoint.state["stage"]) > STAGES.index("control"):
        if "control" not in run.checkpoint.state["fingerprints"]["settings"]["stages"]:
            raise SettingsError(
                "stages: expected no control, since the run to continue is already past it, got one; start a new run "
                f"with stages=[control] model.path={run.stage1}"
            )
        if not on_main(run.world, final.is_dir):
            raise CheckpointError(
                f"{final} is missing, but the checkpoint is later than the control; restore the folder"
            )
        return
    state = build_imitation(run.stage1, run.settings, run.world, run.material, run.media, stage="control")
    _imitation_steps(run, state, "control", run.settings.distill, _late_questions(run, state), final)


def _imitation_steps(
    run: TrainingRun,
    state: StageState,
    stage: str,
    training: SftConfig | DistillConfig,
    questions: list[Question],
    final: Path,
) -> None:
    engines = {"policy": state.policy}
    restore(run, (stage,), state, engines)
    loader = open_loader(run, state, stage, questions, training.batch_size, imitates=True)
    rates = {"policy": rate_of(training, steps=training.steps)}
    run_steps(run, stage, state, loader, engines, sft.step, rates)
    export(run, state.student, state.policy, final, stage)
    state.policy.close()


def distillation(run: TrainingRun) -> None:
    """Run the discriminator warm-up and stage 2. It ends by writing `export/`, and `discriminator/` if asked to."""
    state = build_distillation(run.stage1, run.settings, run.world, run.material, run.media)
    with closing(state.rollouts), ask_judge(run, state):
        _distillation(run, state)


def check_judge(settings: RunConfig, folder: Path | None = None) -> None:
    """Check the settings of a judge of stage 2, and its replies so far. Its server is not asked yet.

    Args:
        settings: settings of the run.
        folder: the run folder, once it is locked, to check the judge's replies in it; None = check URL and key.
    Raises:
        SettingsError: the URL is malformed, or the key is missing.
        CheckpointError, JudgeError: the file of replies is damaged.
    """
    if not asks_judge(settings):
        return
    from rmsd_fast.train_feedback import check_replies, feedback_client

    if folder is None:
        feedback_client(settings.self_teacher.judge)
    else:
        check_replies(folder)


def try_judge(run: TrainingRun) -> None:
    """Ask the judge about one answer, so that a wrong URL, key or model is found before anything is trained.

    Raises:
        JudgeError: the judge does not answer.
    """
    question = run.material.train[0]
    with _feedback(run, trial=True) as feedback:
        # A continued run has the reply in its file.
        feedback([(question, f"<answer>{question.answer or ''}</answer>")] if run.world.is_main else [])


@contextmanager
def ask_judge(run: TrainingRun, state: StageState) -> Iterator[None]:
    """Let stage 2 ask the judge of `self_teacher.judge` inside the context, if there is one."""
    if not asks_judge(run.settings):
        yield
        return
    with _feedback(run) as feedback:
        state.judge = feedback
        yield


@contextmanager
def _feedback(run: TrainingRun, *, trial: bool = False) -> Iterator[Feedback]:
    """Open the judge's replies of a run inside the context."""
    from rmsd_fast.train_feedback import Feedback

    feedback = Feedback(run.settings.self_teacher.judge, run.folder, run.world, run.stop, trial=trial)
    try:
        yield feedback
    except BaseException:
        # Report the original error, not an error of closing the file.
        with suppress(OSError):
            feedback.close()
        raise
    on_main(run.world, feedback.close)


def _distillation(run: TrainingRun, state: StageState) -> None:
    settings = run.settings
    engines: dict[str, Saved] = {"policy": state.policy}
    if state.discriminator is not None:
        engines["discriminator"] = state.discriminator
    if state.average is not None:
        engines["self_teacher"] = state.average
    if state.term_weights is not None:
        engines["term_weights"] = state.term_weights
    restore(run, ("warm_up", "distill"), state, engines)
    first = first_step(run, "warm_up") if "warm_up" in settings.stages else 0
    first += first_step(run, "distill") if "distill" in settings.stages else 0
    state.dump = begin_dump(settings, run.world, run.folder, run.fingerprints, run.stage1, first)
    _forecast(run, state)
    if "warm_up" in settings.stages:
        _adversarial_steps(run, state, engines, "warm_up", distill.warm_up_step)
    if "distill" in settings.stages:
        _adversarial_steps(run, state, engines, "distill", distill.step)
        export(run, state.student, state.policy, run.folder / "export", "distill")
    if settings.discriminator.export:
        write_discriminator(run, state)
    for engine in engines.values():
        engine.close()


def _adversarial_steps(run: TrainingRun, state: StageState, engines: dict[str, Saved], stage: str, step: Step) -> None:
    settings = run.settings
    lr = settings.discriminator.warm_up_lr if stage == "warm_up" else settings.discriminator.lr
    rates = {"discriminator": lambda _: lr}
    if stage == "distill":
        rate = rate_of(settings.distill, steps=settings.distill.steps)
        rates = {"policy": rate, **rates}
        if state.term_weights is not None:
            factor = uncertainty_lr_factor(settings)
            rates["term_weights"] = lambda number: factor * rate(number)
    rates = {name: rate for name, rate in rates.items() if name in engines}
    loader = open_loader(run, state, stage, _late_questions(run, state), settings.distill.batch_size)
    run_steps(run, stage, state, loader, engines, step, rates)


def _forecast(run: TrainingRun, state: StageState) -> None:
    """Print what stage 2 can gain, and write it to `forecast.json`, before any step of warm-up and stage 2."""
    first = next(stage for stage in run.settings.stages if stage in ("warm_up", "distill"))
    path = run.folder / "forecast.json"
    if not has_pool(run.settings) or on_main(run.world, path.exists) or first_step(run, first):
        return
    loader = open_loader(run, state, first, _late_questions(run, state), run.settings.distill.batch_size)
    seen = run.bad, run.seen
    try:
        metrics = distill.forecast(state, next_prompts(run, loader, 0, 1))
    finally:
        loader.close()
    # The first step counts the same samples.
    run.bad, run.seen = seen
    if metrics is None:
        run.metrics.message("forecast: impossible, since the student's logits are not finite")
        return
    on_main(run.world, lambda: write_text_atomic(path, json.dumps(metrics, indent=2) + "\n"))
    for line in describe_forecast(metrics, run.settings):
        run.metrics.message(line)


def describe_forecast(metrics: dict[str, float | None], settings: RunConfig) -> list[str]:
    """Return lines that show what stage 2 can gain on closed questions, with a warning if there is no gain."""
    student, target = metrics["rollout/quality"], metrics["teacher/target_quality"]
    if student is None:
        return ["forecast: none, since no question of the first step has both ground truth and a teacher answer"]
    best, signal = metrics["teacher/best_quality"], metrics["rollout/signal_share"]
    judged = uses_discriminator(settings)
    led = f"; the discriminator leads to {target:.3f}" if judged else ""
    lines = [
        "forecast for closed questions, from the rollouts of one batch: the student has a quality of "
        f"{student:.3f}{led}, best answer of K {best:.3f}; {signal:.0%} of the groups differ in content"
    ]
    if judged and target <= student:
        lines.append(
            "WARNING: the teacher answers that the discriminator is trained toward are not better than the rollouts. "
            "Raise teacher.weight_power or teacher.min_quality, or lower reward.alpha"
        )
    if signal < LEAST_SIGNAL and settings.reward.delta > 0:
        lines.append(
            "WARNING: almost no group differs in content, so the content reward teaches nothing. Raise "
            "rollout.temperature or rollout.n, or use harder questions"
        )
    return lines


def _late_questions(run: TrainingRun, state: StageState) -> list[Question]:
    """Return the questions of warm-up and stage 2. The control has the same list, so its prompts are the same."""
    if run.settings.teacher.empty_pools == "keep":
        return run.material.train
    return [question for question in run.material.train if state.targets[question.id].has_teacher]


def describe_run(run: TrainingRun) -> None:
    """Print a summary of the inputs, and write `run.json` and `teacher.json` (quality statistics of the pool)."""
    run.metrics.message(run.material.summary.text())
    write_facts(run, finished=False)
    write_text_atomic(run.folder / "teacher.json", json.dumps(run.material.statistics, indent=2) + "\n")
