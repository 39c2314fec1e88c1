"""Collect the answers of a teacher through an API with OpenAI's chat completions, and write a pool for training.

python -m rmsd_fast.collect q.jsonl --endpoint http://localhost:8000/v1 --model my-teacher --k 4 --out pool.jsonl
python -m rmsd_fast.collect q.jsonl --recipe hosted --model my-teacher --out pool.jsonl --dry-run
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import lenient_output, run_main, tell

if TYPE_CHECKING:
    from rmsd_fast.collect_run.config import CollectionConfig

# Exit codes: some answers are missing; an error. After a signal, the code is 128 + its number.
INCOMPLETE, FAILED = 1, 2


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and collect. Return 0 if the pool is complete."""
    if reason := environment.why_not(("torch", "omegaconf", "httpx2", "PIL"), "collect,video"):
        tell(f"rmsd_fast.collect: {reason}")
        return FAILED
    from rmsd_fast.collect_run.config import load_collection, print_config
    from rmsd_fast.config import UserError

    arguments = _parse(argv)
    # Otherwise the lock would not cover the file under its other name.
    arguments.out = arguments.out.resolve() if arguments.out.is_symlink() else arguments.out
    try:
        settings = load_collection(arguments.recipe, _overrides(arguments))
        if arguments.print_config:
            print(print_config(settings), end="")
            return 0
        with lenient_output():
            return _rescore(settings, arguments) if arguments.rescore else _collect(settings, arguments)
    except UserError as error:
        tell(f"rmsd_fast.collect: {error}")
        return FAILED
    except KeyboardInterrupt:
        tell("rmsd_fast.collect: interrupted; what was collected before is in the pool")
        return 130
    except BrokenPipeError:
        # The reader of the output has ended, which run_main handles.
        raise
    except OSError as error:
        where = f"{error.filename2 or error.filename}: " if error.filename else ""
        tell(f"rmsd_fast.collect: {where}{error.strerror or error}; what was collected before is in the pool")
        return FAILED


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Return the settings of the command line. The options are short for settings."""
    named = {"endpoint": arguments.endpoint, "model": arguments.model, "k": arguments.k}
    return [
        f"collect.{name}={json.dumps(value)}" for name, value in named.items() if value is not None
    ] + arguments.overrides


def _collect(settings: CollectionConfig, arguments: argparse.Namespace) -> int:
    import asyncio

    from rmsd_fast.collect_run.config import teachers
    from rmsd_fast.collect_run.loop import Collection
    from rmsd_fast.collect_run.plan import describe_plan, make_plan, missing
    from rmsd_fast.collect_run.progress import Progress, run_with_signals, summary
    from rmsd_fast.collect_run.requests import RequestBuilder
    from rmsd_fast.collect_run.store import PoolStore
    from rmsd_fast.data.media import MediaReader

    questions, preprocessor = _questions(settings, arguments.questions), _preprocessor(settings)
    models = teachers(settings.collect)
    with (
        PoolStore(arguments.out, questions, settings, models, preprocessor.family, dry=arguments.dry_run) as store,
        MediaReader(settings.data) as media,
    ):
        builder = RequestBuilder(settings, preprocessor, media)
        plan = make_plan(questions, store, settings, builder, len(models))
        print("\n".join(describe_plan(plan, questions, store, settings)))
        if arguments.dry_run or not plan.answers:
            return INCOMPLETE if store.failed and not arguments.dry_run else 0
        collection = Collection(questions, settings, store, builder, models, preprocessor.family)
        progress = Progress(collection, settings.collect, plan.answers, store.metered)
        try:
            number = asyncio.run(run_with_signals(collection, progress))
        finally:
            lacking = sum(len(missing(question, store, settings, with_rejected=True)) for question in questions)
            print("\n".join(summary(collection, settings.collect, lacking, builder.short_videos())))
        if number:
            return 128 + number
        return INCOMPLETE if lacking or store.failed else 0


def _rescore(settings: CollectionConfig, arguments: argparse.Namespace) -> int:
    """Read and score the answers of the pool again, without asking the teacher."""
    from rmsd_fast.collect_run.store import lock_pool, repair_tail
    from rmsd_fast.teacher.pool import check_pool, load_pool, write_pool
    from rmsd_fast.teacher.scores import describe_changes, repair_pool

    questions = _questions(settings, arguments.questions)
    with lock_pool(arguments.out):
        repair_tail(arguments.out)
        pool = load_pool(arguments.out)
        check_pool(pool, questions, max_unanswered_share=1.0)
        repaired = repair_pool(pool, questions, settings.teacher)
        write_pool(arguments.out, repaired.responses)
    print("\n".join([f"{arguments.out}: {repaired.text()}", *describe_changes(pool, repaired)]))
    return 0


def _questions(settings: CollectionConfig, path: Path):
    from rmsd_fast.config import SettingsError
    from rmsd_fast.stages.inputs import read_files

    questions = read_files(settings, {"train": str(path)}, {"train": settings.data.media_root})[0]["train"]
    for question in questions:
        if any(question.spans) and settings.collect.video_as != "frames":
            raise SettingsError(
                f"collect.video_as={settings.collect.video_as}: expected whole videos, got question {question.id!r} "
                "about a section of one; set collect.video_as=frames"
            )
    return questions


def _preprocessor(settings: CollectionConfig):
    """Return the preprocessing of the student at `model.path`, or that of Qwen3-VL without the model."""
    from rmsd_fast.data.preprocess import Preprocessor, load_preprocessor

    if not settings.model.path:
        return Preprocessor()
    from rmsd_fast.models.folders import find_folder

    if folder := find_folder(settings.model.path):
        return load_preprocessor(folder)
    tell(
        f"model.path={settings.model.path}: expected a downloaded model, got none; the frames are chosen as for "
        "Qwen3-VL. Download the model first if it is of another family"
    )
    return Preprocessor()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    from rmsd_fast.collect_run.config import READ, SECTIONS, CollectionConfig
    from rmsd_fast.settings import describe_settings

    parser = Parser(
        prog="rmsd_fast.collect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"settings (section.field = default):\n{describe_settings(CollectionConfig, SECTIONS, READ)}",
    )
    parser.add_argument("questions", type=Path, help="questions, JSONL (docs/data.md)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help="settings to change")
    parser.add_argument("--recipe", default="", help="YAML file or name of a recipe, of a teacher or of a run")
    parser.add_argument("--endpoint", action="append", metavar="URL", help="collect.endpoint; may be repeated")
    parser.add_argument("--model", action="append", metavar="NAME", help="collect.model; may be repeated")
    parser.add_argument("--k", type=int, help="collect.k")
    parser.add_argument("--out", type=Path, required=True, metavar="POOL", help="pool to write or to continue")
    parser.add_argument("--dry-run", action="store_true", help="check the inputs, estimate requests, tokens and cost")
    parser.add_argument("--rescore", action="store_true", help="score the answers of the pool again without asking")
    parser.add_argument("--print-config", action="store_true", help="print all settings and exit")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(run_main(main))
