"""Device functions of the Triton row back end: the pass that reads a row, and the pass that writes its gradient.

    u = cap(logit + bias)    z = u / temperature    d = (u - top) * log2(e) / temperature    e = 2^d

In the first pass, each thread keeps a running maximum of u (`top`) and the sums of e, e*d and, with a reference,
e*(d*ln 2 - log r). The threads are combined once, after the loop, so the loop has no barrier. Log-sum-exp, entropy and
the exact KL follow from the sums, so an offset that all logits share does not reduce the precision. The second pass
starts at the end of the row, which is still in the cache, and overwrites the logits with their gradient. All arithmetic
after a load is float32.

The target's rounded logit is never used. Before the first pass, `hide_target` replaces it in memory by -inf, so that it
does not contribute to the sums; its exact logit is added to them later. Its gradient is a single store after the second
pass, which overwrites the value written by that pass.

Whole blocks are read without a mask, and the tail of a row with a mask. If a field of a record is None, its code is
removed when the kernel is compiled.

Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867), extended to entropy and KL.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below every logit except -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Up to this size of u * log2(e) / temperature, the rounding error of that product is far below the largest exponent.
LARGEST_PRODUCT = tl.constexpr(1e9)
# Replaces base-2 logarithms whose power is 0 in float32, in products with that 0, because -inf would give NaN.
LOG_OF_ZERO = tl.constexpr(-1e3)
# Triton's exp2 takes three more instructions to handle results below 2^-126. The interpreter cannot run assembly.
HAS_ASM = tl.constexpr(not triton.knobs.runtime.interpret)


class View(NamedTuple):
    """The parameters of z for a row. If a field is None, its code is removed when the kernel is compiled."""

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
    """Results of the first pass: log p = (u - top) / temperature - log_total. top is the largest u, or a likely one."""

    logp: Any
    entropy: Any
    full_kl: Any
    top: Any
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
    """Return tanh(x) and its derivative, without overflow or cancellation for small or large x."""
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
    """Return u of a block, and du/dlogit (1.0 without a softcap). u is -inf beyond the row and for logits of -inf.

    hidden_col: a column whose logit is -inf in memory, which a softcap would make finite.
    """
    u = _columns(row_ptr, col, view.vocab, -float("inf"), MASKED)
    slope = 1.0
    if view.bias_ptr is not None:
        u += _columns(view.bias_ptr, col, view.vocab, 0.0, MASKED)
    if view.softcap is not None:
        tanh, slope = _tanh(u / view.softcap)
        # The softcap makes the -inf of hidden columns finite, so they are reset.
        u = tl.where((col < view.vocab) & (col != hidden_col), view.softcap * tanh, -float("inf"))
    return u, slope


@triton.jit
def log_r(ref, col, MASKED: tl.constexpr):
    """Return the log-probabilities of the reference head in a block."""
    u, _ = block_u(ref.ptr + ref.offset, col, -1, ref.view, MASKED)
    return tl.fma(u, ref.view.inverse_temperature, -ref.lse)


@triton.jit
def ref_of_row(row, ref_ptr, ref_stride, ref_lse_ptr, ref_logp_ptr, ref_bias_ptr, view):
    """Return the Ref of one row."""
    ref_view = View(ref_bias_ptr, view.softcap, view.inverse_temperature, view.vocab)
    lse, logp = load_or(ref_lse_ptr, row, 0.0), load_or(ref_logp_ptr, row, 0.0)
    return Ref(ref_ptr, row * ref_stride, lse, logp, ref_view)


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
def online(top, total, u, scale):
    """Add a block, u as [threads, columns of a thread], to each thread's maximum and sum.

    Return the new top, the distance of the old one from it, 2^distance, d and e of the block, and the new sum of e.
    """
    new = tl.maximum(top, tl.max(u, 1))
    distance = tl.maximum((top - new) * scale, LOG_OF_ZERO)
    factor = exp2(distance)
    # Do not use a single multiply-add with a product of top and scale: where u is top, d would be its rounding error.
    d = (u - new[:, None]) * scale
    e = exp2(d)
    return new, distance, factor, d, e, total * factor + tl.sum(e, 1)


@triton.jit
def moment(old, total, distance, factor, e, values):
    """Add a block to each thread's sum of e*value, where values are relative to top and total is the sum of e.

    If e is 0, the value may be any finite number.
    """
    return (old + total * distance) * factor + tl.sum(e * values, 1)


@triton.jit
def _read_block(
    top, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, col, LANE: tl.constexpr, MASKED: tl.constexpr
):
    shape: tl.constexpr = [col.shape[0] // LANE, LANE]
    u, _ = block_u(logits_row, col, target.col, view, MASKED)
    new, distance, factor, d, e, new_total = online(top, total, tl.reshape(u, shape), scale)
    # Only this copy of d is bounded, not the argument of exp2: a NaN must reach the sum of e.
    sum_ed = moment(sum_ed, total, distance, factor, e, tl.maximum(d, LOG_OF_ZERO))
    if ref.ptr is not None:
        # A probability of 0 contributes nothing, even if its logarithm is -inf.
        w = tl.where(e == 0.0, 0.0, tl.fma(d, LN2, -tl.reshape(log_r(ref, col, MASKED), shape)))
        sum_ew = moment(sum_ew, total, distance * LN2, factor, e, w)
    return new, new_total, sum_ed, sum_ew


@triton.jit
def first_pass(logits_row, ref, target, view, BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr):
    """Return the Row of one row of logits whose target is hidden."""
    scale = view.inverse_temperature * LOG2E
    tops = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    sum_ed = tl.zeros([BLOCK // LANE], tl.float32)
    sum_ew = tl.zeros([BLOCK // LANE], tl.float32)
    offsets = tl.arange(0, BLOCK)
    whole = view.vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        tops, total, sum_ed, sum_ew = _read_block(
            tops, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, start + offsets, LANE, False
        )
    if whole < view.vocab:
        tops, total, sum_ed, sum_ew = _read_block(
            tops, total, sum_ed, sum_ew, logits_row, ref, target, view, scale, whole + offsets, LANE, True
        )
    # Rescale the sums of all threads and of the target to a common top.
    top = tl.maximum(tl.max(tops, 0), target.u)
    distance = tl.maximum((tops - top) * scale, LOG_OF_ZERO)
    factor = exp2(distance)
    d = (target.u - top) * scale
    e = exp2(d)
    all_total = tl.sum(total * factor, 0) + e
    all_ed = tl.sum((sum_ed + total * distance) * factor, 0) + e * tl.maximum(d, LOG_OF_ZERO)
    log_total = tl.log2(all_total)
    logp = (d - log_total) * LN2
    # tl.minimum would convert NaN to 0 on a GPU.
    logp = tl.where(target.valid, tl.where(logp > 0.0, 0.0, logp), float("nan"))
    entropy = (log_total - all_ed / all_total) * LN2
    full_kl = 0.0
    if ref.ptr is not None:
        w = tl.where(e == 0.0, 0.0, e * (d * LN2 - ref.logp))
        all_ew = tl.sum((sum_ew + total * (distance * LN2)) * factor, 0) + w
        full_kl = all_ew / all_total - log_total * LN2
    return Row(logp, entropy, full_kl, top, log_total * LN2)


@triton.jit
def _write_block(
    logits_row,
    ref,
    target,
    view,
    scale,
    row,
    terms,
    col,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    FAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    constant, of_log_p, of_log_r, product = terms
    u, slope = block_u(logits_row, col, target.col, view, MASKED)
    if FAST:
        dz = exp2(tl.fma(u, scale, -product)) * constant
    else:
        log_p = tl.fma(u - row.top, view.inverse_temperature, -row.log_total)
        p = exp2(log_p * LOG2E)
        if HAS_ENTROPY or HAS_FULL_KL:
            dz = p * tl.fma(tl.maximum(log_p, LOG_OF_ZERO), of_log_p, constant)
            if HAS_FULL_KL:
                dz = tl.where(p == 0.0, dz, dz - of_log_r * (p * log_r(ref, col, MASKED)))
        else:
            dz = p * constant
    if view.softcap is not None:
        dz *= slope
    dz = dz.to(logits_row.dtype.element_ty)
    if MASKED:
        tl.store(logits_row + col, dz, mask=col < view.vocab)
    else:
        tl.store(logits_row + col, dz)


@triton.jit
def _write_row(
    logits_row,
    ref,
    target,
    view,
    scale,
    row,
    terms,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    blocks = view.vocab // BLOCK
    if blocks * BLOCK < view.vocab:
        col = blocks * BLOCK + offsets
        _write_block(logits_row, ref, target, view, scale, row, terms, col, HAS_ENTROPY, HAS_FULL_KL, FAST, True)
    for i in tl.range(0, blocks, num_stages=STAGES):
        col = (blocks - 1 - i) * BLOCK + offsets
        _write_block(logits_row, ref, target, view, scale, row, terms, col, HAS_ENTROPY, HAS_FULL_KL, FAST, False)


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
    FAST: tl.constexpr = False,
):
    """Overwrite logits with their gradient, from the end of the row. slopes: d loss / d (logp, entropy, full KL).

    FAST: use one instruction less per logit; only for logits of moderate size, without entropy and full KL.
    """
    g_logp, g_entropy, g_full_kl = slopes
    scale = view.inverse_temperature * LOG2E
    # dz = p * (-g_logp - g_entropy * (log p + H) + g_full_kl * (log p - log r - KL)).
    of_log_p = 0.0
    constant = -g_logp
    if HAS_ENTROPY:
        of_log_p -= g_entropy
        constant -= g_entropy * row.entropy
    if HAS_FULL_KL:
        of_log_p += g_full_kl
        constant -= g_full_kl * row.full_kl
    constant *= view.inverse_temperature
    terms = (constant, of_log_p * view.inverse_temperature, g_full_kl * view.inverse_temperature, 0.0)
    if FAST:
        product = row.top * scale
        if tl.abs(product) < LARGEST_PRODUCT:
            # The sum of e is relative to top, and the product is rounded.
            error = tl.fma(row.top, scale, -product)
            fast = (constant * exp2(-row.log_total * LOG2E - error), 0.0, 0.0, product)
            _write_row(logits_row, ref, target, view, scale, row, fast, False, False, True, BLOCK, STAGES)
        else:
            _write_row(logits_row, ref, target, view, scale, row, terms, False, False, False, BLOCK, STAGES)
    else:
        _write_row(logits_row, ref, target, view, scale, row, terms, HAS_ENTROPY, HAS_FULL_KL, False, BLOCK, STAGES)
    p = tl.exp(row.logp)
    # 1 - p, without the loss of precision of the difference where p is near 1.
    half, _ = _tanh(0.5 * row.logp)
    dz = g_logp * (-2.0 * half / (1.0 - half))
    if HAS_ENTROPY:
        dz -= tl.where(p == 0.0, 0.0, g_entropy * p * (row.logp + row.entropy))
    if HAS_FULL_KL:
        dz += tl.where(p == 0.0, 0.0, g_full_kl * p * (row.logp - ref.logp - row.full_kl))
    put_target(logits_row, target, dz * view.inverse_temperature * target.du)
