"""Faults of data files: where they are, what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmsd_fast.config import UserError

# Faults of one file that a report lists.
SHOWN_FAULTS = 20


class DataError(UserError, ValueError):
    """Data that the user can fix: `<file>:<line>: field 'x': expected …, got …; what to do`."""

    @classmethod
    def at(cls, where: str, name: str, expected: str, got: object, todo: str) -> DataError:
        """The error in its usual words; `got` is shown shortened, None as nothing."""
        return cls(f"{where}: field '{name}': expected {expected}, got {short(got)}; {todo}")


class OtherFileError(DataError):
    """A file of another kind than was asked for, as where two were given in the wrong order: one record tells."""


def several_faults(path: Path, faults: Sequence[DataError], records: int) -> DataError:
    """Return one error for all faults of a file."""
    if len(faults) == 1:
        return faults[0]
    shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
    more = f"\n  and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
    return DataError(f"{path}: {len(faults):,} of {records:,} records cannot be used:{shown}{more}")


def all_faults(faults: Sequence[UserError]) -> UserError:
    """Return one error for the faults of several files."""
    return faults[0] if len(faults) == 1 else DataError("\n".join(str(fault) for fault in faults))


def short(value: object) -> str:
    """A value as an error shows it."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 question`, `2,000 questions`, `2 processes` with the plural given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
