"""Log-prob and entropy of every token from hidden states, both differentiated with constants as upstream gradients.

Head trainable (6TDV), frozen (4TDV), and scoring without gradients (2TDV), flop over the scored rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.heads import run
from bench.heads.cases import Case, HeadInputs
from bench.heads.peers import LOGPROB, eager_logprob, logprob_weights
from rmsd_fast.losses import linear_logprob

NAME = "linear_logprob"


def ours(x: HeadInputs) -> Tensor:
    for_logp, for_entropy = logprob_weights(x)
    logp, entropy = linear_logprob(x.hidden, x.weight, x.targets, ignore_index=x.ignore_index, return_entropy=True)
    return (logp * for_logp).sum() + (entropy * for_entropy).sum()


def _stacked(logp: Tensor, entropy: Tensor, x: HeadInputs) -> Tensor:
    """Both values of the scored rows, weighted so that neither gradient hides the other's error."""
    return torch.cat([logp[x.scored], entropy[x.scored]])


def gate_ours(x: HeadInputs, budget: int | None) -> Tensor:
    options = {"ignore_index": x.ignore_index, "memory_budget_bytes": budget}
    scores = linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True, **options)
    return _stacked(*scores, x)


def gate_eager(x: HeadInputs) -> Tensor:
    return _stacked(*eager_logprob(x.hidden, x.weight, x.targets), x)


BENCH = run.HeadBench(NAME, ours, gate_ours, gate_eager, LOGPROB)
toy_cases = run.toy_cases
conditions = partial(run.conditions, on_cpu=[Case(512, 256, torch.float32)])


def cases(quick: bool, device: str) -> list[Case]:
    base = run.base_cases(quick, device)
    if quick and device == "cpu":
        return [base[0], replace(base[-1], head="frozen")]
    if device == "cuda":
        long, *others = base
        return [long, *(replace(long, head=h) for h in ("frozen", "score")), *others]
    short, _, medium, long = base
    return [*base, *(replace(case, head="frozen") for case in (short, medium)), replace(long, head="score")]


@pytest.mark.timeout(1800)
def test_linear_logprob(case: Case, effort, report, quick: bool) -> None:
    skip = {}
    if quick and case.device == "cpu":
        skip = {"torch.compile": "quick: its compilation is left out"}
    elif case.device == "cpu" and case.tokens > 512 and case.head == "trainable":
        skip = {"Liger scaled CE": "left out at this length, to save time: see T = 512"}
    report(*run.run_case(BENCH, case, effort, skip))


@pytest.mark.timeout(1800)
def test_linear_logprob_conditions(condition_case: Case, effort, report) -> None:
    report(*run.run_conditions(BENCH, condition_case, effort))
