"""Remove the ground truths of some generated training questions, after the simulated teacher has answered them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rmsd_fast.data.records import Question, write_questions
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.matching import uniform


def keep_labels(questions: Sequence[Question], *, share: float, seed: int) -> list[Question]:
    """Return the questions, with ground truths for a share of each closed task only; open questions are unchanged.

    A hash of seed and id ranks the questions. A larger share therefore keeps all ground truths that a smaller one
    keeps.
    """
    removed: set[str] = set()
    for task in CLOSED_TASKS:
        ids = [question.id for question in questions if question.task_type == task]
        ids.sort(key=lambda identity: uniform("label", seed, 0, identity, index=0))
        removed.update(ids[round(share * len(ids)) :])
    return [replace(question, answer=None) if question.id in removed else question for question in questions]


def write_label_share(train: Path, questions: Sequence[Question], *, share: float, seed: int, media_root: Path) -> Path:
    """Write the questions with a share of their ground truths next to `train`, unless present; return the path."""
    path = train.with_name(f"{train.stem}-labels-{share!r}.jsonl")
    if not path.exists():
        write_questions(path, keep_labels(questions, share=share, seed=seed), media_root=media_root)
    return path
