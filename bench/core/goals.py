"""What the benchmarks promise, in one table, and what the records say about each promise.

    python -m bench.core.goals [--results bench/results] [--hardware PART_OF_ITS_NAME]

A row of TABLE is a set of benchmarks, their cases, a device, a metric of metrics.py and its bound. In a verdict, n is
the number of rounds of the variant that took part in the fewest. A value is NOT MEASURED if there is no record of the
case, or if one of the compared variants did not run.

The exit code is 1 if a goal on CPU is missed or not measured. Goals on CUDA are judged by the records of bench.cuda.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench.core.metrics import LEAST, METRICS
from bench.core.records import RECORDS, RESULTS, SUBJECTS, case_of, load, load_run

MET, MISSED, NOT_MEASURED = "met", "MISSED", "NOT MEASURED"


class Verdict(NamedTuple):
    """What a record says about one goal."""

    status: str
    where: str
    what: str


class Goal(NamedTuple):
    """A row of the table."""

    bench: str
    case: str
    device: str
    metric: str
    bound: float


HEADS = ("linear_cross_entropy", "linear_policy_loss", "linear_logprob")
LOSSES = (*HEADS, "linear_divergence", "discriminator")
_NARROW, _WIDE = "D256-float32-mask0-random-trainable", "D2560-bfloat16-mask0-random-trainable"
_SHORT, _LONG, _CUDA = f"T512-{_NARROW}", f"T2048-{_WIDE}", "T8192-D2560-bfloat16-mask0-random"
_PLAIN = (_SHORT, f"T2048-{_NARROW}", f"T512-{_WIDE}", _LONG)
# Every case that is measured on CPU.
CASES = {
    "linear_cross_entropy": (
        *_PLAIN,
        *(f"T512-D256-float32-{condition}-trainable" for condition in ("mask50-random", "mask90-random")),
        "T512-D256-float32-mask0-peaked-trainable",
    ),
    "linear_policy_loss": _PLAIN,
    "linear_logprob": (
        *_PLAIN,
        "T512-D256-float32-mask0-random-frozen",
        "T512-D2560-bfloat16-mask0-random-frozen",
        "T2048-D2560-bfloat16-mask0-random-score",
    ),
    "linear_divergence": (f"{_SHORT}-forward_kl", f"{_SHORT}-jsd", f"T512-{_WIDE}-forward_kl"),
    "discriminator": tuple(
        f"B16-L512-D2560-{d}-{mode}" for d in ("bfloat16", "float32") for mode in ("train", "score")
    ),
    "shared_prefix": tuple(
        f"P{p}-R{r}-float32" for p, r in ((1024, 64), (1024, 128), (2048, 64), (2048, 128), (2048, 256), (4096, 128))
    ),
    "step": tuple(f"P{p}-R{r}-float32" for p, r in ((1024, 64), (2048, 64), (2048, 128), (4096, 128))),
    "rollout": tuple(f"P{p}-N{n}-R64-float32" for p in (512, 2048) for n in (4, 8, 16)),
    "evaluation": ("V40-Q200-F16-R32-float32",),
    "self_teacher": tuple(f"P{p}-R{r}-float32-N8-H64" for p, r in ((2048, 128), (1024, 64))),
}
CONDITIONS = {
    "linear_cross_entropy": (f"{_LONG}-conditions",),
    "linear_policy_loss": (f"{_SHORT}-conditions", f"{_LONG}-conditions"),
    "linear_logprob": (f"{_SHORT}-conditions",),
}
# All ways over K are measured in these two.
SWEPT = ("P1024-R64-float32", "P2048-R128-float32")
CUDA_STEPS = tuple(f"P{p}-R{r}-bfloat16" for p, r in ((8192, 512), (2048, 128), (2048, 512), (8192, 128)))
# Mean difference, in levels of 256, that decoders' color conversions make; one frame off makes ten times as much.
MOST_LEVELS = 3.0
SIZES, GOPS = (16, 64), (30, 250)


_STEPS, _SHARED, _MEDIA, _ROLLOUT = ("step",), ("shared_prefix",), ("media",), ("rollout",)
_PREPROCESS = tuple(f"preprocess-720p-{frames}f" for frames in reversed(SIZES))
_DECODE = tuple(f"decode-720p-{frames}f-gop{gop}" for frames in reversed(SIZES) for gop in GOPS)
_EPOCHS, _FLAT, _ON_CUDA = ("epochs-720p",), ("flat",), ("cuda-720p-64f-gop30",)
_ROWS = ("B16-L1-D2560-bfloat16-rows",)

# Benchmarks, cases, device, metric, bound.
TABLE = (
    (HEADS, (_LONG,), "cpu", "share of the GEMMs' rate", 0.93),
    (HEADS, (_SHORT,), "cpu", "share of the GEMMs' rate", 0.88),
    (HEADS, (_LONG, _SHORT), "cpu", "peak over eager", 0.2),
    (HEADS, (_LONG, _SHORT), "cpu", "peak beyond gradients over eager", 0.2),
    *(((bench,), cases, "cpu", "time with a frozen head", 0.72) for bench, cases in CONDITIONS.items()),
    *(((bench,), cases, "cpu", "time with 90% masked", 0.2) for bench, cases in CONDITIONS.items()),
    *(((bench,), CASES[bench], "cpu", "times faster than every peer", 1.0) for bench in LOSSES),
    (("discriminator",), CASES["discriminator"], "cpu", "times faster than eager", 5.0),
    (_SHARED, ("P2048-R128-float32",), "cpu", "times faster than padded rows", 4.0),
    (_SHARED, ("P2048-R128-float32",), "cpu", "memory over padded rows", 0.25),
    (_SHARED, CASES["shared_prefix"], "cpu", "pass against the cost model", 1.25),
    (_STEPS, CASES["step"], "cpu", "whole step, K=4 over K=1", 1.15),
    (_STEPS, CASES["step"], "cpu", "passes, K=4 over K=1", 1.15),
    (_STEPS, CASES["step"], "cpu", "ways against the cost model", 1.25),
    (_STEPS, SWEPT, "cpu", "K=8 against the cost model", 1.25),
    (_ROLLOUT, ("P2048-N8-R64-float32",), "cpu", "times faster than generate", 3.0),
    (("evaluation",), CASES["evaluation"], "cpu", "times faster than generate", 2.5),
    (("self_teacher",), CASES["self_teacher"][:1], "cpu", "self-teacher over a step", 0.2),
    (_MEDIA, _PREPROCESS, "cpu", "preprocessing time", 3.0),
    (_MEDIA, _PREPROCESS, "cpu", "preprocessing memory", 0.2),
    (_MEDIA, _PREPROCESS, "cpu", "levels from HF", 0),
    (_MEDIA, _PREPROCESS, "cpu", "values from HF", 1e-6),
    (_MEDIA, _DECODE, "cpu", "decoding over the best peer", 1.25),
    (_MEDIA, _DECODE, "cpu", "levels from the peers", MOST_LEVELS),
    (_MEDIA, _EPOCHS, "cpu", "epoch 2, memory cache", 10.0),
    (_MEDIA, _EPOCHS, "cpu", "epoch 2, disk cache", 10.0),
    (_MEDIA, _FLAT, "cpu", "growth of the process in MiB", 8.0),
    (_MEDIA, _FLAT, "cpu", "growth of the workers in MiB", 8.0),
    # Descriptors may belong to cached frames, whose number varies with their sizes.
    (_MEDIA, _FLAT, "cpu", "more descriptors", 8),
    (_MEDIA, _FLAT, "cpu", "more processes", 0),
    (_MEDIA, _FLAT, "cpu", "videos decoded", 1.0),
    (_STEPS, CUDA_STEPS, "cuda", "gradient norms", 0.05),
    (_STEPS, CUDA_STEPS, "cuda", "whole step, K=4 over K=1", 1.15),
    (_STEPS, CUDA_STEPS, "cuda", "passes, K=4 over K=1", 1.15),
    (_STEPS, CUDA_STEPS, "cuda", "utilisation", 0.45),
    (_STEPS, CUDA_STEPS, "cuda", "utilisation, recipe", 0.45),
    (_STEPS, CUDA_STEPS[1:2], "cuda", "utilisation, 4 groups", 0.45),
    (_STEPS, CUDA_STEPS[1:2], "cuda", "utilisation, 4 groups, recipe", 0.45),
    (_STEPS, CUDA_STEPS, "cuda", "passes against the cost model", 1.15),
    (_STEPS, CUDA_STEPS[:1], "cuda", "passes of padded rows", 5.0),
    (_ROLLOUT, ("P2048-N8-R64-bfloat16",), "cuda", "times faster than eager steps", 3.0),
    (_ROLLOUT, ("P2048-N8-R64-bfloat16",), "cuda", "vLLM, times faster than eager steps", 5.0),
    (_ROLLOUT, ("P2048-N8-R64-bfloat16",), "cuda", "all weights to vLLM, ms", 1000.0),
    (HEADS, (f"{_CUDA}-trainable",), "cuda", "time over the GEMMs", 1.15),
    (("linear_logprob",), (f"{_CUDA}-frozen",), "cuda", "time over the GEMMs", 1.15),
    (("linear_logprob",), (f"{_CUDA}-trainable",), "cuda", "times faster than the best peer", 1.3),
    (("linear_policy_loss",), (f"{_CUDA}-trainable",), "cuda", "MiB beside the gradients", 0.6e9 / 2**20),
    (("linear_policy_loss",), (f"{_CUDA}-trainable",), "cuda", "times faster than GRPO", 5.0),
    (("discriminator",), _ROWS, "cuda", "device time in µs", 20.0),
    (("discriminator",), _ROWS, "cuda", "kernels launched", 2),
    (_MEDIA, _ON_CUDA, "cuda", "file to patches", 20.0),
    (_MEDIA, _ON_CUDA, "cuda", "decoded on the device", 1.0),
    (_MEDIA, _ON_CUDA, "cuda", "MiB copied to the host", 1.0),
)
GOALS = tuple(Goal(bench, case, *promise) for benches, cases, *promise in TABLE for bench in benches for case in cases)
# The cases that `pytest bench/ --claims` measures.
CLAIM_CASES = {
    (goal.bench, goal.case) for goal in GOALS if goal.device == "cpu" and goal.metric != "times faster than every peer"
}


def verdicts(records: list[dict], device: str, benches: Iterable[str] | None = None) -> Iterator[Verdict]:
    """Judge every goal of a device, in the order of the table. Records of --quick make no claims."""
    found = {(r["bench"], case_of(r)): r for r in records if not r.get("quick") and r["device"] == device}
    for goal in GOALS:
        if goal.device != device or (benches is not None and goal.bench not in benches):
            continue
        where, (sense, measure) = f"{goal.bench} {goal.case}", METRICS[goal.metric]
        bound = f"{sense} {goal.bound:.4g}"
        record = found.get((goal.bench, goal.case))
        if record is None:
            yield Verdict(NOT_MEASURED, where, f"no record; promised: {goal.metric} {bound}")
            continue
        for value, text, sides in measure(record):
            if value is None:
                yield Verdict(NOT_MEASURED, where, text)
                continue
            reached = value >= goal.bound if sense == LEAST else value <= goal.bound
            rounds = f" (n = {min(side['rounds'] for side in sides)})" if sides else ""
            yield Verdict(MET if reached else MISSED, where, f"{text}, {bound}{rounds}")


def verdicts_of(results: Path, hardware: str | None = None) -> dict[str, list[Verdict]]:
    """By device. On CUDA: of each folder that bench.cuda has left; without any, what it would measure."""
    on_cpu = [
        verdict
        for subject, benches in SUBJECTS.items()
        for verdict in verdicts(load(results, subject, hardware=hardware), "cpu", benches)
    ]
    runs = {path.parent.name: load_run(path) for path in sorted(results.glob(f"*/{RECORDS}"))} or {"": []}
    on_cuda = [
        verdict._replace(where=f"{name} {verdict.where}".strip())
        for name, records in runs.items()
        for verdict in verdicts(records, "cuda")
    ]
    return {"CUDA": on_cuda, "CPU": on_cpu}


def counted(found: Iterable[Verdict]) -> str:
    counts = Counter(verdict.status for verdict in found)
    return ", ".join(f"{counts[status]} {status}" for status in (MET, MISSED, NOT_MEASURED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--hardware", help="part of the name of the machine whose records count")
    options = parser.parse_args()
    if not any(options.results.glob("*.jsonl")):
        parser.error(f"--results: no records (*.jsonl) in {options.results}")
    found = verdicts_of(options.results, options.hardware)
    for device, own in found.items():
        for verdict in own:
            print(f"{device:5s}{verdict.status:13s} {verdict.where}: {verdict.what}")
    for device, own in found.items():
        print(f"on {device}: {counted(own)}")
    return int(any(verdict.status != MET for verdict in found["CPU"]))


if __name__ == "__main__":
    sys.exit(main())
