"""A variant of the media path: what its process is started with, what it does, and the processes below it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Spec:
    """Which variant, with which arguments, and how many threads torch may use. What a process is started with."""

    part: str
    variant: str
    arguments: dict[str, Any] = field(default_factory=dict)
    threads: int = 1


@dataclass(frozen=True)
class Work:
    """What a variant does. Built in its process.

    Fields:
        run: the timed call; gets what `prepare` returned.
        prepare: before each call, not measured.
        clean: after each call, not measured; gets what `prepare` returned.
        output: the arrays or tensors of the result, whose bytes are not its fault.
        twice: bytes of the result that two of the processes have mapped at once.
        facts: numbers about the result that belong into the record.
        save: writes the result for comparison.
        library: name and versions.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    clean: Callable[[Any], None] = lambda state: None
    output: Callable[[Any], list[Any]] = lambda result: [result]
    twice: Callable[[Any], int] = lambda result: 0
    facts: Callable[[Any], dict[str, Any]] = lambda result: {}
    save: Callable[[Any, Path], None] | None = None
    library: str = ""


def descendants(pid: int) -> list[int]:
    """Processes below this one, however deep."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                children.setdefault(int(stat_fields(int(entry.name))[1]), []).append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return sorted(found)


def stat_fields(pid: int) -> list[str]:
    """Fields of /proc/pid/stat after the name, which may hold spaces: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
