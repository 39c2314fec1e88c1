"""Stream the policy's weights to an engine that has its own copy, and compare the two copies.

The names are those of transformers for a model without adapters. The vision tower is left out, because engines get its
features from the training model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmsd_fast.models.adapters import POLICY, adapted_layers, merged_weight
from rmsd_fast.rollout.base import PolicyEngine

VISION = "model.visual."
# Elements that `bit_sum` handles at once. The temporary tensors take 8 bytes per element.
CHUNK = 2**24
# Odd constants that spread the bits of a number over all 32 bits, as signed 32-bit numbers.
_SPREAD = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32)


@dataclass(frozen=True)
class SourceWeight:
    """One weight of the language model.

    Attributes:
        name: its name in a model without adapters.
        params: the parameters that it is computed from.
        trained: whether it changes in training.
        value: function that returns it. Under ZeRO-3, call it while `params` are gathered.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    trained: bool
    value: Callable[[], Tensor]

    @property
    def group(self) -> str:
        return weight_group(self.name)


def source_weights(policy: PolicyEngine) -> list[SourceWeight]:
    """Return the weights of the policy's language model in the order of the model, without copying any.

    The weight of a layer with an adapter is the merged weight, which is computed when `value` is called.
    """
    model, trained = policy.module.model, set(policy.names)
    layers = adapted_layers(model)
    weights = []
    for name, param in model.named_parameters():
        path, _, last = name.replace(".base_layer.", ".").rpartition(".")
        if name.startswith(VISION) or ".lora_" in name:
            continue
        if path in layers and last == "weight":
            weights.append(_merged(f"{path}.weight", layers[path]))
        else:
            is_trained = f"model.{name}" in trained
            weights.append(SourceWeight(f"{path}.{last}", (param,), is_trained, lambda param=param: param.detach()))
    return weights


def _merged(name: str, layer: nn.Module) -> SourceWeight:
    params = (layer.get_base_layer().weight, layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight)
    return SourceWeight(name, params, True, lambda: merged_weight(layer, POLICY))


def stream(policy: PolicyEngine, weights: Iterable[SourceWeight]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values. The values of one group are gathered together, and valid until the next is asked for.

    Under ZeRO-3, all ranks must consume the iterator to its end.
    """
    groups: dict[str, list[SourceWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.group, []).append(weight)
    for group in groups.values():
        with policy.gathered(param for weight in group for param in weight.params):
            for weight in group:
                yield weight.name, weight.value()


def weight_group(name: str) -> str:
    """Return the group in which a weight is compared: "layers.3", "embeddings", "head", "norm" or "vision".

    The name may be that of transformers or of vLLM.
    """
    if re.search(r"(^|\.)visual\.", name):
        return "vision"
    if layer := re.search(r"\.layers\.(\d+)\.", name):
        return f"layers.{layer[1]}"
    for part, group in (("embed_tokens.", "embeddings"), ("lm_head.", "head"), (".norm.", "norm")):
        if part in name:
            return group
    return name


@torch.no_grad()
def bit_sum(weight: Tensor) -> Tensor:
    """Return the sum of a hash of each element's bits, an int64 scalar on the device of the weight.

    Sums of tensors add up to the sum of their concatenation, in any order, so that a fused weight has the sum of its
    parts. Zeros count as 0. The hash spreads the bits: the sum of the bits themselves would often be the same after a
    small step in bfloat16, which changes some elements by one unit up and others by one unit down.

    Args:
        weight: float32, bfloat16 or float16 tensor of any shape.
    """
    flat = weight.detach().reshape(-1)
    flat = flat.view(torch.int32 if flat.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    first, second = _SPREAD
    for start in range(0, len(flat), CHUNK):
        bits = flat[start : start + CHUNK].to(torch.int32, copy=True)
        # Products wrap around modulo 2^32.
        bits.mul_(first)
        bits.bitwise_xor_(bits >> 15)
        bits.mul_(second)
        bits.bitwise_xor_(bits >> 13)
        total += bits.sum(dtype=torch.int64)
    return total


def group_sums(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return the sum of `bit_sum` over the weights of each group."""
    sums: dict[str, Tensor] = {}
    for name, weight in named:
        group = weight_group(name)
        sums[group] = bit_sum(weight) + sums.get(group, 0)
    return sums


def to_host(sums: dict[str, Tensor]) -> dict[str, int]:
    """Return sums as numbers, with one copy from the device."""
    return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True)) if sums else {}
