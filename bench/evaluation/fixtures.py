"""Evaluate a student on invented records in the formats of all eight benchmarks, and write the printed tables.

python -m bench.evaluation.fixtures [--model runs/x/export --about TEXT] [--prompt rmsd] [--clips 4]

The records (fixture_records.py) ask about generated clips. Without --model, the student has the random weights with
which the quickstart starts. The page is bench/results/fixtures.md.
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
    asked = (
        f"{about} answers a few invented questions in the format of each benchmark. They are about generated clips of "
        f"8 seconds, or about a frame of them, and are asked with `evaluate.prompt={prompt}`. The tables are those "
        "that `python -m rmsd_fast.evaluate` prints. So few questions say nothing about a student."
    )
    lines = ["# Tables of invented records", "", "Written by `python -m bench.evaluation.fixtures`.", ""]
    lines += [*textwrap.wrap(asked, 120), ""]
    for benchmark, result in results.items():
        lines += [f"## {benchmark}", "", "```", format_table(result), "```", ""]
    lines.append(f"{sources([facts])}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="", help="the student, in place of an untrained one")
    parser.add_argument("--about", default=UNTRAINED, help="what the page says about the student")
    parser.add_argument("--prompt", choices=("benchmark", "rmsd"), default="benchmark")
    parser.add_argument("--clips", type=int, default=4, help="number of clips (default: 4)")
    parser.add_argument("--out", type=Path, default=RESULTS / "fixtures.md")
    arguments = parser.parse_args()
    world = start()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        clips = write_clips(folder, arguments.clips)
        model = arguments.model or str(folder / "student")
        if not arguments.model:
            build_tiny_student(folder / "student", texts=["Which colour is the shape?", "When is the light on?"])
        results = evaluate_all(folder, clips, model, arguments.prompt, world)
    stop()
    write_text_atomic(arguments.out, page(results, arguments.about, arguments.prompt))


if __name__ == "__main__":
    main()
