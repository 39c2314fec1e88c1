"""Use Liger's RMSNorm, RoPE and SwiGLU in a single student. Liger's losses are not used, because we have our own.

The kernels are applied to one model, never to classes of transformers. `liger_kernel`'s own patch replaces names in
transformers' module, which affects every model of the process, and silently skips the SwiGLU of Qwen3-VL.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import types
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from rmsd_fast.config import NotInstalled, SettingsError
from rmsd_fast.models.families import family_of
from rmsd_fast.models.families.family import LigerLayers


def check_liger(setting: str, device: torch.device) -> None:
    """Raise SettingsError if `model.liger` is "on" but Liger cannot be used."""
    obstacle = _obstacle(device)
    if setting == "on" and obstacle:
        raise SettingsError(f"model.liger=on: {obstacle}; set model.liger=auto or model.liger=off")


def use_liger(setting: str, device: torch.device) -> bool:
    """Return whether `model.liger` selects Liger's kernels on this device.

    Args:
        setting: "auto", "on" or "off".
        device: device of the student.
    Raises:
        SettingsError: the setting is "on" but Liger cannot be used.
    """
    check_liger(setting, device)
    return setting != "off" and not _obstacle(device)


def describe_liger(setting: str, device: torch.device) -> str:
    """Describe for the run's log which of Liger's kernels the students use, or why they use none."""
    if use_liger(setting, device):
        return f"rms_norm, rope, swiglu (liger-kernel {importlib.metadata.version('liger-kernel')})"
    return f"off ({'model.liger=off' if setting == 'off' else _obstacle(device)})"


def apply_liger(model: PreTrainedModel) -> dict[str, int]:
    """Replace layers of the model by Liger's. Parameters, their names and the state dict do not change.

    Returns:
        Number of layers with each kernel.
    Raises:
        RuntimeError: a layer could not be replaced.
        NotInstalled: the installed liger-kernel lacks a kernel.
    """
    kinds = family_of(model.config).liger
    try:
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, rope

        rotations = {cls: getattr(rope, name) for cls, (_, name) in kinds.rotations.items()}
    except (ImportError, AttributeError) as error:
        raise NotInstalled(f"model.liger: {error}; pip install 'liger-kernel>=0.8.5' or set model.liger=off") from error
    before = _count(model, kinds)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is kinds.norm:
                setattr(parent, name, _norm(layer, LigerRMSNorm))
            elif type(layer) is kinds.mlp:
                setattr(parent, name, _mlp(layer, LigerSwiGLUMLP))
            elif type(layer) in rotations:
                name_of_rotation, _ = kinds.rotations[type(layer)]
                forward = _with_rotation(type(layer), name_of_rotation, rotations[type(layer)])
                layer.forward = types.MethodType(forward, layer)
    after = {
        "rms_norm": sum(type(layer) is LigerRMSNorm for layer in model.modules()),
        "rope": sum(_rotation(layer, kinds) in rotations.values() for layer in model.modules()),
        "swiglu": sum(type(layer) is LigerSwiGLUMLP for layer in model.modules()),
    }
    if after != before or not all(after.values()):
        raise RuntimeError(
            f"model.liger: expected Liger's kernels in {before} layers, got {after}; set model.liger=off"
        )
    return after


def _obstacle(device: torch.device) -> str:
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and this run is on {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'liger-kernel>=0.8.5')"
    return ""


def _count(model: nn.Module, kinds: LigerLayers) -> dict[str, int]:
    """Count the layers of the family's own classes for which Liger has a kernel."""
    classes = {"rms_norm": kinds.norm, "rope": tuple(kinds.rotations), "swiglu": kinds.mlp}
    return {name: sum(isinstance(layer, cls) for layer in model.modules()) for name, cls in classes.items()}


def _norm(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        # "llama" sums squares in float32 and applies the weight in the input's dtype, as the family does.
        norm = cls(layer.weight.shape[0], eps=layer.variance_epsilon, casting_mode="llama")
    norm.weight = layer.weight
    return norm.train(layer.training)


def _mlp(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        mlp = cls(layer.config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, getattr(layer, name))
    return mlp.train(layer.training)


def _with_rotation(cls: type[nn.Module], name: str, rotation: Callable) -> Callable:
    """Return a copy of the attention's forward in which the name of its rotation refers to another function."""
    forward = cls.forward
    if name not in forward.__code__.co_names:
        raise RuntimeError(
            f"model.liger: {cls.__name__}.forward does not call {name} in this version of transformers, so RoPE cannot "
            "be replaced; set model.liger=off"
        )
    names = {**forward.__globals__, name: rotation}
    copy = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _rotation(layer: nn.Module, kinds: LigerLayers) -> Callable | None:
    """Return the function that an attention layer currently uses for rotation; None for other layers."""
    if type(layer) not in kinds.rotations:
        return None
    return layer.forward.__func__.__globals__[kinds.rotations[type(layer)][0]]
