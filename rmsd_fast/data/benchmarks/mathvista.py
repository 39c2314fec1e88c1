"""MathVista (arXiv 2310.02255), testmini: questions about one image, with options, numbers or lists as answers.

Annotations: parquet of AI4Math/MathVista, the authors' `testmini.json`, or VLMEvalKit's TSV. The prompt is the field
`query`, which contains a hint about the form of the answer.

The field lets a language model extract the answer. Here, rules extract it, and a language model only with
`evaluate.judge` and where rules cannot. `exact` compares it: a number after rounding to the field `precision`.
"""

from __future__ import annotations

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
_GROUPS = ("task", "category", "context", "grade", "skills")


def read(record: Record) -> list[Question]:
    """Return the question of a row."""
    query = record.text("query", "question")
    question = record.text("question", "query")
    unit = record.get("unit")
    task = record.kind(_KINDS, "question_type")
    options = record.choices("choices") if task == "mcq" else None
    metadata = record.inner("metadata") if isinstance(record.get("metadata"), dict) else record
    groups = record.groups(**{name: metadata.label(name) for name in _GROUPS})
    return [
        record.question(
            record.need("pid", "index", "key"),
            f"{question} (Unit: {unit})" if unit and f"(Unit: {unit})" not in question else question,
            task,
            images=(record.needed_image("decoded_image", "image"),),
            options=options,
            answer=record.letter(options, "answer") if options else _answer(record),
            prompt=query,
            meta={
                "groups": {
                    "question_type": record.text("question_type"),
                    **record.groups(answer_type=record.label("answer_type")),
                    **groups,
                }
            },
        )
    ]


def _answer(record: Record) -> str:
    """Return the answer; a number with decimals has as many of them as `precision` says, such as 1.20."""
    answer = record.plain_answer("answer")
    decimals = 0.0 if record.get("precision") is None else record.number("precision", least=0)
    if not decimals.is_integer() or decimals > 20:
        raise record.fail("precision", "a number of decimals", record.get("precision"), "download the annotation again")
    whole, point, digits = answer.partition(".")
    return f"{whole}.{digits:0<{int(decimals)}}" if point and digits.isdecimal() else answer
