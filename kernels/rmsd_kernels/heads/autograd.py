"""Gradients of the loops in `loops`: three autograd functions, and the choice between them for log-probs.

- `one_pass`: the gradient's size per row is known but for one factor, so forward makes all gradients and backward
  multiplies them by it. Its value is a zero that carries the gradient; the loss's own value is computed beside it.
- `score`: log-probs, entropy and exact KL with any gradient per row. Logits are kept for backward where all of them fit
  the memory budget, else computed again. With a frozen head and log-probs alone, d logp / d hidden is made in forward.
- `divergence`: as one_pass.

Gradients made in forward and kept logits are used up in place by the first backward; a second one raises.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..ops import accumulation_dtype, first_order
from . import loops
from .chunks import DEFAULT_KEPT_BYTES
from .loops import Stat


class HeadCall(NamedTuple):
    """The head and what it is applied to; vectors in the accumulation dtype, refs without gradient."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: Tensor | None  # [T]
    softcap: float | None
    ignore_index: int | None
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    full_kl: bool = False


class HeadScores(NamedTuple):
    """Of each row [T]: logp, entropy and full_kl with a gradient, ref_logp without; None where not asked for."""

    logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    full_kl: Tensor | None


class RowTerms(NamedTuple):
    """Arguments of loops.head_policy after full_kl and before need_hidden."""

    scale: Tensor
    advantage: Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    rollout_logp: Tensor | None = None
    tis_cap: float = 0.0
    kl: str = "none"
    kl_coef: float = 0.0
    kl_log_ratio_clip: float | None = None
    clip_low: float = 0.0
    clip_high: float = 0.0
    entropy_coef: float = 0.0
    skip_idle: bool = False  # look for rows whose gradient is 0 beforehand


def one_pass(call: HeadCall, terms: RowTerms, impl: str, budget: int) -> tuple[HeadScores, Tensor]:
    """Detached scores, and a zero whose gradient is that of the rows' policy losses."""
    needs = _needs(call)
    if not any(needs):
        return score(call, impl, budget), call.hidden.new_zeros((), dtype=terms.scale.dtype)
    unit = _unit(call.hidden, terms.scale)
    if unit is not None:
        terms = terms._replace(scale=terms.scale / unit)
    stats, carrier = _OnePass.apply(*call, *terms, *needs, impl, budget)
    return _detached(stats, call), carrier if unit is None else carrier * unit


def score(call: HeadCall, impl: str, budget: int, entropy_grad: bool = True) -> HeadScores:
    """Scores of the rows, differentiable where an input needs a gradient."""
    needs = _needs(call)
    if not any(needs):
        stats, _, _ = loops.head_score(*_constants(call), False, impl, budget)
        return _detached(stats, call)
    if needs == (True, False, False) and not entropy_grad and not call.full_kl:
        stats, logp = _FrozenHead.apply(*call, impl, budget)
        return _detached(stats, call)._replace(logp=logp)
    row_bytes = len(call.weight) * call.hidden.element_size() * (1 + call.full_kl)
    kept_bytes = budget or DEFAULT_KEPT_BYTES.get(call.hidden.device.type, DEFAULT_KEPT_BYTES["cpu"])
    keep = len(call.hidden) * row_bytes <= kept_bytes
    stats, logp, entropy, full_kl = _Scores.apply(*call, keep, *needs, impl, budget)
    ref_logp = _detached(stats, call).ref_logp
    return HeadScores(logp, entropy, ref_logp, full_kl if call.full_kl else None)


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    topk_ids: Tensor | None,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    scale: Tensor,
    skip_zero_scale: bool,
    impl: str,
    budget: int,
) -> Tensor:
    """sum of scale * divergence over rows: a scalar with a gradient. Arguments as loops.head_divergence."""
    grad = torch.is_grad_enabled()
    needs = (grad and hidden.requires_grad, grad and weight.requires_grad)
    unit = _unit(hidden, scale) if any(needs) else None
    row_scale = scale if unit is None else scale / unit
    arguments = (teacher, teacher_weight, topk_ids, temperature, kind, alpha, row_scale, skip_zero_scale)
    if any(needs):
        values, carrier = _Divergence.apply(hidden, weight, *arguments, *needs, impl, budget)
        carrier = carrier if unit is None else carrier * unit
    else:
        values, _, _ = loops.head_divergence(hidden.detach(), weight.detach(), *arguments, False, False, impl, budget)
        carrier = 0.0
    return torch.where(scale == 0, 0.0, values * scale).sum() + carrier


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        stats, *gradients = loops.head_policy(*arguments)
        return _save_gradients(ctx, stats, gradients, len(arguments))

    @staticmethod
    @first_order
    def backward(ctx, _, g):
        return _used_up(ctx, g)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        values, *gradients = loops.head_divergence(*arguments)
        return _save_gradients(ctx, values, gradients, len(arguments))

    @staticmethod
    @first_order
    def backward(ctx, _, g):
        return _used_up(ctx, g)


class _FrozenHead(torch.autograd.Function):
    """logp whose gradient by hidden, W[y] - p W, is made in forward: no logits outlive their chunk."""

    @staticmethod
    def forward(ctx, *arguments):
        call, (impl, budget) = HeadCall(*arguments[:-2]), arguments[-2:]
        ones = torch.ones(len(call.hidden), dtype=accumulation_dtype(call.hidden), device=call.hidden.device)
        terms = RowTerms(scale=ones, advantage=-ones)
        stats, d_hidden, _, _ = loops.head_policy(*call, *terms, True, False, False, impl, budget)
        ctx.save_for_backward(d_hidden, call.targets)
        ctx.ignore_index, ctx.arguments = call.ignore_index, len(arguments)
        ctx.mark_non_differentiable(stats)
        return stats, stats[Stat.LOGP].clone()

    @staticmethod
    @first_order
    def backward(ctx, _, g_logp):
        d_hidden, targets = ctx.saved_tensors
        if ctx.ignore_index is not None:
            # What reaches an ignored row may be NaN, and 0 times it would be too.
            g_logp = torch.where(targets == ctx.ignore_index, 0.0, g_logp)
        return (d_hidden * g_logp.unsqueeze(1)).to(d_hidden.dtype), *(None,) * (ctx.arguments - 1)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        call, (keep, *needs, impl, budget) = HeadCall(*arguments[:-6]), arguments[-6:]
        stats, logits, ref_logits = loops.head_score(*call, keep, impl, budget)
        tensors = [t for t in call[:10] if isinstance(t, Tensor)]
        ctx.keep = keep
        ctx.save_for_backward(*((logits, ref_logits) if keep else ()), stats, *tensors)
        ctx.layout = [("tensor" if isinstance(t, Tensor) else t) for t in call]
        ctx.settings = (*needs, impl, budget)
        ctx.arguments = len(arguments)
        ctx.mark_non_differentiable(stats)
        # What the loss does not use costs nothing in backward.
        ctx.set_materialize_grads(False)
        return stats, stats[Stat.LOGP].clone(), stats[Stat.ENTROPY].clone(), stats[Stat.FULL_KL].clone()

    @staticmethod
    @first_order
    def backward(ctx, _, g_logp, g_entropy, g_full_kl):
        if ctx.keep:
            _once(ctx)
        saved = list(ctx.saved_tensors)
        kept = [saved.pop(0), saved.pop(0)] if ctx.keep else None
        stats, *tensors = saved
        rest = iter(tensors)
        call = HeadCall(*(next(rest) if isinstance(t, str) else t for t in ctx.layout))
        logits, ref_logits = kept or (call.hidden.new_empty(0, len(call.weight)) for _ in range(2))
        checks.refuse_sharded("weight", call.weight)
        g_logp = torch.zeros_like(stats[Stat.LOGP]) if g_logp is None else g_logp
        g_full_kl = g_full_kl if call.full_kl else None
        gradients = loops.head_gradient(
            *call[:10], stats, g_logp, g_entropy, g_full_kl, logits, ref_logits, *ctx.settings
        )
        return *_present(gradients), *(None,) * (ctx.arguments - 3)


def _save_gradients(ctx, values: Tensor, gradients: list[Tensor], arguments: int) -> tuple[Tensor, Tensor]:
    ctx.save_for_backward(*gradients)
    ctx.arguments = arguments
    ctx.mark_non_differentiable(values)
    # No zeros for the gradient of `values`: a launch each.
    ctx.set_materialize_grads(False)
    return values, values.new_zeros(())


def _used_up(ctx, g: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of forward times g, in place; none without one."""
    if g is None:
        return (None,) * ctx.arguments
    _once(ctx)
    gradients = ctx.saved_tensors
    for gradient in gradients:
        if gradient.numel():
            loops.scale_(gradient, g)
    return *_present(gradients), *(None,) * (ctx.arguments - len(gradients))


def _once(ctx) -> None:
    """What backward uses up in place can serve one backward. A compiled graph has no state to ask."""
    if torch.compiler.is_compiling():
        return
    if getattr(ctx, "used_up", False):
        raise RuntimeError(
            "backward through a fused loss ran a second time, but the first has used its gradients up in place; call "
            "the loss again, or add the losses up and call backward once"
        )
    ctx.used_up = True


def _unit(hidden: Tensor, scale: Tensor) -> Tensor | None:
    """What float16 gradients are divided by in forward, as their factors come later; None for other dtypes.

    Gradients of a mean over T tokens are too small for float16 before a loss scale has multiplied them, and sums of T
    gradients of size 1 may be too large: sqrt(T) lies between.
    """
    if hidden.dtype != torch.float16 or not scale.numel():
        return None
    return scale.abs().max().clamp(min=torch.finfo(torch.float32).tiny) * scale.numel() ** 0.5


def _present(gradients: tuple[Tensor, ...]) -> list[Tensor | None]:
    return [gradient if gradient.dim() > 1 or gradient.numel() else None for gradient in gradients]


def _needs(call: HeadCall) -> tuple[bool, bool, bool]:
    """Whether hidden, weight and bias need a gradient."""
    if not torch.is_grad_enabled():
        return False, False, False
    return call.hidden.requires_grad, call.weight.requires_grad, call.bias is not None and call.bias.requires_grad


def _constants(call: HeadCall) -> HeadCall:
    return HeadCall(*(t.detach() if isinstance(t, Tensor) else t for t in call))


def _detached(stats: Tensor, call: HeadCall) -> HeadScores:
    ref_logp = None if call.ref_hidden is None else stats[Stat.REF_LOGP]
    return HeadScores(stats[Stat.LOGP], stats[Stat.ENTROPY], ref_logp, stats[Stat.FULL_KL] if call.full_kl else None)
