"""Divergence between a student's and a teacher's head, straight from hidden states; the teacher is a constant.

GEMM flop: 8TDV = the student's 6TDV and 2TDV for the teacher's logits of the same width; shares are of that rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bench.cases import GATE_TOKENS, Case, HeadInputs, checked, head_inputs
from bench.heads import OURS, Outcome
from bench.measure import GEMMS, Variant, bare_gemms, differences_of, gemm_flop, main_time, measure, numbers_of
from bench.peers import as_variant, divergence_peers, eager_divergence, gather
from rmsd_fast.losses import linear_divergence


@dataclass(frozen=True)
class DivergenceCase(Case):
    """A case with the kind of divergence."""

    kind: str = "forward_kl"

    @property
    def name(self) -> str:
        return f"{super().name}-{self.kind}"


@dataclass(frozen=True)
class Teacher:
    """Hidden states and head of the teacher, from those of the student: nearby, as in distillation."""

    kind: str

    def of(self, x: HeadInputs) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return x.hidden.roll(1, 0) * 0.3 + x.hidden, x.weight.detach()

    def ours(self, x: HeadInputs, budget: int | None) -> Tensor:
        hidden, weight = self.of(x)
        return linear_divergence(
            x.hidden, x.weight, teacher_hidden=hidden, teacher_weight=weight, kind=self.kind, memory_budget_bytes=budget
        )

    def eager(self, x: HeadInputs) -> Tensor:
        return eager_divergence(x.hidden, x.weight, *self.of(x), self.kind)


def cases(quick: bool, device: str) -> list[DivergenceCase]:
    if device == "cuda":
        long = DivergenceCase(512 if quick else 8192, 2560, torch.bfloat16, device=device)
        return [replace(long, kind=kind) for kind in ("forward_kl", "jsd")]
    narrow = DivergenceCase(128 if quick else 512, 256, torch.float32)
    wide = [] if quick else [DivergenceCase(512, 2560, torch.bfloat16)]
    return [narrow, replace(narrow, kind="jsd"), *wide]


def toy_cases(device: str) -> list[DivergenceCase]:
    return [DivergenceCase(64, 64, torch.bfloat16, device=device, vocabulary=512)]


@pytest.mark.timeout(900)
def test_linear_divergence(case: DivergenceCase, effort, report, quick: bool) -> None:
    side = Teacher(case.kind)
    errors = checked("linear_divergence", replace(case, tokens=GATE_TOKENS), side.ours, side.eager, buffers=2)
    x = head_inputs(case)
    teacher = side.of(x)
    loss = lambda: linear_divergence(  # noqa: E731
        x.hidden, x.weight, teacher_hidden=teacher[0], teacher_weight=teacher[1], kind=case.kind
    )
    names = ("torch.compile", "Liger chunked JSD") if quick and case.device == "cpu" else ()
    peers, not_run = gather(
        divergence_peers(*teacher, case.kind), x, skip=dict.fromkeys(names, "quick: its compilation is left out")
    )
    variants = [_gemms(x, teacher), as_variant(OURS, loss, x, False), *peers]
    samples = measure(variants, effort, x.hidden.device, not_run, base=OURS)
    numbers = numbers_of(samples, variants)
    flop = gemm_flop(case.tokens, case.hidden, case.vocabulary, "trainable") * 8 // 6
    record = {"bench": "linear_divergence", **case.facts(), "kind": case.kind, "gemm_flop": flop, "baseline": OURS}
    record |= {"variants": numbers, "differences": differences_of(samples), "not_run": not_run}
    record["errors"] = errors._asdict()
    report(Outcome(record, variants[1], main_time(numbers[OURS]) / 1e3))


def _gemms(x: HeadInputs, teacher: tuple[Tensor, Tensor]) -> Variant:
    student, score = bare_gemms(x.hidden, x.weight, "trainable"), bare_gemms(*teacher, "score")

    def forward() -> Tensor:
        score.forward()
        return student.forward()

    return replace(student, name=GEMMS, forward=forward)
