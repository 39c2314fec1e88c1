"""What a stage's step works on, and the bookkeeping that both stages share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rmsd_fast.config import RunConfig, SettingsError, UserError
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.micro_batches import MicroBatch, plan_micro_batches
from rmsd_fast.data.packing import Rows, make_rows
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.cost import balance_weights
from rmsd_fast.models.students import MediaFeatures, Student, encode_media
from rmsd_fast.rollout.base import RolloutEngine
from rmsd_fast.runtime.distributed import Engine, World, global_max
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.stages.groups import Group
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
    features: ByteLru[list[torch.Tensor]] | None = None
    """Vision features of a frozen tower by medium, where `data.embedding_cache_mib` gives room."""


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimiser step over the global batch; skipped = weights left as they were.

    groups: this process's questions with their rollouts, in stages that roll out.
    """

    metrics: dict[str, float]
    skipped: bool
    groups: list[Group] = field(default_factory=list)


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


def count_skipped(state: RunState, settings: RunConfig, skipped: bool) -> None:
    """Count a step as skipped or not; raises NonFiniteRun for the `runtime.max_skipped_steps`-th in a row."""
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row >= settings.runtime.max_skipped_steps:
        raise NonFiniteRun(
            f"logits, loss or gradient were not finite in {state.skipped_in_a_row} steps in a row, which changed "
            "nothing. Lower the learning rate, or use model.dtype=float32 to look for the cause"
        )


def micro_batches(
    state: RunState, prompts: list[Prompt], responses: list[list[torch.Tensor]], settings: RunConfig
) -> list[MicroBatch]:
    """Micro-batches of the prompts with their responses, as many on every process.

    Raises:
        SettingsError: on all processes, where a prompt with one response exceeds `micro_tokens` on any.
    """
    planned = False

    def agree(count: int) -> int:
        nonlocal planned
        planned = True
        found = global_max({"count": count, "fault": 0}, state.world)
        if found["fault"]:
            raise SettingsError("another process has a prompt that exceeds micro_tokens; see its message above")
        return int(found["count"])

    try:
        return plan_micro_batches(
            [len(prompt.input_ids) for prompt in prompts],
            [[len(ids) for ids in own] for own in responses],
            packing=settings.packing,
            micro_tokens=settings.micro_tokens,
            weights=balance_weights(state.student.model.config),
            ids=[prompt.question.id for prompt in prompts],
            agree=agree,
        )
    except SettingsError:
        if not planned:
            global_max({"count": 0, "fault": 1}, state.world)
        raise


def rows_of(
    state: RunState,
    batch: MicroBatch,
    prompts: list[Prompt],
    responses: list[list[torch.Tensor]],
    settings: RunConfig,
) -> Rows:
    """The rows of a micro-batch on this process's device; responses in the order of the batch."""
    chosen = [[responses[i][r] for r in own] for i, own in zip(batch.prompts, batch.responses, strict=True)]
    rows = make_rows(settings.packing, [prompts[i] for i in batch.prompts], chosen, pad_id=state.builder.eos_id)
    return rows.to(state.world.device)


def is_split(batches: list[MicroBatch], responses: list[list[torch.Tensor]]) -> bool:
    """Whether any group did not fit one micro-batch."""
    return any(
        len(own) < len(responses[i])
        for batch in batches
        if not batch.filler
        for i, own in zip(batch.prompts, batch.responses, strict=True)
    )


def encode_step(state: RunState, prompts: list[Prompt], settings: RunConfig) -> MediaFeatures:
    """Vision features of a step's prompts without a graph, each video once. No collective: not under ZeRO-3, unless
    within `full_weights`.
    """
    with state.timer("vision"), torch.no_grad():
        return encode_media(state.student.model, prompts, tokens_per_call=settings.micro_tokens, cache=state.features)


def select_features(features: MediaFeatures | None, indices: list[int]) -> MediaFeatures | None:
    """Features of some of the prompts; None stays None (each model then encodes its own)."""
    return None if features is None else features.select(indices)
