"""Test the reference policy loss against loops, enumeration and finite differences, which share none of its code."""

import math

import pytest
import torch
from loss_rows import IGNORED, D, T, V, probabilities_by_loop, row_vector, tensors
from torch.autograd import gradcheck

from rmsd_kernels.heads.policy_formula import kl_estimate
from rmsd_kernels.reference import linear_logprob, linear_policy_loss


def policy_by_loop(logp, advantages, old, *, clip=0.2, weights=None, scored=None):
    total = 0.0
    for i in scored:
        r = math.exp(logp[i] - old[i])
        surrogate = min(r * advantages[i], min(max(r, 1 - clip), 1 + clip) * advantages[i])
        total -= (1.0 if weights is None else weights[i]) * surrogate
    return total


SCORED = [i for i in range(T) if i != IGNORED]


def test_clipped_policy_loss_by_definition():
    hidden, weight, targets = tensors()
    advantages, weights = row_vector(1), row_vector(2, 0.1, 2.0)
    logp = linear_logprob(hidden, weight, targets, temperature=0.8).detach()
    old = logp + torch.tensor([0.5, -0.5, 0.0, 0.1, 0.3, -0.4], dtype=torch.float64)
    result = linear_policy_loss(hidden, weight, targets, advantages, old_logp=old, temperature=0.8)
    expected = policy_by_loop(logp.tolist(), advantages.tolist(), old.tolist(), scored=SCORED)
    assert result.loss.item() == pytest.approx(expected / 5, abs=1e-12)
    weighted = linear_policy_loss(
        hidden, weight, targets, advantages, old_logp=old, temperature=0.8, token_weights=weights
    )
    expected = policy_by_loop(logp.tolist(), advantages.tolist(), old.tolist(), weights=weights.tolist(), scored=SCORED)
    assert weighted.loss.item() == pytest.approx(expected / weights[SCORED].sum().item(), abs=1e-12)

    ratios = [math.exp(logp[i] - old[i]) for i in SCORED]
    clipped = [
        (r > 1.2 and advantages[i] > 0) or (r < 0.8 and advantages[i] < 0) for r, i in zip(ratios, SCORED, strict=True)
    ]
    assert 0 < sum(clipped) < 5
    assert result.metrics["clip_fraction"].item() == pytest.approx(sum(clipped) / 5)
    assert result.metrics["mean_ratio"].item() == pytest.approx(sum(ratios) / 5)
    assert result.metrics["logp"].item() == pytest.approx(logp[SCORED].mean().item())
    assert result.metrics["rows"].item() == 5
    assert not any(value.requires_grad for value in result.metrics.values())
    assert "kl" not in result.metrics and "importance_ratio" not in result.metrics


def test_clipping_stops_the_gradient_on_one_side_only():
    logp_row = lambda w: linear_logprob(torch.ones(1, 1, dtype=torch.float64), w, torch.tensor([0]))  # noqa: E731
    for shift, advantage, moves in ((0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False)):
        weight = torch.tensor([[0.3], [-0.2]], dtype=torch.float64, requires_grad=True)
        old = logp_row(weight).detach() - shift
        loss = linear_policy_loss(
            torch.ones(1, 1, dtype=torch.float64),
            weight,
            torch.tensor([0]),
            torch.tensor([advantage], dtype=torch.float64),
            old_logp=old,
        ).loss
        (gradient,) = torch.autograd.grad(loss, weight)
        assert bool((gradient != 0).any()) is moves


def test_asymmetric_clip():
    # r = e^0.5 = 1.6487 is compared with 1 + 0.28, and e^-0.5 = 0.6065 with 1 - 0.3.
    hidden, weight = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    old = torch.tensor([math.log(0.5) - 0.5, math.log(0.5) + 0.5], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = linear_policy_loss(
        hidden, weight, torch.tensor([0, 1]), advantages, old_logp=old, clip_low=0.3, clip_high=0.28
    ).loss
    assert loss.item() == pytest.approx((-1.28 + 0.7) / 2)


def test_on_policy_has_ratio_one_and_the_plain_policy_gradient():
    hidden, weight, targets = tensors()
    advantages = row_vector(1)
    result = linear_policy_loss(hidden, weight, targets, advantages)
    assert result.loss.item() == pytest.approx(-advantages[SCORED].mean().item(), abs=1e-14)
    assert result.metrics["mean_ratio"] == 1 and result.metrics["clip_fraction"] == 0
    gradient = torch.autograd.grad(result.loss, (hidden, weight))
    plain = -(advantages * linear_logprob(hidden, weight, targets)).sum() / 5
    for ours, expected in zip(gradient, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        assert torch.allclose(ours, expected, atol=1e-14)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "full"])
def test_policy_loss_gradients(kind):
    hidden, weight, targets = tensors()
    other_hidden, other_weight, _ = (t.detach() for t in tensors(seed=1))
    # No ratio is near a clip bound, where the loss is not differentiable.
    old = linear_logprob(hidden, weight, targets, temperature=0.8).detach() + 0.1

    def function(h, w):
        return linear_policy_loss(
            h,
            w,
            targets,
            row_vector(1),
            old_logp=old,
            ref_hidden=other_hidden,
            ref_weight=other_weight,
            kl=kind,
            kl_coef=0.7,
            entropy_coef=0.3,
            temperature=0.8,
            token_weights=row_vector(2, 0.1, 2.0),
        ).loss

    assert gradcheck(function, (hidden, weight))


def every_token(seed=0):
    """Score one hidden state against every token of the vocabulary with a reference; row v has target v."""
    hidden, weight, _ = tensors(seed)
    state = hidden.detach()[:1].requires_grad_()
    rows = state.expand(V, D)
    targets = torch.arange(V)
    other_hidden, other_weight, _ = (t.detach() for t in tensors(seed + 10))
    ref_logp = linear_logprob(other_hidden[:1].expand(V, D), other_weight, targets, temperature=0.8)
    logp = linear_logprob(rows, weight, targets, temperature=0.8)
    return state, weight, rows, targets, logp, ref_logp


def estimator_loss(kind, rows, weight, targets, ref_logp, token_weights):
    """Return the expectation of the estimator over v ~ pi with constant probabilities, as in sampling."""
    return linear_policy_loss(
        rows,
        weight,
        targets,
        torch.zeros(V, dtype=torch.float64),
        ref_logp=ref_logp,
        kl=kind,
        kl_coef=1.0,
        temperature=0.8,
        token_weights=token_weights,
        normalizer=1,
    )


def test_gradients_of_the_kl_estimators_in_expectation():
    state, weight, rows, targets, logp, ref_logp = every_token()
    p = logp.exp().detach()
    q = ref_logp.exp()
    gradient = {
        kind: torch.autograd.grad(
            estimator_loss(kind, rows, weight, targets, ref_logp, p).loss, (state, weight), retain_graph=True
        )
        for kind in ("k1", "k2", "k3")
    }
    kl_policy_ref = (logp.exp() * (logp - ref_logp)).sum()
    kl_ref_policy = (q * (ref_logp - logp)).sum()
    forward = torch.autograd.grad(kl_policy_ref, (state, weight), retain_graph=True)
    backward = torch.autograd.grad(kl_ref_policy, (state, weight))
    for index in range(2):
        assert gradient["k1"][index].abs().max() < 1e-14
        assert torch.allclose(gradient["k2"][index], forward[index], atol=1e-13)
        assert torch.allclose(gradient["k3"][index], backward[index], atol=1e-13)
        assert forward[index].abs().max() > 1e-3 and not torch.allclose(forward[index], backward[index], atol=1e-3)


def test_values_of_the_kl_estimators_in_expectation():
    _, weight, rows, targets, logp, ref_logp = every_token()
    p, q = logp.exp().detach(), ref_logp.exp()
    kl = (p * (logp - ref_logp)).sum().item()
    value = {k: estimator_loss(k, rows, weight, targets, ref_logp, p).loss.item() for k in ("k1", "k2", "k3")}
    assert value["k1"] == pytest.approx(kl, abs=1e-13)
    assert value["k3"] == pytest.approx(kl, abs=1e-13)
    assert value["k2"] == pytest.approx((p * (logp - ref_logp) ** 2 / 2).sum().item(), abs=1e-13)
    assert (q.sum() - 1).abs() < 1e-12


def test_full_kl_is_the_sum_over_the_vocabulary_at_every_row():
    hidden, weight, targets = tensors()
    other_hidden, other_weight, _ = (t.detach() for t in tensors(seed=1))
    p = torch.tensor(probabilities_by_loop(hidden, weight, temperature=0.8), dtype=torch.float64)
    q = torch.tensor(probabilities_by_loop(other_hidden, other_weight, temperature=0.8), dtype=torch.float64)
    expected = (p * (p / q).log()).sum(-1)[SCORED]
    result = linear_policy_loss(
        hidden,
        weight,
        targets,
        torch.zeros(T, dtype=torch.float64),
        ref_hidden=other_hidden,
        ref_weight=other_weight,
        kl="full",
        kl_coef=1.0,
        temperature=0.8,
    )
    assert result.loss.item() == pytest.approx(expected.mean().item(), abs=1e-12)
    assert result.metrics["kl"].item() == pytest.approx(expected.mean().item(), abs=1e-12)


def test_a_reference_given_as_hidden_states_equals_its_logprobs():
    hidden, weight, targets = tensors()
    other_hidden, other_weight, _ = (t.detach() for t in tensors(seed=1))
    ref_logp = linear_logprob(other_hidden, other_weight, targets, temperature=0.8)
    settings = {"kl": "k3", "kl_coef": 0.5, "temperature": 0.8}
    a = linear_policy_loss(hidden, weight, targets, row_vector(1), ref_logp=ref_logp, **settings)
    b = linear_policy_loss(
        hidden, weight, targets, row_vector(1), ref_hidden=other_hidden, ref_weight=other_weight, **settings
    )
    assert torch.allclose(a.loss, b.loss, atol=1e-14)
    assert a.metrics["kl_k1"].item() == pytest.approx(b.metrics["kl_k1"].item(), abs=1e-14)


def test_kl_estimates_by_hand():
    logp, ref = torch.zeros(2, dtype=torch.float64), torch.tensor([0.5, -2.0], dtype=torch.float64)
    assert kl_estimate(logp, ref, "k1").tolist() == [-0.5, 2.0]
    assert kl_estimate(logp, ref, "k2").tolist() == [0.125, 2.0]
    assert kl_estimate(logp, ref, "k3").tolist() == pytest.approx([math.exp(0.5) - 1.5, math.exp(-2.0) + 1.0])
    assert kl_estimate(logp, ref, "k1", 1.0).tolist() == [-0.5, 1.0]
    assert kl_estimate(logp, ref, "k2", 1.0).tolist() == [0.125, 0.5]
    assert kl_estimate(logp, ref, "k3", 1.0).tolist() == pytest.approx([math.exp(0.5) - 1.5, math.exp(-1.0)])


def test_ratio_and_k3_stay_finite_at_extreme_log_ratios():
    """Only the argument of exp is limited, to 80."""
    hidden, weight = torch.zeros(2, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    targets = torch.tensor([0, 1])
    far = torch.tensor([-1e4, 1e4])
    result = linear_policy_loss(
        hidden, weight, targets, torch.tensor([-1.0, 1.0]), old_logp=far, ref_logp=-far, kl="k3", kl_coef=1.0
    )
    assert result.loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(result.loss, (hidden, weight)))
    logp = torch.zeros(1, dtype=torch.float64)
    assert kl_estimate(logp, logp + 79, "k3").item() == pytest.approx(math.exp(79) - 80, rel=1e-14)
    assert kl_estimate(logp, logp + 1e4, "k3").item() == pytest.approx(math.exp(80), rel=1e-14)


def test_entropy_term():
    hidden, weight, targets = tensors()
    zero = torch.zeros(T, dtype=torch.float64)
    result = linear_policy_loss(hidden, weight, targets, zero, entropy_coef=0.5)
    _, entropy = linear_logprob(hidden, weight, targets, return_entropy=True)
    assert result.loss.item() == pytest.approx(-0.5 * entropy.sum().item() / 5, abs=1e-13)
    ours = torch.autograd.grad(result.loss, weight)[0]
    assert torch.allclose(ours, torch.autograd.grad(-0.1 * entropy.sum(), weight)[0], atol=1e-13)
    measured = linear_policy_loss(hidden, weight, targets, zero).metrics["entropy"]
    assert measured.item() == pytest.approx(entropy.sum().item() / 5, abs=1e-13)


CU_SEQLENS = torch.tensor([0, 3, 3, 6], dtype=torch.int32)  # Row 2 is ignored, and the middle sequence is empty.


def test_sequence_ratio_by_definition():
    hidden, weight, targets = tensors()
    logp = linear_logprob(hidden, weight, targets).detach()
    delta = torch.tensor([0.1, 0.4, 9.0, -0.3, 0.0, -0.6], dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    result = linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages,
        old_logp=logp - delta,
        importance_level="sequence",
        cu_seqlens=CU_SEQLENS,
        clip_low=0.5,
        clip_high=0.5,
    )
    # The means of the scored rows are 0.25 over two rows and -0.3 over three.
    expected = -(2 * math.exp(0.25) - 3 * math.exp(-0.3)) / 5
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    # The gradient reaches every row of the sequence with the ratio of the sequence.
    coefficients = torch.tensor([math.exp(0.25)] * 3 + [-math.exp(-0.3)] * 3, dtype=torch.float64)
    plain = -(coefficients * linear_logprob(hidden, weight, targets)).sum() / 5
    for ours, other in zip(
        torch.autograd.grad(result.loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        assert torch.allclose(ours, other, atol=1e-12)


def test_truncated_importance_weights_and_sequence_mask():
    hidden, weight, targets = tensors()
    logp = linear_logprob(hidden, weight, targets).detach()
    # exp(old - rollout) is 1, 4, -, 0.5, 3, 8. The mean is 2.5 in sequence 0 and 11.5 / 3 in sequence 2.
    ratio = torch.tensor([1.0, 4.0, 99.0, 0.5, 3.0, 8.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 50.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    call = lambda **kw: linear_policy_loss(  # noqa: E731
        hidden, weight, targets, advantages, rollout_logp=logp - ratio.log(), **kw
    )
    assert call().loss.item() == pytest.approx(-15 / 5)
    assert call().metrics["importance_ratio"].item() == pytest.approx(16.5 / 5)
    capped = call(tis_cap=2.0)
    assert capped.loss.item() == pytest.approx(-(1 * 1 + 2 * 2 + 0.5 * 3 + 2 * 4 + 2 * 5) / 5)
    assert capped.metrics["tis_capped_fraction"].item() == pytest.approx(3 / 5)
    masked = call(tis_cap=2.0, sequence_mask_cap=3.0, cu_seqlens=CU_SEQLENS)
    assert masked.loss.item() == pytest.approx(-(1 + 4) / 5)
    assert masked.metrics["sequence_masked_fraction"].item() == pytest.approx(3 / 5)
    assert call(sequence_mask_cap=4.0, cu_seqlens=CU_SEQLENS).loss.item() == pytest.approx(-15 / 5)
    # The correction is detached, so the gradient is that of the plain loss with these row weights.
    plain = -(linear_logprob(hidden, weight, targets) * advantages * ratio.clamp(max=2.0)).sum() / 5
    ours = torch.autograd.grad(capped.loss, weight)[0]
    assert torch.allclose(ours, torch.autograd.grad(plain, weight)[0], atol=1e-13)


def test_correction_does_not_change_the_kl_term():
    hidden, weight, targets = tensors()
    logp = linear_logprob(hidden, weight, targets).detach()
    settings = {"ref_logp": logp - 1.0, "kl": "k1", "kl_coef": 1.0, "cu_seqlens": CU_SEQLENS}
    loss = linear_policy_loss(
        hidden, weight, targets, row_vector(1), rollout_logp=logp - 5, sequence_mask_cap=3.0, **settings
    ).loss
    assert loss.item() == pytest.approx(1.0, abs=1e-13)
