"""Build records like those of the benchmarks of a CUDA machine, with times chosen by a test."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parents[2] / "bench"


def bench_cases(device: str, function: str = "cases") -> dict[str, list[Any]]:
    """Return the cases of all benchmark files for a device, by the name of their records."""
    found: dict[str, list[Any]] = {}
    for path in BENCH.glob("*/bench_*.py"):
        module = importlib.import_module(f"bench.{path.parent.name}.{path.stem}")
        for case in getattr(module, function)(False, device) if hasattr(module, function) else ():
            found.setdefault(getattr(case, "bench", module.NAME), []).append(case)
    return found


def head_record(bench: str, head: str = "trainable", **times_ms: float) -> dict:
    """Return a record with variants by name (_ represents a space); a GEMM takes 20 ms."""
    variants = {"bare GEMMs": {"both": {"median_ms": 20.0}, "rounds": 10}}
    for name, ms in {"ours": 22.0, **times_ms}.items():
        own = {"both": {"median_ms": ms}, "share_of_gemms": 20.0 / ms, "rounds": 9, "peak_beyond_gradients_mib": 500}
        variants[name.replace("_", " ")] = own
    case = f"T8192-D2560-bfloat16-mask0-random-{head}"
    return {"bench": bench, "case": case, "head": head, "device": "cuda", "quick": False, "variants": variants}


def step_record(case: str, **seconds: float) -> dict:
    """Return a record with variants by a short name; the model predicts one second."""
    names = {"k4": "shared K=4 N=8", "k1": "shared K=1 N=8", "padded": "padded K=4 N=8"}
    names["several"] = "shared K=4 N=8, 4 groups"
    variants = {}
    for name, s in seconds.items():
        own = {"passes_s": s, "whole_s": s + 0.5, "optimizer_s": 0.5, "predicted_s": 1.0, "rounds": 3}
        own["utilisation"] = {"whole": 0.6 / (s + 0.5)}
        own |= {"forward": {"median_ms": 1e3 * (s + 0.5)}, "training": {"median_ms": 1e3 * s}}
        variants[names[name.removesuffix("_again")] + ", checkpointing" * name.endswith("_again")] = own
    record = {"bench": "step", "case": case, "device": "cuda", "quick": False, "variants": variants, "not_run": {}}
    return record | {"remarks": {}, "differences": {"padded": 0.01}, "optimizer": {"how": "apart"}}
