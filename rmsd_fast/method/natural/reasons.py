"""Why a response cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

REASONS = {
    "empty": "there is no text",
    "truncated": "the response was cut, at the token limit or by an error of the server",
    "filtered": "a content filter of the server stopped the response",
    "refusal": "the teacher declined to answer",
    "unfinished": "the reasoning or the answer has no end",
    "format": "the response is not <think>…</think><answer>…</answer>",
    "no_answer": "no final answer was found",
    "two_answers": "several different answers were given",
    "not_an_option": "the answer names none of the options",
    "not_an_interval": "the answer is not one interval in seconds",
    "not_a_box": "the answer is not one box x1,y1,x2,y2",
    "not_a_number": "the answer is not one number",
    "a_range": "the answer is a range or a bound, not one number",
    "special_token": "the text holds a special token of the student's tokenizer",
    "not_unicode": "the text holds half of a surrogate pair, which no tokenizer takes",
    "no_think": "the student's chat template opens the response with <think>, and the text does not begin with it",
    "too_long": "the response does not fit micro_tokens beside a prompt",
}


class Unreadable(ValueError):
    """An answer that is not one clear answer; `reason` is a key of REASONS."""

    def __init__(self, reason: str):
        super().__init__(REASONS[reason])
        self.reason = reason


def the_only(answers: Sequence[str]) -> str:
    """The one answer that all of them are; raises Unreadable where they differ."""
    if len(set(answers)) != 1:
        raise Unreadable("two_answers")
    return answers[0]
