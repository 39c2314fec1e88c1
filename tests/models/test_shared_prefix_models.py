"""Test shared prompts in transformers models: one packed pass against separate rows through the stock attention.

The tests also cover enabling and disabling, and checkpointed and compiled layers. test_shared_prefix_refusals.py tests
refused models and inputs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from family_students import (
    BUILDERS,
    MROPE,
    TEXT_FAMILIES,
    FamilyPrompt,
    build_family,
    compute_in_float64,
    family_prompts,
    pack_inputs,
    pixels_of,
)
from shared_prefix_students import (
    LENGTHS,
    CausalCache,
    Media,
    Responses,
    make_responses,
    media_of,
    packed_rows,
    plan_of,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from rmsd_fast.config import ModelError
from rmsd_fast.models.shared_prefix import (
    SHARED_PREFIX,
    disable_shared_prefix,
    enable_shared_prefix,
    is_shared_prefix,
    run_shared_prefix,
    shared_prefix_enabled,
    text_positions,
)
from rmsd_kernels import SharedPrefixPlan

STUDENTS = [(name, {}) for name in (*BUILDERS, *TEXT_FAMILIES)] + [
    ("internvl", {"model_type": "qwen3", "head_dim": 8}),
    ("internvl", {"model_type": "llama"}),
]
students = pytest.mark.parametrize(
    ("name", "text"), STUDENTS, ids=[f"{name}-{text.get('model_type', 'default')}" for name, text in STUDENTS]
)
# LLaVA-OneVision reads the last layer of the tower before the norm that follows it.
UNUSED = {"llava_onevision": {f"model.vision_tower.post_layernorm.{kind}" for kind in ("weight", "bias")}}


def separate_rows(
    model: nn.Module, prompts: list[FamilyPrompt], responses: Responses, media: Media = media_of
) -> list[torch.Tensor]:
    """Return the same from one stock pass per response."""
    assert not is_shared_prefix(model)
    return [
        model.model(**pack_inputs([prompt], [[response]]), **media(model, [prompt]), use_cache=False).last_hidden_state[
            0
        ]
        for prompt, group in zip(prompts, responses, strict=True)
        for response in group
    ]


def loss_of(rows: list[torch.Tensor]) -> torch.Tensor:
    """Return a loss that weights every element of every row differently."""
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
        # The gradient of a key bias without rotary embedding is only rounding error.
        scale = max(grad.norm(), 1e-6 * total)
        assert (found[name] - grad).norm() <= tolerance * scale, name


def check_against_separate_rows(model: nn.Module, tolerance: float, media: Media = media_of) -> None:
    prompts, responses = family_prompts(model.config.model_type, model), make_responses()
    wanted = separate_rows(model, prompts, responses, media)
    wanted_gradients = gradients(model, wanted)
    with shared_prefix_enabled(model):
        found = packed_rows(model, prompts, responses, media)
        found_gradients = gradients(model, found)
    for row, oracle in zip(found, wanted, strict=True):
        assert (row - oracle).abs().max() <= tolerance * oracle.abs().max()
    # Everything but the head takes part: a tower, its deepstack mergers or projector, and every decoder layer.
    body = {name for name, _ in model.named_parameters() if "lm_head" not in name}
    assert body - wanted_gradients.keys() == UNUSED.get(model.config.model_type, set())
    check_gradients(found_gradients, wanted_gradients, tolerance)


@students
def test_packed_pass_from_pixels_equals_separate_rows(name: str, text: dict) -> None:
    check_against_separate_rows(build_family(name, **text).double(), 1e-6, pixels_of)


@students
def test_packed_pass_equals_separate_rows_in_float64_throughout(
    name: str, text: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_against_separate_rows(compute_in_float64(build_family(name, **text), monkeypatch), 1e-9)


@pytest.mark.parametrize("name", [*BUILDERS, "qwen3"])
def test_bfloat16_error_is_that_of_separate_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_as_close_as_separate_rows(build_family(name).bfloat16(), media_of, "cpu", monkeypatch)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_with_heads_of_32_from_pixels_is_that_of_separate_rows(
    dtype: torch.dtype, checkpointed: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {**MROPE, "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    model = build_family("qwen3_vl", head_dim=32, rope_parameters=rope).to(dtype)
    if checkpointed:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Sums of a few float32 numbers in another order have a random error: 0.9 to 1.14 times as large with other weights.
    bound = 1.2 if dtype == torch.bfloat16 else 2.0
    check_as_close_as_separate_rows(model, pixels_of, device, monkeypatch, bound)


def check_as_close_as_separate_rows(
    low: nn.Module, media: Media, device: str, monkeypatch: pytest.MonkeyPatch, bound: float = 1.2
) -> None:
    """Check that hidden states and weight gradients have errors as large as those of separate stock passes."""
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


@pytest.mark.parametrize("name", [*BUILDERS, "qwen3"])
def test_a_response_does_not_affect_the_other_responses(name: str) -> None:
    model = build_family(name)
    prompts, responses = family_prompts(name, model), make_responses()
    enable_shared_prefix(model)
    before = packed_rows(model, prompts, responses)
    responses[0][1] = (responses[0][1] + 1) % 80 + 3
    after = packed_rows(model, prompts, responses)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, True]


def test_order_of_responses_does_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
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
@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "qwen2"])
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
def test_compiled_layers_give_the_same_numbers_and_recompile_once_for_lengths(
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
    # Layers compile once for the first lengths, once with lengths as symbols, and then never again.
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
def test_disabling_restores_the_settings_before_enabling(name: str) -> None:
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


def test_enabling_a_text_model_and_disabling_it() -> None:
    model = build_family("qwen3")
    model.set_attn_implementation("eager")
    with shared_prefix_enabled(model):
        assert model.config._attn_implementation == SHARED_PREFIX and is_shared_prefix(model.model)
        with shared_prefix_enabled(model.model):
            pass
        assert is_shared_prefix(model)
    assert model.config._attn_implementation == "eager"


def test_the_language_model_of_a_family_is_a_text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was enabled as a part is not disabled through the whole model, where its parts have other names."""
    model = compute_in_float64(build_family("internvl"), monkeypatch)
    language = model.model.language_model
    plan = SharedPrefixPlan.from_lengths([4], [[2, 3]])
    ids = torch.arange(3, 12)[None]
    wanted = language(input_ids=ids[:, :6], use_cache=False).last_hidden_state
    with shared_prefix_enabled(language):
        found = run_shared_prefix(language, plan, input_ids=ids, position_ids=text_positions(plan))
        with pytest.raises(ModelError, match="disable them there"):
            disable_shared_prefix(model)
    torch.testing.assert_close(found[:, :6], wanted, rtol=1e-9, atol=1e-9)
    assert not is_shared_prefix(model) and model.config.vision_config._attn_implementation == "sdpa"


def test_positions_of_text_are_counted_from_the_prompt() -> None:
    prompts, responses = family_prompts("qwen2", build_family("qwen2")), make_responses()
    wanted = pack_inputs(prompts, responses)["position_ids"]
    assert torch.equal(text_positions(plan_of(prompts, responses)), wanted)
    assert text_positions(SharedPrefixPlan.from_lengths([2, 1], [[], [2]])).tolist() == [[0, 1, 0, 1, 2]]


def test_a_copy_of_an_enabled_model_is_enabled_and_independent() -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    other = copy.deepcopy(model)
    assert is_shared_prefix(other)
    disable_shared_prefix(other)
    assert is_shared_prefix(model) and not is_shared_prefix(other)
    assert other.config.text_config._attn_implementation == other.config.vision_config._attn_implementation == "sdpa"


def test_the_shared_prefix_setting_is_not_exported(tmp_path) -> None:
    model = build_family("qwen3_vl")
    enable_shared_prefix(model)
    model.save_pretrained(tmp_path)
    assert "rmsd" not in (tmp_path / "config.json").read_text()
    assert not is_shared_prefix(type(model).from_pretrained(tmp_path, local_files_only=True))


def test_an_object_with_its_own_attention_replaces_a_plan() -> None:
    model = build_family("qwen3_vl").double()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    positions = torch.arange(3).expand(3, 2, 3)
    wanted = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    cache = CausalCache()
    with shared_prefix_enabled(model):
        found = run_shared_prefix(model.model, cache, input_ids=ids, position_ids=positions)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert cache.seen == [(layer, (2, 4, 3, 8), (2, 2, 3, 8), 8**-0.5) for layer in range(3)]
