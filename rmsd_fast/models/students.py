"""The student: a model of the Qwen3-VL family with its tokenizer and preprocessor; its forward passes on rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from rmsd_fast.config import ModelError, NotInstalled, first_line
from rmsd_fast.data.chat_template import END_TOKEN
from rmsd_fast.data.media_cache import ByteLru, held_bytes
from rmsd_fast.data.packing import Rows
from rmsd_fast.data.preprocess import Preprocessor, video_patches
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.video import Frames
from rmsd_fast.models.folders import open_folder, resolve_folder
from rmsd_fast.models.liger import apply_liger
from rmsd_fast.models.shared_prefix import is_shared_prefix, run_shared_prefix

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
    files = open_folder(folder)
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
    if liger:
        apply_liger(model)
    return Student(model, files.tokenizer, files.preprocessor)


def freeze(model: Qwen3VLForConditionalGeneration, *, train_vision: bool) -> None:
    """Train the language model, and vision tower, merger and deepstack mergers only if asked."""
    model.requires_grad_(True)
    model.model.visual.requires_grad_(train_vision)


def encode_media(
    model: Qwen3VLForConditionalGeneration,
    prompts: list[Prompt],
    *,
    distinct: bool = True,
    tokens_per_call: int | None = None,
    cache: ByteLru[list[torch.Tensor]] | None = None,
) -> MediaFeatures:
    """Vision features of all media of the prompts, in one call of the vision tower.

    The features carry a graph where the vision tower is trainable. distinct=False encodes equal media as often as they
    come, as trainers do that know samples and no groups; for comparison. tokens_per_call: several calls of the tower,
    each of at most so many tokens or one medium; not within an engine's forward, where ranks must make equally many.
    cache: features by `Frames.key`, in host memory, for a tower that does not change. Each medium then has a call of
    its own, so that its features do not depend on which others were found.

    Raises:
        RuntimeError: the tower gave another number of features than a prompt has places for.
    """
    media = [frames for prompt in prompts for frames in prompt.media]
    counts = [len(prompt.media) for prompt in prompts]
    if not media:
        layers = len(model.config.vision_config.deepstack_visual_indexes)
        return MediaFeatures([], [[] for _ in range(layers)], [], counts)
    kinds = [frames.kind for frames in media]
    media, index_of = _distinct_media(media) if distinct else (media, range(len(media)))
    if cache is None:
        layers = _encode(model, media, tokens_per_call)
    else:
        each = [_encode_cached(model, frames, cache) for frames in media]
        layers = [[of_medium[layer] for of_medium in each] for layer in range(len(each[0]))]
    layers = [[layer[index] for index in index_of] for layer in layers]
    for features in layers:
        _check_places(prompts, features)
    return MediaFeatures(layers[0], layers[1:], kinds, counts)


def _encode(
    model: Qwen3VLForConditionalGeneration, media: list[Frames], tokens_per_call: int | None
) -> list[list[torch.Tensor]]:
    """Pooled features of each medium, then those of each deepstack layer."""
    layers: list[list[torch.Tensor]] = [[] for _ in range(1 + len(model.config.vision_config.deepstack_visual_indexes))]
    for part in _parts_of(media, tokens_per_call):
        encoded = _run_tower(model, part)
        layers[0] += encoded.pooler_output
        sizes = [len(pooled) for pooled in encoded.pooler_output]
        for layer, features in zip(layers[1:], encoded.deepstack_features, strict=True):
            # Until transformers 5.17 the tower's own tensors came through, of all media together.
            layer += features.split(sizes) if isinstance(features, torch.Tensor) else features
    return layers


def _encode_cached(
    model: Qwen3VLForConditionalGeneration, frames: Frames, cache: ByteLru[list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Features of one medium, layer by layer; kept in host memory, pinned where the model is on a GPU."""
    device = model.model.visual.device
    cached = cache.get(frames.key) if frames.key else None
    if cached is not None:
        return [features.to(device, non_blocking=True) for features in cached]
    layers = [features for (features,) in _encode(model, [frames], None)]
    if frames.key:
        kept = [features.detach().cpu() for features in layers]
        kept = [features.pin_memory() if device.type == "cuda" else features for features in kept]
        cache.put(frames.key, kept, sum(map(held_bytes, kept)))
    return layers


def _run_tower(model: Qwen3VLForConditionalGeneration, media: list[Frames]):
    visual = model.model.visual
    # Pixels stay uint8 until they are on the device: a quarter of the bytes. Pinned ones are copied without waiting.
    patches = []
    for frames in media:
        pixels = frames.pixels.to(visual.device, non_blocking=True)
        if pixels.is_cuda:
            # Frames from NVDEC were allocated on the decoder's stream.
            pixels.record_stream(torch.cuda.current_stream(pixels.device))
        patches.append(video_patches(pixels, frames.preprocessor, dtype=visual.dtype))
    grid_thw = torch.tensor([frames.grid_thw for frames in media], device=visual.device)
    # Images and videos take the same way through the tower, so one call serves both.
    return model.model.get_image_features(torch.cat(patches), grid_thw, return_dict=True)


def _parts_of(media: list[Frames], most_tokens: int | None) -> list[list[Frames]]:
    """The media in order, in parts of at most so many vision tokens, or of one medium."""
    parts: list[list[Frames]] = []
    tokens = 0
    for frames in media:
        size = math.prod(frames.grid_thw) // frames.preprocessor.merge_size**2
        if not parts or (most_tokens is not None and tokens + size > most_tokens):
            parts.append([])
            tokens = 0
        parts[-1].append(frames)
        tokens += size
    return parts


def _check_places(prompts: list[Prompt], features: list[torch.Tensor]) -> None:
    """Raise RuntimeError where features would be put into other places than their own."""
    lengths = iter([len(feature) for feature in features])
    for prompt in prompts:
        places, encoded = int((prompt.mm_token_type_ids != 0).sum()), sum(next(lengths) for _ in prompt.media)
        if places != encoded:
            raise RuntimeError(
                f"question {prompt.question.id!r}: the vision tower gave {encoded} features for {places} places in the "
                "prompt; the folder's config.json and preprocessor files belong to different models"
            )


def _distinct_media(media: list[Frames]) -> tuple[list[Frames], list[int]]:
    """The media without repetitions, and the index of each in them: several questions are asked of one video."""
    distinct, index_of = [], []
    candidates: dict[tuple, list[int]] = {}
    for frames in media:
        alike = candidates.setdefault(_sample(frames), [])
        index = next((index for index in alike if _same(distinct[index], frames)), None)
        if index is None:
            index = len(distinct)
            distinct.append(frames)
            alike.append(index)
        index_of.append(index)
    return distinct, index_of


def _same(a: Frames, b: Frames) -> bool:
    # A key stands for all that determines the pixels.
    return bool(a.key and a.key == b.key) or torch.equal(a.pixels, b.pixels)


def _sample(frames: Frames) -> tuple:
    """Key or some pixels: media that differ hardly ever agree in them, so whole videos are seldom compared."""
    if frames.key:
        return frames.grid_thw, frames.key
    pixels = frames.pixels.flatten()
    return frames.grid_thw, bytes(pixels[:: max(1, len(pixels) // 997)].tolist())


def embed(
    model: Qwen3VLForConditionalGeneration,
    input_ids: torch.Tensor,
    features: MediaFeatures,
    order: list[int],
    places: torch.Tensor,
) -> dict[str, torch.Tensor | list[torch.Tensor] | None]:
    """Arguments of `model.model.language_model` in place of `input_ids`: embeddings with the features in their places.

    The whole model takes features only since transformers 5.18, and ignores them before; its language model always did.

    Args:
        input_ids: int64 [B, L].
        features: of a list of prompts.
        order: the prompts of that list whose placeholders stand in `input_ids`, from row to row and left to right.
        places: int64 [vision tokens], these placeholders in `input_ids.flatten()`, on its device.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    media = [medium for index in order for medium in features.media_of(index)]
    if not media:
        return {"inputs_embeds": embeddings}
    add_deepstack_by_index(model.model.language_model)
    pooled = torch.cat([features.pooled[medium] for medium in media]).to(embeddings.dtype)
    return {
        "inputs_embeds": embeddings.flatten(0, 1).index_copy(0, places, pooled).view_as(embeddings),
        "visual_pos_masks": places,
        "deepstack_visual_embeds": [torch.cat([layer[medium] for medium in media]) for layer in features.deepstack],
    }


def add_deepstack_by_index(language_model: nn.Module) -> None:
    """Let a language model add deepstack features at an index [vision tokens] in place of a mask [B, L].

    transformers indexes by the mask twice per layer, and each time the host waits for the device to count it. A mask,
    which the whole model of transformers makes, is still understood.

    Raises:
        NotInstalled: a version of transformers that adds them by another method.
    """
    if not hasattr(language_model, "_deepstack_process"):
        raise NotInstalled(
            f"{type(language_model).__name__} of transformers {transformers.__version__} has no _deepstack_process, "
            "which adds the vision tower's deepstack features; install transformers>=5.17,<5.24"
        )
    language_model._deepstack_process = _add_features


def _add_features(hidden: torch.Tensor, places: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, D] of a decoder layer with features [vision tokens, D] added at their places, in place.

    A layer ends with the sum of its residual and its MLP, whose backward does not read it.
    """
    if places.dtype == torch.bool:
        places = places.flatten().nonzero()[:, 0]
    features = features.to(hidden.device, hidden.dtype)
    hidden.view(-1, hidden.shape[-1]).index_add_(0, places.to(hidden.device), features)
    return hidden


def forward_hidden(model: Qwen3VLForConditionalGeneration, rows: Rows, features: MediaFeatures) -> torch.Tensor:
    """Hidden states after the final norm, [B, L, D]; those on padding mean nothing.

    Gradients flow into the features, from every row that carries them.

    Raises:
        RuntimeError: packed rows for a model without shared-prefix attention, or padded rows for one with it.
    """
    if rows.plan is None and is_shared_prefix(model):
        raise RuntimeError("padded rows need the model's own attention; call disable_shared_prefix(model) first")
    inputs = embed(model, rows.input_ids, features, rows.media_order, rows.media_places)
    language_model = model.model.language_model
    if rows.plan is not None:
        return run_shared_prefix(language_model, rows.plan, position_ids=rows.position_ids, **inputs)
    return language_model(
        position_ids=rows.position_ids, attention_mask=rows.attention_mask, use_cache=False, **inputs
    ).last_hidden_state
