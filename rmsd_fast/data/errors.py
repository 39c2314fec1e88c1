"""Errors in data files, with the location, the expected value, the actual value, and advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rmsd_fast.config import UserError

# Number of errors of one file that a report lists.
SHOWN_FAULTS = 20


class DataError(UserError, ValueError):
    """Data that the user can fix: `<file>:<line>: field 'x': expected …, got …; what to do`."""

    @classmethod
    def at(cls, where: str, name: str, expected: str, got: object, todo: str) -> DataError:
        """Build an error in the standard wording. `got` is shortened, and None is shown as nothing."""
        return cls(f"{where}: field '{name}': expected {expected}, got {short(got)}; {todo}")


class OtherFileError(DataError):
    """A file of a different kind from the expected one, for example because two were swapped. One record is shown."""


def several_faults(path: Path, faults: Sequence[DataError], records: int) -> DataError:
    """Return one error that lists the problems of a file."""
    if len(faults) == 1:
        return faults[0]
    shown = "".join(f"\n  {fault}" for fault in faults[:SHOWN_FAULTS])
    more = f"\n  and {len(faults) - SHOWN_FAULTS:,} more" if len(faults) > SHOWN_FAULTS else ""
    return DataError(f"{path}: {len(faults):,} of {records:,} records cannot be used:{shown}{more}")


def all_faults(faults: Sequence[UserError]) -> UserError:
    """Return one error that lists the problems of several files."""
    return faults[0] if len(faults) == 1 else DataError("\n".join(str(fault) for fault in faults))


def short(value: object) -> str:
    """Return a value in the form that errors show."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: `1 question`, `2,000 questions`, or `2 processes` if the plural is given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
