"""Simulate a teacher: generate responses with known errors in the schema of a real pool, without a model.

All of its responses have `model="simulated"`, and all results computed from them must be labeled as simulated. It knows
the ground truth of every question (and the content of a generated clip). A given share of its answers is wrong, with
reasoning that agrees with the wrong answer. There are two ways to choose this share:

- `error_rate` in [0, 1]: this share of closed-task answers is wrong or inexact, more in ocr and grounding, less in mcq.
- `error_rate=None`: the spread that R-MSD reports for its teacher (arXiv 2603.11423): mean quality 0.75 and sd 0.22
  across inputs, mcq 0.96, ocr between 0.50 and 0.85, sd within an input from 0.07 (mcq) to 0.15 (graded tasks).

Format violations are drawn in addition: 10% of temporal answers and 0.2% of the others. The paper reports up to 10% on
temporal and 1% overall, which implies that fewer than one question in six is temporal.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rmsd_fast.data.records import Question
from rmsd_fast.made.clips import COLORS, DIGITS, LETTERS, Content, article
from rmsd_fast.method.answers import CLOSED_TASKS, bare_options, option_letters, parse_answer_body
from rmsd_fast.teacher.pool import TeacherResponse, media_digest, request_key, write_pool

MODEL = "simulated"
# Increase it whenever the same settings would give different responses.
VERSION = 2

# Exponents f of 1 - (1 - error_rate)**f, the share of wrong answers; their mean over the closed tasks is 1.
ERROR_FACTORS = {"mcq": 0.7, "temporal": 1.1, "spatial": 1.1, "numeric": 1.0, "ocr": 1.1, "open": 1.0}
VIOLATION_RATES = {"temporal": 0.10}
OTHER_VIOLATIONS = 0.002


@dataclass(frozen=True)
class Spread:
    """Quality before format violations: its mean over inputs, its sd across inputs, and its sd within an input."""

    mean: float
    across: float
    within: float


# Chosen so that the pool reproduces the reported numbers (tested). mcq, numeric and ocr answers are right or wrong per
# letter, number or word, which alone produces their sd within an input.
REPORTED = {
    "mcq": Spread(0.96, 0.0, 0.0),
    "temporal": Spread(0.72, 0.16, 0.15),
    "spatial": Spread(0.70, 0.17, 0.17),
    "numeric": Spread(0.74, 0.12, 0.0),
    "ocr": Spread(0.68, 0.10, 0.05),
    "open": Spread(0.80, 0.10, 0.0),
}


def simulate_teacher(
    questions: Sequence[Question], *, k: int, seed: int, error_rate: float | None
) -> list[TeacherResponse]:
    """Return K responses to every question. Responses do not depend on K or on other questions.

    Args:
        questions: questions with ground truths. Media files must exist, because the request key covers their contents.
        k: responses per question.
        seed: seed of all draws.
        error_rate: share of answers that are wrong or inexact, in [0, 1]; None means the reported spread.
    Raises:
        ValueError: a number is out of range, or a closed question has no ground truth.
        DataError: a media file cannot be read.
    """
    if k < 1:
        raise ValueError(f"responses: expected at least 1 per question, got {k}")
    if error_rate is not None and not 0 <= error_rate <= 1:
        raise ValueError(f"error_rate: expected a number in [0, 1] or none, got {error_rate}")
    sampling = {"seed": seed, "error_rate": error_rate, "version": VERSION}
    responses = []
    for question in questions:
        if question.answer is None and question.task_type in CLOSED_TASKS:
            raise ValueError(f"question {question.id!r}: expected a ground truth to simulate from, got none; add it")
        key = request_key(question, sampling=sampling, frame_indices=None, media_digest=media_digest(question))
        level = _question_level(question, seed)
        for index in range(k):
            rng = random.Random(f"simulated {seed} {question.id} {index}")
            text, finish_reason = _respond(question, level, error_rate, rng)
            responses.append(
                TeacherResponse(
                    question.id, index, key, text, finish_reason=finish_reason, model=MODEL, sampling=sampling
                )
            )
    return responses


def write_simulated_pool(
    folder: str | os.PathLike, questions: Sequence[Question], *, k: int, seed: int, error_rate: float | None
) -> Path:
    """Write `pool-<hash of settings and questions>.jsonl` to the folder, unless it exists, and return its path."""
    settings = [VERSION, k, seed, error_rate, [[question.id, question.question] for question in questions]]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = Path(folder) / f"pool-{name}.jsonl"
    if not path.exists():
        write_pool(path, simulate_teacher(questions, k=k, seed=seed, error_rate=error_rate))
    return path


def is_simulated(pool: dict[str, list[TeacherResponse]]) -> bool:
    """Return whether any response of the pool was simulated, so that its numbers must be labeled."""
    return any(response.model == MODEL for responses in pool.values() for response in responses)


def _question_level(question: Question, seed: int) -> float:
    """Return the teacher's mean quality on this input, for the reported spread."""
    spread = REPORTED[question.task_type]
    rng = random.Random(f"simulated level {seed} {question.id}")
    return min(1.0, max(0.1, rng.gauss(spread.mean, spread.across)))


def _respond(question: Question, level: float, error_rate: float | None, rng: random.Random) -> tuple[str, str]:
    """Return the text and the finish reason of one response."""
    task = question.task_type
    if error_rate is None:
        spread = REPORTED[task]
        target = min(1.0, max(0.1, rng.gauss(level, spread.within)))
        answer = _graded(question, target, rng) if question.answer is not None else None
    else:
        wrong = rng.random() < 1 - (1 - error_rate) ** ERROR_FACTORS[task]
        answer = _wrong(question, rng) if wrong and question.answer is not None else question.answer
    think, answer = _reasoning(question, answer, rng)
    if rng.random() < VIOLATION_RATES.get(task, OTHER_VIOLATIONS):
        return _violate(think, answer, task, rng)
    return f"<think>{think}</think><answer>{answer}</answer>", "stop"


def _graded(question: Question, target: float, rng: random.Random) -> str:
    """Return an answer whose quality is `target`, exactly (graded tasks) or on average (all others)."""
    task, answer = question.task_type, question.answer
    if task == "temporal":
        start, end = parse_answer_body(answer, task)
        kept = max(0.1, round(target * (end - start), 1))
        return _interval(start, start + kept) if rng.random() < 0.5 else _interval(end - kept, end)
    if task == "spatial":
        x1, y1, x2, y2 = parse_answer_body(answer, task)
        if rng.random() < 0.5:
            x2 = x1 + target * (x2 - x1)
        else:
            y1 = y2 - target * (y2 - y1)
        return _box((x1, y1, x2, y2))
    if task == "ocr":
        return " ".join(word if rng.random() < target else _other_word(word, rng) for word in answer.split())
    return answer if rng.random() < target else _wrong(question, rng)


def _wrong(question: Question, rng: random.Random) -> str:
    """Return a wrong answer: with equal probability, a near miss or an entirely different answer."""
    task, answer = question.task_type, question.answer
    if task == "mcq":
        letters = option_letters(question.options) if question.options else "ABCD"
        return rng.choice([letter for letter in letters if letter != answer])
    if task == "temporal":
        return _wrong_interval(*parse_answer_body(answer, task), question.duration, rng)
    if task == "spatial":
        return _wrong_box(parse_answer_body(answer, task), rng)
    if task == "numeric":
        value = parse_answer_body(answer, task)
        # Off by one for counts, and by a tenth for measurements. Zero only increases.
        step = 1.0 if value == int(value) else abs(value) / 10
        return f"{value + step * (1 if value <= step or rng.random() < 0.5 else -1):.6g}"
    words = answer.split()
    if task == "ocr":
        changed = set(rng.sample(range(len(words)), rng.randint(1, len(words))))
        return " ".join(_other_word(word, rng) if index in changed else word for index, word in enumerate(words))
    return " ".join(words[: max(1, len(words) // 2)])


def _wrong_interval(start: float, end: float, duration: float | None, rng: random.Random) -> str:
    limit = max(end, duration or 0.0)
    step = max(0.1, round(limit / 8, 1))
    if rng.random() < 0.5:
        # Move one end by an eighth of the clip, so that an interval within the clip remains.
        moves = [(start - step, end), (start + step, end), (start, end - step), (start, end + step)]
    else:
        moves = [(step * first, step * (first + count)) for first in range(8) for count in (1, 2, 3, 4)]
    moves = [(a, b) for a, b in moves if a >= 0 and a + step / 2 < b <= limit + 1e-9 and (a, b) != (start, end)]
    # An interval that fills a clip of one step has no neighbor, so halve it.
    return _interval(*rng.choice(moves)) if moves else _interval(start, (start + end) / 2)


def _wrong_box(box: tuple[float, ...], rng: random.Random) -> str:
    x1, y1, x2, y2 = box
    width, height = x2 - x1, y2 - y1
    on_grid = all(value % 250 == 0 for value in box)
    step_x, step_y = (250.0, 250.0) if on_grid else (width / 2, height / 2)
    if rng.random() < 0.5:
        moves = [(x1 + dx, y1 + dy) for dx, dy in ((step_x, 0), (-step_x, 0), (0, step_y), (0, -step_y))]
    else:
        moves = [(step_x * column, step_y * row) for column in range(4) for row in range(4)]
    limit_x, limit_y = max(1000.0, x2), max(1000.0, y2)
    moves = [
        (x, y, x + width, y + height)
        for x, y in moves
        if x >= 0 and y >= 0 and x + width <= limit_x and y + height <= limit_y and (x, y) != (x1, y1)
    ]
    return _box(rng.choice(moves)) if moves else _box((x1, y1, x1 + width / 2, y2))


def _other_word(word: str, rng: random.Random) -> str:
    for alphabet in (LETTERS, DIGITS):
        if word in alphabet:
            return rng.choice([other for other in alphabet if other != word])
    # Replace a character, but not by the same letter in a different case.
    place = rng.randrange(len(word))
    return (
        word[:place] + rng.choice([c for c in "ae0o1lst" if c.casefold() != word[place].casefold()]) + word[place + 1 :]
    )


def _reasoning(question: Question, answer: str | None, rng: random.Random) -> tuple[str, str]:
    """Return reasoning that leads to the (right or wrong) answer and describes the clip, and the text of the answer."""
    task = question.task_type
    if "made" in question.meta:
        return _made_reasoning(question, _content(question.meta["made"]), answer, rng)
    if answer is None:
        return "I look at the clip.", "I cannot tell."
    if task == "mcq" and question.options:
        chosen = bare_options(question.options)[option_letters(question.options).index(answer)]
        return f"I see {chosen}.", answer
    words = {
        "temporal": f"It is seen from {answer}.",
        "spatial": "I see where it is.",
        "numeric": f"I count {answer}.",
        "ocr": f"It reads {answer}.",
    }
    return words.get(task, "I look at the clip."), answer


def _made_reasoning(question: Question, content: Content, answer: str, rng: random.Random) -> tuple[str, str]:
    task = question.task_type
    if task == "mcq":
        chosen = question.options[option_letters(question.options).index(answer)]
        claimed = replace(content, **{question.meta["asked"]: chosen}) if question.meta["asked"] != "place" else content
        place = chosen if question.meta["asked"] == "place" else content.place
        # Repeat the options, each followed by its letter, so that a tiny student can learn to copy the letter.
        listed = ", ".join(f"{option} {letter}" for option, letter in zip(question.options, "ABCD", strict=True))
        return f"{listed}. {_seen(claimed, place)}. So {chosen} {answer}.", answer
    if task == "temporal":
        start, end = parse_answer_body(answer, task)
        return f"The light is on from {start:g} to {end:g}.", answer
    if task == "spatial":
        box = tuple(int(value) for value in parse_answer_body(answer, task))
        return f"{_seen(content, replace(content, box=box).place)}.", answer
    if task == "numeric":
        return f"I count {answer} {content.dot_color} dots.", answer
    if task == "ocr":
        return f"The sign reads {answer}.", answer
    # A shortened open answer represents a wrong answer, so use a different color.
    if answer != question.answer:
        content = replace(content, color=rng.choice([name for name in COLORS if name != content.color]))
    seen = _seen(content, content.place)
    return f"{seen}.", f"{seen}."


def _seen(content: Content, place: str) -> str:
    return f"{article(content.color)} {content.color} {content.shape} at the {place}".capitalize()


def _violate(think: str, answer: str, task: str, rng: random.Random) -> tuple[str, str]:
    """Return a response whose format is violated in a common way, and its finish reason."""
    whole = f"<think>{think}</think><answer>{answer}</answer>"
    inside = {
        "temporal": [answer.replace(" to ", "-"), f"from {answer}", answer.replace(" to ", " s to ") + " s"],
        "spatial": [f"[{answer}]", answer.replace(",", " ")],
        "numeric": [f"about {answer}"],
        "mcq": [f"{answer} it is"],
    }.get(task, [])
    if inside and rng.random() < 0.5:
        return f"<think>{think}</think><answer>{rng.choice(inside)}</answer>", "stop"
    kind = rng.choice(("no think", "unclosed", "trailing", "truncated"))
    if kind == "no think":
        return f"<answer>{answer}</answer>", "stop"
    if kind == "unclosed":
        return whole.removesuffix("</answer>"), "stop"
    if kind == "trailing":
        return f"{whole} I am sure.", "stop"
    return whole[: rng.randint(len("<think>"), len(whole) - len("</answer>"))], "length"


def _content(record: dict[str, Any]) -> Content:
    fields = {name: value for name, value in record.items() if name != "place"}
    return Content(**fields | {"box": tuple(fields["box"])})


def _interval(start: float, end: float) -> str:
    return f"{start:.1f} to {end:.1f}"


def _box(box: Sequence[float]) -> str:
    return ",".join(str(round(value)) for value in box)
