"""Run with every file of hostile_files.py, as video and as picture, in training, evaluation and report.

python tests/attack/media.py [--only dash]

The run must end with 0 and without a traceback. Each file that is not a video or picture is listed in bad_media.jsonl
and counted in the predictions, and videos under strange names are used. A video and a picture outside of the media root
are neither opened nor shown, and no program that libraries start for such files runs.

The program prints a line for each file and kind, and a table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from hostile_files import PROGRAMS, STRANGE_NAMES, is_magenta, make_hostile, make_secret, shown
from small_runs import start
from train_runs import MINI, environment, only_run

from rmsd_fast.data.media_cache import DiskCache

LONGEST_S = 900
KINDS, PLACES = ("video", "image"), ("training", "evaluation", "report")
CLIPS, BATCH, DECODE_S = 50, 16, 30
# The links lead out of the media root or nowhere, so no run starts if its questions name them.
LINKS = {"zero.mp4": "/dev/zero", "loop.mp4": "loop.mp4"}
TEXT = "<think>It moves.</think><answer>Something that moves.</answer>"


class Watch:
    """Report whether any process has opened or read the files since the last call."""

    def __init__(self, *paths: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK)
        for path in paths:
            if (
                libc.inotify_add_watch(self._descriptor, os.fsencode(path), 0x21) < 0
            ):  # These are IN_ACCESS and IN_OPEN.
                raise OSError(ctypes.get_errno(), "inotify", str(path))

    def fired(self) -> bool:
        try:
            return bool(os.read(self._descriptor, 65536))
        except BlockingIOError:
            return False


def make_material(work: Path) -> Path:
    """Create clips with questions, answers and a student by a run of one step, and return their folder."""
    made = work / "made"
    arguments = ["stages=[sft]", "sft.steps=1", "sft.warmup_steps=0", "evaluate.max_questions=1"]
    taken = [setting for setting in MINI if setting.startswith(("made.", "data.", "micro"))]
    arguments = ["quickstart", *taken, *arguments, f"made.train_clips={CLIPS}", f"made.folder={made}"]
    process = start([*arguments, f"output={work / 'first'}"], 1)
    _, errors = process.communicate(timeout=LONGEST_S)
    if process.returncode:
        sys.exit(errors[-3000:])
    (folder,) = [path for path in made.iterdir() if path.is_dir()]
    return folder


def question(identity: str, kind: str, path: str) -> dict:
    return {"id": identity, f"{kind}s": [path], "question": "Describe the clip.", "task_type": "open"}


def write_lines(path: Path, records: list[dict], *, before: str = "") -> Path:
    path.write_text(before + "".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_settings(made: Path, root: Path, cases: dict[str, tuple[str, str]], work: Path) -> list[str]:
    """Return the settings of a run on the generated questions and, in both roles, on those of the hostile files."""
    shutil.copytree(made / "clips", root / "clips", dirs_exist_ok=True)
    # A path that begins with "data:" is refused because it is not a file.
    asked = [question(identity, kind, f"./hostile/{name}") for identity, (name, kind) in cases.items()]
    questions = {role: (made / f"{role}.jsonl").read_text() for role in ("train", "heldout")}
    paths = {role: write_lines(root / f"{role}.jsonl", asked, before=text) for role, text in questions.items()}
    (answers,) = made.glob("pool-*.jsonl")
    (student,) = made.glob("student-*")
    pool = [
        {"id": identity, "k": k, "text": TEXT, "finish_reason": "stop", "model": "made"}
        for identity in cases
        for k in range(4)
    ]
    write_lines(root / "pool.jsonl", pool, before=answers.read_text())
    steps = -(-(questions["train"].count("\n") + len(asked)) // BATCH)
    return [
        "quickstart",
        *(setting for setting in MINI if not setting.startswith("made.")),
        *("made.enabled=false", f"model.path={student}", f"teacher.pool={root / 'pool.jsonl'}"),
        *(f"data.{role}={path}" for role, path in paths.items()),
        *(f"sft.batch_size={BATCH}", f"sft.steps={steps}", f"distill.batch_size={BATCH}", f"distill.steps={steps}"),
        *("data.max_bad_share=1", f"data.decode_timeout_s={DECODE_S}", f"data.disk_cache={work / 'cache'}"),
        *("evaluate.samples=1000", f"output={work / 'runs'}"),
    ]


def report_of(run: Path, rows: list[dict], page: Path, path: str) -> tuple[dict[str, str], str]:
    """Return what a report shows for these rows by id ("used", "magenta", "refused" or "nothing"), and a traceback."""
    copy = page.with_suffix("")
    copy.mkdir()
    shutil.copy(run / "config.yaml", copy)
    write_lines(copy / "samples.jsonl", rows)
    program = [sys.executable, "-m", "rmsd_fast.report", str(copy), "--output", str(page)]
    done = subprocess.run(
        program, env=environment() | {"PATH": path}, capture_output=True, text=True, timeout=LONGEST_S
    )
    cards = page.read_text().split('<article class="card sample">')[1:] if page.exists() else []
    seen = {}
    for row, card in zip(rows, cards, strict=False):
        pictures = re.findall(r'"(data:image/jpeg;base64,[^"]+)"', card)
        fault = re.search(r'<div class="gone">(.*?)</div>', card)
        seen[row["id"]] = "used" if pictures else "refused" if fault and "not read: " not in fault[1] else "nothing"
        if any(is_magenta(shown((picture, ""))) for picture in pictures):
            seen[row["id"]] = "magenta"
    return seen, "" if done.returncode == 0 and "Traceback" not in done.stderr else done.stderr


def outcomes(run: Path, identity: str, path: Path, reported: dict[str, str]) -> tuple[dict[str, str], str]:
    """Return the outcome of a question in each place ("refused", "used", or the fault), and the reason of a refusal."""
    stages = {record["stage"] for record in read_lines(run / "bad_media.jsonl") if record["id"] == identity}
    training = {frozenset(): "used", frozenset(("sft", "distill")): "refused"}.get(frozenset(stages - {"warm_up"}))
    files = sorted((run / "predictions").iterdir())
    errors = [record.get("error", "") for file in files for record in read_lines(file) if record["id"] == identity]
    # The file must be refused because of its content and not because it is missing.
    refused = [str(path) in error and "no such file" not in error for error in errors]
    evaluation = "refused" if all(refused) else f"{errors}" if any(errors) else "used"
    return {
        "training": training or f"refused in {sorted(stages)} alone",
        "evaluation": evaluation if len(files) == 3 else f"{len(files)} students",
        "report": reported.get(identity, "missing"),
    }, errors[-1].partition(f"{path}: ")[2]


def refused_at_start(name: str, kind: str, root: Path, arguments: list[str], path: str) -> str:
    """Return the fault of a run on a question that names a link out of the root, or an empty text."""
    asked = write_lines(root / "one.jsonl", [question("one", kind, name)], before=(root / "train.jsonl").read_text())
    process = start([*arguments, f"data.train={asked}"], 1, PATH=path)
    _, errors = process.communicate(timeout=LONGEST_S)
    lines = errors.strip().splitlines()
    right = process.returncode == 2 and "Traceback" not in errors and any("one.jsonl" in line for line in lines)
    return "" if right else f"exit {process.returncode}: {lines[-1:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the files whose name contains this word")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    root, outside, programs, ran = work / "root", work / "outside", work / "programs", work / "ran"
    for folder in (root / "hostile", outside, programs):
        folder.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(f"#!/bin/sh\necho {name} >> {ran}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    secret = make_secret(outside)
    paths = make_hostile(root / "hostile", secret)
    names = [name for name in paths if options.only in name]
    cases = {f"{kind}-{number}": (name, kind) for number, name in enumerate(names) for kind in KINDS}
    made = make_material(work)
    arguments = run_settings(made, root, cases, work)
    problems: list[str] = []

    # Start the run. Links that prevent a start are created after it has started.
    for name in LINKS:
        paths[name].unlink()
    watch, began = Watch(secret, outside / "magenta.png"), time.monotonic()
    process = start(arguments, 1, PATH=path)
    while process.poll() is None and not list(work.glob("runs/*/config.yaml")):
        time.sleep(0.05)
    for name, target in LINKS.items():
        paths[name].symlink_to(target)
    _, errors = process.communicate(timeout=LONGEST_S)
    print(f"the run: exit {process.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    if process.returncode or "Traceback" in errors:
        problems.append(f"the run ended with {process.returncode}: {errors[-3000:]}")
        print(f"{problems[0]}\n({work})")
        return 1
    run = only_run(work / "runs")
    cache = DiskCache(work / "cache", 2**40)
    kept = [cache.get(file.stem) for file in (work / "cache").glob("??/*.frames")]
    problems += ["the secret is in the disk cache"] * any(is_magenta(frames.pixels) for frames in kept)
    pictures = re.findall(r'"(data:image/jpeg;base64,[^"]+)"', (run / "report.html").read_text())
    problems += ["the secret is in the run's report"] * any(is_magenta(shown((picture, ""))) for picture in pictures)

    # These reports try all files, whereas the report of the run skips the files that the run refused.
    reported: dict[str, str] = {}
    for kind in KINDS:
        asked = [(identity, name) for identity, (name, own) in cases.items() if own == kind]
        rows = [
            {"student": "stage2", "response": "x", **question(identity, kind, str(paths[name]))}
            for identity, name in asked
        ]
        began = time.monotonic()
        seen, fault = report_of(run, rows, work / f"{kind}.html", path)
        reported |= seen
        problems += [f"report of {kind}s: {fault[-2000:]}"] * bool(fault)
        print(f"report of {kind}s: {time.monotonic() - began:.0f} s", flush=True)

    for name, kind in [(name, kind) for name in (*LINKS, "data:x") for kind in KINDS]:
        fault = refused_at_start(name if name == "data:x" else f"hostile/{name}", kind, root, arguments, path)
        print(f"at the start, {name} as {kind}: {fault or 'refused'}", flush=True)
        problems += [f"at the start, {name} as {kind}: {fault}"] * bool(fault)
    problems += ["the secret was opened"] * watch.fired()
    problems += [f"programs ran: {sorted(set(ran.read_text().split()))}"] if ran.exists() else []
    control, _ = report_of(run, [{"student": "stage2", **question("c", "video", str(secret))}], work / "c.html", path)
    problems += ["what is watched for would not be seen"] * (control != {"c": "magenta"} or not watch.fired())

    counted: Counter[tuple[str, str, str]] = Counter()
    for identity, (name, kind) in cases.items():
        expected = "used" if name in STRANGE_NAMES and kind == "video" else "refused"
        got, reason = outcomes(run, identity, paths[name], reported)
        counted.update((kind, place, what if what == expected else "FAILED") for place, what in got.items())
        print(f"{name} as {kind}: {', '.join(f'{place} {what}' for place, what in got.items())}  {reason:.70}")
        problems += [f"{name} as {kind}: expected {expected}, got {got}"] * (set(got.values()) != {expected})
    print(f"| {len(names)} files | where | refused | read rightly | failed |\n|---|---|---|---|---|")
    for kind, place in ((kind, place) for kind in KINDS for place in PLACES):
        cells = [counted[kind, place, what] for what in ("refused", "used", "FAILED")]
        print(f"| as {kind} | {place} | {cells[0]} | {cells[1]} | {cells[2]} |")
    print("\n".join(problems) + f"\n({work})" if problems else f"{len(kept)} cached clips, none with the secret")
    if not problems:
        shutil.rmtree(work)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
