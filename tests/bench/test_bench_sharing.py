"""Test the benchmarks of shared prefixes: their inputs, predictions, claims and charts."""

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
    from bench.core.goals import verdicts

    def statuses(bench: str, variants: dict) -> list[str]:
        record = _record(bench, "P2048-R128-float32", variants)
        return [v.status for v in verdicts([record], "cpu") if v.where == f"{bench} P2048-R128-float32"]

    passes = {
        "shared M=12": _side(10, 1.0, mib=24),
        "padded M=12": _side(39, 5.0, mib=100),
        "shared M=1": _side(5, 0.5),
        "shared M=9": _side(9, 0.6),
    }
    for own in passes.values():
        del own["training"]
    # Time and memory are compared with padded rows. M=9 has 0.9 measured and 0.6 predicted, M=1 has 0.5 and 0.5, padded
    # rows have 3.9 and 5, and copies were not measured.
    assert statuses("shared_prefix", passes) == ["MISSED", "met", "MISSED", "met", "MISSED", "NOT MEASURED"]
    steps = {"shared K=1 N=8": _side(100, 1.0, training=50), "shared K=4 N=8": _side(114, 1.1, training=58)}
    # The whole step and its passes are compared over K, and three variants with K=8 are compared with the cost model.
    assert statuses("step", steps) == ["met", "MISSED", "met", *["NOT MEASURED"] * 3]


def test_chart_and_table_show_the_recorded_values():
    from bench.core.report import sharing_chart, sharing_page

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
    svg = sharing_chart([step])
    ElementTree.fromstring(svg)
    for text in ("1.10", "7.00", "9.00", "2048 prompt tokens, responses of 128"):
        assert text in svg
    # N=1 does not belong to this chart.
    assert "0.70" not in svg
    passes = {"shared M=12": _side(10, 1.0), "padded M=12": _side(45, 5.0, mib=1234)}
    record = _record("shared_prefix", "P2048-R128-float32", passes) | {"baseline": "shared M=12"}
    table = sharing_page([step, record])
    assert "| 2048, 128 | shared K=4 N=8 | 1.10 | 0.00 | 0.00 | 0.00 | 0.00 | 0.55 | 0.00 | 1.10 | 1.10 | 1 |" in table
    assert "| 2048, 128 | padded M=12 | 4.50 | 5.00 | 1,234 | 3 |" in table
    with pytest.raises(ValueError, match="at least one case"):
        sharing_chart([])


def test_variants_of_a_pass_have_equal_gradients():
    from bench.core.measure import difference
    from bench.prefix.bench_pass import Case, make_variant

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


def test_predictions_are_sums_of_the_rates():
    from bench.step.flops import Flops
    from bench.step.rates import predicted_seconds, rates

    flops = Flops(dense=600, attention=50, head=100, vision=300, vision_attention=50)
    assert predicted_seconds(flops, {"matmul": 1000.0, "attention": 10.0}) == pytest.approx(1.0 + 10.0)
    from types import SimpleNamespace

    text = SimpleNamespace(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    found = rates(SimpleNamespace(text_config=text), 64, torch.float32, torch.device("cpu"))
    assert found["matmul"] > 0 and found["attention"] > 0
