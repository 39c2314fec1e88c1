"""The sections of bench.cuda in order of importance, and how one of them is run.

Each has a process of its own, stopped in time: a hang or a broken CUDA context costs one section, and what it has found
until then is there, since results are written as they come.
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

from bench.core.records import REPOSITORY, read_lines

# What a section may overrun, to write what it has.
GRACE_S = 15.0
# Processes for tests that wait for compilers more than for the device.
TEST_PROCESSES = 8
PASSED, FAILED, STOPPED, LEFT_OUT = "passed", "FAILED", "stopped", "left out"
# The reason of a section in which the run was, or that is left out since.
INTERRUPTED = "interrupted"
# Tests for the kernels that the benchmarks time, by file. All other tests for CUDA and vLLM come later.
KERNEL_TESTS = (
    *("triton_rows", "fused_heads", "shared_prefix_cuda", "shared_prefix_op", "shared_prefix_decode"),
    "triton_discriminator",
)
# The first of the other tests; the rest follow by name.
FIRST_TESTS = ("stages_cuda", "media", "video_patches")


@dataclass(frozen=True)
class Run:
    """What all sections share. records: the .jsonl file of benchmarks; toy: sizes of a rehearsal."""

    records: Path
    log: Path
    toy: bool
    environment: dict[str, str]


@dataclass(frozen=True)
class Section:
    """seconds: of a run of `MINUTES`; least_s: with less it is not begun; ahead: what makes its files meanwhile."""

    name: str
    what: str
    seconds: float
    least_s: float
    command: Callable[[Run], list[str]]
    required: bool = False
    ahead: Callable[[Run], list[str]] | None = None


@dataclass
class Result:
    """tests: lines of section_log. reason: why it failed, stopped or was left out."""

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
        # One file that does not load must not cost the others.
        options = [*_PLUGINS, "-m", "cuda or vllm", "--timeout=150", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist") is not None and not run.toy:
            # The distribution that keeps their order: one by one, to whoever is free.
            options += ["-n", str(TEST_PROCESSES), "--dist", "loadgroup"]
        return _python("pytest", *options, *(str(path.relative_to(REPOSITORY)) for path in test_files(kernels)))

    return command


def test_files(kernels: bool) -> list[Path]:
    """Files with tests for CUDA or vLLM: those of the kernels, or all others."""
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
    """Benchmarks of one process, in this order; conftest.py puts the cases that carry a goal first."""

    def command(run: Run) -> list[str]:
        chosen = ["-k", "toy" if run.toy else only] if only else []
        options = [*_PLUGINS, "--benchmark-disable", "--record", str(run.records), *["--toy"] * run.toy]
        return _python("pytest", *options, *chosen, *(f"bench/{name}.py" for name in files))

    return command


def _media_files(run: Run) -> list[str]:
    return [sys.executable, "-c", "from bench.media import bench_video; bench_video.make_files()"]


_PLUGINS = ("-p", "bench.cuda.section_log", "-p", "no:cacheprovider", "-q")
_HEADS = [f"heads/bench_{n}" for n in ("profile", "policy_loss", "logprob", "cross_entropy", "divergence")]
_PREFIX = ("prefix/bench_attention", "heads/bench_discriminator")
# The kernels that the others are made of come first, so that a fault in them is known before anything rests on it. No
# section needs a communicator before `optimizer`.
SECTIONS = (
    Section("machine", "what the machine is, and its ceilings", 15, 5, _machine, required=True),
    Section("correctness", "tests of rows, heads, prefixes and discriminator", 60, 20, _tests(kernels=True)),
    Section("heads", "where a head's time goes; the losses", 120, 30, _benchmark(*_HEADS)),
    Section("prefix", "attention over a shared prefix, decoding, discriminator", 60, 20, _benchmark(*_PREFIX)),
    Section("step", "steps at the shape of Qwen3-VL-4B", 135, 45, _benchmark("step/bench_step"), required=True),
    Section(
        *("media", "decoding and preprocessing", 30, 20, _benchmark("media/bench_video", only="cuda")),
        ahead=_media_files,
    ),
    Section("stages", "whole stages, and all other tests for CUDA and vLLM", 40, 20, _tests(kernels=False)),
    Section("optimizer", "a full optimiser at the shape of Qwen3-VL-4B", 20, 20, _benchmark("step/bench_optimizer")),
)
MINUTES = sum(section.seconds for section in SECTIONS) / 60


def ends_of(sections: list[Section], begin: float, deadline: float) -> list[float]:
    """When each section shall have ended at the latest: its share of the time, what earlier ones leave included.

    What is required keeps at least its `least_s`, at the cost of those before it.
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
    """Run one; it is told `until`, and killed GRACE_S later or, if that is sooner, at the deadline (unix times).

    A KeyboardInterrupt ends it at once; what it has found is in the result, whose reason is INTERRUPTED.
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
        # Without a buffer, whose rest would be written, or fail to be, when it is closed.
        with run.log.open("ab", buffering=0) as log, child(section.command(run), environment) as process:
            copier = threading.Thread(target=_copy, args=(process.stdout, log, terminal()), daemon=True)
            copier.start()
            try:
                code = process.wait(timeout=max(1.0, min(until + GRACE_S, deadline) - time.time()))
            except subprocess.TimeoutExpired:
                pass
            except KeyboardInterrupt:
                interrupted = True
            # What it left running would keep the pipe open.
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
        result.outcome, result.reason = STOPPED, f"its time was up after {result.seconds:.0f} s"
    elif code != 0 and code != 5:
        # 5: pytest found no test.
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
    """A process with a group of its own, which does not outlive the block. Its errors go where its output goes."""
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
    """What makes a section's files beside other sections, at the lowest priority; what it prints goes to the log."""
    command = ["nice", "-n", "19", *section.ahead(run)]
    with run.log.open("ab") as log, child(command, run.environment, log) as process:
        yield process


def wait_for(process: subprocess.Popen, until: float) -> None:
    """Until it has ended, or the time has come (unix time)."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(0.0, until - time.time()))


def end(process: subprocess.Popen, patience_s: float = 3.0) -> None:
    """End a process and those it started: all are asked, and those that are left when patience is over are killed."""
    until = time.monotonic() + patience_s
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while _runs(process.pid) and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _runs(group: int) -> bool:
    """Whether a process of the group has not ended; in a container one that has may wait for ever to be noted."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, _, found = path.read_text().rpartition(")")[2].split()[:3]
            if int(found) == group and state not in "XZ":
                return True
    return False


def terminal() -> Any:
    """Where bytes for the terminal go; None where it was closed from the start."""
    return getattr(sys.stdout, "buffer", None)


def _copy(source: IO[bytes], *sinks: IO[bytes] | None) -> None:
    """Line by line to each. One that cannot be written, a closed terminal or a full disk, must not stall the source."""
    for line in source:
        for sink in filter(None, sinks):
            with suppress(OSError, ValueError):
                sink.write(line)
                sink.flush()
