"""Divergences between rows of logits in Triton: `divergence_` of `torch_rows` for CUDA tensors.

One program processes one row of student logits and of teacher logits. It reads both rows twice, and a third time if it
writes the gradient. With b bytes per logit, 2bV bytes are read from memory, and repeated reads hit the cache as long as
it holds both rows. A gradient adds bV bytes of writes. Logarithms are to base 2 until a result is stored.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import SLICED, check_logits, launch, row_vectors
from .triton_row_math import LN2, LOG2E, LOWEST, View, block_u, exp2, load_or, online


@triton.jit
def _log2_mixture(log_p, log_q, log_share, log_rest):
    """Return log2(share * p + (1 - share) * q) from log2 p and log2 q; -inf if both are -inf."""
    a = log_p + log_share
    b = log_q + log_rest
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(a, b)
    return tl.where(high == -float("inf"), high, high + tl.log2(1.0 + exp2(low - high)))


@triton.jit
def _times(p, log_p, value):
    """Return p * value, or 0 if p is 0, even if value is not finite."""
    return p * tl.where(log_p == -float("inf"), 0.0, value)


@triton.jit
def _log2_softmax(row_ptr, col, view, scale, top, log_total, MASKED: tl.constexpr):
    u, _ = block_u(row_ptr, col, -1, view, MASKED)
    return tl.fma(u - top, scale, -log_total)


@triton.jit
def _read_block(row_ptr, tops, total, view, scale, col, LANE: tl.constexpr, MASKED: tl.constexpr):
    u, _ = block_u(row_ptr, col, -1, view, MASKED)
    new, _, _, _, _, new_total = online(tops, total, tl.reshape(u, [col.shape[0] // LANE, LANE]), scale)
    return new, new_total


@triton.jit
def _combined(tops, total, scale):
    """Return the maximum over all threads, and the base-2 logarithm of their sum."""
    top = tl.max(tops, 0)
    return top, tl.log2(tl.sum(total * exp2((tops - top) * scale), 0))


@triton.jit
def _add_block(value, mean_slope, log_p, log_q, log_share, log_rest, share, KIND: tl.constexpr, LANE: tl.constexpr):
    """Add a block to the divergence, and to sum q f of the gradient q * (f - sum q f), f = d divergence / dq."""
    q = exp2(log_q)
    p = exp2(log_p)
    shape: tl.constexpr = [p.shape[0] // LANE, LANE]
    if KIND == "forward_kl":
        value += tl.sum(tl.reshape(_times(p, log_p, log_p - log_q), shape), 1)
    elif KIND == "reverse_kl":
        value += tl.sum(tl.reshape(_times(q, log_q, log_q - log_p), shape), 1)
    else:
        log_m = _log2_mixture(log_p, log_q, log_share, log_rest)
        to_m = tl.sum(tl.reshape(_times(p, log_p, log_p - log_m), shape), 1)
        if KIND == "jsd":
            from_student = tl.sum(tl.reshape(_times(q, log_q, log_q - log_m), shape), 1)
            value += share * to_m + (1.0 - share) * from_student
            mean_slope += (1.0 - share) * from_student
        else:
            value += to_m
            mean_slope -= (1.0 - share) * tl.sum(tl.reshape(_times(q, log_q, exp2(log_p - log_m)), shape), 1)
    return value, mean_slope


@triton.jit
def _slope_of_block(log_p, log_q, log_share, log_rest, share, middle, KIND: tl.constexpr):
    """Return the derivative with respect to z. The caller multiplies by ln 2 for logarithms to base 2."""
    q = exp2(log_q)
    if KIND == "forward_kl":
        dz = q - exp2(log_p)
    else:
        if KIND == "reverse_kl":
            slope = log_q - log_p
        else:
            log_m = _log2_mixture(log_p, log_q, log_share, log_rest)
            if KIND == "jsd":
                slope = (1.0 - share) * (log_q - log_m)
            else:
                slope = -(1.0 - share) * exp2(log_p - log_m)
        dz = _times(q, log_q, slope - middle)
    return dz


@triton.jit
def _bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, KIND: tl.constexpr):
    """Return min(summand, vocab_clip), q f and q of each entry; f is 0 where the summand is clipped."""
    q = exp2(log_q)
    p = exp2(log_p)
    if KIND == "forward_kl":
        term = _times(p, log_p, log_p - log_q)
        slope = -p
    elif KIND == "reverse_kl":
        term = _times(q, log_q, log_q - log_p)
        # The derivative of q (log q - log p) has a constant, which cancels only if no entry is clipped.
        slope = _times(q, log_q, log_q - log_p + LOG2E)
    else:
        log_m = _log2_mixture(log_p, log_q, log_share, log_rest)
        term = _times(p, log_p, log_p - log_m)
        if KIND == "jsd":
            slope = (1.0 - share) * _times(q, log_q, log_q - log_m)
            term = share * term + slope
        else:
            slope = -(1.0 - share) * _times(q, log_q, exp2(log_p - log_m))
    bounded = tl.minimum(term, vocab_clip, propagate_nan=tl.PropagateNan.ALL)
    return bounded, tl.where(term > vocab_clip, 0.0, slope), q


@triton.jit
def _add_bounded_block(
    value, mean_slope, log_p, log_q, log_share, log_rest, share, vocab_clip, KIND: tl.constexpr, LANE: tl.constexpr
):
    """Add a block to the divergence and to sum q f, like `_add_block`."""
    term, slope, _ = _bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, KIND)
    shape: tl.constexpr = [term.shape[0] // LANE, LANE]
    return value + tl.sum(tl.reshape(term, shape), 1), mean_slope + tl.sum(tl.reshape(slope, shape), 1)


@triton.jit
def _slope_of_bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, middle, KIND: tl.constexpr):
    """Return the derivative with respect to z, like `_slope_of_block`."""
    _, slope, q = _bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, KIND)
    return slope - q * middle


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _divergence_kernel(
    logits_ptr,
    teacher_ptr,
    temperature_ptr,
    scale_ptr,
    value_ptr,
    stride,
    teacher_stride,
    vocab,
    share,
    log_share,
    log_rest,
    vocab_clip,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature = 1.0 / load_or(temperature_ptr, row, 1.0)
    view = View(None, None, inverse_temperature, vocab)
    scale = inverse_temperature * LOG2E
    student_row = logits_ptr + row * stride
    teacher_row = teacher_ptr + row * teacher_stride
    offsets = tl.arange(0, BLOCK)
    blocks = vocab // BLOCK
    whole = blocks * BLOCK
    # First pass: log-sum-exp of both rows.
    tops_q = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    tops_p = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    total_q = tl.zeros([BLOCK // LANE], tl.float32)
    total_p = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        tops_q, total_q = _read_block(student_row, tops_q, total_q, view, scale, start + offsets, LANE, False)
        tops_p, total_p = _read_block(teacher_row, tops_p, total_p, view, scale, start + offsets, LANE, False)
    if whole < vocab:
        tops_q, total_q = _read_block(student_row, tops_q, total_q, view, scale, whole + offsets, LANE, True)
        tops_p, total_p = _read_block(teacher_row, tops_p, total_p, view, scale, whole + offsets, LANE, True)
    top_q, log_q_total = _combined(tops_q, total_q, scale)
    top_p, log_p_total = _combined(tops_p, total_p, scale)

    # Second pass: the divergence. It starts at the end of the row, which is still in the cache.
    value = tl.zeros([BLOCK // LANE], tl.float32)
    mean_slope = tl.zeros([BLOCK // LANE], tl.float32)
    if whole < vocab:
        log_q = _log2_softmax(student_row, whole + offsets, view, scale, top_q, log_q_total, True)
        log_p = _log2_softmax(teacher_row, whole + offsets, view, scale, top_p, log_p_total, True)
        if vocab_clip is None:
            value, mean_slope = _add_block(value, mean_slope, log_p, log_q, log_share, log_rest, share, KIND, LANE)
        else:
            value, mean_slope = _add_bounded_block(
                value, mean_slope, log_p, log_q, log_share, log_rest, share, vocab_clip, KIND, LANE
            )
    for i in tl.range(0, blocks, num_stages=STAGES):
        col = (blocks - 1 - i) * BLOCK + offsets
        log_q = _log2_softmax(student_row, col, view, scale, top_q, log_q_total, False)
        log_p = _log2_softmax(teacher_row, col, view, scale, top_p, log_p_total, False)
        if vocab_clip is None:
            value, mean_slope = _add_block(value, mean_slope, log_p, log_q, log_share, log_rest, share, KIND, LANE)
        else:
            value, mean_slope = _add_bounded_block(
                value, mean_slope, log_p, log_q, log_share, log_rest, share, vocab_clip, KIND, LANE
            )
    total = tl.sum(value, 0)
    tl.store(value_ptr + row, total * LN2)

    if scale_ptr is not None:
        factor = tl.load(scale_ptr + row) * inverse_temperature
        if KIND == "reverse_kl" or KIND == "jsd":
            factor *= LN2
        middle = total
        if KIND == "jsd" or KIND == "skew_kl" or vocab_clip is not None:
            middle = tl.sum(mean_slope, 0)
        for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
            col = start + offsets
            log_q = _log2_softmax(student_row, col, view, scale, top_q, log_q_total, False)
            log_p = _log2_softmax(teacher_row, col, view, scale, top_p, log_p_total, False)
            if vocab_clip is None:
                dz = _slope_of_block(log_p, log_q, log_share, log_rest, share, middle, KIND)
            else:
                dz = _slope_of_bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, middle, KIND)
            dz *= factor
            tl.store(student_row + col, dz.to(logits_ptr.dtype.element_ty))
        if whole < vocab:
            col = whole + offsets
            log_q = _log2_softmax(student_row, col, view, scale, top_q, log_q_total, True)
            log_p = _log2_softmax(teacher_row, col, view, scale, top_p, log_p_total, True)
            if vocab_clip is None:
                dz = _slope_of_block(log_p, log_q, log_share, log_rest, share, middle, KIND)
            else:
                dz = _slope_of_bounded_block(log_p, log_q, log_share, log_rest, share, vocab_clip, middle, KIND)
            dz *= factor
            tl.store(student_row + col, dz.to(logits_ptr.dtype.element_ty), mask=col < vocab)


def divergence_(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor | None,
    vocab_clip: float | None = None,
) -> Tensor:
    """Return the divergence [n] between teacher and student; kinds and vocab_clip as in linear_divergence.

    With scale [n], overwrite logits with the gradient of the sum of scale * divergence; without it, only read them.
    """
    if kind not in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        raise ValueError(f"kind: expected 'forward_kl', 'reverse_kl', 'jsd' or 'skew_kl', got {kind!r}")
    check_logits("teacher_logits", teacher_logits, logits)
    vectors = row_vectors(logits, temperature=temperature, scale=scale)
    value = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        share = float({"jsd": 0.5, "skew_kl": 0.1}.get(kind, 0.5) if alpha is None else alpha)
        arguments = {
            "logits_ptr": logits,
            "teacher_ptr": teacher_logits,
            "temperature_ptr": vectors["temperature"],
            "scale_ptr": vectors["scale"],
            "value_ptr": value,
            "stride": logits.stride(0),
            "teacher_stride": teacher_logits.stride(0),
            "vocab": logits.shape[1],
            "share": share,
            "log_share": math.log2(share),
            "log_rest": math.log2(1.0 - share),
            "vocab_clip": None if vocab_clip is None else vocab_clip * math.log2(math.e),
            "KIND": kind,
        }
        launch(_divergence_kernel, logits, arguments, two_rows=True)
    return value
