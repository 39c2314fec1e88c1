"""Find the beginnings that prompts of a batch have in common: everything up to the end of their media.

Several questions about a video differ only in what follows it. Their common beginning is most of the prompt, and its
keys and values are the same, because attention is causal.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.students import MediaFeatures


@dataclass(frozen=True)
class SharedBeginnings:
    """The prompts of a batch by their beginnings.

    Attributes:
        groups: indices of the prompts with each beginning, in the order of their first prompts.
        lengths: number of tokens of each beginning.
        suffixes: number of tokens of each prompt after its beginning, by group, at least one; None if the beginnings
            are whole prompts.
    """

    groups: list[list[int]]
    lengths: list[int]
    suffixes: list[list[int]] | None

    @property
    def order(self) -> list[int]:
        """The indices of all prompts, group by group."""
        return [index for group in self.groups for index in group]

    def split(self, most: int | None) -> list[SharedBeginnings]:
        """Return parts of adjacent groups. Each has at most `most` tokens, or one group; None means a single part."""
        suffixes = self.suffixes or [[] for _ in self.groups]
        starts, tokens = [0], 0
        for number, (length, group) in enumerate(zip(self.lengths, suffixes, strict=True)):
            of_group = length + sum(group)
            if most is not None and number > starts[-1] and tokens + of_group > most:
                starts.append(number)
                tokens = 0
            tokens += of_group
        parts = [slice(*edges) for edges in itertools.pairwise([*starts, len(self.groups)])]
        return [
            SharedBeginnings(self.groups[part], self.lengths[part], self.suffixes and self.suffixes[part])
            for part in parts
        ]


def whole_prompts(prompts: list[Prompt]) -> SharedBeginnings:
    """Return each prompt as a beginning of its own."""
    return SharedBeginnings([[index] for index in range(len(prompts))], [len(p.input_ids) for p in prompts], None)


def shared_beginnings(prompts: list[Prompt], features: MediaFeatures) -> SharedBeginnings | None:
    """Return the beginnings, or None if no two prompts have one in common.

    Prompts share a beginning if their token ids, positions and media are equal up to the last vision token.

    Args:
        prompts: the prompts of a batch.
        features: their vision features. Equal media have the same tensor; see `encode_media`.
    """
    groups: dict[object, list[int]] = {}
    lengths: dict[object, int] = {}
    for index, prompt in enumerate(prompts):
        vision = torch.nonzero(prompt.mm_token_type_ids)[:, 0]
        end = int(vision[-1]) + 1 if len(vision) else 0
        if end == len(prompt.input_ids):
            # Nothing follows the media, so the last token, which predicts the response, cannot be in a suffix.
            return None
        key: object = index
        if end:
            media = tuple(id(features.pooled[medium]) for medium in features.media_of(index))
            texts = (prompt.input_ids[:end], prompt.position_ids[:, :end])
            key = (media, *(text.contiguous().numpy().tobytes() for text in texts))
        groups.setdefault(key, []).append(index)
        # A prompt about text alone has no beginning that is worth sharing, but in this batch it needs a suffix too.
        lengths[key] = end or len(prompt.input_ids) - 1
    if len(groups) == len(prompts) or min(lengths.values()) < 1:
        return None
    suffixes = [[len(prompts[index].input_ids) - lengths[key] for index in group] for key, group in groups.items()]
    return SharedBeginnings(list(groups.values()), list(lengths.values()), suffixes)
