"""The folder of a run: who may write to it, and whether a run continues what was begun in it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmsd_fast.config import STAGES, CheckpointError, RunConfig, SettingsError, UserError
from rmsd_fast.files import FolderLock, remove_leftovers, sync_folder, write_text_atomic
from rmsd_fast.models.folders import model_digests
from rmsd_fast.runtime.checkpoint import Checkpoint, compare_fingerprints
from rmsd_fast.runtime.process_group import World, all_gather_objects, on_main
from rmsd_fast.settings import load_settings, save_settings, settings_as_dict, to_yaml
from rmsd_fast.stages.material import Material

# Section and field of the settings that tell how many steps a stage has.
STEPS = {"sft": ("sft", "steps"), "warm_up": ("discriminator", "warm_up_steps"), "distill": ("distill", "steps")}
# What the run was started with, and `stage1/` from its end on: settings, and hashes of all files that are read.
FINGERPRINTS = "fingerprints.json"
# The threads of a process that was killed end within this time, and release its lock.
KILLED_S = 5.0


@contextmanager
def run_folder(settings: RunConfig, world: World, resume: Path | None) -> Iterator[Path]:
    """The folder of a run, made if it is a new one, and kept from other programs until the end of the `with` block.

    Raises:
        Locked: another program writes to the folder.
        SettingsError: it cannot be made.
    """
    lock: FolderLock | None = None

    def take() -> Path:
        nonlocal lock
        folder = _new_folder(settings) if resume is None else resume
        lock = FolderLock(folder, wait_s=KILLED_S)
        for written in (folder, folder / "predictions", folder / "checkpoints"):
            remove_leftovers(written)
        return folder

    try:
        yield on_main(world, take)
    finally:
        if lock is not None:
            lock.close()


def digests_of_all_nodes(material: Material, world: World) -> dict:
    """Hashes of the files that the run reads, which every node has to find the same.

    Raises:
        CheckpointError: on all processes, where they differ.
    """
    digests, fault = None, ""
    if world.local_rank == 0:
        try:
            digests = material.fingerprints()
        except (OSError, UserError) as error:
            fault = f"{error}"
    parts = all_gather_objects((digests, fault), world)
    if faults := [fault for _, fault in parts if fault]:
        raise CheckpointError(faults[0])
    first = parts[0][0]
    for rank, (digests, _) in enumerate(parts):
        if digests is not None and digests != first:
            changes = compare_fingerprints({"files": first}, {"files": digests}, allow_changes=True)
            raise CheckpointError(
                f"the node of process {rank} has other files than that of process 0:\n  " + "\n  ".join(changes)
            )
    return first


def _new_folder(settings: RunConfig) -> Path:
    name = f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while True:
        folder = Path(settings.output) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
            break
        except FileExistsError:
            # Of this run's name and second; or a file where `output` should be.
            if not folder.is_dir():
                raise SettingsError(f"output: {settings.output} is a file; choose another folder") from None
            number += 1
        except OSError as error:
            raise SettingsError(f"output: cannot make {folder} ({error.strerror}); choose another folder") from error
    try:
        save_settings(settings, folder / "config.yaml")
    except OSError:
        # A run folder without settings is of no use to anybody.
        with suppress(OSError):
            folder.rmdir()
        raise
    return folder


def check_changes(
    settings: RunConfig, folder: Path, checkpoint: Checkpoint | None, fingerprints: dict, allow_changes: bool
) -> dict:
    """Compare with the run to continue; take over allowed changes. Writes nothing before all is checked.

    Returns:
        The fingerprints, with that of stage 1 where it is done.
    """
    former = former_fingerprints(folder, checkpoint)
    now = {key: value for key, value in fingerprints.items() if key in former}
    if "stage1" in former:
        if (folder / "stage1").is_dir():
            now["stage1"] = model_digests(folder / "stage1")
        else:
            # Whether it can be made again is seen where it is needed.
            del former["stage1"]
    changes = compare_fingerprints(former, now, allow_changes=allow_changes)
    if allow_changes and not changes:
        raise SettingsError("--allow-changes: nothing differs from the run to continue; leave it out")
    if checkpoint is not None:
        _refuse_late_changes(settings, checkpoint.state)
    if changes:
        _take_changes(settings, folder)
    return {**fingerprints, **now}


def former_fingerprints(folder: Path, checkpoint: Checkpoint | None) -> dict:
    """Those of the checkpoint; before the first one, those that the run was started with. `stage1` from its end on."""
    written: dict = {}
    with suppress(OSError, ValueError):
        content = json.loads((folder / FINGERPRINTS).read_text(encoding="utf-8"))
        written = content if isinstance(content, dict) else {}
    if checkpoint is None:
        settings = settings_as_dict(load_settings(str(folder / "config.yaml"), [], resumed=True))
        return {**written, "settings": settings}
    former = dict(checkpoint.state["fingerprints"])
    if "stage1" not in former and "stage1" in written:
        # Between the end of the stage and the next checkpoint the file alone tells. Without it the stage has not come
        # to its end, and its last checkpoint writes the folder again.
        former["stage1"] = written["stage1"]
    return former


def write_fingerprints(folder: Path, fingerprints: dict) -> None:
    write_text_atomic(folder / FINGERPRINTS, json.dumps(fingerprints, indent=1) + "\n")


def _refuse_late_changes(settings: RunConfig, state: dict) -> None:
    """Refuse other settings of stages that are complete, and fewer steps of the last one than are done."""
    former = state["fingerprints"]["settings"]
    now = settings_as_dict(settings)
    for stage in (stage for stage in STAGES[: STAGES.index(state["stage"]) + 1] if stage in former["stages"]):
        section, steps = STEPS[stage]
        # More steps of the last stage are allowed, also where it is complete.
        if stage != state["stage"] or state["step"] == former[section][steps] == now[section][steps]:
            # The discriminator's section has settings of both its stages.
            names = ("warm_up_steps", "warm_up_lr") if stage == "warm_up" else now[section]
            late = [name for name in names if now[section][name] != former[section].get(name)]
        else:
            late = [steps] if now[section][steps] < state["step"] else []
        if late:
            done = state["step"] if stage == state["stage"] else former[section][steps]
            raise SettingsError(
                f"{section}.{late[0]}={now[section][late[0]]} has no effect, {done} of {former[section][steps]} steps "
                f"of {stage} are done; leave it out, or start a new run from the exported student"
            )


def _take_changes(settings: RunConfig, folder: Path) -> None:
    """The settings from here on; those before stay beside them. Answers to the questions so far are asked for again."""
    number = len(list(folder.glob("config.before-*.yaml"))) + 1
    write_text_atomic(folder / f"config.before-{number}.yaml", (folder / "config.yaml").read_text(encoding="utf-8"))
    write_text_atomic(folder / "config.yaml", to_yaml(settings))
    shutil.rmtree(folder / "predictions", ignore_errors=True)


def stage_steps(settings: RunConfig, stage: str) -> int:
    section, name = STEPS[stage]
    return getattr(getattr(settings, section), name)
