"""Simulate a teacher: generate responses with known errors in the schema of a real pool, without a model.

All of its responses have `model="simulated"`, and all results computed from them must be labeled as simulated. It knows
the ground truth of every question (and the content of a generated clip). A given share of its answers is wrong, with
reasoning that agrees with the wrong answer. There are five kinds of simulated teachers:

- `noisy`: the share `error_rate` of closed-task answers is wrong or inexact, more in ocr and grounding, less in mcq.
- `reported`: the spread that R-MSD reports for its teacher (arXiv 2603.11423): mean quality 0.75 and sd 0.22 across
  inputs, mcq 0.96, ocr between 0.50 and 0.85, sd within an input from 0.07 (mcq) to 0.15 (graded tasks).
- `biased`, `imprecise` and `blind`: as described in `errors`.

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

from rmsd_fast.config import TEACHERS, WORDINGS
from rmsd_fast.data.records import Question
from rmsd_fast.made.clips import COLORS, Content, article
from rmsd_fast.made.errors import box_text, drawn_answer, interval_text, noisy_answer, other_word, wrong_answer
from rmsd_fast.made.wording import paraphrase, wrong_text
from rmsd_fast.method.answers import bare_options, option_letters, parse_answer_body
from rmsd_fast.teacher.pool import TeacherResponse, media_digest, request_key, write_pool

MODEL = "simulated"
# Increase it whenever the same settings would give different responses.
VERSION = 2

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


@dataclass(frozen=True)
class SimulatedTeacher:
    """What a simulated teacher gets wrong, and how it words open answers.

    Raises:
        ValueError: a value is not one of those below.
    """

    kind: str = "noisy"
    """One of `config.TEACHERS`."""
    error_rate: float = 0.35
    """Share of answers of `noisy` that are wrong or inexact, in [0, 1]. Other kinds ignore it."""
    wording: str = "reference"
    """One of `config.WORDINGS`."""

    def __post_init__(self):
        if self.kind not in TEACHERS:
            raise ValueError(f"teacher: expected one of {', '.join(TEACHERS)}, got {self.kind!r}")
        if not 0 <= self.error_rate <= 1:
            raise ValueError(f"error_rate: expected a number in [0, 1], got {self.error_rate}")
        if self.wording not in WORDINGS:
            raise ValueError(f"wording: expected one of {', '.join(WORDINGS)}, got {self.wording!r}")

    def settings(self) -> dict[str, Any]:
        """Return the values that decide the responses. They are part of the responses and of their file's name."""
        # The rate alone distinguishes `noisy` from `reported`, as in earlier versions, so existing pools keep their
        # names.
        settings = {"error_rate": self.error_rate if self.kind == "noisy" else None}
        if self.kind not in ("noisy", "reported"):
            settings["teacher"] = self.kind
        if self.wording != "reference":
            settings["wording"] = self.wording
        return settings


def simulate_teacher(
    questions: Sequence[Question], *, k: int, seed: int, teacher: SimulatedTeacher
) -> list[TeacherResponse]:
    """Return K responses to every question. Responses do not depend on K or on other questions.

    Args:
        questions: questions with ground truths. Media files must exist, because the request key covers their contents.
        k: responses per question.
        seed: seed of all draws.
        teacher: kind of errors, and wording of open answers.
    Raises:
        ValueError: a number is out of range, or a closed question has no ground truth.
        DataError: a media file cannot be read.
    """
    if k < 1:
        raise ValueError(f"responses: expected at least 1 per question, got {k}")
    settings = teacher.settings()
    sampling = {"seed": seed, "error_rate": settings.pop("error_rate"), "version": VERSION, **settings}
    responses = []
    for question in questions:
        if question.is_unlabeled:
            raise ValueError(f"question {question.id!r}: expected a ground truth to simulate from, got none; add it")
        key = request_key(question, sampling=sampling, frame_indices=None, media_digest=media_digest(question))
        level = _question_level(question, seed)
        for index in range(k):
            rng = random.Random(f"simulated {seed} {question.id} {index}")
            text, finish_reason = _respond(question, level, teacher, rng)
            responses.append(
                TeacherResponse(
                    question.id, index, key, text, finish_reason=finish_reason, model=MODEL, sampling=sampling
                )
            )
    return responses


def write_simulated_pool(
    folder: str | os.PathLike, questions: Sequence[Question], *, k: int, seed: int, teacher: SimulatedTeacher
) -> Path:
    """Write `pool-<hash of settings and questions>.jsonl` to the folder, unless it exists, and return its path."""
    described = teacher.settings()
    asked = [[question.id, question.question] for question in questions]
    settings = [VERSION, k, seed, described.pop("error_rate"), asked, *([described] if described else [])]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    path = Path(folder) / f"pool-{name}.jsonl"
    if not path.exists():
        write_pool(path, simulate_teacher(questions, k=k, seed=seed, teacher=teacher))
    return path


def is_simulated(pool: dict[str, list[TeacherResponse]]) -> bool:
    """Return whether any response of the pool was simulated, so that its numbers must be labeled."""
    return any(response.model == MODEL for responses in pool.values() for response in responses)


def _question_level(question: Question, seed: int) -> float:
    """Return the teacher's mean quality on this input, for the reported spread."""
    spread = REPORTED[question.task_type]
    rng = random.Random(f"simulated level {seed} {question.id}")
    return min(1.0, max(0.1, rng.gauss(spread.mean, spread.across)))


def _respond(question: Question, level: float, teacher: SimulatedTeacher, rng: random.Random) -> tuple[str, str]:
    """Return the text and the finish reason of one response."""
    task = question.task_type
    if teacher.kind == "reported":
        spread = REPORTED[task]
        target = min(1.0, max(0.1, rng.gauss(level, spread.within)))
        answer = _graded(question, target, rng) if question.answer is not None else None
    elif teacher.kind == "noisy":
        answer = noisy_answer(question, teacher.error_rate, rng)
    else:
        answer = drawn_answer(question, teacher.kind, rng)
    think, answer = _reasoning(question, answer, teacher.wording, rng)
    if rng.random() < VIOLATION_RATES.get(task, OTHER_VIOLATIONS):
        return _violate(think, answer, task, rng)
    return f"<think>{think}</think><answer>{answer}</answer>", "stop"


def _graded(question: Question, target: float, rng: random.Random) -> str:
    """Return an answer whose quality is `target`, exactly (graded tasks) or on average (all others)."""
    task, answer = question.task_type, question.answer
    if task == "temporal":
        start, end = parse_answer_body(answer, task)
        kept = max(0.1, round(target * (end - start), 1))
        return interval_text(start, start + kept) if rng.random() < 0.5 else interval_text(end - kept, end)
    if task == "spatial":
        x1, y1, x2, y2 = parse_answer_body(answer, task)
        if rng.random() < 0.5:
            x2 = x1 + target * (x2 - x1)
        else:
            y1 = y2 - target * (y2 - y1)
        return box_text((x1, y1, x2, y2))
    if task == "ocr":
        return " ".join(word if rng.random() < target else other_word(word, rng) for word in answer.split())
    return answer if rng.random() < target else wrong_answer(question, rng)


def _reasoning(question: Question, answer: str | None, wording: str, rng: random.Random) -> tuple[str, str]:
    """Return reasoning that leads to the (right or wrong) answer and describes the clip, and the text of the answer."""
    task = question.task_type
    if "made" in question.meta:
        return _made_reasoning(question, _content(question.meta["made"]), answer, wording, rng)
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


def _made_reasoning(
    question: Question, content: Content, answer: str, wording: str, rng: random.Random
) -> tuple[str, str]:
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
    if wording == "paraphrased":
        worded = paraphrase if answer == question.answer else wrong_text
        text = worded(content.color, content.shape, content.place, rng)
        return text, text
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
