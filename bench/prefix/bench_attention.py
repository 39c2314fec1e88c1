"""The attention op alone at the shape of Qwen3-VL-4B: one group of M responses over a prefix of P tokens, or decoding.

A decode step of N sequences is compared with attention over a copy of the prefix for each. Bytes are keys, values,
queries and outputs, each once: what has to move at least. `gb_per_s` is over the device time that the profiler gives,
with cold caches, or where there is none over the time between events, which holds the host's too; `times_floor` is that
time over the bytes at the rate of a copy (`copy_gb_per_s`).

FLOPs are counted from the pairs of query and key that a variant has to compute: 4 * size per head and pair in the
forward pass, and 8 * size in the backward pass. `floor` has the ms that our pairs would take at the rate of causal
flash attention over the prefix alone, and the ratio of our time to it. 1 means that merging and short responses are
free.

Before timing, errors are checked on a short row against the formula in float64: the norm of our error, on prefix and
responses separately, is at most 2 * 1.25 times that of eager code in the same dtype (1.25: both parts are rounded
before they are merged). In the timed shape, the gradients of all variants are compared with ours (`differences`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.core.launches import copy_gb_per_s, launches_of
from bench.core.measure import (
    OURS,
    Effort,
    Variant,
    difference,
    differences_of,
    facts_of,
    main_time,
    measure,
    numbers_of,
)
from bench.cuda.section_log import seconds_left
from bench.prefix.variants import (
    CEILING,
    FLEX,
    LOOP,
    VARLEN,
    Case,
    Inputs,
    Way,
    build_ways,
    explicit,
    make_inputs,
    visible,
)
from rmsd_kernels import DecodePlan, shared_prefix_decode

NAME = "prefix_attention"

# Two parts and their sum are rounded, instead of one result.
_ALLOWANCE = 1.25
# Relative to the gradient's norm. 16-bit rounding causes 0.5%; a response that attends to another's tokens causes far
# more.
_MOST_DIFFERENCE = {torch.bfloat16: 5e-2, torch.float32: 1e-3}
# Well-established torch kernels, which must agree with ours.
_TRUSTED = (VARLEN, LOOP)
_GATE = {"prefix": 320, "response": 64, "count": 3}
EXPANDED = "expanded copies, sdpa"
_COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 22}
# FlexAttention compiles for about 40 s per shape. It is left out if less time than this remains.
_FLEX_S = 100.0
# FlexAttention is compiled for each shape, so it runs only where the most and the least is shared.
_FLEX_SHAPES = ((8192, 512), (2048, 128))


def cases(quick: bool, device: str) -> list[Case]:
    """Return the cases, the most informative first, because a run may end early.

    There are none on CPU, where bench_pass measures whole passes.
    """
    if device != "cuda":
        return []
    sizes = ((8192, 512), (2048, 128), (8192, 8, True), (8192, 64, True))
    sizes += () if quick else ((8192, 128), (2048, 512), (2048, 8, True), (2048, 64, True))
    return [Case(p, 256, n, *decode, device=device) if decode else Case(p, n, device=device) for p, n, *decode in sizes]


def toy_cases(device: str) -> list[Case]:
    small = {"heads": 4, "key_heads": 2, "size": 64, "device": device}
    return [Case(128, 16, 3, **small), Case(64, 8, 4, decode=True, **small)]


@functools.cache
def gate(case: Case) -> dict[str, dict[str, float]]:
    """Return the relative norm of each variant's error by part of the row, for a short case.

    FlexAttention is left out because it would be compiled for this shape too; it is compared with ours in the timed
    shape.

    Raises:
        AssertionError: if our errors are too large.
    """
    x, wide = make_inputs(case), make_inputs(case, torch.float64)
    mask = visible(case, x)
    truth = _with_gradients(explicit(wide, mask), wide)
    errors = {"eager": _errors(_with_gradients(explicit(x, mask), x), truth, case.prefix)}
    for name, way in build_ways(case, x, {FLEX: ""})[0].items():
        try:
            errors |= {name: _errors(_outcome(way), truth, case.prefix)} if way.packed else {}
        except Exception:
            # Ours has to work. A peer that fails is reported when the timed shape runs.
            if name == OURS:
                raise
    # Eager code may be exact by chance, so allow a fraction of the dtype's rounding.
    floor = torch.finfo(case.dtype).eps / 32
    far = {n: e for n, e in errors[OURS].items() if not e <= 2 * _ALLOWANCE * errors["eager"][n] + floor}
    assert not far, f"{case.name}: too far from float64: {far}, eager {errors['eager']}"
    return errors


def _with_gradients(out: Tensor, x: Inputs) -> dict[str, Tensor]:
    return _named(out.detach(), *torch.autograd.grad(out, x.leaves, x.d_out))


def _outcome(way: Way) -> dict[str, Tensor]:
    out = way.variant.forward()
    return _named(way.packed(out).detach(), *way.variant.backward(out))


def _named(*tensors: Tensor) -> dict[str, Tensor]:
    return dict(zip(("out", "dq", "dk", "dv"), tensors, strict=True))


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor], prefix: int) -> dict[str, float]:
    parts = {"prefix": slice(0, prefix), "responses": slice(prefix, None)}
    return {
        f"{name} {part}": ((found[name][rows].double() - exact[rows]).norm() / exact[rows].norm()).item()
        for name, exact in truth.items()
        for part, rows in parts.items()
    }


@pytest.mark.timeout(600)
def test_prefix_attention(case: Case, effort, publish) -> None:
    record = measure_decode(case, effort) if case.decode else measure_attention(case, effort)
    publish(_facts(case) | record)
    trusted = {name: d for name, d in record["differences"].items() if name in _TRUSTED}
    far = {name: d for name, d in trusted.items() if not max(d.values()) <= _MOST_DIFFERENCE[case.dtype]}
    assert not far, f"gradients differ from ours in the timed shape: {far}"


def measure_attention(case: Case, effort: Effort) -> dict[str, object]:
    device, skip = torch.device(case.device), {}
    if case.device == "cuda" and (case.prefix, case.response) not in _FLEX_SHAPES:
        skip[FLEX] = "compiled for two shapes only"
    elif seconds_left() < _FLEX_S:
        skip[FLEX] = f"no time left to compile it: {seconds_left():.0f} s"
    errors = gate(replace(case, **_GATE))
    ways, not_run = build_ways(case, make_inputs(case), skip)
    variants = [way.variant for way in ways.values()]
    samples = measure(variants, effort, device, not_run, base=OURS)
    numbers = numbers_of(samples, variants, baseline=None)
    for name, own in numbers.items():
        own |= {"pairs": ways[name].pairs, "flop": 12 * case.heads * case.size * ways[name].pairs}
        own["tflop_per_s"] = own["flop"] / main_time(own) / 1e9
    record = {"variants": numbers, "floor": floor_of(numbers)}
    record |= {"pairs": {"shared": case.shared_pairs, "separate": case.separate_pairs}}
    record |= {"errors": errors, "differences": differences_of(samples), "not_run": not_run}
    return record | launches_of({name: ways[name].variant for name in (OURS, VARLEN) if name in numbers}, device)


def floor_of(numbers: dict[str, dict]) -> dict[str, float]:
    """Return, by direction, the ms that our pairs would take at the ceiling's rate, and the ratio of our time to it."""
    if CEILING not in numbers:
        return {}
    ours, ceiling = numbers[OURS], numbers[CEILING]
    found = {}
    for key in ("forward", "backward", "both"):
        found[f"{key}_ms"] = ceiling[key]["median_ms"] * ours["pairs"] / ceiling["pairs"]
        found[f"{key}_times"] = ours[key]["median_ms"] / found[f"{key}_ms"]
    return found


# Decoding.


def decode_bytes(case: Case) -> dict[str, int]:
    """Return bytes of keys and values, queries and outputs that ours and the peer move at least."""
    row = 2 * case.key_heads * case.size * case.dtype.itemsize
    ends = 2 * case.count * case.heads * case.size * case.dtype.itemsize
    own = case.count * case.response * row
    return {OURS: case.prefix * row + own + ends, EXPANDED: case.count * case.prefix * row + own + ends}


def decode_runs(case: Case, dtype: torch.dtype | None = None) -> dict[str, Callable[[], Tensor]]:
    """Return ours and the peer on the same values, rounded to the case's dtype, each giving [N, H, d]."""
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


def decode_gate(case: Case) -> dict[str, float]:
    """Return errors in norm to float64 on a short prefix. AssertionError: ours is beyond 2 * 1.25 of the peer's."""
    small = replace(case, prefix=min(case.prefix, 320), response=min(case.response, 9))
    exact = decode_runs(small, torch.float64)[EXPANDED]()
    errors = {name: difference(run().double(), exact) for name, run in decode_runs(small).items()}
    bound = 2.5 * errors[EXPANDED] + torch.finfo(case.dtype).eps / 32
    assert errors[OURS] <= bound, f"{case.name}: too far from float64: {errors}, bound {bound}"
    return errors


@torch.no_grad()
def measure_decode(case: Case, effort: Effort) -> dict[str, object]:
    """Measure what the record of a case says beside its shape."""
    device, errors, runs = torch.device(case.device), decode_gate(case), decode_runs(case)
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


def _facts(case: Case) -> dict[str, object]:
    shape = {"P": case.prefix, "R": case.response, "N" if case.decode else "M": case.count}
    shape |= {"H": case.heads, "Hkv": case.key_heads, "d": case.size}
    return facts_of(NAME, case, shape)
