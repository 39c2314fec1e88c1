"""LoRA adapters in a student's language model: the policy's, the discriminator's, and none for the reference.

peft replaces linear layers in place, so the model keeps its class and everything that works on it. One backbone can
hold several adapters. `activate` chooses which one the next forward pass uses. It must not change before the backward
of that pass, because recomputed layers would use the other adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmsd_fast.config import ModelConfig, ModelError, NotInstalled, SettingsError
from rmsd_fast.files import os_errors_of_safetensors

POLICY, DISCRIMINATOR = "policy", "discriminator"
_SEEDS = {POLICY: 0, DISCRIMINATOR: 1}
_BODY = "model.language_model."
# Sub-folder of an export that holds the adapter alone.
ADAPTER_FOLDER = "adapter"


def add_adapter(model: nn.Module, name: str, cfg: ModelConfig, *, seed: int) -> None:
    """Add an adapter to the language model. Its initial weights do not change what the model computes.

    Args:
        model: a student's model, on its device.
        name: `POLICY` or `DISCRIMINATOR`.
        cfg: rank, scale and targets of the adapter.
        seed: seed of the initial weights; the same on all processes.
    Raises:
        NotInstalled: peft is not installed.
        SettingsError: a target is not a linear layer of the language model.
        ModelError: the model has dropout.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise NotInstalled(
            f"model.adapter=lora: expected the package peft, got none ({error}); run pip install 'rmsd-fast[lora]', "
            "or set model.adapter=none"
        ) from error
    target_layers(model, cfg.lora_targets)
    dropout = getattr(model.config.text_config, "attention_dropout", 0.0)
    if dropout:
        raise ModelError(
            f"config.json: attention_dropout: expected 0 with model.adapter=lora, since the reference shares the model "
            f"in training mode, got {dropout}; set it to 0"
        )
    # A pattern instead of names, because names would also match layers of the vision tower.
    pattern = rf"{_BODY.replace('.', '[.]')}.*[.]({'|'.join(cfg.lora_targets)})"
    config = LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=pattern, bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns about a second adapter, which is intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed + _SEEDS[name])
        inject_adapter_in_model(config, model, adapter_name=name)
    activate(adapted_layers(model).values(), name)


def target_layers(model: nn.Module, targets: list[str]) -> list[nn.Module]:
    """Return the layers of the language model that get adapters.

    Raises:
        SettingsError: a target is not a linear layer of the language model.
    """
    linear = {
        path: module
        for path, module in model.named_modules()
        if path.startswith(_BODY) and (isinstance(module, nn.Linear) or _is_adapted(module))
    }
    ends = sorted({path.rpartition(".")[2] for path in linear})
    for target in targets:
        if target not in ends:
            raise SettingsError(
                f"model.lora_targets: expected linear layers of the language model, {ends}, got {target!r}; leave it "
                "out"
            )

    return [module for path, module in linear.items() if path.rpartition(".")[2] in targets]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters by their names in the model; an empty dict for a model without adapters."""
    return {name: module for name, module in model.named_modules() if _is_adapted(module)}


def activate(layers: Iterable[Any], name: str | None) -> None:
    """Use the adapter `name` in the following passes, or none. Only the weights of this adapter are trainable then.

    Args:
        layers: the layers with adapters. Callers keep them, because a search through the model in each pass takes time.
        name: the adapter; None = the backbone alone.
    """
    for layer in layers:
        if name is None:
            layer.enable_adapters(False)
            continue
        if layer.disable_adapters:
            layer.enable_adapters(True)
        layer.set_adapter(name)


@torch.no_grad()
def merged_weights(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of the model with an adapter merged into them, under the names of the model without adapters.

    The sums are computed in float32 and rounded once. They are in host memory, because all of them together take as
    much memory as the model.
    """
    layers = adapted_layers(model)
    weights = {
        key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if ".lora_" not in key
    }
    for path, layer in layers.items():
        base = layer.get_base_layer().weight
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        weights[f"{path}.weight"] = (base.float() + layer.scaling[name] * (b.float() @ a.float())).to("cpu", base.dtype)
    return weights


def write_adapter(model: nn.Module, name: str, folder: Path, *, base_model: str) -> None:
    """Write an adapter alone, as peft reads it: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        model: the model with the adapter.
        name: the adapter.
        folder: folder to create.
        base_model: the model that the adapter belongs to, for `adapter_config.json`.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    config = replace(
        model.peft_config[name], base_model_name_or_path=base_model, inference_mode=True, task_type="CAUSAL_LM"
    )
    config.save_pretrained(folder)
    tensors = {}
    for path, layer in adapted_layers(model).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part)[name].weight
            tensors[f"base_model.model.{path}.{part}.weight"] = weight.detach().contiguous()
    with os_errors_of_safetensors(folder):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
