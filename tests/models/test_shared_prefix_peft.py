"""Test shared prompts in models with peft adapters: a packed pass equals peft's own forward pass of separate rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("peft", reason="needs peft (extra: test)")
import peft
from family_students import WIDTH, FamilyPrompt, build_family, compute_in_float64, family_prompts, pack_inputs
from shared_prefix_students import make_responses, media_of, packed_rows, plan_of
from torch import nn
from transformers import PreTrainedModel

from rmsd_fast.config import ModelError
from rmsd_fast.models.shared_prefix import (
    ADAPTERS,
    disable_shared_prefix,
    enable_shared_prefix,
    is_shared_prefix,
    run_shared_prefix,
    shared_prefix_enabled,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(*targets: str, **options) -> peft.LoraConfig:
    """Return a config of adapters that do not start at 0, so that a comparison covers them."""
    return peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **options)


CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "attention and MLP": lambda: lora(*PROJECTIONS),
    # In this case keys and values of the first layer do not need a gradient.
    "queries alone": lambda: lora("q_proj"),
    "DoRA": lambda: lora("v_proj", "down_proj", use_dora=True),
    "embedding and head": lambda: lora("embed_tokens", "v_proj", "lm_head"),
    "modules to save": lambda: lora("v_proj", modules_to_save=["embed_tokens", "norm", "lm_head"]),
    "trained tokens": lambda: lora("v_proj", trainable_token_indices={"embed_tokens": [4, 5, 6, 7, 8]}),
    "IA3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "LOHA": lambda: peft.LoHaConfig(r=3, target_modules=["v_proj", "down_proj"], init_weights=False),
    "LOKR": lambda: peft.LoKrConfig(r=3, target_modules=["v_proj", "down_proj"], init_weights=False),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "v_proj"], init_weights=False),
    "VERA": lambda: peft.VeraConfig(r=8, target_modules=["q_proj"], init_weights=False),
}


def adapted(config: peft.PeftConfig, monkeypatch: pytest.MonkeyPatch, name: str = "qwen3", **options) -> peft.PeftModel:
    """Return a model with adapters in float64 throughout."""
    base = compute_in_float64(build_family(name), monkeypatch)
    torch.manual_seed(3)
    return peft.get_peft_model(base, config, **options).double()


def logits_apart(model: nn.Module, prompts: list[FamilyPrompt], responses: list) -> list[torch.Tensor]:
    """Return the logits [P + R, V] of every row from peft's forward pass."""
    assert not is_shared_prefix(model)
    return [
        model(**pack_inputs([prompt], [[ids]]), **media_of(base_of(model), [prompt]), use_cache=False).logits[0]
        for prompt, group in zip(prompts, responses, strict=True)
        for ids in group
    ]


def logits_packed(model: nn.Module, prompts: list[FamilyPrompt], responses: list) -> list[torch.Tensor]:
    """Return the same logits from one packed pass."""
    base = base_of(model)
    return [base.get_output_embeddings()(row) for row in packed_rows(base, prompts, responses)]


def base_of(model: nn.Module) -> nn.Module:
    return next(part for part in model.modules() if isinstance(part, PreTrainedModel))


def loss_and_gradients(model: nn.Module, rows: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    loss = sum((row * torch.randn(row.shape, generator=generator).to(row)).sum() for row in rows)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_against_peft(model: nn.Module, tolerance: float = 1e-9) -> dict[str, torch.Tensor]:
    """Compare logits and gradients, and return the gradients."""
    name = base_of(model).config.model_type
    prompts, responses = family_prompts(name, base_of(model)), make_responses()
    wanted = logits_apart(model, prompts, responses)
    wanted_loss, wanted_gradients = loss_and_gradients(model, wanted)
    with shared_prefix_enabled(model):
        found = logits_packed(model, prompts, responses)
        loss, gradients = loss_and_gradients(model, found)
    for row, oracle in zip(found, wanted, strict=True):
        assert (row - oracle).abs().max() <= tolerance * oracle.abs().max()
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == wanted_gradients.keys()
    total = torch.cat([grad.flatten() for grad in wanted_gradients.values()]).norm()
    for key, grad in wanted_gradients.items():
        assert (gradients[key] - grad).norm() <= tolerance * max(grad.norm(), 1e-6 * total), key
    return gradients


@pytest.mark.parametrize("case", CONFIGS)
def test_a_packed_pass_equals_a_peft_forward_pass(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(CONFIGS[case](), monkeypatch)
    gradients = check_against_peft(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # No parameter of the base model gets a gradient, and every adapter gets one.
    assert gradients.keys() == trained and all(gradient.any() for gradient in gradients.values())


def test_every_supported_kind_of_adapter_is_tested() -> None:
    assert {str(config().peft_type.value) for config in CONFIGS.values()} == set(ADAPTERS)


@pytest.mark.parametrize("name", ["qwen2", "qwen3_vl"])
def test_other_families(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_peft(adapted(lora("q_proj", "v_proj", "down_proj"), monkeypatch, name))


def test_several_adapters_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora("q_proj", "v_proj"), monkeypatch)
    model.add_adapter("second", lora("k_proj", "v_proj", "up_proj"))
    model.double()
    names = [check_against_peft(model).keys()]
    model.set_adapter("second")
    names.append(check_against_peft(model).keys())
    model.base_model.set_adapter(["default", "second"])
    both = check_against_peft(model).keys()
    assert both == names[0] | names[1] and not names[0] & names[1]
    prompts, responses = family_prompts("qwen3", base_of(model)), make_responses()
    with model.disable_adapter(), torch.no_grad():
        wanted = logits_apart(model, prompts, responses)
        with shared_prefix_enabled(model):
            found = logits_packed(model, prompts, responses)
    plain = compute_in_float64(build_family("qwen3"), monkeypatch)
    with torch.no_grad():
        base = logits_apart(plain, prompts, responses)
    for row, oracle, without in zip(found, wanted, base, strict=True):
        torch.testing.assert_close(row, oracle, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(row, without, rtol=1e-9, atol=1e-9)


def test_a_mixed_model(monkeypatch: pytest.MonkeyPatch) -> None:
    check_against_peft(adapted(lora("q_proj", "down_proj"), monkeypatch, mixed=True))


def test_adapters_added_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", minversion="0.20", reason="transformers adds adapters with peft 0.20 or later")
    model = compute_in_float64(build_family("qwen3"), monkeypatch)
    model.add_adapter(lora("q_proj", "down_proj"))
    gradients = check_against_peft(model.double())
    assert any("lora_A" in name for name in gradients)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_under_frozen_weights(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora("q_proj", "down_proj"), monkeypatch).train()
    prompts, responses = family_prompts("qwen3", base_of(model)), make_responses()
    enable_shared_prefix(model)
    _, wanted = loss_and_gradients(model, logits_packed(model, prompts, responses))
    model.enable_input_require_grads()
    base_of(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    _, found = loss_and_gradients(model, logits_packed(model, prompts, responses))
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], grad) for key, grad in wanted.items())


def test_optimizer_steps_equal_those_of_separate_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take five AdamW steps on the cross entropy of the responses."""
    weights = []
    for packed in (False, True):
        model = adapted(lora(*PROJECTIONS, modules_to_save=["norm"]), monkeypatch).train()
        prompts, responses = family_prompts("qwen3", base_of(model)), make_responses()
        logits_of = logits_packed if packed else logits_apart
        if packed:
            enable_shared_prefix(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # If a gradient is 0 up to rounding, Adam's default eps would amplify the rounding error.
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        for _ in range(5):
            rows = logits_of(model, prompts, responses)
            targets = [ids for group in responses for ids in group]
            scored = torch.cat([row[-1 - len(ids) : -1] for row, ids in zip(rows, targets, strict=True)])
            nn.functional.cross_entropy(scored, torch.cat(targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append({name: p.detach() for name, p in model.named_parameters() if name in before})
    apart, together = weights
    for name, weight in apart.items():
        assert (weight - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(together[name], weight, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING.*learned tokens"),
        (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PREFIX_TUNING.*such as LoRA"),
        (
            lambda: lora("q_proj", task_type="CAUSAL_LM", alora_invocation_tokens=[4, 5]),
            "activated LoRA.*without alora_invocation_tokens",
        ),
        (lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), "ADALORA.*use one of LORA, IA3"),
        (lambda: lora("down_proj", modules_to_save=["self_attn"]), "whole attention modules out of peft's"),
    ],
    ids=["prompt tuning", "prefix tuning", "aLoRA", "AdaLoRA", "copies of attention"],
)
def test_unsupported_adapters_are_refused(config: Callable, reason: str) -> None:
    model = peft.get_peft_model(build_family("qwen3"), config())
    with pytest.raises(ModelError, match=f"qwen3: .*{reason}"):
        enable_shared_prefix(model)
    assert not is_shared_prefix(model)


def test_an_adapter_added_later_is_checked_when_enabled_again() -> None:
    model = peft.get_peft_model(build_family("qwen3"), lora("q_proj", task_type="CAUSAL_LM"))
    enable_shared_prefix(model)
    enable_shared_prefix(model)
    model.add_adapter("late", lora("q_proj", task_type="CAUSAL_LM", alora_invocation_tokens=[4]))
    with pytest.raises(ModelError, match="'late'"):
        enable_shared_prefix(model)


def test_slips() -> None:
    model = peft.get_peft_model(build_family("qwen3"), lora("q_proj", task_type="CAUSAL_LM"))
    prompts, responses = family_prompts("qwen3", base_of(model)), make_responses()
    plan, inputs = plan_of(prompts, responses), pack_inputs(prompts, responses)
    body = model.get_base_model().model
    enable_shared_prefix(model)
    with pytest.raises(ValueError, match=r"PeftModelForCausalLM: .*pass model\.get_base_model\(\)\.model"):
        run_shared_prefix(model, plan, **inputs)
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM: .*pass model\.model"):
        run_shared_prefix(model.get_base_model(), plan, **inputs)
    with pytest.raises(ValueError, match=r"adapter_names is read only by peft's wrapper; call model\.set_adapter"):
        run_shared_prefix(body, plan, **inputs, adapter_names=["default"])
    # A trainer calls peft's forward pass with labels and a mask.
    with pytest.raises(RuntimeError, match="expected a plan, got none"):
        model(input_ids=inputs["input_ids"], labels=inputs["input_ids"])
    assert run_shared_prefix(body, plan, **inputs).shape == (1, plan.tokens, WIDTH)
    disable_shared_prefix(model)
    with pytest.raises(RuntimeError, match="expected attention rmsd_shared_prefix, got sdpa, which ignores plans"):
        run_shared_prefix(body, plan, **inputs)
