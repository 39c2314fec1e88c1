"""Divide tokens into chunks: their size, the inputs of their logits, and the sums of gradients over them."""

import importlib
import math
from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType

import torch
from torch import Tensor

from ..implementations import resolve_impl
from ..ops import accumulation_dtype, full_precision_sums
from .row_types import Execution, HeadCall, Needs, RowInputs, RowReference

# Bytes of one head's logits if the caller sets no budget. CUDA: 1664 rows of V = 151936 in bf16; the tiles of their
# d_hidden GEMM fill 98.5% of an H200 (calculated, not measured). CPU: each additional chunk reads and writes d_weight
# again, but above about 1000 rows the bf16 GEMM of d_weight gets slower (measured with V = 151936 on AVX512 and AMX,
# 2 cores).
DEFAULT_BUDGET_BYTES = {"cuda": 512 << 20, "cpu": 256 << 20}
# If the gradient is known only in backward, up to this many bytes of logits are kept, which saves a second GEMM.
DEFAULT_KEPT_BYTES = {"cuda": 512 << 20, "cpu": 1 << 30}
# Up to this many chunks, rounding a 16-bit d_weight once per chunk does not exceed the error of a single GEMM (measured
# in the tests). With more chunks, it is summed in float32.
MAX_ROUNDINGS = 5
_CUDA_TILE_ROWS = 128
_CPU_TILE_ROWS = 32
_ROW_COLUMNS = 64
_WEIGHT_BLOCK_BYTES = 32 << 20


class Loop(ExitStack):
    """Iterate over chunks of a head's rows. Inside the context, GEMMs are computed in the dtype of their inputs.

    Args:
        hidden: hidden states, [T, D].
        weight: the head, [V, D].
        rows: indices of the scored rows, int64; None means all.
        execution: implementation and memory budget.
        buffers: number of [n, V] tensors that a chunk of n rows needs.
        bias: bias of the head, [V].
        live: the first `live` scored rows carry a gradient; None means all.
        need_weight: whether d_weight is needed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        execution: Execution,
        buffers: int,
        *,
        bias: Tensor | None = None,
        live: int | None = None,
        need_weight: bool = False,
    ) -> None:
        super().__init__()
        self.hidden, self.weight = hidden, weight
        self.dtype = accumulation_dtype(hidden)
        self.bias = self.bias_of(bias)
        self.backend = _backend(execution.impl, hidden)
        self.rows = rows
        self.count = len(hidden) if rows is None else len(rows)
        # A chunk holds either rows with a gradient or rows without one, never both.
        self.live = self.count if live is None else live
        row_bytes = weight.shape[0] * hidden.element_size()
        budget = execution.budget or buffers * default_budget(self.live, row_bytes, weight, need_weight)
        self.step = chunk_rows(self.count, buffers * row_bytes, budget, hidden.device.type)
        self.chunks = math.ceil(self.live / self.step)

    def __enter__(self) -> "Loop":
        device = self.hidden.device.type
        if torch.is_autocast_enabled(device):
            self.enter_context(torch.autocast(device, enabled=False))
        if device == "cuda" and self.hidden.element_size() == 2:
            self.enter_context(full_precision_sums())
        return self

    def workspace(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return an empty tensor for a chunk's logits, in the dtype of hidden by default."""
        return empty_logits(self.hidden, self.step if self.count else 0, self.weight.shape[0], dtype)

    def bias_of(self, bias: Tensor | None) -> Tensor | None:
        """Return a head's bias in the format of the row functions: contiguous, in the accumulation dtype."""
        return None if bias is None else bias.to(self.dtype).contiguous()

    def __iter__(self) -> Iterator[tuple[slice, slice | Tensor]]:
        """Yield (span, index) of each chunk: its slice of the scored rows, and its rows in hidden."""
        for first, end in ((0, self.live), (self.live, self.count)):
            for start in range(first, end, self.step):
                span = slice(start, min(start + self.step, end))
                yield span, span if self.rows is None else self.rows[span]

    def inputs(self, call: HeadCall, rows: Tensor, index: slice | Tensor) -> RowInputs:
        """Return the inputs of the row functions other than the logits; rows = call.hidden[index]."""
        temperature, targets = None if call.temperature is None else call.temperature[index], call.targets[index]
        target_logit = self.backend.target_logit(rows, self.weight, targets)
        return RowInputs(targets, target_logit, self.bias, temperature, call.softcap)


class Gradients:
    """d_hidden, d_weight and d_bias, summed over chunks. Gradients that are not needed are empty."""

    def __init__(self, loop: Loop, needs: Needs) -> None:
        self.loop, self.needs = loop, needs
        hidden, weight = loop.hidden, loop.weight
        # Without ignored rows, the chunks write every row of d_hidden.
        make = torch.empty_like if loop.rows is None else torch.zeros_like
        self.hidden = make(hidden, memory_format=torch.contiguous_format) if needs.hidden else hidden.new_empty(0)
        self.in_float32 = weight.element_size() == 2 and loop.chunks > MAX_ROUNDINGS
        self.weight = weight.new_empty(0)
        if needs.weight:
            dtype = torch.float32 if self.in_float32 else weight.dtype
            start = torch.zeros if self.in_float32 or not loop.live else torch.empty
            self.weight = start(weight.shape, dtype=dtype, device=weight.device)
        self.bias = torch.zeros(len(weight) if needs.bias else 0, dtype=loop.dtype, device=weight.device)

    def unrounded(self, logits: Tensor, ref: RowReference | None) -> tuple[Tensor, RowReference | None]:
        """Return logits in the accumulation dtype if d_bias is needed, because it sums unrounded gradients."""
        if not self.needs.bias or logits.dtype == self.loop.dtype:
            return logits, ref
        ref = None if ref is None else ref._replace(logits=ref.logits.to(self.loop.dtype))
        return logits.to(self.loop.dtype), ref

    def add(self, span: slice, index: slice | Tensor, rows: Tensor, d_logits: Tensor) -> None:
        """Add a chunk's gradients: rows = hidden[index], and `span` is the chunk's slice of the scored rows."""
        if self.needs.bias:
            self.bias += d_logits.sum(dim=0)
            d_logits = d_logits.to(rows.dtype)
        if self.needs.hidden:
            if isinstance(index, slice):
                torch.mm(d_logits, self.loop.weight, out=self.hidden[index])
            else:
                self.hidden.index_copy_(0, index, torch.mm(d_logits, self.loop.weight))
        if not self.needs.weight:
            return
        if self.in_float32:
            self._add_in_float32(rows, d_logits)
        elif span.start == 0:
            torch.mm(d_logits.t(), rows, out=self.weight)
        else:
            self.weight.addmm_(d_logits.t(), rows)

    def _add_in_float32(self, rows: Tensor, d_logits: Tensor) -> None:
        if rows.device.type == "cuda":
            torch.addmm(self.weight, d_logits.t(), rows, out_dtype=torch.float32, out=self.weight)
            return
        # On CPU, a GEMM of 16-bit matrices has a 16-bit result, so each chunk's share is rounded once.
        step = max(1, _WEIGHT_BLOCK_BYTES // (2 * rows.shape[1]))
        for first in range(0, len(self.weight), step):
            block = slice(first, first + step)
            self.weight[block] += torch.mm(d_logits[:, block].t(), rows)

    def result(self, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weight = self.weight.to(self.loop.weight.dtype)
        return self.hidden, weight, self.bias if bias is None else self.bias.to(bias.dtype)


def workspace_bytes(rows: int, weight: Tensor, *, device: str, need_weight: bool, buffers: int = 1) -> int:
    """Return the bytes that a loop over `rows` scored rows holds at most, besides its inputs and its results.

    These are the logits of a chunk and, if d_weight is summed in float32, that sum: its 16-bit copy, the result, is
    made after the logits are freed.

    Args:
        rows: number of scored rows, all with a gradient if there is one.
        weight: the head, [V, D]; only its shape and dtype are used.
        device: "cuda" or "cpu", where the loop will run.
        need_weight: whether d_weight is needed.
        buffers: number of [n, V] tensors that a chunk of n rows needs, see `chunk_buffers`.
    """
    row_bytes = len(weight) * weight.element_size()
    budget = buffers * default_budget(rows, row_bytes, weight, need_weight, device)
    step = chunk_rows(rows, buffers * row_bytes, budget, device)
    in_float32 = need_weight and weight.element_size() == 2 and math.ceil(rows / step) > MAX_ROUNDINGS
    return buffers * step * row_bytes + (4 * weight.numel() if in_float32 else 0)


def default_budget(rows: int, row_bytes: int, weight: Tensor, need_weight: bool, device: str = "") -> int:
    """Return the bytes of one head's logits if the caller sets no budget. The default device is that of the weight.

    For a 16-bit d_weight, chunks are large enough that at most MAX_ROUNDINGS of them are needed. If that takes more
    memory in total than a sum in float32, d_weight is summed in float32, with chunks of the size of d_weight, because
    each chunk reads and writes it once.
    """
    device = device or weight.device.type
    usual = DEFAULT_BUDGET_BYTES.get(device, DEFAULT_BUDGET_BYTES["cpu"])
    if not need_weight or weight.element_size() != 2:
        return usual
    few = _whole_tiles(math.ceil(rows / MAX_ROUNDINGS), device) * row_bytes
    # Compare chunks and a 16-bit d_weight with chunks, a float32 d_weight and its 16-bit copy.
    in_float32 = 4 * weight.numel()
    return max(usual, few if few <= 2 * in_float32 else in_float32)


def empty_logits(like: Tensor, rows: int, vocabulary: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty [rows, V] on the device of `like`, in its dtype by default.

    On CUDA, rows are padded to a multiple of 64 numbers: with unaligned rows, the row kernels would need four times as
    many instructions.
    """
    width = -(-vocabulary // _ROW_COLUMNS) * _ROW_COLUMNS if like.device.type == "cuda" else vocabulary
    return like.new_empty(rows, width, dtype=dtype)[:, :vocabulary]


def chunk_rows(rows: int, row_bytes: int, budget: int, device: str) -> int:
    """Return the rows per chunk that fit into the budget, in whole GEMM tiles, and on CPU in chunks of equal size."""
    most = max(1, budget // row_bytes)
    if rows <= most:
        return max(1, rows)
    if device == "cuda":
        return max(most // _CUDA_TILE_ROWS * _CUDA_TILE_ROWS, min(most, _CUDA_TILE_ROWS))
    return min(most, _whole_tiles(math.ceil(rows / math.ceil(rows / most)), device))


def _whole_tiles(rows: int, device: str) -> int:
    tile = _CUDA_TILE_ROWS if device == "cuda" else _CPU_TILE_ROWS
    return math.ceil(rows / tile) * tile


def scored_rows(targets: Tensor, ignore_index: int | None) -> Tensor | None:
    """Return the indices of rows whose target is not ignore_index; None means all. Waits for an accelerator."""
    if ignore_index is None:
        return None
    rows = torch.nonzero(targets != ignore_index).flatten()
    return None if len(rows) == len(targets) else rows


def live_first(rows: Tensor | None, coefficient: Tensor) -> tuple[Tensor | None, int]:
    """Return the rows, sorted so that rows with a nonzero coefficient come first, and the number of these rows.

    Waits once for an accelerator.
    """
    idle = (coefficient if rows is None else coefficient[rows]) == 0
    live = len(idle) - int(idle.sum())
    if live == len(idle):
        return rows, live
    order = torch.argsort(idle.to(torch.uint8), stable=True)
    return (order if rows is None else rows[order]), live


def chunk_buffers(hidden: Tensor, full_kl: bool, need_bias: bool) -> int:
    """Return how many [n, V] tensors in the dtype of hidden a chunk needs.

    These are the logits, the reference's logits, and float32 copies of both for a 16-bit d_bias.
    """
    heads = 1 + full_kl
    return heads + 2 * heads + 1 if need_bias and hidden.element_size() == 2 else heads


def _backend(impl: str, hidden: Tensor) -> ModuleType:
    """Return the row back end for `hidden`. Triton is imported here, on first use."""
    return importlib.import_module(f".{resolve_impl(impl, hidden)}_rows", __package__)
