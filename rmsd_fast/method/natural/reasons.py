"""The reasons why a response cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

REASONS = {
    "empty": "the response is empty",
    "truncated": "the response was cut off, at the token limit or by an error of the server",
    "filtered": "a content filter of the server stopped the response",
    "refusal": "the teacher declined to answer",
    "unfinished": "the reasoning or the answer is not closed",
    "format": "the response is not <think>…</think><answer>…</answer>",
    "no_answer": "no final answer was found",
    "two_answers": "several different answers were given",
    "not_an_option": "the answer names none of the options",
    "not_an_interval": "the answer is not one interval in seconds",
    "not_a_box": "the answer is not one box x1,y1,x2,y2",
    "not_a_number": "the answer is not one number",
    "a_range": "the answer is a range or a bound, not one number",
    "special_token": "the text contains a special token of the student's tokenizer",
    "not_unicode": "the text contains an unpaired surrogate, which tokenizers reject",
    "no_think": "the student's chat template opens the response with <think>, but the text does not begin with it",
    "too_long": "prompt and response together do not fit in micro_tokens",
}


class Unreadable(ValueError):
    """Raised if a text does not give one clear answer; `reason` is a key of REASONS."""

    def __init__(self, reason: str):
        super().__init__(REASONS[reason])
        self.reason = reason


def the_only(answers: Sequence[str]) -> str:
    """Return the answer if all answers are equal. Raise Unreadable otherwise."""
    if len(set(answers)) != 1:
        raise Unreadable("two_answers")
    return answers[0]
