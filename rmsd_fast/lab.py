"""Run an ablation: every arm of a plan over several seeds, with a table of means, differences and intervals.

python -m rmsd_fast.lab plan.yaml --out runs/lab --dry-run
python -m rmsd_fast.lab plan.yaml --out runs/lab --jobs 2 distill.steps=60

The same command continues an interrupted lab: finished runs are kept, and unfinished ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import end_with_parent, lenient_output, run_main, tell

if TYPE_CHECKING:
    from rmsd_fast.lab_plan import Job, Plan
    from rmsd_fast.lab_results import Scored

# Seconds that stopped runs get to finish their step and save it.
STOP_S = 600.0
POLL_S = 0.2
# Lines of a failed run's log that are shown.
SHOWN_LINES = 12


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, check the whole plan and run it. Return 1 if a run failed, 2 if the plan is wrong."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    if reason := environment.why_not():
        tell(f"rmsd_fast.lab: {reason}")
        return 2
    from rmsd_fast.config import UserError
    from rmsd_fast.files import FolderLock
    from rmsd_fast.lab_plan import check_seeds, choose, plan_jobs, read_plan

    try:
        seeds = check_seeds(arguments.seeds, "--seeds") if arguments.seeds else ()
        plan = read_plan(arguments.plan, overrides=arguments.overrides, seeds=seeds)
        out = arguments.out.resolve()
        jobs = plan_jobs(plan, out)
        chosen = choose(plan, jobs, arguments.only, seeds)
        lab = Lab(plan, jobs, chosen, out, at_once=arguments.jobs, keep=arguments.keep)
        if arguments.dry_run:
            print(lab.queue())
            return 0
        out.mkdir(parents=True, exist_ok=True)
        with FolderLock(out), lenient_output():
            return lab.run()
    except UserError as error:
        tell(f"rmsd_fast.lab: {error}")
        return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="rmsd_fast.lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", help="YAML file of the plan (docs/lab.md), or name of a plan of the package")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="settings for every run"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for runs, material and results")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of runs at once (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], metavar="SEED", help="train only these seeds")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="train only these, and the stage-1 students they need"
    )
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of finished runs")
    parser.add_argument("--dry-run", action="store_true", help="check the plan, print the runs and exit")
    # Otherwise, a setting after --seeds or --only would be parsed as one of their values.
    overrides = [item for item in argv if "=" in item and not item.startswith("-")]
    arguments = parser.parse_intermixed_args([item for item in argv if item not in overrides])
    if arguments.overrides:
        parser.error(f"expected section.field=value, got {arguments.overrides[0]!r}")
    if arguments.jobs < 1:
        parser.error(f"--jobs: expected a number of runs at once, got {arguments.jobs}")
    arguments.overrides = overrides
    return arguments


def train_command(folder: Path) -> list[str]:
    """Return the command that trains the run whose settings are in this folder, or continues it."""
    return [sys.executable, "-m", "rmsd_fast.train", "--resume", str(folder)]


class Lab:
    """Train the chosen runs of a plan, some at a time, and keep the results up to date.

    Args:
        plan: the plan.
        jobs: all of its training runs, in order.
        chosen: those to train.
        out: folder of the lab.
        at_once: number of runs at once.
        keep: whether to keep the checkpoints of finished runs.
    Raises:
        SettingsError: a run folder holds a run with other settings.
    """

    def __init__(self, plan: Plan, jobs: list[Job], chosen: list[Job], out: Path, *, at_once: int, keep: bool) -> None:
        self.plan, self.jobs, self.out = plan, jobs, out
        self.at_once, self.keep = at_once, keep
        self.finished = {job.folder: _scores(job) for job in jobs if _is_finished(job, out)}
        self.chosen = chosen
        self.waiting = [job for job in chosen if job.folder not in self.finished]
        self.total = len(self.waiting)
        # Process and start time of each running job.
        self.running: dict[Job, tuple[subprocess.Popen, float]] = {}
        self.failed: list[Job] = []
        # Seconds of the runs that this call has finished, by entry.
        self.seconds: dict[str, list[float]] = {}

    def queue(self) -> str:
        """Return the runs in order, and whether each is finished."""
        lines = [self.totals()]
        for job in self.chosen:
            state = "new"
            if job.folder in self.finished:
                state = "finished"
            elif (job.folder / "config.yaml").is_file():
                state = "unfinished"
            start = f", from {job.entry.start}" if job.needs else ""
            lines.append(f"  {job.name}{start}: {', '.join(job.settings.stages)} ({state})")
        return "\n".join(lines)

    def totals(self) -> str:
        """Return the line that a lab starts with."""
        done = len(self.chosen) - len(self.waiting)
        seeds = len({job.seed for job in self.chosen})
        students = sum(not job.entry.is_arm for job in self.chosen)
        return (
            f"{self.plan.path.name}: {len(self.chosen)} runs ({students} of stage 1, {len(self.chosen) - students} of "
            f"arms) over {seeds} seeds, {done} already finished, {self.at_once} at once"
        )

    def run(self) -> int:
        """Train the unfinished runs. Return 0, 1 if a run failed, or 130 after Ctrl-C."""
        print(self.totals(), flush=True)
        former = signal.signal(signal.SIGTERM, _interrupt)
        try:
            for job in self.chosen:
                if job.folder in self.finished:
                    self._remove_checkpoints(job)
            if self.finished:
                self._write()
            while self.waiting or self.running:
                self._start_ready()
                self._collect()
        except KeyboardInterrupt:
            self._stop()
            left = len(self.chosen) - sum(job.folder in self.finished for job in self.chosen)
            tell(f"interrupted with {left} runs left; run the same command again to continue")
            return 130
        finally:
            signal.signal(signal.SIGTERM, former)
        results = self.out / "table.md"
        if self.failed:
            tell(f"{len(self.failed)} of {self.total} runs failed: {'; '.join(job.name for job in self.failed)}")
            print(f"results without them: {results}")
            return 1
        print(f"done: {results}")
        return 0

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if job.needs is not None and job.needs in self.failed:
                self.waiting.remove(job)
                self._fail(job, f"not trained, because {job.needs.name} failed")
            elif len(self.running) < self.at_once and (job.needs is None or job.needs.folder in self.finished):
                self.waiting.remove(job)
                prepare(job, self.out)
                self.running[job] = (self._start(job), time.monotonic())

    def _start(self, job: Job) -> subprocess.Popen:
        log = self._log(job)
        log.parent.mkdir(exist_ok=True)
        command = train_command(job.folder)
        with log.open("a") as stream:
            stream.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {' '.join(command)}\n")
            stream.flush()
            # Use a separate session, so that Ctrl-C in the terminal reaches only the lab, which stops its runs.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=run_environment(self.plan.threads),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def _log(self, job: Job) -> Path:
        return self.out / "logs" / f"{job.seed}-{job.entry.name}.log"

    def _collect(self) -> None:
        """Take the runs that have ended, and wait a moment if there are none."""
        ended = [job for job, (process, _) in self.running.items() if process.poll() is not None]
        for job in ended:
            process, started = self.running.pop(job)
            if process.returncode == 0 and _is_finished(job, self.out):
                self.seconds.setdefault(job.entry.name, []).append(time.monotonic() - started)
                self._finish(job)
            else:
                lines = self._log(job).read_text(errors="replace").splitlines()[-SHOWN_LINES:]
                shown = "\n".join(f"    {line}" for line in lines)
                code = process.returncode
                self._fail(job, f"failed with exit code {code}; {self._log(job)} ends with:\n{shown}")
        if not ended:
            time.sleep(POLL_S)

    def _finish(self, job: Job) -> None:
        run = self.finished[job.folder] = _scores(job)
        self._remove_checkpoints(job)
        self._write()
        scores = [f"{kind} {score:.3f}" for kind in ("greedy", "sampled") if (score := run.score(kind)) is not None]
        self._tell(job, ", ".join(scores))

    def _remove_checkpoints(self, job: Job) -> None:
        if not self.keep:
            shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)

    def _fail(self, job: Job, reason: str) -> None:
        self.failed.append(job)
        self._tell(job, reason)

    def _tell(self, job: Job, text: str) -> None:
        done = self.total - len(self.waiting) - len(self.running)
        left = f"; about {_duration(self._left_s())} left" if self.seconds and (self.waiting or self.running) else ""
        print(f"[{done}/{self.total}] {job.name}: {text}{left}", flush=True)

    def _left_s(self) -> float:
        """Return the estimated seconds until the end, from the runs that have finished."""
        known = {name: fmean(seconds) for name, seconds in self.seconds.items()}
        usual = fmean(known.values())
        now = time.monotonic()
        seconds = sum(known.get(job.entry.name, usual) for job in self.waiting)
        for job, (_, started) in self.running.items():
            seconds += max(known.get(job.entry.name, usual) - (now - started), 0.0)
        return seconds / self.at_once

    def _write(self) -> None:
        from rmsd_fast.lab_results import write_results

        write_results(self.plan, self.jobs, self.finished, self.out)

    def _stop(self) -> None:
        """End the running processes: they save their step first, unless Ctrl-C is given again."""
        processes = [process for process, _ in self.running.values()]
        if not processes:
            return
        tell(f"stopping {len(processes)} runs after their current step; Ctrl-C again ends them at once")
        for process in processes:
            process.terminate()
        end = time.monotonic() + STOP_S
        try:
            for process in processes:
                process.wait(max(end - time.monotonic(), 0.0))
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in processes:
                process.kill()
                process.wait()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_environment(threads: int) -> dict[str, str]:
    """Return the environment of a run: one process, offline, and on the CPU if there is no GPU."""
    import torch

    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    device = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    return {**inherited, **device, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}


def prepare(job: Job, out: Path) -> None:
    """Write the settings of a new run, and the answers of its first student if its stage-1 run has them already."""
    from rmsd_fast.files import write_text_atomic
    from rmsd_fast.settings import save_settings

    folder = job.folder
    folder.mkdir(parents=True, exist_ok=True)
    if job.needs is not None and _same_evaluation(job, job.needs):
        answers = folder / "predictions" / "stage1.jsonl"
        if not answers.is_file():
            write_text_atomic(answers, (job.needs.folder / "predictions" / "stage1.jsonl").read_text(encoding="utf-8"))
    commits = folder / "commit.txt"
    former = commits.read_text().split(", ") if commits.is_file() else []
    if (now := _commit()) and now not in former:
        write_text_atomic(commits, ", ".join([*former, now]))
    # Written last, because a folder with settings is treated as a run that has started.
    if not (folder / "config.yaml").is_file():
        save_settings(job.settings, folder / "config.yaml")


def _same_evaluation(job: Job, stage1: Job) -> bool:
    """Return whether both runs would ask a student the same questions in the same way and score it alike."""
    from rmsd_fast.lab_plan import flat_settings

    sections = ("evaluate.", "data.", "video.", "made.", "model.", "runtime.")
    names = ("seed", "rollout.temperature", "teacher.numeric_metric", "teacher.numeric_eps", "teacher.ocr_metric")
    ours, theirs = flat_settings(job.settings), flat_settings(stage1.settings)
    return all(
        ours[key] == theirs[key]
        for key in ours
        if (key.startswith(sections) or key in names) and key not in ("model.path", "evaluate.samples")
    )


def _commit() -> str:
    """Return the commit of the source tree, or "" outside of a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _is_finished(job: Job, out: Path) -> bool:
    """Return whether a run has finished.

    Raises:
        SettingsError: the folder holds a run with other settings.
    """
    from rmsd_fast.config import SettingsError
    from rmsd_fast.lab_plan import with_effect
    from rmsd_fast.settings import load_settings

    config = job.folder / "config.yaml"
    if not config.is_file():
        return False
    there, wanted = (with_effect(s, out) for s in (load_settings(str(config), resumed=True), job.settings))
    # A lab that was moved has different paths, but the folder names still identify the students.
    different = [key for key in {**there, **wanted} if key != "model.path" and there.get(key) != wanted.get(key)]
    if different:
        raise SettingsError(
            f"{config}: expected the settings of {job.name}, got other values of {', '.join(different)}, which an "
            f"earlier version wrote; remove {job.folder}, or choose another --out"
        )
    try:
        facts = json.loads((job.folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "finished" in facts and (job.folder / "predictions" / f"{job.entry.prediction}.jsonl").is_file()


def _scores(job: Job) -> Scored:
    from rmsd_fast.lab_results import read_run

    return read_run(job.folder, job.entry.prediction)


if __name__ == "__main__":
    sys.exit(run_main(main))
