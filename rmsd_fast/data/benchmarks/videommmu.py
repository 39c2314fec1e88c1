"""Video-MMMU (arXiv 2501.13826): three tracks of 300 questions about lectures, some with an image.

Annotations: a folder with parquet of lmms-eval/VideoMMMU, one folder per track, `VideoMMMU.tsv` of VLMEvalKit, or
EasyVideoR1's `videommmu_with_image.json`, which does not name the tracks of questions without an image.

The knowledge gain needs answers before the video was seen, so it is not computed.
Source of the prompts: lmms-eval 0.7.3, tasks/videommmu.
"""

from __future__ import annotations

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question

PATTERNS = ("**/test*.parquet", "**/VideoMMMU.tsv", "**/videommmu*.json*")
COUNTS = (900,)
IGNORED = {"index", "link_selected", "data_source", "process", "data_type", "original_question_type", "problem_id"}
TRACKS = ("perception", "comprehension", "adaptation")
_IGNORE_QUIZ = "\nPlease ignore the Quiz question in last frame of the video."
_APPLY = (
    "You should watch and learn the video content. Then apply what you learned to answer the following {kind} "
    "question. The image for this question is at the end of the video.\n"
)


def read(record: Record) -> list[Question]:
    """Return the question of a row. An image in the row is shown after the video, also at the mark `<image 1>`."""
    question = record.text("question", "problem")
    options = record.options("options")
    path = record.get("path", "video")
    video = str(record.get("id") or path).rpartition("/")[2].removesuffix(".mp4")
    subject = "_".join(video.split("_")[1:-1])
    image = record.image("image", "image_path")
    track = _track(record, image)
    is_choice = record.get("question_type", "problem_type") not in ("open", "open-ended", "numerical")
    shown = "\n".join([question, *lettered(options)]) if options else question
    if track == "adaptation":
        prompt = _APPLY.format(kind="multi-choice" if is_choice else "open-ended") + shown
    else:
        prompt = shown + _IGNORE_QUIZ
    return [
        record.question(
            f"{track}/{video}" if track in TRACKS else record.nth(video),
            question,
            "mcq" if is_choice else "exact",
            videos=(record.video("id", [path, f"{video}.mp4", f"videos/{video}.mp4"]),),
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
    """Return the answer of an open question; the first one of a list."""
    value = record.get("answer", "solution")
    if isinstance(value, list) or (isinstance(value, str) and value.startswith("[")):
        return str((record.list("answer", "solution") or [""])[0])
    return record.plain_answer("answer", "solution")
