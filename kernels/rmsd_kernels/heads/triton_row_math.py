"""Device functions of the Triton row back end: the pass that reads a row, and the pass that writes its gradient.

    u = cap(logit + bias)    z = u / temperature    d = z * log2(e) - shift    e = 2^d, the only exponential of a pass

In the first pass, each thread keeps a running maximum (`shift`) and the sums of e, e*d and, with a reference,
e*(d - log2 r). The threads are combined once, after the loop, so the loop has no barrier. Log-sum-exp, entropy and the
exact KL follow from the sums, so an offset that all logits share costs no digits. The second pass runs from the end of
the row, which is still in the cache, and overwrites the logits with their gradient. Everything after a load is float32.

The loops never process the target. `hide_target` replaces it in memory by -inf, so it adds nothing to the sums. Its
exact logit is added to them afterwards, and its gradient is a single store after the second pass.

Whole blocks are read without a mask, and the tail of a row with one. A field of a record that is None removes its code
when the kernel is compiled. Logits whose z * log2(e) is below -1e38 count as -inf.

Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867), extended to entropy and KL.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every other shift, and far enough from the limits of float32 that the distance to any shift is finite.
LOWEST = tl.constexpr(-1e38)
# Replaces log 0 in products with a probability of 0, which -inf would make NaN.
LOG_OF_ZERO = tl.constexpr(-1e30)
# Triton's exp2 takes three instructions more to handle results below 2^-126. The interpreter cannot run assembly.
HAS_ASM = tl.constexpr(not triton.knobs.runtime.interpret)


class View(NamedTuple):
    """The parameters of z for a row. A field that is None removes its code when the kernel is compiled."""

    bias_ptr: Any
    softcap: Any
    inverse_temperature: Any
    vocab: Any


class Target(NamedTuple):
    """Column of a row's target, and u of its exact logit. A target out of range has column -1 and u = -inf."""

    col: Any
    u: Any
    du: Any  # derivative of u with respect to the logit
    valid: Any


class Ref(NamedTuple):
    """The reference head's logits (None without a reference), the row's offset, log-sum-exp and log-prob."""

    ptr: Any
    offset: Any
    lse: Any
    logp: Any
    view: Any


class Row(NamedTuple):
    """Results of the first pass. shift + log_total is the base-2 log-sum-exp; adding the two would lose digits."""

    logp: Any
    entropy: Any
    full_kl: Any
    shift: Any
    log_total: Any


@triton.jit
def exp2(x):
    """Return 2^x, or 0 if the result is below 2^-126."""
    if HAS_ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _tanh(x):
    """Return tanh(x) and its derivative, without overflow and without cancellation for small or large x."""
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
def load_or(ptr, index, default):
    value = default
    if ptr is not None:
        value = tl.load(ptr + index)
    return value


@triton.jit
def _columns(ptr, col, vocab, other, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(ptr + col, mask=col < vocab, other=other)
    else:
        values = tl.load(ptr + col)
    return values.to(tl.float32)


@triton.jit
def block_u(row_ptr, col, hidden_col, view, MASKED: tl.constexpr):
    """Return u of a block, and du/dlogit (1.0 without a softcap). u is -inf beyond the row and at hidden_col."""
    u = _columns(row_ptr, col, view.vocab, -float("inf"), MASKED)
    slope = 1.0
    if view.bias_ptr is not None:
        u += _columns(view.bias_ptr, col, view.vocab, 0.0, MASKED)
    if view.softcap is not None:
        tanh, slope = _tanh(u / view.softcap)
        # The softcap makes the -inf of hidden columns finite, so they are set again.
        u = tl.where((col < view.vocab) & (col != hidden_col), view.softcap * tanh, -float("inf"))
    return u, slope


@triton.jit
def log2_r(ref, col, scale, MASKED: tl.constexpr):
    """Return the base-2 log-probabilities of the reference head in a block."""
    u, _ = block_u(ref.ptr + ref.offset, col, -1, ref.view, MASKED)
    return tl.fma(u, scale, -ref.lse * LOG2E)


@triton.jit
def target_of_row(row, targets_ptr, target_logit_ptr, view):
    """Return the Target of one row."""
    target = tl.load(targets_ptr + row)
    valid = (target >= 0) & (target < view.vocab)
    col = tl.where(valid, target, -1).to(tl.int32)
    u = tl.load(target_logit_ptr + row)
    slope = 1.0
    if view.bias_ptr is not None:
        u += tl.load(view.bias_ptr + tl.where(valid, col, 0))
    if view.softcap is not None:
        tanh, slope = _tanh(u / view.softcap)
        u = view.softcap * tanh
    return Target(col, tl.where(valid, u, -float("inf")), slope, valid)


@triton.jit
def hide_target(logits_row, target):
    """Replace the target's logit by -inf and return the previous value."""
    raw = tl.load(logits_row + target.col, mask=target.valid, other=0.0)
    tl.debug_barrier()
    tl.store(logits_row + target.col, -float("inf"), mask=target.valid)
    # Other threads read the -inf.
    tl.debug_barrier()
    return raw


@triton.jit
def put_target(logits_row, target, value):
    """Write the target's column, after all threads have finished their reads and writes of the row."""
    tl.debug_barrier()
    tl.store(logits_row + target.col, value.to(logits_row.dtype.element_ty), mask=target.valid)


@triton.jit
def online(shift, total, u, scale):
    """Add a block, u as [threads, columns of a thread], to each thread's maximum and sum.

    Return the new shift, old shift - new shift = distance, 2^distance, d and e of the block, and the new sum of e.
    """
    new = tl.maximum(shift, tl.max(u, 1) * scale)
    distance = shift - new
    factor = exp2(distance)
    d = tl.fma(u, scale, -new[:, None])
    e = exp2(d)
    return new, distance, factor, d, e, total * factor + tl.sum(e, 1)


@triton.jit
def moment(old, total, distance, factor, e, values):
    """Add a block to each thread's sum of e*value, where values are relative to the shift and total is the sum of e.

    If e is 0, the value may be any finite number.
    """
    return (old + total * distance) * factor + tl.sum(e * values, 1)


@triton.jit
def _read_block(
    shift, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, col, LANE: tl.constexpr, MASKED: tl.constexpr
):
    shape: tl.constexpr = [col.shape[0] // LANE, LANE]
    u, _ = block_u(logits_row, col, target.col, view, MASKED)
    new, distance, factor, d, e, new_total = online(shift, total, tl.reshape(u, shape), scale)
    # Only this copy of d is bounded, not the argument of exp2: a NaN must reach the sum of e.
    sum_ed = moment(sum_ed, total, distance, factor, e, tl.maximum(d, LOG_OF_ZERO))
    if ref.ptr is not None:
        # A probability of 0 adds nothing, even if its logarithm is -inf.
        w = tl.where(e == 0.0, 0.0, d - tl.reshape(log2_r(ref, col, scale, MASKED), shape))
        sum_ew = moment(sum_ew, total, distance, factor, e, w)
    return new, new_total, sum_ed, sum_ew


@triton.jit
def first_pass(logits_row, ref, target, view, BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr):
    """Return the Row of one row of logits whose target is hidden."""
    scale = view.inverse_temperature * LOG2E
    shift = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    sum_ed = tl.zeros([BLOCK // LANE], tl.float32)
    sum_ew = tl.zeros([BLOCK // LANE], tl.float32)
    offsets = tl.arange(0, BLOCK)
    whole = view.vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        shift, total, sum_ed, sum_ew = _read_block(
            shift, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, start + offsets, LANE, False
        )
    if whole < view.vocab:
        shift, total, sum_ed, sum_ew = _read_block(
            shift, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, whole + offsets, LANE, True
        )
    # Bring all threads and the target to one shift.
    top = tl.maximum(tl.max(shift, 0), target.u * scale)
    distance = shift - top
    factor = exp2(distance)
    d = tl.fma(target.u, scale, -top)
    e = exp2(d)
    all_total = tl.sum(total * factor, 0) + e
    all_ed = tl.sum((sum_ed + total * distance) * factor, 0) + e * tl.maximum(d, LOG_OF_ZERO)
    log_total = tl.log2(all_total)
    logp = (d - log_total) * LN2
    # tl.minimum would turn NaN into 0 on a GPU.
    logp = tl.where(target.valid, tl.where(logp > 0.0, 0.0, logp), float("nan"))
    entropy = (log_total - all_ed / all_total) * LN2
    full_kl = 0.0
    if ref.ptr is not None:
        w = tl.where(e == 0.0, 0.0, e * (d - ref.logp * LOG2E))
        all_ew = tl.sum((sum_ew + total * distance) * factor, 0) + w
        full_kl = (all_ew / all_total - log_total) * LN2
    return Row(logp, entropy, full_kl, top, log_total)


@triton.jit
def _write_block(
    logits_row,
    ref,
    target,
    view,
    scale,
    shift,
    terms,
    col,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    MASKED: tl.constexpr,
):
    constant, of_d, of_log_r = terms
    u, slope = block_u(logits_row, col, target.col, view, MASKED)
    d = tl.fma(u, scale, -shift)
    e = exp2(d)
    if HAS_ENTROPY or HAS_FULL_KL:
        dz = e * tl.fma(tl.maximum(d, LOG_OF_ZERO), of_d, constant)
        if HAS_FULL_KL:
            dz = tl.where(e == 0.0, dz, dz - of_log_r * (e * log2_r(ref, col, scale, MASKED)))
    else:
        dz = e * constant
    if view.softcap is not None:
        dz *= slope
    dz = dz.to(logits_row.dtype.element_ty)
    if MASKED:
        tl.store(logits_row + col, dz, mask=col < view.vocab)
    else:
        tl.store(logits_row + col, dz)


@triton.jit
def second_pass(
    logits_row,
    ref,
    target,
    view,
    row,
    slopes,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Overwrite logits with their gradient, from the end of the row. slopes: d loss / d (logp, entropy, full KL)."""
    g_logp, g_entropy, g_full_kl = slopes
    scale = view.inverse_temperature * LOG2E
    # dz = p * (-g_logp - g_entropy * (log p + H) + g_full_kl * (log p - log r - KL)), and p = e / total.
    of_log_p = 0.0
    constant = -g_logp
    if HAS_ENTROPY:
        of_log_p -= g_entropy
        constant -= g_entropy * row.entropy
    if HAS_FULL_KL:
        of_log_p += g_full_kl
        constant -= g_full_kl * row.full_kl
    inverse_total = exp2(-row.log_total) * view.inverse_temperature
    terms = (
        (constant - of_log_p * (row.log_total * LN2)) * inverse_total,
        of_log_p * LN2 * inverse_total,
        g_full_kl * LN2 * inverse_total,
    )
    offsets = tl.arange(0, BLOCK)
    blocks = view.vocab // BLOCK
    if blocks * BLOCK < view.vocab:
        col = blocks * BLOCK + offsets
        _write_block(logits_row, ref, target, view, scale, row.shift, terms, col, HAS_ENTROPY, HAS_FULL_KL, True)
    for i in tl.range(0, blocks, num_stages=STAGES):
        col = (blocks - 1 - i) * BLOCK + offsets
        _write_block(logits_row, ref, target, view, scale, row.shift, terms, col, HAS_ENTROPY, HAS_FULL_KL, False)
    p = tl.exp(row.logp)
    dz = g_logp - g_logp * p
    if HAS_ENTROPY:
        dz -= tl.where(p == 0.0, 0.0, g_entropy * p * (row.logp + row.entropy))
    if HAS_FULL_KL:
        dz += tl.where(p == 0.0, 0.0, g_full_kl * p * (row.logp - ref.logp - row.full_kl))
    put_target(logits_row, target, dz * view.inverse_temperature * target.du)
