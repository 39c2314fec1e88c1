"""Train a video student with R-MSD (arXiv 2603.11423): stage 1, discriminator warm-up, stage 2, evaluation, report.

torchrun --standalone --nproc-per-node 1 -m rmsd_fast.train quickstart distill.steps=20
torchrun --standalone --nproc-per-node 1 -m rmsd_fast.train --resume runs/quickstart-20260101-120000
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rmsd_fast import environment


def main(argv: list[str] | None = None) -> int:
    """Parse, check, run. Imports what a run needs only when there is one: `--help` takes no seconds."""
    if reason := environment.why_not():
        print(f"rmsd_fast.train: {reason}", file=sys.stderr)
        return 2
    from rmsd_fast.config import SettingsError, UserError
    from rmsd_fast.settings import load_settings, to_yaml

    arguments = _parse(argv)
    try:
        if arguments.resume:
            if not (arguments.resume / "config.yaml").is_file():
                raise SettingsError(f"--resume {arguments.resume}: expected a run folder with config.yaml, found none")
            recipe = str(arguments.resume / "config.yaml")
            overrides = [o for o in (arguments.recipe, *arguments.overrides) if o]
        else:
            recipe, overrides = arguments.recipe or "quickstart", arguments.overrides
            if "=" in recipe:
                recipe, overrides = "quickstart", [recipe, *overrides]
        settings = load_settings(recipe, overrides)
        if arguments.print_config:
            print(to_yaml(settings), end="")
            return 0
        if arguments.dry_run:
            return _dry_run(settings)
    except UserError as error:
        print(f"rmsd_fast.train: {error}", file=sys.stderr)
        return 2
    return _run(settings, arguments)


def _dry_run(settings) -> int:
    from rmsd_fast.stages.plan import describe_plan

    plan, ready = describe_plan(settings)
    # torchrun starts one process for each GPU, and each knows the same.
    if os.environ.get("RANK", "0") == "0":
        print(plan)
    return 0 if ready else 2


def _run(settings, arguments: argparse.Namespace) -> int:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rmsd_fast.config import UserError
    from rmsd_fast.runtime.world import start, stop
    from rmsd_fast.stages.run import Stopped
    from rmsd_fast.train_run import train

    try:
        disable_progress_bar()
        world = start()
        folder = train(settings, world, arguments.resume, arguments.allow_changes)
        if world.is_main:
            print(f"done: {folder}\nreport: {folder / 'report.html'}")
        code = 0
    except Stopped as stopped:
        print(f"stopped by SIGTERM: {stopped}", file=sys.stderr)
        code = 0
    except UserError as error:
        print(f"rmsd_fast.train: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; --resume <run folder> continues from the last checkpoint", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print(f"rmsd_fast.train: {_out_of_memory(settings, error)}", file=sys.stderr)
        # Of this process alone: leaving the group would wait for the others.
        return 2
    # Not after other errors, for the same reason.
    stop()
    return code


def _out_of_memory(settings, error: Exception) -> str:
    """What to lower where a GPU ran out of memory, with the values of now."""
    video, runtime = settings.video, settings.runtime
    lines = [
        f"out of GPU memory ({str(error).strip().splitlines()[0]}). Lower, in this order:",
        f"  micro_tokens={settings.micro_tokens} (tokens of one forward pass)",
        f"  rollout.prompts_per_batch={settings.rollout.prompts_per_batch}, where it happened in rollouts; "
        f"evaluate.prompts_per_batch={settings.evaluate.prompts_per_batch}, in evaluation",
        f"  video.max_video_pixels={video.max_video_pixels}, data.max_prompt_tokens={settings.data.max_prompt_tokens}",
    ]
    if not settings.model.gradient_checkpointing:
        lines.append("  and write model.gradient_checkpointing=true")
    if runtime.zero_stage < 3:
        lines.append(f"  or shard more: runtime.zero_stage={runtime.zero_stage} -> 3, on as many GPUs as there are")
    if not runtime.offload_optimizer:
        lines.append("  or keep optimiser states in host memory: runtime.offload_optimizer=true")
    return "\n".join([*lines, "then continue with --resume <run folder> --allow-changes section.field=value"])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    from rmsd_fast.data.question_text import ANSWER_FORMAT
    from rmsd_fast.settings import describe_settings

    formats = "\n".join(f"  {task:<9} {text}" for task, text in ANSWER_FORMAT.items())
    parser = argparse.ArgumentParser(
        prog="rmsd_fast.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what the student sees, and a teacher should too: the media, the question, one line `A. text` for each "
        f"option, and as its last line\n{formats}\n\nsettings (section.field = default):\n{describe_settings()}",
    )
    parser.add_argument("recipe", nargs="?", default="", help="YAML file or name of a recipe; default quickstart")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that differ")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="run folder to continue, with its own settings")
    parser.add_argument("--allow-changes", action="store_true", help="resume although settings or data differ")
    parser.add_argument("--print-config", action="store_true", help="print all settings and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check settings and inputs, print the plan; ends with 2 where not ready"
    )
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    code = main()
    if "torch" not in sys.modules:
        sys.exit(code)
    from rmsd_fast.runtime.world import exit_process

    exit_process(code)
