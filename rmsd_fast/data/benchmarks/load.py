"""Load a benchmark: read its annotation, check it, and compare the number of its questions with the published one."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from rmsd_fast.config import BENCHMARKS, SettingsError
from rmsd_fast.data.benchmarks import (
    longvideobench,
    mathverse,
    mathvista,
    mlvu,
    videomme,
    videommmu,
    vstar,
    worldsense,
)
from rmsd_fast.data.benchmarks.record import MediaFolder, Record
from rmsd_fast.data.benchmarks.tables import annotation_files, other_annotations, read_rows
from rmsd_fast.data.errors import DataError, counted, several_faults
from rmsd_fast.data.records import Question
from rmsd_fast.method.quality import parse_ground_truth

log = logging.getLogger("rmsd_fast")

# Most files or cues that a warning names.
MOST_NAMED = 5
_READERS = {
    "videomme": videomme,
    "videommmu": videommmu,
    "worldsense": worldsense,
    "longvideobench": longvideobench,
    "mlvu": mlvu,
    "mathvista": mathvista,
    "mathverse": mathverse,
    "vstar": vstar,
}


def benchmark_files(name: str, path: str | os.PathLike) -> list[Path]:
    """Return the annotation files that `load_benchmark` reads.

    Raises:
        DataError: the path is wrong.
    """
    return annotation_files(Path(path), _READERS[name].PATTERNS)


def load_benchmark(
    name: str,
    path: str | os.PathLike,
    *,
    media_root: str | os.PathLike | None = None,
    follow_symlinks: bool = False,
    image_cache: str | os.PathLike | None = None,
    check_count: bool = True,
    most: int = 0,
    subtitles: bool = False,
    videos: bool = True,
) -> list[Question]:
    """Return the questions of a benchmark, including those whose media are missing.

    `meta["benchmark"]` is the name, and `meta["groups"]` has the values of the breakdown groups by name.

    Args:
        name: one of BENCHMARKS.
        path: the annotation: a file (JSON, JSONL, TSV, CSV, parquet), or the folder of the download.
        media_root: folder that must contain all media, in any subfolders; None or "" means the folder of the
            annotation.
        follow_symlinks: whether symbolic links in the media root may point outside it.
        image_cache: folder for images that the annotation contains; None or "" means
            `$XDG_CACHE_HOME/rmsd_fast/benchmarks`. Each image is written once.
        check_count: whether to warn if the number of questions differs from the published one.
        most: evaluate.max_questions; a warning says if it leaves questions out. 0 = no limit.
        videos: whether questions are asked with their videos. Without them, they still have their images, and questions
            about one video are still one cluster.
        subtitles: whether prompts have subtitles. A warning counts and names missing files and damaged cues.
    Raises:
        DataError: the path is wrong, a required field is missing or damaged, an id occurs twice, or a medium's path is
            outside the root. Several faults of a file are reported together.
        NotInstalled: the annotation is parquet, and pyarrow is not installed.
        SettingsError: the benchmark is unknown.
    """
    if name not in BENCHMARKS:
        raise SettingsError(f"evaluate.benchmark: expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    reader, path = _READERS[name], Path(path)
    files = benchmark_files(name, path)
    root = Path(media_root).absolute() if media_root else (path if path.is_dir() else path.parent).absolute()
    if not root.is_dir():
        raise DataError(
            f"data.media_root: expected the folder of the media of {name}, got {root}, which does not exist"
        )
    cache = Path(image_cache) / "benchmark_images" if image_cache else _cache_folder()
    cache = (cache / name).absolute()
    media = MediaFolder(root, follow_symlinks=follow_symlinks, image_cache=cache, subtitles=subtitles, videos=videos)
    questions: list[Question] = []
    faults: list[DataError] = []
    unknown: Counter[str] = Counter()
    places: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for where, file, row in read_rows(files):
        record = Record(where, file, row, media, seen)
        try:
            for question in reader.read(record):
                _check_answer(where, question)
                if question.id in places:
                    todo = f"it was already used at {places[question.id]}; remove one of the two"
                    raise DataError.at(where, "id", "an id that occurs once", question.id, todo)
                places[question.id] = where
                question = replace(question, meta={**question.meta, "benchmark": name})
                questions.append(question if videos else _without_videos(question))
        except DataError as error:
            faults.append(error)
            continue
        unknown.update(record.unknown(reader.IGNORED))
    if faults:
        raise several_faults(path, faults, len(faults) + len(questions))
    if not questions:
        raise DataError(f"{path}: expected the annotation of {name}, got a file without rows; download it again")
    _check_subtitles(root, media, questions)
    _warn_of_others(path, files, other_annotations(path, reader.PATTERNS, files))
    _warn(name, files[0] if len(files) == 1 else path, unknown, len(questions) if check_count else None)
    if 0 < most < len(questions):
        log.warning(
            "evaluate.max_questions=%d: only the first of %s questions of %s are answered, which may all belong to one "
            "task; the scores are not those of the benchmark",
            most,
            f"{len(questions):,}",
            name,
        )
    return questions


def _without_videos(question: Question) -> Question:
    """Return a question without its videos and their marks."""
    bare = {
        name: text.replace("<video>", "")
        for name in ("question", "prompt")
        if isinstance(text := getattr(question, name), str)
    }
    if question.options:
        bare["options"] = tuple(option.replace("<video>", "") for option in question.options)
    cluster = question.meta.get("cluster") or "\n".join(question.videos)
    return replace(question, videos=(), spans=(), meta={**question.meta, "cluster": cluster}, **bare)


def _check_answer(where: str, question: Question) -> None:
    """Raise DataError if the answer cannot be scored, so that an evaluation does not fail at this question."""
    try:
        parse_ground_truth(question.answer, question.task_type, question.options)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: question {question.id!r}: {error}") from error


def _check_subtitles(root: Path, media: MediaFolder, questions: list[Question]) -> None:
    """Warn of missing subtitle files and damaged cues. Raise DataError if all files are missing."""
    lost = [path for path, digest in media.subtitle_files.items() if digest is None]
    if lost and len(lost) == len(media.subtitle_files):
        raise DataError(
            f"data.media_root={root}: expected subtitle files for evaluate.subtitles, got none, for instance not "
            f"{lost[0]}; extract them below this folder, or set evaluate.subtitles=false"
        )
    if lost:
        asked = sum("subtitles_missing" in question.meta for question in questions)
        log.warning(
            "without subtitles: %s, because %d of %s are missing: %s",
            counted(asked, "question"),
            len(lost),
            counted(len(media.subtitle_files), "subtitle file"),
            ", ".join(lost[:MOST_NAMED]) + (", …" if len(lost) > MOST_NAMED else ""),
        )
    if faults := media.subtitle_faults:
        log.warning(
            "%s in subtitles, which are left out: %s%s",
            counted(len(faults), "damaged cue"),
            "; ".join(faults[:MOST_NAMED]),
            "; …" if len(faults) > MOST_NAMED else "",
        )


def _warn_of_others(path: Path, files: list[Path], others: list[Path]) -> None:
    """Warn of annotations in the folder that are not read. Downloads may contain one in several formats."""
    if others:
        log.warning(
            "%s: the annotation is read from %s, and not from %s; to read another one, name it in data.heldout and the "
            "folder of the media in data.media_root",
            path,
            ", ".join(str(file.relative_to(path)) for file in files),
            ", ".join(str(file.relative_to(path)) for file in others),
        )


def published_counts(name: str) -> tuple[int, ...]:
    """Return the published number of questions of a benchmark, or those of its sets."""
    return _READERS[name].COUNTS


def _warn(name: str, path: Path, unknown: Counter[str], count: int | None) -> None:
    """Warn of fields that the reader does not know, and of a number of questions other than the published one."""
    if unknown:
        log.warning(
            "%s: the reader of %s does not know the fields %s; the annotation may be newer, and other fields may have "
            "another meaning",
            path,
            name,
            ", ".join(map(repr, sorted(unknown))),
        )
    published = _READERS[name].COUNTS
    if count is not None and count not in published:
        log.warning(
            "%s: %s has %s questions, got %s; scores are not comparable with published ones",
            path,
            name,
            " or ".join(f"{number:,}" for number in published),
            f"{count:,}",
        )


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rmsd_fast" / "benchmarks"
