"""Read the JSON objects of a file, each with its location for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rmsd_fast.data.converters import RECORD_KEYS
from rmsd_fast.data.errors import DataError, short

Located = tuple[str, dict[str, Any] | DataError]


class _RepeatedKey(Exception):
    """An object has the same key twice; json.loads would keep the last value. The message says what to do."""


def read_records(path: Path) -> Iterator[Located]:
    """Yield the objects of a JSONL file or a JSON list. A line that cannot be parsed is yielded as an error.

    A list may be the only value of an object, on one line or on several: `{"data": []}`. Other keys next to it are
    rejected, because their values would be lost.
    """
    text = read_text(path)
    # splitlines() would also split at U+2028, which JSON strings may contain.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("["):
        yield from _items(path, _parse_whole(path, text))
    elif _is_one_object([line for _, line in lines[:2]]):
        yield from _whole_object(path, lines[0][0], _parse_whole(path, text))
    else:
        for number, line in lines:
            where = f"{path}:{number}"
            try:
                yield where, parse_record(line, where)
            except DataError as error:
                yield where, error


def parse_record(line: str, where: str) -> dict[str, Any]:
    """Parse one line of JSONL as a dict. Raise DataError if it is not a JSON object."""
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except _RepeatedKey as error:
        raise DataError(f"{where}: {error}") from None
    # ValueError: invalid JSON, or a number with more digits than Python converts.
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected one JSON object per line, got text that cannot be parsed ({error}); fix it"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, got {short(record)}; write one object per line")
    return record


def read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        todo = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new.jsonl"
        raise DataError(f"{path}: expected UTF-8 text, got UTF-16; {todo}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        todo = f"convert it from its encoding, e.g. iconv -f GB18030 -t UTF-8 {path.name} > new.jsonl"
        raise DataError(
            f"{path}: expected UTF-8 text, got byte 0x{data[error.start]:02x} at {error.start} ({error.reason}); {todo}"
        ) from error


def _is_one_object(lines: list[str]) -> bool:
    """Return whether a file that begins with these lines is a single object, on one line or on several.

    In JSONL with a damaged first line, the second line is an object by itself.
    """
    whole = [line.lstrip().startswith("{") and _parses(line) for line in lines]
    return whole == [True] or (whole == [False, False] and lines[0].lstrip().startswith("{"))


def _parses(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse_whole(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _RepeatedKey as error:
        raise DataError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: expected JSON, got text that cannot be parsed ({error}); fix it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object with these keys and values. Raise _RepeatedKey if a key occurs twice."""
    record: dict[str, Any] = {}
    for key, value in pairs:
        if key in record:
            identity = f" in the object of id {short(record['id'])}" if "id" in record else ""
            raise _RepeatedKey(
                f"field {key!r}: expected each key once, got {short(record[key])} and {short(value)}{identity}; "
                "keep one of the two"
            )
        record[key] = value
    return record


def _whole_object(path: Path, line: int, whole: dict[str, Any]) -> Iterator[Located]:
    """Yield the records of a file that is a single object: that object, or the items of its only list of objects."""
    lists = [
        value
        for value in whole.values()
        if isinstance(value, list) and all(isinstance(item, dict) and not _is_turn(item) for item in value)
    ]
    if set(whole) & set(RECORD_KEYS) or not lists:
        yield f"{path}:{line}", whole
        return
    others = [key for key, value in whole.items() if value is not None and value is not lists[0]]
    if others:
        raise DataError(
            f"{path}: expected JSONL (one object per line), a JSON list or an object that holds only one list, "
            f"got one object with the keys {', '.join(map(repr, whole))}; write one record per line, and repeat "
            "shared values in each record"
        )
    yield from _items(path, lists[0])


def _is_turn(item: dict[str, Any]) -> bool:
    """Return whether an object is a turn of a conversation, which is part of a record but not a record."""
    return {"role", "content"} <= set(item) or {"from", "value"} <= set(item)


def _items(path: Path, items: list[Any]) -> Iterator[Located]:
    for index, item in enumerate(items, start=1):
        where = f"{path}: item {index}"
        if isinstance(item, dict):
            yield where, item
        else:
            todo = "write one object per question"
            yield where, DataError(f"{where}: expected a JSON object, got {short(item)}; {todo}")
