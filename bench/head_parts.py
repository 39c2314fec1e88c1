"""The kernels of one call of a fused head, sorted into the parts of its loop by name and order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.launches import Event

GEMMS = ("GEMM logits", "GEMM d_hidden", "GEMM d_weight")
ROWS, REST, COPIES, ALL_GEMMS = "row kernel", "other kernels", "copies", "GEMMs"
_ROW_KERNELS = ("_policy_kernel", "_score_kernel", "_gradient_kernel")
# What cuBLAS calls its kernels, in small letters; _SUM adds up the parts of the GEMM before it.
_SUM = "splitkreduce"
_GEMM_WORDS = ("gemm", "nvjet", "cutlass", "xmma", _SUM)


def parts_of(timeline: Sequence[Event], gemms: Sequence[str]) -> dict[str, dict]:
    """Launches and ms of each part of a call. Of the GEMMs between two other kernels those after a row kernel are
    d_hidden and then d_weight, all others logits; as one where that does not come out even.
    """
    found: dict[str, list[float]] = {}
    products, after_row, last = Counter(), 0, GEMMS[0]
    for event in timeline:
        name = event.name.lower()
        if event.is_copy:
            part = COPIES
        elif any(word in name for word in _ROW_KERNELS):
            part, after_row = ROWS, 1
        elif any(word in name for word in _GEMM_WORDS):
            if _SUM not in name:
                last = GEMMS[min(after_row, 2)]
                after_row += after_row > 0
                products[last] += 1
            part = last
        else:
            part, after_row = REST, 0
        found.setdefault(part, []).append(event.us)
    if len({products[name] for name in gemms}) > 1 or products.keys() - set(gemms):
        found[ALL_GEMMS] = [us for name in GEMMS for us in found.pop(name, ())]
    return {name: {"launches": len(times), "ms": sum(times) / 1e3} for name, times in found.items()}
