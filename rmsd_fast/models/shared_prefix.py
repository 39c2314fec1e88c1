"""Share prompts in a transformers model: decoder layers run on packed rows, without copied or patched model code.

A packed row `[P_1 | ... | P_G | R_11 R_12 ... | R_21 ...]` holds every prompt once, followed by all responses. A
response attends to its prompt and itself. transformers allows attention functions to be registered by name. Ours reads
the layout from the keyword `shared_prefix=`, which the model's forward passes on to every attention layer. No mask
function is registered, so transformers builds no mask. It then silently drops a 2-D mask, so the inputs of the text
model are checked here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from rmsd_fast.config import ModelError
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_kernels import SharedPrefixPlan, attention_calls, shared_prefix_attention

SHARED_PREFIX = "rmsd_shared_prefix"
# Families that were tested against separate rows, with their tested language models. A text model is its own language
# model.
FAMILIES = {
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "internvl": ("qwen2", "qwen3", "llama"),
    "llava_onevision": ("qwen2",),
    "smolvlm": ("llama",),
    "qwen2": ("qwen2",),
    "qwen3": ("qwen3",),
    "llama": ("llama",),
    "mistral": ("mistral",),
    "smollm3": ("smollm3",),
    "olmo2": ("olmo2",),
    "granite": ("granite",),
}
# Tested adapters of peft. Each only changes what a module computes for a token.
ADAPTERS = ("LORA", "IA3", "LOHA", "LOKR", "OFT", "VERA")
# Rotary scalings whose frequencies depend on the longest row of a batch, so packing would change them.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
_ADVICE = (
    "run rows through run_shared_prefix(model.model, plan, ...), which takes no mask and no cache; "
    "for anything else, e.g. generate(), call disable_shared_prefix(model) first"
)


class AttendsItself(Protocol):
    """An object that can replace a plan and holds its own keys and values, such as a cache for decoding."""

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return the attention of one layer, [B, L, H, d].

        Args:
            layer_idx: index of the layer.
            query: [B, H, L, d], as transformers passes it.
            key: [B, Hkv, L, d].
            value: [B, Hkv, L, d].
            scale: scale of the scores.
        """
        ...


def enable_shared_prefix(model: nn.Module) -> None:
    """Make the decoder layers attend according to a plan, and a vision tower process all frames in one call.
    Idempotent.

    After this call, the model rejects a forward pass without `shared_prefix=`; see `run_shared_prefix`. The setting is
    stored in the model's config, which several models may share, but the checks are stored in the model. Enable every
    model separately.

    Args:
        model: a transformers model of one of `FAMILIES`, or a module that wraps one. With peft, pass peft's model after
            adding its adapters, because adapters are checked here.
    Raises:
        ModelError: the family, a layer or an adapter is not supported, or the model did not accept the setting. The
            message names the reason, and the model is unchanged.
    """
    reason = _adapter_reason(model)
    model = _transformers_model(model)
    if reason:
        raise ModelError(f"{model.config.model_type}: cannot share prompts, {reason}")
    if is_shared_prefix(model) and _checks_inputs(model):
        return
    reason = unsupported(model)
    if reason:
        raise ModelError(
            f"{model.config.model_type}: cannot share prompts, {reason}; use a model of a supported family: "
            f"{', '.join(FAMILIES)}"
        )
    text, before = _text_model(model), _attention(model)
    wanted = {name: vision_implementation(model) or attention for name, attention in before.items()}
    wanted[_text_part(model)] = SHARED_PREFIX
    model.set_attn_implementation(wanted)
    in_layers = {layer.self_attn.config._attn_implementation for layer in text.layers}
    if _attention(model) != wanted or in_layers != {SHARED_PREFIX}:
        got = f"{sorted(map(str, in_layers))} in the decoder layers, {_attention(model)} in the config"
        model.set_attn_implementation(before)
        raise ModelError(
            f"{model.config.model_type}: expected attention {wanted}, got {got}: {type(model).__name__} does not "
            "accept it; use the class of transformers for this family, and leave whole attention modules out of peft's "
            "modules_to_save"
        )
    if before[_text_part(model)] != SHARED_PREFIX:
        text.attention_before_shared_prefix = before
    if not _checks_inputs(model):
        # The hook remains when sharing is disabled. It then rejects plans, which the model's attention would ignore.
        text.register_forward_pre_hook(_check_inputs, with_kwargs=True)


def disable_shared_prefix(model: nn.Module) -> None:
    """Restore the text and vision attention that the model had before sharing was enabled.

    Raises:
        ModelError: sharing was enabled on another model with the same config or by `set_attn_implementation`, so the
            previous attention is unknown.
    """
    model = _transformers_model(model)
    if not is_shared_prefix(model):
        return
    text = _text_model(model)
    before = getattr(text, "attention_before_shared_prefix", None)
    # A language model and the whole model around it have different parts but the same text model.
    if before is None or before.keys() != _attention(model).keys():
        raise ModelError(
            f"{model.config.model_type}: shared prompts were not enabled on this model, but on another model with the "
            "same config or by set_attn_implementation; disable them there"
        )
    model.set_attn_implementation(before)
    del text.attention_before_shared_prefix


@contextmanager
def shared_prefix_enabled(model: nn.Module) -> Iterator[None]:
    """Enable shared prompts inside the context, and restore the previous attention afterward."""
    before = is_shared_prefix(model)
    enable_shared_prefix(model)
    try:
        yield
    finally:
        if not before:
            disable_shared_prefix(model)


def is_shared_prefix(model: nn.Module) -> bool:
    """Return whether the model's decoder layers attend according to a plan."""
    return _transformers_model(model).config.get_text_config()._attn_implementation == SHARED_PREFIX


def run_shared_prefix(body: nn.Module, plan: SharedPrefixPlan | AttendsItself, **inputs: Any) -> torch.Tensor:
    """Return the hidden states after the final norm: [1, T, D] of a packed row, or [B, L, D] when a cache decodes.

    Args:
        body: the model without its head, `model.model`; with peft, `model.get_base_model().model`.
        plan: the row's layout, on the row's device, or an object with an `attend` method.
        inputs: inputs of `body`: `input_ids` [1, T], `position_ids` ([3, 1, T] if positions have three rows, otherwise
            [1, T], see `text_positions`), and pixels or features. Features are passed as
            `mm_encoder_outputs={"image": model.model.get_image_features(...)}`, which requires transformers 5.18. With
            earlier versions, embed them yourself and pass a text model as `body`, as the Qwen3-VL students do.
    Raises:
        RuntimeError: the model is not enabled, attention did not run exactly once per decoder layer, or this version of
            transformers would drop `mm_encoder_outputs`.
        ValueError: a mask or a cache was passed, positions are missing, rows do not fit the plan, features have a
            different format, or the model includes its head.
    """
    if not isinstance(plan, SharedPrefixPlan) and not hasattr(plan, "attend"):
        raise ValueError(f"plan: expected a SharedPrefixPlan, got {type(plan).__name__}; see its from_lengths")
    if hasattr(body, "get_base_model"):
        raise ValueError(
            f"{type(body).__name__}: expected the model without its head, got peft's wrapper; pass "
            "model.get_base_model().model, whose layers hold the adapters"
        )
    if body.get_output_embeddings() is not None:
        raise ValueError(f"{type(body).__name__}: expected the model without its head; pass model.model")
    config = body.config.get_text_config()
    if config._attn_implementation != SHARED_PREFIX:
        raise RuntimeError(
            f"{config.model_type}: expected attention {SHARED_PREFIX}, got {config._attn_implementation}, which "
            "ignores plans; call enable_shared_prefix(model) first"
        )
    if not _checks_inputs(body):
        raise RuntimeError(
            f"{config.model_type}: shared prompts were enabled elsewhere, and this model was never checked; call "
            "enable_shared_prefix(model) first"
        )
    _refuse_mask_and_cache(type(body).__name__, inputs)
    if inputs.pop("use_cache", False):
        raise ValueError(f"{type(body).__name__}: shared-prompt attention does not support use_cache; {_ADVICE}")
    if inputs.get("adapter_names") is not None:
        raise ValueError(
            f"{type(body).__name__}: adapter_names is read only by peft's wrapper; call model.set_adapter(name) instead"
        )
    _check_rows(plan, inputs)
    if inputs.get("mm_encoder_outputs") is not None:
        _check_features(body, inputs["mm_encoder_outputs"])
    cache = None if isinstance(plan, SharedPrefixPlan) else _CountedCache(plan)
    calls = attention_calls()
    hidden = body(**inputs, shared_prefix=plan if cache is None else cache, use_cache=False).last_hidden_state
    ran = attention_calls() - calls if cache is None else cache.calls
    if ran != config.num_hidden_layers:
        raise RuntimeError(
            f"{config.model_type}: shared-prompt attention ran {ran} times in {config.num_hidden_layers} decoder "
            "layers, so the hidden states are wrong; use the unchanged decoder layers of transformers"
        )
    return hidden


def text_positions(plan: SharedPrefixPlan) -> torch.Tensor:
    """Return the positions of a packed row of text, int64 [1, T]: each response continues from its prompt.

    The positions are on the plan's device. For models whose positions have three rows (Qwen-VL), use get_rope_index.
    """
    parts = [torch.arange(prompt) for prompt in plan.prefix_lengths]
    for prompt, group in zip(plan.prefix_lengths, plan.response_lengths, strict=True):
        parts += [torch.arange(prompt, prompt + length) for length in group]
    return torch.cat(parts)[None].to(plan.device)


def _check_rows(plan: SharedPrefixPlan | AttendsItself, inputs: dict[str, Any]) -> None:
    """Check that there is one position per token, and that a plan has the row's number of tokens."""
    tokens = plan.tokens if isinstance(plan, SharedPrefixPlan) else None
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    if tokens is not None and ids is not None and tuple(ids.shape) != (1, tokens):
        raise ValueError(f"input_ids: expected [1, {tokens}], the plan's tokens in one row, got {list(ids.shape)}")
    if positions is None or positions.dim() < 2 or tokens not in (None, positions.shape[-1]):
        # Without positions, transformers would number the row as a single text.
        raise ValueError(
            f"position_ids: expected positions of {tokens or 'all'} tokens, [1, T] or [3, 1, T], in which each "
            f"response continues from its prompt, got {'none' if positions is None else list(positions.shape)}"
        )


def _check_features(body: nn.Module, features: Any) -> None:
    """Reject features that transformers would silently ignore, because the model would then see no video."""
    forward = inspect.signature(getattr(body, "_orig_mod", body).forward)
    if "mm_encoder_outputs" not in forward.parameters:
        raise RuntimeError(
            f"{body.config.model_type}: {type(body).__name__} of transformers {transformers.__version__} ignores "
            "mm_encoder_outputs, so the model would see no video; pass a vision-language model, with transformers>=5.18"
        )
    # A model's output is also a mapping, but with different keys.
    if type(features) is not dict or not features or features.keys() - {"image", "video"}:
        got = list(features) if isinstance(features, dict) else type(features).__name__
        raise ValueError(
            f'mm_encoder_outputs: expected {{"image": features}}, {{"video": features}} or both, with what '
            f"model.model.get_image_features or get_video_features returns, got {got}"
        )


def unsupported(model: PreTrainedModel) -> str | None:
    """Return why the model's layers cannot work on packed rows, or None. Only config and modules are inspected."""
    config = model.config
    text_config = config.get_text_config()
    text = next((part for part in model.modules() if _is_text_model(part, text_config)), None)
    reason = _config_reason(config, text_config) or (_module_reason(text) if text else None)
    if reason:
        return reason
    if config.model_type not in FAMILIES:
        return "since it was not tested with this family"
    if text_config.model_type not in FAMILIES[config.model_type]:
        return f"since it was not tested with {text_config.model_type} as the language model of this family"
    if text is None or len(text.layers) != text_config.num_hidden_layers:
        return "since no module holds the decoder layers that config.text_config describes"
    return None


def _config_reason(config: Any, text_config: Any) -> str | None:
    layer_types = getattr(text_config, "layer_types", None) or []
    other_kinds = sorted({kind for kind in layer_types if kind not in ("full_attention", "sliding_attention")})
    if other_kinds:
        return f"since it has layers other than attention to all tokens ({', '.join(other_kinds)})"
    window = getattr(text_config, "use_sliding_window", getattr(text_config, "sliding_window", None))
    if "sliding_attention" in layer_types or (window and not layer_types):
        return "since it has sliding-window layers"
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(text_config, name, None):
            return f"since its attention scores are capped ({name})"
    if getattr(text_config, "use_bidirectional_attention", None) or config.model_type == "paligemma":
        return "since its attention is not causal over images"
    if getattr(text_config, "cross_attention_layers", None):
        return "since it has cross-attention layers"
    rope = getattr(text_config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    for kind in LENGTH_DEPENDENT_ROPE:
        if kind in kinds:
            return f"since its rotary frequencies depend on the longest row (rope_type={kind})"
    return None


def _adapter_reason(model: nn.Module) -> str | None:
    """Return why peft's adapters cannot work on packed rows, or None. Only peft's configs are read."""
    for part in model.modules():
        # PeftModel has this attribute, and so does every model with adapters in its layers.
        for name, adapter in (getattr(part, "peft_config", None) or {}).items():
            kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
            if getattr(adapter, "is_prompt_learning", False):
                return (
                    f"since the adapter {name!r} ({kind}) puts learned tokens before a prompt, outside the layers; "
                    "use an adapter on the layers, such as LoRA"
                )
            if getattr(adapter, "alora_invocation_tokens", None):
                return (
                    f"since the adapter {name!r} (activated LoRA) starts at a token that peft's wrapper looks for in "
                    "each row; use LoRA without alora_invocation_tokens"
                )
            if kind not in ADAPTERS:
                return f"since it was not tested with the adapter {name!r} ({kind}); use one of {', '.join(ADAPTERS)}"
    return None


def _module_reason(text: nn.Module) -> str | None:
    for index, layer in enumerate(getattr(text, "layers", ())):
        attention = getattr(layer, "self_attn", None)
        if attention is None:
            return f"since decoder layer {index} ({type(layer).__name__}) has no self-attention"
        if not getattr(attention, "is_causal", False):
            return f"since decoder layer {index} does not attend causally"
        if getattr(attention, "sliding_window", None):
            return f"since decoder layer {index} has a sliding window"
        if getattr(attention, "sinks", None) is not None:
            return f"since decoder layer {index} has attention sinks"
        if getattr(attention, "attention_dropout", 0.0):
            return "since it has attention dropout (set attention_dropout to 0 in config.json)"
    return None


def _shared_prefix_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared_prefix: SharedPrefixPlan | AttendsItself | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention with the signature of transformers: [B, H, L, d] in, [B, L, H, d] out."""
    what = _refused(attention_mask, dropout, kwargs)
    if what:
        raise ValueError(f"{type(module).__name__}: shared-prompt attention does not support {what}; {_ADVICE}")
    if shared_prefix is None:
        raise RuntimeError(f"{type(module).__name__}: shared-prompt attention expected a plan, got none; {_ADVICE}")
    if not isinstance(shared_prefix, SharedPrefixPlan):
        return shared_prefix.attend(module.layer_idx, query, key, value, scaling), None
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{type(module).__name__}: expected one packed row without a cache, as in the plan, got query "
            f"{list(query.shape)} and key {list(key.shape)}; {_ADVICE}"
        )
    rows = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return shared_prefix_attention(*rows, shared_prefix, scale=scaling).unsqueeze(0), None


def _refused(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Return the first argument of a layer that the op does not support, or None."""
    arguments = {
        "an attention mask": attention_mask is not None,
        "dropout": dropout > 0.0,
        "a sliding window": kwargs.get("sliding_window") is not None,
        "a cap on the scores": kwargs.get("softcap") is not None,
        "attention sinks": kwargs.get("s_aux") is not None,
        "attention that is not causal": kwargs.get("is_causal") is False,
        "a cache": kwargs.get("past_key_values") is not None,
        "output_attentions": bool(kwargs.get("output_attentions")),
    }
    return next((name for name, present in arguments.items() if present), None)


def _check_inputs(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Reject inputs that would never reach attention: a 2-D mask, a cache, or a plan that the attention ignores."""
    plan = kwargs.get("shared_prefix")
    name = type(text).__name__
    if text.config._attn_implementation != SHARED_PREFIX:
        if plan is not None:
            raise RuntimeError(
                f"{name}: expected attention {SHARED_PREFIX}, got {text.config._attn_implementation}, which ignores "
                "plans; call enable_shared_prefix(model) first"
            )
        return
    if plan is None:
        raise RuntimeError(f"{name}: shared-prompt attention expected a plan, got none; {_ADVICE}")
    if len(args) > 1:
        raise ValueError(
            f"{name}: expected keyword arguments after the first input, got {len(args)} positional ones; {_ADVICE}"
        )
    _refuse_mask_and_cache(name, kwargs)
    # If use_cache is missing or None, transformers uses the config's value, which creates a cache.
    if kwargs.get("use_cache") is not False:
        raise ValueError(f"{name}: expected use_cache=False, got {kwargs.get('use_cache')}; {_ADVICE}")


def _refuse_mask_and_cache(name: str, inputs: dict[str, Any]) -> None:
    for what in ("attention_mask", "past_key_values"):
        if inputs.get(what) is not None:
            raise ValueError(f"{name}: shared-prompt attention does not support {what}; {_ADVICE}")


class _CountedCache:
    """Count the layers that attend through an object."""

    def __init__(self, cache: AttendsItself):
        self.cache = cache
        self.calls = 0

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.calls += 1
        return self.cache.attend(layer_idx, query, key, value, scale)


def _transformers_model(model: nn.Module) -> PreTrainedModel:
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            return part
    raise ModelError(f"{type(model).__name__}: expected a transformers model, or a module that contains one")


def _is_text_model(part: nn.Module, text_config: Any) -> bool:
    return isinstance(part, PreTrainedModel) and part.config is text_config and hasattr(part, "layers")


def _text_model(model: PreTrainedModel) -> PreTrainedModel:
    return next(part for part in model.modules() if _is_text_model(part, model.config.get_text_config()))


def _checks_inputs(model: nn.Module) -> bool:
    """Return whether the model has the hook, that is, whether it passed the check of `unsupported`."""
    return any(_check_inputs in part._forward_pre_hooks.values() for part in model.modules())


def _text_part(model: PreTrainedModel) -> str:
    """Return set_attn_implementation's name for the text model: a key of the config, or "" for a text-only model."""
    return "" if model.config.get_text_config() is model.config else "text_config"


def _attention(model: PreTrainedModel) -> dict[str, str]:
    """Return the attention of text and vision in the format of set_attn_implementation."""
    if not _text_part(model):
        return {"": model.config._attn_implementation}
    return {name: getattr(model.config, name)._attn_implementation for name in ("text_config", "vision_config")}


AttentionInterface.register(SHARED_PREFIX, _shared_prefix_forward)
