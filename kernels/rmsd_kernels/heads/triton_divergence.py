"""Divergences between rows of logits in Triton: `divergence_` of `torch_rows` for CUDA tensors.

One program owns one row of the student and of the teacher and reads both twice, and a third time to write the gradient:
2bV bytes from memory and the rest from cache while it holds the two rows, bV more written with a gradient.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import SLICED, check_logits, launch, row_vectors
from .triton_row_math import View, block_z, load_or, shifted


@triton.jit
def _log_mixture(log_p, log_q, log_share, log_rest):
    """log(share * p + (1 - share) * q) from logarithms, -inf where both are."""
    a = log_p + log_share
    b = log_q + log_rest
    high = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    low = tl.minimum(a, b)
    return tl.where(high == -float("inf"), high, high + tl.log(1.0 + tl.exp(low - high)))


@triton.jit
def _times(p, log_p, value):
    """p * value, 0 where p is impossible whatever value is."""
    return p * tl.where(log_p == -float("inf"), 0.0, value)


@triton.jit
def _log_softmax(row_ptr, col, view, shift, log_total):
    z, _ = block_z(row_ptr, col, -1, 0.0, view)
    return (z - shift) - log_total


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
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    inverse_temperature = 1.0 / load_or(temperature_ptr, row, 1.0)
    view = View(None, None, inverse_temperature, vocab)
    student_row = logits_ptr + row * stride
    teacher_row = teacher_ptr + row * teacher_stride
    # First pass: log-sum-exp of both rows.
    m_q = -float("inf")
    m_p = -float("inf")
    sum_q = tl.zeros([BLOCK], tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        z_q, _ = block_z(student_row, col, -1, 0.0, view)
        z_p, _ = block_z(teacher_row, col, -1, 0.0, view)
        m_q, _, factor_q, _, e_q = shifted(m_q, z_q)
        m_p, _, factor_p, _, e_p = shifted(m_p, z_p)
        sum_q = sum_q * factor_q + e_q
        sum_p = sum_p * factor_p + e_p
    log_total_q = tl.log(tl.sum(sum_q, 0))
    log_total_p = tl.log(tl.sum(sum_p, 0))

    # Second pass, from the end: the divergence, and sum q f of the gradient q * (f - sum q f), f its derivative by q.
    blocks = tl.cdiv(vocab, BLOCK)
    value = tl.zeros([BLOCK], tl.float32)
    mean_slope = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, blocks, num_stages=STAGES):
        col = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        log_q = _log_softmax(student_row, col, view, m_q, log_total_q)
        log_p = _log_softmax(teacher_row, col, view, m_p, log_total_p)
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        if KIND == "forward_kl":
            value += _times(p, log_p, log_p - log_q)
        elif KIND == "reverse_kl":
            value += _times(q, log_q, log_q - log_p)
        else:
            log_m = _log_mixture(log_p, log_q, log_share, log_rest)
            to_m = _times(p, log_p, log_p - log_m)
            if KIND == "jsd":
                from_student = _times(q, log_q, log_q - log_m)
                value += share * to_m + (1.0 - share) * from_student
                mean_slope += (1.0 - share) * from_student
            else:
                value += to_m
                mean_slope -= (1.0 - share) * _times(q, log_q, tl.exp(log_p - log_m))
    total = tl.sum(value, 0)
    tl.store(value_ptr + row, total)

    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row) * inverse_temperature
        middle = total
        if KIND == "jsd" or KIND == "skew_kl":
            middle = tl.sum(mean_slope, 0)
        for start in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            col = start + tl.arange(0, BLOCK)
            log_q = _log_softmax(student_row, col, view, m_q, log_total_q)
            log_p = _log_softmax(teacher_row, col, view, m_p, log_total_p)
            q = tl.exp(log_q)
            if KIND == "forward_kl":
                dz = q - tl.exp(log_p)
            else:
                if KIND == "reverse_kl":
                    slope = log_q - log_p
                else:
                    log_m = _log_mixture(log_p, log_q, log_share, log_rest)
                    if KIND == "jsd":
                        slope = (1.0 - share) * (log_q - log_m)
                    else:
                        slope = -(1.0 - share) * tl.exp(log_p - log_m)
                dz = _times(q, log_q, slope - middle)
            tl.store(student_row + col, (dz * scale).to(logits_ptr.dtype.element_ty), mask=col < vocab)


def divergence_(
    logits: Tensor,
    teacher_logits: Tensor,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor | None,
) -> Tensor:
    """Divergence [n] of teacher from student; kinds as in linear_divergence.

    Where scale [n] is given, logits become scale times its gradient with respect to them; else they are only read.
    """
    if kind not in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        raise ValueError(f"kind: expected 'forward_kl', 'reverse_kl', 'jsd' or 'skew_kl', got {kind!r}")
    check_logits("teacher_logits", teacher_logits, logits)
    vectors = row_vectors(logits, temperature=temperature, scale=scale)
    value = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        share = float({"jsd": 0.5, "skew_kl": 0.1}.get(kind, 0.5) if alpha is None else alpha)
        arguments = [logits, teacher_logits, *vectors, value, logits.stride(0), teacher_logits.stride(0)]
        arguments += [logits.shape[1], share, math.log(share), math.log1p(-share), kind]
        launch(_divergence_kernel, logits, arguments, two_rows=True)
    return value
