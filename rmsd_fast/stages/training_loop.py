"""Run the training loop that every stage uses: data, learning rates, step, metrics, checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from rmsd_fast.config import CheckpointError, SettingsError, UserError
from rmsd_fast.data.loader import PromptLoader, TooManyBadSamples
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.records import Question
from rmsd_fast.runtime.metrics import PhaseTimer, peak_mib
from rmsd_fast.runtime.process_group import all_gather_objects, any_rank, global_max, global_sum
from rmsd_fast.setting_rules.uses import teaches
from rmsd_fast.stages import held_out
from rmsd_fast.stages.rollout_log import log_rollouts, rollout_rows
from rmsd_fast.stages.run import Saved, TrainingRun, first_step, save
from rmsd_fast.stages.run_folder import stage_steps
from rmsd_fast.stages.state import NonFiniteRun, StageState, StepResult, count_skipped, learning_rate

# A stage's step takes the state, this process's prompts, and the step within the stage, counted from 0.
Step = Callable[[StageState, list[Prompt], int], StepResult]


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
    state.timer = PhaseTimer(run.world.device, run.metrics)
    run.metrics.begin(stage, total, first_step(run, stage))
    run.media.take_counts()  # Discards the counts of the evaluation.
    try:
        with run.stop.deferred():
            for number in range(first_step(run, stage), total):
                if held_out.is_due(run, stage, number):
                    held_out.evaluate_step(run, stage, number, state)
                state.timer.take()
                with state.timer("data"):
                    prompts = next_prompts(run, loader, number, total)
                for name, rate in rates.items():
                    engines[name].set_lr(rate(number))
                result = step(state, prompts, number)
                _log_step(run, stage, number, state, prompts, result, next(iter(rates.values()))(number))
                finished = result.finished
                # The groups hold the frames of the step, which must be freed before the next step.
                del result
                _save_if_due(run, stage, number, state, engines, finished=finished)
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


def _log_step(
    run: TrainingRun, stage: str, number: int, state: StageState, prompts: list[Prompt], result: StepResult, lr: float
) -> None:
    """Log the metrics and rollouts of a step, and whether it was skipped.

    Raises:
        NonFiniteRun: too many consecutive steps were skipped.
    """
    run.skipped += result.skipped
    if result.skipped:
        _note_skipped(run, stage, number + 1, prompts)
    metrics = {**result.metrics, "lr": lr, **_cost(run, state, result)}
    records = []
    if "rollouts" in run.logs:
        records = log_rollouts(
            run.logs["rollouts"],
            result.groups,
            run.settings.rollout,
            builder=state.builder,
            stage=stage,
            step=number + 1,
            total=stage_steps(run.settings, stage),
        )
    run.metrics.log(stage, number + 1, metrics, rollout_rows(records))
    try:
        count_skipped(state, result.skipped)
    except NonFiniteRun as error:
        raise NonFiniteRun(f"{error}; {run.stop.advice}") from None


def _save_if_due(
    run: TrainingRun, stage: str, number: int, state: StageState, engines: dict[str, Saved], *, finished: bool
) -> None:
    """Save a checkpoint after a step if one is due, the stage has ended, or the run was asked to stop.

    Raises:
        Stopped: SIGTERM was received; the state is saved.
        CheckpointError: SIGTERM was received, and the state could not be saved.
    """
    stopping = any_rank(run.stop.asked, run.world)
    every = run.settings.checkpoint.every_steps
    # A run that is stopped during an evaluation continues with it.
    due = (every and (number + 1) % every == 0) or held_out.is_due(run, stage, number + 1)
    saved = False
    if number + 1 == stage_steps(run.settings, stage) or finished or stopping or due:
        saved = save(run, stage, number + 1, state, engines, finished=finished)
    if stopping and not saved:
        raise CheckpointError(f"stopped by SIGTERM; the last steps are not saved; {run.stop.advice}")
    if stopping:
        raise run.stop.stopped(f"step {number + 1} of {stage} is saved", together=True)


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


def rate_of(stage_settings, *, steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, for `sft` or `distill` settings."""
    return lambda step: learning_rate(
        step,
        steps=steps,
        lr=stage_settings.lr,
        warmup_steps=stage_settings.warmup_steps,
        schedule=stage_settings.schedule,
    )
