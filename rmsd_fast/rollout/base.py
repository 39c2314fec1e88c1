"""What every rollout engine gives and takes, and the counter that its sampling noise is drawn from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.students import MediaFeatures


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; `temperature=0` is greedy decoding."""

    n: int
    temperature: float
    max_new_tokens: int
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Rollout:
    """One response: what was sampled and under which log-probs.

    token_ids: int64 [R], the end token included if the response ended by itself. logp: float32 [R], of the distribution
    that was sampled from (temperature applied, banned ids left out); NaN at the last token where the model's logits
    were not finite, and the response ends there. truncated: cut at `max_new_tokens`.
    policy_version: the rollout step it was written in; the weights change at most once per step.
    """

    question_id: str
    index: int
    token_ids: torch.Tensor
    text: str
    logp: torch.Tensor
    truncated: bool
    policy_version: int

    @property
    def finite(self) -> bool:
        """Whether the model's logits were finite at every token."""
        return bool(torch.isfinite(self.logp).all())


class RolloutEngine(Protocol):
    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """N rollouts per prompt, in the order of the prompts.

        features: vision features of the prompts, for an engine that runs the model itself.
        """


def sampling_noise(sampling: Sampling, question_id: str, index: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [max_new_tokens], for one rollout.

    A function of (seed, step, id, index, position) alone: the row has a hash of the first four as its key, a position
    the splitmix64 output at its place in the sequence of that key. So a rollout depends neither on what else is in its
    batch nor on the number of processes.
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
