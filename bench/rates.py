"""What this machine gives for the two kinds of work that the cost model counts, measured beside the benchmark."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention


def rates(config, prefix: int, dtype: torch.dtype, device: torch.device, rounds: int = 7) -> dict[str, float]:
    """FLOP/s of matrix products and of attention at the sizes of one decoder layer, forward and backward.

    FLOPs are counted as `rmsd_fast.models.cost` counts them: 6TMN for a product with its two gradients, 12 per pair,
    head and size for attention (a backward of two forwards).
    """
    text = config.text_config
    x = torch.randn(prefix, text.hidden_size, dtype=dtype, device=device, requires_grad=True)
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
        "matmul": 6 * prefix * text.hidden_size * text.intermediate_size,
        "attention": 12 * heads * size * (prefix * (prefix + 1) // 2),
    }
    found = {}
    for name, run in (("matmul", products), ("attention", attention)):
        run()
        found[name] = flop[name] / median(_seconds(run, device) for _ in range(rounds))
    return found


def predicted_seconds(flops, rate: dict[str, float]) -> float:
    """Time of FLOPs by component at the measured rates; nothing else is counted."""
    attention = flops.attention + flops.vision_attention
    return (flops.total - attention) / rate["matmul"] + attention / rate["attention"]


def _seconds(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
