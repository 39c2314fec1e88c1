"""What the records of a CUDA machine say about each number that losses, shared prefixes, step and media promise there.

Read by bench.cuda for its summary and by bench.claims. `records`: as records.load_run gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import video_goals
from bench.measure import GEMMS, OURS, main_time
from bench.records import case_of
from bench.verdicts import MET, MISSED, NOT_MEASURED, Finding, Verdict, rounds_of

LONG = "T8192-D2560-bfloat16-mask0-random"
MOST_OF_FLOOR, LEAST_OVER_PER_TOKEN, LEAST_OVER_GRPO = 1.15, 1.3, 5.0
MOST_WORKSPACE_MIB = 0.6e9 / 2**20
MOST_DEVICE_US, MOST_LAUNCHES = 20.0, 2
MOST_FOR_K, LEAST_OVER_PADDED, MOST_OFF_MODEL, LEAST_UTILISATION = 1.15, 5.0, 1.15, 0.45
# Those whose log-prob of each token is exact; a filtered one skips work.
GRPO_PEERS = ("Liger chunked GRPO", "TRL chunked log-prob")
STEPS = tuple(f"P{p}-R{r}-bfloat16" for p, r in ((8192, 512), (2048, 128), (2048, 512), (8192, 128)))
# The op on rows gathered beforehand: what stands around it is no part of the promise.
PREPARED = "ours, all prepared"
STEP_SEVERAL, SEVERAL = "shared K=4 N=8, 4 groups", 4
# What is measured has one group or four; the recipe has 128 on 8 GPUs, and an optimiser step costs the same for all.
RECIPE_GROUPS = 16
STEP_BASE, STEP_ONE, STEP_PADDED = "shared K=4 N=8", "shared K=1 N=8", "padded K=4 N=8"

_KINDS = ("", ", checkpointing")

Judge = Callable[[dict], Iterator[Finding]]


def _floor(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    times = 1 / variants[OURS]["share_of_gemms"]
    flop = {"trainable": "6TDV", "frozen": "4TDV", "score": "2TDV"}[record["head"]]
    yield (
        times <= MOST_OF_FLOOR,
        f"{times:.3f} times the bare GEMMs ({flop}), at most {MOST_OF_FLOOR}"
        + rounds_of(variants[OURS], variants[GEMMS]),
    )


def _workspace(record: dict) -> Iterator[Finding]:
    found = record["variants"][OURS]["peak_beyond_gradients_mib"]
    yield found <= MOST_WORKSPACE_MIB, f"{found:.0f} MiB beside the gradients, at most {MOST_WORKSPACE_MIB:.0f}"


def _per_token(record: dict) -> Iterator[Finding]:
    """Against the fastest peer that gives an exact log-prob per token."""
    variants = record["variants"]
    peers = [name for name in variants if name not in (GEMMS, OURS)]
    if not peers:
        yield None, "no peer ran"
        return
    best = min(peers, key=lambda name: main_time(variants[name]))
    yield _faster(variants, best, LEAST_OVER_PER_TOKEN, "the best exact per-token peer, ")


def _grpo(record: dict) -> Iterator[Finding]:
    for name in GRPO_PEERS:
        yield _faster(record["variants"], name, LEAST_OVER_GRPO)


def _faster(variants: dict, name: str, least: float, what: str = "") -> Finding:
    if name not in variants:
        return None, f"{name} did not run"
    times = main_time(variants[name]) / main_time(variants[OURS])
    found = f"{times:.2f} times faster than {what}{name}, at least {least:g}"
    return times >= least, found + rounds_of(variants[OURS], variants[name])


def _launches(record: dict) -> Iterator[Finding]:
    own = record.get("launches", {}).get(PREPARED)
    if own is None:
        yield None, f"device time: {record.get('profiler', 'not counted')}"
        return
    yield own["device_us"] <= MOST_DEVICE_US, f"{own['device_us']:.1f} µs on the device, at most {MOST_DEVICE_US:g}"
    yield own["count"] <= MOST_LAUNCHES, f"{own['count']} kernels launched, at most {MOST_LAUNCHES}"


def _step(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    if "gate" in record["remarks"]:
        yield False, record["remarks"]["gate"]
    base, one = _alike(record, STEP_BASE, STEP_ONE)
    if base is None:
        yield None, _why_not(record, STEP_BASE)
        return
    own = variants[base]
    if one is None:
        yield None, _why_not(record, STEP_ONE)
    else:
        # Passes as well: an optimiser step that is the same for both hides what K costs.
        for key, what in (("whole_s", "whole step"), ("passes_s", "passes")):
            times = own[key] / variants[one][key]
            if key == "whole_s" and own["optimizer_s"] is None:
                yield None, f"whole step: optimisers {record['optimizer']['how']}"
                continue
            found = f"{what}: {base} takes {times:.3f} of {one}, at most {MOST_FOR_K}"
            yield times <= MOST_FOR_K, found + rounds_of(own, variants[one])
    yield from _utilisation(record, base, 1)
    several = _alike(record, STEP_SEVERAL)[0]
    if several is not None:
        yield from _utilisation(record, several, SEVERAL)
    elif record["case"] == STEPS[1]:
        yield None, _why_not(record, STEP_SEVERAL)
    off = max(own["passes_s"] / own["predicted_s"], own["predicted_s"] / own["passes_s"])
    yield off <= MOST_OFF_MODEL, f"{base}: passes {off:.2f} apart from the cost model, at most {MOST_OFF_MODEL}"


def _utilisation(record: dict, name: str, groups: int) -> Iterator[Finding]:
    """As measured, and as it would be with the recipe's number of groups to each optimiser step."""
    own, optimizer = record["variants"][name], record["optimizer"]["how"]
    used = own["utilisation"]["whole"]
    if used is None:
        yield None, f"{name}: utilisation: {record['remarks'].get('utilisation', f'optimiser {optimizer}')}"
        return
    found = f"{name}: {used:.1%} of the datasheet's peak in the whole step (optimiser {optimizer})"
    yield used >= LEAST_UTILISATION, f"{found}, at least {LEAST_UTILISATION:.0%}" + rounds_of(own)
    times, others = RECIPE_GROUPS / groups, own["whole_s"] - own["optimizer_s"]
    used *= times * own["whole_s"] / (times * others + own["optimizer_s"])
    found = f"{name}: {used:.1%} computed from that for the recipe's {RECIPE_GROUPS} groups to an optimiser step"
    yield used >= LEAST_UTILISATION, f"{found}, at least {LEAST_UTILISATION:.0%}"


def _over_padded(record: dict) -> Iterator[Finding]:
    variants = record["variants"]
    base, padded = _alike(record, STEP_BASE, STEP_PADDED)
    if base is None or padded is None:
        yield None, _why_not(record, STEP_BASE if base is None else STEP_PADDED)
        return
    times = variants[padded]["passes_s"] / variants[base]["passes_s"]
    found = f"passes of {base} {times:.2f} times faster than {padded}, at least {LEAST_OVER_PADDED:g}"
    yield times >= LEAST_OVER_PADDED, found + rounds_of(variants[base], variants[padded])


def _alike(record: dict, *names: str) -> list[str | None]:
    """These variants as they are, or all of them with recomputed layers: whichever has more of them."""
    kinds = [[name + kind if name + kind in record["variants"] else None for name in names] for kind in _KINDS]
    return max(kinds, key=lambda found: (found[0] is not None, len(found) - found.count(None)))


def _why_not(record: dict, name: str) -> str:
    not_run = record["not_run"]
    return f"{name}: {not_run.get(name, not_run.get(f'{name}, checkpointing', 'did not run'))}"


# (benchmark, case, judge, what is promised)
GOALS: tuple[tuple[str, str, Judge, str], ...] = (
    *(
        (
            "step_4b",
            case,
            _step,
            f"K=4 at most {MOST_FOR_K} times K=1, at least {LEAST_UTILISATION:.0%} of the peak, the cost model within "
            f"{MOST_OFF_MODEL}",
        )
        for case in STEPS
    ),
    ("step_4b", STEPS[0], _over_padded, f"at least {LEAST_OVER_PADDED:g} times faster than padded rows"),
    *(
        (f"linear_{bench}", f"{LONG}-{head}", _floor, f"at most {MOST_OF_FLOOR} times the bare GEMMs")
        for bench, head in (
            *((bench, "trainable") for bench in ("policy_loss", "cross_entropy", "logprob")),
            ("logprob", "frozen"),
        )
    ),
    ("linear_policy_loss", f"{LONG}-trainable", _workspace, "at most 0.6 GB beside the gradients"),
    (
        "linear_logprob",
        f"{LONG}-trainable",
        _per_token,
        f"at least {LEAST_OVER_PER_TOKEN} times faster than the best exact per-token peer",
    ),
    (
        "linear_policy_loss",
        f"{LONG}-trainable",
        _grpo,
        f"at least {LEAST_OVER_GRPO:g} times faster than the GRPO paths of Liger and TRL",
    ),
    (
        "discriminator",
        "B16-L1-D2560-bfloat16-rows",
        _launches,
        f"at most {MOST_DEVICE_US:g} µs on the device and {MOST_LAUNCHES} launches",
    ),
)
_MEDIA = f"file to patches at least {video_goals.LEAST_CUDA:g} times faster than HF's processor, no pixels to the host"


def verdicts(records: list[dict]) -> Iterator[Verdict]:
    """Of every goal on CUDA, in the order of GOALS."""
    found = {(record["bench"], case_of(record)): record for record in records if not record["quick"]}
    for bench, case, judge, promised in GOALS:
        where = f"{bench} {case}"
        if (bench, case) not in found:
            yield Verdict(NOT_MEASURED, where, f"no record; promised: {promised}")
            continue
        for reached, what in judge(found[bench, case]):
            yield Verdict(NOT_MEASURED if reached is None else MET if reached else MISSED, where, what)
    media = [record for (bench, _), record in found.items() if bench == "media"]
    for status, name, what in video_goals.verdicts(media, video_goals.CUDA_GOALS):
        yield Verdict(status, f"media {name}", what if media else f"{what}; promised: {_MEDIA}")
