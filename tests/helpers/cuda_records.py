"""Records like those of the CUDA benchmarks, with times chosen by a test."""

from __future__ import annotations


def head_record(bench: str, head: str = "trainable", **times_ms: float) -> dict:
    """Return a record of a head benchmark. times_ms: time of each variant, _ for a space; the GEMMs take 20 ms."""
    variants = {"bare GEMMs": {"both": {"median_ms": 20.0}, "rounds": 10}}
    for name, ms in {"ours": 22.0, **times_ms}.items():
        result = {"both": {"median_ms": ms}, "share_of_gemms": 20.0 / ms, "rounds": 9, "peak_beyond_gradients_mib": 500}
        variants[name.replace("_", " ")] = result
    case = f"T8192-D2560-bfloat16-mask0-random-{head}"
    return {"bench": bench, "case": case, "head": head, "quick": False, "variants": variants}


def step_record(case: str, **seconds: float) -> dict:
    """Return a record of a step benchmark. seconds: time of each variant, by short name; the prediction is 1 s."""
    names = {"k4": "shared K=4 N=8", "k1": "shared K=1 N=8", "padded": "padded K=4 N=8"}
    names["several"] = "shared K=4 N=8, 4 groups"
    variants = {}
    for name, s in seconds.items():
        result = {"passes_s": s, "whole_s": s + 0.5, "optimizer_s": 0.5, "predicted_s": 1.0, "rounds": 3}
        result["utilisation"] = {"whole": 0.6 / (s + 0.5)}
        variants[names[name.removesuffix("_again")] + ", checkpointing" * name.endswith("_again")] = result
    record = {"bench": "step_4b", "case": case, "quick": False, "variants": variants, "not_run": {}, "remarks": {}}
    return record | {"optimizer": {"how": "apart"}}
