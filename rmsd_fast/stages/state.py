"""What a stage's step works on, and the bookkeeping that both stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rmsd_fast.config import RunConfig, UserError
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures, Student
from rmsd_fast.rollout.base import RolloutEngine
from rmsd_fast.runtime.distributed import Engine, World
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.teacher.targets import Targets


@dataclass
class RunState:
    """The live objects of a stage; `policy.module` is the model inside `student`."""

    world: World
    student: Student
    builder: PromptBuilder
    targets: dict[str, Targets]
    timer: PhaseTimer
    policy: Engine
    discriminator: Engine | None = None
    reference: torch.nn.Module | None = None
    rollouts: RolloutEngine | None = None
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimiser step over the global batch; skipped = weights left as they were."""

    metrics: dict[str, float]
    skipped: bool


class NonFiniteRun(UserError, RuntimeError):
    """Loss or gradient was not finite for too many steps in a row."""


def learning_rate(step: int, *, steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then constant or cosine to zero at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))


def apply_or_discard(state: RunState, engines: list[Engine], settings: RunConfig) -> tuple[list[float], bool]:
    """One optimiser step of every engine, or of none where a gradient of any is not finite on any process.

    Gradients that are finite one by one can still overflow in their squared norm: that engine then throws its own away,
    the others have stepped, and the step counts as skipped as well.

    Returns:
        Gradient norms in the order of the engines, and whether the step was skipped.
    Raises:
        NonFiniteRun: this was the `runtime.max_skipped_steps`-th in a row.
    """
    norms = [float("nan")] * len(engines)
    if all([engine.gradients_finite() for engine in engines]):
        norms = [engine.step() for engine in engines]
    else:
        for engine in engines:
            engine.discard()
    skipped = not all(map(math.isfinite, norms))
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row >= settings.runtime.max_skipped_steps:
        raise NonFiniteRun(
            f"loss or gradient was not finite in {state.skipped_in_a_row} steps in a row; the weights are those of the "
            "last good step. Lower the learning rate, or use model.dtype=float32 to look for the cause"
        )
    return norms, skipped


def micro_batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def prompt_tokens(prompts: list[Prompt]) -> int:
    return sum(len(prompt.input_ids) for prompt in prompts)


def select_features(features: MediaFeatures | None, indices: list[int]) -> MediaFeatures | None:
    """Features of some of the prompts; None stays None (each model then encodes its own)."""
    return None if features is None else features.select(indices)
