"""Provide rows of logits for the tests of the compiled row back end, and check their errors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmsd_kernels.heads import torch_rows
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs, RowReference

FLOOR = 1e-6


class Case(NamedTuple):
    """Logits [n, V] of one dtype with their inputs, the rows of a reference head, and float32 coefficients [n]."""

    logits: Tensor
    inputs: RowInputs
    ref: RowReference
    a: Tensor
    b: Tensor
    c: Tensor


def make(dtype: torch.dtype, vocab: int, full: bool, rows: int = 5, spread: float = 3.0, seed: int = 0) -> Case:
    """Return a random Case; `full` adds bias, softcap and a temperature per row.

    Target logits differ slightly from the logits, as the exact target logits differ from those of a 16-bit GEMM.
    """
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=g) * spread).to(dtype)
    ref_logits = (logits.float() + 0.5 * torch.randn(rows, vocab, generator=g)).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=g)
    pick = lambda rows_: rows_.float().gather(1, targets[:, None])[:, 0]  # noqa: E731
    bias, ref_bias = (torch.randn(vocab, generator=g) if full else None for _ in range(2))
    temperature = torch.rand(rows, generator=g) + 0.5 if full else None
    inputs = RowInputs(targets, pick(logits) * 1.001, bias, temperature, 8.0 if full else None)
    ref_stats = torch_rows.score(
        ref_logits.double(), doubled(inputs._replace(target_logit=pick(ref_logits), bias=ref_bias))
    )
    ref = RowReference(ref_logits, ref_bias, ref_stats.lse.float(), ref_stats.logp.float())
    return Case(logits, inputs, ref, *(torch.randn(rows, generator=g) for _ in range(3)))


def terms_of(case: Case, kl: str, on_policy: bool, entropy_coef: float, clip: float | None) -> PolicyTerms:
    """Return terms with ratios on both sides of the clip, and log-ratios to the reference on both sides of `clip`."""
    logp = torch_rows.score(case.logits.double(), doubled(case.inputs)).logp.float()
    sampled = kl in ("k1", "k2", "k3")
    return PolicyTerms(
        scale=case.a.abs(),
        advantage=case.b,
        old_logp=None if on_policy else logp + 0.3 * case.c,
        ref_logp=logp - 0.4 * case.c if sampled else None,
        settings=PolicySettings(
            kl_loss=kl,
            kl_coef=0.2,
            kl_log_ratio_clip=clip,
            clip_low=0.2,
            clip_high=0.25,
            entropy_coef=entropy_coef,
        ),
    )


def doubled(value):
    """Return the same record or tensor with every floating tensor in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(*map(doubled, value)) if isinstance(value, tuple) else value


def assert_close(name: str, got: Tensor | None, eager: Tensor | None, exact: Tensor | None) -> None:
    """Check that the error is at most twice the error of eager torch on the same inputs, plus a floor."""
    if exact is None:
        assert got is None, name
        return
    assert got.shape == exact.shape and got.isfinite().all(), name
    error, eager_error = ((t.double() - exact.double()).abs().max().item() for t in (got, eager))
    floor = FLOOR * max(1.0, exact.abs().max().item())
    assert error <= 2 * eager_error + floor, f"{name}: error {error:.2e}, eager {eager_error:.2e}, floor {floor:.1e}"


def assert_stats_close(got, eager, exact) -> None:
    assert (got.logp <= 0).all()
    for name in exact._fields:
        assert_close(name, getattr(got, name), getattr(eager, name), getattr(exact, name))
