"""Run with standard streams that are closed, full, gone, or strange terminals, and compare with an ordinary run.

python tests/attack/streams.py [--only terminal]

Each run has to end with 0 and the same result, and no printed text may be in a file of its folder. The program needs
Linux.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from small_runs import differences, end, kill_all, uninterrupted
from train_runs import command, environment, mini_arguments, only_run

LONGEST_S = 150
# A run and torchrun print these texts.
PRINTED = re.compile(rb"question/s|\ds/step| s/step|run folder: |Traceback|Warning: |torch\.distributed\.run|done: ")
NON_ASCII = "läufe-视频"


def through_shell(redirections: str) -> Callable[[list[str], dict], int]:
    """Run through a line of bash, and return the exit code of its first command."""

    def run(arguments: list[str], variables: dict) -> int:
        line = f"{shlex.join(arguments)} {redirections}; exit ${{PIPESTATUS[0]}}"
        return _code(subprocess.Popen(["bash", "-c", line], env=variables, **QUIET))

    return run


QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def unread_pipe(*, full: bool) -> Callable[[list[str], dict], int]:
    """Run into a pipe that is not read before the end; `full` uses a small pipe, which refuses further output."""

    def run(arguments: list[str], variables: dict) -> int:
        reading, writing = os.pipe()
        if full:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
            os.set_blocking(writing, False)
        streams = {"stdin": subprocess.DEVNULL, "stdout": writing, "stderr": writing}
        try:
            return _code(subprocess.Popen(arguments, env=variables, **streams))
        finally:
            os.close(writing)
            os.close(reading)

    return run


def terminal(rows: int, columns: int, *, closed: bool = False, resized: bool = False) -> Callable[..., int]:
    """Run in a new terminal, which is closed after the first lines or changes its size all the time."""

    def run(arguments: list[str], variables: dict) -> int:
        ours, theirs = os.openpty()
        _resize(ours, rows, columns)

        def control() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(
            arguments,
            env=variables,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=control,
        )
        os.close(theirs)

        def read() -> None:
            text = b""
            # Reading fails when the process has ended.
            with suppress(OSError):
                while block := os.read(ours, 4096):
                    text += block
                    if closed and text.count(b"\n") > 3:
                        break
            os.close(ours)

        reader = threading.Thread(target=read)
        reader.start()
        number = 0
        while resized and process.poll() is None and number < LONGEST_S / 0.1:
            with suppress(OSError):
                _resize(ours, *((0, 0), (1, 1), (24, 80), (500, 500))[number % 4])
            number += 1
            time.sleep(0.1)
        code = _code(process)
        reader.join(10)
        return code

    return run


def _resize(descriptor: int, rows: int, columns: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def with_variables(**changed: str) -> Callable[[list[str], dict], int]:
    def run(arguments: list[str], variables: dict) -> int:
        return _code(subprocess.Popen(arguments, env=variables | changed, **QUIET))

    return run


def _code(process: subprocess.Popen) -> int:
    """Return the exit code, or -SIGKILL if the process hung."""
    try:
        return process.wait(LONGEST_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


# Each case gives the function that starts it, the name of its folder, and the numbers of processes.
CASES: dict[str, tuple[Callable[[list[str], dict], int], str, tuple[int, ...]]] = {
    "stdin closed": (through_shell("<&-"), "", (1,)),
    "stdout closed": (through_shell(">&-"), "", (1, 2)),
    "stderr closed": (through_shell("2>&-"), "", (1, 2)),
    "all closed": (through_shell("<&- >&- 2>&-"), "", (1, 2)),
    "reader gone": (through_shell("2>&1 | head -1"), "", (1, 2)),
    "reader of stdout gone": (through_shell("| true"), "", (1,)),
    "/dev/full": (through_shell("> /dev/full 2>&1"), "", (1, 2)),
    "pipe that nobody reads": (unread_pipe(full=False), "", (1,)),
    "full pipe that refuses": (unread_pipe(full=True), "", (1, 2)),
    "terminal": (terminal(24, 80), "", (1,)),
    "terminal closed": (terminal(24, 80, closed=True), "", (1,)),
    "terminal 0x0": (terminal(0, 0), "", (1,)),
    "terminal 1x1": (terminal(1, 1), "", (1,)),
    "terminal resized": (terminal(24, 80, resized=True), "", (1,)),
    "ASCII output, other name": (with_variables(PYTHONIOENCODING="ascii"), NON_ASCII, (1,)),
    "C locale, other name": (with_variables(LC_ALL="C"), NON_ASCII, (1,)),
}


def strange_files(run: Path, whole: Path) -> str:
    """Return the faults of the files of a run folder: printed text, other names, invalid JSON, or other weights."""
    names = {}
    for folder in (run, whole):
        files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
        names[folder] = {str(path.relative_to(folder)): path for path in files}
    if different := names[run].keys() ^ names[whole].keys():
        return f"other files: {sorted(different)}"
    for name, path in names[run].items():
        content = path.read_bytes()
        if PRINTED.search(content) and not PRINTED.search(names[whole][name].read_bytes()):
            return f"{name} has {PRINTED.search(content)[0]!r}"
        with suppress(KeyError):
            lines = {".json": [content], ".jsonl": content.splitlines()}[path.suffix]
            try:
                [json.loads(line) for line in lines]
            except ValueError as error:
                return f"{name}: {error}"
        if path.suffix == ".safetensors" and content != names[whole][name].read_bytes():
            return f"{name} differs"
    events = b"".join(path.read_bytes() for path in run.glob("tensorboard/**/*") if path.is_file())
    return "TensorBoard's events have printed text" if PRINTED.search(events) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the cases whose name matches this regular expression")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    counted: dict[int, list[int]] = {1: [0, 0], 2: [0, 0]}
    for processes, counts in counted.items():
        chosen = {n: c for n, c in CASES.items() if processes in c[2] and re.search(options.only, f"{processes} {n}")}
        whole = work / f"whole-{processes}"
        whole.mkdir()
        expected = uninterrupted(whole, mini_arguments(whole, work / "made"), processes) if chosen else {}
        for number, (name, (run_with, folder_name, _)) in enumerate(chosen.items(), start=1):
            place = work / f"streams-{processes}-{number}"
            folder = place / folder_name
            folder.mkdir(parents=True)
            arguments = command(mini_arguments(folder, work / "made"), processes=processes)
            began = time.monotonic()
            code = run_with(arguments, {**environment(), "ATTACK_MARK": str(place)})
            kill_all(str(place))
            try:
                run = only_run(folder)
                problem = differences(expected, run) or strange_files(run, only_run(whole))
            except (ValueError, OSError) as error:
                problem = f"no result: {error}"
            if code:
                problem = f"{'hangs' if code == -signal.SIGKILL else f'exit {code}'}; {problem}"
            counts[bool(problem)] += 1
            print(
                f"{processes} process(es), {name}: {problem or 'equal'}, {time.monotonic() - began:.0f} s", flush=True
            )
            if not problem:
                shutil.rmtree(place)
    print("| streams | equal | failed |\n|---|---|---|")
    for processes, (equal, failed) in counted.items():
        print(f"| {processes} process(es) | {equal} | {failed} |")
    return end(counted.values(), work)


if __name__ == "__main__":
    sys.exit(main())
