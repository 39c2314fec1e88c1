"""Test the arithmetic and bookkeeping of the benchmark suite, on which all claims from its records depend."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from cuda_records import bench_cases


@pytest.fixture(autouse=True)
def _malloc_restored():
    """Restore malloc's defaults, because `measure` keeps freed memory for the whole process."""
    yield
    from bench.core.memory import plain_malloc

    with plain_malloc():
        pass


CPU = torch.device("cpu")
MIB = 2**20


def _variant(name, calls, seconds=0.0):
    import time

    from bench.core.measure import Variant

    def forward():
        calls.append(name)
        time.sleep(seconds)
        return torch.zeros(())

    return Variant(name, forward)


def test_rounds_rotate_the_order_and_slow_variants_run_in_fewer():
    from bench.core.measure import Effort, interleaved

    calls = []
    variants = [_variant("a", calls), _variant("b", calls, 0.02), _variant("c", calls)]
    effort = Effort(seconds=0.03, most_rounds=4, slow_s=1.0, least_rounds=2)
    timings = interleaved(variants, effort, CPU)
    # "b" has used 0.04 s after its two required rounds.
    assert calls == ["a", "b", "c", "b", "c", "a", "c", "a", "a", "c"]
    assert {name: sorted(own) for name, own in timings.items()} == {"a": [0, 1, 2, 3], "b": [0, 1], "c": [0, 1, 2, 3]}
    assert all(t.forward_ms >= 20 and t.backward_ms == 0 for t in timings["b"].values())
    # Claims depend on ours, eager and the GEMMs, which have their own minimum number of rounds.
    effort = Effort(seconds=0.0, most_rounds=9, slow_s=1.0, least_rounds=2, always_rounds=7)
    rounds = interleaved([_variant(name, []) for name in ("bare GEMMs", "ours", "eager", "peer")], effort, CPU)
    assert {name: len(own) for name, own in rounds.items()} == {"bare GEMMs": 7, "ours": 7, "eager": 7, "peer": 2}


def test_a_call_beyond_the_limit_is_represented_by_its_memory_pass():
    from bench.core.measure import GEMMS, Effort, measure, numbers_of

    calls = []
    # The baseline is timed properly, however long it takes.
    variants = [_variant("quick", calls), _variant("slow", calls, 0.05), _variant(GEMMS, calls, 0.05)]
    effort = Effort(seconds=0.01, most_rounds=3, slow_s=0.04, least_rounds=3)
    numbers = numbers_of(measure(variants, effort, CPU), variants, baseline="quick")
    assert calls.count("slow") == 1 and calls.count("quick") == 4 and calls.count(GEMMS) == 4
    assert numbers["slow"]["memory_pass_only"] and numbers["slow"]["rounds"] == 1
    assert numbers["slow"]["forward"]["median_ms"] >= 50
    assert numbers["slow"]["share_of_gemms_by_round"] is None
    assert numbers["quick"]["share_of_gemms"] == 1.0


def test_a_failing_peer_is_reported_and_our_failure_is_an_error():
    from bench.core.measure import OURS, Effort, Variant, measure

    def broken():
        raise RuntimeError("not enough memory\nmore")

    effort = Effort(seconds=0.01, most_rounds=1, slow_s=9.0, least_rounds=1)
    not_run = {}
    samples = measure([_variant(OURS, []), Variant("peer", broken)], effort, CPU, not_run)
    assert list(samples) == [OURS] and not_run == {"peer": "RuntimeError: not enough memory"}
    with pytest.raises(RuntimeError, match="not enough memory"):
        measure([Variant(OURS, broken)], effort, CPU, not_run)


def test_gradients_of_the_timed_shape_are_compared_with_those_of_eager():
    from bench.core.measure import EAGER, OURS, Effort, difference, measure, with_gradients

    weight, bias = torch.ones(100, requires_grad=True), torch.ones(4, requires_grad=True)

    def variant(name, factor):
        return with_gradients(name, lambda: weight.sum() + factor * bias.sum(), (weight, bias))

    effort = Effort(seconds=0.01, most_rounds=1, slow_s=9.0)
    variants = [variant(OURS, 2.0), variant(EAGER, 2.0), variant("peer", 3.0)]
    found = {name: s.differences for name, s in measure(variants, effort, CPU, base=OURS).items()}
    assert found[OURS] == {} and found["peer"] == {
        "value": pytest.approx(4 / 108),
        "gradient 0": 0.0,
        "gradient 1": 0.5,
    }
    # Only the second gradient is wrong.
    with pytest.raises(AssertionError, match="gradient 1"):
        measure([variant(OURS, 2.0), variant(EAGER, 2.01)], effort, CPU, base=OURS)
    assert difference(torch.tensor([3.0, 4.0]), torch.zeros(2)) == float("inf")
    assert not difference(torch.tensor([float("nan")]), torch.ones(1)) <= 1.0


def test_ratios_of_medians_and_by_round():
    from bench.core.measure import quantiles, ratio

    totals = {"gemms": {0: 10.0, 1: 20.0, 2: 30.0}, "ours": {0: 20.0, 1: 25.0, 2: 30.0}, "alone": {-1: 40.0}}
    assert ratio(totals, "gemms", "ours") == (20.0 / 25.0, 20.0 / 25.0)
    totals["ours"] = {0: 20.0, 2: 30.0}
    # The medians are 20 and 25, and the common rounds 0 and 2 have ratios 0.5 and 1.
    assert ratio(totals, "gemms", "ours") == (20.0 / 25.0, 0.75)
    assert ratio(totals, "gemms", "alone") == (0.5, None)
    assert quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx({"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0})


def test_peak_includes_freed_memory_and_excludes_gradients():
    from bench.core.measure import Effort, measure, numbers_of, with_gradients
    from bench.core.memory import peak_extra_bytes

    if peak_extra_bytes(lambda: None, CPU)[0] is None:
        pytest.skip("peak memory is counted on Linux with glibc only")
    weight = torch.ones(8 * MIB, requires_grad=True)

    def loss():
        # 64 MiB are freed before the next 32 MiB are allocated, and the gradient of 32 MiB exists, so the peak is 64.
        torch.ones(16 * MIB).mul_(2.0)
        return (weight * 2.0).sum()

    effort = Effort(seconds=0.01, most_rounds=1, slow_s=9.0, least_rounds=1)
    variant = with_gradients("it", loss, (weight,))
    numbers = numbers_of(measure([variant], effort, CPU), [variant], baseline=None)["it"]
    # The bounds lie between 64 and the neighboring sums 32 and 96, because machines round resident pages differently.
    assert 48 < numbers["peak_mib"] < 80
    assert numbers["peak_beyond_gradients_mib"] == pytest.approx(numbers["peak_mib"] - 32, abs=0.01)


def test_freed_blocks_are_kept_to_avoid_page_faults():
    from bench.core.memory import fill_thread_cache, keep_freed_memory, page_faults, plain_malloc

    def faults_of_a_block():
        fill_thread_cache()
        before = page_faults()
        torch.ones(4 * MIB)
        return page_faults() - before

    pages = 16 * MIB // 4096
    with plain_malloc() as is_plain:
        if not is_plain:
            pytest.skip("malloc is configured for glibc only")
        plain = min(faults_of_a_block() for _ in range(4))
    if plain < 0.9 * pages:
        pytest.skip("large blocks use pages larger than 4 KiB here")
    assert keep_freed_memory(128 * MIB)
    # The first calls may leave gaps (see fill_thread_cache).
    assert max([faults_of_a_block() for _ in range(20)][10:]) < 0.1 * pages
    with plain_malloc():
        # Freed blocks of the heap are available but not used.
        assert all(faults_of_a_block() >= 0.9 * pages for _ in range(4))


@pytest.mark.parametrize(("passes", "products"), [("score", 1), ("frozen", 2), ("trainable", 3)])
def test_bare_gemms_equal_those_of_the_loss(passes, products):
    from bench.core.measure import bare_gemms, gemm_flop

    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    gemms = bare_gemms(hidden, weight, passes)
    logits = gemms.forward()
    assert torch.equal(logits, hidden @ weight.T)
    assert (gemms.backward is None) == (passes == "score")
    assert gemm_flop(3, 4, 5, passes) == 2 * products * 60


def test_inputs_follow_the_case():
    from bench.heads.cases import Case, head_inputs

    small = {"hidden": 64, "dtype": torch.float32, "vocabulary": 500}
    plain = head_inputs(Case(40, **small))
    assert plain.weight.requires_grad and plain.scored.all() and plain.sequences == 2
    logits = plain.hidden @ plain.weight.T
    assert 0.8 < logits.std() < 1.2
    masked = head_inputs(Case(40, **small, mask=90, head="frozen"))
    assert masked.scored.sum() == 4 and not masked.weight.requires_grad
    peaked = head_inputs(Case(40, **small, softmax="peaked"))
    logp = (peaked.hidden @ peaked.weight.T).log_softmax(-1)
    assert 0.3 < (-(logp.exp() * logp).sum(-1)).mean() < 2
    assert 0.75 <= (logp.argmax(-1) == peaked.targets).float().mean() <= 0.8
    assert torch.equal(plain.advantages[:20], plain.advantages[:1].expand(20))


def test_gate_accepts_eager_and_refuses_wrong_results():
    from bench.heads.cases import Case, checked
    from bench.heads.peers import eager_cross_entropy

    def eager(x):
        return eager_cross_entropy(x)

    def same(x, budget):
        return eager(x)

    def off(x, budget):
        return F.cross_entropy(x.hidden @ x.weight.T * 1.001, x.targets)

    def off_in_chunks(x, budget):
        return off(x, budget) if budget else eager(x)

    case = Case(16, 64, torch.float32, vocabulary=500)
    errors = checked(case, same, eager)
    assert errors.ours == errors.eager and set(errors.bound) == {"value", "hidden gradient", "weight gradient"}
    with pytest.raises(AssertionError, match="in one chunk.*too far from float64"):
        checked(case, off, eager)
    with pytest.raises(AssertionError, match="in chunks of 8 rows.*too far from float64"):
        checked(case, off_in_chunks, eager)


def test_peers_agree_and_unavailable_peers_are_reported():
    from bench.heads.cases import Case, head_inputs
    from bench.heads.peers import CROSS_ENTROPY, LOGPROB, POLICY, gather

    x = head_inputs(Case(32, 64, torch.float32, mask=50, vocabulary=500))
    for peers in (CROSS_ENTROPY, LOGPROB, POLICY):
        skip = {"torch.compile": "slow", **{name: "slow" for name in peers if "CCE" in name or "GRPO" in name}}
        variants, not_run = gather(peers, x, skip=skip)
        assert {variant.name for variant in variants} | set(not_run) == set(peers)
        assert all(not_run.values())
        values = {variant.name: variant.forward().item() for variant in variants}
        assert values == pytest.approx(dict.fromkeys(values, values["eager"]), rel=1e-4)
    # These need CUDA tensors, regardless of what is installed.
    assert "CCE" in gather(CROSS_ENTROPY, x, skip={"torch.compile": "slow"})[1]


def test_both_forms_of_the_discriminator_pass_its_gate():
    from bench.core.measure import EAGER
    from bench.heads.bench_discriminator import FORMS, Case, eager, gate, make_inputs

    case = Case(torch.float32, "train", batch=3, length=5, hidden=64)
    assert set(gate(case)) == set(FORMS) == {"ours", "ours in one call"}
    # Rows that were gathered beforehand are batches of length 1.
    rows = make_inputs(Case(torch.float32, "rows", batch=3, length=1, hidden=64))
    values = {name: loss(rows).item() for name, loss in (FORMS | {EAGER: eager}).items()}
    assert values == pytest.approx(dict.fromkeys(values, values[EAGER]), rel=1e-5)


def _record(bench="linear_policy_loss", ours_ms=5.0, **changes):
    times = {"bare GEMMs": 4.6, "ours": ours_ms, "eager": 7.0, "a peer": 61.0}
    variants = {
        name: {
            "both": {"median_ms": ms, "p20_ms": ms, "p80_ms": ms},
            "rounds": 3,
            "share_of_gemms": 4.6 / ms,
            "share_of_gemms_by_round": 4.6 / ms,
            "peak_mib": 1500.0,
            "peak_beyond_gradients_mib": 900.0 if name == "eager" else 100.0,
        }
        for name, ms in times.items()
    }
    record = {
        "bench": bench,
        "case": "T2048-D2560-bfloat16-mask0-random-trainable",
        "shape": {"T": 2048, "D": 2560, "V": 151936},
        "dtype": "bfloat16",
        "mask_percent": 0,
        "softmax": "random",
        "head": "trainable",
        "device": "cpu",
        "baseline": "ours",
        "variants": variants,
        "not_run": {"QuACK": "CuTe kernels for CUDA only"},
    }
    return record | changes


def test_records_are_appended_and_the_newest_of_a_case_is_used(tmp_path):
    from bench.core.records import load, save
    from bench.core.report import case_text

    save(_record(ours_ms=6.0), tmp_path)
    path = save(_record(), tmp_path)
    save(_record(bench="linear_cross_entropy"), tmp_path)
    assert len(path.read_text().splitlines()) == 2
    found = load(tmp_path, "heads")
    assert [record["bench"] for record in found] == ["linear_cross_entropy", "linear_policy_loss"]
    assert found[1]["variants"]["ours"]["both"]["median_ms"] == 5.0
    assert {"cpu", "threads", "torch", "python", "commit"} <= set(found[1])
    text = case_text(_record())
    assert "QuACK: not run: CuTe kernels for CUDA only" in text and "92%" in text


def test_chart_draws_the_recorded_values(tmp_path):
    from bench.core.records import load, save
    from bench.core.report import heads_chart

    shorter = _record(shape={"T": 512, "D": 2560, "V": 151936}, case="T512")
    cold = _record()
    cold["variants"]["a peer"]["memory_pass_only"] = True
    for record in (cold, shorter, _record(mask_percent=50, case="masked"), _record(case="x-conditions")):
        save(record, tmp_path)
    root = ElementTree.fromstring(heads_chart(load(tmp_path, "heads")))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    # The chart shows only the longest plain case: 5.0 / 4.6 for ours, and 61 / 4.6 for the peer, whose bar is cut and
    # keeps its number. A star marks its single cold call.
    assert {"ours", "eager", "a peer *", "1.09", "13", "900"} <= set(words) and words.count("ours") == 1
    assert any("T = 2048" in word for word in words)
    with pytest.raises(ValueError, match="at least one case"):
        heads_chart([])


def test_commits_and_machines_are_stated_and_never_mixed(tmp_path):
    import json

    from bench.core.records import hardware_of, load, sources

    def line(case, **changes):
        facts = {"cpu": "one", "threads": 2, "torch": "2.13.0", "commit": "a" * 40}
        return json.dumps(_record(case=case) | facts | changes) + "\n"

    file = tmp_path / "linear_policy_loss.jsonl"
    file.write_text(line("x") + line("y") + line("z") + line("y", commit="b" * 40 + "-dirty") + line("x", quick=True))
    found = load(tmp_path, "heads")
    assert [record["case"] for record in found] == ["x", "y", "z"] and not any(r.get("quick") for r in found)
    assert sources(found) == "one, 2 threads, torch 2.13.0, commits aaaaaaaaaa (2 cases), bbbbbbbbbb-dirty (1 case)"
    with file.open("a") as out:
        out.write(line("x", threads=16) + line("x", device="cuda", gpu="big"))
    with pytest.raises(ValueError, match="several machines"):
        load(tmp_path, "heads")
    assert [record["threads"] for record in load(tmp_path, "heads", hardware="16 threads")] == [16]
    assert hardware_of({"gpu": "big"}) == "big" and load(tmp_path, "heads", hardware="big") == []


def test_table_has_ratios_and_excludes_cold_calls():
    from bench.core.report import heads_page

    facts = {"cpu": "one", "threads": 2, "torch": "2.13.0", "commit": "a" * 40}
    record = _record() | facts
    conditions = {name: {"times_base": 0.5} for name in ("50% masked", "90% masked", "peaked", "frozen head")}
    conditions["ours"] = {"rounds": 7}
    text = heads_page([record, _record(case="x-conditions", variants=conditions) | facts])
    assert "| policy loss | bfloat16, T 2048, D 2560 | 92% | 1.40 | 12.20 (a peer) | 1,500 / 1,500 (1.00) |" in text
    assert "| 0.50 | 0.50 | 0.50 | 0.50 | 7 |" in text and "commit aaaaaaaaaa." in text
    record["variants"]["a peer"]["memory_pass_only"] = True
    assert "| 1.40 | - |" in heads_page([record])


def test_claims_are_checked_against_the_records():
    from bench.core.goals import CONDITIONS, GOALS, verdicts

    def of(*records):
        return [v for v in verdicts(list(records), "cpu") if v.where == f"linear_policy_loss {_record()['case']}"]

    found = of(_record())
    # The verdicts are for the rate, the whole peak and the peak beyond gradients, and eager and the peer.
    assert [verdict.status for verdict in found] == ["MISSED", "MISSED", "met", "met", "met"]
    assert "92.0%" in found[0].what and "n = 3" in found[0].what
    assert "1.0000 of eager" in found[1].what and "0.1111 of eager" in found[2].what
    assert [verdict.status for verdict in of(_record(ours_ms=7.5))] == ["MISSED", "MISSED", "met", "MISSED", "met"]
    cold = _record()
    cold["variants"]["a peer"]["memory_pass_only"] = True
    assert not any("a peer" in verdict.what for verdict in of(cold))
    without = _record()
    del without["variants"]["eager"]
    assert [verdict.status for verdict in of(without)] == ["MISSED", *["NOT MEASURED"] * 3, "met"]
    # Every goal is listed without any record.
    on_cpu = [goal for goal in GOALS if goal.device == "cpu"]
    assert [verdict.status for verdict in verdicts([], "cpu")] == ["NOT MEASURED"] * len(on_cpu)
    conditions = _record(case=CONDITIONS["linear_policy_loss"][1])
    conditions["variants"] = {
        "ours": {"rounds": 7},
        "frozen head": {"times_base": 0.7, "rounds": 7},
        "90% masked": {"times_base": 0.25, "rounds": 8},
    }
    found = [verdict for verdict in verdicts([conditions], "cpu") if verdict.status != "NOT MEASURED"]
    assert [verdict.status for verdict in found] == ["met", "MISSED"]


def test_cases_with_a_claim_are_exactly_the_measured_cases():
    from bench.core.goals import CASES, CLAIM_CASES, CONDITIONS, METRICS, SWEPT, TABLE

    measured, conditions = bench_cases("cpu"), bench_cases("cpu", "conditions")
    for bench, names in CASES.items():
        assert sorted(case.name for case in measured[bench]) == sorted(names)
        assert tuple(f"{case.name}-conditions" for case in conditions.get(bench, ())) == CONDITIONS.get(bench, ())
    every = {(bench, name) for cases in (CASES, CONDITIONS) for bench, names in cases.items() for name in names}
    assert {(bench, case) for bench, case in CLAIM_CASES if bench != "media"} < every
    assert {metric for *_, metric, _ in TABLE} == set(METRICS)
    swept = [case.name for case in measured["step"] if len(case.ways) == 10]
    assert swept == list(SWEPT)
