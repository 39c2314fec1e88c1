"""The text of a prompt, which should also be used for the teacher. This module has no heavy imports."""

from __future__ import annotations

from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import bare_options

_REPLY = "Reply as <think>reasoning</think><answer>{answer}</answer>"
# The last line of each prompt. It is short because every rollout of every question contains it.
ANSWER_FORMAT = {
    "mcq": _REPLY.format(answer="option letter"),
    "temporal": _REPLY.format(answer="start to end") + ", in seconds",
    "spatial": _REPLY.format(answer="x1,y1,x2,y2") + ", from 0 to 1000",
    "numeric": _REPLY.format(answer="number"),
    "ocr": _REPLY.format(answer="text read"),
    "open": _REPLY.format(answer="text"),
}


def question_text(question: Question) -> str:
    """Return the user's turn: question, one line per option (`A. text`), answer format. Media marks stay in it."""
    options = bare_options(question.options) if question.options else []
    lines = [f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options)]
    return "\n".join([question.question.strip(), *lines, ANSWER_FORMAT[question.task_type]])
