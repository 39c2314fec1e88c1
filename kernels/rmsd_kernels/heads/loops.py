"""Run the loop of the fused heads: for each chunk of tokens, a GEMM, a pass of a row back end, and backward GEMMs.

    logits = hidden[chunk] @ weight.T  ->  row function, in place  ->  d_hidden[chunk] = logits @ weight
                                                                       d_weight       += logits.T @ hidden[chunk]

Unless they are kept for backward, logits exist for one chunk at a time, in the dtype of hidden (a 16-bit d_bias needs
float32 copies of a chunk). The row function overwrites them with their gradient.
Work with T scored tokens: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained head. A reference head
adds 2TDV, and so does a backward that recomputes the logits. Ignored rows are excluded from all GEMMs. Rows whose
gradient is known to be 0 (advantage 0 without KL and entropy terms) are included only in the first GEMM. On CUDA with
ignore_index=None, these rows are not searched for, because this would wait for the device.

Each loop is one torch.library op without a gradient of its own; `autograd` adds the gradient. Per-row results are one
tensor [len(Stat), T] in float32 (float64 for float64 inputs), 0 in ignored rows. An op cannot return None, so results
that were not requested are empty tensors.
"""

import importlib
from enum import IntEnum

import torch
from torch import Tensor

from ..implementations import can_run_triton, resolve_impl
from ..ops import accumulation_dtype, record_op
from . import torch_rows
from .chunks import Gradients, Loop, chunk_buffers, empty_logits, live_first, scored_rows
from .row_types import Execution, HeadCall, Needs, PolicyTerms, RowInputs, RowReference, RowStats


class Stat(IntEnum):
    """Rows of the statistics tensor."""

    LOGP = 0
    ENTROPY = 1
    LSE = 2
    REF_LOGP = 3
    REF_LSE = 4
    FULL_KL = 5


@record_op("head_score")
def head_score(call: HeadCall, keep: bool, execution: Execution) -> tuple[Tensor, Tensor, Tensor]:
    """Return (statistics, logits, reference's logits). With keep, logits are [T, V] with the scored rows first."""
    hidden, keep_ref = call.hidden, keep and call.full_kl
    scored = scored_rows(call.targets, call.ignore_index)
    with Loop(hidden, call.weight, scored, execution, buffers=1 + call.full_kl, bias=call.bias) as loop:
        stats = Statistics(loop)
        kept = empty_logits(hidden, len(hidden) if keep else 0, len(call.weight))
        ref_kept = empty_logits(hidden, len(hidden) if keep_ref else 0, len(call.weight))
        workspace = None if keep else loop.workspace()
        ref_workspace = None if keep_ref and _same_dtype(call) else _reference_workspace(loop, call, workspace)
        for span, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            ref_out = ref_kept[span] if keep_ref else None
            ref = _score_reference(loop, call, stats, span, index, inputs, ref_workspace, ref_out)
            logits = torch.mm(rows, loop.weight.t(), out=kept[span] if keep else workspace[: len(rows)])
            loop.backend.score(logits, inputs, ref, out=stats.outputs(span, ref))
        return stats.in_token_order(), kept, ref_kept


@head_score.register_fake
def _(call, keep, execution):
    tokens, vocabulary = call.hidden.shape[0], call.weight.shape[0]
    kept, ref_kept = (empty_logits(call.hidden, tokens if k else 0, vocabulary) for k in (keep, keep and call.full_kl))
    return _fake_statistics(call.hidden), kept, ref_kept


@record_op("head_gradient", mutates=("logits",))
def head_gradient(
    call: HeadCall,
    stats: Tensor,
    g_logp: Tensor,
    g_entropy: Tensor | None,
    g_full_kl: Tensor | None,
    logits: Tensor,
    ref_logits: Tensor,
    needs: Needs,
    execution: Execution,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (d_hidden, d_weight, d_bias) of the sum of g_* times the statistics.

    logits: the logits kept by head_score, which are overwritten; if empty, they are recomputed.
    """
    hidden, full_kl = call.hidden, g_full_kl is not None
    scored = scored_rows(call.targets, call.ignore_index)
    buffers = chunk_buffers(hidden, full_kl, needs.bias)
    with Loop(hidden, call.weight, scored, execution, buffers, bias=call.bias, need_weight=needs.weight) as loop:
        kept = logits.shape[0] > 0
        gradients = Gradients(loop, needs)
        workspace = None if kept else loop.workspace()
        ref_workspace = loop.workspace(call.ref_hidden.dtype) if full_kl and not kept else None
        for span, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            chunk = logits[span] if kept else torch.mm(rows, loop.weight.t(), out=workspace[: len(rows)])
            chunk_stats = stats[:, index]
            ref = None
            if full_kl:
                ref_chunk = ref_logits[span]
                if not kept:
                    ref_chunk = ref_workspace[: len(rows)]
                    torch.mm(call.ref_hidden[index], call.ref_weight.t(), out=ref_chunk)
                    ref_chunk = ref_chunk.to(hidden.dtype)
                ref_bias = loop.bias_of(call.ref_bias)
                ref = RowReference(ref_chunk, ref_bias, chunk_stats[Stat.REF_LSE], chunk_stats[Stat.REF_LOGP])
            row_stats = RowStats(*(chunk_stats[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL)))
            chunk, ref = gradients.unrounded(chunk, ref)
            slopes = {"g_logp": g_logp, "g_entropy": g_entropy, "g_full_kl": g_full_kl}
            slopes = {name: None if g is None else g[index].contiguous() for name, g in slopes.items()}
            loop.backend.gradient_(chunk, inputs, row_stats, ref=ref, **slopes)
            gradients.add(span, index, rows, chunk)
        # Free the chunk before a float32 d_weight is converted.
        chunk = ref_chunk = ref = workspace = ref_workspace = None
        return gradients.result(call.bias)


@head_gradient.register_fake
def _(call, stats, g_logp, g_entropy, g_full_kl, logits, ref_logits, needs, execution):
    return _fake_gradients(call.hidden, call.weight, call.bias, needs)


@record_op("head_policy")
def head_policy(
    call: HeadCall, terms: PolicyTerms, skip_idle: bool, needs: Needs, execution: Execution
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (statistics, d_hidden, d_weight, d_bias) of the summed policy losses of the rows, in one pass.

    skip_idle: whether to find rows whose gradient is known to be 0 and skip their backward GEMMs.
    """
    hidden, settings = call.hidden, terms.settings
    scored, live = scored_rows(call.targets, call.ignore_index), None
    may_wait = call.ignore_index is not None or hidden.device.type == "cpu"
    if skip_idle and may_wait and settings.kl_loss == "none" and not settings.entropy_coef:
        scored, live = live_first(scored, terms.scale * terms.advantage)
    buffers = chunk_buffers(hidden, call.full_kl, needs.bias)
    options = {"bias": call.bias, "live": live, "need_weight": needs.weight}
    with Loop(hidden, call.weight, scored, execution, buffers, **options) as loop:
        stats = Statistics(loop)
        gradients = Gradients(loop, needs)
        workspace = loop.workspace()
        ref_workspace = _reference_workspace(loop, call, workspace)
        for span, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            ref = _score_reference(loop, call, stats, span, index, inputs, ref_workspace)
            logits = torch.mm(rows, loop.weight.t(), out=workspace[: len(rows)])
            row_stats = stats.outputs(span, ref)
            if span.start >= loop.live:
                loop.backend.score(logits, inputs, ref, out=row_stats)
                continue
            row_terms = terms.rows(index)
            if terms.ref_logp is None and call.ref_hidden is not None:
                row_terms = row_terms._replace(ref_logp=stats.packed[Stat.REF_LOGP, span])
            logits, ref = gradients.unrounded(logits, ref)
            loop.backend.policy_(logits, inputs, row_terms, ref, out=row_stats)
            gradients.add(span, index, rows, logits)
        # Free the chunk before a float32 d_weight is converted.
        logits = ref = workspace = ref_workspace = None
        return stats.in_token_order(), *gradients.result(call.bias)


@head_policy.register_fake
def _(call, terms, skip_idle, needs, execution):
    return _fake_statistics(call.hidden), *_fake_gradients(call.hidden, call.weight, call.bias, needs)


@record_op("head_divergence")
def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    topk_ids: Tensor | None,
    temperature: Tensor | None,
    kind: str,
    alpha: float | None,
    vocab_clip: float | None,
    scale: Tensor,
    skip_zero_scale: bool,
    needs: Needs,
    execution: Execution,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (divergence [T], d_hidden, d_weight) of the sum of scale * divergence.

    teacher: hidden states if there is a teacher_weight, otherwise logits, [T, V], or [T, k] with topk_ids.
    """
    nonzero_rows = torch.nonzero(scale).flatten() if skip_zero_scale else None
    buffers = 1 + (teacher_weight is not None)
    need_grad = needs.hidden or needs.weight
    bound = {} if vocab_clip is None else {"vocab_clip": vocab_clip}
    if bound:
        # csrc/ does not implement the bound.
        execution = execution._replace(impl=resolve_impl(execution.impl, hidden, native_form=False))
    with Loop(hidden, weight, nonzero_rows, execution, buffers, need_weight=needs.weight) as loop:
        values = torch.zeros(len(hidden), dtype=loop.dtype, device=hidden.device)
        gradients = Gradients(loop, needs)
        workspace = loop.workspace()
        teacher_workspace = workspace if teacher_weight is None else loop.workspace(teacher.dtype)
        for span, index in loop:
            rows, teacher_rows = hidden[index], teacher[index]
            logits = torch.mm(rows, loop.weight.t(), out=workspace[: len(rows)])
            if teacher_weight is not None:
                teacher_rows = torch.mm(teacher_rows, teacher_weight.t(), out=teacher_workspace[: len(rows)])
            elif _needs_copy(teacher_rows):
                teacher_rows = teacher_rows.to(loop.dtype).contiguous()
            row_temperature = None if temperature is None else temperature[index]
            row_scale = scale[index] if need_grad else None
            if topk_ids is None:
                arguments = (logits, teacher_rows, row_temperature, kind, alpha, row_scale)
                row_values = loop.backend.divergence_(*arguments, **bound)
            else:
                # With only k logits per row, a fused kernel would not be faster.
                ids = topk_ids[index]
                chosen = logits.gather(1, ids).to(loop.dtype)
                arguments = (chosen, teacher_rows, row_temperature, kind, alpha, row_scale)
                row_values = torch_rows.divergence_(*arguments, **bound)
                if need_grad:
                    logits.zero_().scatter_add_(1, ids, chosen.to(logits.dtype))
            values[index] = row_values
            if need_grad:
                gradients.add(span, index, rows, logits)
        # Free the chunk before a float32 d_weight is converted.
        logits = teacher_rows = workspace = teacher_workspace = None
        return values, *gradients.result(None)[:2]


@head_divergence.register_fake
def _(
    hidden, weight, teacher, teacher_weight, topk_ids, temperature, kind, alpha, vocab_clip, scale, skip_zero_scale,
    needs, execution,
):  # fmt: skip
    values = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return values, *_fake_gradients(hidden, weight, None, needs)[:2]


@torch.library.custom_op("rmsd_kernels::scale_", mutates_args=("values",))
def scale_(values: Tensor, factor: Tensor) -> None:
    """Multiply values in place by a one-element tensor. In the usual case of a factor of 1, values are not read."""
    if values.device.type == "cuda" and can_run_triton(values) and factor.dtype == torch.float32:
        importlib.import_module(".triton_rows", __package__).scale_unless_one_(values, factor)
    elif values.device.type != "cpu" or factor.item() != 1.0:
        values.mul_(factor)


@scale_.register_fake
def _(values, factor):
    return None


class Statistics:
    """Results of the scored rows in the order of the loop, so that a chunk's results are adjacent (no copy)."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.packed = torch.zeros(len(Stat), loop.count, dtype=loop.dtype, device=loop.hidden.device)

    def outputs(self, span: slice, ref: RowReference | None) -> RowStats:
        """Return the views into which a row function writes a chunk's results."""
        columns = self.packed[:, span].unbind()
        logp, entropy, lse, full_kl = (columns[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL))
        return RowStats(logp, entropy, lse, None if ref is None else full_kl)

    def in_token_order(self) -> Tensor:
        """Return the results of all rows, [len(Stat), T], 0 in rows that are not scored."""
        if self.loop.rows is None:
            return self.packed
        all_rows = self.packed.new_zeros(len(Stat), len(self.loop.hidden))
        return all_rows.index_copy_(1, self.loop.rows, self.packed)


def _reference_workspace(loop: Loop, call: HeadCall, workspace: Tensor | None) -> Tensor | None:
    """Return memory for a chunk of the reference's logits, or None if there is no reference.

    workspace: memory for a chunk of the policy's logits. The reference shares it if possible.
    """
    if call.ref_hidden is None:
        return None
    # The policy's logits overwrite those of the reference. Only the exact KL needs both at once.
    if workspace is not None and not call.full_kl and _same_dtype(call):
        return workspace
    return loop.workspace(call.ref_hidden.dtype)


def _score_reference(
    loop: Loop,
    call: HeadCall,
    stats: Statistics,
    span: slice,
    index: slice | Tensor,
    inputs: RowInputs,
    workspace: Tensor | None,
    out: Tensor | None = None,
) -> RowReference | None:
    """Score a chunk's reference into stats, and return the RowReference of the exact KL.

    workspace: result of `_reference_workspace`. It is not needed if `out` has the dtype of the reference.
    out: memory for the logits in the dtype of hidden, if they are kept.
    """
    if call.ref_hidden is None:
        return None
    rows, bias = call.ref_hidden[index], loop.bias_of(call.ref_bias)
    buffer = out if out is not None and _same_dtype(call) else workspace[: len(rows)]
    logits = torch.mm(rows, call.ref_weight.t(), out=buffer)
    target_logit = loop.backend.target_logit(rows, call.ref_weight, inputs.targets).to(loop.dtype)
    logp, lse = stats.packed[Stat.REF_LOGP, span], stats.packed[Stat.REF_LSE, span]
    unused_entropy = torch.empty_like(logp)
    row_stats = RowStats(logp, unused_entropy, lse, None)
    loop.backend.score(logits, inputs._replace(target_logit=target_logit, bias=bias), out=row_stats)
    if not call.full_kl:
        return None
    if not _same_dtype(call):
        logits = logits.to(loop.hidden.dtype) if out is None else out.copy_(logits)
    return RowReference(logits, bias, lse, logp)


def _same_dtype(call: HeadCall) -> bool:
    return call.ref_hidden is None or call.ref_hidden.dtype == call.hidden.dtype


def _needs_copy(teacher: Tensor) -> bool:
    """Return whether the row functions need a copy: columns not adjacent, rows that overlap, or float64."""
    return teacher.stride(1) != 1 or teacher.stride(0) < teacher.shape[1] or teacher.dtype == torch.float64


def _fake_statistics(hidden: Tensor) -> Tensor:
    return hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulation_dtype(hidden))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape) if needs.weight else weight.new_empty(0)
    dtype = accumulation_dtype(hidden) if bias is None else bias.dtype
    return d_hidden, d_weight, hidden.new_empty(weight.shape[0] if needs.bias else 0, dtype=dtype)
