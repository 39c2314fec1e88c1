"""Read the token counts and the cost that a server reports with an answer, and price tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

# Names of the token counts: OpenAI and compatible servers, Anthropic, Gemini.
_PROMPT = ("prompt_tokens", "input_tokens", "promptTokenCount")
_COMPLETION = ("completion_tokens", "output_tokens", "candidatesTokenCount")
_TOTAL = ("total_tokens", "totalTokenCount")
# Gemini reports tokens of the reasoning in addition to those of the answer; most others include them.
_MORE_COMPLETION = ("thoughtsTokenCount",)
_COST = ("cost",)
# The collector stores the usage of a reply with its first answer. The others have the number k of that answer here.
WITH = "with"
Tokens = TypeVar("Tokens", float, np.ndarray)


class Usage(NamedTuple):
    """Tokens of prompt and completion, and the cost. NaN if the server did not report a value."""

    prompt_tokens: float
    completion_tokens: float
    cost: float


class Prices(NamedTuple):
    """Prices of a million prompt tokens and of a million completion tokens, in any currency."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: Tokens, completion_tokens: Tokens) -> Tokens:
        """Return the cost of these tokens, for numbers or arrays."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """Return what a server reported. Negative, infinite and other unusable values count as not reported.

    Some servers count reasoning tokens only in the total, so the completion has at least the tokens of the total that
    are not those of the prompt.
    """
    prompt, completion, total, more, cost = (
        _first(usage, names) for names in (_PROMPT, _COMPLETION, _TOTAL, _MORE_COMPLETION, _COST)
    )
    if not math.isnan(more):
        completion += more
    if total - prompt > completion:
        completion = total - prompt
    return Usage(prompt, completion, cost)


def _first(usage: Mapping[str, Any], names: Sequence[str]) -> float:
    for name in names:
        value = usage.get(name)
        # Larger integers are not token counts, and the largest cannot be converted to a float.
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e15:
            return float(value)
    return math.nan
