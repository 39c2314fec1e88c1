"""What the machine is, and its ceilings: bf16 matrix product, copy, causal attention. First section of bench.cuda.

    python -m bench.cuda.machine [--record FILE.jsonl] [--toy]

GEMM: 2 n³ flop for n = 8192. Copy: bytes read and bytes written, 4 GiB each. Attention: torch's causal
scaled_dot_product_attention, forward, 32 heads of 128 with 8 key heads over 8192 tokens, 4 * 128 flop per head and
pair. Random data, since zeros run faster. On CUDA each is called for a second, since a power limit acts only after a
while: medians of single calls between CUDA events, of the last half. sm_clock_after_products: while products go on.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.core.launches import call_seconds, copy_gb_per_s
from bench.core.records import cpu_name, save

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
# Beyond about a thousand launches the host waits for the device.
MOST_QUEUED = 500
# What the run would use where it is installed: peers, and what a part of the package needs.
OPTIONAL = {
    "torchcodec": "decoding, and a whole run, are not tested",
    "vllm": "collecting from a real server is not tested",
    "torchvision": "HF's video processor needs it",
    "liger_kernel": "its losses are no peers, and students run without its layers",
    "cut_cross_entropy": "no peer",
    "trl": "no peer",
    "flash_attn": "vision towers take torch's attention",
    "flash_attn_interface": "shared prefixes take torch's flash kernels",
}


def ceilings(device: torch.device, toy: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Return TFLOP/s and GB/s; and on CUDA the clock that was left for products, a fact of the machine."""
    size, copied, tokens = (256, 2**22, 256) if toy else (8192, 2**32, 8192)
    seconds = 1.0 if device.type == "cuda" and not toy else 0.0

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    a, b, out = (draw(size, size) for _ in range(3))
    gemm_s, facts = call_seconds(lambda: torch.mm(a, b, out=out), device, seconds), {}
    if device.type == "cuda":
        # More of them in the queue: the clock rises again as soon as they end.
        for _ in range(min(MOST_QUEUED, int(0.5 * seconds / gemm_s))):
            torch.mm(a, b, out=out)
        facts["sm_clock_after_products"] = _nvidia_smi("clocks.sm")
        torch.cuda.synchronize(device)
    q, k, v = (draw(1, heads, tokens, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    attention = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    attention_flop = 4 * HEADS * HEAD_DIM * (tokens * (tokens + 1) // 2)
    rates = {
        "gemm_tflop_per_s": 2 * size**3 / gemm_s / 1e12,
        "causal_attention_tflop_per_s": attention_flop / call_seconds(attention, device, seconds) / 1e12,
        "copy_gb_per_s": copy_gb_per_s(device, copied, seconds),
    }
    return rates, facts


def machine(device: torch.device) -> dict[str, object]:
    """Facts about the hardware; versions come with the surroundings of every record."""
    facts: dict[str, object] = {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "nvcc": _last_line(["nvcc", "--version"]),
    }
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        facts |= {
            "name": own.name,
            "capability": f"{own.major}.{own.minor}",
            "multiprocessors": own.multi_processor_count,
            "gpu_memory_gib": round(own.total_memory / 2**30, 1),
            "l2_mib": round(getattr(own, "L2_cache_size", 0) / 2**20, 1),
            "driver": _nvidia_smi("driver_version"),
            "clocks_and_power": _nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit"),
        }
    else:
        facts["name"] = cpu_name()
    return facts


def _nvidia_smi(what: str) -> str:
    return _last_line(["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"])


def _last_line(command: list[str]) -> str:
    """What a program prints last, or why it says nothing."""
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="append the record to this .jsonl file")
    parser.add_argument("--toy", action="store_true", help="tiny sizes")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {"bench": "machine", "device": device.type, "quick": given.toy}
    rates, facts = ceilings(device, given.toy)
    record |= {"machine": machine(device) | facts, "ceilings": rates}
    record["not_installed"] = {name: why for name, why in OPTIONAL.items() if find_spec(name) is None}
    for part in ("machine", "ceilings"):
        for name, value in record[part].items():
            print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    if given.record:
        save(record, given.record)


if __name__ == "__main__":
    main()
