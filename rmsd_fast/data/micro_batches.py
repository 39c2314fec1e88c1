"""Pack groups into micro-batches of balanced cost, the same number on every rank.

A group is one prompt and its responses. It is split only if it exceeds the budget, because each part of a packed group
computes the prompt again.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rmsd_fast.config import SettingsError


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass.

    Fields:
        prompts: indices of its prompts in the step, ascending.
        responses: for each prompt, indices of its responses in the prompt's group, ascending.
        filler: whether it repeats another micro-batch so that all ranks have the same number. Multiply its loss by 0.
    """

    prompts: list[int]
    responses: list[list[int]]
    filler: bool


@dataclass(frozen=True)
class _Part:
    """Some responses of one prompt: tokens and attended pairs as a packed row, and tokens of the longest padded row."""

    prompt: int
    responses: list[int]
    tokens: int
    pairs: int
    longest: int


def plan_micro_batches(
    prefix_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    *,
    packing: str,
    micro_tokens: int,
    weights: tuple[float, float] = (1.0, 0.0),
    agree: Callable[[int], int] = lambda count: count,
    ids: Sequence[str] | None = None,
) -> list[MicroBatch]:
    """Distribute this rank's responses, each once, over micro-batches of similar cost within a token budget.

    The most expensive micro-batches come first, so that ranks in lockstep do similar work, and an out-of-memory error
    occurs immediately or never.

    Args:
        prefix_lengths: tokens of each prompt.
        response_lengths: tokens of each prompt's responses; a prompt may have none.
        packing: how tokens are counted. "shared": each prompt once, plus all responses. "padded": rows x longest row.
        micro_tokens: largest number of tokens of a micro-batch.
        weights: cost of a token and of an attended (query, key) pair, e.g. `rmsd_fast.models.cost.balance_weights`.
        agree: function that maps the number this rank needs to the number all ranks use (the maximum over ranks);
            called once.
        ids: question ids, for messages.
    Returns:
        The agreed number of micro-batches. The last ones may be fillers: the cheapest prompt with one response.
    Raises:
        SettingsError: a prompt with one response exceeds `micro_tokens`.
        ValueError: packing, lengths or weights are invalid, `agree` returns fewer micro-batches than needed, or there
            is no micro-batch to repeat.
    """
    check_packing(packing)
    _check(prefix_lengths, response_lengths, micro_tokens, weights, ids)
    lengths = zip(prefix_lengths, response_lengths, strict=True)
    groups = [(prompt, prefix, responses) for prompt, (prefix, responses) in enumerate(lengths) if responses]
    size = partial(_size, padded=packing == "padded", weights=weights)
    parts = [part for group in groups for part in _split(*group, size, micro_tokens)]
    tokens = [size([part])[0] for part in parts]
    # Two parts above half the budget never fit together, which gives a lower bound on the number of micro-batches.
    needed = max(math.ceil(sum(tokens) / micro_tokens), sum(2 * of_part > micro_tokens for of_part in tokens))
    while (fewest := _place(parts, needed, size, micro_tokens)) is None:
        needed += 1
    count = agree(needed)
    if count < needed:
        raise ValueError(f"agree: expected at least {needed} micro-batches, got {count}; give the maximum over ranks")
    if count and not parts:
        raise ValueError("this rank has no responses to repeat but other ranks have some; give each rank a response")
    # In rare cases, the placement fails even with more micro-batches than needed.
    plan = _place(parts, count, size, micro_tokens) or fewest
    if len(plan) < count:
        singles = [_part(*group, [response]) for group in groups for response in range(len(group[2]))]
        cheapest = min(singles, key=lambda part: size([part])[1])
        plan += [MicroBatch([cheapest.prompt], [cheapest.responses], filler=True)] * (count - len(plan))
    return plan


def check_packing(packing: str) -> None:
    if packing not in ("shared", "padded"):
        raise ValueError(f"packing: expected 'shared' or 'padded', got {packing!r}")


def _check(prefix_lengths, response_lengths, micro_tokens, weights, ids) -> None:
    if len(prefix_lengths) != len(response_lengths):
        raise ValueError(f"expected a list per prompt, got {len(response_lengths)} for {len(prefix_lengths)} prompts")
    if min(weights) < 0 or max(weights) <= 0:
        raise ValueError(f"weights: expected (per_token, per_pair), none negative, one positive, got {weights}")
    for number, (prefix, lengths) in enumerate(zip(prefix_lengths, response_lengths, strict=True)):
        if min([prefix, *lengths]) < 1:
            raise ValueError(f"prompt {number}: expected lengths of at least 1, got {prefix} and responses {lengths}")
        longest = max(lengths, default=0)
        if lengths and prefix + longest > micro_tokens:
            name = f"number {number} of the step" if ids is None else repr(ids[number])
            raise SettingsError(
                f"micro_tokens: question {name} has {prefix} prompt tokens and a response of {longest}, "
                f"{prefix + longest} in all, got micro_tokens={micro_tokens}; "
                f"set it to at least {prefix + longest}, or allow fewer prompt or response tokens"
            )


def _causal_pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _part(prompt: int, prefix: int, lengths: Sequence[int], responses: list[int]) -> _Part:
    chosen = [lengths[response] for response in responses]
    pairs = _causal_pairs(prefix) + sum(_causal_pairs(length) + length * prefix for length in chosen)
    return _Part(prompt, responses, prefix + sum(chosen), pairs, prefix + max(chosen))


def _size(parts: list[_Part], *, padded: bool, weights: tuple[float, float]) -> tuple[int, float]:
    """Return the tokens and the cost of a micro-batch."""
    if padded:
        rows = sum(len(part.responses) for part in parts)
        longest = max((part.longest for part in parts), default=0)
        tokens, pairs = rows * longest, rows * _causal_pairs(longest)
    else:
        tokens, pairs = sum(part.tokens for part in parts), sum(part.pairs for part in parts)
    return tokens, weights[0] * tokens + weights[1] * pairs


def _split(prompt: int, prefix: int, lengths: Sequence[int], size: Callable, micro_tokens: int) -> list[_Part]:
    """Return the whole group if it fits, otherwise as few even parts as possible.

    Each response, longest first, goes to the smallest part.
    """
    order = sorted(range(len(lengths)), key=lambda response: -lengths[response])
    for count in range(1, len(order) + 1):
        parts = [_part(prompt, prefix, lengths, [response]) for response in order[:count]]
        for response in order[count:]:
            smallest = min(range(count), key=lambda index: size([parts[index]])[0])
            parts[smallest] = _part(prompt, prefix, lengths, [*parts[smallest].responses, response])
        if all(size([part])[0] <= micro_tokens for part in parts):
            break
    return parts


def _place(parts: list[_Part], count: int, size: Callable, micro_tokens: int) -> list[MicroBatch] | None:
    """Put each part, most expensive first, into the cheapest of `count` micro-batches that has room for it.

    Return None if there is no room for a part.
    """
    # (cost, number, parts), ascending, so the first micro-batch that a part fits is the cheapest.
    batches: list[tuple[float, int, list[_Part]]] = [(0.0, number, []) for number in range(count)]
    for part in sorted(parts, key=lambda part: -size([part])[1]):
        fits = (i for i, (_, _, placed) in enumerate(batches) if size([*placed, part])[0] <= micro_tokens)
        cheapest = next(fits, None)
        if cheapest is None:
            return None
        _, number, placed = batches.pop(cheapest)
        insort(batches, (size([*placed, part])[1], number, [*placed, part]))
    return [_micro_batch(placed) for _, _, placed in reversed(batches) if placed]


def _micro_batch(parts: list[_Part]) -> MicroBatch:
    merged: dict[int, list[int]] = {}
    for part in sorted(parts, key=lambda part: part.prompt):
        merged.setdefault(part.prompt, []).extend(part.responses)
    return MicroBatch(list(merged), [sorted(responses) for responses in merged.values()], filler=False)
