"""Read and check the input files of a run (questions and teacher answers) before anything else happens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rmsd_fast.config import ModelError, RunConfig, SettingsError, UserError
from rmsd_fast.data.benchmarks import load_benchmark
from rmsd_fast.data.errors import DataError, all_faults, counted
from rmsd_fast.data.records import Question, load_questions, question_format
from rmsd_fast.made.teacher import is_simulated
from rmsd_fast.setting_rules.uses import stage_sizes
from rmsd_fast.settings import POOL_SETTINGS, load_settings
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.pool import check_pool, load_pool
from rmsd_fast.teacher.scores import Pool, Scores, score_pool
from rmsd_fast.teacher.summary import Summary, describe_frames, describe_pool, describe_questions

# Errors are reported in this order, regardless of the order of the arguments.
QUESTION_ROLES = ("train", "heldout")


@dataclass(frozen=True)
class Inputs:
    """Questions and teacher answers, read and checked.

    Attributes:
        train: training questions.
        heldout: held-out questions.
        scores: scores of the answers to `train`.
        simulated: whether a simulated teacher wrote the answers.
        statistics: result of pool_statistics; empty without a pool.
        summary: human-readable description of the inputs.
    """

    train: list[Question]
    heldout: list[Question]
    scores: Scores
    simulated: bool
    statistics: dict
    summary: Summary


def read_inputs(
    settings: RunConfig, files: dict[str, str], roots: dict[str, str], *, allow_missing: bool = False
) -> Inputs:
    """Read and check the given files: any of `train`, `heldout` and `pool`.

    Args:
        settings: settings of the run.
        files: path by role.
        roots: media root by role; an empty root means the folder of the file.
        allow_missing: whether any number of media files may be missing.
    Raises:
        DataError: a file is damaged, the pool belongs to other questions or has almost no valid answer, or too many
            media files are missing. All problems found before the answers are scored are raised as one error.
        SettingsError: the pool holds fewer answers per question than requested, or data.task_type has no effect.
    """
    questions, pool = read_files(settings, files, roots)
    train, heldout = questions["train"], questions["heldout"]
    if settings.evaluate.max_questions:
        heldout = heldout[: settings.evaluate.max_questions]
    faults: list[UserError] = [
        DataError(fault)
        for role, asked in (("train", train), ("heldout", heldout))
        if not allow_missing and (fault := missing_media(asked, settings, files.get(role, "")))
    ]
    summary = describe_questions(train, heldout) if train else Summary()
    answered, unanswered = train, []
    if train and pool:
        try:
            unanswered = check_pool(pool, train, max_unanswered_share=settings.teacher.max_unanswered_share)
            answered = leave_out(train, unanswered)
            _check_responses(settings, pool, answered, files["pool"])
        except UserError as error:
            faults.append(error)
    if faults:
        raise all_faults(faults)
    if answered:
        summary += _describe_passes(len(answered), settings)
    scores: Scores = {}
    statistics: dict = {}
    simulated = False
    if train and pool:
        scores = score_pool(pool, answered, settings.teacher)
        simulated = is_simulated(pool)
        statistics = pool_statistics(scores, answered, settings.teacher, simulated=simulated)
        summary += describe_pool(answered, pool, statistics, unanswered, settings)
        summary += describe_frames(answered, pool, settings, _frame_family(settings.model.path))
        if statistics["all"]["reasons"]:
            example = f"python -m rmsd_fast.pool check {files['pool']} {files['train']}"
            if settings.teacher.unlabeled != "refuse":
                example += f" teacher.unlabeled={settings.teacher.unlabeled}"
            summary.lines.append(f"  examples of invalid answers: {example}")
        if summary.faults:
            raise DataError("\n".join([*summary.faults, *summary.lines]))
    return Inputs(answered, heldout, scores, simulated, statistics, summary)


def _describe_passes(questions: int, settings: RunConfig) -> Summary:
    """Describe how often each stage sees the questions."""
    sizes = stage_sizes(settings)
    shares = ", ".join(f"{stage} {steps * batch / questions:.3g}" for stage, (steps, batch) in sizes.items())
    # A stage may leave out questions, and then sees the others more often.
    summary = Summary([f"passes over the {counted(questions, 'question')}, at least: {shares}"])
    large = {"sft" if stage == "sft" else "distill": batch for stage, (_, batch) in sizes.items() if batch > questions}
    for section, batch in large.items():
        summary.warnings.append(
            f"{section}.batch_size={batch} is more than the {counted(questions, 'training question')}, so a step sees "
            "some of them several times; lower it"
        )
    return summary


def _frame_family(path: str) -> str | None:
    """Return the family whose rules choose the student's frames; None if the model is not on this machine."""
    from rmsd_fast.data.preprocess import Preprocessor, load_preprocessor
    from rmsd_fast.models.folders import find_folder

    if not path:
        return Preprocessor().family
    try:
        folder = find_folder(path)
        return load_preprocessor(folder).family if folder else None
    except ModelError:
        # It is reported when the model is opened.
        return None


def read_files(
    settings: RunConfig, files: dict[str, str], roots: dict[str, str]
) -> tuple[dict[str, list[Question]], Pool]:
    """Read questions by role, and teacher answers by question; both are empty if the file is not given.

    Raises:
        DataError: a file is damaged. The problems of all files are raised as one error.
        SettingsError: data.task_type has no effect.
    """
    _check_task_type(settings, files)
    questions: dict[str, list[Question]] = {role: [] for role in QUESTION_ROLES}
    pool: Pool = {}
    faults: list[UserError] = []
    for role in (*QUESTION_ROLES, "pool"):
        if role not in files:
            continue
        try:
            if role == "pool":
                pool = load_pool(files[role])
            else:
                questions[role] = _load_questions(settings, role, files[role], roots[role])
        except DataError as error:
            faults.append(error)
    if faults:
        raise all_faults(faults)
    return questions, pool


def _load_questions(settings: RunConfig, role: str, path: str, root: str) -> list[Question]:
    data = settings.data
    if role == "heldout" and (benchmark := settings.evaluate.benchmark):
        if not data.heldout:
            raise SettingsError(
                f"evaluate.benchmark={benchmark}: expected data.heldout, the benchmark's annotation file or folder, "
                "got nothing; set data.heldout and data.media_root"
            )
        return load_benchmark(
            benchmark,
            path,
            media_root=root,
            follow_symlinks=data.follow_symlinks,
            image_cache=data.disk_cache,
            check_count=not settings.evaluate.max_questions,
            most=settings.evaluate.max_questions or 0,
            subtitles=settings.evaluate.subtitles,
            videos=not settings.evaluate.without_video,
        )
    return load_questions(
        path,
        media_root=root,
        format=data.format,
        task_type=data.task_type,
        require_answer=role == "heldout" or settings.teacher.unlabeled == "refuse",
        follow_symlinks=data.follow_symlinks,
        held_out=role == "heldout",
    )


def read_pool_files(
    program: str,
    also_read: Sequence[str],
    pool: str | os.PathLike,
    questions: str | os.PathLike,
    overrides: Sequence[str],
    *,
    schema: type[RunConfig] = RunConfig,
) -> tuple[RunConfig, list[Question], Pool]:
    """Return settings, questions and teacher answers for a program that has no recipe.

    Args:
        program: name of the program in errors.
        also_read: settings that the program reads, in addition to POOL_SETTINGS.
        pool, questions: the files.
        overrides: `section.field=value` settings.
        schema: RunConfig, or a dataclass that adds sections to it.
    Raises:
        DataError: a file is damaged. The problems of both files are raised as one error.
        SettingsError: an override is unknown, or sets a setting that the program does not read.
    """
    settings = load_settings("", overrides, schema=schema)
    readable = (*POOL_SETTINGS, *also_read)
    for key in (override.partition("=")[0] for override in overrides):
        if key not in readable:
            raise SettingsError(
                f"override: {key} has no effect: {program} reads {', '.join(readable)}; leave {key} out"
            )
    files = {"train": str(questions), "pool": str(pool)}
    loaded, answers = read_files(settings, files, {"train": settings.data.media_root})
    return settings, loaded["train"], answers


def leave_out(questions: list[Question], unanswered: list[str]) -> list[Question]:
    """Return the questions whose ids are not in `unanswered`."""
    ids = set(unanswered)
    return [question for question in questions if question.id not in ids]


def absent_media(questions: Sequence[Question]) -> tuple[list[str], int]:
    """Return the media files of the questions that do not exist, sorted, and the number of all."""
    media = {file for question in questions for file in (*question.videos, *question.images)}
    return sorted(file for file in media if not os.path.exists(file)), len(media)


def missing_media(questions: list[Question], settings: RunConfig, path: str) -> str:
    """Return an error message if so many media files are missing that a run would fail hours later; otherwise ""."""
    absent, media = absent_media(questions)
    missing = set(absent)
    affected = sum(any(file in missing for file in (*q.videos, *q.images)) for q in questions)
    if affected <= settings.data.max_bad_share * len(questions):
        return ""
    return (
        f"{path}: {len(missing):,} of {media:,} media files are missing, for {affected:,} of {len(questions):,} "
        f"questions (first: {', '.join(absent[:3])}); check data.media_root, or raise data.max_bad_share"
    )


def _check_responses(settings: RunConfig, pool: Pool, questions: list[Question], path: str) -> None:
    most = max(sum(not response.is_hinted for response in pool[question.id]) for question in questions)
    if settings.teacher.responses > most:
        raise SettingsError(
            f"teacher.responses: expected at most {most}, the largest number of responses to a question in {path}, "
            f"got {settings.teacher.responses}; set teacher.responses={most} or collect more"
        )


def _check_task_type(settings: RunConfig, files: dict[str, str]) -> None:
    """Reject data.task_type if every question file is in our own format, whose records specify their task types."""
    data = settings.data
    if data.task_type == "auto" or data.format != "auto":
        return
    roles = ("train",) if settings.evaluate.benchmark else QUESTION_ROLES
    paths = [files[role] for role in roles if role in files]
    try:
        formats = {question_format(path) for path in paths}
    except DataError:
        # Reading the file reports this problem together with its other problems.
        return
    if formats == {"rmsd"}:
        raise SettingsError(
            f"data.task_type={data.task_type} has no effect: the records of {' and '.join(paths)} are in our own "
            "format and specify their task types; leave data.task_type out"
        )
