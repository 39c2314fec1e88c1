"""Token credit: how a self-teacher and the position of a token change the advantages of the policy loss.

    advantage of token t of rollout i = w_t * (A_i * u_t + kd.coef * g_t)

A_i is the advantage of the rollout, u_t the magnitude weight, g_t the distillation advantage, and w_t the position
weight times the prune weight. All of them are constants in the loss. The policy loss is linear in an advantage that is
multiplied by a number of at least 0, so this is exact with clipping and importance weights too.

The self-teacher is the student's own model with hints in its prompt. Its views m have log-probs q_m of the student's
tokens, and the student has p, both at the temperature of the rollouts. The gap of a view is q_m - p.

Sources: magnitude weights: VISD (arXiv 2605.06094); k1: ViCuR (arXiv 2606.05718); position weights: PW-OPSD (arXiv
2605.21606); several views: AVSD (arXiv 2605.20643); overlap: Prune-OPD.
"""

import math

import torch
from torch import Tensor

# Added to denominators of the weights of several views (2605.20643).
EPS = 1e-8


def magnitude_mix(step: int, *, mix: float, steps: int) -> float:
    """Return the share of the teacher in the magnitude weights: from `mix` linearly to 0 at `steps`.

    Args:
        step: step, counted from 0.
        mix: the share in step 0, in [0, 1].
        steps: step from which the share is 0; 0 = it never changes.
    """
    return mix * max(0.0, 1 - step / steps) if steps else mix


def magnitude_weights(advantage: Tensor, gap: Tensor, *, clip: float, mix: float) -> tuple[Tensor, Tensor]:
    """Return u = (1 - mix) + mix * clamp(exp(sign(A) * gap), 1 - clip, 1 + clip), and where the clamp applies.

    A token that the teacher finds more probable than the student gets more of a positive advantage and less of a
    negative one. The sign of A * u is that of A. u is exactly 1 if the gap, the advantage or the mix is 0.

    Args:
        advantage: A of each token, [T].
        gap: gap of each token, [T], floating.
        clip: bound of the change, in (0, 1].
        mix: share of the teacher, in [0, 1].
    Returns:
        u in the dtype of gap and whether it was clamped, both [T].
    """
    change = torch.exp(torch.sign(advantage) * gap) - 1
    # Written as a change from 1, so that no change gives exactly 1.
    return 1 + mix * change.clamp(-clip, clip), change.abs() > clip


def renormalized_gap(
    teacher_top: Tensor, student_top: Tensor, teacher_own: Tensor, student_own: Tensor, among: Tensor
) -> Tensor:
    """Return the gap log q(y | S) - log p(y | S) of each token y, where S has y and k other candidates.

    S is the union of y and the teacher's k most probable tokens. If S is the whole vocabulary, this is the gap of the
    sampled token.

    Args:
        teacher_top, student_top: log-probs of these k tokens under teacher and student, [T, k].
        teacher_own, student_own: log-probs of y, [T].
        among: whether y is one of the k tokens, bool [T].
    """
    gap = torch.zeros_like(teacher_own)
    for sign, top, own in ((1, teacher_top, teacher_own), (-1, student_top, student_own)):
        # y counts once.
        extra = own.masked_fill(among, -math.inf).unsqueeze(1)
        gap = gap + sign * (own - torch.logsumexp(torch.cat([top, extra], dim=1), dim=1))
    return gap


def overlap_shares(student_ids: Tensor, teacher_ids: Tensor) -> Tensor:
    """Return which share of the student's k most probable tokens is among the teacher's, [T], in the default dtype.

    Args:
        student_ids, teacher_ids: distinct token ids in each row, int64 [T, k].
    """
    shared = (student_ids.unsqueeze(2) == teacher_ids.unsqueeze(1)).any(dim=2)
    return shared.to(torch.get_default_dtype()).mean(dim=1)


def prune_weights(overlap: Tensor, *, threshold: float, decay: float, floor: float) -> Tensor:
    """Return w = clip(1 - decay * C, 0, 1) + floor, where C counts the overlaps below the threshold up to the token.

    After the student has left the paths that the teacher considers probable, the teacher's judgment counts less. The
    weights never rise.

    Args:
        overlap: share of common candidates at each token, [T].
        threshold: overlap below which a token counts.
        decay: decrease for each of these tokens.
        floor: lower bound of the weights; the upper one is 1 + floor.
    """
    misses = torch.cumsum((overlap < threshold).to(overlap.dtype), dim=0)
    return (1 - decay * misses).clamp(0, 1) + floor


def k1_advantages(gap: Tensor, *, clip: float) -> Tensor:
    """Return g = clamp(gap, -clip, clip).

    On-policy, the gradient of this term is that of -KL(p || q), apart from the clamp.

    Args:
        gap: gap of each token, [T], or [M, T] for several views, of which the mean is used.
        clip: largest absolute value, above 0.
    """
    return (gap if gap.ndim == 1 else gap.mean(dim=0)).clamp(-clip, clip)


def avsd_advantages(teacher_logp: Tensor, student_logp: Tensor, *, clip: float) -> Tensor:
    """Return g = clamp(A_G + C * R * J, -clip, clip) of several views, which is their mean gap if they agree.

    A_G is the mean gap, J = max(0, log mean_m exp(q_m) - mean_m q_m) the disagreement of the views, C = |A_G| / mean
    |gap| how far they agree on the sign, and R = |A_G| / (|A_G| + J). The addition is at most |A_G|, so the sign is
    that of A_G, up to rounding, and a single view gives its gap.

    Args:
        teacher_logp: log-probs of the tokens under each view, [M, T], M >= 1.
        student_logp: log-probs under the student, [T].
        clip: largest absolute value, above 0.
    """
    gaps = teacher_logp - student_logp
    mean_gap = gaps.mean(dim=0)
    spread = torch.logsumexp(teacher_logp, dim=0) - math.log(len(teacher_logp)) - teacher_logp.mean(dim=0)
    spread = spread.clamp(min=0)
    size = mean_gap.abs()
    consistency, reliability = size / (gaps.abs().mean(dim=0) + EPS), size / (size + spread + EPS)
    return (mean_gap + consistency * reliability * spread).clamp(-clip, clip)


def position_weights(length: int, *, least: float, start: float, width: float) -> Tensor:
    """Return w = least + (1 - least) * sigmoid(((t - 0.5) / T - start) / width) for t = 1..T, [T], float64.

    Args:
        length: T, the tokens of the rollout.
        least: lower bound of the weights, in [0, 1].
        start: position at which half of the rise is reached, as a share of the rollout.
        width: width of the rise, as a share of the rollout, above 0.
    """
    position = (torch.arange(length, dtype=torch.float64) + 0.5) / length
    return least + (1 - least) * torch.sigmoid((position - start) / width)
