"""Compare the log-probs of the rollout engine with those of the trainer, on the same tokens and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from rmsd_fast.config import RunConfig, UserError
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.runtime.process_group import World, global_max, global_sum
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState

# Largest mean difference of a correct engine, by `model.dtype`. Engine and trainer round differently: in float32, the
# differences are about 1e-6; in bfloat16, they are about 0.01, and grow with the number of layers.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.05}
# Tokens whose probability ratio is outside [1 - BAND, 1 + BAND] are counted.
BAND = 0.1


class ParityError(UserError, RuntimeError):
    """The rollout engine and the trainer compute different log-probs for the same tokens."""


@dataclass(frozen=True)
class Parity:
    """Differences between two computations of the same tokens' log-probs, over all processes.

    Attributes:
        mean: mean absolute difference in nats; NaN if any log-prob is not finite.
        largest: largest absolute difference in nats.
        outside: share of the tokens whose probability ratio is outside [0.9, 1.1].
        tokens: number of tokens.
    """

    mean: float
    largest: float
    outside: float
    tokens: int

    def text(self) -> str:
        """Return the differences as text."""
        return (
            f"log-probs differ by {self.mean:.2g} in the mean and {self.largest:.2g} at most, {self.outside:.2%} of "
            f"{self.tokens:,} probability ratios are outside [{1 - BAND:g}, {1 + BAND:g}]"
        )


def compare(first: torch.Tensor, second: torch.Tensor, world: World) -> Parity:
    """Return the differences of two tensors of log-probs, [S] on the host. All processes call it together."""
    difference = (first.double() - second.double()).abs()
    outside = ((first.double() - second.double()).exp() - 1).abs() > BAND
    sums = global_sum({"total": difference.sum(), "outside": outside.sum(), "tokens": difference.numel()}, world)
    largest = global_max({"largest": difference.max() if len(difference) else 0.0}, world)["largest"]
    tokens = int(sums["tokens"])
    return Parity(sums["total"] / tokens, largest, sums["outside"] / tokens, tokens)


def bound_of(settings: RunConfig) -> float:
    """Return the largest mean difference that `check_parity` accepts."""
    return BOUNDS[settings.model.dtype] if settings.rollout.parity_bound is None else settings.rollout.parity_bound


def check_parity(
    state: StageState,
    prompts: list[Prompt],
    rollouts: list[list[Rollout]],
    features: MediaFeatures | None,
    step: int,
) -> dict[str, float]:
    """Check the log-probs of some rollouts at every `rollout.parity_every`-th step, counted from 0.

    Args:
        state: state of the stage. The policy's weights must be those that the rollouts were sampled with.
        prompts: prompts of this process.
        rollouts: rollouts of each prompt.
        features: vision features of the prompts; None if each model encodes its own.
        step: step of the stage.
    Returns:
        The metrics of the check; empty at other steps.
    Raises:
        ParityError: on all processes, if the mean difference exceeds its bound.
    """
    rollout = state.settings.rollout
    # Replayed rollouts were sampled by another run, whose weights may differ on purpose.
    if not rollout.parity_every or step % rollout.parity_every or rollout.engine == "replay":
        return {}
    with state.timer("parity"):
        parity = measure_parity(state, prompts, rollouts, features)
    bound = bound_of(state.settings)
    # NaN is not within the bound either.
    if not parity.mean <= bound:
        raise ParityError(
            f"rollout engine ({state.settings.rollout.engine}) and trainer disagree: {parity.text()}; expected a mean "
            f"difference of at most {bound:g} (rollout.parity_bound). The engine has other weights, prompts or videos "
            "than the trainer, or computes with less precision; the last checkpoint is unaffected. Run python -m "
            "rmsd_fast.doctor with this recipe to look for the cause, or set rollout.engine=hf"
        )
    return {
        "parity/mean_difference": parity.mean,
        "parity/largest_difference": parity.largest,
        "parity/outside_share": parity.outside,
    }


def measure_parity(
    state: StageState, prompts: list[Prompt], rollouts: list[list[Rollout]], features: MediaFeatures | None
) -> Parity:
    """Compare engine and trainer on the rollouts of one forward pass per process."""
    trainer = next(score_rollouts(state, prompts, rollouts, features))
    engine = [rollouts[i][r].logp for i, r in trainer]
    nothing = [torch.zeros(0)]  # A filler pass has no tokens.
    return compare(torch.cat([*trainer.values(), *nothing]), torch.cat([*engine, *nothing]), state.world)


# Log-probs of rollouts, float32 [R] on the host, by the indices of the prompt and of its rollout.
LogProbs = dict[tuple[int, int], torch.Tensor]


@torch.no_grad()
def score_rollouts(
    state: StageState, prompts: list[Prompt], rollouts: list[list[Rollout]], features: MediaFeatures | None
) -> Iterator[LogProbs]:
    """Yield the log-probs of the rollouts under the policy, pass by pass.

    Every process yields the same number of passes, and all processes must take the same number of them.
    """
    score = partial(linear_logprob, temperature=state.settings.rollout.temperature, ignore_index=None)
    responses = [[rollout.token_ids for rollout in drawn] for drawn in rollouts]
    for read in passes(state, prompts, responses, features):
        logp = state.policy(read.prompts, read.rows, read.features, score).float().cpu()
        pairs = zip(read.batch.prompts, read.batch.responses, strict=True)
        places = [(i, r) for i, chosen in pairs for r in chosen]
        scored = dict(zip(places, logp.split(read.rows.lengths_list), strict=True))
        yield {} if read.filler else scored
