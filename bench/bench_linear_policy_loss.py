"""GRPO loss on policy (ratio 1, clip 0.2) with 0.04 * k3 to given reference log-probs, straight from hidden states.

GEMM flop: 6TDV over the scored rows. The path that a training step of stage 2 takes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import heads
from bench.cases import Case, HeadInputs
from bench.heads import HeadBench, base_cases, condition_cases, run_case, run_conditions
from bench.peers import CLIP, KL_COEF, POLICY, eager_policy_loss
from rmsd_fast.losses import linear_policy_loss


def ours(x: HeadInputs, budget: int | None = None) -> Tensor:
    return linear_policy_loss(
        x.hidden,
        x.weight,
        x.targets,
        x.advantages,
        ref_logp=x.ref_logp,
        kl="k3",
        kl_coef=KL_COEF,
        clip_low=CLIP,
        clip_high=CLIP,
        memory_budget_bytes=budget,
    ).loss


def eager(x: HeadInputs) -> Tensor:
    scored = x.scored.to(x.advantages.dtype)
    return eager_policy_loss(x.hidden, x.weight, x.targets, x.advantages, x.ref_logp, scored)


BENCH = HeadBench("linear_policy_loss", ours, ours, eager, POLICY)


def cases(quick: bool, device: str) -> list[Case]:
    base = base_cases(quick, device)
    return base if quick else [*base, *(condition_cases(quick, device) if device == "cuda" else [])]


def toy_cases(device: str) -> list[Case]:
    return heads.toy_cases(device)


def conditions(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        return [Case(512 if quick else 8192, 2560, torch.bfloat16, device=device)]
    return [] if quick else [Case(512, 256, torch.float32), Case(2048, 2560, torch.bfloat16)]


@pytest.mark.timeout(1800)
def test_linear_policy_loss(case: Case, effort, report, quick: bool) -> None:
    skip = {}
    if quick and case.device == "cpu":
        skip = {"torch.compile": "quick: its compilation is left out"}
        if case.dtype is torch.bfloat16:
            skip["Liger chunked GRPO"] = "quick: its compilation is left out"
    report(run_case(BENCH, case, effort, skip))


@pytest.mark.timeout(1800)
def test_linear_policy_loss_conditions(condition_case: Case, effort, report) -> None:
    report(run_conditions(BENCH, condition_case, effort))
