"""Test the train program as a user starts it: whole runs in their own processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import descendants, wait_until_gone
from safetensors.torch import load_file
from train_runs import (
    MACHINE,
    command,
    environment,
    forget_steps,
    made_files,
    metrics,
    mini_arguments,
    only_run,
    run_train,
    start_train,
)
from warm_process import run_program

from rmsd_fast.files import FolderLock
from rmsd_fast.report_page.curves import GROUPS
from rmsd_fast.runtime.alarms import CONDITIONS

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("made")


# A self-teacher with weights of its own, which checkpoints must contain and processes share.
TAUGHT = (
    *("self_teacher.kind=ema", "self_teacher.ema_rate=0.3", "self_teacher.views=[answer]"),
    *("kd.kind=k1", "credit.magnitude=teacher", "distill.sft_coef=0.3", "teacher.selection=aligned"),
    "credit.uncertainty=instance",
    # The answers to a third of the questions are longer, so some rollouts of a step, and of a process, have no hint.
    *("self_teacher.max_hint_tokens=20", "data.max_bad_share=0.5"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made) -> Path:
    """Return a run of one process without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_train(mini_arguments(folder, made, *TAUGHT, "runtime.check_memory=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memory planned per process: " in done.stderr
    return only_run(folder)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def test_a_run_leaves_the_files_that_the_readme_lists(whole):
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "samples.jsonl", "report.html", "teacher.json"):
        assert (whole / name).stat().st_size > 0, name
    assert list((whole / "tensorboard").rglob("events.*"))
    assert (whole / "checkpoints" / "latest").read_text().strip() == "step_9"
    assert [(line["stage"], line["step"]) for line in metrics(whole)] == [
        *(("sft", step) for step in (1, 2, 3)),
        ("warm_up", 1),
        *(("distill", step) for step in (1, 2, 3, 4, 5)),
    ]
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert list(evaluation["students"]) == ["untrained", "stage1", "stage2"]
    assert evaluation["teacher_simulated"] is True
    assert set(evaluation["differences"]) == {"stage1-untrained", "stage2-stage1"}
    assert not list(whole.rglob("*.tmp"))


def logged_rollouts(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def test_rollouts_of_some_steps_are_logged(whole):
    records = logged_rollouts(whole)
    # Every second step and the last step of each stage are logged, with two questions each.
    steps = [("warm_up", 1), ("distill", 1), ("distill", 3), ("distill", 5)]
    assert [(r["stage"], r["step"]) for r in records] == [step for step in steps for _ in range(2)]
    assert all(len(r["rollouts"]) == 3 and len(r["teacher"]) == 4 for r in records)
    assert {r["advantage"] is None for r in records[0]["rollouts"]} == {True}
    assert all(rollout["advantage"] is not None for record in records[2:] for rollout in record["rollouts"])
    assert "Rollouts while training" in (whole / "report.html").read_text()


def test_every_chart_of_the_report_has_its_metric(whole):
    logged = {key for line in metrics(whole) for key in line}
    drawn = {key for _, charts in GROUPS for chart in charts for key, _ in chart.keys}
    # The settings here turn the corrections for mismatch off, so their metrics are missing.
    off = {"policy/tis_capped_fraction", "policy/sequence_masked_fraction"}
    # Other tests have these: that of divergences on two processes below, and that of a judge's feedback.
    off |= {"kd/divergence", "credit/overlap", "credit/prune_weight", "self_teacher/feedback_share"}
    machine = {key for key in drawn if key.startswith(MACHINE)}
    assert drawn - machine - off <= logged
    assert logged - drawn <= {"stage", "step", "tokens_computed"}
    assert {condition.metric for condition in CONDITIONS} - off <= logged


def test_training_changed_the_student(whole):
    stage1, stage2 = load_file(whole / "stage1" / "model.safetensors"), weights(whole)
    changed = {name for name in stage1 if not torch.equal(stage1[name], stage2[name])}
    assert any("language_model" in name for name in changed)
    # Stage 2 does not change the vision tower and the mergers.
    assert not any("visual" in name for name in changed)
    first = metrics(whole)[0]
    assert abs(first["loss"] - math.log(600)) < 1.5


def test_export_gives_the_same_logits_in_plain_transformers(whole):
    from transformers import AutoModelForImageTextToText

    from rmsd_fast.config import VideoConfig
    from rmsd_fast.data.packing import make_rows
    from rmsd_fast.data.preprocess import video_patches
    from rmsd_fast.data.prompts import PromptBuilder
    from rmsd_fast.data.records import load_questions
    from rmsd_fast.models.students import encode_media, forward_hidden, load_student

    student = load_student(whole / "export", dtype="float32")
    plain = AutoModelForImageTextToText.from_pretrained(whole / "export", dtype=torch.float32)
    question = load_questions(next(whole.parent.parent.glob("made*/*/heldout.jsonl")))[0]
    builder = PromptBuilder(student, VideoConfig(num_frames=8))
    prompt = builder.build(question)
    responses = [[builder.encode_response("<think>a</think><answer>B</answer>")]]
    rows = make_rows("padded", [prompt], responses, pad_id=0)
    with torch.no_grad():
        ours = student.model.lm_head(forward_hidden(student.model, rows, encode_media(student.model, [prompt])))
        types = torch.zeros_like(rows.input_ids)
        types[0, : len(prompt.mm_token_type_ids)] = prompt.mm_token_type_ids
        theirs = plain(
            input_ids=rows.input_ids,
            mm_token_type_ids=types,
            attention_mask=rows.attention_mask,
            pixel_values_videos=video_patches(prompt.media[0].pixels, prompt.media[0].preprocessor),
            video_grid_thw=torch.tensor([prompt.media[0].grid_thw]),
        ).logits
    assert (ours - theirs).abs().max() < 1e-4


# Prompts have 71 to 95 tokens and rollouts mostly 12. In 140 tokens no group of 8 rollouts fits, with or without its
# teacher responses, and the processes need different numbers of micro-batches. The tower is frozen from the start.
# With a zero head, the first gradient of the head's bias is a rounding error, which AdamW turns into a visible step.
LARGE = ("rollout.n=8", "sft.train_vision=false", "discriminator.head=random")
SPLIT = (*LARGE, "data.max_prompt_tokens=100", "micro_tokens=140")


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory, made) -> Path:
    folder = tmp_path_factory.mktemp("unsplit")
    done = run_train(mini_arguments(folder, made, *LARGE, "micro_tokens=4000"))
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(folder)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_give_the_metrics_of_one(whole, made, tmp_path, zero_stage):
    arguments = mini_arguments(tmp_path, made, *TAUGHT, f"runtime.zero_stage={zero_stage}")
    # Interpreters of their own have different hash seeds, as those of users.
    done = run_train(arguments, processes=2, warm=zero_stage == 3)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path)
    compare_metrics(whole, run)
    assert any(0 < line["self_teacher/hinted_share"] < 1 for line in metrics(run) if line["stage"] == "distill")
    # The main process has the first half of the questions of a step, which are those that one process logs.
    for one, two in zip(logged_rollouts(whole), logged_rollouts(run), strict=True):
        assert [one[key] for key in ("stage", "step", "id")] == [two[key] for key in ("stage", "step", "id")]
        assert [r["text"] for r in one["rollouts"]] == [r["text"] for r in two["rollouts"]]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_with_split_groups_give_the_metrics_of_one(unsplit, made, tmp_path, zero_stage):
    done = run_train(mini_arguments(tmp_path, made, *SPLIT, f"runtime.zero_stage={zero_stage}"), processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    split = only_run(tmp_path)
    compare_metrics(unsplit, split)
    tokens = [[line["tokens_computed"] for line in metrics(run) if line["stage"] != "sft"] for run in (unsplit, split)]
    assert all(b > 1.2 * a for a, b in zip(*tokens, strict=True))


def compare_metrics(first: Path, second: Path) -> None:
    one, two = metrics(first), metrics(second)
    assert len(one) == len(two) == 9
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        # Parts of groups read their prompt again, and fillers read tokens of another micro-batch.
        for key, value in ((key, value) for key, value in a.items() if key != "tokens_computed"):
            if isinstance(value, float):
                # The correlation is a ratio of small differences of scores, which amplifies rounding errors.
                close = 1e-4 if key == "discriminator/length_correlation" else 1e-5
                assert value == pytest.approx(b[key], rel=close, abs=close), (a["stage"], a["step"], key)
            else:
                assert value == b[key]


def test_two_processes_distill_distributions_as_one(made, tmp_path):
    taught = ("self_teacher.kind=ema", "self_teacher.ema_rate=0.3", "self_teacher.views=[answer]")
    taught += ("kd.kind=forward_kl", "kd.vocab_clip=0.5", "credit.prune=overlap", "credit.magnitude=teacher")
    # Rollouts of a third of the questions have no hint, so the processes' passes differ.
    taught += ("credit.magnitude_topk=4", "self_teacher.max_hint_tokens=20", "data.max_bad_share=0.5")
    runs = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = run_train(mini_arguments(folder, made, *taught, "runtime.zero_stage=3"), processes=processes, warm=True)
        assert done.returncode == 0, done.stderr[-3000:]
        runs.append(only_run(folder))
    compare_metrics(*runs)
    lines = [line for line in metrics(runs[1]) if line["stage"] == "distill"]
    assert all(line["kd/divergence"] > 0 and 0 < line["credit/overlap"] < 1 for line in lines)
    assert all(0.5 <= line["credit/prune_weight"] <= 1.5 for line in lines)


@pytest.mark.parametrize("line", [2, 6], ids=["in stage 1", "in stage 2"])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(whole, made, tmp_path, line):
    arguments = mini_arguments(tmp_path, made, *TAUGHT, "checkpoint.every_steps=1")
    process = start_train(arguments)
    _wait_for_lines(process, tmp_path, line)
    process.kill()
    process.wait()
    killed = only_run(tmp_path)
    assert not (killed / "export").exists()
    # All lines after the checkpoint are written again.
    with (killed / "rollouts.jsonl").open("a") as file:
        file.write('{"stage": "distill", "step": 3, "id": "after the checkpoint"}\n{"stage": "dist')
    done = run_train(["--resume", str(killed)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(killed) == metrics(whole)
    assert (killed / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    gaps = [line["self_teacher/gap"] for line in metrics(whole) if line["stage"] == "distill"]
    assert len(set(gaps)) == 5
    expected, got = weights(whole), weights(killed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    ("stage", "before", "after", "zero_stage"), [("sft", 1, 2, 2), ("distill", 2, 1, 3), ("distill", 1, 2, 0)]
)
def test_a_run_continues_with_another_number_of_processes(whole, made, tmp_path, stage, before, after, zero_stage):
    """Only the steps after the checkpoint run again, and their metrics are those of an uninterrupted run."""
    overrides = ["checkpoint.every_steps=1", "checkpoint.keep=9", f"runtime.zero_stage={zero_stage}"]
    done = run_train(mini_arguments(tmp_path, made, *TAUGHT, *overrides), processes=before)
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path)
    forget_steps(run, after={"sft": 2, "distill": 6}[stage])
    if stage == "sft":
        shutil.rmtree(run / "stage1")
    done = run_train(["--resume", str(run)], processes=after)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"was saved by {before} process" in done.stderr
    compare_metrics(whole, run)
    expected, got = weights(whole), weights(run)
    # AdamW enlarges rounding errors of tiny gradients. Uninterrupted runs of one and of two processes differ as much.
    assert all((expected[name] - got[name]).abs().max() < 3e-5 for name in expected)


def test_sigterm_saves_and_ends_with_0(whole, made, tmp_path):
    errors = tmp_path / "errors"
    process = start_train(mini_arguments(tmp_path, made, "checkpoint.every_steps=0"), stderr=errors)
    _wait_for_lines(process, tmp_path, 1)
    decoders = descendants(process.pid)
    # A fork server has a worker.
    assert any(map(descendants, decoders))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    for pid in decoders:
        wait_until_gone(pid)
    assert "--resume" in errors.read_text()
    assert list((only_run(tmp_path) / "checkpoints").glob("step_*/manifest.json"))


def test_a_continued_run_is_evaluated_again(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = metrics(run)
    done = run_train(["--resume", str(run), "--allow-changes", "distill.steps=6"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics(run)[:-1] == before and metrics(run)[-1]["step"] == 6
    assert (run / "config.before-1.yaml").read_text() == (whole / "config.yaml").read_text()
    assert "steps: 6" in (run / "config.yaml").read_text()
    old, new = ((folder / "predictions" / "stage2.jsonl").stat().st_mtime_ns for folder in (whole, run))
    assert new > old
    expected, got = weights(whole), weights(run)
    assert any(not torch.equal(expected[name], got[name]) for name in expected)


def test_evaluate_gives_the_scores_of_the_run(whole, made, tmp_path):
    output = tmp_path / "evaluation.json"
    # The settings of the run include those of training, which the program refuses only as overrides.
    arguments = [str(whole / "config.yaml"), f"model.path={whole / 'export'}", "--output", str(output)]
    done = run_program("rmsd_fast.evaluate", arguments, environment(), timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = json.loads((whole / "evaluation.json").read_text())
    assert json.loads(output.read_text())["students"]["model"] == expected["students"]["stage2"]
    assert "closed" in done.stdout


def test_bad_videos_do_not_end_a_run(tmp_path):
    made = tmp_path / "made"
    late = ("rollout.", "distill.", "discriminator.", "sft.steps")
    mini = [a for a in mini_arguments(tmp_path / "first", made) if not a.startswith(late)] + ["stages=[sft]"]
    first = run_train([*mini, "sft.steps=1"])
    assert first.returncode == 0, first.stderr[-3000:]
    clips = sorted(made.glob("*/clips/train-*.mp4"))
    assert len(clips) == 24
    clips[0].write_bytes(b"no video")
    clips[1].unlink()
    clips[2].write_bytes(clips[2].read_bytes()[:700])
    arguments = [*mini, "sft.steps=9"]
    stopped = run_train(arguments)
    assert stopped.returncode == 2 and "data.max_bad_share" in stopped.stderr
    done = run_train([*arguments, "data.max_bad_share=0.5", f"output={tmp_path / 'third'}"])
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path / "third")
    listed = [json.loads(line) for line in (run / "bad_media.jsonl").read_text().splitlines()]
    # Nine steps of eight questions are one epoch, so each of the three questions of the three clips occurs once.
    assert {line["id"][:11] for line in listed} == {"train-00000", "train-00001", "train-00002"}
    assert metrics(run)[-1]["samples/bad"] >= 9
    assert len(metrics(run)) == 9


def test_a_user_error_exits_with_2_and_one_line(tmp_path):
    done = run_train(["quickstart", "sft.stepz=3"])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("rmsd_fast.train: override: unknown setting sft.stepz")
    assert "Traceback" not in done.stderr


def _wait_for_text(process, text: str) -> None:
    """Wait until a process has written a text to its stderr, even if the line has not ended."""
    read = ""
    while text not in read:
        letter = process.stderr.read(1)
        assert letter, "the run ended before it could be interrupted"
        read += letter


def _wait_for_lines(process, folder: Path, lines: int) -> None:
    for _ in range(3000):
        found = list(folder.glob("*/metrics.jsonl"))
        if found and len(found[0].read_bytes().splitlines()) >= lines:
            return
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    raise AssertionError("the run wrote no metrics")


def test_the_control_imitates_the_questions_of_stage_2_from_the_stage_1_student(tmp_path, made):
    """The control does not depend on whether stage 2 follows it."""
    late = ("rollout.", "discriminator.")
    without = [a for a in mini_arguments(tmp_path / "a", made) if not a.startswith(late)]
    content = ["stages=[sft,control,distill]", "reward.alpha=0", "teacher.empty_pools=drop"]
    every = [a for a in mini_arguments(tmp_path / "b", made, *content) if not a.startswith("discriminator.")]
    for arguments in ([*without, "stages=[sft,control]"], every):
        done = run_train(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, both = only_run(tmp_path / "a"), only_run(tmp_path / "b")
    controls = [load_file(run / "control" / "model.safetensors") for run in (alone, both)]
    stage1 = load_file(alone / "stage1" / "model.safetensors")
    assert all(torch.equal(controls[0][name], controls[1][name]) for name in stage1)
    assert any(not torch.equal(controls[0][name], stage1[name]) for name in stage1)
    evaluation = json.loads((both / "evaluation.json").read_text())
    assert list(evaluation["students"]) == ["untrained", "stage1", "stage2", "control"]
    assert list(evaluation["differences"])[1:] == ["stage2-stage1", "control-stage1", "stage2-control"]
    assert [line["step"] for line in metrics(both) if line["stage"] == "control"] == [1, 2, 3, 4, 5]
    assert "Control: imitation in place of stage 2" in (both / "report.html").read_text()


def test_resume_refuses_other_settings(whole):
    done = run_train(["--resume", str(whole), "distill.lr=1e-3"])
    assert done.returncode == 2
    assert "distill.lr" in done.stderr and "--allow-changes" in done.stderr
    assert "Traceback" not in done.stderr


def copy_of(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.mark.parametrize(
    "lost",
    [
        ("evaluation.json", "report.html"),
        ("samples.jsonl",),
        ("predictions/stage2.jsonl", "evaluation.json"),
        ("stage1", "fingerprints.json"),
    ],
    ids=" ".join,
)
def test_a_resume_writes_the_files_that_a_kill_prevented(whole, tmp_path, lost):
    """A resume writes the files that a kill left out and changes no other file of the run."""
    run = copy_of(whole, tmp_path)
    expected = made_files(run)
    for name in lost:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # A kill while writing leaves these folders.
    (run / ".export.tmp").mkdir()
    (run / ".evaluation.json.99999999.tmp").write_text("{")
    (run / "checkpoints" / ".step_7.removed.tmp").mkdir()
    done = run_train(["--resume", str(run)])
    if "stage1" in lost:
        assert done.returncode == 2 and "stage1 is missing" in done.stderr and "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stderr[-3000:]
    assert made_files(run) == expected
    assert (run / "report.html").stat().st_size > 0
    assert not list(run.rglob("*.tmp"))


def change(path: Path) -> None:
    """Change a bit of the weights, or a byte of another file that parsers ignore."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        content[-5] ^= 1
    else:
        content += b"\n"
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "chat_template.jinja", "tokenizer.json", "preprocessor_config.json"]
)
@pytest.mark.parametrize("folder", ["stage1", "model.path"])
def test_resume_refuses_another_model(whole, made, tmp_path, folder, name):
    """Change a bit of any file that a student is loaded from, at the start of stage 2 or of the run."""
    run = copy_of(whole, tmp_path)
    if folder == "stage1":
        change(run / "stage1" / name)
        key = f"stage1.{name}"
    else:
        here = Path(shutil.copytree(made, tmp_path / "made"))
        for student in here.glob("*/student-*"):
            change(student / name)
        config = run / "config.yaml"
        config.write_text(config.read_text().replace(str(made), str(here)))
        key = f"files.model.{name}"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    done = run_train(["--resume", str(run)])
    assert done.returncode == 2, done.stderr[-3000:]
    assert f"{key}: was" in done.stderr and "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"} == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--allow-changes"], "--allow-changes: expected a change"),
        (["--allow-changes", "distill.steps=5"], "--allow-changes: expected a change"),
        (["--allow-changes", "sft.steps=4"], "sft.steps=4 has no effect: 3 of 3 steps of sft are done"),
        (["--allow-changes", "sft.lr=0.5"], "sft.lr=0.5 has no effect: 3 of 3 steps of sft are done"),
        (["--allow-changes", "distill.steps=4"], "distill.steps=4 has no effect: 5 of 5 steps of distill are done"),
        (["--allow-changes", "discriminator.mode=head"], "discriminator.mode=head: expected separate, with which the"),
    ],
)
def test_resume_refuses_changes_without_effect(whole, overrides, words):
    before = (whole / "config.yaml").read_text()
    done = run_train(["--resume", str(whole), *overrides])
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert (whole / "config.yaml").read_text() == before and not list(whole.glob("config.before-*"))


def test_a_run_in_progress_is_not_touched(whole, tmp_path):
    run = copy_of(whole, tmp_path)
    with FolderLock(run):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        done = run_train(["--resume", str(run)])
        assert done.returncode == 2 and "is writing to this folder" in done.stderr and "Traceback" not in done.stderr
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_killing_torchrun_ends_its_ranks(made, tmp_path):
    process = subprocess.Popen(
        command(mini_arguments(tmp_path, made, "distill.steps=200"), processes=2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _wait_for_lines(process, tmp_path, 2)
    ranks = [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(ranks) == 2
    process.kill()
    process.wait()
    for rank in ranks:
        wait_until_gone(rank)
    # The kernel has released their lock too.
    FolderLock(only_run(tmp_path), wait_s=20).close()


def test_sigterm_in_an_evaluation_ends_at_once(whole, tmp_path):
    run = copy_of(whole, tmp_path)
    (run / "predictions" / "stage1.jsonl").unlink()
    errors = tmp_path / "errors"
    process = start_train(["--resume", str(run), "--allow-changes", "evaluate.max_new_tokens=400"], stderr=errors)
    while "evaluate untrained" not in errors.read_text():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0, errors.read_text()[-2000:]
    assert f"continue with --resume {run}" in errors.read_text()
    # The run does not wait for the end of the evaluation.
    assert not (run / "predictions" / "untrained.jsonl").exists()


def test_sigterm_to_one_process_ends_all_of_them_in_an_evaluation(made, tmp_path):
    arguments = mini_arguments(
        tmp_path, made, "made.heldout_clips=40", "evaluate.max_new_tokens=100", "evaluate.prompts_per_batch=1"
    )
    process = subprocess.Popen(
        command(arguments, processes=2),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for_text(process, "evaluate untrained")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    errors = process.communicate(timeout=300)[1]
    run = only_run(tmp_path)
    # torchrun ends the other process and adds its own summary.
    assert process.returncode == 1, errors[-2000:]
    assert errors.count(f"continue with --resume {run}") == 1 and "Stopped" not in errors
    assert not (run / "predictions" / "untrained.jsonl").exists()


def test_a_resumed_stage_2_leaves_the_control(tmp_path, made):
    """The control is complete, and its checkpoints do not hold the student of stage 2."""
    every = ["stages=[sft,control,warm_up,distill]", "checkpoint.every_steps=1", "discriminator.head=random"]
    arguments = mini_arguments(tmp_path, made, *every)
    process = start_train(arguments)
    # Three steps of stage 1, five of the control, one of the warm-up and two of stage 2.
    _wait_for_lines(process, tmp_path, 11)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 0
    run = only_run(tmp_path)
    before = load_file(run / "control" / "model.safetensors")
    changed = run_train(["--resume", str(run), "--allow-changes", "distill.steps=9"])
    assert changed.returncode == 2
    assert "distill.steps=9: expected 5, with which the control was trained" in changed.stderr
    done = run_train(["--resume", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    stage1, control = (load_file(run / name / "model.safetensors") for name in ("stage1", "control"))
    assert all(torch.equal(before[name], control[name]) for name in before)
    for other in (stage1, control):
        assert any(not torch.equal(weights(run)[name], other[name]) for name in other)
    shutil.rmtree(run / "control")
    refused = run_train(["--resume", str(run)])
    assert refused.returncode == 2 and "the checkpoint is later than the control; restore the folder" in refused.stderr


def test_a_resume_during_an_interim_evaluation_repeats_only_the_evaluation(tmp_path, made):
    """Evaluations during training change no step, and a run without one of them continues with it."""
    content = ["stages=[sft,control,distill]", "reward.alpha=0", "evaluate.rollouts=2"]
    plain, interim = (
        [a for a in mini_arguments(tmp_path / name, made, *content, *more) if not a.startswith("discriminator.")]
        for name, more in (("a", ()), ("b", ("evaluate.every_steps=2",)))
    )
    for arguments in (plain, interim):
        done = run_train(arguments)
        assert done.returncode == 0, done.stderr[-3000:]
    without, run = only_run(tmp_path / "a"), only_run(tmp_path / "b")
    assert "distill step 2, held-out: greedy" in done.stderr and "  stage2-control: greedy" in done.stderr
    for name, expected in weights(without).items():
        assert torch.equal(weights(run)[name], expected)
    evaluation = json.loads((run / "evaluation.json").read_text())
    progress = evaluation["progress"]
    assert [entry["step"] for entry in progress] == [0, 2, 4, 5]
    assert all(list(entry["students"]) == ["stage2", "control"] for entry in progress)
    assert [list(entry["differences"]) for entry in progress[1:]] == [
        ["stage2-control", "stage2-stage1", "control-stage1"]
    ] * 3
    # The entries leave out readings and groups.
    first, last = (progress[index]["students"] for index in (0, -1))
    for entry, student in ((first["stage2"], "stage1"), (last["control"], "control")):
        assert "closed" in entry and "strict" not in entry
        assert entry.items() <= evaluation["students"][student].items()
    difference = progress[-1]["differences"]["stage2-control"]
    assert "closed" in difference and difference.items() <= evaluation["differences"]["stage2-control"].items()
    assert "Held-out score during stage 2" in (run / "report.html").read_text()
    # A run that was killed in the evaluation after step 4 has the checkpoint of that step.
    answers = (run / "predictions" / "stage2@4.jsonl").read_bytes()
    for path in run.iterdir():
        if path.name == "checkpoints":
            last = max(path.iterdir(), key=lambda folder: folder.name)
            shutil.rmtree(last)
        elif path.name in ("export", "evaluation.json", "report.html", "samples.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("stage2@4", "stage2"):
        (run / "predictions" / f"{name}.jsonl").unlink()
    done = run_train(["--resume", str(run)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing after step 4 of distill" in done.stderr
    assert (run / "predictions" / "stage2@4.jsonl").read_bytes() == answers
    assert json.loads((run / "evaluation.json").read_text()) == evaluation
