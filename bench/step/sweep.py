"""Ways of making a stage-2 step on the same three models, tried and timed within a deadline.

Ways of one part of a case are timed in the same rounds, beside the base. Each has a warm-up step first, which finds out
whether it fits and measures its memory.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.core.measure import in_turns
from bench.core.memory import keep_freed_memory, peak_extra_bytes
from bench.cuda.section_log import NO_TIME, seconds_left
from bench.step import models
from bench.step.copies import copying_step
from bench.step.flops import Load, StepLoad, padded_flops, step_flops
from bench.step.rates import predicted_seconds, rates
from bench.step.way import BASE, Formatted, Given, Rounds, StepCase, Way
from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.liger import describe_liger
from rmsd_fast.stages import distill
from rmsd_fast.stages.state import StageState

# Seconds of a step over those predicted: until one was timed in this case, and bounds after that.
FIRST_PACE, PACES = 2.0, (0.8, 3.0)
# Of the gate, with K=2 and N=3.
GATE_RESPONSE, MOST_DIFFERENCE = 32, {"bfloat16": 5e-2, "float32": 1e-3}
# As libraries below torch's allocator say that there is no memory left.
_EXHAUSTED = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Makes a step and returns its metrics.
Step = Callable[[], dict[str, float]]


@dataclass
class Measured:
    """What the parts of a case gave; nothing in it holds a model.

    rate: of `rates`. held: bytes before a step; peaks: at a step's highest, by name. rounds: seconds by phase.
    recompute: the base does not fit as it is, so that all ways recompute layers and are compared like with like.
    pace: the largest ratio of a step's seconds to those predicted.
    """

    case: StepCase
    config: Any
    prefix: int
    grid: tuple[int, int, int]
    rate: dict[str, float]
    held: int
    peaks: dict[str, float] = field(default_factory=dict)
    rounds: dict[Way, list[dict[str, float]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    recompute: bool = False
    pace: float | None = None

    def expected_s(self, way: Way) -> float:
        """Return the seconds that one step should take."""
        return self.predicted_s(way) * (FIRST_PACE if self.pace is None else self.pace)

    def loads(self, way: Way) -> list[StepLoad]:
        """Return the load of each group."""
        response = self.case.response
        return [StepLoad(self.prefix, [response] * way.n, [response] * way.k, [self.grid])] * way.groups

    def predicted_s(self, way: Way) -> float:
        """Return the seconds of the passes at the measured rates: all that runs, whether it is needed or not."""
        loads = self.loads(way)
        flops = step_flops(self.config, loads, way.mode, checkpointing=way.checkpointing)
        if way.mode == "padded" and self.case.sizes is not models.SMALL:
            # The discriminator's rows come in several micro-batches, so they are read without gradient first.
            judged = [Load(load.prefix, [*load.rollouts, *load.teachers]) for load in loads]
            flops += padded_flops(self.config, judged, head=False, vision=False)
        return predicted_seconds(flops, self.rate)

    def variant(self, way: Way) -> Way:
        return way.recomputing() if self.recompute else way

    def add(self, way: Way, numbers: dict[str, float]) -> None:
        self.rounds.setdefault(way, []).append(numbers)
        least, most = PACES
        self.pace = min(most, max(least, self.pace or 0.0, numbers["step"] / self.predicted_s(way)))


class Rig:
    """The three models of some cases, and how steps are made on them."""

    def __init__(self, case: StepCase, world: models.World, rounds: Rounds):
        self.sizes, self.dtype, self.world, self.rounds = case.sizes, case.dtype, world, rounds
        self.apart = is_apart(case, world.device)
        settings = self.settings("shared", case.prefix, case.response, 4, 8)
        self.state: StageState | None = models.make_state(self.sizes, settings, world, apart=self.apart)
        # The engine of rollouts, where they are not given.
        self.generator = None if case.gives_rollouts else self.state.rollouts
        self.config = self.state.student.model.config
        self.liger, self.counts = describe_liger(settings.model.liger, world.device), models.counts_of(self.sizes)
        # Why the device can no longer be used.
        self.lost = ""
        # What is wrong with the steps; their times are taken all the same, and the benchmark fails.
        self.differences, self.gate, _ = attempt(lambda: self.check(min(512, case.prefix)), self.release)
        if not self.gate and max(self.differences.values()) >= MOST_DIFFERENCE[self.dtype]:
            self.gate = f"gradient norms of padded and shared steps differ: {self.differences}"

    def settings(self, *shape: Any, **groups: int) -> RunConfig:
        return models.settings_of(self.sizes, *shape, f"model.dtype={self.dtype}", **groups)

    def prepare(self, way: Way, prompts: list[Prompt], response: int, *overrides: str) -> Step:
        """Set up steps of this way on the first prompts. The returned call makes one and returns its metrics."""
        state, prompts, prefix = self.state, prompts[: way.groups], len(prompts[0].input_ids)
        settings = self.settings(way.packing, prefix, response, way.k, way.n, *overrides, groups=way.groups)
        models.switch(state, way.packing, way.checkpointing)
        models.set_teacher(state, prompts, response, way.k)
        state.rollouts = self.generator or Given(state.builder, response)
        step = copying_step if way.mode == "copies" else distill.step

        def run() -> dict[str, float]:
            state.settings = settings
            result = step(state, prompts, 0)
            # None stands for what a step does not tell, such as the accuracy of no pair.
            measured = {name: value for name, value in result.metrics.items() if value is not None}
            bad = {name: value for name, value in measured.items() if not math.isfinite(value)}
            assert not result.skipped and not bad, f"{way.name}: a step that is not finite: {bad}"
            if way.mode == "shared":
                # Another micro-batch would read the prompt once more.
                group = 2 * prefix + (way.k + 2 * way.n) * response
                more = result.metrics["tokens_computed"] - way.groups * group
                assert abs(more) < prefix / 2, f"{way.name}: {more} tokens more than its group has"
            return result.metrics

        return run

    def check(self, prefix: int) -> dict[str, float]:
        """Relative differences of gradient norms from those of shared prompts, on the same rollouts, by way.

        In 16 bits one rollout of three is formatted, and the discriminator's reward hardly counts: its scores of random
        texts err by a fifth of their spread, which advantages would hand on to the policy (5% of the norm, found on 36
        layers of width 512; so it is 0.1%, and 0.5% in the discriminator).
        """
        exact = self.dtype == "float32"
        prompts, norms = models.make_prompts(self.state, prefix, 1), {}
        for mode in ("shared", "padded", *["copies"] * exact):
            run = self.prepare(Way(mode, 2, 3), prompts, GATE_RESPONSE, *["reward.alpha=1e-3"] * (not exact))
            self.state.rollouts = (Given if exact else Formatted)(self.state.builder, GATE_RESPONSE)
            metrics = run()
            norms[mode] = [metrics[f"{name}/grad_norm"] for name in ("policy", "discriminator")]
        shared = norms.pop("shared")
        return {mode: max(abs(a / b - 1) for a, b in zip(own, shared, strict=True)) for mode, own in norms.items()}

    def held_bytes(self) -> int:
        """What a GPU holds before a step. On CPU 0: there a peak is what the step adds."""
        models.free_bytes(self.world.device)
        return torch.cuda.memory_allocated(self.world.device) if self.world.device.type == "cuda" else 0

    def release(self) -> None:
        """Forget a step that did not end, and give its memory back to the device."""
        try:
            for engine in (self.state.policy, self.state.discriminator):
                engine.discard()
            self.state.timer.take()
            models.free_bytes(self.world.device)
        except Exception as error:
            # After an illegal access every call fails; what was found before shall be written.
            self.lost = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"

    def close(self) -> None:
        """Free the models."""
        if self.state is not None:
            self.state.policy.close()
            self.state.discriminator.close()
            self.state = None
        models.free_bytes(self.world.device)


def is_apart(case: StepCase, device: torch.device) -> bool:
    """Whether the optimizers do not fit beside the models; asked while the device is empty."""
    room = case.room or models.free_bytes(device)
    return not models.fits(case.sizes, room, case.prefix + (BASE.k + BASE.n) * case.response)


def attempt(call: Callable[[], Any], free: Callable[[], object]) -> tuple[Any, str, bool]:
    """Return the result, "" and False; or None, why the call failed, and whether for lack of memory, after `free`."""
    try:
        return call(), "", False
    except Exception as error:
        text = str(error)
        memory = isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _EXHAUSTED)
        kind = "out of memory" if memory else type(error).__name__
        reason = f"{kind}: {text.splitlines()[0][:300] if text else type(error).__name__}"
        # Frames hold what has filled the device.
        traceback.clear_frames(error.__traceback__)
    free()
    return None, reason, memory


def begin(rig: Rig, case: StepCase) -> Measured:
    """Measure the rates of a case, and nothing else."""
    (prompt,) = models.make_prompts(rig.state, case.prefix, 1)
    tokens = case.prefix + (BASE.k + BASE.n) * case.response
    rate = rates(rig.config, case.prefix, getattr(torch, case.dtype), rig.world.device, rows=tokens)
    return Measured(case, rig.config, len(prompt.input_ids), prompt.media[0].grid_thw, rate, rig.held_bytes())


def sweep(rig: Rig, found: Measured, ways: tuple[Way, ...]) -> list[str]:
    """Add the numbers of these ways, and return what failed for reasons other than memory or time."""
    models.free_bytes(rig.world.device)
    prompts = models.make_prompts(rig.state, found.case.prefix, max(way.groups for way in ways))
    new = [way for way in ways if found.variant(way) not in found.rounds]
    warm: list[Way] = []
    faults: list[str] = []
    for plain in ways:
        for way in (plain.recomputing(),) if found.recompute else (plain, plain.recomputing()):
            # Those that are warm are still to be timed.
            if rig.lost or seconds_left() < sum(_cost_s(rig, found, own) for own in (way, *warm)):
                found.not_run.setdefault(way.name, rig.lost or NO_TIME)
                break
            reason, memory = _first_step(rig, found, way, prompts)
            if not reason:
                warm.append(way)
                break
            if way not in found.rounds:
                found.not_run[way.name] = reason
            if not memory:
                faults.append(f"{way.name}: {reason}")
                break
            found.recompute = found.recompute or way == BASE
    if rig.world.device.type == "cpu":
        # The passes for memory have put malloc's defaults back.
        keep_freed_memory(int(2 * max(found.peaks.values(), default=0)))
    if any(way in [found.variant(own) for own in new] for way in warm):
        faults += _time_rounds(rig, found, warm, prompts)
    for way in found.rounds:
        found.not_run.pop(way.name, None)
    if found.recompute and BASE in warm and not rig.lost:
        # It fitted once, and then not with what the allocator held: from the start, with recomputed layers.
        return faults + sweep(rig, found, ways)
    return faults


def _cost_s(rig: Rig, found: Measured, way: Way) -> float:
    """Return the seconds of its first step and of all rounds that it has not had."""
    rounds = max(1, _rounds_of(rig, found, way) - len(found.rounds.get(way, ())))
    return found.expected_s(way) * (rounds + (not _is_slow(rig, found, way)))


def _first_step(rig: Rig, found: Measured, way: Way, prompts: list[Prompt]) -> tuple[str, bool]:
    """Measure the peak of a step, the only one of a slow way. Return why it failed, and whether for lack of memory."""

    def first() -> tuple[int, dict[str, float]]:
        run = rig.prepare(way, prompts, found.case.response)
        peak, numbers = peak_extra_bytes(lambda: timed(rig, run), rig.world.device)
        return peak or 0, numbers

    result, reason, memory = attempt(first, rig.release)
    if not reason:
        # The least: an engine's first step makes its optimizer states, which are none of the step's own memory.
        found.peaks[way.name] = min(found.peaks.get(way.name, math.inf), found.held + result[0])
        if _is_slow(rig, found, way):
            found.add(way, result[1])
    return reason, memory


def _time_rounds(rig: Rig, found: Measured, ways: list[Way], prompts: list[Prompt]) -> list[str]:
    """Time each way once, then in further rounds while there is time. Return what failed, except for lack of memory."""
    failed: dict[Way, str] = {}
    # The base comes in every part: as often as what it stands beside.
    others = [way for way in ways if way not in (BASE, BASE.recomputing())] or ways
    for number, way in in_turns(ways, max((_rounds_of(rig, found, way) for way in others), default=0)):
        late = seconds_left() < found.expected_s(way) and way in found.rounds
        enough = number >= _rounds_of(rig, found, way) or _is_slow(rig, found, way)
        if late or enough or rig.lost or way in failed:
            continue
        one = partial(lambda way: timed(rig, rig.prepare(way, prompts, found.case.response)), way)
        numbers, reason, memory = attempt(one, rig.release)
        if not reason:
            found.add(way, numbers)
            continue
        if memory and way == BASE:
            found.recompute = True
            return []
        if way not in found.rounds:
            found.not_run[way.name] = reason
        failed[way] = "" if memory else f"{way.name}: {reason}"
    return [fault for fault in failed.values() if fault]


def _is_slow(rig: Rig, found: Measured, way: Way) -> bool:
    return way.mode != "shared" and found.predicted_s(way) > rig.rounds.slow_s


def _rounds_of(rig: Rig, found: Measured, way: Way) -> int:
    if way.mode != "shared":
        return 1 if _is_slow(rig, found, way) else rig.rounds.other
    return rig.rounds.shared * (2 if found.predicted_s(way) < rig.rounds.quick_s else 1)


def timed(rig: Rig, run: Step) -> dict[str, float]:
    """Return the seconds of a step by phase and in all (`step`), and `tokens_computed`."""
    rig.state.timer.take()
    began = time.perf_counter()
    metrics = run()
    phases = {name.removeprefix("seconds/"): seconds for name, seconds in rig.state.timer.take().items()}
    return phases | {"step": time.perf_counter() - began, "tokens_computed": metrics["tokens_computed"]}
