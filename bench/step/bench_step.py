"""A whole stage-2 step: shared prompts against padded rows and against a copy of the prompt per response.

One step is vision, rollouts, discriminator on N rollouts and K teacher responses, reference, policy, both optimizers,
by the trainer's own code. On a CPU it runs with the small student and generates its rollouts; on a GPU it has the shape
of Qwen3-VL-4B, and rollouts are given and not timed (models.py). The ways share the same three models:

- `shared K=… N=…`: the trainer as it is.
- `padded K=… N=…`: packing=padded; the video is encoded once, and generation shares prompts here too.
- `copies K=… N=…`: prompt and video once per response everywhere (copies.py).

Gradient norms of the ways are compared first, on the same rollouts (`differences`). If they are too far apart, `gate`
says so, and the benchmark fails after the steps were timed. `passes_s` (`training` in ms) is the four passes by the
trainer's PhaseTimer, `whole_s` the step by the clock. Where two full optimizers do not fit, `whole_s` is without them
until bench_optimizer.py has run; `optimizer` says which. A way that runs out of memory is in `not_run`, and comes again
with recomputed decoder layers ("..., checkpointing"); if that is the base, all ways of the case recompute.

`utilisation` counts the FLOPs of shared prompts, whatever the way computes, over the datasheet's dense bf16 peak, and
`utilisation_of_measured_gemm` over the rate of GEMMs in `rates`. `predicted_s` is all FLOPs of the passes at `rates`.
`peak_mib` is `held_mib` before the step (0 on CPU) and what the step adds.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from bench.core.goals import SWEPT
from bench.core.measure import Effort, facts_of, quantiles
from bench.core.report import PASSES
from bench.cuda.section_log import NO_TIME, seconds_left
from bench.step import trl_peer
from bench.step.flops import step_flops
from bench.step.models import CONFIG_TOY, SMALL, counts_of, start, stop
from bench.step.rates import datasheet_peak
from bench.step.sweep import Measured, Rig, begin, sweep
from bench.step.way import (
    ALL_SMALL,
    BASE,
    COPIES,
    COUNTS,
    FEW_SMALL,
    PADDED,
    PAIR,
    SEVERAL,
    Rounds,
    StepCase,
    Way,
)

NAME = "step"
LONG, SHORT, MIDDLE, FLAT = SHAPES = ((8192, 512), (2048, 128), (2048, 512), (8192, 128))
# By importance: a run may end before the last. Several groups are for short rows, which they fill up.
PLAN = (
    *((LONG, PAIR), (LONG, PADDED), (SHORT, PAIR), (MIDDLE, PAIR), (FLAT, PAIR), (SHORT, SEVERAL)),
    *((shape, COUNTS) for shape in SHAPES),
    *((shape, PADDED) for shape in (SHORT, MIDDLE, FLAT)),
    # Whole rows of the others keep more than a device has.
    (SHORT, COPIES),
)
_SMALL_SHAPES = ((1024, 64), (2048, 64), (2048, 128), (4096, 128))


def cases(quick: bool, device: str) -> list[StepCase]:
    """So small a student leaves a GPU waiting for launches, and a step at the shape of 4B takes a CPU an hour."""
    if device == "cuda":
        plan = PLAN[:2] if quick else PLAN
        return [StepCase(*shape, "bfloat16", device, ways=ways) for shape, ways in plan]
    found = [StepCase(*shape, sizes=SMALL, ways=FEW_SMALL) for shape in ([(512, 32)] if quick else _SMALL_SHAPES)]
    return [StepCase(c.prefix, c.response, sizes=SMALL, ways=ALL_SMALL) if c.name in SWEPT else c for c in found]


def toy_cases(device: str) -> list[StepCase]:
    """A rehearsal of both modes: with optimizers in the step, and apart."""
    parts = (PAIR, (*PADDED, *SEVERAL[1:]), (*COUNTS, *COPIES[1:]))
    found = [StepCase(128, 16, "bfloat16", device, sizes=CONFIG_TOY, ways=ways) for ways in parts]
    apart = StepCase(128, 16, "bfloat16", device, sizes=CONFIG_TOY, ways=PAIR, room=room_for_apart())
    return [*found, apart]


def room_for_apart() -> int:
    """Bytes in which the toy's optimizers do not fit, and not all of its layers with one."""
    counts = counts_of(CONFIG_TOY)
    return 24 * (counts.trained - counts.layer)


def numbers_of(rig: Rig, found: Measured, way: Way, peak: float | None) -> dict[str, Any]:
    """A variant of the record. peak: FLOP/s. Optimizers that are measured apart are not in it."""
    rounds = found.rounds[way]
    flop = step_flops(rig.config, found.loads(way), "shared").total
    passes = [sum(phases.get(name, 0.0) for name in PASSES) for phases in rounds]
    left_out = ("rollout",) * found.case.gives_rollouts + ("optimizer",) * rig.apart
    whole = [phases["step"] - sum(phases[name] for name in left_out) for phases in rounds]
    spent = {"passes": median(passes), "whole": None if rig.apart else median(whole)}
    phases = [name for name in rounds[0] if name not in ("step", "tokens_computed")]
    return {
        "rounds": len(rounds),
        "forward": quantiles([1e3 * seconds for seconds in whole]),
        "training": quantiles([1e3 * seconds for seconds in passes]),
        "passes_s": median(passes),
        "whole_s": median(whole),
        "optimizer_s": None if rig.apart else median(phases["optimizer"] for phases in rounds),
        "phases_s": {name: median(own.get(name, 0.0) for own in rounds) for name in phases},
        "predicted_s": found.predicted_s(way),
        "model_flop": flop,
        **rates_of(flop, spent, peak, found.rate["matmul"]),
        "peak_mib": found.peaks[way.name] / 2**20,
        "tokens_computed": rounds[-1]["tokens_computed"],
    }


def rates_of(flop: float, spent: dict[str, float | None], peak: float | None, gemm: float) -> dict[str, dict]:
    """FLOP over seconds, absolute and as shares. None: the time or the peak is not known."""

    def over(unit: float | None) -> dict[str, float | None]:
        return {name: None if unit is None or s is None else flop / s / unit for name, s in spent.items()}

    return {"tflop_per_s": over(1e12), "utilisation": over(peak), "utilisation_of_measured_gemm": over(gemm)}


def record_of(rig: Rig, found: Measured) -> dict[str, Any]:
    case = found.case
    device = torch.cuda.get_device_name(rig.world.device) if case.device == "cuda" else case.device
    peak = datasheet_peak(device)
    variants = {way.name: numbers_of(rig, found, way, peak) for way in found.rounds}
    how = "not measured; whole_s is without" if rig.apart else "in the step"
    remarks = {"optimizer": how}
    if peak is None and case.device == "cuda":
        remarks["utilisation"] = f"no datasheet's peak is known for {device}"
    if rig.gate:
        remarks["gate"] = rig.gate
    if BASE.name not in variants:
        why = found.not_run.get(BASE.name, "not tried")
        remarks[BASE.name] = f"not as it is ({why}); all ratios are to another variant"
    text, counts = rig.config.text_config, {"parameters": rig.counts.total, "trained": rig.counts.trained}
    shape = {"P": found.prefix, "R": case.response, "D": text.hidden_size, "layers": text.num_hidden_layers}
    baseline = BASE.name if BASE.name in variants else next(iter(variants))
    return facts_of(NAME, case, shape | counts, baseline) | {
        "student": f"{rig.sizes.name}, random weights",
        "rates": found.rate,
        "peak_flop_per_s": peak,
        "differences": rig.differences,
        "liger": rig.liger,
        "held_mib": found.held / 2**20,
        "optimizer": {"how": how},
        "variants": variants,
        "not_run": found.not_run,
        "remarks": remarks,
    }


def with_optimizer(record: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
    """The record of steps without optimizers, with twice the step that bench_optimizer.py has measured."""
    both = 2 * optimizer["seconds"]
    variants = {}
    for name, own in record["variants"].items():
        whole = own["whole_s"] + both
        spent, gemm = {"passes": own["passes_s"], "whole": whole}, record["rates"]["matmul"]
        times = {key: ms + 1e3 * both for key, ms in own["forward"].items()}
        rates = rates_of(own["model_flop"], spent, record["peak_flop_per_s"], gemm)
        variants[name] = own | {"forward": times, "whole_s": whole, "optimizer_s": both} | rates
    optimizer = {"how": "apart" + ", scaled by parameters" * optimizer["scaled"]} | optimizer
    remarks = record["remarks"] | {"optimizer": optimizer["how"]}
    return record | {"variants": variants, "optimizer": optimizer, "remarks": remarks}


def lacks_optimizer(record: dict[str, Any]) -> bool:
    return record["bench"] == NAME and any(own.get("optimizer_s", 0.0) is None for own in record["variants"].values())


class Bench:
    """The models of the case at hand, and what was found on them so far."""

    def __init__(self) -> None:
        self.rig: Rig | None = None
        self.kind: tuple | None = None
        self.found: dict[str, Measured] = {}
        self.failed: dict[tuple, str] = {}

    def rig_of(self, case: StepCase, rounds: Rounds) -> Rig:
        """Return the models, which are made once for all cases of a kind."""
        kind = (case.sizes, case.room, case.dtype)
        if kind in self.failed:
            pytest.skip(f"its models could not be made: {self.failed[kind]}")
        if self.rig is not None and self.rig.lost:
            pytest.skip(f"the device can no longer be used: {self.rig.lost}")
        if self.rig is None or self.kind != kind:
            self.close()
            self.kind = kind
            try:
                self.rig = Rig(case, start(), rounds)
            except Exception as error:
                self.failed[kind] = f"{type(error).__name__}: {error}"
                # pytest keeps the error to the end, and its frames what was made of the models.
                traceback.clear_frames(error.__traceback__)
                raise
        return self.rig

    def close(self) -> None:
        if self.rig is not None:
            self.rig.close()
        self.rig = None


@pytest.fixture(scope="module")
def bench():
    bench = Bench()
    yield bench
    bench.close()
    stop()


@pytest.mark.timeout(3600)
def test_step(case: StepCase, bench: Bench, effort: Effort, publish: Callable[[dict], dict]) -> None:
    if seconds_left() <= 0:
        pytest.skip(NO_TIME)
    small = Rounds(effort.always_rounds, effort.least_rounds, slow_s=float("inf"), quick_s=0.0)
    rig = bench.rig_of(case, small if case.sizes is SMALL else Rounds())
    if case.name not in bench.found:
        bench.found[case.name] = begin(rig, case)
    found = bench.found[case.name]
    before = sum(map(len, found.rounds.values()))
    faults = sweep(rig, found, case.ways)
    if sum(map(len, found.rounds.values())) == before:
        assert not faults, faults
        pytest.skip(f"nothing ran: {'; '.join(sorted(set(found.not_run.values()))) or NO_TIME}")
    publish(record_of(rig, found))
    assert not faults and not rig.gate, [*faults, rig.gate]


@pytest.mark.timeout(3600)
def test_against_trl(quick: bool, toy: bool, publish: Callable[[dict], dict]) -> None:
    """Rollouts, reference, policy and optimizer like for like, and ours with the discriminator as well."""
    if toy or torch.cuda.is_available():
        pytest.skip("a benchmark for CPUs, not part of a rehearsal")
    missing = trl_peer.missing()
    if missing:
        pytest.skip(missing)
    publish(trl_peer.measure(*((2, 1, 32) if quick else (4, 2, 128))))
