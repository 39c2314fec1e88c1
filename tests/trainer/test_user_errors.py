"""Test user errors: the message says what, where and what to do, the exit code is 2, and no partial output remains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from material import tiny_material

from rmsd_fast import evaluate, pool, train
from rmsd_fast.config import SettingsError
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.plan import describe_plan


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return tiny_material(tmp_path_factory.mktemp("errors"))


def fails(capsys, tmp_path, *arguments: str, program=train) -> str:
    assert program.main(list(arguments)) == 2
    assert not (tmp_path / "runs").exists()
    return capsys.readouterr().err


def arguments(material, tmp_path, **changes) -> list[str]:
    given = {
        "data.train": material.files["train"],
        "teacher.pool": material.files["pool"],
        "model.path": material.model_path,
        "model.dtype": "float32",
        "output": tmp_path / "runs",
    }
    return ["rmsd_qwen3vl_4b", *(f"{key}={value}" for key, value in {**given, "data.heldout": "", **changes}.items())]


def read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_unknown_setting(capsys, tmp_path):
    assert "did you mean sft.steps" in fails(capsys, tmp_path, "quickstart", "sft.stepz=3")


@pytest.mark.parametrize(
    ("program", "given", "advice"),
    [
        (train, ["quickstart", "--sft.steps=4"], "write sft.steps=4"),
        (train, ["quickstart", "--sft.steps", "4"], "write sft.steps=<value>"),
        (train, ["quickstart", "--seed=3"], "write seed=3"),
        (evaluate, ["quickstart", "--output", "x.json", "--model.path=x"], "write model.path=x"),
        (pool, ["check", "a.jsonl", "b.jsonl", "--teacher.parse=strict"], "write teacher.parse=strict"),
    ],
)
def test_a_setting_in_option_syntax(capsys, program, given, advice):
    with pytest.raises(SystemExit) as ended:
        program.main(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith(f"; settings have no dashes: {advice}")
    # Other options are only reported as unknown.
    with pytest.raises(SystemExit):
        train.main(["quickstart", "--nonsense=4"])
    assert capsys.readouterr().err.strip().endswith("unrecognized arguments: --nonsense=4")


def test_losses_that_are_unavailable_on_this_machine(capsys, tmp_path, material, monkeypatch):
    """An example is CUDA without triton."""

    def missing(*_, **__):
        raise RuntimeError("triton is not installed (pip install triton)")

    monkeypatch.setattr("rmsd_fast.stages.material.resolve_impl", missing)
    error = fails(capsys, tmp_path, *arguments(material, tmp_path))
    assert error.strip().splitlines()[-1].endswith("losses: triton is not installed (pip install triton)")


def test_a_question_file_that_does_not_exist(capsys, tmp_path, material):
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"data.train": "nowhere.jsonl"}))
    assert "nowhere.jsonl: cannot be read" in error


def test_a_question_without_ground_truth(capsys, tmp_path, material):
    lines = read(material.files["train"])
    next(line for line in lines if line["task_type"] == "mcq").pop("answer")
    number = 1 + next(i for i, line in enumerate(lines) if "answer" not in line)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"data.train": path}))
    assert f"train.jsonl:{number}" in error and "answer" in error


def test_media_outside_the_root(capsys, tmp_path, material):
    line = read(material.files["train"])[0]
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({**line, "videos": ["../../etc/passwd"]}) + "\n")
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"data.train": path}))
    assert "train.jsonl:1" in error and "data.media_root" in error


def test_pool_of_other_questions(capsys, tmp_path, material):
    lines = read(material.files["pool"])
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({**line, "id": f"other-{line['id']}"}) + "\n" for line in lines))
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"teacher.pool": path}))
    assert "expected responses to all" in error and "teacher.pool" in error


def test_pool_without_a_usable_response(capsys, tmp_path, material):
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps({**line, "text": " "}) + "\n" for line in read(material.files["pool"])))
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"teacher.pool": path}))
    assert (
        "0.0% of 144 answers are valid" in error
        and "Reasons: empty 143, truncated 1" in error
        and f"pool check {path} {material.files['train']}" in error
    )


def test_missing_media(capsys, tmp_path, material):
    path = tmp_path / "train.jsonl"
    path.write_text(Path(material.files["train"]).read_text())
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"data.train": path}))
    assert "12 of 12 media files are missing, for 36 of 36 questions" in error and "data.media_root" in error


def test_missing_held_out_media(capsys, tmp_path, material):
    """Missing held-out media used to be found only after stage 1, one question at a time."""
    path = tmp_path / "heldout.jsonl"
    path.write_text(Path(material.files["heldout"]).read_text())
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"data.heldout": path}))
    assert "heldout.jsonl: 3 of 3 media files are missing" in error


def test_boxes_in_pixels_are_not_a_setting(capsys, tmp_path, material):
    error = fails(capsys, tmp_path, *arguments(material, tmp_path), "teacher.spatial_format=pixel")
    assert (
        "teacher.spatial_format was removed: box coordinates always range from 0 to 1000" in error
        and "/ width" in error
    )


def test_model_of_another_family(capsys, tmp_path, material):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    error = fails(capsys, tmp_path, *arguments(material, tmp_path, **{"model.path": folder}))
    assert "llama" in error and "qwen3_vl" in error


def test_missing_ffmpeg(capsys, tmp_path, material, monkeypatch):
    # Importing torchcodec without FFmpeg's libraries raises this error.
    for name in ("torchcodec", "torchcodec.decoders", "torchcodec.encoders"):
        monkeypatch.setitem(sys.modules, name, None)
    error = fails(
        capsys, tmp_path, "quickstart", f"output={tmp_path / 'runs'}", f"made.folder={tmp_path / 'made'}",
        "made.train_clips=2", "made.heldout_clips=1",
    )  # fmt: skip
    assert "ffmpeg" in error.lower() and "install" in error
    assert [path.name for path in (tmp_path / "made").iterdir()] == [".lock"]


def test_nothing_to_evaluate(capsys, tmp_path, material):
    # The program refuses settings of training on its command line.
    read = ("rmsd_qwen3vl_4b", "model.path=", "data.heldout=")
    given = [word for word in arguments(material, tmp_path) if word.startswith(read)]
    error = fails(capsys, tmp_path, *given, "--output", str(tmp_path / "x.json"), program=evaluate)
    assert "data.heldout" in error
    assert not (tmp_path / "x.json").exists()


def test_a_batch_that_the_processes_cannot_divide(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of 3 (processes)" in fails(capsys, tmp_path, "quickstart", "--dry-run")


def test_batches_are_checked_before_anything_is_evaluated(capsys, tmp_path, material):
    world = World(rank=0, size=3, local_rank=0, device=torch.device("cpu"))
    settings = load_settings("quickstart", ["sft.batch_size=32", "distill.batch_size=6"])
    with pytest.raises(
        SettingsError, match=r"sft\.batch_size: expected a multiple of 3 \(processes\), got 32; set sft"
    ):
        prepare_material(settings, world)


def test_out_of_gpu_memory_names_the_settings_to_lower(capsys, tmp_path, material, monkeypatch):
    def full(settings, world, stop, *_):
        stop.run_folder = folder
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore lines")

    monkeypatch.setattr("rmsd_fast.train_run.train", full)
    folder = None
    error = fails(capsys, tmp_path, "quickstart", "micro_tokens=8192", f"output={tmp_path / 'runs'}")
    assert error.endswith("then start it again with section.field=value\n")
    folder = tmp_path / "runs" / "x"
    error = fails(capsys, tmp_path, "quickstart", "micro_tokens=8192", f"output={tmp_path / 'runs'}")
    assert "out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB.)" in error
    assert "micro_tokens=8192" in error and "rollout.prompts_per_batch=" in error
    assert f"--resume {folder} --allow-changes section.field=value" in error
    assert "model.gradient_checkpointing=true" in error and "runtime.zero_stage=2 -> 3" in error


def test_dry_run_reports_an_unsupported_model(capsys, tmp_path, material):
    """A text model of 0.1 million parameters was once reported as a model of 12.6 billion."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    assert train.main([*arguments(material, tmp_path, **{"model.path": folder}), "--dry-run"]) == 2
    printed = capsys.readouterr().out
    assert "MISSING" in printed and "got 'llama'" in printed and "parameters" not in printed
    assert train.main([*arguments(material, tmp_path, **{"data.train": "nowhere.jsonl"}), "--dry-run"]) == 2
    # The path is absolute, because relative paths start at the current folder and not at the folder of the recipe.
    assert f"MISSING: data.train: {Path.cwd() / 'nowhere.jsonl'}" in capsys.readouterr().out


def test_dry_run_counts_the_available_inputs(capsys, tmp_path, material):
    assert train.main([*arguments(material, tmp_path), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "questions: 36 (" in printed
    assert "teacher: 144 answers of simulated, up to K=4 of each question (36 questions have 4)" in printed
    assert "memory per process, on CPU, planned" in printed and printed.strip().endswith("ready")


@pytest.mark.parametrize(
    ("processes", "ahead", "said"), [(1, 1, ("1 process, ", "1 step ")), (2, 3, ("2 processes, ", "3 steps "))]
)
def test_counts_in_the_plan_use_singular_and_plural(monkeypatch, processes, ahead, said):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    plan, _ = describe_plan(load_settings("quickstart", [f"data.decode_ahead={ahead}", "data.decode_threads=1"]))
    assert f"settings are consistent; {said[0]}" in plan and f"1 thread, decoding {said[1]}ahead" in plan
    assert "(s)" not in plan and "(es)" not in plan


def test_a_few_questions_without_an_answer_are_excluded(capsys, tmp_path, material):
    lines = read(material.files["pool"])
    gone = lines[0]["id"]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["id"] != gone))
    given = arguments(material, tmp_path, **{"teacher.pool": path})
    assert train.main([*given, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"left out: 1 question without an answer ({gone})" in printed and "(35 questions have 4)" in printed
    error = fails(capsys, tmp_path, *given, "teacher.max_unanswered_share=0")
    assert "teacher.max_unanswered_share (now 0)" in error


def test_resume_of_a_folder_that_is_not_a_run(capsys, tmp_path):
    assert "expected a run folder" in fails(capsys, tmp_path, "--resume", str(tmp_path / "nothing"))


def test_print_config_and_dry_run(capsys):
    assert train.main(["quickstart", "--print-config", "seed=5"]) == 0
    assert "seed: 5" in capsys.readouterr().out
    assert train.main(["distill.steps=7", "--dry-run"]) == 0
    assert "distill: 7 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "module"), [("runtime.optimizer=adamw_8bit", "bitsandbytes"), ("model.adapter=lora", "peft")]
)
def test_dry_run_lists_missing_packages(capsys, tmp_path, material, monkeypatch, override, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    overrides = [override, "sft.train_vision=false", "runtime.check_memory=false"]
    assert train.main([*arguments(material, tmp_path), *overrides, "--dry-run"]) == 2
    printed = capsys.readouterr().out
    assert f"expected the package {module}, got none" in printed and "not ready" in printed
