"""Test the benchmark of whole steps at the shape of Qwen3-VL-4B: its counts, and a complete run on a toy model."""

from __future__ import annotations

import json
import math
import time
import weakref

import pytest
import torch

from bench.core.goals import CUDA_STEPS, NOT_MEASURED, verdicts
from bench.core.metrics import STEP_BASE, STEP_ONE, STEP_PADDED, STEP_SEVERAL
from bench.core.report import case_text
from bench.cuda.section_log import NO_TIME
from bench.step import bench_optimizer, bench_step, rates
from bench.step import sweep as sweeps
from bench.step.flops import step_flops
from bench.step.models import (
    CONFIG_4B,
    Passes,
    activation_bytes,
    counts_of,
    fits,
    layers_that_fit,
    make_config,
    make_prompts,
)
from bench.step.sweep import Measured, Rig, attempt, begin, sweep
from bench.step.way import BASE, Rounds, StepCase, Way
from rmsd_fast.runtime import engine
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.stages import distill

H100, H200 = 85e9, 150e9
ENGINES, *_, APART = bench_step.toy_cases("cpu")
FEW = (Way("shared", 4, 8), Way("padded", 4, 8), Way("shared", 2, 3, groups=2), Way("copies", 2, 3))


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.fixture(scope="module")
def rig(world):
    """Return a rig of passes without optimizers."""
    rig = Rig(APART, world, Rounds())
    yield rig
    rig.close()


def test_the_student_has_the_size_of_qwen3_vl_4b():
    counts = counts_of(CONFIG_4B)
    # The total is 4.44B, of which the decoder has 4.02B: 151,936 x 2560 tied embeddings, 36 layers, and the last norm.
    assert counts.total == 4_437_815_808
    assert counts.layer == 2560 * 128 * (32 + 8 + 8 + 32) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128
    assert counts.trained == 151_936 * 2560 + 36 * counts.layer + 2560


def test_bytes_by_hand():
    # A token and layer stores these 16-bit numbers: 4 x 2560, 3 x 32 x 128, 3 x 8 x 128, 3 x 9728.
    assert activation_bytes(CONFIG_4B, 10) == 2 * 10 * 36 * (10240 + 12288 + 3072 + 29184)
    assert activation_bytes(CONFIG_4B, 10, checkpointing=True) == 2 * 10 * (36 * 2560 + 54784)
    assert not fits(CONFIG_4B, H200, 3584) and fits(CONFIG_4B, 2 * H200, 3584)
    assert [layers_that_fit(CONFIG_4B, room) for room in (H200, H100, 1e9)] == [36, 30, 1]


def test_model_flops_of_a_load_by_hand():
    # The load is a prompt of 100 tokens with 16 patches, K=1, N=2, and responses of 10.
    (load,) = Measured(StepCase(128, 10), None, 100, (1, 4, 4), {}, 0).loads(Way("shared", 1, 2))
    weights = 36 * (2560 * 128 * (32 + 8 + 8 + 32) + 3 * 2560 * 9728)
    # Policy forward and backward and reference forward take 120 tokens; discriminator forward and backward take 130.
    dense = 2 * weights * (120 * 3 + 120 + 130 * 3)
    pairs = 100 * 101 // 2 + 2 * (55 + 1000), 100 * 101 // 2 + 3 * (55 + 1000)
    attention = 4 * 36 * 32 * 128 * (4 * pairs[0] + 3 * pairs[1])
    head = 2 * 2560 * 151_936 * 20 * 4
    patch = 2 * 3 * 2 * 16 * 16 * 1024 + 2 * 24 * (4 * 1024**2 + 2 * 1024 * 4096)
    vision = 16 * patch + 4 * 2 * 4 * (4096**2 + 4096 * 2560) + 4 * 24 * 1024 * 16**2
    found = step_flops(make_config(CONFIG_4B), [load], "shared")
    assert found.total == dense + attention + head + vision


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", None),
    ],
)
def test_peaks_of_datasheets(name, peak):
    assert rates.datasheet_peak(name) == peak


def test_cases_of_a_gpu_and_their_names():
    cases = bench_step.cases(False, "cuda")
    # Cases with goals come first, and together they cover all shapes.
    assert list(dict.fromkeys(case.name for case in cases[:5])) == list(CUDA_STEPS)
    assert all(case.ways[0] == BASE for case in cases) and BASE.name == STEP_BASE
    ways = {case.name: {way.name for other in cases if other.name == case.name for way in other.ways} for case in cases}
    assert {STEP_ONE, STEP_PADDED} <= set.intersection(*ways.values())
    assert STEP_SEVERAL in ways["P2048-R128-bfloat16"]


def verdicts_of(record: dict) -> list:
    """Return the verdicts as if the record were the first case of a GPU."""
    moved = record | {"case": CUDA_STEPS[0], "device": "cuda", "quick": False}
    return [verdict for verdict in verdicts([moved], "cuda") if verdict.where == f"step {CUDA_STEPS[0]}"]


def check_record(record: dict, names: set[str]) -> None:
    """Check that the record is complete, plausible, and in the form that table, goals and summary read."""
    assert set(record["variants"]) == names and record["baseline"] in names
    for name, own in record["variants"].items():
        assert 0 < own["passes_s"] < own["whole_s"] < 60 and own["rounds"] >= 1, name
        assert own["passes_s"] == pytest.approx(own["training"]["median_ms"] / 1e3)
        assert own["passes_s"] <= sum(own["phases_s"].values()) * 1.5
        assert own["predicted_s"] > 0 and own["peak_mib"] > record["held_mib"] == 0
        assert own["tflop_per_s"]["passes"] == pytest.approx(own["model_flop"] / own["passes_s"] / 1e12)
        assert 0 < own["utilisation_of_measured_gemm"]["passes"] < 10
        # The peak rate of a CPU is unknown.
        assert own["utilisation"] == {"passes": None, "whole": None}
    assert max(record["differences"].values()) < sweeps.MOST_DIFFERENCE["bfloat16"]
    assert "shared K=4 N=8" in case_text(record) and json.dumps(record)
    found = verdicts_of(record)
    assert any("cost model" in verdict.what for verdict in found)
    assert {verdict.status for verdict in found if "utilisation" in verdict.what} == {NOT_MEASURED}


def test_toy_with_optimizers_in_the_step(world):
    rig = Rig(ENGINES, world, Rounds())
    try:
        assert not rig.apart and not rig.gate
        found = begin(rig, ENGINES)
        # As in a real run, the sweep has two parts with the base in both.
        assert sweep(rig, found, FEW[:2]) == [] and sweep(rig, found, (BASE, *FEW[2:])) == []
        record = bench_step.record_of(rig, found)
    finally:
        rig.close()
    check_record(record, {way.name for way in FEW})
    # In each part, the base takes as many rounds as the variant that it is compared with: 2 for padded rows, and 6 for
    # the quick shared variant.
    assert record["variants"]["shared K=4 N=8"]["rounds"] == 2 + 6
    assert record["optimizer"] == {"how": "in the step"} and not record["not_run"]
    prefix = record["shape"]["P"]
    assert record["variants"]["shared K=4 N=8"]["tokens_computed"] == 2 * prefix + 20 * 16
    assert record["variants"]["shared K=2 N=3, 2 groups"]["tokens_computed"] == 2 * (2 * prefix + 8 * 16)
    # Rows have one prompt and one response: 8 in the policy, and 12 in the discriminator, read twice.
    assert record["variants"]["padded K=4 N=8"]["tokens_computed"] == (8 + 2 * 12) * (prefix + 16)
    # Recomputation does not count as useful work.
    flops = {own["model_flop"] for name, own in record["variants"].items() if name.endswith("K=4 N=8")}
    assert len(flops) == 1


def test_separate_optimizer_measurement(world, rig):
    found = begin(rig, APART)
    assert sweep(rig, found, FEW[:1]) == []
    record = bench_step.record_of(rig, found)
    check_record(record, {BASE.name})
    assert "not measured" in record["optimizer"]["how"]
    assert record["variants"][BASE.name]["tflop_per_s"]["whole"] is record["variants"][BASE.name]["optimizer_s"] is None
    optimizer = bench_optimizer.measure_optimizer(APART, world)
    # Not all of the toy's 4 layers fit with their optimizer.
    assert optimizer["scaled"] and optimizer["layers"] < 4
    assert optimizer["seconds"] == pytest.approx(optimizer["measured_s"] * rig.counts.trained / optimizer["parameters"])
    assert bench_step.lacks_optimizer(record)
    whole = bench_step.with_optimizer(record, optimizer)
    check_record(whole, {BASE.name})
    assert not bench_step.lacks_optimizer(whole)
    ours, before = (one["variants"][BASE.name] for one in (whole, record))
    assert ours["whole_s"] == pytest.approx(before["whole_s"] + 2 * optimizer["seconds"])
    assert ours["tflop_per_s"]["whole"] < ours["tflop_per_s"]["passes"]


def failing(monkeypatch, error: Exception, which) -> list:
    """Make steps fail if `which` accepts their settings and model, and return weak references to their objects."""
    step, lost = distill.step, []

    def fail(state, prompts, number):
        if which(state.settings, state.student.model):
            activations = torch.zeros(10)
            lost.append(weakref.ref(activations))
            raise error
        return step(state, prompts, number)

    monkeypatch.setattr(distill, "step", fail)
    return lost


def test_all_variants_recompute_if_the_base_does_not_fit(rig, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
    shared = failing(
        monkeypatch, error, lambda settings, model: settings.packing == "shared" and not model.is_gradient_checkpointing
    )
    found = begin(rig, APART)
    assert sweep(rig, found, FEW[:2]) == []
    assert [way.name for way in found.rounds] == ["shared K=4 N=8, checkpointing", "padded K=4 N=8, checkpointing"]
    assert found.not_run == {"shared K=4 N=8": "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."}
    assert shared and all(reference() is None for reference in shared)
    record = bench_step.record_of(rig, found)
    assert record["baseline"] == "shared K=4 N=8, checkpointing"
    assert "another variant" in record["remarks"]["shared K=4 N=8"] and "out of memory" in case_text(record)
    # The prediction includes recomputed layers, and the utilization excludes them.
    plain, recomputed = BASE, Way("shared", 4, 8, checkpointing=True)
    assert found.predicted_s(recomputed) > 1.15 * found.predicted_s(plain)


def test_a_failing_variant_does_not_affect_others(rig, monkeypatch):
    lost = failing(monkeypatch, ValueError("wrong"), lambda settings, model: settings.packing == "padded")
    found = begin(rig, APART)
    faults = sweep(rig, found, FEW[:3])
    assert faults == ["padded K=4 N=8: ValueError: wrong"] and found.not_run == {"padded K=4 N=8": "ValueError: wrong"}
    assert [way.name for way in found.rounds] == ["shared K=4 N=8", "shared K=2 N=3, 2 groups"]
    assert len(found.rounds[BASE]) == 6 and all(reference() is None for reference in lost)
    assert attempt(lambda: 1, rig.release) == (1, "", False)


def test_a_failing_gate_is_reported_and_steps_are_still_timed(world, monkeypatch):
    monkeypatch.setattr(sweeps, "MOST_DIFFERENCE", {"bfloat16": -1.0})
    rig = Rig(APART, world, Rounds())
    try:
        found = begin(rig, APART)
        assert sweep(rig, found, FEW[:1]) == [] and rig.gate.startswith("gradient norms of padded and shared")
        record = bench_step.record_of(rig, found)
    finally:
        rig.close()
    assert record["remarks"]["gate"] == rig.gate and BASE.name in record["variants"]
    assert [v.status for v in verdicts_of(record) if "gradient norms" in v.what] == ["MISSED"]


def test_models_that_cannot_be_built_are_not_tried_again(world, monkeypatch):
    made = []

    def fail(case, world, rounds):
        made.append(case)
        raise RuntimeError("no room")

    monkeypatch.setattr(bench_step, "Rig", fail)
    bench = bench_step.Bench()
    with pytest.raises(RuntimeError, match="no room"):
        bench.rig_of(ENGINES, Rounds())
    with pytest.raises(pytest.skip.Exception, match="no room"):
        bench.rig_of(ENGINES, Rounds())
    assert len(made) == 1


def test_no_variant_starts_that_would_end_too_late(rig, monkeypatch):
    monkeypatch.setenv("RMSD_BENCH_UNTIL", str(time.time() - 1))
    found = begin(rig, APART)
    assert sweep(rig, found, FEW) == [] and not found.rounds
    assert set(found.not_run.values()) == {NO_TIME} and len(found.not_run) == len(FEW)
    # Each variant is timed once if it was started, and then the time is used up.
    monkeypatch.setattr(sweeps, "FIRST_PACE", 0.0)
    step, steps = sweeps.timed, []

    def late(*arguments):
        steps.append(step(*arguments))
        # The first steps of both do not count.
        if len(steps) > 2:
            monkeypatch.setenv("RMSD_BENCH_UNTIL", str(time.time() - 1))
        return steps[-1]

    monkeypatch.setenv("RMSD_BENCH_UNTIL", str(time.time() + 60))
    monkeypatch.setattr(sweeps, "timed", late)
    assert sweep(rig, found, FEW[:2]) == []
    assert {way.name: len(rounds) for way, rounds in found.rounds.items()} == {"shared K=4 N=8": 1, "padded K=4 N=8": 1}
    # A part without enough time does not time its base again.
    assert sweep(rig, found, (BASE, FEW[2])) == [] and len(found.rounds[BASE]) == 1
    assert found.not_run[FEW[2].name] == NO_TIME


def test_running_out_of_memory_later_restarts_the_part(rig, monkeypatch):
    steps = []

    def which(settings, model):
        steps.append(model.is_gradient_checkpointing)
        # The warm-ups of both variants fit.
        return settings.packing == "shared" and not model.is_gradient_checkpointing and len(steps) > 2

    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), which)
    found = begin(rig, APART)
    assert sweep(rig, found, (BASE, Way("shared", 1, 8))) == []
    assert [way.name for way in found.rounds] == ["shared K=4 N=8, checkpointing", "shared K=1 N=8, checkpointing"]


def test_a_lost_device_keeps_the_results_so_far(rig, monkeypatch):
    found = begin(rig, APART)
    assert sweep(rig, found, (BASE,)) == []
    failing(monkeypatch, RuntimeError("CUDA error: an illegal memory access"), lambda settings, model: True)
    monkeypatch.setattr(rig.state.policy, "discard", lambda: 1 / 0)
    faults = sweep(rig, found, (BASE, *FEW[1:3]))
    assert len(faults) == 1 and rig.lost.startswith("ZeroDivisionError") and len(found.rounds[BASE]) == 6
    assert found.not_run[FEW[2].name] == rig.lost
    bench = bench_step.Bench()
    bench.rig, bench.kind = rig, (APART.sizes, APART.room, APART.dtype)
    with pytest.raises(pytest.skip.Exception, match="can no longer be used"):
        bench.rig_of(APART, Rounds())
    monkeypatch.setattr(rig, "lost", "")


def test_passes_have_the_same_gradients_as_an_engine(world, monkeypatch):
    # As in the real size, the embedding is larger than DeepSpeed's bucket.
    monkeypatch.setattr(engine, "LARGEST_BUCKET", 100_000)
    norms = {}
    for apart in (True, False):
        # The available memory decides whether the optimizers are allocated.
        rig = Rig(APART if apart else ENGINES, world, Rounds())
        assert isinstance(rig.state.policy, Passes) == apart
        run = rig.prepare(Way("padded", 2, 3), make_prompts(rig.state, 128, 1), 16)
        first, second = run(), run()
        norms[apart] = [first["policy/grad_norm"], first["discriminator/grad_norm"]]
        # lr is 0, and no gradient remains.
        assert [second["policy/grad_norm"], second["discriminator/grad_norm"]] == norms[apart]
        rig.close()
    assert all(math.isfinite(norm) and norm > 0 for norm in norms[True])
    # The sums of eight micro-batches are in bf16 and in float32.
    assert norms[True] == pytest.approx(norms[False], rel=1e-2)
