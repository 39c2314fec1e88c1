"""Where the segments of a packed row lie, read from the length tensor that travels through the ops."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """A prefix with at least one response, as rows of the packed row."""

    keys: slice
    queries: slice


class Run(NamedTuple):
    """`count` neighbouring segments of `length` tokens each: one batched call."""

    rows: slice
    count: int
    length: int


class Layout(NamedTuple):
    """Of a packed row: T, the prefixes' tokens, all segments as runs, groups with responses, and longest lengths."""

    tokens: int
    prefix_tokens: int
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    longest_segment: int
    longest_queries: int  # tokens of one group's responses
    longest_keys: int


def integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """The values as Python's integers; TypeError for others, of which int() would drop a part."""
    try:
        return tuple(map(index, values))
    except TypeError:
        raise TypeError(f"{name}: expected a list of integers, got {values!r}") from None


def cumulative(lengths: Iterable[int], device: torch.device | str) -> Tensor:
    """Edges from 0, int32, as varlen kernels take them."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def layout_of(lengths: Tensor) -> Layout:
    """The Layout of a plan's `lengths`."""
    return _layout(tuple(lengths.tolist()))


# A step goes through every layer with the same few plans.
@lru_cache(maxsize=256)
def _layout(lengths: tuple[int, ...]) -> Layout:
    groups = lengths[0]
    prefixes, counts, responses = (
        lengths[1 : 1 + groups],
        lengths[1 + groups : 1 + 2 * groups],
        lengths[1 + 2 * groups :],
    )
    runs, row = [], 0
    # A run holds prefixes or responses, not both.
    for (_, length), equal in groupby([*((0, length) for length in prefixes), *((1, length) for length in responses)]):
        count = len(list(equal))
        runs.append(Run(slice(row, row + count * length), count, length))
        row += count * length
    used, key, first, query = [], 0, 0, sum(prefixes)
    longest = 0
    for prefix, count in zip(prefixes, counts, strict=True):
        rows = sum(responses[first : first + count])
        if rows:
            used.append(Group(slice(key, key + prefix), slice(query, query + rows)))
        key, first, query = key + prefix, first + count, query + rows
        longest = max(longest, rows)
    return Layout(row, sum(prefixes), tuple(runs), tuple(used), max((*prefixes, *responses)), longest, max(prefixes))
