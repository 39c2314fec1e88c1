"""Compare the log-probs of the rollout engine with those of the trainer, on the same tokens and weights."""

from __future__ import annotations

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

# Largest mean difference of a correct engine over a question's rollouts, by `model.dtype`. Engine and trainer round
# differently: in float32 by about 1e-6. In bfloat16, a logit of 24 alone is rounded by up to 0.06. The bound there is a
# guess, because no GPU has measured it.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
# Tokens whose probability ratio is outside [1 - BAND, 1 + BAND] are counted.
BAND = 0.1

# Log-probs of rollouts, float32 [R] on the host, by the indices of the prompt and of its rollout.
LogProbs = dict[tuple[int, int], torch.Tensor]


class ParityError(UserError, RuntimeError):
    """The rollout engine and the trainer compute different log-probs for the same tokens."""


@dataclass(frozen=True)
class Parity:
    """Differences between two computations of the same tokens' log-probs, over all processes.

    Attributes:
        mean: mean absolute difference in nats; NaN if any log-prob is not finite.
        worst: the largest mean of a question.
        largest: largest absolute difference of a token.
        outside: share of the tokens whose probability ratio is outside [0.9, 1.1].
        tokens: number of tokens.
    """

    mean: float
    worst: float
    largest: float
    outside: float
    tokens: int

    def within(self, bound: float) -> bool:
        """Return whether no question's mean exceeds the bound. NaN does."""
        return self.mean <= bound and self.worst <= bound

    def text(self) -> str:
        """Return the differences as text."""
        outside = f", {self.outside:.2%} of the ratios are outside [{1 - BAND:g}, {1 + BAND:g}]" if self.outside else ""
        return (
            f"log-probs of {self.tokens:,} tokens differ by {self.mean:.2g} on average ({self.worst:.2g} in the worst "
            f"question, {self.largest:.2g} in the worst token){outside}"
        )


def compare(first: LogProbs, second: LogProbs, world: World) -> Parity:
    """Return the differences between the log-probs of the same rollouts. All processes call it together.

    Args:
        first: log-probs of this process's rollouts; may be empty.
        second: log-probs of at least these rollouts.
        world: this process in the run.
    """
    of_question: dict[int, list[torch.Tensor]] = {}
    for place, logp in first.items():
        of_question.setdefault(place[0], []).append(logp.double() - second[place].double())
    questions = [torch.cat(parts) for parts in of_question.values()]
    every = torch.cat([*questions, torch.zeros(0, dtype=torch.float64)])
    outside = (every.exp() - 1).abs() > BAND
    sums = global_sum({"total": every.abs().sum(), "outside": outside.sum(), "tokens": every.numel()}, world)
    worst = max((float(question.abs().mean()) for question in questions), default=0.0)
    most = global_max({"worst": worst, "largest": every.abs().max() if len(every) else 0.0}, world)
    tokens = max(1, int(sums["tokens"]))
    return Parity(sums["total"] / tokens, most["worst"], most["largest"], sums["outside"] / tokens, int(sums["tokens"]))


def bound_of(settings: RunConfig) -> float:
    """Return the largest mean difference of a question that `check_parity` accepts."""
    return BOUNDS[settings.model.dtype] if settings.rollout.parity_bound is None else settings.rollout.parity_bound


def check_parity(
    state: StageState,
    prompts: list[Prompt],
    rollouts: list[list[Rollout]],
    features: MediaFeatures | None,
    step: int,
) -> dict[str, float]:
    """Check the log-probs of the rollouts at every `rollout.parity_every`-th step, counted from 0.

    The first step of a stage, and of a resumed run, checks all rollouts. Later ones check those of one forward pass per
    process, in turn.

    Args:
        state: state of the stage. The policy's weights must be those that the rollouts were sampled with.
        prompts: prompts of this process.
        rollouts: rollouts of each prompt.
        features: vision features of the prompts; None if each model encodes its own.
        step: step of the stage.
    Returns:
        The metrics of the check; empty at other steps. A resumed run has the metrics of an uninterrupted one.
    Raises:
        ParityError: on all processes, if the mean difference of a question exceeds its bound.
    """
    rollout = state.settings.rollout
    # Replayed rollouts were sampled by another run, whose weights may differ on purpose.
    if not rollout.parity_every or rollout.engine == "replay":
        return {}
    due, first = step % rollout.parity_every == 0, step == 0 or not state.parity_checked
    if not (due or first):
        return {}
    with state.timer("parity"):
        turn = None if first else step // rollout.parity_every
        trainer = score_rollouts(state, prompts, rollouts, features, turn=turn)
        parity = compare(trainer, recorded(rollouts), state.world)
    state.parity_checked = True
    bound = bound_of(state.settings)
    if not parity.within(bound):
        raise ParityError(
            f"rollout engine ({rollout.engine}) and trainer disagree: {parity.text()}; expected a mean difference of "
            f"at most {bound:g} for each question (rollout.parity_bound). The engine has other weights, prompts or "
            "media than the trainer, or computes with less precision; the last checkpoint is unaffected. Look for the "
            "cause with python -m rmsd_fast.doctor and this recipe. If the trainer itself is as imprecise, raise "
            f"rollout.parity_bound{'' if rollout.engine == 'hf' else '; rollout.engine=hf uses no other engine'}"
        )
    if not due:
        return {}
    return {
        "parity/mean_difference": parity.mean,
        "parity/worst_difference": parity.worst,
        "parity/largest_difference": parity.largest,
        "parity/outside_share": parity.outside,
    }


def recorded(rollouts: list[list[Rollout]]) -> LogProbs:
    """Return the log-probs that the rollout engine has recorded."""
    return {(i, r): rollout.logp for i, drawn in enumerate(rollouts) for r, rollout in enumerate(drawn)}


@torch.no_grad()
def score_rollouts(
    state: StageState,
    prompts: list[Prompt],
    rollouts: list[list[Rollout]],
    features: MediaFeatures | None,
    *,
    turn: int | None = None,
) -> LogProbs:
    """Return the log-probs of this process's rollouts under the policy. All processes call it together.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        rollouts: rollouts of each prompt.
        features: vision features of the prompts; None if each model encodes its own.
        turn: score only the rollouts of one forward pass, another one in each turn.
    """
    score = partial(linear_logprob, temperature=state.settings.rollout.temperature, ignore_index=None)
    responses = [[rollout.token_ids for rollout in drawn] for drawn in rollouts]
    every = list(passes(state, prompts, responses, features))
    scored: LogProbs = {}
    # Every process has as many passes.
    for read in every if turn is None else [every[turn % len(every)]]:
        logp = state.policy(read.prompts, read.rows, read.features, score).float().cpu()
        if read.filler:
            continue
        scored |= dict(zip(read.indices, logp.split(read.rows.lengths_list), strict=True))
    return scored
