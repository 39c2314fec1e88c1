"""A whole stage-2 step of R-MSD at the shape of Qwen3-VL-4B with random weights, on one CUDA GPU.

The trainer's own step (`stages.distill.step`) on one group, or on several: vision, discriminator forward and backward
on N + K responses, reference, policy forward and backward, optimisers. Rollouts are given, not generated, and their
time is left out; learning rates are 0. The ways to make it run on the same three models: `shared` prompts, `padded`
rows, `copies` of prompt and video per response (`steps.copying_step`). micro_tokens is what the shared groups take as
one micro-batch of the discriminator. The same budget splits padded rows over many; and the discriminator's rows of a
group in more than one are read twice by the trainer, first without gradient.

Parts of the cases are measured by importance, and the record of a case is written anew after each part. Times are
medians over rounds in turned order, after a warm-up step each; of a slow way that is not shared the first step is the
only round. `passes_s`, the four passes by the trainer's PhaseTimer (CUDA events: waiting for the host counts), and
`whole_s`, the step by the clock without rollouts, with both optimisers.
Where two full optimisers do not fit (`student_4b.fits`) the passes run on `student_4b.Passes`, and twice the step that
bench_optimizer_4b has recorded is added; without such a record `whole_s` has no optimisers. `optimizer` says which. Not
in it then: how DeepSpeed adds 16-bit gradients to its float32 ones in backward (`accumulation_s` for one backward), and
its hooks. Never in it: data loading, checkpoints, other GPUs.

A way that runs out of memory is in `not_run`, and comes again as a variant of its own whose decoder layers are
recomputed in backward ("..., checkpointing"); where that is the base, all ways of the case recompute, so that like is
compared with like. In `not_run` is also what would not end by RMSD_BENCH_UNTIL (unix time), and what fails: then the
benchmark fails as well, once the rest is written. So it does where gradient norms of a shared and a padded step differ
(`gate`).

`utilisation`: FLOPs of `bench.flops.step_flops` for shared prompts, whatever the way computes, over time and
the datasheet's dense bf16 peak; `utilisation_of_measured_gemm`: over the rate of GEMMs in `rates`. `predicted_s`, of
the passes: all FLOPs that run, repeated and recomputed ones too, at `rates`. `peak_mib`: `held_mib` before the step and
what it adds. `device_allocs`: blocks that a timed step had to ask the device for and so waited; a shared one is then
timed again at once, since in training the allocator's cache has its shapes.

Where to look should utilisation stay below 45%, by counts and not measured, per token and layer (its GEMMs, forward and
backward: 0.61 GFLOP, 0.8 us at 750 TFLOP/s):
- attention: 31% of all FLOPs at (8192, 512), 10% at (2048, 128). At 330 TFLOP/s, less than half of the GEMMs' rate,
  it alone bounds the passes to 55% and 67% of an H100's peak;
- norms, rotation, SwiGLU, sums: 0.4 MB read and written, 0.1 us at 4 TB/s; without Liger's kernels (`liger`) thrice
  that;
- two optimisers: some 130 bytes per parameter each, 0.25 s at 4 TB/s together. They weigh much here: with the recipe a
  GPU has 16 groups per step and an eighth of the states. Recomputed layers: a third of the passes;
- the host: 25 launches per layer forward, 0.5 to 1 ms of Python; it leads at 3,000 tokens or fewer, most in the
  reference, and each pass waits for it at six boolean indices of deepstack;
- vision: one Conv3d in bf16, for which some versions of cuDNN have no fast kernel.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench.flops import step_flops
from bench.measure import quantiles
from bench.rates import datasheet_peak
from bench.records import hardware_of, read_lines, save, surroundings, table
from bench.section_log import NO_TIME, seconds_left
from bench.student_4b import CONFIG_TOY, activation_bytes, counts_of
from bench.sweep_4b import BASE, COPIES, COUNTS, PADDED, PAIR, SEVERAL, Measured, Rig, StepCase, Way, begin, sweep
from rmsd_fast.runtime.process_group import start, stop

LONG, SHORT, MIDDLE, FLAT = (8192, 512), (2048, 128), (2048, 512), (8192, 128)
SHAPES = (LONG, SHORT, MIDDLE, FLAT)
# By importance: a run may end before the last. Several groups are for short rows, which they fill up.
PLAN = (
    *((shape, PAIR) for shape in SHAPES),
    (LONG, PADDED),
    (SHORT, SEVERAL),
    *((shape, COUNTS) for shape in SHAPES),
    *((shape, PADDED) for shape in (SHORT, MIDDLE, FLAT)),
    # Whole rows of the others keep more than a device has.
    (SHORT, COPIES),
)
PASSES = ("vision", "discriminator", "reference", "policy")


def cases(quick: bool, device: str) -> list[StepCase]:
    """None on CPU, where one such step takes an hour."""
    plan = PLAN[:2] if quick else PLAN
    return [StepCase(*shape, "bfloat16", device, ways=ways) for shape, ways in plan] if device == "cuda" else []


def toy_cases(device: str) -> list[StepCase]:
    """A rehearsal of both modes: with optimisers in the step, and apart."""
    toy = {"dtype": "bfloat16", "device": device, "toy": True}
    parts = (PAIR, (*PADDED, *SEVERAL[1:]), (*COUNTS, *COPIES[1:]))
    found = [StepCase(128, 16, ways=ways, **toy) for ways in parts]
    return [*found, StepCase(128, 16, ways=PAIR, room=room_for_apart(), **toy)]


def room_for_apart() -> int:
    """Bytes in which the toy's optimisers do not fit, and not all of its layers with one."""
    counts = counts_of(CONFIG_TOY)
    return 24 * (counts.trained - counts.layer)


def numbers_of(rig: Rig, found: Measured, way: Way, peak: float | None, optimizer_s: float | None) -> dict[str, Any]:
    """A variant of the record. peak: FLOP/s. optimizer_s: of both together where timed apart, None: not known."""
    rounds, response = found.rounds[way], found.case.response
    flop = step_flops(rig.config, found.loads(way), "shared", teacher_per_rollout=False).total
    passes = [sum(phases.get(name, 0.0) for name in PASSES) for phases in rounds]
    whole = [phases["step"] - phases["rollout"] for phases in rounds]
    if rig.apart:
        whole = [s - phases["optimizer"] + (optimizer_s or 0.0) for s, phases in zip(whole, rounds, strict=True)]
    spent = {"passes": median(passes), "whole": None if rig.apart and optimizer_s is None else median(whole)}

    def rate_over(unit: float | None) -> dict[str, float | None]:
        return {name: None if unit is None or s is None else flop / s / unit for name, s in spent.items()}

    tokens = way.groups * (found.prefix + (way.k + way.n) * response)
    return {
        "rounds": len(rounds),
        "forward": quantiles([1e3 * seconds for seconds in whole]),
        "training": quantiles([1e3 * seconds for seconds in passes]),
        "passes_s": median(passes),
        "whole_s": median(whole),
        "optimizer_s": optimizer_s if rig.apart else median(phases["optimizer"] for phases in rounds),
        "phases_s": {name: median(phases.get(name, 0.0) for phases in rounds) for name in (*PASSES, "matching")},
        "predicted_s": found.predicted_s(rig.config, way),
        "model_flop": flop,
        "tflop_per_s": rate_over(1e12),
        "utilisation": rate_over(peak),
        "utilisation_of_measured_gemm": rate_over(found.rate["matmul"]),
        "peak_mib": found.peaks[way.name] / 2**20,
        "tokens_computed": rounds[-1]["tokens_computed"],
        "device_allocs": [phases["device_allocs"] for phases in rounds],
    } | (
        {"activations_estimated_mib": activation_bytes(rig.sizes, tokens, checkpointing=way.checkpointing) / 2**20}
        if way.mode == "shared"
        else {}
    )


def record_of(rig: Rig, found: Measured, optimizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """optimizer: of `optimizer_of`, where it was measured apart."""
    case, text = found.case, rig.sizes.text
    device = torch.cuda.get_device_name(rig.world.device) if case.device == "cuda" else case.device
    peak = datasheet_peak(device)
    optimizer_s = None if optimizer is None else 2 * optimizer["seconds"]
    variants = {way.name: numbers_of(rig, found, way, peak, optimizer_s) for way in found.rounds}
    if not rig.apart:
        optimizer = {"how": "in the step"}
    elif optimizer is None:
        optimizer = {"how": "not measured; whole_s is without"}
    else:
        optimizer = {"how": "apart" + ", scaled by parameters" * optimizer["scaled"]} | optimizer
    remarks = {"optimizer": optimizer["how"]}
    if peak is None:
        remarks["utilisation"] = f"no datasheet's peak is known for {device}"
    if rig.gate:
        remarks["gate"] = rig.gate
    if case.device == "cuda" and "attention as torch chooses" not in found.rate:
        remarks["attention"] = "no flash kernel takes these sizes; predicted at the rate of what torch chooses"
    if BASE.name not in variants:
        why = found.not_run.get(BASE.name, "not tried")
        remarks[BASE.name] = f"not as it is ({why}); all ratios are to another variant"
    shape = {"P": found.prefix, "R": case.response, "D": text["hidden_size"]}
    counts = {"parameters": rig.counts.total, "trained": rig.counts.trained}
    return {
        "bench": "step_4b",
        "case": case.name,
        "shape": shape | {"layers": text["num_hidden_layers"], **counts},
        "student": f"{rig.sizes.name}, random weights",
        "dtype": case.dtype,
        "device": case.device,
        "baseline": BASE.name if BASE.name in variants else next(iter(variants)),
        "rates": found.rate,
        "peak_flop_per_s": peak,
        "differences": rig.differences,
        "liger": rig.liger,
        "held_mib": found.held / 2**20,
        "optimizer": optimizer,
        "variants": variants,
        "not_run": found.not_run,
        "remarks": remarks,
    }


def optimizer_of(place: Path | None, rig: Rig, toy: bool) -> dict[str, Any] | None:
    """What bench_optimizer_4b has recorded of this student on this hardware, where these records go."""
    path = None if place is None else place if place.suffix == ".jsonl" else place / "optimizer_4b.jsonl"
    found = None
    for record in read_lines(path) if path is not None and path.exists() else ():
        same = record["bench"] == "optimizer_4b" and hardware_of(record) == hardware_of(surroundings())
        if same and record["case"] == rig.sizes.name and record["quick"] == toy:
            found = record["optimizer"]
    return found


class Bench:
    """The models of the case at hand, and what was found on them so far."""

    def __init__(self) -> None:
        self.rig: Rig | None = None
        self.kind: tuple | None = None
        self.found: dict[str, Measured] = {}
        self.failed: dict[tuple, str] = {}

    def rig_of(self, case: StepCase) -> Rig:
        """Made once for all cases of a kind."""
        kind = (case.sizes, case.room)
        if kind in self.failed:
            pytest.skip(f"its models could not be made: {self.failed[kind]}")
        if self.rig is not None and self.rig.lost:
            pytest.skip(f"the device can no longer be used: {self.rig.lost}")
        if self.rig is None or self.kind != kind:
            self.close()
            self.kind = kind
            try:
                self.rig = Rig(case, start())
            except Exception as error:
                self.failed[kind] = f"{type(error).__name__}: {error}"
                # pytest keeps the error to the end, and its frames what was made of the models.
                traceback.clear_frames(error.__traceback__)
                raise
        return self.rig

    def found_of(self, rig: Rig, case: StepCase) -> Measured:
        if case.name not in self.found:
            self.found[case.name] = begin(rig, case)
        return self.found[case.name]

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


@pytest.fixture
def publish(request: pytest.FixtureRequest, capsys, quick: bool) -> Callable[[dict], None]:
    """Prints and saves a record. Not `report`: pytest-benchmark would pay for more steps."""

    def run(record: dict) -> None:
        record = {**record, "quick": quick}
        with capsys.disabled():
            print(table(record), flush=True)
        if request.config.getoption("record"):
            save(record, request.config.getoption("record"))

    return run


@pytest.mark.timeout(600)
def test_step(case: StepCase, bench: Bench, publish, request: pytest.FixtureRequest) -> None:
    if seconds_left() <= 0:
        pytest.skip(NO_TIME)
    rig = bench.rig_of(case)
    found = bench.found_of(rig, case)
    before = sum(map(len, found.rounds.values()))
    faults = sweep(rig, found, case.ways)
    if sum(map(len, found.rounds.values())) == before:
        assert not faults, faults
        pytest.skip(f"nothing ran: {'; '.join(sorted(set(found.not_run.values()))) or NO_TIME}")
    optimizer = optimizer_of(request.config.getoption("record"), rig, case.toy) if rig.apart else None
    publish(record_of(rig, found, optimizer))
    assert not faults and not rig.gate, [*faults, rig.gate]
