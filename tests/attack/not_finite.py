"""Put non-finite or huge numbers into one step of a small run, and check that exactly that step is skipped.

python tests/attack/not_finite.py --processes 1 [--every 3] [--only rollouts] [runtime.zero_stage=3]

Each run must end with 0, count one skipped step and list it with its questions. The checkpoints before and after that
step show that no optimizer moved. All weights of the export are finite, all ranks have the same weights, and the rest
of the run is the same as with every other poison at this step. If it is killed after the step and resumed, it gives the
same run. If all steps of a stage are poisoned, the run ends with 2 and one line and can be continued.

The program prints a line for each case, and a table. With 2 processes, only rank 1 is poisoned.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch
from small_runs import FORKS, differences, end, result, start_fork
from train_runs import command, environment, metrics, mini_arguments, only_run

from rmsd_fast.files import read_tensors

LONGEST_S = 300
TRAIN = ["-m", "rmsd_fast.train"]
STEPS = {"sft": 3, "warm_up": 3, "distill": 4}
QUESTIONS = {"sft": 8, "warm_up": 4, "distill": 4}
# Each engine takes steps in these stages. Stage 1 has its own policy.
ENGINES = {"stage1": ("sft",), "policy": ("distill",), "discriminator": ("warm_up", "distill")}
MOST_SKIPPED = 2
SIZES = (
    "sft.steps=3 discriminator.warm_up_steps=3 distill.steps=4 checkpoint.every_steps=1 checkpoint.keep=99 "
    f"runtime.max_skipped_steps={MOST_SKIPPED}"
).split()
# See poisoned.py.
ENGINE = ["loss.nan", "loss.inf", "loss.-inf", "value.nan", "value.inf", "gradient.nan", "gradient.inf", "loss.1e25"]
POLICY, DISCRIMINATOR = ([f"{name}.{kind}" for kind in ENGINE] for name in ("policy", "discriminator"))
SCORES = [f"scores.{kind}" for kind in ("all.nan", "one.nan", "one.inf", "one.-inf")]
ROLLOUTS = [f"rollouts.{kind}" for kind in ("all.nan", "row.nan", "one.nan", "all.inf", "all.-inf", "one.inf")]
REFERENCE = [f"reference.{kind}" for kind in ("all.nan", "one.nan", "all.inf", "all.-inf")]
SETTINGS = ("sft.lr=.inf", "distill.lr=.nan", "distill.kl_coef=1e400")


@dataclass(frozen=True)
class Case:
    """A poison and its step; step 0 means every step, and `kills` adds kills around the step's checkpoint."""

    kind: str
    stage: str
    step: int = 2
    kills: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} in {f'step {self.step}' if self.step else 'every step'} of {self.stage}"

    @property
    def sort(self) -> str:
        """Return the row of the table for this case."""
        place, what, value = self.kind.split(".")
        if not self.step:
            return "every step"
        return f"{place}, huge gradient" if value == "1e25" else f"{place}, {what}"

    @property
    def checkpoint(self) -> int:
        """Return the number of the checkpoint after the step."""
        return sum(list(STEPS.values())[: list(STEPS).index(self.stage)]) + self.step


def cases() -> list[Case]:
    killed = {("policy.loss.nan", "sft"), ("scores.all.nan", "warm_up"), ("rollouts.all.nan", "distill")}
    both = ["both.loss.1e25", "both.loss.nan"]
    kinds = {"sft": POLICY, "warm_up": DISCRIMINATOR + SCORES + ROLLOUTS}
    kinds["distill"] = POLICY + DISCRIMINATOR + both + SCORES + ROLLOUTS + REFERENCE
    chosen = [Case(kind, stage, kills=(kind, stage) in killed) for stage in STEPS for kind in kinds[stage]]
    edges = {"sft": "policy.gradient.nan", "warm_up": "discriminator.loss.1e25", "distill": "rollouts.row.nan"}
    chosen += [Case(kind, stage, step, True) for stage, kind in edges.items() for step in (1, STEPS[stage])]
    every = {"sft": "policy.loss.1e25", "warm_up": "rollouts.all.nan", "distill": "both.loss.nan"}
    return chosen + [Case(kind, stage, 0) for stage, kind in every.items()]


def run_to_end(program: list[str], arguments: list[str], processes: int) -> tuple[int, str]:
    """Run a module, or a file, to its end, and return the exit code and the messages.

    Args:
        program: ["-m", module] or [file], with its first arguments.
    """
    if FORKS and processes == 1:
        name, *others = program[1:] if program[0] == "-m" else program
        fork = start_fork(name, [*others, *arguments])
        try:
            _, errors = fork.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            fork.kill()
            return -1, f"Traceback: it hangs, {LONGEST_S} s"
        return fork.returncode, errors
    launcher = command([], processes=processes)[: -len(TRAIN)]
    line = [*launcher, *program, *arguments]
    try:
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        return -1, f"Traceback: it hangs, {LONGEST_S} s"
    return done.returncode, done.stderr


def poisoned(case: Case, arguments: list[str], processes: int, *others: str) -> tuple[int, str]:
    driver = [str(Path(__file__).with_name("poisoned.py")), case.kind, case.stage, str(case.step), *others]
    return run_to_end([*driver, "--rank", str(processes - 1), "--"], arguments, processes)


def failure(code: int, errors: str) -> str:
    return f"exit {code}: {errors.strip().splitlines()[-1:]}" if code or "Traceback" in errors else ""


def engine_tensors(run: Path, checkpoint: int) -> dict[str, torch.Tensor]:
    """Return all tensors in the engines of a checkpoint, by engine, file and name."""
    files = sorted((run / "checkpoints" / f"step_{checkpoint}" / "engines").glob("*/*.safetensors"))
    return {f"{f.parent.name}/{f.stem}/{name}": tensor for f in files for name, tensor in read_tensors(f).items()}


def adam_steps(run: Path, engine: str) -> set[int]:
    """Return the number of steps that an engine has taken at its end, by the counts of its optimizer."""
    tensors = engine_tensors(run, STEPS["sft"] if engine == "stage1" else sum(STEPS.values()))
    prefix = "policy/" if engine == "stage1" else f"{engine}/"
    return {int(tensor) for name, tensor in tensors.items() if name.startswith(prefix) and name.endswith(".step")}


def not_skipped(run: Path, case: Case, digests: Path) -> str:
    """Return the fault of a run that reached its end, or an empty text."""
    counted = [line["samples/skipped_steps"] for line in metrics(run)]
    listed = (run / "skipped.jsonl").read_text().splitlines() if (run / "skipped.jsonl").exists() else []
    if counted != [int(number >= case.checkpoint) for number in range(1, sum(STEPS.values()) + 1)]:
        return f"skipped steps are counted as {counted}, listed {len(listed)}"
    records = [(r["stage"], r["step"], len(set(r["questions"]))) for r in map(json.loads, listed)]
    if records != [(case.stage, case.step, QUESTIONS[case.stage])]:
        return f"skipped.jsonl holds {records}"
    before, after = engine_tensors(run, case.checkpoint - 1), engine_tensors(run, case.checkpoint)
    # No checkpoints of the engines exist before the first steps of stage 1 and of the warm-up.
    if case.step > 1 or case.stage == "distill":
        names = before.keys() | after.keys()
        kept = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
        if names - kept:
            return f"the step moved {sorted(names - kept)}"
    for engine, stages in ENGINES.items():
        expected = sum(STEPS[stage] - (stage == case.stage) for stage in stages)
        if adam_steps(run, engine) != {expected}:
            return f"{engine} has made {adam_steps(run, engine)} steps, expected {expected}"
    for folder in ("stage1", "export"):
        weights = read_tensors(run / folder / "model.safetensors")
        if bad := [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]:
            return f"{folder} is not finite in {bad}"
    return "the ranks hold different weights" if len({path.read_text() for path in digests.iterdir()}) > 1 else ""


def every_step(case: Case, work: Path, processes: int, code: int, errors: str) -> str:
    """Return the fault of a run in which every step of a stage was unusable."""
    told = {line for line in errors.splitlines() if line.startswith("rmsd_fast.train: ")}
    # Each rank reports why it ends. torchrun turns exit code 2 into 1 and adds its own traceback.
    if code != (2 if processes == 1 else 1) or len(told) != 1 or (processes == 1 and "Traceback" in errors):
        return f"exit {code}, {told}: {errors.strip().splitlines()[-1:]}"
    run = only_run(work)
    listed = (run / "skipped.jsonl").read_text().splitlines()
    logged = [line for line in metrics(run) if line["stage"] == case.stage]
    if not len(listed) == len(logged) == MOST_SKIPPED:
        return f"{len(listed)} steps in skipped.jsonl, {len(logged)} in metrics.jsonl, expected {MOST_SKIPPED}"
    code, errors = run_to_end(TRAIN, ["--resume", str(run)], processes)
    counted = metrics(run)[-1]["samples/skipped_steps"]
    # No checkpoint is written after the last skipped step, so the step is repeated.
    return failure(code, errors) or (f"resumed: {counted} skipped" if counted != MOST_SKIPPED - 1 else "")


def try_case(case: Case, work: Path, made: Path, processes: int, rests: dict) -> tuple[str, dict]:
    """Return the fault of a case and the output of its run; `rests` is the output of other cases by stage and step."""
    digests = work / "digests"
    digests.mkdir(parents=True)
    code, errors = poisoned(case, mini_arguments(work, made, *SIZES), processes, "--digests", str(digests))
    if case.step == 0:
        return every_step(case, work, processes, code, errors), {}
    problem = failure(code, errors) or not_skipped(only_run(work), case, digests)
    if problem:
        return problem, {}
    made_of = result(only_run(work))
    # A skipped step may change only its own metrics and rollouts.
    rest = {name: content for name, content in made_of.items() if name != "rollouts.jsonl"}
    rest["metrics"] = [line for line in rest["metrics"] if (line["stage"], line["step"]) != (case.stage, case.step)]
    first = rests.setdefault((case.stage, case.step), rest)
    different = sorted(name for name in rest if rest[name] != first.get(name))
    return f"the rest differs from that of other poisons: {different}" if different else "", made_of


def killed_and_resumed(case: Case, kill: str, work: Path, made: Path, processes: int, expected: dict) -> str:
    """Return the fault of a run that was killed before or after the checkpoint and resumed with the same poison."""
    work.mkdir()
    poisoned(case, mini_arguments(work, made, *SIZES), processes, "--kill", kill)
    run = only_run(work)
    if (run / "report.html").exists():
        return "it was not killed"
    if problem := failure(*poisoned(case, ["--resume", str(run)], processes)):
        return f"resumed: {problem}"
    listed = len((run / "skipped.jsonl").read_text().splitlines())
    return differences(expected, run) or (f"{listed} lines in skipped.jsonl" if listed != 1 else "")


def refused(setting: str, work: Path) -> str:
    """Return the fault of the response to a setting that is not a finite number."""
    work.mkdir()
    code, errors = run_to_end(TRAIN, mini_arguments(work / "out", work / "made", setting), 1)
    written = list(work.iterdir())
    right = code == 2 and len(errors.splitlines()) == 1 and setting.split("=")[0] in errors and not written
    return "" if right else f"exit {code}, {errors!r}, {written}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--every", type=int, default=1, help="run the first of every N cases")
    parser.add_argument("--only", default="", help="run the cases whose name matches this regular expression")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of all runs")
    options = parser.parse_args()
    SIZES.extend(options.overrides)
    work = Path(tempfile.mkdtemp(prefix="attack-"))
    counted: dict[str, list[int]] = {}
    rests: dict = {}

    def note(sort: str, name: str, problem: str, folder: Path) -> None:
        counted.setdefault(sort, [0, 0])[bool(problem)] += 1
        print(f"{name}: {f'{problem} ({folder})' if problem else 'right'}", flush=True)
        if not problem:
            shutil.rmtree(folder)

    for number, case in enumerate(
        [case for case in cases() if re.search(options.only, case.name)][:: options.every], start=1
    ):
        folder = work / f"case-{number}"
        problem, made_of = try_case(case, folder, work / "made", options.processes, rests)
        note(case.sort, case.name, problem, folder)
        for kill in ("unsaved", "saved") if case.kills and made_of else ():
            folder = work / f"case-{number}-{kill}"
            problem = killed_and_resumed(case, kill, folder, work / "made", options.processes, made_of)
            note("killed and resumed", f"{case.name}, killed {kill}", problem, folder)
    for setting in [setting for setting in SETTINGS if re.search(options.only, setting)]:
        folder = work / setting
        note("settings", setting, refused(setting, folder), folder)
    print(f"| {options.processes} process(es), poisoned | right | wrong |\n|---|---|---|")
    for sort, (right, wrong) in counted.items():
        print(f"| {sort} | {right} | {wrong} |")
    return end(counted.values(), work)


if __name__ == "__main__":
    sys.exit(main())
