"""Compute one decode step of B sequences. Keys and values of a prompt are stored once, not once per sequence.

Attention over a sequence's own keys and attention over its prompt's keys are two calls, merged as in `attention`. Query
heads that share a key head are folded into query rows, so that both calls read each key once for all of these heads.
This is exact because there is no mask. Gradients are not supported.

A prompt may consist of a prefix that other prompts share, such as a video, and a suffix of its own, such as a question
about it. The keys of suffixes are then a third part, with a plan of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from .attention import autocast, check_heads, check_query
from .backends import IMPLEMENTATIONS, backend_of, count_call
from .layout import cumulative, integers
from .merge import adjacent, merge_


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """The prefix of each of B = sum(rows) sequences, group by group. Create it with `from_counts`.

    Attributes:
        prefix_lengths: tokens of each prefix, [G].
        rows: number of sequences of each prefix, [G].
        lengths: G, prefix_lengths and rows, [1 + 2G], int64 on the CPU.
        group_queries: edges of each group's sequences, [G + 1], int32 on the plan's device.
        group_keys: edges of the prefixes, [G + 1], int32 on the plan's device.
    """

    prefix_lengths: tuple[int, ...]
    rows: tuple[int, ...]
    lengths: Tensor
    group_queries: Tensor
    group_keys: Tensor

    @classmethod
    def from_counts(
        cls, prefix_lengths: Sequence[int], rows: Sequence[int], *, device: torch.device | str = "cpu"
    ) -> "DecodePlan":
        """Create the plan in which rows[g] sequences decode on prefix g.

        Args:
            prefix_lengths: tokens of each prefix, [G], integers >= 1.
            rows: number of sequences of each prefix, [G], integers >= 0, not all 0.
            device: device on which the attention runs.
        Returns:
            The plan.
        Raises:
            ValueError: the lists differ in length, or a number is out of range.
            TypeError: a number is not an integer.
        """
        prefixes, counts = integers("prefix_lengths", prefix_lengths), integers("rows", rows)
        if not prefixes or len(prefixes) != len(counts):
            raise ValueError(
                f"rows: expected one number per prefix and at least one prefix, got {len(counts)} for "
                f"{len(prefixes)} prefixes"
            )
        if min(prefixes) < 1:
            raise ValueError(f"prefix_lengths: expected at least 1 token each, got {list(prefixes)}")
        if min(counts) < 0 or not any(counts):
            raise ValueError(f"rows: expected numbers >= 0, not all 0, got {list(counts)}")
        lengths = torch.tensor([len(prefixes), *prefixes, *counts], dtype=torch.int64)
        return cls(prefixes, counts, lengths, cumulative(counts, device), cumulative(prefixes, device))

    def to(self, device: torch.device | str) -> "DecodePlan":
        """Return the same plan on another device."""
        edges = (t.to(device, non_blocking=True) for t in (self.group_queries, self.group_keys))
        return DecodePlan(self.prefix_lengths, self.rows, self.lengths, *edges)


def shared_prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    plan: DecodePlan,
    *,
    own_lengths: Tensor | None = None,
    suffix_k: Tensor | None = None,
    suffix_v: Tensor | None = None,
    suffix_plan: DecodePlan | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute attention of one new token per sequence over its group's prefix and its own tokens.

    With `own_lengths`, own_k and own_v are buffers of which only the first tokens are used. On CUDA, the host does not
    read these numbers, so a step can be captured in a CUDA graph and replayed while they grow. On CPU, the result has
    the same bits as a call with slices of the buffers, except with impl="torch", which masks the scores.

    Args:
        q: queries, [B, H, d], floating.
        prefix_k: keys of all prefixes, concatenated, [Tp, Hkv, d], dtype of q.
        prefix_v: values of all prefixes, concatenated, [Tp, Hkv, d], dtype of q.
        own_k: keys of each sequence's own tokens, including the new token, [B, Hkv, t, d], t >= 1, dtype of q. May be a
            view of a larger buffer.
        own_v: values of each sequence's own tokens, [B, Hkv, t, d], dtype of q. May be a view of a larger buffer.
        plan: the prefix of each sequence, on the device of q.
        own_lengths: number of used tokens of each sequence in own_k and own_v, from 1 to t, [B], int32, contiguous, on
            the device of q; None means t. The values in unused places must be finite, and those of own_lengths are
            checked on CPU only, because CUDA would have to wait. On CUDA, flash kernels need buffers with the strides
            of [B, t, Hkv, d]; others are copied.
        suffix_k: keys of all suffixes between prefix and own tokens, concatenated, [Ts, Hkv, d], dtype of q; None if
            prompts have none.
        suffix_v: values of all suffixes, [Ts, Hkv, d], dtype of q.
        suffix_plan: the suffix of each sequence, on the device of q. Its groups are finer than those of `plan`.
        scale: factor of the scores; None means d ** -0.5.
        impl: as in shared_prefix_attention.
    Returns:
        The attention output, [B, H, d], contiguous, in the dtype of q; under autocast in the autocast dtype.
    Raises:
        ValueError: shapes, devices or the plan do not match.
        TypeError: dtypes do not match.
        RuntimeError: impl="flash" does not support the call, or an input requires a gradient.
    """
    q, prefix_k, prefix_v, own_k, own_v = autocast(q, prefix_k, prefix_v, own_k, own_v)
    _check_step(q, prefix_k, prefix_v, own_k, own_v, plan)
    suffix: tuple = (None,) * 5
    if suffix_plan is not None:
        suffix_k, suffix_v = autocast(suffix_k, suffix_v)
        _check_suffix(q, suffix_k, suffix_v, own_k, suffix_plan)
        suffix = (suffix_k, suffix_v, suffix_plan.lengths, suffix_plan.group_queries, suffix_plan.group_keys)
    if own_lengths is not None:
        _check_lengths(own_lengths, q)
    checks.check_choice("impl", impl, IMPLEMENTATIONS)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    edges = (plan.lengths, plan.group_queries, plan.group_keys)
    return _decode(q, prefix_k, prefix_v, own_k, own_v, own_lengths, *edges, scale, impl, *suffix)


@torch.library.custom_op("rmsd_kernels::shared_prefix_decode", mutates_args=())
def _decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    own_lengths: Tensor | None,
    lengths: Tensor,
    group_queries: Tensor,
    group_keys: Tensor,
    scale: float,
    impl: str,
    suffix_k: Tensor | None = None,
    suffix_v: Tensor | None = None,
    suffix_lengths: Tensor | None = None,
    suffix_queries: Tensor | None = None,
    suffix_edges: Tensor | None = None,
) -> Tensor:
    count_call()
    prefixes, rows = _numbers(lengths)
    if len(q) != sum(rows) or len(prefix_k) != sum(prefixes):
        raise ValueError(
            f"q and prefix_k: expected the plan's B={sum(rows)} and Tp={sum(prefixes)}, "
            f"got {len(q)} and {len(prefix_k)}"
        )
    if own_lengths is not None and own_lengths.device.type == "cpu":
        used = own_lengths.tolist()
        if min(used) < 1 or max(used) > own_k.shape[2]:
            raise ValueError(f"own_lengths: expected numbers from 1 to t={own_k.shape[2]}, got {used}")
    with torch.autocast(q.device.type, enabled=False):
        folded = adjacent(q).unflatten(1, (own_k.shape[1], -1))  # [B, Hkv, r, d]
        backend = backend_of(q, impl)
        out, lse = backend.attend_own(folded, own_k, own_v, own_lengths, scale)
        if suffix_lengths is not None:
            numbers, edges = _numbers(suffix_lengths), (suffix_queries, suffix_edges)
            suffix_out, suffix_lse = backend.attend_prefixes(folded, suffix_k, suffix_v, *numbers, edges, scale)
            merge_(out, lse, suffix_out, suffix_lse)
        edges = (group_queries, group_keys)
        prefix_out, prefix_lse = backend.attend_prefixes(folded, prefix_k, prefix_v, prefixes, rows, edges, scale)
        merge_(out, lse, prefix_out, prefix_lse, needs_lse=False)
        return out.to(q.dtype).contiguous()


@_decode.register_fake
def _(q, *_):
    return q.new_empty(q.shape)


def _numbers(lengths: Tensor) -> tuple[list[int], list[int]]:
    """Return prefix_lengths and rows of a plan's `lengths`."""
    groups, *numbers = lengths.tolist()
    return numbers[:groups], numbers[groups:]


def _check_step(q, prefix_k, prefix_v, own_k, own_v, plan: DecodePlan) -> None:
    check_query(q, "[B, H, d]")
    check_heads(q, prefix_k, prefix_v, ("prefix_k", "prefix_v"), 1, "[Tp, Hkv, d]")
    check_heads(q, own_k, own_v, ("own_k", "own_v"), 1, "[B, Hkv, t, d]")
    if own_k.shape[1] != prefix_k.shape[1]:
        raise ValueError(f"own_k: expected the {prefix_k.shape[1]} heads of prefix_k, got {own_k.shape[1]}")
    if own_k.shape[0] != q.shape[0] or own_k.shape[2] == 0:
        raise ValueError(
            f"own_k: expected B={q.shape[0]} sequences of t >= 1 tokens, the new one included, got {list(own_k.shape)}"
        )
    if not isinstance(plan, DecodePlan):
        raise ValueError(f"plan: expected a DecodePlan, got {type(plan).__name__}; make one with from_counts")
    checks.check_device("plan", plan.group_queries, q)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, prefix_k, prefix_v, own_k, own_v)):
        raise RuntimeError("shared_prefix_decode has no gradient; call it under torch.no_grad()")


def _check_suffix(q, suffix_k, suffix_v, own_k, suffix_plan: DecodePlan) -> None:
    if not isinstance(suffix_plan, DecodePlan) or suffix_k is None or suffix_v is None:
        raise ValueError(
            "suffix_plan: expected a DecodePlan together with suffix_k and suffix_v; pass all three or none"
        )
    check_heads(q, suffix_k, suffix_v, ("suffix_k", "suffix_v"), 1, "[Ts, Hkv, d]")
    if own_k.shape[1] != suffix_k.shape[1]:
        raise ValueError(f"suffix_k: expected the {own_k.shape[1]} heads of own_k, got {suffix_k.shape[1]}")
    rows, tokens = sum(suffix_plan.rows), sum(suffix_plan.prefix_lengths)
    if rows != len(q) or tokens != len(suffix_k):
        raise ValueError(
            f"suffix_plan: expected B={len(q)} sequences and Ts={len(suffix_k)} tokens, got {rows} and {tokens}"
        )
    checks.check_device("suffix_plan", suffix_plan.group_queries, q)
    if torch.is_grad_enabled() and (suffix_k.requires_grad or suffix_v.requires_grad):
        raise RuntimeError("shared_prefix_decode has no gradient; call it under torch.no_grad()")


def _check_lengths(own_lengths: Tensor, q: Tensor) -> None:
    if own_lengths.dtype != torch.int32:
        raise TypeError(f"own_lengths: expected int32, got {own_lengths.dtype}")
    if own_lengths.shape != q.shape[:1] or not own_lengths.is_contiguous():
        raise ValueError(f"own_lengths: expected a contiguous vector of B={len(q)}, got {list(own_lengths.shape)}")
    checks.check_device("own_lengths", own_lengths, q)
