"""Test that shared prompts refuse unsupported models, settings and inputs, and that errors say why."""

from __future__ import annotations

import pytest
import torch
import transformers
from family_students import build_family, family_prompts, pack_inputs
from shared_prefix_students import CausalCache, make_responses, media_of, packed_rows, plan_of, takes_features
from torch import nn

from rmsd_fast.config import ModelError
from rmsd_fast.models.shared_prefix import (
    FAMILIES,
    SHARED_PREFIX,
    disable_shared_prefix,
    enable_shared_prefix,
    is_shared_prefix,
    run_shared_prefix,
    shared_prefix_enabled,
)
from rmsd_kernels import SharedPrefixPlan

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def test_a_setting_that_does_not_take_effect_is_detected_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("qwen3_vl")
    # transformers skips the part with only a warning.
    text = type(model.model.language_model)
    monkeypatch.setattr(text, "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ModelError, match=r"expected attention .* got \['sdpa'\]"):
        enable_shared_prefix(model)
    assert model.config.vision_config._attn_implementation == "sdpa" and not is_shared_prefix(model)


def other_config(model_type: str, **text):
    """Return the config of a model of another family and, if a decoder layer decides, a small body of it."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0, **text}
    return transformers.AutoConfig.for_model(model_type, **small)


@pytest.mark.parametrize(
    ("model_type", "text", "reason"),
    [
        ("qwen3_next", {"num_hidden_layers": 4}, "linear_attention"),
        ("gemma3_text", {}, "sliding-window layers"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "scores are capped"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2, "num_local_experts": 2}, "attention sinks"),
        ("llama", {"attention_dropout": 0.1}, "attention dropout"),
        ("cohere", {}, "not tested with this family"),
        ("mistral", {"sliding_window": 8}, "sliding-window layers"),
        ("llama", {"rope_parameters": DYNAMIC_ROPE}, "longest row"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window layers"),
    ],
)
def test_other_models_are_refused(model_type: str, text: dict, reason: str) -> None:
    model = transformers.AutoModel.from_config(other_config(model_type, **text))
    with pytest.raises(ModelError, match=f"{model_type}: cannot share prompts, .*{reason}.*") as caught:
        enable_shared_prefix(model)
    assert all(family in str(caught.value) for family in FAMILIES) and "padded" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window"),
        ("qwen3_vl", {"attention_dropout": 0.1}, "attention dropout"),
        (
            "internvl",
            {"model_type": "mistral", "sliding_window": None},
            "not tested with mistral as the language",
        ),
        ("internvl", {"rope_parameters": DYNAMIC_ROPE}, "longest row"),
    ],
)
def test_family_models_with_other_layers_are_refused(name: str, text: dict, reason: str) -> None:
    model = build_family(name, **text)
    with pytest.raises(ModelError, match=rf"{name}: cannot share prompts, .*{reason}"):
        enable_shared_prefix(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_model_with_only_the_setting_is_still_checked() -> None:
    model = build_family("internvl", rope_parameters=DYNAMIC_ROPE)
    model.set_attn_implementation({"text_config": SHARED_PREFIX})
    for enable in (enable_shared_prefix, lambda model: shared_prefix_enabled(model).__enter__()):
        with pytest.raises(ModelError, match="longest row"):
            enable(model)
    prompts, responses = family_prompts("internvl", model), make_responses()
    with pytest.raises(RuntimeError, match="this model was never checked; call enable_shared_prefix"):
        packed_rows(model, prompts, responses)


def test_models_that_share_a_config_are_enabled_separately() -> None:
    first = build_family("qwen3_vl")
    second = type(first)(first.config).eval()
    prompts, responses = family_prompts("qwen3_vl", first), make_responses()
    enable_shared_prefix(first)
    with pytest.raises(RuntimeError, match="this model was never checked"):
        packed_rows(second, prompts, responses)
    with shared_prefix_enabled(second):
        packed_rows(second, prompts, responses)
    assert is_shared_prefix(second)
    inputs = {**pack_inputs(prompts, responses), "shared_prefix": plan_of(prompts, responses), "use_cache": False}
    ids = inputs.pop("input_ids")
    with pytest.raises(ValueError, match="does not support attention_mask"):
        second.model.language_model(ids, attention_mask=torch.ones_like(ids), **inputs)
    with pytest.raises(ModelError, match="not enabled on this model.*disable them there"):
        disable_shared_prefix(second)
    disable_shared_prefix(first)
    assert not is_shared_prefix(second)


def test_a_module_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear: expected a transformers model"):
        enable_shared_prefix(nn.Linear(2, 2))


def test_a_layer_that_skips_attention_is_detected() -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    prompts, responses = family_prompts("qwen3_vl", model), make_responses()
    attention = model.model.language_model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match="ran 2 times in 3 decoder layers"):
        packed_rows(model, prompts, responses)


class TestRefusedInputs:
    """Test inputs that an enabled model must refuse."""

    @pytest.fixture
    def case(self) -> tuple[nn.Module, dict, SharedPrefixPlan]:
        model = build_family("qwen2_5_vl")
        prompts, responses = family_prompts("qwen2_5_vl", model), make_responses()
        enable_shared_prefix(model)
        inputs = {**pack_inputs(prompts, responses), **media_of(model, prompts)}
        return model, inputs, plan_of(prompts, responses)

    def test_inputs_that_transformers_would_ignore_are_refused(self, case) -> None:
        model, inputs, plan = case
        if not takes_features(model):
            pytest.skip("transformers accepts media features since 5.18")
        features = inputs.pop("mm_encoder_outputs")
        # The output of get_image_features is itself a mapping.
        for wrong in (next(iter(features.values())), {"image_features": 1}, [1], {}):
            with pytest.raises(ValueError, match='mm_encoder_outputs: expected {"image": features}'):
                run_shared_prefix(model.model, plan, **inputs, mm_encoder_outputs=wrong)

    def test_slips(self, case) -> None:
        model, inputs, plan = case
        with pytest.raises(ValueError, match="pass model.model"):
            run_shared_prefix(model, plan, **inputs)
        with pytest.raises(ValueError, match="plan: expected a SharedPrefixPlan, got NoneType"):
            run_shared_prefix(model.model, None, **inputs)
        with pytest.raises(ValueError, match="does not support use_cache"):
            run_shared_prefix(model.model, plan, **inputs, use_cache=True)
        hidden = run_shared_prefix(model.model, plan, **inputs, use_cache=False)
        assert torch.equal(hidden, run_shared_prefix(model.model, plan, **inputs))
        ids = inputs.pop("input_ids")
        for wrong in (ids[0], ids[:, :-1]):
            with pytest.raises(ValueError, match=rf"input_ids: expected \[1, {plan.tokens}\]"):
                run_shared_prefix(model.model, plan, **inputs, input_ids=wrong)
        positions = inputs.pop("position_ids")
        with pytest.raises(ValueError, match="position_ids: expected positions of"):
            run_shared_prefix(
                model.model, plan, **inputs, input_ids=ids, position_ids=positions.flatten()[: ids.numel()]
            )

    def test_no_plan(self, case) -> None:
        model, inputs, _ = case
        with pytest.raises(RuntimeError, match=r"expected a plan, got none; .*run_shared_prefix"):
            model.model(**inputs, use_cache=False)

    def test_generate(self, case) -> None:
        model, _, _ = case
        with pytest.raises(RuntimeError, match=r"generate\(\), call disable_shared_prefix"):
            model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)

    @pytest.mark.parametrize("mask", [torch.ones(1, 67, dtype=torch.int64), torch.ones(1, 1, 67, 67).bool()])
    def test_mask(self, case, mask: torch.Tensor) -> None:
        model, inputs, plan = case
        with pytest.raises(ValueError, match="Qwen2_5_VLModel: .* does not support attention_mask"):
            run_shared_prefix(model.model, plan, **inputs, attention_mask=mask)
        with pytest.raises(ValueError, match="Qwen2_5_VLTextModel: .* does not support attention_mask"):
            model.model(**inputs, shared_prefix=plan, attention_mask=mask, use_cache=False)

    def test_positional_mask(self, case) -> None:
        model, inputs, plan = case
        ids = inputs["input_ids"]
        with pytest.raises(ValueError, match="expected keyword arguments after the first input, got 2"):
            model.model.language_model(ids, torch.ones_like(ids), shared_prefix=plan, use_cache=False)

    def test_cache(self, case) -> None:
        model, inputs, plan = case
        for cache in (transformers.DynamicCache(), ()):
            with pytest.raises(ValueError, match="Qwen2_5_VLModel: .* does not support past_key_values"):
                run_shared_prefix(model.model, plan, **inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="Qwen2_5_VLTextModel: .* does not support past_key_values"):
            model.model(**inputs, shared_prefix=plan, past_key_values=transformers.DynamicCache(), use_cache=False)

    @pytest.mark.parametrize("setting", [{}, {"use_cache": None}, {"use_cache": True}], ids=str)
    def test_default_cache(self, case, setting: dict) -> None:
        model, inputs, plan = case
        with pytest.raises(ValueError, match="expected use_cache=False, got"):
            model.model(**inputs, shared_prefix=plan, **setting)

    def test_no_positions(self, case) -> None:
        model, inputs, plan = case
        for positions in ({}, {"position_ids": None}):
            with pytest.raises(ValueError, match="position_ids: expected positions of 67 tokens, .* got none"):
                run_shared_prefix(model.model, plan, input_ids=inputs["input_ids"], **positions)
        with pytest.raises(ValueError, match="position_ids: expected positions of all tokens, .* got none"):
            run_shared_prefix(model.model, CausalCache(), input_ids=inputs["input_ids"])

    def test_two_rows(self, case) -> None:
        model, inputs, plan = case
        ids, positions = inputs["input_ids"].clamp(max=80), inputs["position_ids"]
        with pytest.raises(ValueError, match=r"the plan's tokens in one row, got \[2, 67\]"):
            run_shared_prefix(model.model, plan, input_ids=ids.expand(2, -1), position_ids=positions.expand(3, 2, -1))

    def test_vision_features_that_the_model_would_ignore_are_refused(self, case) -> None:
        model, inputs, plan = case
        model.model.forward = lambda input_ids, position_ids, **_: pytest.fail("the model ran without vision features")
        with pytest.raises(RuntimeError, match="ignores mm_encoder_outputs"):
            run_shared_prefix(model.model, plan, **inputs | {"mm_encoder_outputs": {"image": torch.ones(6, 32)}})

    def test_plan_of_other_lengths(self, case) -> None:
        model, inputs, _ = case
        plan = SharedPrefixPlan.from_lengths([10], [[2]])
        with pytest.raises(
            ValueError, match=r"input_ids: expected \[1, 12\], the plan's tokens in one row, got \[1, 67\]"
        ):
            run_shared_prefix(model.model, plan, **inputs)
        with pytest.raises(ValueError, match="T=12"):
            model.model(**inputs, shared_prefix=plan, use_cache=False)

    def test_dropout_switched_on_later(self, case) -> None:
        model, inputs, plan = case
        model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
        model.train()
        with pytest.raises(ValueError, match="does not support dropout"):
            run_shared_prefix(model.model, plan, **inputs)

    def test_sliding_window_switched_on_later(self, case) -> None:
        model, inputs, plan = case
        model.model.language_model.layers[0].self_attn.sliding_window = 8
        with pytest.raises(ValueError, match="does not support a sliding window"):
            run_shared_prefix(model.model, plan, **inputs)

    def test_model_that_is_not_enabled(self, case) -> None:
        model, inputs, plan = case
        disable_shared_prefix(model)
        with pytest.raises(
            RuntimeError,
            match="expected attention rmsd_shared_prefix, got sdpa, which ignores plans; call enable_shared_prefix",
        ):
            run_shared_prefix(model.model, plan, **inputs)
        with pytest.raises(
            RuntimeError,
            match="expected attention rmsd_shared_prefix, got sdpa, which ignores plans; call enable_shared_prefix",
        ):
            model.model(**inputs, shared_prefix=plan, use_cache=False)
