"""MLVU (arXiv 2406.04264), the multiple-choice tasks of dev and test.

Annotations: parquet of sy1998/MLVU_dev or MLVU_Test, the authors' folder of JSON files (`json/1_plotQA.json`, …),
`MLVU_MCQ.tsv` of VLMEvalKit, or EasyVideoR1's `mlvu-dev.json`, which has no task types and therefore no M-Avg.
Source of the prompt: lmms-eval 0.7.3, tasks/mlvu.
"""

from __future__ import annotations

import re

from rmsd_fast.data.benchmarks.record import Record, lettered
from rmsd_fast.data.records import Question

PATTERNS = (
    "**/test*.parquet",
    "**/[1-7]_*.json",
    "**/MLVU_MCQ.tsv",
    "**/test-ground-truth/*mc*.json",
    "**/mlvu*.json*",
)
COUNTS = (2174, 502)
IGNORED = {"index", "duration", "data_source", "data_type", "problem_type", "question_id"}
_LABEL = re.compile(r"\n\(([A-Z])\) ?")
_TASK_FILE = re.compile(r"[0-9]+_(\w+)")
TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
_FOLDERS = {task: f"{number}_{task}" for number, task in enumerate(TASKS, start=1)}


def _split(text: str) -> tuple[str, tuple[str, ...] | None]:
    """Return a question without its lines "(A) text", and their texts, of which a few are empty; None without lines."""
    question, *parts = _LABEL.split(text)
    letters, texts = parts[::2], parts[1::2]
    if letters != list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(letters)]) or len(letters) < 2:
        return text, None
    return question, tuple(text.strip() for text in texts)


def _video(record: Record, name: str, task: str | None) -> str:
    """Return the path of a video. Tasks of the authors' download have folders with videos of equal names."""
    guesses = [name, f"video/{name}", f"videos/{name}"]
    if isinstance(folder := record.get("prefix"), str) and folder.strip("./"):
        return record.medium("video", [f"{folder}/{name}", f"{folder.rstrip('/').rpartition('/')[2]}/{name}"], guesses)
    if task in _FOLDERS:
        return record.medium("video", [f"{_FOLDERS[task]}/{name}"], [f"video/{_FOLDERS[task]}/{name}", *guesses])
    return record.medium("video", [name], guesses)


def read(record: Record) -> list[Question]:
    """Return the question of a row. Options may be a list, or lines "(A) text" of the question."""
    question = record.text("question", "problem")
    options = record.options("candidates", "options")
    shown = question
    if options:
        shown = "\n".join([question, *(f"({line[0]}) {line[2:].removeprefix(' ')}" for line in lettered(options))])
    else:
        question, options = _split(question)
    name = record.text("video_name", "video", "path")
    in_file = _TASK_FILE.fullmatch(record.file.stem)
    task = record.label("task_type", "question_type") or (in_file[1] if in_file else None)
    identity = record.get("problem_id")
    return [
        record.question(
            record.nth(f"{task}/{name}" if task else name) if identity is None else identity,
            question,
            "mcq",
            videos=(_video(record, name, task),),
            options=options,
            answer=record.letter(options, "answer", "solution"),
            prompt=f"{shown}\nOnly give the best option.\nBest option: (",
            meta={"groups": record.groups(task=task)},
        )
    ]
