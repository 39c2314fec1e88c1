"""Log-prob and entropy of every token from hidden states, both differentiated with constants as upstream gradients.

Head trainable (6TDV), frozen (4TDV), and scoring without gradients (2TDV), flop over the scored rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, HeadInputs
from heads import HeadBench, base_cases, condition_cases, run_case, run_conditions
from peers import LOGPROB, eager_logprob, logprob_weights
from torch import Tensor

from rmsd_fast.losses import linear_logprob


def ours(x: HeadInputs) -> Tensor:
    for_logp, for_entropy = logprob_weights(x)
    logp, entropy = linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True)
    return (logp * for_logp).sum() + (entropy * for_entropy).sum()


def _stacked(logp: Tensor, entropy: Tensor, x: HeadInputs) -> Tensor:
    """Both values of the scored rows, weighted so that neither gradient hides the other's error."""
    return torch.cat([logp[x.scored], entropy[x.scored]])


def gate_ours(x: HeadInputs) -> Tensor:
    return _stacked(*linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True), x)


def gate_eager(x: HeadInputs) -> Tensor:
    return _stacked(*eager_logprob(x.hidden, x.weight, x.targets), x)


BENCH = HeadBench("linear_logprob", ours, gate_ours, gate_eager, LOGPROB)


def cases(quick: bool, device: str) -> list[Case]:
    base = base_cases(quick, device)
    if quick:
        return [base[0], replace(base[-1], head="frozen")]
    if device == "cuda":
        extra = [replace(base[2], head=head) for head in ("frozen", "score")]
        return [*base, *extra, *condition_cases(quick, device)]
    # The long shape of float32 is that of bench_linear_cross_entropy.py; here the head's modes take its place.
    short, _, medium, long = base
    heads = [replace(medium, head="frozen"), replace(long, head="score")]
    return [short, replace(short, head="frozen"), medium, *heads]


def conditions(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        return [Case(512 if quick else 8192, 2560, torch.bfloat16, device=device)]
    return [] if quick else [Case(512, 256, torch.float32)]


@pytest.mark.timeout(1800)
def test_linear_logprob(case: Case, effort, report, quick: bool) -> None:
    compiled = quick and case.device == "cpu"
    report(run_case(BENCH, case, effort, {"torch.compile": "--quick leaves out its compilation"} if compiled else {}))


@pytest.mark.timeout(1800)
def test_linear_logprob_conditions(condition_case: Case, effort, report) -> None:
    report(run_conditions(BENCH, condition_case, effort))
