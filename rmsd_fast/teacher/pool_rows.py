"""Arrays with one row per teacher answer, from which the report of a pool computes its statistics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.folding import fold_text
from rmsd_fast.teacher.pool import TeacherResponse
from rmsd_fast.teacher.scores import Pool, ScoredResponse, Scores
from rmsd_fast.teacher.usage import WITH, Prices, Usage, read_usage


@dataclass(frozen=True)
class PoolRows:
    """The answers to Q questions as arrays over A answers. The answers to a question are adjacent, in order of k.

    Attributes:
        questions: the questions that have an answer, [Q].
        start: first answer of each question, and A, int64 [Q + 1].
        quality: q_k, float64 [A].
        valid: whether each answer can be used, bool [A].
        as_sent: whether its text follows the format as sent, bool [A].
        characters: length of the text as sent, int64 [A].
        repeated: whether an earlier answer to the question has the same text, bool [A].
        elsewhere: whether an answer to another question has the same text, bool [A].
        distinct: number of different valid answers to each question, int64 [Q].
        model: index into `models`, int64 [A].
        models: names of the teachers, most frequent first.
        usage: fields of Usage, and with prices `priced`, the cost at these prices; float64 [A] each, NaN if the server
            did not report them. The usage of a reply with several answers is divided equally among them.
        prompt_added: prompt tokens that each answer adds, float64 [A]: those of the whole prompt for the first answer
            of a reply, and 0 for the others.
    """

    questions: list[Question]
    start: np.ndarray
    quality: np.ndarray
    valid: np.ndarray
    as_sent: np.ndarray
    characters: np.ndarray
    repeated: np.ndarray
    elsewhere: np.ndarray
    distinct: np.ndarray
    model: np.ndarray
    models: list[str]
    usage: dict[str, np.ndarray]
    prompt_added: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Return the number of answers to each question, int64 [Q]."""
        return np.diff(self.start)

    @property
    def owner(self) -> np.ndarray:
        """Return the index of each answer's question, int64 [A]."""
        return np.repeat(np.arange(len(self.questions)), self.counts)

    def per_question(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of values over the answers to each question, float64 [Q]."""
        return np.add.reduceat(np.asarray(values, dtype=np.float64), self.start[:-1])


def pool_rows(pool: Pool, questions: Sequence[Question], scores: Scores, prices: Prices | None = None) -> PoolRows:
    """Return the answers of a pool as arrays.

    Args:
        pool: all answers.
        questions: questions that have at least one answer each.
        scores: result of score_pool for all answers to these questions.
        prices: prices of the tokens, if they are known.
    Raises:
        ValueError: there are no questions, or not all answers were scored.
    """
    if not questions:
        raise ValueError("questions: expected at least one with an answer, got none")
    answers: list[ScoredResponse] = []
    responses: list[TeacherResponse] = []
    usages: list[Usage] = []
    prompt_added: list[float] = []
    start, distinct = [0], []
    for question in questions:
        if not scores[question.id] or len(scores[question.id]) != len(pool[question.id]):
            raise ValueError(
                f"question {question.id!r}: expected a score for each of its {len(pool[question.id])} answers, got "
                f"{len(scores[question.id])}; set teacher.responses to the largest number of answers"
            )
        answers += scores[question.id]
        responses += pool[question.id]
        shares, added = _split_usage(pool[question.id])
        usages += shares
        prompt_added += added
        start.append(len(answers))
        distinct.append(len({_final(answer, question) for answer in scores[question.id] if answer.valid}))
    ids = np.repeat(np.arange(len(questions)), np.diff(start))
    repeated, elsewhere = _repetitions([_sent(response) for response in responses], ids)
    models, model = _models(responses)
    columns = np.array(usages, dtype=np.float64)
    usage = {name: columns[:, column] for column, name in enumerate(Usage._fields)}
    if prices is not None:
        usage["priced"] = prices.cost(usage["prompt_tokens"], usage["completion_tokens"])
    return PoolRows(
        questions=list(questions),
        start=np.array(start),
        quality=np.array([answer.quality for answer in answers], dtype=np.float64),
        valid=np.array([answer.valid for answer in answers]),
        as_sent=np.array([answer.as_sent for answer in answers]),
        characters=np.array([len(_sent(response)) for response in responses]),
        repeated=repeated,
        elsewhere=elsewhere,
        distinct=np.array(distinct),
        model=model,
        models=models,
        usage=usage,
        prompt_added=np.array(prompt_added, dtype=np.float64),
    )


def _split_usage(responses: Sequence[TeacherResponse]) -> tuple[list[Usage], list[float]]:
    """Return the usage of each answer to a question, and the prompt tokens that each adds.

    The usage of a reply is divided equally among its answers. Its prompt is added by the first one.
    """
    named = [response.usage.get(WITH) for response in responses]
    replies = [k if isinstance(k, int) else response.k for k, response in zip(named, responses, strict=True)]
    whole = {response.k: read_usage(response.usage) for response in responses}
    nothing = Usage(math.nan, math.nan, math.nan)
    usage = [Usage(*(value / replies.count(k) for value in whole.get(k, nothing))) for k in replies]
    added = [0.0 if k in replies[:index] else whole.get(k, nothing).prompt_tokens for index, k in enumerate(replies)]
    return usage, added


def _sent(response: TeacherResponse) -> str:
    return response.text if response.raw is None else response.raw


def _final(answer: ScoredResponse, question: Question) -> object:
    """Return the content of a valid answer, in a form in which equal answers are equal."""
    parsed = parse_answer(answer.text, question.task_type, question.options)
    return fold_text(parsed) if isinstance(parsed, str) else parsed


def _repetitions(texts: Sequence[str], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which texts occur earlier for the same question, and which occur for another question.

    Args:
        texts: texts of the answers, [A].
        ids: index of each answer's question, [A], ascending.
    """
    # A hash of 8 bytes per answer takes less memory than a set of texts. It does not vary between processes.
    hashed = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    _, text = np.unique(np.frombuffer(b"".join(hashed), dtype=np.uint64), return_inverse=True)
    order = np.lexsort((np.arange(len(texts)), ids, text))
    same_text = np.diff(text[order]) == 0
    same_question = np.diff(ids[order]) == 0
    repeated = np.zeros(len(texts), dtype=bool)
    repeated[order[1:]] = same_text & same_question
    pairs = np.unique(np.stack([text, ids], axis=1), axis=0)
    questions_with = np.bincount(pairs[:, 0])
    return repeated, questions_with[text] > 1


def _models(responses: Sequence[TeacherResponse]) -> tuple[list[str], np.ndarray]:
    """Return the names of the teachers, most frequent first, and the index of each answer's teacher."""
    names, index, counts = np.unique(
        [response.model for response in responses], return_inverse=True, return_counts=True
    )
    order = np.lexsort((np.arange(len(names)), -counts))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return [str(names[place]) for place in order], rank[index]
