"""Read the rows of a benchmark's annotation: JSON, JSONL, TSV, CSV or parquet, a file or a folder."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rmsd_fast.config import NotInstalled
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.json_records import read_text

# (location for messages, name of the file, row)
Row = tuple[str, Path, dict[str, Any]]
_OPTION = re.compile(r"option[0-9]+|[A-Z]")
SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".parquet")


def annotation_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the annotation files: the file itself, or those in a folder that match the first pattern with any match.

    The shards of parquet are one annotation, and so are the files of a pattern with a range such as `[1-7]`.

    Args:
        path: a file or a folder.
        patterns: glob patterns relative to the folder, in order of preference.
    Raises:
        DataError: the path does not exist, or the folder has no such file, or several of which only one can be meant.
    """
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            todo = "name the annotation file, not a video or an archive"
            raise DataError(f"{path}: expected one of {', '.join(SUFFIXES)}, got '{path.suffix}'; {todo}")
        return [path]
    if not path.is_dir():
        todo = "get the annotation as docs/evaluation.md describes, or set data.heldout"
        raise DataError(f"{path}: no such file or folder; {todo}")
    for pattern in patterns:
        if files := _matches(path, pattern):
            if len(files) > 1 and not (pattern.endswith(".parquet") or "[" in pattern):
                names = ", ".join(str(file.relative_to(path)) for file in files)
                todo = "name one of them in data.heldout, and the folder of the media in data.media_root"
                raise DataError(f"{path}: expected one annotation ({pattern}), got {names}; {todo}")
            return files
    inside = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{path}: expected an annotation of the benchmark ({', '.join(patterns)}), got a folder with {inside}; check "
        "data.heldout, or name the file itself"
    )


def other_annotations(path: Path, patterns: Sequence[str], files: Sequence[Path]) -> list[Path]:
    """Return the annotations in a folder that are not read, because `files` match an earlier pattern."""
    if not path.is_dir():
        return []
    return sorted({file for pattern in patterns for file in _matches(path, pattern)} - set(files))


def _matches(path: Path, pattern: str) -> list[Path]:
    return sorted(file for file in path.glob(pattern) if file.is_file())


def read_rows(files: Sequence[Path]) -> Iterator[Row]:
    """Yield the rows of annotation files in order.

    Raises:
        DataError: a file cannot be read or parsed.
        NotInstalled: a file is parquet, and pyarrow is not installed.
    """
    for path in files:
        reader = {".parquet": _parquet, ".tsv": _table, ".csv": _table, ".jsonl": _lines}.get(
            path.suffix.lower(), _json
        )
        yield from reader(path)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NotInstalled(
            f"{path}: expected the package pyarrow to read parquet, got none; run pip install 'rmsd-fast[benchmarks]', "
            "or name a JSON, JSONL or TSV file in data.heldout"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            number = 0
            # Rows may hold images, so few are in memory at a time.
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    yield f"{path}: row {number}", path, row
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{path}: expected parquet, got a file that cannot be read ({reason}); download it again"
        ) from error


def _table(path: Path) -> Iterator[Row]:
    # Cells may hold images in base64.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(reader, start=1):
            where = f"{path}: row {number}"
            # Cells beyond the header have the key None, and missing cells the value None.
            if None in row or None in row.values():
                expected = f"{len(reader.fieldnames)} cells as in the header"
                raise DataError(f"{where}: expected {expected}, got another number; the file may be truncated")
            yield where, path, {name: _cell(name, value) for name, value in row.items()}
    except csv.Error as error:
        raise DataError(f"{path}: expected a table, got text that cannot be parsed ({error}); fix it") from error


def _cell(name: str, value: str) -> str | None:
    """Return a cell of a table. Tables of pandas write missing values as empty cells or nan; options may be "nan"."""
    return None if not value or (value == "nan" and not _OPTION.fullmatch(name)) else value


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield _object(path, f"{path}:{number}", _parse(f"{path}:{number}", line))


def _json(path: Path) -> Iterator[Row]:
    text = read_text(path)
    value = _parse(str(path), text)
    # A list, {"data": [...]}, or an object of records by name, as WorldSense's.
    if isinstance(value, dict) and len(value) == 1 and isinstance(next(iter(value.values())), list):
        value = next(iter(value.values()))
    if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        for name, item in value.items():
            yield f"{path}: '{name}'", path, {"key": name, **item}
        return
    if not isinstance(value, list):
        raise DataError(f"{path}: expected a list of records, got {type(value).__name__}; check data.heldout")
    for number, item in enumerate(value, start=1):
        yield _object(path, f"{path}: item {number}", item)


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: expected JSON, got text that cannot be parsed ({error}); download it again"
        ) from error


def _object(path: Path, where: str, value: object) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}; check data.heldout")
    return where, path, value
