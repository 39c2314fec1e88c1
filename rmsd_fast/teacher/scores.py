"""Score teacher answers for training: the text in canonical form, its validity and its quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.marks import SPECIAL_TOKEN, is_unicode
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import answer_body, has_outer_format, parse_answer
from rmsd_fast.method.finish_reasons import finish_reason_of
from rmsd_fast.method.natural import Unreadable, read_response
from rmsd_fast.method.quality import agreement, quality_score, word_overlap
from rmsd_fast.teacher.pool import TeacherResponse

Pool = dict[str, list[TeacherResponse]]
Scores = dict[str, list["ScoredResponse"]]

# Number of examples of each kind of change.
EXAMPLES = 3
_NOT_WHOLE = {"length": "truncated", "content_filter": "filtered"}
# Reason if the text inside <answer> cannot be parsed, by task type.
_NOT_PARSED = {
    "mcq": "not_an_option",
    "temporal": "not_an_interval",
    "spatial": "not_a_box",
    "numeric": "not_a_number",
    "ocr": "no_answer",
    "open": "no_answer",
}


class ScoredResponse(NamedTuple):
    """One teacher answer as training uses it."""

    k: int
    """Index in the pool."""
    text: str
    """The full text: canonical if `teacher.parse=natural` could read it, otherwise as sent."""
    valid: bool
    quality: float
    """The task's metric in [0, 1]; 0 for invalid answers, 1 for valid answers to open questions.

    Without ground truth, it is the agreement with the other valid answers to the question.
    """
    reason: str | None = None
    """Why it is invalid, a key of `method.natural.REASONS`; None if it is valid."""
    as_sent: bool = True
    """Whether the original text, before any repair, follows the format.

    arXiv 2603.11423 counts the others as format violations.
    """
    is_counted: bool = True
    """Whether statistics of the teacher include it: it was neither drawn adaptively nor hinted."""


def used_responses(responses: Sequence[TeacherResponse], cfg: TeacherConfig) -> list[TeacherResponse]:
    """Return the responses to a question that training uses: the first `cfg.responses`, in order of k.

    Hinted responses are not among them. With `cfg.hinted`, they follow.
    """
    plain = [response for response in responses if not response.is_hinted]
    hinted = [response for response in responses if response.is_hinted] if cfg.hinted else []
    return plain[: cfg.responses] + hinted


def score_pool(pool: Pool, questions: Sequence[Question], cfg: TeacherConfig) -> Scores:
    """Score the answers of each question id that training uses. Other questions get no answers."""
    scores = {}
    for question in questions:
        responses = used_responses(pool.get(question.id, []), cfg)
        answers = [score_response(response, question, cfg) for response in responses]
        scores[question.id] = _with_agreement(answers, question, cfg) if question.is_unlabeled else answers
    return scores


def _with_agreement(answers: Sequence[ScoredResponse], question: Question, cfg: TeacherConfig) -> list[ScoredResponse]:
    """Return the answers to a closed question without ground truth, with their agreement as quality."""
    texts = [answer.text for answer in answers if answer.valid]
    scores = iter(agreement(texts, question.task_type, options=question.options, **quality_settings(cfg)))
    return [answer._replace(quality=next(scores)) if answer.valid else answer for answer in answers]


def score_response(response: TeacherResponse, question: Question, cfg: TeacherConfig) -> ScoredResponse:
    """Return validity, reason and quality of one answer. Truncated and filtered answers are always invalid.

    An answer to a closed question without ground truth gets quality 0, because its agreement needs the other answers.
    """
    text, task, options = response.text, question.task_type, question.options
    ended = finish_reason_of(response.finish_reason)
    strict = _strict_reason(text, ended, question)
    as_sent = strict is None if response.raw is None else _strict_reason(response.raw, ended, question) is None
    if cfg.parse == "natural":
        try:
            text, reason = read_response(text, task, options, ended), None
        except Unreadable as error:
            reason = error.reason
    else:
        reason = strict
    if reason is None and SPECIAL_TOKEN.search(text):
        reason = "special_token"
    # JSON can contain lone surrogates.
    if reason is None and not is_unicode(text):
        reason = "not_unicode"
    quality = 0.0
    if reason is None and not question.is_unlabeled:
        quality = quality_score(text, task, question.answer, options=options, **quality_settings(cfg))
        if task == "open" and cfg.open_quality == "lexical":
            quality = word_overlap(answer_body(text), _reference(question))
    return ScoredResponse(response.k, text, reason is None, quality, reason, as_sent, response.is_counted)


def repaired(response: TeacherResponse, question: Question, cfg: TeacherConfig) -> TeacherResponse:
    """Return a response with its canonical text where it can be read, next to the text as sent, and with its scores.

    The text as sent is read again even if the response was repaired before. An invalid answer keeps its text, with the
    reason. The quality is unknown if the question has no answer to compare with.
    """
    sent = replace(response, text=response.raw if response.raw is not None else response.text, raw=None)
    answer = score_response(sent, question, cfg)
    return replace(
        sent,
        text=answer.text,
        raw=sent.text if answer.text != sent.text else None,
        reason=answer.reason,
        valid=answer.valid,
        quality=answer.quality if question.answer is not None else None,
    )


@dataclass(frozen=True)
class RepairedPool:
    """The responses of a repaired pool, and how many were converted to canonical form or are invalid."""

    responses: list[TeacherResponse]
    foreign: int
    """Number of responses to other questions, which are unchanged."""
    rewritten: int
    invalid: int

    def text(self) -> str:
        """Return the counts in words."""
        alone = f", {self.foreign:,} to questions not in the file left unchanged" if self.foreign else ""
        done = f"{self.rewritten:,} converted to canonical form, {self.invalid:,} invalid"
        return f"{counted(len(self.responses), 'answer')}, {done}{alone}"


def repair_pool(pool: Pool, questions: Sequence[Question], cfg: TeacherConfig) -> RepairedPool:
    """Repair every response to the questions; see `repaired`."""
    by_id = {question.id: question for question in questions}
    responses = [response for answers in pool.values() for response in answers]
    written = [repaired(r, by_id[r.id], cfg) if r.id in by_id else r for r in responses]
    ours = [response for response in written if response.id in by_id]
    rewritten = sum(response.raw is not None for response in ours)
    return RepairedPool(written, len(written) - len(ours), rewritten, sum(not response.valid for response in ours))


def describe_changes(pool: Pool, repaired: RepairedPool) -> list[str]:
    """Return how many answers changed their validity, quality or reason, by kind of change and with examples.

    The examples do not depend on the order of the pool, which is that of the server's replies.

    Args:
        pool: the responses before.
        repaired: result of `repair_pool` for this pool.
    """
    before = [response for responses in pool.values() for response in responses]
    kinds: dict[str, list[str]] = defaultdict(list)
    pairs = zip(before, repaired.responses, strict=True)
    for old, new in sorted(pairs, key=lambda pair: (pair[0].id, pair[0].k)):
        if (old.valid, old.quality, old.reason) != (new.valid, new.quality, new.reason):
            qualities = f"{_shown(old.quality)} → {_shown(new.quality)}"
            kinds[_change(old, new)].append(f"{new.id} k={new.k} (quality {qualities})")
    if not kinds:
        return ["no answer changed its validity, quality or reason"]
    changed = sum(map(len, kinds.values()))
    return [f"changed: {changed:,} of {counted(len(before), 'answer')}"] + [
        f"  {kind}: {len(places):,}, such as {', '.join(places[:EXAMPLES])}"
        for kind, places in sorted(kinds.items(), key=lambda entry: -len(entry[1]))
    ]


def _change(old: TeacherResponse, new: TeacherResponse) -> str:
    states = [
        "no score" if response.valid is None else "valid" if response.valid else response.reason or "invalid"
        for response in (old, new)
    ]
    if states[0] != states[1]:
        return " → ".join(states)
    if old.quality is None or new.quality is None:
        return f"{states[1]}, {'unknown quality before' if old.quality is None else 'quality unknown now'}"
    return f"{states[1]}, {'higher' if new.quality > old.quality else 'lower'} quality"


def _shown(quality: float | None) -> str:
    return "unknown" if quality is None else f"{quality:.3g}"


def _reference(question: Question) -> str:
    if question.answer is None:
        raise DataError(
            f"teacher.open_quality=lexical: expected a reference answer to open question {question.id!r}, got none; "
            "add it, or set teacher.open_quality=valid"
        )
    return question.answer


def quality_settings(teacher: TeacherConfig) -> dict:
    """Return metric settings as arguments of `quality_score` and `agreement` of `method.quality`."""
    return {
        "numeric_metric": teacher.numeric_metric,
        "numeric_eps": teacher.numeric_eps,
        "ocr_metric": teacher.ocr_metric,
    }


def _strict_reason(text: str, ended: str | None, question: Question) -> str | None:
    """Return why a text is invalid, considering only the format. `ended` is the result of finish_reason_of."""
    if ended in _NOT_WHOLE:
        return _NOT_WHOLE[ended]
    if not text.strip():
        return "empty"
    if not has_outer_format(text):
        return "format"
    parsed = parse_answer(text, question.task_type, question.options)
    return _NOT_PARSED[question.task_type] if parsed is None else None
