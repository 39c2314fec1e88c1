"""Score the rollouts of stage 2 with the self-teacher: log-probs of their tokens under the student's model with hints.

Hints follow the user's text, and therefore the video, so all rollouts with all their hints share one prompt:
`[body | hint_1 tail R_1 | hint_1 tail R_2 | …]`, where the tail ends the user's turn and opens the response. If the
self-teacher is the reference, its log-probs without a hint come from the same passes, with the tail alone as the lead.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from rmsd_fast.config import DIVERGENCES
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.setting_rules.uses import samples_reference
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.top_tokens import split_top
from rmsd_kernels import TopK, linear_topk


@torch.no_grad()
def teach(
    state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None, *, top: int = 0
) -> torch.Tensor | None:
    """Store the self-teacher's log-probs of each rollout in `teacher_logp` of the groups.

    If the self-teacher is the reference, also store its log-probs without hints in `ref_logp`, if stage 2 needs them.
    For a divergence over the vocabulary, also store its hidden states in `teacher_hidden`. They are on the CPU, so that
    the device holds those of one pass at a time.

    Args:
        state: state of the stage.
        groups: groups of this process.
        features: vision features of the groups' prompts; None if each model encodes its own.
        top: number of most probable tokens to store in `teacher_top`, too.
    Returns:
        The self-teacher's head, [V, D], for a divergence; None if it is the policy's, or if none is computed.
    """
    frozen = state.settings.self_teacher.kind == "frozen"
    with_reference = frozen and samples_reference(state.settings)
    most = state.settings.self_teacher.max_hint_tokens
    bodies, leads = [], []
    for group in groups:
        body, tail = state.builder.split(group.prompt)
        hints = [state.builder.encode_hint(text, max_tokens=most) for text in state.hints[body.question.id]]
        bodies.append(body)
        leads.append([tail] * with_reference + [torch.cat([hint, tail]) for hint in hints])
    if not any(leads):
        # All processes run the same passes, and this one has no hints. The result is not used.
        leads[0] = [state.builder.split(groups[0].prompt)[1]]
    drawn = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
    scores, kept = _score(state, bodies, features, leads, drawn, top)
    for group, of_group, hidden, ranked in zip(groups, scores, kept.hidden, kept.top, strict=True):
        # Views come first, then rollouts.
        count = len(group.rollouts)
        views = [of_group[start : start + count] for start in range(0, len(of_group), count)]
        group.ref_logp = views.pop(0) if with_reference else []
        views = views[: len(state.hints[group.prompt.question.id])]
        group.teacher_logp = [torch.stack(of_rollout) for of_rollout in zip(*views, strict=True)]
        if group.teacher_logp and hidden:
            # Without the reference's; a divergence has a single view.
            group.teacher_hidden = hidden[-count:]
        group.teacher_top = ranked[-count:] if group.teacher_logp else []
    return kept.head


@dataclass
class _Kept:
    """What is kept of the self-teacher's passes besides log-probs.

    Attributes:
        hidden: hidden states of each prompt's rollouts, lead by lead; empty lists without a divergence.
        top: most probable tokens, in the same order; empty lists if nothing compares them.
        head: the head, if it is not the policy's; None without a divergence.
    """

    hidden: list[list[torch.Tensor]]
    top: list[list[TopK]]
    head: torch.Tensor | None = None


def _score(
    state: StageState,
    bodies: list[Prompt],
    features: MediaFeatures | None,
    leads: list[list[torch.Tensor]],
    drawn: list[list[torch.Tensor]],
    top: int,
) -> tuple[list[list[torch.Tensor]], _Kept]:
    """Return the log-probs of each prompt's rollouts after each of its leads, float32 [R] on the CPU, lead by lead."""
    lead_of_each = [[lead for lead in of_prompt for _ in ids] for of_prompt, ids in zip(leads, drawn, strict=True)]
    responses = [ids * len(of_prompt) for of_prompt, ids in zip(leads, drawn, strict=True)]
    score = partial(linear_logprob, temperature=state.settings.rollout.temperature, ignore_index=None)
    kind = state.settings.self_teacher.kind
    distills = state.settings.kd.kind in DIVERGENCES
    kept = _Kept(*([[None] * len(ids) * keeps for ids in responses] for keeps in (distills, top > 0)))
    own_head = distills and kind != "live" and state.settings.model.adapter != "lora"

    def read_out(hidden, weight, targets):
        if own_head and kept.head is None:
            # The average is in the place of the policy's weights only during these passes.
            kept.head = weight.detach().clone() if kind == "ema" else weight.detach()
        ranked = linear_topk(hidden, weight, top, temperature=state.settings.rollout.temperature) if top else None
        return score(hidden, weight, targets), hidden if distills else None, ranked

    model = state.reference if kind == "frozen" else state.policy
    indices, logp, lengths = [], [], []
    with state.average.in_place() if kind == "ema" else nullcontext():
        for read in passes(state, bodies, responses, features, lead_of_each):
            of_pass, hidden, ranked = model(read.prompts, read.rows, read.features, read_out)
            if not read.filler:
                pairs = zip(read.batch.prompts, read.batch.responses, strict=True)
                of_rows = [(i, r) for i, chosen in pairs for r in chosen]
                indices += of_rows
                logp.append(of_pass)
                lengths += read.rows.lengths_list
                if hidden is not None:
                    _keep_views(kept.hidden, of_rows, hidden.split(read.rows.lengths_list), drawn)
                if ranked is not None:
                    _keep_views(kept.top, of_rows, split_top(ranked, read.rows.lengths_list), drawn)
    scores: list[list[torch.Tensor]] = [[torch.empty(0)] * len(ids) for ids in responses]
    for (i, r), values in zip(indices, torch.cat(logp).cpu().split(lengths), strict=True):
        scores[i][r] = values
    return scores, kept


def _keep_views(kept: list[list], of_rows: list[tuple[int, int]], values: Iterable, drawn: list[list]) -> None:
    """Copy the results of a pass to the CPU, except those after the leads of the reference, which come first."""
    for (i, r), value in zip(of_rows, values, strict=True):
        if r >= len(kept[i]) - len(drawn[i]):
            kept[i][r] = value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
