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
from typing import Any, NamedTuple

from rmsd_fast.config import JUDGED
from rmsd_fast.data.benchmarks.record import lettered
from rmsd_fast.data.marks import MARK
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import parse_answer
from rmsd_fast.method.exact import exact_match, is_decided
from rmsd_fast.method.lenient import final_text, lenient_response

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
_ANSWER_LINE = re.compile(r"^[\s*_`#>-]*(?:final |extracted )?answer[\s*_`]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_NONE = re.compile(r"\W*(?:none|null|n/a)\W*", re.IGNORECASE)
_ONLY_SCORE = re.compile(r"[\s*_`.'\"]*(?:(?:score|grade|rating)[\s*_`'\":=]*)?(\d)[\s*_`.'\"]*", re.IGNORECASE)
_SCORES = re.compile(r"\b(?:score|grade|rating)[\s*_`'\"]*[:=][\s*_`'\"]*(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class Ask(NamedTuple):
    """A request to the judge: its kind, a key of PROMPTS, and its messages."""

    kind: str
    messages: list[dict[str, str]]


def prompts_hash() -> str:
    """Return a hash of the judge's prompts and of the rules around them."""
    text = json.dumps([PROMPTS, _FORMS, _OTHER_FORM, LEAST_GRADE])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_judged(question: Question) -> bool:
    """Return whether the field scores the answers to a question with a language model."""
    benchmark = question.meta.get("benchmark")
    return benchmark in JUDGED and (benchmark != "vstar" or question.meta["groups"]["ask"] == "what")


def rules_decide(question: Question, response: str, read: str | None) -> bool:
    """Return whether rules score an answer for sure. A response without any answer is wrong for sure.

    Args:
        question: the question.
        response: the whole response.
        read: the response as `method.lenient` reads it, or None if it finds no answer.
    """
    if not final_text(response):
        return True
    if read is None:
        return False
    answer = parse_answer(read, question.task_type, question.options)
    return question.task_type != "exact" or is_decided(str(answer), str(question.answer))


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


def judging(question: Question, response: str) -> Generator[Ask, str | int, dict[str, Any]]:
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
    about = question.meta.get("judged_question") or _shown(question)
    grade = yield _ask("score", question=about, truth=question.answer, response=extracted)
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
        lines = [line.strip(" \t*_`") for line in _ANSWER_LINE.findall(text)] or text.splitlines()
        if len(set(lines)) != 1 or not lines[0].strip():
            return None
        return "" if _NONE.fullmatch(lines[0]) else lines[0].strip()
    alone = _ONLY_SCORE.fullmatch(text)
    scores = {alone[1]} if alone else set(_SCORES.findall(text))
    (score,) = scores if len(scores) == 1 else (None,)
    return int(score) if score in map(str, range(_MOST[kind] + 1)) else None


def _ask(kind: str, **fields: object) -> Ask:
    system, prompt = PROMPTS[kind]
    # One pass over the prompt, so that braces in a question or a response are text.
    content = re.sub(r"\{(\w+)\}", lambda match: str(fields[match[1]]), prompt)
    return Ask(kind, [{"role": "system", "content": system}, {"role": "user", "content": content}])


def _shown(question: Question) -> str:
    """Return the benchmark's prompt, which has the question, its options and the form of the answer."""
    options = lettered(question.options) if question.options else []
    text = question.prompt or "\n".join([question.question, *options])
    return MARK.sub("", text).strip()


def _form(question: Question) -> str:
    kind = question.meta["groups"].get("answer_type") if question.task_type == "exact" else "mcq"
    return _FORMS.get(kind, _OTHER_FORM)


def _by_rules(question: Question, extracted: str) -> float | None:
    """Return the score of an answer that the judge has copied, or None if rules cannot decide."""
    if question.task_type == "mcq":
        read = lenient_response(extracted, "mcq", options=question.options)
        letter = parse_answer(read, "mcq", question.options) if read else None
        return None if letter is None else float(letter == question.answer)
    return exact_match(extracted, question.answer) if is_decided(extracted, question.answer) else None
