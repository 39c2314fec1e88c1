"""What the machine is, and its ceilings: bf16 matrix product, copy, causal attention. First section of bench.cuda.

    python -m bench.cuda_machine [--record FILE.jsonl] [--toy]

GEMM: 2 n³ flop for n = 8192. Copy: bytes read and bytes written, 4 GiB each. Attention: torch's causal
scaled_dot_product_attention, forward, 32 heads of 128 with 8 key heads over 8192 tokens, 4 * 128 flop per head and
pair. Random data, since zeros run faster; medians of single calls between CUDA events.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.records import cpu_name, save

HEADS, KEY_HEADS, HEAD_DIM = 32, 8, 128
# What the run would use where it is installed: peers, and what a part of the package needs.
OPTIONAL = {
    "torchcodec": "decoding, and a whole run, are not tested",
    "vllm": "no test uses it yet",
    "torchvision": "HF's video processor needs it",
    "liger_kernel": "its losses are no peers, and students run without its layers",
    "cut_cross_entropy": "no peer",
    "trl": "no peer",
    "quack": "no peer",
    "verl": "no peer",
    "flash_attn": "no peer, and vision towers take torch's attention",
    "flash_attn_interface": "no peer, and shared prefixes take torch's flash kernels",
}


def call_seconds(run: Callable[[], object], device: torch.device, calls: int = 20) -> float:
    """Median seconds of one call, after three that do not count."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return median(found)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) / 1e3


def ceilings(device: torch.device, toy: bool) -> dict[str, float]:
    """TFLOP/s and GB/s."""
    size, copied, tokens = (256, 2**22, 256) if toy else (8192, 2**32, 8192)
    return {
        "gemm_tflop_per_s": _gemm(size, device) / 1e12,
        "causal_attention_tflop_per_s": _causal_attention(tokens, device) / 1e12,
        "copy_gb_per_s": _copy(copied, device) / 1e9,
    }


def _draw(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


def _gemm(size: int, device: torch.device) -> float:
    a, b, out = (_draw(device, size, size) for _ in range(3))
    return 2 * size**3 / call_seconds(lambda: torch.mm(a, b, out=out), device)


def _causal_attention(tokens: int, device: torch.device) -> float:
    q, k, v = (_draw(device, 1, heads, tokens, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    seconds = call_seconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), device)
    return 4 * HEADS * HEAD_DIM * (tokens * (tokens + 1) // 2) / seconds


def _copy(count: int, device: torch.device) -> float:
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / call_seconds(lambda: target.copy_(source), device)


def machine(device: torch.device) -> dict[str, object]:
    """Facts about the hardware; versions come with the surroundings of every record."""
    facts: dict[str, object] = {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    facts["nvcc"] = _last_line(["nvcc", "--version"])
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        facts |= {
            "name": own.name,
            "capability": f"{own.major}.{own.minor}",
            "multiprocessors": own.multi_processor_count,
            "gpu_memory_gib": round(own.total_memory / 2**30, 1),
            "l2_mib": round(getattr(own, "L2_cache_size", 0) / 2**20, 1),
            "driver": _last_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
            "clocks_and_power": _last_line(
                ["nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
            ),
        }
    else:
        facts["name"] = cpu_name()
    return facts


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
    record |= {"machine": machine(device), "ceilings": ceilings(device, given.toy)}
    record["not_installed"] = {name: why for name, why in OPTIONAL.items() if find_spec(name) is None}
    for part in ("machine", "ceilings"):
        for name, value in record[part].items():
            print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}", flush=True)
    if given.record:
        save(record, given.record)


if __name__ == "__main__":
    main()
