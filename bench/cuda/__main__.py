"""One command that proves and measures everything on a CUDA machine, and says what it reached and missed.

    python -m bench.cuda [--minutes 8] [--only SECTION ...] [--wheels DIR] [--output FOLDER] [--list]
    python -m bench.cuda --device cpu        # a rehearsal at toy sizes: no CUDA, and nothing is measured

Facts and ceilings of the machine, correctness on CUDA, then benchmarks, most important first, in so many minutes at
most. What has been found is on disk after each section, however the run ends:

    results.jsonl    a line per measured case, and per section how it went
    summary.md       goals reached and missed, tables, and what was left out with the reason
    output.log       what all sections printed

in bench/results/<gpu>-<date>/ (of a rehearsal: runs/bench-cuda-rehearsal-<date>/). --wheels: a folder made by
tools.offline.wheels, from which the run takes the packages and FFmpeg libraries that the machine lacks. Nothing is
installed; but a native library of that folder is put into this checkout, where git ignores it.
Exit code 1: a section failed, or whole steps were not measured, which is never optional; 2: it cannot run here.
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
# Kept for the last summary.
CLOSING_S = 4.0
# Looking for the device and unpacking, about.
START_S = 10.0
NEEDED = ("torch", "triton", "transformers", "numpy", "pytest", "pytest_benchmark", "pytest_timeout")
NEEDED_FROM_FOLDER = ("deepspeed", "omegaconf")
# Settings for other programs, which would change what is measured.
NOT_PASSED_ON = (
    *("DS_ACCELERATOR", "TRITON_INTERPRET", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("RMSD_BENCH_UNTIL", "RMSD_BENCH_LOG"),
)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    text = f"most that the whole run takes (default: {MINUTES:g})"
    parser.add_argument("--minutes", type=float, default=MINUTES, help=text)
    text = f"these alone: {', '.join(names)}; without step the exit code is 1, since whole steps are never optional"
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=text)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder made by python -m tools.offline.wheels")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go; must be empty or not there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at toy sizes")
    parser.add_argument("--list", action="store_true", help="list the sections and end")
    own = parser.parse_args(given)
    if not own.minutes > 0:
        parser.error(f"--minutes: expected a number above 0, got {own.minutes:g}")
    if own.output is not None and own.output.exists() and (not own.output.is_dir() or any(own.output.iterdir())):
        parser.error(f"--output: expected an empty or new folder, {own.output} holds something")
    chosen = [section for section in SECTIONS if not own.only or section.name in own.only]
    needed = START_S + CLOSING_S + sum(section.least_s for section in chosen if section.required)
    if 60 * own.minutes < needed:
        parser.error(f"--minutes: these sections need at least {needed / 60:.1f}, got {own.minutes:g}")
    # Sections run elsewhere than where this was started.
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
        # What is measured is this checkout, whatever is installed.
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
            # A full disk, most likely: there is nowhere to write what else would be found.
            print(f"bench.cuda: {folder}: {error.strerror}; the run ends here", file=sys.stderr)
            return 1


def environment_of(device: str) -> dict[str, str]:
    """Of all sections."""
    own = {name: value for name, value in os.environ.items() if name not in NOT_PASSED_ON}
    own |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # A machine without a network: NCCL shall not look for one.
    own |= {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    return own | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def run_sections(run: Run, sections: list[Section], began: float, deadline: float) -> int:
    """Run them, and write the summary after each; the exit code of the command."""
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
            # Start-up is at the cost of all.
            for section, until in zip(sections, ends_of(sections, time.time(), deadline), strict=True):
                if section.required:
                    # Those before it may have overrun, to end.
                    until = min(max(until, time.time() + section.least_s), deadline)
                say(f"\n=== {section.name}: {section.what}, until second {until - began:.0f}")
                if section.name in ahead:
                    wait_for(ahead[section.name], until - section.least_s)
                result = run_section(section, run, until, deadline)
                reason = f": {result.reason}" if result.reason else ""
                say(f"=== {section.name}: {result.outcome} in {result.seconds:.0f} s{reason}")
                results.append(result)
                append_line({"bench": "section", **asdict(result)}, run.records)
                summarise(run)
                if result.reason == INTERRUPTED:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            faults.append(INTERRUPTED)
            for section in sections[len(results) :]:
                results.append(Result(section.name, LEFT_OUT, reason=INTERRUPTED))
                append_line({"bench": "section", **asdict(results[-1])}, run.records)
    faults = [f"{r.section}: {r.reason}" for r in results if r.outcome == FAILED] + missing_steps(run) + faults
    append_line({"bench": "end", "seconds": round(time.time() - began, 1), "faults": faults}, run.records)
    say("\n" + summarise(run))
    say(f"{run.records.parent}: {RECORDS}, summary.md, output.log")
    for fault in faults:
        say(f"FAILED: {fault}")
    return int(bool(faults))


def _interrupt(number: int, frame: object) -> None:
    """What runs is ended, and what was found is summed up, which a second signal shall not prevent."""
    for number in INTERRUPTIONS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def say(text: str) -> None:
    """To the terminal, which may be gone: the results are on disk."""
    with suppress(OSError, ValueError):
        print(text, flush=True)


def missing_steps(run: Run) -> list[str]:
    """Why whole steps count as missing; nothing if those with shared prompts were measured."""
    names = {STEP_BASE, f"{STEP_BASE}, checkpointing"}
    for record in read_lines(run.records):
        if record["bench"] == "step" and (run.toy or not record["quick"]) and names & record["variants"].keys():
            return []
    return ["whole steps were not measured, and they are never optional (section step)"]


def summarise(run: Run) -> str:
    """Write summary.md from results.jsonl, and return the part of it that is for the terminal."""
    try:
        text, short = (report.summary(run.records, tables=tables) for tables in (True, False))
    except Exception:
        # A record of a form that it does not know must not cost the rest of the run.
        text = short = f"No summary of {run.records.name}:\n\n```\n{traceback.format_exc()}```\n"
    run.records.with_name("summary.md").write_text(text, encoding="utf-8")
    return short


def probe(device: str, environment: dict[str, str]) -> tuple[str, str]:
    """Name of the device, and why it cannot be used or what is missing; "" where all is well."""
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
    """What became of the folder of packages, a line for each."""
    lines = [f"taken: {name} {version}" for name, version in packages.taken.items()]
    lines += [f"not taken: {name}: {why}" for name, why in packages.skipped.items()]
    lines += [f"not in the folder: {name}: {why}" for name, why in packages.left_out.items()]
    return [*lines, *[f"native library: {packages.native}"] * bool(packages.native)]


def new_folder(gpu: str) -> Path:
    """bench/results/<gpu>-<date>, or runs/bench-cuda-rehearsal-<date>; with a number where that is there already."""
    parent, stem = (RESULTS, gpu) if gpu else (REPOSITORY / "runs", "bench-cuda-rehearsal")
    stem = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-") + f"-{date.today().isoformat()}"
    folder, number = parent / stem, 1
    while folder.exists():
        number += 1
        folder = parent / f"{stem}-{number}"
    return folder


if __name__ == "__main__":
    sys.exit(main())
