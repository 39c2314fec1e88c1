"""The loop of the fused heads: over chunks of tokens, a GEMM, one pass of a row back end, and the GEMMs of backward.

    logits = hidden[chunk] @ weight.T  ->  row function, in place  ->  d_hidden[chunk] = logits @ weight
                                                                       d_weight       += logits.T @ hidden[chunk]

Logits exist for one chunk at a time and in the input's dtype; the row function turns them into their own gradient.
Work with T scored tokens: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained one, 2TDV more with a
reference head, and 2TDV more where backward has to compute the logits again. Ignored rows never enter a GEMM, and rows
whose gradient is 0 beforehand (advantage 0 without KL and entropy terms) enter the first alone; on CUDA not where
ignore_index is None, as finding them would wait for the device.

Each loop is one torch.library op, so torch.compile and autograd see a call without a gradient; `autograd` gives it
one. Per-row results are one tensor [len(Stat), T] in float32 (float64 for float64), 0 in ignored rows. Empty tensors
stand for what was not asked for, as an op cannot return None. budget: bytes of logits at once, 0 = default_budget.
"""

import importlib
from enum import IntEnum

import torch
from torch import Tensor

from ..implementations import can_run_triton
from ..ops import accumulation_dtype, without_autocast
from . import torch_rows
from .chunks import Gradients, Loop, chunk_buffers, live_first, scored_rows, target_logit
from .torch_rows import PolicyTerms, RowInputs, RowReference, RowStats


class Stat(IntEnum):
    """Rows of the statistics tensor."""

    LOGP = 0
    ENTROPY = 1
    LSE = 2
    REF_LOGP = 3
    REF_LSE = 4
    FULL_KL = 5


@torch.library.custom_op("rmsd_kernels::head_score", mutates_args=())
@without_autocast
def head_score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    full_kl: bool,
    keep: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(statistics, logits, reference's logits); logits [T, V] are kept on request, the scored rows first."""
    buffers = 1 + full_kl
    loop = Loop(hidden, weight, bias, temperature, scored_rows(targets, ignore_index), impl, budget, buffers)
    stats = torch.zeros(len(Stat), len(hidden), dtype=loop.dtype, device=hidden.device)
    kept = hidden.new_empty(len(hidden) if keep else 0, len(weight))
    ref_kept = hidden.new_empty(len(hidden) if keep and full_kl else 0, len(weight))
    space = None if keep else loop.workspace()
    reference = _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl, space, own=not (keep and full_kl))
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        place = slice(start, start + len(rows))
        ref = reference(index, inputs, stats, ref_kept[place] if keep and full_kl else None)
        logits = torch.mm(rows, loop.weight.t(), out=kept[place] if keep else space[: len(rows)])
        _store(stats, index, loop.backend.score(logits, inputs, ref))
    return stats, kept, ref_kept


@head_score.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias,
    full_kl, keep, impl, budget,
):  # fmt: skip
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    stats = hidden.new_empty(len(Stat), rows, dtype=accumulation_dtype(hidden))
    kept = hidden.new_empty(rows if keep else 0, vocabulary)
    return stats, kept, hidden.new_empty(rows if keep and full_kl else 0, vocabulary)


@torch.library.custom_op("rmsd_kernels::head_gradient", mutates_args=("logits",))
@without_autocast
def head_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    stats: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    g_full_kl: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias) of the sum of g_* times statistics. Kept logits are used up, else computed again."""
    buffers = chunk_buffers(hidden, g_full_kl is not None, need_bias)
    loop = Loop(
        hidden,
        weight,
        bias,
        temperature,
        scored_rows(targets, ignore_index),
        impl,
        budget,
        buffers,
        need_weight=need_weight,
    )
    kept = logits.shape[0] > 0
    gradients = Gradients(loop, need_hidden, need_weight, need_bias)
    space = None if kept else loop.workspace()
    ref_space = loop.workspace(ref_hidden.dtype) if g_full_kl is not None and not kept else None
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        place = slice(start, start + len(rows))
        chunk = logits[place] if kept else torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        of_rows = stats[:, index]
        ref = None
        if g_full_kl is not None:
            other = ref_logits[place]
            if not kept:
                other = torch.mm(ref_hidden[index], ref_weight.t(), out=ref_space[: len(rows)]).to(hidden.dtype)
            ref = RowReference(other, loop.bias_of(ref_bias), of_rows[Stat.REF_LSE], of_rows[Stat.REF_LOGP])
        given = RowStats(*(of_rows[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL)))
        chunk, ref = gradients.exact(chunk, ref)
        coefficients = [None if g is None else g[index].contiguous() for g in (g_logp, g_entropy, g_full_kl)]
        loop.backend.gradient_(chunk, inputs, given, coefficients[0], coefficients[1], ref, coefficients[2])
        gradients.add(start, index, rows, chunk)
    return gradients.result(bias)


@head_gradient.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias, stats,
    g_logp, g_entropy, g_full_kl, logits, ref_logits, need_hidden, need_weight, need_bias, impl, budget,
):  # fmt: skip
    return _fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


@torch.library.custom_op("rmsd_kernels::head_policy", mutates_args=())
@without_autocast
def head_policy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    ignore_index: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    full_kl: bool,
    scale: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    rollout_logp: Tensor | None,
    tis_cap: float,
    kl: str,
    kl_coef: float,
    kl_log_ratio_clip: float | None,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    skip_idle: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(statistics, d_hidden, d_weight, d_bias) of the rows' policy losses (torch_rows.PolicyTerms), in one pass.

    rollout_logp: where the policy itself is the old one, so that the correction min(exp(logp - rollout_logp), tis_cap)
    is known only when a row is scored; else it is part of advantage.
    """
    scored, live = scored_rows(targets, ignore_index), None
    buffers = chunk_buffers(hidden, full_kl, need_bias)
    if skip_idle and kl == "none" and not entropy_coef and (ignore_index is not None or hidden.device.type == "cpu"):
        scored, live = live_first(scored, scale * advantage)
    loop = Loop(hidden, weight, bias, temperature, scored, impl, budget, buffers, live, need_weight)
    stats = torch.zeros(len(Stat), len(hidden), dtype=loop.dtype, device=hidden.device)
    gradients = Gradients(loop, need_hidden, need_weight, need_bias)
    space = loop.workspace()
    reference = _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl, space)
    for start, index in loop:
        rows = hidden[index]
        inputs = loop.inputs(rows, targets, index, softcap)
        ref = reference(index, inputs, stats, None)
        logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        old, other = (None if t is None else t[index] for t in (old_logp, ref_logp))
        if other is None and ref_hidden is not None:
            other = stats[Stat.REF_LOGP, index]
        terms = PolicyTerms(
            scale[index],
            advantage[index],
            old,
            other,
            kl,
            kl_coef,
            kl_log_ratio_clip,
            clip_low,
            clip_high,
            entropy_coef,
        )
        if start >= loop.live:
            _store(stats, index, loop.backend.score(logits, inputs, ref))
            continue
        logits, ref = gradients.exact(logits, ref)
        if rollout_logp is None:
            found = loop.backend.policy_(logits, inputs, terms, ref)
        else:
            found = loop.backend.score(logits, inputs, ref)
            correction = (found.logp - rollout_logp[index]).exp().clamp(max=tis_cap)
            terms = terms._replace(advantage=terms.advantage * correction)
            loop.backend.gradient_(logits, inputs, found, *torch_rows.policy_coefficients(found.logp, terms, ref))
        _store(stats, index, found)
        gradients.add(start, index, rows, logits)
    return stats, *gradients.result(bias)


@head_policy.register_fake
def _(
    hidden, weight, bias, targets, temperature, softcap, ignore_index, ref_hidden, ref_weight, ref_bias, full_kl,
    scale, advantage, old_logp, ref_logp, rollout_logp, tis_cap, kl, kl_coef, kl_log_ratio_clip, clip_low, clip_high,
    entropy_coef, skip_idle, need_hidden, need_weight, need_bias, impl, budget,
):  # fmt: skip
    stats = hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulation_dtype(hidden))
    return stats, *_fake_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)


@torch.library.custom_op("rmsd_kernels::head_divergence", mutates_args=())
@without_autocast
def head_divergence(
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
    need_hidden: bool,
    need_weight: bool,
    impl: str,
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], d_hidden, d_weight) of the sum of scale * divergence.

    teacher: logits [T, V], or [T, k] with topk_ids, or hidden states where teacher_weight is given.
    """
    rows_scored = torch.nonzero(scale).flatten() if skip_zero_scale else None
    buffers = 1 + (teacher_weight is not None)
    loop = Loop(hidden, weight, None, temperature, rows_scored, impl, budget, buffers, need_weight=need_weight)
    values = torch.zeros(len(hidden), dtype=loop.dtype, device=hidden.device)
    gradients = Gradients(loop, need_hidden, need_weight, False)
    space = loop.workspace()
    teacher_space = space if teacher_weight is None else loop.workspace(teacher.dtype)
    need = need_hidden or need_weight
    for start, index in loop:
        rows, other = hidden[index], teacher[index]
        logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
        if teacher_weight is not None:
            other = torch.mm(other, teacher_weight.t(), out=teacher_space[: len(rows)])
        elif other.stride(1) != 1 or other.stride(0) < other.shape[1] or other.dtype == torch.float64:
            # The row functions take adjacent columns, rows that do not overlap, and no more digits than they use.
            other = other.to(loop.dtype).contiguous()
        heat = None if temperature is None else temperature[index]
        weights = scale[index] if need else None
        if topk_ids is None:
            values[index] = loop.backend.divergence_(logits, other, heat, kind, alpha, weights)
        else:
            # k logits a row: nothing that a kernel of its own would gain.
            ids = topk_ids[index]
            chosen = logits.gather(1, ids).to(loop.dtype)
            values[index] = torch_rows.divergence_(chosen, other, heat, kind, alpha, weights)
            if need:
                logits.zero_().scatter_add_(1, ids, chosen.to(logits.dtype))
        if need:
            gradients.add(start, index, rows, logits)
    return values, *gradients.result(None)[:2]


@head_divergence.register_fake
def _(
    hidden, weight, teacher, teacher_weight, topk_ids, temperature, kind, alpha, scale, skip_zero_scale,
    need_hidden, need_weight, impl, budget,
):  # fmt: skip
    values = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return values, *_fake_gradients(hidden, weight, None, need_hidden, need_weight, False)[:2]


@torch.library.custom_op("rmsd_kernels::scale_", mutates_args=("values",))
def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor, one number on the same device; where it is 1, the usual case, values are not touched."""
    if values.device.type == "cuda" and can_run_triton(values) and factor.dtype == torch.float32:
        importlib.import_module(".triton_rows", __package__).scale_unless_one_(values, factor)
    elif values.device.type != "cpu" or factor.item() != 1.0:
        values.mul_(factor)


@scale_.register_fake
def _(values, factor):
    return None


def _reference(loop, ref_hidden, ref_weight, ref_bias, full_kl: bool, space: Tensor | None, own: bool = True):
    """A function that scores a chunk's reference into stats, and gives the RowReference that the exact KL needs.

    space: a chunk's room that the policy's logits take afterwards; own: room of the reference's own may be made.
    """
    if ref_hidden is None:
        return lambda index, inputs, stats, out: None
    bias = loop.bias_of(ref_bias)
    same = ref_hidden.dtype == loop.hidden.dtype
    # Only the exact KL needs both heads' logits at once.
    if space is None or full_kl or not same:
        space = loop.workspace(ref_hidden.dtype) if own or not same else None

    def reference(index, inputs: RowInputs, stats: Tensor, out: Tensor | None) -> RowReference | None:
        rows = ref_hidden[index]
        room = out if out is not None and same else space[: len(rows)]
        logits = torch.mm(rows, ref_weight.t(), out=room)
        exact = target_logit(rows, ref_weight, inputs.targets).to(loop.dtype)
        found = loop.backend.score(logits, inputs._replace(target_logit=exact, bias=bias))
        stats[Stat.REF_LOGP, index], stats[Stat.REF_LSE, index] = found.logp, found.lse
        if not full_kl:
            return None
        if not same:
            logits = logits.to(loop.hidden.dtype) if out is None else out.copy_(logits)
        return RowReference(logits, bias, stats[Stat.REF_LSE, index], stats[Stat.REF_LOGP, index])

    return reference


def _store(stats: Tensor, index: slice | Tensor, found: RowStats) -> None:
    stats[Stat.LOGP, index], stats[Stat.ENTROPY, index], stats[Stat.LSE, index] = found[:3]
    if found.full_kl is not None:
        stats[Stat.FULL_KL, index] = found.full_kl


def _fake_gradients(hidden, weight, bias, need_hidden: bool, need_weight: bool, need_bias: bool):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    dtype = accumulation_dtype(hidden) if bias is None else bias.dtype
    return d_hidden, d_weight, hidden.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype)
