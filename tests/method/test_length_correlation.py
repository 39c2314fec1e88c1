"""Test the discriminator's length correlation, centered within questions, against hand-computed numbers."""

from __future__ import annotations

import pytest
import torch

from rmsd_fast.stages.discriminator_pass import correlation as within_correlation
from rmsd_fast.stages.discriminator_pass import sums_within_questions


def sums_of(questions: list[tuple[list[int], list[float]]]) -> tuple[float, ...]:
    """Return the sums of a process with these questions, each with the lengths and scores of its responses."""
    lengths = torch.tensor([length for own, _ in questions for length in own])
    scores = torch.tensor([score for _, own in questions for score in own])
    question = torch.tensor([index for index, (own, _) in enumerate(questions) for _ in own])
    # Rollouts come before teacher responses, so the responses of a question are not adjacent.
    order = torch.tensor([*range(0, len(question), 2), *range(1, len(question), 2)])
    return sums_within_questions(lengths[order], scores[order], question[order])


def correlation(*questions) -> float:
    return within_correlation(*sums_of(list(questions)))


def test_one_question_by_hand():
    # Around their means, the lengths are -10, 0, 10 and the scores -2, -1, 3: 50 / sqrt(200 * 14).
    assert correlation(([10, 20, 30], [0.0, 1.0, 5.0])) == pytest.approx(50 / 2800**0.5)
    assert correlation(([10, 20, 30], [5.0, 3.0, 1.0])) == pytest.approx(-1)


def test_a_question_with_long_answers_and_high_scores_is_not_length_bias():
    # The covariance is +20 within the first question and -20 within the second. All six responses together have a
    # correlation of 0.97.
    short, long = ([10, 20, 30], [1.0, 2.0, 3.0]), ([110, 120, 130], [13.0, 12.0, 11.0])
    assert correlation(short, long) == pytest.approx(0, abs=1e-12)
    together = torch.tensor([[*short[0], *long[0]], [*short[1], *long[1]]])
    assert float(torch.corrcoef(together)[0, 1]) > 0.95
    # (20 + 20) / sqrt((200 + 200) * (2 + 2))
    assert correlation(short, ([110, 120, 130], [11.0, 12.0, 13.0])) == pytest.approx(1)


def test_constant_values_within_a_question_add_nothing():
    whole = ([10, 20, 30], [0.0, 1.0, 5.0])
    one = correlation(whole)
    # A single response adds nothing, and equal lengths with different scores only affect the variance of the scores.
    assert correlation(whole, ([500], [9.0])) == pytest.approx(one)
    assert correlation(whole, ([7, 7], [1.0, 3.0])) == pytest.approx(50 / (200 * 16) ** 0.5)
    assert correlation(([7, 7], [1.0, 3.0])) is None
    # Scores that are equal up to rounding do not correlate with anything.
    assert correlation(([10, 20, 30], [1.0, 1.0 + 1e-7, 1.0 + 2e-7])) is None


def test_sums_of_processes_add_up_to_those_of_one():
    questions = [([10, 20, 30], [0.0, 1.0, 5.0]), ([4, 8], [2.0, 1.0]), ([50, 70, 60], [1.0, 0.5, 2.0])]
    parts = [sums_of(questions[:1]), sums_of(questions[1:])]
    together = [sum(sums) for sums in zip(*parts, strict=True)]
    assert within_correlation(*together) == pytest.approx(within_correlation(*sums_of(questions)))
    # 50 - 2 - 5; 200 + 8 + 200; 14 + 0.5 + (1/6)^2 + (4/6)^2 + (5/6)^2
    assert within_correlation(*together) == pytest.approx(43 / (408 * (14.5 + 42 / 36)) ** 0.5)
