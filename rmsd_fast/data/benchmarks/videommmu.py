"""Video-MMMU (arXiv 2501.13826): three tracks of 300 questions about lectures, some with an image.

Annotations: a folder with parquet of lmms-lab/VideoMMMU, one folder per track, `VideoMMMU.tsv` of VLMEvalKit, or
EasyVideoR1's `videommmu_with_image.json`, which does not name the tracks of questions without an image.

The knowledge gain needs answers to adaptation without the video (`evaluate.without_video`), which are asked with the
question, its options and its image alone; see `stages.evaluation_compare`.
Source of the prompts: lmms-eval 0.7.3, tasks/videommmu.
"""

from __future__ import annotations

import re

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question

PATTERNS = ("**/test*.parquet", "**/VideoMMMU.tsv", "**/videommmu*.json*")
COUNTS = (900,)
IGNORED = {"index", "link_selected", "data_source", "process", "data_type", "original_question_type", "problem_id"}
_KINDS = dict.fromkeys(("multiple-choice", "multiple choice", "perception", "comprehension"), "mcq")
_KINDS |= dict.fromkeys(("open", "open-ended", "numerical"), "exact")
# A list of texts, or an empty list, that a table stores as text.
_TEXTS = re.compile(r"""\s*\[\s*['"\]]""")
TRACKS = ("perception", "comprehension", "adaptation")
_IGNORE_QUIZ = "\nPlease ignore the Quiz question in last frame of the video."
_APPLY = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {kind} "
    "question. The image for this question is at the end of the video.\n"
)


def read(record: Record) -> list[Question]:
    """Return the question of a row. An image in the row is shown after the video, also at the mark `<image 1>`."""
    question = record.text("question", "problem")
    path = record.get("path", "video")
    video = record.text("id", "path", "video").rpartition("/")[2].removesuffix(".mp4")
    subject = "_".join(video.split("_")[1:-1])
    image = record.image("image", "image_path")
    track = _track(record, image)
    # Without a type, the question must have options.
    typed = record.get("question_type", "problem_type") is not None
    is_choice = not typed or record.kind(_KINDS, "question_type", "problem_type") == "mcq"
    options = record.choices("options") if is_choice else record.options("options")
    shown = "\n".join([question, *lettered(options)]) if options else question
    if not record.media.with_videos:
        prompt = shown
    elif track == "adaptation":
        prompt = _APPLY.format(kind="multi-choice" if is_choice else "open-ended") + shown
    else:
        prompt = shown + _IGNORE_QUIZ
    return [
        record.question(
            f"{track}/{video}" if track in TRACKS else record.nth(video),
            question,
            "mcq" if is_choice else "exact",
            videos=(record.medium("id", [path or f"{video}.mp4"], [f"{video}.mp4", f"videos/{video}.mp4"]),),
            images=(image,) if image else (),
            options=options if is_choice else None,
            answer=record.letter(options, "answer", "solution") if is_choice else _open_answer(record),
            prompt=prompt,
            meta={"groups": record.groups(track=track, subject=subject or None)},
        )
    ]


def _track(record: Record, image: str | None) -> str:
    """Return the track: a field, the folder of the file, or adaptation for questions with an image."""
    named = [record.get("category", "track"), record.file.parent.name, record.file.stem]
    for name in named:
        if track := next((track for track in TRACKS if track in str(name or "").lower()), None):
            return track
    return "adaptation" if image else "unnamed"


def _open_answer(record: Record) -> str:
    """Return the answer of an open question. A list of texts, as in MMMU, must have one item; "[2, 3]" is a text."""
    value = record.need("answer", "solution")
    if isinstance(value, list) or (isinstance(value, str) and _TEXTS.match(value)):
        items = record.list("answer", "solution") or []
        if len(items) != 1 or not str(items[0]).strip():
            raise record.fail("answer", "one answer", value, "choose one of the answers")
        return str(items[0]).strip()
    return record.plain_answer("answer", "solution")
