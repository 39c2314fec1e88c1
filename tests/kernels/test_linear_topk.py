"""Test the most probable tokens of a head against the reference and by hand."""

import math

import pytest
import torch

from rmsd_kernels import linear_topk, reference

T, D, V = 23, 16, 301


def inputs(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(V, (T, 3), generator=generator)
    temperature = 0.5 + torch.rand(T, generator=generator, dtype=torch.float64)
    return hidden, weight, ids, temperature


def test_top_tokens_by_hand():
    weight = torch.tensor([[0.1], [0.6], [0.3]], dtype=torch.float64).log()
    hidden = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    top = linear_topk(hidden, weight, 2, ids=torch.tensor([[0], [2]]))
    assert top.ids.tolist() == [[1, 2], [1, 2]]
    # The second row has squared probabilities, 0.36 and 0.09 of 0.46 in total.
    expected = [[0.6, 0.3], [0.36 / 0.46, 0.09 / 0.46]]
    assert top.logp.exp().tolist() == [pytest.approx(row) for row in expected]
    assert top.at_ids.exp().flatten().tolist() == pytest.approx([0.1, 0.09 / 0.46])
    # A temperature of 2 undoes the square.
    cooled = linear_topk(hidden[1:], weight, 0, ids=torch.tensor([[2, 2]]), temperature=2.0)
    assert cooled.logp.shape == cooled.ids.shape == (1, 0)
    assert cooled.at_ids.flatten().tolist() == pytest.approx([math.log(0.3)] * 2)


@pytest.mark.parametrize("k", [0, 1, 7, V])
def test_float64_equals_the_reference_in_chunks_of_any_size(k):
    hidden, weight, ids, temperature = inputs()
    for heat in (1.0, temperature):
        expected = reference.linear_topk(hidden, weight, k, ids=ids, temperature=heat)
        for budget in (None, 5 * V * 8, 1):
            top = linear_topk(hidden, weight, k, ids=ids, temperature=heat, memory_budget_bytes=budget)
            assert torch.equal(top.ids, expected.ids) and top.logp.dtype == torch.float64
            assert torch.allclose(top.logp, expected.logp, atol=1e-13, rtol=0)
            assert torch.allclose(top.at_ids, expected.at_ids, atol=1e-13, rtol=0)
    assert linear_topk(hidden, weight, k).at_ids is None
    assert linear_topk(hidden[:0], weight, k, ids=ids[:0]).at_ids.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_below_those_of_eager_code(dtype):
    worse = 0
    for seed in range(4):
        hidden, weight, ids, temperature = inputs(dtype, seed)
        arguments = {"ids": ids, "temperature": temperature.float()}
        top = linear_topk(hidden, weight, 8, memory_budget_bytes=9 * V * 4, **arguments)
        eager = reference.linear_topk(hidden, weight, 8, **arguments)
        every = torch.arange(V).expand(T, V)
        exact = reference.linear_topk(
            hidden.double(), weight.double(), 8, ids=every, temperature=arguments["temperature"].double()
        )
        assert top.logp.dtype == torch.float32
        errors = []
        for result in (top, eager):
            error = (result.logp - exact.at_ids.gather(1, result.ids)).abs().max()
            errors.append(max(float(error), float((result.at_ids - exact.at_ids.gather(1, ids)).abs().max())))
        assert errors[0] <= 2 * errors[1] + 2e-6
        assert bool((top.logp[:, 1:] <= top.logp[:, :-1]).all())
        # Rounded logits of neighboring ranks may be equal, so eager code may choose less probable tokens.
        wrong = [int((torch.sort(r.ids)[0] != torch.sort(exact.ids)[0]).any(1).sum()) for r in (top, eager)]
        assert wrong[0] == 0
        worse += wrong[1]
    assert (worse > 0) == (dtype == torch.bfloat16)


def test_it_has_no_gradient_and_ignores_autocast():
    hidden, weight, ids, _ = inputs(torch.float32)
    plain = linear_topk(hidden, weight, 5, ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        top = linear_topk(hidden.requires_grad_(), weight.requires_grad_(), 5, ids=ids)
    assert torch.equal(top.logp, plain.logp) and not top.logp.requires_grad and not top.at_ids.requires_grad


def test_wrong_arguments():
    hidden, weight, ids, _ = inputs()
    for change, message in (
        ({"k": V + 1}, f"k: expected 0 to V={V}, got {V + 1}"),
        ({"k": -1}, "k: expected 0 to V"),
        ({"ids": ids.float()}, r"ids: expected int64 \[23, j\], got torch.float32"),
        ({"ids": ids[1:]}, r"ids: expected int64 \[23, j\]"),
        ({"ids": ids + V}, f"ids: expected values in 0..{V - 1}"),
        ({"weight": weight[:, 1:]}, "weight: expected shape"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_topk(**({"hidden": hidden, "weight": weight, "k": 3} | change))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda(dtype):
    hidden, weight, ids, temperature = inputs(dtype)
    expected = linear_topk(hidden, weight, 8, ids=ids, temperature=temperature.float())
    top = linear_topk(hidden.cuda(), weight.cuda(), 8, ids=ids.cuda(), temperature=temperature.float().cuda())
    assert torch.equal(top.ids.cpu(), expected.ids)
    assert torch.allclose(top.logp.cpu(), expected.logp, atol=1e-2)
