"""Row back end in Triton: the functions of `torch_rows` for CUDA tensors.

One program processes one row [V] of float32, bfloat16 or float16 logits and computes in float32. There are no atomics,
so repeated runs are bit-identical. Row offsets are int64, because n*V may exceed 2^31. `triton_row_math` has the passes
over a row.

Bytes moved per row, with b bytes per logit: score bV; policy_ 2bV if the row stays in cache, otherwise 3bV; gradient_
2bV. A reference head adds bV.

Importing this module imports triton. If TRITON_INTERPRET=1 is set before the import, the kernels run on CPU tensors.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import DTYPES, SLICED, check_logits, device_of, launch, row_vectors
from .row_types import PolicyTerms, RowInputs, RowReference, RowStats
from .triton_divergence import divergence_
from .triton_row_math import (
    Row,
    View,
    first_pass,
    hide_target,
    load_or,
    put_target,
    ref_of_row,
    second_pass,
    target_of_row,
)

__all__ = ["divergence_", "gradient_", "policy_", "scale_unless_one_", "score", "target_logit"]

# 8 numbers per thread: 16-byte loads for 16-bit rows.
DOT_BLOCK = 1024
DOT_WARPS = 4
# This many programs fill any device; each processes several blocks.
SCALE_BLOCK = 4096
SCALE_PROGRAMS = 1024
SCALE_WARPS = 8


@triton.jit
def _store_stats(row, row_stats, inverse_temperature, logp_ptr, entropy_ptr, lse_ptr, full_kl_ptr):
    tl.store(logp_ptr + row, row_stats.logp)
    tl.store(entropy_ptr + row, row_stats.entropy)
    tl.store(lse_ptr + row, tl.fma(row_stats.top, inverse_temperature, row_stats.log_total))
    if full_kl_ptr is not None:
        tl.store(full_kl_ptr + row, row_stats.full_kl)


@triton.jit
def _policy_slope(
    row,
    logp,
    advantage_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    rollout_logp_ptr,
    kl_coef,
    log_ratio_clip,
    ratio_low,
    ratio_high,
    tis_cap,
    KL: tl.constexpr,
):
    """Return the derivative of a row's policy loss with respect to logp, without the row's scale."""
    advantage = tl.load(advantage_ptr + row)
    if rollout_logp_ptr is not None:
        mismatch = logp - tl.load(rollout_logp_ptr + row)
        correction = tl.exp(tl.where(mismatch > 80.0, 80.0, mismatch))
        advantage *= tl.where(correction > tis_cap, tis_cap, correction)
    g = -advantage
    if old_logp_ptr is not None:
        log_ratio = logp - tl.load(old_logp_ptr + row)
        # Above 80, exp would overflow in float32, so the ratio is a constant there. NaN passes through.
        beyond = log_ratio > 80.0
        ratio = tl.exp(tl.where(beyond, 80.0, log_ratio))
        clipped = ((ratio > ratio_high) & (advantage > 0.0)) | ((ratio < ratio_low) & (advantage < 0.0))
        g = tl.where(clipped | beyond, 0.0, -advantage * ratio)
    if KL == "k1" or KL == "k2" or KL == "k3":
        d = tl.load(ref_logp_ptr + row) - logp
        if KL == "k1":
            slope = tl.full([], 1.0, tl.float32)
        elif KL == "k2":
            slope = -d
        else:
            slope = 1.0 - tl.where(d > 80.0, 0.0, tl.exp(tl.where(d > 80.0, 80.0, d)))
        if log_ratio_clip is not None:
            slope = tl.where(tl.abs(d) > log_ratio_clip, 0.0, slope)
        g += kl_coef * slope
    return g


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _score_kernel(
    logits_ptr,
    targets_ptr,
    target_logit_ptr,
    temperature_ptr,
    bias_ptr,
    ref_ptr,
    ref_bias_ptr,
    ref_lse_ptr,
    ref_logp_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    full_kl_ptr,
    softcap,
    stride,
    ref_stride,
    vocab,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    view = View(bias_ptr, softcap, 1.0 / load_or(temperature_ptr, row, 1.0), vocab)
    target = target_of_row(row, targets_ptr, target_logit_ptr, view)
    ref = ref_of_row(row, ref_ptr, ref_stride, ref_lse_ptr, ref_logp_ptr, ref_bias_ptr, view)
    logits_row = logits_ptr + row * stride
    raw = hide_target(logits_row, target)
    row_stats = first_pass(logits_row, ref, target, view, BLOCK, LANE, STAGES)
    put_target(logits_row, target, raw)
    _store_stats(row, row_stats, view.inverse_temperature, logp_ptr, entropy_ptr, lse_ptr, full_kl_ptr)


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _policy_kernel(
    logits_ptr,
    targets_ptr,
    target_logit_ptr,
    temperature_ptr,
    bias_ptr,
    ref_ptr,
    ref_bias_ptr,
    ref_lse_ptr,
    ref_logp_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    full_kl_ptr,
    softcap,
    stride,
    ref_stride,
    vocab,
    scale_ptr,
    advantage_ptr,
    old_logp_ptr,
    kl_ref_logp_ptr,
    rollout_logp_ptr,
    kl_coef,
    log_ratio_clip,
    ratio_low,
    ratio_high,
    tis_cap,
    entropy_coef,
    KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    view = View(bias_ptr, softcap, 1.0 / load_or(temperature_ptr, row, 1.0), vocab)
    target = target_of_row(row, targets_ptr, target_logit_ptr, view)
    ref = ref_of_row(row, ref_ptr, ref_stride, ref_lse_ptr, ref_logp_ptr, ref_bias_ptr, view)
    logits_row = logits_ptr + row * stride
    hide_target(logits_row, target)
    row_stats = first_pass(logits_row, ref, target, view, BLOCK, LANE, STAGES)
    _store_stats(row, row_stats, view.inverse_temperature, logp_ptr, entropy_ptr, lse_ptr, full_kl_ptr)
    scale = tl.load(scale_ptr + row)
    g_logp = scale * _policy_slope(
        row,
        row_stats.logp,
        advantage_ptr,
        old_logp_ptr,
        kl_ref_logp_ptr,
        rollout_logp_ptr,
        kl_coef,
        log_ratio_clip,
        ratio_low,
        ratio_high,
        tis_cap,
        KL,
    )
    slopes = (g_logp, -scale * entropy_coef, scale * kl_coef)
    FAST: tl.constexpr = not HAS_ENTROPY and KL != "full"
    second_pass(logits_row, ref, target, view, row_stats, slopes, HAS_ENTROPY, KL == "full", BLOCK, STAGES, FAST)


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _gradient_kernel(
    logits_ptr,
    targets_ptr,
    target_logit_ptr,
    temperature_ptr,
    bias_ptr,
    ref_ptr,
    ref_bias_ptr,
    ref_lse_ptr,
    ref_logp_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    full_kl_ptr,
    softcap,
    stride,
    ref_stride,
    vocab,
    g_logp_ptr,
    g_entropy_ptr,
    g_full_kl_ptr,
    HAS_ENTROPY: tl.constexpr,
    HAS_FULL_KL: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    view = View(bias_ptr, softcap, 1.0 / load_or(temperature_ptr, row, 1.0), vocab)
    target = target_of_row(row, targets_ptr, target_logit_ptr, view)
    ref = ref_of_row(row, ref_ptr, ref_stride, ref_lse_ptr, ref_logp_ptr, ref_bias_ptr, view)
    full_kl = load_or(full_kl_ptr, row, 0.0)
    # Use u relative to the target's unless the target is unlikely: its log-prob is smaller than the log-sum-exp and
    # therefore more precise.
    lse = tl.load(lse_ptr + row)
    logp = tl.load(logp_ptr + row)
    likely = target.valid & (logp > -64.0)
    top = tl.where(likely, target.u, 0.0)
    row_stats = Row(logp, tl.load(entropy_ptr + row), full_kl, top, tl.where(likely, -logp, lse))
    slopes = (tl.load(g_logp_ptr + row), load_or(g_entropy_ptr, row, 0.0), load_or(g_full_kl_ptr, row, 0.0))
    logits_row = logits_ptr + row * stride
    second_pass(logits_row, ref, target, view, row_stats, slopes, HAS_ENTROPY, HAS_FULL_KL, BLOCK, STAGES)


@triton.jit(do_not_specialize_on_alignment=SLICED)
def _target_logit_kernel(
    hidden_ptr,
    weight_ptr,
    targets_ptr,
    logit_ptr,
    hidden_row,
    hidden_col,
    weight_row,
    weight_col,
    dim,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.minimum(tl.maximum(tl.load(targets_ptr + row), 0), vocab - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        col = (start + tl.arange(0, BLOCK)).to(tl.int64)
        hidden = tl.load(hidden_ptr + row * hidden_row + col * hidden_col, mask=col < dim, other=0.0)
        weight = tl.load(weight_ptr + target * weight_row + col * weight_col, mask=col < dim, other=0.0)
        total += hidden.to(tl.float32) * weight.to(tl.float32)
    tl.store(logit_ptr + row, tl.sum(total, 0))


@triton.jit
def _scale_kernel(values_ptr, scalar_ptr, numel, BLOCK: tl.constexpr):
    scalar = tl.load(scalar_ptr)
    if scalar != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
            index = start + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + index, mask=index < numel).to(tl.float32) * scalar
            tl.store(values_ptr + index, values.to(values_ptr.dtype.element_ty), mask=index < numel)


def target_logit(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return hidden @ weight[target] of each row in float32, [n]. Targets are clamped to 0..V-1."""
    logit = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    if len(hidden):
        sizes = (*hidden.stride(), *weight.stride(), hidden.shape[1], len(weight))
        with device_of(hidden):
            _target_logit_kernel[(len(hidden),)](
                hidden, weight, targets.contiguous(), logit, *sizes, BLOCK=DOT_BLOCK, num_warps=DOT_WARPS
            )
    return logit


def score(
    logits: Tensor, inputs: RowInputs, ref: RowReference | None = None, *, out: RowStats | None = None
) -> RowStats:
    """Return RowStats of logits [n, V], in `out` if it is given. Logits are changed temporarily and restored."""
    stats = _new_stats(logits, ref is not None) if out is None else _written(out)
    if len(logits):
        _launch(_score_kernel, logits, _row_arguments(logits, inputs, stats, ref), inputs, ref)
    return stats


def gradient_(
    logits: Tensor,
    inputs: RowInputs,
    stats: RowStats,
    g_logp: Tensor,
    g_entropy: Tensor | None = None,
    ref: RowReference | None = None,
    g_full_kl: Tensor | None = None,
) -> None:
    """Overwrite logits [n, V] with the gradient of g_logp*logp + g_entropy*entropy + g_full_kl*full_kl."""
    if g_full_kl is not None and (ref is None or stats.full_kl is None):
        raise ValueError("g_full_kl: expected ref and stats.full_kl too, got None; its gradient needs ref and full_kl")
    if not len(logits):
        return
    if g_full_kl is None:
        ref, stats = None, stats._replace(full_kl=None)
    slopes = {"g_logp": g_logp, "g_entropy": g_entropy, "g_full_kl": g_full_kl}
    arguments = _row_arguments(logits, inputs, stats, ref) | {
        **_pointers(row_vectors(logits, **slopes)),
        "HAS_ENTROPY": g_entropy is not None,
        "HAS_FULL_KL": g_full_kl is not None,
    }
    _launch(_gradient_kernel, logits, arguments, inputs, ref)


def policy_(
    logits: Tensor,
    inputs: RowInputs,
    terms: PolicyTerms,
    ref: RowReference | None = None,
    *,
    out: RowStats | None = None,
) -> RowStats:
    """Return RowStats of logits [n, V] and overwrite logits with the gradient of the rows' summed policy losses."""
    settings = terms.settings
    kl, on_target = settings.kl_loss, settings.kl_loss in ("k1", "k2", "k3")
    if not on_target and kl not in ("none", "full"):
        raise ValueError(f"kl: expected 'none', 'k1', 'k2', 'k3' or 'full', got {kl!r}")
    if (kl == "full" and ref is None) or (on_target and terms.ref_logp is None):
        raise ValueError(f"kl: {kl!r} needs {'ref' if kl == 'full' else 'terms.ref_logp'}, got None")
    if terms.rollout_logp is not None and settings.tis_cap is None:
        raise ValueError("tis_cap: expected a number with rollout_logp, got None")
    stats = _new_stats(logits, ref is not None) if out is None else _written(out)
    if not len(logits):
        return stats
    _launch(_policy_kernel, logits, _policy_arguments(logits, inputs, stats, terms, ref), inputs, ref)
    return stats


def _policy_arguments(
    logits: Tensor, inputs: RowInputs, stats: RowStats, terms: PolicyTerms, ref: RowReference | None
) -> dict[str, Any]:
    settings = terms.settings
    vectors = row_vectors(
        logits,
        scale=terms.scale,
        advantage=terms.advantage,
        old_logp=terms.old_logp,
        kl_ref_logp=terms.ref_logp if settings.kl_loss in ("k1", "k2", "k3") else None,
        rollout_logp=terms.rollout_logp,
    )
    return _row_arguments(logits, inputs, stats, ref) | {
        **_pointers(vectors),
        "kl_coef": float(settings.kl_coef),
        "log_ratio_clip": _number(settings.kl_log_ratio_clip),
        "ratio_low": 1.0 - settings.clip_low,
        "ratio_high": 1.0 + settings.clip_high,
        "tis_cap": _number(settings.tis_cap),
        "entropy_coef": float(settings.entropy_coef),
        "KL": settings.kl_loss,
        "HAS_ENTROPY": bool(settings.entropy_coef),
    }


def scale_unless_one_(values: Tensor, scalar: Tensor) -> Tensor:
    """Multiply values in place by scalar, one float32 element on the same device. If it is 1, values are not read."""
    if values.dtype not in DTYPES or not values.is_contiguous():
        raise TypeError(
            f"values: expected contiguous float32, bfloat16 or float16, got {values.dtype} {values.stride()}"
        )
    if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != values.device:
        got = f"{scalar.dtype} {list(scalar.shape)} on {scalar.device}"
        raise ValueError(f"scalar: expected one float32 element on {values.device}, got {got}")
    if values.numel():
        programs = min(triton.cdiv(values.numel(), SCALE_BLOCK), SCALE_PROGRAMS)
        with device_of(values):
            _scale_kernel[(programs,)](values, scalar, values.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS)
    return values


def _new_stats(logits: Tensor, with_full_kl: bool) -> RowStats:
    columns = torch.empty(4 if with_full_kl else 3, len(logits), dtype=torch.float32, device=logits.device).unbind()
    return RowStats(*columns) if with_full_kl else RowStats(*columns, None)


def _written(out: RowStats) -> RowStats:
    for name, vector in out._asdict().items():
        if vector is not None and not vector.is_contiguous():
            raise ValueError(f"out.{name}: expected a contiguous vector, got stride {vector.stride()}")
    return out


def _row_arguments(logits: Tensor, inputs: RowInputs, stats: RowStats, ref: RowReference | None) -> dict[str, Any]:
    """Return the arguments that all kernels with a target share."""
    check_logits("logits", logits, None)
    if inputs.targets.dtype != torch.int64:
        raise TypeError(f"targets: expected torch.int64, got {inputs.targets.dtype}")
    reference = RowReference(None, None, None, None) if ref is None else ref
    for name, bias in (("bias", inputs.bias), ("ref.bias", reference.bias)):
        if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
            raise TypeError(f"{name}: expected contiguous float32, got {bias.dtype} with strides {bias.stride()}")
    if ref is not None:
        check_logits("ref.logits", ref.logits, logits)
    vectors = row_vectors(
        logits,
        target_logit=inputs.target_logit,
        temperature=inputs.temperature,
        ref_lse=reference.lse,
        ref_logp=reference.logp,
        **stats._asdict(),
    )
    return {
        "logits_ptr": logits,
        "targets_ptr": inputs.targets.contiguous(),
        "bias_ptr": inputs.bias,
        "ref_ptr": reference.logits,
        "ref_bias_ptr": reference.bias,
        **_pointers(vectors),
        "softcap": _number(inputs.softcap),
        "stride": logits.stride(0),
        "ref_stride": 0 if ref is None else ref.logits.stride(0),
        "vocab": logits.shape[1],
    }


def _pointers(vectors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {f"{name}_ptr": vector for name, vector in vectors.items()}


def _launch(
    kernel: Any, logits: Tensor, arguments: dict[str, Any], inputs: RowInputs, ref: RowReference | None
) -> None:
    plain = inputs.bias is None and inputs.softcap is None
    launch(kernel, logits, arguments, plain=plain, two_rows=ref is not None)


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
