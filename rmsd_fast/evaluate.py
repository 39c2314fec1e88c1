"""Evaluate a model on held-out questions: accuracy by task type with 95% intervals, as a table and as JSON.

torchrun --nproc-per-node 1 -m rmsd_fast.evaluate quickstart model.path=runs/x/export --output evaluation.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main, tell

if TYPE_CHECKING:
    from rmsd_fast.config import RunConfig
    from rmsd_fast.runtime.process_group import World
    from rmsd_fast.runtime.stop_signal import StopSignal


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and evaluate. Heavy imports are delayed so that `--help` is fast."""
    parser = Parser(prog="rmsd_fast.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="recipe with data.heldout and other settings; rmsd_fast.train --help lists them")
    parser.add_argument("overrides", nargs="*", help="section.field=value, e.g. model.path=runs/x/export")
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file to write; predictions are written next to it"
    )
    arguments = parser.parse_intermixed_args(argv)
    if reason := environment.why_not():
        tell(f"rmsd_fast.evaluate: {reason}")
        return 2
    from rmsd_fast.config import UserError
    from rmsd_fast.settings import load_settings

    try:
        settings = load_settings(arguments.recipe, arguments.overrides)
    except UserError as error:
        tell(f"rmsd_fast.evaluate: {error}")
        return 2
    from rmsd_fast.program import run_program

    return run_program(
        "rmsd_fast.evaluate",
        settings,
        lambda world, stop: evaluate(settings, world, stop, arguments.output),
        trains=False,
    )


def evaluate(settings: RunConfig, world: World, stop: StopSignal, output: Path) -> None:
    """Evaluate `model.path` and write `output`. The answers are written next to it, as `<stem>.predictions.jsonl`."""
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.files import write_text_atomic
    from rmsd_fast.stages.build import load
    from rmsd_fast.stages.evaluation import answer_questions, floors_of, format_table
    from rmsd_fast.stages.material import prepare_material
    from rmsd_fast.stages.summaries import summarize

    material = prepare_material(settings, world, training=False)
    student = load(material.model_path, settings, world)
    with MediaReader(settings.data, world.device) as media:
        records = answer_questions(
            student, material.heldout, settings, world, media, name=material.model_path, stop=stop
        )
    if not world.is_main:
        return
    result = {
        "questions": len(records),
        "model": material.model_path,
        "parse": settings.evaluate.parse,
        "floors": floors_of(material.heldout, settings),
        "unusable": {"model": sum("error" in record for record in records)},
        "students": {"model": summarize(records)},
        "differences": {},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_text_atomic(output.with_suffix(".predictions.jsonl"), lines)
    write_text_atomic(output, json.dumps(result, indent=2) + "\n")
    print(format_table(result))


if __name__ == "__main__":
    code = run_main(main)
    from rmsd_fast.runtime.process_group import exit_process

    exit_process(code)
