"""Store the frozen linear layers of a student's language model in nf4, through bitsandbytes (QLoRA, arXiv 2305.14314).

A weight takes 4 bits and its share of the scales: a byte per block of 64 weights, and a float32 scale of these bytes
per 256 blocks. That is 0.516 bytes per weight. A layer dequantizes its weight in every pass, and gives the numbers of a
linear layer with the dequantized weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rmsd_fast.config import NotInstalled

# Start of the names of a student's modules that belong to its language model.
LANGUAGE_MODEL = "model.language_model."
# 4 bits, a byte per block of 64, and a float32 scale per 256 blocks.
BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class QuantizedBase:
    """The model whose weights are the nf4 weights of a backbone.

    Attributes:
        path: its folder or Hub name.
        dtype: "float32" or "bfloat16": dtype of its weights before they were quantized.
        files: hash of each of its files by name.
    """

    path: str
    dtype: str
    files: dict[str, str]


def quantize(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers of the language model by layers with nf4 weights, which are on `device`.

    Args:
        model: the model of a student of any family. On the host, so that the device never holds all weights in
            the model's dtype.
        device: device of this process.
    Raises:
        NotInstalled: bitsandbytes is not installed.
    """
    bitsandbytes = import_bitsandbytes()
    for path, layer in quantizable_layers(model).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _nf4_layer(bitsandbytes, layer, device))


def quantizable_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the language model by their names in a model without adapters."""
    return {path: m for path, m in model.named_modules() if path.startswith(LANGUAGE_MODEL) and type(m) is nn.Linear}


def import_bitsandbytes() -> Any:
    """Return the package bitsandbytes, or raise NotInstalled."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise NotInstalled(
            f"model.quantize=nf4: expected the package bitsandbytes, got none ({error}); run pip install "
            "'rmsd-fast[quantize]', or set model.quantize=none"
        ) from error
    return bitsandbytes


def _nf4_layer(bitsandbytes: Any, layer: nn.Linear, device: torch.device) -> nn.Module:
    options = {"compress_statistics": True, "quant_type": "nf4"}
    quantized = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        device="meta",
        **options,
    )
    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, module=quantized, **options)
    quantized.weight = weight.to(device)
    quantized.bias = layer.bias
    # In eval mode, bitsandbytes would pack the weights of some CPUs in place for bfloat16 products, and later training
    # passes would use them.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(layer.training)


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with nf4 weights by their names in the model; an empty dict for a model without them."""
    return {path: module for path, module in model.named_modules() if _state_of(module) is not None}


def full_weight(layer: nn.Module) -> torch.Tensor:
    """Return the weight of a linear layer, [out, in], dequantized if it is in nf4."""
    state = _state_of(layer)
    if state is None:
        return layer.weight
    return import_bitsandbytes().functional.dequantize_4bit(layer.weight.data, state)


def _state_of(module: nn.Module) -> Any:
    return getattr(module._parameters.get("weight"), "quant_state", None)
