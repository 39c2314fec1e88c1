"""Evaluate a model on held-out questions: accuracy by task type with 95% intervals, as a table and as JSON.

torchrun --nproc-per-node 1 -m rmsd_fast.evaluate quickstart model.path=runs/x/export --output evaluation.json
python -m rmsd_fast.evaluate quickstart model.path=runs/x/export --dry-run
python -m rmsd_fast.evaluate --compare base.json evaluation.json
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main, tell

if TYPE_CHECKING:
    from rmsd_fast.collect_run.config import CollectConfig, Teacher
    from rmsd_fast.config import RunConfig
    from rmsd_fast.runtime.process_group import World
    from rmsd_fast.runtime.stop_signal import StopSignal
    from rmsd_fast.stages.answer_store import AnswerStore
    from rmsd_fast.stages.material import Material


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and evaluate. Heavy imports are delayed so that `--help` is fast."""
    parser = Parser(prog="rmsd_fast.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipe", nargs="?", help="recipe with data.heldout and other settings; rmsd_fast.train --help lists them"
    )
    parser.add_argument("overrides", nargs="*", help="section.field=value, e.g. model.path=runs/x/export")
    parser.add_argument("--output", type=Path, help="JSON file to write; predictions are written next to it")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check questions, media, prompt lengths and memory, and time one batch, without an evaluation; exit with "
        "code 2 if not ready",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="EVALUATION",
        help="compare evaluations instead, the others with the first: JSON files of this program, or run folders, with "
        ":student for another student than the last one",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.output is not None and arguments.output.suffix != ".json":
        # Predictions are written to <stem>.predictions.jsonl, which would be the same file for a.stage1 and a.stage2.
        parser.error(f"--output: expected a file that ends with .json, got {arguments.output}; add .json to its name")
    if arguments.output is not None and (fault := _why_not_writable(arguments.output)):
        parser.error(f"--output: expected a file that can be written, got {arguments.output}, {fault}")
    if arguments.compare:
        if arguments.recipe or arguments.dry_run or len(arguments.compare) < 2:
            parser.error("--compare: expected two or more evaluations, no recipe and no --dry-run")
        return _compare(arguments.compare, arguments.output)
    if not arguments.recipe:
        parser.error("expected a recipe and --output or --dry-run, or --compare with two or more evaluations")
    if arguments.dry_run and arguments.output:
        parser.error(f"--output: expected none with --dry-run, which writes no evaluation, got {arguments.output}")
    if not arguments.dry_run and not arguments.output:
        parser.error("--output is missing: expected a JSON file to write")
    if reason := environment.why_not():
        tell(f"rmsd_fast.evaluate: {reason}")
        return 2
    from rmsd_fast.config import UserError
    from rmsd_fast.settings import load_settings

    try:
        settings = load_settings(arguments.recipe, arguments.overrides, trains=False)
    except UserError as error:
        tell(f"rmsd_fast.evaluate: {error}")
        return 2
    from rmsd_fast.program import run_program

    ready = True

    def work(world: World, stop: StopSignal) -> None:
        nonlocal ready
        if arguments.dry_run:
            ready = rehearse(settings, world)
        else:
            evaluate(settings, world, stop, arguments.output)

    code = run_program("rmsd_fast.evaluate", settings, work, trains=False)
    return code or (0 if ready else 2)


def rehearse(settings: RunConfig, world: World) -> bool:
    """Check an evaluation, answer one batch per process to time it, and print the findings.

    Nothing is written except generated material and, with `data.disk_cache`, decoded frames.

    Returns:
        Whether the evaluation is ready to start: at most `data.max_bad_share` of the questions cannot be used.
    """
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.stages.evaluation import time_questions
    from rmsd_fast.stages.evaluation_forecast import describe_evaluation
    from rmsd_fast.stages.evaluation_vllm import load_answering
    from rmsd_fast.stages.material import prepare_material
    from rmsd_fast.stages.reranker import load_reranker

    if settings.evaluate.judge.endpoint:
        _judge_client(settings, world)
    material = prepare_material(settings, world, training=False, allow_missing=True)
    questions = material.heldout
    with MediaReader(settings.data, world.device) as media:
        lines, lengths = describe_evaluation(material.model_path, questions, settings, world, media)
        if world.is_main:
            print("\n".join(lines), flush=True)
        usable = [question for question in questions if question.id not in lengths.faults]
        ready = len(lengths.faults) <= settings.data.max_bad_share * len(questions) and bool(usable)
        if usable:
            student, engine = load_answering(material.model_path, settings, world)
            reranker = load_reranker(student, settings, world) if settings.evaluate.reranker else None
            line = time_questions(student, usable, settings, world, media, engine=engine, reranker=reranker)
            if world.is_main:
                print(line)
    if world.is_main:
        unusable = f"{len(lengths.faults):,} of {len(questions):,} questions cannot be used"
        limit = f"data.max_bad_share={settings.data.max_bad_share:g}"
        print("ready" if ready else f"not ready: {unusable}, which is more than {limit} of them")
    return ready


def evaluate(settings: RunConfig, world: World, stop: StopSignal, output: Path) -> None:
    """Evaluate `model.path` and write `output`. The answers are written next to it, as `<stem>.predictions.jsonl`.

    With `evaluate.reranker`, its discriminator ranks the sampled answers. With `evaluate.judge`, a language model
    scores answers that rules cannot, and its replies are kept in `<stem>.judge.jsonl`. If an evaluation of the same
    model, settings and questions was interrupted, continue it.
    """
    from rmsd_fast.files import write_text_atomic
    from rmsd_fast.models.folders import open_folder, resolve_folder
    from rmsd_fast.runtime.process_group import on_main
    from rmsd_fast.stages.answer_store import AnswerStore, delete_parts, finished_answers
    from rmsd_fast.stages.evaluation_files import evaluation_of, score_again, write_records
    from rmsd_fast.stages.evaluation_table import format_table
    from rmsd_fast.stages.material import prepare_material
    from rmsd_fast.stages.protocol import evaluation_identity, identity_hash, model_identity

    material = prepare_material(settings, world, training=False)
    questions = material.heldout
    model = on_main(world, lambda: model_identity(material.model_path))
    identity = evaluation_identity(settings, questions, model)
    ranked = settings.evaluate.reranker
    if ranked:
        on_main(world, lambda: bool(open_folder(resolve_folder(ranked), discriminator=True)))
        identity["reranker"] = on_main(world, lambda: model_identity(ranked))
    judge = settings.evaluate.judge
    client = _judge_client(settings, world) if judge.endpoint else None
    path, replies = output.with_suffix(".predictions.jsonl"), output.with_suffix(".judge.jsonl")
    stop.output = path
    # Only a judge has something to add to a finished evaluation.
    records = on_main(world, lambda: finished_answers(output, path, identity, questions)) if judge.endpoint else None
    if records is None:
        with AnswerStore(path, identity, world) as store:
            if judge.endpoint and all(question.id in store.done for question in questions):
                records = [store.done[question.id] for question in questions]
            else:
                records = _answer(settings, world, stop, material, store)
    if judge.endpoint:
        from rmsd_fast.evaluate_judge import judge_answers

        # Answers that were read from a file were scored before, possibly with other rules or with a judge.
        records = score_again(records, questions, settings)
        records = judge_answers(records, questions, judge, replies, world, stop, client=client)

    def write() -> None:
        result = {"model": material.model_path, **evaluation_of({"model": records}, questions, settings)}
        result["protocol"]["model"] |= model
        result["answers_of"] = identity_hash(identity)
        if ranked:
            result["protocol"]["reranker"] = identity["reranker"]
        write_records(path, records)
        write_text_atomic(output, json.dumps(result, indent=2) + "\n")
        print(format_table(result))
        print(f"evaluation: {output}\npredictions: {path}" + (f"\njudge: {replies}" if judge.endpoint else ""))

    on_main(world, write)
    delete_parts(path, world)


def _answer(settings: RunConfig, world: World, stop: StopSignal, material: Material, store: AnswerStore) -> list[dict]:
    """Load the student, and return its answers to all questions."""
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.stages.evaluation import answer_questions
    from rmsd_fast.stages.evaluation_forecast import READ_FIRST, describe_evaluation
    from rmsd_fast.stages.evaluation_vllm import load_answering
    from rmsd_fast.stages.reranker import load_reranker

    model, questions = material.model_path, material.heldout
    with MediaReader(settings.data, world.device) as media:
        lines, _ = describe_evaluation(model, questions, settings, world, media, most=READ_FIRST)
        if world.is_main:
            tell("\n".join(lines))
        student, engine = load_answering(model, settings, world)
        return answer_questions(
            student,
            questions,
            settings,
            world,
            media,
            name=model,
            stop=stop,
            store=store,
            engine=engine,
            reranker=load_reranker(student, settings, world) if settings.evaluate.reranker else None,
            forecast=True,
        )


def _judge_client(settings: RunConfig, world: World) -> tuple[CollectConfig, Teacher] | None:
    """Return the settings of the judge's client on the main process, and None on the others.

    Raises:
        UserError: before the questions are answered, if the judge's settings cannot be used.
    """
    from rmsd_fast.config import NotInstalled
    from rmsd_fast.runtime.process_group import on_main

    made: list[tuple[CollectConfig, Teacher]] = []

    def make() -> None:
        if reason := environment.why_not(("httpx2",), extras="collect"):
            raise NotInstalled(f"evaluate.judge: {reason}")
        from rmsd_fast.evaluate_judge import client_settings

        made.append(client_settings(settings.evaluate.judge))

    # The settings contain a key, so they are not sent to other processes.
    on_main(world, make)
    return made[0] if made else None


def _why_not_writable(output: Path) -> str:
    """Return why a file cannot be written, or "" if it can. Missing folders of its path will be created."""
    if output.is_dir():
        return "which is a folder; name a file in it"
    folder = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not folder.is_dir():
        return f"but {folder} is not a folder; check the path"
    return "" if os.access(folder, os.W_OK | os.X_OK) else f"but {folder} is read-only; check its permissions"


def _compare(names: list[str], output: Path | None) -> int:
    from rmsd_fast.config import UserError
    from rmsd_fast.files import write_text_atomic
    from rmsd_fast.stages.evaluation_compare import compare_evaluations, format_comparison, read_evaluation

    try:
        result = compare_evaluations([read_evaluation(name) for name in names])
    except UserError as error:
        tell(f"rmsd_fast.evaluate: {error}")
        return 2
    if output is not None:
        write_text_atomic(output, json.dumps(result, indent=2) + "\n")
    print(format_comparison(result))
    return 0


if __name__ == "__main__":
    code = run_main(main)
    from rmsd_fast.runtime.process_group import exit_process

    exit_process(code)
