"""What the records say about each number that losses, shared prefixes and media path promise: a line per goal and case.

met, MISSED: with n, the rounds of the side that took part in fewer. NOT MEASURED: no record of the case, or it lacks a
side. Exit code 1 where a goal on CPU is missed or not measured. Goals on CUDA follow, by the results of bench.cuda.

python -m bench.claims [--results bench/results] [--hardware PART_OF_ITS_NAME]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import cuda_goals, video_goals
from bench.measure import EAGER, GEMMS, OURS, main_time
from bench.records import RECORDS, ROOT, load, load_run
from bench.verdicts import MET, MISSED, NOT_MEASURED, Finding, Verdict, rounds_of

HEADS = ("linear_cross_entropy", "linear_policy_loss", "linear_logprob")
_NARROW, _WIDE = "D256-float32-mask0-random-trainable", "D2560-bfloat16-mask0-random-trainable"
_SHORT, _LONG = f"T512-{_NARROW}", f"T2048-{_WIDE}"
_PLAIN = (_SHORT, f"T2048-{_NARROW}", f"T512-{_WIDE}", _LONG)
_DISCRIMINATOR = tuple(f"B16-L512-D2560-{d}-{mode}" for d in ("bfloat16", "float32") for mode in ("train", "score"))
# Every case that is measured on CPU: ours must not be slower than eager, nor than any peer, in any of them.
CASES = {
    "linear_cross_entropy": (
        *_PLAIN,
        *(
            f"T512-D256-float32-{condition}-trainable"
            for condition in ("mask50-random", "mask90-random", "mask0-peaked")
        ),
    ),
    "linear_policy_loss": _PLAIN,
    "linear_logprob": (
        *_PLAIN,
        "T512-D256-float32-mask0-random-frozen",
        "T512-D2560-bfloat16-mask0-random-frozen",
        "T2048-D2560-bfloat16-mask0-random-score",
    ),
    "linear_divergence": (f"{_SHORT}-forward_kl", f"{_SHORT}-jsd", f"T512-{_WIDE}-forward_kl"),
    "discriminator": _DISCRIMINATOR,
}
CONDITIONS = {
    "linear_cross_entropy": (f"{_LONG}-conditions",),
    "linear_policy_loss": (f"{_SHORT}-conditions", f"{_LONG}-conditions"),
    "linear_logprob": (f"{_SHORT}-conditions",),
}
LEAST_SHARE = {_LONG: 0.93, _SHORT: 0.88}
MOST_FROZEN, MOST_MASKED_90, MOST_MEMORY, LEAST_DISCRIMINATOR = 0.72, 0.2, 0.2, 5.0
LEAST_OVER_PADDED, MOST_OF_PADDED, MOST_FOR_K, MOST_OFF_MODEL = 4.0, 0.25, 1.15, 1.25
SHARED_CASES = tuple(
    f"P{p}-R{r}-float32" for p, r in ((1024, 64), (1024, 128), (2048, 64), (2048, 128), (2048, 256), (4096, 128))
)
SWEPT_CASES = ("P1024-R64-float32", "P2048-R128-float32")
STEP_CASES = tuple(f"P{p}-R{r}-float32" for p, r in ((1024, 64), (2048, 64), (2048, 128), (4096, 128)))

Judge = Callable[[dict], Iterator[Finding]]


def _share(least: float) -> Judge:
    def judge(variants: dict) -> Iterator[Finding]:
        ours = variants[OURS]
        share, by_round = ours["share_of_gemms"], ours["share_of_gemms_by_round"]
        what = f"{share:.1%} of the bare GEMMs' rate (by round {by_round:.1%}), at least {least:.0%}"
        yield share >= least, what + rounds_of(ours, variants[GEMMS])

    return judge


def _memory(variants: dict) -> Iterator[Finding]:
    """By both definitions of memory.py, as two goals."""
    for key, name in (("peak_mib", "whole peak"), ("peak_beyond_gradients_mib", "peak beyond gradients")):
        if not all(key in variants.get(side, {}) for side in (OURS, EAGER)):
            yield None, f"{name} of ours and eager"
            continue
        ours, eager = variants[OURS][key], variants[EAGER][key]
        times = ours / max(eager, 1e-9)
        yield (
            times <= MOST_MEMORY,
            f"{name} {times:.4f} of eager's ({ours:.0f} / {eager:.0f} MiB), at most {MOST_MEMORY}",
        )


def _conditions(variants: dict) -> Iterator[Finding]:
    for name, most in (("frozen head", MOST_FROZEN), ("90% masked", MOST_MASKED_90)):
        times = variants[name]["times_base"]
        what = f"{name}: {times:.3f} of the time without, at most {most}"
        yield times <= most, what + rounds_of(variants[name], variants[OURS])


def _discriminator(variants: dict) -> Iterator[Finding]:
    yield _faster(variants, EAGER, LEAST_DISCRIMINATOR)


def _sharing(variants: dict) -> Iterator[Finding]:
    """One pass over a group of 12 responses: time against padded rows."""
    yield _at_least(variants, "padded M=12", LEAST_OVER_PADDED)


def _sharing_memory(variants: dict) -> Iterator[Finding]:
    sides = [variants.get(name, {}).get("peak_beyond_gradients_mib") for name in ("shared M=12", "padded M=12")]
    if None in sides:
        yield None, "peak memory of shared and padded"
        return
    share = sides[0] / sides[1]
    yield share <= MOST_OF_PADDED, f"peak beyond gradients {share:.3f} of padded rows', at most {MOST_OF_PADDED}"


def _sharing_model(variants: dict) -> Iterator[Finding]:
    """Ratios of times against the ratios that the cost model predicts."""
    for name in ("shared M=9", "shared M=1", "padded M=12", "copies M=12"):
        yield _predicted(variants, name, "shared M=12", main_time)


def _step(variants: dict) -> Iterator[Finding]:
    yield _k_times(variants, main_time, "whole step")
    yield _k_times(variants, _training, "training")


def _step_model(variants: dict) -> Iterator[Finding]:
    for name in ("shared K=4 N=8", "padded K=4 N=8", "copies K=4 N=8"):
        yield _predicted(variants, name, "shared K=1 N=8", _training)


def _step_sweep(variants: dict) -> Iterator[Finding]:
    yield _predicted(variants, "shared K=8 N=8", "shared K=1 N=8", _training)


def _k_times(variants: dict, time: Callable[[dict], float], what: str) -> Finding:
    four, one = (variants.get(f"shared K={k} N=8") for k in (4, 1))
    if four is None or one is None:
        return None, f"{what} at K=4 and K=1"
    times = time(four) / time(one)
    return times <= MOST_FOR_K, f"{what}: K=4 takes {times:.3f} of K=1, at most {MOST_FOR_K}" + rounds_of(four, one)


def _predicted(variants: dict, name: str, base: str, time: Callable[[dict], float]) -> Finding:
    if name not in variants or base not in variants:
        return None, f"{name} and {base}"
    own, other = variants[name], variants[base]
    measured, predicted = time(own) / time(other), own["predicted_s"] / other["predicted_s"]
    off = max(measured / predicted, predicted / measured)
    what = f"{name} over {base}: {measured:.2f}, predicted {predicted:.2f}, apart {off:.2f}, at most {MOST_OFF_MODEL}"
    return off <= MOST_OFF_MODEL, what + rounds_of(own, other)


def _training(own: dict) -> float:
    return own["training"]["median_ms"]


def _at_least(variants: dict, name: str, least: float) -> Finding:
    if name not in variants or "shared M=12" not in variants:
        return None, name
    own, base = variants[name], variants["shared M=12"]
    times = main_time(own) / main_time(base)
    return times >= least, f"{times:.2f} times faster than {name}, at least {least:g}" + rounds_of(own, base)


def _no_slower(variants: dict) -> Iterator[Finding]:
    """Against eager and every peer. One cold call of a peer is no measurement to be faster than."""
    if EAGER not in variants:
        yield None, EAGER
    for name, own in variants.items():
        if name == GEMMS or name.startswith(OURS) or own.get("memory_pass_only"):
            continue
        yield _faster(variants, name, 1.0)


def _faster(variants: dict, name: str, least: float) -> Finding:
    if name not in variants:
        return None, name
    times = main_time(variants[name]) / main_time(variants[OURS])
    return times >= least, f"{times:.2f} times faster than {name}, at least {least:g}" + rounds_of(
        variants[name], variants[OURS]
    )


# (benchmark, case, judge), those with a number of their own first.
NUMBERS: tuple[tuple[str, str, Judge], ...] = (
    *((bench, case, _share(least)) for case, least in LEAST_SHARE.items() for bench in HEADS),
    *((bench, case, _memory) for case in LEAST_SHARE for bench in HEADS),
    *((bench, case, _conditions) for bench, cases in CONDITIONS.items() for case in cases),
    *(("discriminator", case, _discriminator) for case in _DISCRIMINATOR),
    ("shared_prefix", "P2048-R128-float32", _sharing),
    ("shared_prefix", "P2048-R128-float32", _sharing_memory),
    *(("shared_prefix", case, _sharing_model) for case in SHARED_CASES),
    *(("step", case, judge) for case in STEP_CASES for judge in (_step, _step_model)),
    *(("step", case, _step_sweep) for case in SWEPT_CASES),
)
GOALS = (*NUMBERS, *((bench, case, _no_slower) for bench, cases in CASES.items() for case in cases))
# What `pytest bench/ --claims` measures.
CLAIM_CASES = {(bench, case) for bench, case, _ in NUMBERS}


def verdicts(records: list[dict]) -> Iterator[Verdict]:
    """Of every goal on CPU, in the order of GOALS; records as `load` gives them."""
    found = {(record["bench"], record["case"]): record["variants"] for record in records}
    for bench, case, judge in GOALS:
        where = f"{bench} {case}"
        variants = found.get((bench, case))
        if variants is None:
            yield Verdict(
                NOT_MEASURED, where, f"no record ({judge.__qualname__.split('.')[0].strip('_').replace('_', ' ')})"
            )
            continue
        for reached, what in judge(variants):
            yield Verdict(NOT_MEASURED if reached is None else MET if reached else MISSED, where, what)


def _on_cuda(results: Path) -> Iterator[Verdict]:
    """Of each folder that bench.cuda has left; without any, what it would measure."""
    runs = sorted(results.glob(f"*/{RECORDS}"))
    if not runs:
        yield from cuda_goals.verdicts([])
    for run in runs:
        for verdict in cuda_goals.verdicts(load_run(run)):
            yield verdict._replace(where=f"{run.parent.name} {verdict.where}")


def _counts(found: list[Verdict]) -> dict[str, int]:
    return {status: sum(v.status == status for v in found) for status in (MET, MISSED, NOT_MEASURED)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    given = parser.parse_args()
    if not any(given.results.glob("*.jsonl")):
        parser.error(f"--results: no records (*.jsonl) in {given.results}")
    media = video_goals.verdicts(video_goals.load(given.results, given.hardware))
    found = [
        *verdicts(load(given.results, hardware=given.hardware)),
        *(Verdict(status, f"media {name}", what) for status, name, what in media),
    ]
    for verdict in found:
        print(f"{verdict.status:12s} {verdict.where}: {verdict.what}")
    counts = _counts(found)
    on_cuda = list(_on_cuda(given.results))
    for verdict in on_cuda:
        print(f"on CUDA: {verdict.status:12s} {verdict.where}: {verdict.what}")
    for where, own in (("CUDA", _counts(on_cuda)), ("CPU", counts)):
        print(f"on {where}: " + ", ".join(f"{count} {status}" for status, count in own.items()))
    return int(counts[MET] < len(found))


if __name__ == "__main__":
    sys.exit(main())
