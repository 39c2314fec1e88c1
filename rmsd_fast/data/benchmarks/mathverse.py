"""MathVerse (arXiv 2403.14624), testmini: every problem in five versions, with more and more of its text in the image.

Annotations: parquet of CaraJ/MathVerse-lmmseval, or the authors' `testmini.json`. The prompt is the field `query_wo`,
which asks for a direct answer.

The authors' file has a few multiple-choice problems whose answer is the text of an option, or two letters. A text is
replaced by its letter if the row shows the options. Other answers are scored as texts (`exact`).

The field lets a language model extract and score the answers. Here, rules do, so scores of free-form answers are lower,
unless `evaluate.judge` is set.
"""

from __future__ import annotations

import re

from rmsd_fast.data.benchmarks.record import Record
from rmsd_fast.data.records import Question

PATTERNS = ("**/testmini-*.parquet", "**/testmini*.parquet", "**/testmini.json")
COUNTS = (3940,)
IGNORED = {"query_cot"}
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
_KINDS = {"multi-choice": "mcq", "multi_choice": "mcq", "free-form": "exact", "free_form": "exact"}
_LETTER = re.compile(r"\s*\(?([A-H])\)?[.:]?\s*")
_LETTERS = re.compile(r"[A-H](?:\s+[A-H])+")
_OPTION = re.compile(r"^\(?([A-H])\)?[.:](.*)$", re.MULTILINE)


def read(record: Record) -> list[Question]:
    """Return the question of a row. In the version Vision Only, the image shows the question and its options."""
    question = record.get("question")
    version = record.text("problem_version")
    if version not in VERSIONS:
        raise record.fail("problem_version", f"one of {', '.join(VERSIONS)}", version, "leave other versions out")
    task = record.kind(_KINDS, "question_type")
    answer = record.plain_answer("answer")
    # The question in words, also where the image shows it; only a judge reads it.
    asked = record.get("question_for_eval")
    if task == "mcq":
        letter = _letter(answer, [text for text in (question, asked) if isinstance(text, str)])
        # In this version, only the image shows the options.
        shown = version != "Vision Only" or len(answer) == 1
        if letter is None and shown and not _LETTERS.fullmatch(answer):
            expected = "a letter from A to H, or an option that the question shows"
            raise record.fail("answer", expected, answer, "download the annotation again")
        task, answer = ("mcq", letter) if letter else ("exact", " and ".join(answer.split("\n")))
    groups = {}
    if isinstance(record.get("metadata"), dict):
        metadata = record.inner("metadata")
        groups = record.groups(subject=metadata.label("subject"), subfield=metadata.label("subfield"))
    # The versions of a problem are not independent, although their images differ.
    cluster = record.label("problem_index")
    if cluster is None:
        raise record.fail("problem_index", "a number or a text", record.need("problem_index"), "download it again")
    return [
        record.question(
            record.need("sample_index"),
            question if isinstance(question, str) and question.strip() else "Answer the question that the image shows.",
            task,
            images=(record.needed_image("image"),),
            answer=answer,
            prompt=record.text("query_wo"),
            meta={
                "cluster": cluster,
                **({"judged_question": asked.strip()} if isinstance(asked, str) and asked.strip() else {}),
                "groups": {"version": version, "question_type": record.text("question_type"), **groups},
            },
        )
    ]


def _letter(answer: str, texts: list[str]) -> str | None:
    """Return the letter of the answer, which is a letter or the text of an option in one of the texts, or None."""
    if letter := _LETTER.fullmatch(answer):
        return letter[1]
    same = {letter for text in texts for letter, option in _OPTION.findall(text) if option.strip() == answer}
    return same.pop() if len(same) == 1 else None
