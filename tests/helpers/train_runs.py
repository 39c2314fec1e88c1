"""Run the train program at the smallest useful size, for tests that need whole processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from warm_process import Fork, run_program, start_programs

# Material with all kinds of questions. The quickstart itself asks only two.
SIX_TASKS = [
    "made.tasks=[mcq,temporal,spatial,numeric,ocr,open]",
    "made.questions_per_clip=3",
    "made.teacher=noisy",
    "stages=[sft,warm_up,distill]",
    "evaluate.rollouts=0",
]
# These settings run all parts of the quickstart in seconds: 3 + 1 + 5 steps.
MINI = [
    *SIX_TASKS,
    "made.train_clips=24",
    "made.heldout_clips=4",
    "made.student_layers=2",
    "sft.steps=3",
    "sft.batch_size=8",
    "sft.warmup_steps=1",
    "discriminator.warm_up_steps=1",
    "rollout.n=3",
    "rollout.max_new_tokens=12",
    "rollout.prompts_per_batch=2",
    "rollout.log_every_steps=2",
    "rollout.log_questions=2",
    "distill.steps=5",
    "distill.batch_size=4",
    "evaluate.max_new_tokens=8",
    "evaluate.samples=6",
    "evaluate.prompts_per_batch=12",
    "data.cache_mib=16",
    "data.max_prompt_tokens=500",
    "micro_tokens=600",
    # The plan takes a third of the time of such a run; tests of the memory and of one whole run check it.
    "runtime.check_memory=false",
]
# These prefixes mark metrics that measure the machine and not the run.
MACHINE = ("seconds/", "rate/", "memory/", "media/")


def command(arguments: list[str], *, processes: int = 1) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "rmsd_fast.train", *arguments]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, "-m", "rmsd_fast.train", *arguments]


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the environment of a process that uses this device even if another is available."""
    # Remove the variables that a process group of the test process has set.
    others = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    own = {name: value for name, value in os.environ.items() if name not in others}
    chosen = {} if device == "cuda" else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **chosen}


def mini_arguments(folder: Path, made: Path, *overrides: str) -> list[str]:
    return ["quickstart", *MINI, f"output={folder}", f"made.folder={made}", *overrides]


def run_train(
    arguments: list[str],
    *,
    processes: int = 1,
    timeout_s: float = 400,
    device: str = "cpu",
    warm: bool = True,
) -> subprocess.CompletedProcess:
    """Train to the end.

    Args:
        arguments: arguments of the program.
        processes: number of processes.
        timeout_s: time that the run has.
        device: "cpu" or "cuda".
        warm: fork processes that have the imports done, except on CUDA. Otherwise start interpreters, with torchrun if
            there are several processes.
    """
    if warm and device == "cpu":
        return run_program("rmsd_fast.train", arguments, environment(), processes=processes, timeout_s=timeout_s)
    return subprocess.run(
        command(arguments, processes=processes),
        env=environment(device),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def start_train(arguments: list[str], *, stderr: Path | str = os.devnull) -> Fork:
    """Start a run of one process on the CPU, and return at once.

    Args:
        arguments: arguments of the program.
        stderr: file for its messages.
    """
    (fork,) = start_programs("rmsd_fast.train", arguments, environment(), [{}], stderr=stderr)
    return fork


def only_run(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if (path / "config.yaml").is_file()]
    return found


def forget_steps(run: Path, *, after: int) -> None:
    """Remove what a run has written after a checkpoint, as if it had been killed before its next one."""
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > after:
            shutil.rmtree(path)
    (run / "checkpoints" / "latest").unlink()
    shutil.rmtree(run / "export")
    for name in ("predictions/stage2.jsonl", "evaluation.json"):
        (run / name).unlink()


def metrics(run: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without machine measurements."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MACHINE)} for line in lines]


def made_files(run: Path) -> dict[str, bytes]:
    """Return the output of a finished run without times, paths and data of the machine."""
    names = ["evaluation.json", "samples.jsonl", "teacher.json", "rollouts.jsonl"]
    paths = [run / name for name in names] + [*(run / "predictions").iterdir(), *(run / "export").iterdir()]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}
