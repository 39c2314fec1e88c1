"""The sections of bench.cuda in order of importance, and how one of them is run.

Each has a process of its own, stopped in time: a hang or a broken CUDA context costs one section, and what it has found
until then is there, since results are written as they come.
"""

from __future__ import annotations

import importlib.util
import json
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
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
# What a section may overrun, to write what it has.
GRACE_S = 15.0
# Processes for tests that wait for compilers more than for the device.
TEST_PROCESSES = 8
PASSED, FAILED, STOPPED, LEFT_OUT = "passed", "FAILED", "stopped", "left out"


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

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for test in self.tests:
            found[test["outcome"]] = found.get(test["outcome"], 0) + 1
        return found


def _python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", "-m", *arguments]


def _machine(run: Run) -> list[str]:
    return _python("bench.cuda_machine", "--record", str(run.records), *["--toy"] * run.toy)


def _correctness(run: Run) -> list[str]:
    options = ["-m", "cuda or vllm", "-p", "bench.section_log", "-p", "no:cacheprovider", "--timeout=150", "-q"]
    if importlib.util.find_spec("xdist") is not None and not run.toy:
        options += ["-n", str(TEST_PROCESSES), "--dist", "worksteal"]
    # Those alone have such tests; the others take a while to import.
    marked = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").glob("test_*.py")) if _has_mark(p)]
    return _python("pytest", *options, *marked)


def _has_mark(path: Path) -> bool:
    text = path.read_text(encoding="utf-8")
    return "mark.cuda" in text or "mark.vllm" in text


def _benchmark(*names: str) -> Callable[[Run], list[str]]:
    def command(run: Run) -> list[str]:
        files = [f"bench/bench_{name}.py" for name in names]
        options = ["-p", "bench.section_log", "-p", "no:cacheprovider", "--benchmark-disable", "-q"]
        return _python("pytest", *options, "--record", str(run.records), *["--toy"] * run.toy, *files)

    return command


def _media(run: Run) -> list[str]:
    return [*_benchmark("video")(run), "-k", "toy" if run.toy else "cuda"]


def _media_files(run: Run) -> list[str]:
    return _python("bench.video_files")


SECTIONS = (
    Section("machine", "what the machine is, and its ceilings", 20, 5, _machine),
    Section("correctness", "the suite's tests for CUDA and vLLM", 105, 20, _correctness),
    Section("step", "whole stage-2 steps at the shape of Qwen3-VL-4B", 135, 60, _benchmark("step_4b"), required=True),
    Section("policy_loss", "fused GRPO loss", 35, 15, _benchmark("linear_policy_loss")),
    Section("logprob", "fused log-probs and entropy", 35, 15, _benchmark("linear_logprob")),
    Section("prefix_attention", "attention over a shared prefix", 60, 15, _benchmark("prefix_attention")),
    Section("discriminator", "discriminator loss", 25, 10, _benchmark("discriminator")),
    Section("media", "decoding and preprocessing", 35, 20, _media, ahead=_media_files),
    Section("cross_entropy", "fused cross entropy", 30, 15, _benchmark("linear_cross_entropy")),
    Section("head_profile", "where a fused head's time goes; chunks and warps", 35, 10, _benchmark("head_profile")),
    Section("divergence", "fused divergence between two heads", 10, 10, _benchmark("linear_divergence")),
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
    """Run one; it is told `until`, and killed GRACE_S later or, if that is sooner, at the deadline (unix times)."""
    left = until - time.time()
    if left < section.least_s:
        reason = f"no time left: {max(left, 0):.0f} s, {section.least_s:.0f} needed"
        return Result(section.name, LEFT_OUT, reason=reason)
    tests = run.log.with_name(f".{section.name}.tests")
    tests.unlink(missing_ok=True)
    environment = run.environment | {"RMSD_BENCH_UNTIL": f"{until:.3f}", "RMSD_BENCH_LOG": str(tests)}
    began = time.time()
    with run.log.open("ab") as log, child(section.command(run), environment) as process:
        copier = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
        copier.start()
        try:
            code = process.wait(timeout=max(1.0, min(until + GRACE_S, deadline) - time.time()))
        except subprocess.TimeoutExpired:
            code = None
        # What it left running would keep the pipe open.
        end(process)
        copier.join(timeout=5)
    result = Result(section.name, PASSED, time.time() - began, tests=_lines(tests))
    tests.unlink(missing_ok=True)
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


def _lines(path: Path) -> list[dict]:
    """Without a last line that a kill cut."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@contextmanager
def child(
    command: list[str], environment: dict[str, str], *, lowest_priority: bool = False
) -> Iterator[subprocess.Popen]:
    """A process with a group of its own, which does not outlive the block.

    Output and errors are one pipe; of one that runs beside others, at the lowest priority, they are dropped.
    """
    process = subprocess.Popen(
        ["nice", "-n", "19", *command] if lowest_priority else command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL if lowest_priority else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end(process)


def wait_for(process: subprocess.Popen, until: float) -> None:
    """Until it has ended, or the time has come (unix time)."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(0.0, until - time.time()))


def end(process: subprocess.Popen, patience_s: float = 3.0) -> None:
    """End a process and those it started: asked first, then killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if process.poll() is None and number is signal.SIGTERM:
            try:
                process.wait(timeout=patience_s)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def _copy(source: IO[bytes], log: IO[bytes]) -> None:
    """Line by line to the log and to the terminal."""
    for line in source:
        log.write(line)
        log.flush()
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
