"""The ways of making a step, the cases that they are compared on, and rollouts that are given instead of generated."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.prefix.groups import Case, make_responses
from bench.step.models import CONFIG_4B, SMALL, Sizes
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.rollout.base import Rollout


@dataclass(frozen=True)
class Way:
    """How a step is made: shared, padded or copies; K teacher responses and N rollouts of each group."""

    mode: str
    k: int
    n: int
    groups: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.mode} K={self.k} N={self.n}{groups}" + ", checkpointing" * self.checkpointing

    @property
    def packing(self) -> str:
        return "shared" if self.mode == "shared" else "padded"

    def recomputing(self) -> Way:
        return replace(self, checkpointing=True)


BASE = Way("shared", 4, 8)
PAIR = (BASE, Way("shared", 1, 8))
PADDED = (BASE, Way("padded", 4, 8))
SEVERAL = (BASE, Way("shared", 4, 8, groups=4))
COUNTS = (BASE, Way("shared", 1, 1), Way("shared", 8, 8), Way("shared", 4, 16))
COPIES = (BASE, Way("copies", 4, 8))
# Of the small student; all of them where it takes minutes and not hours.
FEW_SMALL = (*PAIR, Way("shared", 1, 1), *PADDED[1:], *COPIES[1:])
ALL_SMALL = (
    *(Way("shared", k, n) for k, n in ((4, 8), (1, 8), (2, 8), (8, 8), (1, 1))),
    *(Way("padded", k, 8) for k in (4, 1)),
    *(Way("copies", k, 8) for k in (4, 1, 8)),
)


@dataclass(frozen=True)
class Rounds:
    """How often ways are timed.

    slow_s: ways other than shared ones that are predicted to take longer are timed once, in their first step: their
    many micro-batches are alike, so that what the first one loads is a few per cent. quick_s: shared ways that are
    predicted to take less are timed twice as often.
    """

    shared: int = 3
    other: int = 2
    slow_s: float = 3.0
    quick_s: float = 0.7


@dataclass(frozen=True)
class StepCase(Case):
    """A part of a case: its ways. room: bytes of memory to plan with in place of the device's."""

    sizes: Sizes = CONFIG_4B
    ways: tuple[Way, ...] = PAIR
    room: int | None = None

    @property
    def name(self) -> str:
        kind = "" if self.sizes.name != "toy" else "toy-" if self.room is None else "toy-apart-"
        return kind + super().name

    @property
    def gives_rollouts(self) -> bool:
        return self.sizes is not SMALL


class Given:
    """A rollout engine that returns the same random responses whatever the model, by the question's name."""

    runs_policy = True

    def __init__(self, builder: PromptBuilder, response: int):
        self.builder, self.response = builder, response

    def update(self, policy, version) -> None:
        """Do nothing: the responses do not depend on the model."""

    def generate(self, model, prompts, sampling, *, features=None, policy_version=0) -> list[list[Rollout]]:
        groups = []
        for prompt in prompts:
            name, _, copied = prompt.question.id.partition("/")
            chosen = [int(copied)] if copied else range(sampling.n)
            ids = self.responses(max(8, len(chosen)), seed=int(name.removeprefix("q")))
            groups.append([self._rollout(prompt, i, ids[i]) for i in chosen])
        return groups

    def responses(self, count: int, seed: int) -> list[Tensor]:
        return make_responses(self.builder, count, self.response, seed)

    def _rollout(self, prompt: Prompt, index: int, ids: Tensor) -> Rollout:
        logp = torch.full((len(ids),), -6.0)
        return Rollout(prompt.question.id, index, ids, self.builder.decode_response(ids), logp, False, 0)


class Formatted(Given):
    """The first response is a right answer in the right format."""

    def responses(self, count: int, seed: int) -> list[Tensor]:
        first, end = (self.builder.encode_response(text) for text in ("<think>", "</think><answer>0.0 to 1.0</answer>"))
        # A word of its own, with the blank before it that encode_response would strip.
        filler = torch.tensor(self.builder.tokenizer.encode(" video", add_special_tokens=False)[:1])
        filler = filler.repeat(self.response - 1 - len(end))
        return [torch.cat([first[:1], filler, end]), *super().responses(count, seed)[1:]]
