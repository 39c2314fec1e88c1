"""The sections of bench.cuda in order of importance, and how to run one of them.

Each section has its own process, which is stopped when its time is up. A hang or a broken CUDA context therefore costs
only one section. Results are written as they come, so those found before a fault are kept.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from bench.core.records import REPOSITORY, read_lines

# Seconds that a section may overrun in order to write its results.
GRACE_S = 15.0
# Tests run in parallel because they spend more time waiting for compilers than for the device.
TEST_PROCESSES = 8
PASSED, FAILED, STOPPED, LEFT_OUT = "passed", "FAILED", "stopped", "left out"
# The reason given for the section that was running at an interruption and for those after it.
INTERRUPTED = "interrupted"
# Test files for the kernels that the benchmarks time. All other tests for CUDA and vLLM run later.
KERNEL_TESTS = (
    *("triton_rows", "fused_heads", "shared_prefix_cuda", "shared_prefix_op", "shared_prefix_decode"),
    "triton_discriminator",
)
# These run first among the other tests; the rest follow by name.
FIRST_TESTS = ("stages_cuda", "media", "video_patches")


@dataclass(frozen=True)
class Run:
    """What all sections share. records: the benchmarks' .jsonl file; toy: whether to use the sizes of a rehearsal."""

    records: Path
    log: Path
    toy: bool
    environment: dict[str, str]


@dataclass(frozen=True)
class Section:
    """One section.

    seconds: its time in a run of `MINUTES`; least_s: it does not start with less time than this; ahead: the command
    that prepares its files while other sections run.
    """

    name: str
    what: str
    seconds: float
    least_s: float
    command: Callable[[Run], list[str]]
    required: bool = False
    ahead: Callable[[Run], list[str]] | None = None


@dataclass
class Result:
    """The result of a section. tests: lines of section_log; reason: why it failed, was stopped or was left out."""

    section: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    tests: list[dict] = field(default_factory=list)


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", *arguments]


def _machine(run: Run) -> list[str]:
    return _python("bench.cuda.machine", "--record", str(run.records), *["--toy"] * run.toy)


def _tests(kernels: bool) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        # If a file cannot be imported, the tests in other files still run.
        options = [*_PLUGINS, "-m", "cuda or vllm", "--timeout=150", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist") is not None and not run.toy:
            # This mode keeps the order: each test goes to the next free process.
            options += ["-n", str(TEST_PROCESSES), "--dist", "loadgroup"]
        return _python("pytest", *options, *(str(path.relative_to(REPOSITORY)) for path in test_files(kernels)))

    return command


def test_files(kernels: bool) -> list[Path]:
    """Return the files with tests for CUDA or vLLM: those of the kernels, or all others."""
    marked = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if _has_mark(path)]
    names = {path.stem.removeprefix("test_"): path for path in marked}
    if kernels:
        return [names[name] for name in KERNEL_TESTS]
    first = [names[name] for name in FIRST_TESTS]
    return first + [path for name, path in names.items() if name not in (*KERNEL_TESTS, *FIRST_TESTS)]


def _has_mark(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return "mark.cuda" in text or "mark.vllm" in text


def _benchmark(*files: str, only: str = "") -> Callable[[Run], list[str]]:
    """Run benchmarks in one process, in this order; conftest.py puts cases that have a goal first."""

    def command(run: Run) -> list[str]:
        chosen = ["-k", "toy" if run.toy else only] if only else []
        options = [*_PLUGINS, "--benchmark-disable", "--record", str(run.records), *["--toy"] * run.toy]
        return _python("pytest", *options, *chosen, *(f"bench/{name}.py" for name in files))

    return command


def _media_files(run: Run) -> list[str]:
    return [sys.executable, "-c", "from bench.media import bench_video; bench_video.make_files()"]


_PLUGINS = ("-p", "bench.cuda.section_log", "-p", "no:cacheprovider", "-q")
_HEADS = ("heads/bench_profile", "heads/bench_losses")
_PREFIX = ("prefix/bench_attention", "heads/bench_discriminator")
# Basic kernels come first, so that their faults are known before anything depends on them. `optimizer` is the first
# section that needs a communicator.
SECTIONS = (
    Section("machine", "what the machine is, and its ceilings", 15, 5, _machine, required=True),
    Section("correctness", "tests of rows, heads, prefixes and discriminator", 60, 20, _tests(kernels=True)),
    Section("heads", "where a head's time goes; the losses", 100, 30, _benchmark(*_HEADS)),
    Section("prefix", "attention over a shared prefix, decoding, discriminator", 50, 20, _benchmark(*_PREFIX)),
    Section("step", "steps at the shape of Qwen3-VL-4B", 135, 45, _benchmark("step/bench_step"), required=True),
    Section(
        *("media", "decoding and preprocessing", 30, 20, _benchmark("media/bench_video", only="cuda")),
        ahead=_media_files,
    ),
    Section("rollout", "rollouts at the shape of Qwen3-VL-4B", 30, 20, _benchmark("rollout/bench_rollout")),
    Section("stages", "whole stages, and all other tests for CUDA and vLLM", 40, 20, _tests(kernels=False)),
    Section("optimizer", "a full optimizer at the shape of Qwen3-VL-4B", 20, 20, _benchmark("step/bench_optimizer")),
)
MINUTES = sum(section.seconds for section in SECTIONS) / 60


def ends_of(sections: list[Section], begin: float, deadline: float) -> list[float]:
    """Return the latest end of each section. Each gets a share of the time, plus what earlier sections leave unused.

    Required sections keep at least their `least_s`, at the expense of earlier sections.
    """
    total, spent = sum(section.seconds for section in sections), 0.0
    ends = []
    for place, section in enumerate(sections):
        spent += section.seconds
        end = begin + (deadline - begin) * spent / total
        if section.required:
            before = ends[-1] if ends else begin
            end = min(deadline, max(end, before + section.least_s))
        reserved = sum(later.least_s for later in sections[place + 1 :] if later.required)
        ends.append(min(end, max(begin, deadline - reserved)))
    return ends


def run_section(section: Section, run: Run, until: float, deadline: float) -> Result:
    """Run one section. It is told to end by `until`, and killed GRACE_S later or at the deadline, whichever is first.

    `until` and `deadline` are Unix times. A KeyboardInterrupt ends the section at once; the result then has the tests
    that have ended, and the reason INTERRUPTED.
    """
    left = until - time.time()
    if left < section.least_s:
        reason = f"no time left: {max(left, 0):.0f} s, {section.least_s:.0f} needed"
        return Result(section.name, LEFT_OUT, reason=reason)
    tests = run.log.with_name(f".{section.name}.tests")
    tests.unlink(missing_ok=True)
    environment = run.environment | {"RMSD_BENCH_UNTIL": f"{until:.3f}", "RMSD_BENCH_LOG": str(tests)}
    began, code, interrupted = time.time(), None, False
    try:
        # Unbuffered, so closing the file has nothing left to write and cannot fail.
        with run.log.open("ab", buffering=0) as log, child(section.command(run), environment) as process:
            copier = threading.Thread(target=_copy, args=(process.stdout, log, terminal()), daemon=True)
            copier.start()
            try:
                code = process.wait(timeout=max(1.0, min(until + GRACE_S, deadline) - time.time()))
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                interrupted = True
            # Leftover child processes would keep the pipe open.
            end(process)
            copier.join(timeout=5)
        result = Result(section.name, PASSED, time.time() - began, tests=read_lines(tests))
    finally:
        tests.unlink(missing_ok=True)
    if interrupted:
        result.outcome, result.reason = STOPPED, INTERRUPTED
    else:
        _judge(result, code)
    return result


def _judge(result: Result, code: int | None) -> None:
    failed = [test["test"] for test in result.tests if test["outcome"] == "failed"]
    ran = any(test["outcome"] == "passed" for test in result.tests)
    if failed:
        result.outcome, result.reason = FAILED, f"{len(failed)} failed, the first is {failed[0]}"
    elif code is None:
        result.outcome, result.reason = STOPPED, f"timed out after {result.seconds:.0f} s"
    elif code != 0 and code != 5:
        # pytest exits with 5 if it finds no test.
        died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        result.outcome, result.reason = FAILED, f"{died}; see the log"
    elif code == 5:
        result.outcome, result.reason = LEFT_OUT, "there is no such test"
    elif result.tests and not ran:
        reasons = {test["reason"] for test in result.tests}
        result.outcome, result.reason = LEFT_OUT, "; ".join(sorted(reasons))[:300]


@contextmanager
def child(
    command: list[str], environment: dict[str, str], output: IO[bytes] | int = subprocess.PIPE
) -> Iterator[subprocess.Popen]:
    """Run a process in its own group until the block ends. Its stderr goes to the same place as its stdout."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


@contextmanager
def beside(section: Section, run: Run) -> Iterator[subprocess.Popen]:
    """Prepare a section's files in the background while other sections run, at the lowest priority; log the output."""
    command = ["nice", "-n", "19", *section.ahead(run)]
    with run.log.open("ab") as log, child(command, run.environment, log) as process:
        yield process


def wait_for(process: subprocess.Popen, until: float) -> None:
    """Wait until the process has ended, or until the given Unix time."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(0.0, until - time.time()))


def end(process: subprocess.Popen, patience_s: float = 3.0) -> None:
    """End a process and its children: send SIGTERM to all, and SIGKILL to those that remain after `patience_s`."""
    until = time.monotonic() + patience_s
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while _runs(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _runs(group: int) -> bool:
    """Return whether a process of the group still runs. In a container, ended processes may stay zombies for ever."""
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return True
    return False


def terminal() -> Any:
    """Return the binary stream of the terminal, or None if it was closed from the start."""
    return getattr(sys.stdout, "buffer", None)


def _copy(source: IO[bytes], *sinks: IO[bytes] | None) -> None:
    """Copy each line to all sinks. A sink that fails (closed terminal, full disk) must not stall the source."""
    for line in source:
        for sink in filter(None, sinks):
            with suppress(OSError, ValueError):
                sink.write(line)
                sink.flush()
