"""Errors of the simulated teachers: which wrong answer is given, and how often each kind of error occurs.

Everything here is simulated, and nothing is measured on a real teacher. `ERROR_SHARES` has the shares of exact,
slightly wrong, shifted and entirely wrong intervals, boxes and counts:

- `biased` errs in one direction. Slight: the end is one second late, the box is a step too wide, the count is one too
  high. Shifted: start and end are one second late, the box is a step too far right, the count is one too high.
- `imprecise` errs in all directions. Slight: any one edge is off by a step. Shifted: the interval is moved by a step
  either way, the box along one axis. Counts are one too high or one too low in both cases.
- `blind` is right, except that all of its answers to the questions of `UNSEEN` are entirely wrong.

A step is one second, or a quarter of the frame. No error leaves the clip or the frame. If the light is on until the
clip's end, `biased` cannot move the end, so it moves the start in slight errors too: 4 to 8 of 8 s becomes 5 to 8. An
interval that would become empty keeps its second half: 7 to 8 becomes 7.5 to 8. The same holds for boxes at the right
edge of the frame.

Wrong intervals and boxes have an IoU of at most `WRONG_IOU` with the true ones. Wrong counts are off by two or three.

Options, words and descriptions have no direction in which they could be biased. In mcq, ocr and open questions,
`biased` and `imprecise` therefore err like `noisy` at `OTHER_ERROR_RATE`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rmsd_fast.data.records import Question
from rmsd_fast.made.clips import DIGITS, LETTERS
from rmsd_fast.method.answers import option_letters, parse_answer_body

# Exponents f of 1 - (1 - error_rate)**f, the share of wrong answers; their mean over the closed tasks is 1.
ERROR_FACTORS = {"mcq": 0.7, "temporal": 1.1, "spatial": 1.1, "numeric": 1.0, "ocr": 1.1, "open": 1.0}


@dataclass(frozen=True)
class ErrorShares:
    """Shares of the answers by kind of error; they add up to 1."""

    exact: float
    slight: float
    """One edge is off by a step."""
    shifted: float
    """Both edges are off by a step."""
    wrong: float


ERROR_SHARES = {
    "biased": ErrorShares(exact=0.05, slight=0.10, shifted=0.70, wrong=0.15),
    "imprecise": ErrorShares(exact=0.30, slight=0.35, shifted=0.20, wrong=0.15),
    "blind": ErrorShares(exact=1.0, slight=0.0, shifted=0.0, wrong=0.0),
}
UNSEEN_SHARES = ErrorShares(exact=0.0, slight=0.0, shifted=0.0, wrong=1.0)
OTHER_ERROR_RATE = 0.35
WRONG_IOU = 0.2
STEP_S = 1.0
# A box on the grid of the generated clips moves by a patch, any other box by half of its size.
STEP_GRID = 250.0

# What the teacher `blind` does not see, by task type: contents of generated clips, and their share of all contents.
UNSEEN: dict[str, Callable[[dict[str, Any]], bool]] = {
    # The light goes on in second 5 or later: 6 of 18 intervals.
    "temporal": lambda made: made["start"] >= 5,
    # Six or seven dots: 2 of 7 numbers.
    "numeric": lambda made: made["dots"] >= 6,
    # A sign with the digit 7 or 8: 2 of 6 digits.
    "ocr": lambda made: made["sign"][-1] in "78",
    # A shape on the right: 3 of 9 boxes.
    "spatial": lambda made: "right" in made["place"],
    "mcq": lambda made: "right" in made["place"],
    "open": lambda made: "right" in made["place"],
}


def noisy_answer(question: Question, error_rate: float, rng: random.Random) -> str | None:
    """Return the ground truth, or a wrong answer with a probability that follows from `error_rate`."""
    wrong = rng.random() < 1 - (1 - error_rate) ** ERROR_FACTORS[question.task_type]
    return wrong_answer(question, rng) if wrong and question.answer is not None else question.answer


def drawn_answer(question: Question, kind: str, rng: random.Random) -> str | None:
    """Return an answer with the errors of a teacher.

    Args:
        question: the question, with its ground truth.
        kind: `biased`, `imprecise` or `blind`.
        rng: source of all draws.
    """
    shares = ERROR_SHARES[kind]
    if kind == "blind":
        shares = UNSEEN_SHARES if is_unseen(question) else shares
    elif question.task_type not in ("temporal", "spatial", "numeric"):
        return noisy_answer(question, OTHER_ERROR_RATE, rng)
    draw = rng.random()
    if draw < shares.exact or question.answer is None:
        return question.answer
    if draw >= shares.exact + shares.slight + shares.shifted:
        return _entirely_wrong(question, rng)
    is_shifted = draw >= shares.exact + shares.slight
    if question.task_type == "numeric":
        return _off_by_one(question.answer, rng, upwards=kind == "biased")
    bounds, steps, limits = _extent(question)
    if kind == "biased":
        return _written(question, _moved_on(bounds, steps[0], limits[0], both=is_shifted))
    # An interval that fills its clip cannot be shifted, and one of a single step that fills it cannot be moved at all.
    moves = (_shifts(bounds, steps, limits) if is_shifted else []) or _edge_moves(bounds, steps, limits)
    return _written(question, rng.choice(moves)) if moves else wrong_answer(question, rng)


def is_unseen(question: Question) -> bool:
    """Return whether the teacher `blind` answers this question wrongly. Without generated content, it never does."""
    made = question.meta.get("made")
    return made is not None and UNSEEN[question.task_type](made)


def wrong_answer(question: Question, rng: random.Random) -> str:
    """Return an answer that differs from the ground truth: a near miss or an unrelated one, equally often."""
    task, answer = question.task_type, question.answer
    if task == "mcq":
        letters = option_letters(question.options) if question.options else "ABCD"
        return rng.choice([letter for letter in letters if letter != answer])
    if task == "temporal":
        return _wrong_interval(*parse_answer_body(answer, task), question.duration, rng)
    if task == "spatial":
        return _wrong_box(parse_answer_body(answer, task), rng)
    if task == "numeric":
        return _off_by_one(answer, rng)
    words = answer.split()
    if task == "ocr":
        changed = set(rng.sample(range(len(words)), rng.randint(1, len(words))))
        return " ".join(other_word(word, rng) if index in changed else word for index, word in enumerate(words))
    return " ".join(words[: max(1, len(words) // 2)])


def _off_by_one(answer: str, rng: random.Random, *, upwards: bool = False) -> str:
    """Return a number that is off by one for counts, and by a tenth for measurements. Zero is only increased."""
    value = parse_answer_body(answer, "numeric")
    step = _step_of(value)
    return f"{value + step * (1 if upwards or value <= step or rng.random() < 0.5 else -1):.6g}"


def _step_of(value: float) -> float:
    return 1.0 if value == int(value) else abs(value) / 10


def _entirely_wrong(question: Question, rng: random.Random) -> str:
    """Return an answer that has little or nothing in common with the ground truth."""
    task, answer = question.task_type, question.answer
    if task == "ocr":
        return " ".join(other_word(word, rng) for word in answer.split())
    if task == "numeric":
        value = parse_answer_body(answer, task)
        step = _step_of(value)
        # A positive count stays positive.
        values = [value + step * count for count in (-3, -2, 2, 3) if value <= 0 or value + step * count > 0]
        return f"{rng.choice(values):.6g}"
    if task not in ("temporal", "spatial"):
        return wrong_answer(question, rng)
    bounds, _, limits = _extent(question)
    if task == "temporal":
        limit = bounds[1] if math.isinf(limits[0]) else limits[0]
        step = max(0.1, round(limit / 8, 1))
        places = [(step * first, step * (first + count)) for first in range(8) for count in (1, 2, 3, 4)]
    else:
        width, height = bounds[2] - bounds[0], bounds[3] - bounds[1]
        corners = [(STEP_GRID * column, STEP_GRID * row) for column in range(4) for row in range(4)]
        places = [(x, y, x + width, y + height) for x, y in corners]
    places = [place for place in places if _fits(place, limits) and _iou(place, bounds) <= WRONG_IOU]
    # There is no room elsewhere if the true one fills most of the clip or the frame.
    return _written(question, rng.choice(places)) if places else wrong_answer(question, rng)


def _extent(question: Question) -> tuple[tuple[float, ...], list[float], list[float]]:
    """Return the lower and then the upper bounds of an interval or a box, and the step and upper limit of each axis."""
    bounds = parse_answer_body(question.answer, question.task_type)
    if question.task_type == "temporal":
        limit = math.inf if question.duration is None else max(bounds[1], question.duration)
        return bounds, [STEP_S], [limit]
    steps = [STEP_GRID, STEP_GRID]
    if any(value % STEP_GRID for value in bounds):
        steps = [(bounds[2] - bounds[0]) / 2, (bounds[3] - bounds[1]) / 2]
    return bounds, steps, [max(1000.0, bounds[2]), max(1000.0, bounds[3])]


def _moved_on(bounds: Sequence[float], step: float, limit: float, *, both: bool) -> list[float]:
    """Return bounds that end a step later along the first axis and, with `both`, also start a step later.

    At the limit, the end stays and the start moves. An axis that would become empty keeps its second half.
    """
    axes = len(bounds) // 2
    low, high = bounds[0], min(bounds[axes] + step, limit)
    if both or high == bounds[axes]:
        low += step
    if low >= high:
        low = (bounds[0] + high) / 2
    return [low, *bounds[1:axes], high, *bounds[axes + 1 :]]


def _edge_moves(bounds: Sequence[float], steps: Sequence[float], limits: Sequence[float]) -> list[list[float]]:
    """Return the bounds with one edge moved by a step, in all ways that fit."""
    moves = []
    for edge, value in enumerate(bounds):
        for step in (-steps[edge % len(steps)], steps[edge % len(steps)]):
            moved = list(bounds)
            moved[edge] = value + step
            moves.append(moved)
    return [moved for moved in moves if _fits(moved, limits)]


def _shifts(bounds: Sequence[float], steps: Sequence[float], limits: Sequence[float]) -> list[list[float]]:
    """Return the bounds shifted along one axis by a step, in all ways that fit."""
    axes = len(steps)
    shifted = [
        [value + sign * steps[axis] * (index % axes == axis) for index, value in enumerate(bounds)]
        for axis in range(axes)
        for sign in (-1, 1)
    ]
    return [moved for moved in shifted if _fits(moved, limits)]


def _fits(bounds: Sequence[float], limits: Sequence[float]) -> bool:
    axes = len(limits)
    return all(0 <= bounds[axis] < bounds[axis + axes] <= limits[axis] for axis in range(axes))


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the IoU of two intervals or boxes. Training uses the exact one of `method.quality`."""
    axes = len(a) // 2
    overlap = math.prod(max(0.0, min(a[i + axes], b[i + axes]) - max(a[i], b[i])) for i in range(axes))
    area_a, area_b = (math.prod(box[i + axes] - box[i] for i in range(axes)) for box in (a, b))
    return overlap / (area_a + area_b - overlap)


def _written(question: Question, bounds: Sequence[float]) -> str:
    return interval_text(*bounds) if question.task_type == "temporal" else box_text(bounds)


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
    return interval_text(*rng.choice(moves)) if moves else interval_text(start, (start + end) / 2)


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
    return box_text(rng.choice(moves)) if moves else box_text((x1, y1, x1 + width / 2, y2))


def other_word(word: str, rng: random.Random) -> str:
    """Return a misread word."""
    for alphabet in (LETTERS, DIGITS):
        if word in alphabet:
            return rng.choice([other for other in alphabet if other != word])
    # A misread character, which must not give the same word in a different case.
    place = rng.randrange(len(word))
    return (
        word[:place] + rng.choice([c for c in "ae0o1lst" if c.casefold() != word[place].casefold()]) + word[place + 1 :]
    )


def interval_text(start: float, end: float) -> str:
    """Return an interval as it belongs inside `<answer>`."""
    return f"{start:.1f} to {end:.1f}"


def box_text(box: Sequence[float]) -> str:
    """Return a box as it belongs inside `<answer>`."""
    return ",".join(str(round(value)) for value in box)
