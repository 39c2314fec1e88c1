"""Test the run folder: how a run detects that it continues its own work, and lines that wait for the disk."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from rmsd_fast.config import CheckpointError, RunConfig, SettingsError
from rmsd_fast.runtime.json_lines import JsonLines
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings, save_settings, settings_as_dict
from rmsd_fast.stages import run as stage_run
from rmsd_fast.stages import run_folder


def test_changes_to_a_complete_stage_are_errors_before_the_next_checkpoint():
    """The steps of the stage are done, so only additional steps would change anything."""
    former = RunConfig()
    former.sft.steps = 4
    state = {"stage": "sft", "step": 4, "fingerprints": {"settings": settings_as_dict(former)}}
    now = RunConfig()
    now.sft.steps, now.sft.lr = 4, 1e-4
    with pytest.raises(SettingsError, match="sft.lr=0.0001 has no effect: 4 of 4 steps of sft are done"):
        run_folder._refuse_late_changes(now, state)
    now.sft.steps = 6
    run_folder._refuse_late_changes(now, state)
    now.sft.steps = 3
    with pytest.raises(SettingsError, match="sft.steps=3 has no effect"):
        run_folder._refuse_late_changes(now, state)


@pytest.mark.parametrize("content", ["[1, null]", "", "3", "{", "null"])
def test_damaged_fingerprints_are_restored_from_the_checkpoint(tmp_path, content):
    (tmp_path / run_folder.FINGERPRINTS).write_text(content)
    checkpoint = SimpleNamespace(state={"fingerprints": {"files": {"train": "00"}}})
    assert run_folder.former_fingerprints(tmp_path, checkpoint) == {"files": {"train": "00"}}


def test_a_continued_stage_discards_its_output_record(tmp_path):
    """A kill before `stage1/` is replaced must not leave a record that matches the old folder."""
    fingerprints = {"settings": {}, "stage1": {"model.safetensors": "00"}}
    run_folder.write_fingerprints(tmp_path, fingerprints)
    run = SimpleNamespace(folder=tmp_path, fingerprints=fingerprints, world=World(0, 1, 0, torch.device("cpu")))
    assert run_folder.former_fingerprints(tmp_path, SimpleNamespace(state={"fingerprints": {}})) == {
        "stage1": {"model.safetensors": "00"}
    }
    stage_run.forget_stage1(run)
    assert run_folder.former_fingerprints(tmp_path, SimpleNamespace(state={"fingerprints": {}})) == {}


def test_lines_that_cannot_be_written_are_in_the_checkpoint(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(stage_run, "save_checkpoint", lambda *args, state, **_: states.append(state) or True)
    log, metrics = JsonLines(tmp_path / "rollouts.jsonl"), JsonLines(tmp_path / "metrics.jsonl")
    run = stage_run.TrainingRun(
        RunConfig(), World(0, 1, 0, torch.device("cpu")), tmp_path, None, None, metrics, {"rollouts": log}, None, {}
    )
    state = SimpleNamespace(
        policy=SimpleNamespace(full_weights=nullcontext), student=None, skipped_in_a_row=0, accuracies=[]
    )

    def save(step):
        for file in (log, metrics):
            file.append({"n": step})
        assert stage_run.save(run, "sft", step, state, {})
        return states[-1]

    save(1)
    with monkeypatch.context() as failing:
        write = JsonLines._write
        failing.setattr(
            JsonLines,
            "_write",
            lambda self, line: OSError(errno.EIO, os.strerror(errno.EIO)) if self is log else write(self, line),
        )
        save(2)
        saved = save(3)
    assert saved["metrics_lines"] == 3 and saved["log_lines"] == {"rollouts": 1}
    assert saved["waiting"] == {"metrics": [], "rollouts": ['{"n": 2}', '{"n": 3}']}
    # A run that resumes from the checkpoint has these lines, regardless of what was written later.
    assert save(4)["waiting"] == {"metrics": [], "rollouts": []}
    again = JsonLines(tmp_path / "rollouts.jsonl", saved["log_lines"]["rollouts"], saved["waiting"]["rollouts"])
    assert [record["n"] for record in again.records()] == [1, 2, 3]
    again.sync()
    assert again.lines == 3


def test_another_model_to_start_from_is_refused():
    """Checkpoints hold only trained weights, so the others come from this model."""
    former = {"files": {"model": {"model.safetensors": "00"}, "train": "1"}, "stage1": {"model.safetensors": "aa"}}
    run_folder._refuse_other_models(former, {**former, "files": {**former["files"], "train": "2"}})
    with pytest.raises(CheckpointError, match=r"model\.path: expected the files with which the run started"):
        run_folder._refuse_other_models(former, {**former, "files": {"model": {"model.safetensors": "01"}}})
    with pytest.raises(CheckpointError, match="stage1: expected the files with which the run started"):
        run_folder._refuse_other_models(former, {**former, "stage1": {"model.safetensors": "ab"}})


FINAL = {"untrained", "stage1", "control", "stage2"}


def kept_after(folder, override, *, stage="distill", step=1, finished=False, files=None, former=(), before=None):
    """Return the names of the answers that a run with a checkpoint keeps if a setting or a file changes."""
    settings = load_settings("quickstart", list(former))
    save_settings(settings, folder / "config.yaml")
    (folder / "predictions").mkdir()
    for name in (*FINAL, "control@2"):
        (folder / "predictions" / f"{name}.jsonl").write_text("{}\n")
    fingerprints = {"settings": settings_as_dict(settings), "files": before or {"heldout": "00", "train": "00"}}
    state = {"stage": stage, "step": step, "finished": finished, "fingerprints": deepcopy(fingerprints)}
    checkpoint = SimpleNamespace(state=state) if stage else None
    if not stage:
        run_folder.write_fingerprints(folder, fingerprints)
    now = load_settings("quickstart", [*former, override] if override else list(former))
    changed = {"settings": settings_as_dict(now), "files": files or fingerprints["files"]}
    run_folder.check_changes(now, folder, checkpoint, changed, True)
    return {path.stem for path in (folder / "predictions").iterdir()}


@pytest.mark.parametrize(
    ("override", "kept"),
    [
        ("checkpoint.every_steps=7", {"untrained", "stage1", "control", "control@2"}),
        ("runtime.zero_stage=1", {"untrained", "stage1", "control", "control@2"}),
        ("runtime.trackers=[]", {"untrained", "stage1", "control", "control@2"}),
        ("distill.kl_coef=0.5", {"untrained", "stage1", "control", "control@2"}),
        ("model.liger=off", {"control@2"}),
        ("seed=5", {"control@2"}),
        ("evaluate.max_new_tokens=9", set()),
        ("rollout.temperature=0.5", set()),
        ("video.num_frames=4", set()),
    ],
)
def test_changes_keep_the_answers_that_stay_comparable(tmp_path, override, kept):
    """Stage 2 has taken its first step, so answers of its student would be of other weights."""
    assert kept_after(tmp_path, override) == kept


def test_the_answers_of_students_that_are_trained_further_are_deleted(tmp_path):
    control = "stages=[sft,control]"
    cases = (
        ("distill", 60, "runtime.zero_stage=1", (), FINAL),
        ("distill", 60, "distill.steps=61", ("stages=[sft,warm_up,distill]",), {"untrained", "stage1"}),
        ("control", 60, "runtime.zero_stage=1", (control,), {"untrained", "stage1", "control"}),
        ("control", 59, "runtime.zero_stage=1", (control,), {"untrained", "stage1"}),
        ("control", 60, "distill.steps=61", (control,), {"untrained", "stage1"}),
        ("sft", 2, "runtime.zero_stage=1", (), {"untrained"}),
        (None, 0, "runtime.zero_stage=1", (), {"untrained"}),
        # Without stage 1, the model to start from is the student of stage 1.
        ("distill", 1, "runtime.zero_stage=1", ("stages=[warm_up,distill]",), {"untrained", "stage1"}),
        # The model to start from becomes the student of stage 1.
        ("distill", 1, "stages=[warm_up,distill]", (), set()),
    )
    for number, (stage, step, override, former, kept) in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        assert kept_after(tmp_path / str(number), override, stage=stage, step=step, former=former) == {
            *kept,
            "control@2",
        }, (stage, override)


def test_answers_to_other_questions_are_deleted(tmp_path):
    for name, files, kept in (
        ("train", {"heldout": "00", "train": "01"}, {"untrained", "stage1", "control", "control@2"}),
        ("heldout", {"heldout": "01", "train": "00"}, set()),
    ):
        (tmp_path / name).mkdir()
        assert kept_after(tmp_path / name, "", files=files) == kept


@pytest.mark.parametrize("now", [{"heldout/a.json": "01"}, {"heldout/a.json": "00", "heldout/b.json": "00"}, {}])
def test_answers_to_another_benchmark_folder_are_deleted(tmp_path, now):
    """Each annotation in the folder of a benchmark has a role of its own: one is changed, added or removed."""
    before = {"heldout/a.json": "00", "train": "00"}
    assert kept_after(tmp_path, "", before=before, files={"train": "00", **now}) == set()


def test_answers_to_the_same_benchmark_folder_are_kept(tmp_path):
    files = {"heldout/a.json": "00", "heldout/b.json": "00"}
    kept = kept_after(tmp_path, "", before={**files, "train": "00"}, files={**files, "train": "01"})
    assert kept == {"untrained", "stage1", "control", "control@2"}


def test_more_steps_than_the_control_has_taken_are_refused_while_it_is_compared():
    former = load_settings("quickstart")
    state = {"stage": "distill", "step": 5, "fingerprints": {"settings": settings_as_dict(former)}}
    more = load_settings("quickstart", ["distill.steps=90"])
    with pytest.raises(SettingsError, match=r"distill\.steps=90: expected 60, with which the control was trained"):
        run_folder._refuse_late_changes(more, state)
    run_folder._refuse_late_changes(load_settings("quickstart", ["distill.kl_coef=0.5"]), state)
    without = load_settings("quickstart", ["distill.steps=90", "stages=[sft,warm_up,distill]"])
    run_folder._refuse_late_changes(without, state)


def test_settings_of_the_saved_states_are_refused():
    """The checkpoint's engines could not be loaded, or would be another model, so nothing may be written before."""
    former = settings_as_dict(load_settings("quickstart", ["model.adapter=lora", "sft.train_vision=false"]))
    for override in ("model.lora_rank=4", "model.lora_alpha=8", "runtime.optimizer=adamw_8bit"):
        changed = settings_as_dict(
            load_settings("quickstart", ["model.adapter=lora", "sft.train_vision=false", override])
        )
        with pytest.raises(SettingsError, match=f"{override}.*: expected .* with which the checkpoint was written"):
            run_folder._refuse_other_states(former, changed)
    run_folder._refuse_other_states(former, former)
    # Checkpoints of earlier versions do not know every setting.
    del former["runtime"]["optimizer"]
    run_folder._refuse_other_states(former, former | {"runtime": {"optimizer": "adamw"}})
