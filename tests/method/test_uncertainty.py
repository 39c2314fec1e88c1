"""Test the learned weights of the terms of a loss, with numbers worked out by hand."""

import math

import pytest
import torch

from rmsd_fast.method.uncertainty import term_weights, uncertainty_loss

VALUES = torch.tensor([[0.5, 2.0]], dtype=torch.float64)
ONES = torch.ones(1, 2, dtype=torch.float64)


@pytest.mark.parametrize(("form", "factor"), [("task", 0.5), ("instance", 1.0)])
def test_at_zero_the_loss_is_the_sum_of_the_terms(form, factor):
    zero = torch.zeros(2, dtype=torch.float64)
    assert float(uncertainty_loss(VALUES, ONES, zero, form=form)) == factor * 2.5
    assert term_weights(zero, form=form).tolist() == [factor, factor]


@pytest.mark.parametrize(("form", "factor"), [("task", 0.5), ("instance", 1.0)])
def test_values_and_gradients_by_hand(form, factor):
    s = torch.tensor([math.log(2), -math.log(4)], dtype=torch.float64, requires_grad=True)
    # exp(-s) is 1/2 and 4.
    loss = uncertainty_loss(VALUES, ONES, s, form=form)
    assert float(loss) == pytest.approx(factor * (0.25 + 8 - math.log(2)))
    (gradient,) = torch.autograd.grad(loss, s)
    assert gradient.tolist() == pytest.approx([factor * (1 - 0.25), factor * (1 - 8)])
    assert term_weights(s.detach(), form=form).tolist() == pytest.approx([factor * 0.5, factor * 4])


@pytest.mark.parametrize("form", ["task", "instance"])
def test_the_minimum_is_where_exp_s_is_the_loss(form):
    s = VALUES[0].log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertainty_loss(VALUES, ONES, s, form=form), s)
    assert gradient.abs().max() < 1e-15
    for shift in (-0.1, 0.1):
        moved = uncertainty_loss(VALUES, ONES, s + shift, form=form)
        assert moved > uncertainty_loss(VALUES, ONES, s, form=form)


def test_a_single_term_only_becomes_its_logarithm():
    """At the minimum over s, the loss is log L + 1, and the gradient of the model is that of log L."""
    value = torch.tensor([[3.0]], dtype=torch.float64, requires_grad=True)
    s = value.detach().log()
    loss = uncertainty_loss(value, torch.ones_like(value), s, form="instance")
    assert float(loss) == pytest.approx(math.log(3) + 1)
    assert float(torch.autograd.grad(loss, value)[0]) == pytest.approx(1 / 3)


def test_questions_share_a_term():
    # The means of the questions are 2 and 0.5; their tokens are a quarter and three quarters of all.
    values, shares = torch.tensor([[0.5], [0.375]]).double(), torch.tensor([[0.25], [0.75]]).double()
    s = torch.tensor([[2.0], [0.5]]).double().log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertainty_loss(values, shares, s, form="instance"), s)
    assert gradient.abs().max() < 1e-15
    # With one s for both, exp(s) is their weighted mean.
    s = torch.tensor([0.875]).double().log().requires_grad_()
    (gradient,) = torch.autograd.grad(uncertainty_loss(values, shares, s, form="task"), s)
    assert gradient.abs().max() < 1e-15
    # A question without the term has no part in it.
    s = torch.tensor([[0.3], [0.3]]).double().requires_grad_()
    nothing = torch.tensor([[0.5], [0.0]]).double(), torch.tensor([[1.0], [0.0]]).double()
    (gradient,) = torch.autograd.grad(uncertainty_loss(*nothing, s, form="instance"), s)
    assert gradient[1] == 0 and gradient[0] != 0
