"""Examine a recipe on this machine: packages, devices, inputs, prompts, videos, log-probs, and seconds per step.

Nothing is written except generated material. Every check is a `Finding`, and a check that depends on a failed one is
skipped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rmsd_fast.config import RunConfig, SettingsError, UserError
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptError
from rmsd_fast.data.video import Frames
from rmsd_fast.models.folders import resolve_folder
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.rollout.vllm_process import PACKAGES as VLLM_PACKAGES
from rmsd_fast.runtime.engine import release_memory
from rmsd_fast.runtime.process_group import World, any_rank, global_max, global_sum, on_main
from rmsd_fast.setting_rules import makes_rollouts
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.build import build_distillation, build_imitation
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.material import Material, losses_of, prepare_material
from rmsd_fast.stages.memory import plan_memory
from rmsd_fast.stages.memory_advice import check_memory
from rmsd_fast.stages.parity import LogProbs, Parity, bound_of, compare, recorded, score_rollouts
from rmsd_fast.stages.plan import describe_plan
from rmsd_fast.stages.run import PACKAGES, Step, version_of
from rmsd_fast.stages.state import StageState, StepResult, encode_step

# Learning rates of the steps after which an engine with old weights must be seen, until the change is large enough.
UPDATE_LRS = (1e-3, 1e-2, 1e-1)
Show = Callable[["Finding"], None]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warning", "fault" or "skipped".
        text: what was found, and what to do about a fault; one or more lines.
        numbers: measured values by name, for JSON.
    """

    name: str
    status: str
    text: str
    numbers: dict[str, float | int | str | None] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the finding as lines for a terminal."""
        first, *rest = self.text.splitlines() or [""]
        return [f"{self.name:<12} {self.status:<8} {first}", *(f"{'':<22}{line}" for line in rest)]


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
    show(_packages())
    show(_device(settings, world))
    show(_disk(settings))
    ready = _plan(settings, world)
    show(ready)
    if ready.status == "fault":
        show(Finding("the rest", "skipped", "it needs the inputs and the model"))
        return
    material = prepare_material(settings, world)
    memory = _memory(settings, world, material)
    show(memory)
    if memory.status == "fault":
        show(Finding("the rest", "skipped", "it would run out of memory"))
        return
    with MediaReader(settings.data, world.device) as media:
        reason = f": {media.decoder_reason}" if media.decoder_reason else ""
        show(Finding("decoder", "warning" if reason else "ok", f"videos are decoded on {media.decoder}{reason}"))
        count = questions or min(settings.rollout.prompts_per_batch, settings.distill.batch_size // world.size)
        _examine_training(settings, world, material, media, count, show)


def _packages() -> Finding:
    versions = {name: version_of(name) for name in (*PACKAGES, "flash-attn")}
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
            {"processes": world.size},
        )
    properties = torch.cuda.get_device_properties(world.device)
    capability = f"{properties.major}.{properties.minor}"
    text = (
        f"{world.size} x {properties.name}, compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB "
        f"each, CUDA {torch.version.cuda}; {host}; {heads}"
    )
    return Finding("device", "ok", text, {"processes": world.size, "gpu": properties.name, "capability": capability})


def _disk(settings: RunConfig) -> Finding:
    folder = Path(settings.output).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("disk", "fault", f"output={settings.output}: {folder} cannot be written; choose another folder")
    return Finding("disk", "ok", f"{free / 2**30:.0f} GiB free for {settings.output}", {"free_bytes": free})


def _plan(settings: RunConfig, world: World) -> Finding:
    """Return the plan of the dry run: inputs, steps and memory."""

    def plan() -> tuple[str, bool]:
        try:
            return describe_plan(settings)
        except UserError as error:
            return str(error), False

    text, ready = on_main(world, plan)
    return Finding("plan", "ok" if ready else "fault", text)


def _memory(settings: RunConfig, world: World, material: Material) -> Finding:
    """Return the memory plan of the model, which the dry run may not have had yet."""
    config = json.loads((resolve_folder(material.model_path) / "config.json").read_text())
    sizes = {"processes": world.size}

    def plan() -> Finding:
        table = plan_memory(settings, config, **sizes, device=world.device.type).table()
        text = "\n".join(["planned for the longest prompts and responses", *table])
        try:
            lines = check_memory(settings, config, **sizes, device=world.device)
        except SettingsError as error:
            # `runtime.check_memory=false` starts a run whose plan does not fit.
            return Finding("memory", "fault" if settings.runtime.check_memory else "warning", f"{error}\n{text}")
        return Finding("memory", "ok", "\n".join([text, *lines]))

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
            show_time(_time_imitation(state, sample))
            if not makes_rollouts(settings):
                show_time(_time_evaluation(state, material, media))
        state.policy.close()
        del state
        release_memory()
        if sample is None:
            return
    if makes_rollouts(settings):
        state = build_distillation(material.model_path, settings, world, material, media)
        if sample is None:
            sample, finding = _sample(state, material, count)
            show(finding)
        if sample:
            _examine_rollouts(state, sample, show)
            show_time(_time_distillation(state, sample))
            show_time(_time_evaluation(state, material, media))
            show(_after_update(state, sample))
        state.policy.close()
        if state.discriminator is not None:
            state.discriminator.close()
    if stages_timed := [name for name in ("imitation", "stage 2") if name in hours and hours[name] == 0]:
        show(Finding("whole run", "skipped", f"{', '.join(stages_timed)} could not be timed"))
    elif hours:
        parts = ", ".join(f"{name} {_duration(of_part)}" for name, of_part in hours.items())
        total = sum(hours.values())
        show(Finding("whole run", "ok", f"about {_duration(total)}: {parts}", {"hours": total}))


@dataclass(frozen=True)
class _Sample:
    """Prompts of this process, as many as on every other process, and the seconds that reading one of them took."""

    prompts: list[Prompt]
    seconds: float


def _sample(state: StageState, material: Material, count: int) -> tuple[_Sample | None, Finding]:
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
        return None, Finding("prompts", "fault", f"no question could be read on at least one process{what}")
    prompts = prompts[:usable]
    seconds = totals["seconds"] / totals["read"]
    lengths = [len(prompt.input_ids) for prompt in prompts]
    text = f"{totals['read']:.0f} questions read, {min(lengths)} to {max(lengths)} tokens, {seconds:.2g} s each"
    if not any(prompt.media for prompt in prompts):
        text += ", without media"
    status = "ok"
    if totals["bad"]:
        first = f"; first: {faults[0]}" if faults else ""
        status, text = "warning", f"{text}; {totals['bad']:.0f} of them cannot be used{first}"
    numbers = {"questions": totals["read"], "unusable": totals["bad"], "longest": max(lengths), "seconds": seconds}
    return _Sample(prompts, seconds), Finding("prompts", status, text, numbers)


Drawn = tuple[list[list[Rollout]], MediaFeatures | None]


def _examine_rollouts(state: StageState, sample: _Sample, show: Show) -> None:
    """Compare the log-probs of rollout engine and trainer, and check that both see the media."""
    prompts = sample.prompts
    rollouts, features = distill.roll_out(state, prompts, 0)
    if rollouts is None:
        show(Finding("log-probs", "fault", "the student's logits are not finite; use another model or model.dtype"))
        return
    together = score_rollouts(state, prompts, rollouts, features)
    noise = _noise(state, prompts, rollouts, features, together)
    text = f"the trainer with one question per pass against several: {noise.text()}"
    show(Finding("noise", "ok", text, dataclasses.asdict(noise)))
    show(_parity(state, "log-probs", rollouts, together))
    show(_media_seen(state, prompts, rollouts, together, noise))


def _noise(
    state: StageState,
    prompts: list[Prompt],
    rollouts: list[list[Rollout]],
    features: MediaFeatures | None,
    together: LogProbs,
) -> Parity:
    """Compare the trainer with itself: the same tokens, one question per pass. No engine can agree better than this."""
    alone: LogProbs = {}
    for i, (prompt, drawn) in enumerate(zip(prompts, rollouts, strict=True)):
        of_prompt = score_rollouts(state, [prompt], [drawn], None if features is None else features.select([i]))
        alone |= {(i, r): logp for (_, r), logp in of_prompt.items()}
    return compare(alone, together, state.world)


def _parity(state: StageState, name: str, rollouts: list[list[Rollout]], trainer: LogProbs) -> Finding:
    parity, bound = compare(trainer, recorded(rollouts), state.world), bound_of(state.settings)
    text = f"engine {state.settings.rollout.engine} against trainer: {parity.text()}"
    numbers = {**dataclasses.asdict(parity), "bound": bound}
    if parity.within(bound):
        return Finding(name, "ok", text, numbers)
    text += (
        f"\nexpected at most {bound:g} for each question: the engine has other weights, prompts or media than the "
        "trainer, or computes with less precision"
    )
    return Finding(name, "fault", text, numbers)


def _media_seen(
    state: StageState, prompts: list[Prompt], rollouts: list[list[Rollout]], trainer: LogProbs, noise: Parity
) -> Finding:
    """Give each prompt the pixels of other media. The trainer's log-probs must change, and the engine must follow.

    The engine follows if the log-probs of its new rollouts are those of the trainer with these media, and not those of
    the trainer with the former ones.
    """
    with_media = [i for i, prompt in enumerate(prompts) if prompt.media]
    if any_rank(not with_media, state.world):
        return Finding("media", "skipped", "some process has no question with media")
    before = [prompts[i] for i in with_media]
    others = [_with_other_media(prompt, prompts) for prompt in before]
    drawn, features = distill.roll_out(state, others, 0)
    if drawn is None:
        return Finding("media", "fault", "with other media, the student's logits are not finite")
    same_tokens = score_rollouts(state, others, [rollouts[i] for i in with_media], features)
    former = {(place, r): trainer[i, r] for place, i in enumerate(with_media) for r in range(len(rollouts[i]))}
    change = compare(former, same_tokens, state.world)
    engine = recorded(drawn)
    with_others = score_rollouts(state, others, drawn, features)
    with state.policy.full_weights(), torch.no_grad():
        features = encode_step(state, before)
    with_former = score_rollouts(state, before, drawn, None if state.train_vision else features)
    blind = sum(
        2 * _distance(with_former, engine, i) < _distance(with_others, engine, i) for i in range(len(with_media))
    )
    sums = global_sum({"blind": blind, "questions": len(with_media)}, state.world)
    numbers = {"trainer_change": change.mean, "engine_blind": sums["blind"], "questions": sums["questions"]}
    text = f"with other media, the trainer's log-probs of the same tokens change by {change.mean:.2g} in the mean"
    if not change.mean > 2 * noise.mean:
        return Finding("media", "fault", f"{text}, no more than the noise: the trainer does not see them", numbers)
    if sums["blind"]:
        text += f"; the engine's rollouts of {sums['blind']:.0f} of {sums['questions']:.0f} questions do not follow"
        return Finding("media", "fault", f"{text}: the engine does not see the media", numbers)
    return Finding("media", "ok", f"{text}, and the engine's rollouts follow", numbers)


def _distance(first: LogProbs, second: LogProbs, question: int) -> float:
    """Return the mean absolute difference over the rollouts of a question."""
    pairs = [(logp, second[place]) for place, logp in first.items() if place[0] == question]
    return float((torch.cat([a for a, _ in pairs]).double() - torch.cat([b for _, b in pairs]).double()).abs().mean())


def _with_other_media(prompt: Prompt, prompts: list[Prompt]) -> Prompt:
    """Return the prompt with the pixels of another question's media of the same size, or else with inverted pixels."""
    every = [frames for other in prompts for frames in other.media]

    def other(frames: Frames) -> Frames:
        for candidate in every:
            if candidate.pixels.shape == frames.pixels.shape and not torch.equal(candidate.pixels, frames.pixels):
                return dataclasses.replace(frames, pixels=candidate.pixels, key="")
        return dataclasses.replace(frames, pixels=255 - frames.pixels.flip(0), key="")

    return dataclasses.replace(prompt, media=tuple(map(other, prompt.media)))


def _time_imitation(state: StageState, sample: _Sample) -> Finding:
    """Time a step of stage 1 whose learning rate is 0, and extrapolate to stage 1 and the control."""
    settings = state.settings
    state.policy.set_lr(0.0)
    seconds, _ = _time_steps(state, sample, sft.step)
    hours, lines = 0.0, []
    for stage, training in (("sft", settings.sft), ("control", settings.distill)):
        if stage in settings.stages:
            step = _step_seconds(state, sample, seconds, training.batch_size)
            hours += step * training.steps / 3600
            lines.append(f"{stage}: {step:.2g} s per step of {training.batch_size} questions, {training.steps} steps")
    lines[0] += f"; {_shares(seconds)}"
    return Finding("imitation", "ok", "\n".join(lines), {"hours": hours, **seconds})


def _time_distillation(state: StageState, sample: _Sample) -> Finding:
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
    hours, lines = 0.0, []
    if "warm_up" in settings.stages:
        partial = {name: s for name, s in seconds.items() if name not in ("reference", "policy")}
        step, steps = _step_seconds(state, sample, partial, batch), settings.discriminator.warm_up_steps
        hours += step * steps / 3600
        lines.append(f"warm_up: {step:.2g} s per step of {batch} questions, {steps} steps")
    if "distill" in settings.stages:
        step, steps = _step_seconds(state, sample, seconds, batch), settings.distill.steps
        hours += step * steps / 3600
        lines.append(f"distill: {step:.2g} s per step of {batch} questions, {steps} steps; {_shares(seconds)}")
        per_process = batch / state.world.size
        needed = sample.seconds * per_process / settings.data.decode_threads
        threads = counted(settings.data.decode_threads, "thread")
        lines.append(f"reading the step's media takes {needed:.2g} s with {threads}, at the same time")
    tokens = result.metrics["rollout/tokens_mean"]
    lines.append(f"this student's rollouts have {tokens:.0f} tokens in the mean; a trained one may write shorter ones")
    return Finding("stage 2", "ok", "\n".join(lines), {"hours": hours, **seconds})


def _time_steps(state: StageState, sample: _Sample, step: Step) -> tuple[dict[str, float], StepResult]:
    """Return the seconds of each phase of a second step, since kernels are compiled in the first one."""
    for number in (1, 2):
        state.timer.take()
        result = step(state, sample.prompts, number)
    seconds = {name.removeprefix("seconds/"): spent for name, spent in state.timer.take().items()}
    # The slowest process sets the pace.
    return global_max(seconds, state.world), result


def _step_seconds(state: StageState, sample: _Sample, seconds: dict[str, float], batch: int) -> float:
    """Return the seconds of a step with the recipe's batch. All phases but the optimizer grow with the questions."""
    scale = batch / state.world.size / len(sample.prompts)
    return sum(s * (1 if name == "optimizer" else scale) for name, s in seconds.items() if name != "step")


def _shares(seconds: dict[str, float]) -> str:
    total = sum(s for name, s in seconds.items() if name != "step")
    return ", ".join(f"{name} {s / total:.0%}" for name, s in seconds.items() if name != "step" and s >= 0.005 * total)


def _time_evaluation(state: StageState, material: Material, media: MediaReader) -> Finding:
    """Time the answers to some held-out questions, and extrapolate to all evaluations of the run."""
    settings, world = state.settings, state.world
    late = [stage for stage in ("control", "distill") if stage in settings.stages]
    evaluations = 1 + len({"sft", "control", "distill"} & set(settings.stages))
    if settings.evaluate.every_steps:
        evaluations += len(late) * ((settings.distill.steps - 1) // settings.evaluate.every_steps)
    questions = material.heldout[: settings.evaluate.prompts_per_batch * world.size]
    if len(questions) < world.size:
        return Finding("evaluation", "skipped", "there are fewer held-out questions than processes", {"hours": 0.0})
    began = time.perf_counter()
    with state.policy.full_weights():
        state.policy.module.activate()
        answer_questions(state.student, questions, settings, world, media, name="sample")
    spent = global_max({"seconds": time.perf_counter() - began}, world)["seconds"]
    each = spent / len(questions)
    text = f"{each:.2g} s per question; {counted(len(material.heldout), 'question')}, {evaluations} times"
    hours = each * len(material.heldout) * evaluations / 3600
    return Finding("evaluation", "ok", text, {"hours": hours, "seconds_per_question": each})


def _after_update(state: StageState, sample: _Sample) -> Finding:
    """Change the policy's weights so much that old ones cannot pass for new ones, and compare the log-probs again."""
    name, bound = "new weights", bound_of(state.settings)
    rollouts, features = distill.roll_out(state, sample.prompts, 3)
    if rollouts is None:
        return Finding(name, "fault", "the student's logits are not finite")
    before = score_rollouts(state, sample.prompts, rollouts, features)
    for lr in UPDATE_LRS:
        state.policy.set_lr(lr)
        # Imitation always has a gradient. That of stage 2 is zero if all rollouts of a question earn the same reward.
        skipped = sft.step(state, sample.prompts, 3).skipped
        change = compare(before, score_rollouts(state, sample.prompts, rollouts, features), state.world)
        if skipped or change.mean > 3 * bound:
            break
    if skipped or not change.mean > 3 * bound:
        text = (
            f"the training steps changed the log-probs by {change.mean:.2g}, too little for an engine with old weights"
        )
        return Finding(name, "warning", f"not decided: {text} to be seen", {"change": change.mean})
    drawn, features = distill.roll_out(state, sample.prompts, 4)
    if drawn is None:
        return Finding(
            name, "warning", f"not decided: after a step at a learning rate of {lr:g}, logits are not finite"
        )
    found = _parity(state, name, drawn, score_rollouts(state, sample.prompts, drawn, features))
    text = f"{found.text}\nthe update has changed the log-probs of the former rollouts by {change.mean:.2g}"
    return dataclasses.replace(found, text=text, numbers={**found.numbers, "change": change.mean})


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    minutes = round(hours * 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
