"""Match rollouts with teacher responses, and build the pairs of the discriminator loss.

Every draw is a hash of (seed, step, question id, rollout index), and there is no random state. A match therefore does
not depend on the batch, the world size or earlier draws, and a resumed run makes the same draws.

Source: R-MSD (arXiv 2603.11423), quality-weighted matching. `expected` pairing replaces the sampled pair by its exact
expectation over the match.
"""

import bisect
import hashlib
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# BRTS (arXiv 2605.09725) counts the tokens of a response that are among so many most probable tokens of the student.
TOP_TOKENS = 16


class Pairs(NamedTuple):
    """Pairs of the discriminator loss, over the concatenated groups.

    Attributes:
        student_index: position of each pair's rollout among all rollouts of the groups, [P], int64.
        teacher_index: position of each pair's teacher response among all teacher responses, [P], int64.
        quality: weight w_k of each pair's teacher response: q_k or a power of it, or 1 with uniform weights. In an
            order pair, it is the difference in quality. It is the argument `quality` of the loss, [P].
        pair_weight: weight of each pair, [P].
        normalizer: number of rollouts that have a teacher. Sum it over ranks and micro-batches before dividing.
    """

    student_index: Tensor
    teacher_index: Tensor
    quality: Tensor
    pair_weight: Tensor
    normalizer: int


def passes_filter(quality: float, min_quality: float) -> bool:
    """Return whether a response of this quality passes the filter: q >= tau, and never q = 0, which means invalid."""
    return quality >= min_quality and quality > 0


def matching_probabilities(
    quality: Tensor | Sequence[float],
    *,
    closed_ended: bool,
    kept: Sequence[bool] | None = None,
    power: float = 1.0,
) -> Tensor:
    """Return the probabilities with which the K teacher responses of one question are matched.

    For closed-ended questions, p_k is proportional to q_k ** power over the kept responses. For open-ended questions,
    p is uniform over them. If no response is kept, or all of them have no weight, p is all zero.

    Args:
        quality: quality of each response, [K], in [0, 1].
        closed_ended: whether p follows the quality.
        kept: whether each response can be matched, K flags; None = all of them.
        power: exponent of the quality, above 0.
    Returns:
        Probabilities, [K], in the dtype of quality (float32 for half precision and integers, float64 for a list).
    Raises:
        ValueError: quality is not one-dimensional or outside [0, 1], there are not K flags, or power is not above 0.
    """
    if not power > 0:
        raise ValueError(f"power: expected a number above 0, got {power!r}")
    quality = _probability_vector(quality, "quality")
    if not bool(((quality >= 0) & (quality <= 1)).all()):
        raise ValueError(f"quality: expected values in [0, 1], got {quality.tolist()}")
    flags = torch.ones_like(quality, dtype=torch.float64)
    if kept is not None:
        if len(kept) != len(quality):
            raise ValueError(f"kept: expected {len(quality)} flags, one per response, got {len(kept)}")
        flags = torch.tensor(list(kept), dtype=torch.float64, device=quality.device)
    weight = quality.double() ** power * flags if closed_ended else flags
    total = weight.sum()
    return (weight / torch.where(total > 0, total, torch.ones_like(total))).to(quality.dtype)


def sample_matches(p: Tensor | Sequence[float], n: int, *, seed: int, step: int, question_id: str) -> Tensor:
    """Draw m(i) ~ Categorical(p) independently for the rollouts i = 0..n-1 of one question.

    m(i) depends only on p and (seed, step, question_id, i), so a larger n appends matches without changing the others.

    Args:
        p: matching probabilities, [K], >= 0, with sum 1.
        n: number of rollouts, >= 0.
        seed: seed of the run.
        step: step of the stage.
        question_id: id of the question.
    Returns:
        Index of the matched teacher response of each rollout, [n], int64, on the device of p.
    Raises:
        ValueError: p is all zero (leave the question out of the pairs), negative, not finite, or does not sum to 1, or
            n is negative.
    """
    p = _probability_vector(p, "p")
    values = p.double().tolist()
    if n < 0:
        raise ValueError(f"n: expected a number of rollouts >= 0, got {n}")
    if not all(value >= 0 and value != float("inf") for value in values):
        raise ValueError(f"p: expected finite probabilities >= 0, got {values}")
    total = sum(values)
    if total == 0:
        raise ValueError("p: expected a probability above 0, got all zero; leave this question out of the pairs")
    if abs(total - 1) > 1e-5:
        raise ValueError(f"p: expected probabilities that sum to 1, got the sum {total}")
    cumulative = list(itertools.accumulate(values))
    last = max(k for k, value in enumerate(values) if value > 0)
    draws = (uniform("match", seed, step, question_id, index=i) * cumulative[-1] for i in range(n))
    # bisect_right never returns a k with p_k = 0. `last` handles a draw that is rounded up to the total.
    matches = [min(bisect.bisect_right(cumulative, draw), last) for draw in draws]
    return torch.tensor(matches, dtype=torch.int64, device=p.device)


def best_response(
    quality: Tensor | Sequence[float], usable: Sequence[bool], *, seed: int, question_id: str
) -> int | None:
    """Return the index of T_best, the usable response of highest quality; None if no response is usable.

    A seeded uniform draw decides ties. The valid responses to an open-ended question all have quality 1, so T_best is a
    uniform draw among them. The paper specifies neither ties nor open questions.

    Args:
        quality: quality of each response, [K].
        usable: whether each response may be imitated, K flags.
        seed: seed of the run.
        question_id: id of the question.
    Returns:
        The index, or None.
    """
    return draw_response(top_responses(quality, usable), seed=seed, question_id=question_id)


def top_responses(quality: Tensor | Sequence[float], usable: Sequence[bool]) -> list[int]:
    """Return the indices of the usable responses of highest quality, ascending; [] if no response is usable.

    Args:
        quality: quality of each response, [K].
        usable: whether each response may be imitated, K flags.
    """
    values = _probability_vector(quality, "quality").tolist()
    best = max((value for value, use in zip(values, usable, strict=True) if use), default=None)
    return [k for k, (value, use) in enumerate(zip(values, usable, strict=True)) if use and value == best]


def draw_response(candidates: Sequence[int], *, seed: int, question_id: str) -> int | None:
    """Return a seeded uniform draw among the candidates; None if there are none."""
    if not candidates:
        return None
    draw = uniform("best", seed, 0, question_id, index=0)
    return candidates[min(int(draw * len(candidates)), len(candidates) - 1)]


def overlap(ranks: Tensor) -> float:
    """Return the share of a response's tokens that are among the student's `TOP_TOKENS` most probable next tokens.

    Args:
        ranks: number of tokens that the student finds more probable than each token of the response, int64 [R], R >= 1.
    """
    return int((ranks < TOP_TOKENS).sum()) / len(ranks)


def aligned_response(
    candidates: Sequence[int], overlaps: Sequence[float], *, seed: int, question_id: str
) -> int | None:
    """Return the candidate of largest overlap with the student. A seeded uniform draw decides ties.

    Args:
        candidates: indices of the responses to choose from.
        overlaps: overlap of each candidate, in the same order.
        seed: seed of the run.
        question_id: id of the question.
    Returns:
        The index; None if there are no candidates.
    Source: BRTS (arXiv 2605.09725).
    """
    most = max(overlaps, default=None)
    nearest = [k for k, value in zip(candidates, overlaps, strict=True) if value == most]
    return draw_response(nearest, seed=seed, question_id=question_id)


def expected_pairs(num_rollouts: Sequence[int], probabilities: Sequence[Tensor], quality: Sequence[Tensor]) -> Pairs:
    """Return all pairs of each group with pair_weight = p_k: the exact expectation of the sampled discriminator loss.

    With the returned normalizer, the loss is (1/rollouts) * sum_i sum_k p_k q_k softplus(D(S_i) - D(T_k)). Responses
    with p_k = 0 are not in any pair. A group whose probabilities are empty or all zero has no pairs and is not counted
    in the normalizer.

    Args:
        num_rollouts: N of each group.
        probabilities: p of each group, [K].
        quality: quality of each group's responses, [K]. Teacher positions count all responses, including those with
            p_k = 0.
    Returns:
        The pairs.
    Raises:
        ValueError: lengths differ between the arguments or within a group.
    """
    _check_groups(num_rollouts, probabilities, quality, "probabilities")
    group_pairs, first_student, first_teacher, normalizer = [], 0, 0, 0
    for n, p, q in zip(num_rollouts, probabilities, quality, strict=True):
        if p.shape != q.shape or p.ndim != 1:
            raise ValueError(f"probabilities and quality: expected the same shape [K], got {p.shape} and {q.shape}")
        kept = torch.nonzero(p > 0).flatten()
        students = torch.arange(n, device=p.device).repeat_interleave(len(kept))
        teachers = kept.repeat(n)
        group_pairs.append((students + first_student, teachers + first_teacher, q[teachers], p[teachers]))
        normalizer += n if len(kept) else 0
        first_student, first_teacher = first_student + n, first_teacher + len(p)
    return _join_pairs(group_pairs, normalizer)


def sampled_pairs(num_rollouts: Sequence[int], matches: Sequence[Tensor | None], quality: Sequence[Tensor]) -> Pairs:
    """Return one pair per rollout, (S_i, T_m(i)), with pair_weight 1, as in the paper's discriminator loss.

    Args:
        num_rollouts: N of each group.
        matches: m of each group, [N], int64, from sample_matches; None for a group without a teacher.
        quality: quality of each group's responses, [K].
    Returns:
        The pairs.
    Raises:
        ValueError: lengths differ, or a match is outside its group's responses.
    """
    _check_groups(num_rollouts, matches, quality, "matches")
    group_pairs, first_student, first_teacher, normalizer = [], 0, 0, 0
    for n, match, q in zip(num_rollouts, matches, quality, strict=True):
        if match is not None:
            if match.shape != (n,):
                raise ValueError(f"matches: expected shape [{n}], one match per rollout, got {list(match.shape)}")
            if n and not bool(((match >= 0) & (match < len(q))).all()):
                raise ValueError(f"matches: expected values in 0..{len(q) - 1}, got {match.tolist()}")
            students = torch.arange(n, device=q.device)
            group_pairs.append((students + first_student, match + first_teacher, q[match], torch.ones_like(q[match])))
            normalizer += n
        first_student, first_teacher = first_student + n, first_teacher + len(q)
    return _join_pairs(group_pairs, normalizer)


def order_pairs(quality: Sequence[Tensor]) -> Pairs:
    """Return the pairs of a better and a worse response within each set, weighted by the difference in quality.

    The result has the form of the other pairs, with the worse response as the "student" and the better one as the
    "teacher"; both index the concatenated sets. The pairs of a set of M responses have the weights M / (number of
    pairs), so that a set counts like M rollouts in `expected_pairs`. Sets of equal quality yield no pair.

    Args:
        quality: quality of the responses of each set, [M].
    """
    set_pairs, first = [], 0
    for values in quality:
        gap = values[None, :] - values[:, None]
        worse, better = torch.nonzero(gap > 0, as_tuple=True)
        size = len(values)
        if len(worse):
            weight = torch.full_like(gap[worse, better], size / (size * (size - 1) / 2))
            set_pairs.append((worse + first, better + first, gap[worse, better], weight))
        first += size
    return _join_pairs(set_pairs, 0)


def uniform(purpose: str, seed: int, step: int, question_id: str, *, index: int) -> float:
    """Return a pseudo-random number in [0, 1) with 53 bits, a pure function of the arguments."""
    # The id comes last and nothing before it contains "|", so different arguments have different keys.
    digest = hashlib.sha256(
        f"{purpose}|{int(seed)}|{int(step)}|{int(index)}|{question_id}".encode("utf-8", "surrogatepass")
    ).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def _probability_vector(values: Tensor | Sequence[float], name: str) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(f"{name}: expected shape [K], got {list(values.shape)}")
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _check_groups(num_rollouts: Sequence[int], groups: Sequence[object], quality: Sequence[Tensor], name: str) -> None:
    if not len(num_rollouts) == len(groups) == len(quality):
        raise ValueError(
            f"num_rollouts, {name}, quality: expected one entry per group in each, "
            f"got {len(num_rollouts)}, {len(groups)} and {len(quality)}"
        )
    if any(n < 0 for n in num_rollouts):
        raise ValueError(f"num_rollouts: expected numbers >= 0, got {list(num_rollouts)}")


def _join_pairs(group_pairs: list[tuple[Tensor, Tensor, Tensor, Tensor]], normalizer: int) -> Pairs:
    if not group_pairs:
        index, value = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        return Pairs(index, index.clone(), value, value.clone(), normalizer)
    return Pairs(*(torch.cat(column) for column in zip(*group_pairs, strict=True)), normalizer)
