"""Device functions of the Triton row back end: z of a block, the pass that reads a row, the one that writes.

The first pass keeps a running maximum m and, per lane, the sums of e, e*(z - m) and e*((z - m) - log r) with
e = exp(z - m), so that no digits are lost to an offset that all logits share; log-sum-exp, entropy and the exact KL
follow from them. The second pass walks the row from its end, which the cache still holds, and writes the gradient over
the logits. Everything after a load is float32. What is None in a record is left out when a kernel is compiled.

Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867), carried over to entropy and KL.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """How z is made of a row's logits. What is None is left out when the kernel is compiled."""

    bias_ptr: Any
    softcap: Any
    inverse_temperature: Any
    vocab: Any


class Target(NamedTuple):
    """Column of a row's target, its logit without bias, its z. Out of range: column -1 and z NaN."""

    col: Any
    logit: Any
    z: Any


class Ref(NamedTuple):
    """The reference head's logits (None: there is none), where this row begins, its log-sum-exp and log-prob."""

    ptr: Any
    offset: Any
    lse: Any
    logp: Any
    view: Any


class Row(NamedTuple):
    """What the first pass finds. The log-sum-exp is shift + log_total, kept apart because their sum loses digits."""

    logp: Any
    entropy: Any
    full_kl: Any
    shift: Any
    log_total: Any


@triton.jit
def _tanh(x):
    """tanh(x) and its derivative, without overflow, and without cancellation for small and for large x."""
    e = tl.exp(-2.0 * tl.abs(x))
    large = 1.0 - 2.0 * e / (1.0 + e)
    # Fitted to (tanh(x) - x) / x^3 for |x| < 0.65; the relative error of tanh is 7e-9.
    u = x * x
    p = -0.005501060856 * u + 0.02045441767
    p = p * u - 0.05368245329
    p = p * u + 0.1333074709
    p = p * u - 0.3333325581
    tanh = tl.where(tl.abs(x) < 0.6, x + x * u * p, tl.where(x < 0, -large, large))
    return tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _z(x, col, view):
    """z of raw logits x at columns col, and dz/dx."""
    slope = view.inverse_temperature
    if view.bias_ptr is not None:
        x += tl.load(view.bias_ptr + col, mask=(col >= 0) & (col < view.vocab), other=0.0)
    if view.softcap is not None:
        tanh, tanh_slope = _tanh(x / view.softcap)
        x = view.softcap * tanh
        slope = slope * tanh_slope
    return x * view.inverse_temperature, slope


@triton.jit
def block_z(row_ptr, col, target_col, target_logit, view):
    """z of a block of a row and dz/dlogit. The target's logit is replaced; columns beyond the row give -inf."""
    inside = col < view.vocab
    x = tl.load(row_ptr + col, mask=inside, other=-float("inf")).to(tl.float32)
    z, slope = _z(tl.where(col == target_col, target_logit, x), col, view)
    # A softcap has made the -inf beyond the row finite.
    return tl.where(inside, z, -float("inf")), slope


@triton.jit
def _log_r(ref, col, target_col):
    """log-probabilities of the reference head in a block."""
    z, _ = block_z(ref.ptr + ref.offset, col, -1, 0.0, ref.view)
    return tl.where(col == target_col, ref.logp, z - ref.lse)


@triton.jit
def shifted(m, z):
    """Of a block z and the maximum m so far: the new maximum, m less that, exp of it, z less that, exp of it."""
    m_new = tl.maximum(m, tl.max(z, 0))
    # Where nothing but -inf was seen yet, 0 stands in for the maximum: -inf - -inf would be NaN.
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    distance = tl.where(m == -float("inf"), 0.0, m - shift)
    d = z - shift
    return m_new, distance, tl.exp(distance), d, tl.exp(d)


@triton.jit
def load_or(ptr, index, default):
    value = default
    if ptr is not None:
        value = tl.load(ptr + index)
    return value


@triton.jit
def target_of_row(row, targets_ptr, target_logit_ptr, view):
    """Target of one row."""
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < view.vocab)
    col = tl.where(valid, target, -1).to(tl.int32)
    logit = tl.load(target_logit_ptr + row)
    z, _ = _z(logit, col, view)
    return Target(col, logit, tl.where(valid, z, float("nan")))


@triton.jit
def first_pass(logits_row, ref, target, view, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Row of one row of logits."""
    m = -float("inf")
    sum_e = tl.zeros([BLOCK], tl.float32)
    sum_ed = tl.zeros([BLOCK], tl.float32)
    sum_ew = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, view.vocab, BLOCK, num_stages=STAGES):
        col = start + tl.arange(0, BLOCK)
        z, _ = block_z(logits_row, col, target.col, target.logit, view)
        m, distance, factor, d, e = shifted(m, z)
        # What was summed as e*(z - m_old) becomes e*(z - m): the distance enters as often as the sum of e says. A
        # probability of 0 adds nothing, whatever its logarithm is.
        if ref.ptr is not None:
            w = tl.where(e == 0.0, 0.0, d - _log_r(ref, col, target.col))
            sum_ew = (sum_ew + sum_e * distance) * factor + e * w
        sum_ed = (sum_ed + sum_e * distance) * factor + e * tl.where(e == 0.0, 0.0, d)
        sum_e = sum_e * factor + e
    total = tl.sum(sum_e, 0)
    log_total = tl.log(total)
    shift = tl.where(m == -float("inf"), 0.0, m)
    logp = (target.z - shift) - log_total
    # Not tl.minimum: on a GPU it turns NaN into 0.
    logp = tl.where(logp > 0.0, 0.0, logp)
    entropy = log_total - tl.sum(sum_ed, 0) / total
    return Row(logp, entropy, tl.sum(sum_ew, 0) / total - log_total, shift, log_total)


@triton.jit
def second_pass(
    logits_row,
    ref,
    target,
    view,
    found,
    slopes,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Logits become their gradient, from the end of the row. slopes: derivatives by logp, entropy and full KL."""
    g_logp, g_entropy, g_full_kl = slopes
    blocks = tl.cdiv(view.vocab, BLOCK)
    for i in tl.range(0, blocks, num_stages=STAGES):
        col = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z, slope = block_z(logits_row, col, target.col, target.logit, view)
        log_p = tl.where(col == target.col, found.logp, (z - found.shift) - found.log_total)
        p = tl.exp(log_p)
        dz = -g_logp * p
        if HAS_ENTROPY:
            dz -= g_entropy * (p * tl.where(p == 0.0, 0.0, log_p + found.entropy))
        if HAS_FULL_KL:
            log_r = _log_r(ref, col, target.col)
            dz += g_full_kl * (p * tl.where(p == 0.0, 0.0, log_p - log_r - found.full_kl))
        dz = tl.where(col == target.col, dz + g_logp, dz) * slope
        tl.store(logits_row + col, dz.to(logits_row.dtype.element_ty), mask=col < view.vocab)
