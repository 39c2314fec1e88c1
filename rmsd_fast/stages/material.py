"""What a run needs before it starts: questions, teacher pool and a model directory, read and checked, made if asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from rmsd_fast.config import NotInstalled, RunConfig, SettingsError
from rmsd_fast.data.clips import make_clips
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.real_clips import write_real_questions
from rmsd_fast.data.records import DataError, Question, load_questions
from rmsd_fast.models.folders import check_family, resolve_folder
from rmsd_fast.models.liger import check_liger
from rmsd_fast.models.students import DTYPES
from rmsd_fast.models.tiny import build_tiny_student
from rmsd_fast.runtime.distributed import World, on_main
from rmsd_fast.teacher.diagnostics import score_pool
from rmsd_fast.teacher.pool import TeacherResponse, check_pool, load_pool
from rmsd_fast.teacher.simulated import is_simulated, write_simulated_pool
from rmsd_fast.teacher.targets import content_score
from rmsd_kernels.implementations import resolve_impl


@dataclass(frozen=True)
class Material:
    """Inputs of a run. `simulated` = the pool was written by the simulated teacher. files: paths by role."""

    train: list[Question]
    heldout: list[Question]
    pool: dict[str, list[TeacherResponse]]
    model_path: str
    simulated: bool
    files: dict[str, str]

    def fingerprints(self) -> dict[str, str]:
        """sha256 of every input file, by role; of the model its configuration and the sizes of its weights."""
        found = {role: _digest(Path(path)) for role, path in self.files.items()}
        folder = resolve_folder(self.model_path)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
        return {**found, "model": f"{_digest(folder / 'config.json')} {sizes}"}


def prepare_material(settings: RunConfig, world: World, *, training: bool = True) -> Material:
    """Read and check what a run needs. With `made.enabled`, the main process makes what is not there yet.

    training=False asks for held-out questions and a model alone.

    Raises:
        UserError: a needed path is not given, a file is damaged, the pool belongs to other questions, the model is of
            another family, or model.liger=on or the losses cannot be here.
    """
    check_liger(settings.model.liger, world.device)
    if training:
        losses_of(settings, world)
    made = on_main(world, lambda: _make(settings)) if settings.made.enabled else {}
    given = {"train": settings.data.train, "heldout": settings.data.heldout, "pool": settings.teacher.pool}
    files = {role: path or made.get(role, "") for role, path in given.items()}
    model_path = settings.model.path or made.get("student", "")
    needed = {"model.path": model_path}
    needed |= {"data.train": files["train"], "teacher.pool": files["pool"]} if training else {}
    needed |= {} if training else {"data.heldout": files["heldout"]}
    for key, path in needed.items():
        if not path:
            raise SettingsError(f"{key}: expected a path, got nothing; give {key}=… or made.enabled=true")
    files = {role: path for role, path in files.items() if path and (training or role == "heldout")}

    def read(role: str) -> list[Question]:
        if role not in files:
            return []
        root = settings.data.media_root or (None if given[role] else made["media_root"])
        questions = load_questions(files[role], media_root=root, format=settings.data.format)
        _check_ground_truths(questions, settings, files[role])
        return questions

    train, heldout = read("train"), read("heldout")
    if settings.evaluate.max_questions:
        heldout = heldout[: settings.evaluate.max_questions]
    pool = load_pool(files["pool"]) if "pool" in files else {}
    if training:
        check_pool(pool, train)
        most = max(len(responses) for responses in pool.values())
        if settings.teacher.responses > most:
            raise SettingsError(
                f"teacher.responses={settings.teacher.responses}: {files['pool']} holds at most {most} responses to "
                f"a question; write teacher.responses={most} or collect more"
            )
        check_usable(pool, train, settings)
    # Before a run folder is made; the main process fetches a hub model, the others find it.
    on_main(world, lambda: check_family(resolve_folder(model_path)))
    return Material(train, heldout, pool, model_path, is_simulated(pool), files)


def losses_of(settings: RunConfig, world: World) -> str:
    """Which implementation `auto` takes for the heads on this device.

    Raises:
        NotInstalled: on CUDA without triton.
    """
    try:
        return resolve_impl("auto", torch.empty(0, dtype=DTYPES[settings.model.dtype], device=world.device))
    except RuntimeError as error:
        raise NotInstalled(f"losses: {error}") from None


def check_usable(pool: dict[str, list[TeacherResponse]], questions: list[Question], settings: RunConfig) -> None:
    """Refuse what would only fail hours later: no response that can be imitated, too many media files missing.

    Raises:
        DataError: says what is missing and where to look.
    """
    scores = score_pool(pool, questions, settings.teacher)
    if not any(quality > 0 for rows in scores.values() for _, quality in rows):
        raise DataError(
            f"teacher pool: no response to any of the {len(questions)} questions is valid and of quality above 0; "
            "expected whole texts <think>…</think><answer>…</answer> whose answer has the task's format"
        )
    media = {path for question in questions for path in (*question.videos, *question.images)}
    missing = sorted(path for path in media if not Path(path).exists())
    gone = set(missing)
    affected = sum(any(path in gone for path in (*q.videos, *q.images)) for q in questions)
    if affected > settings.data.max_bad_share * len(questions):
        raise DataError(
            f"media: {len(missing)} of {len(media)} files are missing, for {affected} of {len(questions)} questions "
            f"(first: {', '.join(missing[:3])}); check data.media_root, or raise data.max_bad_share"
        )


def _check_ground_truths(questions: list[Question], settings: RunConfig, path: str) -> None:
    """What only the metric's settings can judge: e.g. a box beyond 1000 without teacher.spatial_format=pixel."""
    for question in questions:
        try:
            content_score("", question, settings.teacher)
        except ValueError as error:
            raise DataError(f"{path}: question {question.id!r}: {error}") from None


def _make(settings: RunConfig) -> dict[str, str]:
    """Make what is not there yet; paths by role. Names carry a hash of what determines the content."""
    made = settings.made
    if made.source == "clips":
        clips = make_clips(
            made.folder,
            train_clips=made.train_clips,
            heldout_clips=made.heldout_clips,
            questions_per_clip=made.questions_per_clip,
            seed=made.seed,
        )
        folder, train, heldout, root = clips.folder, clips.train, clips.heldout, clips.folder
    else:
        folder = Path(made.folder).absolute() / f"real-clips-{made.seed}"
        train, heldout, root = write_real_questions(folder)
    questions = load_questions(train, media_root=root)
    pool_path = write_simulated_pool(
        folder, questions, k=made.responses, seed=made.seed, error_rate=made.teacher_error_rate
    )
    texts = [question_text(question) for question in questions[:2000]]
    texts += [response.text for responses in list(load_pool(pool_path).values())[:2000] for response in responses]
    student = folder / f"student-{made.student_hidden}x{made.student_layers}-{pool_path.stem}"
    build_tiny_student(student, texts=texts, seed=made.seed, hidden=made.student_hidden, layers=made.student_layers)
    paths = {"train": train, "heldout": heldout, "pool": pool_path, "student": student, "media_root": root}
    return {role: str(path) for role, path in paths.items()}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
