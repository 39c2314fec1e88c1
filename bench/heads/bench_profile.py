"""Where the fused head spends its time on CUDA, and how other chunk sizes and launch settings would change it.

T=8192, D=2560, V=151936 in bf16. `policy` is the GRPO loss with a trained head, `logprob` log-probs with a frozen head.

- kernels: the profiler's times of each of the three GEMMs (2TDV FLOPs), of the row kernel (its bytes are one read and
  one write of the logits), of other kernels, and of gaps on the device. For comparison, the GEMMs of one chunk are
  timed alone, and the rate of a copy is measured.
- chunks: time and peak memory by rows per chunk (memory_budget_bytes). "ours" is the default, which is measured again
  at the end.
- rows: the row kernel on one chunk by number of warps, columns per step and loads in flight: GB/s from the same bytes,
  registers, and spills. "ours" is the package's launch. The three fastest settings are repeated with other numbers of
  loads in flight.
- media: the patches kernel by number of warps; its GB/s count frames read once and patches written once.

A sweep ends early if RMSD_BENCH_UNTIL (Unix time) is near. `ended` says how it ended, and `not_run` what could not run.
On CPU, a rehearsal takes the same steps without Triton and the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bench.core.launches import COUNTED, copy_gb_per_s, count_launches, device_ms, device_timings
from bench.core.measure import (
    OURS,
    Effort,
    Outcome,
    Unavailable,
    Variant,
    difference,
    facts_of,
    main_time,
    measure,
    numbers_of,
    quantiles,
    with_gradients,
)
from bench.cuda.section_log import NO_TIME, seconds_left
from bench.heads import bench_policy_loss, profile
from bench.heads import cases as head_cases
from bench.heads.peers import logprob_weights
from bench.heads.profile import GEMMS, ROWS, Media, PolicyRows, Setting
from rmsd_fast.losses import linear_logprob

NAME = "head_profile"
# A run with a deadline starts with these cases, because they show whether a kernel is slow.
FIRST = True

_CHUNKS = (512, 1024, 1664, 2048, 3328, 4096, 8192)
# One point of a sweep takes less than this, including compilation.
_POINT_S = 3.0
_CHUNK_OF_ROWS = 1664
COMPLETE, INTERRUPTED = "complete", "interrupted"


@dataclass(frozen=True)
class Case:
    """A part of the profile (see above). clip: number of frames, and (height, width) of the clip and after resizing."""

    part: str
    loss: str = "policy"
    tokens: int = 8192
    hidden: int = 2560
    vocabulary: int = head_cases.VOCABULARY
    clip: tuple[int, tuple[int, int], tuple[int, int]] = (32, (720, 1280), (384, 672))
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"T{self.tokens}-D{self.hidden}-{dtype}-{self.loss}-{self.part}"

    @property
    def gemms(self) -> tuple[str, ...]:
        return GEMMS if self.loss == "policy" else GEMMS[:2]


def cases(quick: bool, device: str) -> list[Case]:
    return _every_part(device=device) if device == "cuda" else []


def toy_cases(device: str) -> list[Case]:
    return _every_part(device=device, tokens=64, hidden=64, vocabulary=512, clip=(2, (48, 64), (32, 64)))


def _every_part(**settings) -> list[Case]:
    """Return all parts. The most informative parts come first, because a run may end early."""
    parts = (("rows", "policy"), ("kernels", "policy"), ("chunks", "policy"), ("kernels", "logprob"))
    return [Case(*part, **settings) for part in (*parts, ("media", "policy"), ("chunks", "logprob"))]


@pytest.mark.timeout(300)
def test_head_profile(case: Case, effort, report) -> None:
    run(case, replace(effort, most_rounds=min(effort.most_rounds, 8)), report)


def run(case: Case, effort: Effort, report: Callable[[Outcome], None]) -> None:
    """Run one part. Report partial results if the part is cut off."""
    shape = {"T": case.tokens, "D": case.hidden, "V": case.vocabulary}
    record = facts_of(NAME, case, shape) | {"part": case.part, "variants": {}, "not_run": {}, "ended": INTERRUPTED}
    part = PARTS[case.part](case, effort, record)
    try:
        ours = next(part)
        for _ in part:
            pass
    finally:
        if OURS in record["variants"]:
            report(Outcome(record, ours, main_time(record["variants"][OURS]) / 1e3))


def sweep(record: dict, points: Iterable[tuple[str, Callable[[], dict]]]) -> None:
    """Add the numbers of each point to the record as they come, until time runs out."""
    for name, numbers in points:
        if seconds_left() < _POINT_S:
            record["ended"] = f"{NO_TIME} before {name}"
            return
        try:
            record["variants"][name] = numbers()
        except Exception as error:
            # Out of memory, registers or shared memory. The next configuration may fit.
            record["not_run"][name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
    record["ended"] = COMPLETE


class Head:
    """A case's loss, with its inputs."""

    def __init__(self, case: Case) -> None:
        self.case, self.device = case, torch.device(case.device)
        head = "trainable" if case.loss == "policy" else "frozen"
        shape = head_cases.Case(case.tokens, case.hidden, case.dtype, head=head, device=case.device)
        temperature = bench_policy_loss.TEMPERATURE if case.loss == "policy" else 1.0
        self.x = head_cases.head_inputs(replace(shape, vocabulary=case.vocabulary, temperature=temperature))

    def variant(self, name: str, budget: int | None = None) -> Variant:
        x = self.x
        if self.case.loss == "policy":
            return with_gradients(name, lambda: bench_policy_loss.ours(x, budget), x.differentiable)
        weights, _ = logprob_weights(x)

        def loss() -> Tensor:
            return (
                linear_logprob(x.hidden, x.weight, x.targets, ignore_index=None, memory_budget_bytes=budget) * weights
            ).sum()

        return with_gradients(name, loss, x.differentiable)

    def chunk(self, budget: int | None = None) -> int:
        """Return the rows per chunk for a memory budget (None: the default)."""
        case = self.case
        sizes = (case.tokens, case.vocabulary, case.dtype.itemsize)
        return profile.rows_per_chunk(*sizes, self.x.weight, case.loss == "policy", budget)

    def numbers(self, variant: Variant, effort: Effort, rows: int) -> dict:
        own = numbers_of(measure([variant], effort, self.device), [variant], baseline=None)[variant.name]
        return own | {"rows_per_chunk": rows, "chunks": -(-self.case.tokens // rows)}


def profile_kernels(case: Case, effort: Effort, record: dict) -> Iterator[Variant]:
    head, flop = Head(case), 2 * case.tokens * case.hidden * case.vocabulary
    ours = head.variant(OURS)
    record["variants"][OURS] = head.numbers(ours, effort, head.chunk())
    yield ours
    logits_bytes = 2 * case.tokens * case.vocabulary * case.dtype.itemsize
    record["gemms_alone"] = gemms_alone(head)
    record["copy_gb_per_s"] = rate = copy_gb_per_s(head.device, min(logits_bytes // 2, 1 << 30))
    try:
        found = count_launches(ours, head.device)
        record["profiler"] = COUNTED if found else "launches are counted on CUDA only"
    except Unavailable as reason:
        found, record["profiler"] = None, str(reason)
    if found is None:
        record["not_run"]["profile"] = record["profiler"]
    else:
        record["launches"] = {OURS: found.facts()}
        record["parts"] = parts = profile.parts_of(found.timeline, case.gemms)
        for name in parts.keys() & set(GEMMS):
            parts[name]["tflop_per_s"] = flop / parts[name]["ms"] / 1e9
        if ROWS in parts:
            parts[ROWS]["gb_per_s"] = logits_bytes / parts[ROWS]["ms"] / 1e6
            parts[ROWS]["share_of_copy"] = parts[ROWS]["gb_per_s"] / rate
        parts["gaps"] = {"launches": 0, "ms": max(0.0, found.span_us - found.total_us) / 1e3}
    record["ended"] = COMPLETE


def gemms_alone(head: Head) -> dict[str, dict[str, float]]:
    """Time each of the engine's GEMMs for one chunk alone, that of d_weight both overwriting and accumulating."""
    rows, x = head.chunk(), head.x
    hidden, weight = x.hidden.detach()[:rows], x.weight.detach()
    logits = hidden @ weight.t()
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    calls = {
        GEMMS[0]: lambda: torch.mm(hidden, weight.t(), out=logits),
        GEMMS[1]: lambda: torch.mm(logits, weight, out=d_hidden),
        GEMMS[2]: lambda: torch.mm(logits.t(), hidden, out=d_weight),
        f"{GEMMS[2]}, added": lambda: d_weight.addmm_(logits.t(), hidden),
    }
    wanted = {name: run for name, run in calls.items() if name.startswith(head.case.gemms)}
    times = {name: device_ms(run, head.device) for name, run in wanted.items()}
    flop = 2 * len(hidden) * weight.numel()
    return {name: {"rows": len(hidden), "ms": ms, "tflop_per_s": flop / ms / 1e9} for name, ms in times.items()}


def sweep_chunks(case: Case, effort: Effort, record: dict) -> Iterator[Variant]:
    head = Head(case)
    ours = head.variant(OURS)
    record["variants"][OURS] = head.numbers(ours, effort, head.chunk())
    yield ours

    def points() -> Iterator[tuple[str, Callable[[], dict]]]:
        for wanted in _CHUNKS:
            budget = min(wanted, case.tokens) * case.vocabulary * case.dtype.itemsize
            variant, rows = head.variant(f"{wanted} rows", budget), head.chunk(budget)
            yield variant.name, lambda variant=variant, rows=rows: head.numbers(variant, effort, rows)
        yield "ours, again", lambda: head.numbers(head.variant("ours, again"), effort, head.chunk())

    sweep(record, points())


def sweep_rows(case: Case, effort: Effort, record: dict) -> Iterator[Variant]:
    device, rows = torch.device(case.device), min(case.tokens, _CHUNK_OF_ROWS)
    chunk = PolicyRows(rows, case.vocabulary, case.dtype, case.device)
    variants, default = record["variants"], profile.default_setting(case.vocabulary, case.dtype.itemsize)

    def numbers(call: Callable[[], object], expected: Tensor | None) -> dict:
        chunk.restore()
        compiled = call()
        own = profile.registers(compiled)
        if expected is not None:
            own["difference"] = difference(chunk.logits, expected)
        return own | _rate(call, device, effort, chunk.bytes, chunk.restore)

    ours = Variant(OURS, chunk.by_the_package)
    variants[OURS] = numbers(chunk.by_the_package, None) | {"setting": default.name}
    yield ours
    record["copy_gb_per_s"] = copy_gb_per_s(device, chunk.bytes // 2)
    chunk.restore()
    chunk.by_the_package()
    expected = chunk.logits.clone()

    def point(setting: Setting) -> tuple[str, Callable[[], dict]]:
        return setting.name, lambda: numbers(chunk.launcher(setting), expected) | setting._asdict()

    def points() -> Iterator[tuple[str, Callable[[], dict]]]:
        chosen = dict.fromkeys((default, *profile.FIRST))
        yield from map(point, chosen)
        found = sorted((s for s in chosen if s.name in variants), key=lambda s: main_time(variants[s.name]))
        others = dict.fromkeys(s._replace(stages=n) for s in found[:3] for n in profile.OTHER_STAGES)
        yield from map(point, (s for s in others if s not in chosen))

    sweep(record, points())


def sweep_media(case: Case, effort: Effort, record: dict) -> Iterator[Variant]:
    device, media = torch.device(case.device), Media(*case.clip, case.device)
    record["shape"] = dict(zip(("F", "frame", "resized"), case.clip, strict=True))
    record["variants"][OURS] = _rate(media.by_the_package, device, effort, media.bytes)
    yield Variant(OURS, media.by_the_package)
    record["copy_gb_per_s"] = copy_gb_per_s(device, media.bytes // 2)
    expected = media.out.clone()

    def point(warps: int) -> dict:
        call = media.launcher(warps)
        own = profile.registers(call()) | {"difference": difference(media.out, expected)}
        return own | _rate(call, device, effort, media.bytes)

    sweep(record, ((f"{warps} warps", lambda warps=warps: point(warps)) for warps in profile.MEDIA_WARPS))


def _rate(call: Callable, device: torch.device, effort: Effort, size: int, prepare: Callable | None = None) -> dict:
    """Return the timings of a warmed-up call, and its rate in GB/s for the `size` bytes that it has to move."""
    timings = device_timings(Variant("", call), device, effort.always_rounds, prepare)
    own = {"rounds": len(timings), "forward": quantiles([timing.forward_ms for timing in timings])}
    return own | {"bytes": size, "gb_per_s": size / main_time(own) / 1e6}


PARTS = {"kernels": profile_kernels, "chunks": sweep_chunks, "rows": sweep_rows, "media": sweep_media}
