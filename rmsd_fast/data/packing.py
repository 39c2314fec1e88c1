"""Arrange groups in rows. A group is one prompt and all its responses; `plan_micro_batches` chooses the groups of one
pass.

Packed: one row `[P_1 | P_2 | ... | R_11 R_12 ... | R_21 ...]`, each prompt once. A single response is part of its
prompt's own segment. Padded: `[prompt | response | pad]` per response, the reference that packed rows are tested
against. Both describe in the same way which hidden states predict which tokens, so a loss does not depend on the
layout. Responses are always numbered group by group ("group-major").

A response may have a lead: tokens between the prompt and the response that only this response attends to, such as a
hint. A lead is read but not scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch.autograd.function import once_differentiable

from rmsd_fast.data.micro_batches import check_packing
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.transfer import to_device
from rmsd_kernels.shared_prefix.attention import SharedPrefixPlan

# Tensors of a plan that attention reads on the device.
PLAN_EDGES = ("segments", "group_queries", "group_keys")


@dataclass(frozen=True)
class Rows:
    """The input of one forward pass: B rows of L tokens, with S response tokens in M responses.

    Fields:
        input_ids: int64 [B, L].
        position_ids: int64 [3, B, L]; 0 on padding.
        attention_mask: int64 [B, L]; None for packed rows, with B = 1 and no padding.
        plan: the segments of a packed row; None for padded rows.
        predicts: int64 [S], response by response: the row of `hidden.flatten(0, 1)` that predicts the token. The first
            token of a response is predicted by the last row of its lead or, without a lead, of its prompt.
        targets: int64 [S], the predicted tokens.
        last: int64 [M], the row of each response's last token.
        lengths: int64 [M], tokens of each response.
        media_order: indices of the prompts whose media the rows contain, in the order of their placeholders. Packed:
            each prompt once; padded: one per row.
        media_places: int64 [vision tokens], the placeholders in `input_ids.flatten()`.
        lengths_list: `lengths` on the host, readable without waiting for a device.
        forks: (row, first, count): the row predicts the first tokens of `count` responses, starting with `first`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    plan: SharedPrefixPlan | None
    predicts: torch.Tensor
    targets: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor
    media_order: list[int]
    media_places: torch.Tensor
    lengths_list: list[int]
    forks: list[tuple[int, int, int]]

    def to(self, device: torch.device | str) -> Rows:
        """Return the same rows on a device, with one copy that does not block the host."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        names = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        edges = [] if self.plan is None else [getattr(self.plan, name) for name in PLAN_EDGES]
        copies = to_device([*(values[name] for name in names), *edges], device)
        moved = dict(zip(names, copies, strict=False))
        if self.plan is not None:
            moved["plan"] = replace(self.plan, **dict(zip(PLAN_EDGES, copies[len(names) :], strict=True)))
        return replace(self, **moved)


def make_rows(
    packing: str,
    prompts: list[Prompt],
    responses: list[list[torch.Tensor]],
    leads: list[list[torch.Tensor]] | None = None,
    *,
    pad_id: int,
) -> Rows:
    """Call `pack` for packing="shared" and `pad` for "padded".

    Raises:
        ValueError: packing is neither, or `pack` or `pad` raises it.
    """
    check_packing(packing)
    return pack(prompts, responses, leads) if packing == "shared" else pad(prompts, responses, leads, pad_id=pad_id)


def pack(
    prompts: list[Prompt], responses: list[list[torch.Tensor]], leads: list[list[torch.Tensor]] | None = None
) -> Rows:
    """Return one packed row of all prompts and responses.

    Args:
        prompts: G prompts.
        responses: the responses of each prompt, each int64 [R], including the end token if there is one. A prompt may
            have none.
        leads: the lead of each response, int64 [H] with H >= 1; None = responses follow their prompts directly.
    Raises:
        ValueError: there are no prompts, the lists differ in length, or a response or a lead is empty or contains one
            of the prompts' `vision_ids`.
        TypeError: a response or a lead is not a one-dimensional int64 tensor.
    """
    flat, _ = _flatten(prompts, responses, leads)
    segments = _segments(responses, leads)
    # A single response continues its prompt's segment: plain causal attention, in one call instead of three.
    continuations = [of_prompt if len(of_prompt) == 1 else [] for of_prompt in segments]
    tails = [of_prompt if len(of_prompt) != 1 else [] for of_prompt in segments]
    pairs = zip(prompts, continuations, strict=True)
    prefix_lengths = [len(prompt.input_ids) + sum(map(len, of_prompt)) for prompt, of_prompt in pairs]
    ids, positions, tail_ids, tail_positions, predicts, last, forks = [], [], [], [], [], [], []
    row, tail_row = 0, sum(prefix_lengths)
    for prompt, answers, of_prompt, length in zip(prompts, responses, segments, prefix_lengths, strict=True):
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        end = row + len(prompt.input_ids)
        lone = len(answers) == 1
        if len(answers) > 1 and leads is None:
            forks.append((end - 1, len(last), len(answers)))
        for response, segment in zip(answers, of_prompt, strict=True):
            stop = (end if lone else tail_row) + len(segment)
            (ids if lone else tail_ids).append(segment)
            following = (prompt.next_position + torch.arange(len(segment))).expand(3, len(segment))
            (positions if lone else tail_positions).append(following)
            predicts.append(torch.arange(stop - 1 - len(response), stop - 1))
            if leads is None:
                predicts[-1][0] = end - 1
            last.append(stop - 1)
            tail_row += 0 if lone else len(segment)
        row += length
    lengths = [len(response) for response in flat]
    return Rows(
        input_ids=torch.cat(ids + tail_ids)[None],
        position_ids=torch.cat(positions + tail_positions, dim=1)[:, None],
        attention_mask=None,
        plan=SharedPrefixPlan.from_lengths(
            prefix_lengths, [[len(segment) for segment in of_prompt] for of_prompt in tails]
        ),
        predicts=_joined(predicts),
        targets=_joined(flat),
        last=torch.tensor(last, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        media_order=list(range(len(prompts))),
        media_places=media_places(prompts, list(accumulate(prefix_lengths[:-1], initial=0))),
        lengths_list=lengths,
        forks=forks,
    )


def pad(
    prompts: list[Prompt],
    responses: list[list[torch.Tensor]],
    leads: list[list[torch.Tensor]] | None = None,
    *,
    pad_id: int,
) -> Rows:
    """Return one row `[prompt | lead | response]` per response, padded on the right with `pad_id`.

    Arguments and errors as `pack`, except that at least one response is required.
    """
    flat, owner = _flatten(prompts, responses, leads)
    if not flat:
        raise ValueError("expected at least one response, got none; padded rows consist of responses")
    lengths = [len(response) for response in flat]
    segments = [segment for of_prompt in _segments(responses, leads) for segment in of_prompt]
    starts = [len(prompts[i].input_ids) for i in owner]
    length = max(start + len(segment) for start, segment in zip(starts, segments, strict=True))
    input_ids = torch.full((len(flat), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(flat), length, dtype=torch.int64)
    position_ids = torch.zeros(3, len(flat), length, dtype=torch.int64)
    following = [prompt.next_position for prompt in prompts]
    predicts, last = [], []
    for row, (response, segment, i, start) in enumerate(zip(flat, segments, owner, starts, strict=True)):
        end = start + len(segment)
        input_ids[row, :start] = prompts[i].input_ids
        input_ids[row, start:end] = segment
        attention_mask[row, :end] = 1
        position_ids[:, row, :start] = prompts[i].position_ids
        position_ids[:, row, start:end] = following[i] + torch.arange(len(segment))
        predicts.append(row * length + torch.arange(end - 1 - len(response), end - 1))
        last.append(row * length + end - 1)
    return Rows(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        plan=None,
        predicts=_joined(predicts),
        targets=_joined(flat),
        last=torch.tensor(last, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        media_order=owner,
        media_places=media_places([prompts[i] for i in owner], range(0, input_ids.numel(), length)),
        lengths_list=lengths,
        forks=[],
    )


def media_places(prompts: Sequence[Prompt], starts: Sequence[int]) -> torch.Tensor:
    """Return the rows of the vision tokens of prompts that begin at these rows, int64, on the CPU."""
    pairs = zip(prompts, starts, strict=True)
    return torch.cat([prompt.mm_token_type_ids.nonzero()[:, 0] + start for prompt, start in pairs])


def gather_rows(hidden: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Return `hidden[rows.predicts]`, with a backward that is exact if one row predicts several tokens.

    The same row predicts the first tokens of all responses of a packed prompt. Its gradient is the sum of their
    gradients, accumulated in float32 (float64 for float64) in the order of the responses, and rounded once. Plain
    indexing would round after each addition.

    Args:
        hidden: [B * L, D], any floating dtype.
        rows: the rows that `hidden` was computed from, on its device.
    Returns:
        [S, D], in the dtype of `hidden`.
    Raises:
        ValueError: the number of rows of `hidden` is wrong.
    """
    if hidden.dim() != 2 or len(hidden) != rows.input_ids.numel():
        raise ValueError(
            f"hidden: expected [{rows.input_ids.numel()}, D], one row per token, got {list(hidden.shape)}; "
            "pass hidden.flatten(0, 1) of the forward pass that read these rows"
        )
    return _GatherRows.apply(hidden, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rows):
        ctx.rows, ctx.shape = rows, hidden.shape
        return hidden[rows.predicts]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows = ctx.rows
        grad_hidden = grad.new_zeros(ctx.shape)
        # Shared rows occur several times here, in any order, and are overwritten below.
        grad_hidden[rows.predicts] = grad
        if rows.forks:
            precision = torch.float64 if grad.dtype == torch.float64 else torch.float32
            firsts = grad[rows.lengths.cumsum(0) - rows.lengths]
            # Read from the host to avoid waiting for the device.
            for row, first, count in rows.forks:
                grad_hidden[row] = firsts[first : first + count].sum(0, dtype=precision)
        return grad_hidden, None


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _segments(responses: list[list[torch.Tensor]], leads: list[list[torch.Tensor]] | None) -> list[list[torch.Tensor]]:
    """Return the responses of each prompt with their leads."""
    if leads is None:
        return responses
    pairs = zip(leads, responses, strict=True)
    return [[torch.cat(pair) for pair in zip(of_prompt, answers, strict=True)] for of_prompt, answers in pairs]


def _flatten(
    prompts: list[Prompt], responses: list[list[torch.Tensor]], leads: list[list[torch.Tensor]] | None
) -> tuple[list[torch.Tensor], list[int]]:
    """Check responses and leads, and return the responses in group-major order with the index of each one's prompt."""
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"expected at least one prompt, and a list of responses for each prompt, got {len(responses)} lists "
            f"and {len(prompts)} prompts"
        )
    if leads is not None and [len(of_prompt) for of_prompt in leads] != [len(answers) for answers in responses]:
        raise ValueError(
            f"leads: expected one per response, {[len(answers) for answers in responses]} for the prompts, got "
            f"{[len(of_prompt) for of_prompt in leads]}"
        )
    vision_ids = {index for prompt in prompts for index in prompt.vision_ids}
    for kind, lists in (("response", responses), ("lead", leads or [])):
        for prompt, of_prompt in zip(prompts, lists, strict=False):
            for number, ids in enumerate(of_prompt):
                _check_ids(f"{kind} {number} of question {prompt.question.id!r}", ids, vision_ids)
    flat = [response for answers in responses for response in answers]
    owner = [i for i, answers in enumerate(responses) for _ in answers]
    return flat, owner


def _check_ids(name: str, ids: torch.Tensor, vision_ids: set[int]) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise TypeError(f"{name}: expected int64 [R], got {ids.dtype} {list(ids.shape)}")
    if not len(ids):
        raise ValueError(f"{name} is empty; leave it out, or append the end token")
    vision_tokens = vision_ids.intersection(ids.tolist())
    if vision_tokens:
        raise ValueError(
            f"{name} contains the vision token {min(vision_tokens)}, which the model would treat as a medium "
            "or its delimiter; ban it in generation, or leave the response out"
        )
