"""Score the rollouts of stage 2 with the self-teacher: log-probs of their tokens under a model that is told hints.

Hints follow the user's text, and therefore the video, so all rollouts with all their hints share one prompt:
`[body | hint_1 tail R_1 | hint_2 tail R_2 | …]`, where the tail ends the user's turn and opens the response. If each
prompt has only one hint, it is part of the shared prompt instead: `[body hint tail | R_1 | R_2 | …]`. If the
self-teacher is the reference, its log-probs without a hint come from the same passes, with the tail alone as the lead.
A hint with other media has a prompt of its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from rmsd_fast.config import DIVERGENCES
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_logprob
from rmsd_fast.method.hints import Hint
from rmsd_fast.models.students import MediaFeatures, encode_media
from rmsd_fast.setting_rules.uses import samples_reference, shows_media
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.top_tokens import split_top
from rmsd_kernels import TopK, linear_topk


@dataclass
class _Prefix:
    """A prompt that the self-teacher reads, with the responses that follow it.

    Attributes:
        body: the prompt up to the end of the user's text.
        tail: tokens that end the user's turn, int64.
        responses: token ids of rollouts, int64 [R] each. A rollout occurs once for each of its hints.
        leads: tokens between `body` and each response, int64 [H] each.
        plain: number of first responses that the reference reads, of which only log-probs are needed.
    """

    body: Prompt
    tail: torch.Tensor
    responses: list[torch.Tensor] = field(default_factory=list)
    leads: list[torch.Tensor] = field(default_factory=list)
    plain: int = 0

    def add(self, response: torch.Tensor, hint: torch.Tensor | None = None) -> None:
        """Add a response after a hint, int64 [H], or directly after the user's turn."""
        self.responses.append(response)
        self.leads.append(self.tail if hint is None else torch.cat([hint, self.tail]))

    @property
    def one_lead(self) -> bool:
        """Whether all responses have the same lead."""
        return all(torch.equal(lead, self.leads[0]) for lead in self.leads)


class _Scored(NamedTuple):
    """What the self-teacher says about a response of R tokens, on the CPU.

    Attributes:
        logp: log-probs of its tokens, float32 [R].
        hidden: hidden states that predict them, [R, D]; None without a divergence, and for the reference.
        top: the most probable tokens; None if nothing compares them, and for the reference.
    """

    logp: torch.Tensor
    hidden: torch.Tensor | None = None
    top: TopK | None = None


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
        groups: groups of this process, with the hints of their rollouts.
        features: vision features of the groups' prompts; None if each model encodes its own.
        top: number of most probable tokens to store in `teacher_top`; 0 = none.
    Returns:
        The self-teacher's head, [V, D], for a divergence; None if it is the policy's, or if none is computed.
    """
    settings = state.settings
    with_reference = settings.self_teacher.kind == "frozen" and samples_reference(settings)
    told = [group.hints for group in groups]
    own = [_Prefix(*state.builder.split(group.prompt)) for group in groups]
    shown = [i for i, hints in enumerate(told) if any(hint.media for of_rollout in hints for hint in of_rollout)]
    other = {i: _Prefix(*state.builder.split(groups[i].prompt.teacher)) for i in shown}
    for i, group in enumerate(groups):
        # Most rollouts of a question have the same hints.
        encoded = {hint.text: _encode(state, hint) for hints in told[i] for hint in hints}
        for rollout in group.rollouts if with_reference else []:
            own[i].add(rollout.token_ids)
            own[i].plain += 1
        for rollout, hints in zip(group.rollouts, told[i], strict=True):
            for hint in hints:
                (other if hint.media else own)[i].add(rollout.token_ids, encoded[hint.text])
    if not any(prefix.responses for prefix in (*own, *other.values())):
        # All processes run the same passes, and this one has no hints. The result is not used.
        own[0].add(groups[0].rollouts[0].token_ids)
    read = [i for i, prefix in enumerate(own) if prefix.responses]
    prefixes = [*(own[i] for i in read), *other.values()]
    features = _teacher_features(state, [prefix.body for prefix in prefixes], features, read)
    scores, head = _score(state, prefixes, features, top)
    scores = [iter(of_prefix) for of_prefix in scores]
    of_own = dict(zip(read, scores, strict=False))
    of_other = dict(zip(shown, scores[len(read) :], strict=True))
    for i, group in enumerate(groups):
        group.ref_logp = [next(of_own[i]).logp for _ in group.rollouts] if with_reference else []
        group.teacher_logp, group.teacher_hidden, group.teacher_top = [], [], []
        if any(told[i]):
            pairs = zip(group.rollouts, told[i], strict=True)
            for rollout, hints in pairs:
                views = [next((of_other if hint.media else of_own)[i]) for hint in hints]
                logp = [view.logp for view in views]
                group.teacher_logp.append(torch.stack(logp) if views else torch.empty(0, len(rollout.token_ids)))
                # All views are one hint if these are read.
                first = views[0] if views else _Scored(torch.empty(0))
                group.teacher_hidden.append(first.hidden)
                group.teacher_top.append(first.top)
    return head


def _encode(state: StageState, hint: Hint) -> torch.Tensor | None:
    most = state.settings.self_teacher.max_hint_tokens
    return state.builder.encode_hint(hint.text, max_tokens=most) if hint.text else None


def _teacher_features(
    state: StageState, prompts: list[Prompt], features: MediaFeatures | None, read: list[int]
) -> MediaFeatures | None:
    """Return the vision features of the prompts that the self-teacher reads.

    Args:
        state: state of the stage.
        prompts: those of some groups, followed by prompts with other media.
        features: the student's features of the prompts of all groups; None if each model encodes its own.
        read: indices of the groups whose prompts are read.
    """
    tokens = state.settings.micro_tokens
    if state.teacher is not None and not state.shares_tower:
        return encode_media(state.teacher.model, prompts, tokens_per_call=tokens)
    if features is None:
        return None
    features = features.select(read)
    if not shows_media(state.settings):
        return features
    model = state.student.model
    with state.policy.full_weights(model.model.visual):
        others = encode_media(model, prompts[len(read) :], tokens_per_call=tokens, cache=state.features)
    return features.join(others)


def _score(
    state: StageState, prefixes: list[_Prefix], features: MediaFeatures | None, top: int
) -> tuple[list[list[_Scored]], torch.Tensor | None]:
    """Return the scores of each prefix's responses, and the head for a divergence if it is not the policy's."""
    responses = [prefix.responses for prefix in prefixes]
    prompts, leads = [prefix.body for prefix in prefixes], [prefix.leads for prefix in prefixes]
    if all(prefix.one_lead for prefix in prefixes):
        # The lead is computed once for all responses.
        prompts = [p.body.with_text(p.leads[0]) if p.leads else p.body for p in prefixes]
        leads = None
    score = partial(linear_logprob, temperature=state.settings.rollout.temperature, ignore_index=None)
    kind = state.settings.self_teacher.kind
    model = {"frozen": state.reference, "path": state.teacher}.get(kind, state.policy)
    distills, temperature = state.settings.kd.kind in DIVERGENCES, state.settings.rollout.temperature
    own_head = distills and (kind == "path" or (kind != "live" and state.settings.model.adapter != "lora"))
    head: list[torch.Tensor] = []

    def read_out(hidden, weight, targets):
        if own_head and not head:
            # The average is in the place of the policy's weights only during these passes.
            head.append(weight.detach().clone() if kind == "ema" else weight.detach())
        states = hidden if distills else None
        if not top:
            return score(hidden, weight, targets), states, None
        # One product with the head gives the log-probs of the targets too.
        ranked = linear_topk(hidden, weight, top, ids=targets[:, None], temperature=temperature)
        return ranked.at_ids[:, 0], states, ranked._replace(at_ids=None)

    indices, logp, lengths, kept = [], [], [], {}
    with state.average.in_place() if kind == "ema" else nullcontext():
        for read in passes(state, prompts, responses, features, leads):
            of_pass, hidden, ranked = model(read.prompts, read.rows, read.features, read_out)
            if not read.filler:
                indices += read.indices
                logp.append(of_pass)
                lengths += read.rows.lengths_list
                kept |= _kept(read.indices, read.rows.lengths_list, prefixes, hidden, ranked)
    scores = [[_Scored(torch.empty(0))] * len(ids) for ids in responses]
    for (i, r), values in zip(indices, torch.cat(logp).cpu().split(lengths), strict=True):
        scores[i][r] = _Scored(values, *kept.get((i, r), ()))
    return scores, head[0] if head else None


def _kept(
    of_rows: list[tuple[int, int]],
    lengths: list[int],
    prefixes: list[_Prefix],
    hidden: torch.Tensor | None,
    ranked: TopK | None,
) -> dict[tuple[int, int], tuple[torch.Tensor | None, TopK | None]]:
    """Return hidden states and most probable tokens of a pass, by response, on the CPU, but not the reference's."""
    nothing = [None] * len(lengths)
    states = nothing if hidden is None else hidden.split(lengths)
    tops = nothing if ranked is None else split_top(ranked, lengths)
    return {
        (i, r): (None if of_row is None else of_row.to("cpu", copy=True), top)
        for (i, r), of_row, top in zip(of_rows, states, tops, strict=True)
        if r >= prefixes[i].plain
    }
