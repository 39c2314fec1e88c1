"""Attention over one packed row in which responses share their group's prefix: each prefix is read once, exactly.

    row:     [P_1 | P_2 | … | P_G | R_11 R_12 … | R_21 …]       prefixes first, then the responses, group by group
    call A:  every segment, prefix or response, attends to itself, causally
    call B:  all responses of a group attend to the group's prefix, not causally
    merge:   out = out_A + sigmoid(lse_B - lse_A) (out_B - out_A),  lse = logaddexp(lse_A, lse_B)     on response rows

Backward is the same two calls, both given the merged out and lse: a flash backward computes p = exp(s - lse) and
delta = dout·out from what it is given, so each call returns exactly its share of dQ and its own dK and dV, and the
shares add up. Merging outside of one autograd function would be wrong without a sign of it, as the gradient of a flash
kernel's lse is dropped everywhere.

Work with M responses of R tokens on P tokens: P²/2 + M (R²/2 + R P) pairs of query and key, against M (P + R)²/2 in
separate rows. Each direction is one torch.library op, so autograd, both kinds of checkpointing and torch.compile see
one call. Lengths reach it as tensors: compiled code serves every plan. Nothing but making a plan waits for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype, without_autocast
from .backends import IMPLEMENTATIONS, backend_of, count_call
from .layout import cumulative, integers, layout_of


@dataclass(frozen=True, eq=False)
class SharedPrefixPlan:
    """Segments of one packed row of T tokens; see `from_lengths`.

    prefix_lengths: tokens of each prefix, [G]; response_lengths: tokens of each group's responses, [G][M_g].
    lengths: int64 on the CPU, [1 + 2G + M]: G, the prefixes' tokens, the groups' numbers of responses, the responses'
        tokens. The other tensors are int32 on the plan's device: `segments` [G + M + 1], edges of all segments in the
        row; `group_queries` [G + 1], edges of each group's responses, counted from the first response; `group_keys`
        [G + 1], edges of the prefixes.
    """

    prefix_lengths: tuple[int, ...]
    response_lengths: tuple[tuple[int, ...], ...]
    lengths: Tensor
    segments: Tensor
    group_queries: Tensor
    group_keys: Tensor

    @classmethod
    def from_lengths(
        cls,
        prefix_lengths: Sequence[int],
        response_lengths: Sequence[Sequence[int]],
        *,
        device: torch.device | str = "cpu",
    ) -> "SharedPrefixPlan":
        """The plan of a row with these segments.

        Args:
            prefix_lengths: tokens of each prefix, [G], integers >= 1.
            response_lengths: for each prefix the tokens of its responses, integers >= 1; a prefix may have none.
            device: where the attention runs.
        Raises:
            ValueError: no prefix, an empty prefix or response, not one list of responses per prefix.
            TypeError: a length that is no integer.
        """
        prefixes = integers("prefix_lengths", prefix_lengths)
        responses = tuple(integers(f"response_lengths[{g}]", group) for g, group in enumerate(response_lengths))
        if not prefixes:
            raise ValueError("prefix_lengths: expected at least one prefix, got none")
        if len(responses) != len(prefixes):
            raise ValueError(
                f"response_lengths: expected one list per prefix, {len(prefixes)}, got {len(responses)}; a prefix "
                "without responses has an empty list"
            )
        for g, (prefix, group) in enumerate(zip(prefixes, responses, strict=True)):
            if prefix < 1:
                raise ValueError(f"prefix_lengths[{g}]: expected at least 1 token, got {prefix}")
            for m, length in enumerate(group):
                if length < 1:
                    raise ValueError(
                        f"response_lengths[{g}][{m}]: expected at least 1 token, got {length}; leave the response out"
                    )
        flat = [length for group in responses for length in group]
        lengths = [len(prefixes), *prefixes, *map(len, responses), *flat]
        return cls(
            prefixes,
            responses,
            torch.tensor(lengths, dtype=torch.int64),
            cumulative([*prefixes, *flat], device),
            cumulative([sum(group) for group in responses], device),
            cumulative(prefixes, device),
        )

    @property
    def tokens(self) -> int:
        """T, of prefixes and responses together."""
        return self.prefix_tokens + sum(map(sum, self.response_lengths))

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all prefixes: where the responses begin."""
        return sum(self.prefix_lengths)

    @property
    def device(self) -> torch.device:
        """Where attention with this plan runs."""
        return self.segments.device

    def predicting_rows(self) -> Tensor:
        """For each response token, response by response, the row of the packed row that predicts it: int64 [S], CPU.

        The first token of a response is predicted by its prefix's last row, every other by the row before it.
        """
        found, start, end = [], self.prefix_tokens, 0
        for prefix, group in zip(self.prefix_lengths, self.response_lengths, strict=True):
            end += prefix
            for length in group:
                found += [end - 1, *range(start, start + length - 1)]
                start += length
        return torch.tensor(found, dtype=torch.int64)

    def to(self, device: torch.device | str) -> "SharedPrefixPlan":
        """The same plan for another device."""
        edges = (t.to(device, non_blocking=True) for t in (self.segments, self.group_queries, self.group_keys))
        return SharedPrefixPlan(self.prefix_lengths, self.response_lengths, self.lengths, *edges)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SharedPrefixPlan,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Causal attention of a packed row in which every response sees its group's prefix and itself.

    Same as scaled_dot_product_attention with the [T, T] mask of the plan, which is never made. Differentiable once.

    Args:
        q: [T, H, d], float. k, v: [T, Hkv, d], the same dtype, H a multiple of Hkv; any strides.
        plan: the row's segments, on the tensors' device.
        scale: of the scores; None: d ** -0.5.
        impl: "flash": on CUDA flash-attn 3 where it is installed and the device is of compute capability 9.0, else
            torch's own flash kernels (bfloat16 and float16, d a multiple of 8 up to 256); on CPU torch's CPU flash, in
            16 bit with float32 inside where parts are added up. On CUDA the two parts are rounded to 16 bit before they
            are merged: on response rows, out and dq may err up to 1.25 times as much as from one flash call.
            "torch": explicit mathematics in float32 (float64 for float64), any device and floating dtype.
            "auto": flash where it can serve the call, else torch.
    Returns:
        [T, H, d], contiguous, in the dtype of q. Under autocast, in its dtype, as scaled_dot_product_attention.
    Raises:
        ValueError: shapes, devices or the plan do not fit. TypeError: dtypes do not fit.
        RuntimeError: impl="flash" cannot serve the call.
    """
    q, k, v = autocast(q, k, v)
    _check_row(q, k, v, plan)
    checks.check_choice("impl", impl, IMPLEMENTATIONS)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    edges = (plan.lengths, plan.segments, plan.group_queries, plan.group_keys)
    return _forward(q, k, v, *edges, scale, impl)[0]


@torch.library.custom_op("rmsd_kernels::shared_prefix_forward", mutates_args=())
@without_autocast
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    segments: Tensor,
    group_queries: Tensor,
    group_keys: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, d], lse [H, T])."""
    count_call()
    layout = layout_of(lengths)
    if q.shape[0] != layout.tokens:
        raise ValueError(f"q: expected the plan's T={layout.tokens} rows, got {q.shape[0]}")
    backend = backend_of(q, impl)
    return backend.forward(q, k, v, layout, (segments, group_queries, group_keys), scale)


@_forward.register_fake
def _(q, k, v, lengths, segments, group_queries, group_keys, scale, impl):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))


@torch.library.custom_op("rmsd_kernels::shared_prefix_backward", mutates_args=())
@without_autocast
def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Tensor,
    segments: Tensor,
    group_queries: Tensor,
    group_keys: Tensor,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the merged attention."""
    edges = (segments, group_queries, group_keys)
    return backend_of(q, impl).backward(d_out.contiguous(), q, k, v, out, lse, layout_of(lengths), edges, scale)


@_backward.register_fake
def _(d_out, q, k, v, out, lse, lengths, segments, group_queries, group_keys, scale, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.impl = inputs
    q, k, v, *plan = tensors
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, d_out, _):
    # Autograd records a backward exactly where create_graph asks for it; a trace for torch.compile always does.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "shared_prefix_attention has no second derivatives (create_graph=True); use dense attention for these"
        )
    nothing = (None,) * 6
    if d_out is None:
        return None, None, None, *nothing
    return *_backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.impl), *nothing


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would hand to scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], axis: int, shape: str) -> None:
    """k and v of one shape, with the dtype, device and head size of q, and a number of heads that divides that of q."""
    for name, other in zip(names, (k, v), strict=True):
        if other.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {other.dtype}; cast one")
        checks.check_device(name, other, q)
        if other.ndim != len(shape.split(",")) or other.shape[-1] != q.shape[-1] or other.shape != k.shape:
            raise ValueError(
                f"{name}: expected shape {shape} with d={q.shape[-1]} as q, k and v alike, got {list(other.shape)}"
            )
    heads, own = q.shape[1], k.shape[axis]
    if own == 0 or heads % own:
        raise ValueError(f"{names[0]}: expected a number of heads that divides the {heads} heads of q, got {own}")


def check_query(q: Tensor, shape: str) -> None:
    if not isinstance(q, Tensor) or q.ndim != 3 or 0 in q.shape:
        got = list(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"q: expected shape {shape}, none of them 0, got {got}")
    if not q.is_floating_point():
        raise TypeError(f"q: expected a floating dtype, got {q.dtype}")


def _check_row(q: Tensor, k: Tensor, v: Tensor, plan: SharedPrefixPlan) -> None:
    check_query(q, "[T, H, d]")
    check_heads(q, k, v, ("k", "v"), 1, "[T, Hkv, d]")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k: expected the {q.shape[0]} rows of q, got {k.shape[0]}")
    if not isinstance(plan, SharedPrefixPlan):
        raise ValueError(
            f"plan: expected a SharedPrefixPlan, got {type(plan).__name__}; make one with SharedPrefixPlan.from_lengths"
        )
    if plan.segments.device != q.device:
        raise ValueError(f"plan: expected device {q.device}, got {plan.segments.device}; use plan.to(q.device)")
