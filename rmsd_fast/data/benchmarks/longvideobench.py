"""LongVideoBench (arXiv 2407.15754), validation: two to five options about videos of up to an hour.

Annotations: `lvb_val.json`, parquet of the split `validation`, VLMEvalKit's TSV, or EasyVideoR1's
`longvideobench.json`.
Source of the prompt: lmms-eval 0.7.3, tasks/longvideobench. Its prompt with subtitles shows them between frames, as its
authors do. Here a video is one medium, and its subtitles follow it.
"""

from __future__ import annotations

from typing import Any

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question
from rmsd_fast.data.subtitles import MARK, NO_SUBTITLES

PATTERNS = ("lvb_val.json", "**/validation*.parquet", "**/LongVideoBench.tsv", "**/longvideobench*.json*")
COUNTS = (1337,)
IGNORED = {"video_id", "index", "video", "subtitle_path", "starting_timestamp_for_subtitles", "view_count", "level"}
IGNORED |= {"data_source", "process", "data_type", "original_question_type", "problem_type", "duration"}


def read(record: Record) -> list[Question]:
    """Return the question of a row."""
    question = record.text("question", "problem")
    options = record.options("candidates", "options") or _numbered(record)
    path = record.text("video_path", "path")
    subtitles = _subtitles(record)
    prompt = "\n".join(
        [question, *lettered(options), "Answer with the option's letter from the given choices directly.\n"]
    )
    if subtitles:
        shown = MARK if "subtitles" in subtitles else NO_SUBTITLES
        prompt = f"This video's subtitles are listed below:\n{shown}\n{prompt}"
    return [
        record.question(
            record.need("id", "problem_id"),
            question,
            "mcq",
            videos=(record.medium("video_path", [path], [f"videos/{path}"]),),
            options=options,
            answer=_answer(record, options),
            prompt=prompt,
            meta={
                **subtitles,
                "groups": record.groups(
                    duration_group=record.label("duration_group"),
                    question_category=record.label("question_category"),
                    topic_category=record.label("topic_category"),
                ),
            },
        )
    ]


def _subtitles(record: Record) -> dict[str, Any]:
    """Return the items of `Question.meta` about subtitles. Short cues are widened to a second, as the authors do."""
    if not record.media.with_subtitles:
        return {}
    name = record.text("subtitle_path")
    begin_s = record.number("starting_timestamp_for_subtitles")
    return record.subtitles([f"subtitles/{name}", name], shift_s=begin_s, least_s=1.0)


def _numbered(record: Record) -> tuple[str, ...]:
    """Return the options of the fields option0, option1, …; "N/A" and missing fields end the list."""
    options = []
    for number in range(10):
        option = record.get(f"option{number}")
        if option is None or option == "N/A":
            continue
        if len(options) < number:
            raise record.fail(
                f"option{number}", "no option after a missing one", option, "download the annotation again"
            )
        options.append(str(option))
    if not options:
        record.need("candidates", "options", "option0")
    return tuple(options)


def _answer(record: Record, options: tuple[str, ...]) -> str:
    """Return the letter of `correct_choice`, an index from 0 that tables store as text, or of `solution`."""
    choice = record.get("correct_choice")
    if choice is None:
        return record.letter(options, "answer", "solution")
    index = record.number("correct_choice")
    if not index.is_integer():
        raise record.fail("correct_choice", "a whole number", choice, "download the annotation again")
    record.row["correct_choice"] = int(index)
    return record.letter(options, "correct_choice")
