"""Discriminator step on the last response tokens: ours against eager code that scores every token of padded batches.

Eager code takes student and teacher batches [B, L, D], applies RMSNorm and the value head to all tokens, gathers the
last one, and computes the pair loss. Ours calls `last_token_values` on each batch and then the pair loss; "ours in one
call" calls `discriminator_loss` on the last rows of both. `train` differentiates hidden states, norm weight and head.
`score` is a forward pass without gradients. `rows` (CUDA) starts from rows gathered beforehand, so that gradients of
padded batches do not hide the difference.

On CUDA, `launches` counts the kernels of a call and their time on the device. Two more variants are counted but not
timed: `discriminator_loss` and eager code on prepared tensors, which is the op alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.launches import launches_of
from bench.core.measure import OURS, differences_of, facts_of, measure, numbers_of
from bench.core.metrics import PREPARED
from bench.cuda.section_log import seconds_left
from bench.heads.peers import eager_and_compiled, gather
from rmsd_fast.losses import discriminator_loss, last_token_values, pairwise_discriminator_loss

NAME = "discriminator"

EPS = 1e-6
ONE_CALL = "ours in one call"
EAGER_ALONE = "eager, all prepared"
# The first compilation in a process takes about this long.
_COMPILE_S = 12.0


@dataclass(frozen=True)
class Case:
    """B pairs of padded length L; mode: train, score or rows."""

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

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        return self[:4]

    @property
    def sides(self) -> tuple[tuple[Tensor, Tensor], ...]:
        return (self.student, self.last_student), (self.teacher, self.last_teacher)


def make_inputs(case: Case, dtype: torch.dtype | None = None) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(3)
    shape = (case.batch, case.length, case.hidden)

    def draw(*size: int) -> Tensor:
        # Rounded to the case's dtype first, so that the float64 truth has the same inputs.
        values = torch.randn(*size, generator=generator, device=case.device).to(case.dtype)
        return values.to(dtype or case.dtype)

    student, teacher, norm, head = draw(*shape), draw(*shape), draw(case.hidden) * 0.1 + 1, draw(case.hidden) * 0.02
    last = [
        torch.randint(min(1, case.length - 1), case.length, (case.batch,), generator=generator, device=case.device)
        for _ in range(2)
    ]
    quality = torch.rand(case.batch, generator=generator, device=case.device).to(student.dtype)
    return Inputs(*(t.requires_grad_() for t in (student, teacher, norm, head)), *last, quality)


def eager(x: Inputs) -> Tensor:
    def last_scores(hidden: Tensor, last: Tensor) -> Tensor:
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        values = F.linear(x.norm * normed.to(hidden.dtype), x.head[None])[..., 0]
        return values.gather(1, last[:, None])[:, 0]

    return _pair_loss(last_scores(x.student, x.last_student), last_scores(x.teacher, x.last_teacher), x)


def gathered_eager(x: Inputs) -> Tensor:
    """Optimized eager code: only the last rows pass through norm and head. On CPU, ours is torch code like this."""
    pairs = torch.arange(len(x.quality), device=x.quality.device)
    student, teacher = (_row_scores(hidden[pairs, last], x) for hidden, last in x.sides)
    return _pair_loss(student, teacher, x)


def _row_scores(rows: Tensor, x: Inputs) -> Tensor:
    rows = rows.float()
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS) * x.norm.float()
    return (normed * x.head.float()).sum(-1)


def _pair_loss(student: Tensor, teacher: Tensor, x: Inputs) -> Tensor:
    return (x.quality * F.softplus(student - teacher)).mean()


def ours(x: Inputs) -> Tensor:
    rows = torch.arange(len(x.quality), device=x.quality.device)
    scores = [
        last_token_values(hidden.flatten(0, 1), rows * hidden.shape[1] + last, x.head, norm_weight=x.norm, norm_eps=EPS)
        for hidden, last in x.sides
    ]
    return pairwise_discriminator_loss(*scores, rows, rows, x.quality).loss


def ours_in_one_call(x: Inputs) -> Tensor:
    pairs, length = torch.arange(len(x.quality), device=x.quality.device), x.student.shape[1]
    return _one_call(torch.cat([h.flatten(0, 1).index_select(0, pairs * length + last) for h, last in x.sides]), x)


def _one_call(rows: Tensor, x: Inputs) -> Tensor:
    """rows: the last rows of students and teachers, [2B, D]."""
    every = torch.arange(len(rows), device=rows.device)
    pairs = every[: len(x.quality)]
    settings = {"num_students": len(pairs), "norm_weight": x.norm, "norm_eps": EPS}
    return discriminator_loss(rows, every, x.head, pairs, pairs, x.quality, **settings).loss


FORMS = {OURS: ours, ONE_CALL: ours_in_one_call}


def gate(case: Case) -> dict[str, dict[str, list[float]]]:
    """For each of our implementations, return the errors [ours, eager] against float64, on a shorter batch.

    They cover the loss and its gradients.
    """
    small = replace(case, length=min(case.length, 16))

    def outputs(loss: Callable[[Inputs], Tensor], x: Inputs) -> dict[str, Tensor]:
        value = loss(x)
        return dict(
            zip(("value", "student", "teacher", "norm", "head"), (value.detach(), *_grad(value, x)), strict=True)
        )

    x = make_inputs(small)
    exact, other = outputs(eager, make_inputs(small, torch.float64)), outputs(eager, x)
    errors: dict[str, dict[str, list[float]]] = {}
    for form, loss in FORMS.items():
        got = outputs(loss, x)
        for name, truth in exact.items():
            own, bar = ((side[name].double() - truth).abs().max().item() for side in (got, other))
            assert own <= 2 * bar + 1e-6 * truth.abs().max().item(), f"{form} {case.name} {name}: {own}, eager {bar}"
            errors.setdefault(form, {})[name] = [own, bar]
    return errors


def prepared(x: Inputs, score: bool) -> dict[str, Callable[[], object]]:
    """Return calls of the op alone and of eager code on the last rows [2B, D], with gradients unless `score`."""
    pairs = torch.arange(len(x.quality), device=x.quality.device)
    rows = torch.cat([hidden.detach()[pairs, last] for hidden, last in x.sides]).requires_grad_()
    every, one = torch.arange(len(rows), device=rows.device), torch.ones((), device=rows.device)
    settings = {"num_students": len(pairs), "norm_weight": x.norm, "norm_eps": EPS}

    def alone() -> Tensor:
        return discriminator_loss(rows, every, x.head, pairs, pairs, x.quality, **settings).loss

    def eager_alone() -> Tensor:
        return _pair_loss(*_row_scores(rows, x).split(len(pairs)), x)

    def call(loss: Callable[[], Tensor]) -> Callable[[], object]:
        return torch.no_grad()(loss) if score else lambda: torch.autograd.grad(loss(), [rows, x.norm, x.head], one)

    return {PREPARED: call(alone), EAGER_ALONE: call(eager_alone)}


def _grad(value: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, x.differentiable)


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        # The variant that our claims rest on comes first.
        shapes = (("rows", 1), ("train", 512), ("score", 512))
        return [Case(torch.bfloat16, mode, length=length, device=device) for mode, length in shapes]
    dtypes = [torch.bfloat16] if quick else [torch.bfloat16, torch.float32]
    return [Case(dtype, mode, device=device) for dtype in dtypes for mode in ("train", "score")]


def toy_cases(device: str) -> list[Case]:
    small = {"batch": 3, "hidden": 64, "device": device}
    return [Case(torch.bfloat16, "rows", length=1, **small), Case(torch.float32, "score", length=5, **small)]


@pytest.mark.timeout(900)
def test_discriminator(case: Case, effort, report) -> None:
    errors = gate(case)
    x = make_inputs(case)
    skip = {}
    if case.device == "cpu" and case.hidden < 1024:
        skip["torch.compile"] = "a rehearsal leaves out its compilation"
    elif seconds_left() < _COMPILE_S:
        skip["torch.compile"] = f"no time left to compile: {seconds_left():.0f} s"
    builds = {name: lambda x, f=loss: partial(f, x) for name, loss in FORMS.items()}
    builds |= eager_and_compiled(eager) | {"eager, gathered": lambda x: partial(gathered_eager, x)}
    score, device = case.mode == "score", x.student.device
    variants, not_run = gather(builds, x, score=score, skip=skip)
    not_run["other libraries"] = "none has a fused form of this loss"
    samples = measure(variants, effort, device, not_run, base=OURS)
    numbers = numbers_of(samples, variants, baseline=None)
    shape = {"B": case.batch, "L": case.length, "D": case.hidden}
    record = facts_of(NAME, case, shape) | {"mode": case.mode, "variants": numbers, "errors": errors}
    record |= {"not_run": not_run, "differences": differences_of(samples)}
    counted = {variant.name: variant for variant in variants if variant.name in numbers}
    report(record | launches_of(prepared(x, score) | counted, device), variants[0])
