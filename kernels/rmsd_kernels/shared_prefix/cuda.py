"""Shared-prefix attention on CUDA, with two variable-length flash calls for any number of groups.

torch's own kernels are FlashAttention-2, so the package flash_attn (2) is not needed. FlashAttention-3
(`flash_attn_interface`) is used on supported devices (compute capability 9.0). Its interface is not stable, so the
first use checks that its ops accept the arguments that this file passes.

This file relies on these properties of the kernels:
- lse of variable-length calls is [H, T], and backward expects it to be contiguous.
- Gradients of keys that no query attends to may be left uninitialized.
- With a maximum query length of 1, the FlashAttention-2 forward assumes one query per segment, which is wrong for a
  group without responses. This file passes 2 instead, which is valid because the argument is only an upper bound.

The kernels round both parts to 16 bits. The merge is in float32, and its result is rounded again. On response rows, and
in gradients that are sums of two parts of similar size, the error is up to 1.25 times that of one call (measured with
CPU kernels).
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
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k")


class Lengths(NamedTuple):
    """Edges of the segments of queries and keys, int32 on the device, and bounds on their lengths.

    With `used_keys`, int32 on the device, only the first keys of each segment are used, as many as it says.
    """

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int
    used_keys: Tensor | None = None


class Varlen(NamedTuple):
    """A back end built from a kernel's forward and backward on q [T, H, d] and k, v [S, Hkv, d] with Lengths.

    attend(q, k, v, lengths, causal, scale) returns (out, lse [H, T]). With lengths=None, it takes q [B, T, H, d] and
    k, v [B, S, Hkv, d], and lse is [B, H, T].
    attend_backward(d_out, q, k, v, out, lse, lengths, causal, scale) returns (dq, dk, dv).
    """

    attend: Callable
    attend_backward: Callable

    def forward(self, q, k, v, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor]:
        """Return (out [T, H, d], lse [H, T])."""
        q, k, v = map(adjacent, (q, k, v))
        within_segments, over_prefixes = _calls(layout, edges)
        out, lse = self.attend(q, k, v, within_segments, True, scale)
        # The op returns contiguous tensors, but a kernel may use the strides of q.
        out = out.contiguous()
        if layout.groups:
            keys, queries = slice(0, layout.prefix_tokens), slice(layout.prefix_tokens, None)
            prefix_out, prefix_lse = self.attend(q[queries], k[keys], v[keys], over_prefixes, False, scale)
            merge_(out[queries], lse[:, queries], prefix_out, prefix_lse)
        return out, lse

    def backward(self, d_out, q, k, v, out, lse, layout: Layout, edges, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv)."""
        q, k, v = map(adjacent, (q, k, v))
        within_segments, over_prefixes = _calls(layout, edges)
        gradients = self.attend_backward(d_out, q, k, v, out, lse, within_segments, True, scale)
        dq, dk, dv = (t.contiguous() for t in gradients)
        if layout.groups:
            keys, queries = slice(0, layout.prefix_tokens), slice(layout.prefix_tokens, None)
            rows = (d_out[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries].contiguous())
            prefix_dq, prefix_dk, prefix_dv = self.attend_backward(*rows, over_prefixes, False, scale)
            dq[queries].add_(prefix_dq)
            for prefix_rows in _joined(layout.groups):
                dk[prefix_rows].add_(prefix_dk[prefix_rows])
                dv[prefix_rows].add_(prefix_dv[prefix_rows])
        return dq, dk, dv

    def attend_own(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float):
        """Return the attention of q [B, Hkv, r, d] over k, v [B, Hkv, t, d]: out [B, Hkv r, d], lse [Hkv r, B].

        With lengths, int32 [B], this is a variable-length call over whole buffers of t tokens, because the dense call
        does not take a number of used keys. The host does not read the lengths.
        """
        batch, _, fold, _ = q.shape
        query, key, value = (t.transpose(1, 2) for t in (q, *map(adjacent, (k, v))))
        if lengths is None:
            out, lse = self.attend(query, key, value, None, False, scale)
            return out.transpose(1, 2).flatten(1, 2), lse.flatten(1, 2).t()
        room = key.shape[1]
        edges = (
            torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device) for tokens in (fold, room)
        )
        bounds = Lengths(*edges, max(fold, _LEAST_BOUND), room, lengths)
        # Buffers that are stored token by token are not copied.
        out, lse = self.attend(*(t.flatten(0, 1) for t in (query, key, value)), bounds, False, scale)
        return _by_sequence(out, lse, batch)

    def attend_prefixes(self, q, k, v, prefixes, rows, edges, scale: float) -> tuple[Tensor, Tensor]:
        """Return the same for each group's rows over its prefix, with k, v [Tp, Hkv, d].

        If all prompts have the same length and number of rows, this is a dense call, in which FlashAttention-2 divides
        the keys among thread blocks. Otherwise it is a variable-length call, in which each block reads a whole prefix,
        so with few groups most of the device is idle.
        """
        k, v = map(adjacent, (k, v))
        batch, _, fold, _ = q.shape
        query = q.transpose(1, 2).flatten(0, 1)  # [B r, Hkv, d]
        if len(set(prefixes)) == 1 and len(set(rows)) == 1:
            batched = (t.unflatten(0, (len(prefixes), -1)) for t in (query, k, v))
            out, lse = self.attend(*batched, None, False, scale)
            out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1, 2)
        else:
            longest = max(max(rows) * fold, _LEAST_BOUND)
            lengths = Lengths(edges[0] * fold, edges[1], longest, max(prefixes))
            out, lse = self.attend(query, k, v, lengths, False, scale)
        return _by_sequence(out, lse, batch)


def _by_sequence(out: Tensor, lse: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return out [B r, Hkv, d] as [B, Hkv r, d], and lse [Hkv, B r] as [Hkv r, B]."""
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)
    return out, lse.unflatten(1, (batch, -1)).transpose(1, 2).flatten(0, 1)


def _calls(layout: Layout, edges: tuple[Tensor, ...]) -> tuple[Lengths, Lengths]:
    """Return the Lengths of the two calls: every segment over itself, and each group's responses over its prefix."""
    segments, group_queries, group_keys = edges
    longest = max(layout.longest_segment, _LEAST_BOUND)
    within_segments = Lengths(segments, segments, longest, longest)
    longest_queries = max(layout.longest_queries, _LEAST_BOUND)
    return within_segments, Lengths(group_queries, group_keys, longest_queries, layout.longest_keys)


def _joined(groups: tuple[Group, ...]) -> list[slice]:
    """Return the slices of the groups' keys, with adjacent slices joined."""
    joined: list[slice] = []
    for keys, _ in groups:
        if joined and joined[-1].stop == keys.start:
            keys = slice(joined.pop().start, keys.stop)
        joined.append(keys)
    return joined


def why_not(q: Tensor) -> str:
    """Return why the CUDA flash kernels do not support queries like q, or "" if they do."""
    if torch.version.hip:
        return "the lse of ROCm's flash kernels has a layout that is not supported"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA flash kernels take bfloat16 and float16, got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"the CUDA flash kernels take head sizes that are multiples of 8 up to 256, got {q.shape[-1]}"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"the CUDA flash kernels need compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"
    return ""


def kernels_for(q: Tensor) -> Varlen:
    """Return FlashAttention-3 if it is installed and supports the device, otherwise torch's kernels."""
    if torch.cuda.get_device_capability(q.device) == (9, 0) and _has_flash_attn_3():
        return flash_attn_3()
    return TORCH_FLASH


@lru_cache(maxsize=1)
def _has_flash_attn_3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None


def torch_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, causal: bool, scale: float):
    *bounds, used = Lengths(None, None, q.shape[1], k.shape[1]) if lengths is None else lengths
    forward = torch.ops.aten._flash_attention_forward
    out, lse, *_ = forward(q, k, v, *bounds, 0.0, causal, False, scale=scale, seqused_k=used)
    return out, lse


def torch_flash_backward(d_out, q, k, v, out, lse, lengths: Lengths, causal: bool, scale: float):
    # The random state is read only with dropout.
    rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    backward = torch.ops.aten._flash_attention_backward
    return backward(
        d_out, q, k, v, out, lse, *lengths[:4], 0.0, causal, rng_state, rng_state.new_empty(()), scale=scale
    )


TORCH_FLASH = Varlen(torch_flash, torch_flash_backward)


@lru_cache(maxsize=1)
def flash_attn_3() -> Varlen:
    """Return the ops of FlashAttention-3. Raise RuntimeError if they do not accept the arguments passed here."""
    importlib.import_module("flash_attn_interface")
    settings = ("softmax_scale", "is_causal")
    forward = _op("fwd", ("q", "k", "v", *_LENGTHS, *settings))
    tensors = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv")
    backward = _op("bwd", (*tensors, *_LENGTHS[:4], *settings, "deterministic"))

    def attend(q, k, v, lengths: Lengths | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        bounds = {} if lengths is None else dict(zip(_LENGTHS, lengths, strict=True))
        out, lse, *_ = forward(q=q, k=k, v=v, softmax_scale=scale, is_causal=causal, **bounds)
        return out, lse

    def attend_backward(d_out, q, k, v, out, lse, lengths: Lengths, causal: bool, scale: float):
        gradients = tuple(t.new_empty(t.shape) for t in (q, k, v))
        backward(
            **dict(zip(tensors, (d_out, q, k, v, out, lse, *gradients), strict=True)),
            **dict(zip(_LENGTHS[:4], lengths[:4], strict=True)),
            softmax_scale=scale,
            is_causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients

    return Varlen(attend, attend_backward)


def _op(name: str, passed: tuple[str, ...]) -> Callable:
    """Return torch.ops.flash_attn_3.<name>, which must accept every argument in `passed` and require no other."""
    try:
        op = getattr(torch.ops.flash_attn_3, name).default
    except AttributeError:
        raise RuntimeError(_unsupported(f"has no op flash_attn_3::{name}")) from None
    arguments = op._schema.arguments
    unknown = sorted(set(passed) - {argument.name for argument in arguments})
    missing = sorted(a.name for a in arguments if not a.has_default_value() and a.name not in passed)
    if unknown or missing:
        raise RuntimeError(
            _unsupported(
                f"has another interface: flash_attn_3::{name} does not accept {unknown} and also requires {missing}"
            )
        )
    return op


def _unsupported(what: str) -> str:
    return f"the installed flash_attn_interface {what}; install another version, remove it, or use impl='torch'"
