"""The interface of rollout engines, and the counter-based generator of their sampling noise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rmsd_fast.config import UserError
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.students import MediaFeatures


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        n: number of responses per prompt.
        temperature: sampling temperature; 0 means greedy decoding.
        max_new_tokens: maximum length of a response.
        seed: seed of the run.
        step: step that the noise depends on.
    """

    n: int
    temperature: float
    max_new_tokens: int
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        question_id: id of the question.
        index: index of the response within its question.
        token_ids: sampled ids, int64 [R], including the end token if the response was not truncated.
        text: decoded text.
        logp: log-probs of the sampled ids, float32 [R], at the sampling temperature and over the whole vocabulary, as
            the trainer computes them; at temperature 0, those at temperature 1. Ids that may not be sampled count. If
            the model's logits were not finite, the response ends there with NaN.
        truncated: whether the response was truncated at `max_new_tokens`.
        policy_version: rollout step in which the response was sampled. The weights change at most once per step.
        banned_mass: probability of ids that may not be sampled, mean over the response's tokens; None if the engine
            does not know it.
    """

    question_id: str
    index: int
    token_ids: torch.Tensor
    text: str
    logp: torch.Tensor
    truncated: bool
    policy_version: int
    banned_mass: float | None = None

    @property
    def finite(self) -> bool:
        """Whether the model's logits were finite at every token."""
        return bool(torch.isfinite(self.logp).all())


class RolloutError(UserError, RuntimeError):
    """An engine that cannot sample rollouts of the policy, or whose rollouts cannot be used."""


class PolicyEngine(Protocol):
    """What a rollout engine needs of the `runtime.engine.Engine` that trains the policy."""

    names: list[str]

    @property
    def module(self) -> Policy: ...

    def gathered(self, params: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]: ...


class RolloutEngine(Protocol):
    """Sample rollouts.

    Attributes:
        runs_policy: whether `generate` runs the training model. If not, the engine has weights of its own, and the
            caller need not gather those of the language model under ZeRO-3.
    """

    runs_policy: bool

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Take over the policy's weights, if this engine has its own. All ranks call this together.

        Args:
            policy: engine of the policy, whose adapter is active.
            version: number of the rollout step, for messages.
        Raises:
            RolloutError: the weights did not arrive.
        """

    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Return N rollouts per prompt, in the order of the prompts.

        Args:
            model: the policy's model.
            prompts: prompts to answer.
            sampling: sampling parameters.
            features: vision features of the prompts, for engines that run the model themselves.
            policy_version: version to record in the rollouts.
        """

    def close(self) -> None:
        """Leave rollout servers, if this engine uses any."""


def sampling_noise(sampling: Sampling, question_id: str, index: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) for one rollout, float64 [max_new_tokens].

    The numbers depend only on (seed, step, id, index, position). The key of a rollout is a hash of the first four
    values, and the number at a position is the corresponding output of splitmix64 seeded with the key. A rollout
    therefore does not depend on the rest of its batch or on the number of processes.
    """
    name = f"{sampling.seed}/{sampling.step}/{question_id}/{index}".encode()
    key = np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))
    positions = np.arange(1, sampling.max_new_tokens + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = key + positions * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
