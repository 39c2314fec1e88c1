"""Provide a dense oracle, rows of every kind, error checks and fake kernels for tests of shared-prefix attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmsd_kernels import SharedPrefixPlan
from rmsd_kernels.heads.row_formula import accumulation_dtype
from rmsd_kernels.shared_prefix.cuda import Lengths, Varlen

# Each entry gives (prefix lengths, response lengths) for one code path: adjacent segments of equal length (one batched
# call) and of different lengths; groups without responses at the start, in the middle and at the end; a response longer
# than its prefix; single tokens.
ROWS = {
    "one group": ([9], [[4, 4, 2]]),
    "one response": ([7], [[5]]),
    "no responses": ([6, 3], [[], []]),
    "uneven groups": ([5, 1, 8, 3], [[2, 2, 7], [3], [], [1, 4]]),
    "empty groups at the ends": ([4, 4, 6, 2, 5], [[], [3, 3], [6, 1], [2], []]),
    "single tokens": ([1, 1], [[1], [1, 1]]),
    "single tokens, one group empty": ([1, 1, 1], [[1, 1], [], [1]]),
}
PLAN = SharedPrefixPlan.from_lengths(*ROWS["uneven groups"])
# Each entry gives the numbers of query and key heads.
HEADS = [(2, 2), (4, 2), (3, 1)]


def mask_of(plan: SharedPrefixPlan) -> Tensor:
    """Return the attention mask of the packed row, [T, T]."""
    mask = torch.zeros(plan.tokens, plan.tokens, dtype=torch.bool)
    key, row = 0, plan.prefix_tokens
    for prefix, responses in zip(plan.prefix_lengths, plan.response_lengths, strict=True):
        mask[key : key + prefix, key : key + prefix] = torch.ones(prefix, prefix).tril() > 0
        for response in responses:
            mask[row : row + response, key : key + prefix] = True
            mask[row : row + response, row : row + response] = torch.ones(response, response).tril() > 0
            row += response
        key += prefix
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, plan: SharedPrefixPlan, scale: float | None = None) -> Tensor:
    """Return the expected result: torch's attention with the 4-D mask of the plan."""
    rows = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    mask = mask_of(plan).to(q.device)[None, None]
    return F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def random_rows(
    plan: SharedPrefixPlan, heads: tuple[int, int] = (4, 2), size: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return q, k and v that require gradients."""
    queries, keys = heads
    return [
        torch.randn(plan.tokens, n, size).to(device=plan.device, dtype=dtype).requires_grad_()
        for n in (queries, keys, keys)
    ]


def with_gradients(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def largest_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, truth, strict=True))


def error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).norm())


def check_errors(ours: list[Tensor], others: list[Tensor], truth: list[Tensor], plan, bound: float) -> None:
    # Prefixes and responses are checked separately, so that the errors of one cannot hide those of the other.
    for rows in (slice(0, plan.prefix_tokens), slice(plan.prefix_tokens, None)):
        for a, b, exact in zip(ours, others, truth, strict=True):
            assert error(a[rows], exact[rows]) <= bound * error(b[rows], exact[rows])


def _segments(lengths: Lengths, q: Tensor, k: Tensor):
    """Return (queries, keys) of each segment, and check the assumptions of the kernels about their arguments."""
    edges = [t.tolist() for t in (lengths.queries, lengths.keys)]
    for t, row_edges, rows in zip((lengths.queries, lengths.keys), edges, (q, k), strict=True):
        assert t.dtype == torch.int32 and t.is_contiguous()
        assert row_edges[0] == 0 and row_edges[-1] == len(rows)
        assert rows.stride(-1) == 1
    assert len(edges[0]) == len(edges[1])
    spans = [[slice(a, b) for a, b in zip(e, e[1:], strict=False)] for e in edges]
    if lengths.used_keys is not None:
        assert lengths.used_keys.dtype == torch.int32 and lengths.used_keys.is_contiguous()
        assert lengths.used_keys.shape == (len(edges[0]) - 1,)
    # With a bound of 1, the kernel would take another path; see shared_prefix/cuda.py.
    assert lengths.longest_queries >= max(2, *(s.stop - s.start for s in spans[0]))
    assert lengths.longest_keys >= max(s.stop - s.start for s in spans[1])
    return zip(*spans, strict=True)


def _softmax(q: Tensor, k: Tensor, causal: bool, scale: float, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return probabilities [H, R, P] of q [R, H, d] over k [P, H, d], and lse [H, R]."""
    scores = torch.einsum("rhd,phd->hrp", q, k) * scale
    if causal:
        assert len(q) == len(k)
        scores = scores.masked_fill(torch.ones(len(q), len(k)).triu(1) > 0, float("-inf"))
    lse = scores.logsumexp(-1) if lse is None else lse
    return (scores - lse.unsqueeze(-1)).exp(), lse


def stand_in_attend(q, k, v, lengths: Lengths | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Run a fake variable-length kernel that checks its input as strictly as the CUDA kernels.

    With 16-bit inputs, it rounds as they do: probabilities before a product, and the result.
    """
    dtype, (q, k, v) = q.dtype, _accumulated(q, k, v)
    if lengths is None:
        assert q.ndim == 4 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and not causal
        repeat = q.shape[2] // k.shape[2]
        pairs = [_softmax(a, b.repeat_interleave(repeat, 1), causal, scale) for a, b in zip(q, k, strict=True)]
        out = [
            torch.einsum("hrp,phd->rhd", _rounded(p, dtype), c.repeat_interleave(repeat, 1))
            for (p, _), c in zip(pairs, v, strict=True)
        ]
        return torch.stack(out).to(dtype), torch.stack([lse for _, lse in pairs])
    repeat = q.shape[1] // k.shape[1]
    # As in the kernels, the result has the strides of q.
    out = torch.full_like(q, float("nan"))
    lse = q.new_full((q.shape[1], len(q)), float("nan"))
    for index, (queries, keys) in enumerate(_segments(lengths, q, k)):
        if lengths.used_keys is not None:
            keys = slice(keys.start, keys.start + int(lengths.used_keys[index]))
        p, lse[:, queries] = _softmax(q[queries], k[keys].repeat_interleave(repeat, 1), causal, scale)
        out[queries] = torch.einsum("hrp,phd->rhd", _rounded(p, dtype), v[keys].repeat_interleave(repeat, 1))
    return out.to(dtype), lse


def stand_in_backward(d_out, q, k, v, out, lse, lengths: Lengths, causal: bool, scale: float):
    """Run the backward of the fake kernel from out and lse; gradients of keys without queries are not written."""
    assert all(t.is_contiguous() for t in (d_out, out, lse)) and lse.shape == (q.shape[1], len(q))
    dtype, (d_out, q, k, v, out) = q.dtype, _accumulated(d_out, q, k, v, out)
    repeat = q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.full_like(t, float("nan")) for t in (q, k, v))
    for queries, keys in _segments(lengths, q, k):
        if queries.start == queries.stop:
            continue
        key, value = (t[keys].repeat_interleave(repeat, 1) for t in (k, v))
        p, _ = _softmax(q[queries], key, causal, scale, lse[:, queries])
        delta = (d_out[queries] * out[queries]).sum(-1).t().unsqueeze(-1)
        ds = p * (torch.einsum("rhd,phd->hrp", d_out[queries], value) - delta) * scale
        p, ds = _rounded(p, dtype), _rounded(ds, dtype)
        dq[queries] = torch.einsum("hrp,phd->rhd", ds, key)
        per_head = torch.einsum("hrp,rhd->phd", ds, q[queries]), torch.einsum("hrp,rhd->phd", p, d_out[queries])
        dk[keys], dv[keys] = (t.unflatten(1, (-1, repeat)).sum(2) for t in per_head)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _accumulated(*tensors: Tensor) -> list[Tensor]:
    return [t.to(accumulation_dtype(t)) for t in tensors]


def _rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).to(t.dtype)


def one_call_per_response(
    kernel: Varlen, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, plan: SharedPrefixPlan
) -> list[Tensor]:
    """Return out, dq, dk, dv of the packed row from one call per `[prefix | response]`; every prefix has responses.

    The gradients of a prefix are summed over its responses in the accumulation dtype and rounded once.
    """
    out, sums = torch.empty_like(q), [torch.zeros_like(t) for t in _accumulated(q, k, v)]
    key, row = 0, plan.prefix_tokens
    for prefix, responses in zip(plan.prefix_lengths, plan.response_lengths, strict=True):
        for index, response in enumerate(responses):
            rows = torch.cat([torch.arange(key, key + prefix), torch.arange(row, row + response)]).to(q.device)
            inputs = [t[rows] for t in (q, k, v)]
            edges = torch.tensor([0, len(rows)], dtype=torch.int32, device=q.device)
            lengths = Lengths(edges, edges, len(rows), len(rows))
            scale = q.shape[-1] ** -0.5
            out[rows], lse = kernel.attend(*inputs, lengths, True, scale)
            gradient = d_out[rows]
            # The outputs of the prefix count only once, with the first response.
            gradient[: prefix if index else 0] = 0
            gradients = kernel.attend_backward(gradient, *inputs, out[rows], lse, lengths, True, scale)
            for total, share in zip(sums, gradients, strict=True):
                total.index_add_(0, rows, share.to(total.dtype))
            row += response
        key += prefix
    return [out, *(total.to(q.dtype) for total in sums)]


STAND_IN = Varlen(stand_in_attend, stand_in_backward)
