"""Test whole runs of each family of students on videos, images and text alone, in one and in two processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from media_files import noise_frames
from PIL import Image
from safetensors.torch import load_file
from train_runs import SIX_TASKS, metrics, only_run, run_train

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.packing import make_rows
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question, load_questions, write_questions
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.made.teacher import SimulatedTeacher, write_simulated_pool
from rmsd_fast.models.families import FAMILIES
from rmsd_fast.models.students import encode_media, forward_hidden, load_student
from rmsd_fast.runtime.process_group import World
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import prepare_material

# Few steps of each stage, with the vision tower trained. A step has two questions, so one of two processes often has
# only text, and the other one a picture.
SIZES = [
    "stages=[sft,control,warm_up,distill]",
    "sft.steps=6",
    "sft.batch_size=2",
    "sft.warmup_steps=1",
    "discriminator.warm_up_steps=1",
    "discriminator.head=random",
    "rollout.n=2",
    "rollout.max_new_tokens=8",
    "rollout.prompts_per_batch=3",
    "rollout.log_every_steps=1",
    "distill.steps=3",
    "distill.batch_size=2",
    "distill.train_vision=true",
    "evaluate.max_new_tokens=6",
    "evaluate.rollouts=0",
    "evaluate.prompts_per_batch=8",
    "data.cache_mib=16",
    "data.max_prompt_tokens=500",
    "micro_tokens=1200",
]
SHORT = ["stages=[sft,warm_up,distill]"]
LORA = ["model.adapter=lora", "model.lora_rank=4", "sft.train_vision=false", "distill.train_vision=false"]
LORA += ["discriminator.mode=shared"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write questions about videos, images, several media and text alone, a pool, and a student of each family."""
    folder = tmp_path_factory.mktemp("students")
    sizes = ["made.train_clips=6", "made.heldout_clips=2", "made.student_layers=1"]
    settings = load_settings("quickstart", [f"made.folder={folder / 'made'}", *SIX_TASKS, *sizes])
    made = prepare_material(settings, World(rank=0, size=1, local_rank=0, device=torch.device("cpu")))
    for seed, (height, width) in enumerate([(64, 64), (50, 90)]):
        pixels = noise_frames(1, height, width, seed=seed)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    train = _mixed(folder, list(made.train), "t")
    write_questions(folder / "train.jsonl", train, media_root=folder)
    write_questions(folder / "heldout.jsonl", _mixed(folder, list(made.heldout), "h"), media_root=folder)
    asked = load_questions(folder / "train.jsonl", media_root=folder)
    pool = write_simulated_pool(folder, asked, k=4, seed=0, teacher=SimulatedTeacher("noisy", error_rate=0.35))
    shutil.copy(pool, folder / "pool.jsonl")
    texts = [json.loads(line)["text"] for line in (folder / "pool.jsonl").read_text().splitlines()]
    for family in FAMILIES:
        build_tiny_student(folder / family, texts=texts, layers=2, family=family)
    return folder


def _mixed(folder: Path, videos: list[Question], name: str) -> list[Question]:
    """Return six questions about each kind of media in turn, so that each step has all kinds."""
    questions = []
    for number in range(6):
        about = videos[number % len(videos)]
        images = tuple(str(folder / f"{index}.png") for index in range(1 + number % 2))
        common = {"task_type": "numeric", "answer": "4"}
        questions += [
            about,
            Question(id=f"{name}-image-{number}", question="How many blobs are there?", images=images, **common),
            Question(id=f"{name}-text-{number}", question="How much is two and two?", **common),
            Question(
                id=f"{name}-both-{number}",
                question="How many dots has <image> more than <video>?",
                videos=about.videos,
                images=images[:1],
                **common,
            ),
        ]
    return list({question.id: question for question in questions}.values())


def _run(folder: Path, output: Path, family: str, *overrides: str, processes: int = 1) -> Path:
    arguments = [
        "quickstart",
        "made.enabled=false",
        f"output={output}",
        f"model.path={folder / family}",
        f"data.train={folder / 'train.jsonl'}",
        f"data.heldout={folder / 'heldout.jsonl'}",
        f"data.media_root={folder}",
        f"teacher.pool={folder / 'pool.jsonl'}",
        "runtime.check_memory=false",
        *SIZES,
        *overrides,
    ]
    done = run_train(arguments, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return only_run(output)


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: _run(folder, tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=list(FAMILIES))
def whole(request: pytest.FixtureRequest, runs: dict[str, Path]) -> Path:
    return runs[request.param]


def _kind(identity: str) -> str:
    return identity.split("-")[1] if "-image-" in identity or "-text-" in identity or "-both-" in identity else "video"


KINDS = {"video", "image", "text", "both"}


def _changed(before: Path, after: Path) -> set[str]:
    """Return the names of the weights that differ. Files of Qwen2.5-VL have other names than its modules."""
    first, last = (load_student(path, dtype="float32").model.state_dict() for path in (before, after))
    return {name for name in first if not torch.equal(first[name], last[name])}


def test_a_run_trains_and_evaluates_on_all_kinds_of_media(whole: Path) -> None:
    steps = [(line["stage"], line["step"]) for line in metrics(whole)]
    assert steps == [
        *(("sft", number) for number in range(1, 7)),
        *(("control", number) for number in range(1, 4)),
        ("warm_up", 1),
        *(("distill", number) for number in range(1, 4)),
    ]
    assert all(line["skipped"] == 0 for line in metrics(whole) if "skipped" in line)
    for name in ("stage1", "stage2", "control"):
        lines = [json.loads(line) for line in (whole / "predictions" / f"{name}.jsonl").read_text().splitlines()]
        assert {_kind(line["id"]) for line in lines} == KINDS
        assert not any(line.get("error") for line in lines)
    rollouts = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    assert {_kind(line["id"]) for line in rollouts} >= {"text", "image"}
    assert "no media recorded" in (whole / "report.html").read_text()
    changed = _changed(whole / "stage1", whole / "export")
    assert any("language_model" in name for name in changed) and any("visual" in name for name in changed)


def test_the_export_gives_the_same_logits_in_plain_transformers(whole: Path, folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    student = load_student(whole / "export", dtype="float32")
    plain = AutoModelForImageTextToText.from_pretrained(whole / "export", dtype=torch.float32)
    builder = PromptBuilder(student, VideoConfig(num_frames=8))
    questions = {_kind(question.id): question for question in load_questions(folder / "heldout.jsonl")}
    assert set(questions) == KINDS
    response = builder.encode_response("<think>a</think><answer>B</answer>")
    for question in questions.values():
        prompt = builder.build(question)
        rows = make_rows("padded", [prompt], [[response]], pad_id=0)
        inputs: dict[str, torch.Tensor] = {}
        for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
            media = [frames for frames in prompt.media if frames.kind == kind]
            if media:
                inputs[pixels] = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in media])
                inputs[f"{kind}_grid_thw"] = torch.tensor([frames.grid_thw for frames in media])
        with torch.no_grad():
            ours = student.model.lm_head(forward_hidden(student.model, rows, encode_media(student.model, [prompt])))
            theirs = plain(input_ids=rows.input_ids, position_ids=rows.position_ids, **inputs).logits
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_processes_train_like_one_although_one_has_only_text(
    folder: Path, runs: dict[str, Path], tmp_path: Path, zero_stage: int
) -> None:
    alone = runs["qwen2_5_vl"]
    together = _run(folder, tmp_path, "qwen2_5_vl", *SHORT, f"runtime.zero_stage={zero_stage}", processes=2)
    names = ("loss", "grad_norm", "discriminator/loss", "policy/loss", "policy/kl", "policy/grad_norm")
    lines = [line for line in metrics(alone) if line["stage"] != "control"]
    for line, expected in zip(metrics(together), lines, strict=True):
        for name in names:
            if expected.get(name) is not None:
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (name, expected["step"])
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (together, alone))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4) for name in theirs)


@pytest.mark.parametrize("packing", ["shared", pytest.param("padded", marks=pytest.mark.slow)])
def test_adapters_of_qwen2_5_vl(folder: Path, tmp_path: Path, packing: str) -> None:
    run = _run(folder, tmp_path, "qwen2_5_vl", *SHORT, *LORA, f"packing={packing}", "model.gradient_checkpointing=true")
    changed = _changed(folder / "qwen2_5_vl", run / "export")
    assert changed and all("language_model.layers" in name and "proj" in name for name in changed)
    assert (run / "export" / "adapter" / "adapter_model.safetensors").is_file()
    assert [line["stage"] for line in metrics(run)] == ["sft"] * 6 + ["warm_up"] + ["distill"] * 3
