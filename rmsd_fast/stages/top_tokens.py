"""Read the policy's most probable tokens, and its log-probs of the self-teacher's, for the rollouts of stage 2."""

from __future__ import annotations

import torch

from rmsd_fast.data.transfer import to_device
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.stages.groups import RolloutGroup
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState
from rmsd_kernels import TopK, linear_topk


@torch.no_grad()
def read_top_tokens(
    state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None, *, top: int, student_top: int
) -> None:
    """Store the policy's log-probs and most probable tokens in `student_top` of the groups, in passes without hints.

    They are computed with the weights of the trainer, like those of the self-teacher, and not taken from the rollout
    engine, which only knows the sampled tokens.

    Args:
        state: state of the stage.
        groups: groups of this process, with the self-teacher's tokens in `teacher_top`.
        features: vision features of the groups' prompts; None if each model encodes its own.
        top: number of most probable tokens of the self-teacher.
        student_top: number of most probable tokens of the policy to read; 0 = none.
    """
    temperature = state.settings.rollout.temperature
    responses = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
    for group in groups:
        group.student_top = [None] * len(group.rollouts)
    for read in passes(state, [group.prompt for group in groups], responses, features):
        wanted = [_wanted(groups[i], r, top) for i, r in read.indices]
        (ids,) = to_device([torch.cat(wanted)], state.world.device)

        def head(hidden, weight, targets, ids=ids):
            return linear_topk(hidden, weight, student_top, ids=ids, temperature=temperature)

        ranked = state.policy(read.prompts, read.rows, read.features, head)
        if not read.filler:
            for (i, r), of_rollout in zip(read.indices, split_top(ranked, read.rows.lengths_list), strict=True):
                groups[i].student_top[r] = of_rollout


def split_top(ranked: TopK, lengths: list[int]) -> list[TopK]:
    """Return the parts of a result with so many rows each, on the CPU."""
    columns = [None if values is None else values.cpu().split(lengths) for values in ranked]
    return [TopK(*(None if column is None else column[i] for column in columns)) for i in range(len(lengths))]


def _wanted(group: RolloutGroup, rollout: int, top: int) -> torch.Tensor:
    """Return the self-teacher's tokens and the sampled one at each position, int64 [R, top + 1]."""
    own = group.rollouts[rollout].token_ids.unsqueeze(1)
    # Without a hint, the results are not used.
    ranked = group.teacher_top[rollout] if group.teacher_top else None
    others = own.expand(-1, top) if ranked is None else ranked.ids
    return torch.cat([others, own], dim=1)
