"""Convert natural answers of a teacher to the canonical form `<think>…</think><answer>…</answer>`.

API models often do not follow a format. `canonical_response` rewrites a response whose answer is clear to a careful
reader, and rejects all other responses, including ambiguous ones. `invalid_reason` returns the reason. Ground truths
are not used. The rewards in training remain strict (`method.answers`). This package reads teacher responses and, with
`evaluate.parse=lenient`, evaluations.

Files: `response` finds the answer in a response, with `tags`, `sentences` and `refusals`. `body` rewrites the answer of
a task type, with `options`, `times`, `boxes` and `numbers`. `readings` finds the text that sentences quote from a
picture. `doubts` detects doubt, denial and correction. `text` removes markup. `reasons` lists the reasons for
rejection.
"""

from .reasons import REASONS, Unreadable
from .response import canonical_response, invalid_reason, read_response

__all__ = ["REASONS", "Unreadable", "canonical_response", "invalid_reason", "read_response"]
