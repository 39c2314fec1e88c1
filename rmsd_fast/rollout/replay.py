"""Read the rollouts of another run instead of generating them (`rollout.engine=replay`)."""

from __future__ import annotations

from pathlib import Path

import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import PolicyEngine, Rollout, Sampling
from rmsd_fast.rollout.dump import read_info, read_step, step_file, unpack


class ReplayRollout:
    """Return the rollouts that a run has written with `rollout.dump`. The model is not used.

    Args:
        folder: the dump.
        builder: builder of the prompts, which decodes responses.
        rank: rank of this process. Its prompts are the rank-th share of the step.
    """

    runs_policy = False

    def __init__(self, folder: Path, builder: PromptBuilder, *, rank: int) -> None:
        self.folder, self.builder, self.rank = folder, builder, rank
        self.key = read_info(folder, "rollout.replay").key

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Do nothing: the rollouts do not depend on the policy's weights."""

    def close(self) -> None:
        """Do nothing: this engine uses no server."""

    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Return N rollouts per prompt; see `RolloutEngine`. They keep the policy version of the run that wrote them.

        Raises:
            DataError: the step's file is missing or damaged, or does not have N rollouts of a question.
            SettingsError: the step has no rollouts of a question.
        """
        packed = read_step(self.folder, sampling.step, self.key)
        places: dict[str, list[int]] = {}
        for place, question in enumerate(packed.questions):
            places.setdefault(question, []).append(place)
        groups = []
        for number, prompt in enumerate(prompts, start=self.rank * len(prompts)):
            dumped = places.get(prompt.question.id)
            if not dumped:
                raise SettingsError(
                    f"{step_file(self.folder, sampling.step)}: expected rollouts of question {prompt.question.id!r}, "
                    f"got those of {', '.join(packed.questions[:3])}, …; use the questions and the settings data.* and "
                    "teacher.* of the run that wrote the dump"
                )
            # If a step has a question twice, its copies have the same places in every run.
            place = number if number in dumped else dumped[0]
            group = unpack(packed, place, self.builder.decode_response)
            if [rollout.index for rollout in group] != list(range(sampling.n)):
                raise DataError(
                    f"{step_file(self.folder, sampling.step)}: expected {sampling.n} rollouts of question "
                    f"{prompt.question.id!r}, got {len(group)}; write the dump again"
                )
            groups.append(group)
        return groups
