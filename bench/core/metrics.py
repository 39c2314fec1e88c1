"""How each promised number is computed from the record of a case; goals.py has the cases and the bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bench.core.measure import EAGER, GEMMS, OURS, main_time

LEAST, MOST = "at least", "at most"
HF = "HF processor"
# The op of the discriminator on rows that were gathered beforehand: the code around it is not part of the promise.
PREPARED = "ours, all prepared"
STEP_BASE, STEP_ONE, STEP_PADDED = "shared K=4 N=8", "shared K=1 N=8", "padded K=4 N=8"
STEP_SEVERAL, SEVERAL = "shared K=4 N=8, 4 groups", 4
# The recipe has 128 groups on 8 GPUs to an optimizer step; the benchmark has one or four.
RECIPE_GROUPS = 16


class Found(NamedTuple):
    """A value of a metric, None if it could not be computed; the sentence about it; the variants that were compared."""

    value: float | None
    text: str
    sides: tuple[dict, ...] = ()


class NotRun(Exception):
    """What a metric needs and the record lacks."""


Metric = Callable[[dict], Iterator[Found]]


def _metric(
    function: Callable[..., Found], *arguments: object, each: Iterable[str] | Callable[[dict], Iterable[str]] = ("",)
) -> Metric:
    """Return a metric with a value per name, or one. each: names of variants, or a function that finds them."""

    def metric(record: dict) -> Iterator[Found]:
        for name in each(record) if callable(each) else each:
            try:
                yield function(record, *[name] * bool(name), *arguments)
            except NotRun as reason:
                yield Found(None, str(reason))

    return metric


def _sides(record: dict, *names: str) -> tuple[dict, ...]:
    for name in names:
        if name not in record["variants"]:
            why = record.get("not_run", {})
            raise NotRun(f"{name}: {why.get(name, why.get(f'{name}, checkpointing', 'did not run'))}")
    return tuple(record["variants"][name] for name in names)


# The losses.


def _share_of_gemms(record: dict) -> Found:
    ours, gemms = _sides(record, OURS, GEMMS)
    share, by_round = ours["share_of_gemms"], ours["share_of_gemms_by_round"]
    return Found(share, f"{share:.1%} of the bare GEMMs' rate (by round {by_round:.1%})", (ours, gemms))


def _times_gemms(record: dict) -> Found:
    ours, gemms = _sides(record, OURS, GEMMS)
    flop, times = {"trainable": "6TDV", "frozen": "4TDV", "score": "2TDV"}[record["head"]], 1 / ours["share_of_gemms"]
    return Found(times, f"{times:.3f} times the bare GEMMs ({flop})", (ours, gemms))


def _memory_over(record: dict, key: str, name: str, ours: str, other: str) -> Found:
    own, base = (side.get(key) for side in _sides(record, ours, other))
    if own is None or base is None:
        raise NotRun(f"{name} of {ours} and {other}")
    share = own / max(base, 1e-9)
    return Found(share, f"{name} {share:.4f} of {other} ({own:.0f} / {base:.0f} MiB)")


def _condition(record: dict, name: str) -> Found:
    own, base = _sides(record, name, OURS)
    return Found(own["times_base"], f"{name}: {own['times_base']:.3f} of the time without", (own, base))


def _faster_than(record: dict, name: str, ours: str = OURS) -> Found:
    other, own = _sides(record, name, ours)
    times = main_time(other) / main_time(own)
    return Found(times, f"{times:.2f} times faster than {name}", (other, own))


def _milliseconds(record: dict, name: str) -> Found:
    (own,) = _sides(record, name)
    return Found(main_time(own), f"{main_time(own):.0f} ms", (own,))


def _peers(record: dict) -> list[str]:
    """Return eager and every peer. A peer with a single cold call has not been measured well enough."""
    variants = record["variants"]
    others = [n for n in variants if n != GEMMS and not n.startswith(OURS) and not variants[n].get("memory_pass_only")]
    return [EAGER] * (EAGER not in variants) + others


def _best_per_token(record: dict) -> list[str]:
    """Return the fastest peer that gives an exact log-prob per token."""
    variants = record["variants"]
    peers = [name for name in variants if name not in (GEMMS, OURS)]
    return [min(peers, key=lambda name: main_time(variants[name]), default="a peer")]


def _value(record: dict, key: str, text: str, name: str = OURS) -> Found:
    """Return a number of a variant as it is."""
    value = _sides(record, name)[0][key]
    return Found(value, text.format(value))


def _launches(record: dict, key: str, text: str) -> Found:
    own = record.get("launches", {}).get(PREPARED)
    if own is None:
        raise NotRun(f"device time: {record.get('profiler', 'not counted')}")
    return Found(own[key], text.format(own[key]))


# Shared prefixes and whole steps.


def _off_model(record: dict, name: str, base: str) -> Found:
    """Compare the ratio of measured times with the ratio that the cost model predicts."""
    own, other = _sides(record, name, base)
    measured, predicted = _passes(own) / _passes(other), own["predicted_s"] / other["predicted_s"]
    off = max(measured / predicted, predicted / measured)
    text = f"{name} over {base}: {measured:.2f}, predicted {predicted:.2f}, apart {off:.2f}"
    return Found(off, text, (own, other))


def _passes(own: dict) -> float:
    return own["training"]["median_ms"] if "training" in own else main_time(own)


def _gradient_norms(record: dict) -> Found:
    if "gate" in record["remarks"]:
        return Found(float("inf"), record["remarks"]["gate"])
    apart = max(record["differences"].values())
    return Found(apart, f"gradient norms of padded and shared steps {apart:.4f} apart")


def _alike(record: dict, *names: str) -> tuple[str, ...]:
    """Return these variants as they are, or all with recomputed layers: whichever has more of them."""
    kinds = [tuple(name + kind for name in names) for kind in ("", ", checkpointing")]
    return max(kinds, key=lambda own: (own[0] in record["variants"], sum(n in record["variants"] for n in own)))


def _k_times(record: dict, whole: bool) -> Found:
    base, one = _alike(record, STEP_BASE, STEP_ONE)
    own, other = _sides(record, base, one)
    if whole and own.get("optimizer_s", 0.0) is None:
        raise NotRun(f"whole step: optimizers {record['optimizer']['how']}")
    # The passes are judged as well: an optimizer step that is the same for both hides the cost of K.
    times = main_time(own) / main_time(other) if whole else _passes(own) / _passes(other)
    return Found(times, f"{'whole step' if whole else 'passes'}: {base} takes {times:.3f} of {one}", (own, other))


def _utilisation(record: dict, variant: str, groups: int, scaled: bool) -> Found:
    """Return it as measured, or scaled to the recipe's number of groups per optimizer step."""
    (name,) = _alike(record, variant)
    (own,), optimizer = _sides(record, name), record["optimizer"]["how"]
    used = own["utilisation"]["whole"]
    if used is None:
        raise NotRun(f"{name}: utilisation: {record['remarks'].get('utilisation', f'optimizer {optimizer}')}")
    if not scaled:
        return Found(used, f"{name}: {used:.1%} of the datasheet's peak in the whole step ({optimizer})", (own,))
    times, others = RECIPE_GROUPS / groups, own["whole_s"] - own["optimizer_s"]
    used *= times * own["whole_s"] / (times * others + own["optimizer_s"])
    return Found(used, f"{name}: {used:.1%} computed from that for {RECIPE_GROUPS} groups per optimizer step")


def _passes_off_model(record: dict) -> Found:
    (base,) = _alike(record, STEP_BASE)
    (own,) = _sides(record, base)
    off = max(own["passes_s"] / own["predicted_s"], own["predicted_s"] / own["passes_s"])
    return Found(off, f"{base}: passes {off:.2f} apart from the cost model")


def _step_over_padded(record: dict) -> Found:
    base, padded = _alike(record, STEP_BASE, STEP_PADDED)
    own, other = _sides(record, base, padded)
    times = other["passes_s"] / own["passes_s"]
    return Found(times, f"passes of {base} {times:.2f} times faster than {padded}", (own, other))


def _self_teacher(record: dict, kind: str) -> Found:
    own, plain = _sides(record, kind, record["baseline"])
    return Found(own["extra_share"], f"{kind}: {own['extra_share']:.1%} of a step more", (own, plain))


# The media path. Its times are spreads of seconds, and cpu_s counts all threads and processes.


def _against(record: dict, what: str = "", by: str = "cpu_s") -> tuple[str, tuple[dict, dict], float, float]:
    """Return the fastest peer whose name begins with `what`, both sides, and the seconds of both, ours first."""
    sides = record["variants"]
    seconds = {n: own[by]["median"] for n, own in sides.items() if n.startswith(what) and not n.startswith(OURS)}
    if not seconds:
        raise NotRun(f"{what or 'peers'}: " + "; ".join(sorted(set(record["not_run"].values()))))
    peer = min(seconds, key=seconds.get)
    return peer, (sides[OURS], sides[peer]), sides[OURS][by]["median"], seconds[peer]


def _preprocessing_time(record: dict) -> Found:
    peer, sides, ours, theirs = _against(record, HF)
    text = f"{theirs / ours:.1f} times faster than {peer} ({ours:.3f} and {theirs:.3f} s of CPU)"
    return Found(theirs / ours, text, sides)


def _preprocessing_memory(record: dict) -> Found:
    ours, theirs = (side.get("beyond_output_mib") for side in _against(record, HF)[1])
    if ours is None or theirs is None:
        raise NotRun("peak memory is counted on Linux with glibc only")
    share = ours / max(theirs, 1e-9)
    return Found(share, f"peak beside the output {share:.4f} of theirs ({ours:.1f} / {theirs:.0f} MiB)")


def _preprocessing_difference(record: dict, key: str, text: str) -> Found:
    far = record["differences"][_against(record, HF)[0]][key]
    return Found(far, text.format(far))


def _decode_time(record: dict) -> Found:
    peer, sides, ours, theirs = _against(record)
    return Found(ours / theirs, f"{ours / theirs:.2f} of the CPU seconds of the best, {peer}", sides)


def _decode_levels(record: dict) -> Found:
    far = {name: own["worst_frame"] for name, own in record["differences"].items()}
    worst = max(far, key=far.get, default=None)
    if worst is None:
        raise NotRun("no peer runs here")
    return Found(far[worst], f"the worst frame is {far[worst]:.2f} levels from that of {worst} in the mean")


def _epochs(record: dict, name: str) -> Found:
    (own,) = _sides(record, name)
    one, two = own["epoch_1_s"]["median"], own["epoch_2_s"]["median"]
    return Found(one / two, f"{name}: epoch 2 {one / two:.0f} times faster than epoch 1 ({two:.3f} and {one:.2f} s)")


def _growth(record: dict, key: str, what: str) -> Found:
    """Return the growth between the first mark, when the cache is full, and the last."""
    (own,) = record["variants"].values()
    first, last = own["marks"][0], own["marks"][-1]
    more = last[key] - first[key]
    counts = f"{first[key]:.0f} after {first['videos']} videos and {last[key]:.0f} after {last['videos']}"
    return Found(more, f"{what}: {counts}, {more:.0f} more")


def _decoded(record: dict) -> Found:
    (own,) = record["variants"].values()
    videos = own["marks"][-1]["videos"]
    return Found(own["decoded"] / videos, f"{own['decoded']} videos decoded of {videos}")


def _file_to_patches(record: dict) -> Found:
    peer, _, ours, theirs = _against(record, by="wall_s")
    return Found(theirs / ours, f"file to patches {theirs / ours:.1f} times faster than {peer}")


def _decoder(record: dict) -> Found:
    own = record["variants"][OURS]["decoder"]
    return Found(float(own == "cuda"), f"decoded by {own}, cuda wanted")


_PEAK, _BEYOND = ("peak_mib", "whole peak"), ("peak_beyond_gradients_mib", "peak beyond gradients")
_OF_A_PASS = ("shared M=9", "shared M=1", "padded M=12", "copies M=12")
_OF_A_STEP = ("shared K=4 N=8", "padded K=4 N=8", "copies K=4 N=8")
# Those of Liger and TRL whose log-prob of each token is exact; a filtered one skips work.
_GRPO = ("Liger chunked GRPO", "TRL chunked log-prob")

METRICS: dict[str, tuple[str, Metric]] = {
    "share of the GEMMs' rate": (LEAST, _metric(_share_of_gemms)),
    "time over the GEMMs": (MOST, _metric(_times_gemms)),
    "peak over eager": (MOST, _metric(_memory_over, *_PEAK, OURS, EAGER)),
    "peak beyond gradients over eager": (MOST, _metric(_memory_over, *_BEYOND, OURS, EAGER)),
    "MiB beside the gradients": (MOST, _metric(_value, "peak_beyond_gradients_mib", "{:.0f} MiB beside the gradients")),
    "time with a frozen head": (MOST, _metric(_condition, "frozen head")),
    "time with 90% masked": (MOST, _metric(_condition, "90% masked")),
    "times faster than eager": (LEAST, _metric(_faster_than, EAGER)),
    "times faster than every peer": (LEAST, _metric(_faster_than, each=_peers)),
    "times faster than the best peer": (LEAST, _metric(_faster_than, each=_best_per_token)),
    "times faster than GRPO": (LEAST, _metric(_faster_than, each=_GRPO)),
    "device time in µs": (MOST, _metric(_launches, "device_us", "{:.1f} µs on the device")),
    "kernels launched": (MOST, _metric(_launches, "count", "{} kernels launched")),
    "times faster than padded rows": (LEAST, _metric(_faster_than, "padded M=12", "shared M=12")),
    "memory over padded rows": (MOST, _metric(_memory_over, *_BEYOND, "shared M=12", "padded M=12")),
    "pass against the cost model": (MOST, _metric(_off_model, "shared M=12", each=_OF_A_PASS)),
    "gradient norms": (MOST, _metric(_gradient_norms)),
    "whole step, K=4 over K=1": (MOST, _metric(_k_times, True)),
    "passes, K=4 over K=1": (MOST, _metric(_k_times, False)),
    "ways against the cost model": (MOST, _metric(_off_model, STEP_ONE, each=_OF_A_STEP)),
    "K=8 against the cost model": (MOST, _metric(_off_model, "shared K=8 N=8", STEP_ONE)),
    "utilisation": (LEAST, _metric(_utilisation, STEP_BASE, 1, False)),
    "utilisation, recipe": (LEAST, _metric(_utilisation, STEP_BASE, 1, True)),
    "utilisation, 4 groups": (LEAST, _metric(_utilisation, STEP_SEVERAL, SEVERAL, False)),
    "utilisation, 4 groups, recipe": (LEAST, _metric(_utilisation, STEP_SEVERAL, SEVERAL, True)),
    "passes against the cost model": (MOST, _metric(_passes_off_model)),
    "passes of padded rows": (LEAST, _metric(_step_over_padded)),
    "times faster than generate": (LEAST, _metric(_faster_than, "generate")),
    "times faster than eager steps": (LEAST, _metric(_faster_than, "ours, eager")),
    "vLLM, times faster than eager steps": (LEAST, _metric(_faster_than, "ours, eager", "vllm")),
    "all weights to vLLM, ms": (MOST, _metric(_milliseconds, "vllm, weights")),
    "self-teacher over a step": (MOST, _metric(_self_teacher, each=("frozen", "live", "ema"))),
    "preprocessing time": (LEAST, _metric(_preprocessing_time)),
    "preprocessing memory": (MOST, _metric(_preprocessing_memory)),
    "levels from HF": (
        MOST,
        _metric(_preprocessing_difference, "levels", f"before normalisation {{:.2g}} levels from {HF}"),
    ),
    "values from HF": (MOST, _metric(_preprocessing_difference, "values", f"after normalisation {{:.1e}} from {HF}")),
    "decoding over the best peer": (MOST, _metric(_decode_time)),
    "levels from the peers": (MOST, _metric(_decode_levels)),
    "epoch 2, memory cache": (LEAST, _metric(_epochs, "memory cache")),
    "epoch 2, disk cache": (LEAST, _metric(_epochs, "disk cache, new reader")),
    "growth of the process in MiB": (MOST, _metric(_growth, "own_mib", "MiB of the process")),
    "growth of the workers in MiB": (MOST, _metric(_growth, "workers_mib", "MiB of the workers")),
    "more descriptors": (MOST, _metric(_growth, "descriptors", "descriptors")),
    "more processes": (MOST, _metric(_growth, "processes", "processes")),
    "videos decoded": (LEAST, _metric(_decoded)),
    "file to patches": (LEAST, _metric(_file_to_patches)),
    "decoded on the device": (LEAST, _metric(_decoder)),
    "MiB copied to the host": (
        MOST,
        _metric(_value, "to_host_mib", "{:.2f} MiB copied to the host", "ours, copies counted"),
    ),
}
