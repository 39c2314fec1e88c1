"""FLOPs of the student over groups: packed, padded, and as trainers without a shared prefix do it. No model is built.

Counted: the products of matrices, 2 FLOPs per multiply-add. Per token of a decoder layer: q, k, v, o, gate, up, down.
Per attended (query, key) pair 4 * heads * head_dim, scores and weighted values; a row of L tokens has L(L+1)/2 pairs, M
responses of R tokens on a prefix of P another M * R * P. The head on rows that predict a response token. The vision
tower per patch, its attention among the patches of one frame (of one `temporal_patch_size`), merger and deepstack
mergers per vision token. Norms, activations, rotary embeddings and the value head are not counted.

A backward pass costs two forwards (gradients of inputs and of weights), checkpointing of the decoder layers one forward
more. A frozen tower has no backward; pixels need no gradient. A kernel that recomputes scores in its backward does more
than is counted here, so does one that computes masked pairs.

`config` is a transformers config, or the same as nested dicts. Its vision part is that of the Qwen3-VL family.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rmsd_fast.models.cost import balance_weights, read_setting, read_sizes, text_sizes


@dataclass(frozen=True)
class Load:
    """A prompt and the responses that are read with it.

    Fields:
        prefix: tokens of the prompt, vision tokens included.
        responses: tokens of each response.
        grids: patches along time, height and width of each medium of the prompt.
    """

    prefix: int
    responses: Sequence[int]
    grids: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True)
class StepLoad:
    """A group of a stage-2 step: `Load` with the rollouts and the teacher responses apart."""

    prefix: int
    rollouts: Sequence[int]
    teachers: Sequence[int]
    grids: Sequence[tuple[int, int, int]] = ()


@dataclass(frozen=True)
class Flops:
    """FLOPs by component: decoder matrices, decoder attention, head, vision matrices, vision attention."""

    dense: int = 0
    attention: int = 0
    head: int = 0
    vision: int = 0
    vision_attention: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def packed_flops(config: Any, groups: Iterable[Load], **options: bool) -> Flops:
    """One pass over packed groups: each prompt and its media once.

    Args:
        config: of the model.
        groups: what is read.
        options: backward=False: forward and backward. head=True: with the language-model head. vision=True: with the
            vision tower, train_vision=False: and its backward. checkpointing=False: decoder layers run again in the
            backward.
    Raises:
        ValueError: a config of another shape: a mixture of experts, a vision tower of another family, a missing size.
    """
    groups = list(groups)
    tokens = sum(group.prefix + sum(group.responses) for group in groups)
    pairs = sum(
        _causal(group.prefix) + sum(_causal(own) + own * group.prefix for own in group.responses) for group in groups
    )
    return _flops(config, groups, tokens, pairs, **options)


def padded_flops(config: Any, groups: Iterable[Load], **options: bool) -> Flops:
    """The same as `[prompt | response | padding]`: every row as long as the longest, media encoded once per prompt."""
    groups = list(groups)
    rows = [group.prefix + own for group in groups for own in group.responses]
    longest = max(rows, default=0)
    return _flops(config, groups, len(rows) * longest, len(rows) * _causal(longest), **options)


def copies_flops(config: Any, groups: Iterable[Load], **options: bool) -> Flops:
    """The same without a shared prefix: a prompt and its media once per response, no padding."""
    alone = [replace(group, responses=[own]) for group in groups for own in group.responses]
    return packed_flops(config, alone, **options)


PASS_FLOPS = {"shared": packed_flops, "padded": padded_flops, "copies": copies_flops}


def step_flops(
    config: Any,
    groups: Iterable[StepLoad],
    mode: str,
    *,
    checkpointing: bool = False,
) -> Flops:
    """A whole stage-2 step but the rollouts: policy forward and backward, reference forward, discriminator both.

    The tower is frozen, and the discriminator reads N rollouts and K teacher responses. "shared" and "padded" encode
    media once for all three models; "copies" does so once per row and model.

    Raises:
        ValueError: another mode, or a config as in `packed_flops`.
    """
    if mode not in PASS_FLOPS:
        raise ValueError(f"mode: expected one of {list(PASS_FLOPS)}, got {mode!r}")
    groups, one_pass = list(groups), PASS_FLOPS[mode]
    written = [Load(group.prefix, group.rollouts, group.grids) for group in groups]
    judged = [Load(group.prefix, [*group.rollouts, *group.teachers], group.grids) for group in groups]
    again, trained = mode == "copies", {"backward": True, "checkpointing": checkpointing}
    total = one_pass(config, written, **trained) + one_pass(config, written, vision=again)
    return total + one_pass(config, judged, head=False, vision=again, **trained)


def _flops(
    config: Any,
    groups: list[Load],
    tokens: int,
    pairs: int,
    *,
    backward: bool = False,
    head: bool = True,
    vision: bool = True,
    train_vision: bool = False,
    checkpointing: bool = False,
) -> Flops:
    text = text_sizes(config)
    per_token, per_pair = balance_weights(config)
    passes = 3 if backward else 1
    layer_passes = passes + (backward and checkpointing)
    predicting = sum(sum(group.responses) for group in groups)
    total = Flops(
        dense=layer_passes * per_token * tokens,
        attention=layer_passes * per_pair * pairs,
        head=passes * 2 * text["hidden_size"] * text["vocab_size"] * predicting if head else 0,
    )
    grids = [grid for group in groups for grid in group.grids]
    return total + _vision_flops(config, grids, backward and train_vision) if vision and grids else total


def _vision_flops(config: Any, grids: list[tuple[int, int, int]], backward: bool) -> Flops:
    vision = _vision_config(config)
    hidden = vision["hidden_size"]
    patches = sum(t * h * w for t, h, w in grids)
    pixels = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    merged = vision["spatial_merge_size"] ** 2
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    embed = 2 * pixels * hidden * patches
    blocks = 2 * vision["depth"] * (4 * hidden * hidden + 2 * hidden * vision["intermediate_size"]) * patches
    wide = merged * hidden
    mergers_flops = 2 * mergers * (wide * wide + wide * vision["out_hidden_size"]) * (patches // merged)
    pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
    passes = 3 if backward else 1
    return Flops(
        vision=passes * (blocks + mergers_flops) + (2 if backward else 1) * embed,
        vision_attention=passes * 4 * vision["depth"] * hidden * pairs,
    )


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _vision_config(config: Any) -> dict[str, Any]:
    names = (
        "hidden_size depth intermediate_size out_hidden_size in_channels patch_size temporal_patch_size "
        "spatial_merge_size deepstack_visual_indexes"
    )
    return read_sizes(read_setting(config, "vision_config") or {}, "vision_config", names)
