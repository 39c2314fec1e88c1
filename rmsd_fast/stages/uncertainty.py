"""Weigh the terms of stage 2's loss by learned log-variances, see `credit.uncertainty` and `method.uncertainty`.

The terms are the policy gradient of the rewards (pg), distillation from the self-teacher (kd) and the cross entropy of
imitated responses (sft), each with its coefficient. The KL to the reference is not weighted. The weights of a step
follow from the log-variances before it, which then take a step of their own with the values of the terms in this step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rmsd_fast.method.uncertainty import term_weights
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_metrics import Metric, mean


@dataclass
class WeighedStep:
    """The terms of a step on this process, for Q questions and M terms. All tensors are on the CPU.

    Attributes:
        values: part of each question in each term, float64 [Q, M]; those of `sft` are added by the policy's passes.
        shares: share of each question in the tokens of each term, float64 [Q, M].
        features: mean vision features of each question, float32 [Q, D]; None with `task`.
        record: this process's part of the metrics.
    """

    values: torch.Tensor
    shares: torch.Tensor
    features: torch.Tensor | None
    record: dict[str, Metric]


def weigh_terms(
    state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None, counts: Mapping[str, float]
) -> WeighedStep:
    """Set the advantages of tokens and the weights of imitated responses in the groups to the weighted terms.

    Args:
        state: state of the stage, with `term_weights`.
        groups: groups of this process, with the terms of their tokens.
        features: vision features of the groups' prompts; unused by `task`.
        counts: the normalizers of the loss, see `policy_pass.policy_pass`.
    """
    weigher = state.term_weights
    means = _mean_features(features, len(groups), weigher.features) if weigher.form == "instance" else None
    with torch.no_grad():
        log_variances = weigher.log_variances(means, len(groups))
        weights = term_weights(log_variances, form=weigher.form)
    token_mean = state.settings.distill.aggregation == "token_mean"
    values, shares = torch.zeros(2, len(groups), len(weigher.terms), dtype=torch.float64)
    for i, group in enumerate(groups):
        of_group = dict(zip(weigher.terms, weights[i], strict=True))
        group.sft_weight = float(of_group.get("sft", 1.0))
        for r, terms in enumerate(group.token_terms):
            # Without rewards, pg is 0 and not one of the learned terms.
            group.token_advantages[r] = sum(of_group.get(name, 1.0) * term for name, term in terms.items())
            tokens = len(group.rollouts[r].token_ids)
            each = 1 / counts["tokens"] if token_mean else 1 / (tokens * counts["sequences"])
            for name in terms.keys() & of_group.keys():
                m = weigher.terms.index(name)
                values[i, m] -= each * terms[name].double().sum()
                shares[i, m] += each * tokens
        if "sft" in of_group and group.imitated is not None:
            shares[i, weigher.terms.index("sft")] = len(group.imitated) / counts["imitated"]
    record: dict[str, Metric] = {
        f"uncertainty/{name}": (mean, float(log_variances[:, m].sum()), len(groups))
        for m, name in enumerate(weigher.terms)
    }
    return WeighedStep(values, shares, means, record)


def add_answer_values(state: StageState, step: WeighedStep, owners: list[int], values: list[torch.Tensor]) -> None:
    """Add the parts of imitated responses in their cross entropy.

    Args:
        state: state of the stage, with `term_weights`.
        step: the terms of the step.
        owners: index of the question of each imitated token, in the order of the values.
        values: parts of the tokens in the mean over all imitated tokens, in tensors of any lengths.
    """
    if "sft" not in state.term_weights.terms or not values:
        return
    m = state.term_weights.terms.index("sft")
    parts = state.settings.distill.sft_coef * torch.cat(values).double().cpu()
    step.values[:, m].index_add_(0, torch.tensor(owners), parts)


def learn_weights(state: StageState, step: WeighedStep) -> None:
    """Take the step of the log-variances, together with all processes."""
    state.term_weights.step(step.values.float(), step.shares.float(), step.features)


def _mean_features(features: MediaFeatures, questions: int, size: int) -> torch.Tensor:
    """Return the mean of each question's vision features over its tokens, float32 [Q, size]; 0 for text alone."""
    means = torch.zeros(questions, size)
    shown = [i for i in range(questions) if features.counts[i]]
    if shown:
        media = [[features.pooled[medium] for medium in features.media_of(i)] for i in shown]
        means[shown] = torch.stack([torch.cat(of_one).detach().float().mean(dim=0) for of_one in media]).cpu()
    return means
