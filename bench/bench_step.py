"""A whole stage-2 step, shared against padded and against a copy of the prompt per response: time by phase, and memory.

One step: vision, N rollouts per question, discriminator forward and backward on N rollouts and K teacher responses,
reference, policy forward and backward, both optimisers; DeepSpeed, as in training. Per case (prefix, response) the
variants are timed in the same rounds:

- `shared K=… N=…`: the trainer as it is (`stages.distill.step`).
- `padded K=… N=…`: the same with packing=padded; generation shares prompts here too.
- `copies K=… N=…`: `steps.copying_step`, prompt and video once per response everywhere, as in trainers whose batch is a
  list of samples (TRL, verl). Not their code: theirs has no discriminator, and on CPU no comparable step.

`training`: the step without rollouts, optimisers and matching, i.e. vision and the passes of the three models; that is
what the cost model predicts (`predicted_s`). What generation encodes for itself (`copies`) counts as rollout. Before
anything is timed, gradient norms of both engines after a step on the same rollouts are compared between all three ways.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest
import torch

from bench.flops import StepLoad, step_flops
from bench.groups import HIDDEN, LAYERS, Case
from bench.heads import Outcome
from bench.measure import Variant, quantiles
from bench.memory import keep_freed_memory, peak_extra_bytes
from bench.rates import predicted_seconds, rates
from bench.steps import Given, copying_step, make_prompts, make_state, set_teacher, settings_of
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill

BASE = "shared K=4 N=8"
# K and N by way; all of them where it takes minutes and not hours.
WAYS = {"shared": ((4, 8), (1, 8), (1, 1)), "padded": ((4, 8),), "copies": ((4, 8),)}
ALL_WAYS = {
    "shared": ((4, 8), (1, 8), (2, 8), (8, 8), (1, 1)),
    "padded": ((4, 8), (1, 8)),
    "copies": ((4, 8), (1, 8), (8, 8)),
}
SWEPT = ((1024, 64), (2048, 128))
PASSES = ("vision", "discriminator", "reference", "policy")
GROUPS = 1


@dataclass
class Way:
    """A variant: how, K, N, and a call that makes one step."""

    name: str
    mode: str
    load: StepLoad
    run: Callable[[], None]
    state: object


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        # So small a student leaves a GPU waiting for launches: bench_step_4b measures there.
        return []
    return [Case(512, 32)] if quick else [Case(1024, 64), Case(2048, 64), Case(2048, 128), Case(4096, 128)]


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


def make_ways(case: Case, world) -> list[Way]:
    states = {
        packing: make_state(settings_of(packing, case.prefix, case.response, 8, case.dtype), world)
        for packing in WAYS
        if packing != "copies"
    }
    prompts = make_prompts(states["shared"], case.prefix, GROUPS)
    grids = [frames.grid_thw for frames in prompts[0].media]
    ways = []
    for mode, counts in (ALL_WAYS if (case.prefix, case.response) in SWEPT else WAYS).items():
        packing = "shared" if mode == "shared" else "padded"
        state = states[packing]
        step = copying_step if mode == "copies" else distill.step
        for k, n in counts:
            settings = settings_of(packing, case.prefix, case.response, n, case.dtype)

            def run(state=state, step=step, settings=settings, k=k) -> None:
                set_teacher(state, prompts, case.response, k)
                state.settings = settings
                step(state, prompts, 0)

            load = StepLoad(len(prompts[0].input_ids), [case.response] * n, [case.response] * k, grids)
            ways.append(Way(f"{mode} K={k} N={n}", mode, load, run, state))
    return ways


def check(case: Case, world) -> dict[str, float]:
    """Largest relative difference of gradient norms from those of shared prompts, on rollouts given to all."""
    norms = {}
    for mode in WAYS:
        packing = "shared" if mode == "shared" else "padded"
        settings = settings_of(packing, case.prefix, case.response, 3, case.dtype)
        state = make_state(settings, world)
        prompts = make_prompts(state, case.prefix, GROUPS)
        set_teacher(state, prompts, case.response, 2)
        state.rollouts = Given(state.builder, case.response)
        step = copying_step if mode == "copies" else distill.step
        metrics = step(state, prompts, 0).metrics
        norms[mode] = (metrics["policy/grad_norm"], metrics["discriminator/grad_norm"])
        close(state)
    found = {mode: max(abs(a - b) / b for a, b in zip(norms[mode], norms["shared"], strict=True)) for mode in norms}
    assert max(found.values()) < (1e-3 if case.dtype == "float32" else 5e-2), f"gradient norms differ: {norms}"
    return found


def close(state) -> None:
    state.policy.close()
    state.discriminator.close()
    gc.collect()


def timed(way: Way) -> dict[str, float]:
    """Seconds by phase of one step, and in all."""
    way.state.timer.take()
    began = time.perf_counter()
    way.run()
    phases = {name.removeprefix("seconds/"): seconds for name, seconds in way.state.timer.take().items()}
    return {**phases, "step": time.perf_counter() - began, "training": sum(phases.get(name, 0.0) for name in PASSES)}


def numbers_of(way: Way, rounds: list[dict[str, float]], peak: int | None, config, rate: dict[str, float]) -> dict:
    flops = step_flops(config, [way.load] * GROUPS, way.mode, teacher_per_rollout=False)
    own = {
        "rounds": len(rounds),
        "forward": quantiles([1e3 * phases["step"] for phases in rounds]),
        "training": quantiles([1e3 * phases["training"] for phases in rounds]),
        "phases_s": {name: median(phases.get(name, 0.0) for phases in rounds) for name in rounds[0]},
        "predicted_s": predicted_seconds(flops, rate),
        "flop": flops.total,
    }
    return own | ({} if peak is None else {"peak_mib": peak / 2**20})


@pytest.mark.timeout(3600)
def test_step(case: Case, effort, report, world) -> None:
    differences = check(case, world)
    ways = make_ways(case, world)
    device = torch.device(case.device)
    peaks = {}
    for way in (ways[0], next(way for way in ways if way.mode != "shared")):
        # The first step of an engine makes its optimiser states, which are none of the step's own memory.
        way.run()
    for way in ways:
        peaks[way.name], _ = peak_extra_bytes(way.run, device)
    if case.device == "cpu":
        keep_freed_memory(2 * max(peak or 0 for peak in peaks.values()))
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
    for number in range(effort.always_rounds):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            if way.mode == "shared" or number < effort.least_rounds:
                found[way.name].append(timed(way))
    config = ways[0].state.student.model.config
    rate = rates(config, case.prefix, getattr(torch, case.dtype), device)
    numbers = {way.name: numbers_of(way, found[way.name], peaks[way.name], config, rate) for way in ways}
    record = {
        "bench": "step",
        "case": case.name,
        "shape": {"P": ways[0].load.prefix, "R": case.response, "groups": GROUPS, "D": HIDDEN, "layers": LAYERS},
        "dtype": case.dtype,
        "device": case.device,
        "baseline": BASE,
        "rates": rate,
        "differences": differences,
        "variants": numbers,
    }
    ours = Variant(BASE, ways[0].run)
    report(Outcome(record, ours, numbers[BASE]["forward"]["median_ms"] / 1e3))
    for state in {id(way.state): way.state for way in ways}.values():
        close(state)
