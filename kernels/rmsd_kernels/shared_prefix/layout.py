"""Compute the positions of a packed row's segments from the length tensor that is passed to the ops."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """A prefix with at least one response: the slices of its keys and of its responses' queries in the packed row."""

    keys: slice
    queries: slice


class Run(NamedTuple):
    """`count` adjacent segments of `length` tokens each, processed in one batched call."""

    rows: slice
    count: int
    length: int


class Layout(NamedTuple):
    """The layout of a packed row: token counts, all segments as runs, groups with responses, and maximum lengths."""

    tokens: int
    prefix_tokens: int
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    longest_segment: int
    longest_queries: int  # tokens of one group's responses
    longest_keys: int


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Return the values as Python integers. Raise TypeError for floats, which int() would truncate."""
    try:
        return tuple(map(index, values))
    except TypeError:
        raise TypeError(f"{name}: expected a list of integers, got {values!r}") from None


def cumulative(lengths: Iterable[int], device: torch.device | str) -> Tensor:
    """Return the cumulative lengths from 0, int32, as required by varlen kernels."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def layout_of(lengths: Tensor) -> Layout:
    """Return the Layout of a plan's `lengths`."""
    return _layout(tuple(lengths.tolist()))


# All layers use the same few plans in a step, so the layouts are cached.
@lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...]) -> Layout:
    groups = lengths[0]
    prefixes, counts, responses = (
        lengths[1 : 1 + groups],
        lengths[1 + groups : 1 + 2 * groups],
        lengths[1 + 2 * groups :],
    )
    runs, row = [], 0
    # A run contains either prefixes or responses.
    for (_, length), equal in groupby([*((0, length) for length in prefixes), *((1, length) for length in responses)]):
        count = len(list(equal))
        runs.append(Run(slice(row, row + count * length), count, length))
        row += count * length
    nonempty, key, first, query = [], 0, 0, sum(prefixes)
    longest = 0
    for prefix, count in zip(prefixes, counts, strict=True):
        rows = sum(responses[first : first + count])
        if rows:
            nonempty.append(Group(slice(key, key + prefix), slice(query, query + rows)))
        key, first, query = key + prefix, first + count, query + rows
        longest = max(longest, rows)
    longest_segment = max((*prefixes, *responses))
    return Layout(row, sum(prefixes), tuple(runs), tuple(nonempty), longest_segment, longest, max(prefixes))
