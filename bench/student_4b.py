"""Policy, reference and discriminator of the shape of Qwen3-VL-4B with random weights, made on the device.

Nothing is read from disk: a model is made in its dtype on its device, within a second or two on a GPU. Ids of special
tokens are those of the tiny student's tokenizer, whose 600 tokens at most are the only ids that occur; embedding and
head keep all their 151,936 rows, so that their GEMMs, gradients and optimiser states have their real size. The three
start with the same weights, as in stage 2.

Memory, counted: 4.02e9 parameters of the decoder are trained, 0.42e9 of the vision tower are not. In GB, bf16:

- weights 26.6 for the three; gradients 8.0 each for policy and discriminator, both held until both step;
- what a forward keeps for its backward, with Liger's kernels: `activation_bytes`, 3.94 MB per token. K=4, N=8: in the
  discriminator and the policy 55.4 and 47.4 at (8192, 512), 37.3 and 35.2 at (8192, 128), 32.2 and 24.1 at (2048, 512),
  14.0 and 12.0 at (2048, 128). Recomputed layers keep 0.18 MB per token, and one whole layer at a time;
- the head's d_weight, 0.8 or 1.6 in float32, and 0.5 of logits.

So (8192, 512) peaks at about 84 in both: an H200 (150) holds that, an H100 (85) does not and has to recompute there;
the other three cases fit both. Two full optimisers would add 16 bytes per trained parameter each, 129: more than either
has.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from bench.groups import TEXTS, make_prompt, make_responses
from rmsd_fast.config import RunConfig, VideoConfig
from rmsd_fast.data.packing import pack
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.prompts import END_TOKEN, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.made.student import build_tokenizer
from rmsd_fast.models.liger import apply_liger, use_liger
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix
from rmsd_fast.models.students import DTYPES, Student, encode_media
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.build import make_discriminator, make_engine, make_policy, make_reference, prepare
from rmsd_fast.stages.state import StageState

# Bytes per trained parameter of a full optimiser: float32 master and two moments; gradients added up in float32; and,
# of one engine at a time, AdamW's square root of the second moment.
STATES, GRADIENTS, TEMPORARY = 12, 4, 4
# Share of a device's memory to plan with: the rest is for workspaces, buckets, and gaps that the allocator cannot join.
USABLE = 0.92


@dataclass(frozen=True)
class Sizes:
    """What of a config.json decides shapes."""

    name: str
    text: dict[str, Any] = field(hash=False)
    vision: dict[str, Any] = field(hash=False)


_ROPE = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_interleaved": True}
_VISION = dict(hidden_act="gelu_pytorch_tanh", patch_size=16, temporal_patch_size=2, spatial_merge_size=2)
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
# For rehearsals, the same structure: grouped heads, interleaved sections, three deepstack layers, more embeddings than
# tokens. Its initializer_range keeps the size of what a layer reads, as 0.02 does at a width of 2560.
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
    image, video, start, end, eos = (_tokenizer().convert_tokens_to_ids(token) for token in special)
    # Configs write into what they are given.
    text, vision = copy.deepcopy((sizes.text, sizes.vision))
    text |= {"tie_word_embeddings": True, "eos_token_id": eos}
    return Qwen3VLConfig(
        text_config=text | ({} if layers is None else {"num_hidden_layers": layers}),
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )


def make_student(sizes: Sizes, settings: RunConfig, device: torch.device | str, layers: int | None = None) -> Student:
    """A student made in place; on one device always with the same weights."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            make_config(sizes, layers),
            dtype=DTYPES[settings.model.dtype],
            attn_implementation=settings.model.attention,
        )
    if use_liger(settings.model.liger, device):
        apply_liger(model)
    return Student(model, _tokenizer(), Preprocessor())


@functools.cache
def settings_of(
    packing: str, prefix: int, response: int, k: int, n: int, *overrides: str, groups: int = 1
) -> RunConfig:
    """The recipe for this model, bf16, nothing recomputed, learning rates of 0: all steps meet the same weights.

    prefix: tokens of a prompt, exactly. micro_tokens: what the groups take as one shared row of the discriminator; the
    same budget makes several micro-batches of padded rows.
    """
    sizes = (f"rollout.n={n}", f"rollout.max_new_tokens={response}", f"data.max_prompt_tokens={prefix}")
    budget = f"micro_tokens={groups * (prefix + (k + n) * response)}"
    choices = (f"packing={packing}", "model.gradient_checkpointing=false", "distill.lr=0", "discriminator.lr=0")
    return load_settings("rmsd_qwen3vl_4b", [*sizes, budget, *choices, *overrides])


class Passes(Engine):
    """Forward and backward of one model behind the interface of `Engine`, without an optimiser.

    For devices that two full optimisers do not fit. Gradients add up in bf16 in `.grad`, as under DeepSpeed's ZeRO-0,
    and go through the same check; `step` returns their norm and frees them. Weights stay as they are.
    """

    def __init__(self, module: nn.Module, *, world: World) -> None:
        self.world, self.zero_stage, self.dtype = world, 0, "bfloat16"
        self._module, self._trained = module, [p for p in module.parameters() if p.requires_grad]
        self._trace, self._probe = 0, torch.zeros((), device=world.device)
        self._hooks = [p.register_hook(self._watch(i)) for i, p in enumerate(self._trained)]

    @property
    def module(self) -> nn.Module:
        return self._module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss * self.world.size).backward()

    def set_lr(self, lr: float) -> None:
        """Nothing here has a learning rate."""

    def step(self) -> float:
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self._trained if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        self.discard()
        return norm

    def discard(self) -> None:
        for p in self._trained:
            p.grad = None
        self._reset_watch()

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.discard()


@dataclass(frozen=True)
class Counts:
    """Parameters of a student: all, the decoder's, which are trained, and those of one of its layers."""

    total: int
    trained: int
    layer: int


@functools.cache
def counts_of(sizes: Sizes) -> Counts:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_config(sizes), dtype=torch.bfloat16)
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
    """Whether three models, two full optimisers and a forward over so many tokens have room in so many bytes."""
    counts = counts_of(sizes)
    optimizers = counts.trained * (2 * (STATES + GRADIENTS) + TEMPORARY)
    return 3 * 2 * counts.total + optimizers + activation_bytes(sizes, tokens) <= USABLE * room


def layers_that_fit(sizes: Sizes, room: int) -> int:
    """Most decoder layers of one model with its full optimiser in so many bytes; 1 at the least."""
    counts, layers = counts_of(sizes), sizes.text["num_hidden_layers"]
    each = 2 + STATES + GRADIENTS + TEMPORARY
    whole = each * counts.trained + 2 * (counts.total - counts.trained)
    missing = max(0.0, whole - USABLE * room)
    return max(1, layers - int(-(-missing // (each * counts.layer))))


def free_bytes(device: torch.device) -> int:
    """Memory that nothing of this process or another holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def make_state(sizes: Sizes, settings: RunConfig, world: World, *, apart: bool) -> StageState:
    """Policy, discriminator and reference wired by the trainer's own functions; rollouts and targets are to be set.

    apart: without optimisers, as `Passes`.
    """

    def student() -> Student:
        return prepare(make_student(sizes, settings, world.device), sizes.name, settings, world)

    def engine(module: nn.Module) -> Engine:
        return Passes(module, world=world) if apart else make_engine(module, settings, world, 0.0)

    own = student()
    policy = engine(make_policy(own, settings, train_vision=False))
    state = StageState(settings, world, own, PromptBuilder(own, VideoConfig()), {}, PhaseTimer(world.device), policy)
    state.reference = make_reference(student())
    state.discriminator = engine(make_discriminator(student(), settings))
    return state


def switch(state: StageState, packing: str, checkpointing: bool) -> None:
    """Attention and recomputation of the same three models, as a way of stepping wants them."""
    for model in (state.student.model, state.reference.model, state.discriminator.module.model):
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


def time_optimizer(sizes: Sizes, world: World, layers: int, prefix: int, rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Seconds of `Engine.step` of one full model of so many layers, after real backwards; of all layers by parameters.

    The device has to be empty. Given twice: as soon as it is known, and again with accumulation_s: what a backward
    through DeepSpeed takes longer than a plain one, which is the time it needs to add 16-bit gradients to its float32
    ones; of the layers measured.
    """
    settings = settings_of("shared", 2 * prefix, 32, 1, 2)
    student = prepare(make_student(sizes, settings, world.device, layers), sizes.name, settings, world)
    builder, policy = PromptBuilder(student, VideoConfig()), make_policy(student, settings, train_vision=False)
    prompts = [make_prompt(builder, prefix, 0)]
    rows = pack(prompts, [make_responses(builder, 2, 32, seed=1)]).to(world.device)
    with torch.no_grad():
        features = encode_media(student.model, prompts)

    def seconds(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return time.perf_counter() - began

    def backward(engine: Engine) -> None:
        loss = -engine(prompts, rows, features, partial(linear_logprob, ignore_index=None)).mean()
        engine.backward(loss, last=True)

    def step(engine: Engine) -> None:
        assert engine.gradients_finite()
        engine.step()

    def medians(engine: Engine) -> list[float]:
        """Seconds of a backward and of a step."""
        try:
            times = [(seconds(partial(backward, engine)), seconds(partial(step, engine))) for _ in range(1 + rounds)]
        finally:
            engine.close()
        # The first makes the moments, and compiles kernels.
        return [median(own) for own in zip(*times[1:], strict=True)]

    trained, counts = sum(p.numel() for p in policy.parameters() if p.requires_grad), counts_of(sizes)
    spent = medians(make_engine(policy, settings, world, 0.0))
    found = {
        "seconds": spent[1] * counts.trained / trained,
        "scaled": trained != counts.trained,
        "measured_s": spent[1],
        "layers": layers,
        "parameters": trained,
        "rounds": rounds,
    }
    yield found
    yield found | {"accumulation_s": spent[0] - medians(Passes(policy, world=world))[0]}
