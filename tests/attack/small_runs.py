"""Runs that an attack starts, and what has to be equal after it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from train_runs import command, environment, made_files, metrics, only_run

HOOK = Path(__file__).parent / "hook"
LONGEST_S = 600


def start(
    arguments: list[str], processes: int, *, stderr: int | TextIO = subprocess.PIPE, **others: str
) -> subprocess.Popen:
    """Start a run in a group of its own, so that a kill reaches torchrun alone or its ranks too.

    Args:
        others: variables of its environment.
    """
    hooked = {**others, "PYTHONPATH": os.pathsep.join([str(HOOK), os.environ.get("PYTHONPATH", "")])} if others else {}
    return subprocess.Popen(
        command(arguments, processes=processes),
        env=environment() | hooked,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def result(run: Path) -> dict:
    """What has to be equal."""
    report = (run / "report.html").read_text()
    shown = [name for name in ("untrained", "stage1", "stage2") if name in report]
    return {"metrics": metrics(run), "report": shown, **made_files(run)}


def differences(expected: dict, run: Path) -> str:
    try:
        got = result(run)
    except OSError as error:
        return f"{error.filename} is missing"
    return ", ".join(sorted(key for key in expected.keys() | got.keys() if expected.get(key) != got.get(key)))


def resume(run_parent: Path, arguments: list[str], processes: int, writers: int, **variables: str) -> tuple[Path, str]:
    """Continue what a kill left, by so many programs at once. Where it had made no folder with settings, start anew."""
    runs = [path for path in run_parent.iterdir() if (path / "config.yaml").is_file()]
    again = ["--resume", str(runs[0])] if runs else arguments
    started = [start(again, processes, **variables) for _ in range(writers if runs else 1)]
    ends = [(process.communicate(timeout=LONGEST_S)[1], process.returncode) for process in started]
    # Of several only one may write. The others are refused, or find the run finished. torchrun turns 2 into 1.
    refused = [end for end in ends if end[1] and "is writing to this folder" in end[0]]
    faults = [end for end in ends if end[1] and end not in refused]
    fault = f"exit {faults[0][1]}: {faults[0][0].strip().splitlines()[-1:]}" if faults else ""
    return only_run(run_parent), fault or ("all were refused" if len(refused) == len(ends) else "")


def uninterrupted(folder: Path, arguments: list[str], processes: int) -> dict:
    """What a run comes to that nothing disturbs. Makes the material too."""
    process = start(arguments, processes)
    _, errors = process.communicate(timeout=LONGEST_S)
    try:
        if process.returncode == 0:
            return result(only_run(folder))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"the undisturbed run ended with 0 and without all its files\n{errors[-3000:]}") from error
    raise RuntimeError(f"the undisturbed run: expected exit 0, got {process.returncode}\n{errors[-3000:]}")


def of_run(mark: str) -> dict[int, str]:
    """Command lines of the living processes that have ATTACK_MARK=mark in their environment, by process id."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            # It may be ending, or somebody else's. A zombie has no environment any more.
            with suppress(OSError):
                if f"ATTACK_MARK={mark}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def processes_of(mark: str, kind: str) -> list[int]:
    """Process ids of a kind: all, torchrun, train (every rank), rank (the last), fork server, worker (one of them)."""
    alive = of_run(mark)
    if kind == "all":
        return list(alive)
    decoders = {pid for pid, line in alive.items() if "decode_worker" in line}
    launchers = {pid for pid, line in alive.items() if "torch.distributed.run" in line}
    ranks = {pid for pid, line in alive.items() if "rmsd_fast.train" in line} - launchers
    parents = {pid: _parent(pid) for pid in decoders | ranks}
    # A process that was just forked has the command line of its parent.
    ranks = {pid for pid in ranks if parents[pid] not in ranks}
    fork_servers = {pid for pid in decoders if parents[pid] not in decoders}
    of_kind = {"torchrun": launchers, "train": ranks, "fork server": fork_servers, "worker": decoders - fork_servers}
    return sorted(ranks)[-1:] if kind == "rank" else sorted(of_kind[kind])[: 1 if kind == "worker" else None]


def _parent(pid: int) -> int:
    """0 where the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])
    except OSError:
        return 0


def kill_all(mark: str) -> None:
    """End what is left of a run."""
    for pid in of_run(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def own_traceback(errors: str) -> str:
    """Last line of a traceback that names a file of rmsd_fast or comes from a rank; torchrun prints others."""
    for block in re.findall(r"Traceback \(most recent call last\):\n(?:(?:\[rank\d+\]:)? .*\n)*.*", errors):
        if "/rmsd_fast/" in block or "[rank" in block:
            return block.splitlines()[-1]
    return ""


def end(counted: Iterable[Sequence[float]], work: Path) -> int:
    """The exit code of an attack, from its counts (passed, failed, …); the folder of its runs is kept if one failed."""
    rows = list(counted)
    passed, failed = (sum(row[index] for row in rows) for index in (0, 1))
    if not failed:
        shutil.rmtree(work)
    # Without a case nothing was tested.
    return 1 if failed or not passed else 0
