"""What this machine gives for the two kinds of work that the cost model counts, measured beside the benchmark.

And what a GPU's datasheet says, for its share of the peak.
"""

from __future__ import annotations

import re
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.core.launches import call_seconds

# Dense bfloat16 FLOP/s of datasheets, by what stands in the device's name. NVL cards have other values, and a GH200 or
# GB200 is a word of its own.
_PEAKS = (
    (r"\bH100\b.*\bPCIe\b", 756e12),
    (r"\b(H100|H200)\b(?!.*\b(NVL|PCIe)\b)", 989.4e12),
    (r"\bA100\b", 312e12),
    (r"\bB200\b", 2250e12),
)
_WARM_S = 0.6


def datasheet_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s by the datasheet of a device with this name; None where none is known."""
    return next((value for pattern, value in _PEAKS if re.search(pattern, name)), None)


def rates(
    config, prefix: int, dtype: torch.dtype, device: torch.device, *, rows: int | None = None
) -> dict[str, float]:
    """FLOP/s of matrix products and of attention at the sizes of one decoder layer, forward and backward.

    rows: of the products, where there are others than the prefix has.
    FLOPs are counted as `bench.step.flops` counts them: 6TMN for a product with its two gradients, 12 per pair,
    head and size for attention (a backward of two forwards).
    """
    text = config.text_config
    rows = rows or prefix
    x = torch.randn(rows, text.hidden_size, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(text.intermediate_size, text.hidden_size, dtype=dtype, device=device, requires_grad=True)
    heads, kv, size = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    q, k, v = (torch.randn(1, h, prefix, size, dtype=dtype, device=device, requires_grad=True) for h in (heads, kv, kv))

    def products():
        return torch.autograd.grad((y := torch.nn.functional.linear(x, w)), (x, w), y)

    def attention():
        # torch's own, not the op that is judged by it.
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(out, (q, k, v), out)

    flop = {
        "matmul": 6 * rows * text.hidden_size * text.intermediate_size,
        "attention": 12 * heads * size * (prefix * (prefix + 1) // 2),
    }
    seconds = _WARM_S if device.type == "cuda" else 0.0
    flash = device.type == "cuda" and dtype != torch.float32
    # The kernels that the op is made of on CUDA, where torch may choose others for itself.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
        attention_s = call_seconds(attention, device, seconds)
    return {
        "matmul": flop["matmul"] / call_seconds(products, device, seconds),
        "attention": flop["attention"] / attention_s,
    }


def predicted_seconds(flops, rate: dict[str, float]) -> float:
    """Time of FLOPs by component at the measured rates; nothing else is counted."""
    attention = flops.attention + flops.vision_attention
    return (flops.total - attention) / rate["matmul"] + attention / rate["attention"]
