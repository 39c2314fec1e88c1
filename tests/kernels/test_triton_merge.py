"""Test the Triton merge of two parts of attention against the torch form, in Triton's interpreter and on CUDA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, Case, as_stored, compare, interpret, main

CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def parts(rows: int, heads: int, dim: int, device, dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Return out and other [R, H, d], lse and other_lse [H, R]."""
    g = torch.Generator().manual_seed(seed)
    out, other = (torch.randn(rows, heads, dim, generator=g).to(device, dtype) for _ in range(2))
    lse, other_lse = (4 * torch.randn(heads, rows, generator=g).to(device) for _ in range(2))
    return out, lse, other, other_lse


def torch_form(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.sigmoid(other_lse - lse).t().unsqueeze(-1)
    return out + (other - out) * weight, torch.logaddexp(lse, other_lse)


def check(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> float:
    from rmsd_kernels.shared_prefix.triton_merge import merge_

    tensors = (out, lse, other, other_lse)
    eager_out, eager_lse = torch_form(*(t.float() for t in tensors))
    exact_out, exact_lse = torch_form(*(t.double() for t in tensors))
    before = other.clone()
    merge_(*tensors)
    assert torch.equal(other, before)
    stored = as_stored(eager_out, out.dtype)
    return max(compare("out", out, stored, exact_out), compare("lse", lse, eager_lse, exact_lse))


@case
def heads_and_sizes(device, dtype):
    return max(check(*parts(5, heads, dim, device, dtype)) for heads, dim in ((1, 8), (8, 64), (11, 40), (32, 128)))


@case
def slices_and_other_strides(device, dtype):
    """Use the layouts of the callers: rows of a longer tensor, and heads with a larger stride than rows."""
    out, lse, other, other_lse = parts(9, 6, 16, device, dtype)
    whole, whole_lse = out.clone(), lse.clone()
    worst = check(
        whole[2:7], whole_lse[:, 2:7], other[2:7].transpose(0, 1).contiguous().transpose(0, 1), other_lse[:, 2:7]
    )
    kept = [0, 1, 7, 8]
    assert torch.equal(whole[kept], out[kept]) and torch.equal(whole_lse[:, kept], lse[:, kept])
    return worst


@case
def parts_without_weight(device, dtype):
    """A part with a log-sum-exp of -inf has no weight; the two log-sum-exps may also be far apart."""
    from rmsd_kernels.shared_prefix.triton_merge import merge_

    out, lse, other, other_lse = parts(4, 2, 8, device, dtype)
    lse[:, 0], other_lse[:, 1] = -math.inf, -math.inf
    lse[:, 2], other_lse[:, 3] = 300.0, 300.0
    first, first_lse = out.clone(), lse.clone()
    merge_(out, lse, other, other_lse)
    assert torch.allclose(out[[0, 3]], other[[0, 3]], atol=1e-6, rtol=0) and torch.equal(out[[1, 2]], first[[1, 2]])
    assert torch.equal(lse[:, [0, 3]], other_lse[:, [0, 3]]) and torch.equal(lse[:, [1, 2]], first_lse[:, [1, 2]])
    return 0.0


@case
def no_rows(device, dtype):
    from rmsd_kernels.shared_prefix.triton_merge import merge_

    merge_(*parts(0, 2, 8, device, dtype))
    return 0.0


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict]:
    pytest.importorskip("triton")
    return interpret(__file__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(interpreted, name, dtype):
    failure = interpreted[name, dtype]["failure"]
    assert not failure, failure


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, dtype):
    CASES[name](torch.device("cuda"), DTYPES[dtype])


if __name__ == "__main__":
    main(CASES)
