"""The loop of the fused heads: over chunks of tokens, a GEMM, one pass of a row back end, and the GEMMs of backward.

    logits = hidden[chunk] @ weight.T  ->  row function, in place  ->  d_hidden[chunk] = logits @ weight
                                                                       d_weight       += logits.T @ hidden[chunk]

Logits exist for one chunk at a time and in the input's dtype; the row function turns them into their own gradient.
Work with T scored tokens: 2TDV without gradients, 4TDV with a frozen head, 6TDV with a trained one, 2TDV more with a
reference head, and 2TDV more where backward has to compute the logits again. Ignored rows never enter a GEMM, and rows
whose gradient is 0 beforehand (advantage 0 without KL and entropy terms) enter the first alone; on CUDA not where
ignore_index is None, as finding them would wait for the device.

Each loop is one torch.library op, so torch.compile and autograd see a call without a gradient; `autograd` gives it one.
Per-row results are one tensor [len(Stat), T] in float32 (float64 for float64), 0 in ignored rows. Empty tensors stand
for what was not asked for, as an op cannot return None.
"""

import importlib
from collections.abc import Callable
from enum import IntEnum

import torch
from torch import Tensor

from ..implementations import can_run_triton
from ..ops import accumulation_dtype, record_op
from . import torch_rows
from .chunks import Gradients, Loop, chunk_buffers, live_first, scored_rows
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
    """(statistics, logits, reference's logits); logits [T, V] are kept on request, the scored rows first."""
    hidden, both = call.hidden, keep and call.full_kl
    rows = scored_rows(call.targets, call.ignore_index)
    with Loop(hidden, call.weight, rows, execution, buffers=1 + call.full_kl, bias=call.bias) as loop:
        stats = Statistics(loop)
        kept = hidden.new_empty(len(hidden) if keep else 0, len(call.weight))
        ref_kept = hidden.new_empty(len(hidden) if both else 0, len(call.weight))
        space = None if keep else loop.workspace()
        reference = _reference(loop, call, stats, space, own=not both)
        for place, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            ref = reference(index, place, inputs, ref_kept[place] if both else None)
            logits = torch.mm(rows, loop.weight.t(), out=kept[place] if keep else space[: len(rows)])
            loop.backend.score(logits, inputs, ref, out=stats.of(place, ref))
        return stats.of_all_rows(), kept, ref_kept


@head_score.register_fake
def _(call, keep, execution):
    rows, vocabulary = call.hidden.shape[0], call.weight.shape[0]
    kept = call.hidden.new_empty(rows if keep else 0, vocabulary)
    return _fake_statistics(call.hidden), kept, call.hidden.new_empty(rows if keep and call.full_kl else 0, vocabulary)


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
    """(d_hidden, d_weight, d_bias) of the sum of g_* times statistics. Kept logits are used up, else computed again."""
    hidden, full_kl = call.hidden, g_full_kl is not None
    rows = scored_rows(call.targets, call.ignore_index)
    buffers = chunk_buffers(hidden, full_kl, needs.bias)
    with Loop(hidden, call.weight, rows, execution, buffers, bias=call.bias, need_weight=needs.weight) as loop:
        kept = logits.shape[0] > 0
        gradients = Gradients(loop, needs)
        space = None if kept else loop.workspace()
        ref_space = loop.workspace(call.ref_hidden.dtype) if full_kl and not kept else None
        for place, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            chunk = logits[place] if kept else torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
            of_rows = stats[:, index]
            ref = None
            if full_kl:
                ref_chunk = ref_logits[place]
                if not kept:
                    room = ref_space[: len(rows)]
                    ref_chunk = torch.mm(call.ref_hidden[index], call.ref_weight.t(), out=room).to(hidden.dtype)
                ref_bias = loop.bias_of(call.ref_bias)
                ref = RowReference(ref_chunk, ref_bias, of_rows[Stat.REF_LSE], of_rows[Stat.REF_LOGP])
            row_stats = RowStats(*(of_rows[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL)))
            chunk, ref = gradients.exact(chunk, ref)
            slopes = {"g_logp": g_logp, "g_entropy": g_entropy, "g_full_kl": g_full_kl}
            slopes = {name: None if g is None else g[index].contiguous() for name, g in slopes.items()}
            loop.backend.gradient_(chunk, inputs, row_stats, ref=ref, **slopes)
            gradients.add(place, index, rows, chunk)
        return gradients.result(call.bias)


@head_gradient.register_fake
def _(call, stats, g_logp, g_entropy, g_full_kl, logits, ref_logits, needs, execution):
    return _fake_gradients(call.hidden, call.weight, call.bias, needs)


@record_op("head_policy")
def head_policy(
    call: HeadCall, terms: PolicyTerms, skip_idle: bool, needs: Needs, execution: Execution
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(statistics, d_hidden, d_weight, d_bias) of the rows' policy losses, in one pass.

    skip_idle: look for rows whose gradient is 0 beforehand.
    """
    hidden, settings = call.hidden, terms.settings
    rows, live = scored_rows(call.targets, call.ignore_index), None
    can_look = call.ignore_index is not None or hidden.device.type == "cpu"
    if skip_idle and can_look and settings.kl_loss == "none" and not settings.entropy_coef:
        rows, live = live_first(rows, terms.scale * terms.advantage)
    buffers = chunk_buffers(hidden, call.full_kl, needs.bias)
    options = {"bias": call.bias, "live": live, "need_weight": needs.weight}
    with Loop(hidden, call.weight, rows, execution, buffers, **options) as loop:
        stats = Statistics(loop)
        gradients = Gradients(loop, needs)
        space = loop.workspace()
        reference = _reference(loop, call, stats, space)
        for place, index in loop:
            rows = hidden[index]
            inputs = loop.inputs(call, rows, index)
            ref = reference(index, place, inputs, None)
            logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
            row_stats = stats.of(place, ref)
            if place.start >= loop.live:
                loop.backend.score(logits, inputs, ref, out=row_stats)
                continue
            row_terms = terms.rows(index)
            if terms.ref_logp is None and call.ref_hidden is not None:
                row_terms = row_terms._replace(ref_logp=stats.packed[Stat.REF_LOGP, place])
            logits, ref = gradients.exact(logits, ref)
            loop.backend.policy_(logits, inputs, row_terms, ref, out=row_stats)
            gradients.add(place, index, rows, logits)
        return stats.of_all_rows(), *gradients.result(call.bias)


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
    scale: Tensor,
    skip_zero_scale: bool,
    needs: Needs,
    execution: Execution,
) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [T], d_hidden, d_weight) of the sum of scale * divergence.

    teacher: logits [T, V], or [T, k] with topk_ids, or hidden states where teacher_weight is given.
    """
    rows_scored = torch.nonzero(scale).flatten() if skip_zero_scale else None
    buffers = 1 + (teacher_weight is not None)
    need = needs.hidden or needs.weight
    with Loop(hidden, weight, rows_scored, execution, buffers, need_weight=needs.weight) as loop:
        values = torch.zeros(len(hidden), dtype=loop.dtype, device=hidden.device)
        gradients = Gradients(loop, needs)
        space = loop.workspace()
        teacher_space = space if teacher_weight is None else loop.workspace(teacher.dtype)
        for place, index in loop:
            rows, teacher_rows = hidden[index], teacher[index]
            logits = torch.mm(rows, loop.weight.t(), out=space[: len(rows)])
            if teacher_weight is not None:
                teacher_rows = torch.mm(teacher_rows, teacher_weight.t(), out=teacher_space[: len(rows)])
            elif _needs_copy(teacher_rows):
                teacher_rows = teacher_rows.to(loop.dtype).contiguous()
            row_temperature = None if temperature is None else temperature[index]
            weights = scale[index] if need else None
            if topk_ids is None:
                found = loop.backend.divergence_(logits, teacher_rows, row_temperature, kind, alpha, weights)
            else:
                # k logits a row: nothing that a kernel of its own would gain.
                ids = topk_ids[index]
                chosen = logits.gather(1, ids).to(loop.dtype)
                found = torch_rows.divergence_(chosen, teacher_rows, row_temperature, kind, alpha, weights)
                if need:
                    logits.zero_().scatter_add_(1, ids, chosen.to(logits.dtype))
            values[index] = found
            if need:
                gradients.add(place, index, rows, logits)
        return values, *gradients.result(None)[:2]


@head_divergence.register_fake
def _(
    hidden, weight, teacher, teacher_weight, topk_ids, temperature, kind, alpha, scale, skip_zero_scale, needs,
    execution,
):  # fmt: skip
    values = hidden.new_empty(hidden.shape[0], dtype=accumulation_dtype(hidden))
    return values, *_fake_gradients(hidden, weight, None, needs)[:2]


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


class Statistics:
    """The scored rows' results in the loop's order, so that a chunk's place is adjacent and written without a copy."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.packed = torch.zeros(len(Stat), loop.count, dtype=loop.dtype, device=loop.hidden.device)

    def of(self, place: slice, ref: RowReference | None) -> RowStats:
        """Where a row function writes the results of a chunk."""
        columns = self.packed[:, place].unbind()
        logp, entropy, lse, full_kl = (columns[i] for i in (Stat.LOGP, Stat.ENTROPY, Stat.LSE, Stat.FULL_KL))
        return RowStats(logp, entropy, lse, None if ref is None else full_kl)

    def of_all_rows(self) -> Tensor:
        """[len(Stat), T], 0 in rows that are not scored."""
        if self.loop.rows is None:
            return self.packed
        everywhere = self.packed.new_zeros(len(Stat), len(self.loop.hidden))
        return everywhere.index_copy_(1, self.loop.rows, self.packed)


def _reference(loop: Loop, call: HeadCall, stats: Statistics, space: Tensor | None, own: bool = True) -> Callable:
    """A function that scores a chunk's reference into stats, and gives the RowReference that the exact KL needs.

    space: a chunk's room that the policy's logits take afterwards; own: room of the reference's own may be made.
    """
    if call.ref_hidden is None:
        return lambda index, place, inputs, out: None
    bias = loop.bias_of(call.ref_bias)
    same = call.ref_hidden.dtype == loop.hidden.dtype
    # Only the exact KL needs both heads' logits at once.
    if space is None or call.full_kl or not same:
        space = loop.workspace(call.ref_hidden.dtype) if own or not same else None

    def reference(index, place: slice, inputs: RowInputs, out: Tensor | None) -> RowReference | None:
        rows = call.ref_hidden[index]
        room = out if out is not None and same else space[: len(rows)]
        logits = torch.mm(rows, call.ref_weight.t(), out=room)
        exact = loop.backend.target_logit(rows, call.ref_weight, inputs.targets).to(loop.dtype)
        logp, lse = stats.packed[Stat.REF_LOGP, place], stats.packed[Stat.REF_LSE, place]
        room_for_entropy = torch.empty_like(logp)
        row_stats = RowStats(logp, room_for_entropy, lse, None)
        loop.backend.score(logits, inputs._replace(target_logit=exact, bias=bias), out=row_stats)
        if not call.full_kl:
            return None
        if not same:
            logits = logits.to(loop.hidden.dtype) if out is None else out.copy_(logits)
        return RowReference(logits, bias, lse, logp)

    return reference


def _needs_copy(teacher: Tensor) -> bool:
    """The row functions take adjacent columns, rows that do not overlap, and no more digits than they use."""
    return teacher.stride(1) != 1 or teacher.stride(0) < teacher.shape[1] or teacher.dtype == torch.float64


def _fake_statistics(hidden: Tensor) -> Tensor:
    return hidden.new_empty(len(Stat), hidden.shape[0], dtype=accumulation_dtype(hidden))


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs):
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else hidden.new_empty(0)
    d_weight = weight.new_empty(weight.shape) if needs.weight else weight.new_empty(0)
    dtype = accumulation_dtype(hidden) if bias is None else bias.dtype
    return d_hidden, d_weight, hidden.new_empty(weight.shape[0] if needs.bias else 0, dtype=dtype)
