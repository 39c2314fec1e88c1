"""Records of the media path, and what they say about each number that it promises. Read by bench_video.py,
chart_media.py and claims.py.

A record is one line of results/media.jsonl: part, shape, device, variants, differences, not_run, and the surroundings.
Its `name` tells the cases apart; of each the newest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bench.records import hardware_of, read_lines
from bench.verdicts import MET, MISSED, NOT_MEASURED, Finding, rounds_of

OURS, HF = "ours", "HF processor"
LEAST_FASTER, MOST_MEMORY, MOST_AFTER = 3.0, 1 / 5, 1e-6
MOST_OF_PEER = 1.25
# Mean difference, in levels of 256, that decoders' colour conversions make; one frame off makes ten times as much.
MOST_LEVELS = 3.0
LEAST_EPOCH = 10.0
# Allowed growth of memory between the first mark, when the cache is full, and the last.
MOST_GROWTH_MIB = 8.0
# Descriptors may belong to cached frames, whose number varies with their sizes.
MOST_MORE_DESCRIPTORS = 8
LEAST_CUDA, MOST_TO_HOST_MIB = 20.0, 1.0
SIZES, GOPS = (16, 64), (30, 250)

Judge = Callable[[dict], Iterator[Finding]]


def load(folder: Path, hardware: str | None = None, *, quick: bool = False) -> list[dict]:
    """The newest record of each case on one machine, in the order of the file.

    Raises: ValueError where records of several machines are left; hardware names a part of one.
    """
    newest: dict[str, dict] = {}
    for record in read_lines(folder / "media.jsonl"):
        if record["quick"] == quick and (hardware or "") in hardware_of(record):
            newest[record["name"]] = record
    machines = sorted({hardware_of(record) for record in newest.values()})
    if len(machines) > 1:
        raise ValueError(f"records of several machines in {folder}: {machines}; name one with --hardware")
    return list(newest.values())


def fastest(variants: dict[str, dict], among: Callable[[str], bool], by: str = "cpu_s") -> str | None:
    """The variant of the least CPU seconds, or of the least `by`."""
    chosen = {name: own[by]["median"] for name, own in variants.items() if among(name)}
    return min(chosen, key=chosen.get, default=None)


def is_peer(name: str) -> bool:
    return not name.startswith(OURS)


def _preprocess(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    ours, peer = variants[OURS], fastest(variants, lambda name: name.startswith(HF))
    if peer is None:
        yield None, f"{HF}: " + "; ".join(sorted(set(record["not_run"].values())))
        return
    theirs = variants[peer]
    times = theirs["cpu_s"]["median"] / ours["cpu_s"]["median"]
    seconds = f"{ours['cpu_s']['median']:.3f} and {theirs['cpu_s']['median']:.3f} s of CPU"
    yield (
        times >= LEAST_FASTER,
        f"{times:.1f} times faster than {peer} ({seconds}), at least {LEAST_FASTER:g}" + rounds_of(ours, theirs),
    )
    if "beyond_output_mib" not in ours:
        yield None, "peak memory, which is counted on Linux with glibc"
    else:
        share = ours["beyond_output_mib"] / max(theirs["beyond_output_mib"], 1e-9)
        found = f"{ours['beyond_output_mib']:.1f} / {theirs['beyond_output_mib']:.0f} MiB"
        yield share <= MOST_MEMORY, f"peak beside the output {share:.4f} of theirs ({found}), at most {MOST_MEMORY:g}"
    far = record["differences"][peer]
    yield far["levels"] == 0, f"before normalisation at most {far['levels']} levels from {HF}, 0 wanted"
    yield far["values"] <= MOST_AFTER, f"after it at most {far['values']:.1e} from {HF}, at most {MOST_AFTER:g}"


def _decode(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    peer = fastest(variants, is_peer)
    if peer is None:
        yield None, "no peer runs here"
        return
    ours, theirs = variants[OURS], variants[peer]
    share = ours["cpu_s"]["median"] / theirs["cpu_s"]["median"]
    yield (
        share <= MOST_OF_PEER,
        f"{share:.2f} of the CPU seconds of the best, {peer}, at most {MOST_OF_PEER:g}" + rounds_of(ours, theirs),
    )
    far = {name: own["worst_frame"] for name, own in record["differences"].items()}
    worst = max(far, key=far.get)
    yield (
        far[worst] <= MOST_LEVELS,
        f"no frame further than {far[worst]:.2f} levels in the mean ({worst}), at most {MOST_LEVELS:g}",
    )


def _epochs(record: dict) -> Iterator[Finding]:
    for name in ("memory cache", "disk cache, new reader"):
        if name not in record["variants"]:
            yield None, name
            continue
        own = record["variants"][name]
        one, two = own["epoch_1_s"]["median"], own["epoch_2_s"]["median"]
        yield (
            one / two >= LEAST_EPOCH,
            f"{name}: epoch 2 {one / two:.0f} times faster than epoch 1 ({two:.3f} and {one:.2f} s), at least "
            f"{LEAST_EPOCH:g}",
        )


def _flat(record: dict) -> Iterator[Finding]:
    (own,) = record["variants"].values()
    first, last = own["marks"][0], own["marks"][-1]
    for key, where in (("own_mib", "process"), ("workers_mib", "workers")):
        growth = last[key] - first[key]
        yield (
            growth <= MOST_GROWTH_MIB,
            f"memory of the {where} {first[key]:.0f} MiB after {first['videos']} videos, {last[key]:.0f} after "
            f"{last['videos']}: at most {MOST_GROWTH_MIB:g} more",
        )
    for key, more in (("descriptors", MOST_MORE_DESCRIPTORS), ("processes", 0)):
        yield last[key] - first[key] <= more, f"{key} {first[key]} and {last[key]}: at most {more} more"
    yield own["decoded"] >= last["videos"], f"{own['decoded']} videos decoded of {last['videos']}"


def _cuda(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    ours, peer = variants[OURS], fastest(variants, is_peer, by="wall_s")
    if peer is None:
        yield None, f"{HF} on CPU: " + "; ".join(sorted(set(record["not_run"].values())))
        return
    times = variants[peer]["wall_s"]["median"] / ours["wall_s"]["median"]
    yield times >= LEAST_CUDA, f"file to patches {times:.1f} times faster than {peer}, at least {LEAST_CUDA:g}"
    yield ours["decoder"] == "cuda", f"decoded by {ours['decoder']}, cuda wanted"
    copied = variants["ours, copies counted"]["to_host_mib"]
    yield copied <= MOST_TO_HOST_MIB, f"{copied:.2f} MiB copied to the host, at most {MOST_TO_HOST_MIB:g}"


# Name of the case, judge.
GOALS: tuple[tuple[str, Judge], ...] = (
    *((f"preprocess-720p-{frames}f", _preprocess) for frames in reversed(SIZES)),
    *((f"decode-720p-{frames}f-gop{gop}", _decode) for frames in reversed(SIZES) for gop in GOPS),
    ("epochs-720p", _epochs),
    ("flat", _flat),
)
CUDA_GOALS: tuple[tuple[str, Judge], ...] = (("cuda-720p-64f-gop30", _cuda),)


def verdicts(records: list[dict], goals: tuple[tuple[str, Judge], ...] = GOALS) -> Iterator[tuple[str, str, str]]:
    """(status, name of the case, what was found) of every goal, in order."""
    found = {record["name"]: record for record in records}
    for name, judge in goals:
        if name not in found:
            yield NOT_MEASURED, name, "no record"
            continue
        for reached, what in judge(found[name]):
            yield NOT_MEASURED if reached is None else MET if reached else MISSED, name, what
