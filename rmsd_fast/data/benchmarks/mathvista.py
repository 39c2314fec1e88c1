"""MathVista (arXiv 2310.02255), testmini: questions about one image, with options, numbers or lists as answers.

Annotations: parquet of AI4Math/MathVista, the authors' `testmini.json`, or VLMEvalKit's TSV. The prompt is the field
`query`, which contains a hint about the form of the answer.

The field lets a language model extract the answer. Here, rules extract it, and `exact` compares it: a number after
rounding to the decimals of the reference.
"""

from __future__ import annotations

from rmsd_fast.data.benchmarks.record import Record
from rmsd_fast.data.records import Question

PATTERNS = ("**/testmini*.parquet", "**/testmini.json", "**/MathVista_MINI.tsv")
COUNTS = (1000,)
IGNORED = {
    "image",
    "precision",
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
IGNORED |= {"answer_option", "img_height", "img_width", "key"}


def read(record: Record) -> list[Question]:
    """Return the question of a row."""
    query = record.text("query", "question")
    question = record.text("question", "query")
    unit = record.get("unit")
    options = record.options("choices")
    is_choice = record.text("question_type") == "multi_choice"
    metadata = record.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else record.row
    image = record.image("decoded_image") or record.image("image")
    groups = {name: str(metadata[name]) for name in ("task", "category", "context", "grade") if metadata.get(name)}
    skills = metadata.get("skills")
    return [
        record.question(
            record.need("pid", "index", "key"),
            f"{question} (Unit: {unit})" if unit and f"(Unit: {unit})" not in question else question,
            "mcq" if is_choice else "exact",
            images=(image,) if image else (),
            options=options if is_choice else None,
            answer=record.letter(options, "answer") if is_choice else record.plain_answer("answer"),
            prompt=query,
            meta={
                "groups": {
                    "question_type": record.text("question_type"),
                    **record.groups(answer_type=record.label("answer_type")),
                    **groups,
                    **({"skills": ", ".join(skills)} if isinstance(skills, list) else {}),
                }
            },
        )
    ]
