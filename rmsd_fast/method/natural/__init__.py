"""Natural answers of a teacher in the canonical form `<think>…</think><answer>…</answer>`.

API models seldom keep to a format. `canonical_response` rewrites a response whose answer is clear to a careful reader
and refuses every other one; `invalid_reason` says why. What could be read in two ways is refused, and nothing here
knows a ground truth. The rewards of training stay strict (`method.answers`); this reads teachers and, on request,
evaluations.

Files: `response` finds the answer in a response, with `tags`, `sentences` and `refusals`; `body` rewrites the answer of
one task type, with `options`, `times`, `boxes` and `numbers`; `readings` finds the text that sentences quote
from a picture; `doubts` tests for doubt, denial and correction; `text`
removes markup; `reasons` names what is refused.
"""

from .reasons import REASONS, Unreadable
from .response import canonical_response, invalid_reason, read_response

__all__ = ["REASONS", "Unreadable", "canonical_response", "invalid_reason", "read_response"]
