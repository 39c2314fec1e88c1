"""Create and lock the folder of a run, and compare a resumed run with its saved state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rmsd_fast.config import STAGES, CheckpointError, RunConfig, SettingsError, UserError
from rmsd_fast.files import FolderLock, remove_leftovers, sync_folder, write_text_atomic
from rmsd_fast.models.folders import model_digests
from rmsd_fast.runtime.checkpoint import Checkpoint, compare_fingerprints
from rmsd_fast.runtime.process_group import World, all_gather_objects, on_main
from rmsd_fast.settings import load_settings, save_settings, settings_as_dict, to_yaml
from rmsd_fast.stages.material import Material

# Section and field of the settings that hold the number of steps of each stage.
STEPS = {"sft": ("sft", "steps"), "warm_up": ("discriminator", "warm_up_steps"), "distill": ("distill", "steps")}
STEPS["control"] = STEPS["distill"]
# Settings that a stage reads, if its section also holds settings of another stage.
_ONLY_IN = {
    "warm_up": ("warm_up_steps", "warm_up_lr", "warm_up_accuracy", "head"),
    "control": ("steps", "batch_size", "lr", "warmup_steps", "schedule", "weight_decay", "train_vision"),
}
# Settings and hashes of all input files at the start of the run, and of `stage1/` once stage 1 has ended.
FINGERPRINTS = "fingerprints.json"
# Seconds that the threads of a killed process may take to end and release its lock.
KILLED_S = 5.0


@contextmanager
def run_folder(settings: RunConfig, world: World, resume: Path | None) -> Iterator[Path]:
    """Yield the folder of a run, created if the run is new, and lock it for the duration of the `with` block.

    Args:
        settings: settings of the run.
        world: this process in the run.
        resume: folder of the run to continue; None for a new run.
    Raises:
        Locked: another program writes to the folder.
        SettingsError: the folder cannot be created.
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
    """Return the hashes of the files that the run reads, which must be the same on every node.

    Raises:
        CheckpointError: on all processes, if the hashes differ between nodes.
    """
    digests, fault = None, ""
    if world.local_rank == 0:
        try:
            digests = material.fingerprints()
        except (OSError, UserError) as error:
            fault = f"{error}"
    gathered = all_gather_objects((digests, fault), world)
    if faults := [fault for _, fault in gathered if fault]:
        raise CheckpointError(faults[0])
    first = gathered[0][0]
    for rank, (digests, _) in enumerate(gathered):
        if digests is not None and digests != first:
            changes = compare_fingerprints({"files": first}, {"files": digests}, allow_changes=True)
            raise CheckpointError(
                f"inputs: expected the same files on all nodes, got different ones on the nodes of processes 0 and "
                f"{rank}; copy the files to every node:\n  " + "\n  ".join(changes)
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
            # Either another run has the same name and started in the same second, or `output` is a file.
            if not folder.is_dir():
                raise SettingsError(
                    f"output: expected a folder, got the file {settings.output}; choose another folder"
                ) from None
            number += 1
        except OSError as error:
            raise SettingsError(f"output: cannot create {folder} ({error.strerror}); choose another folder") from error
    try:
        save_settings(settings, folder / "config.yaml")
    except OSError:
        # A run folder without settings is useless, so it is removed.
        with suppress(OSError):
            folder.rmdir()
        raise
    return folder


def check_changes(
    settings: RunConfig, folder: Path, checkpoint: Checkpoint | None, fingerprints: dict, allow_changes: bool
) -> dict:
    """Compare the settings and inputs with the saved run, and apply allowed changes.

    Nothing is written before all checks have passed.

    Args:
        settings: settings of the continued run.
        folder: the run folder.
        checkpoint: the checkpoint to continue from; None if there is none yet.
        fingerprints: current fingerprints of settings and input files.
        allow_changes: whether settings may differ from those of the run.
    Returns:
        The fingerprints, including stage 1 if it is complete.
    """
    former = former_fingerprints(folder, checkpoint)
    now = {key: value for key, value in fingerprints.items() if key in former}
    if "stage1" in former:
        if (folder / "stage1").is_dir():
            now["stage1"] = model_digests(folder / "stage1")
        else:
            # Stage 1 itself checks whether the missing folder can be written again.
            del former["stage1"]
    changes = compare_fingerprints(former, now, allow_changes=allow_changes)
    if allow_changes and not changes:
        raise SettingsError("--allow-changes: expected a change from the run to continue, got none; leave it out")
    if checkpoint is not None:
        _refuse_late_changes(settings, checkpoint.state)
        _refuse_other_models(former, now)
        # After stage 1, the next stage starts with new engines.
        if not (checkpoint.state["stage"] == "sft" and _is_complete("sft", settings, checkpoint.state)):
            _refuse_other_states(former["settings"], now["settings"])
    if changes:
        state = checkpoint.state if checkpoint else None
        _take_changes(settings, folder, keeps=lambda name: _comparable(name, former, now, settings, state))
    return {**fingerprints, **now}


def former_fingerprints(folder: Path, checkpoint: Checkpoint | None) -> dict:
    """Return the fingerprints of the checkpoint, or of the run's start if there is no checkpoint yet.

    They include `stage1` once stage 1 has ended.
    """
    written: dict = {}
    with suppress(OSError, ValueError):
        content = json.loads((folder / FINGERPRINTS).read_text(encoding="utf-8"))
        written = content if isinstance(content, dict) else {}
    if checkpoint is None:
        settings = settings_as_dict(load_settings(str(folder / "config.yaml"), [], resumed=True))
        return {**written, "settings": settings}
    former = dict(checkpoint.state["fingerprints"])
    if "stage1" not in former and "stage1" in written:
        # Between the end of stage 1 and the next checkpoint, only this file records that the stage is complete. Without
        # this record, the stage continues from its last checkpoint and writes the folder again.
        former["stage1"] = written["stage1"]
    return former


def write_fingerprints(folder: Path, fingerprints: dict) -> None:
    write_text_atomic(folder / FINGERPRINTS, json.dumps(fingerprints, indent=1) + "\n")


def _refuse_late_changes(settings: RunConfig, state: dict) -> None:
    """Reject changed settings of completed stages, and fewer steps of the current stage than are already done."""
    former = state["fingerprints"]["settings"]
    now = settings_as_dict(settings)
    for stage in STAGES[: STAGES.index(state["stage"]) + 1]:
        if stage not in former["stages"] or (stage == "control" and stage not in now["stages"]):
            continue
        section, steps = STEPS[stage]
        # The current stage may get more steps, even if it is complete.
        if (
            stage != state["stage"]
            or state.get("finished", False)
            or state["step"] == former[section][steps] == now[section][steps]
        ):
            names = _ONLY_IN.get(stage, now[section])
            late = [name for name in names if now[section][name] != former[section].get(name)]
        else:
            late = [steps] if now[section][steps] < state["step"] else []
        if late:
            done = state["step"] if stage == state["stage"] else former[section][steps]
            if stage == "control" and "distill" in now["stages"]:
                raise SettingsError(
                    f"{section}.{late[0]}={now[section][late[0]]}: expected {former[section][late[0]]}, with which the "
                    "control was trained, since stage 2 is compared with it; leave it out, or start a new run"
                )
            raise SettingsError(
                f"{section}.{late[0]}={now[section][late[0]]} has no effect: {done} of {former[section][steps]} steps "
                f"of {stage} are done; leave it out, or start a new run from the exported student"
            )


# Settings that decide which weights the engines train and which states their optimizers have.
_OF_STATES = (
    *("model.dtype", "model.adapter", "model.lora_rank", "model.lora_alpha", "model.lora_targets", "model.quantize"),
    *("discriminator.mode", "runtime.optimizer"),
)


def _refuse_other_states(former: dict, now: dict) -> None:
    """Reject changes with which the states of the checkpoint's engines could not be loaded or would mean another model.

    Args:
        former, now: settings before and after the changes.
    """
    for setting in _OF_STATES:
        section, _, name = setting.partition(".")
        before, after = former[section].get(name), now[section][name]
        if before is not None and before != after:
            raise SettingsError(
                f"{setting}={after}: expected {before}, with which the checkpoint was written; leave it out, or start "
                "a new run"
            )


def _refuse_other_models(former: dict, now: dict) -> None:
    """Reject another model to start from. With adapters, checkpoints hold only the trained weights."""
    for name, before, after in (
        ("model.path", former["files"].get("model"), now["files"].get("model")),
        ("stage1", former.get("stage1"), now.get("stage1")),
    ):
        if before and after and before != after:
            raise CheckpointError(
                f"{name}: expected the files with which the run started, since its students come from them, got "
                "others; restore the files, or start a new run"
            )


def _comparable(name: str, former: dict, now: dict, settings: RunConfig, state: dict | None) -> bool:
    """Return whether the answers in `predictions/<name>.jsonl` stay comparable with those after the changes.

    Answers during training (`<stage>@<step>`) cannot be generated again, so they need the same evaluation only. Final
    answers must also be those that the students of the changed run would give: from the same model, by a student that
    is not trained further.

    Args:
        name: name of the student.
        former, now: fingerprints before and after the changes.
        settings: settings after the changes.
        state: state of the checkpoint to continue from; None if there is none yet.
    """
    before, after = former["settings"], now["settings"]
    same = _same_answers(before, after) and _heldout_files(former) == _heldout_files(now)
    if not same or "@" in name:
        return same
    if before["model"] != after["model"] or _file(former, "model") != _file(now, "model"):
        return False
    # Sampled answers depend on the seed.
    if before["seed"] != after["seed"] or ("sft" in before["stages"]) != ("sft" in after["stages"]):
        return False
    trained_in = {"stage1": "sft", "control": "control", "stage2": "distill"}.get(name)
    if trained_in not in after["stages"]:
        # The untrained student. Without stage 1, it is called stage1.
        return name == "untrained" or (name == "stage1" and trained_in not in before["stages"])
    return state is not None and _is_complete(trained_in, settings, state)


def _heldout_files(fingerprints: dict) -> dict[str, object]:
    """Return the hashes of the held-out questions by role: one file, or the files of a benchmark's folder."""
    files = fingerprints.get("files", {})
    return {role: digest for role, digest in files.items() if role == "heldout" or role.startswith("heldout/")}


def _file(fingerprints: dict, role: str) -> object:
    return fingerprints.get("files", {}).get(role)


def _is_complete(stage: str, settings: RunConfig, state: dict) -> bool:
    """Return whether a run that continues from a checkpoint takes no more steps of a stage."""
    if state["stage"] != stage:
        return STAGES.index(state["stage"]) > STAGES.index(stage)
    return state.get("finished", False) or state["step"] >= stage_steps(settings, stage)


def _same_answers(former: dict, now: dict) -> bool:
    """Return whether students answer the held-out questions as before, so that earlier answers stay comparable."""
    sections = ("evaluate", "video", "data", "made", "teacher")
    same = all(former.get(name) == now[name] for name in sections)
    return same and former["rollout"].get("temperature") == now["rollout"]["temperature"]


def _take_changes(settings: RunConfig, folder: Path, *, keeps: Callable[[str], bool]) -> None:
    """Save the new settings next to the previous ones, and delete predictions so that they are generated again.

    Args:
        settings: settings of the continued run.
        folder: the run folder.
        keeps: whether the answers of the student with this name are kept.
    """
    number = len(list(folder.glob("config.before-*.yaml"))) + 1
    write_text_atomic(folder / f"config.before-{number}.yaml", (folder / "config.yaml").read_text(encoding="utf-8"))
    write_text_atomic(folder / "config.yaml", to_yaml(settings))
    for path in (folder / "predictions").glob("*.jsonl"):
        if not keeps(path.stem):
            path.unlink()
    (folder / "forecast.json").unlink(missing_ok=True)


def stage_steps(settings: RunConfig, stage: str) -> int:
    section, name = STEPS[stage]
    return getattr(getattr(settings, section), name)
