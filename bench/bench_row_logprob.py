"""Log-probability and entropy of T rows of logits on CPU: the native op against eager torch and torch.compile.

Bytes counted: the logits once, T * V * itemsize; the vectors are nothing beside them. GB/s = T * V * itemsize / time:
an op that copies the logits shows as one that is slow. Each variant runs once per round in turn, after a sweep
through a buffer larger than the caches. `RMSD_BENCH_SAVE=1` appends the numbers to bench/results/row_logprob.jsonl.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmsd_kernels import native

ROUNDS = 9
SWEEP_MIB = 256
Scores = tuple[Tensor, Tensor]


def eager(logits: Tensor, targets: Tensor, temperature: Tensor) -> Scores:
    logp = (logits.float() / temperature[:, None]).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def peak_mib(run: Callable[[], object]) -> float:
    """Memory that one call adds at its highest, MiB, as the kernel of the system counts resident pages."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to the present size
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before) / 1024


def interleaved_ms(variants: dict[str, Callable[[], object]]) -> dict[str, Tensor]:
    """Milliseconds per round and variant. The order turns with the round, so that none always comes first."""
    sweep = torch.zeros(SWEEP_MIB * 2**18)
    names, times = list(variants), {name: [] for name in variants}
    for index in range(ROUNDS):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            sweep.add_(1.0)
            start = time.perf_counter()
            variants[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: torch.tensor(values) for name, values in times.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(record: dict[str, object]) -> None:
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    record |= {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"python": platform.python_version(), "commit": commit.stdout.strip() or "unknown"}
    (root / "results").mkdir(exist_ok=True)
    with (root / "results" / "row_logprob.jsonl").open("a") as out:
        out.write(json.dumps(record) + "\n")


@pytest.mark.skipif(not native.available(), reason=f"native ops: {native.why_not()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocab", "spread"), [(64, 151936, 3.0), (512, 4096, 3.0)], ids=["qwen3", "tiny"])
def test_row_logprob(benchmark, capsys, rows: int, vocab: int, spread: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    temperature = torch.full((rows,), 0.8)
    compiled = torch.compile(eager, dynamic=False)
    functions = {"native": native.row_logprob, "eager": eager, "torch.compile": compiled}
    variants = {name: lambda f=f: f(logits, targets, temperature) for name, f in functions.items()}

    truth = eager(logits[:8].double(), targets[:8], temperature[:8].double())
    peer = eager(logits[:8], targets[:8], temperature[:8])
    for got, other, exact in zip(variants["native"](), peer, truth, strict=True):
        error, bar = (got[:8] - exact).abs().max(), (other - exact).abs().max()
        assert error <= 2 * bar + 1e-6 * exact.abs().max(), (error, bar)

    for run in variants.values():
        run()
    moved_gb = logits.numel() * logits.element_size() / 1e9
    lines = [f"\n[{rows}, {vocab}] {dtype}, {torch.get_num_threads()} threads"]
    record: dict[str, object] = {"bench": "row_logprob", "shape": [rows, vocab], "dtype": str(dtype), "variants": {}}
    times = interleaved_ms(variants)
    for name, values in times.items():
        low, median, high = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8])).tolist()
        numbers = {"median_ms": median, "p20_ms": low, "p80_ms": high, "peak_mib": peak_mib(variants[name])}
        numbers |= {"gb_per_s": moved_gb / median * 1e3, "times_native": median / times["native"].median().item()}
        record["variants"][name] = numbers
        lines.append(f"  {name:14s}" + "  ".join(f"{key} {value:8.2f}" for key, value in numbers.items()))
    with capsys.disabled():
        print("\n".join(lines))
    if os.environ.get("RMSD_BENCH_SAVE") == "1":
        save(record)
    benchmark.extra_info.update(record)
    benchmark.pedantic(variants["native"], rounds=3, warmup_rounds=1)
