"""The text of a prompt, which should also be used for the teacher. This module has no heavy imports."""

from __future__ import annotations

from collections.abc import Sequence

from rmsd_fast.data.marks import MARK
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
_BENCHMARK_FORMAT = {
    "exact": _REPLY.format(answer="answer"),
    "boxes": _REPLY.format(answer='{"second": [x1,y1,x2,y2], …}') + ", from 0 to 1000",
}


def question_text(question: Question) -> str:
    """Return the user's turn: question, one line per option (`A. text`), answer format. Media marks stay in it."""
    options = bare_options(question.options) if question.options else []
    lines = [f"{chr(ord('A') + index)}. {option}" for index, option in enumerate(options)]
    reply = (ANSWER_FORMAT | _BENCHMARK_FORMAT)[question.task_type]
    return "\n".join([question.question.strip(), *lines, reply])


def content_parts(text: str, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Return the content parts of the user's turn: media at their marks, or before the text if there are no marks.

    Args:
        text: result of question_text.
        kinds: "video" or "image" for each medium, in the order of `question.media`.
    """
    if not MARK.search(text):
        return [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
    # MARK.split yields text, kind, text, …
    pieces = enumerate(MARK.split(text))
    parts = [{"type": piece} if place % 2 else {"type": "text", "text": piece} for place, piece in pieces]
    return [part for part in parts if part.get("text") != ""]
