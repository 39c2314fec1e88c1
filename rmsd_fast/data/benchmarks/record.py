"""Access the fields of one annotation row, find its media, and write images that the row contains."""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import io
import itertools
import math
import os
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rmsd_fast.data.errors import DataError, short
from rmsd_fast.data.marks import MARK
from rmsd_fast.data.media_paths import media_paths
from rmsd_fast.data.records import Question, parse_id
from rmsd_fast.data.subtitles import read_subtitles
from rmsd_fast.files import replacing, write_all
from rmsd_fast.method.answers import bare_options, option_letters

_ANSWER_TAGS = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
_IMAGE_TYPES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"BM": "bmp", b"RIFF": "webp"}


class MediaFolder:
    """The folder of a benchmark's media, whatever subfolders its download made.

    Args:
        root: absolute path of the folder.
        follow_symlinks: whether symbolic links in it may point outside.
        image_cache: folder for images that annotations contain.
        subtitles: whether questions have subtitles.
        videos: whether questions are asked with their videos.
    Attributes:
        subtitle_files: hash of each subtitle file that was asked for, by its path; None = there is no such file.
        subtitle_faults: a text about each damaged cue.
    """

    def __init__(
        self, root: Path, *, follow_symlinks: bool, image_cache: Path, subtitles: bool = False, videos: bool = True
    ) -> None:
        self.root, self.follow_symlinks, self.image_cache = root, follow_symlinks, image_cache
        self.with_subtitles, self.with_videos = subtitles, videos
        self.subtitle_files: dict[str, str | None] = {}
        self.subtitle_faults: list[str] = []

    def subtitles(self, path: str) -> str | None:
        """Return the hash of a subtitle file, or None if there is no such file. Each file is checked once.

        Raises:
            DataError: the file has no usable cue.
        """
        if path not in self.subtitle_files:
            self.subtitle_files[path] = None
            if os.path.isfile(path):
                self.subtitle_faults += read_subtitles(path).faults
                self.subtitle_files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
        return self.subtitle_files[path]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """Paths of all files below the root by file name, relative to it."""
        files: dict[str, list[str]] = {}
        for folder, _, names in os.walk(self.root, followlinks=self.follow_symlinks):
            for name in names:
                files.setdefault(name, []).append(os.path.relpath(os.path.join(folder, name), self.root))
        return files

    def find(self, where: str, name: str, paths: Sequence[str], guesses: Sequence[str] = ()) -> str:
        """Return the absolute path of a medium.

        It is the first path or guess that exists, otherwise the only file below the root whose absolute path ends with
        a whole path, otherwise the first path, as a missing file. Names without a folder do not count for the second
        step if another path has one, since folders distinguish files of the same name.

        Args:
            where: location of the row.
            name: field that names the medium.
            paths: the medium as the annotation names it, relative to the root or to a folder below it.
            guesses: usual places relative to the root.
        Raises:
            DataError: the path is outside the root, or several files match.
        """
        # Unlike Path.is_file, os.path.isfile accepts names that are too long.
        exists = next((path for path in (*paths, *guesses) if os.path.isfile(self.root / path)), None)
        if exists is None:
            endings = [path for path in paths if os.path.dirname(path)] or paths
            found = {file for path in endings for file in self._ending_with(path)}
            if len(found) > 1:
                todo = "set data.media_root to the folder of one copy"
                raise DataError.at(where, name, "one file of this name below data.media_root", sorted(found)[:3], todo)
            exists = found.pop() if found else paths[0]

        def fail(_: str, expected: str, got: object, todo: str) -> DataError:
            return DataError.at(where, name, expected, got, todo)

        return media_paths([exists], name, self.root, self.follow_symlinks, fail)[0]

    def _ending_with(self, path: str) -> list[str]:
        """Return the files below the root whose absolute path ends with all folders and the name of a path."""
        files = self._by_name.get(os.path.basename(path), ())
        return [file for file in files if str(self.root / file).endswith(f"{os.sep}{path}")]

    def write_image(self, where: str, name: str, data: bytes) -> str:
        """Write an image into the cache folder, if it is not there yet, and return its path."""
        kind = next((kind for start, kind in _IMAGE_TYPES.items() if data.startswith(start)), None)
        if kind is None:
            raise DataError.at(where, name, "a PNG, JPEG, GIF, BMP or WebP image", data[:8], "download the file again")
        path = self.image_cache / f"{hashlib.sha256(data).hexdigest()[:32]}.{kind}"
        if not path.is_file() or path.stat().st_size != len(data):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as file:
                write_all(file, data)
        return str(path)


class Record:
    """One row of an annotation, with the names of the fields that were read.

    Args:
        where: location for messages.
        file: file that contains the row.
        row: the row; null values are missing fields.
        media: folder of the media.
        seen: number of earlier rows by name; see `nth`.
    """

    def __init__(self, where: str, file: Path, row: dict[str, Any], media: MediaFolder, seen: Counter[str]) -> None:
        self.where, self.file, self.media, self._seen = where, file, media, seen
        self.row = {name: value for name, value in row.items() if value is not None}
        self.read: set[str] = set()

    def fail(self, name: str, expected: str, got: object, todo: str) -> DataError:
        return DataError.at(self.where, name, expected, got, todo)

    def get(self, *names: str) -> Any:
        """Return the first present field of several spellings, or None. All of them count as read."""
        self.read |= set(names)
        return next((self.row[name] for name in names if name in self.row), None)

    def need(self, *names: str) -> Any:
        """Return a required field.

        Raises:
            DataError: it is missing. The message lists the fields of the row, since a newer annotation may have renamed
                it.
        """
        value = self.get(*names)
        if value is None:
            got = f"the fields {', '.join(map(repr, self.row)) or 'none'}"
            raise DataError(
                f"{self.where}: expected a field {' or '.join(map(repr, names))}, got {got}; check evaluate.benchmark "
                "and data.heldout: the file may belong to another benchmark, or be newer than this reader"
            )
        return value

    def text(self, *names: str) -> str:
        """Return a required field that must be a text with content."""
        value = self.need(*names)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(names[0], "non-empty text", value, "download the annotation again")
        return value

    def label(self, *names: str) -> str | None:
        """Return an optional field as the name of a group; the items of a list are joined."""
        value = self.get(*names)
        if isinstance(value, str) and value.strip().startswith("["):
            value = self._literal(names[0], value)
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        return None if value is None or value == "" else str(parse_id(value))

    def inner(self, name: str) -> Record:
        """Return a record inside this one, from a field that is an object."""
        self.read.add(name)
        return Record(f"{self.where}: '{name}'", self.file, self.row[name], self.media, self._seen)

    def nth(self, name: str) -> str:
        """Return an id for rows without one: the name and the number of the row among those of this name, from 1."""
        self._seen[name] += 1
        return f"{name}#{self._seen[name]}"

    def groups(self, **names: str | None) -> dict[str, str]:
        """Return the groups whose values are not None."""
        return {name: value for name, value in names.items() if value is not None}

    def list(self, *names: str) -> list[Any] | None:
        """Return an optional field that is a list, also if a table stores it as text; [] is None."""
        value = self.get(*names)
        if isinstance(value, str):
            value = self._literal(names[0], value)
        if value is not None and not isinstance(value, list):
            raise self.fail(names[0], "a list", value, "download the annotation again")
        return value or None

    def options(self, *names: str) -> tuple[str, ...] | None:
        """Return the options as published, with or without letters; None if there are none."""
        options = self.list(*names)
        if options is None:
            return None
        options = [str(option) if isinstance(option, int | float) else option for option in options]
        if not 1 <= len(options) <= 26 or not all(isinstance(option, str) for option in options):
            raise self.fail(names[0], "1 to 26 texts", options, "download the annotation again")
        return tuple(options)

    def choices(self, *names: str) -> tuple[str, ...]:
        """Return the options of a question that must have some."""
        options = self.options(*names)
        if options is None:
            self.need(*names)
            raise self.fail(names[0], "at least one option", self.get(*names), "download the annotation again")
        return options

    def letter(self, options: Sequence[str] | None, *names: str) -> str:
        """Return the letter of the right option, given by its letter, by its text, or by its index from 0.

        A single letter is always a letter, even if another option has this text.
        """
        value = self.need(*names)
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if options is None else option_letters(options)
        if isinstance(value, int) and not isinstance(value, bool):
            if options is not None and 0 <= value < len(options):
                return letters[value]
            raise self.fail(names[0], f"an index from 0 to {len(letters) - 1}", value, "download the annotation again")
        text = value.strip() if isinstance(value, str) else ""
        if tagged := _ANSWER_TAGS.fullmatch(text):
            text = tagged[1].strip()
        alone = text.strip("().").upper()
        if len(alone) == 1 and alone in letters:
            return alone
        texts = [option.strip() for option in options or ()]
        same = [
            text in (option, bare) for option, bare in zip(texts, bare_options(texts) if texts else [], strict=True)
        ]
        if any(same):
            return letters[same.index(True)]
        raise self.fail(names[0], f"a letter among {letters} or an option", value, "download the annotation again")

    def plain_answer(self, *names: str) -> str:
        """Return a required answer that is a text or a number, without `<answer>` tags."""
        value = self.need(*names)
        value = str(parse_id(value)) if isinstance(value, int | float) else value
        if tagged := _ANSWER_TAGS.fullmatch(value if isinstance(value, str) else ""):
            value = tagged[1]
        if not isinstance(value, str) or not value.strip():
            raise self.fail(names[0], "a text or a number", value, "download the annotation again")
        return value.strip()

    def kind(self, kinds: Mapping[str, str], *names: str) -> str:
        """Return the task type of a required field, one of the published spellings."""
        value = self.need(*names)
        if not isinstance(value, str) or value not in kinds:
            expected = f"one of {', '.join(map(repr, kinds))}"
            raise self.fail(
                names[0], expected, value, "the annotation may be newer than this reader; leave the row out"
            )
        return kinds[value]

    def needed_image(self, *names: str) -> str:
        """Return the path of a required image, from the first field that has one; see `image`."""
        for name in names:
            if path := self.image(name):
                return path
        self.need(*names)
        raise self.fail(names[0], "an image", self.get(*names), "download the annotation again")

    def image(self, *names: str) -> str | None:
        """Return the path of an optional image: a path, the bytes of an image, or its base64 text."""
        value = self.get(*names)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and len(value) > 256:
            try:
                value = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise self.fail(names[0], "a path or an image in base64", value, "download the file again") from None
        if isinstance(value, bytes):
            return self.media.write_image(self.where, names[0], value)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.medium(names[0], [value])

    def medium(self, name: str, paths: Iterable[object], guesses: Iterable[object] = ()) -> str:
        """Return the path of a medium below the media root; see `MediaFolder.find`. Only texts count."""
        named, guessed = (
            [os.path.normpath(path) for path in given if isinstance(path, str) and path.strip() and "\0" not in path]
            for given in (paths, guesses)
        )
        if not named:
            raise self.fail(name, "the name of a file", self.row.get(name), "download the annotation again")
        return self.media.find(self.where, name, named, guessed)

    def subtitles(self, paths: Iterable[object], *, shift_s: float = 0.0, least_s: float = 0.0) -> dict[str, Any]:
        """Return the items of `Question.meta` about subtitles; {} unless they are asked for.

        Args:
            paths: the file as the annotation or the download names it, relative to the media root.
            shift_s, least_s: see `data.subtitles.spoken_at`.
        """
        if not self.media.with_subtitles:
            return {}
        path = self.medium("subtitle_path", paths)
        digest = self.media.subtitles(path)
        if digest is None:
            return {"subtitles_missing": path}
        return {"subtitles": {"path": path, "digest": digest, "shift_s": shift_s, "least_s": least_s}}

    def number(self, name: str, *, least: float = -math.inf) -> float:
        """Return a required finite number of at least `least`, also if a table stores it as text."""
        value = self.need(name)
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < least:
            expected = "a number" if least == -math.inf else f"a number of at least {least:g}"
            raise self.fail(name, expected, value, "download the annotation again")
        return number

    def question(self, identity: object, text: str, task: str, **fields: Any) -> Question:
        """Return a question of this row.

        Raises:
            DataError: the id is not a text or a number, or the marks of media in a text are not one for each medium.
        """
        identity = parse_id(identity)
        if not isinstance(identity, str) or not identity.strip():
            raise self.fail("id", "a text or a number", identity, "download the annotation again")
        question = Question(id=identity, question=text.strip(), task_type=task, **fields)
        kinds = sorted(["video"] * len(question.videos) + ["image"] * len(question.images))
        for shown in ("\n".join((question.question, *(question.options or ()))), question.prompt or ""):
            marks = MARK.findall(shown)
            if marks and sorted(marks) != kinds:
                todo = "remove the marks from the text, or add the files"
                raise self.fail("question", f"no marks of media, or one for each of {kinds}", marks, todo)
        return question

    def unknown(self, ignored: Iterable[str]) -> set[str]:
        """Return the names of fields that were neither read nor are known to the reader."""
        return {name for name in self.row if name not in self.read and name not in ignored}

    def _literal(self, name: str, text: str) -> Any:
        """Return the value of a list that a table stores as text, in JSON or as Python writes it."""
        if not text.strip().startswith("["):
            raise self.fail(name, "a list", text, "download the annotation again")
        try:
            value = ast.literal_eval(text.strip())
            faulty = _has_adjacent_texts(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            faulty = True
        if faulty:
            raise self.fail(name, "a list such as ['a', 'b']", short(text), "download the annotation again")
        return value


def _has_adjacent_texts(text: str) -> bool:
    """Return whether two texts follow each other without a comma. numpy writes lists so, and Python joins the texts."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.NEWLINE)]
    return (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds)


def lettered(options: Sequence[str]) -> list[str]:
    """Return the options as "A. text": unchanged if all of them begin like this, otherwise with this label."""
    letters = option_letters(options)
    if all(option.startswith(f"{letter}.") for letter, option in zip(letters, options, strict=True)):
        return list(options)
    bare = bare_options(options)
    texts = options if bare == [option.strip() for option in options] else bare
    return [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
