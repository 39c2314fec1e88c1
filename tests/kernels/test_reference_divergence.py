"""Test the reference divergences and discriminator losses against derivations that do not share their code."""

import math

import pytest
import torch
from loss_rows import D, T, V, probabilities_by_loop, row_vector, tensors
from torch.autograd import gradcheck

from rmsd_kernels.reference import (
    discriminator_loss,
    last_token_values,
    linear_divergence,
    pairwise_discriminator_loss,
)


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


def test_topk_renormalizes_both_sides():
    hidden, weight, _ = tensors()
    ids = torch.tensor([[0, 3]] * T)
    logits = torch.tensor([[1.0, -0.5]] * T, dtype=torch.float64)
    q = torch.tensor(probabilities_by_loop(hidden, weight), dtype=torch.float64)[:, [0, 3]]
    expected = divergence_by_definition(logits.softmax(-1), q / q.sum(-1, keepdim=True), "forward_kl", None).mean()
    for shift in (0.0, 5.0):  # Only differences count, so logits and log-probs agree.
        loss = linear_divergence(hidden, weight, teacher_topk=(logits + shift, ids))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_divergence_gradients(kind, alpha):
    hidden, weight, _ = tensors()
    logits = torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def function(h, w):
        return linear_divergence(h, w, teacher_logits=logits, kind=kind, alpha=alpha, temperature=0.8)

    assert gradcheck(function, (hidden, weight))


def test_bounded_summands_by_hand():
    # p = (0.5, 0.25, 0.25), q = (0.25, 0.5, 0.25): the summands of KL(p||q) are 0.5 ln 2, -0.25 ln 2 and 0.
    hidden = torch.eye(3, dtype=torch.float64)[:1].requires_grad_()
    weight = torch.tensor([[0.25], [0.5], [0.25]], dtype=torch.float64).log() @ torch.ones(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    for kind, first in (("forward_kl", 0), ("reverse_kl", 1)):
        z = (hidden @ weight.T).detach().requires_grad_()
        loss = linear_divergence(
            z, torch.eye(3, dtype=torch.float64), teacher_logits=teacher, kind=kind, vocab_clip=0.1
        )
        assert loss.item() == pytest.approx(0.1 - 0.25 * math.log(2))
        slope = torch.autograd.grad(loss, z)[0][0]
        # forward_kl: the free entries give sum_v -p_v d log q_v. reverse_kl: sum_v (log q_v - log p_v + 1) d q_v.
        p, q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.5, 0.25]).double()
        free = torch.ones(3).double()
        free[first] = 0
        f = free * (-p / q if kind == "forward_kl" else (q / p).log() + 1)
        assert slope.tolist() == pytest.approx((q * (f - (q * f).sum())).tolist())


@pytest.mark.parametrize(("kind", "alpha"), KINDS)
def test_a_high_bound_changes_nothing_and_clipped_entries_have_no_gradient(kind, alpha):
    hidden, weight, _ = tensors()
    logits = torch.randn(T, V, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    settings = {"teacher_logits": logits, "kind": kind, "alpha": alpha}
    plain = linear_divergence(hidden, weight, **settings)
    for bound in (1e9, float(plain.detach()) * T + 1e3):
        loss = linear_divergence(hidden, weight, vocab_clip=bound, **settings)
        assert loss.item() == pytest.approx(plain.item(), abs=1e-13)
        pairs = zip(*(torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (loss, plain)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-13) for a, b in pairs)
    assert gradcheck(lambda h, w: linear_divergence(h, w, vocab_clip=0.02, **settings), (hidden, weight))
    low = linear_divergence(hidden, weight, vocab_clip=0.02, **settings)
    assert low.item() < plain.item() - 1e-3
    # The teacher of one entry rules the others out, so its summand is the only one, and it is clipped.
    certain = torch.full((T, V), -1e4, dtype=torch.float64)
    certain[:, 0] = 0
    loss = linear_divergence(hidden, weight, teacher_logits=certain, vocab_clip=1e-4)
    assert loss.item() == pytest.approx(1e-4)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (hidden, weight)))
    ruled_out = torch.zeros(T, V, dtype=torch.float64)
    ruled_out[:, 0] = -float("inf")
    loss = linear_divergence(hidden, weight, teacher_logits=ruled_out, kind=kind, alpha=alpha, vocab_clip=0.02)
    assert loss.isfinite() and all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


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
        assert loss.item() == float("inf")  # The student has mass where the teacher has none.
    else:
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_last_token_values_by_hand():
    hidden = torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64)
    index = torch.tensor([1, 0, 1])
    assert last_token_values(hidden, index, weight).tolist() == [-1.0, -1.0, -1.0]
    bias, scale = torch.tensor(0.5, dtype=torch.float64), torch.tensor([2.0, 1.0], dtype=torch.float64)
    values = last_token_values(hidden, index, weight, bias=bias, norm_weight=scale, norm_eps=0.5)
    # Row [3, 4] has mean square 12.5 + 0.5 = 13 and value (2*3 - 4)/sqrt(13) + 0.5. Row [1, 2] has 2.5 + 0.5 = 3 and (2
    # - 2)/sqrt(3).
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
    assert result.accuracy.item() == pytest.approx(1 / 3)  # The margins are 0, -1 and 2.
    assert result.margin.item() == pytest.approx(1 / 3)
    weight = torch.tensor([0.5, 0.0, 1.5])
    weighted = pairwise_discriminator_loss(student, teacher, *pairs, quality, pair_weight=weight)
    assert weighted.loss.item() == pytest.approx((0.5 * softplus[0] + 1.5 * 0.25 * softplus[2]) / 2)
    assert weighted.accuracy.item() == pytest.approx(0.75) and weighted.margin.item() == pytest.approx(1.5)
    # The squares are 0, 1, 0 and 9 over four scores.
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
    # The pair loss does not fix the level of the scores, so its gradients over all scores sum to zero.
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
    # Beyond 20, torch's softplus drops the exponential term, which still matters in float64.
    far = torch.tensor([25.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    exact = pairwise_discriminator_loss(*far, index[:1], index[:1], torch.ones(1, dtype=torch.float64)).loss.item()
    assert exact == 25.0 + math.log1p(math.exp(-25.0)) != 25.0


def test_no_pairs_give_a_zero_loss_with_zero_gradients():
    student, teacher = torch.zeros(0, requires_grad=True), torch.zeros(0, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.int64)
    for scores in ((student, teacher), (torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True))):
        result = pairwise_discriminator_loss(*scores, nothing, nothing, torch.zeros(0))
        assert (result.loss.item(), result.accuracy.item(), result.margin.item()) == (0.0, 0.0, 0.0)
        assert all((g == 0).all() for g in torch.autograd.grad(result.loss, scores))


def test_discriminator_loss_equals_its_two_steps():
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
