"""Define the results of the doctor's checks, and the prompts that several checks use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rmsd_fast.data.prompts import Prompt


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: what was checked.
        status: "ok", "warning", "fault" or "skipped".
        text: what was found, and what to do about a fault; one or more lines.
        numbers: measured values by name, for JSON.
    """

    name: str
    status: str
    text: str
    numbers: dict[str, float | int | str | None] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the finding as lines for a terminal."""
        first, *rest = self.text.splitlines() or [""]
        return [f"{self.name:<12} {self.status:<8} {first}", *(f"{'':<22}{line}" for line in rest)]


Show = Callable[[Finding], None]


@dataclass(frozen=True)
class Sample:
    """Prompts of this process, as many as on every other process, and the seconds that reading one of them took."""

    prompts: list[Prompt]
    seconds: float
