"""Mean cross entropy from hidden states: ours against eager, torch.compile, torch's own, Liger and CCE.

GEMM flop: 6TDV over the scored rows. TFLOP/s = flop / time. See README.md in this folder.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from bench.heads import run
from bench.heads.cases import Case, HeadInputs
from bench.heads.peers import CROSS_ENTROPY, eager_cross_entropy
from rmsd_fast.losses import linear_cross_entropy

NAME = "linear_cross_entropy"


def ours(x: HeadInputs, budget: int | None = None) -> Tensor:
    return linear_cross_entropy(x.hidden, x.weight, x.targets, ignore_index=x.ignore_index, memory_budget_bytes=budget)


def eager(x: HeadInputs) -> Tensor:
    return eager_cross_entropy(x.hidden, x.weight, x.targets)


BENCH = run.HeadBench(NAME, ours, ours, eager, CROSS_ENTROPY)
toy_cases = run.toy_cases
conditions = partial(run.conditions, on_cpu=[Case(2048, 2560, torch.bfloat16)])


def cases(quick: bool, device: str) -> list[Case]:
    return [*run.base_cases(quick, device), *run.condition_cases(quick, device)]


@pytest.mark.timeout(1800)
def test_linear_cross_entropy(case: Case, effort, report, quick: bool) -> None:
    skip, chunked = {}, "torch l.c.e. chunked"
    if case.device == "cpu":
        if case.mask or case.softmax != "random":
            # Compilation alone takes half a minute, and the other forms stand for these.
            skip = dict.fromkeys(("CCE torch_compile", chunked), "left out under conditions, to save time")
        if case.tokens > 512 and case.dtype is torch.float32:
            skip = dict.fromkeys(("CCE torch_compile", chunked), "left out at this length, to save time: see T = 512")
        if quick:
            skip = {chunked: "quick: many seconds a call, left out"}
        if case.dtype is torch.bfloat16:
            skip[chunked] = "16 tokens take 12 s on a CPU"
            names = ("torch.compile", "CCE torch_compile") if quick else ()
            skip |= dict.fromkeys(names, "quick: its compilation is left out")
    report(*run.run_case(BENCH, case, effort, skip))


@pytest.mark.timeout(1800)
def test_linear_cross_entropy_conditions(condition_case: Case, effort, report) -> None:
    report(*run.run_conditions(BENCH, condition_case, effort))
