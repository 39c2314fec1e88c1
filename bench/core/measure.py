"""Interleaved timing of variants of one computation, against the bare GEMMs of the same shape in the same process.

Each round runs every variant once, in turned order, after a sweep through a buffer larger than the caches. Slow
variants take part in fewer rounds; one that needs longer than `Effort.slow_s` for a call has the call of the memory
pass alone. Forward and backward are timed apart: CUDA by events, CPU by the clock.

Numbers of a variant: median, p20 and p80 in ms of forward, backward and both; `rounds`; `page_faults` per call (CPU);
`host_ms`, the median time in which the host enqueues a call (CUDA); peaks (memory.py); and with a baseline
`share_of_gemms`, its median time over that of the variant, and the median of that ratio per round.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.core.memory import fill_thread_cache, keep_freed_memory, page_faults, peak_extra_bytes

Thing = TypeVar("Thing")
GEMMS, OURS, EAGER = "bare GEMMs", "ours", "eager"
# Beside the environment and not in it: torchvision's wheel breaks `import transformers` on CPU builds of torch.
ORACLE = Path(sys.prefix) / "oracle"
# Definitions of ops go with the object that made them.
_LIBRARIES: list[torch.library.Library] = []
# Timed in rounds however long they take.
ALWAYS = (GEMMS, OURS, EAGER)
_SWEEP_MIB = 256
# Cycles of torch.cuda._sleep: about 3 ms at 2 GHz, in which the host enqueues a call.
AHEAD_CYCLES = 6_000_000
# Most that a gradient of ours may differ from eager's in the timed shape, in norm: both are rounded to 16 bits a few
# times (0.1% each), and one chunk left out of five would make 45%.
_MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class Unavailable(Exception):
    """The reason why a variant does not run on this machine."""


def need(module: str) -> ModuleType:
    """Import a module. Raises: Unavailable, whatever the import failed with."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        own = missing.split(".")[0] == module.split(".")[0]
        raise Unavailable(f"{missing} is not installed" + ("" if own else f", which {module} imports")) from error
    except Exception as error:
        raise Unavailable(f"import of {module} fails: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def available(builds: dict[str, Callable[[], Thing]], skip: dict[str, str]) -> tuple[dict[str, Thing], dict[str, str]]:
    """Build what runs here; return it, and the reasons of the others: their own, or those of `skip`."""
    made, not_run = {}, {name: reason for name, reason in skip.items() if name in builds}
    for name, build in builds.items():
        if name not in not_run:
            try:
                made[name] = build()
            except Unavailable as reason:
                not_run[name] = str(reason)
    return made, not_run


def find_torchvision() -> None:
    """Let torchvision be imported where `make` has put it. Call it before anything imports transformers."""
    if (ORACLE / "torchvision").is_dir():
        sys.path.append(str(ORACLE))
    if torch.version.cuda is None and not _LIBRARIES:
        # The CUDA wheel of torchvision registers shapes for two ops that its library does not bring to a CPU torch.
        _LIBRARIES.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _LIBRARIES[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@dataclass(frozen=True)
class Effort:
    """How long a benchmark may take: rounds between the two bounds, about `seconds` per variant and shape."""

    seconds: float
    most_rounds: int
    slow_s: float
    # Rows of the head with which a wide one (D > 1024) stands before the gate; None: all.
    gate_vocabulary: int | None = None
    # Rounds that peers take part in at least, and those of ALWAYS, on which every claim rests.
    least_rounds: int = 2
    always_rounds: int = 3


@dataclass(frozen=True)
class Variant:
    """One way to compute the same thing. backward takes what forward returned; None: forward alone is timed."""

    name: str
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] | None = None
    # Needs one call at the real shape before it is measured.
    compiles: bool = False

    def __call__(self) -> tuple[Tensor, object]:
        value = self.forward()
        return value, None if self.backward is None else self.backward(value)


def facts_of(bench: str, case: Any, shape: dict[str, int], baseline: str = OURS) -> dict[str, Any]:
    """What every record begins with."""
    facts = {"bench": bench, "case": case.name, "shape": shape, "dtype": str(case.dtype).removeprefix("torch.")}
    return facts | {"device": case.device, "baseline": baseline}


def with_gradients(
    name: str, forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], *, compiles: bool = False
) -> Variant:
    """A variant that differentiates the scalar of forward by those inputs that require a gradient."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return Variant(name, forward, lambda loss: torch.autograd.grad(loss, wanted), compiles)


class Timing(NamedTuple):
    """One call."""

    forward_ms: float
    backward_ms: float
    page_faults: int
    # On CUDA, until all of the call's launches are in the queue.
    host_ms: float | None = None

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass
class Samples:
    """All calls of one variant, by round (a round in which it did not take part is missing)."""

    timings: dict[int, Timing] = field(default_factory=dict)
    peak_bytes: int | None = None
    gradient_bytes: int = 0
    # Of the memory pass, relative to the variant it is compared with (see difference).
    differences: dict[str, float] = field(default_factory=dict)


def time_once(variant: Variant, device: torch.device) -> Timing:
    """Times of one call; the results are freed after the clock has stopped.

    On CUDA the device is kept busy first, so that the host runs ahead of it and the times are the device's own, as in
    a training step whose launches wait in a queue. A call that waits for the device loses that lead.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize(device)
        torch.cuda._sleep(AHEAD_CYCLES)
        marks[0].record()
        start = time.perf_counter()
        value = variant.forward()
        marks[1].record()
        gradients = variant.backward(value) if variant.backward else None
        marks[2].record()
        host_ms = (time.perf_counter() - start) * 1e3
        torch.cuda.synchronize(device)
        del value, gradients
        return Timing(marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2]), 0, host_ms)
    fill_thread_cache()
    faults, start = page_faults(), time.perf_counter()
    value = variant.forward()
    middle = time.perf_counter()
    gradients = variant.backward(value) if variant.backward else None
    end = time.perf_counter()
    faults = page_faults() - faults
    del value, gradients
    return Timing((middle - start) * 1e3, (end - middle) * 1e3 if variant.backward else 0.0, faults)


def in_turns(things: Sequence[Thing], rounds: int) -> Iterator[tuple[int, Thing]]:
    """Every thing once per round, with the number of the round; each round begins with another one."""
    for number in range(rounds):
        turn = number % max(len(things), 1)
        for thing in (*things[turn:], *things[:turn]):
            yield number, thing


def interleaved(variants: list[Variant], effort: Effort, device: torch.device) -> dict[str, dict[int, Timing]]:
    """Timings by variant and round. Each takes part until its time is used up, or the rounds are."""
    sweep = torch.zeros(_SWEEP_MIB * 2**18, device=device)
    found: dict[str, dict[int, Timing]] = {variant.name: {} for variant in variants}
    for index, variant in in_turns(variants, effort.most_rounds):
        own = found[variant.name]
        least = effort.always_rounds if variant.name in ALWAYS else effort.least_rounds
        if index < least or sum(t.total_ms for t in own.values()) < effort.seconds * 1e3:
            sweep.add_(1.0)
            own[index] = time_once(variant, device)
    return found


def measure(
    variants: list[Variant],
    effort: Effort,
    device: torch.device,
    not_run: dict[str, str] | None = None,
    base: str | None = None,
) -> dict[str, Samples]:
    """Peak memory of each variant, then interleaved rounds.

    not_run: peers that fail at this shape are added to it, with the error, instead of raising. base: the variant that
    those after it are compared with; AssertionError where one of its gradients is far from eager's.
    """
    samples: dict[str, Samples] = {}
    first: dict[str, float] = {}
    expected: dict[str, Tensor] = {}
    for variant in variants:
        try:
            samples[variant.name], first[variant.name], found = _memory_pass(variant, device)
        except Exception as error:
            # Ours and the GEMMs have to work; eager may be out of memory where ours is not.
            if not_run is None or variant.name in (GEMMS, OURS):
                raise
            not_run[variant.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        own = samples[variant.name].differences
        alike = [name for name in expected.keys() & found.keys() if found[name].shape == expected[name].shape]
        own |= {name: difference(found[name], expected[name]) for name in sorted(alike)}
        if variant.name == EAGER:
            far = {n: d for n, d in own.items() if n != "value" and not d <= _MOST_DIFFERENCE[expected[n].dtype]}
            assert not far, f"gradients of {base} and eager differ in the timed shape: {far}"
        if variant.name == base:
            expected = found
        del found
    expected.clear()
    variants = [variant for variant in variants if variant.name in samples]
    if device.type == "cpu":
        keep_freed_memory(2 * max((s.peak_bytes or 0 for s in samples.values()), default=0))
    slow = {n: {-1: Timing(0.0, s * 1e3, -1)} for n, s in first.items() if s > effort.slow_s and n not in ALWAYS}
    for name, timings in (slow | interleaved([v for v in variants if v.name not in slow], effort, device)).items():
        samples[name].timings = timings
    return samples


def _memory_pass(variant: Variant, device: torch.device) -> tuple[Samples, float, dict[str, Tensor]]:
    """Peak of one call, its seconds, and what it computed: the gradients, and a value that is a scalar."""
    if variant.compiles or device.type == "cuda":
        # Libraries allocate workspaces and compile kernels at their first call.
        variant()
    start = time.perf_counter()
    peak, (value, gradients) = peak_extra_bytes(variant, device)
    seconds = time.perf_counter() - start
    held = gradients if isinstance(gradients, tuple) else ()
    own = Samples(peak_bytes=peak, gradient_bytes=sum(t.numel() * t.element_size() for t in held))
    found = {f"gradient {i}": tensor for i, tensor in enumerate(held)}
    return own, seconds, found if value.ndim else {"value": value.detach()} | found


def difference(values: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in blocks: a head in float32 is gigabytes."""
    far = base = 0.0
    for own, other in zip(*(t.reshape(-1).split(1 << 24) for t in (values, expected)), strict=True):
        wide = other.float()
        far += torch.linalg.vector_norm(own.float() - wide, dtype=torch.float64).item() ** 2
        base += torch.linalg.vector_norm(wide, dtype=torch.float64).item() ** 2
    if far == 0:
        return 0.0
    return (far / base) ** 0.5 if base else float("inf")


def spread(values: list[float], unit: str = "") -> dict[str, float]:
    """Return median, 20th and 80th percentile, with the unit as an ending of their names."""
    low, middle, high = np.quantile(values, [0.2, 0.5, 0.8]).tolist()
    return {f"median{unit}": middle, f"p20{unit}": low, f"p80{unit}": high}


def quantiles(values: list[float]) -> dict[str, float]:
    return spread(values, "_ms")


def numbers_of(samples: dict[str, Samples], variants: list[Variant], baseline: str | None = GEMMS) -> dict[str, dict]:
    """The record of each variant (see the module docstring)."""
    with_backward = {v.name for v in variants if v.backward is not None}
    totals = {n: {i: t.total_ms for i, t in s.timings.items()} for n, s in samples.items()}
    numbers: dict[str, dict] = {}
    for name, found in samples.items():
        timings = list(found.timings.values())
        single = -1 in found.timings
        total = quantiles(list(totals[name].values()))
        own: dict = {"rounds": len(timings), "memory_pass_only": single}
        if name not in with_backward:
            own["forward"] = total
        else:
            if not single:
                own["forward"] = quantiles([t.forward_ms for t in timings])
                own["backward"] = quantiles([t.backward_ms for t in timings])
            own["both"] = total
        if not single:
            own["page_faults"] = int(median(t.page_faults for t in timings))
            if timings[0].host_ms is not None:
                own["host_ms"] = median(t.host_ms for t in timings)
        if found.peak_bytes is not None:
            own["peak_mib"] = found.peak_bytes / 2**20
            own["peak_beyond_gradients_mib"] = max(0, found.peak_bytes - found.gradient_bytes) / 2**20
        numbers[name] = own
    if baseline in numbers:
        for name in numbers:
            own, ratios = ratio(totals, baseline, name)
            numbers[name] |= {"share_of_gemms": own, "share_of_gemms_by_round": ratios}
    return numbers


def differences_of(samples: dict[str, Samples]) -> dict[str, dict[str, float]]:
    """Differences of those variants that were compared."""
    return {name: own.differences for name, own in samples.items() if own.differences}


def ratio(totals: dict[str, dict[int, float]], over: str, under: str) -> tuple[float, float | None]:
    """time(over) / time(under): of the medians, and the median over the common rounds (None without any)."""
    shared = sorted(totals[over].keys() & totals[under].keys())
    by_round = median(totals[over][i] / totals[under][i] for i in shared) if shared else None
    return median(totals[over].values()) / median(totals[under].values()), by_round


def main_time(numbers: dict) -> float:
    """Median ms of the whole call."""
    return (numbers.get("both") or numbers["forward"])["median_ms"]


def bare_gemms(hidden: Tensor, weight: Tensor, passes: str) -> Variant:
    """The GEMMs of `score` (2TDV flop), `frozen` (4TDV) or `trainable` (6TDV) head, into buffers allocated here."""
    hidden, weight = hidden.detach(), weight.detach()
    # Written once, so that their pages are there: an empty tensor has none yet.
    logits = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device).fill_(1.0)
    into_hidden = torch.empty_like(hidden).fill_(1.0)
    into_weight = torch.empty_like(weight).fill_(1.0) if passes == "trainable" else None

    def forward() -> Tensor:
        return torch.mm(hidden, weight.t(), out=logits)

    def backward(logits: Tensor) -> None:
        torch.mm(logits, weight, out=into_hidden)
        if into_weight is not None:
            torch.mm(logits.t(), hidden, out=into_weight)

    return Variant(GEMMS, forward, None if passes == "score" else backward)


def gemm_flop(tokens: int, hidden: int, vocabulary: int, passes: str) -> int:
    """Flop of bare_gemms."""
    return {"score": 2, "frozen": 4, "trainable": 6}[passes] * tokens * hidden * vocabulary
