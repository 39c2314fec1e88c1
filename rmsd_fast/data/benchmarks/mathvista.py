"""MathVista (arXiv 2310.02255), testmini: questions about one image, with options, numbers or lists as answers.

Annotations: parquet of AI4Math/MathVista, the authors' `testmini.json`, or VLMEvalKit's TSV. The prompt is the field
`query`, which contains a hint about the form of the answer and the options. The authors' JSON has no such field, so the
prompt is built from the others, as the authors build it.

The field lets a language model extract the answer. Here, rules extract it, and a language model only with
`evaluate.judge` and where rules cannot. `exact` compares it: a number after rounding to the field `precision`.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_uppercase

from rmsd_fast.data.benchmarks.record import Record
from rmsd_fast.data.records import Question

PATTERNS = ("**/testmini*.parquet", "**/testmini.json", "**/MathVista_MINI.tsv")
COUNTS = (1000,)
IGNORED = {
    "image",
    "index",
    "category",
    "task",
    "context",
    "grade",
    "skills",
    "language",
    "source",
    "split",
}
IGNORED |= {"answer_option", "img_height", "img_width", "key", "choices"}
_KINDS = {"multi_choice": "mcq", "multi-choice": "mcq", "free_form": "exact", "free-form": "exact"}
_LETTER_HINT = "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
_HINT = "Please answer the question requiring {} and provide the final {}, e.g., {}, at the end."
_HINTS = {
    "integer": _HINT.format("an integer answer", "value", "1, 2, 3"),
    "float 1": _HINT.format("a floating-point number with one decimal place", "value", "1.2, 1.3, 1.4"),
    "float 2": _HINT.format("a floating-point number with two decimal places", "value", "1.23, 1.34, 1.45"),
    "list": _HINT.format("a Python list as an answer", "list", "[1, 2, 3], [1.2, 1.3, 1.4]"),
}
_GROUPS = ("task", "category", "context", "grade", "skills")


def read(record: Record) -> list[Question]:
    """Return the question of a row."""
    question = record.text("question", "query")
    unit = record.get("unit")
    if unit and f"(Unit: {unit})" not in question:
        question = f"{question} (Unit: {unit})"
    task = record.kind(_KINDS, "question_type")
    options = record.choices("choices") if task == "mcq" else None
    metadata = record.inner("metadata") if isinstance(record.get("metadata"), dict) else record
    groups = record.groups(**{name: metadata.label(name) for name in _GROUPS})
    return [
        record.question(
            record.need("pid", "index", "key"),
            question,
            task,
            images=(record.needed_image("decoded_image", "image"),),
            options=options,
            answer=record.letter(options, "answer") if options else _answer(record),
            prompt=_query(record, question, options),
            meta={
                "groups": {
                    "question_type": record.text("question_type"),
                    **record.groups(answer_type=record.label("answer_type")),
                    **groups,
                }
            },
        )
    ]


def _query(record: Record, question: str, options: Sequence[str] | None) -> str:
    """Return the prompt: the field `query`, VLMEvalKit's question with its hint, or a prompt from the other fields."""
    if record.get("query") is not None:
        return record.text("query")
    if question.startswith("Hint:"):
        return question
    hint = _LETTER_HINT
    if options is None:
        kind, kinds = record.label("answer_type") or "", ("integer", "float", "list")
        todo = "add the field 'query', or download the annotation again"
        if kind not in kinds:
            raise record.fail("answer_type", f"a field 'query', or one of {', '.join(map(repr, kinds))}", kind, todo)
        if kind == "float":
            precision = record.number("precision")
            kind = f"float {precision:g}"
            if kind not in _HINTS:
                raise record.fail("precision", "a field 'query', or 1 or 2 decimals", precision, todo)
        hint = _HINTS[kind]
    shown = [f"({letter}) {option}" for letter, option in zip(ascii_uppercase, options or (), strict=False)]
    return "\n".join([f"Hint: {hint}", f"Question: {question}", *(["Choices:", *shown] if shown else [])]).strip()


def _answer(record: Record) -> str:
    """Return the answer; a number with decimals has as many of them as `precision` says, such as 1.20."""
    answer = record.plain_answer("answer")
    decimals = 0.0 if record.get("precision") is None else record.number("precision", least=0)
    if not decimals.is_integer() or decimals > 20:
        raise record.fail("precision", "a number of decimals", record.get("precision"), "download the annotation again")
    whole, point, digits = answer.partition(".")
    return f"{whole}.{digits:0<{int(decimals)}}" if point and digits.isdecimal() else answer
