"""Compare the memory plan with the measured peak of real steps and evaluations:
`python -m bench.memory [--only NAME] [--out FOLDER]`.

Each configuration runs in a process of its own (step.py, evaluation.py) with one thread, and with a malloc that maps
blocks of 256 KiB and more and returns them when they are freed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.core.records import REPOSITORY, RESULTS, save
from bench.memory.evaluation import EvaluationCase
from bench.memory.step import Case

_LORA = {"adapter": "lora", "mode": "shared"}
CASES = (
    Case("separate"),
    Case("separate, checkpointing", checkpointing=True),
    Case("separate, padded", packing="padded", groups=1),
    Case("separate, ZeRO-0", zero=0),
    Case("separate, bfloat16", dtype="bfloat16"),
    Case("separate, bfloat16, checkpointing, ZeRO-0", dtype="bfloat16", checkpointing=True, zero=0),
    Case("separate, bfloat16, checkpointing, ZeRO-1", dtype="bfloat16", checkpointing=True, zero=1),
    Case("separate, 4 groups", groups=4),
    Case("shared", **_LORA),
    Case("shared, checkpointing, 4 groups", **_LORA, checkpointing=True, groups=4),
    Case("shared, padded", **_LORA, packing="padded", groups=1),
    Case("shared, bfloat16", **_LORA, dtype="bfloat16"),
    Case("separate, ZeRO-3", zero=3),
    Case("shared, nf4", **_LORA, quantize="nf4"),
    Case("separate, lora, ZeRO-3", adapter="lora", zero=3),
    Case("separate, checkpointing, adamw_8bit", checkpointing=True, optimizer="adamw_8bit"),
    Case("head", mode="head"),
    Case("head, lora, ZeRO-0", mode="head", adapter="lora", zero=0),
)
_SPLIT = {"prompts": 8, "micro_tokens": 2200}
EVALUATIONS = (
    EvaluationCase("evaluation"),
    EvaluationCase("evaluation, 8 prompts in a pass", prompts=8),
    EvaluationCase("evaluation, 2 prompts in a pass", **_SPLIT),
    EvaluationCase("evaluation, 8 questions about a video", prompts=8, each=8),
    EvaluationCase("evaluation, samples", **_SPLIT, rollouts=8),
    EvaluationCase("evaluation, long answers", **_SPLIT, rollouts=4, response=256),
    EvaluationCase("evaluation, long video", prompts=2, frames=256, side=6, micro_tokens=1200),
    EvaluationCase("evaluation, reranker", rollouts=4, reranker=True),
    EvaluationCase("evaluation, bfloat16", **_SPLIT, rollouts=4, dtype="bfloat16"),
)
# With one thread, the buffers of a kernel's threads do not depend on the machine.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 10),
}


def measure(case: Case | EvaluationCase) -> dict:
    """Run a configuration in a process of its own, and return its record."""
    bench, module = ("memory", "step") if isinstance(case, Case) else ("evaluation_memory", "evaluation")
    command = [sys.executable, "-m", f"bench.memory.{module}", json.dumps(asdict(case))]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | _ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    record = json.loads(done.stdout.strip().splitlines()[-1])
    measured = max(record["measured"].values())
    planned = max(sum(parts.values()) for parts in record["plan"].values())
    return {"bench": bench, "device": "cpu"} | record | {"peak": measured, "planned": planned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="run the configurations whose name has this part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder or .jsonl file for the records")
    arguments = parser.parse_args()
    # The record names the threads of this process.
    torch.set_num_threads(1)
    for case in (*CASES, *EVALUATIONS):
        if arguments.only and arguments.only not in case.name:
            continue
        record = measure(case)
        save(record, arguments.out)
        measured, planned = (record[name] / 2**20 for name in ("peak", "planned"))
        ratio = planned / measured
        print(f"{case.name:<45} measured {measured:.0f} MiB, planned {planned:.0f} MiB, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
