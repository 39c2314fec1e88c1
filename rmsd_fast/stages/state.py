"""The state that the steps of a stage work on, and the bookkeeping that all stages share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from rmsd_fast.config import RunConfig, UserError
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.method.hints import Hint
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.students import MediaFeatures, Student, encode_media
from rmsd_fast.rollout.base import RolloutEngine
from rmsd_fast.runtime.engine import Engine, gradients_finite
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.term_weights import TermWeights
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.rollout_dump import RolloutDump
from rmsd_fast.teacher.targets import Targets


@dataclass
class StageState:
    """The settings and live objects of a stage. `policy.module` is the model inside `student`.

    Attributes:
        train_vision: whether the policy's vision tower is trained. If so, each model encodes the media in its own
            passes.
        dump: where the rollouts are also written; None without `rollout.dump`.
        features: cached vision features of a frozen tower, by medium; None if `data.embedding_cache_mib` is 0.
        reference: takes the arguments of `Policy.forward`: a frozen `Policy`, or with adapters the policy's engine with
            adapters off; None if nothing needs it.
        parity_checked: whether this process has compared log-probs of rollout engine and trainer.
        hints: what the self-teacher is told about each training question, by id; empty without a self-teacher.
        hinted_share: share of the questions of an imitation step that are shown with a hint.
        judge: takes pairs of a question and a rollout's text, and returns a judge's advice about each, or None where it
            gives none. All processes call it together. None if no judge is asked.
        average: weights of the self-teacher with `self_teacher.kind=ema`.
        teacher: the frozen model of `self_teacher.kind=path`; None with other kinds.
        shares_tower: whether the vision features of the student's frozen tower are also those of `teacher`.
        term_weights: log-variances of the terms of the loss, with `credit.uncertainty`.
        accuracies: pair accuracies of the latest steps of the warm-up, for `discriminator.warm_up_accuracy`.
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
    reference: Callable[..., Any] | None = None
    rollouts: RolloutEngine | None = None
    dump: RolloutDump | None = None
    skipped_in_a_row: int = 0
    hints: dict[str, tuple[Hint, ...]] = field(default_factory=dict)
    hinted_share: float = 0.0
    judge: Callable[[list[tuple[Question, str]]], list[str | None]] | None = None
    average: MovingAverage | None = None
    teacher: Policy | None = None
    shares_tower: bool = False
    term_weights: TermWeights | None = None
    features: ByteLru[list[torch.Tensor]] | None = None
    accuracies: list[float] = field(default_factory=list)
    parity_checked: bool = False


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step over the global batch.

    Attributes:
        metrics: metrics over the global batch.
        skipped: whether the step was skipped, which leaves the weights unchanged.
        groups: this process's questions with their rollouts; empty in stages without rollouts.
        finished: whether the stage has reached its goal and ends before its last step.
    """

    metrics: dict[str, float | None]
    skipped: bool
    groups: list[RolloutGroup] = field(default_factory=list)
    finished: bool = False


class NonFiniteRun(UserError, RuntimeError):
    """The loss or a gradient was not finite for too many consecutive steps."""


def learning_rate(step: int, *, steps: int, lr: float, warmup_steps: int, schedule: str) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then constant or cosine to zero at `steps`."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return lr * 0.5 * (1 + math.cos(math.pi * done))


def apply_or_discard(engines: list[Engine]) -> tuple[list[float], bool]:
    """Run one optimizer step of every engine, or of none if any gradient or gradient norm is not finite on any rank.

    The host waits for the device twice, besides the waits of DeepSpeed's optimizers.

    Returns:
        Gradient norms in the order of the engines, and whether the step was skipped.
    Raises:
        RuntimeError: DeepSpeed did not apply a step, or a norm is not finite although `gradients_finite` is true.
    """
    # Check all engines before the first one takes a step.
    if not gradients_finite(engines):
        for engine in engines:
            engine.discard()
        return [float("nan")] * len(engines), True
    # One read of all norms, after the last step.
    norms = torch.stack([engine.step() for engine in engines]).tolist()
    if not all(map(math.isfinite, norms)):
        raise RuntimeError(f"gradient norms: expected finite numbers after gradients_finite(), got {norms}")
    return norms, False


def count_skipped(state: StageState, skipped: bool) -> None:
    """Count consecutive skipped steps.

    Raises:
        NonFiniteRun: the number of consecutive skipped steps has reached `runtime.max_skipped_steps`.
    """
    state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
    if state.skipped_in_a_row >= state.settings.runtime.max_skipped_steps:
        raise NonFiniteRun(
            f"logits, loss or gradient were not finite in {state.skipped_in_a_row} steps in a row, and those steps "
            "were skipped; lower the learning rate, or set model.dtype=float32 to look for the cause"
        )


def encode_step(state: StageState, prompts: list[Prompt]) -> MediaFeatures:
    """Return the vision features of a step's prompts without a graph, encoding each video once.

    No collective is called, so under ZeRO-3 this works only inside `full_weights`.
    """
    tokens = state.settings.micro_tokens
    with state.timer("vision"), torch.no_grad():
        return encode_media(state.student.model, prompts, tokens_per_call=tokens, cache=state.features)
