"""Build tiny models of the families that share prompts, with random weights and prompts, without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

VOCAB, IMAGE, VIDEO, START, END, WIDTH = 97, 90, 91, 92, 93, 32
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The sections divide half a head of 8 among time, height and width.
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": WIDTH,
}
IMAGE_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@dataclass
class FamilyPrompt:
    """A prompt of any family.

    input_ids: [P]. position_ids: [3, P] if the positions of the family have three rows, otherwise [P]. next_position:
    the position of the first response token. kind: "image", "video" or "text". pixels: the input of the vision tower.
    grid_thw: the grid of a Qwen tower.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    kind: str
    pixels: torch.Tensor
    grid_thw: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> FamilyPrompt:
        """Return the same prompt on a device."""
        tensors = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)}
        return replace(self, **tensors)


def _qwen3_vl(text: dict[str, Any]) -> nn.Module:
    vision = {**QWEN_VISION, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}, **text}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **IDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl(text: dict[str, Any]) -> nn.Module:
    # Windows have 2 x 2 merged patches, so grids of 3 x 5 leave smaller windows at both edges.
    vision = {**QWEN_VISION, "window_size": 8, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": MROPE, **text}, vision_config=vision, **IDS
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _internvl(text: dict[str, Any]) -> nn.Module:
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT, **text},
        vision_config={**IMAGE_VISION, "attention_bias": True, "layer_scale_init_value": 1.0},
        image_token_id=IMAGE,
    )
    return transformers.InternVLForConditionalGeneration(config)


def _llava_onevision(text: dict[str, Any]) -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT, **text},
        vision_config={"model_type": "siglip_vision_model", **IMAGE_VISION, "vision_use_head": False},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def _smolvlm(text: dict[str, Any]) -> nn.Module:
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT, **text},
        vision_config=IMAGE_VISION,
        image_token_id=IMAGE,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def _text_model(name: str, text: dict[str, Any]) -> nn.Module:
    config = transformers.AutoConfig.for_model(name, **{**TEXT, **TEXT_FAMILIES[name], **text})
    return transformers.AutoModelForCausalLM.from_config(config)


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "internvl": _internvl,
    "llava_onevision": _llava_onevision,
    "smolvlm": _smolvlm,
}
# Each text model is listed with the settings that its config needs besides TEXT.
TEXT_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": None},
    # Every other layer has no rotary positions, attention is scaled by a setting, and norms follow the layers.
    "smollm3": {"no_rope_layer_interval": 2},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "olmo2": {},
}


def build_family(name: str, *, seed: int = 0, **text: Any) -> nn.Module:
    """Return a model of the family with attention "sdpa" in float32; `text` overrides settings of its text config.

    The weights are large enough that attention prefers some tokens, unlike weights with transformers' default of 0.02.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BUILDERS[name](text) if name in BUILDERS else _text_model(name, text)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
                else:
                    weight.add_(0.1 * torch.randn_like(weight))
    model.set_attn_implementation("sdpa")
    return model.eval()


class Float64RMSNorm(nn.Module):
    """The RMSNorm of transformers' language models without the conversion to float32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


def rotate_in_dtype(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rotary embedding of the Qwen towers in the dtype of q and k; [S, H, d] with cos, sin [S, d]."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None].to(x.dtype) + torch.cat((-second, first), -1) * sin[:, None].to(x.dtype)

    return rotate(q), rotate(k)


def compute_in_float64(model: nn.Module, monkeypatch: Any) -> nn.Module:
    """Replace the parts that transformers always computes in float32, so that the model uses float64 throughout."""
    for part in list(model.modules()):
        for name, child in part.named_children():
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                setattr(part, name, Float64RMSNorm(child))
    for family in ("qwen3_vl", "qwen2_5_vl"):
        module = f"transformers.models.{family}.modeling_{family}"
        monkeypatch.setattr(f"{module}.apply_rotary_pos_emb_vision", rotate_in_dtype)
    return model.double()


def family_prompts(name: str, model: nn.Module, *, seed: int = 0) -> list[FamilyPrompt]:
    """Return two prompts of different length; for Qwen-VL, one has a video of two frames and one has an image."""
    generator = torch.Generator().manual_seed(seed)
    makers = {"qwen3_vl": _qwen_prompts, "qwen2_5_vl": _qwen_prompts, **dict.fromkeys(TEXT_FAMILIES, _text_prompts)}
    return makers.get(name, _image_prompts)(name, model, generator)


def _text(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, 80, (count,), generator=generator)


def _qwen_prompts(name: str, model: nn.Module, generator: torch.Generator) -> list[FamilyPrompt]:
    prompts = []
    for kind, grid in (("video", (2, 6, 10)), ("image", (1, 4, 6))):
        token, frames = (VIDEO, grid[0]) if kind == "video" else (IMAGE, 1)
        per_frame = grid[1] * grid[2] // 4
        # Qwen3-VL separates the frames of a video, and Qwen2.5-VL joins them.
        blocks = [per_frame] * frames if name == "qwen3_vl" else [per_frame * frames]
        parts = [_text(4, generator)]
        for block in blocks:
            parts += [torch.tensor([START] + [token] * block + [END]), _text(2, generator)]
        ids = torch.cat(parts)
        grid_thw = torch.tensor([grid])
        types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        more = {"second_per_grid_ts": torch.tensor([1.0])} if name == "qwen2_5_vl" and kind == "video" else {}
        positions, _ = model.model.get_rope_index(
            ids[None], types[None], **{f"{kind}_grid_thw": grid_thw}, **more, attention_mask=torch.ones_like(ids)[None]
        )
        pixels = torch.randn(grid[0] * grid[1] * grid[2], 3 * 2 * 2 * 2, generator=generator, dtype=torch.float64)
        prompts.append(FamilyPrompt(ids, positions[:, 0], int(positions.max()) + 1, kind, pixels, grid_thw))
    return prompts


def _text_prompts(name: str, model: nn.Module, generator: torch.Generator) -> list[FamilyPrompt]:
    prompts = [_text(count, generator) for count in (11, 6)]
    return [FamilyPrompt(ids, torch.arange(len(ids)), len(ids), "text", torch.empty(0)) for ids in prompts]


def _image_prompts(name: str, model: nn.Module, generator: torch.Generator) -> list[FamilyPrompt]:
    prompts = []
    kind, token = ("video", VIDEO) if name == "llava_onevision" else ("image", IMAGE)
    for count in (5, 2):
        # A frame has four tokens, and LLaVA-OneVision ends a video with one more.
        media = [token] * (8 + (name == "llava_onevision"))
        ids = torch.cat([_text(count, generator), torch.tensor(media), _text(3, generator)])
        pixels = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        prompts.append(FamilyPrompt(ids, torch.arange(len(ids)), len(ids), kind, pixels))
    return prompts


def pixels_of(model: nn.Module, prompts: list[FamilyPrompt]) -> dict[str, torch.Tensor]:
    """Return the media of the prompts in order, in the form that every version of transformers accepts."""
    family, inputs = model.config.model_type, {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        chosen = [prompt for prompt in prompts if prompt.kind == kind]
        if not chosen:
            continue
        pixels = torch.cat([prompt.pixels for prompt in chosen]).to(model.dtype)
        if family in ("qwen3_vl", "qwen2_5_vl"):
            inputs[f"{kind}_grid_thw"] = torch.cat([prompt.grid_thw for prompt in chosen])
        elif family == "llava_onevision":
            pixels = pixels.unflatten(0, (len(chosen), 2))
        elif family == "smolvlm":
            pixels = pixels[None]
        inputs[f"pixel_values{suffix}"] = pixels
    return inputs


def encode(model: nn.Module, prompts: list[FamilyPrompt]) -> dict[str, Any]:
    """Return the model's `mm_encoder_outputs` for the same media, with a graph."""
    body, inputs, outputs = model.model, pixels_of(model, prompts), {}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        pixels = inputs.get(f"pixel_values{suffix}")
        if pixels is None:
            continue
        if f"{kind}_grid_thw" in inputs:
            features = body.get_image_features(pixels, inputs[f"{kind}_grid_thw"], return_dict=True)
            deepstack = getattr(features, "deepstack_features", None)
            outputs[kind] = BaseModelOutputWithDeepstackFeatures(
                pooler_output=features.pooler_output, deepstack_features=deepstack
            )
            continue
        encoder = body.get_image_features if kind == "image" else body.get_video_features
        outputs[kind] = BaseModelOutputWithPooling(pooler_output=encoder(pixels, return_dict=True).pooler_output)
    return outputs


def pack_inputs(prompts: list[FamilyPrompt], responses: list[list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return `input_ids` [1, T] and `position_ids` ([3, 1, T] or [1, T]) of `[P_1 | ... | R_11 ... | R_21 ...]`."""
    ids = [prompt.input_ids for prompt in prompts]
    positions = [prompt.position_ids for prompt in prompts]
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            ids.append(response)
            steps = prompt.next_position + torch.arange(len(response), device=prompt.position_ids.device)
            positions.append(steps.expand(*prompt.position_ids.shape[:-1], -1))
    return {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions, -1).unsqueeze(-2)}
