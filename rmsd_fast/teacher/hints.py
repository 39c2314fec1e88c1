"""Collect the hints of the training questions for the self-teacher, from the question file and the pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import bare_options
from rmsd_fast.method.hints import MEDIA_VIEW, Hint, make_hints
from rmsd_fast.method.matching import best_response
from rmsd_fast.teacher.targets import Targets


def build_hints(
    questions: Sequence[Question],
    targets: Mapping[str, Targets],
    views: Sequence[str],
    refuse: Callable[[str], bool],
    absent: Callable[[Question], bool],
    *,
    together: bool,
    seed: int,
) -> dict[str, tuple[Hint, ...]]:
    """Return what the self-teacher is told about each question; () for a question without hints.

    Args:
        questions: the training questions.
        targets: the pool's answers to them, by question id.
        views: names of the hints, see `method.hints`.
        refuse: function that returns whether the self-teacher cannot read a text, which is then left out.
        absent: function that returns whether media of `hints.media` are missing, which are then left out.
        together: whether one teacher reads all views.
        seed: seed of the run, which chooses among equally good answers of the pool.
    """
    hints = {}
    for question in questions:
        facts = _facts(question, targets[question.id], seed)
        if MEDIA_VIEW in views and MEDIA_VIEW in facts and absent(question):
            del facts[MEDIA_VIEW]
        hints[question.id] = tuple(make_hints(views, facts, together=together, refuse=refuse))
    return hints


def _facts(question: Question, targets: Targets, seed: int) -> dict[str, Any]:
    best = best_response(targets.quality, (targets.p > 0).tolist(), seed=seed, question_id=question.id)
    answered = {} if question.answer is None else {"answer": stated_answer(question)}
    chosen = {} if best is None else {"best_answer": targets.answers[best].text.strip()}
    return {**answered, **chosen, **question.hints}


def stated_answer(question: Question) -> str:
    """Return the ground truth; for mcq questions with options, the letter and the text of the option."""
    if question.task_type != "mcq" or not question.options:
        return question.answer
    return f"{question.answer}. {bare_options(question.options)[ord(question.answer.upper()) - ord('A')]}"
