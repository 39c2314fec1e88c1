"""The student: a model of the Qwen3-VL family with its tokenizer and preprocessor; forward passes on padded rows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from rmsd_fast.config import ModelError, NotInstalled
from rmsd_fast.data.prompts import END_TOKEN, IMAGE_PAD, VIDEO_PAD, Prompt
from rmsd_fast.data.video import Preprocessor, load_preprocessor, video_patches
from rmsd_fast.models.folders import check_family, first_line, load_tokenizer, resolve_folder, write_preprocessor
from rmsd_fast.models.liger import apply_liger

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Student:
    """A loaded student. `model` is a transformers Qwen3VLForConditionalGeneration."""

    model: Qwen3VLForConditionalGeneration
    tokenizer: Any
    preprocessor: Preprocessor

    @property
    def eos_id(self) -> int:
        """Id of `<|im_end|>`, which ends every response."""
        return self.tokenizer.convert_tokens_to_ids(END_TOKEN)

    @property
    def pad_id(self) -> int:
        """Id used for padding."""
        return self.tokenizer.pad_token_id


@dataclass
class MediaFeatures:
    """Vision features of a list of prompts, one vision call for all.

    Fields:
        pooled: one tensor [tokens, D] per medium, in the order of the prompts and of the media in each.
        deepstack: per deepstack layer, the same list.
        kinds: "video" or "image" per medium.
        counts: media of each prompt.
    """

    pooled: list[torch.Tensor]
    deepstack: list[list[torch.Tensor]]
    kinds: list[str]
    counts: list[int]

    def detach(self) -> MediaFeatures:
        """The same features without their graph."""
        pooled = [feature.detach() for feature in self.pooled]
        deepstack = [[feature.detach() for feature in layer] for layer in self.deepstack]
        return MediaFeatures(pooled, deepstack, self.kinds, self.counts)

    def select(self, prompts: Iterable[int]) -> MediaFeatures:
        """Features of some of the prompts, in the order given."""
        prompts = list(prompts)
        media = [medium for prompt in prompts for medium in self.media_of(prompt)]
        return MediaFeatures(
            [self.pooled[medium] for medium in media],
            [[layer[medium] for medium in media] for layer in self.deepstack],
            [self.kinds[medium] for medium in media],
            [self.counts[prompt] for prompt in prompts],
        )

    def media_of(self, prompt: int) -> range:
        """Indices of a prompt's media in `pooled`."""
        start = sum(self.counts[:prompt])
        return range(start, start + self.counts[prompt])


@dataclass
class RowBatch:
    """Rows `[prompt | response | padding]`, B rows padded on the right to L tokens.

    Fields:
        input_ids, attention_mask: int64 [B, L].
        position_ids: int64 [3, B, L]; 0 on padding.
        response_mask: bool [B, L], true on response tokens.
        prompt_index: int64 [B], which prompt of the list a row belongs to; stays on the CPU, where it is read.
        prompt_lengths, response_lengths: int64 [B].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    response_mask: torch.Tensor
    prompt_index: torch.Tensor
    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor

    def to(self, device: torch.device | str) -> RowBatch:
        """The same rows on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if name != "prompt_index"}
        return RowBatch(**moved, prompt_index=self.prompt_index)


def load_student(path: str | Path, *, dtype: str, attn_implementation: str = "sdpa", liger: bool = False) -> Student:
    """Load a student with its tokenizer and preprocessor.

    Args:
        path: local directory, or name of a model on the hub.
        dtype: "float32" or "bfloat16".
        attn_implementation: attention of transformers: "sdpa", "eager" or "flash_attention_2".
        liger: with Liger's RMSNorm, RoPE and SwiGLU, for CUDA.
    Raises:
        ValueError: no such model, a model of another family, or a folder that lacks something; says what to do.
        NotInstalled: the attention implementation, or liger-kernel, is not installed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: expected one of {sorted(DTYPES)}, got {dtype!r}")
    folder = resolve_folder(path)
    check_family(folder)
    preprocessor = load_preprocessor(folder)
    tokenizer = load_tokenizer(folder)
    try:
        model, info = Qwen3VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise NotInstalled(
            f"model.attention={attn_implementation!r} is not available here ({error}); use model.attention=sdpa"
        ) from error
    # safetensors reports damaged files with an exception type of its own, derived from Exception alone.
    except Exception as error:
        raise ModelError(
            f"{folder}: the weights cannot be loaded ({first_line(error)}); "
            "expected *.safetensors that fit config.json: fetch or export the model again"
        ) from error
    if info["missing_keys"] or info.get("mismatched_keys"):
        names = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))
        raise ModelError(
            f"{folder}: {len(names)} weights are missing or of another shape, the first is {names[0]}; "
            "fetch or export the model again"
        )
    student = Student(model, tokenizer, preprocessor)
    _check_agreement(student, folder)
    if liger:
        apply_liger(model)
    return student


def freeze(model: Qwen3VLForConditionalGeneration, *, train_vision: bool) -> None:
    """Train the language model, and vision tower, merger and deepstack mergers only if asked."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(train_vision)


def encode_media(model: Qwen3VLForConditionalGeneration, prompts: list[Prompt]) -> MediaFeatures:
    """Vision features of all media of the prompts, in one call of the vision tower.

    The features carry a graph where the vision tower is trainable.
    """
    media = [frames for prompt in prompts for frames in prompt.media]
    counts = [len(prompt.media) for prompt in prompts]
    if not media:
        layers = len(model.config.vision_config.deepstack_visual_indexes)
        return MediaFeatures([], [[] for _ in range(layers)], [], counts)
    visual = model.model.visual
    # Pixels stay uint8 until they are on the device: a quarter of the bytes.
    patches = [
        video_patches(frames.pixels.to(visual.device), frames.preprocessor, dtype=visual.dtype) for frames in media
    ]
    grid_thw = torch.tensor([frames.grid_thw for frames in media], device=visual.device)
    # Images and videos take the same way through the tower, so one call serves both.
    output = model.model.get_image_features(torch.cat(patches), grid_thw, return_dict=True)
    deepstack = [list(layer) for layer in output.deepstack_features]
    return MediaFeatures(list(output.pooler_output), deepstack, [frames.kind for frames in media], counts)


def make_rows(
    prompts: list[Prompt], responses: list[torch.Tensor], prompt_index: list[int], *, pad_id: int
) -> RowBatch:
    """Pad `[prompt | response]` rows on the right.

    Args:
        prompts: prompts of the batch.
        responses: int64 [R_b] for each row, the end token included where there is one; may be empty.
        prompt_index: for each row, its prompt in `prompts`.
        pad_id: id written on padding.
    Raises:
        ValueError: lists of different length, or no rows.
    """
    if len(responses) != len(prompt_index) or not responses:
        raise ValueError(
            f"expected as many responses as prompt indices, at least one, got {len(responses)} and {len(prompt_index)}"
        )
    rows = len(responses)
    prompt_lengths = torch.tensor([len(prompts[index].input_ids) for index in prompt_index])
    response_lengths = torch.tensor([len(response) for response in responses])
    length = int((prompt_lengths + response_lengths).max())
    input_ids = torch.full((rows, length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(rows, length, dtype=torch.int64)
    position_ids = torch.zeros(3, rows, length, dtype=torch.int64)
    response_mask = torch.zeros(rows, length, dtype=torch.bool)
    for row, (response, index) in enumerate(zip(responses, prompt_index, strict=True)):
        prompt = prompts[index]
        start = len(prompt.input_ids)
        end = start + len(response)
        input_ids[row, :start] = prompt.input_ids
        input_ids[row, start:end] = response
        attention_mask[row, :end] = 1
        position_ids[:, row, :start] = prompt.position_ids
        position_ids[:, row, start:end] = prompt.next_position + torch.arange(len(response))
        response_mask[row, start:end] = True
    return RowBatch(
        input_ids,
        attention_mask,
        position_ids,
        response_mask,
        torch.tensor(prompt_index),
        prompt_lengths,
        response_lengths,
    )


def gather_features(
    features: MediaFeatures, prompt_index: list[int]
) -> dict[str, BaseModelOutputWithDeepstackFeatures] | None:
    """Features of each row's prompt, in row order, as the model's `mm_encoder_outputs`; None without media."""
    order = [medium for index in prompt_index for medium in features.media_of(index)]
    outputs = {}
    for kind in ("image", "video"):
        chosen = [medium for medium in order if features.kinds[medium] == kind]
        if chosen:
            outputs[kind] = BaseModelOutputWithDeepstackFeatures(
                pooler_output=[features.pooled[medium] for medium in chosen],
                deepstack_features=[[layer[medium] for medium in chosen] for layer in features.deepstack],
            )
    return outputs or None


def forward_hidden(model: Qwen3VLForConditionalGeneration, rows: RowBatch, features: MediaFeatures) -> torch.Tensor:
    """Hidden states after the final norm, [B, L, D]; those on padding mean nothing.

    A prompt used in several rows brings its features along without a second vision call; gradients flow into them.
    """
    output = model.model(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
        mm_encoder_outputs=gather_features(features, rows.prompt_index.tolist()),
        use_cache=False,
    )
    return output.last_hidden_state


def export_student(student: Student, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write a folder that plain transformers loads: safetensors, config, tokenizer, chat template, preprocessor.

    The folder appears complete or not at all; an earlier export in its place is replaced.

    Args:
        student: what to write.
        folder: where.
        state_dict: weights to write in place of the model's own, e.g. gathered from a sharded engine.
    Raises:
        ValueError: the folder holds something that is no export of a student.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").is_file())):
        raise ValueError(f"{folder}: expected no folder or an earlier export, found other files; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.parent / f"{folder.name}.tmp{os.getpid()}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        student.model.save_pretrained(staged, state_dict=state_dict)
        student.tokenizer.save_pretrained(staged)
        write_preprocessor(student.preprocessor, staged)
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_agreement(student: Student, folder: Path) -> None:
    """Raise ValueError where the files of a folder come from different models."""
    config, preprocessor, tokenizer = student.model.config, student.preprocessor, student.tokenizer
    vision = config.vision_config
    sizes = (preprocessor.patch_size, preprocessor.temporal_patch_size, preprocessor.merge_size)
    ids = tuple(tokenizer.convert_tokens_to_ids([IMAGE_PAD, VIDEO_PAD]))
    for what, wanted, found in (
        (
            "patch, temporal patch and merge size",
            (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size),
            sizes,
        ),
        (f"the ids of {IMAGE_PAD} and {VIDEO_PAD}", (config.image_token_id, config.video_token_id), ids),
    ):
        if wanted != found:
            raise ModelError(
                f"{folder}: {what} are {wanted} in config.json and {found} in the preprocessor or tokenizer files; "
                "restore the files of one model"
            )
    if len(tokenizer) > config.text_config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {config.text_config.vocab_size}; "
            "restore the files of one model"
        )
