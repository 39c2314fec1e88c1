"""Public discriminator losses: arguments checked, implementation chosen. The formulas are in `reference`.

These move a few kilobytes and there is nothing to cut into chunks, so "torch" and "reference" are the same code here.
On CUDA one launch each way (`triton_loss`) replaces about 25 of eager code: what is gained is latency.
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
    """Scalar head on the hidden state of the last token of each response; the other rows are never touched.

    Same as: (rms_norm(hidden[last_index]) * weight).sum(-1) + bias, in float32.

    Args:
        hidden: packed hidden states, [T, D], float. weight: [D]. bias: one element, [1] or without an axis.
        last_index: row of the LAST response token of each response (no minus-one shift), [B], int64.
        norm_weight: [D], applies RMSNorm with norm_eps first; None where hidden is normalised already.
    Returns:
        [B], float32 (float64 for float64).
    Raises:
        ValueError: shapes or devices do not fit; an index out of range (CPU). TypeError: dtypes do not fit.
        RuntimeError: impl is not available.
    Source: R-MSD (arXiv 2603.11423), discriminator on the last response token.
    """
    form = _form(impl, hidden)
    _check_values(hidden, last_index, weight, bias, norm_weight, norm_eps)
    return form.last_token_values(
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
    """Quality-weighted discriminator loss over (student, teacher) pairs.

    loss = sum of pair_weight * quality * softplus(S[student_index] - T[teacher_index]) / normalizer
           + score_l2 * (sum of all squared scores) / l2_normalizer

    Args:
        student_scores: scores of rollouts, [S], float. teacher_scores: of distinct teacher responses, [R].
        student_index, teacher_index: the pairs, [P], int64.
        quality: of each pair's teacher response, in [0, 1], [P], float; a constant, like pair_weight.
        pair_weight: [P], >= 0. `expected` pairing: all pairs with the matching probability as weight, and as normalizer
            the number of rollouts that have a teacher (rmsd_fast.method.matching.expected_pairs makes them).
        normalizer: None = number of pairs, or the sum of pair_weight where given. 0 counts as 1.
        l2_normalizer: None = S + R, so that score_l2 weighs the mean square; give the global count to make the loss
            independent of micro-batching.
    Returns:
        DiscriminatorLoss(loss, accuracy, margin): the share of pairs with T > S and the mean of T - S, both weighted by
        pair_weight and 0 where there are no pairs.
    Raises:
        ValueError: shapes or devices differ; on CPU also an index out of range, a quality outside [0, 1] or NaN, a
            negative pair_weight. TypeError: dtypes. RuntimeError: impl is not available.
    Source: R-MSD (arXiv 2603.11423), discriminator loss; score L2: PRISM (arXiv 2604.28123).
    """
    form = _form(impl, student_scores)
    for name, scores in (("student_scores", student_scores), ("teacher_scores", teacher_scores)):
        checks.check_vector(name, scores, scores.shape[0] if getattr(scores, "ndim", 0) else 0, student_scores)
    _check_pairs(student_scores, len(student_scores), len(teacher_scores), student_index, teacher_index, quality)
    _check_reduction(student_index, quality, pair_weight, score_l2, normalizer, l2_normalizer)
    return form.pairwise_discriminator_loss(
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
    """last_token_values of all responses and pairwise_discriminator_loss of their scores, in one call.

    Args beyond those two:
        last_index: [S+R], the S = num_students rollouts first, then the R teacher responses. head: [D].
    Returns:
        DiscriminatorOutput(loss, accuracy, margin, scores): scores [S+R] are detached, those of the first S are the
        rewards of the rollouts.
    Raises: as the two; ValueError also for num_students outside 0..S+R.
    """
    form = _form(impl, hidden)
    _check_values(hidden, last_index, head, bias, norm_weight, norm_eps)
    if not 0 <= num_students <= len(last_index):
        raise ValueError(f"num_students: expected 0..{len(last_index)}, the length of last_index, got {num_students}")
    num_teachers = len(last_index) - num_students
    _check_pairs(hidden, num_students, num_teachers, student_index, teacher_index, quality)
    _check_reduction(student_index, quality, pair_weight, score_l2, normalizer, l2_normalizer)
    return form.discriminator_loss(
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


def _form(impl: str, tensor: Tensor) -> ModuleType:
    """The module whose functions of the same names serve the call; triton is imported on first use."""
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
        found = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden: expected a tensor [T, D], got {found}; flatten batch and length (row b*L + i)")
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
