"""LoRA adapters in a student's language model: the policy's, the discriminator's, and none for the reference.

peft replaces linear layers in place, so the model keeps its class and everything that works on it. One backbone can
hold several adapters. `activate` chooses which one the next forward pass uses. It must not change before the backward
of that pass, because recomputed layers would use the other adapter.

A quantized backbone keeps the weights of the base model in all stages, because quantizing merged weights again would
round away what an adapter has learned. The adapter of the student that a stage starts from then stays active, frozen.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rmsd_fast.config import ModelConfig, ModelError, NotInstalled, SettingsError, first_line
from rmsd_fast.files import os_errors_of_safetensors, read_tensors
from rmsd_fast.models.folders import model_digests, resolve_folder
from rmsd_fast.models.quantize import LANGUAGE_MODEL, QuantizedBase, full_weight, quantized_layers

if TYPE_CHECKING:
    from rmsd_fast.models.students import Student

POLICY, DISCRIMINATOR = "policy", "discriminator"
# The frozen adapter of the student that a stage starts from, if its backbone is quantized.
START = "start"
_SEEDS = {POLICY: 0, DISCRIMINATOR: 1}
# Sub-folder of an export that holds the adapter alone.
ADAPTER_FOLDER = "adapter"
# File in that folder if the adapter was trained on a quantized backbone.
QUANTIZATION_FILE = "quantization.json"


def add_adapter(model: nn.Module, name: str, cfg: ModelConfig, *, seed: int) -> None:
    """Add an adapter to the language model. Its initial weights do not change what the model computes.

    Args:
        model: a student's model, on its device.
        name: `POLICY` or `DISCRIMINATOR`.
        cfg: rank, scale and targets of the adapter.
        seed: seed of the initial weights; the same on all processes.
    Raises:
        NotInstalled: peft is not installed.
        SettingsError: a target is not a linear layer of the language model, or the targets are not those of the
            adapter that the model already has.
        ModelError: the model has dropout.
    """
    peft = import_peft()
    targets = target_layers(model, cfg.lora_targets)
    started = {path: layer for path, layer in adapted_layers(model).items() if START in layer.lora_A}
    if started and set(map(id, started.values())) != set(map(id, targets)):
        same = sorted({path.rpartition(".")[2] for path in started})
        raise SettingsError(
            f"model.lora_targets: expected {same}, the layers with adapters of the student to start from, since both "
            f"adapters are exported as one, got {sorted(cfg.lora_targets)}; set model.lora_targets=[{','.join(same)}]"
        )
    dropout = getattr(model.config.text_config, "attention_dropout", 0.0)
    if dropout:
        raise ModelError(
            f"config.json: attention_dropout: expected 0 with model.adapter=lora, since the reference shares the model "
            f"in training mode, got {dropout}; set it to 0"
        )
    # A pattern instead of names, because names would also match layers of the vision tower.
    pattern = rf"{LANGUAGE_MODEL.replace('.', '[.]')}.*[.]({'|'.join(cfg.lora_targets)})"
    config = peft.LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=pattern, bias="none")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns about a second adapter, which is intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed + _SEEDS[name])
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    activate(adapted_layers(model).values(), name)


def import_peft() -> Any:
    """Return the package peft, or raise NotInstalled."""
    try:
        import peft
    except ImportError as error:
        raise NotInstalled(
            f"model.adapter=lora: expected the package peft, got none ({error}); run pip install 'rmsd-fast[lora]', "
            "or set model.adapter=none"
        ) from error
    return peft


def read_quantized_base(export: Path) -> QuantizedBase | None:
    """Return the base model of an export whose adapter was trained on a quantized backbone; None for other models.

    Raises:
        ModelError: the export's adapter is damaged.
    """
    path = export / ADAPTER_FOLDER / QUANTIZATION_FILE
    if not path.is_file():
        return None
    try:
        quantization = json.loads(path.read_text(encoding="utf-8"))
        dtype, files = quantization["dtype"], dict(quantization["files"])
        path = path.with_name("adapter_config.json")
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return QuantizedBase(str(base), str(dtype), files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: expected the base model of the adapter, got an unreadable file ({first_line(error)}); restore "
            "it, or set model.quantize=none to use the merged weights"
        ) from error


def check_base(base: QuantizedBase, export: Path, *, dtype: str) -> Path:
    """Return the folder of the base model of an export, after comparing its files with those used in training.

    Args:
        base: the base model that `read_quantized_base` returned.
        export: folder of the export, for errors.
        dtype: `model.dtype` of this run.
    Raises:
        SettingsError: the dtype is not that of training.
        ModelError: the base model does not exist, or one of its files has changed.
    """
    merged = "or set model.quantize=none to use the merged weights"
    if dtype != base.dtype:
        raise SettingsError(
            f"model.dtype: expected {base.dtype}, in which the base model of {export} was quantized, got {dtype}; set "
            f"model.dtype={base.dtype}, {merged}"
        )
    expected = f"{export}: expected the base model {base.path} with which its adapter was trained"
    try:
        folder = resolve_folder(base.path)
        files = model_digests(folder)
    except ModelError as error:
        raise ModelError(f"{expected}, got: {error}; restore it, {merged}") from error
    for name in sorted(base.files.keys() | files.keys()):
        if base.files.get(name) != files.get(name):
            change = "a changed" if name in base.files and name in files else "no" if name in base.files else "a new"
            raise ModelError(f"{expected}, got {change} file {folder / name}; restore the base model, {merged}")
    return folder


@torch.no_grad()
def add_start(model: nn.Module, export: Path) -> None:
    """Add the adapter of an export, frozen, to its base model.

    Args:
        model: the quantized base model, on its device.
        export: folder of the export.
    Raises:
        ModelError: the adapter is damaged, or does not belong to the model.
    """
    peft = import_peft()
    folder = export / ADAPTER_FOLDER
    try:
        config = peft.LoraConfig.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]):
            peft.inject_adapter_in_model(config, model, adapter_name=START)
        weights = read_tensors(folder / "adapter_model.safetensors")
    # The exception type of safetensors is derived from Exception directly.
    except Exception as error:
        raise ModelError(
            f"{export}: expected an export with its adapter, got a damaged one ({type(error).__name__}: "
            f"{first_line(error)}); restore the folder"
        ) from error
    layers = adapted_layers(model)
    parts = {
        f"base_model.model.{path}.{part}.weight": getattr(layer, part)[START]
        for path, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }
    if parts.keys() != weights.keys() or any(weights[key].shape != part.weight.shape for key, part in parts.items()):
        raise ModelError(
            f"{folder}: expected an adapter of {config.base_model_name_or_path}, got other layers or shapes; restore "
            "the folder"
        )
    for key, part in parts.items():
        part.weight.data = weights[key].to(part.weight.device, model.dtype)
    activate(layers.values(), None)


def target_layers(model: nn.Module, targets: list[str]) -> list[nn.Module]:
    """Return the layers of the language model that get adapters.

    Raises:
        SettingsError: a target is not a linear layer of the language model.
    """
    linear = {
        path: module
        for path, module in model.named_modules()
        if path.startswith(LANGUAGE_MODEL) and (isinstance(module, nn.Linear) or _is_adapted(module))
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
        name: the adapter; None = the backbone alone. The adapter `START`, if there is one, is part of the backbone.
    """
    for layer in layers:
        active = [START] if START in layer.lora_A else []
        active += [] if name is None else [name]
        if not active:
            layer.enable_adapters(False)
            continue
        if layer.disable_adapters:
            layer.enable_adapters(True)
        layer.set_adapter(active)
        if START in active:
            # peft makes all active adapters trainable.
            layer.lora_A[START].requires_grad_(False)
            layer.lora_B[START].requires_grad_(False)


@torch.no_grad()
def merged_weights(model: nn.Module, name: str | None) -> dict[str, torch.Tensor]:
    """Return the weights of the model with an adapter merged into them, under the names of the model without adapters.

    With `name=None`, they are those of the backbone. The sums are computed in float32 and rounded once. They are in
    host memory, because all of them together take as much memory as the model. Quantized weights are dequantized.
    """
    layers = adapted_layers(model)
    weights = {
        key.replace(".base_layer.", "."): value for key, value in model.state_dict().items() if ".lora_" not in key
    }
    for path, layer in quantized_layers(model).items():
        path = path.removesuffix(".base_layer")
        for key in [key for key in weights if key.startswith(f"{path}.weight.")]:
            del weights[key]
        if path not in layers:
            weights[f"{path}.weight"] = full_weight(layer).to("cpu")
    for path, layer in layers.items():
        weights[f"{path}.weight"] = merged_weight(layer, name).to("cpu")
    return weights


@torch.no_grad()
def merged_weight(layer: Any, name: str | None) -> torch.Tensor:
    """Return the weight of a layer with an adapter merged into it, [out, in].

    The sum is computed in float32 and rounded once to the dtype of the layer. The layer itself does not change.
    """
    base = full_weight(layer.get_base_layer())
    merged = base.float()
    for adapter in _merged_adapters(layer, name):
        product = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
        merged = merged + layer.scaling[adapter] * product
    return merged.to(base.dtype)


def _merged_adapters(layer: Any, name: str | None) -> list[str]:
    return [*([START] if START in layer.lora_A else []), *([] if name is None else [name])]


def write_adapter(student: Student, name: str, folder: Path, *, base_model: str) -> None:
    """Write an adapter alone, as peft reads it: `adapter_config.json` and `adapter_model.safetensors`.

    The adapter `START`, if there is one, is part of it: their ranks add up.

    Args:
        student: the student with the adapter.
        name: the adapter.
        folder: folder to create.
        base_model: the model that the adapter belongs to, for `adapter_config.json`. Not used if the backbone is
            quantized, since the student then holds its base.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    model, base = student.model, student.base
    assert (base is None) == (not quantized_layers(model)), "a quantized backbone without its base"
    layers = adapted_layers(model)
    config = model.peft_config[name]
    if START in model.peft_config:
        start = model.peft_config[START]
        rank = start.r + config.r
        config = replace(config, r=rank, lora_alpha=config.lora_alpha / config.r * rank)
    base_model = base.path if base else base_model
    config = replace(config, base_model_name_or_path=base_model, inference_mode=True, task_type="CAUSAL_LM")
    config.save_pretrained(folder)
    tensors = {}
    for path, layer in layers.items():
        parts = _merged_adapters(layer, name)
        a = torch.cat([layer.lora_A[part].weight for part in parts])
        # peft multiplies the whole product by the scale of `name`.
        b = [layer.lora_B[part].weight * (layer.scaling[part] / layer.scaling[name]) for part in parts]
        for part, weight in (("lora_A", a), ("lora_B", torch.cat(b, dim=1))):
            tensors[f"base_model.model.{path}.{part}.weight"] = weight.detach().contiguous()
    if base:
        quantization = {"quantize": "nf4", "dtype": base.dtype, "files": base.files}
        (folder / QUANTIZATION_FILE).write_text(json.dumps(quantization, indent=1) + "\n", encoding="utf-8")
    with os_errors_of_safetensors(folder):
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
