"""Shared-prefix attention with one call per segment: torch's CPU flash kernel, or explicit products on any device.

Adjacent segments of equal length are one batched call on views, so inputs are not copied.
"""

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import accumulation_dtype
from .layout import Layout, Run
from .merge import adjacent, merge_

# Number of scores that exist at once in the explicit form: 64 MiB in float32.
_SCORES = 1 << 24


class Segments(NamedTuple):
    """A back end built from four functions on [B, H, R, d] queries and [B, Hkv, P, d] keys.

    attend(q, k, v, causal, scale) returns (out, lse [B, H, R]).
    attend_exactly is the same, with out in the accumulation dtype, for results that are rounded after a merge.
    attend_backward(d_out, q, k, v, out, lse, causal, scale) returns (dq, dk, dv).
    attend_first(q, k, v, lengths, scale), with H = Hkv, is attend over the first lengths[b] keys of sequence b.
    """

    attend: Callable
    attend_exactly: Callable
    attend_backward: Callable
    attend_first: Callable

    def forward(self, q, k, v, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out [T, H, d], lse [H, T])."""
        q, k, v = map(adjacent, (q, k, v))
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))
        responses = out[layout.prefix_tokens :]
        exact = responses if out.dtype == lse.dtype else responses.new_empty(responses.shape, dtype=lse.dtype)
        for run in layout.runs:
            rows = (_batch(t, run.rows, run) for t in (q, k, v))
            if run.rows.start < layout.prefix_tokens:
                run_out, run_lse = self.attend(*rows, True, scale)
                _batch(out, run.rows, run).copy_(run_out)
            else:
                run_out, run_lse = self.attend_exactly(*rows, True, scale)
                _batch(exact, _shifted(run.rows, layout), run).copy_(run_out)
            _lse_batch(lse, run).copy_(run_lse)
        for keys, queries in layout.groups:
            prefix_inputs = (_as_batch(q[queries]), _as_batch(k[keys]), _as_batch(v[keys]))
            prefix_out, prefix_lse = self.attend_exactly(*prefix_inputs, False, scale)
            merge_(exact[_shifted(queries, layout)], lse[:, queries], prefix_out[0].transpose(0, 1), prefix_lse[0])
        if exact is not responses:
            responses.copy_(exact)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv)."""
        q, k, v = map(adjacent, (q, k, v))
        gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
        for run in layout.runs:
            rows = (_batch(t, run.rows, run) for t in (d_out, q, k, v, out))
            run_gradients = self.attend_backward(*rows, _lse_batch(lse, run), True, scale)
            for gradient, run_gradient in zip(gradients, run_gradients, strict=True):
                _batch(gradient, run.rows, run).copy_(run_gradient)
        for keys, queries in layout.groups:
            slices = (queries, queries, keys, keys, queries)
            rows = (_as_batch(t[rows]) for t, rows in zip((d_out, q, k, v, out), slices, strict=True))
            shares = self.attend_backward(*rows, lse[:, queries].unsqueeze(0), False, scale)
            for gradient, rows, share in zip(gradients, (queries, keys, keys), shares, strict=True):
                _as_batch(gradient[rows]).add_(share)
        return gradients

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float):
        """Return the attention of q [B, Hkv, r, d] over k, v [B, Hkv, t, d]: out [B, Hkv r, d], lse [Hkv r, B].

        With lengths, int32 [B], each sequence attends to so many of its first keys.
        """
        k, v = map(adjacent, (k, v))
        if lengths is None:
            out, lse = self.attend(q, k, v, False, scale)
        else:
            out, lse = self.attend_first(q, k, v, lengths, scale)
        return out.flatten(1, 2), lse.flatten(1, 2).t()

    def attend_prefixes(self, q, k, v, prefixes, rows, edges, scale: float) -> tuple[Tensor, Tensor]:
        """Return the same for each group's rows over its prefix, with k, v [Tp, Hkv, d]."""
        k, v = map(adjacent, (k, v))
        batch, kv_heads, fold, _ = q.shape
        if len(prefixes) == 1:
            # Without other groups, nothing has to be put together.
            query = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)
            out, lse = self.attend(query, _as_batch(k), _as_batch(v), False, scale)
            out, lse = (t[0].unflatten(1, (batch, fold)) for t in (out, lse))
            return out.transpose(0, 1).flatten(1, 2), lse.transpose(1, 2).flatten(0, 1)
        out = q.new_empty(q.shape, dtype=accumulation_dtype(q))
        lse = q.new_empty(kv_heads, batch, fold, dtype=accumulation_dtype(q))
        row = key = 0
        for prefix, count in zip(prefixes, rows, strict=True):
            if count:
                group_rows, keys = slice(row, row + count), slice(key, key + prefix)
                query = q[group_rows].transpose(0, 1).flatten(1, 2).unsqueeze(0)
                group_out, group_lse = self.attend(query, _as_batch(k[keys]), _as_batch(v[keys]), False, scale)
                out[group_rows] = group_out[0].unflatten(1, (count, fold)).transpose(0, 1)
                lse[:, group_rows] = group_lse[0].unflatten(1, (count, fold))
            row, key = row + count, key + prefix
        return out.flatten(1, 2), lse.transpose(1, 2).flatten(0, 1)


def _as_batch(rows: Tensor) -> Tensor:
    """Return [R, H, d] as [1, H, R, d]."""
    return rows.transpose(0, 1).unsqueeze(0)


def _shifted(rows: slice, layout: Layout) -> slice:
    """Return the slice counted from the first response."""
    return slice(rows.start - layout.prefix_tokens, rows.stop - layout.prefix_tokens)


def _batch(t: Tensor, rows: slice, run: Run) -> Tensor:
    """Return a run's rows of [T, H, d] as [count, H, length, d]."""
    return t[rows].unflatten(0, (run.count, run.length)).transpose(1, 2)


def _lse_batch(lse: Tensor, run: Run) -> Tensor:
    """Return a run's columns of [H, T] as [count, H, length]."""
    return lse[:, run.rows].unflatten(1, (run.count, run.length)).transpose(0, 1)


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def cpu_flash_exactly(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    # Rounding both parts to bfloat16, and their merge again, gives up to 1.25 times the error of one attention call.
    return cpu_flash(*(t.to(accumulation_dtype(t)) for t in (q, k, v)), causal, scale)


def cpu_flash_backward(d_out, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    # For bfloat16 inputs, the kernel sums dK and dV in bfloat16, over blocks of 32 to 256 queries and over the query
    # heads of a key head, which gives 2 to 4 times the error of a single rounding.
    rows = (t.to(lse.dtype) for t in (d_out, q, k, v, out))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(*rows, lse, 0.0, causal, scale=scale)


def cpu_flash_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Reading numbers costs nothing on a CPU, and calls on slices give the same bits as calls on tensors of that length.
    numbers = lengths.tolist()
    if min(numbers) == max(numbers):
        return cpu_flash(q, k[:, :, : numbers[0]], v[:, :, : numbers[0]], False, scale)
    calls, row = [], 0
    for used, sequences in groupby(numbers):
        rows = slice(row, row + len(list(sequences)))
        calls.append(cpu_flash(q[rows], k[rows, :, :used], v[rows, :, :used], False, scale))
        row = rows.stop
    return tuple(map(torch.cat, zip(*calls, strict=True)))


def explicit(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with matrix products, in chunks of queries with at most _SCORES scores (or one query)."""
    kv_heads, dtype = k.shape[1], accumulation_dtype(q)
    k, v = k.to(dtype), v.to(dtype)
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
    for rows, seen in _chunks(q, k, causal):
        scores = _scores(_fold(q[:, :, rows].to(dtype), kv_heads), k[:, :, :seen], rows, causal, scale)
        chunk_lse = scores.logsumexp(-1)
        chunk_out = scores.sub_(chunk_lse.unsqueeze(-1)).exp_() @ v[:, :, :seen]
        out[:, :, rows] = _unfold(chunk_out, q.shape[1])
        lse[:, :, rows] = _unfold(chunk_lse, q.shape[1])
    return out, lse


def explicit_first(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to the first keys of each sequence by masking the others, without reading the lengths on the host."""
    dtype = accumulation_dtype(q)
    scores = (q.to(dtype) @ k.to(dtype).mT).mul_(scale)
    beyond = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
    lse = scores.masked_fill_(beyond[:, None, None], float("-inf")).logsumexp(-1)
    return scores.sub_(lse.unsqueeze(-1)).exp_() @ v.to(dtype), lse


def explicit_backward(d_out, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads, dtype = k.shape[1], accumulation_dtype(q)
    k, v = k.to(dtype), v.to(dtype)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, seen in _chunks(q, k, causal):
        query, gradient, value = (_fold(t[:, :, rows].to(dtype), kv_heads) for t in (q, d_out, out))
        p = _scores(query, k[:, :, :seen], rows, causal, scale)
        p.sub_(_fold(lse[:, :, rows], kv_heads).unsqueeze(-1)).exp_()
        dv[:, :, :seen] += p.mT @ gradient
        delta = (gradient * value).sum(-1, keepdim=True)
        ds = (gradient @ v[:, :, :seen].mT).sub_(delta).mul_(p).mul_(scale)
        dk[:, :, :seen] += ds.mT @ query
        dq[:, :, rows] = _unfold(ds @ k[:, :, :seen], q.shape[1])
    return dq, dk, dv


def _chunks(q: Tensor, k: Tensor, causal: bool):
    """Yield (slice of a chunk's queries, number of keys that they attend to)."""
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    size = max(1, _SCORES // (batch * heads * keys))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), stop if causal else keys


def _fold(t: Tensor, kv_heads: int) -> Tensor:
    """Return [B, H, R, …] as [B, Hkv, H / Hkv * R, …], so that queries with the same keys are rows of one product."""
    return t.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _unfold(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(2, (heads // t.shape[1], -1)).flatten(1, 2)


def _scores(query: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    scores = (query @ k.mT).mul_(scale)
    if causal:
        count, keys = rows.stop - rows.start, k.shape[2]
        later = torch.ones(count, keys, dtype=torch.bool, device=k.device).triu_(rows.start + 1)
        scores.unflatten(2, (-1, count)).masked_fill_(later, float("-inf"))
    return scores


CPU_FLASH = Segments(cpu_flash, cpu_flash_exactly, cpu_flash_backward, cpu_flash_first)
EXPLICIT = Segments(explicit, explicit, explicit_backward, explicit_first)
