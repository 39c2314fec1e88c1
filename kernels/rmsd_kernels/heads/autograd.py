"""Define the gradients of the loops in `loops`: four autograd functions, and the choice between them for log-probs.

- `one_pass`: forward computes all gradients, because each row's gradient is known up to one common factor. Backward
  multiplies them by this factor. The function returns a zero that carries the gradient; the value of the loss is
  computed separately from the scores.
- `score`: log-probs, entropy and exact KL, with any upstream gradient per row. Logits are kept for backward if all of
  them fit into the memory budget, and recomputed otherwise. If the head is frozen and only log-probs are
  differentiated, forward computes d logp / d hidden instead.
- `divergence`: same as one_pass.

The first backward of `one_pass`, of `divergence` and through kept logits overwrites tensors saved by forward, so a
second backward raises. Tensors that receive a gradient are separate arguments; all other inputs are fields of records
and constants to autograd.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype, first_order
from . import loops
from .chunks import DEFAULT_KEPT_BYTES
from .loops import Stat
from .row_types import Execution, HeadCall, Needs, PolicyTerms


class HeadScores(NamedTuple):
    """Per-row scores [T]: logp, entropy and full_kl with a gradient, ref_logp without. None if not requested."""

    logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    full_kl: Tensor | None


def one_pass(
    call: HeadCall, terms: PolicyTerms, execution: Execution, *, skip_idle: bool = False
) -> tuple[HeadScores, Tensor]:
    """Return detached scores, and a zero whose gradient is the gradient of the summed policy losses of the rows.

    skip_idle: whether to find rows whose gradient is known to be 0 and skip their backward GEMMs.
    """
    needs = _needs(call)
    if not any(needs):
        return score(call, execution), call.hidden.new_zeros((), dtype=terms.scale.dtype)
    unit = _unit(call.hidden, terms.scale)
    if unit is not None:
        terms = terms._replace(scale=terms.scale / unit)
    arguments = {"terms": terms, "skip_idle": skip_idle, "needs": needs, "execution": execution}
    stats, carrier = _OnePass.apply(call.hidden, call.weight, call.bias, _constants(call), arguments)
    return _detached(stats, call), carrier if unit is None else carrier * unit


def score(call: HeadCall, execution: Execution, *, entropy_grad: bool = True) -> HeadScores:
    """Return the scores of the rows, differentiable if an input needs a gradient."""
    needs, constants = _needs(call), _constants(call)
    if not any(needs):
        stats, _, _ = loops.head_score(call=constants, keep=False, execution=execution)
        return _detached(stats, call)
    if needs == (True, False, False) and not entropy_grad and not call.full_kl:
        stats, logp = _FrozenHead.apply(call.hidden, constants, execution)
        return _detached(stats, call)._replace(logp=logp)
    row_bytes = len(call.weight) * call.hidden.element_size() * (1 + call.full_kl)
    kept_bytes = execution.budget or DEFAULT_KEPT_BYTES.get(call.hidden.device.type, DEFAULT_KEPT_BYTES["cpu"])
    keep = len(call.hidden) * row_bytes <= kept_bytes
    arguments = (call.hidden, call.weight, call.bias, constants, keep, needs, execution)
    stats, logp, entropy, full_kl = _Scores.apply(*arguments)
    ref_logp = _detached(stats, call).ref_logp
    return HeadScores(logp, entropy, ref_logp, full_kl if call.full_kl else None)


def divergence(
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    topk_ids: Tensor | None,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    vocab_clip: float | None,
    scale: Tensor,
    skip_zero_scale: bool,
    execution: Execution,
) -> Tensor:
    """Return the sum of scale * divergence over rows, a scalar with a gradient. Arguments as in head_divergence."""
    grad = torch.is_grad_enabled()
    needs = Needs(grad and hidden.requires_grad, grad and weight.requires_grad, bias=False)
    unit = _unit(hidden, scale) if any(needs) else None
    arguments = {
        "teacher": teacher,
        "teacher_weight": teacher_weight,
        "topk_ids": topk_ids,
        "temperature": temperature,
        "kind": kind,
        "alpha": alpha,
        "vocab_clip": vocab_clip,
        "scale": scale if unit is None else scale / unit,
        "skip_zero_scale": skip_zero_scale,
        "needs": needs,
        "execution": execution,
    }
    if any(needs):
        values, carrier = _Divergence.apply(hidden, weight, arguments)
        carrier = carrier if unit is None else carrier * unit
    else:
        values, _, _ = loops.head_divergence(hidden=hidden.detach(), weight=weight.detach(), **arguments)
        carrier = 0.0
    return torch.where(scale == 0, 0.0, values * scale).sum() + carrier


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, arguments):
        stats, *gradients = loops.head_policy(call=call, **arguments)
        return _save_gradients(ctx, stats, gradients)

    @staticmethod
    @first_order
    def backward(ctx, _, g):
        return *_scale_saved_gradients(ctx, g), None, None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, arguments):
        values, *gradients = loops.head_divergence(hidden=hidden.detach(), weight=weight.detach(), **arguments)
        return _save_gradients(ctx, values, gradients)

    @staticmethod
    @first_order
    def backward(ctx, _, g):
        return *_scale_saved_gradients(ctx, g), None


class _FrozenHead(torch.autograd.Function):
    """Compute logp, and already in forward d logp / d hidden = W[y] - p W, so that no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, hidden, call, execution):
        ones = torch.ones(len(hidden), dtype=accumulation_dtype(hidden), device=hidden.device)
        terms, needs = PolicyTerms(scale=ones, advantage=-ones), Needs(hidden=True, weight=False, bias=False)
        stats, d_hidden, _, _ = loops.head_policy(
            call=call, terms=terms, skip_idle=False, needs=needs, execution=execution
        )
        ctx.save_for_backward(d_hidden, call.targets)
        ctx.ignore_index = call.ignore_index
        ctx.mark_non_differentiable(stats)
        return stats, stats[Stat.LOGP].clone()

    @staticmethod
    @first_order
    def backward(ctx, _, g_logp):
        d_hidden, targets = ctx.saved_tensors
        if ctx.ignore_index is not None:
            # The upstream gradient of an ignored row may be NaN, and 0 * NaN is NaN.
            g_logp = torch.where(targets == ctx.ignore_index, 0.0, g_logp)
        return (d_hidden * g_logp.unsqueeze(1)).to(d_hidden.dtype), None, None


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, keep, needs, execution):
        stats, logits, ref_logits = loops.head_score(call=call, keep=keep, execution=execution)
        # Save the inputs themselves, not detached aliases: hooks for saved tensors and ZeRO-3 identify parameters by
        # identity.
        call = call._replace(hidden=hidden, weight=weight, bias=bias)
        tensors = {name: value for name, value in call._asdict().items() if isinstance(value, Tensor)}
        ctx.save_for_backward(stats, *((logits, ref_logits) if keep else ()), *tensors.values())
        ctx.tensors, ctx.values = tuple(tensors), {n: v for n, v in call._asdict().items() if n not in tensors}
        ctx.keep, ctx.needs, ctx.execution = keep, needs, execution
        ctx.mark_non_differentiable(stats)
        # Outputs that the loss does not use then have no cost in backward.
        ctx.set_materialize_grads(False)
        return stats, stats[Stat.LOGP].clone(), stats[Stat.ENTROPY].clone(), stats[Stat.FULL_KL].clone()

    @staticmethod
    @first_order
    def backward(ctx, _, g_logp, g_entropy, g_full_kl):
        if ctx.keep:
            _allow_one_backward(ctx)
        stats, *saved = ctx.saved_tensors
        kept, tensors = (saved[:2], saved[2:]) if ctx.keep else (None, saved)
        call = HeadCall(**dict(zip(ctx.tensors, tensors, strict=True)), **ctx.values)
        logits, ref_logits = kept or (call.hidden.new_empty(0, len(call.weight)) for _ in range(2))
        checks.refuse_sharded("weight", call.weight)
        gradients = loops.head_gradient(
            call=call,
            stats=stats,
            g_logp=torch.zeros_like(stats[Stat.LOGP]) if g_logp is None else g_logp,
            g_entropy=g_entropy,
            g_full_kl=g_full_kl if call.full_kl else None,
            logits=logits,
            ref_logits=ref_logits,
            needs=ctx.needs,
            execution=ctx.execution,
        )
        return *_present(gradients), None, None, None, None


def _save_gradients(ctx, values: Tensor, gradients: list[Tensor]) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(values)
    # Materializing a zero gradient of `values` would need an additional launch.
    ctx.set_materialize_grads(False)
    return values, values.new_zeros(())


def _scale_saved_gradients(ctx, g: Tensor | None) -> list[Tensor | None]:
    """Multiply the gradients computed in forward by g, in place, and return them; return Nones if g is None."""
    if g is not None:
        _allow_one_backward(ctx)
    gradients = ctx.saved_tensors
    if g is None:
        return [None] * len(gradients)
    for gradient in gradients:
        if gradient.numel():
            loops.scale_(gradient, g)
    return _present(gradients)


def _allow_one_backward(ctx) -> None:
    """Raise if backward has already run, because it overwrites its saved tensors."""
    # A compiled graph does not have this state.
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "backward_done", False):
        raise RuntimeError(
            "backward through a fused loss ran a second time, but the first one consumed the gradients in place; call "
            "the loss again, or sum the losses and call backward once"
        )
    ctx.backward_done = True


def _unit(hidden: Tensor, scale: Tensor) -> Tensor | None:
    """Return the divisor of float16 gradients computed in forward, or None for other dtypes.

    The loss scale multiplies the gradients only in backward. Before that, gradients of a mean over T tokens are too
    small for float16, while sums of T gradients of size 1 may be too large. A factor of sqrt(T) is a compromise.
    """
    if hidden.dtype != torch.float16 or not scale.numel():
        return None
    return scale.abs().max().clamp(min=torch.finfo(torch.float32).tiny) * scale.numel() ** 0.5


def _present(gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if gradient.dim() > 1 or gradient.numel() else None for gradient in gradients]


def _needs(call: HeadCall) -> Needs:
    if not torch.is_grad_enabled():
        return Needs(False, False, False)
    with_bias = call.bias is not None and call.bias.requires_grad
    return Needs(call.hidden.requires_grad, call.weight.requires_grad, with_bias)


def _constants(call: HeadCall) -> HeadCall:
    return HeadCall(*(t.detach() if isinstance(t, Tensor) else t for t in call))


def _detached(stats: Tensor, call: HeadCall) -> HeadScores:
    ref_logp = None if call.ref_hidden is None else stats[Stat.REF_LOGP]
    return HeadScores(stats[Stat.LOGP], stats[Stat.ENTROPY], ref_logp, stats[Stat.FULL_KL] if call.full_kl else None)
