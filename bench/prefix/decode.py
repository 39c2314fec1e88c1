"""One decode step of N sequences on one prefix: ours against attention over a copy of the prefix per sequence.

Bytes are keys, values, queries and outputs, each once: what has to move at least. `gb_per_s` is over the device time
that the profiler gives, with cold caches, or where there is none over the time between events, which holds the host's
too; `times_floor` is that time over the bytes at the rate of a copy (`copy_gb_per_s`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.core.launches import copy_gb_per_s, launches_of
from bench.core.measure import OURS, Effort, Variant, difference, main_time, measure, numbers_of
from bench.prefix.variants import Case
from rmsd_kernels import DecodePlan, shared_prefix_decode

EXPANDED = "expanded copies, sdpa"
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}


def decode_bytes(case: Case) -> dict[str, int]:
    """Keys and values of prefix and sequences, queries and outputs: bytes that ours and the peer move at least."""
    row = 2 * case.key_heads * case.size * case.dtype.itemsize
    ends = 2 * case.count * case.heads * case.size * case.dtype.itemsize
    own = case.count * case.response * row
    return {OURS: case.prefix * row + own + ends, EXPANDED: case.count * case.prefix * row + own + ends}


def decode_runs(case: Case, dtype: torch.dtype | None = None) -> dict[str, Callable[[], Tensor]]:
    """Ours and the peer on the same values, rounded to the case's dtype, each giving [N, H, d]."""
    generator = torch.Generator(case.device).manual_seed(6)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, case.size, generator=generator, device=case.device)
        return values.to(case.dtype).to(dtype or case.dtype)

    q = draw(case.count, case.heads)
    prefix = [draw(case.prefix, case.key_heads) for _ in range(2)]
    own = [draw(case.count, case.key_heads, case.response) for _ in range(2)]
    plan = DecodePlan.from_counts([case.prefix], [case.count], device=case.device)
    copies = [
        torch.cat([p.transpose(0, 1).expand(case.count, -1, -1, -1), o], 2) for p, o in zip(prefix, own, strict=True)
    ]

    def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    return {
        OURS: functools.partial(shared_prefix_decode, q, *prefix, *own, plan),
        EXPANDED: functools.partial(expanded, q, *copies),
    }


def gate(case: Case) -> dict[str, float]:
    """Errors in norm to float64 on a short prefix; AssertionError where ours is beyond 2 * 1.25 of the peer's."""
    small = replace(case, prefix=min(case.prefix, 320), response=min(case.response, 9))
    exact = decode_runs(small, torch.float64)[EXPANDED]()
    errors = {name: difference(run().double(), exact) for name, run in decode_runs(small).items()}
    bound = 2.5 * errors[EXPANDED] + torch.finfo(case.dtype).eps / 32
    assert errors[OURS] <= bound, f"{case.name}: too far from float64: {errors}, bound {bound}"
    return errors


@torch.no_grad()
def measure_decode(case: Case, effort: Effort) -> dict[str, object]:
    """What the record of a case says beside its shape."""
    device, errors, runs = torch.device(case.device), gate(case), decode_runs(case)
    found = {EXPANDED: {"out": difference(runs[EXPANDED](), runs[OURS]())}}
    variants = [Variant(name, torch.no_grad()(run)) for name, run in runs.items()]
    numbers = numbers_of(measure(variants, effort, device), variants, baseline=None)
    counted = launches_of({variant.name: variant.forward for variant in variants}, device)
    rate, sizes = copy_gb_per_s(device, _COPIED_BYTES[device.type]), decode_bytes(case)
    for name, own in numbers.items():
        facts = counted["launches"].get(name)
        us = facts["device_us"] if facts else main_time(own) * 1e3
        own |= {"bytes": sizes[name], "gb_per_s": sizes[name] / us / 1e3, "times_floor": us * rate * 1e3 / sizes[name]}
    return {"variants": numbers, **counted, "copy_gb_per_s": rate, "errors": errors, "differences": found}
