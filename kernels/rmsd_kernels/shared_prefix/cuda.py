"""Shared-prefix attention on CUDA: two variable-length flash calls for all groups together, whatever their number.

torch's own kernels are FlashAttention-2, so the package flash_attn (2) would bring nothing and is not used.
FlashAttention-3 (`flash_attn_interface`) is, on the devices it is written for (compute capability 9.0): its ops are
checked against the arguments given here when they are first used, since its interface is not a stable one.

Facts on the kernels that this file relies on: lse of variable-length calls is [H, T], and backward reads it as one
block; gradients of keys that no query sees need not be written; with a longest query of 1 the FlashAttention-2 forward
takes the row for one query per segment, which a group without responses breaks, so 2 is said instead (it is a bound).

The kernels round both parts to 16 bit before they are merged, in float32, and rounded again: on response rows, and in
gradients that are sums of two parts of equal size, up to 1.25 times the error of one call (found with CPU kernels).
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Group, Layout
from .merge import adjacent, merge_

_LEAST_BOUND = 2
# FlashAttention-3's names for the fields of Lengths.
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


class Lengths(NamedTuple):
    """Edges of the segments of queries and keys, int32 on the device, and bounds on their lengths."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


class Varlen(NamedTuple):
    """A backend made of a kernel's two directions on q [T, H, d] and k, v [S, Hkv, d] with Lengths.

    attend(q, k, v, lengths, causal, scale) -> (out, lse [H, T]); with lengths=None on [B, T, H, d] and [B, S, Hkv, d],
    whose lse is [B, H, T]. attend_backward(d_out, q, k, v, out, lse, lengths, causal, scale) -> (dq, dk, dv).
    """

    attend: Callable
    attend_backward: Callable

    def forward(self, q, k, v, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor]:
        """(out [T, H, d], lse [H, T])."""
        q, k, v = map(adjacent, (q, k, v))
        own, shared = _calls(layout, edges)
        out, lse = self.attend(q, k, v, own, True, scale)
        # The op promises adjacent rows, a kernel may follow the strides of q.
        out = out.contiguous()
        if layout.groups:
            keys, queries = slice(0, layout.prefix_tokens), slice(layout.prefix_tokens, None)
            part, part_lse = self.attend(q[queries], k[keys], v[keys], shared, False, scale)
            merge_(out[queries], lse[:, queries], part, part_lse)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv)."""
        q, k, v = map(adjacent, (q, k, v))
        own, shared = _calls(layout, edges)
        parts = self.attend_backward(d_out, q, k, v, out, lse, own, True, scale)
        dq, dk, dv = (t.contiguous() for t in parts)
        if layout.groups:
            keys, queries = slice(0, layout.prefix_tokens), slice(layout.prefix_tokens, None)
            rows = (d_out[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous())
            part_q, part_k, part_v = self.attend_backward(*rows, shared, False, scale)
            dq[queries].add_(part_q)
            for used in _joined(layout.groups):
                dk[used].add_(part_k[used])
                dv[used].add_(part_v[used])
        return dq, dk, dv

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Of q [B, Hkv, r, d] over k, v [B, Hkv, t, d]: out [B, Hkv r, d], lse [Hkv r, B]."""
        rows = (t.transpose(1, 2) for t in (q, *map(adjacent, (k, v))))
        out, lse = self.attend(*rows, None, False, scale)
        return out.transpose(1, 2).flatten(1, 2), lse.flatten(1, 2).t()

    def attend_prefixes(self, q, k, v, prefixes, rows, edges, scale: float) -> tuple[Tensor, Tensor]:
        """The same of each group's rows over its prefix, k, v [Tp, Hkv, d].

        Prompts of one length with equally many rows are one dense call, for which FlashAttention-2 divides the keys
        among thread blocks. Its variable-length call, which all others take, does not: each block then reads a whole
        prefix, and few groups leave most of a device idle.
        """
        k, v = map(adjacent, (k, v))
        batch, _, fold, _ = q.shape
        query = q.transpose(1, 2).flatten(0, 1)  # [B r, Hkv, d]
        if len(set(prefixes)) == 1 and len(set(rows)) == 1:
            of_groups = (t.unflatten(0, (len(prefixes), -1)) for t in (query, k, v))
            out, lse = self.attend(*of_groups, None, False, scale)
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
        else:
            longest = max(max(rows) * fold, _LEAST_BOUND)
            lengths = Lengths(edges[0] * fold, edges[1], longest, max(prefixes))
            out, lse = self.attend(query, k, v, lengths, False, scale)
        out = out.unflatten(0, (batch, fold)).transpose(1, 2).flatten(1, 2)
        return out, lse.unflatten(1, (batch, fold)).transpose(1, 2).flatten(0, 1)


def _calls(layout: Layout, edges: tuple[Tensor, ...]) -> tuple[Lengths, Lengths]:
    """Every segment over itself; each group's responses over its prefix."""
    segments, group_queries, group_keys = edges
    longest = max(layout.longest_segment, _LEAST_BOUND)
    own = Lengths(segments, segments, longest, longest)
    return own, Lengths(group_queries, group_keys, max(layout.longest_queries, _LEAST_BOUND), layout.longest_keys)


def _joined(groups: tuple[Group, ...]) -> list[slice]:
    """The groups' keys, neighbours as one."""
    joined: list[slice] = []
    for keys, _ in groups:
        if joined and joined[-1].stop == keys.start:
            keys = slice(joined.pop().start, keys.stop)
        joined.append(keys)
    return joined


def why_not(q: Tensor) -> str:
    """Why the flash kernels do not take queries like q on CUDA, "" where they do."""
    if torch.version.hip:
        return "the lse of ROCm's flash kernels has another layout than is read here"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA flash kernels take bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"the CUDA flash kernels take head sizes that are multiples of 8 up to 256, got {q.shape[-1]}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"the CUDA flash kernels need compute capability 8.0, got {capability[0]}.{capability[1]}"
    return ""


def kernels_for(q: Tensor) -> Varlen:
    """FlashAttention-3 where it is installed and meant for the device, else torch's kernels."""
    if torch.cuda.get_device_capability(q.device) == (9, 0) and _has_flash_attn_3():
        return flash_attn_3()
    return TORCH_FLASH


@lru_cache(maxsize=1)
def _has_flash_attn_3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None


def torch_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, causal: bool, scale: float):
    given = (None, None, q.shape[1], k.shape[1]) if lengths is None else lengths
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *given, 0.0, causal, False, scale=scale)
    return out, lse


def torch_flash_backward(d_out, q, k, v, out, lse, lengths: Lengths, causal: bool, scale: float):
    # The state of the random numbers is read with dropout alone.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    backward = torch.ops.aten._flash_attention_backward
    return backward(d_out, q, k, v, out, lse, *lengths, 0.0, causal, state, state.new_empty(()), scale=scale)


TORCH_FLASH = Varlen(torch_flash, torch_flash_backward)


@lru_cache(maxsize=1)
def flash_attn_3() -> Varlen:
    """The ops of FlashAttention-3; RuntimeError where they take other arguments than the ones given here."""
    importlib.import_module("flash_attn_interface")
    settings = (*_LENGTHS, "softmax_scale", "is_causal")
    forward = _op("fwd", ("q", "k", "v", *settings))
    tensors = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
    backward = _op("bwd", (*tensors, *settings, "deterministic"))

    def attend(q, k, v, lengths: Lengths | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        given = {} if lengths is None else dict(zip(_LENGTHS, lengths, strict=True))
        out, lse, *_ = forward(q=q, k=k, v=v, softmax_scale=scale, is_causal=causal, **given)
        return out, lse

    def attend_backward(d_out, q, k, v, out, lse, lengths: Lengths, causal: bool, scale: float):
        gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
        backward(
            **dict(zip(tensors, (d_out, q, k, v, out, lse, *gradients), strict=True)),
            **dict(zip(_LENGTHS, lengths, strict=True)),
            softmax_scale=scale,
            is_causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients

    return Varlen(attend, attend_backward)


def _op(name: str, given: tuple[str, ...]) -> Callable:
    """torch.ops.flash_attn_3.<name>, which must know every argument given and demand no other."""
    try:
        op = getattr(torch.ops.flash_attn_3, name).default
    except AttributeError:
        raise RuntimeError(_unknown(f"has no op flash_attn_3::{name}")) from None
    arguments = op._schema.arguments
    unknown = sorted(set(given) - {argument.name for argument in arguments})
    missing = sorted(a.name for a in arguments if not a.has_default_value() and a.name not in given)
    if unknown or missing:
        raise RuntimeError(
            _unknown(f"has another interface: flash_attn_3::{name} does not know {unknown} and demands {missing}")
        )
    return op


def _unknown(what: str) -> str:
    return f"the installed flash_attn_interface {what}; install another version, remove it, or use impl='torch'"
