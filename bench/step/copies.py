"""A stage-2 step with a copy of prompt and video for each response, as in trainers whose batch is a list of samples.

It is our code all the same: such trainers have no discriminator. trl_peer.py compares with one that is not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

from bench.prefix.groups import media_each
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models import students
from rmsd_fast.rollout.base import Rollout, Sampling
from rmsd_fast.stages import discriminator_pass, distill, policy_pass
from rmsd_fast.stages.passes import Pass, passes
from rmsd_fast.stages.state import StageState, StepResult


def copying_step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run `stages.distill.step` on padded rows, where every row and model encodes the media again.

    The discriminator reads N + K rows; one pair per rollout would be 2N.
    """
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        # No features are shared between models, nor between equal media of one call.
        patch(distill, "encode_step", lambda state, prompts: None)
        patch(students, "_distinct_media", lambda media: (media, range(len(media))))
        for stage in (policy_pass, discriminator_pass):
            patch(stage, "passes", _copying_passes)
        patch(state, "rollouts", _CopyingRollouts(state.rollouts))
        return distill.step(state, prompts, number)


def _copying_passes(*arguments: Any) -> Iterator[Pass]:
    for own in passes(*arguments):
        copies = [prompt for prompt, chosen in zip(own.prompts, own.batch.responses, strict=True) for _ in chosen]
        yield replace(own, prompts=copies, rows=media_each(own.rows))


class _CopyingRollouts:
    """Generate each rollout from a copy of its prompt."""

    runs_policy = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def update(self, policy: Any, version: int) -> None:
        self.engine.update(policy, version)

    def generate(self, model: Any, prompts: list[Prompt], sampling: Sampling, **options: Any) -> list[list[Rollout]]:
        # Sampling noise is drawn by the name of the question.
        copies = [
            replace(prompt, question=replace(prompt.question, id=f"{prompt.question.id}/{index}"))
            for prompt in prompts
            for index in range(sampling.n)
        ]
        drawn = [one for (one,) in self.engine.generate(model, copies, replace(sampling, n=1), **options)]
        return [drawn[start : start + sampling.n] for start in range(0, len(drawn), sampling.n)]
