"""What a stage's step works on, and the bookkeeping that both stages share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rmsd_fast.config import RunConfig, UserError
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures, Student, encode_media
from rmsd_fast.rollout.base import RolloutEngine
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.teacher.targets import Targets


@dataclass
class StageState:
    """The settings and live objects of a stage; `policy.module` is the model inside `student`.

    train_vision: whether the policy's vision tower is trained; then each model encodes the media in its own passes.
    """

    settings: RunConfig
    world: World
    student: Student
    builder: PromptBuilder
    targets: dict[str, Targets]
    timer: PhaseTimer
    policy: Engine
    train_vision: bool = False
    discriminator: Engine | None = None
    reference: torch.nn.Module | None = None
    rollouts: RolloutEngine | None = None
    skipped_in_a_row: int = 0
    features: ByteLru[list[torch.Tensor]] | None = None
    """Vision features of a frozen tower by medium, where `data.embedding_cache_mib` gives room."""


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimiser step over the global batch; skipped = weights left as they were.

    groups: this process's questions with their rollouts, in stages that roll out.
    """

    metrics: dict[str, float | None]
    skipped: bool
    groups: list[RolloutGroup] = field(default_factory=list)


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


def apply_or_discard(engines: list[Engine]) -> tuple[list[float], bool]:
    """One optimiser step of every engine, or of none where a gradient, or the norm, of any is not finite on any rank.

    Returns:
        Gradient norms in the order of the engines, and whether the step was skipped.
    """
    # Of all engines before any of them steps.
    skipped = not all([engine.gradients_finite() for engine in engines])
    if skipped:
        for engine in engines:
            engine.discard()
        return [float("nan")] * len(engines), True
    return [engine.step() for engine in engines], False


def count_skipped(state: StageState, skipped: bool) -> None:
    """Count a step as skipped or not; raises NonFiniteRun for the `runtime.max_skipped_steps`-th in a row."""
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row >= state.settings.runtime.max_skipped_steps:
        raise NonFiniteRun(
            f"logits, loss or gradient were not finite in {state.skipped_in_a_row} steps in a row, which changed "
            "nothing. Lower the learning rate, or use model.dtype=float32 to look for the cause"
        )


def encode_step(state: StageState, prompts: list[Prompt]) -> MediaFeatures:
    """Vision features of a step's prompts without a graph, each video once. No collective: not under ZeRO-3, unless
    within `full_weights`.
    """
    tokens = state.settings.micro_tokens
    with state.timer("vision"), torch.no_grad():
        return encode_media(state.student.model, prompts, tokens_per_call=tokens, cache=state.features)
