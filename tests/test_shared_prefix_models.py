"""Shared prompts in transformers models: one packed pass against separate rows through the model's stock attention."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from family_students import (
    BUILDERS,
    MROPE,
    FamilyPrompt,
    build_family,
    compute_in_float64,
    encode,
    family_prompts,
    pack_inputs,
    pixels_of,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

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

# Two groups; lengths apart, so that a mix-up of segments shows; one response of a single token.
LENGTHS = [[5, 3, 1], [4, 2]]
STUDENTS = [(name, {}) for name in BUILDERS] + [
    ("internvl", {"model_type": "qwen3", "head_dim": 8}),
    ("internvl", {"model_type": "llama"}),
]
students = pytest.mark.parametrize(
    ("name", "text"), STUDENTS, ids=[f"{name}-{text.get('model_type', 'default')}" for name, text in STUDENTS]
)
Responses = list[list[torch.Tensor]]
# LLaVA-OneVision reads the tower's last layer before the norm that follows it.
UNUSED = {"llava_onevision": {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}}


def make_responses(lengths: list[list[int]] = LENGTHS) -> Responses:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, 80, (length,), generator=generator) for length in group] for group in lengths]


def plan_of(prompts: list[FamilyPrompt], responses: Responses) -> SharedPrefixPlan:
    lengths = [[len(response) for response in group] for group in responses]
    device = prompts[0].input_ids.device
    return SharedPrefixPlan.from_lengths([len(prompt.input_ids) for prompt in prompts], lengths, device=device)


def encoded(model: nn.Module, prompts: list[FamilyPrompt]) -> dict:
    return {"mm_encoder_outputs": encode(model, prompts)}


Media = Callable[[nn.Module, list[FamilyPrompt]], dict]


def packed_rows(
    model: nn.Module, prompts: list[FamilyPrompt], responses: Responses, media: Media = encoded
) -> list[torch.Tensor]:
    """Hidden states [P + R, D] of every `[prefix | response]`, cut out of one packed pass."""
    inputs = pack_inputs(prompts, responses)
    plan = plan_of(prompts, responses)
    hidden = run_shared_prefix(model.model, plan, **inputs, **media(model, prompts))[0]
    prefixes = hidden[: plan.prefix_tokens].split(plan.prefix_lengths)
    parts = iter(hidden[plan.prefix_tokens :].split([len(response) for group in responses for response in group]))
    return [torch.cat([prefix, next(parts)]) for prefix, group in zip(prefixes, responses, strict=True) for _ in group]


def separate_rows(
    model: nn.Module, prompts: list[FamilyPrompt], responses: Responses, media: Media = encoded
) -> list[torch.Tensor]:
    """The same from one stock pass per response."""
    assert not is_shared_prefix(model)
    return [
        model.model(**pack_inputs([prompt], [[response]]), **media(model, [prompt]), use_cache=False).last_hidden_state[
            0
        ]
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]


def loss_of(rows: list[torch.Tensor]) -> torch.Tensor:
    """Weighs every element of every row apart."""
    generator = torch.Generator().manual_seed(2)
    return sum((row * torch.randn(row.shape, generator=generator).to(row)).sum() for row in rows)


def gradients(model: nn.Module, rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss_of(rows).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def check_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    total = torch.cat([grad.flatten() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        # A bias of keys without rotary embedding has no gradient but rounding.
        scale = max(grad.norm(), 1e-6 * total)
        assert (found[name] - grad).norm() <= tolerance * scale, name


def check_against_separate_rows(model: nn.Module, tolerance: float) -> None:
    prompts, responses = family_prompts(model.config.model_type, model), make_responses()
    wanted = separate_rows(model, prompts, responses)
    wanted_gradients = gradients(model, wanted)
    with shared_prefix_enabled(model):
        found = packed_rows(model, prompts, responses)
        found_gradients = gradients(model, found)
    for row, oracle in zip(found, wanted, strict=True):
        assert (row - oracle).abs().max() <= tolerance * oracle.abs().max()
    # Everything but the head takes part: the tower, its deepstack mergers or projector, every decoder layer.
    body = {name for name, _ in model.named_parameters() if "lm_head" not in name}
    assert body - wanted_gradients.keys() == UNUSED.get(model.config.model_type, set())
    check_gradients(found_gradients, wanted_gradients, tolerance)


@students
def test_packed_pass_equals_separate_rows(name: str, text: dict) -> None:
    check_against_separate_rows(build_family(name, **text).double(), 1e-6)


@students
def test_packed_pass_equals_separate_rows_in_float64_throughout(
    name: str, text: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_against_separate_rows(compute_in_float64(build_family(name, **text), monkeypatch), 1e-9)


@pytest.mark.parametrize("name", BUILDERS)
def test_bfloat16_is_as_close_to_the_truth_as_separate_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_close_as_separate_rows(build_family(name).bfloat16(), encoded, "cpu", monkeypatch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_32_from_pixels_are_as_close_to_the_truth_as_separate_rows(
    dtype: torch.dtype, checkpointed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {**MROPE, "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    model = build_family("qwen3_vl", head_dim=32, rope_parameters=rope).to(dtype)
    if checkpointed:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Sums of a few float32 numbers in another order err more or less by chance: 0.9 to 1.14 times with other weights.
    bound = 1.2 if dtype == torch.bfloat16 else 2.0
    check_as_close_as_separate_rows(model, pixels_of, device, monkeypatch, bound)


def check_as_close_as_separate_rows(
    low: nn.Module, media: Media, device: str, monkeypatch: pytest.MonkeyPatch, bound: float = 1.2
) -> None:
    """Hidden states and the gradients of all weights, with errors as large as those of one stock pass per response."""
    exact = compute_in_float64(copy.deepcopy(low), monkeypatch)
    prompts, responses = family_prompts(low.config.model_type, low), make_responses([[24, 17, 9], [16, 16]])
    truth = separate_rows(exact, prompts, responses, media)
    truth_gradients = gradients(exact, truth)
    low.to(device)
    prompts = [prompt.to(device) for prompt in prompts]
    responses = [[response.to(device) for response in group] for group in responses]

    def errors(rows: list[torch.Tensor]) -> tuple[float, float]:
        grads = gradients(low, rows)
        differences = [(grads[key].cpu().double() - grad).flatten() for key, grad in truth_gradients.items()]
        hidden = torch.cat(rows).cpu().double() - torch.cat(truth)
        return hidden.norm().item(), torch.cat(differences).norm().item()

    separate = errors(separate_rows(low, prompts, responses, media))
    with shared_prefix_enabled(low):
        packed = errors(packed_rows(low, prompts, responses, media))
    assert packed[0] <= bound * separate[0]
    assert packed[1] <= bound * separate[1]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_response_does_not_reach_the_others(name: str) -> None:
    model = build_family(name)
    prompts, responses = family_prompts(name, model), make_responses()
    enable_shared_prefix(model)
    before = packed_rows(model, prompts, responses)
    responses[0][1] = (responses[0][1] + 1) % 80 + 3
    after = packed_rows(model, prompts, responses)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]


def test_order_of_responses_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compute_in_float64(build_family("qwen3_vl"), monkeypatch)
    prompts, responses = family_prompts("qwen3_vl", model), make_responses()
    enable_shared_prefix(model)
    first, second, third, *others = packed_rows(model, prompts, responses)
    turned = packed_rows(model, prompts, [responses[0][::-1], responses[1]])
    for row, wanted in zip(turned, [third, second, first, *others], strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-12, atol=1e-12)


def test_one_response_equals_a_plain_causal_row_and_a_prefix_may_be_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compute_in_float64(build_family("qwen3_vl"), monkeypatch)
    one = FamilyPrompt(torch.tensor([7]), torch.zeros(3, 1, dtype=torch.int64), 1, "text", torch.empty(0))
    prompts, responses = [family_prompts("qwen3_vl", model)[0], one], make_responses([[6], [3]])
    wanted = separate_rows(model, prompts, responses)
    with shared_prefix_enabled(model):
        found = packed_rows(model, prompts, responses)
    for row, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(row, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_checkpointed_layers_give_the_same_gradients(name: str, use_reentrant: bool) -> None:
    model = build_family(name).train()
    prompts, responses = family_prompts(name, model), make_responses()
    enable_shared_prefix(model)
    wanted = gradients(model, packed_rows(model, prompts, responses))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = gradients(model, packed_rows(model, prompts, responses))
    assert all(torch.equal(found[key], grad) for key, grad in wanted.items())
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_layers_give_the_same_numbers_and_compile_for_lengths_once(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    model = compute_in_float64(build_family("qwen3_vl"), monkeypatch).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    prompts = family_prompts("qwen3_vl", model)
    batches = [make_responses(lengths) for lengths in (LENGTHS, [[2, 9], [7]], [[3, 3, 3], [8, 5, 2]], [[4], [6, 11]])]
    enable_shared_prefix(model)
    wanted = [gradients(model, packed_rows(model, prompts, responses)) for responses in batches]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.language_model.layers:
        layer.compile(backend=counter)
    frames = []
    for responses, grads in zip(batches, wanted, strict=True):
        check_gradients(gradients(model, packed_rows(model, prompts, responses)), grads, 1e-12)
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    # Once for the first lengths, once with lengths as symbols, and then never again.
    assert 0 < frames[0] and frames[1] == frames[-1], frames


@pytest.mark.slow
def test_layers_compiled_by_inductor_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = compute_in_float64(build_family("qwen3_vl", num_hidden_layers=2), monkeypatch).train()
    prompts, responses = family_prompts("qwen3_vl", model), make_responses()
    enable_shared_prefix(model)
    wanted = gradients(model, packed_rows(model, prompts, responses))
    for layer in model.model.language_model.layers:
        layer.compile(backend="inductor")
    found = gradients(model, packed_rows(model, prompts, responses))
    torch._dynamo.reset()
    check_gradients(found, wanted, 1e-10)


@pytest.mark.parametrize("name", BUILDERS)
def test_enabling_sets_what_was_asked_and_disabling_brings_it_back(name: str) -> None:
    model = build_family(name)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})

    def settings() -> tuple[str, str, str]:
        config = model.config
        return tuple(part._attn_implementation for part in (config, config.text_config, config.vision_config))

    before = settings()
    assert not is_shared_prefix(model)
    with shared_prefix_enabled(model):
        inside = settings()
        with shared_prefix_enabled(model):
            assert settings() == inside
        enable_shared_prefix(model)
        assert settings() == inside and is_shared_prefix(model.model) and is_shared_prefix(nn.Sequential(model))
    assert inside[1] == SHARED_PREFIX
    assert inside[2] == ("rmsd_flash_frames" if name.startswith("qwen") else "sdpa")
    assert settings() == before and before[1] == "eager"
    disable_shared_prefix(model)
    assert settings() == before


def test_a_copy_of_an_enabled_model_is_enabled_and_independent() -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    other = copy.deepcopy(model)
    assert is_shared_prefix(other)
    disable_shared_prefix(other)
    assert is_shared_prefix(model) and not is_shared_prefix(other)
    assert other.config.text_config._attn_implementation == other.config.vision_config._attn_implementation == "sdpa"


def test_the_setting_is_not_exported(tmp_path) -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    model.save_pretrained(tmp_path)
    assert "rmsd" not in (tmp_path / "config.json").read_text()
    assert not is_shared_prefix(type(model).from_pretrained(tmp_path, local_files_only=True))


def test_setting_that_does_not_arrive_is_noticed_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("qwen3_vl")
    # transformers skips such a part with a warning only.
    text = type(model.model.language_model)
    monkeypatch.setattr(text, "_can_set_attn_implementation", classmethod(lambda _: False))
    with pytest.raises(ModelError, match=r"asked for attention .* found \['sdpa'\]"):
        enable_shared_prefix(model)
    assert model.config.vision_config._attn_implementation == "sdpa" and not is_shared_prefix(model)


def other_config(model_type: str, **text):
    """A model of another family: its config and, where a decoder layer decides, a small body of it."""
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
        ("llama", {}, "not tested with this family"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding-window layers"),
    ],
)
def test_other_models_are_refused_by_name(model_type: str, text: dict, reason: str) -> None:
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
        ("internvl", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "longest row"),
    ],
)
def test_members_of_a_family_with_other_layers_are_refused(name: str, text: dict, reason: str) -> None:
    model = build_family(name, **text)
    with pytest.raises(ModelError, match=rf"{name}: cannot share prompts, .*{reason}"):
        enable_shared_prefix(model)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_the_setting_alone_does_not_let_a_model_pass_unchecked() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = build_family("internvl", rope_parameters=rope)
    model.set_attn_implementation({"text_config": SHARED_PREFIX})
    for enable in (enable_shared_prefix, lambda model: shared_prefix_enabled(model).__enter__()):
        with pytest.raises(ModelError, match="longest row"):
            enable(model)
    prompts, responses = family_prompts("internvl", model), make_responses()
    with pytest.raises(RuntimeError, match="this model was never checked; call enable_shared_prefix"):
        packed_rows(model, prompts, responses)


def test_models_on_one_config_are_enabled_one_by_one() -> None:
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
    with pytest.raises(ValueError, match="cannot take attention_mask"):
        second.model.language_model(ids, attention_mask=torch.ones_like(ids), **inputs)
    with pytest.raises(ModelError, match="not switched on here.*switch them off there"):
        disable_shared_prefix(second)
    disable_shared_prefix(first)
    assert not is_shared_prefix(second)


def test_a_module_without_a_transformers_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear: expected a transformers model"):
        enable_shared_prefix(nn.Linear(2, 2))


def test_a_layer_that_skips_attention_is_noticed() -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    prompts, responses = family_prompts("qwen3_vl", model), make_responses()
    attention = model.model.language_model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match="ran 2 times in 3 decoder layers"):
        packed_rows(model, prompts, responses)


class TestRefusedInputs:
    """What an enabled model must not compute."""

    @pytest.fixture
    def case(self) -> tuple[nn.Module, dict, SharedPrefixPlan]:
        model = build_family("qwen2_5_vl")
        prompts, responses = family_prompts("qwen2_5_vl", model), make_responses()
        enable_shared_prefix(model)
        inputs = {**pack_inputs(prompts, responses), "mm_encoder_outputs": encode(model, prompts)}
        return model, inputs, plan_of(prompts, responses)

    def test_no_plan(self, case) -> None:
        model, inputs, _ = case
        with pytest.raises(RuntimeError, match=r"without a plan; .*run_shared_prefix"):
            model.model(**inputs, use_cache=False)

    def test_generate(self, case) -> None:
        model, _, _ = case
        with pytest.raises(RuntimeError, match=r"generate\(\), call disable_shared_prefix"):
            model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2)

    @pytest.mark.parametrize("mask", [torch.ones(1, 67, dtype=torch.int64), torch.ones(1, 1, 67, 67).bool()])
    def test_mask(self, case, mask: torch.Tensor) -> None:
        model, inputs, plan = case
        with pytest.raises(ValueError, match="Qwen2_5_VLModel: .* cannot take attention_mask"):
            run_shared_prefix(model.model, plan, **inputs, attention_mask=mask)
        with pytest.raises(ValueError, match="Qwen2_5_VLTextModel: .* cannot take attention_mask"):
            model.model(**inputs, shared_prefix=plan, attention_mask=mask, use_cache=False)

    def test_mask_by_place(self, case) -> None:
        model, inputs, plan = case
        ids = inputs["input_ids"]
        with pytest.raises(ValueError, match="expected keywords behind the first input, got 2"):
            model.model.language_model(ids, torch.ones_like(ids), shared_prefix=plan, use_cache=False)

    def test_cache(self, case) -> None:
        model, inputs, plan = case
        for cache in (transformers.DynamicCache(), ()):
            with pytest.raises(ValueError, match="Qwen2_5_VLModel: .* cannot take past_key_values"):
                run_shared_prefix(model.model, plan, **inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="Qwen2_5_VLTextModel: .* cannot take past_key_values"):
            model.model(**inputs, shared_prefix=plan, past_key_values=transformers.DynamicCache(), use_cache=False)

    @pytest.mark.parametrize("setting", [{}, {"use_cache": None}, {"use_cache": True}], ids=str)
    def test_a_cache_by_default(self, case, setting: dict) -> None:
        model, inputs, plan = case
        with pytest.raises(ValueError, match="expected use_cache=False, got"):
            model.model(**inputs, shared_prefix=plan, **setting)

    def test_no_positions(self, case) -> None:
        model, inputs, plan = case
        for positions in ({}, {"position_ids": None}):
            with pytest.raises(ValueError, match="position_ids: expected those of 67 tokens, .* got none"):
                run_shared_prefix(model.model, plan, input_ids=inputs["input_ids"], **positions)
        with pytest.raises(ValueError, match="position_ids: expected those of all tokens, .* got none"):
            run_shared_prefix(model.model, CausalCache(), input_ids=inputs["input_ids"])

    def test_two_rows(self, case) -> None:
        model, inputs, plan = case
        ids, positions = inputs["input_ids"].clamp(max=80), inputs["position_ids"]
        with pytest.raises(ValueError, match="one packed row"):
            run_shared_prefix(model.model, plan, input_ids=ids.expand(2, -1), position_ids=positions.expand(3, 2, -1))

    def test_vision_features_that_the_model_would_ignore(self, case) -> None:
        model, inputs, plan = case
        model.model.forward = lambda input_ids, position_ids, **_: pytest.fail("ran without vision")
        with pytest.raises(RuntimeError, match="ignores mm_encoder_outputs"):
            run_shared_prefix(model.model, plan, **inputs)

    def test_plan_of_other_lengths(self, case) -> None:
        model, inputs, _ = case
        plan = SharedPrefixPlan.from_lengths([10], [[2]])
        with pytest.raises(ValueError, match="position_ids: expected those of 12 tokens, .* got 67"):
            run_shared_prefix(model.model, plan, **inputs)
        with pytest.raises(ValueError, match="T=12"):
            model.model(**inputs, shared_prefix=plan, use_cache=False)

    def test_dropout_switched_on_later(self, case) -> None:
        model, inputs, plan = case
        model.model.language_model.layers[0].self_attn.attention_dropout = 0.1
        model.train()
        with pytest.raises(ValueError, match="cannot take dropout"):
            run_shared_prefix(model.model, plan, **inputs)

    def test_sliding_window_switched_on_later(self, case) -> None:
        model, inputs, plan = case
        model.model.language_model.layers[0].self_attn.sliding_window = 8
        with pytest.raises(ValueError, match="cannot take a sliding window"):
            run_shared_prefix(model.model, plan, **inputs)

    def test_model_that_is_not_enabled(self, case) -> None:
        model, inputs, plan = case
        disable_shared_prefix(model)
        with pytest.raises(RuntimeError, match="attention is sdpa, which ignores plans; call enable_shared_prefix"):
            run_shared_prefix(model.model, plan, **inputs)
        with pytest.raises(RuntimeError, match="attention is sdpa, which ignores plans; call enable_shared_prefix"):
            model.model(**inputs, shared_prefix=plan, use_cache=False)


class CausalCache:
    """Attends each row causally by itself, as a cache would that has seen nothing; notes what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...], tuple[int, ...], float]] = []

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.seen.append((layer_idx, tuple(query.shape), tuple(key.shape), scale))
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2)


def test_an_object_that_attends_itself_takes_the_place_of_a_plan() -> None:
    model = build_family("qwen3_vl").double()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    positions = torch.arange(3).expand(3, 2, 3)
    wanted = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    cache = CausalCache()
    with shared_prefix_enabled(model):
        found = run_shared_prefix(model.model, cache, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert cache.seen == [(layer, (2, 4, 3, 8), (2, 2, 3, 8), 8**-0.5) for layer in range(3)]
