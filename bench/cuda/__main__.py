"""Test and measure everything on a CUDA machine with one command, and report which goals were reached and missed.

    python -m bench.cuda [--minutes 8] [--only SECTION ...] [--wheels DIR] [--output FOLDER] [--list]
    python -m bench.cuda --device cpu        # a rehearsal at toy sizes: no CUDA, and nothing is measured

The run records the machine's properties and ceilings, tests correctness on CUDA, and then runs the benchmarks, the most
important ones first, within the given number of minutes. Results are written after each section, so they are on disk
however the run ends:

    results.jsonl    one line per measured case, and one line per section with its outcome
    summary.md       goals reached and missed, tables, and what was left out, with the reason
    output.log       the output of all sections

The files go to bench/results/<gpu>-<date>/, those of a rehearsal to runs/bench-cuda-rehearsal-<date>/. --wheels names a
folder made by tools.offline.wheels, which provides packages and FFmpeg libraries that the machine lacks. Nothing is
installed, but a native library of that folder is copied into this checkout, where git ignores it.
Exit codes: 1: a section failed, or the mandatory step section was not measured; 2: the benchmarks cannot run on this
machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import date
from pathlib import Path

from bench.core import report
from bench.core.metrics import STEP_BASE
from bench.core.records import RECORDS, REPOSITORY, RESULTS, append_line, read_lines
from bench.cuda.sections import (
    FAILED,
    INTERRUPTED,
    LEFT_OUT,
    MINUTES,
    SECTIONS,
    Result,
    Run,
    Section,
    beside,
    ends_of,
    run_section,
    wait_for,
)
from tools.offline.packages import Packages, prepare

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Seconds reserved for the last summary.
CLOSING_S = 4.0
# Approximate seconds for finding the device and unpacking.
START_S = 10.0
NEEDED = ("torch", "triton", "transformers", "numpy", "psutil", "pytest", "pytest_benchmark", "pytest_timeout")
NEEDED_FROM_FOLDER = ("deepspeed", "omegaconf")
# Environment variables set for other programs that would distort the measurements.
NOT_PASSED_ON = (
    *("DS_ACCELERATOR", "TRITON_INTERPRET", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("RMSD_BENCH_UNTIL", "RMSD_BENCH_LOG"),
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    text = f"time limit for the whole run (default: {MINUTES:g})"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=text)
    text = f"run only these sections: {', '.join(names)}; without step, which is mandatory, the exit code is 1"
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=text)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder made by python -m tools.offline.wheels")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go; must be empty or not exist")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at toy sizes")
    parser.add_argument("--list", action="store_true", help="list the sections and exit")
    own = parser.parse_args(given)
    if not own.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {own.minutes:g}")
    if own.output is not None and own.output.exists() and (not own.output.is_dir() or any(own.output.iterdir())):
        parser.error(f"--output: expected an empty or new folder, {own.output} holds something")
    chosen = [section for section in SECTIONS if not own.only or section.name in own.only]
    needed = START_S + CLOSING_S + sum(section.least_s for section in chosen if section.required)
    if 60 * own.minutes < needed:
        parser.error(f"--minutes: these sections need at least {needed / 60:.1f}, got {own.minutes:g}")
    # Sections run in another working directory.
    own.output = None if own.output is None else own.output.resolve()
    return own


def main(given: Sequence[str] | None = None) -> int:
    own = arguments(given)
    if own.list:
        for section in SECTIONS:
            print(f"{section.name:17s}{section.seconds:4.0f} s of {60 * MINUTES:.0f}  {section.what}")
        return 0
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="bench-cuda-") as unpacked:
        environment = environment_of(own.device)
        packages = Packages({}, {}, {}, {}, "")
        if own.wheels is not None:
            try:
                packages = prepare(own.wheels, Path(unpacked))
            except (OSError, ValueError) as error:
                print(f"bench.cuda: --wheels {own.wheels}: {error}", file=sys.stderr)
                return 2
            environment |= packages.environment
        # Measure this checkout, even if another version is installed.
        sources = [str(REPOSITORY), str(REPOSITORY / "kernels")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*sources, environment.get("PYTHONPATH", "")]))
        name, obstacle = probe(own.device, environment)
        if obstacle:
            print(f"bench.cuda: {obstacle}", file=sys.stderr)
            return 2
        folder = own.output or new_folder(name if own.device == "cuda" else "")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "output.log").touch()
        except OSError as error:
            print(f"bench.cuda: {folder}: cannot be written ({error.strerror}); name another --output", file=sys.stderr)
            return 2
        run = Run(folder / RECORDS, folder / "output.log", own.device == "cpu", environment)
        sections = [section for section in SECTIONS if not own.only or section.name in own.only]
        not_chosen = [section.name for section in SECTIONS if section not in sections]
        taken = {field: getattr(packages, field) for field in ("taken", "skipped", "left_out", "native")}
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(began))
        facts = {"device": own.device, "name": name, "started": started, "minutes": own.minutes}
        say("\n".join([*described(packages), f"results: {folder}"]))
        try:
            append_line({"bench": "run", **facts, "packages": taken, "not_chosen": not_chosen}, run.records)
            return run_sections(run, sections, began, began + 60 * own.minutes - CLOSING_S)
        except OSError as error:
            # Most likely the disk is full, so further results could not be written.
            print(f"bench.cuda: {folder}: {error.strerror}; the run ends here", file=sys.stderr)
            return 1


def environment_of(device: str) -> dict[str, str]:
    """Return the environment variables that all sections run with."""
    own = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The machine may have no network; keep NCCL from looking for one.
    own |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    return own | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def run_sections(run: Run, sections: list[Section], began: float, deadline: float) -> int:
    """Run the sections, write the summary after each, and return the exit code."""
    results: list[Result] = []
    faults: list[str] = []
    for number in INTERRUPTIONS:
        signal.signal(number, _interrupt)
    with ExitStack() as stack:
        try:
            ahead = {
                section.name: stack.enter_context(beside(section, run))
                for section in sections
                if section.ahead is not None and not run.toy
            }
            # Start-up time counts against the overall budget.
            for section, until in zip(sections, ends_of(sections, time.time(), deadline), strict=True):
                if section.required:
                    # Earlier sections may have overrun while shutting down.
                    until = min(max(until, time.time() + section.least_s), deadline)
                say(f"\n=== {section.name}: {section.what}, until second {until - began:.0f}")
                if section.name in ahead:
                    wait_for(ahead[section.name], until - section.least_s)
                result = run_section(section, run, until, deadline)
                reason = f": {result.reason}" if result.reason else ""
                say(f"=== {section.name}: {result.outcome} in {result.seconds:.0f} s{reason}")
                results.append(result)
                append_line({"bench": "section", **asdict(result)}, run.records)
                summarize(run)
                if result.reason == INTERRUPTED:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            faults.append(INTERRUPTED)
            for section in sections[len(results) :]:
                results.append(Result(section.name, LEFT_OUT, reason=INTERRUPTED))
                append_line({"bench": "section", **asdict(results[-1])}, run.records)
    faults = [f"{r.section}: {r.reason}" for r in results if r.outcome == FAILED] + missing_steps(run) + faults
    append_line({"bench": "end", "seconds": round(time.time() - began, 1), "faults": faults}, run.records)
    say("\n" + summarize(run))
    say(f"{run.records.parent}: {RECORDS}, summary.md, output.log")
    for fault in faults:
        say(f"FAILED: {fault}")
    return int(bool(faults))


def _interrupt(number: int, frame: object) -> None:
    """Stop the running section and write the summary, even if a second signal arrives."""
    for number in INTERRUPTIONS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def say(text: str) -> None:
    """Print to the terminal. It may have closed, but the results are on disk."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


def missing_steps(run: Run) -> list[str]:
    """Return a fault if whole steps are missing, or an empty list if those with shared prompts were measured."""
    names = {STEP_BASE, f"{STEP_BASE}, checkpointing"}
    for record in read_lines(run.records):
        if record["bench"] == "step" and (run.toy or not record["quick"]) and names & record["variants"].keys():
            return []
    return ["whole steps were not measured, and they are never optional (section step)"]


def summarize(run: Run) -> str:
    """Write summary.md from results.jsonl, and return a short version for the terminal."""
    try:
        text, short = (report.summary(run.records, tables=tables) for tables in (True, False))
    except Exception:
        # A record in an unknown format must not end the run.
        text = short = f"No summary of {run.records.name}:\n\n```\n{traceback.format_exc()}```\n"
    run.records.with_name("summary.md").write_text(text, encoding="utf-8")
    return short


def probe(device: str, environment: dict[str, str]) -> tuple[str, str]:
    """Return the device's name, and why it cannot be used or which packages are missing ("" if all is well)."""
    code = (
        "import importlib.util as u, sys, torch\n"
        f"missing = [n for n in {(*NEEDED, *NEEDED_FROM_FOLDER)!r} if u.find_spec(n) is None]\n"
        "print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')\n"
        "print(' '.join(missing))\n"
    )
    if importlib.util.find_spec("torch") is None:
        return "", f"torch is not installed for {sys.executable}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return "", f"torch does not load:\n{done.stderr.strip()}"
    name, missing, *_ = [*done.stdout.splitlines(), "", ""]
    if device == "cuda" and not name:
        return "", "torch sees no CUDA device; to rehearse without one: python -m bench.cuda --device cpu"
    if missing:
        return name, (
            f"not installed: {missing}. Install them (make dev), or take them along: where there is a network, run "
            "python -m tools.offline.wheels DIR, then --wheels DIR here"
        )
    return name, ""


def described(packages: Packages) -> list[str]:
    """Return one line for each package of the --wheels folder: taken, or why not."""
    lines = [f"taken: {name} {version}" for name, version in packages.taken.items()]
    lines += [f"not taken: {name}: {why}" for name, why in packages.skipped.items()]
    lines += [f"not in the folder: {name}: {why}" for name, why in packages.left_out.items()]
    return [*lines, *[f"native library: {packages.native}"] * bool(packages.native)]


def new_folder(gpu: str) -> Path:
    """Return bench/results/<gpu>-<date> or runs/bench-cuda-rehearsal-<date>, with a number if it already exists."""
    parent, stem = (RESULTS, gpu) if gpu else (REPOSITORY / "runs", "bench-cuda-rehearsal")
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") + f"-{date.today().isoformat()}"
    folder, number = parent / stem, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stem}-{number}"
    return folder


if __name__ == "__main__":
    sys.exit(main())
