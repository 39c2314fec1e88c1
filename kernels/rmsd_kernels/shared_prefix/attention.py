"""Compute exact attention over a packed row whose responses share their group's prefix. Each prefix is processed once.

    row:     [P_1 | P_2 | … | P_G | R_11 R_12 … | R_21 …]       prefixes first, then the responses, group by group
    call A:  every segment, prefix or response, attends to itself, causally
    call B:  all responses of a group attend to the group's prefix, not causally
    merge:   out = out_A + sigmoid(lse_B - lse_A) (out_B - out_A),  lse = logaddexp(lse_A, lse_B)     on response rows

Backward makes the same two calls, both with the merged out and lse. A flash backward computes p = exp(s - lse) and
delta = dout·out from its arguments, so each call returns exactly its share of dQ and its own dK and dV, and dQ is the
sum of the shares. Merging outside of a single autograd function would silently give wrong gradients, because flash
kernels drop the gradient of lse.

Work for M responses of R tokens on a prefix of P tokens: P²/2 + M (R²/2 + R P) query-key pairs, compared with
M (P + R)²/2 in separate rows. Each direction is one torch.library op, so autograd, both kinds of checkpointing and
torch.compile see a single call. Lengths are passed as tensors, so compiled code works for every plan. Only creating a
plan waits for the device.
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
    """The segments of one packed row of T tokens. Create it with `from_lengths`.

    Attributes:
        prefix_lengths: tokens of each prefix, [G].
        response_lengths: tokens of each group's responses, [G][M_g].
        lengths: G, the prefixes' tokens, the number of responses of each group, and the responses' tokens,
            [1 + 2G + M], int64 on the CPU.
        segments: edges of all segments in the row, [G + M + 1], int32 on the plan's device.
        group_queries: edges of each group's responses, counted from the first response, [G + 1], int32, same device.
        group_keys: edges of the prefixes, [G + 1], int32, same device.
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
        """Create the plan of a row with these segments.

        Args:
            prefix_lengths: tokens of each prefix, [G], integers >= 1.
            response_lengths: tokens of each prefix's responses, [G][M_g], integers >= 1; M_g may be 0.
            device: device on which the attention runs.
        Returns:
            The plan.
        Raises:
            ValueError: there is no prefix, a prefix or response is empty, or there is not one list of responses per
                prefix.
            TypeError: a length is not an integer.
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
        """T, the number of tokens of all prefixes and responses."""
        return self.prefix_tokens + sum(map(sum, self.response_lengths))

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens of all prefixes, which is also the row of the first response token."""
        return sum(self.prefix_lengths)

    @property
    def device(self) -> torch.device:
        """Device on which attention with this plan runs."""
        return self.segments.device

    def predicting_rows(self) -> Tensor:
        """Return, for each of the S response tokens in order, the index in the packed row that predicts it.

        A response's first token is predicted at its prefix's last token, every other token at the token before it.

        Returns:
            Indices, [S], int64 on the CPU.
        """
        rows, start, end = [], self.prefix_tokens, 0
        for prefix, group in zip(self.prefix_lengths, self.response_lengths, strict=True):
            end += prefix
            for length in group:
                rows += [end - 1, *range(start, start + length - 1)]
                start += length
        return torch.tensor(rows, dtype=torch.int64)

    def to(self, device: torch.device | str) -> "SharedPrefixPlan":
        """Return the same plan on another device."""
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
    """Compute causal attention of a packed row in which each response attends to its group's prefix and to itself.

    Same as scaled_dot_product_attention with the plan's [T, T] mask, which is never materialized. The result can be
    differentiated once.

    Args:
        q: queries, [T, H, d], floating, any strides.
        k: keys, [T, Hkv, d], dtype of q, any strides; H is a multiple of Hkv.
        v: values, [T, Hkv, d], dtype of q, any strides.
        plan: the row's segments, on the device of q.
        scale: factor of the scores; None means d ** -0.5.
        impl: "flash", "torch" or "auto".
            "flash" uses flash kernels. On CUDA these are FlashAttention-3 if it is installed and the device has compute
            capability 9.0, otherwise torch's own (bfloat16 and float16; d a multiple of 8, up to 256). CUDA kernels
            round both parts to 16 bits before they are merged; on response rows, the error of out and dq may be up to
            1.25 times the error of a single flash call. On CPU, torch's CPU flash kernel is used, and 16-bit inputs are
            converted to float32 where parts are summed.
            "torch" uses explicit matrix products in float32 (float64 for float64 inputs), for any device and floating
            dtype.
            "auto" uses flash kernels if they support the call, otherwise "torch".
    Returns:
        The attention output, [T, H, d], contiguous, in the dtype of q; under autocast in the autocast dtype, as
        scaled_dot_product_attention.
    Raises:
        ValueError: shapes, devices or the plan do not match.
        TypeError: dtypes do not match.
        RuntimeError: impl="flash" does not support the call.
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
    """Return (out [T, H, d], lse [H, T])."""
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
    """Return (dq, dk, dv) of the merged attention."""
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
    # In backward, grad mode is on only under create_graph=True, and always while torch.compile traces.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "shared_prefix_attention has no second derivatives (create_graph=True); use dense attention for them"
        )
    no_gradients = (None,) * 6
    if d_out is None:
        return None, None, None, *no_gradients
    return *_backward(d_out, *ctx.saved_tensors, ctx.scale, ctx.impl), *no_gradients


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype that autocast uses for scaled_dot_product_attention."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_heads(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], axis: int, shape: str) -> None:
    """Check that k and v have the same shape, the dtype, device and head size of q, and heads that divide those of q.

    `names` are the names of k and v in messages, `axis` is the axis of their heads, and `shape` is their expected shape
    in messages.
    """
    for name, tensor in zip(names, (k, v), strict=True):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {tensor.dtype}; cast it")
        checks.check_device(name, tensor, q)
        if tensor.ndim != len(shape.split(",")) or tensor.shape[-1] != q.shape[-1] or tensor.shape != k.shape:
            raise ValueError(
                f"{name}: expected shape {shape} with d={q.shape[-1]} as in q, the same for k and v, "
                f"got {list(tensor.shape)}"
            )
    heads, kv_heads = q.shape[1], k.shape[axis]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{names[0]}: expected a number of heads that divides the {heads} heads of q, got {kv_heads}")


def check_query(q: Tensor, shape: str) -> None:
    """Check for a floating tensor with 3 nonempty axes. `shape` is its expected shape in messages."""
    if not isinstance(q, Tensor) or q.ndim != 3 or 0 in q.shape:
        got = list(q.shape) if isinstance(q, Tensor) else type(q).__name__
        raise ValueError(f"q: expected shape {shape} with no empty axis, got {got}")
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
