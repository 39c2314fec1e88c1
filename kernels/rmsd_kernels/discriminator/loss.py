"""Public discriminator losses, with argument checks and the choice of implementation. `reference` has the formulas.

The losses move only a few kilobytes, so chunks are not needed, and "torch" and "reference" run the same code. On CUDA,
one launch in each direction (`triton_loss`) replaces about 25 launches of eager code, which saves latency.
"""

from types import ModuleType

from torch import Tensor

from .. import checks
from ..implementations import IMPLEMENTATIONS, resolve_impl
from . import reference
from .reference import DiscriminatorLoss, DiscriminatorOutput


def last_token_values(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """Apply a scalar head to the hidden state of the last token of each response. Other rows are not read.

    Same as: (rms_norm(hidden[last_index]) * weight).sum(-1) + bias, in float32.

    Args:
        hidden: packed hidden states, [T, D], floating.
        last_index: row of each response's last token in hidden, without a shift by one, [B], int64.
        weight: the scalar head, [D], floating.
        bias: bias of the head, [1] or [], floating; None means 0.
        norm_weight: weight of an RMSNorm that is applied before the head, [D], floating. None skips the norm, for
            hidden states that are already normalized.
        norm_eps: epsilon of the RMSNorm, >= 0.
        impl: see rmsd_fast.losses.
    Returns:
        Scores of the responses, [B], float32 (float64 for float64 inputs).
    Raises:
        ValueError: shapes or devices do not match, or an index is out of range (checked for CPU tensors).
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    Source: R-MSD (arXiv 2603.11423), discriminator on the last response token.
    """
    backend = _backend(impl, hidden)
    _check_values(hidden, last_index, weight, bias, norm_weight, norm_eps)
    return backend.last_token_values(
        hidden, last_index, weight, bias=_scalar(bias), norm_weight=norm_weight, norm_eps=norm_eps
    )


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
    impl: str = "auto",
) -> DiscriminatorLoss:
    """Compute the quality-weighted discriminator loss over (student, teacher) pairs.

    loss = sum(pair_weight * quality * softplus(S[student_index] - T[teacher_index])) / normalizer
           + score_l2 * (sum of all squared scores) / l2_normalizer

    Args:
        student_scores: scores S of the rollouts, [S], floating.
        teacher_scores: scores T of the distinct teacher responses, [R], floating.
        student_index: rollout of each pair, [P], int64.
        teacher_index: teacher response of each pair, [P], int64.
        quality: quality of each pair's teacher response, in [0, 1], [P], floating; a constant.
        pair_weight: weight of each pair, >= 0, [P], floating; a constant. None means 1. For `expected` pairing, pass
            all pairs with their matching probabilities as weights, and the number of rollouts that have a teacher as
            the normalizer (rmsd_fast.method.matching.expected_pairs returns them).
        score_l2: coefficient of the squared scores, >= 0.
        normalizer: divisor of the sum over pairs, a number or a tensor with one element. None means the sum of
            pair_weight, or the number of pairs without pair_weight. 0 is treated as 1.
        l2_normalizer: divisor of the squared scores, like normalizer. None means S + R, so that score_l2 weighs the
            mean square. Pass the global count to make the loss independent of micro-batching.
        impl: see rmsd_fast.losses.
    Returns:
        DiscriminatorLoss(loss, accuracy, margin): the loss, the share of pairs with T > S, and the mean of T - S. Share
        and mean are weighted by pair_weight, and are 0 without pairs.
    Raises:
        ValueError: shapes or devices do not match. For CPU tensors, an index is out of range, a quality is NaN or
            outside [0, 1], or a pair_weight is negative.
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    Source: R-MSD (arXiv 2603.11423), discriminator loss; score L2: PRISM (arXiv 2604.28123).
    """
    backend = _backend(impl, student_scores)
    for name, scores in (("student_scores", student_scores), ("teacher_scores", teacher_scores)):
        checks.check_vector(name, scores, scores.shape[0] if getattr(scores, "ndim", 0) else 0, student_scores)
    _check_pairs(student_scores, len(student_scores), len(teacher_scores), student_index, teacher_index, quality)
    _check_reduction(student_index, quality, pair_weight, score_l2, normalizer, l2_normalizer)
    return backend.pairwise_discriminator_loss(
        student_scores,
        teacher_scores,
        student_index,
        teacher_index,
        quality,
        pair_weight=pair_weight,
        score_l2=score_l2,
        normalizer=normalizer,
        l2_normalizer=l2_normalizer,
    )


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
    impl: str = "auto",
) -> DiscriminatorOutput:
    """Score all responses with last_token_values and compute pairwise_discriminator_loss of the scores, in one call.

    Args:
        hidden: packed hidden states, [T, D], floating.
        last_index: row of each response's last token, [S+R], int64; the S rollouts first, then the R teacher responses.
        head: the scalar head, [D], floating.
        student_index: rollout of each pair, [P], int64, in 0..S-1.
        teacher_index: teacher response of each pair, [P], int64, in 0..R-1.
        quality: quality of each pair's teacher response, in [0, 1], [P], floating; a constant.
        num_students: S, the number of rollouts in last_index.
        bias: bias of the head, [1] or [], floating; None means 0.
        norm_weight: weight of an RMSNorm that is applied before the head, [D], floating; None skips the norm.
        norm_eps: epsilon of the RMSNorm, >= 0.
        pair_weight: as in pairwise_discriminator_loss, [P], floating.
        score_l2: coefficient of the squared scores, >= 0.
        normalizer: as in pairwise_discriminator_loss.
        l2_normalizer: as in pairwise_discriminator_loss.
        impl: see rmsd_fast.losses.
    Returns:
        DiscriminatorOutput(loss, accuracy, margin, scores). scores [S+R] are detached; the first S of them are the
        rewards of the rollouts.
    Raises:
        ValueError: as in the two functions, or num_students is outside 0..S+R.
        TypeError: a dtype does not match.
        RuntimeError: impl is not available.
    """
    backend = _backend(impl, hidden)
    _check_values(hidden, last_index, head, bias, norm_weight, norm_eps)
    if not 0 <= num_students <= len(last_index):
        raise ValueError(f"num_students: expected 0..{len(last_index)}, the length of last_index, got {num_students}")
    num_teachers = len(last_index) - num_students
    _check_pairs(hidden, num_students, num_teachers, student_index, teacher_index, quality)
    _check_reduction(student_index, quality, pair_weight, score_l2, normalizer, l2_normalizer)
    return backend.discriminator_loss(
        hidden,
        last_index,
        head,
        student_index,
        teacher_index,
        quality,
        num_students=num_students,
        bias=_scalar(bias),
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        pair_weight=pair_weight,
        score_l2=score_l2,
        normalizer=normalizer,
        l2_normalizer=l2_normalizer,
    )


def _backend(impl: str, tensor: Tensor) -> ModuleType:
    """Return the module that implements the functions for this call; triton is imported on first use."""
    checks.check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    if resolve_impl(impl, tensor, native_form=False) != "triton":
        return reference
    from . import triton_loss

    return triton_loss


def _scalar(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape(())


def _check_values(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
) -> None:
    if not isinstance(hidden, Tensor) or hidden.ndim != 2:
        got = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden: expected a tensor [T, D], got {got}; flatten batch and length (row b*L + i)")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden: expected a floating dtype, got {hidden.dtype}")
    checks.check_vector("weight", weight, hidden.shape[1], hidden)
    checks.check_index("last_index", last_index, None, len(hidden), hidden)
    if norm_weight is not None:
        checks.check_vector("norm_weight", norm_weight, hidden.shape[1], hidden)
    checks.check_number("norm_eps", norm_eps, least=0.0)
    if bias is not None and bias.numel() != 1:
        raise ValueError(f"bias: expected one element, got shape {list(bias.shape)}")


def _check_pairs(
    like: Tensor, num_students: int, num_teachers: int, student_index: Tensor, teacher_index: Tensor, quality: Tensor
) -> None:
    checks.check_index("student_index", student_index, None, num_students, like)
    checks.check_index("teacher_index", teacher_index, len(student_index), num_teachers, like)
    checks.check_vector("quality", quality, len(student_index), like)
    checks.check_unit_interval("quality", quality)


def _check_reduction(
    student_index: Tensor,
    quality: Tensor,
    pair_weight: Tensor | None,
    score_l2: float,
    normalizer: float | Tensor | None,
    l2_normalizer: float | Tensor | None,
) -> None:
    if pair_weight is not None:
        checks.check_vector("pair_weight", pair_weight, len(student_index), quality)
        checks.check_not_negative("pair_weight", pair_weight)
    checks.check_number("score_l2", score_l2, least=0.0)
    checks.check_normalizer(normalizer)
    checks.check_normalizer(l2_normalizer, "l2_normalizer")
