"""Load a student (a model of a supported family, tokenizer and preprocessor), and run its forward passes on rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rmsd_fast.config import ModelError, NotInstalled, first_line
from rmsd_fast.data.chat_template import END_TOKEN
from rmsd_fast.data.media_cache import ByteLru, held_bytes
from rmsd_fast.data.packing import Rows
from rmsd_fast.data.preprocess import Preprocessor, video_patches
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.video import Frames
from rmsd_fast.models.adapters import adapted_layers
from rmsd_fast.models.families import Family, family_of
from rmsd_fast.models.folders import open_folder, resolve_folder
from rmsd_fast.models.liger import apply_liger
from rmsd_fast.models.quantize import QuantizedBase
from rmsd_fast.models.shared_prefix import is_shared_prefix, run_shared_prefix

LM_HEAD = "lm_head.weight"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Student:
    """A loaded student.

    Attributes:
        model: model of its family's `model_class`.
        tokenizer: its tokenizer.
        preprocessor: its settings for videos and images.
        base: the model whose quantized weights its backbone has; None if it is not quantized.
    """

    model: PreTrainedModel
    tokenizer: Any
    preprocessor: Preprocessor
    base: QuantizedBase | None = None

    @property
    def family(self) -> Family:
        """The family of the model."""
        return family_of(self.model.config)

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
    """Vision features of a list of prompts.

    Attributes:
        pooled: one tensor [tokens, D] per medium, in the order of the prompts and of the media in each prompt.
        deepstack: the same list for each deepstack layer.
        kinds: "video" or "image" for each medium.
        counts: number of media of each prompt.
        unused: a zero that depends on the tower's weights, if no prompt has media; see `encode_in_pass`.
    """

    pooled: list[torch.Tensor]
    deepstack: list[list[torch.Tensor]]
    kinds: list[str]
    counts: list[int]
    unused: torch.Tensor | None = None

    def detach(self) -> MediaFeatures:
        """Return the same features without their graph."""
        pooled = [feature.detach() for feature in self.pooled]
        deepstack = [[feature.detach() for feature in layer] for layer in self.deepstack]
        return MediaFeatures(pooled, deepstack, self.kinds, self.counts)

    def select(self, prompts: Iterable[int]) -> MediaFeatures:
        """Return the features of the given prompts, in the given order."""
        prompts = list(prompts)
        media = [medium for prompt in prompts for medium in self.media_of(prompt)]
        return MediaFeatures(
            [self.pooled[medium] for medium in media],
            [[layer[medium] for medium in media] for layer in self.deepstack],
            [self.kinds[medium] for medium in media],
            [self.counts[prompt] for prompt in prompts],
        )

    def join(self, other: MediaFeatures) -> MediaFeatures:
        """Return the features of both lists of prompts, those of `other` last."""
        layers = zip(self.deepstack, other.deepstack, strict=True)
        return MediaFeatures(
            self.pooled + other.pooled,
            [first + second for first, second in layers],
            self.kinds + other.kinds,
            self.counts + other.counts,
        )

    def media_of(self, prompt: int) -> range:
        """Return the indices of a prompt's media in `pooled`."""
        start = sum(self.counts[:prompt])
        return range(start, start + self.counts[prompt])


def load_student(
    path: str | Path,
    *,
    dtype: str,
    attn_implementation: str = "sdpa",
    liger: bool = False,
    discriminator: bool = False,
) -> Student:
    """Load a student with its tokenizer and preprocessor.

    Args:
        path: local folder, or name of a model on the Hub.
        dtype: "float32" or "bfloat16".
        attn_implementation: attention of transformers: "sdpa", "eager" or "flash_attention_2".
        liger: whether to use Liger's RMSNorm, RoPE and SwiGLU, which require CUDA.
        discriminator: whether the folder holds a discriminator, whose language-model head may be missing and must not
            be used; see `models.discriminator_folder`.
    Raises:
        ModelError: the model does not exist or is of an unsupported family, or files are missing or damaged.
        NotInstalled: the attention implementation, or liger-kernel, is not installed.
    """
    if dtype not in DTYPES:
        raise ModelError(f"model.dtype: expected one of {sorted(DTYPES)}, got {dtype!r}")
    folder = resolve_folder(path)
    files = open_folder(folder, discriminator=discriminator)
    try:
        model, info = family_of(files.config).model_class.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except ImportError as error:
        raise NotInstalled(
            f"model.attention: {attn_implementation!r} is not available here ({error}); set model.attention=sdpa"
        ) from error
    # The exception type of safetensors is derived from Exception directly.
    except Exception as error:
        raise ModelError(
            f"{folder}: expected *.safetensors that match config.json, but the weights cannot be loaded "
            f"({first_line(error)}); download or export the model again"
        ) from error
    names = sorted(map(str, [*info["missing_keys"], *info.get("mismatched_keys", [])]))
    if discriminator:
        names = [name for name in names if name != LM_HEAD]
    if names:
        raise ModelError(
            f"{folder}: {len(names)} weights are missing or have a different shape (first: {names[0]}); "
            "download or export the model again"
        )
    if liger:
        apply_liger(model)
    return Student(model, files.tokenizer, files.preprocessor)


def freeze(model: PreTrainedModel, *, train_vision: bool) -> None:
    """Make the language model trainable, and the vision tower with its mergers only if train_vision is set.

    Of a model with adapters, only the active adapter is trainable, and `activate` has already chosen it.
    """
    if adapted_layers(model):
        return
    model.requires_grad_(True)
    model.model.visual.requires_grad_(train_vision)


def encode_media(
    model: PreTrainedModel,
    prompts: list[Prompt],
    *,
    distinct: bool = True,
    tokens_per_call: int | None = None,
    cache: ByteLru[list[torch.Tensor]] | None = None,
) -> MediaFeatures:
    """Return the vision features of all media of the prompts, by default from one call of the vision tower.

    The features carry a graph if the vision tower is trainable.

    Args:
        model: the student's model.
        prompts: prompts whose media are encoded.
        distinct: whether to encode equal media only once. False allows comparisons with trainers that process samples
            without groups.
        tokens_per_call: if set, split the media over several calls, each of at most this many vision tokens or one
            image or temporal patch. Long videos are split between temporal patches, which do not attend to each other.
            Do not set it inside an engine's forward, where all ranks must make the same number of calls.
        cache: features by `Frames.key` in host memory, for a tower that does not change. Each medium is then encoded in
            calls of its own, so that its features do not depend on which other media were cached.
    Raises:
        RuntimeError: the number of features of a prompt differs from its number of placeholders.
    """
    media = [frames for prompt in prompts for frames in prompt.media]
    counts = [len(prompt.media) for prompt in prompts]
    if not media:
        layers = family_of(model.config).deepstack_layers(model.config)
        return MediaFeatures([], [[] for _ in range(layers)], [], counts)
    kinds = [frames.kind for frames in media]
    media, index_of = _distinct_media(media) if distinct else (media, range(len(media)))
    if cache is None:
        layers = _encode(model, media, tokens_per_call)
    else:
        encoded_media = [_encode_cached(model, frames, cache, tokens_per_call) for frames in media]
        layers = [[of_medium[layer] for of_medium in encoded_media] for layer in range(len(encoded_media[0]))]
    layers = [[layer[index] for index in index_of] for layer in layers]
    for features in layers:
        _check_places(prompts, features)
    return MediaFeatures(layers[0], layers[1:], kinds, counts)


def encode_in_pass(model: PreTrainedModel, prompts: list[Prompt]) -> MediaFeatures:
    """Call `encode_media` inside an engine's forward, where the tower must run on every process.

    If no prompt has media, the tower encodes a blank image whose features are multiplied by zero. Otherwise, a process
    with questions about text alone would miss the collectives of the others, for gradients or, under ZeRO-3, weights.
    """
    features = encode_media(model, prompts)
    if features.kinds:
        return features
    vision = model.config.vision_config
    preprocessor = Preprocessor(vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
    side = preprocessor.factor
    pixels = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    blank = Frames(pixels, (), preprocessor.grid(1, side, side), "image", preprocessor)
    features.unused = 0.0 * sum(layer.sum() for (layer,) in _encode(model, [blank], None))
    return features


def _encode(model: PreTrainedModel, media: list[Frames], tokens_per_call: int | None) -> list[list[torch.Tensor]]:
    """Return the pooled features of each medium, followed by the features of each deepstack layer.

    The features of several calls are copied into one tensor per layer, call by call, so that no more than one call's
    features exist twice.
    """
    calls = _calls_of(media, tokens_per_call)
    if len(calls) == 1:
        return family_of(model.config).vision_layers(_run_tower(model, calls[0]))
    sizes = list(map(_tokens_of, media))
    joined: list[torch.Tensor] = []
    begin = 0
    for call in calls:
        joined = _encode_into(joined, model, call, begin, sum(sizes))
        begin += sum(map(_tokens_of, call))
    return [list(layer.split(sizes)) for layer in joined]


def _encode_into(
    joined: list[torch.Tensor], model: PreTrainedModel, call: list[Frames], begin: int, total: int
) -> list[torch.Tensor]:
    """Write the features of a call to `joined`, [total, D] per layer, from row `begin`, and return `joined`.

    The first call finds an empty list, and allocates the tensors.
    """
    layers = family_of(model.config).vision_layers(_run_tower(model, call))
    joined = joined or [features.new_empty(total, features.shape[1]) for features, *_ in layers]
    for layer, of_call in zip(joined, layers, strict=True):
        start = begin
        for features in of_call:
            layer[start : start + len(features)] = features
            start += len(features)
    return joined


def _encode_cached(
    model: PreTrainedModel, frames: Frames, cache: ByteLru[list[torch.Tensor]], tokens_per_call: int | None
) -> list[torch.Tensor]:
    """Return the features of one medium, layer by layer, cached in host memory (pinned if the model is on a GPU)."""
    device = model.model.visual.device
    cached = cache.get(frames.key) if frames.key else None
    if cached is not None:
        return [features.to(device, non_blocking=True) for features in cached]
    layers = [features for (features,) in _encode(model, [frames], tokens_per_call)]
    if frames.key:
        kept = [features.detach().cpu() for features in layers]
        kept = [features.pin_memory() if device.type == "cuda" else features for features in kept]
        cache.put(frames.key, kept, sum(map(held_bytes, kept)))
    return layers


def _run_tower(model: PreTrainedModel, media: list[Frames]):
    visual = model.model.visual
    grid_thw = torch.tensor([frames.grid_thw for frames in media], device=visual.device)
    # The tower processes images and videos in the same way, so one call handles both.
    return model.model.get_image_features(_patches_of(media, visual), grid_thw, return_dict=True)


def _patches_of(media: list[Frames], visual: torch.nn.Module) -> torch.Tensor:
    """Return the patches of media in one tensor. Those of each medium are freed before the tower runs."""
    patches = []
    for frames in media:
        # Pixels stay uint8 until they are on the device, which takes a quarter of the bytes. Pinned pixels are copied
        # asynchronously.
        pixels = frames.pixels.to(visual.device, non_blocking=True)
        if pixels.is_cuda:
            # Frames from NVDEC were allocated on the decoder's stream.
            pixels.record_stream(torch.cuda.current_stream(pixels.device))
        patches.append(video_patches(pixels, frames.preprocessor, dtype=visual.dtype))
    return torch.cat(patches) if len(patches) > 1 else patches[0]


def _tokens_of(frames: Frames) -> int:
    return math.prod(frames.grid_thw) // frames.preprocessor.merge_size**2


def _calls_of(media: list[Frames], most_tokens: int | None) -> list[list[Frames]]:
    """Return what each call of the tower encodes, in order: media, or parts of videos."""
    calls: list[list[Frames]] = []
    tokens = 0
    for piece in (piece for frames in media for piece in _split(frames, most_tokens)):
        size = _tokens_of(piece)
        if not calls or (most_tokens is not None and tokens + size > most_tokens):
            calls.append([])
            tokens = 0
        calls[-1].append(piece)
        tokens += size
    return calls


def _split(frames: Frames, most_tokens: int | None) -> list[Frames]:
    """Split a medium between temporal patches, into pieces of at most `most_tokens` vision tokens or one such patch."""
    steps, height, width = frames.grid_thw
    of_step = height * width // frames.preprocessor.merge_size**2
    if most_tokens is None or steps * of_step <= most_tokens:
        return [frames]
    count, span = max(1, most_tokens // of_step), frames.preprocessor.temporal_patch_size
    return [
        replace(
            frames,
            # The key is that of the whole video.
            key="",
            pixels=frames.pixels[start * span : (start + count) * span],
            timestamps_s=frames.timestamps_s[start * span : (start + count) * span],
            grid_thw=(min(count, steps - start), height, width),
        )
        for start in range(0, steps, count)
    ]


def _check_places(prompts: list[Prompt], features: list[torch.Tensor]) -> None:
    """Raise RuntimeError if the number of features of a prompt differs from its number of placeholders."""
    lengths = iter([len(feature) for feature in features])
    for prompt in prompts:
        places, encoded = int((prompt.mm_token_type_ids != 0).sum()), sum(next(lengths) for _ in prompt.media)
        if places != encoded:
            raise RuntimeError(
                f"question {prompt.question.id!r}: expected {places} features for the placeholders of the prompt, got "
                f"{encoded} from the vision tower; restore config.json and preprocessor files of one model"
            )


def _distinct_media(media: list[Frames]) -> tuple[list[Frames], list[int]]:
    """Return the distinct media and the index of each medium in them. Several questions often share a video."""
    distinct, index_of = [], []
    candidates: dict[tuple, list[int]] = {}
    for frames in media:
        same_sample = candidates.setdefault(_sample(frames), [])
        index = next((index for index in same_sample if _same(distinct[index], frames)), None)
        if index is None:
            index = len(distinct)
            distinct.append(frames)
            same_sample.append(index)
        index_of.append(index)
    return distinct, index_of


def _same(a: Frames, b: Frames) -> bool:
    # A key identifies everything that determines the pixels.
    return bool(a.key and a.key == b.key) or torch.equal(a.pixels, b.pixels)


def _sample(frames: Frames) -> tuple:
    """Return a key or a sample of the pixels. Samples of different media are rarely equal, so few videos are
    compared."""
    if frames.key:
        return frames.grid_thw, frames.key
    pixels = frames.pixels.flatten()
    return frames.grid_thw, bytes(pixels[:: max(1, len(pixels) // 997)].tolist())


def embed(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    features: MediaFeatures,
    order: list[int],
    places: torch.Tensor,
) -> dict[str, torch.Tensor | list[torch.Tensor] | None]:
    """Return arguments for `model.model.language_model` instead of `input_ids`: embeddings that include the features.

    The whole model accepts features only since transformers 5.18 and ignores them before. Its language model has always
    accepted them.

    Args:
        model: the student's model.
        input_ids: token ids with placeholders, int64 [B, L].
        features: vision features of a list of prompts.
        order: indices of the prompts whose placeholders are in `input_ids`, row by row and from left to right.
        places: positions of these placeholders in `input_ids.flatten()`, int64 [vision tokens], on its device.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    media = [medium for index in order for medium in features.media_of(index)]
    if not media:
        return {"inputs_embeds": embeddings if features.unused is None else embeddings + features.unused}
    pooled = torch.cat([features.pooled[medium] for medium in media]).to(embeddings.dtype)
    deepstack = [torch.cat([layer[medium] for medium in media]) for layer in features.deepstack]
    return {
        "inputs_embeds": embeddings.flatten(0, 1).index_copy(0, places, pooled).view_as(embeddings),
        **family_of(model.config).deepstack_inputs(model.model.language_model, places, deepstack),
    }


def forward_hidden(model: PreTrainedModel, rows: Rows, features: MediaFeatures) -> torch.Tensor:
    """Return the hidden states after the final norm, [B, L, D]. They are undefined at padding.

    Gradients flow into the features from every row that contains them.

    Raises:
        RuntimeError: the rows are packed but shared-prefix attention is disabled, or the rows are padded but it is
            enabled.
    """
    if rows.plan is None and is_shared_prefix(model):
        raise RuntimeError("padded rows require the model's own attention; call disable_shared_prefix(model) first")
    inputs = embed(model, rows.input_ids, features, rows.media_order, rows.media_places)
    language_model = model.model.language_model
    if rows.plan is not None:
        return run_shared_prefix(language_model, rows.plan, position_ids=rows.position_ids, **inputs)
    return language_model(
        position_ids=rows.position_ids, attention_mask=rows.attention_mask, use_cache=False, **inputs
    ).last_hidden_state
