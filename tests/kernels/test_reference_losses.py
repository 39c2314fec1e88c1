"""Test the reference log-probs and cross entropy against loops, enumeration and finite differences."""

import math

import pytest
import torch
from loss_rows import IGNORED, D, T, V, probabilities_by_loop, row_vector, tensors
from torch.autograd import gradcheck

from rmsd_kernels.reference import (
    linear_cross_entropy,
    linear_logprob,
    linear_policy_loss,
)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8}, {"temperature": 0.7, "softcap": 1.5, "bias": True}])
def test_logprob_and_entropy_by_definition(settings):
    hidden, weight, targets = tensors()
    settings = {**settings, **({"bias": torch.linspace(-1, 1, V, dtype=torch.float64)} if settings.get("bias") else {})}
    table = probabilities_by_loop(hidden, weight, **settings)
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True, **settings)
    for row, (p, target) in enumerate(zip(table, targets.tolist(), strict=True)):
        if row == IGNORED:
            assert logp[row] == 0 and entropy[row] == 0
        else:
            assert logp[row].item() == pytest.approx(math.log(p[target]), abs=1e-12)
            assert entropy[row].item() == pytest.approx(-sum(v * math.log(v) for v in p), abs=1e-12)


def test_temperature_per_row_equals_one_at_a_time():
    hidden, weight, targets = tensors()
    temperature = row_vector(3, 0.5, 2.0)
    together = linear_logprob(hidden, weight, targets, temperature=temperature)
    alone = [linear_logprob(hidden, weight, targets, temperature=t.item())[i] for i, t in enumerate(temperature)]
    assert torch.allclose(together, torch.stack(alone), atol=1e-14)


def test_logprob_and_entropy_gradients():
    hidden, weight, targets = tensors()
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)

    def function(h, w, b):
        return linear_logprob(h, w, targets, bias=b, temperature=0.8, softcap=2.0, return_entropy=True)

    assert gradcheck(function, (hidden, weight, bias))


def test_ignored_rows_may_contain_anything():
    hidden, weight, targets = tensors()
    clean = linear_cross_entropy(hidden, weight, targets)
    clean_gradient = torch.autograd.grad(clean, (hidden, weight))
    dirty = hidden.detach().clone()
    dirty[IGNORED] = float("nan")
    dirty.requires_grad_()
    loss = linear_cross_entropy(dirty, weight, targets)
    gradient = torch.autograd.grad(loss, (dirty, weight))
    assert torch.equal(loss, clean)
    assert torch.equal(gradient[0], clean_gradient[0]) and torch.equal(gradient[1], clean_gradient[1])
    assert (gradient[0][IGNORED] == 0).all()


def test_a_target_out_of_range_gives_nan_and_reads_nothing_out_of_bounds():
    hidden, weight, targets = tensors()
    targets[0], targets[1] = V, -1
    logp = linear_logprob(hidden, weight, targets)
    assert logp.isnan().tolist() == [True, True] + [False] * (T - 2)


def test_banned_tokens_by_a_bias_of_minus_infinity():
    """The distribution without a token equals that of a smaller vocabulary, in value and gradient."""
    hidden, weight, targets = tensors()
    targets[targets == V - 1] = 0
    bias = torch.zeros(V, dtype=torch.float64)
    bias[-1] = -float("inf")
    banned = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True)
    smaller = linear_logprob(hidden, weight[:-1], targets, return_entropy=True)
    coefficients = row_vector(4), row_vector(5)
    loss = [sum((c * part).sum() for c, part in zip(coefficients, parts, strict=True)) for parts in (banned, smaller)]
    gradients = [torch.autograd.grad(value, (hidden, weight)) for value in loss]
    assert loss[0].item() == pytest.approx(loss[1].item(), abs=1e-12)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_and_never_above_zero(dtype):
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0, 0, 1])
    logp, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    assert logp.dtype == torch.float32
    assert logp.tolist() == pytest.approx([0.0, -2e4, -math.log(3)], rel=1e-2)
    assert (logp <= 0).all() and entropy.isfinite().all()
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_cross_entropy_by_hand():
    # One-hot hidden states select rows of the weight as logits, so the log-probs are log(1/4) and log(3/4).
    weight = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0]], dtype=torch.float64).T.contiguous()
    hidden = torch.eye(2, dtype=torch.float64)
    targets = torch.tensor([0, 0])
    assert linear_logprob(hidden, weight, targets).exp().tolist() == pytest.approx([0.25, 0.75])
    total = -math.log(0.25) - math.log(0.75)
    assert linear_cross_entropy(hidden, weight, targets).item() == pytest.approx(total / 2)
    weights = torch.tensor([3.0, 1.0], dtype=torch.float64)
    weighted = -3 * math.log(0.25) - math.log(0.75)
    assert linear_cross_entropy(hidden, weight, targets, token_weights=weights).item() == pytest.approx(weighted / 4)
    assert linear_cross_entropy(hidden, weight, targets, token_weights=weights, normalizer=10).item() == pytest.approx(
        weighted / 10
    )


def test_cross_entropy_of_parts_sums_to_the_whole():
    hidden, weight, targets = tensors()
    whole = linear_cross_entropy(hidden, weight, targets)
    parts = [linear_cross_entropy(hidden[s], weight, targets[s], normalizer=T - 1) for s in (slice(0, 4), slice(4, T))]
    assert whole.item() == pytest.approx(sum(parts).item(), abs=1e-14)


@pytest.mark.parametrize("rows", ["none", "all ignored"])
def test_no_scored_rows_give_a_zero_loss_with_zero_gradients(rows):
    hidden, weight, targets = tensors()
    if rows == "none":
        hidden, targets = torch.zeros(0, D, dtype=torch.float64, requires_grad=True), targets[:0]
    else:
        targets = torch.full_like(targets, -100)
    advantages = torch.zeros(len(targets), dtype=torch.float64)
    for normalizer in (None, 0, 7.0, torch.tensor(0.0)):
        losses = [
            linear_cross_entropy(hidden, weight, targets, normalizer=normalizer),
            linear_policy_loss(hidden, weight, targets, advantages, normalizer=normalizer, entropy_coef=1.0).loss,
        ]
        for loss in losses:
            gradient = torch.autograd.grad(loss, (hidden, weight))
            assert loss.item() == 0 and all((g == 0).all() for g in gradient)
