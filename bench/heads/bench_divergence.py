"""Divergence between a student's and a teacher's head, straight from hidden states; the teacher is a constant.

GEMM flop: 8TDV = the student's 6TDV and 2TDV for the teacher's logits of the same width; shares are of that rate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bench.core.measure import Variant, bare_gemms
from bench.heads import run
from bench.heads.cases import Case, HeadInputs
from bench.heads.peers import divergence_peers, eager_divergence
from rmsd_fast.losses import linear_divergence

NAME = "linear_divergence"


@dataclass(frozen=True)
class DivergenceCase(Case):
    """A case with the kind of divergence."""

    kind: str = "forward_kl"
    teacher: bool = True

    @property
    def name(self) -> str:
        return f"{super().name}-{self.kind}"


def bench_of(kind: str) -> run.HeadBench:
    def ours(x: HeadInputs, budget: int | None = None) -> Tensor:
        teacher = {"teacher_hidden": x.teacher_hidden, "teacher_weight": x.weight.detach()}
        return linear_divergence(x.hidden, x.weight, **teacher, kind=kind, memory_budget_bytes=budget)

    def eager(x: HeadInputs) -> Tensor:
        return eager_divergence(x.hidden, x.weight, x.teacher_hidden, x.weight.detach(), kind)

    return run.HeadBench(NAME, ours, ours, eager, divergence_peers(kind), gemms=_gemms, buffers=2)


def _gemms(x: HeadInputs) -> Variant:
    student, score = bare_gemms(x.hidden, x.weight, "trainable"), bare_gemms(x.teacher_hidden, x.weight, "score")

    def forward() -> Tensor:
        score.forward()
        return student.forward()

    return replace(student, forward=forward)


BENCHES = {kind: bench_of(kind) for kind in ("forward_kl", "jsd")}


def cases(quick: bool, device: str) -> list[DivergenceCase]:
    if device == "cuda":
        long = DivergenceCase(8192, 2560, torch.bfloat16, device=device)
        return [replace(long, kind=kind) for kind in BENCHES]
    narrow = DivergenceCase(128 if quick else 512, 256, torch.float32)
    wide = [] if quick else [DivergenceCase(512, 2560, torch.bfloat16)]
    return [narrow, replace(narrow, kind="jsd"), *wide]


def toy_cases(device: str) -> list[DivergenceCase]:
    return [DivergenceCase(64, 64, torch.bfloat16, device=device, vocabulary=512)]


@pytest.mark.timeout(900)
def test_linear_divergence(case: DivergenceCase, effort, report, quick: bool) -> None:
    names = ("torch.compile", "Liger chunked JSD") if quick and case.device == "cpu" else ()
    skip = dict.fromkeys(names, "quick: its compilation is left out")
    record, ours = run.run_case(BENCHES[case.kind], case, effort, skip)
    report(record | {"kind": case.kind}, ours)
