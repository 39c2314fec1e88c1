"""Train a video student with R-MSD (arXiv 2603.11423): stage 1, discriminator warm-up, stage 2, evaluation, report.

torchrun --standalone --nproc-per-node 1 -m rmsd_fast.train quickstart distill.steps=20
torchrun --standalone --nproc-per-node 1 -m rmsd_fast.train --resume runs/quickstart-20260101-120000
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main, tell


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, check them and run. Heavy imports are delayed so that `--help` is fast."""
    if reason := environment.why_not():
        tell(f"rmsd_fast.train: {reason}")
        return 2
    from rmsd_fast.config import SettingsError, UserError
    from rmsd_fast.settings import load_settings, to_yaml

    arguments = _parse(argv)
    try:
        if arguments.resume:
            if not os.path.isfile(arguments.resume / "config.yaml"):
                raise SettingsError(f"--resume {arguments.resume}: expected a run folder with config.yaml, got none")
            recipe = str(arguments.resume / "config.yaml")
            overrides = [o for o in (arguments.recipe, *arguments.overrides) if o]
        else:
            recipe, overrides = arguments.recipe or "quickstart", arguments.overrides
            if "=" in recipe:
                recipe, overrides = "quickstart", [recipe, *overrides]
        settings = load_settings(recipe, overrides, resumed=arguments.resume is not None)
        if arguments.print_config:
            print(to_yaml(settings), end="")
            return 0
        if arguments.gpu_gib is not None and not arguments.dry_run:
            raise SettingsError("--gpu-gib: expected --dry-run with it, got none; a run reads the memory of its GPU")
        if arguments.dry_run:
            return _dry_run(settings, arguments.gpu_gib, arguments.resume)
    except UserError as error:
        tell(f"rmsd_fast.train: {error}")
        return 2
    return _run(settings, arguments)


def _dry_run(settings, gpu_gib: float | None, resume: Path | None) -> int:
    # torchrun starts one process per GPU, and the plan is the same for all of them.
    if os.environ.get("RANK", "0") != "0":
        return 0
    from rmsd_fast.stages.plan import describe_plan
    from rmsd_fast.train_run import check_judge

    check_judge(settings)
    plan, ready = describe_plan(settings, gpu_gib, resume)
    print(plan)
    return 0 if ready else 2


def _run(settings, arguments: argparse.Namespace) -> int:
    from rmsd_fast.program import run_program
    from rmsd_fast.train_run import train

    def work(world, stop) -> None:
        folder = train(settings, world, stop, arguments.resume, arguments.allow_changes)
        if world.is_main:
            print(f"done: {folder}\nreport: {folder / 'report.html'}")

    return run_program("rmsd_fast.train", settings, work, trains=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    from rmsd_fast.data.question_text import ANSWER_FORMAT
    from rmsd_fast.settings import describe_settings

    formats = "\n".join(f"  {task:<9} {text}" for task, text in ANSWER_FORMAT.items())
    parser = Parser(
        prog="rmsd_fast.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The student sees the media, the question, one line `A. text` for each option, and a last line that "
        f"depends on the task type. A teacher should see the same. Last lines:\n{formats}\n\n"
        f"settings (section.field = default):\n{describe_settings()}",
    )
    parser.add_argument("recipe", nargs="?", default="", help="YAML file or name of a recipe (default: quickstart)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help="settings to change")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="run folder to continue with its saved settings")
    parser.add_argument("--allow-changes", action="store_true", help="resume even if settings or data differ")
    parser.add_argument("--print-config", action="store_true", help="print all settings and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings and inputs and print the plan; exit with code 2 if not ready",
    )
    parser.add_argument(
        "--gpu-gib",
        type=_positive,
        metavar="GIB",
        help="with --dry-run: plan the memory for GPUs of this size, which need not be here",
    )
    return parser.parse_intermixed_args(argv)


def _positive(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1e6:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a size in GiB above 0, got {text!r}")


if __name__ == "__main__":
    code = run_main(main)
    if "torch" not in sys.modules:
        sys.exit(code)
    from rmsd_fast.runtime.process_group import exit_process

    exit_process(code)
