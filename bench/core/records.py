"""Records of the benchmarks, as JSON lines."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "bench" / "results"
# The file with all records of a run of bench.cuda.
RECORDS = "results.jsonl"
_PACKAGES = (
    *("triton", "transformers", "deepspeed", "torchcodec", "vllm"),
    *("liger_kernel", "trl", "cut-cross-entropy", "flash-attn"),
)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@functools.cache
def surroundings() -> dict[str, object]:
    """Return the hardware, package versions and commit of this process."""
    facts: dict[str, object] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    for name in _PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return facts | {"python": platform.python_version(), "commit": _commit()}


def _commit() -> str:
    """Return the commit of the measured code, with -dirty if files other than results have changed.

    For a copy without git, RMSD_BENCH_COMMIT can name the commit.
    """
    commands = (
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results"],
    )
    told = os.environ.get("RMSD_BENCH_COMMIT", "unknown")
    if shutil.which("git") is None:
        return told
    outputs = []
    for command in commands:
        done = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        outputs.append(done.stdout.strip() if done.returncode == 0 else "")
    return outputs[0] + "-dirty" * bool(outputs[1]) if outputs[0] else told


def read_lines(path: Path) -> list[dict]:
    """Return the JSON lines of a file, without lines cut by a kill. A missing file has no lines."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append_line(record: dict[str, object], path: Path) -> None:
    """Append a JSON line to a file. It starts on a new line even if a kill has cut the last one."""
    line = json.dumps(record).encode() + b"\n"
    with path.open("a+b") as out:
        if out.seek(0, os.SEEK_END):
            out.seek(-1, os.SEEK_END)
            line = line if out.read() == b"\n" else b"\n" + line
        out.write(line)


def save(record: dict[str, object], place: Path) -> Path:
    """Append the record and the surroundings to <place>/<bench>.jsonl, or to `place` if it is a .jsonl file."""
    path = place if place.suffix == ".jsonl" else place / f"{record['bench']}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(record | surroundings(), path)
    return path


# Benchmarks whose records are shown together and must therefore come from one machine.
SUBJECTS = {
    "heads": (
        *("linear_cross_entropy", "linear_divergence", "linear_logprob", "linear_policy_loss"),
        "discriminator",
    ),
    "sharing": ("shared_prefix", "step"),
    "rollouts": ("rollout",),
    "evaluations": ("evaluation",),
    "teachers": ("self_teacher",),
    "media": ("media",),
}


def load(folder: Path, subject: str, *, hardware: str | None = None) -> list[dict]:
    """Return the newest record of each case of a subject on CPU, in the order of SUBJECTS and of the files.

    Records of --quick are ignored.

    Args:
        hardware: part of the name that hardware_of returns.
    Raises:
        ValueError: if the records come from several machines.
    """
    records = [record for bench in SUBJECTS[subject] for record in read_lines(folder / f"{bench}.jsonl")]
    records = [record for record in records if not record.get("quick") and record["device"] == "cpu"]
    found = _newest(record for record in records if (hardware or "") in hardware_of(record))
    machines = sorted({hardware_of(record) for record in found})
    if len(machines) > 1:
        raise ValueError(f"records of several machines in {folder}: {machines}; name one with --hardware")
    return found


def load_run(path: Path) -> list[dict]:
    """Return the newest record of each case in the results.jsonl of a run of bench.cuda.

    For media benchmarks, the case is the record's `name`.
    """
    return _newest(record for record in read_lines(path) if "variants" in record)


def _newest(records: Iterable[dict]) -> list[dict]:
    return list({(record["bench"], case_of(record)): record for record in records}.values())


def case_of(record: dict) -> str:
    return record["case"] if "case" in record else record["name"]


def hardware_of(record: dict) -> str:
    threads = record.get("threads")
    return record.get("gpu") or f"{record['cpu']}, {threads} thread{'' if threads == 1 else 's'}"


def sources(records: list[dict]) -> str:
    """Return hardware, torch and commit in one line.

    If there are several commits, give the number of cases for each.
    """
    commits = Counter(record["commit"] for record in records)
    short = {commit: commit[:10] + ("-dirty" if commit.endswith("-dirty") else "") for commit in commits}
    cases = {commit: f" ({count} case{'' if count == 1 else 's'})" for commit, count in commits.items()}
    named = [short[commit] + (cases[commit] if len(commits) > 1 else "") for commit in commits]
    torches = ", ".join(sorted({record["torch"] for record in records}))
    return f"{hardware_of(records[0])}, torch {torches}, commit{'s' * (len(commits) > 1)} {', '.join(named)}"
