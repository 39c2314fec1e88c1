"""Qwen2.5-VL: one block of tokens per video, whose positions count seconds, and vision features in the embeddings only.

The positions are those of the family's release, of transformers up to 5.2, and of vLLM: text begins after the last
position of the medium before it. transformers 5.3 to 5.23 lets it begin after the medium's longer side instead, which
can be earlier than the video's last time. Versions up to 5.17 also round the seconds of a temporal patch down. The
positions are therefore computed here, the same with each version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from rmsd_fast.data.chat_template import IMAGE_PAD, VIDEO_PAD
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames, MediaLayout
from rmsd_fast.models.families.family import Family, LigerLayers, processor_settings

_CARD = """\
- For videos, use 5.16 or later. Earlier processors do not limit the pixels of a whole video.
- Positions of text after a video: this student was trained with those of vLLM and of transformers up to 5.2, in which
  text begins after the last time of the video. transformers 5.3 to 5.23 lets it begin earlier if a video has more time
  positions than rows and columns of tokens. Versions up to 5.17 also round the seconds of a temporal patch down."""


def media_text(frames: Frames | MediaLayout, preprocessor: Preprocessor) -> str:
    """Return the text that replaces a medium's pad token: as many pad tokens as it has features."""
    tokens = math.prod(frames.grid_thw) // preprocessor.merge_size**2
    return (IMAGE_PAD if frames.kind == "image" else VIDEO_PAD) * tokens


def position_ids(
    model: PreTrainedModel, ids: torch.Tensor, types: torch.Tensor, media: Sequence[Frames]
) -> torch.Tensor:
    """Return the positions of a prompt, int64 [3, P]: time, height, width.

    Text counts up on all axes. A medium has one position per row and column of tokens. A temporal patch of a video
    moves by `tokens_per_second` times its seconds, rounded down after the product; an image has no time.
    """
    vision = model.config.vision_config
    merge, remaining = vision.spatial_merge_size, iter(media)
    runs, row, start = [], 0, 0
    for kind, run in groupby(types.tolist()):
        end = row + len(list(run))
        while row < end:
            if kind == 0:
                positions = torch.arange(end - row).expand(3, end - row)
            else:
                frames = next(remaining)
                steps, height, width = frames.grid_thw
                # float32 as in transformers, where the seconds are a tensor.
                interval = vision.tokens_per_second * torch.tensor(seconds_per_step(frames))
                times = (torch.arange(steps) * interval).long()
                axes = torch.meshgrid(times, torch.arange(height // merge), torch.arange(width // merge), indexing="ij")
                positions = torch.stack(axes).reshape(3, -1)
            runs.append(positions + start)
            row += positions.shape[1]
            start = int(runs[-1].max()) + 1
    return torch.cat(runs, dim=1)


def seconds_per_step(frames: Frames) -> float:
    """Return the seconds from one temporal patch to the next, as the family's processor computes them; 0 for an image.

    Raises:
        ValueError: the rate of a video's frames is unknown.
    """
    if frames.kind == "image":
        return 0.0
    if not frames.frames_per_s:
        raise ValueError("frames_per_s: expected the rate of the chosen frames, got none; read them with read_media")
    return frames.preprocessor.temporal_patch_size / frames.frames_per_s


def _deepstack_layers(config: Qwen2_5_VLConfig) -> int:
    return 0


def _vision_layers(encoded: Any) -> list[list[torch.Tensor]]:
    return [list(encoded.pooler_output)]


def _deepstack_inputs(language_model: nn.Module, places: torch.Tensor, layers: list[torch.Tensor]) -> dict[str, Any]:
    return {}


def _tower_inputs(config: PreTrainedConfig, grids: torch.Tensor) -> dict[str, Any]:
    merge = config.spatial_merge_size
    index, windows = get_vision_window_index(
        grids, spatial_merge_size=merge, window_size=config.window_size, patch_size=config.patch_size
    )
    return {
        "position_ids": get_vision_position_ids(grids, merge),
        "cu_seqlens": get_vision_cu_seqlens(grids),
        "max_seqlen": int((grids[:, 1] * grids[:, 2]).max()),
        "window_index": index,
        "cu_window_seqlens": windows,
        "max_window_seqlen": int(windows.diff().max()),
    }


def _processor_files(preprocessor: Preprocessor) -> dict[str, dict[str, Any]]:
    # The original models have these budgets for images and for each frame of a video.
    common = {
        **processor_settings(preprocessor),
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    image = {**common, "image_processor_type": "Qwen2VLImageProcessorFast"}
    # All frames of a video share a budget. transformers before 5.16 ignores the setting and does not limit them.
    video = {**common, "video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": True}
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    title="Qwen2.5-VL",
    example="Qwen/Qwen2.5-VL-7B-Instruct",
    config_class=Qwen2_5_VLConfig,
    model_class=Qwen2_5_VLForConditionalGeneration,
    preprocessing="qwen2_vl",
    flat_text_config=True,
    time_stamps=False,
    pixel_boxes=True,
    media_text=media_text,
    position_ids=position_ids,
    deepstack_layers=_deepstack_layers,
    vision_layers=_vision_layers,
    deepstack_inputs=_deepstack_inputs,
    tower_inputs=_tower_inputs,
    liger=LigerLayers(
        norm=modeling.Qwen2_5_VLRMSNorm,
        mlp=modeling.Qwen2MLP,
        rotations={
            modeling.Qwen2_5_VLAttention: ("apply_rotary_pos_emb", "liger_rotary_pos_emb"),
            modeling.Qwen2_5_VLVisionAttention: ("apply_rotary_pos_emb_vision", "liger_rotary_pos_emb_vision"),
        },
    ),
    processor_files=_processor_files,
    card=_CARD,
)
