"""Kill a run at random moments and before chosen file operations, resume it, and compare it with an uninterrupted run.

python tests/attack/kills.py --random 20 --operations 20 --full 10 --writers 5 --processes 1

`--full` makes 20 writes fail instead of killing the run, as on a full or failing disk. The run may continue, or exit
with code 2 and a one-line message.

"Equal" covers metrics except machine measurements, predictions, evaluation, samples, logged rollouts, every file of the
export, and a report that shows all students. The program prints a line for each kill, and a table.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from small_runs import LONGEST_S, differences, result, resume, start
from train_runs import mini_arguments, only_run

from rmsd_fast.files import DISK_ERRORS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=int, default=10, help="kills at random moments")
    parser.add_argument("--operations", type=int, default=10, help="kills before file operations, evenly spread")
    parser.add_argument("--full", type=int, default=5, help="full disks at file operations, evenly spread")
    parser.add_argument("--writers", type=int, default=3, help="kills after which two programs resume at once")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    made, counts = work / "made", work / "count"

    def arguments(folder: Path) -> list[str]:
        return mini_arguments(folder, made, "checkpoint.every_steps=1")

    whole = work / "whole"
    whole.mkdir()
    # Run twice, because the first run also makes the material, whose time does not count.
    for folder in (work / "first", whole):
        began = time.monotonic()
        process = start(
            arguments(folder),
            options.processes,
            ATTACK_FOLDER=str(folder),
            ATTACK_OPERATION="0",
            ATTACK_COUNT=str(counts),
        )
        _, errors = process.communicate(timeout=LONGEST_S)
        if process.returncode:
            print(errors[-3000:])
            return 1
        seconds = time.monotonic() - began
    operations = int(counts.read_text().split()[0])
    expected = result(only_run(whole))
    print(f"uninterrupted: {seconds:.0f} s, {operations} file operations of the main process", flush=True)

    kills = [("random", generator.uniform(0.05, 1.0) * seconds) for _ in range(options.random)]
    step = operations / max(1, options.operations)
    kills += [("operation", 1 + int(step * (i + generator.random()))) for i in range(options.operations)]
    step = operations / max(1, options.full)
    kills += [("full", 1 + int(step * (i + generator.random()))) for i in range(options.full)]
    kills += [("writers", generator.uniform(0.5, 1.0) * seconds) for _ in range(options.writers)]
    counted = {kind: [0, 0] for kind in dict.fromkeys(kind for kind, _ in kills)}
    for number, (kind, place) in enumerate(kills, start=1):
        folder = work / f"kill-{number}"
        folder.mkdir()
        if kind in ("random", "writers"):
            process = start(arguments(folder), options.processes)
            try:
                process.communicate(timeout=place)
            except subprocess.TimeoutExpired:
                # Only torchrun is killed, so its ranks have to end by themselves.
                process.kill()
        else:
            attack = {"ATTACK_FOLDER": str(folder), "ATTACK_OPERATION": str(place)}
            if kind == "full":
                attack |= {"ATTACK_ERRNO": str(DISK_ERRORS[number % len(DISK_ERRORS)]), "ATTACK_LENGTH": "20"}
            process = start(arguments(folder), options.processes, **attack)
            try:
                _, errors = process.communicate(timeout=LONGEST_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                errors = "Traceback: it hangs"
        process.wait()
        fault = ""
        # torchrun adds its own traceback and turns exit code 2 into 1.
        alone = options.processes == 1
        if kind == "full" and alone and ("Traceback" in errors or process.returncode not in (0, 2)):
            fault = f"exit {process.returncode}: {errors.strip().splitlines()[-1:]}"
        run, after = resume(folder, arguments(folder), options.processes, 2 if kind == "writers" else 1)
        problem = fault or after or differences(expected, run)
        left = [str(path.relative_to(run)) for path in run.rglob("*.tmp")]
        problem = problem or (f"left behind: {left}" if left else "")
        counted[kind][bool(problem)] += 1
        where = f"{place:.1f} s" if kind in ("random", "writers") else f"{place}"
        print(f"{number:3} {kind} {where}: {problem or 'equal'}", flush=True)
        if not problem:
            shutil.rmtree(folder)
    print(f"| {options.processes} process(es), killed | equal | failed |\n|---|---|---|")
    for kind, (equal, failed) in counted.items():
        print(f"| {kind} | {equal} | {failed} |")
    failed = sum(failed for _, failed in counted.values())
    if not failed:
        shutil.rmtree(work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
