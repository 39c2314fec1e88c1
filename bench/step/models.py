"""The three models of a step at three sizes, the settings of a run, and most of what the benchmarks use of the trainer.

- SMALL: hidden 256, 4 layers, float32, 3 million parameters; rollouts are generated.
- 4B: the shape of Qwen3-VL-4B in bfloat16 with random weights, made on the device. Ids of special tokens are those of
  the small student's tokenizer; embedding and head keep all their 151,936 rows. Rollouts are given.
- TOY: the structure of 4B at a toy size, for rehearsals.

Policy, reference and discriminator start with the same weights. Learning rates are 0, so all steps meet them.

Memory of 4B in GB, counted: weights 26.6 for the three models, gradients 8.0 each for policy and discriminator, 3.94 MB
per token that a forward keeps for its backward, or 0.18 with recomputed layers. (8192, 512) with K=4 and N=8 peaks at
about 84, which an H200 holds and an H100 does not. Two full optimizers would add 129, which neither holds.
"""

from __future__ import annotations

import copy
import functools
import gc
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from bench.prefix.groups import HIDDEN, LAYERS, TEXTS, make_prompt, make_texts, student_folder
from rmsd_fast.config import RunConfig
from rmsd_fast.data.chat_template import END_TOKEN, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.made.student import build_tokenizer
from rmsd_fast.models.liger import apply_liger, use_liger
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix
from rmsd_fast.models.students import DTYPES, Student
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.setting_rules.uses import uses_discriminator
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.build import load, make_discriminator, make_engine, make_policy, make_reference, prepare
from rmsd_fast.stages.state import StageState
from rmsd_fast.teacher.scores import ScoredResponse
from rmsd_fast.teacher.targets import Targets

__all__ = ["World", "start", "stop"]

# Bytes per trained parameter of a full optimizer: float32 master and two moments; gradients added up in float32; and,
# of one engine at a time, AdamW's square root of the second moment.
STATES, GRADIENTS, TEMPORARY = 12, 4, 4
# Share of a device's memory to plan with: the rest is for workspaces, buckets, and gaps that the allocator cannot join.
USABLE = 0.92


@dataclass(frozen=True)
class Sizes:
    """A student: its name, and the entries of config.json that decide shapes (SMALL has a folder instead)."""

    name: str
    text: dict[str, Any] = field(hash=False)
    vision: dict[str, Any] = field(hash=False)


_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True}
_VISION = dict(hidden_act="gelu_pytorch_tanh", patch_size=16, temporal_patch_size=2, spatial_merge_size=2)
SMALL = Sizes("small", {}, {})
# config.json of Qwen/Qwen3-VL-4B-Instruct, but for the ids.
CONFIG_4B = Sizes(
    "Qwen3-VL-4B",
    text=dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, hidden_act="silu")
    | dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, attention_bias=False, rms_norm_eps=1e-6)
    | dict(max_position_embeddings=262144, rope_parameters=_ROPE | {"mrope_section": [24, 20, 20]})
    | dict(initializer_range=0.02),
    vision=_VISION
    | dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560)
    | dict(num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17], initializer_range=0.02),
)
# Grouped heads, interleaved sections, three deepstack layers, more embeddings than tokens. The initializer_range keeps
# the size of what a layer reads, as 0.02 does at a width of 2560.
CONFIG_TOY = Sizes(
    "toy",
    text=CONFIG_4B.text
    | dict(vocab_size=2048, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    | dict(num_key_value_heads=2, head_dim=32, initializer_range=0.09)
    | dict(rope_parameters=_ROPE | {"mrope_section": [6, 5, 5]}),
    vision=CONFIG_4B.vision
    | dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128)
    | dict(deepstack_visual_indexes=[0, 1, 2]),
)


@functools.cache
def _tokenizer():
    return build_tokenizer(TEXTS, 600)


def make_config(sizes: Sizes, layers: int | None = None) -> Qwen3VLConfig:
    """layers: of the decoder, where not all of them."""
    special = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, END_TOKEN)
    image, video, start_id, end, eos = (_tokenizer().convert_tokens_to_ids(token) for token in special)
    # Configs write into what they are given.
    text, vision = copy.deepcopy((sizes.text, sizes.vision))
    text |= {"tie_word_embeddings": True, "eos_token_id": eos}
    return Qwen3VLConfig(
        text_config=text | ({} if layers is None else {"num_hidden_layers": layers}),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start_id,
        vision_end_token_id=end,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )


def make_student(sizes: Sizes, settings: RunConfig, world: World, layers: int | None = None) -> Student:
    """A student on the process's device, always with the same weights."""
    if sizes is SMALL:
        return load(str(student_folder(HIDDEN, LAYERS)), settings, world)
    device = torch.device(world.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            make_config(sizes, layers),
            dtype=DTYPES[settings.model.dtype],
            attn_implementation=settings.model.attention,
        )
    if use_liger(settings.model.liger, device):
        apply_liger(model)
    return prepare(Student(model, _tokenizer(), Preprocessor()), sizes.name, settings, world)


@functools.cache
def settings_of(
    sizes: Sizes, packing: str, prefix: int, response: int, k: int, n: int, *overrides: str, groups: int = 1
) -> RunConfig:
    """The settings of a run of stage 2 with all its parts, nothing recomputed.

    SMALL: no group is split. Others: micro_tokens is what the groups take as one shared row of the discriminator, so
    that padded rows come in several micro-batches.
    """
    room = 512 if sizes is SMALL else 0
    budget = 40 * (prefix + room + response) if sizes is SMALL else groups * (prefix + (k + n) * response)
    changes = [
        f"rollout.n={max(2, n)}",
        f"rollout.max_new_tokens={response}",
        f"data.max_prompt_tokens={prefix + room}",
    ]
    # Given rollouts have the log-probs of no model.
    changes.append("rollout.parity_every=0")
    changes += [f"packing={packing}", f"micro_tokens={budget}"]
    changes += [] if sizes is SMALL else ["model.gradient_checkpointing=false"]
    # Random weights give equal content rewards, so only scores that differ from the start give advantages.
    scored = not any(o.startswith("reward.alpha=") and float(o.partition("=")[2]) == 0 for o in overrides)
    changes += ["discriminator.head=random"] if scored else []
    settings = load_settings("quickstart" if sizes is SMALL else "rmsd_qwen3vl_4b", [*changes, *overrides])
    # A run needs two, because the advantage of a single rollout is 0. Here, N = 1 shows what a rollout costs.
    settings.rollout.n = n
    return settings


class Passes:
    """Forward and backward of one model behind the interface of the trainer's Engine, without an optimizer.

    For devices that two full optimizers do not fit. Gradients add up in 16 bits in `.grad`, as under DeepSpeed's
    ZeRO-0; `step` returns their norm and frees them. Weights stay as they are.
    """

    zero_stage = 0

    def __init__(self, module: nn.Module, *, world: World) -> None:
        self.module, self.world = module, world
        self._norm = torch.zeros((), dtype=torch.float64, device=world.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def full_weights(self, part: torch.nn.Module | None = None) -> nullcontext:
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self.world.size).backward()

    def watched(self) -> dict[str, float | Tensor]:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norms = torch.stack(norms) if norms else torch.zeros(1, device=self.world.device)
        self._norm = torch.linalg.vector_norm(norms).double()
        return {"bad": self._norm.isfinite().logical_not(), "high": 0, "low": 0}

    def step(self) -> Tensor:
        self.discard()
        return self._norm

    def discard(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def close(self) -> None:
        self.discard()


@dataclass(frozen=True)
class Counts:
    """Parameters of a student: all, those of the decoder, which are trained, and those of one of its layers."""

    total: int
    trained: int
    layer: int


@functools.cache
def counts_of(sizes: Sizes) -> Counts:
    with torch.device("meta"):
        if sizes is SMALL:
            config = Qwen3VLConfig.from_pretrained(student_folder(HIDDEN, LAYERS))
        else:
            config = make_config(sizes)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    total, layers = sum(p.numel() for p in model.parameters()), model.model.language_model.layers
    frozen = sum(p.numel() for p in model.model.visual.parameters())
    return Counts(total, total - frozen, sum(p.numel() for p in layers[0].parameters()))


def activation_bytes(sizes: Sizes, tokens: int, *, checkpointing: bool = False) -> int:
    """Bytes that a forward of the decoder keeps for its backward: 16-bit tensors of fused norms, rotation and SwiGLU.

    A layer and token keeps: the residual stream before either norm and the outputs of both (4D), queries and keys
    before and after norm and rotation, values and the attention's output (3 times all heads), gate, up and their
    product (3 times the intermediate size). Without Liger's kernels it is about twice that.
    """
    text = sizes.text
    heads = text["num_attention_heads"] + text["num_key_value_heads"]
    own = 4 * text["hidden_size"] + 3 * heads * text["head_dim"] + 3 * text["intermediate_size"]
    layers = text["num_hidden_layers"]
    return 2 * tokens * (layers * text["hidden_size"] + own if checkpointing else layers * own)


def fits(sizes: Sizes, room: int, tokens: int) -> bool:
    """Whether three models, two full optimizers and a forward over so many tokens have room in so many bytes."""
    if sizes is SMALL:
        return True
    counts = counts_of(sizes)
    optimizers = counts.trained * (2 * (STATES + GRADIENTS) + TEMPORARY)
    return 3 * 2 * counts.total + optimizers + activation_bytes(sizes, tokens) <= USABLE * room


def layers_that_fit(sizes: Sizes, room: int) -> int:
    """Most decoder layers of one model with its full optimizer in so many bytes; 1 at the least."""
    counts, layers = counts_of(sizes), sizes.text["num_hidden_layers"]
    each = 2 + STATES + GRADIENTS + TEMPORARY
    whole = each * counts.trained + 2 * (counts.total - counts.trained)
    missing = max(0.0, whole - USABLE * room)
    return max(1, layers - int(-(-missing // (each * counts.layer))))


def free_bytes(device: torch.device) -> int:
    """Return memory that nothing of this process or another holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().free


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def make_state(
    sizes: Sizes, settings: RunConfig, world: World, *, apart: bool = False, media: MediaReader | None = None
) -> StageState:
    """Policy, reference and, if the rewards need it, discriminator, wired by the trainer's own functions.

    Targets are to be set. apart: without optimizers, as `Passes`.
    """

    def student() -> Student:
        return make_student(sizes, settings, world)

    def engine(module: nn.Module) -> Engine | Passes:
        return Passes(module, world=world) if apart else make_engine(module, settings, world, 0.0)

    own = student()
    policy = engine(make_policy(own, settings, train_vision=False))
    builder = PromptBuilder(own, settings.video, media)
    state = StageState(settings, world, own, builder, {}, PhaseTimer(world.device), policy)
    state.reference = make_reference(student())
    if uses_discriminator(settings):
        state.discriminator = engine(make_discriminator(student(), settings))
    # A rollout that may not end by itself has exactly `max_new_tokens` tokens.
    state.rollouts = HfRollout(builder, prompts_per_batch=settings.rollout.prompts_per_batch, device=world.device)
    banned = state.rollouts.banned_ids
    state.rollouts.banned_ids = torch.cat([banned, banned.new_tensor([builder.eos_id])])
    switch(state, settings.packing, checkpointing=False)
    return state


def switch(state: StageState, packing: str, checkpointing: bool) -> None:
    """Set attention and recomputation of the same three models for a way of stepping."""
    models = [state.student.model, state.reference.model]
    models += [] if state.discriminator is None else [state.discriminator.module.model]
    for model in models:
        if packing == "shared":
            enable_shared_prefix(model)
        else:
            disable_shared_prefix(model)
            # The tower's attention is the same in all ways; what is compared is the sharing.
            frames = vision_implementation(model)
            if frames is not None:
                model.set_attn_implementation({"vision_config": frames})
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def make_prompts(state: StageState, prefix: int, groups: int) -> list[Prompt]:
    """Prompts with a video each; on CUDA in pinned memory, where the media reader puts them."""
    prompts = [make_prompt(state.builder, prefix, number) for number in range(groups)]
    if state.world.device.type != "cuda":
        return prompts
    media = [tuple(replace(one, pixels=one.pixels.pin_memory()) for one in p.media) for p in prompts]
    return [replace(p, media=own) for p, own in zip(prompts, media, strict=True)]


def set_teacher(state: StageState, prompts: list[Prompt], response: int, k: int) -> None:
    """Give each prompt K responses of quality 1, where the step looks for them."""
    for number, prompt in enumerate(prompts):
        texts = make_texts(state.builder, k, response, seed=100 + number)
        answers = tuple(ScoredResponse(index, text, True, 1.0) for index, text in enumerate(texts))
        ones = torch.ones(k)
        state.targets[prompt.question.id] = Targets(answers, ones, ones / k, ones, (True,) * k, (0,), (0,))
