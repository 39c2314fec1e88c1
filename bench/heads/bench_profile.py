"""Where the fused head spends its time on CUDA, and how other chunk sizes and launch settings would change it.

T=8192, D=2560, V=151936 in bf16. `policy` is the GRPO loss with a trained head, `logprob` log-probs with a frozen head.

- kernels: the profiler's times of each of the three GEMMs (2TDV FLOPs), of the row kernel (its bytes are one read and
  one write of the logits), of other kernels, and of gaps on the device. The rate of a copy is measured for comparison.
- chunks: time and peak memory by rows per chunk (memory_budget_bytes). "ours" is the default, which is measured again
  at the end.
- rows: the row kernel on one chunk by number of warps, columns per step and loads in flight: GB/s from the same bytes.
  "ours" is the package's launch. The three fastest settings are repeated with other numbers of loads in flight.

A sweep ends early if RMSD_BENCH_UNTIL (Unix time) is near. `ended` says how it ended, and `not_run` what could not run.
On CPU, a rehearsal takes the same steps without Triton and the profiler.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.core.launches import COUNTED, Event, copy_gb_per_s, count_launches, device_timings, facts_of_call
from bench.core.measure import (
    OURS,
    Effort,
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
from bench.heads import cases as head_cases
from bench.heads.bench_losses import policy_loss
from bench.heads.peers import CLIP, KL_COEF, TEMPERATURE, logprob_weights
from rmsd_fast.losses import linear_logprob
from rmsd_kernels.heads.chunks import chunk_rows, default_budget
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs
from rmsd_kernels.implementations import can_run_triton

NAME = "head_profile"
# A run with a deadline starts with these cases, because they show whether a kernel is slow.
FIRST = True

_CHUNKS = (512, 1024, 1664, 2048, 3328, 4096, 8192)
# One point of a sweep takes less than this, including compilation.
_POINT_S = 3.0
_CHUNK_OF_ROWS = 1664
COMPLETE, INTERRUPTED = "complete", "interrupted"

GEMMS = ("GEMM logits", "GEMM d_hidden", "GEMM d_weight")
ROWS, REST, COPIES, ALL_GEMMS = "row kernel", "other kernels", "copies", "GEMMs"
_ROW_KERNELS = ("_policy_kernel", "_score_kernel", "_gradient_kernel")
# What cuBLAS calls its kernels, in small letters; _SUM adds up the parts of the GEMM before it.
_SUM = "splitkreduce"
_GEMM_WORDS = ("gemm", "nvjet", "cutlass", "xmma", _SUM)


@dataclass(frozen=True)
class Case:
    """A part of the profile (see above)."""

    part: str
    loss: str = "policy"
    tokens: int = 8192
    hidden: int = 2560
    vocabulary: int = head_cases.VOCABULARY
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
    return _every_part(device=device, tokens=64, hidden=64, vocabulary=512)


def _every_part(**settings) -> list[Case]:
    """Return all parts. The most informative parts come first, because a run may end early."""
    parts = (("rows", "policy"), ("kernels", "policy"), ("chunks", "policy"), ("kernels", "logprob"))
    return [Case(*part, **settings) for part in (*parts, ("chunks", "logprob"))]


@pytest.mark.timeout(300)
def test_head_profile(case: Case, effort, publish) -> None:
    run(case, replace(effort, most_rounds=min(effort.most_rounds, 8)), publish)


def run(case: Case, effort: Effort, publish: Callable[[dict], object]) -> None:
    """Run one part. Publish partial results if the part is cut off."""
    shape = {"T": case.tokens, "D": case.hidden, "V": case.vocabulary}
    record = facts_of(NAME, case, shape) | {"part": case.part, "variants": {}, "not_run": {}, "ended": INTERRUPTED}
    try:
        PARTS[case.part](case, effort, record)
    finally:
        if OURS in record["variants"]:
            publish(record)


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
        head, temperature = ("trainable", TEMPERATURE) if case.loss == "policy" else ("frozen", 1.0)
        shape = head_cases.Case(case.tokens, case.hidden, case.dtype, head=head, device=case.device)
        self.x = head_cases.head_inputs(replace(shape, vocabulary=case.vocabulary, temperature=temperature))

    def variant(self, name: str = OURS, budget: int | None = None) -> Variant:
        x = self.x
        if self.case.loss == "policy":
            return with_gradients(name, lambda: policy_loss(x, budget), x.differentiable)
        weights, _ = logprob_weights(x)

        def loss() -> Tensor:
            logp = linear_logprob(x.hidden, x.weight, x.targets, ignore_index=None, memory_budget_bytes=budget)
            return (logp * weights).sum()

        return with_gradients(name, loss, x.differentiable)

    def numbers(self, effort: Effort, name: str = OURS, budget: int | None = None) -> dict:
        case, variant = self.case, self.variant(name, budget)
        own = numbers_of(measure([variant], effort, self.device), [variant], baseline=None)[name]
        row_bytes = case.vocabulary * case.dtype.itemsize
        budget = budget or default_budget(case.tokens, row_bytes, self.x.weight, case.loss == "policy")
        rows = chunk_rows(case.tokens, row_bytes, budget, case.device)
        return own | {"rows_per_chunk": rows, "chunks": -(-case.tokens // rows)}


def profile_kernels(case: Case, effort: Effort, record: dict) -> None:
    head, flop = Head(case), 2 * case.tokens * case.hidden * case.vocabulary
    record["variants"][OURS] = head.numbers(effort)
    logits_bytes = 2 * case.tokens * case.vocabulary * case.dtype.itemsize
    record["copy_gb_per_s"] = rate = copy_gb_per_s(head.device, min(logits_bytes // 2, 1 << 30))
    try:
        found = count_launches(head.variant(), head.device)
        record["profiler"] = COUNTED if found else "launches are counted on CUDA only"
    except Unavailable as reason:
        found, record["profiler"] = None, str(reason)
    if found is None:
        record["not_run"]["profile"] = record["profiler"]
    else:
        record["launches"] = {OURS: (facts := facts_of_call(found))}
        record["parts"] = parts = parts_of(found, case.gemms)
        for name in parts.keys() & set(GEMMS):
            parts[name]["tflop_per_s"] = flop / parts[name]["ms"] / 1e9
        if ROWS in parts:
            parts[ROWS]["gb_per_s"] = logits_bytes / parts[ROWS]["ms"] / 1e6
            parts[ROWS]["share_of_copy"] = parts[ROWS]["gb_per_s"] / rate
        parts["gaps"] = {"launches": 0, "ms": max(0.0, facts["span_us"] - facts["device_us"]) / 1e3}
    record["ended"] = COMPLETE


def parts_of(timeline: Sequence[Event], gemms: Sequence[str]) -> dict[str, dict]:
    """Return launches and ms of each part of a call.

    Of the GEMMs between two other kernels, those after a row kernel are d_hidden and then d_weight, all others logits.
    If their numbers do not match, they are reported as one part.
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


def sweep_chunks(case: Case, effort: Effort, record: dict) -> None:
    head, row_bytes = Head(case), case.vocabulary * case.dtype.itemsize
    record["variants"][OURS] = head.numbers(effort)
    budgets = {f"{rows} rows": min(rows, case.tokens) * row_bytes for rows in _CHUNKS} | {"ours, again": None}
    sweep(record, ((name, partial(head.numbers, effort, name, budget)) for name, budget in budgets.items()))


class Setting(NamedTuple):
    """Launch settings of a row kernel: warps of a program, columns at a time, loads under way."""

    warps: int
    columns: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.warps} warps, {self.columns} columns, {self.stages} stages"

    @contextmanager
    def applied(self, itemsize: int) -> Iterator[None]:
        """Let the package launch its row kernels with this setting."""
        from rmsd_kernels import triton_launch as own

        # 255 is the most that a thread can have.
        registers = min(255, own.REGISTERS_OF_AN_SM // (32 * self.warps))
        launch = own.RowLaunch(self.columns, own.LOAD_BYTES // itemsize, self.warps, registers)
        with mock.patch.multiple(own, row_launch=lambda *_, **__: launch, STAGES=self.stages):
            yield


# Without spilled registers when compiled for compute capability 9.0 in 16 bit. A program of 32 warps has an SM to
# itself, two of 16 share one, and so on: then more rows are under way at once than an L2 cache holds.
SETTINGS = (
    *(Setting(32, columns, 1) for columns in (8192, 16384)),
    *(Setting(16, columns, 1) for columns in (4096, 8192)),
    *(Setting(8, columns, 1) for columns in (2048, 4096)),
    Setting(16, 8192, 3),
)
OTHER_STAGES = (2, 3)


class PolicyRows:
    """A chunk of logits [n, V] and what the policy kernel needs beside it, as in bench_losses."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(7)
        self.original = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        for part in self.original.split(128):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        self.logits = self.original.clone()
        # One read and one write of the chunk: what the kernel moves where a row is still in the cache when it is read
        # again.
        self.bytes = 2 * self.logits.nbytes
        targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        picked = self.original.gather(1, targets[:, None])[:, 0].float()
        self.inputs = RowInputs(targets, picked, None, torch.full((rows,), TEMPERATURE, device=device), None)
        # About the log-probs themselves.
        ref_logp = picked / TEMPERATURE - torch.logsumexp(self.original[:1].float() / TEMPERATURE, dim=-1)
        settings = PolicySettings.of(kl="k3", kl_coef=KL_COEF, clip_low=CLIP, clip_high=CLIP)
        advantage = torch.randn(rows, generator=generator, device=device)
        scale = torch.full((rows,), 1.0 / rows, device=device)
        self.terms = PolicyTerms(scale, advantage, ref_logp=ref_logp, settings=settings)

    def restore(self) -> None:
        self.logits.copy_(self.original)

    def by_the_package(self) -> None:
        name = "triton_rows" if can_run_triton(self.logits) else "torch_rows"
        importlib.import_module(f"rmsd_kernels.heads.{name}").policy_(self.logits, self.inputs, self.terms)

    def launch(self, setting: Setting) -> None:
        if not can_run_triton(self.logits):
            raise Unavailable(f"Triton kernels do not run on a tensor on {self.logits.device.type}")
        with setting.applied(self.logits.element_size()):
            self.by_the_package()


def sweep_rows(case: Case, effort: Effort, record: dict) -> None:
    device = torch.device(case.device)
    chunk = PolicyRows(min(case.tokens, _CHUNK_OF_ROWS), case.vocabulary, case.dtype, case.device)
    variants = record["variants"]

    def numbers(call: Callable[[], object]) -> dict:
        chunk.restore()
        call()
        own = {"difference": difference(chunk.logits, expected)}
        timings = device_timings(Variant("", call), device, effort.always_rounds, chunk.restore)
        own |= {"rounds": len(timings), "forward": quantiles([timing.forward_ms for timing in timings])}
        return own | {"bytes": chunk.bytes, "gb_per_s": chunk.bytes / main_time(own) / 1e6}

    chunk.by_the_package()
    expected = chunk.logits.clone()
    variants[OURS] = numbers(chunk.by_the_package)
    record["copy_gb_per_s"] = copy_gb_per_s(device, chunk.bytes // 2)

    def points() -> Iterator[tuple[str, Callable[[], dict]]]:
        for setting in SETTINGS:
            yield setting.name, partial(numbers, partial(chunk.launch, setting))
        found = sorted((s for s in SETTINGS if s.name in variants), key=lambda s: main_time(variants[s.name]))
        others = dict.fromkeys(s._replace(stages=n) for s in found[:3] for n in OTHER_STAGES)
        for setting in others:
            if setting not in SETTINGS:
                yield setting.name, partial(numbers, partial(chunk.launch, setting))

    sweep(record, points())


PARTS = {"kernels": profile_kernels, "chunks": sweep_chunks, "rows": sweep_rows}
