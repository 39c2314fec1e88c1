"""Triton kernels of the discriminator's losses; formulas and launches are in `triton_loss`.

If an optional pointer or number is None, its code is removed when the kernel is compiled. The kernels do not specialize
on sizes that change per batch. All arithmetic after a load is float32.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Recorded configurations, chosen from the compiler's register counts, not from measurements. Beyond ONE_PROGRAM_ROWS,
# gathering the rows on one SM takes longer than a second launch.
ONE_PROGRAM_ROWS = 128
TILE_ROWS = 16
ROW_BLOCK_D = 512
SCORE_BLOCK = 32
PAIR_BLOCK = 256
WARPS = 16
ROWS_WARPS = 4
GRAD_ROWS = 64
GRAD_BLOCK_D = 64
GRAD_WARPS = 8

SIZES = ["students", "teachers", "pairs", "count", "tokens"]
# These may be slices of longer vectors, so the kernels do not specialize on their alignment.
UNALIGNED = [
    "last_index_ptr",
    "scores_ptr",
    "saved_ptr",
    "student_ptr",
    "teacher_ptr",
    "student_index_ptr",
    "teacher_index_ptr",
    "quality_ptr",
    "pair_weight_ptr",
    "normalizer_ptr",
    "l2_normalizer_ptr",
    "bias_ptr",
    "score_grad_ptr",
    "grad_loss_ptr",
    "loss_ptr",
    "accuracy_ptr",
    "margin_ptr",
]


class _Pairs(NamedTuple):
    """The pairs, and the scores that they index."""

    student_ptr: Any
    teacher_ptr: Any
    students: Any
    teachers: Any
    student_index_ptr: Any
    teacher_index_ptr: Any
    quality_ptr: Any
    weight_ptr: Any
    count: Any


class _Head(NamedTuple):
    """Packed hidden states and the value head on them."""

    hidden_ptr: Any
    index_ptr: Any
    weight_ptr: Any
    bias_ptr: Any
    norm_ptr: Any
    eps: Any
    count: Any
    tokens: Any
    stride: Any
    dim: Any


@triton.jit
def _load_float(ptr, index, mask):
    return tl.load(ptr + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_starts(index_ptr, i, count, tokens, stride):
    """Return each response's row (-1 beyond the last response), whether hidden has this row, and its offset."""
    index = tl.load(index_ptr + i, mask=i < count, other=-1)
    valid = (index >= 0) & (index < tokens)
    return index, valid, tl.where(valid, index, 0) * stride


@triton.jit
def _store_scores(head, first, scores_ptr, saved_ptr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store scores of ROWS responses; with a norm also rstd and rstd^2 * (score - bias) / D, for backward."""
    i = first + tl.arange(0, ROWS)
    _, valid, start = _row_starts(head.index_ptr, i, head.count, head.tokens, head.stride)
    dots = tl.zeros([ROWS, BLOCK_D], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for begin in range(0, head.dim, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        inside = d < head.dim
        x = _load_float(head.hidden_ptr, start[:, None] + d[None, :], valid[:, None] & inside[None, :])
        weight = _load_float(head.weight_ptr, d, inside)
        if head.norm_ptr is not None:
            weight = weight * _load_float(head.norm_ptr, d, inside)
            squares += x * x
        dots += x * weight[None, :]
    score = tl.sum(dots, 1)
    if head.norm_ptr is not None:
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / head.dim + head.eps)
        score = score * rstd
        tl.store(saved_ptr + i, rstd, mask=i < head.count)
        tl.store(saved_ptr + head.count + i, rstd * rstd * score / head.dim, mask=i < head.count)
    if head.bias_ptr is not None:
        score += tl.load(head.bias_ptr).to(tl.float32)
    tl.store(scores_ptr + i, tl.where(valid, score, float("nan")), mask=i < head.count)


@triton.jit
def _log1p(e):
    """Return log(1 + e) for e in [0, 1] as 2 atanh(e / (2 + e)), with a relative error of 1e-9 also for small e."""
    s = e / (2.0 + e)
    u = s * s
    p = u / 15.0 + 1.0 / 13.0
    p = p * u + 1.0 / 11.0
    p = p * u + 1.0 / 9.0
    p = p * u + 1.0 / 7.0
    p = p * u + 0.2
    p = p * u + 1.0 / 3.0
    return 2.0 * s + 2.0 * s * u * p


@triton.jit
def _pair_block(pairs, p):
    """Load pairs p: student and teacher index, quality, weight (0 beyond the last pair), margin (NaN: bad index)."""
    inside = p < pairs.count
    s = tl.load(pairs.student_index_ptr + p, mask=inside, other=0)
    t = tl.load(pairs.teacher_index_ptr + p, mask=inside, other=0)
    valid = inside & (s >= 0) & (s < pairs.students) & (t >= 0) & (t < pairs.teachers)
    margin = _load_float(pairs.teacher_ptr, t, valid) - _load_float(pairs.student_ptr, s, valid)
    margin = tl.where(inside, tl.where(valid, margin, float("nan")), 0.0)
    weight = inside.to(tl.float32)
    if pairs.weight_ptr is not None:
        weight = _load_float(pairs.weight_ptr, p, inside)
    return s, t, _load_float(pairs.quality_ptr, p, inside), weight, margin


@triton.jit
def _divisor(value, normalizer, normalizer_ptr):
    """Return the normalizer if it is given, otherwise value; 0 becomes 1."""
    if normalizer_ptr is not None:
        value = tl.load(normalizer_ptr).to(tl.float32)
    elif normalizer is not None:
        value = normalizer + 0.0
    return tl.where(value == 0.0, 1.0, value)


@triton.jit
def _pair_losses(
    pairs,
    score_l2,
    normalizer,
    normalizer_ptr,
    l2_normalizer,
    l2_normalizer_ptr,
    loss_ptr,
    accuracy_ptr,
    margin_ptr,
    score_grad_ptr,
    SCORE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Store loss, accuracy and margin (first program only) and this program's share of the gradient of the scores."""
    losses = tl.zeros([PAIR_BLOCK], tl.float32)
    right = tl.zeros([PAIR_BLOCK], tl.float32)
    margins = tl.zeros([PAIR_BLOCK], tl.float32)
    weights = tl.zeros([PAIR_BLOCK], tl.float32)
    for begin in range(0, pairs.count, PAIR_BLOCK):
        _, _, quality, weight, margin = _pair_block(pairs, begin + tl.arange(0, PAIR_BLOCK))
        # -log sigmoid(margin). A NaN margin fails the comparison and stays NaN.
        softplus = tl.where(margin > 0.0, 0.0, -margin) + _log1p(tl.exp(-tl.abs(margin)))
        losses += softplus * quality * weight
        right += tl.where(margin > 0.0, weight, 0.0)
        margins += margin * weight
        weights += weight
    weight_sum = tl.sum(weights, 0)
    divisor = _divisor(weight_sum, normalizer, normalizer_ptr)
    shares = tl.where(weight_sum == 0.0, 1.0, weight_sum)
    loss = tl.sum(losses, 0) / divisor
    scores = pairs.students + pairs.teachers
    l2_slope = 0.0
    if score_l2 is not None:
        squares = tl.zeros([PAIR_BLOCK], tl.float32)
        for begin in range(0, scores, PAIR_BLOCK):
            j = begin + tl.arange(0, PAIR_BLOCK)
            score = _score_of(pairs, j)
            squares += score * score
        l2_divisor = _divisor(scores.to(tl.float32), l2_normalizer, l2_normalizer_ptr)
        loss += score_l2 * (tl.sum(squares, 0) / l2_divisor)
        l2_slope = 2.0 * score_l2 / l2_divisor
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, loss)
        tl.store(accuracy_ptr, tl.sum(right, 0) / shares)
        tl.store(margin_ptr, tl.sum(margins, 0) / shares)

    if score_grad_ptr is not None:
        for first in range(tl.program_id(0) * SCORE_BLOCK, scores, tl.num_programs(0) * SCORE_BLOCK):
            j = first + tl.arange(0, SCORE_BLOCK)
            gradient = tl.zeros([SCORE_BLOCK], tl.float32)
            for begin in range(0, pairs.count, PAIR_BLOCK):
                s, t, quality, weight, margin = _pair_block(pairs, begin + tl.arange(0, PAIR_BLOCK))
                # sigmoid(-margin): 0 where exp overflows.
                slope = quality * weight / (1.0 + tl.exp(margin))
                of_student = tl.where(j[:, None] == s[None, :], slope[None, :], 0.0)
                of_teacher = tl.where(j[:, None] == (pairs.students + t)[None, :], slope[None, :], 0.0)
                gradient += tl.sum(of_student - of_teacher, 1)
            gradient = gradient / divisor
            if score_l2 is not None:
                gradient += l2_slope * _score_of(pairs, j)
            tl.store(score_grad_ptr + j, gradient, mask=j < scores)


@triton.jit
def _score_of(pairs, j):
    """Load scores j of the concatenated students and teachers; 0 beyond the last score."""
    is_student = j < pairs.students
    is_teacher = (j >= pairs.students) & (j < pairs.students + pairs.teachers)
    student = _load_float(pairs.student_ptr, j, is_student)
    return student + _load_float(pairs.teacher_ptr, j - pairs.students, is_teacher)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def _rows_kernel(
    hidden_ptr,
    last_index_ptr,
    head_ptr,
    bias_ptr,
    norm_ptr,
    scores_ptr,
    saved_ptr,
    count,
    tokens,
    stride,
    dim,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the scores, ROWS responses per program."""
    head = _Head(hidden_ptr, last_index_ptr, head_ptr, bias_ptr, norm_ptr, eps, count, tokens, stride, dim)
    _store_scores(head, tl.program_id(0) * ROWS, scores_ptr, saved_ptr, ROWS, BLOCK_D)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def _pairs_kernel(
    student_ptr,
    teacher_ptr,
    student_index_ptr,
    teacher_index_ptr,
    quality_ptr,
    pair_weight_ptr,
    score_l2,
    normalizer,
    normalizer_ptr,
    l2_normalizer,
    l2_normalizer_ptr,
    loss_ptr,
    accuracy_ptr,
    margin_ptr,
    score_grad_ptr,
    students,
    teachers,
    pairs,
    SCORE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Compute the loss of the pairs. The programs divide the scores among them to compute the scores' gradient."""
    scores = (student_ptr, teacher_ptr, students, teachers)
    _pair_losses(
        _Pairs(*scores, student_index_ptr, teacher_index_ptr, quality_ptr, pair_weight_ptr, pairs),
        score_l2,
        normalizer,
        normalizer_ptr,
        l2_normalizer,
        l2_normalizer_ptr,
        loss_ptr,
        accuracy_ptr,
        margin_ptr,
        score_grad_ptr,
        SCORE_BLOCK,
        PAIR_BLOCK,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def _forward_kernel(
    hidden_ptr,
    last_index_ptr,
    head_ptr,
    bias_ptr,
    norm_ptr,
    scores_ptr,
    saved_ptr,
    student_index_ptr,
    teacher_index_ptr,
    quality_ptr,
    pair_weight_ptr,
    score_l2,
    normalizer,
    normalizer_ptr,
    l2_normalizer,
    l2_normalizer_ptr,
    loss_ptr,
    accuracy_ptr,
    margin_ptr,
    score_grad_ptr,
    students,
    teachers,
    pairs,
    tokens,
    stride,
    dim,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
):
    """Compute scores and loss in a single program."""
    count = students + teachers
    head = _Head(hidden_ptr, last_index_ptr, head_ptr, bias_ptr, norm_ptr, eps, count, tokens, stride, dim)
    for first in range(0, count, ROWS):
        _store_scores(head, first, scores_ptr, saved_ptr, ROWS, BLOCK_D)
    # The pairs read scores that other threads of this program wrote.
    tl.debug_barrier()
    _pair_losses(
        _Pairs(
            scores_ptr,
            scores_ptr + students,
            students,
            teachers,
            student_index_ptr,
            teacher_index_ptr,
            quality_ptr,
            pair_weight_ptr,
            pairs,
        ),
        score_l2,
        normalizer,
        normalizer_ptr,
        l2_normalizer,
        l2_normalizer_ptr,
        loss_ptr,
        accuracy_ptr,
        margin_ptr,
        score_grad_ptr,
        SCORE_BLOCK,
        PAIR_BLOCK,
    )


@triton.jit
def _clear_rows(out_ptr, index_ptr, count, tokens, dim, d, inside, ROWS: tl.constexpr):
    """Zero columns d of the rows at which no response ends. The programs of the second axis divide the rows."""
    for first in range(tl.program_id(1) * ROWS, tokens, tl.num_programs(1) * ROWS):
        row = first + tl.arange(0, ROWS)
        ends = tl.zeros([ROWS], tl.int32)
        for begin in range(0, count, ROWS):
            j = begin + tl.arange(0, ROWS)
            index = tl.load(index_ptr + j, mask=j < count, other=-1)
            ends += tl.sum((row[:, None] == index[None, :]).to(tl.int32), 1)
        empty = (row < tokens) & (ends == 0)
        out = out_ptr + row.to(tl.int64)[:, None] * dim + d[None, :]
        zero = tl.zeros([ROWS, 1], tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out, zero, mask=empty[:, None] & inside[None, :])


@triton.jit
def _row_gradients(
    head,
    saved_ptr,
    score_grad_ptr,
    grad_loss_ptr,
    d_hidden_ptr,
    d_head_ptr,
    d_bias_ptr,
    d_norm_ptr,
    d,
    inside,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store columns d of the gradients of the rows at which responses end, and of head, bias and norm."""
    factor = 1.0
    if grad_loss_ptr is not None:
        factor = tl.load(grad_loss_ptr).to(tl.float32)
    weight = _load_float(head.weight_ptr, d, inside)
    norm = tl.full([BLOCK_D], 1.0, tl.float32)
    if head.norm_ptr is not None:
        norm = _load_float(head.norm_ptr, d, inside)
    sum_gx = tl.zeros([BLOCK_D], tl.float32)
    sum_g = tl.zeros([ROWS], tl.float32)
    for first in range(0, head.count, ROWS):
        i = first + tl.arange(0, ROWS)
        index, valid, start = _row_starts(head.index_ptr, i, head.count, head.tokens, head.stride)
        g = _load_float(score_grad_ptr, i, i < head.count) * factor
        sum_g += g
        x = _load_float(head.hidden_ptr, start[:, None] + d[None, :], valid[:, None] & inside[None, :])
        rstd = tl.full([ROWS], 1.0, tl.float32)
        if head.norm_ptr is not None:
            rstd = _load_float(saved_ptr, i, i < head.count)
        sum_gx += tl.sum((g * rstd)[:, None] * x, 0)
        if d_hidden_ptr is not None:
            # Responses that end at the same row all write that row's whole gradient.
            shared = tl.zeros([ROWS], tl.float32)
            for begin in range(0, head.count, ROWS):
                j = begin + tl.arange(0, ROWS)
                others = tl.load(head.index_ptr + j, mask=j < head.count, other=-1)
                g_others = _load_float(score_grad_ptr, j, j < head.count) * factor
                shared += tl.sum(tl.where(index[:, None] == others[None, :], g_others[None, :], 0.0), 1)
            row = rstd[:, None] * (norm * weight)[None, :]
            if head.norm_ptr is not None:
                row -= x * _load_float(saved_ptr, head.count + i, i < head.count)[:, None]
            # hidden may be a view with gaps between its rows; d_hidden is contiguous.
            out = d_hidden_ptr + tl.where(valid, index, 0)[:, None] * head.dim + d[None, :]
            row = (shared[:, None] * row).to(d_hidden_ptr.dtype.element_ty)
            tl.store(out, row, mask=valid[:, None] & inside[None, :])
    if d_head_ptr is not None:
        tl.store(d_head_ptr + d, (sum_gx * norm).to(d_head_ptr.dtype.element_ty), mask=inside)
    if d_norm_ptr is not None:
        tl.store(d_norm_ptr + d, (sum_gx * weight).to(d_norm_ptr.dtype.element_ty), mask=inside)
    if d_bias_ptr is not None and tl.program_id(0) == 0:
        tl.store(d_bias_ptr, tl.sum(sum_g, 0).to(d_bias_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def _row_gradient_kernel(
    hidden_ptr,
    last_index_ptr,
    head_ptr,
    norm_ptr,
    saved_ptr,
    score_grad_ptr,
    grad_loss_ptr,
    d_hidden_ptr,
    d_head_ptr,
    d_bias_ptr,
    d_norm_ptr,
    count,
    tokens,
    stride,
    dim,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute BLOCK_D columns of the gradients from the scores' gradients; rows without a response get 0."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < dim
    if tl.program_id(1) == 0:
        _row_gradients(
            _Head(hidden_ptr, last_index_ptr, head_ptr, None, norm_ptr, 0.0, count, tokens, stride, dim),
            saved_ptr,
            score_grad_ptr,
            grad_loss_ptr,
            d_hidden_ptr,
            d_head_ptr,
            d_bias_ptr,
            d_norm_ptr,
            d,
            inside,
            ROWS,
            BLOCK_D,
        )
    if d_hidden_ptr is not None:
        _clear_rows(d_hidden_ptr, last_index_ptr, count, tokens, dim, d, inside, ROWS)
