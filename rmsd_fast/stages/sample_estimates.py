"""Estimate pass@k, best@k and majority@k from the sampled responses to a question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import comb, inf


def sizes_of(n: int) -> list[int]:
    """Return the k = 1, 2, 4, … up to n, and n."""
    powers = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    return powers if powers[-1] == n else [*powers, n]


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """Return the unbiased estimate of the expected maximum score of k responses, from n >= k responses.

    It is the mean of the maximum over all subsets of k responses. For scores of 0 and 1, this is the usual
    1 - C(n - c, k) / C(n, k) with c right responses.

    Args:
        scores: score of each response, [n], in [0, 1].
        k: size of the subsets, 1 to n.
    Source: Chen et al. (arXiv 2107.03374), pass@k.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of responses, got {k}")
    # The i-th smallest score is the maximum of the subsets that contain it and k - 1 of the i smaller ones.
    return min(1.0, sum(score * comb(i, k - 1) for i, score in enumerate(sorted(scores))) / comb(n, k))


def best_at_k(scores: Sequence[float], ranks: Sequence[float | None], k: int) -> float:
    """Return the expected score of the highest-ranked of k responses, from n >= k responses.

    It is the mean over all subsets of k responses. If several responses have the highest rank, one of them is drawn.

    Args:
        scores: score of each response, [n].
        ranks: value by which each response is chosen, [n]; None = only if there is no other.
        k: size of the subsets, 1 to n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of responses, got {k}")
    order = sorted(range(n), key=lambda i: _rank(ranks[i]))
    total, start = 0.0, 0
    for _, tied in groupby(order, key=lambda i: _rank(ranks[i])):
        members = list(tied)
        # As in pass_at_k, the i-th smallest rank is the highest of comb(i, k - 1) subsets. Tied responses share theirs.
        chosen = sum(comb(i, k - 1) for i in range(start, start + len(members)))
        total += chosen * sum(scores[i] for i in members) / len(members)
        start += len(members)
    return total / comb(n, k)


def _rank(value: float | None) -> float:
    return -inf if value is None else value


def majority_at_k(scores: Sequence[float], answers: Sequence[str | None], k: int) -> float:
    """Return the mean score of the most frequent answer of k responses, over the n // k disjoint blocks of k.

    Responses without an answer do not vote; without any vote the score is 0. If several answers are most frequent, the
    result is the mean of their scores, as if one of them were drawn.

    Args:
        scores: score of each response, [n].
        answers: the answer of each response; equal texts are equal answers. None means that it cannot be read.
        k: number of responses that vote, 1 to n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of responses, got {k}")
    blocks = [_voted(scores[i : i + k], answers[i : i + k]) for i in range(0, n - k + 1, k)]
    return sum(blocks) / len(blocks)


def _voted(scores: Sequence[float], answers: Sequence[str | None]) -> float:
    votes: dict[str, list[float]] = {}
    for score, answer in zip(scores, answers, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [sum(of_answer) / len(of_answer) for of_answer in votes.values() if len(of_answer) == most]
    return sum(winners) / len(winners)
