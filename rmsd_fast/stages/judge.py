"""Decide which answers a language model judges, what it is asked, and how its replies are read.

Rules score an answer to MathVista and MathVerse if they find it clearly right or wrong. For any other answer, the judge
copies the final answer out of the response (`extract`), and rules compare it with the reference. For MathVerse, the
judge then compares what rules cannot (`score`, 0 or 1). Answers to `what` of V-STaR are graded from 0 to 3 (`grade`),
and 2 or more is right. The judge never sees the reference while it extracts.

The prompts are in our own words. Source of the protocols: the evaluation code of MathVista (arXiv 2310.02255) and
MathVerse (arXiv 2403.14624) in lmms-eval 0.7.3, and eval.py of V-STaR (arXiv 2503.11495).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from rmsd_fast.config import JUDGED
from rmsd_fast.data.benchmarks.record import lettered
from rmsd_fast.data.marks import MARK
from rmsd_fast.data.records import Question, groups_of
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.exact import exact_match, is_decided
from rmsd_fast.method.lenient import boxed_at_end, final_text, stated_letter

# System prompt and prompt of each request.
PROMPTS = {
    "extract": (
        "You read the answers of a model that is being tested. From each of its responses, you copy the final answer. "
        "You never solve the question yourself and never correct a response: a wrong answer is copied as it is.",
        "Question:\n{question}\n\nResponse of the model:\n{response}\n\nThe answer should be {form}. Reply with one "
        "line, 'Answer: ' and the final answer that the response gives, in this form. If it gives none, or several "
        "without a choice among them, reply with 'Answer: NONE'.",
    ),
    "score": (
        "You compare answers to mathematical questions with reference answers. Notation and wording do not matter, nor "
        "do units if the quantities are equal. An answer agrees only if it has the same value or meaning as the "
        "whole reference. The label of an option and its content are the same answer.",
        "Question:\n{question}\n\nReference answer: {truth}\nAnswer: {response}\n\nReply with one line: 'Score: 1' if "
        "the answer agrees with the reference, and 'Score: 0' if it does not.",
    ),
    "grade": (
        "You grade answers to questions about videos. Compare the meaning of an answer with that of the reference "
        "answer; grammar and length do not matter. 3: the same meaning. 2: right in the main, with a small difference "
        "or omission. 1: wrong in the main, with a small part in common. 0: wrong, or nothing in common.",
        "Question: {question}\nReference answer: {truth}\nAnswer: {response}\n\nReply with one line, 'Score: ' and 0, "
        "1, 2 or 3.",
    ),
}
# Raise it if `rules_decide`, `read_reply` or the scores that follow from a reply change.
RULES_VERSION = 2
# Grade from which an answer of V-STaR is right.
LEAST_GRADE = 2
_MOST = {"score": 1, "grade": 3}
_FORMS = {
    "integer": "a whole number",
    "float": "a number with decimals",
    "list": "a list such as [1, 2]",
    "mcq": "the letter of an option",
}
_OTHER_FORM = "a number, an expression or a short text"
_SAYS = r"^[\s*_`#>-]*(?:the )?(?:final |extracted |correct )?answer"
# Lines that begin with "Answer:", and those that begin with "The answer is", which may also be words about an answer.
_ANSWER_LINES = (
    re.compile(rf"{_SAYS}[\s*_`]*:(.*)$", re.IGNORECASE),
    re.compile(rf"{_SAYS}[\s*_`]+is\b(.*)$", re.IGNORECASE),
)
_NONE = re.compile(r"\W*(?:none|null|n/a)\W*", re.IGNORECASE)
# A letter with its mark at the start of what a judge has copied.
_LABEL = re.compile(r"\(?([A-Z])(?:\)|[.:])(?:\s|$)")
# A number, and that after "/" or "out of", which must be the best score.
_VALUE = r"(-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+(?:\.\d+)?))?"
_EDGE = r"[\s*_`.'\"]*"
# A score alone, or with words after it that have no other number.
_ONLY_SCORE = re.compile(
    rf"{_EDGE}(?:(?:score|grade|rating)[\s*_`'\":=]*)?{_VALUE}{_EDGE}(?:[-–—:,(]\D*)?", re.IGNORECASE
)
_SCORES = re.compile(
    rf"\b(?:score|grade|rating)[\s*_`'\"]*[:=][\s*_`'\"]*{_VALUE}(?![\d.]*\d)(?!\s*(?:or|to|-|–|/)\s*\d)", re.IGNORECASE
)


class JudgeRequest(NamedTuple):
    """A request to the judge: its kind, a key of PROMPTS, and its messages."""

    kind: str
    messages: list[dict[str, str]]


def prompts_hash() -> str:
    """Return a hash of the judge's prompts and of RULES_VERSION."""
    text = json.dumps([PROMPTS, _FORMS, _OTHER_FORM, LEAST_GRADE, RULES_VERSION])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_judged(question: Question) -> bool:
    """Return whether the field scores the answers to a question with a language model."""
    benchmark = question.meta.get("benchmark")
    return benchmark in JUDGED and (benchmark != "vstar" or groups_of(question).get("ask") == "what")


def rules_decide(question: Question, response: str, read: str | None) -> bool:
    """Return whether rules score an answer for sure. A response without any answer is wrong for sure.

    An answer to an `mcq` question must be an option and nothing else; see `stated_letter`. Others: see `is_decided`.

    Args:
        question: the question.
        response: the whole response.
        read: the response as `method.lenient` reads it, or None if it finds no answer.
    """
    final = final_text(response)
    if not final:
        return True
    if read is None:
        return False
    answer = parse_answer(read, question.task_type, question.options)
    if question.task_type == "mcq":
        return stated_letter(final, question.options) == answer
    if question.task_type != "exact":
        return True
    if r"\boxed" in final and not exact_match(str(answer), str(question.answer)):
        # The reading takes the content of a box, whatever stands around it.
        return (boxed := boxed_at_end(final)) is not None and is_decided(boxed, str(question.answer))
    return is_decided(str(answer), str(question.answer))


def needs_judge(question: Question, record: Mapping[str, Any]) -> bool:
    """Return whether the judge is asked about an answer.

    Args:
        question: the question.
        record: its prediction; see `stages.answer_records`.
    """
    if "decided" not in record or not final_text(record["response"]):
        return False
    # The authors of V-STaR let their judge grade each answer.
    return question.meta["benchmark"] == "vstar" or not record["decided"]


def judging(question: Question, response: str) -> Generator[JudgeRequest, str | int, dict[str, Any]]:
    """Yield the requests about an answer, receive what `read_reply` reads in the replies, and return the verdict.

    Args:
        question: a question for which `needs_judge` is true.
        response: the whole response.
    Returns:
        `score`, 0.0 or 1.0, with what it follows from: `extracted` (the answer as the judge copied it, "" = none), or
        `grade`, the judge's number.
    """
    benchmark, text = question.meta["benchmark"], final_text(response) or ""
    if benchmark == "vstar":
        grade = yield _ask("grade", question=question.question, truth=question.answer, response=text)
        return {"score": float(grade >= LEAST_GRADE), "grade": grade}
    extracted = yield _ask("extract", question=_shown(question), response=text, form=_form(question))
    if not extracted:
        return {"score": 0.0, "extracted": ""}
    score = _by_rules(question, extracted)
    if score is not None:
        return {"score": score, "extracted": extracted}
    if benchmark == "mathvista":
        return {"score": 0.0, "extracted": extracted}
    problem = question.meta.get("judged_question") or _shown(question)
    grade = yield _ask("score", question=problem, truth=question.answer, response=extracted)
    return {"score": float(grade), "extracted": extracted, "grade": grade}


def read_reply(kind: str, reply: str) -> str | int | None:
    """Return the answer or the score in a judge's reply, or None if it has none that is clear.

    Args:
        kind: key of PROMPTS.
        reply: the reply; a reasoning in `<think>` is left out.
    Returns:
        A text for `extract`, "" if the response has no answer. An integer for `score` and `grade`.
    """
    text = (final_text(reply) or "").strip()
    if kind == "extract":
        answers = set(_copied(text))
        (answer,) = answers if len(answers) == 1 else ("",)
        return ("" if _NONE.fullmatch(answer) else answer) if answer else None
    alone = _ONLY_SCORE.fullmatch(text)
    found = [alone.groups()] if alone else _SCORES.findall(text)
    scores = {_score(number, best, _MOST[kind]) for number, best in found}
    return scores.pop() if len(scores) == 1 else None


def _copied(text: str) -> list[str]:
    """Return the answers in a reply: those in lines that say so, or in the line after it; otherwise each line."""
    lines = [line for line in text.splitlines() if line.strip()]
    for pattern in _ANSWER_LINES:
        stated = []
        for line, following in pairwise([*lines, ""]):
            if match := pattern.match(line):
                stated.append(_without_marks(match[1].strip().removeprefix(":")) or _without_marks(following))
        if stated:
            return stated
    return [_without_marks(line) for line in lines]


def _without_marks(line: str) -> str:
    return line.strip(" \t*_`").strip()


def _score(number: str, best: str | None, most: int) -> int | None:
    """Return a whole score from 0 to `most`, or None. `best` is the number after its slash, if it has one."""
    value = float(number)
    usable = value.is_integer() and 0 <= value <= most and (not best or float(best) == most)
    return int(value) if usable else None


def _ask(kind: str, **fields: object) -> JudgeRequest:
    system, prompt = PROMPTS[kind]
    # One pass over the prompt, so that braces in a question or a response are text.
    content = re.sub(r"\{(\w+)\}", lambda match: str(fields[match[1]]), prompt)
    return JudgeRequest(kind, [{"role": "system", "content": system}, {"role": "user", "content": content}])


def _shown(question: Question) -> str:
    """Return the benchmark's prompt, which has the question, its options and the form of the answer."""
    options = lettered(question.options) if question.options else []
    text = question.prompt or "\n".join([question.question, *options])
    return MARK.sub("", text).strip()


def _form(question: Question) -> str:
    kind = groups_of(question).get("answer_type") if question.task_type == "exact" else "mcq"
    return _FORMS.get(kind, _OTHER_FORM)


def _by_rules(question: Question, extracted: str) -> float | None:
    """Return the score of an answer that the judge has copied, or None if rules cannot decide."""
    if question.task_type == "mcq":
        letter = stated_letter(extracted, question.options)
        if letter is None and question.options and (label := _LABEL.match(extracted)):
            letter = label[1]
        return None if letter is None else float(letter == question.answer)
    return exact_match(extracted, question.answer) if is_decided(extracted, question.answer) else None
