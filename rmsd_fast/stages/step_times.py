"""Time the steps and evaluations of a recipe on a few questions, and extrapolate to the run."""

from __future__ import annotations

import statistics

from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.runtime.process_group import global_max
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.answer_records import clusters_of
from rmsd_fast.stages.evaluation import Answering
from rmsd_fast.stages.evaluation_batches import plan_batches, spread
from rmsd_fast.stages.evaluation_forecast import time_batch
from rmsd_fast.stages.findings import Finding, Sample
from rmsd_fast.stages.material import Material
from rmsd_fast.stages.state import StageState, StepResult
from rmsd_fast.stages.training_loop import Step

# A step is timed so many times, unless the steps so far took longer than this in seconds.
_TIMED_STEPS, _ENOUGH_S = 3, 20.0


def time_imitation(state: StageState, sample: Sample) -> Finding:
    """Time a step of stage 1 whose learning rate is 0, and extrapolate to stage 1 and the control."""
    settings = state.settings
    state.policy.set_lr(0.0)
    seconds, _ = _time_steps(state, sample, sft.step)
    numbers: dict[str, float] = {"hours": 0.0}
    lines = []
    for stage, training in (("sft", settings.sft), ("control", settings.distill)):
        if stage in settings.stages:
            step = _step_seconds(state, sample, seconds, training.batch_size)
            numbers[f"{stage}_seconds_per_step"] = step
            numbers["hours"] += step * training.steps / 3600
            lines.append(f"{stage}: {step:.2g} s per step of {training.batch_size} questions, {training.steps} steps")
    lines[0] += f"; {_shares(seconds)}"
    return Finding("imitation", "ok", "\n".join(lines), numbers)


def time_distillation(state: StageState, sample: Sample) -> Finding:
    """Time a step of stage 2 whose learning rates are 0, and extrapolate to warm-up and stage 2."""
    settings, batch = state.settings, state.settings.distill.batch_size
    for engine in (state.policy, state.discriminator):
        if engine is not None:
            engine.set_lr(0.0)
    seconds, result = _time_steps(state, sample, distill.step)
    if result.skipped:
        return Finding(
            "stage 2",
            "fault",
            "logits, loss or gradient of a step were not finite",
            {"hours": 0.0},
        )
    numbers: dict[str, float] = {"hours": 0.0}
    lines = []
    if "warm_up" in settings.stages:
        partial = {name: s for name, s in seconds.items() if name not in ("reference", "policy")}
        step, steps = _step_seconds(state, sample, partial, batch), settings.discriminator.warm_up_steps
        numbers |= {"warm_up_seconds_per_step": step, "hours": step * steps / 3600}
        lines.append(f"warm_up: {step:.2g} s per step of {batch} questions, {steps} steps")
    if "distill" in settings.stages:
        step, steps = _step_seconds(state, sample, seconds, batch), settings.distill.steps
        numbers["distill_seconds_per_step"] = step
        numbers["hours"] += step * steps / 3600
        numbers |= {f"distill_{name}_seconds": s for name, s in _scaled(state, sample, seconds, batch).items()}
        lines.append(f"distill: {step:.2g} s per step of {batch} questions, {steps} steps; {_shares(seconds)}")
        per_process = batch / state.world.size
        needed = sample.seconds * per_process / settings.data.decode_threads
        threads = counted(settings.data.decode_threads, "thread")
        lines.append(f"reading the step's media takes {needed:.2g} s with {threads}, at the same time")
    tokens = result.metrics["rollout/tokens_mean"]
    lines.append(f"this student's rollouts have {tokens:.0f} tokens on average; a trained one may write shorter ones")
    numbers["rollout_tokens"] = tokens
    return Finding("stage 2", "ok", "\n".join(lines), numbers)


def _time_steps(state: StageState, sample: Sample, step: Step) -> tuple[dict[str, float], StepResult]:
    """Return the median seconds of each phase over a few steps, and the result of the last one.

    The first step, in which kernels are compiled, does not count.
    """
    timed: list[dict[str, float]] = []
    for number in range(1, _TIMED_STEPS + 2):
        state.timer.take()
        result = step(state, sample.prompts, number)
        spent = {name.removeprefix("seconds/"): s for name, s in state.timer.take().items()}
        # The slowest process sets the pace.
        timed.append(global_max(spent, state.world))
        if sum(seconds["step"] for seconds in timed[1:]) > _ENOUGH_S:
            break
    steps = timed[1:]
    return {name: statistics.median(seconds.get(name, 0.0) for seconds in steps) for name in steps[-1]}, result


def _scaled(state: StageState, sample: Sample, seconds: dict[str, float], batch: int) -> dict[str, float]:
    """Return the seconds of each phase with the recipe's batch. All but the optimizer's grow with the questions."""
    scale = batch / state.world.size / len(sample.prompts)
    return {name: s * (1 if name == "optimizer" else scale) for name, s in seconds.items() if name != "step"}


def _step_seconds(state: StageState, sample: Sample, seconds: dict[str, float], batch: int) -> float:
    return sum(_scaled(state, sample, seconds, batch).values())


def _shares(seconds: dict[str, float]) -> str:
    total = sum(s for name, s in seconds.items() if name != "step")
    return ", ".join(f"{name} {s / total:.0%}" for name, s in seconds.items() if name != "step" and s >= 0.005 * total)


def time_evaluation(state: StageState, material: Material, media: MediaReader) -> Finding:
    """Time the answers to some held-out questions, and extrapolate to all evaluations of the run."""
    settings, world = state.settings, state.world
    late = [stage for stage in ("control", "distill") if stage in settings.stages]
    evaluations = 1 + len({"sft", "control", "distill"} & set(settings.stages))
    if settings.evaluate.every_steps:
        evaluations += len(late) * ((settings.distill.steps - 1) // settings.evaluate.every_steps)
    questions = material.heldout
    if not questions:
        return Finding("evaluation", "skipped", "there are no held-out questions", {"hours": 0.0})
    # Batches of the evaluation, in which questions about the same media are together. There may be fewer batches than
    # processes, all of which take part.
    timed = spread(plan_batches(questions, settings.evaluate.prompts_per_batch, world.size), world.size)
    answering = Answering(state.student, settings, world, media, clusters_of(questions))
    with state.policy.full_weights():
        state.policy.module.activate()
        batch = timed[world.rank % len(timed)]
        measured = time_batch(answering, batch, world, questions=sum(map(len, timed)))
    each = measured.seconds_per_question(world.device)
    text = f"{each:.2g} s per question; {counted(len(material.heldout), 'question')}, {evaluations} times"
    hours = each * len(material.heldout) * evaluations / 3600
    return Finding("evaluation", "ok", text, {"hours": hours, "seconds_per_question": each})
