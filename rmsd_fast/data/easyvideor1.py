"""Handle peculiarities of EasyVideoR1's evaluation records, which have Video-R1's format.

They keep fields of the original benchmark, name groups of breakdowns, and mark images but not videos.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from rmsd_fast.data.marks import mark_kinds
from rmsd_fast.data.option_lists import MOST_OPTIONS
from rmsd_fast.method.answers import TASK_TYPES, bare_options, option_letters
from rmsd_fast.method.folding import fold_text

# Keys of evaluation records whose values are groups of a breakdown.
GROUP_KEYS = (
    "duration_group",
    "domain",
    "sub_category",
    "original_task_type",
    "original_question_type",
    "question_category",
    "category",
    "difficulty",
    "length",
    "ovo_task",
    "ovo_category",
    "q_type_livesports",
)
_TAGGED = re.compile(r"\s*<answer>\s*([A-Z])\s*</answer>\s*")


def without_copies(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record without values that EasyVideoR1's evaluation files keep from the original next to their own.

    These are a `question` equal to `problem`, the text of the option that `solution` names, and a `video` of the same
    name as `path` in another container. A `task_type` of the original, and a duration in words, are renamed.
    """
    record = dict(record)
    right = tagged_letter(record.get("solution"), record.get("options"))
    if right and isinstance(record.get("answer"), str) and fold_text(right[3:]) == fold_text(record["answer"]):
        del record["answer"]
    if all(isinstance(record.get(key), str) for key in ("video", "path")) and _stem(record["video"]) == _stem(
        record["path"]
    ):
        del record["video"]
    texts = record.get("question"), record.get("problem")
    if all(isinstance(text, str) for text in texts) and texts[0].split() == texts[1].split():
        del record["question"]
    if record.get("problem_type") is not None and record.get("task_type") not in (None, *TASK_TYPES):
        record["original_task_type"] = record.pop("task_type")
    if isinstance(record.get("duration"), str) and not any(map(str.isdigit, record["duration"])):
        record["duration_group"] = record.pop("duration")
    return record


def _stem(path: str) -> str:
    return PurePath(path).stem


def groups_of(record: dict[str, Any], used: set[str]) -> dict[str, str]:
    """Return the breakdown groups of an evaluation record: short texts under the names that benchmarks use."""
    values = {name: record[name] for name in GROUP_KEYS if name not in used and record.get(name) not in (None, "", [])}
    return {name: str(value) for name, value in values.items() if isinstance(value, str | int | float)}


def with_video_marks(problem: str, videos: int, images: int) -> str:
    """Return the text with marks for its videos in front if it has a mark only for each image."""
    if videos and images and mark_kinds(problem) == ["image"] * images:
        return "<video>" * videos + problem
    return problem


def tagged_letter(answer: Any, options: Any) -> str | None:
    """Return `<answer>C</answer>` as "C. text of option C", since its letter cannot be the text of another option."""
    tagged = _TAGGED.fullmatch(answer) if isinstance(answer, str) else None
    if not tagged or not isinstance(options, list) or not 1 <= len(options) <= MOST_OPTIONS:
        return None
    letter, all_texts = tagged[1], all(isinstance(option, str) for option in options)
    if not all_texts or letter not in (letters := option_letters(options)):
        return None
    return f"{letter}. {bare_options(options)[letters.index(letter)]}"
