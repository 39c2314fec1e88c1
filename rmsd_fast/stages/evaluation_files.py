"""Write and read the files of evaluations: `predictions/`, `samples.jsonl` and `evaluation.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from rmsd_fast.config import DIFFERENCES, STUDENTS, RunConfig
from rmsd_fast.data.records import Question
from rmsd_fast.files import write_text_atomic
from rmsd_fast.method.answers import ALL_TASKS
from rmsd_fast.stages.answer_records import answer_record, asked_hash, clusters_of
from rmsd_fast.stages.progress import interim_steps, measure_progress
from rmsd_fast.stages.protocol import protocol_of
from rmsd_fast.stages.summaries import compare, count_unusable, summarize
from rmsd_fast.teacher.floors import best_constant_floor

log = logging.getLogger("rmsd_fast")


def write_evaluation(run_folder: Path, questions: list[Question], settings: RunConfig, *, simulated: bool) -> dict:
    """Write `samples.jsonl` and `evaluation.json` from the predictions in the run folder so far."""
    read = {name: read_predictions(run_folder, name, questions, settings) for name in STUDENTS}
    predictions = {name: records for name, records in read.items() if records is not None}
    steps = interim_steps(run_folder)
    result = {
        **evaluation_of(predictions, questions, settings),
        "teacher_simulated": simulated,
        "differences": {
            f"{after}-{before}": compare(predictions[after], predictions[before])
            for after, before in DIFFERENCES
            if after in predictions and before in predictions
        },
        "progress": measure_progress(
            steps, settings.distill.steps, lambda name: read_predictions(run_folder, name, questions, settings)
        ),
    }
    by_id = {question.id: question for question in questions}
    lines = []
    for name, records in predictions.items():
        for record in _spread(records, settings.evaluate.samples):
            question = by_id[record["id"]]
            media = {"videos": question.videos, "images": question.images, "spans": question.spans}
            media["duration"] = question.duration
            asked = {"question": question.question, "options": question.options, "answer": question.answer}
            lines.append(json.dumps({"student": name, **record, **asked, **media}))
    write_text_atomic(run_folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    write_text_atomic(run_folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def evaluation_of(predictions: dict[str, list[dict]], questions: list[Question], settings: RunConfig) -> dict:
    """Return the content of an `evaluation.json` about some students, without their differences."""
    return {
        "questions": len(questions),
        "videos": len(set(clusters_of(questions).values())),
        "benchmark": settings.evaluate.benchmark or None,
        **({"subtitles": _subtitles(questions)} if settings.evaluate.subtitles else {}),
        "seed": settings.seed,
        "parse": settings.evaluate.parse,
        "protocol": protocol_of(settings),
        "floors": floors_of(questions, settings),
        "unusable": {name: count_unusable(records) for name, records in predictions.items()},
        "students": {name: summarize(records) for name, records in predictions.items()},
        "differences": {},
    }


def _subtitles(questions: list[Question]) -> dict:
    """Return the number of questions with subtitles and of those whose file is missing, and these files."""
    lost = [question.meta["subtitles_missing"] for question in questions if "subtitles_missing" in question.meta]
    shown = sum("subtitles" in question.meta for question in questions)
    return {"questions": shown, "missing": len(lost), "missing_files": list(dict.fromkeys(lost))}


def _spread(records: list[dict], count: int) -> list[dict]:
    """Return up to `count` records, taken from each task type in turn so that all of them appear."""
    by_task = [[r for r in records if r["task_type"] == task] for task in ALL_TASKS]
    turns = [rows[i] for i in range(max(map(len, by_task), default=0)) for rows in by_task if i < len(rows)]
    return turns[:count]


def floors_of(questions: list[Question], settings: RunConfig) -> dict[str, dict]:
    """Return, per task type, the score of the best constant answer to all questions."""
    counts = {task: sum(question.task_type == task for question in questions) for task in ALL_TASKS}
    floors = best_constant_floor(questions, settings.teacher)
    return {task: {"score": score, "answer": answer, "n": counts[task]} for task, (score, answer) in floors.items()}


def predictions_path(run_folder: Path, name: str) -> Path:
    return run_folder / "predictions" / f"{name}.jsonl"


def read_predictions(run_folder: Path, name: str, questions: list[Question], settings: RunConfig) -> list[dict] | None:
    """Return a student's answers, one record per question in order, or None if they have to be generated.

    Answers that an earlier version scored in one way only are scored again. Warn if the file exists but is damaged or
    answers other questions.
    """
    path = predictions_path(run_folder, name)
    if not path.exists():
        return None
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [(question.id, question.task_type) for question in questions]
        if [(r["id"], r["task_type"]) for r in records] != asked or not all(map(_is_scored, records)):
            raise ValueError("it answers other questions")
        # Earlier versions did not record the hash.
        hashes = [asked_hash(question) for question in questions]
        if any(record.get("asked_hash", own) != own for record, own in zip(records, hashes, strict=True)):
            raise ValueError("texts, options or ground truths of its questions have changed")
        if not all("strict" in record for record in records):
            records = score_again(records, questions, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: the file cannot be used (%s); the questions will be answered again", path, error)
        return None
    return records


def score_again(records: list[dict], questions: list[Question], settings: RunConfig) -> list[dict]:
    """Return records in the present form and without a judge's verdicts. Their means over sampled responses stay."""
    clusters = clusters_of(questions)
    result = []
    for record, question in zip(records, questions, strict=True):
        ended = {name: record[name] for name in ("truncated", "error", "reason") if name in record}
        scored = answer_record(question, clusters[question.id], record["response"], settings, **ended)
        result.append(scored | {name: record[name] for name in ("sampled", "sampled_meaning") if name in record})
    return result


def _is_scored(record: dict) -> bool:
    scores = [record["score"], *(record[name] for name in ("strict", "lenient") if name in record)]
    return isinstance(record["valid"], bool) and all(isinstance(s, int | float) and 0 <= s <= 1 for s in scores)


def write_predictions(run_folder: Path, name: str, records: list[dict]) -> None:
    write_records(predictions_path(run_folder, name), records)


def write_records(path: Path, records: list[dict]) -> None:
    """Write predictions as JSONL, in place of a former file."""
    write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))
