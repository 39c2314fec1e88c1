"""The loop of the fused heads: over chunks of tokens, a GEMM, one pass of a row back end, and the GEMMs of backward.

    logits = hidden[chunk] @ weight.T  ->  row function, in place  ->  d_hidden[chunk] = logits @ weight
                                                                       d_weight       += logits.T @ hidden[chunk]

Logits exist for one chunk at a time and in the input's dtype; the row function turns them into their own gradient.
Work with T scored tokens: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained one, 2TDV more with a
reference head, and 2TDV more where backward has to compute the logits again. Ignored rows never enter a GEMM, and rows
whose gradient is 0 beforehand (advantage 0 without KL and entropy terms) enter the first alone.

Each loop is one torch.library op, so torch.compile and autograd see a call without a gradient; `head_autograd` gives it
one. Per-row results are one tensor [len(Stat), T] in float32 (float64 for float64), 0 in ignored rows. Empty tensors
stand for what was not asked for, as an op cannot return None.
"""

import importlib
import math
from collections.abc import Iterator
from enum import IntEnum
from types import ModuleType

import torch
from torch import Tensor

from . import torch_rows
from .implementations import resolve_impl
from .rows import accumulation_dtype
from .torch_rows import PolicyTerms, RowInputs, RowReference, RowStats

# On an H200 the GEMM for d_hidden fills 98.5% of the tiles at 1664 rows of V = 151936 in bf16, which are 506 MB.
DEFAULT_MEMORY_BUDGET_BYTES = 512 << 20
# A 16-bit d_weight may be rounded once per chunk without leaving the error of a single GEMM behind (measured in the
# tests); with more chunks it is summed in float32.
MAX_ROUNDINGS = 5
_CUDA_TILE_ROWS = 128
_CPU_TILE_ROWS = 32
_WEIGHT_BLOCK_BYTES = 32 << 20


class Stat(IntEnum):
    """Rows of the statistics tensor."""

    LOGP = 0
    ENTROPY = 1
    LSE = 2
    REF_LOGP = 3
    REF_LSE = 4
    FULL_KL = 5


class _Loop:
    """The arguments every loop shares, and the chunks it walks through."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: Tensor | None,
        rows: Tensor | None,
        impl: str,
        budget: int,
        buffers: int = 1,
        live: int | None = None,
    ) -> None:
        self.hidden, self.weight, self.temperature = hidden, weight.contiguous(), temperature
        self.dtype = accumulation_dtype(hidden)
        self.bias = None if bias is None else bias.to(self.dtype)
        self.backend = _backend(impl, hidden)
        self.rows = rows
        self.count = len(hidden) if rows is None else len(rows)
        # The first `live` of them carry a gradient; no chunk holds both kinds.
        self.live = self.count if live is None else live
        vocabulary = weight.shape[0]
        self.step = chunk_rows(self.count, buffers * vocabulary * hidden.element_size(), budget, hidden.device.type)
        self.chunks = math.ceil(self.live / self.step)

    def workspace(self) -> Tensor:
        return self.hidden.new_empty(self.step if self.count else 0, self.weight.shape[0])

    def __iter__(self) -> Iterator[tuple[int, slice | Tensor]]:
        """(first row among the scored ones, where the chunk's rows stand in hidden)."""
        for first, end in ((0, self.live), (self.live, self.count)):
            for start in range(first, end, self.step):
                chosen = slice(start, min(start + self.step, end))
                yield start, chosen if self.rows is None else self.rows[chosen]

    def inputs(self, rows: Tensor, targets: Tensor, index: slice | Tensor, softcap: float | None) -> RowInputs:
        temperature = None if self.temperature is None else self.temperature[index]
        target = targets[index]
        return RowInputs(target, target_logit(rows, self.weight, target), self.bias, temperature, softcap)


class _Gradients:
    """d_hidden, d_weight and d_bias, summed over chunks; empty where not needed."""

    def __init__(self, loop: _Loop, need_hidden: bool, need_weight: bool, need_bias: bool) -> None:
        self.loop = loop
        hidden, weight = loop.hidden, loop.weight
        # Every row is written where none is left out.
        make = torch.empty_like if loop.rows is None else torch.zeros_like
        self.hidden = make(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
        self.in_float32 = weight.element_size() == 2 and loop.chunks > MAX_ROUNDINGS
        self.weight = weight.new_empty(0)
        if need_weight:
            dtype = torch.float32 if self.in_float32 else weight.dtype
            start = torch.zeros if self.in_float32 or not loop.live else torch.empty
            self.weight = start(weight.shape, dtype=dtype, device=weight.device)
        self.bias = torch.zeros(len(weight) if need_bias else 0, dtype=loop.dtype, device=weight.device)
        self.need_hidden, self.need_weight, self.need_bias = need_hidden, need_weight, need_bias

    def exact(self, logits: Tensor, ref: RowReference | None) -> tuple[Tensor, RowReference | None]:
        """Logits as the row function gets them: d_bias is a sum of gradients that must not be rounded before."""
        if not self.need_bias or logits.dtype == self.loop.dtype:
            return logits, ref
        other = None if ref is None else ref._replace(logits=ref.logits.to(self.loop.dtype))
        return logits.to(self.loop.dtype), other

    def add(self, start: int, index: slice | Tensor, rows: Tensor, d_logits: Tensor) -> None:
        if self.need_bias:
            self.bias += d_logits.sum(dim=0)
            d_logits = d_logits.to(rows.dtype)
        if self.need_hidden:
            if isinstance(index, slice):
                torch.mm(d_logits, self.loop.weight, out=self.hidden[index])
            else:
                self.hidden.index_copy_(0, index, torch.mm(d_logits, self.loop.weight))
        if self.need_weight and self.in_float32:
            step = max(1, _WEIGHT_BLOCK_BYTES // (2 * rows.shape[1]))
            for first in range(0, len(self.weight), step):
                block = slice(first, first + step)
                self.weight[block] += torch.mm(d_logits[:, block].t(), rows)
        elif self.need_weight and start == 0:
            torch.mm(d_logits.t(), rows, out=self.weight)
        elif self.need_weight:
            self.weight.addmm_(d_logits.t(), rows)

    def result(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight.to(self.loop.weight.dtype)
        return self.hidden, weight, self.bias if bias is None else self.bias.to(bias.dtype)


@torch.library.custom_op("rmsd_kernels::head_score", mutates_args=())
def head_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    full_kl: bool,
    keep: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics, logits, reference's logits); logits [T, V] are kept on request, the scored rows first."""
    buffers = 1 + full_kl
    loop = _Loop(hidden, weight, bias, temperature, scored_rows(targets, ignore_index), impl, budget, buffers)
    stats = torch.zeros(len(Stat), len(hidden), dtype=loop.dtype, device=hidden.device)
    kept = hidden.new_empty(len(hidden) if keep else 0, len(weight))
    ref_kept = hidden.new_empty(len(hidden) if keep and full_kl else 0, len(weight))
    space = None if keep else loop.workspace()
    reference = _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl, None if keep else space)
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        place = slice(start, start + len(rows))
        ref = reference(index, inputs, stats, ref_kept[place] if keep and full_kl else None)
        logits = torch.mm(rows, loop.weight.t(), out=kept[place] if keep else space[: len(rows)])
        _store(stats, index, loop.backend.score(logits, inputs, ref))
    return stats, kept, ref_kept


@head_score.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias,
    full_kl, keep, impl, budget,
):  # fmt: skip
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    stats = hidden.new_empty(len(Stat), rows, dtype=accumulation_dtype(hidden))
    kept = hidden.new_empty(rows if keep else 0, vocabulary)
    return stats, kept, hidden.new_empty(rows if keep and full_kl else 0, vocabulary)


@torch.library.custom_op("rmsd_kernels::head_gradient", mutates_args=("logits",))
def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    stats: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    g_full_kl: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the sum of g_* times statistics. Kept logits are used up, else computed again."""
    buffers = _buffers(hidden, g_full_kl is not None, need_bias)
    loop = _Loop(hidden, weight, bias, temperature, scored_rows(targets, ignore_index), impl, budget, buffers)
    kept = logits.shape[0] > 0
    gradients = _Gradients(loop, need_hidden, need_weight, need_bias)
    space = None if kept else loop.workspace()
    ref_space = loop.workspace() if g_full_kl is not None and not kept else None
    ref_matrix = None if ref_weight is None else ref_weight.t()
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        place = slice(start, start + len(rows))
        chunk = logits[place] if kept else torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        of_rows = stats[:, index]
        ref = None
        if g_full_kl is not None:
            other = ref_logits[place]
            if not kept:
                other = torch.mm(ref_hidden[index], ref_matrix, out=ref_space[: len(rows)])
            other_bias = None if ref_bias is None else ref_bias.to(loop.dtype)
            ref = RowReference(other, other_bias, of_rows[Stat.REF_LSE], of_rows[Stat.REF_LOGP])
        given = RowStats(*(of_rows[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL)))
        chunk, ref = gradients.exact(chunk, ref)
        coefficients = [None if g is None else g[index].contiguous() for g in (g_logp, g_entropy, g_full_kl)]
        loop.backend.gradient_(chunk, inputs, given, coefficients[0], coefficients[1], ref, coefficients[2])
        gradients.add(start, index, rows, chunk)
    return gradients.result(bias)


@head_gradient.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias, stats,
    g_logp, g_entropy, g_full_kl, logits, ref_logits, need_hidden, need_weight, need_bias, impl, budget,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


@torch.library.custom_op("rmsd_kernels::head_policy", mutates_args=())
def head_policy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    full_kl: bool,
    scale: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    tis_cap: float,
    kl: str,
    kl_coef: float,
    kl_log_ratio_clip: float | None,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(statistics, d_hidden, d_weight, d_bias) of the rows' policy losses (torch_rows.PolicyTerms), in one pass.

    rollout_logp: where the policy itself is the old one, so that the correction min(exp(logp - rollout_logp), tis_cap)
    is known only when a row is scored; else it is part of advantage.
    """
    scored, live = scored_rows(targets, ignore_index), None
    buffers = _buffers(hidden, full_kl, need_bias)
    if kl == "none" and not entropy_coef and (ignore_index is not None or hidden.device.type == "cpu"):
        scored, live = _live_first(scored, scale * advantage)
    loop = _Loop(hidden, weight, bias, temperature, scored, impl, budget, buffers, live)
    stats = torch.zeros(len(Stat), len(hidden), dtype=loop.dtype, device=hidden.device)
    gradients = _Gradients(loop, need_hidden, need_weight, need_bias)
    space = loop.workspace()
    reference = _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl, space)
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        ref = reference(index, inputs, stats, None)
        logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        old, other = (None if t is None else t[index] for t in (old_logp, ref_logp))
        if other is None and ref_hidden is not None:
            other = stats[Stat.REF_LOGP, index]
        terms = PolicyTerms(
            scale[index],
            advantage[index],
            old,
            other,
            kl,
            kl_coef,
            kl_log_ratio_clip,
            clip_low,
            clip_high,
            entropy_coef,
        )
        if start >= loop.live:
            _store(stats, index, loop.backend.score(logits, inputs, ref))
            continue
        logits, ref = gradients.exact(logits, ref)
        if rollout_logp is None:
            found = loop.backend.policy_(logits, inputs, terms, ref)
        else:
            found = loop.backend.score(logits, inputs, ref)
            correction = (found.logp - rollout_logp[index]).exp().clamp(max=tis_cap)
            terms = terms._replace(advantage=terms.advantage * correction)
            loop.backend.gradient_(logits, inputs, found, *torch_rows.policy_coefficients(found.logp, terms, ref))
        _store(stats, index, found)
        gradients.add(start, index, rows, logits)
    return stats, *gradients.result(bias)


@head_policy.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias, full_kl,
    scale, advantage, old_logp, ref_logp, rollout_logp, tis_cap, kl, kl_coef, kl_log_ratio_clip, clip_low, clip_high,
    entropy_coef,
    need_hidden, need_weight, need_bias, impl, budget,
):  # fmt: skip
    stats = hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulation_dtype(hidden))
    return stats, *_fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


@torch.library.custom_op("rmsd_kernels::head_divergence", mutates_args=())
def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    topk_ids: Tensor | None,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor,
    skip_zero_scale: bool,
    need_hidden: bool,
    need_weight: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], d_hidden, d_weight) of the sum of scale * divergence.

    teacher: logits [T, V], or [T, k] with topk_ids, or hidden states where teacher_weight is given.
    """
    rows_scored = torch.nonzero(scale).flatten() if skip_zero_scale else None
    loop = _Loop(hidden, weight, None, temperature, rows_scored, impl, budget, 1 + (teacher_weight is not None))
    values = torch.zeros(len(hidden), dtype=loop.dtype, device=hidden.device)
    gradients = _Gradients(loop, need_hidden, need_weight, False)
    space = loop.workspace()
    teacher_space = space if teacher_weight is None else loop.workspace()
    need = need_hidden or need_weight
    for start, index in loop:
        rows, other = hidden[index], teacher[index]
        logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        if teacher_weight is not None:
            other = torch.mm(other, teacher_weight.t(), out=teacher_space[: len(rows)])
        heat = None if temperature is None else temperature[index]
        weights = scale[index] if need else None
        if topk_ids is None:
            values[index] = loop.backend.divergence_(logits, other, heat, kind, alpha, weights)
        else:
            # k logits a row: nothing that a kernel of its own would gain.
            ids = topk_ids[index]
            chosen = logits.gather(1, ids).to(loop.dtype)
            values[index] = torch_rows.divergence_(chosen, other, heat, kind, alpha, weights)
            if need:
                logits.zero_().scatter_add_(1, ids, chosen.to(logits.dtype))
        if need:
            gradients.add(start, index, rows, logits)
    return values, *gradients.result(None)[:2]


@head_divergence.register_fake
def _(
    hidden, weight, teacher, teacher_weight, topk_ids, temperature, kind, alpha, scale, skip_zero_scale,
    need_hidden, need_weight, impl, budget,
):  # fmt: skip
    values = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return values, *_fake_gradients(hidden, weight, None, need_hidden, need_weight, False)[:2]


@torch.library.custom_op("rmsd_kernels::scale_", mutates_args=("values",))
def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, one number on the same device; where it is 1, the usual case, values are not touched."""
    if values.device.type == "cuda":
        importlib.import_module(".triton_rows", __package__).scale_unless_one_(values, factor)
    elif factor.item() != 1.0:
        values.mul_(factor)


@scale_.register_fake
def _(values, factor):
    return None


def chunk_rows(rows: int, row_bytes: int, budget: int, device: str) -> int:
    """Rows per chunk: as many as the budget holds, cut to whole GEMM tiles, and on CPU into chunks of equal size."""
    most = max(1, budget // row_bytes)
    if rows <= most:
        return max(1, rows)
    if device == "cuda":
        return max(most // _CUDA_TILE_ROWS * _CUDA_TILE_ROWS, min(most, _CUDA_TILE_ROWS))
    even = math.ceil(rows / math.ceil(rows / most))
    return min(most, math.ceil(even / _CPU_TILE_ROWS) * _CPU_TILE_ROWS)


def scored_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Indices of the rows whose target is not ignore_index; None: all. Finding them waits for an accelerator."""
    if ignore_index is None:
        return None
    rows = torch.nonzero(targets != ignore_index).flatten()
    return None if len(rows) == len(targets) else rows


def _buffers(hidden: Tensor, full_kl: bool, need_bias: bool) -> int:
    """[n, V] in the input's dtype that a chunk needs: logits, the reference's, and for d_bias float32 forms of both."""
    heads = 1 + full_kl
    return heads + 2 * heads + 1 if need_bias and hidden.element_size() == 2 else heads


def _live_first(rows: Tensor | None, coefficient: Tensor) -> tuple[Tensor | None, int]:
    """The rows, those with a coefficient other than 0 first, and how many these are."""
    every = torch.arange(len(coefficient), device=coefficient.device) if rows is None else rows
    carries = coefficient[every] != 0
    live = int(carries.sum())
    return (rows, live) if live == len(every) else (torch.cat([every[carries], every[~carries]]), live)


def target_logit(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden @ weight[target] of each row in the accumulation dtype, [n]; a target out of range takes a nearby row."""
    dtype = accumulation_dtype(rows)
    chosen = weight[targets.clamp(0, len(weight) - 1)]
    return (rows.to(dtype) * chosen.to(dtype)).sum(dim=-1)


def _backend(impl: str, hidden: Tensor) -> ModuleType:
    """The row back end that serves `hidden`; triton is imported here, on first use."""
    return importlib.import_module(f".{resolve_impl(impl, hidden)}_rows", __package__)


def _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl: bool, space: Tensor | None):
    """A function that scores a chunk's reference into stats, and gives the RowReference that the exact KL needs."""
    if ref_hidden is None:
        return lambda index, inputs, stats, out: None
    matrix = ref_weight.contiguous()
    bias = None if ref_bias is None else ref_bias.to(loop.dtype)
    # Only the exact KL needs both heads' logits at once.
    own = loop.workspace() if full_kl or space is None else space

    def reference(index, inputs: RowInputs, stats: Tensor, out: Tensor | None) -> RowReference | None:
        rows = ref_hidden[index]
        logits = torch.mm(rows, matrix.t(), out=own[: len(rows)] if out is None else out)
        exact = target_logit(rows, matrix, inputs.targets)
        found = loop.backend.score(logits, inputs._replace(target_logit=exact, bias=bias))
        stats[Stat.REF_LOGP, index], stats[Stat.REF_LSE, index] = found.logp, found.lse
        return RowReference(logits, bias, found.lse, found.logp) if full_kl else None

    return reference


def _store(stats: Tensor, index: slice | Tensor, found: RowStats) -> None:
    stats[Stat.LOGP, index], stats[Stat.ENTROPY, index], stats[Stat.LSE, index] = found[:3]
    if found.full_kl is not None:
        stats[Stat.FULL_KL, index] = found.full_kl


def _fake_gradients(hidden, weight, bias, need_hidden: bool, need_weight: bool, need_bias: bool):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    dtype = accumulation_dtype(hidden) if bias is None else bias.dtype
    return d_hidden, d_weight, hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype)
