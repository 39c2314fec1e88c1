"""Compare agreement with the metric for simulated teachers, on questions about generated clips.

    python -m bench.teacher.agreement [--clips 300] [--json FILE]

Nothing here is measured on a real teacher: the answers are simulated, with the errors of `rmsd_fast.made.errors`.
For a pool of your own, see `python -m rmsd_fast.report POOL QUESTIONS`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.core.report import table
from rmsd_fast.config import TEACHERS, TeacherConfig
from rmsd_fast.data.records import Question, load_questions
from rmsd_fast.made.clips import make_clips
from rmsd_fast.made.teacher import SimulatedTeacher, simulate_teacher
from rmsd_fast.teacher.agreement_check import agreement_check
from rmsd_fast.teacher.scores import score_pool

TASKS = ("mcq", "temporal", "spatial", "numeric")
COUNTS = (4, 8)
HEAD = ("teacher", "task", "quality", "correlation", "top is best", "by chance", "recovered", "precision", "recall")


def made_questions(folder: Path, clips: int) -> list[Question]:
    """Generate clips with one question of each of TASKS per clip, and return the questions."""
    material = make_clips(folder, train_clips=clips, heldout_clips=1, questions_per_clip=4, seed=0, tasks=TASKS)
    return load_questions(material.train)


def compare(questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """Return the result of agreement_check for each simulated teacher and each K of COUNTS."""
    results: dict[str, dict[str, Any]] = {}
    for kind in TEACHERS:
        pool: dict[str, list] = {question.id: [] for question in questions}
        for response in simulate_teacher(questions, k=max(COUNTS), seed=0, teacher=SimulatedTeacher(kind)):
            pool[response.id].append(response)
        cfg = TeacherConfig(responses=max(COUNTS))
        scores = score_pool(pool, questions, cfg)
        results[kind] = {str(k): agreement_check(questions, scores, replace(cfg, responses=k)) for k in COUNTS}
    return results


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of the manual: one row per teacher and task, with the values of all K."""
    rows = []
    for kind, by_count in results.items():
        for task in TASKS:
            groups = [check["tasks"][task] for check in by_count.values()]
            rows.append(
                (
                    f"`{kind}`",
                    f"`{task}`",
                    _values([group["random_quality"]["mean"] for group in groups]),
                    _values([_value(group["within"]) for group in groups]),
                    *(
                        _values([group[name] and group[name]["mean"] for group in groups])
                        for name in ("top_best", "random_best")
                    ),
                    *(
                        _values([_value(group[name]) for group in groups])
                        for name in ("recovered", "precision", "recall")
                    ),
                )
            )
    return table(HEAD, rows)


def _value(measured: Mapping[str, Any] | None) -> float | None:
    return measured and measured["value"]


def _values(values: Sequence[float | None]) -> str:
    return " / ".join("–" if value is None else f"{value:.2f}".replace("-", "−") for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=300, help="clips, each with a question of each task type")
    parser.add_argument("--json", type=Path, help="also write all numbers, with 95%% intervals over questions")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = compare(made_questions(Path(folder), arguments.clips))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
