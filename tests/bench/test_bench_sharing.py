"""The benchmarks of shared prefixes: what they build, predict, claim and draw."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch


def _side(ms: float, predicted: float, mib: float = 1.0, training: float | None = None) -> dict:
    times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    own = {"forward": times, "rounds": 3, "predicted_s": predicted, "peak_beyond_gradients_mib": mib, "peak_mib": mib}
    return own | {"training": {**times, "median_ms": training or ms}, "phases_s": {"policy": ms / 2e3}}


def _record(bench: str, case: str, variants: dict) -> dict:
    facts = {"cpu": "X", "threads": 2, "torch": "2", "commit": "a" * 40, "device": "cpu"}
    return {"bench": bench, "case": case, "shape": {"P": 2048, "R": 128}, "variants": variants, **facts}


def test_claims_on_sharing_by_hand():
    from bench import claims

    variants = {
        "shared M=12": _side(10, 1.0, mib=24),
        "padded M=12": _side(39, 5.0, mib=100),
        "shared M=1": _side(5, 0.5),
        "shared M=9": _side(9, 0.6),
    }
    assert [reached for reached, _ in claims._sharing(variants)] == [False]
    assert [reached for reached, _ in claims._sharing_memory(variants)] == [True]
    # M=9: 0.9 measured, 0.6 predicted; M=1: 0.5 and 0.5; padded: 3.9 and 5; copies were not measured.
    assert [reached for reached, _ in claims._sharing_model(variants)] == [False, True, False, None]
    steps = {"shared K=1 N=8": _side(100, 1.0, training=50), "shared K=4 N=8": _side(114, 1.1, training=58)}
    assert [reached for reached, _ in claims._step(steps)] == [True, False]
    assert [reached for reached, _ in claims._step_model(steps)] == [True, None, None]
    assert [reached for reached, _ in claims._step_sweep(steps)] == [None]


def test_every_shape_on_cpu_is_claimed():
    from bench import bench_shared_prefix, bench_step, claims

    assert [case.name for case in bench_shared_prefix.cases(False, "cpu")] == list(claims.SHARED_CASES)
    cases = bench_step.cases(False, "cpu")
    assert [case.name for case in cases] == list(claims.STEP_CASES)
    swept = [case.name for case in cases if (case.prefix, case.response) in bench_step.SWEPT]
    assert swept == list(claims.SWEPT_CASES)


def test_chart_and_table_hold_what_the_records_say():
    from bench import chart_sharing

    step = _record(
        "step",
        "P2048-R128-float32",
        {
            "shared K=4 N=8": _side(110, 1.1, training=55),
            "shared K=1 N=8": _side(100, 1.0, training=50),
            "shared K=1 N=1": _side(70, 0.5),
            "copies K=1 N=8": _side(700, 8.0),
            "copies K=4 N=8": _side(900, 9.0),
        },
    )
    svg = chart_sharing.draw([step])
    ElementTree.fromstring(svg)
    for text in ("1.10", "7.00", "9.00", "prompt 2048 tokens, responses 128"):
        assert text in svg
    # N=1 is another question than that of the chart.
    assert "0.70" not in svg
    passes = {"shared M=12": _side(10, 1.0), "padded M=12": _side(45, 5.0, mib=1234)}
    record = _record("shared_prefix", "P2048-R128-float32", passes) | {"baseline": "shared M=12"}
    table = chart_sharing.markdown([step], [record])
    assert "| 2048, 128 | shared K=4 N=8 | 1.10 | 0.00 | 0.00 | 0.00 | 0.00 | 0.55 | 0.00 | 1.10 | 1.10 | 1 |" in table
    assert "| 2048, 128 | padded M=12 | 4.50 | 5.00 | 1,234 | 3 |" in table
    with pytest.raises(ValueError, match="bench_step"):
        chart_sharing.draw([])


def test_variants_of_a_pass_have_equal_gradients():
    from bench.bench_shared_prefix import Case, make_variant
    from bench.measure import difference

    case = Case(512, 16)
    found = {}
    for way in ("shared", "padded", "copies"):
        variant, read, _ = make_variant(way, 3, case)
        value, gradients = variant()
        found[way] = [value.detach(), *gradients]
        assert read.prefix > 256 and list(read.responses) == [16] * 3
    for way in ("padded", "copies"):
        for own, expected in zip(found[way], found["shared"], strict=True):
            assert difference(own, expected) < 1e-4


def test_predictions_add_what_the_rates_say():
    from bench.flops import Flops
    from bench.rates import predicted_seconds, rates

    flops = Flops(dense=600, attention=50, head=100, vision=300, vision_attention=50)
    assert predicted_seconds(flops, {"matmul": 1000.0, "attention": 10.0}) == pytest.approx(1.0 + 10.0)
    from types import SimpleNamespace

    text = SimpleNamespace(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    found = rates(SimpleNamespace(text_config=text), 64, torch.float32, torch.device("cpu"), rounds=1)
    assert found["matmul"] > 0 and found["attention"] > 0
