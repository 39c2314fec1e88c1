"""Measure the accuracy of the demonstration over several seeds against single samples and a control.

    python -m tools.accuracy --recipe quickstart --seeds 0 1 2 --output bench/results/quickstart-accuracy

The seed changes clips, teacher, initial weights and order. The variants of each seed are:

- full: the recipe without changes (untrained, stage 1, stage 2);
- control: further steps from the full run's stage 1, of the same number, size and learning rate, that imitate T_best;
- single: stage 1 alone on one random response per question (`teacher.responses=1 sft.responses=random`).

Runs are sequential and kept, so an interrupted call resumes. Every answer stays with its run. The output folder gets
`table.md`, `accuracy.json` and `picture.svg` of the first seed's run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from rmsd_fast.data.records import TASK_TYPES
from rmsd_fast.report import write_picture
from rmsd_fast.settings import load_settings, settings_as_dict
from rmsd_fast.stages.evaluation import compare, summarize


def run(recipe: str, folder: Path, overrides: list[str]) -> Path:
    """Return the folder of a finished run with these settings, and run it if it does not exist."""
    wanted = settings_as_dict(load_settings(recipe, [f"output={folder}", *overrides]))
    for path in folder.glob("*/run.json"):
        done = "finished" in json.loads(path.read_text())
        if done and settings_as_dict(load_settings(str(path.parent / "config.yaml"))) == wanted:
            return path.parent
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "rmsd_fast.train", recipe, f"output={folder}", *overrides]
    print(" ".join(command), flush=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (path,) = (found.parent for found in folder.glob("*/run.json"))
    (path / "commit.txt").write_text(commit + "\n")
    return path


# Each entry gives the settings of a variant, which may name the stage-1 student of the full run, and the resulting
# student.
VARIANTS = {
    "control": (["stages=[distill]", "distill.objective=sft", "model.path={stage1}"], "stage2"),
    "single": (["stages=[sft]", "teacher.responses=1", "sft.responses=random"], "stage1"),
}


def collect(recipe: str, seeds: list[int], work: Path, extra: list[str], variants: list[str]) -> dict[str, list[dict]]:
    """Collect the records of every student over all seeds; the seed makes ids unique."""
    found: dict[str, list[dict]] = {}

    def keep(name: str, seed: int, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        found.setdefault(name, []).extend({**record, "id": f"{seed}/{record['id']}"} for record in records)

    for seed in seeds:
        own = [f"seed={seed}", f"made.seed={seed}", *extra]
        full = run(recipe, work / f"full-{seed}", own)
        for student in ("untrained", "stage1", "stage2"):
            keep(student, seed, full / "predictions" / f"{student}.jsonl")
        for name in variants:
            changes, student = VARIANTS[name]
            path = run(recipe, work / f"{name}-{seed}", [*own, *(c.format(stage1=full / "stage1") for c in changes)])
            keep(name, seed, path / "predictions" / f"{student}.jsonl")
    return found


def table(records: dict[str, list[dict]], floors: dict[str, float]) -> tuple[str, dict]:
    students = {name: summarize(rows) for name, rows in records.items()}
    pairs = [
        ("stage1", "untrained"),
        ("stage1", "single"),
        ("stage2", "stage1"),
        ("control", "stage1"),
        ("stage2", "control"),
    ]
    differences = {f"{a} - {b}": compare(records[a], records[b]) for a, b in pairs if a in records and b in records}
    lines = ["| task | floor | " + " | ".join(students) + " |", "|---" * (len(students) + 2) + "|"]
    for task in [*TASK_TYPES, "closed"]:
        rows = [s["closed"] if task == "closed" else s["tasks"].get(task) for s in students.values()]
        cells = [f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in rows]
        floor = f"{floors[task]:.3f}" if task in floors else "-"
        lines.append(f"| {task} (n={rows[0]['n']}) | {floor} | " + " | ".join(cells) + " |")
    lines += ["", "| difference, closed tasks | mean | 95% interval |", "|---|---|---|"]
    for name, difference in differences.items():
        d = difference["closed"]
        lines.append(f"| {name} | {d['mean']:+.3f} | [{d['low']:+.3f}, {d['high']:+.3f}] |")
    return "\n".join(lines) + "\n", {"students": students, "differences": differences, "floors": floors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="settings of every run, a.b=c")
    given = parser.parse_intermixed_args()
    work = given.work / given.recipe
    records = collect(given.recipe, given.seeds, work, given.overrides, given.variants)
    runs = [next((work / f"full-{seed}").glob("*/run.json")) for seed in given.seeds]
    floors = [json.loads((path.parent / "evaluation.json").read_text())["floors"] for path in runs]
    mean_floors = {task: sum(f[task]["score"] for f in floors) / len(floors) for task in floors[0]}
    text, numbers = table(records, mean_floors)
    commits = sorted({path.read_text().strip() for path in work.glob("*/*/commit.txt")})
    facts = {
        "recipe": given.recipe,
        "seeds": given.seeds,
        "overrides": given.overrides,
        "teacher": "simulated",
        "commits": commits,
        "machine": platform.machine(),
        "run": json.loads(runs[0].read_text()),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "accuracy.json").write_text(json.dumps({**facts, **numbers}, indent=1) + "\n")
    (given.output / "table.md").write_text(text)
    write_picture(runs[0].parent, given.output / "picture.svg")
    print(text)


if __name__ == "__main__":
    main()
