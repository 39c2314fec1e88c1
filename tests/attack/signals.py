"""Send signals to a run in each of its phases, resume it, and compare it with an uninterrupted run.

python tests/attack/signals.py [--processes 2] [--every 3] [--only "evaluate stage1"]

After SIGTERM, SIGINT and SIGKILL, all processes of the run, its ranks and its decoders have to end within 10 s without
a traceback. A run of one process ends with 0 after SIGTERM and 130 after SIGINT. After the other signals, it continues
to the same result. "all" means all processes at once, as systemd and Slurm send signals. The program needs Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from small_runs import differences, end, kill_all, of_run, own_traceback, processes_of, resume, start, uninterrupted
from train_runs import mini_arguments, only_run

MOST_S = 10.0
LONGEST_S = 120
# There are several batches per evaluation and several warm-up steps, so that polling finds the run in these phases.
LONGER = [
    "checkpoint.every_steps=1",
    "made.heldout_clips=12",
    "evaluate.max_new_tokens=40",
    "evaluate.prompts_per_batch=4",
    "discriminator.warm_up_steps=3",
]
# Checkpoints from this number on belong to stage 2, because 3 + 3 steps precede it.
STAGE_2 = 7


@dataclass(frozen=True)
class Attack:
    """Signals to the processes of a kind, `gap_s` apart; `goes_on` says whether the run continues to its end."""

    name: str
    kind: str
    numbers: tuple[int, ...]
    # The gap is short, so that later signals arrive while the program ends.
    gap_s: float = 0.02
    goes_on: bool = False


ALONE = (
    Attack("TERM", "train", (SIGTERM,)),
    Attack("INT", "train", (SIGINT,)),
    Attack("TERM x3", "train", (SIGTERM,) * 3),
    Attack("INT x3", "train", (SIGINT,) * 3),
    # These signals resemble a key that is held down.
    Attack("INT x30", "train", (SIGINT,) * 30, gap_s=0.005),
    Attack("KILL", "train", (SIGKILL,)),
    Attack("TERM all", "all", (SIGTERM,)),
    Attack("INT all", "all", (SIGINT,)),
    Attack("HUP", "train", (SIGHUP,), goes_on=True),
    Attack("STOP, CONT", "train", (SIGSTOP, SIGCONT), gap_s=3.0, goes_on=True),
    Attack("KILL worker", "worker", (SIGKILL,), goes_on=True),
    Attack("KILL fork server", "fork server", (SIGKILL,), goes_on=True),
)
SEVERAL = (
    *(Attack(f"{n.name[3:]} {kind}", kind, (n,)) for kind in ("torchrun", "all", "rank") for n in (SIGTERM, SIGINT)),
    *(Attack(f"KILL {kind}", kind, (SIGKILL,)) for kind in ("torchrun", "all", "rank")),
    Attack("TERM x3 torchrun", "torchrun", (SIGTERM,) * 3),
    Attack("HUP torchrun", "torchrun", (SIGHUP,)),
    Attack("STOP, CONT rank", "rank", (SIGSTOP, SIGCONT), gap_s=3.0, goes_on=True),
    Attack("KILL worker", "worker", (SIGKILL,), goes_on=True),
)
PHASES = (
    "imports",
    "imports of ranks",
    "making",
    "evaluate untrained",
    "sft",
    "evaluate stage1",
    "warm_up",
    "distill",
    "checkpoint",
    "evaluate stage2",
    "report",
)
# Before the handlers are installed, a signal has its default effect.
EARLY = PHASES[:2]
WITHOUT_DECODERS = (*EARLY, "making", "report")


def possible(phase: str, attack: Attack, processes: int) -> bool:
    """Return whether the phase has processes of that kind."""
    if attack.kind in ("worker", "fork server"):
        return phase not in WITHOUT_DECODERS
    if phase == "imports":
        return attack.kind != "rank"
    return phase != "imports of ranks" or processes > 1


def reached(phase: str, folder: Path, made: Path, errors: Path, processes: int, began: float) -> bool:
    """Return whether the run has reached a phase."""
    if phase == "imports":
        return time.monotonic() - began > 0.3
    if phase == "imports of ranks":
        if len(processes_of(str(folder), "train")) == processes:
            time.sleep(0.5)
            return True
        return False
    if phase == "making":
        return any(made.glob("*/*"))
    if phase.startswith("evaluate"):
        return phase in errors.read_text(errors="replace")
    if phase == "checkpoint":
        writing = (re.fullmatch(r"\.step_(\d+)\.tmp", p.name) for p in folder.glob("*/checkpoints/*.tmp"))
        return any(match and int(match[1]) >= STAGE_2 for match in writing)
    name, word = ("run.json", '"finished"') if phase == "report" else ("metrics.jsonl", f'"{phase}"')
    return any(word in path.read_text() for path in folder.glob(f"*/{name}"))


def send(attack: Attack, targets: list[int]) -> None:
    """Send an attack's signals to processes that an earlier signal may have ended."""
    for count, number in enumerate(attack.numbers):
        time.sleep(attack.gap_s if count else 0)
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def attacked(folder: Path, processes: int, phase: str, attack: Attack, made: Path) -> tuple[str, float, int | None]:
    """Return the fault in how the run ended, the delay after the signal, and the exit code.

    The exit code is None if the signal came too late.
    """
    mark, errors = str(folder), folder.with_suffix(".txt")
    with errors.open("w") as file:
        began = time.monotonic()
        process = start(mini_arguments(folder, made, *LONGER), processes, stderr=file, ATTACK_MARK=mark)
    try:
        while process.poll() is None and not reached(phase, folder, made, errors, processes, began):
            time.sleep(0.002)
        # The first worker starts when the fork server has finished its imports.
        while process.poll() is None and not (targets := processes_of(mark, attack.kind)):
            time.sleep(0.002)
        if process.poll() is not None:
            return "", 0.0, None
        sent = time.monotonic()
        send(attack, targets)
        while (process.poll() is None or of_run(mark)) and time.monotonic() - sent < LONGEST_S:
            time.sleep(0.02)
        seconds = time.monotonic() - sent
        alive = list(of_run(mark).values())
    finally:
        kill_all(mark)
        process.wait()
    code, text = process.returncode, errors.read_text(errors="replace")
    early = phase in EARLY
    trace = own_traceback(text) if processes > 1 else "a traceback" if "Traceback" in text else ""
    expected = {0}
    if not attack.goes_on:
        ends = {SIGTERM: 0, SIGINT: 130, SIGKILL: -9}
        expected = {ends.get(attack.numbers[0], 0)}
    if early:
        expected |= {-number for number in attack.numbers}
    if seconds >= LONGEST_S:
        fault = f"still there after {LONGEST_S} s: {alive}"
    # A killed rank prints nothing; the others report losing it.
    elif trace and not (early and SIGINT in attack.numbers) and attack.name != "KILL rank":
        fault = f"{trace}: {text.strip().splitlines()[-1]}"
    elif code not in expected and (processes == 1 or attack.goes_on):
        fault = f"exit {code}: {text.strip().splitlines()[-1:]}"
    else:
        fault = f"took {seconds:.1f} s" if seconds > MOST_S and not attack.goes_on else ""
    return fault, seconds, code


def afterwards(folder: Path, processes: int, made: Path, expected: dict, *, ended: bool) -> str:
    """Return the fault of the result, after resuming an unfinished run or restarting it if it had no folder yet."""
    try:
        if ended:
            run, fault = only_run(folder), ""
        else:
            run, fault = resume(folder, mini_arguments(folder, made, *LONGER), processes, 1, ATTACK_MARK=str(folder))
    except (subprocess.TimeoutExpired, ValueError) as error:
        kill_all(str(folder))
        return f"not resumed: {error}"
    left = [str(path) for place in (folder, made) for path in place.rglob("*.tmp")]
    return fault or differences(expected, run) or (f"left behind: {left}" if left else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="run the first of every N cases")
    parser.add_argument("--only", default="", help="run the cases whose name matches this regular expression")
    options = parser.parse_args()
    processes = options.processes
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    made, whole = work / "made", work / "whole"
    whole.mkdir()
    expected = uninterrupted(whole, mini_arguments(whole, made, *LONGER), processes)

    every = [(phase, attack) for phase in PHASES for attack in (ALONE if processes == 1 else SEVERAL)]
    cases = [c for c in every if possible(*c, processes) and re.search(options.only, f"{c[0]}: {c[1].name}")]
    cases = cases[:: options.every]
    counted = {phase: [0, 0, 0, 0.0] for phase, _ in cases}
    for number, (phase, attack) in enumerate(cases, start=1):
        folder = work / f"signal-{number}"
        folder.mkdir()
        if phase == "making":
            # The material is generated in the same folder again, because its path appears in the results.
            shutil.rmtree(made)
        problem, seconds, code = attacked(folder, processes, phase, attack, made)
        if code is not None:
            # An interrupted import leaves nothing to resume.
            nothing = phase in EARLY and code and not any(folder.iterdir())
            after = "" if nothing else afterwards(folder, processes, made, expected, ended=attack.goes_on and code == 0)
            problem = "; ".join(part for part in (problem, after and f"afterwards {after}") if part)
        counts = counted[phase]
        counts[2 if code is None else bool(problem)] += 1
        counts[3] = max(counts[3], 0.0 if attack.goes_on else seconds)
        outcome = "missed" if code is None else f"{problem or 'equal'}, exit {code} after {seconds:.1f} s"
        print(f"{number:3} {phase}: {attack.name}: {outcome}", flush=True)
        if problem:
            print(f"    {folder}.txt", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"| {processes} process(es) | equal | failed | missed | slowest end, s |\n|---|---|---|---|---|")
    for phase, (equal, failed, missed, slowest) in counted.items():
        print(f"| {phase} | {equal} | {failed} | {missed} | {slowest:.1f} |")
    return end(counted.values(), work)


if __name__ == "__main__":
    sys.exit(main())
