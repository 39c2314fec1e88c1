"""GRPO loss on policy (ratio 1, clip 0.2) with 0.04 * k3 to given reference log-probs, straight from hidden states.

GEMM flop: 6TDV over the scored rows. Ours is called as a training step of stage 2 calls it: temperature 0.8, a given
normalizer, log-probs of the rollout engine, and no ignore_index.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.heads import run
from bench.heads.cases import Case, HeadInputs
from bench.heads.peers import KL_COEF, POLICY, TEMPERATURE, eager_policy_loss, policy_arguments
from rmsd_fast.losses import linear_policy_loss

NAME = "linear_policy_loss"


def ours(x: HeadInputs, budget: int | None = None) -> Tensor:
    """The call of rmsd_fast/stages/distill.py. With masked rows the trainer's ignore_index=None is not possible."""
    return linear_policy_loss(
        x.hidden,
        x.weight,
        x.targets,
        x.advantages,
        normalizer=x.count,
        temperature=x.temperature,
        ignore_index=x.ignore_index,
        rollout_logp=x.rollout_logp,
        kl="k3",
        kl_coef=KL_COEF,
        ref_logp=x.ref_logp,
        memory_budget_bytes=budget,
    ).loss


def eager(x: HeadInputs) -> Tensor:
    return eager_policy_loss(*policy_arguments(x))


BENCH = run.HeadBench(NAME, ours, ours, eager, POLICY)


def _at_temperature(cases: list[Case]) -> list[Case]:
    return [replace(case, temperature=TEMPERATURE) for case in cases]


def cases(quick: bool, device: str) -> list[Case]:
    return _at_temperature(run.base_cases(quick, device))


def toy_cases(device: str) -> list[Case]:
    return _at_temperature(run.toy_cases(device))


def conditions(quick: bool, device: str) -> list[Case]:
    on_cpu = [Case(512, 256, torch.float32), Case(2048, 2560, torch.bfloat16)]
    return _at_temperature(run.conditions(quick, device, on_cpu))


@pytest.mark.timeout(1800)
def test_linear_policy_loss(case: Case, effort, report, quick: bool) -> None:
    skip = {}
    if quick and case.device == "cpu":
        skip = {"torch.compile": "quick: its compilation is left out"}
        if case.dtype is torch.bfloat16:
            skip["Liger chunked GRPO"] = "quick: its compilation is left out"
    report(*run.run_case(BENCH, case, effort, skip))


@pytest.mark.timeout(1800)
def test_linear_policy_loss_conditions(condition_case: Case, effort, report) -> None:
    report(*run.run_conditions(BENCH, condition_case, effort))
