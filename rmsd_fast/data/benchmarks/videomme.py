"""VideoMME (arXiv 2405.21075): four options, videos of three durations, with or without subtitles.

Annotations: parquet of lmms-lab/Video-MME, `Video-MME.tsv` of VLMEvalKit, or EasyVideoR1's `videomme.json`.
Source of the prompts: lmms-eval 0.7.3, tasks/videomme, the default without subtitles, and that with subtitles.
"""

from __future__ import annotations

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question
from rmsd_fast.data.subtitles import MARK, NO_SUBTITLES

PATTERNS = ("**/test*.parquet", "**/Video-MME.tsv", "**/videomme*.json*")
COUNTS = (2700,)
IGNORED = {"video_id", "url", "index", "video_path", "subtitle_path", "subtitle", "data_source", "process"}
IGNORED |= {"problem_id", "problem", "data_type", "problem_type", "original_question_type", "solution"}
_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n{question}\n{options}\n"
)
_PROMPT = f"{_SELECT}\nAnswer with the option's letter from the given choices directly."
_WITH_SUBTITLES = f"This video's subtitles are listed below: \n{{subtitles}}\n{_SELECT}The best answer is:"


def read(record: Record) -> list[Question]:
    """Return the question of a row."""
    question = record.text("question", "problem")
    options = record.choices("options", "candidates")
    video = record.text("videoID", "video")
    names = [f"{video}{end}" for end in (".mp4", ".MP4", ".mkv")]
    guesses = [f"{folder}/{name}" for folder in ("video", "videos", "data") for name in names]
    identity = record.get("question_id")
    asked = {"question": question, "options": "\n".join(lettered(options))}
    subtitles = record.subtitles([record.get("subtitle_path"), f"subtitle/{video}.srt"])
    prompt = _PROMPT.format(**asked)
    if subtitles:
        prompt = _WITH_SUBTITLES.format(subtitles=MARK if "subtitles" in subtitles else NO_SUBTITLES, **asked)
    return [
        record.question(
            record.nth(video) if identity is None else identity,
            question,
            "mcq",
            videos=(record.medium("videoID", names, [*guesses, record.get("path")]),),
            options=options,
            answer=record.letter(options, "answer", "solution"),
            prompt=prompt,
            meta={
                **subtitles,
                "groups": record.groups(
                    duration=record.label("duration"),
                    domain=record.label("domain"),
                    sub_category=record.label("sub_category"),
                    task_type=record.label("task_type"),
                ),
            },
        )
    ]
