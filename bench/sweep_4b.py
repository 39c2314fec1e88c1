"""Ways of making a stage-2 step on the same three models, tried and timed within a deadline; for bench_step_4b.

Ways of one part of a case are timed in the same rounds, beside the base. Each has a warm-up step first, which finds out
whether it fits and measures its memory.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.flops import Load, StepLoad, padded_flops, step_flops
from bench.groups import Case
from bench.memory import peak_extra_bytes
from bench.rates import predicted_seconds, rates
from bench.section_log import NO_TIME, seconds_left
from bench.steps import Given, copying_step, make_prompts, set_teacher
from bench.student_4b import (
    CONFIG_4B,
    CONFIG_TOY,
    Sizes,
    counts_of,
    fits,
    free_bytes,
    make_state,
    settings_of,
    switch,
)
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.liger import describe_liger
from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages import distill
from rmsd_fast.stages.state import StageState


@dataclass(frozen=True)
class Way:
    """How a step is made: shared, padded or copies; K teacher responses and N rollouts of each group."""

    mode: str
    k: int
    n: int
    groups: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.mode} K={self.k} N={self.n}{groups}" + ", checkpointing" * self.checkpointing

    @property
    def packing(self) -> str:
        return "shared" if self.mode == "shared" else "padded"


BASE = Way("shared", 4, 8)
PAIR = (BASE, Way("shared", 1, 8))
PADDED = (BASE, Way("padded", 4, 8))
SEVERAL = (BASE, Way("shared", 4, 8, groups=4))
COUNTS = (BASE, Way("shared", 1, 1), Way("shared", 8, 8), Way("shared", 4, 16))
COPIES = (BASE, Way("copies", 4, 8))
# Rounds; of shared ways that are predicted to take less than QUICK_S twice as many.
ROUNDS = {"shared": 3, "padded": 2, "copies": 2}
QUICK_S = 0.7
# Others than shared ones that are predicted to take longer are timed once, and that is their first step: their many
# micro-batches are alike, so that what the first one loads is a few per cent.
SLOW_S = 3.0
# Seconds of a step over those predicted: until one was timed in this case, and bounds after that; until one of its mode
# was timed, so many times those of the others.
FIRST_PACE, PACES, UNKNOWN_MODE = 2.0, (0.8, 3.0), 1.3
# Of the gate, with K=2 and N=3.
GATE_RESPONSE, MOST_DIFFERENCE = 32, 5e-2
# As libraries below torch's allocator say that there is no memory left.
_EXHAUSTED = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Makes a step and returns its metrics.
Step = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class StepCase(Case):
    """A part of a case: its ways. room: bytes of memory to plan with in place of the device's."""

    ways: tuple[Way, ...] = PAIR
    toy: bool = False
    room: int | None = None

    @property
    def name(self) -> str:
        kind = "" if not self.toy else "toy-" if self.room is None else "toy-apart-"
        return kind + super().name

    @property
    def sizes(self) -> Sizes:
        return CONFIG_TOY if self.toy else CONFIG_4B


@dataclass
class Measured:
    """What the parts of a case gave; nothing in it holds a model.

    rate: of `rates`. held: bytes before a step; peaks: at a step's highest, by name. rounds: seconds by phase.
    recompute: the base does not fit as it is, so that all ways recompute layers and are compared like with like.
    """

    case: StepCase
    prefix: int
    grid: tuple[int, int, int]
    rate: dict[str, float]
    held: int
    peaks: dict[str, float] = field(default_factory=dict)
    rounds: dict[Way, list[dict[str, float]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    recompute: bool = False
    pace: dict[str, float] = field(default_factory=dict)

    def expected_s(self, config: Any, way: Way) -> float:
        """Of one step."""
        unknown = UNKNOWN_MODE * max(self.pace.values()) if self.pace else FIRST_PACE
        return self.predicted_s(config, way) * self.pace.get(way.mode, unknown)

    def loads(self, way: Way) -> list[StepLoad]:
        """Of each group."""
        response = self.case.response
        return [StepLoad(self.prefix, [response] * way.n, [response] * way.k, [self.grid])] * way.groups

    def predicted_s(self, config: Any, way: Way) -> float:
        """Of the passes, at the measured rates: all that runs, whether it is needed or not."""
        loads = self.loads(way)
        flops = step_flops(config, loads, way.mode, teacher_per_rollout=False, checkpointing=way.checkpointing)
        if way.mode == "padded":
            # The discriminator's rows come in several micro-batches, so they are read without gradient first.
            judged = [Load(load.prefix, [*load.rollouts, *load.teachers]) for load in loads]
            flops += padded_flops(config, judged, head=False, vision=False)
        return predicted_seconds(flops, self.rate)


class Rig:
    """The three models of some cases, and how steps are made on them."""

    def __init__(self, case: StepCase, world: World):
        self.sizes, self.world = case.sizes, world
        self.apart = is_apart(case, world.device)
        settings = settings_of("shared", case.prefix, case.response, 4, 8)
        self.state: StageState | None = make_state(self.sizes, settings, world, apart=self.apart)
        self.config = self.state.student.model.config
        self.liger, self.counts = describe_liger(settings.model.liger, world.device), counts_of(self.sizes)
        # Why the device can no longer be used.
        self.lost = ""
        # What is wrong with the steps; their times are taken all the same, and the benchmark fails.
        self.differences, self.gate, _ = attempt(lambda: self.check(128 if case.toy else 512), self.release)
        if not self.gate and max(self.differences.values()) >= MOST_DIFFERENCE:
            self.gate = f"gradient norms of padded and shared steps differ: {self.differences}"

    def prompts(self, prefix: int, groups: int = 1) -> list[Prompt]:
        prompts = make_prompts(self.state, prefix, groups)
        if self.world.device.type == "cuda":
            # As the media reader does.
            media = [tuple(replace(one, pixels=one.pixels.pin_memory()) for one in p.media) for p in prompts]
            prompts = [replace(p, media=own) for p, own in zip(prompts, media, strict=True)]
        return prompts

    def prepare(self, way: Way, prompts: list[Prompt], response: int, *overrides: str) -> Step:
        """Set everything up for steps of this way on the first prompts; the call makes one and returns its metrics."""
        state, prompts, prefix = self.state, prompts[: way.groups], len(prompts[0].input_ids)
        settings = settings_of(way.packing, prefix, response, way.k, way.n, *overrides, groups=way.groups)
        switch(state, way.packing, way.checkpointing)
        set_teacher(state, prompts, response, way.k)
        state.rollouts = Given(state.builder, response)
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
        """Relative differences of gradient norms between padded and shared prompts, on the same rollouts.

        One rollout of three is formatted, and the discriminator's reward hardly counts: its 16-bit scores of random
        texts err by a fifth of their spread, which advantages would hand on to the policy (5% of the norm, found on 36
        layers of width 512; so it is 0.1%, and 0.5% in the discriminator).
        """
        prompts, norms = self.prompts(prefix), {}
        for mode in ("shared", "padded"):
            way = Way(mode, 2, 3)
            run = self.prepare(way, prompts, GATE_RESPONSE, "reward.alpha=1e-3")
            self.state.rollouts = Formatted(self.state.builder, GATE_RESPONSE)
            metrics = run()
            norms[mode] = {name: metrics[f"{name}/grad_norm"] for name in ("policy", "discriminator")}
        return {name: abs(norms["padded"][name] / own - 1) for name, own in norms["shared"].items()}

    def held_bytes(self) -> int:
        """What is there before a step; on CPU the weights."""
        free_bytes(self.world.device)
        if self.world.device.type == "cuda":
            return torch.cuda.memory_allocated(self.world.device)
        return 3 * 2 * self.counts.total

    def release(self) -> None:
        """Forget a step that did not end, and give its memory back to the device."""
        try:
            for engine in (self.state.policy, self.state.discriminator):
                engine.discard()
            self.state.timer.take()
            free_bytes(self.world.device)
        except Exception as error:
            # After an illegal access every call fails; what was found before shall be written.
            self.lost = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"

    def close(self) -> None:
        """Free the models."""
        if self.state is not None:
            self.state.policy.close()
            self.state.discriminator.close()
            self.state = None
        free_bytes(self.world.device)


class Formatted(Given):
    """The first response is a right answer in the right format."""

    def responses(self, count: int, seed: int) -> list[Tensor]:
        start, end = (self.builder.encode_response(text) for text in ("<think>", "</think><answer>0.0 to 1.0</answer>"))
        # A word of its own, with the blank before it that encode_response would strip.
        filler = torch.tensor(self.builder.tokenizer.encode(" video", add_special_tokens=False)[:1])
        filler = filler.repeat(self.response - 1 - len(end))
        return [torch.cat([start[:1], filler, end]), *super().responses(count, seed)[1:]]


def is_apart(case: StepCase, device: torch.device) -> bool:
    """Whether the optimisers do not fit beside the models; asked while the device is empty."""
    room = case.room or free_bytes(device)
    return not fits(case.sizes, room, case.prefix + (BASE.k + BASE.n) * case.response)


def attempt(call: Callable[[], Any], free: Callable[[], object]) -> tuple[Any, str, bool]:
    """What it returns, "" and False; or None, why it failed, and whether for want of memory. `free` then gives back
    what is left of it.
    """
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
    """Nothing of the case is measured but the rates."""
    (prompt,) = rig.prompts(case.prefix)
    tokens = case.prefix + (BASE.k + BASE.n) * case.response
    rate = rates(rig.config, case.prefix, torch.bfloat16, rig.world.device, rows=tokens)
    return Measured(case, len(prompt.input_ids), prompt.media[0].grid_thw, rate, rig.held_bytes())


def sweep(rig: Rig, found: Measured, ways: tuple[Way, ...]) -> list[str]:
    """Add what these ways give to what was found; returns what failed, but for want of memory or time."""
    free_bytes(rig.world.device)
    prompts = rig.prompts(found.case.prefix, max(way.groups for way in ways))
    new = [way for way in ways if _variant(found, way) not in found.rounds]
    warm: list[Way] = []
    faults: list[str] = []
    for plain in ways:
        recomputing = replace(plain, checkpointing=True)
        for way in (recomputing,) if found.recompute else (plain, recomputing):
            # What is owed: to this way, to those that are warm, and where it is not new, to what it is there for.
            others = [*warm, *(_variant(found, other) for other in new[:1] if plain not in new)]
            owed = [way, *(own for own in others if own != way)]
            if rig.lost or seconds_left() < sum(_cost_s(rig, found, own) for own in owed):
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
    if any(way in [_variant(found, own) for own in new] for way in warm):
        faults += _time_rounds(rig, found, warm, prompts)
    for way in found.rounds:
        found.not_run.pop(way.name, None)
    if found.recompute and BASE in warm and not rig.lost:
        # It fitted once, and then not with what the allocator held: from the start, with recomputed layers.
        return faults + sweep(rig, found, ways)
    return faults


def _variant(found: Measured, way: Way) -> Way:
    return replace(way, checkpointing=True) if found.recompute else way


def _cost_s(rig: Rig, found: Measured, way: Way) -> float:
    """Of its first step, and of all rounds that it has not had."""
    rounds = max(1, _rounds_of(rig.config, found, way) - len(found.rounds.get(way, ())))
    return found.expected_s(rig.config, way) * (rounds + (not _is_slow(rig.config, found, way)))


def _first_step(rig: Rig, found: Measured, way: Way, prompts: list[Prompt]) -> tuple[str, bool]:
    """Its peak; of a slow way its one round. Why it failed, and whether for want of memory."""

    def first() -> tuple[int, dict[str, float]]:
        run = rig.prepare(way, prompts, found.case.response)
        peak, numbers = peak_extra_bytes(lambda: timed(rig, way, run, again=False), rig.world.device)
        return peak or 0, numbers

    result, reason, memory = attempt(first, rig.release)
    if not reason:
        # The least: an engine's first step makes its optimiser states, which are none of the step's own memory.
        found.peaks[way.name] = min(found.peaks.get(way.name, math.inf), found.held + result[0])
        if _is_slow(rig.config, found, way):
            _add(rig, found, way, result[1])
    return reason, memory


def _add(rig: Rig, found: Measured, way: Way, numbers: dict[str, float]) -> None:
    found.rounds.setdefault(way, []).append(numbers)
    least, most = PACES
    found.pace[way.mode] = min(most, max(least, numbers["step"] / found.predicted_s(rig.config, way)))


def _time_rounds(rig: Rig, found: Measured, ways: list[Way], prompts: list[Prompt]) -> list[str]:
    """Each way once, then further rounds as long as there is time; returns what failed, but for want of memory."""
    failed: dict[Way, str] = {}
    # The base comes in every part: as often as what it stands beside.
    others = [way for way in ways if replace(way, checkpointing=False) != BASE] or ways
    for number in range(max((_rounds_of(rig.config, found, way) for way in others), default=0)):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            late = seconds_left() < found.expected_s(rig.config, way) and way in found.rounds
            enough = number >= _rounds_of(rig.config, found, way) or _is_slow(rig.config, found, way)
            if late or enough or rig.lost or way in failed:
                continue

            def one(way: Way = way) -> dict[str, float]:
                return timed(rig, way, rig.prepare(way, prompts, found.case.response))

            numbers, reason, memory = attempt(one, rig.release)
            if not reason:
                _add(rig, found, way, numbers)
                continue
            if memory and way == BASE:
                found.recompute = True
                return []
            if way not in found.rounds:
                found.not_run[way.name] = reason
            failed[way] = "" if memory else f"{way.name}: {reason}"
    return [fault for fault in failed.values() if fault]


def _is_slow(config: Any, found: Measured, way: Way) -> bool:
    return way.mode != "shared" and found.predicted_s(config, way) > SLOW_S


def _rounds_of(config: Any, found: Measured, way: Way) -> int:
    if _is_slow(config, found, way):
        return 1
    return ROUNDS[way.mode] * (2 if way.mode == "shared" and found.predicted_s(config, way) < QUICK_S else 1)


def timed(rig: Rig, way: Way, run: Step, *, again: bool = True) -> dict[str, float]:
    """Seconds of a step by phase and in all (`step`), `device_allocs` and `tokens_computed`.

    again: a shared one for which the allocator's cache lacked a block, so that the device was waited for, is timed once
    more.
    """
    for _ in range(2):
        rig.state.timer.take()
        blocks, began = _device_allocs(rig.world.device), time.perf_counter()
        metrics = run()
        phases = {name.removeprefix("seconds/"): seconds for name, seconds in rig.state.timer.take().items()}
        phases["step"] = time.perf_counter() - began
        phases["device_allocs"] = _device_allocs(rig.world.device) - blocks
        phases["tokens_computed"] = metrics.get("tokens_computed", 0.0)
        if not (again and phases["device_allocs"] and way.mode == "shared" and seconds_left() > 2 * phases["step"]):
            break
    return phases


def _device_allocs(device: torch.device) -> int:
    return torch.cuda.memory_stats(device).get("num_device_alloc", 0) if device.type == "cuda" else 0
