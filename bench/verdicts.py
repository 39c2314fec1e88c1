"""Words for what records say about a goal; used by claims, video_goals and cuda_goals."""

from __future__ import annotations

from typing import NamedTuple

MET, MISSED, NOT_MEASURED = "met", "MISSED", "NOT MEASURED"

# (reached or not, None: a side is missing; what was found)
Finding = tuple[bool | None, str]


class Verdict(NamedTuple):
    """One goal against one case."""

    status: str
    where: str
    what: str


def rounds_of(*sides: dict) -> str:
    """Of the side that took part in the fewest."""
    return f" (n = {min(side['rounds'] for side in sides)})"
