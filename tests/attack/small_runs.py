"""Start the runs of an attack, and compare their results."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from train_runs import command, environment, made_files, metrics, only_run
from warm_process import Fork, start_programs

HOOK = Path(__file__).parent / "hook"
LONGEST_S = 600
# Whether runs of one process are forks of a process that has the imports done. They are faster, but all have the same
# hash seed, so `make attack` starts interpreters.
FORKS = os.environ.get("ATTACK_FORKS") == "1"


@functools.cache
def _messages() -> tempfile.TemporaryDirectory:
    """Return the folder for the messages of forks, which is removed when this program ends."""
    return tempfile.TemporaryDirectory(prefix="attack-messages-")


def start_fork(program: str, arguments: list[str], **variables: str) -> Fork:
    """Start a module, or a file, in a fork with its own process group.

    Args:
        variables: variables of its environment, which are not visible in /proc.
    """
    descriptor, path = tempfile.mkstemp(dir=_messages().name)
    os.close(descriptor)
    hook = (str(HOOK / "sitecustomize.py"),) if "ATTACK_FOLDER" in variables else ()
    (fork,) = start_programs(program, arguments, environment(), [variables], stderr=path, before=hook, new_session=True)
    return fork


def start(
    arguments: list[str], processes: int, *, stderr: int | TextIO = subprocess.PIPE, **others: str
) -> subprocess.Popen | Fork:
    """Start a run in its own process group, so that a kill reaches torchrun alone or its ranks too.

    Args:
        others: variables of its environment.
    """
    # Processes with a mark are found by the variables in /proc.
    if FORKS and processes == 1 and "ATTACK_MARK" not in others:
        return start_fork("rmsd_fast.train", arguments, **others)
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
    """Return the results that have to be equal."""
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
    """Resume a killed run with this number of programs at once, or start it again if it has no folder with settings."""
    runs = [path for path in run_parent.iterdir() if (path / "config.yaml").is_file()]
    again = ["--resume", str(runs[0])] if runs else arguments
    started = [start(again, processes, **variables) for _ in range(writers if runs else 1)]
    ends = [(process.communicate(timeout=LONGEST_S)[1], process.returncode) for process in started]
    # Of several programs only one may write. The others are refused or find the run finished. torchrun turns exit code
    # 2 into 1.
    refused = [end for end in ends if end[1] and "is writing to this folder" in end[0]]
    faults = [end for end in ends if end[1] and end not in refused]
    fault = f"exit {faults[0][1]}: {faults[0][0].strip().splitlines()[-1:]}" if faults else ""
    return only_run(run_parent), fault or ("all were refused" if len(refused) == len(ends) else "")


def uninterrupted(folder: Path, arguments: list[str], processes: int) -> dict:
    """Return the results of an uninterrupted run, which also generates the material."""
    process = start(arguments, processes)
    _, errors = process.communicate(timeout=LONGEST_S)
    try:
        if process.returncode == 0:
            return result(only_run(folder))
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"the uninterrupted run ended with 0 but lacks some of its files\n{errors[-3000:]}"
        ) from error
    raise RuntimeError(f"the uninterrupted run: expected exit 0, got {process.returncode}\n{errors[-3000:]}")


def of_run(mark: str) -> dict[int, str]:
    """Return command lines of the running processes with ATTACK_MARK=mark in their environment, by process id."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            # The process may be ending or belong to another user. A zombie no longer has an environment.
            with suppress(OSError):
                if f"ATTACK_MARK={mark}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def processes_of(mark: str, kind: str) -> list[int]:
    """Return process ids of a kind: all, torchrun, train (all ranks), rank (the last), fork server, or one worker."""
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
    """Return the parent process id, or 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[1])
    except OSError:
        return 0


def kill_all(mark: str) -> None:
    """Kill the remaining processes of a run."""
    for pid in of_run(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def own_traceback(errors: str) -> str:
    """Return the last line of a traceback that names a file of rmsd_fast or comes from a rank."""
    for block in re.findall(r"Traceback \(most recent call last\):\n(?:(?:\[rank\d+\]:)? .*\n)*.*", errors):
        if "/rmsd_fast/" in block or "[rank" in block:
            return block.splitlines()[-1]
    return ""


def end(counted: Iterable[Sequence[float]], work: Path) -> int:
    """Return an attack's exit code from its counts (passed, failed, …), and remove its runs if none failed."""
    rows = list(counted)
    passed, failed = (sum(row[index] for row in rows) for index in (0, 1))
    if not failed:
        shutil.rmtree(work)
    # Without a case nothing was tested.
    return 1 if failed or not passed else 0
