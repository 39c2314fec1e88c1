"""Test the benchmarks of single kernels: their counts, complete rehearsals, and their end when time is up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _malloc_restored():
    """Restore malloc's defaults, because `measure` keeps freed memory for the whole process."""
    yield
    from bench.core.memory import plain_malloc

    with plain_malloc():
        pass


@pytest.fixture
def effort():
    from bench.core.measure import Effort

    return Effort(seconds=0.01, most_rounds=1, slow_s=9.0, least_rounds=1, always_rounds=1)


def small(**changes):
    from bench.prefix.variants import Case

    return Case(4, 3, 2, heads=4, key_heads=2, size=8, dtype=torch.float32, **changes)


def test_pairs_and_bytes_by_hand():
    from bench.prefix.bench_attention import EXPANDED, decode_bytes
    from bench.prefix.variants import make_inputs, visible

    case = small()
    # The prefix attends to itself in 1 + 2 + 3 + 4 pairs; each response has 1 + 2 + 3 with itself and 3 * 4 with the
    # prefix.
    assert case.shared_pairs == 10 + 2 * (6 + 12) == visible(case, make_inputs(case)).sum()
    assert case.separate_pairs == 2 * 28
    # A row of keys and values has 2 * 2 * 8 numbers of 4 bytes, and queries and outputs have 2 * 4 * 8 numbers each.
    ends = 2 * 2 * 4 * 8 * 4
    assert decode_bytes(replace(case, decode=True)) == {
        "ours": (4 + 2 * 3) * 128 + ends,
        EXPANDED: 2 * (4 + 3) * 128 + ends,
    }


def test_mask_separates_responses():
    from bench.prefix.variants import make_inputs, visible

    case = replace(small(), prefix=2, response=2)
    rows = ["100000", "110000", "111000", "111100", "110010", "110011"]
    assert ["".join(map(str, row)) for row in visible(case, make_inputs(case)).int().tolist()] == rows


def test_floor_by_hand():
    from bench.prefix.bench_attention import floor_of
    from bench.prefix.variants import CEILING

    def side(pairs: int, ms: float) -> dict:
        times = {"forward": ms, "backward": 2 * ms, "both": 3 * ms}
        return {"pairs": pairs} | {part: {"median_ms": own} for part, own in times.items()}

    found = floor_of({"ours": side(300, 4.0), CEILING: side(100, 1.0)})
    assert found["forward_ms"] == 3 and found["backward_ms"] == 6 and found["both_ms"] == 9
    assert found["both_times"] == pytest.approx(12 / 9)
    assert floor_of({"ours": side(300, 4.0)}) == {}


def test_bytes_of_rows():
    from bench.heads.bench_profile import PolicyRows

    assert PolicyRows(3, 50, torch.bfloat16, "cpu").bytes == 2 * 3 * 50 * 2


# Attention: all variants compute the same function.


def differences_from_ours(ways: dict) -> dict[str, dict[str, float]]:
    """Return differences of values and gradients, by way."""
    from bench.core.measure import difference
    from bench.prefix.bench_attention import _outcome

    found = {name: _outcome(way) for name, way in ways.items() if way.packed is not None}
    expected = found.pop("ours")
    return {name: {key: difference(own[key], expected[key]) for key in expected} for name, own in found.items()}


def test_variants_agree_in_values_and_gradients(effort):
    from bench.core.measure import differences_of, measure
    from bench.prefix.variants import CEILING, FLEX, LOOP, VARLEN, build_ways, make_inputs

    assert build_ways(small(), make_inputs(small()), {FLEX: "why"})[1][FLEX] == "why"
    ways, not_run = build_ways(small(), make_inputs(small()), {})
    differences = differences_from_ours(ways)
    assert set(differences) == {LOOP} and set(ways) == {"ours", LOOP, CEILING}
    assert set(differences[LOOP]) == {"out", "dq", "dk", "dv"} and max(differences[LOOP].values()) < 1e-5
    # So are they in the timed shape; the ceiling computes something else.
    timed = differences_of(measure([way.variant for way in ways.values()], effort, CPU, not_run, base="ours"))
    assert timed == {LOOP: {f"gradient {i}": differences[LOOP][name] for i, name in enumerate(("dq", "dk", "dv"))}}
    assert "no backward on CPU" in not_run["FlexAttention"] and "CUDA only" in not_run[VARLEN]


def test_gate_refuses_responses_that_attend_to_each_other(monkeypatch):
    from bench.prefix import variants as prefix_variants
    from bench.prefix.bench_attention import gate

    def leaky(q, k, v, plan):
        rows = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    # The variant is not even built, because that would compile it twice.
    monkeypatch.setitem(prefix_variants.WAYS, prefix_variants.FLEX, None)
    errors = gate.__wrapped__(small())
    assert set(errors) >= {"eager", "ours", "separate rows, sdpa row by row"} and set(errors["ours"]) == set(
        errors["eager"]
    )
    monkeypatch.setattr(prefix_variants, "shared_prefix_attention", leaky)
    with pytest.raises(AssertionError, match="too far from float64.*out responses"):
        gate.__wrapped__(small())


def test_flex_attention_gets_the_same_mask():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from bench.prefix.variants import explicit, make_inputs, sees, visible

    case = replace(small(), prefix=130, response=20)
    x = make_inputs(case)
    tokens = x.plan.tokens
    mask = create_block_mask(sees(case, x), None, None, tokens, tokens, device="cpu")
    rows = (t.detach().transpose(0, 1)[None] for t in x.leaves)
    out = flex_attention(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(out, explicit(x, visible(case, x)).detach(), rtol=1e-5, atol=1e-5)


def test_torch_varlen_takes_fewer_key_heads():
    from bench.prefix.variants import _torch_varlen

    q, k = (torch.empty(9, n, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2))
    edges = torch.empty(3, dtype=torch.int32, device="meta")
    out = _torch_varlen()(q, k, k, edges, edges, 5, 5)
    assert [t.shape for t in torch.autograd.grad(out, (q, k), torch.empty_like(out))] == [q.shape, k.shape]


def test_variable_length_functions_receive_concatenated_copies(monkeypatch):
    from bench.prefix import variants as own

    def flash(q, k, v, edges, edges_k, longest, longest_k):
        assert edges.dtype == torch.int32 and torch.equal(edges, edges_k) and longest == longest_k == 7
        rows = [slice(a, b) for a, b in zip(edges.tolist(), edges.tolist()[1:], strict=False)]
        return torch.cat([own._causal(q[r][None], k[r][None], v[r][None])[0] for r in rows])

    monkeypatch.setattr(own, "_need_cuda", lambda case, what: None)
    monkeypatch.setattr(own, "_torch_varlen", lambda: flash)
    x = own.make_inputs(small())
    way = own._separate_varlen(small(), x)
    differences = differences_from_ours({"ours": own.ours(small(), x), "flash": way})
    assert max(differences["flash"].values()) < 1e-5 and way.pairs == small().separate_pairs


def event(name: str, start: float, us: float, **changes) -> SimpleNamespace:
    facts = {"device_type": DeviceType.CUDA, "is_user_annotation": False, **changes}
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start + us), **facts)


SPIN = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def session(calls: list[list[tuple[str, float]]], padding: int = 4) -> list[SimpleNamespace]:
    """Return events as count_launches makes them: padding, and then sweep, marker, call, marker per call."""
    names = [(SPIN, 1.0)] * padding
    for call in calls:
        names += [("fill", 50.0), (SPIN, 3000.0), *call, (SPIN, 1.0)]
    return [event(name, 10000.0 * place, us) for place, (name, us) in enumerate(names)]


CALL = [("Memset (Device)", 1.0), ("forward", 5.0), ("add", 2.0), ("add", 3.0)]


def test_launches_between_the_markers_are_counted():
    from bench.core.launches import calls_of, device_events, facts_of_call, typical

    slow = [(name, us + 1.0) for name, us in CALL]
    events = session([CALL, slow, CALL])
    # The events are out of order and include events that are not device work.
    others = [event("Context Sync", 5.0, 9e9), event("cudaLaunchKernel", 5.0, 9.0, device_type=DeviceType.CPU)]
    others += [
        event("ProfilerStep", 5.0, 9.0, is_user_annotation=True),
        event("x", 5.0, 9.0, activity_type="cuda_sync"),
    ]
    found = typical(calls_of(device_events([*events[::-1], *others])))
    facts = facts_of_call(found)
    assert facts["kernels"] == {"forward": (1, 5.0), "add": (2, 5.0)} and facts["copies"] == {
        "Memset (Device)": (1, 1.0)
    }
    assert facts["count"] == 3 and facts["device_us"] == 11.0 and facts["span_us"] == 3 * 10000.0 + 3.0
    assert [own.name for own in found] == [name for name, _ in CALL] and json.dumps(facts)


def test_kernels_lost_at_the_start_of_a_session_do_not_count():
    from bench.core.launches import Unavailable, calls_of, device_events

    events = device_events(session([CALL] * 3))
    # All of the padding and the first sweep are lost, but the call itself is complete.
    assert [len(call) for call in calls_of(events[5:])] == [4, 4, 4]
    for missing in (6, len(events)):
        with pytest.raises(Unavailable, match="lost kernels"):
            calls_of(events[missing:])
    # A marker in the middle is lost.
    with pytest.raises(Unavailable, match="lost kernels"):
        calls_of([own for place, own in enumerate(events) if place != 12])


def test_a_call_with_an_unusual_number_of_launches_is_skipped():
    from bench.core.launches import calls_of, device_events, typical

    found = typical(calls_of(device_events(session([CALL, [*CALL, ("compiled", 1.0)], CALL]))))
    assert [own.name for own in found] == [name for name, _ in CALL]


def test_a_record_says_why_nothing_was_counted(monkeypatch):
    from bench.core import launches

    assert launches.count_launches(lambda: None, CPU) is None
    assert launches.launches_of({"ours": lambda: None}, CPU) == {
        "launches": {},
        "profiler": "launches are counted on CUDA only",
    }
    # A CPU build of torch has no CUDA activities, as on a machine without CUPTI.
    monkeypatch.setattr(launches, "supported_activities", lambda: set())
    found = launches.launches_of({"ours": lambda: None}, torch.device("cuda"))
    assert found["launches"] == {} and "CUPTI is missing" in found["profiler"]


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Simulate a device whose kernels are events of a session; each of `names` is launched and takes 2 µs."""
    from bench.core import launches

    launched: list[str] = []

    class Session:
        def __init__(self, activities):
            assert list(activities) == [launches.ProfilerActivity.CUDA]

        def __enter__(self):
            launched.clear()
            return self

        def __exit__(self, *_):
            return None

        def events(self):
            return [event(name, 10.0 * place, 2.0) for place, name in enumerate(launched)]

    class Mark:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(launched)

        def elapsed_time(self, other):
            return float(other.place - self.place)

    monkeypatch.setattr(launches, "supported_activities", lambda: {launches.ProfilerActivity.CUDA})
    monkeypatch.setattr(launches, "profile", Session)
    monkeypatch.setattr(launches, "sweeper", lambda device: lambda: launched.append("fill"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: launched.append(SPIN))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    return launched


def test_a_session_is_read_completely(pretended_gpu):
    from bench.core.launches import COUNTED, launches_of

    def run():
        pretended_gpu.extend(["forward", "fill", "backward"])

    found = launches_of({"ours": run, "eager": lambda: pretended_gpu.append("all")}, torch.device("cuda"))
    assert found["profiler"] == COUNTED
    assert found["launches"]["ours"]["count"] == 3 and found["launches"]["ours"]["device_us"] == 6.0
    assert found["launches"]["ours"]["kernels"] == {"forward": (1, 2.0), "fill": (1, 2.0), "backward": (1, 2.0)}
    assert found["launches"]["eager"] == {"count": 1, "device_us": 2.0, "span_us": 2.0, "kernels": {"all": (1, 2.0)}}


def test_device_timings_exclude_preceding_work(pretended_gpu):
    from bench.core.launches import device_timings
    from bench.core.measure import Variant

    def forward():
        pretended_gpu.append("a")

    variant = Variant("it", forward, lambda _: pretended_gpu.extend(["b", "c"]))
    found = device_timings(variant, torch.device("cuda"), 2, lambda: pretended_gpu.append("restored"))
    assert [(timing.forward_ms, timing.backward_ms) for timing in found] == [(1.0, 2.0)] * 2
    assert pretended_gpu == ["restored", SPIN, "a", "b", "c"] * 2


def test_parts_of_a_head_by_name_and_order():
    from bench.core.launches import Event
    from bench.heads.bench_profile import GEMMS, parts_of

    chunk = ["gather", "nvjet_tst", "_policy_kernel", "nvjet_tst", "cublasLt::splitKreduce_kernel", "nvjet_tst"]
    timeline = [Event(name, 0.0, 1000.0) for name in ["Memcpy DtoH", *chunk, *chunk, "_scale_kernel"]]
    found = parts_of(timeline, GEMMS)
    launches = {name: own["launches"] for name, own in found.items()}
    assert launches == {
        "copies": 1, "other kernels": 3, "row kernel": 2, "GEMM logits": 2, "GEMM d_hidden": 4, "GEMM d_weight": 2
    }  # fmt: skip
    assert found["GEMM d_hidden"]["ms"] == 4.0
    # A frozen head has no d_weight. Launches that do not divide evenly are reported as one part.
    assert parts_of(timeline, GEMMS[:2])["GEMMs"] == {"launches": 8, "ms": 8.0}
    frozen = [own for place, own in enumerate(timeline) if place not in (6, 12)]
    assert parts_of(frozen, GEMMS[:2])["GEMM d_hidden"]["launches"] == 4


def test_a_sweep_keeps_its_results_when_time_is_up(monkeypatch):
    from bench.heads.bench_profile import COMPLETE, sweep

    def broken():
        raise RuntimeError("out of registers\nmore")

    points = [("a", lambda: {"x": 1}), ("b", broken), ("c", lambda: {"x": 3})]
    record = {"variants": {}, "not_run": {}}
    sweep(record, points)
    assert record["variants"] == {"a": {"x": 1}, "c": {"x": 3}} and record["ended"] == COMPLETE
    assert record["not_run"] == {"b": "RuntimeError: out of registers"}
    monkeypatch.setenv("RMSD_BENCH_UNTIL", str(time.time() + 1.0))
    record = {"variants": {}, "not_run": {}}
    sweep(record, points)
    assert record["variants"] == {} and record["ended"] == "no time left before a"


def test_an_interrupted_part_is_reported(monkeypatch, effort):
    from bench.heads import bench_profile as bench

    def sweep(record, points):
        record["variants"] |= dict([(name, run()) for name, run in [next(iter(points))]])
        raise KeyboardInterrupt

    reported = []
    monkeypatch.setattr(bench, "sweep", sweep)
    case = next(case for case in bench.toy_cases("cpu") if case.part == "chunks")
    with pytest.raises(KeyboardInterrupt):
        bench.run(case, effort, reported.append)
    (record,) = reported
    assert record["ended"] == bench.INTERRUPTED and list(record["variants"]) == ["ours", "512 rows"]


def complete(record: dict) -> dict:
    """Return the record as it is read back, after printing its table."""
    from bench.core.report import case_text

    assert {"bench", "case", "shape", "dtype", "device", "baseline", "variants"} <= record.keys()
    assert record["baseline"] in case_text(record)
    return json.loads(json.dumps(record))


def test_rehearsal_of_attention(effort):
    from bench.prefix import bench_attention as bench

    reported = []
    for case in bench.toy_cases("cpu"):
        bench.test_prefix_attention(case, effort, reported.append)
    attention, decode = map(complete, reported)
    assert set(attention["variants"]) | set(attention["not_run"]) == set(bench.build_ways.__globals__["WAYS"])
    for own in attention["variants"].values():
        assert own["flop"] == 12 * 4 * 64 * own["pairs"] and own["tflop_per_s"] > 0 and own["both"]["median_ms"] > 0
    assert attention["floor"]["both_times"] > 0 and attention["profiler"]
    assert set(attention["errors"]["ours"]) == set(attention["errors"]["eager"])
    for own in decode["variants"].values():
        assert own["gb_per_s"] > 0 and own["times_floor"] > 0
    assert bench.cases(False, "cpu") == []
    names = [case.name for case in bench.cases(False, "cuda")]
    assert len(names) == len(set(names)) == 8 and "P8192-R512-M12-bfloat16" in names


def test_rehearsal_of_the_discriminator(effort):
    from bench.heads import bench_discriminator as bench

    reported = []
    for case in bench.toy_cases("cpu"):
        bench.test_discriminator(case, effort, lambda record, _: reported.append(record))
        record = complete(reported[-1])
        assert record["launches"] == {} and "CUDA only" in record["profiler"]
        assert "torch.compile" in record["not_run"]


def test_the_discriminator_count_covers_only_its_loss():
    from bench.heads import bench_discriminator as bench

    x = bench.make_inputs(bench.Case(torch.float32, "rows", batch=3, length=1, hidden=64))
    _, *expected = bench._grad(bench.eager(x), x)[1:]
    for name, call in bench.prepared(x, score=False).items():
        rows, norm, head = call()
        assert rows.shape == (6, 64), name
        torch.testing.assert_close([norm, head], expected, rtol=1e-4, atol=1e-6)
    for name, call in bench.prepared(x, score=True).items():
        assert call().item() == pytest.approx(bench.eager(x).item(), rel=1e-5), name


def test_rehearsal_of_the_head_profile(effort):
    from bench.heads import bench_profile as bench

    found = {}
    for case in bench.toy_cases("cpu"):
        bench.run(case, effort, lambda record, case=case: found.update({case.name: complete(record)}))
    assert len(found) == len(bench.PARTS) + 2
    for record in found.values():
        assert record["ended"] == bench.COMPLETE and record["variants"]["ours"]["rounds"] == 1
    by_part = {(record["part"], "policy" in name): record for name, record in found.items()}
    assert "CUDA only" in by_part["kernels", True]["not_run"]["profile"]
    chunks = by_part["chunks", False]["variants"]
    assert set(chunks) == {"ours", "ours, again", *(f"{rows} rows" for rows in bench._CHUNKS)}
    assert chunks["512 rows"]["chunks"] == 1 and chunks["512 rows"]["rows_per_chunk"] == 64
    assert all("Triton" in reason for reason in by_part["rows", True]["not_run"].values())
    assert bench.cases(False, "cpu") == [] and len(bench.cases(False, "cuda")) == 5


INTERPRETED = """
import sys
from unittest import mock

import torch
from bench.heads import bench_profile as own

sys.path.append("tests/helpers")
from triton_cases import repair_interpreter

repair_interpreter()
from rmsd_kernels.heads import triton_rows


class Noted:
    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched.append(options)
            return self.kernel[grid](*arguments, **options)

        return launch


rows = own.PolicyRows(3, 700, torch.float32, "cpu")
rows.by_the_package()
expected = rows.logits.clone()
assert not torch.equal(expected, rows.original)
for setting in (own.Setting(4, 1024, 2), own.Setting(8, 256, 3)):
    rows.restore()
    launched = []
    kernel = triton_rows._policy_kernel
    with mock.patch.object(triton_rows, "_policy_kernel", Noted(kernel, launched)):
        rows.launch(setting)
    (own_options,) = launched
    assert (own_options["num_warps"], own_options["BLOCK"], own_options["STAGES"]) == setting
    torch.testing.assert_close(rows.logits, expected, rtol=1e-5, atol=1e-7)
print("equal")
"""


def test_launchers_of_other_settings_compute_the_same_results():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", INTERPRETED]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_settings_of_the_sweep_compile_without_spills():
    from bench.heads.bench_profile import SETTINGS
    from rmsd_kernels import triton_compile

    policy = next(v for v in triton_compile.row_variants("bf16") if v.name == "policy k3 temperature bf16")
    for setting in SETTINGS:
        constants = policy.constants | {"BLOCK": setting.columns, "STAGES": setting.stages}
        registers = min(255, 65536 // (32 * setting.warps))
        changes = {"constants": constants, "warps": setting.warps, "registers": registers}
        report = triton_compile.compile_variant(policy._replace(**changes))
        assert report.stack_bytes == 0 and report.local_bytes == 0, setting
