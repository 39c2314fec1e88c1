"""Evaluate a student on invented records in the formats of all eight benchmarks, and write the printed tables.

python -m bench.evaluation.fixtures [--model runs/x/export --about TEXT] [--prompt rmsd]

The records (fixture_records.py) ask about generated clips. Without --model, a tiny student with random weights answers.
The page is bench/results/fixtures.md.
"""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from pathlib import Path

from bench.core.records import RESULTS, sources, surroundings
from bench.evaluation.fixture_records import Clip, write_annotation, write_clips
from rmsd_fast.config import BENCHMARKS, RunConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.files import write_text_atomic
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.runtime.process_group import World, start, stop
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.build import load
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_files import evaluation_of
from rmsd_fast.stages.evaluation_table import format_table
from rmsd_fast.stages.material import prepare_material

UNTRAINED = "A student with random weights"
PROMPT = "benchmark"


def fixture_settings(benchmark: str, folder: Path, model: str, prompt: str, *overrides: str) -> RunConfig:
    return load_settings(
        "quickstart",
        [
            "made.enabled=false",
            f"model.path={model}",
            f"evaluate.benchmark={benchmark}",
            f"evaluate.prompt={prompt}",
            "evaluate.parse=lenient",
            "evaluate.rollouts=0",
            "evaluate.max_new_tokens=72",
            f"data.heldout={folder / benchmark}",
            f"data.media_root={folder}",
            "data.max_prompt_tokens=4096",
            *overrides,
        ],
        trains=False,
    )


def evaluate_all(folder: Path, clips: list[Clip], model: str, prompt: str, world: World, *overrides: str) -> dict:
    """Answer the questions of all benchmarks as `rmsd_fast.evaluate` does, and return the results by benchmark."""
    every = {name: fixture_settings(name, folder, model, prompt, *overrides) for name in BENCHMARKS}
    student = load(model, every[BENCHMARKS[0]], world)
    results = {}
    with MediaReader(every[BENCHMARKS[0]].data, world.device) as media:
        for benchmark, settings in every.items():
            write_annotation(benchmark, folder, clips)
            questions = prepare_material(settings, world, training=False).heldout
            records = answer_questions(student, questions, settings, world, media, name=benchmark)
            results[benchmark] = evaluation_of({"student": records}, questions, settings)
    return results


def page(results: dict[str, dict], about: str, prompt: str) -> str:
    facts = surroundings()
    options = " --model FOLDER --about TEXT" * (about != UNTRAINED) + f" --prompt {prompt}" * (prompt != PROMPT)
    asked = (
        f"{about} answers a few invented questions in the format of each benchmark. They are about generated clips of "
        f"8 seconds, or about a frame of them, and are asked with `evaluate.prompt={prompt}`. The tables are those "
        "that `python -m rmsd_fast.evaluate` prints. So few questions say nothing about a student."
    )
    lines = ["# Tables of invented records", "", f"Written by `python -m bench.evaluation.fixtures{options}`.", ""]
    lines += [*textwrap.wrap(asked, 120), ""]
    for benchmark, result in results.items():
        lines += [f"## {benchmark}", "", "```", format_table(result), "```", ""]
    lines.append(f"{sources([facts])}.")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="the student, in place of an untrained one")
    parser.add_argument("--about", default="", help="what the page says about this student")
    parser.add_argument("--prompt", choices=("benchmark", "rmsd"), default=PROMPT)
    parser.add_argument("--out", type=Path, default=RESULTS / "fixtures.md")
    arguments = parser.parse_args(argv)
    if bool(arguments.model) != bool(arguments.about):
        given = "--model" if arguments.model else "--about"
        parser.error(f"--model and --about: expected both or neither, got only {given}; the page describes its student")
    world = start()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        clips = write_clips(folder)
        model = arguments.model or str(folder / "student")
        if not arguments.model:
            build_tiny_student(folder / "student", texts=["Which colour is the shape?", "When is the light on?"])
        results = evaluate_all(folder, clips, model, arguments.prompt, world)
    stop()
    write_text_atomic(arguments.out, page(results, arguments.about or UNTRAINED, arguments.prompt))


if __name__ == "__main__":
    main()
