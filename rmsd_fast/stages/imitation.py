"""Imitate one teacher response per question, T_sel, in stage 2, and choose it, see `teacher.selection`.

With `aligned`, the student scores the best responses in each step, with its current weights and without a gradient. A
resumed run has the same weights, so it makes the same choices, and checkpoints need not contain them.

Source: BRTS (arXiv 2605.09725).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import PolicyLoss, linear_cross_entropy, linear_logprob
from rmsd_fast.method.matching import aligned_response, draw_response, overlap
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.process_group import any_rank
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_metrics import Metric, mean
from rmsd_kernels import linear_rank

PolicyHead = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], PolicyLoss]


def set_imitated(state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None) -> dict[str, Metric]:
    """Store T_sel in the groups of a step of stage 2, and return this process's part of the metrics of its choice."""
    answers, record = selected_answers(state, [group.prompt for group in groups], features)
    for group, answer in zip(groups, answers, strict=True):
        group.imitated = answer
    return record


def imitated_tokens(groups: list[RolloutGroup]) -> int:
    """Count the tokens of the imitated responses without sharing: each with its own prompt."""
    imitated = [group for group in groups if group.imitated is not None]
    return sum(len(group.prompt.input_ids) + len(group.imitated) for group in imitated)


def with_imitation(
    loss: PolicyHead | None,
    rows: torch.Tensor,
    coef: float,
    *,
    normalizer: float,
    weights: torch.Tensor | None = None,
) -> PolicyHead:
    """Return a head that computes a policy loss and adds the cross entropy of imitated responses.

    Args:
        loss: head with the policy loss, which does not read the imitated responses; None if a pass has no rollouts.
        rows: places of the imitated tokens among the scored tokens, int64 on the device.
        coef: weight of the cross entropy.
        normalizer: number of imitated tokens in the global batch.
        weights: learned weight of each imitated token, float32 on the device; None = 1.
    Returns:
        The head. Its metrics are those of the policy loss, the loss itself as `policy_loss`, and `sft_loss`, this
        pass's part of the mean cross entropy over the imitated tokens, without weights. With weights, there are also
        the parts of the tokens, `sft_parts`.
    """

    def head(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> PolicyLoss:
        read, ids = hidden[rows], targets[rows]
        common = {"normalizer": normalizer, "ignore_index": None}
        entropy = linear_cross_entropy(read, weight, ids, token_weights=weights, **common)
        metrics = {"sft_loss": entropy.detach()}
        if weights is not None:
            logp = linear_logprob(read.detach(), weight.detach(), ids, ignore_index=None)
            metrics["sft_parts"] = -logp / normalizer
            metrics["sft_loss"] = metrics["sft_parts"].sum()
        if loss is None:
            return PolicyLoss(coef * entropy, metrics)
        policy = loss(hidden, weight, targets)
        metrics |= {"policy_loss": policy.loss.detach(), **policy.metrics}
        return PolicyLoss(policy.loss + coef * entropy, metrics)

    return head


def selected_answers(
    state: StageState, prompts: list[Prompt], features: MediaFeatures | None
) -> tuple[list[torch.Tensor | None], dict[str, Metric]]:
    """Return T_sel of each prompt, and this process's part of the metrics. All processes call it together.

    Args:
        state: state of the stage.
        prompts: prompts of the step on this process.
        features: vision features of the prompts; None if each model encodes its own.
    Returns:
        Token ids, int64 [R] each, or None for a question without a response to imitate; and the metrics.
    """
    targets = [state.targets[prompt.question.id] for prompt in prompts]
    candidates = [
        [state.builder.encode_response(of_question.answers[k].text) for k in of_question.top] for of_question in targets
    ]
    seeds = [{"seed": state.settings.seed, "question_id": prompt.question.id} for prompt in prompts]
    places = [range(len(ids)) for ids in candidates]
    record: dict[str, Metric] = {}
    if state.settings.teacher.selection == "quality":
        chosen = [draw_response(of_question, **seed) for of_question, seed in zip(places, seeds, strict=True)]
    else:
        with state.timer("selection"):
            overlaps = _overlaps(state, prompts, candidates, features)
        triples = zip(places, overlaps, seeds, strict=True)
        chosen = [aligned_response(of_question, values, **seed) for of_question, values, seed in triples]
        record = _record(overlaps)
    pairs = zip(candidates, chosen, strict=True)
    return [None if place is None else ids[place] for ids, place in pairs], record


@torch.no_grad()
def _overlaps(
    state: StageState, prompts: list[Prompt], candidates: list[list[torch.Tensor]], features: MediaFeatures | None
) -> list[list[float]]:
    """Return the overlap of each candidate with the policy. That of a question's only candidate is not computed: 0."""
    overlaps = [[0.0] * len(ids) for ids in candidates]
    tied = [i for i, ids in enumerate(candidates) if len(ids) > 1]
    if not any_rank(bool(tied), state.world):
        return overlaps
    # All processes run the same passes. Without candidates of its own, a process scores a token for the others.
    read = tied or [0]
    responses = [candidates[i] for i in tied] or [[torch.tensor([state.builder.eos_id])]]
    selected = None if features is None else features.select(read)
    for scored in passes(state, [prompts[i] for i in read], responses, selected):
        ranks = state.policy(scored.prompts, scored.rows, scored.features, linear_rank)
        if scored.filler or not tied:
            continue
        for (i, r), of_response in zip(scored.indices, ranks.cpu().split(scored.rows.lengths_list), strict=True):
            overlaps[tied[i]][r] = overlap(of_response)
    return overlaps


def _record(overlaps: list[list[float]]) -> dict[str, Metric]:
    tied = [values for values in overlaps if len(values) > 1]
    return {
        "selection/tied_share": (mean, len(tied), sum(map(bool, overlaps))),
        "selection/overlap": (mean, sum(map(max, tied)), len(tied)),
        "selection/overlap_of_all": (mean, sum(sum(values) / len(values) for values in tied), len(tied)),
    }
