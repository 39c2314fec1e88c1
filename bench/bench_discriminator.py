"""Discriminator step on the last response tokens: ours against eager code that scores every token of padded batches.

Eager: student and teacher batches [B, L, D], RMSNorm and the value head on all tokens, then a gather of the last one,
then the pair loss. Ours: `last_token_values` gathers first. Both differentiate hidden states, norm weight and head; a
gradient [B, L, D] of the hidden states has to be written by both. `score`: forward without gradients (rewards).
Bytes that eager has to move at least: hidden states read forward and backward and written as gradient, 3 * 2BLD.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from heads import Outcome
from measure import Variant, differences, main_time, measure, numbers_of, with_gradients
from torch import Tensor

from rmsd_fast.losses import last_token_values, pairwise_discriminator_loss

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """B pairs of padded length L."""

    dtype: torch.dtype
    mode: str
    batch: int = 16
    length: int = 512
    hidden: int = 2560
    device: str = "cpu"

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B{self.batch}-L{self.length}-D{self.hidden}-{dtype}-{self.mode}"


class Inputs(NamedTuple):
    """student, teacher [B, L, D]; last_* [B] index of the last token; norm, head [D]; quality [B]."""

    student: Tensor
    teacher: Tensor
    norm: Tensor
    head: Tensor
    last_student: Tensor
    last_teacher: Tensor
    quality: Tensor


def make_inputs(case: Case, dtype: torch.dtype | None = None) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(3)
    shape = (case.batch, case.length, case.hidden)

    def draw(*size: int) -> Tensor:
        # Rounded to the case's dtype first, so that the float64 truth has the same inputs.
        values = torch.randn(*size, generator=generator, device=case.device).to(case.dtype)
        return values.to(dtype or case.dtype)

    student, teacher, norm, head = draw(*shape), draw(*shape), draw(case.hidden) * 0.1 + 1, draw(case.hidden) * 0.02
    last = [torch.randint(1, case.length, (case.batch,), generator=generator, device=case.device) for _ in range(2)]
    quality = torch.rand(case.batch, generator=generator, device=case.device).to(student.dtype)
    return Inputs(*(t.requires_grad_() for t in (student, teacher, norm, head)), *last, quality)


def eager(x: Inputs) -> Tensor:
    def last_scores(hidden: Tensor, last: Tensor) -> Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        values = F.linear(x.norm * normed.to(hidden.dtype), x.head[None])[..., 0]
        return values.gather(1, last[:, None])[:, 0]

    student, teacher = last_scores(x.student, x.last_student), last_scores(x.teacher, x.last_teacher)
    return (x.quality * F.softplus(student - teacher)).mean()


def ours(x: Inputs) -> Tensor:
    rows = torch.arange(len(x.quality), device=x.quality.device)

    def last_scores(hidden: Tensor, last: Tensor) -> Tensor:
        index = rows * hidden.shape[1] + last
        return last_token_values(hidden.flatten(0, 1), index, x.head, norm_weight=x.norm, norm_eps=EPS)

    student, teacher = last_scores(x.student, x.last_student), last_scores(x.teacher, x.last_teacher)
    return pairwise_discriminator_loss(student, teacher, rows, rows, x.quality).loss


def gate(case: Case) -> dict[str, list[float]]:
    """Errors [ours, eager] of the loss and the small gradients to float64, on a shorter batch."""
    small = Case(case.dtype, case.mode, case.batch, 16, case.hidden, case.device)

    def outputs(loss: Callable[[Inputs], Tensor], x: Inputs) -> dict[str, Tensor]:
        value = loss(x)
        return {
            "value": value.detach(),
            **dict(zip(("student", "teacher", "norm", "head"), _grad(value, x), strict=True)),
        }

    x = make_inputs(small)
    exact = outputs(eager, make_inputs(small, torch.float64))
    got, other = outputs(ours, x), outputs(eager, x)
    errors = {}
    for name, truth in exact.items():
        own, bar = ((side[name].double() - truth).abs().max().item() for side in (got, other))
        assert own <= 2 * bar + 1e-6 * truth.abs().max().item(), f"{case.name} {name}: {own}, eager {bar}"
        errors[name] = [own, bar]
    return errors


def _grad(value: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [x.student, x.teacher, x.norm, x.head])


def cases(quick: bool, device: str) -> list[Case]:
    dtypes = [torch.bfloat16] if quick or device == "cuda" else [torch.bfloat16, torch.float32]
    return [Case(dtype, mode, device=device) for dtype in dtypes for mode in ("train", "score")]


@pytest.mark.timeout(900)
def test_discriminator(case: Case, effort, report) -> None:
    errors = gate(case)
    x = make_inputs(case)
    compiled = torch.compile(eager, dynamic=False)
    variants = []
    for name, function in (("ours", ours), ("eager", eager), ("torch.compile", compiled)):
        compiles = name == "torch.compile"
        if case.mode == "score":
            variants.append(Variant(name, torch.no_grad()(lambda f=function: f(x)), compiles=compiles))
        else:
            variants.append(with_gradients(name, lambda f=function: f(x), x[:4], compiles=compiles))
    device = x.student.device
    samples = measure(variants, effort, device)
    numbers = numbers_of(samples, variants, baseline=None)
    item = x.student.element_size()
    record = {
        "bench": "discriminator",
        "case": case.name,
        "shape": {"B": case.batch, "L": case.length, "D": case.hidden},
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device,
        "baseline": "ours",
        "least_bytes_eager": (3 if case.mode == "train" else 1) * 2 * x.student.numel() * item,
        "variants": numbers,
        "differences": differences(samples, "ours"),
        "errors": errors,
        "not_run": {"other libraries": "none has a fused form of this loss"},
    }
    report(Outcome(record, variants[0], main_time(numbers["ours"]) / 1e3))
