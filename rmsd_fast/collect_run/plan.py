"""Decide which answers a pool lacks, and estimate what they cost."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rmsd_fast.collect_run.config import CollectionConfig, cost_of
from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import counted
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.method.quality import agreement
from rmsd_fast.teacher.pool import HINT_K
from rmsd_fast.teacher.scores import quality_settings

if TYPE_CHECKING:
    from rmsd_fast.collect_run.requests import RequestBuilder
    from rmsd_fast.collect_run.store import Answer, PoolStore

# Assumptions of estimates; servers count differently.
CHARACTERS_PER_TOKEN, PIXELS_PER_TOKEN = 3, 32 * 32
# Tokens of a video that is sent as a whole, and of an answer if the pool has none to compare with.
VIDEO_TOKENS, ANSWER_TOKENS = 12_288, 400
# Number of questions whose media are opened for an estimate.
SAMPLED = 20


def missing(
    question: Question, store: PoolStore, settings: CollectionConfig, *, with_rejected: bool = False
) -> list[int]:
    """Return the numbers k of the answers to request next.

    HINT_K stands for the hinted answer of `collect.hint_empty`. With `collect.adaptive`, further answers may be missing
    once these are there.

    Args:
        question: the question.
        store: the pool.
        settings: settings of the collection.
        with_rejected: whether the answers are included whose requests the teachers have rejected.
    """
    collect, stored = settings.collect, store.answers.get(question.id, ())
    present = {answer.k for answer in stored}
    answers = [answer for answer in stored if not answer.hinted]

    def lacks(k: int) -> bool:
        return k not in present and (with_rejected or not store.is_failed(question, k))

    lacking = [k for k in range(collect.k) if lacks(k)]
    if collect.adaptive:
        first = [k for k in lacking if k < collect.k0]
        lacking = first or ([] if is_settled(question, answers, settings.teacher) else lacking[: collect.k0])
    is_hinted = len(answers) < len(stored)
    if lacking or not collect.hint_empty or is_hinted or not answers or not question.answer:
        return lacking
    is_empty = not any(answer.quality or (answer.valid and not question.has_truth) for answer in answers)
    return [HINT_K] if is_empty and lacks(HINT_K) else []


def is_settled(question: Question, answers: Sequence[Answer], teacher: TeacherConfig) -> bool:
    """Return whether further answers would hardly change the best one.

    An open question needs a valid answer. A closed question needs valid answers that all agree, one of them with
    quality 1, or two of them without ground truth.
    """
    valid = [answer for answer in answers if answer.valid]
    if question.task_type not in CLOSED_TASKS:
        return bool(valid)
    texts = [f"<think></think><answer>{answer.body}</answer>" for answer in valid]
    scores = agreement(texts, question.task_type, options=question.options, **quality_settings(teacher))
    if len(valid) > 1 and min(scores) < 1:
        return False
    return len(valid) > 1 if question.is_unlabeled else any(answer.quality == 1 for answer in valid)


def text_tokens(question: Question) -> int:
    """Return the estimated number of tokens of a question's text."""
    return len(question_text(question) + (question.system or "")) // CHARACTERS_PER_TOKEN + 1


def picture_tokens(height: int, width: int) -> int:
    """Return the estimated number of tokens of a picture."""
    return height * width // PIXELS_PER_TOKEN + 2


@dataclass(frozen=True)
class Plan:
    """What a collection would do.

    Fields:
        answers: number of answers to collect.
        requests: number of requests, if none fails and the servers support `n`.
        prompt_tokens, completion_tokens: estimated tokens of all requests.
        faults: reasons why the media of sampled questions cannot be used.
        measured: whether the length of answers comes from the pool.
        short: a line about videos of sampled questions with fewer frames than `video.num_frames`; "" = there are none.
    """

    answers: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    faults: list[str]
    measured: bool
    short: str


def make_plan(
    questions: Sequence[Question], store: PoolStore, settings: CollectionConfig, builder: RequestBuilder, models: int
) -> Plan:
    """Count what a pool lacks, and estimate its tokens from the headers of some media.

    Args:
        questions: all questions.
        store: the pool.
        settings: settings of the collection.
        builder: builds the requests of questions.
        models: number of models; each has a request of its own for its answers.
    """
    collect = settings.collect
    lacking = [(question, ks) for question in questions if (ks := missing(question, store, settings))]
    answers = sum(len(ks) for _, ks in lacking)
    each = (lambda ks: len(ks)) if collect.several == "never" else (lambda ks: len({k % models for k in ks}))
    requests = sum(each(ks) for _, ks in lacking)
    sampled = random.Random(0).sample(lacking, min(SAMPLED, len(lacking)))
    prompts, faults = [], []
    for question, _ in sampled:
        try:
            prompts.append(builder.estimate(question))
        except MediaError as error:
            faults.append(f"{question.id}: {error}")
    measured = store.spent[1] > 0
    length = store.spent[1] / store.metered if measured else min(ANSWER_TOKENS, collect.max_tokens)
    prompt = sum(prompts) / len(prompts) if prompts else 0
    tokens = round(requests * prompt), round(answers * length)
    return Plan(answers, requests, *tokens, faults, measured, builder.short_videos())


def describe_plan(plan: Plan, questions: Sequence[Question], store: PoolStore, settings: CollectionConfig) -> list[str]:
    """Return the lines that `--dry-run` prints."""
    collect = settings.collect
    present = sum(map(len, store.answers.values()))
    lines = [
        f"{store.path}: {counted(present, 'answer')} to {counted(len(questions), 'question')}, K={collect.k}; "
        f"{counted(len(store.failed), 'request')} rejected before",
        f"  to collect: {'at least ' if collect.adaptive or collect.hint_empty else ''}"
        f"{counted(plan.answers, 'answer')} in about {counted(plan.requests, 'request')} to {', '.join(collect.model)}",
        f"  tokens, estimated: {plan.prompt_tokens:,} of prompts and {plan.completion_tokens:,} of answers, whose "
        f"length {'is that of the answers in the pool' if plan.measured else 'is assumed'}",
    ]
    cost = cost_of(collect, plan.prompt_tokens, plan.completion_tokens)
    if math.isnan(cost):
        lines.append("  cost: unknown; set collect.input_price and collect.output_price")
    else:
        lines.append(f"  cost, estimated: {cost:,.2f}; the pool has cost {cost_of(collect, *store.spent):,.2f}")
    lines += [f"  among the sampled questions, {plan.short}"] if plan.short else []
    lines += (
        [f"  media of {len(plan.faults)} of the {SAMPLED} sampled questions cannot be used:"] if plan.faults else []
    )
    return lines + [f"    {fault}" for fault in plan.faults[:3]]
