"""WorldSense (arXiv 2502.04326): three or four options about videos with sound, which the students do not hear.

Annotations: parquet of lmms-lab/worldsense, `WorldSense.tsv` of VLMEvalKit, or the authors' `worldsense_qa.json`.
Source of the prompts, whose first sentences come before the video: VLMEvalKit e8e78f0, without sound.
"""

from __future__ import annotations

import re

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question
from rmsd_fast.data.subtitles import MARK

PATTERNS = ("**/test*.parquet", "**/WorldSense.tsv", "**/worldsense_qa.json", "**/worldsense*.json*")
COUNTS = (3172,)
IGNORED = {"index", "subtitle_path", "audio_path", "video_caption", "video_duration"}
_TASK = re.compile(r"task[0-9]+")
_PROMPT = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option "
    "that accurately addresses the question.<video>\nThese are the frames of a video. {subtitles}Select the best "
    "answer to the following multiple-choice question based on the video. Respond with only the letter (A, B, C, or "
    "D) of the correct option.\n"
    "Question: {question}\n{options}\nAnswer: "
)


def read(record: Record) -> list[Question]:
    """Return the questions of a row: one, or those of a video in the authors' file, where they are nested."""
    tasks = [name for name in record.row if _TASK.fullmatch(name) and isinstance(record.row[name], dict)]
    if not tasks:
        index = record.get("index")
        return [_question(record, record, None if index is None else f"{index}")]
    questions = []
    for name in tasks:
        questions.append(_question(record, record.inner(name), f"{record.text('key')}/{name}"))
    return questions


def _question(video: Record, asked: Record, identity: str | None) -> Question:
    """Return a question.

    Args:
        video: record of the video's fields.
        asked: record of the question's fields.
        identity: its id, or None to number the questions of the video.
    """
    name = str(video.get("video", "video_id", "key") or "")
    question = asked.text("question")
    options = asked.choices("candidates", "options")
    guesses = [f"videos/{name}.mp4", f"{name}.mp4"] if name else []
    subtitles = video.subtitles([video.get("subtitle_path"), f"subtitles/{name}.srt"])
    # VLMEvalKit shows an empty line if there is no file.
    listed = f"This video's subtitles are listed below:\n{MARK if 'subtitles' in subtitles else ''}\n"
    path = video.medium("video_path", [video.get("video_path") or (f"{name}.mp4" if name else None)], guesses)
    return asked.question(
        asked.nth(name or path.rpartition("/")[2]) if identity is None else identity,
        question,
        "mcq",
        videos=(path,),
        options=options,
        answer=asked.letter(options, "answer"),
        prompt=_PROMPT.format(
            subtitles=listed if subtitles else "", question=question, options="\n".join(lettered(options))
        ),
        meta={
            **subtitles,
            "groups": asked.groups(
                task_domain=asked.label("task_domain"),
                task_type=asked.label("task_type"),
                domain=video.label("domain"),
                sub_category=video.label("sub_category"),
                duration=video.label("duration"),
                audio_class=video.label("audio_class"),
            ),
        },
    )
