"""Qwen3-VL with a dense decoder: time stamps in the prompt, and vision features in several decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from rmsd_fast.config import NotInstalled
from rmsd_fast.data.chat_template import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames, MediaLayout
from rmsd_fast.models.families.family import Family, LigerLayers, processor_settings

# The first versions whose processors keep the vision tokens around a whole video and limit the pixels of a frame.
VIDEO_EDGES, FRAME_CAP = "5.10", "5.16"
_CARD = f"""\
- For videos, use {FRAME_CAP} or later. Earlier processors do not limit the pixels of a frame, and those before
  {VIDEO_EDGES} also leave out `<|vision_start|>` and `<|vision_end|>` around a whole video. The student was trained
  with both."""


def media_text(frames: Frames | MediaLayout, preprocessor: Preprocessor) -> str:
    """Return the text that replaces a medium's pad token. The mean time of each temporal patch precedes its tokens.

    As in the family's processor since transformers 5.10, the template's own vision start and end stay around the whole
    video, although each of its temporal patches has its own pair.
    """
    steps, height, width = frames.grid_thw
    tokens = height * width // preprocessor.merge_size**2
    if frames.kind == "image":
        return IMAGE_PAD * tokens
    span = preprocessor.temporal_patch_size
    times = list(frames.timestamps_s)
    times += times[-1:] * (steps * span - len(times))
    # The mean of a patch's first and last frame, as in the family's processor.
    stamps = [(times[index] + times[index + span - 1]) / 2 for index in range(0, len(times), span)]
    block = VISION_START + VIDEO_PAD * tokens + VISION_END
    return "".join(f"<{stamp:.1f} seconds>{block}" for stamp in stamps)


def position_ids(
    model: PreTrainedModel, ids: torch.Tensor, types: torch.Tensor, media: Sequence[Frames]
) -> torch.Tensor:
    """Return the positions of transformers' `get_rope_index`, int64 [3, P]."""
    grids = {}
    for kind in ("image", "video"):
        grid = [frames.grid_thw for frames in media if frames.kind == kind]
        grids[f"{kind}_grid_thw"] = torch.tensor(grid) if grid else None
    positions, _ = model.model.get_rope_index(ids[None], types[None], **grids)
    return positions[:, 0]


def _deepstack_layers(config: Qwen3VLConfig) -> int:
    return len(config.vision_config.deepstack_visual_indexes)


def _vision_layers(encoded: Any) -> list[list[torch.Tensor]]:
    sizes = [len(pooled) for pooled in encoded.pooler_output]
    # Up to transformers 5.17, the tower returns one tensor for all media.
    deepstack = [
        features.split(sizes) if isinstance(features, torch.Tensor) else features
        for features in encoded.deepstack_features
    ]
    return [list(encoded.pooler_output), *map(list, deepstack)]


def _deepstack_inputs(language_model: nn.Module, places: torch.Tensor, layers: list[torch.Tensor]) -> dict[str, Any]:
    add_deepstack_by_index(language_model)
    return {"visual_pos_masks": places, "deepstack_visual_embeds": layers}


def add_deepstack_by_index(language_model: nn.Module) -> None:
    """Let a language model add deepstack features at indices [vision tokens] instead of a mask [B, L].

    transformers indexes with the mask twice per layer, and each time the host waits for the device to count its
    entries. A mask, which the full transformers model passes, is still accepted.

    Raises:
        NotInstalled: this version of transformers adds the features with another method.
    """
    if not hasattr(language_model, "_deepstack_process"):
        raise NotInstalled(
            f"{type(language_model).__name__} of transformers {transformers.__version__} has no _deepstack_process, "
            "which adds the vision tower's deepstack features; install transformers>=5.17,<5.24"
        )
    language_model._deepstack_process = add_features


def add_features(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Add features [vision tokens, D] to the hidden states [B, L, D] of a decoder layer, in place.

    This is safe, because a layer ends with the sum of its residual and its MLP, whose backward does not read the
    result.
    """
    if places.dtype == torch.bool:
        places = places.flatten().nonzero()[:, 0]
    features = features.to(hidden.device, hidden.dtype)
    hidden.view(-1, hidden.shape[-1]).index_add_(0, places.to(hidden.device), features)
    return hidden


def _tower_inputs(config: PreTrainedConfig, grids: torch.Tensor) -> dict[str, Any]:
    merge = config.spatial_merge_size
    indices, weights = get_vision_interpolation_indices_and_weights(
        grids,
        num_grid_per_side=int(config.num_position_embeddings**0.5),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=merge,
    )
    return {
        "interp_indices": indices,
        "interp_weights": weights,
        "position_ids": get_vision_position_ids(grids, merge),
        "cu_seqlens": get_vision_cu_seqlens(grids),
        "max_seqlen": int((grids[:, 1] * grids[:, 2]).max()),
    }


def _processor_files(preprocessor: Preprocessor) -> dict[str, dict[str, Any]]:
    common = processor_settings(preprocessor)
    image = {
        **common,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    video = {
        **common,
        "size": {"shortest_edge": 4096, "longest_edge": 25165824},
        "processor_class": "Qwen3VLProcessor",
        "video_processor_type": "Qwen3VLVideoProcessor",
        # `video_size` also limits frames. transformers before 5.16 ignores the setting and does not limit them.
        "cap_pixels_per_frame": True,
    }
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


QWEN3_VL = Family(
    model_type="qwen3_vl",
    title="Qwen3-VL",
    example="Qwen/Qwen3-VL-4B-Instruct",
    config_class=Qwen3VLConfig,
    model_class=Qwen3VLForConditionalGeneration,
    preprocessing="qwen3_vl",
    flat_text_config=False,
    time_stamps=True,
    pixel_boxes=False,
    media_text=media_text,
    position_ids=position_ids,
    deepstack_layers=_deepstack_layers,
    vision_layers=_vision_layers,
    deepstack_inputs=_deepstack_inputs,
    tower_inputs=_tower_inputs,
    liger=LigerLayers(
        norm=modeling.Qwen3VLTextRMSNorm,
        mlp=modeling.Qwen3VLTextMLP,
        rotations={
            modeling.Qwen3VLTextAttention: ("apply_rotary_pos_emb", "liger_rotary_pos_emb"),
            modeling.Qwen3VLVisionAttention: ("apply_rotary_pos_emb_vision", "liger_rotary_pos_emb_vision"),
        },
    ),
    processor_files=_processor_files,
    card=_CARD,
)
