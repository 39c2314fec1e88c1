"""Dump the rollouts of a run (`rollout.dump`), and check a dump before a run trains from it (`rollout.replay`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rmsd_fast.config import ACCURACY_STEPS, RunConfig, SettingsError
from rmsd_fast.data.errors import counted
from rmsd_fast.files import FolderLock, file_digest, remove_leftovers, sync_folder
from rmsd_fast.models.folders import model_digests, resolve_folder
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.rollout.dump import (
    BYTES_PER_ROLLOUT,
    BYTES_PER_TOKEN,
    INFO,
    DumpInfo,
    dumped_steps,
    join,
    pack,
    read_info,
    read_step,
    step_file,
    write_info,
    write_step,
)
from rmsd_fast.runtime.process_group import World, all_gather_objects, on_main
from rmsd_fast.setting_rules.uses import makes_rollouts, rollout_steps, warm_up_steps
from rmsd_fast.stages.material import Material

log = logging.getLogger("rmsd_fast")


@dataclass(frozen=True)
class RolloutDump:
    """The dump that a run writes.

    Attributes:
        folder: the dump.
        key: `DumpInfo.key` of the dump.
        world: this process in the run.
    """

    folder: Path
    key: str
    world: World

    def write(self, groups: Sequence[Sequence[Rollout]], step: int) -> None:
        """Write the rollouts of a step, from all processes. An earlier file of this step is replaced.

        Raises:
            OSError: on all processes, if the disk is full or fails.
        """
        parts = all_gather_objects(pack(groups), self.world)
        on_main(self.world, lambda: write_step(self.folder, step, join(parts), self.key))


@contextmanager
def dump_folder(settings: RunConfig, world: World, resume: Path | None) -> Iterator[None]:
    """Create and lock the folder of `rollout.dump`, if it is set, for the duration of the `with` block.

    Args:
        settings: settings of the run.
        world: this process in the run.
        resume: folder of the run to continue; None for a new run.
    Raises:
        Locked: another run writes to the folder.
        SettingsError: the folder cannot be created, or holds other files.
    """
    lock: FolderLock | None = None

    def take() -> None:
        nonlocal lock
        folder = Path(settings.rollout.dump)
        check_dump_folder(settings, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        except OSError as error:
            raise SettingsError(
                f"rollout.dump: cannot create {folder} ({error.strerror}); choose another folder"
            ) from error
        lock = FolderLock(folder)
        remove_leftovers(folder)

    if settings.rollout.dump:
        on_main(world, take)
    try:
        yield
    finally:
        if lock is not None:
            lock.close()


def check_dump_folder(settings: RunConfig, resume: Path | None) -> None:
    """Raise SettingsError if the folder of `rollout.dump` holds files that are not an earlier part of this run."""
    folder = Path(settings.rollout.dump)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SettingsError(f"rollout.dump: expected a folder, got the file {folder}; choose another folder")
    if (folder / INFO).is_file():
        run = read_info(folder, "rollout.dump").run
        if not dumped_steps(folder) or (resume is not None and run == resume.resolve().name):
            return
        contents = f"the rollouts of {run}"
    else:
        # A lock and temporary files of a killed run.
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if not names:
            return
        contents = names[0]
    raise SettingsError(
        f"rollout.dump: expected a new or empty folder, got {contents} in {folder}; choose another folder, or delete it"
    )


def begin_dump(
    settings: RunConfig, world: World, run_folder: Path, fingerprints: Mapping, student: str, first: int
) -> RolloutDump | None:
    """Describe the dump of this run, and remove the steps that the run takes again.

    Args:
        settings: settings of the run.
        world: this process in the run.
        run_folder: the run folder.
        fingerprints: settings and hashes of all files that the run reads, with those of stage 1.
        student: folder or Hub name of the student with which warm-up and stage 2 begin.
        first: next rollout step.
    Returns:
        The dump, or None if `rollout.dump` is not set.
    Raises:
        SettingsError: earlier steps of the dump were written with other settings.
    """
    if not settings.rollout.dump:
        return None
    folder = Path(settings.rollout.dump)
    info = DumpInfo(
        run=run_folder.resolve().name,
        student=fingerprints["stage1"] if "sft" in settings.stages else fingerprints["files"]["model"],
        student_path=os.path.abspath(student) if os.path.isdir(student) else student,
        questions=fingerprints["files"]["train"],
        settings=_settings(settings),
    )

    def begin() -> None:
        steps = dumped_steps(folder)
        for step in steps:
            if step >= first:
                step_file(folder, step).unlink()
        kept = [step for step in steps if step < first]
        former = read_info(folder, "rollout.dump") if kept else info
        _refuse_other_settings(former.settings, info.settings, f"rollout.dump={folder}")
        if former.key != info.key:
            raise SettingsError(
                f"rollout.dump={folder}: expected the student and the questions of its earlier steps, got others; "
                "choose another folder"
            )
        warm_up = warm_up_steps(settings)
        if missing := _missing_steps(settings, kept, first):
            log.warning(
                "%s: the rollouts of %s before the next step are missing (%s); a run can only replay a dump with all "
                "steps",
                folder,
                counted(len(missing), "step"),
                _name_steps(missing, warm_up),
            )
        write_info(folder, info)

    on_main(world, begin)
    return RolloutDump(folder, info.key, world)


def check_replay_start(settings: RunConfig, material: Material, resume: Path | None) -> list[str]:
    """Check the dump `rollout.replay`, if the run reads one, before the run starts or continues.

    Args:
        settings: settings of the run.
        material: checked inputs of the run.
        resume: folder of the run to continue; None for a new run.
    Returns:
        Lines that describe the dump.
    Raises:
        SettingsError: as `check_replay`, or the run would train stage 1 first.
        DataError: as `check_replay`.
    """
    if not makes_rollouts(settings) or settings.rollout.engine != "replay":
        return []
    student = _start(settings, resolve_folder(material.model_path), resume)
    return check_replay(settings, student, file_digest(material.files["train"]))


def plan_rollout_files(
    settings: RunConfig, model: Path | None, questions: str, resume: Path | None
) -> tuple[list[str], list[str]]:
    """Return lines about the dump that a run would write or read, and lines about what is missing, for a dry run.

    Args:
        settings: settings of the run.
        model: folder of the model; None if it is not known yet.
        questions: hash of the file with the training questions; empty if it is not known yet.
        resume: folder of the run to continue; None for a new run.
    Raises:
        SettingsError, DataError: as `check_dump_folder` and `check_replay_start`.
    """
    rollout = settings.rollout
    if not makes_rollouts(settings):
        return [], []
    if rollout.engine == "replay":
        if not (Path(rollout.replay) / INFO).is_file():
            return [], [
                f"rollout.replay: {os.path.abspath(rollout.replay)}, a folder that a run has written with rollout.dump"
            ]
        return check_replay(settings, _start(settings, model, resume), questions), []
    if rollout.dump:
        check_dump_folder(settings, resume)
        number = len(rollout_steps(settings)) * settings.distill.batch_size * rollout.n
        size = number * (rollout.max_new_tokens * BYTES_PER_TOKEN + BYTES_PER_ROLLOUT)
        return [f"rollout.dump: {number:,} rollouts, at most {size / 2**30:.2f} GiB, in {rollout.dump}"], []
    return [], []


def _start(settings: RunConfig, model: Path | None, resume: Path | None) -> Path | None:
    """Return the folder of the student with which warm-up and stage 2 begin. Raise SettingsError before stage 1."""
    if "sft" not in settings.stages:
        return model
    if resume is not None and (resume / "stage1").is_dir():
        return resume / "stage1"
    info = read_info(Path(settings.rollout.replay), "rollout.replay")
    late = [stage for stage in settings.stages if stage != "sft"]
    raise SettingsError(
        f"stages: expected no sft with rollout.engine=replay, since the rollouts are those of the student with which "
        f"{info.run} began warm-up and stage 2, got [{','.join(settings.stages)}]; set stages=[{','.join(late)}] "
        f"model.path={info.student_path}"
    )


def check_replay(settings: RunConfig, student: Path | None, questions: str) -> list[str]:
    """Check that the run can train from the dump `rollout.replay`, and return lines that describe it.

    Args:
        settings: settings of the run.
        student: folder of the student with which warm-up and stage 2 begin; None if it is not known yet.
        questions: hash of the file with the training questions; empty if it is not known yet.
    Raises:
        SettingsError: the folder is not a dump, was written by another student, with other questions or settings, or
            lacks steps.
        DataError: a file of the dump is damaged.
    """
    folder = Path(settings.rollout.replay)
    where = f"rollout.replay={folder}"
    info = read_info(folder, "rollout.replay")
    _refuse_other_settings(info.settings, _settings(settings), where)
    if questions and questions != info.questions:
        raise SettingsError(
            f"{where}: expected the training questions of {info.run}, which wrote it, got others; set data.train to "
            "the file of that run, with its contents of that time"
        )
    if student is not None and (digests := model_digests(student)) != info.student:
        names = sorted(name for name in {*digests, *info.student} if digests.get(name) != info.student.get(name))
        raise SettingsError(
            f"{where}: expected the student with which {info.run} began its rollouts, got {student}, which differs in "
            f"{', '.join(names[:3])}; set model.path={info.student_path}"
        )
    available = dumped_steps(folder)
    warm_up = warm_up_steps(settings)
    if missing := _missing_steps(settings, available, len(rollout_steps(settings))):
        last = missing[0] - warm_up
        fewer = f"set distill.steps={last}, or " if last > 0 else ""
        complete = f"continue {info.run}, which wrote it, to its end"
        if available and available[-1] > missing[0]:
            complete = "restore the missing files"
            if missing[0] < warm_up and settings.discriminator.warm_up_accuracy is None:
                complete += ", or set discriminator.warm_up_accuracy as in that run"
        raise SettingsError(
            f"{where}: expected the rollouts of every step, got none for {_name_steps(missing, warm_up)}; {fewer}"
            f"{complete}"
        )
    needed = [step for step in available if step in rollout_steps(settings)]
    size = 0
    for step in needed:
        read_step(folder, step, info.key)
        size += step_file(folder, step).stat().st_size
    return [f"rollout.replay: {counted(len(needed), 'step')} of {info.run}, {size / 2**20:.1f} MiB"]


def _missing_steps(settings: RunConfig, available: Sequence[int], following: int) -> list[int]:
    """Return the rollout steps before step `following` that a dump lacks although its run must have taken them.

    A warm-up with `discriminator.warm_up_accuracy` may end early, after at least `ACCURACY_STEPS` steps, and so does
    its replay. The dump then lacks the last steps of the warm-up, and no earlier ones.
    """
    missing = sorted(set(range(following)).difference(available))
    warm_up = warm_up_steps(settings)
    if settings.discriminator.warm_up_accuracy is None or following < warm_up:
        return missing
    end = max((step + 1 for step in available if step < warm_up), default=0)
    return [step for step in missing if step < end or step >= warm_up or end < ACCURACY_STEPS]


def _settings(settings: RunConfig) -> dict:
    """Return the settings on which the rollouts of a student depend, by name."""
    rollout, video = settings.rollout, settings.video
    return {
        "seed": settings.seed,
        "rollout.n": rollout.n,
        "rollout.temperature": rollout.temperature,
        "rollout.max_new_tokens": rollout.max_new_tokens,
        "distill.batch_size": settings.distill.batch_size,
        "discriminator.warm_up_steps": warm_up_steps(settings),
        **{f"video.{name}": value for name, value in vars(video).items()},
    }


def _refuse_other_settings(dumped: Mapping, now: Mapping, where: str) -> None:
    for name in sorted({*dumped, *now}):
        if dumped.get(name) == now.get(name):
            continue
        advice = f"set {name}={dumped.get(name)}"
        if name == "discriminator.warm_up_steps":
            # Without the stage, the number is 0.
            advice = "set stages and discriminator.warm_up_steps as in that run"
        raise SettingsError(
            f"{where}: expected {name}={dumped.get(name)} as in the run that wrote it, got {now.get(name)}; {advice}, "
            "or choose another folder"
        )


def _name_steps(steps: Sequence[int], warm_up_steps: int) -> str:
    """Return rollout steps as the steps of stages: `warm_up steps 3 to 5, distill step 9`."""
    ranges: list[tuple[str, int, int]] = []
    for step in steps:
        stage, number = ("warm_up", step + 1) if step < warm_up_steps else ("distill", step - warm_up_steps + 1)
        if ranges and ranges[-1][0] == stage and ranges[-1][2] == number - 1:
            ranges[-1] = (stage, ranges[-1][1], number)
        else:
            ranges.append((stage, number, number))
    shown = [f"{stage} step {a}" if a == b else f"{stage} steps {a} to {b}" for stage, a, b in ranges[:5]]
    return ", ".join([*shown, *(["…"] if len(ranges) > 5 else [])])
