"""Count the bytes that a pass of a student holds, by running the pass on tensors without data.

The modules of transformers and peft run as in training, under torch's FakeTensorMode, and every tensor that an op
creates is counted while it lives. Nothing is estimated by a formula except what happens inside of single kernels: the
chunks of the fused heads (`rmsd_kernels.heads.chunks`) and the buffers of the attention kernels (`attention_bytes`).
Layers are alike, so a deep decoder is run with a few layers and the counts are continued to its depth, exactly.

Configs are given as `complete_config` returns them.
"""

from __future__ import annotations

import copy
import functools
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmsd_fast.config import ModelConfig
from rmsd_fast.models.adapters import POLICY, add_adapter
from rmsd_fast.models.families import family_of
from rmsd_fast.models.quantize import quantizable_layers
from rmsd_fast.models.shared_prefix import enable_shared_prefix
from rmsd_fast.models.students import DTYPES, MediaFeatures, embed, freeze
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_kernels.heads.chunks import workspace_bytes
from rmsd_kernels.shared_prefix.attention import SharedPrefixPlan

# What the counted bytes are for.
ACTIVATIONS, HEADS, VISION = "activations", "heads", "vision"
_ATTENTION = ("rmsd_kernels::shared_prefix_forward", "rmsd_kernels::shared_prefix_backward")
Counts = dict[str, int]


@dataclass(frozen=True)
class RowShape:
    """The rows of one pass.

    Attributes:
        packing: "shared" or "padded".
        prefixes: tokens of each prompt.
        responses: tokens of each prompt's responses.
        vision: vision tokens of each prompt, all of one video; 0 = no video.
        steps: temporal steps of a video, each of which attends to itself in the tower.
    """

    packing: str
    prefixes: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    vision: tuple[int, ...]
    steps: int = 1

    @property
    def scored(self) -> int:
        """Number of response tokens."""
        return sum(map(sum, self.responses))

    @property
    def segments(self) -> tuple[list[int], list[list[int]]]:
        """Prefixes and responses of the packed row. A single response is part of its prompt's segment."""
        lone = [len(group) == 1 for group in self.responses]
        prefixes = [p + g[0] if one else p for p, g, one in zip(self.prefixes, self.responses, lone, strict=True)]
        return prefixes, [[] if one else list(group) for group, one in zip(self.responses, lone, strict=True)]

    @property
    def rows(self) -> tuple[int, int]:
        """B and L of the input, [B, L]."""
        if self.packing == "shared":
            return 1, sum(self.prefixes) + self.scored
        pairs = zip(self.prefixes, self.responses, strict=True)
        lengths = [prefix + length for prefix, group in pairs for length in group]
        return len(lengths), max(lengths)


@dataclass(frozen=True)
class PassSettings:
    """What decides how a pass runs, besides its rows.

    Attributes:
        device: "cuda" or "cpu", where the pass will run.
        trains: "policy" for a fused loss, "discriminator" for a scalar head, or "" for a pass without gradients.
        train_vision: whether the vision tower is trained, and runs inside of the pass.
        adapted: whether the model has an adapter, if model.adapter says so.
        reference_heads: number of further heads whose logits a chunk of a loss holds, 1 with distill.kl=full or a
            divergence from a teacher.
        losses: number of fused losses of a policy's pass. Each holds its gradients until backward.
        scores: whether a pass without gradients ends with the head.
        masked: whether the attention of padded rows takes a mask; flash_attention_2 does not.
    """

    device: str
    trains: str = ""
    train_vision: bool = False
    adapted: bool = True
    reference_heads: int = 0
    losses: int = 1
    scores: bool = True
    masked: bool = True


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that live, by tag, and keep the counts at the highest total of each phase.

    Args:
        known: tensors that are not counted, such as weights.
        device: "cuda" or "cpu", for the buffers of attention kernels.
        shape: the rows, for the same.
    """

    def __init__(self, known: list[Tensor], device: str, shape: RowShape) -> None:
        super().__init__()
        self.device, self.shape = device, shape
        self.tag, self.phase = ACTIVATIONS, "forward"
        self.live: Counts = {}
        self.peaks: dict[str, Counts] = {}
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        name = func.name().partition(".")[0]
        extra = 0
        if name in _ATTENTION:
            backward = name.endswith("backward")
            q, k = args[1:3] if backward else args[:2]
            extra = attention_bytes(self.device, self.shape, q, k, backward=backward)
        self.meet(extra)
        return result

    def meet(self, extra: int) -> None:
        """Compare the live bytes, and `extra` bytes inside of a kernel, with the peak of the phase."""
        now = self.live | ({self.tag: self.live.get(self.tag, 0) + extra} if extra else {})
        if sum(now.values()) >= sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(now)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        size, tag = storage.nbytes(), self.tag
        self.live[tag] = self.live.get(tag, 0) + size
        weakref.finalize(storage, self._free, tag, size)

    def _free(self, tag: str, size: int) -> None:
        self.live[tag] -= size


def attention_bytes(device: str, shape: RowShape, q: Tensor, k: Tensor, *, backward: bool) -> int:
    """Return the bytes of the buffers inside of shared-prefix attention, besides its inputs and outputs.

    CUDA: backward sums dq in float32, and dk and dv for each query head in the dtype of the inputs. A second call, of
    all responses over the prefixes, has results of its own.
    CPU: adjacent segments of equal length are one call, and the responses of a group over their prefix are one. Each
    has results of its own. In 16 bits, the calls of backward, and those of forward whose results are merged, get
    copies of their inputs in float32, and their results are in float32.

    Args:
        device: "cuda" or "cpu".
        shape: the rows.
        q: queries, [T, H, d].
        k: keys, [T, Hkv, d].
        backward: whether the op is the backward.
    """
    prefixes, responses = shape.segments
    query, key, width = q[0].numel(), k[0].numel(), q.element_size()
    groups = [(sum(group), prefix) for prefix, group in zip(prefixes, responses, strict=True) if group]
    rows, keys = sum(r for r, _ in groups), sum(p for _, p in groups)
    if device == "cuda":
        if not backward:
            return rows * query * width
        # The sums of the first call are freed before the second.
        own = len(q) * (4 * query + 2 * query * width)
        over_prefixes = rows * query * (4 + width) + keys * (2 * query + 2 * key) * width
        return max(own, over_prefixes if groups else 0)
    cast = 4 if width == 2 else 0
    own_prefixes, own_responses = _runs(prefixes), _runs([length for group in responses for length in group])
    if backward:
        calls = [(tokens, tokens) for tokens in (*own_prefixes, *own_responses)] + groups
        # Results dq, dk and dv; copies of d_out, q and out, and of k and v.
        return max(r * query * (4 + 3 * cast) + p * 2 * key * (4 + cast) for r, p in calls)
    plain = max(tokens * query * width for tokens in own_prefixes)
    calls = [(tokens, tokens) for tokens in own_responses] + groups
    merged = [r * query * (4 + cast) + p * 2 * key * cast for r, p in calls]
    return rows * query * cast + max([plain, *merged])


def _runs(lengths: list[int]) -> list[int]:
    """Return the tokens of each run of adjacent equal lengths."""
    return [sum(run) for _, run in groupby(lengths)]


class _Heads(torch.autograd.Function):
    """Stand for a fused loss: gradients are computed in forward and kept until backward."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(*(torch.empty_like(t) if t.requires_grad else None for t in (hidden, weight)))
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors


class _Nf4Product(torch.autograd.Function):
    """Stand for bitsandbytes' product with an nf4 weight, which is dequantized in forward and again in backward."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.weight = weight
        return nn.functional.linear(inputs, _dequantized(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ _dequantized(ctx.weight) if ctx.needs_input_grad[0] else None, None, None


def _dequantized(weight: Tensor) -> Tensor:
    # The float32 scales of its blocks are dequantized before it.
    scales = torch.empty(weight.numel() // 64, dtype=torch.float32)
    whole = torch.empty_like(weight)
    del scales
    return whole


def _multiply_as_nf4(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return _Nf4Product.apply(inputs, layer.weight, layer.bias)


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a config.json in the nested form of transformers, with its defaults.

    Raises:
        ModelError: the family is not supported.
    """
    return json.loads(family_of(config).config_class(**config).to_json_string(use_diff=False))


def count_pass(config: dict, model_config: ModelConfig, shape: RowShape, settings: PassSettings) -> Counts:
    """Return the bytes that a pass adds at its peak to weights and gradients, by what they are for.

    Gradients of parameters are not included, except for one at a time while it is computed.

    Args:
        config: complete config of the model.
        model_config: `model` section of the settings.
        shape: the rows.
        settings: how the pass runs.
    """
    if not settings.train_vision:
        config = _without_tower(config)
    run = functools.partial(_count_with, model_config=model_config, shape=shape, settings=settings)
    return _continued(config, run, first=2 + (_added_layers(config) if settings.train_vision else 0))


def count_prefill(
    config: dict, model_config: ModelConfig, shape: RowShape, device: str, make_cache: Callable[[list[int]], Any]
) -> Counts:
    """Return the bytes that the prefill of prompts adds at its peak, including their K/V.

    Args:
        config: complete config of the model.
        model_config: `model` section of the settings.
        shape: packed prompts without responses.
        device: "cuda" or "cpu".
        make_cache: function that makes the cache of the keys and values of prompts with these lengths.
    """

    def run(small: dict) -> dict[str, Counts]:
        with _made(small, model_config, shape, PassSettings(device)) as (model, live, features):
            with unset_fake_temporarily():
                cache = make_cache(list(shape.prefixes))
            with torch.no_grad(), live:
                hidden = _body(model, shape, features, cache)
                model.lm_head(hidden[0, : len(shape.prefixes)])
            return live.peaks

    return _continued(_without_tower(config), run)


def count_vision(config: dict, model_config: ModelConfig, shape: RowShape, device: str) -> Counts:
    """Return the bytes that a call of the frozen vision tower adds at its peak, including the call's features.

    Args:
        config: complete config of the model.
        model_config: `model` section of the settings.
        shape: prompts whose videos are encoded.
        device: "cuda" or "cpu".
    """
    with _made(_with_layers(config, 1), model_config, shape, PassSettings(device)) as (model, live, _):
        inputs = _vision_inputs(model, shape)
        live.tag = VISION
        with torch.no_grad(), live:
            if len(_videos(shape)) > 1:
                # The patches of each video are copied into one tensor.
                live.meet(2 * inputs[0].nbytes)
            _tower(model, *inputs)
    return max(live.peaks.values(), key=lambda counts: sum(counts.values()))


def _added_layers(config: dict) -> int:
    """Return the number of layers that add features. With a trained tower, each of them also keeps a gradient."""
    family = family_of(config)
    return family.deepstack_layers(family.config_class(**config))


def _continued(config: dict, run: Callable[[dict], dict[str, Counts]], first: int = 2) -> Counts:
    """Return the counts at the highest peak of a model's phases, from models with `first` layers and one more.

    In each phase, the peak grows by the same bytes with each layer. The last layer is the first in backward, and has a
    phase of its own.
    """
    layers = config["text_config"]["num_hidden_layers"]
    if layers <= first + 1:
        phases = run(_with_layers(config, layers))
    else:
        fewer, more = run(_with_layers(config, first)), run(_with_layers(config, first + 1))
        phases = {
            phase: {
                tag: fewer[phase].get(tag, 0) + (layers - first) * (counts.get(tag, 0) - fewer[phase].get(tag, 0))
                for tag in counts
            }
            for phase, counts in more.items()
        }
    return max(phases.values(), key=lambda counts: sum(counts.values()))


def _without_tower(config: dict) -> dict:
    """Return the config with a small tower, for passes that do not run it."""
    return config | {"vision_config": config["vision_config"] | {"depth": 1}}


def _with_layers(config: dict, layers: int) -> dict:
    small = copy.deepcopy(config)
    text = small["text_config"]
    text["num_hidden_layers"] = layers
    if text.get("layer_types"):
        text["layer_types"] = text["layer_types"][:layers]
    return small


@contextmanager
def _made(
    config: dict, model_config: ModelConfig, shape: RowShape, settings: PassSettings
) -> Iterator[tuple[nn.Module, LiveBytes, MediaFeatures | None]]:
    """Yield a model without data in the dtype and with the adapters of the settings, a counter, and vision features."""
    # A flash attention, which may not be installed here, saves the same tensors as sdpa without a mask.
    attention = "eager" if model_config.attention == "eager" else "sdpa"
    family = family_of(config)
    with torch.device("meta"):
        model = family.model_class._from_config(
            family.config_class(**config), dtype=DTYPES[model_config.dtype], attn_implementation=attention
        )
        if model_config.quantize == "nf4":
            for layer in quantizable_layers(model).values():
                layer.forward = functools.partial(_multiply_as_nf4, layer)
        if settings.adapted and model_config.adapter == "lora":
            add_adapter(model, POLICY, model_config, seed=0)
    if shape.packing == "shared":
        enable_shared_prefix(model)
    else:
        # A loop over frames would read their sizes from tensors without data.
        model.set_attn_implementation({"vision_config": vision_implementation(model)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Ops choose their kernels by the device, so weights without data have to be on the CPU and not on "meta".
        _move_to_fake(model)
        freeze(model, train_vision=settings.train_vision)
        if settings.trains:
            model.train()
            if model_config.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
        else:
            model.eval()
        live = LiveBytes([*model.parameters(), *model.buffers()], settings.device, shape)
        model.model.language_model.layers[-1].register_forward_pre_hook(_part_backward(live))
        features = None if settings.train_vision else _features(model, shape)
        yield model, live, features


def _move_to_fake(model: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones on the CPU. Tied parameters stay tied.

    All parameters get the model's dtype, as in DeepSpeed's engines. On the meta device, peft's are float32.
    """
    fakes: dict[int, nn.Parameter] = {}
    dtype = model.dtype
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fake = torch.empty(parameter.shape, dtype=dtype)
                    fakes[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _part_backward(live: LiveBytes) -> Callable:
    """Return a hook for the last layer. The peak of the layers before it grows with depth in another way."""

    def enter(_, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad and live.phase == "forward":
            args[0].register_hook(lambda _: setattr(live, "phase", "backward of other layers"))

    return enter


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _count_with(config: dict, model_config: ModelConfig, shape: RowShape, settings: PassSettings) -> dict[str, Counts]:
    with _made(config, model_config, shape, settings) as (model, live, features):
        inputs = _vision_inputs(model, shape) if features is None and any(shape.vision) else None
        with torch.set_grad_enabled(bool(settings.trains)), live:
            loss = _loss(model, live, shape, settings, features, inputs)
            if settings.trains:
                live.tag, live.phase = ACTIVATIONS, "backward of the last layer"
                loss.backward()
        return live.peaks


def _loss(model, live: LiveBytes, shape: RowShape, settings: PassSettings, features, vision_inputs) -> Tensor | None:
    if vision_inputs is not None:
        live.tag = VISION
        encoded = _tower(model, *vision_inputs)
        encoded.pooler_output = encoded.pooler_output.split(_videos(shape))
        features = _as_features(family_of(model.config).vision_layers(encoded), shape)
        live.tag = ACTIVATIONS
    if features is None:
        features = _features(model, shape)
    plan = None
    if shape.packing == "shared":
        with unset_fake_temporarily():
            plan = SharedPrefixPlan.from_lengths(*shape.segments)
    hidden = _body(model, shape, features, plan, masked=settings.masked)
    live.tag, live.phase = HEADS, "heads"
    flat = hidden.flatten(0, 1)
    if settings.trains == "discriminator":
        last = torch.zeros(sum(map(len, shape.responses)), dtype=torch.int64)
        return (flat[last].float() * torch.ones(flat.shape[1])).sum()
    if not settings.scores:
        return None
    chosen = flat[torch.zeros(shape.scored, dtype=torch.int64)]
    weight = model.lm_head.weight
    needs_weight = bool(settings.trains) and weight.requires_grad
    losses = [_Heads.apply(chosen, weight) for _ in range(settings.losses)] if settings.trains else []
    live.meet(
        workspace_bytes(
            shape.scored,
            weight,
            device=settings.device,
            need_weight=needs_weight,
            buffers=1 + settings.reference_heads,
        )
    )
    return sum(losses[1:], start=losses[0]) if losses else None


def _body(model, shape: RowShape, features: MediaFeatures, plan: Any, *, masked: bool = True) -> Tensor:
    """Return the hidden states of the rows, as `forward_hidden` computes them. A flash attention takes no mask."""
    rows, length = shape.rows
    copies = [len(group) for group in shape.responses] if shape.packing == "padded" else [1] * len(shape.prefixes)
    order = [prompt for prompt, count in enumerate(copies) for _ in range(count)]
    places = torch.zeros(sum(shape.vision[prompt] for prompt in order), dtype=torch.int64)
    inputs = embed(model, torch.zeros(rows, length, dtype=torch.int64), features, order, places)
    positions = torch.zeros(3, rows, length, dtype=torch.int64)
    if plan is not None:
        options = {"shared_prefix": plan}
    elif masked:
        # transformers expands the mask of each row to all pairs of positions.
        options = {"attention_mask": torch.ones(rows, 1, length, length, dtype=torch.bool)}
    else:
        options = {"attention_mask": None}
    language_model = model.model.language_model
    return language_model(position_ids=positions, use_cache=False, **inputs, **options).last_hidden_state


def _features(model, shape: RowShape) -> MediaFeatures:
    """Return features of the prompts' videos, which are counted elsewhere."""
    width = model.config.text_config.hidden_size
    depth = family_of(model.config).deepstack_layers(model.config)
    layers = [[torch.empty(tokens, width, dtype=model.dtype) for tokens in _videos(shape)] for _ in range(1 + depth)]
    return _as_features(layers, shape)


def _as_features(layers: list[list[Tensor]], shape: RowShape) -> MediaFeatures:
    counts = [int(tokens > 0) for tokens in shape.vision]
    return MediaFeatures(layers[0], layers[1:], ["video"] * sum(counts), counts)


def _videos(shape: RowShape) -> list[int]:
    return [tokens for tokens in shape.vision if tokens]


def _vision_inputs(model, shape: RowShape) -> tuple:
    """Return patches and positions of the prompts' videos, as inputs of `_tower`."""
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    # Videos of equal steps, and the rest of a video's tokens as a video of one step.
    grids = []
    for tokens in _videos(shape):
        steps = min(shape.steps, tokens)
        grids += [[steps, merge, merge * (tokens // steps)]]
        grids += [[1, merge, merge * (tokens % steps)]] if tokens % steps else []
    numel = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.empty(sum(t * h * w for t, h, w in grids), numel, dtype=model.dtype)
    # Positions are computed from values, so they need real tensors.
    with unset_fake_temporarily():
        grid = torch.tensor(grids)
        return patches, grid, family_of(model.config).tower_inputs(vision, grid)


def _tower(model, patches: Tensor, grid: Tensor, positions: dict[str, Any]) -> Any:
    return model.model.visual(patches, grid_thw=grid, **positions)
