"""linear_logprob on the compiled CPU op, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from rmsd_fast.losses import linear_logprob
from rmsd_kernels import native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_not() or "available")


def case(dtype, rows=7, hidden=16, vocabulary=50):
    h, w = torch.randn(rows, hidden).to(dtype), torch.randn(vocabulary, hidden).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    targets[2] = -100
    return h, w, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, "rows"])
def test_no_worse_than_eager(dtype, temperature):
    h, w, targets = case(dtype)
    scale = torch.rand(7) + 0.5 if temperature == "rows" else 0.8
    truth = linear_logprob(h.double(), w.double(), targets, temperature=scale, return_entropy=True, impl="reference")
    eager = linear_logprob(h, w, targets, temperature=scale, return_entropy=True, impl="reference")
    # A budget of one row makes every row a chunk of its own.
    for budget in (None, 50 * h.element_size()):
        ours = linear_logprob(
            h, w, targets, temperature=scale, return_entropy=True, impl="native", memory_budget_bytes=budget
        )
        for got, plain, true in zip(ours, eager, truth, strict=True):
            assert got.dtype == torch.float32 and float(got[2]) == 0
            assert (got - true).abs().max() <= 2 * (plain - true).abs().max() + 1e-6


def test_auto_takes_it_only_where_it_can_serve(monkeypatch):
    h, w, targets = case(torch.float32)
    calls = []
    real = native.row_logprob
    monkeypatch.setattr(native, "row_logprob", lambda *a: calls.append(1) or real(*a))
    linear_logprob(h, w, targets)
    assert calls == [1]
    w.requires_grad_()
    assert linear_logprob(h, w, targets).requires_grad
    linear_logprob(h, w.detach(), targets, softcap=3.0)
    linear_logprob(h.double(), w.detach().double(), targets)
    assert calls == [1]
    with torch.no_grad():
        linear_logprob(h, w, targets)
    assert calls == [1, 1]


def test_native_refuses_what_it_cannot_do():
    h, w, targets = case(torch.float32)
    with pytest.raises(RuntimeError, match="no softcap"):
        linear_logprob(h, w, targets, softcap=3.0, impl="native")
    with pytest.raises(RuntimeError, match="no gradient"):
        linear_logprob(h.requires_grad_(), w, targets, impl="native")
    with pytest.raises(RuntimeError, match="float64"):
        linear_logprob(h.detach().double(), w.double(), targets, impl="native")
