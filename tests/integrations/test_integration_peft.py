"""Test peft LoRA under both fused trainers: losses and adapters equal those of the library's trainer.

A head with an adapter is refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs peft (extra: test)")
pytest.importorskip("accelerate", reason="needs accelerate (extra: test)")
import test_integration_hf as hf
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from rmsd_fast.integrations.hf import FusedTrainer


def lora(*targets: str, **options) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **options)


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same_adapters(own, fused, losses) -> None:
    """Compare float32 runs: losses within 1e-5, and adapters within 1e-4 of their largest weight."""
    torch.testing.assert_close(losses(fused), losses(own), rtol=1e-5, atol=1e-6)
    found, expected = adapters(fused.model), adapters(own.model)
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    moved = max(float(value.abs().max()) for name, value in expected.items() if "lora_B" in name)
    assert moved > 1e-3, "the model learned nothing, so the comparison is meaningless"
    assert max(float((found[name] - value).abs().max()) for name, value in expected.items()) <= 1e-4 * moved


def test_trainer_with_adapters(tmp_path: Path) -> None:
    trainers = []
    for cls in (Trainer, FusedTrainer):
        torch.manual_seed(2)
        adapted = get_peft_model(hf.model("own head"), lora("q_proj", "down_proj"))
        trainers.append(hf.build(cls, tmp_path, trained=adapted))
        trainers[-1].train()
    assert_same_adapters(*trainers, hf.losses)


@pytest.mark.parametrize(("target", "options"), [("lm_head", {}), ("q_proj", {"modules_to_save": ["lm_head"]})])
def test_an_adapter_on_the_head_is_refused(target: str, options: dict, tmp_path: Path) -> None:
    adapted = get_peft_model(hf.model("own head"), lora(target, **options))
    with pytest.raises(RuntimeError, match=r"got peft\..*leave the output embedding out of target_modules"):
        hf.build(FusedTrainer, tmp_path, trained=adapted)


@pytest.mark.parametrize("objective", ["policy", "log_prob"])
def test_grpo_with_adapters(objective: str, tmp_path: Path) -> None:
    """The reference is the model without its adapters."""
    pytest.importorskip("trl", reason="needs trl (extra: test)")
    import test_integration_trl as grpo

    from rmsd_fast.integrations.trl import FusedGRPOTrainer

    folder, tokenizer = tmp_path / "cohere2", grpo.make_tokenizer()
    torch.manual_seed(5)
    cls, config = grpo.FAMILIES["cohere2"]
    cls(config()).save_pretrained(folder)
    options = {"beta": 0.1, "use_bias_correction_kl": False, "num_iterations": 2, "learning_rate": 0.5}
    trainers = []
    for trainer, extra in ((grpo.GRPOTrainer, {}), (FusedGRPOTrainer, {"fused_objective": objective})):
        torch.manual_seed(2)
        trainers.append(
            grpo.trained(trainer, folder, tokenizer, options=options, peft_config=lora("q_proj", "down_proj"), **extra)
        )
    assert_same_adapters(*trainers, lambda trainer: torch.tensor(grpo.history(trainer, "loss")))
    assert any(value > 0 for value in grpo.history(trainers[1], "kl"))
    assert grpo.history(trainers[1], "kl") == pytest.approx(grpo.history(trainers[0], "kl"), rel=1e-4, abs=1e-6)
    # TRL itself refuses the first case.
    for refused in (lora("lm_head"), lora("q_proj", modules_to_save=["lm_head"])):
        with pytest.raises((ValueError, RuntimeError), match="lm_head|got peft"):
            grpo.build(FusedGRPOTrainer, folder, tokenizer, peft_config=refused)
