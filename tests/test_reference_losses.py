"""Reference losses against derivations that do not share their code: loops, enumeration, finite differences."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from rmsd_kernels.reference import (
    discriminator_loss,
    kl_estimate,
    last_token_values,
    linear_cross_entropy,
    linear_divergence,
    linear_logprob,
    linear_policy_loss,
    pairwise_discriminator_loss,
)

T, D, V = 6, 3, 5
IGNORED = 2


def tensors(seed=0, dtype=torch.float64):
    """hidden [T, D], weight [V, D], targets [T] with one ignored row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[IGNORED] = -100
    return hidden, weight, targets


def row_vector(seed, low=-1.0, high=1.0):
    return torch.empty(T, dtype=torch.float64).uniform_(low, high, generator=torch.Generator().manual_seed(seed))


def probabilities_by_loop(hidden, weight, temperature=1.0, softcap=None, bias=None):
    """Softmax by the definition, in Python floats."""
    table = []
    for h in hidden.tolist():
        z = [sum(a * b for a, b in zip(h, w, strict=True)) for w in weight.tolist()]
        z = z if bias is None else [value + b for value, b in zip(z, bias.tolist(), strict=True)]
        z = z if softcap is None else [softcap * math.tanh(value / softcap) for value in z]
        e = [math.exp(value / temperature) for value in z]
        table.append([value / sum(e) for value in e])
    return table


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


def test_ignored_rows_hold_anything():
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


def test_a_target_out_of_range_gives_nan_and_never_reads_elsewhere():
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
    # One-hot hidden states read rows of logits out of the weight: log-probs are log(1/4), log(3/4).
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
def test_nothing_scored_is_a_zero_loss_with_zero_gradients(rows):
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


# --- policy loss -----------------------------------------------------------------------------------------------------


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
    # r = e^0.5 = 1.6487 against 1 + 0.28, and e^-0.5 = 0.6065 against 1 - 0.3.
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
    # No ratio near a clip edge, where the loss has a kink.
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
    """One hidden state scored against every token of the vocabulary, with a reference: rows enumerate v."""
    hidden, weight, _ = tensors(seed)
    state = hidden.detach()[:1].requires_grad_()
    rows = state.expand(V, D)
    targets = torch.arange(V)
    other_hidden, other_weight, _ = (t.detach() for t in tensors(seed + 10))
    ref_logp = linear_logprob(other_hidden[:1].expand(V, D), other_weight, targets, temperature=0.8)
    logp = linear_logprob(rows, weight, targets, temperature=0.8)
    return state, weight, rows, targets, logp, ref_logp


def estimator_loss(kind, rows, weight, targets, ref_logp, token_weights):
    """Expectation of the estimator over v ~ pi, with pi's probabilities held constant as sampling holds them."""
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
    """Only exp's argument is guarded, at 80."""
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


CU_SEQLENS = torch.tensor([0, 3, 3, 6], dtype=torch.int32)  # row 2 is ignored; the middle sequence is empty


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
    # Means of the scored rows: 0.25 over two rows, -0.3 over three.
    expected = -(2 * math.exp(0.25) - 3 * math.exp(-0.3)) / 5
    assert result.loss.item() == pytest.approx(expected, abs=1e-12)
    # Its gradient reaches every row of the sequence with the ratio of the sequence.
    coefficients = torch.tensor([math.exp(0.25)] * 3 + [-math.exp(-0.3)] * 3, dtype=torch.float64)
    plain = -(coefficients * linear_logprob(hidden, weight, targets)).sum() / 5
    for ours, other in zip(
        torch.autograd.grad(result.loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        assert torch.allclose(ours, other, atol=1e-12)


def test_truncated_importance_weights_and_sequence_mask():
    hidden, weight, targets = tensors()
    logp = linear_logprob(hidden, weight, targets).detach()
    # exp(old - rollout): 1, 4, -, 0.5, 3, 8. Mean of sequence 0: 2.5, of sequence 2: 11.5 / 3.
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
    # Detached: the gradient is that of the plain loss with these weights on the rows.
    plain = -(linear_logprob(hidden, weight, targets) * advantages * ratio.clamp(max=2.0)).sum() / 5
    ours = torch.autograd.grad(capped.loss, weight)[0]
    assert torch.allclose(ours, torch.autograd.grad(plain, weight)[0], atol=1e-13)


def test_correction_leaves_the_kl_term_alone():
    hidden, weight, targets = tensors()
    logp = linear_logprob(hidden, weight, targets).detach()
    settings = {"ref_logp": logp - 1.0, "kl": "k1", "kl_coef": 1.0, "cu_seqlens": CU_SEQLENS}
    loss = linear_policy_loss(
        hidden, weight, targets, row_vector(1), rollout_logp=logp - 5, sequence_mask_cap=3.0, **settings
    ).loss
    assert loss.item() == pytest.approx(1.0, abs=1e-13)


# --- divergences -----------------------------------------------------------------------------------------------------


def divergence_by_definition(p, q, kind, alpha):
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if kind == "forward_kl":
        return kl(p, q)
    if kind == "reverse_kl":
        return kl(q, p)
    m = alpha * p + (1 - alpha) * q
    return kl(p, m) if kind == "skew_kl" else alpha * kl(p, m) + (1 - alpha) * kl(q, m)


KINDS = [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.5), ("jsd", 0.2), ("skew_kl", 0.1)]


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergence_by_definition_from_each_kind_of_teacher(kind, alpha):
    hidden, weight, _ = tensors()
    teacher_hidden, teacher_weight, _ = (t.detach() for t in tensors(seed=1))
    q = torch.tensor(probabilities_by_loop(hidden, weight, 0.8), dtype=torch.float64)
    p = torch.tensor(probabilities_by_loop(teacher_hidden, teacher_weight, 0.8), dtype=torch.float64)
    weights = row_vector(2, 0.1, 2.0)
    weights[1] = 0.0
    expected = (weights * divergence_by_definition(p, q, kind, alpha)).sum() / weights.sum()
    settings = {"kind": kind, "alpha": alpha, "temperature": 0.8, "token_weights": weights}
    logits = teacher_hidden @ teacher_weight.T
    every_id = torch.arange(V).expand(T, V).flip(1)
    for teacher in (
        {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight},
        {"teacher_logits": logits},
        {"teacher_topk": (logits.gather(1, every_id), every_id)},
    ):
        loss = linear_divergence(hidden, weight, **teacher, **settings)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_topk_renormalises_both_sides():
    hidden, weight, _ = tensors()
    ids = torch.tensor([[0, 3]] * T)
    logits = torch.tensor([[1.0, -0.5]] * T, dtype=torch.float64)
    q = torch.tensor(probabilities_by_loop(hidden, weight), dtype=torch.float64)[:, [0, 3]]
    expected = divergence_by_definition(logits.softmax(-1), q / q.sum(-1, keepdim=True), "forward_kl", None).mean()
    for shift in (0.0, 5.0):  # logits or log-probs: only differences count
        loss = linear_divergence(hidden, weight, teacher_topk=(logits + shift, ids))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergence_gradients(kind, alpha):
    hidden, weight, _ = tensors()
    logits = torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def function(h, w):
        return linear_divergence(h, w, teacher_logits=logits, kind=kind, alpha=alpha, temperature=0.8)

    assert gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_divergence_vanishes_at_the_teacher_and_a_teacher_may_rule_tokens_out(kind):
    hidden, weight, _ = tensors()
    same = linear_divergence(hidden, weight, teacher_hidden=hidden, teacher_weight=weight, kind=kind)
    assert same.abs().item() < 1e-14
    assert all(g.abs().max() < 1e-14 for g in torch.autograd.grad(same, (hidden, weight)))
    logits = torch.zeros(T, V, dtype=torch.float64)
    logits[:, 0] = -float("inf")
    loss = linear_divergence(hidden, weight, teacher_logits=logits, kind=kind)
    if kind == "reverse_kl":
        assert loss.item() == float("inf")  # the student puts mass where the teacher has none
    else:
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


# --- discriminator ---------------------------------------------------------------------------------------------------


def test_last_token_values_by_hand():
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64)
    index = torch.tensor([1, 0, 1])
    assert last_token_values(hidden, index, weight).tolist() == [-1.0, -1.0, -1.0]
    bias, scale = torch.tensor(0.5, dtype=torch.float64), torch.tensor([2.0, 1.0], dtype=torch.float64)
    values = last_token_values(hidden, index, weight, bias=bias, norm_weight=scale, norm_eps=0.5)
    # Row [3, 4]: mean square 12.5 + 0.5 = 13, so (2*3 - 4)/sqrt(13) + 0.5; row [1, 2]: 2.5 + 0.5 = 3, (2 - 2)/sqrt(3).
    assert values.tolist() == pytest.approx([2 / math.sqrt(13) + 0.5, 0.5, 2 / math.sqrt(13) + 0.5])
    hidden.requires_grad_()
    last_token_values(hidden, index, weight).sum().backward()
    assert hidden.grad.tolist() == [[1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]


def test_pair_loss_by_hand():
    student, teacher = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 3.0])
    pairs = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    quality = torch.tensor([1.0, 0.5, 0.25])
    softplus = [math.log(2), math.log(1 + math.e), math.log(1 + math.exp(-2))]
    result = pairwise_discriminator_loss(student, teacher, *pairs, quality)
    total = softplus[0] + 0.5 * softplus[1] + 0.25 * softplus[2]
    assert result.loss.item() == pytest.approx(total / 3)
    assert result.accuracy.item() == pytest.approx(1 / 3)  # margins 0, -1, 2
    assert result.margin.item() == pytest.approx(1 / 3)
    weight = torch.tensor([0.5, 0.0, 1.5])
    weighted = pairwise_discriminator_loss(student, teacher, *pairs, quality, pair_weight=weight)
    assert weighted.loss.item() == pytest.approx((0.5 * softplus[0] + 1.5 * 0.25 * softplus[2]) / 2)
    assert weighted.accuracy.item() == pytest.approx(0.75) and weighted.margin.item() == pytest.approx(1.5)
    # Squares 0, 1, 0, 9 over four scores.
    with_l2 = pairwise_discriminator_loss(student, teacher, *pairs, quality, score_l2=0.1)
    assert with_l2.loss.item() == pytest.approx(total / 3 + 0.1 * 10 / 4)
    shared = pairwise_discriminator_loss(
        student, teacher, *pairs, quality, score_l2=0.1, l2_normalizer=20, normalizer=6
    )
    assert shared.loss.item() == pytest.approx(total / 6 + 0.1 * 10 / 20)


def random_pairs():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    pairs = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    quality = torch.rand(12, generator=generator, dtype=torch.float64)
    return student, teacher, pairs, quality


def test_pair_loss_gradients():
    student, teacher, pairs, quality = random_pairs()
    function = lambda s, t: pairwise_discriminator_loss(s, t, *pairs, quality, score_l2=0.01).loss  # noqa: E731
    assert gradcheck(function, (student, teacher))
    # The pair loss does not fix the level of the scores: its gradients over all scores sum to zero.
    loss = pairwise_discriminator_loss(student, teacher, *pairs, quality).loss
    gradient = torch.cat(torch.autograd.grad(loss, (student, teacher)))
    assert gradient.sum().abs() < 1e-14 and gradient.abs().max() > 1e-2


def test_quality_zero_gives_an_exactly_zero_gradient():
    student, teacher, pairs, quality = random_pairs()
    quality = torch.where(pairs[1] == 1, 0.0, quality)
    loss = pairwise_discriminator_loss(student, teacher, *pairs, quality).loss
    gradient = torch.autograd.grad(loss, (student, teacher))
    assert gradient[1][1] == 0 and (gradient[1][[0, 2]] != 0).all()
    nothing = pairwise_discriminator_loss(student, teacher, *pairs, torch.zeros_like(quality)).loss
    assert nothing == 0 and all((g == 0).all() for g in torch.autograd.grad(nothing, (student, teacher)))


def test_pair_loss_is_finite_and_exact_at_extreme_scores():
    student = torch.tensor([1e4, -1e4, 25.0], requires_grad=True)
    teacher = torch.tensor([-1e4, 1e4, 0.0], requires_grad=True)
    index = torch.arange(3)
    result = pairwise_discriminator_loss(student, teacher, index, index, torch.ones(3), normalizer=1)
    assert result.loss.item() == pytest.approx(2e4 + 25, rel=1e-6)
    gradient = torch.autograd.grad(result.loss, student)[0]
    assert gradient.tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)
    # Beyond 20 torch's softplus drops the exponential term; in float64 it counts.
    far = torch.tensor([25.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    exact = pairwise_discriminator_loss(*far, index[:1], index[:1], torch.ones(1, dtype=torch.float64)).loss.item()
    assert exact == 25.0 + math.log1p(math.exp(-25.0)) != 25.0


def test_no_pairs_is_a_zero_loss_with_zero_gradients():
    student, teacher = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    for scores in ((student, teacher), (torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True))):
        result = pairwise_discriminator_loss(*scores, nothing, nothing, torch.zeros(0))
        assert (result.loss.item(), result.accuracy.item(), result.margin.item()) == (0.0, 0.0, 0.0)
        assert all((g == 0).all() for g in torch.autograd.grad(result.loss, scores))


def test_discriminator_loss_is_the_two_steps():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(D, generator=generator, dtype=torch.float64).requires_grad_()
    last = torch.tensor([1, 3, 5, 8])
    pairs = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    quality = torch.tensor([1.0, 0.3, 0.6], dtype=torch.float64)
    norm = torch.linspace(0.5, 1.5, D, dtype=torch.float64)
    one = discriminator_loss(hidden, last, head, *pairs, quality, num_students=2, norm_weight=norm, score_l2=1e-3)
    scores = last_token_values(hidden, last, head, norm_weight=norm)
    two = pairwise_discriminator_loss(scores[:2], scores[2:], *pairs, quality, score_l2=1e-3)
    assert torch.equal(one.loss, two.loss) and torch.equal(one.accuracy, two.accuracy)
    assert torch.equal(one.scores, scores) and not one.scores.requires_grad
    gradient = torch.autograd.grad(one.loss, hidden)[0]
    assert (gradient[last] != 0).any() and (gradient[[0, 2, 4, 6, 7]] == 0).all()
