"""Test the rank of targets among the logits of a head."""

import pytest
import torch

from rmsd_kernels import linear_rank
from rmsd_kernels.heads import reference

T, D, V = 13, 8, 41


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator)
    bias = 3 * torch.randn(V, generator=generator)
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (T,), generator=generator), bias.to(dtype)


def test_ranks_by_hand():
    # Logits of the two rows: 3, 1, 2, 2 and 0, 0, 0, 5. Equal logits do not count.
    hidden, weight = torch.eye(2), torch.tensor([[3.0, 0], [1, 0], [2, 0], [2, 5]])
    targets = torch.tensor([0, 1, 2, 3])
    assert [linear_rank(hidden[:1], weight, t[None]).item() for t in targets] == [0, 3, 1, 1]
    assert [linear_rank(hidden[1:], weight, t[None]).item() for t in targets] == [1, 1, 1, 0]
    assert linear_rank(hidden[:1], weight, targets[:1], bias=torch.tensor([-3.0, 0, 0, 0])).item() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_chunks_equal_the_reference_and_topk(dtype, biased):
    hidden, weight, targets, bias = inputs(dtype)
    more = {"bias": bias} if biased else {}
    expected = reference.linear_rank(hidden, weight, targets, **more)
    assert 0 < int((expected < 16).sum()) < T
    # 5 rows per chunk give a ragged last chunk, and 1 byte gives single rows.
    for budget in (None, 5 * (1 + biased) * V * hidden.element_size(), 1):
        ranks = linear_rank(hidden, weight, targets, memory_budget_bytes=budget, **more)
        assert ranks.dtype == torch.int64 and torch.equal(ranks, expected), budget
    if dtype == torch.float64:
        logits = hidden @ weight.T + (bias if biased else 0)
        among = (torch.topk(logits, 16).indices == targets[:, None]).any(dim=1)
        assert torch.equal(ranks < 16, among)


def test_no_gradient_and_no_rows():
    hidden, weight, targets, _ = inputs()
    ranks = linear_rank(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert not ranks.requires_grad
    assert linear_rank(hidden[:0], weight, targets[:0]).shape == (0,)


def test_logits_that_are_not_finite_are_above_the_target():
    hidden, weight, targets, _ = inputs(torch.float32)
    expected = linear_rank(hidden, weight, targets)
    other = (int(targets[0]) + 1) % V
    below = hidden[0] @ weight[other] <= hidden[0] @ weight[targets[0]]
    weight = weight.clone()
    weight[other] = float("nan")
    assert linear_rank(hidden, weight, targets)[0] == expected[0] + int(below)
    hidden = hidden.clone()
    hidden[1] = float("nan")
    assert linear_rank(hidden, weight, targets)[1] == V


def test_wrong_arguments_are_refused():
    hidden, weight, targets, _ = inputs()
    with pytest.raises(ValueError, match="targets: expected values in 0..40"):
        linear_rank(hidden, weight, targets + V)
    with pytest.raises(ValueError, match="targets: expected values in 0..40"):
        linear_rank(hidden, weight, torch.full_like(targets, -100))
    with pytest.raises(TypeError, match="weight: expected the dtype of hidden"):
        linear_rank(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="memory_budget_bytes"):
        linear_rank(hidden, weight, targets, memory_budget_bytes=0)
