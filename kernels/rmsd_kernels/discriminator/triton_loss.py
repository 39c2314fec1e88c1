"""The discriminator's losses in Triton for CUDA tensors, with the same function names as `reference`.

    n = row * rsqrt(mean(row^2) + eps) * norm_weight       (row itself without norm_weight)
    score = sum(n * head) + bias                            row = hidden[last_index]
    loss = sum(w * q * softplus(S - T)) / normalizer + score_l2 * sum(score^2) / l2_normalizer

For up to ONE_PROGRAM_ROWS responses, forward is a single program. It computes the scores, then the pairs, and from the
pairs also the gradient of the loss with respect to each score. Backward is one launch over blocks of D, which also
zeroes the rows of d_hidden at which no response ends. Sums run in float32 and in a fixed order, without atomics. If
several responses end at the same row, each of them writes the sum of their gradients there. Latency dominates: about
2*(S+R)*D*itemsize bytes are moved, and T*D*itemsize bytes for d_hidden.

An index out of range gives NaN and is never dereferenced. Importing this module imports triton. If TRITON_INTERPRET=1
is set before the import, the kernels run on CPU tensors.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ..ops import first_order
from ..triton_launch import DTYPES, device_of
from .reference import DiscriminatorLoss, DiscriminatorOutput
from .triton_kernels import (
    GRAD_BLOCK_D,
    GRAD_ROWS,
    GRAD_WARPS,
    ONE_PROGRAM_ROWS,
    PAIR_BLOCK,
    ROW_BLOCK_D,
    ROWS_WARPS,
    SCORE_BLOCK,
    TILE_ROWS,
    WARPS,
    _forward_kernel,
    _pairs_kernel,
    _row_gradient_kernel,
    _rows_kernel,
)

# Number of programs per block of columns that zero rows, each a series of tiles. With 40 blocks of columns (D = 2560)
# this is about 5 programs per SM. With one program per tile, each program would wait for its indices before its only
# store.
_MOST_TILES = 16
_LIBRARY = torch.library.Library("rmsd_kernels", "FRAGMENT")
_HEAD = "Tensor hidden, Tensor last_index, Tensor head"
_PAIRS = "Tensor student_index, Tensor teacher_index, Tensor quality, Tensor? pair_weight, float score_l2, "
_PAIRS += "float? normalizer, Tensor? normalizer_tensor, float? l2_normalizer, Tensor? l2_normalizer_tensor"


def last_token_values(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Compute reference.last_token_values, [B], float32."""
    return _LastTokenValues.apply(hidden, last_index, weight, bias, norm_weight, float(norm_eps))


def pairwise_discriminator_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorLoss:
    """Compute reference.pairwise_discriminator_loss, float32 scalars."""
    numbers = (*_number(normalizer), *_number(l2_normalizer))
    pairs = (student_index, teacher_index, quality, pair_weight, float(score_l2), *numbers)
    return DiscriminatorLoss(*_Pairwise.apply(student_scores, teacher_scores, *pairs))


def discriminator_loss(
    hidden: Tensor,
    last_index: Tensor,
    head: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    *,
    num_students: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    pair_weight: Tensor | None = None,
    score_l2: float = 0.0,
    normalizer: float | Tensor | None = None,
    l2_normalizer: float | Tensor | None = None,
) -> DiscriminatorOutput:
    """Compute reference.discriminator_loss in float32."""
    numbers = (*_number(normalizer), *_number(l2_normalizer))
    pairs = (student_index, teacher_index, quality, pair_weight, float(score_l2), *numbers)
    head_arguments = (hidden, last_index, head, bias, norm_weight, float(norm_eps))
    return DiscriminatorOutput(*_Discriminator.apply(*head_arguments, num_students, *pairs))


def _number(value: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """Return a normalizer as two arguments for the ops: number, tensor."""
    if isinstance(value, Tensor):
        return None, value.detach()
    return (None if value is None else float(value)), None


class _LastTokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, last_index, weight, bias, norm_weight, norm_eps):
        values, saved = torch.ops.rmsd_kernels.last_token_values_forward(
            hidden, last_index, weight, bias, norm_weight, norm_eps
        )
        ctx.save_for_backward(hidden, last_index, weight, bias, norm_weight, saved)
        return values

    @staticmethod
    @first_order
    def backward(ctx, grad_values):
        needed = ctx.needs_input_grad
        hidden, head, bias, norm = _head_gradients(ctx.saved_tensors, grad_values, None, needed[0], *needed[2:5])
        return hidden, None, head, bias, norm, None


class _Discriminator(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, last_index, head, bias, norm_weight, norm_eps, num_students, *pairs):
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:5])
        loss, accuracy, margin, scores, score_grad, saved = torch.ops.rmsd_kernels.discriminator_forward(
            hidden, last_index, head, bias, norm_weight, norm_eps, num_students, *pairs, any(needed)
        )
        ctx.save_for_backward(hidden, last_index, head, bias, norm_weight, saved, score_grad)
        ctx.mark_non_differentiable(accuracy, margin, scores)
        # Materializing zero gradients of the other three outputs would need an additional launch each.
        ctx.set_materialize_grads(False)
        return loss, accuracy, margin, scores

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, *_):
        needed = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * len(needed)
        *saved, score_grad = ctx.saved_tensors
        hidden, head, bias, norm = _head_gradients(saved, score_grad, grad_loss, needed[0], *needed[2:5])
        return hidden, None, head, bias, norm, *([None] * 11)


class _Pairwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_scores, teacher_scores, *pairs):
        loss, accuracy, margin, score_grad = torch.ops.rmsd_kernels.pairwise_discriminator_forward(
            student_scores, teacher_scores, *pairs, any(ctx.needs_input_grad[:2])
        )
        ctx.save_for_backward(score_grad)
        ctx.dtypes, ctx.split = (student_scores.dtype, teacher_scores.dtype), student_scores.shape[0]
        ctx.mark_non_differentiable(accuracy, margin)
        ctx.set_materialize_grads(False)
        return loss, accuracy, margin

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, *_):
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        gradient = ctx.saved_tensors[0] * grad_loss
        parts = (gradient[: ctx.split], gradient[ctx.split :])
        wanted = zip(parts, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        return *(part.to(dtype) if need else None for part, dtype, need in wanted), *([None] * 9)


def _head_gradients(saved, score_grad, grad_loss, *needed: bool) -> list[Tensor | None]:
    """Return gradients of hidden, head, bias and norm_weight; None for inputs that are None or need no gradient."""
    hidden, last_index, head, bias, norm_weight, stats = saved
    gradients = torch.ops.rmsd_kernels.discriminator_backward(
        score_grad, grad_loss, hidden, last_index, head, bias, norm_weight, stats, *needed
    )
    present = (True, True, bias is not None, norm_weight is not None)
    return [g if need and has else None for g, need, has in zip(gradients, needed, present, strict=True)]


def last_token_values_forward(
    hidden: Tensor, last_index: Tensor, head: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """Return the scores [B], and the norm's statistics for backward [2, B] ([2, 0] without a norm). One launch."""
    hidden, vectors = _head_arguments(hidden, last_index, head, bias, norm_weight)
    scores, saved = _row_outputs(hidden, last_index, norm_weight)
    _launch_rows(hidden, vectors, scores, saved, norm_eps)
    return scores, saved


def discriminator_forward(
    hidden: Tensor,
    last_index: Tensor,
    head: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    num_students: int,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    pair_weight: Tensor | None,
    score_l2: float,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    l2_normalizer: float | None,
    l2_normalizer_tensor: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, accuracy, margin, scores [S+R], the scores' gradient, and the norm's statistics for backward.

    The gradient is [S+R], or [0] unless need_grad. One launch up to ONE_PROGRAM_ROWS responses, otherwise two.
    """
    hidden, vectors = _head_arguments(hidden, last_index, head, bias, norm_weight)
    scores, saved = _row_outputs(hidden, last_index, norm_weight)
    results, score_grad = _pair_outputs(scores, len(scores), need_grad)
    numbers = (score_l2, normalizer, normalizer_tensor, l2_normalizer, l2_normalizer_tensor)
    pairs = _pair_arguments(student_index, teacher_index, quality, pair_weight, *numbers)
    counts = (num_students, len(scores) - num_students, len(student_index))
    outputs = (*results, score_grad if need_grad else None)
    if len(scores) > ONE_PROGRAM_ROWS:
        _launch_rows(hidden, vectors, scores, saved, norm_eps)
        _launch_pairs(scores[:num_students], scores[num_students:], pairs, outputs, counts)
        return *results, scores, score_grad, saved
    dim = hidden.shape[1]
    with device_of(hidden):
        _forward_kernel[(1,)](
            hidden,
            *vectors,
            scores,
            saved if norm_weight is not None else None,
            *pairs,
            *outputs,
            *counts,
            len(hidden),
            hidden.stride(0),
            dim,
            float(norm_eps),
            ROWS=TILE_ROWS,
            BLOCK_D=min(ROW_BLOCK_D, triton.next_power_of_2(dim)),
            SCORE_BLOCK=SCORE_BLOCK,
            PAIR_BLOCK=PAIR_BLOCK,
            num_warps=WARPS,
        )
    return *results, scores, score_grad, saved


def pairwise_discriminator_forward(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_index: Tensor,
    teacher_index: Tensor,
    quality: Tensor,
    pair_weight: Tensor | None,
    score_l2: float,
    normalizer: float | None,
    normalizer_tensor: Tensor | None,
    l2_normalizer: float | None,
    l2_normalizer_tensor: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, accuracy, margin, and the gradient of the scores [S+R] ([0] unless need_grad). One launch."""
    _check_floats(student_scores=student_scores, teacher_scores=teacher_scores)
    numbers = (score_l2, normalizer, normalizer_tensor, l2_normalizer, l2_normalizer_tensor)
    pairs = _pair_arguments(student_index, teacher_index, quality, pair_weight, *numbers)
    counts = (len(student_scores), len(teacher_scores), len(student_index))
    results, score_grad = _pair_outputs(student_scores, counts[0] + counts[1], need_grad)
    outputs = (*results, score_grad if need_grad else None)
    _launch_pairs(student_scores.contiguous(), teacher_scores.contiguous(), pairs, outputs, counts)
    return *results, score_grad


def discriminator_backward(
    score_grad: Tensor,
    grad_loss: Tensor | None,
    hidden: Tensor,
    last_index: Tensor,
    head: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    saved: Tensor,
    need_hidden: bool,
    need_head: bool,
    need_bias: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return gradients of hidden [T, D], head, bias and norm_weight from the scores' gradients [B], in one launch.

    The results are multiplied by grad_loss unless it is None. Gradients that are not needed are empty.
    """
    hidden, vectors = _head_arguments(hidden, last_index, head, bias, norm_weight)
    outputs = _gradient_outputs(hidden, head, bias, norm_weight, need_hidden, need_head, need_bias, need_norm)
    dim, output_pointers = hidden.shape[1], [g if g.numel() else None for g in outputs]
    block = min(GRAD_BLOCK_D, triton.next_power_of_2(dim))
    tiles = min(max(triton.cdiv(len(hidden), GRAD_ROWS), 1), _MOST_TILES) if need_hidden else 1
    with device_of(hidden):
        _row_gradient_kernel[(triton.cdiv(dim, block), tiles)](
            hidden,
            *vectors[:2],
            norm_weight if norm_weight is None else vectors[3],
            saved if norm_weight is not None else None,
            score_grad.contiguous(),
            grad_loss,
            *output_pointers,
            len(last_index),
            len(hidden),
            hidden.stride(0),
            dim,
            ROWS=GRAD_ROWS,
            BLOCK_D=block,
            num_warps=GRAD_WARPS,
        )
    return outputs


def _launch_rows(hidden: Tensor, vectors: list, scores: Tensor, saved: Tensor, norm_eps: float) -> None:
    if not len(scores):
        return
    dim = hidden.shape[1]
    block = min(ROW_BLOCK_D, triton.next_power_of_2(dim))
    with device_of(hidden):
        _rows_kernel[(len(scores),)](
            hidden,
            *vectors,
            scores,
            saved if saved.numel() else None,
            len(scores),
            len(hidden),
            hidden.stride(0),
            dim,
            float(norm_eps),
            ROWS=1,
            BLOCK_D=block,
            num_warps=ROWS_WARPS,
        )


def _launch_pairs(student: Tensor, teacher: Tensor, pairs: list, outputs: tuple, counts: tuple[int, int, int]) -> None:
    blocks = triton.cdiv(counts[0] + counts[1], SCORE_BLOCK) if outputs[-1] is not None else 1
    with device_of(student):
        _pairs_kernel[(max(blocks, 1),)](
            student, teacher, *pairs, *outputs, *counts, SCORE_BLOCK=SCORE_BLOCK, PAIR_BLOCK=PAIR_BLOCK, num_warps=WARPS
        )


def _head_arguments(
    hidden: Tensor, last_index: Tensor, head: Tensor, bias: Tensor | None, norm_weight: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Return hidden with adjacent columns, and [last_index, head, bias, norm_weight] as contiguous vectors."""
    _check_floats(hidden=hidden, head=head, bias=bias, norm_weight=norm_weight)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    vectors = (last_index, head, bias, norm_weight)
    return hidden, [None if vector is None else vector.contiguous() for vector in vectors]


def _pair_arguments(
    student_index: Tensor, teacher_index: Tensor, quality: Tensor, pair_weight: Tensor | None, score_l2: float, *numbers
) -> list[Any]:
    _check_floats(quality=quality, pair_weight=pair_weight)
    pairs = (student_index, teacher_index, quality, pair_weight)
    numbers = [n.to(quality.device) if isinstance(n, Tensor) else n for n in numbers]
    # None instead of 0 removes the term when the kernel is compiled.
    return [*(None if t is None else t.contiguous() for t in pairs), float(score_l2) if score_l2 else None, *numbers]


def _check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}; use impl='reference'")


def _row_outputs(hidden: Tensor, last_index: Tensor, norm_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    count = last_index.shape[0]
    saved = hidden.new_empty(2, 0 if norm_weight is None else count, dtype=torch.float32)
    return hidden.new_empty(count, dtype=torch.float32), saved


def _pair_outputs(like: Tensor, scores: int, need_grad: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    loss, accuracy, margin = (like.new_empty((), dtype=torch.float32) for _ in range(3))
    return (loss, accuracy, margin), like.new_empty(scores if need_grad else 0, dtype=torch.float32)


def _gradient_outputs(hidden, head, bias, norm_weight, *needed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_hidden = hidden.new_empty(hidden.shape) if needed[0] else hidden.new_empty(0)
    pairs = zip((head, bias, norm_weight), needed[1:], strict=True)
    rest = (t.new_empty(t.shape) if t is not None and need else hidden.new_empty(0) for t, need in pairs)
    return d_hidden, *rest


def _define(schema: str, function: Any, fake: Any) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rmsd_kernels::{name}", fake, lib=_LIBRARY)


def _fake_values(hidden, last_index, head, bias, norm_weight, norm_eps):
    return _row_outputs(hidden, last_index, norm_weight)


def _fake_discriminator(hidden, last_index, head, bias, norm_weight, norm_eps, num_students, *pairs):
    scores, saved = _row_outputs(hidden, last_index, norm_weight)
    results, score_grad = _pair_outputs(scores, last_index.shape[0], pairs[-1])
    return *results, scores, score_grad, saved


def _fake_pairwise(student_scores, teacher_scores, *pairs):
    results, score_grad = _pair_outputs(student_scores, student_scores.shape[0] + teacher_scores.shape[0], pairs[-1])
    return *results, score_grad


def _fake_backward(score_grad, grad_loss, hidden, last_index, head, bias, norm_weight, saved, *needed):
    return _gradient_outputs(hidden, head, bias, norm_weight, *needed)


_NORM = "Tensor? bias, Tensor? norm_weight, float norm_eps"
_define(f"last_token_values_forward({_HEAD}, {_NORM}) -> (Tensor, Tensor)", last_token_values_forward, _fake_values)
_define(
    f"discriminator_forward({_HEAD}, {_NORM}, SymInt num_students, {_PAIRS}, bool need_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    discriminator_forward,
    _fake_discriminator,
)
_define(
    f"pairwise_discriminator_forward(Tensor student_scores, Tensor teacher_scores, {_PAIRS}, bool need_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    pairwise_discriminator_forward,
    _fake_pairwise,
)
_define(
    f"discriminator_backward(Tensor score_grad, Tensor? grad_loss, {_HEAD}, Tensor? bias, Tensor? norm_weight, "
    "Tensor saved, bool need_hidden, bool need_head, bool need_bias, bool need_norm) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    discriminator_backward,
    _fake_backward,
)
