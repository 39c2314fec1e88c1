"""What the trainer needs to know about a family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames, MediaLayout


@dataclass(frozen=True)
class LigerLayers:
    """The layers of a family for which Liger has kernels.

    Attributes:
        norm: its RMSNorm.
        mlp: its SwiGLU in the decoder.
        rotations: by attention layer, the function of its module that rotates queries and keys, and the name of Liger's
            replacement.
    """

    norm: type[nn.Module]
    mlp: type[nn.Module]
    rotations: Mapping[type[nn.Module], tuple[str, str]]


@dataclass(frozen=True)
class Family:
    """A family of students: how its models are loaded, how they see media, and which files they consist of.

    In each family, `model.model.language_model` is a dense decoder, `model.model.visual` is the vision tower, and the
    special tokens are those of `rmsd_fast.data.chat_template`.

    Attributes:
        model_type: name of the family in config.json.
        title: name of the family in messages.
        example: a model on the Hub, for messages.
        config_class: class of its configurations in transformers.
        model_class: class of its models in transformers.
        preprocessing: the rules of `rmsd_fast.data.preprocess` that choose frames and sizes.
        flat_text_config: whether config.json may have the settings of the language model at its top level.
        time_stamps: whether prompts state the times of a video. If not, the model counts them from the first frame.
        pixel_boxes: whether its models write boxes in pixels of the resized picture unless a prompt asks for 0 to 1000.
        media_text: function (frames or their layout, preprocessor) that returns the text which replaces a medium's pad
            token in a prompt.
        position_ids: function (model, ids [P], types [P], media) that returns the positions of a prompt, int64 [3, P]:
            time, height, width. The types are 0 for text, 1 for an image, 2 for a video.
        deepstack_layers: function (config) that returns the number of decoder layers with vision features of their own.
        vision_layers: function (output of `get_image_features`) that returns the features by medium: those of the
            embeddings, followed by those of each deepstack layer.
        deepstack_inputs: function (language model, places [vision tokens], features by deepstack layer) that returns
            the arguments with which the language model adds these features.
        tower_inputs: function (config of the tower, grids [media, 3]) that returns the arguments which the tower would
            compute from the values of the grids. With them, the tower runs on tensors without data.
        liger: its layers with kernels in Liger.
        processor_files: function (preprocessor) that returns the content of the processor's files by name.
        card: what a model card says about versions of other software.
    """

    model_type: str
    title: str
    example: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    preprocessing: str
    flat_text_config: bool
    time_stamps: bool
    pixel_boxes: bool
    media_text: Callable[[Frames | MediaLayout, Preprocessor], str]
    position_ids: Callable[[PreTrainedModel, torch.Tensor, torch.Tensor, Sequence[Frames]], torch.Tensor]
    deepstack_layers: Callable[[PreTrainedConfig], int]
    vision_layers: Callable[[Any], list[list[torch.Tensor]]]
    deepstack_inputs: Callable[[nn.Module, torch.Tensor, list[torch.Tensor]], dict[str, Any]]
    tower_inputs: Callable[[PreTrainedConfig, torch.Tensor], dict[str, Any]]
    liger: LigerLayers
    processor_files: Callable[[Preprocessor], dict[str, dict[str, Any]]]
    card: str


def processor_settings(preprocessor: Preprocessor) -> dict[str, Any]:
    """Return the settings that the files of all processors have in common."""
    return {
        "patch_size": preprocessor.patch_size,
        "temporal_patch_size": preprocessor.temporal_patch_size,
        "merge_size": preprocessor.merge_size,
        "image_mean": list(preprocessor.image_mean),
        "image_std": list(preprocessor.image_std),
    }
