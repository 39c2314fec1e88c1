"""Attention of M responses over one shared prefix, and what users have instead: the variants of bench_attention.

All compute out, dq, dk, dv of the packed row [P | R_1 … R_M] from the same q, k, v and gradient of out. Separate rows
[P | R_m] get their copies made beforehand, as a trainer whose batch is such rows has them anyway; the gradients of the
copies of a prefix are summed in backward, as autograd does where a tensor was expanded. The gradient of a prefix's
outputs goes to its first copy. Variants that do not run here raise Unavailable with the reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.core.measure import OURS, Unavailable, Variant, available, need
from rmsd_kernels import SharedPrefixPlan, shared_prefix_attention

FLEX, CEILING = "FlexAttention", "causal flash, P tokens"
VARLEN, LOOP = "separate rows, varlen flash", "separate rows, sdpa row by row"


@dataclass(frozen=True)
class Case:
    """`count` responses of `response` tokens over a prefix of `prefix`; decode: as many sequences, each with `response`
    tokens of its own, the new one included.
    """

    prefix: int
    response: int
    count: int = 12
    decode: bool = False
    heads: int = 32
    key_heads: int = 8
    size: int = 128
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"

    @property
    def name(self) -> str:
        what = f"decode-N{self.count}" if self.decode else f"M{self.count}"
        return f"P{self.prefix}-R{self.response}-{what}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def shared_pairs(self) -> int:
        """Pairs of query and key: the prefix with itself, each response with itself and with the prefix."""
        p, r = self.prefix, self.response
        return p * (p + 1) // 2 + self.count * (r * (r + 1) // 2 + r * p)

    @property
    def separate_pairs(self) -> int:
        """Of `count` rows [prefix | response]."""
        length = self.prefix + self.response
        return self.count * (length * (length + 1) // 2)


class Inputs(NamedTuple):
    """q [T, H, d], k and v [T, Hkv, d] with gradients; d_out [T, H, d]; rows: where those of copy m are, [M, P+R]."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    rows: Tensor
    plan: SharedPrefixPlan

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v


class Way(NamedTuple):
    """A variant whose backward gives the packed row's (dq, dk, dv), what makes of its output that of the packed row
    (None: it computes something else), and the pairs it has to compute.
    """

    variant: Variant
    packed: Callable[[Tensor], Tensor] | None
    pairs: int


Build = Callable[[Case, Inputs], Way]


def make_inputs(case: Case, dtype: torch.dtype | None = None) -> Inputs:
    """dtype: of the tensors, whose values are rounded to the case's all the same."""
    generator = torch.Generator(case.device).manual_seed(5)
    plan = SharedPrefixPlan.from_lengths([case.prefix], [[case.response] * case.count], device=case.device)

    def draw(heads: int) -> Tensor:
        values = torch.randn(plan.tokens, heads, case.size, generator=generator, device=case.device)
        return values.to(case.dtype).to(dtype or case.dtype)

    q, k, v, d_out = (draw(heads) for heads in (case.heads, case.key_heads, case.key_heads, case.heads))
    prefix = torch.arange(case.prefix, device=case.device).expand(case.count, -1)
    responses = torch.arange(case.prefix, plan.tokens, device=case.device).view(case.count, -1)
    rows = torch.cat([prefix, responses], dim=1)
    return Inputs(*(t.requires_grad_() for t in (q, k, v)), d_out, rows, plan)


def visible(case: Case, x: Inputs) -> Tensor:
    """The mask of the packed row, [T, T]."""
    owner, place = _owners(case, x), torch.arange(x.plan.tokens, device=case.device)
    return (place <= place[:, None]) & ((owner == 0) | (owner == owner[:, None]))


def _owners(case: Case, x: Inputs) -> Tensor:
    """Of each row of the packed row: 0 for the prefix, m for the m-th response."""
    place = torch.arange(x.plan.tokens, device=case.device)
    return torch.where(place < case.prefix, 0, (place - case.prefix) // case.response + 1)


def explicit(x: Inputs, mask: Tensor) -> Tensor:
    """The formula as eager code has it: scores and probabilities in the inputs' dtype, softmax in at least float32."""
    repeat = x.q.shape[1] // x.k.shape[1]
    q, k, v = (t.transpose(0, 1) for t in x.leaves)
    k, v = (t.repeat_interleave(repeat, dim=0) for t in (k, v))
    scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide.softmax(-1).to(q.dtype) @ v).transpose(0, 1)


def on_packed_row(
    name: str, case: Case, x: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor], *, compiles: bool = False
) -> Way:
    """attend(q, k, v) -> out, all of the packed row."""
    variant = Variant(
        name, lambda: attend(*x.leaves), lambda out: torch.autograd.grad(out, x.leaves, x.d_out), compiles
    )
    return Way(variant, lambda out: out, case.shared_pairs)


def on_separate_rows(name: str, case: Case, x: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Way:
    """attend(q, k, v) -> out, of copies [M, P+R, heads, d], causal in each."""
    p = case.prefix
    copies = tuple(t.detach()[x.rows].requires_grad_() for t in x.leaves)
    d_copies = x.d_out[x.rows]
    d_copies[1:, :p] = 0

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(out, copies, d_copies)
        return tuple(torch.cat([t[:, :p].sum(0), t[:, p:].flatten(0, 1)]) for t in found)

    variant = Variant(name, lambda: attend(*copies), backward)
    return Way(variant, lambda out: torch.cat([out[0, :p], out[:, p:].flatten(0, 1)]), case.separate_pairs)


def ours(case: Case, x: Inputs) -> Way:
    return on_packed_row(OURS, case, x, lambda q, k, v: shared_prefix_attention(q, k, v, x.plan))


def _separate_varlen(case: Case, x: Inputs) -> Way:
    """The copies one after another in torch's variable-length function."""
    _need_cuda(case, "variable-length flash kernels")
    function, (count, length) = _torch_varlen(), x.rows.shape
    edges = torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=case.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(t.flatten(0, 1) for t in (q, k, v)), edges, edges, length, length)
        return out.unflatten(0, (count, length))

    return on_separate_rows(VARLEN, case, x, attend)


def _torch_varlen() -> Callable[..., Tensor]:
    function = need("torch.nn.attention.varlen").varlen_attn
    # torch 2.11 takes fewer key heads without a word, later ones want to be told.
    gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(function).parameters else {}
    return functools.partial(function, window_size=(-1, 0), **gqa)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, T, heads, d]: the flash kernel on CUDA, torch's choice on CPU."""
    rows = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if q.is_cuda else nullcontext():
        return scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)


def _separate_loop(case: Case, x: Inputs) -> Way:
    if case.device != "cpu":
        raise Unavailable("the form for CPU")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([_causal(*row) for row in zip(q.split(1), k.split(1), v.split(1), strict=True)])

    return on_separate_rows(LOOP, case, x, attend)


def sees(case: Case, x: Inputs) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`visible` as FlexAttention asks for it."""
    owner = _owners(case, x)

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((owner[key] == 0) | (owner[key] == owner[query]))

    return mask


def _flex(case: Case, x: Inputs) -> Way:
    """The mask of blocks is made here, outside of what is timed."""
    if case.device != "cuda":
        raise Unavailable("FlexAttention has no backward on CPU")
    flex, tokens = need("torch.nn.attention.flex_attention"), x.plan.tokens
    mask = flex.create_block_mask(sees(case, x), None, None, tokens, tokens, device=case.device)
    torch._dynamo.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (t.transpose(0, 1)[None] for t in (q, k, v))
        return compiled(*rows, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return on_packed_row(FLEX, case, x, attend, compiles=True)


def _ceiling(case: Case, x: Inputs) -> Way:
    """What the same kernel makes of the prefix alone."""
    rows = tuple(t.detach()[None, : case.prefix].clone().requires_grad_() for t in x.leaves)
    d_out = x.d_out[None, : case.prefix]
    variant = Variant(CEILING, lambda: _causal(*rows), lambda out: torch.autograd.grad(out, rows, d_out))
    return Way(variant, None, case.prefix * (case.prefix + 1) // 2)


def _need_cuda(case: Case, what: str) -> None:
    if case.device != "cuda":
        raise Unavailable(f"{what} on CUDA only")


WAYS: dict[str, Build] = {
    OURS: ours,
    VARLEN: _separate_varlen,
    LOOP: _separate_loop,
    FLEX: _flex,
    CEILING: _ceiling,
}


def build_ways(case: Case, x: Inputs, skip: dict[str, str]) -> tuple[dict[str, Way], dict[str, str]]:
    """Return those that run here, ours first, and the reasons of the others."""
    return available({name: lambda b=build: b(case, x) for name, build in WAYS.items()}, skip)
