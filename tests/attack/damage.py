"""Damage one file of a run folder in one way, resume, and check the outcome.

python tests/attack/damage.py [--only WORD] [--every 4]

Each damage may end in three ways: with the result of an undamaged run ("equal"), with exit code 2 and a message
("refused"), or with 0 and a warning that names the only file that differs because lines were lost ("told"). Everything
else is a failure, such as a traceback, a hang or another result.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from small_runs import differences, result, start
from train_runs import mini_arguments, only_run

LONGEST_S = 300

CHECKPOINT = [
    "manifest.json",
    "state.json",
    "rng_00000.json",
    "engines/policy/engine.json",
    "engines/policy/weights.safetensors",
    "engines/policy/rank_00000.safetensors",
    "engines/discriminator/rank_00000.safetensors",
    "export/model.safetensors",
    "export/config.json",
]
LINES = ["metrics.jsonl", "rollouts.jsonl", "predictions/untrained.jsonl", "predictions/stage1.jsonl"]
OTHERS = ["config.yaml", "run.json", "evaluation.json", "samples.jsonl", "teacher.json", "fingerprints.json"]
STAGE1 = ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "preprocessor_config.json"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lose(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    """Return the content that some file systems leave after a loss of power."""
    path.write_bytes(bytes(path.stat().st_size))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def foreign(path: Path) -> None:
    """Return JSON of another shape."""
    path.write_text("[1, null]\n")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def itself(run: Path) -> Path:
    return run


def damages() -> dict[str, Callable[[Path], object]]:
    """Return the ways to damage a run folder, by name."""
    chosen: dict[str, Callable[[Path], object]] = {}

    def add(name: str, *ways: Callable[[Path], None], where: Callable[[Path], Path] = itself) -> None:
        for way in ways:
            chosen[f"{way.__name__} {name}"] = lambda run, way=way: way(where(run) / name)

    for name in CHECKPOINT:
        add(name, flip, cut, lose, where=newest)
    for name in ("manifest.json", "state.json"):
        add(name, empty, zeros, folder, pipe, foreign, loop, where=newest)
    add("engines/policy/rank_00000.safetensors", zeros, folder, where=newest)
    add("checkpoints/latest", lose, empty, zeros, folder, pipe, foreign)
    for name in LINES:
        add(name, cut, lose, empty, zeros, folder, foreign)
    for name in OTHERS:
        add(name, cut, lose, empty, zeros, folder, foreign)
    for name in STAGE1:
        add(f"stage1/{name}", flip, lose, empty)

    def all_manifests(run: Path) -> None:
        for manifest in run.glob("checkpoints/*/manifest.json"):
            manifest.unlink()

    def unlisted(run: Path) -> None:
        manifest = newest(run) / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["files"]["engines/policy/weights.safetensors"]
        manifest.write_text(json.dumps(content))

    def other_weights(run: Path) -> None:
        shutil.copy(newest(run) / "export" / "model.safetensors", run / "stage1" / "model.safetensors")

    chosen["lose stage1"] = lambda run: shutil.rmtree(run / "stage1")
    chosen["swap stage1's weights"] = other_weights
    chosen["lose all manifests"] = all_manifests
    chosen["lose checkpoints"] = lambda run: shutil.rmtree(run / "checkpoints")
    chosen["entry missing in manifest"] = unlisted
    chosen["file for tensorboard"] = lambda run: (shutil.rmtree(run / "tensorboard"), (run / "tensorboard").touch())
    chosen["foreign files in export"] = lambda run: ((run / "export").mkdir(), (run / "export" / "mine.txt").touch())
    chosen["garbage in bad_media.jsonl"] = lambda run: (run / "bad_media.jsonl").write_bytes(b"\0\xff\n[]\n")
    chosen["leftovers"] = lambda run: [(run / name).mkdir() for name in (".export.tmp", ".stage1.replaced.tmp")]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the damages whose name contains this word")
    parser.add_argument("--every", type=int, default=1, help="run the first of every N damages")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="attack-"))

    def arguments(place: Path) -> list[str]:
        return mini_arguments(place, work / "made", "checkpoint.every_steps=1")

    (work / "whole").mkdir()
    process = start(arguments(work / "whole"), 1)
    _, errors = process.communicate(timeout=LONGEST_S)
    if process.returncode:
        print(errors[-3000:])
        return 1
    expected = result(only_run(work / "whole"))
    # The run was killed in stage 2, so all kinds of files exist and some have not been written yet.
    killed = killed_in_stage_2(arguments(work / "killed"), work / "killed")

    counted = {"equal": 0, "told": 0, "refused": 0, "FAILED": 0}
    chosen = {name: damage for name, damage in damages().items() if options.only in name}
    chosen = dict(list(chosen.items())[:: options.every])
    for number, (name, damage) in enumerate(chosen.items(), start=1):
        place = work / f"damage-{number}"
        run = Path(shutil.copytree(killed, place / killed.name))
        damage(run)
        outcome = resumed(run, expected)
        counted[outcome.split(":")[0]] += 1
        print(f"{number:3} {name}: {outcome}", flush=True)
        if not outcome.startswith("FAILED"):
            shutil.rmtree(place)
    print("| damages | equal | told | refused | failed |\n|---|---|---|---|---|")
    print(f"| {len(chosen)} | {counted['equal']} | {counted['told']} | {counted['refused']} | {counted['FAILED']} |")
    if not counted["FAILED"]:
        shutil.rmtree(work)
    return 1 if counted["FAILED"] else 0


def killed_in_stage_2(arguments: list[str], place: Path) -> Path:
    """Return a run that was killed after the third step of stage 2."""
    place.mkdir()
    process = start(arguments, 1)
    while process.poll() is None:
        lines = [line for path in place.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
        if sum('"distill"' in line for line in lines) >= 3:
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    return only_run(place)


def resumed(run: Path, expected: dict) -> str:
    """Return the outcome of a resume."""
    process = start(["--resume", str(run)], 1)
    try:
        _, errors = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"FAILED: it hangs, {LONGEST_S} s"
    last = (errors.strip().splitlines() or [""])[-1]
    if "Traceback" in errors:
        return f"FAILED: a traceback, {last}"
    if process.returncode == 2:
        return f"refused: {last}"
    if process.returncode:
        return f"FAILED: exit {process.returncode}, {last}"
    different = differences(expected, run)
    lost = f"{different.removesuffix('.jsonl')}.jsonl: expected at least"
    if different in ("metrics", "rollouts.jsonl") and lost in errors:
        return f"told: {different}"
    if "report.html is missing" in different and "report not written: " in errors:
        return f"told: {last}"
    return f"FAILED: {different}" if different else "equal"


if __name__ == "__main__":
    sys.exit(main())
