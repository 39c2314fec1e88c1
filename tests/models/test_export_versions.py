"""Test how other versions of transformers read exports, and how folders written by transformers 4.57 are loaded.

The installed version is always tested. For 4.57, name the interpreter of an environment that has it:

    python3 -m venv venv457
    venv457/bin/pip install torch==2.13.0 numpy==2.3.5 "transformers==4.57.*" pillow
    venv457/bin/pip install --no-deps torchcodec==0.13.0
    venv457/bin/pip install --no-deps --target venv457/oracle torchvision==0.28.0
    RMSD_FAST_TRANSFORMERS_457=venv457/bin/python pytest tests/models/test_export_versions.py

torchvision stays out of site-packages there because its CUDA wheel breaks a CPU build of torch.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TORCHVISION_PRELUDE
from media_files import noise_frames, write_clip
from PIL import Image

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.preprocess import video_patches, video_size
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import TAGS, build_tiny_student
from rmsd_fast.models.export import export_student
from rmsd_fast.models.families.qwen2_5_vl import seconds_per_step
from rmsd_fast.models.families.qwen3_vl import FRAME_CAP, VIDEO_EDGES
from rmsd_fast.models.students import Student, load_student

VARIABLE = "RMSD_FAST_TRANSFORMERS_457"
READER = Path(__file__).parents[1] / "helpers" / "export_reader.py"
TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]
# The probes are special tokens and tags inside text, digits, whitespace, and other scripts.
PROBES = [
    "a<|im_end|><think>é 漢字 😀\t\n\n  x</think>\n<answer>12.5 to 20.0</answer><|video_pad|>b",
    "DON'T  stop 1987",
]
SPECIAL = (
    "eos_token",
    "pad_token",
    "bos_token",
    "unk_token",
    "eos_token_id",
    "pad_token_id",
    "all_special_tokens",
    "all_special_ids",
    "padding_side",
    "model_max_length",
)
# Frames of 720p are above the cap of a frame and far below the budget of a video.
LARGE = (4, 3, 720, 1280)
# The export of the tiny Qwen2.5-VL. All others are Qwen3-VL.
QWEN2_5 = "qwen2_5_vl"
# These are the rope settings of the tiny student, of the family (whose default differs between versions), and of a
# longer context.
ROPES = {
    "tiny": {},
    "family": {"rope_theta": 5000000.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16384},
}


@dataclass
class Export:
    """Hold one export and the results of our own code for the exported student."""

    folder: Path
    student: Student
    cases: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("versions")
    write_clip(root / "a.mp4", noise_frames(9, 64, 96, seed=1), fps=4.0)
    Image.fromarray(noise_frames(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(root / "c.png")
    return root


@pytest.fixture(scope="module")
def exports(root: Path) -> dict[str, Export]:
    build_tiny_student(root / "student", texts=TEXTS, layers=2)
    made = {}
    for name, changes in ROPES.items():
        student = load_student(root / "student", dtype="float32")
        config = student.model.config
        if name == "family":
            _untie(student)
        config.text_config.rope_parameters = {**config.text_config.rope_parameters, **changes}
        export_student(student, root / name, base_model="Qwen/Qwen3-VL-4B-Instruct", stage="distill")
        # The rope of an existing model does not follow its config.
        state = student.model.state_dict()
        student = Student(type(student.model)(config).eval(), student.tokenizer, student.preprocessor)
        student.model.load_state_dict(state)
        made[name] = _work(Export(root / name, student), root)
    build_tiny_student(root / "student25", texts=TEXTS, layers=2, family=QWEN2_5)
    student = load_student(root / "student25", dtype="float32")
    export_student(student, root / QWEN2_5, base_model="Qwen/Qwen2.5-VL-7B-Instruct", stage="distill")
    made[QWEN2_5] = _work(Export(root / QWEN2_5, student), root)
    # The positions affect the logits of these prompts, so equal logits prove equal ropes.
    tiny, yarn = made["tiny"].logits, made["yarn"].logits
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(tiny, yarn, strict=True))
    return made


def _untie(student: Student) -> None:
    """Give the head its own weights, as in the larger models of the family."""
    config, head = student.model.config, student.model.lm_head
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.02 * torch.randn_like(head.weight))


def _work(export: Export, root: Path) -> Export:
    """Fill in prompts without media, with an image, with a video and with both, and our logits for them."""
    builder = PromptBuilder(export.student, VideoConfig(num_frames=4))
    for videos, images in ((0, 0), (0, 1), (1, 0), (1, 1)):
        question = Question(
            id="q",
            question="What colour is the square?",
            task_type="open",
            videos=(str(root / "a.mp4"),) * videos,
            images=(str(root / "c.png"),) * images,
        )
        prompt = builder.build(question)
        inputs = {"input_ids": prompt.input_ids[None], "mm_token_type_ids": prompt.mm_token_type_ids[None]}
        for kind, pixels, grid in (
            ("video", "pixel_values_videos", "video_grid_thw"),
            ("image", "pixel_values", "image_grid_thw"),
        ):
            media = [frames for frames in prompt.media if frames.kind == kind]
            if media:
                inputs[pixels] = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in media])
                inputs[grid] = torch.tensor([frames.grid_thw for frames in media])
        if videos and export.folder.name == QWEN2_5:
            # 9/8 s per step, which 4.57 rounds down to 1. Both give the positions 0 and 2.
            inputs["second_per_grid_ts"] = torch.tensor([seconds_per_step(prompt.media[0])])
        kinds = [{"type": "video"}] * videos + [{"type": "image"}] * images
        export.cases.append(
            {
                "inputs": inputs,
                "messages": [{"role": "user", "content": [*kinds, {"type": "text", "text": question_text(question)}]}],
                "videos": [frames.pixels for frames in prompt.media if frames.kind == "video"],
                "images": [frames.pixels[0] for frames in prompt.media if frames.kind == "image"],
                "metadata": [
                    (9, 4.0, tuple(round(4 * time) for time in frames.timestamps_s))
                    for frames in prompt.media
                    if frames.kind == "video"
                ],
            }
        )
        export.prompts.append(prompt)
        with torch.no_grad():
            export.logits.append(export.student.model(**inputs).logits)
    return export


@dataclass(frozen=True)
class Reading:
    """Hold the results of one interpreter for the exports."""

    python: str
    oracle: str
    version: tuple[int, ...]
    found: dict[str, dict[str, Any]]
    warnings: list[str]
    saved: Path


@pytest.fixture(scope="module", params=["installed", pytest.param("4.57", marks=pytest.mark.slow)])
def reading(request: pytest.FixtureRequest, exports: dict[str, Export], root: Path) -> Reading:
    python = sys.executable if request.param == "installed" else os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} is not set to an interpreter with transformers 4.57; see the top of this file")
    # The path is not resolved, because the interpreter of an environment is a link to the interpreter that created it.
    oracle = Path(python).absolute().parent.parent / "oracle"
    if not oracle.is_dir() and (python != sys.executable or not importlib.util.find_spec("torchvision")):
        pytest.skip(f"torchvision (a test oracle only) is not in {oracle}")
    saved = root / f"saved-{request.param}"
    job = {
        "texts": PROBES,
        "special": SPECIAL,
        "large_video": torch.zeros(LARGE, dtype=torch.uint8),
        "folders": {
            str(export.folder): {"cases": export.cases, "save_to": str(saved / name)}
            for name, export in exports.items()
        },
    }
    torch.save(job, root / "job.pt")
    _run(python, [str(READER), str(root / "job.pt"), str(root / "found.pt"), str(oracle)], root)
    found = torch.load(root / "found.pt")
    version = tuple(map(int, re.findall(r"\d+", found["version"])[:2]))
    assert request.param == "installed" or version == (4, 57), f"{VARIABLE}: transformers {found['version']}"
    return Reading(
        python, str(oracle), version, dict(zip(exports, found["folders"], strict=True)), found["warnings"], saved
    )


def _run(python: str, arguments: list[str], cwd: Path) -> str:
    # The other environment must not find the packages of this environment.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python, *arguments], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, f"{python} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _version(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))


def test_logits_are_equal_for_text_images_and_videos(reading: Reading, exports: dict[str, Export]) -> None:
    for name, export in exports.items():
        found = reading.found[name]
        assert found["faults"] == [] and found["stored_dtype"] == "torch.float32"
        assert found["tied"] == (name != "family")
        for ours, theirs in zip(export.logits, found["logits"], strict=True):
            assert (ours - theirs).abs().max() < 1e-5, name


def test_tokenizer_and_chat_template_are_equal(reading: Reading, exports: dict[str, Export]) -> None:
    for name, export in exports.items():
        found, tokenizer = reading.found[name], export.student.tokenizer
        assert found["ids"] == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]
        assert found["decoded"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in found["ids"]]
        # Tags are plain text and stay, but special tokens are removed.
        assert all(tag in found["decoded"][0] for tag in TAGS) and "<|" not in found["decoded"][0]
        assert found["rendered"] == [
            tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
            for case in export.cases
        ]
        assert found["special"] == {attribute: getattr(tokenizer, attribute) for attribute in SPECIAL}
        assert found["length"] == len(tokenizer)


def test_generation_ends_with_the_end_token(reading: Reading, exports: dict[str, Export]) -> None:
    for name, export in exports.items():
        for ids in reading.found[name]["generated"]:
            assert len(ids) == 4 and ids.index(export.student.eos_id) == 3


def test_processor_builds_the_same_prompts_as_training(reading: Reading, exports: dict[str, Export]) -> None:
    """The prompts are equal up to the two differences that README.md names."""
    for name, export in exports.items():
        joined = name == QWEN2_5
        assert reading.found[name]["processor"] == ("Qwen2_5_VLProcessor" if joined else "Qwen3VLProcessor")
        for prompt, case, theirs in zip(export.prompts, export.cases, reading.found[name]["prompts"], strict=True):
            ids = prompt.input_ids.tolist()
            expected = (
                ids if joined or reading.version >= _version(VIDEO_EDGES) else _without_edges(ids, export.student)
            )
            assert theirs["input_ids"][0].tolist() == expected
            for pixels in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
                assert (pixels in theirs) == (pixels in case["inputs"])
                if pixels in theirs:
                    torch.testing.assert_close(theirs[pixels], case["inputs"][pixels], rtol=0, atol=1e-6)
        if joined:
            # The budget of a frame is that of the original models, which is far above the run's default.
            assert reading.found[name]["large_grid"] == [LARGE[0] // 2, 52, 92]
            continue
        height, width = video_size(LARGE[0], *LARGE[2:], VideoConfig(), export.student.preprocessor)
        capped = reading.found[name]["large_grid"] == [LARGE[0] // 2, height // 16, width // 16]
        assert capped == (reading.version >= _version(FRAME_CAP))


def _without_edges(ids: list[int], student: Student) -> list[int]:
    """Remove the vision tokens around a whole video and keep those around each temporal patch."""
    config = student.model.config
    start, end = config.vision_start_token_id, config.vision_end_token_id
    pads = (config.image_token_id, config.video_token_id)
    return [
        token
        for before, token, after in zip([None, *ids], ids, [*ids[1:], None], strict=False)
        if not (token == start and after not in pads) and not (token == end and before == end)
    ]


def test_no_warnings_are_logged(reading: Reading) -> None:
    assert reading.warnings == []


def test_a_model_saved_by_another_version_loads_as_a_student(reading: Reading, exports: dict[str, Export]) -> None:
    for name, export in exports.items():
        folder = reading.saved / name
        for settings in ("preprocessor_config.json", "video_preprocessor_config.json"):
            shutil.copy(export.folder / settings, folder)
        student = load_student(folder, dtype="float32")
        theirs, ours = student.model.config.text_config, export.student.model.config.text_config
        assert theirs.rope_parameters == ours.rope_parameters
        for attribute in SPECIAL:
            assert getattr(student.tokenizer, attribute) == getattr(export.student.tokenizer, attribute)
        with torch.no_grad():
            for case, logits in zip(export.cases, export.logits, strict=True):
                assert (student.model(**case["inputs"]).logits - logits).abs().max() < 1e-5


def test_code_of_the_readme_runs(reading: Reading, exports: dict[str, Export], root: Path) -> None:
    folder = exports["tiny"].folder
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "max_new_tokens=512" in code
    working = Path(shutil.copytree(folder, root / f"readme-{reading.version[0]}", dirs_exist_ok=True))
    shutil.copy(root / "a.mp4", working / "clip.mp4")
    script = TORCHVISION_PRELUDE.format(folder=reading.oracle) + code.replace("max_new_tokens=512", "max_new_tokens=4")
    _run(reading.python, ["-c", script], working)
