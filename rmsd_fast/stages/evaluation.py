"""Evaluate a student: answers to held-out questions, scores per task type with 95% intervals, and their files.

Answers are greedy; `evaluate.rollouts` adds the mean score of sampled ones.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from rmsd_fast.config import DIFFERENCES, STUDENTS, RunConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.files import write_text_atomic
from rmsd_fast.made.meaning import has_content, meaning_score
from rmsd_fast.method.answers import ALL_TASKS, parse_answer
from rmsd_fast.method.lenient import lenient_response
from rmsd_fast.method.quality import quality_score
from rmsd_fast.models.students import Student
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.runtime.process_group import World, all_gather_objects
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.stages.progress import interim_steps, measure_progress
from rmsd_fast.stages.summaries import compare, signed_interval, summarize
from rmsd_fast.teacher.floors import best_constant_floor
from rmsd_fast.teacher.scores import quality_settings

log = logging.getLogger("rmsd_fast")


def answer_questions(
    student: Student,
    questions: list[Question],
    settings: RunConfig,
    world: World,
    media: MediaReader | None = None,
    *,
    name: str,
    stop: StopSignal | None = None,
) -> list[dict]:
    """Return a student's answers, one record per question, as the same list on every process.

    A record has the greedy answer and, with `evaluate.rollouts`, the mean score of as many sampled ones.

    Every process holds the whole model and answers its share of the questions, while the media of the next batch are
    decoded. A question is recorded with `error` and scored 0 if its media cannot be used, its prompt is too long, or
    the student's logits are not finite.

    Args:
        student: the student to evaluate.
        questions: questions to answer.
        settings: settings of the run.
        world: this process in the run.
        media: reader of the videos and images.
        name: name of the student for messages.
        stop: stop signal, checked between batches.
    Raises:
        Stopped: the program was asked to end.
    """
    video = settings.video
    if settings.evaluate.num_frames is not None:
        video = dataclasses.replace(video, num_frames=settings.evaluate.num_frames, fps=None)
    builder = PromptBuilder(student, video, media, prompt=settings.evaluate.prompt)
    batch_size = settings.evaluate.prompts_per_batch
    graphs = settings.rollout.cuda_graphs
    engine = HfRollout(builder, prompts_per_batch=batch_size, device=world.device, cuda_graphs=graphs)
    sampling = Sampling(n=1, temperature=0.0, max_new_tokens=settings.evaluate.max_new_tokens)
    share = questions[world.rank :: world.size]
    records = []
    # Without a terminal, print one line every ten seconds to show that a long evaluation makes progress.
    live = sys.stderr.isatty()
    with tqdm(
        total=len(share),
        desc=f"evaluate {name}",
        unit="question",
        disable=not world.is_main,
        mininterval=0.1 if live else 10,
        leave=True,
    ) as progress:
        for batch in _prompts_ahead(builder, share, batch_size, settings):
            if stop is not None:
                stop.check()
            prompts = [prompt for _, prompt in batch if isinstance(prompt, Prompt)]
            failed = [_record(q, "", settings, error=str(p)) for q, p in batch if not isinstance(p, Prompt)]
            if prompts:
                answers = engine.generate(student.model, prompts, sampling)
                answered = [
                    _record(
                        prompt.question,
                        rollout.text,
                        settings,
                        truncated=rollout.truncated,
                        error="" if rollout.finite else "the student's logits are not finite",
                    )
                    for prompt, (rollout,) in zip(prompts, answers, strict=True)
                ]
                records += _with_sampled(answered, prompts, student, engine, settings)
            zeros = {"sampled": 0.0} if settings.evaluate.rollouts else {}
            records += [
                {**record, **zeros, **({"sampled_meaning": 0.0} if zeros and "meaning" in record else {})}
                for record in failed
            ]
            progress.update(len(prompts) + len(failed))
    order = {question.id: number for number, question in enumerate(questions)}
    everything = [record for part in all_gather_objects(records, world) for record in part]
    unusable = [record for record in everything if "error" in record]
    if unusable and world.is_main:
        log.warning(
            "evaluate %s: %d of %d questions could not be used and are scored 0; first: %s",
            name,
            len(unusable),
            len(everything),
            unusable[0]["error"],
        )
    return sorted(everything, key=lambda record: order[record["id"]])


def _with_sampled(
    records: list[dict], prompts: list[Prompt], student: Student, engine: HfRollout, settings: RunConfig
) -> list[dict]:
    """Return the records with the means over sampled responses, or unchanged if `evaluate.rollouts` is 0.

    The noise of a response depends on the seed, the question's id and the response's index, and not on the batch.
    """
    count = settings.evaluate.rollouts
    if count == 0:
        return records
    sampling = Sampling(
        n=count,
        temperature=settings.rollout.temperature,
        max_new_tokens=settings.evaluate.max_new_tokens,
        seed=settings.seed,
    )
    # As many rows at a time as in greedy decoding.
    rows = max(1, settings.evaluate.prompts_per_batch // count)
    sampler = HfRollout(
        engine.builder, prompts_per_batch=rows, device=engine.device, cuda_graphs=settings.rollout.cuda_graphs
    )
    result = []
    for record, prompt, rollouts in zip(
        records, prompts, sampler.generate(student.model, prompts, sampling), strict=True
    ):
        samples = [
            _record(
                prompt.question,
                rollout.text,
                settings,
                truncated=rollout.truncated,
                error="" if rollout.finite else "the student's logits are not finite",
            )
            for rollout in rollouts
        ]
        for name in ("score", "meaning"):
            if name in record:
                key = "sampled" if name == "score" else "sampled_meaning"
                record = {**record, key: round(sum(sample[name] for sample in samples) / count, 6)}
        result.append(record)
    return result


def _prompts_ahead(
    builder: PromptBuilder, questions: list[Question], batch_size: int, settings: RunConfig
) -> Iterator[list[tuple[Question, Prompt | Exception]]]:
    """Yield batches of questions, each with its prompt or an error. The next batch is built in the background."""

    def build(question: Question) -> tuple[Question, Prompt | Exception]:
        try:
            return question, builder.build(question, max_tokens=settings.data.max_prompt_tokens)
        except (MediaError, PromptError) as error:
            return question, error

    pool = ThreadPoolExecutor(settings.data.decode_threads, thread_name_prefix="decode")
    try:
        ahead: list[Future] = []
        for start in range(0, len(questions) + batch_size, batch_size):
            building, ahead = ahead, [pool.submit(build, q) for q in questions[start : start + batch_size]]
            if building:
                yield [future.result() for future in building]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _record(
    question: Question, response: str, settings: RunConfig, *, truncated: bool = False, error: str = ""
) -> dict:
    task, options = question.task_type, question.options
    if error:
        # Text generated before the error is not an answer.
        nothing = {"score": 0.0, "valid": False, "truncated": truncated, "error": error}
        return {"id": question.id, "task_type": task, "response": response, **nothing, **_meaning(question, None)}
    read = response
    if settings.evaluate.parse == "natural" and not truncated:
        read = lenient_response(response, task, options=options) or response
    return {
        "id": question.id,
        "task_type": task,
        "response": response,
        "score": quality_score(read, task, question.answer, options=options, **quality_settings(settings.teacher)),
        # The share of answers in the required format is reported separately, regardless of the parser.
        "valid": parse_answer(response, task, options) is not None,
        "truncated": truncated,
        **_meaning(question, parse_answer(read, task, options)),
    }


def _meaning(question: Question, answer: str | None) -> dict[str, float]:
    """Return the meaning score of an open answer about a generated clip; an empty dict for other questions."""
    if question.task_type != "open" or not has_content(question):
        return {}
    return {"meaning": 0.0 if answer is None else meaning_score(answer, question.meta["made"])}


def write_evaluation(run_folder: Path, questions: list[Question], settings: RunConfig, *, simulated: bool) -> dict:
    """Write `samples.jsonl` and `evaluation.json` from the predictions in the run folder so far."""
    predictions = {name: read_predictions(run_folder, name, questions) for name in STUDENTS}
    predictions = {name: records for name, records in predictions.items() if records is not None}
    steps = interim_steps(run_folder)
    result = {
        "questions": len(questions),
        "seed": settings.seed,
        "teacher_simulated": simulated,
        "parse": settings.evaluate.parse,
        "floors": floors_of(questions, settings),
        "unusable": {name: sum("error" in record for record in records) for name, records in predictions.items()},
        "students": {name: summarize(records) for name, records in predictions.items()},
        "differences": {
            f"{after}-{before}": compare(predictions[after], predictions[before])
            for after, before in DIFFERENCES
            if after in predictions and before in predictions
        },
        "progress": measure_progress(
            steps, settings.distill.steps, lambda name: read_predictions(run_folder, name, questions)
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


def read_predictions(run_folder: Path, name: str, questions: list[Question]) -> list[dict] | None:
    """Return a student's answers, one record per question in order, or None if they have to be generated.

    Warn if the file exists but is damaged or answers other questions.
    """
    path = predictions_path(run_folder, name)
    if not path.exists():
        return None
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        asked = [(question.id, question.task_type) for question in questions]
        if [(r["id"], r["task_type"]) for r in records] != asked or not all(_is_scored(r) for r in records):
            raise ValueError("it answers other questions")
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: the file cannot be used (%s); the questions will be answered again", path, error)
        return None
    return records


def _is_scored(record: dict) -> bool:
    score = record["score"]
    return isinstance(record["valid"], bool) and isinstance(score, int | float) and 0 <= score <= 1


def write_predictions(run_folder: Path, name: str, records: list[dict]) -> None:
    path = predictions_path(run_folder, name)
    path.parent.mkdir(exist_ok=True)
    write_text_atomic(path, "".join(json.dumps(record) + "\n" for record in records))


def format_table(result: dict) -> str:
    """Return the accuracy table as text: one line per task type, then the meaning of open answers, then all closed."""
    students = result["students"]
    lines = ["task      floor  " + "  ".join(f"{name:>20}" for name in students)]
    for task in [*ALL_TASKS, "meaning", "closed", "sampled"]:
        rows = {n: _row(s, task) for n, s in students.items()}
        if not any(rows.values()):
            continue
        floor = result["floors"].get(task, {}).get("score")
        cells = [f"{r['mean']:.3f} [{r['low']:.2f}, {r['high']:.2f}]" if r else "-" for r in rows.values()]
        lines.append(
            f"{task:<9} {'-' if floor is None else f'{floor:.3f}':>5}  " + "  ".join(f"{c:>20}" for c in cells)
        )
    for name, difference in result["differences"].items():
        for row, label in (("closed", "closed tasks"), ("sampled", "closed tasks, sampled"), ("meaning", "meaning")):
            if entry := _row(difference, row):
                lines.append(f"{name}, {label}: {signed_interval(entry)}")
    return "\n".join(lines)


def _row(result: dict, row: str) -> dict | None:
    """Return the numbers of one line of the table: a task type, `closed`, `meaning`, or `sampled` for closed tasks."""
    if row == "sampled":
        return result.get("sampled", {}).get("closed")
    return result.get(row) if row in ("closed", "meaning") else result["tasks"].get(row)
