"""Test exports: files for transformers 4.57 and versions 5, the README, and user folders in the spelling of 4.57.

test_export_versions.py tests how other versions read the files.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import noise_frames, write_clip
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen3VLForConditionalGeneration
from transformers.utils.logging import disable_propagation, enable_propagation

import rmsd_fast
from rmsd_fast.config import ModelError, VideoConfig
from rmsd_fast.data.preprocess import load_preprocessor, video_patches
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.question_text import ANSWER_FORMAT
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import CHAT_TEMPLATE, SPECIAL_TOKENS, build_tiny_student
from rmsd_fast.models.export import export_student
from rmsd_fast.models.students import Student, load_student

TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]
PROBE = "a<|im_end|><think>é 漢字 😀\n\n  x</think>\n<answer>12.5 to 20.0</answer><|video_pad|>b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    build_tiny_student(folder / "student", texts=TEXTS, layers=2)
    write_clip(folder / "a.mp4", noise_frames(9, 64, 96, seed=1), fps=4.0)
    write_clip(folder / "b.mp4", noise_frames(6, 64, 64, seed=2), fps=3.0)
    return folder


@pytest.fixture
def student(folder: Path) -> Student:
    return load_student(folder / "student", dtype="float32")


@pytest.fixture
def prompt(folder: Path, student: Student) -> Prompt:
    videos = (str(folder / "a.mp4"), str(folder / "b.mp4"))
    question = Question(id="ab", question="What is it?", task_type="open", videos=videos)
    return PromptBuilder(student, VideoConfig(num_frames=4)).build(question)


def _logits(model: Qwen3VLForConditionalGeneration, prompt: Prompt) -> torch.Tensor:
    with torch.no_grad():
        return model(
            input_ids=prompt.input_ids[None],
            mm_token_type_ids=prompt.mm_token_type_ids[None],
            pixel_values_videos=torch.cat(
                [video_patches(frames.pixels, frames.preprocessor) for frames in prompt.media]
            ),
            video_grid_thw=torch.tensor([frames.grid_thw for frames in prompt.media]),
        ).logits


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    settings = _read(path)
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")


def _set_theta(student: Student, theta: float) -> Student:
    """Change the rope theta and keep the weights."""
    config = student.model.config
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "rope_theta": theta}
    model = Qwen3VLForConditionalGeneration(config).eval()
    model.load_state_dict(student.model.state_dict())
    model.generation_config = student.model.generation_config
    return Student(model, student.tokenizer, student.preprocessor)


def test_export_loads_in_plain_transformers_with_equal_logits(tmp_path: Path, prompt: Prompt, student: Student) -> None:
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    export_student(student, tmp_path / "out" / "export")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "export", dtype=torch.float32)
    assert type(plain) is Qwen3VLForConditionalGeneration
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "export")
    assert tokenizer.decode(prompt.input_ids) == student.tokenizer.decode(prompt.input_ids)
    assert tokenizer.chat_template == student.tokenizer.chat_template and tokenizer.eos_token_id == student.eos_id
    assert load_preprocessor(tmp_path / "out" / "export") == student.preprocessor
    assert torch.equal(_logits(plain, prompt), _logits(student.model, prompt))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export"]


@pytest.mark.parametrize("theta", [10000.0, 5000000.0])
def test_load_student_reads_back_the_same_weights_and_settings(tmp_path: Path, student: Student, theta: float) -> None:
    student = _set_theta(student, theta)
    export_student(student, tmp_path / "export")
    again = load_student(tmp_path / "export", dtype="float32")
    ours, theirs = student.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    settings = [loaded.model.config.to_dict() for loaded in (student, again)]
    for config in settings:
        for section in (config, config["text_config"], config["vision_config"]):
            for key in ("_name_or_path", "dtype"):
                section.pop(key, None)
    assert settings[0] == settings[1]
    assert again.model.config.text_config.rope_parameters["rope_theta"] == theta
    assert again.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert again.tokenizer.special_tokens_map == student.tokenizer.special_tokens_map
    assert again.tokenizer.extra_special_tokens == student.tokenizer.extra_special_tokens == list(SPECIAL_TOKENS)
    assert again.model.generation_config.to_dict() == student.model.generation_config.to_dict()
    # An export of the loaded student has the same bytes.
    export_student(again, tmp_path / "again")
    for path in (tmp_path / "export").iterdir():
        if path.name != "config.json":
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_settings_use_the_spellings_of_both_versions(tmp_path: Path, student: Student) -> None:
    export_student(_set_theta(student, 5000000.0), tmp_path / "export")
    config = _read(tmp_path / "export" / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    assert text["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    assert text["rope_theta"] == 5000000.0
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    # Versions 5.5 to 5.16 would warn about its type.
    assert "rope_parameters" not in vision and student.model.config.vision_config.rope_parameters is not None
    tokenizer = _read(tmp_path / "export" / "tokenizer_config.json")
    # 4.57 expects a dict under extra_special_tokens and fails on a list.
    assert tokenizer["additional_special_tokens"] == list(SPECIAL_TOKENS) and "extra_special_tokens" not in tokenizer
    assert tokenizer["tokenizer_class"] == "Qwen2Tokenizer"
    assert not {"is_local", "local_files_only", "name_or_path"} & tokenizer.keys()


def test_both_spellings_are_read_without_warnings(
    tmp_path: Path, student: Student, caplog: pytest.LogCaptureFixture
) -> None:
    export_student(student, tmp_path / "export")
    # transformers does not propagate its log otherwise.
    enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            config = AutoConfig.from_pretrained(tmp_path / "export")
            AutoTokenizer.from_pretrained(tmp_path / "export")
            AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    finally:
        disable_propagation()
    assert caplog.messages == []
    assert config.text_config.rope_parameters == student.model.config.text_config.rope_parameters
    assert config.vision_config.rope_parameters == student.model.config.vision_config.rope_parameters


def test_equal_exports_have_equal_bytes_and_readable_files(tmp_path: Path, student: Student) -> None:
    for name in ("one", "two"):
        export_student(student, tmp_path / name, base_model="Qwen/Qwen3-VL-4B-Instruct")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
    ]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    # A server under another account can read the weights if it can read the other files.
    assert len({(tmp_path / "one" / name).stat().st_mode for name in files}) == 1


def test_tokenizer_class_is_one_that_both_versions_know(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder / "student", tmp_path / "student"))
    _edit(path / "tokenizer_config.json", lambda settings: settings.update(tokenizer_class="PreTrainedTokenizerFast"))
    student = load_student(path, dtype="float32")
    assert type(student.tokenizer).__name__ == "TokenizersBackend"
    export_student(student, tmp_path / "export")
    assert _read(tmp_path / "export" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = load_student(tmp_path / "export", dtype="float32")
    assert again.tokenizer(PROBE)["input_ids"] == student.tokenizer(PROBE)["input_ids"]


def test_generation_of_an_export_ends_at_the_end_token(tmp_path: Path, student: Student) -> None:
    generation = student.model.generation_config
    pad_id = student.pad_id
    for before, after in (
        (pad_id, [student.eos_id, pad_id]),
        ([pad_id, student.eos_id], [pad_id, student.eos_id]),
        (student.eos_id, student.eos_id),
        (None, [student.eos_id]),
    ):
        generation.eos_token_id, generation._from_model_config = before, True
        export_student(student, tmp_path / "export")
        settings = _read(tmp_path / "export" / "generation_config.json")
        assert settings["eos_token_id"] == after and "_from_model_config" not in settings


def test_export_replaces_an_export_and_nothing_else(tmp_path: Path, student: Student) -> None:
    export_student(student, tmp_path / "export")
    (tmp_path / "export" / "left.txt").write_text("of the earlier export")
    # This is the temporary folder of an export that was killed.
    (tmp_path / ".export.99999999.tmp").mkdir()
    (tmp_path / ".export.99999999.tmp" / "half.txt").write_text("half")
    export_student(student, tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert not {"left.txt", "half.txt"} & {path.name for path in (tmp_path / "export").iterdir()}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        export_student(student, tmp_path / "notes")
    assert (tmp_path / "notes" / "todo.txt").read_text() == "mine"
    # The folder has another model, with its own README or without one.
    for readme in ("", "# My model"):
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        for name, text in (("config.json", "{}"), ("mine.txt", "mine"), *([("README.md", readme)] if readme else [])):
            (model / name).write_text(text)
        with pytest.raises(ValueError, match="an earlier export .recognized by its README.md., got other files"):
            export_student(student, model)
        assert (model / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="choose another folder"):
        export_student(student, tmp_path / "file")
    # A checkpoint creates this folder before it writes to it.
    (tmp_path / "empty").mkdir()
    export_student(student, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("step", ["weights", "tokenizer", "readme"])
def test_interrupted_export_leaves_no_files(
    tmp_path: Path, student: Student, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    owner, name = {
        "weights": (student.model, "save_pretrained"),
        "tokenizer": (student.tokenizer, "save_pretrained"),
        "readme": (rmsd_fast.models.export, "model_card"),
    }[step]
    monkeypatch.setattr(owner, name, disk_full)
    with pytest.raises(OSError, match="No space left"):
        export_student(student, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_readme_describes_the_folder(tmp_path: Path, student: Student) -> None:
    export_student(student, tmp_path / "export", base_model="Qwen/Qwen3-VL-4B-Instruct", stage="distill")
    text = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    for part in (
        "Student of the family `qwen3_vl`",
        f"rmsd_fast {rmsd_fast.__version__}",
        "- Base model: `Qwen/Qwen3-VL-4B-Instruct`\n- Stage of training: `distill`\n",
        "oldest version of transformers that loads this folder is 4.57",
        "do_sample=False",
        "The license of the base model applies.",
        *ANSWER_FORMAT.values(),
    ):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 120 and str(tmp_path) not in text
    rate = VideoConfig(num_frames=None, fps=2.0)
    export_student(student, tmp_path / "export", base_model=str(tmp_path / "my-model"), video=rate)
    text = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "- Base model: `my-model`\n" in text and str(tmp_path) not in text
    assert "- videos: 2 frames per second, at least 4 and at most 768;\n" in text
    assert "- 4,096 to 25,165,824 pixels per video (all frames together), at most 786,432 per frame;\n" in text
    export_student(student, tmp_path / "export", video=VideoConfig(num_frames=16))
    text = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "- videos: 16 evenly spaced frames;\n" in text
    export_student(student, tmp_path / "export")
    text = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "In training" not in text
    assert "Base model" not in text and "Stage" not in text and "\n\n\n" not in text


PROCESSOR_ORACLE = """
import warnings; warnings.filterwarnings("ignore")
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
video, image = processor.video_processor, processor.image_processor
print(type(processor).__name__, type(video).__name__, type(image).__name__.removesuffix("Fast"))
for part in (video, image):
    print(part.patch_size, part.temporal_patch_size, part.merge_size, list(part.image_mean), list(part.image_std))
print(video.cap_pixels_per_frame)
"""


def test_export_includes_its_processor(
    tmp_path: Path, student: Student, run_with_torchvision: Callable[..., str]
) -> None:
    export_student(student, tmp_path / "export")
    lines = run_with_torchvision(PROCESSOR_ORACLE, str(tmp_path / "export")).splitlines()
    assert lines[0] == "Qwen3VLProcessor Qwen3VLVideoProcessor Qwen2VLImageProcessor"
    assert lines[1] == lines[2] == "16 2 2 [0.5, 0.5, 0.5] [0.5, 0.5, 0.5]"
    assert lines[3] == "True"


def _write_as_457(source: Path, target: Path, *, theta: float, dtype_key: str, tokenizer_json: bool) -> Path:
    """Write a copy of an export by hand with the files and spellings of Qwen3-VL as published for transformers 4.57."""
    shutil.copytree(source, target)
    for name in ("README.md", "chat_template.jinja", "generation_config.json", "tiny_student.json"):
        (target / name).unlink(missing_ok=True)
    config = _read(target / "config.json")
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = theta
    text["rope_scaling"] = {
        "mrope_interleaved": True,
        "mrope_section": rope["mrope_section"],
        "rope_type": "default",
    }
    text[dtype_key] = "bfloat16"
    vision.pop("rope_parameters", None)
    vision["model_type"] = "qwen3_vl"
    config.pop("dtype")
    config["transformers_version"] = "4.57.0.dev0"
    # Published configs have these keys only in text_config.
    for key in ("eos_token_id", "pad_token_id"):
        config.pop(key)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    backend = _read(target / "tokenizer.json")
    added = {str(token.pop("id")): token for token in backend["added_tokens"]}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (target / "vocab.json").write_text(json.dumps(backend["model"]["vocab"]), encoding="utf-8")
    merges = "\n".join(map(" ".join, backend["model"]["merges"]))
    (target / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    if not tokenizer_json:
        (target / "tokenizer.json").unlink()
    return target


@pytest.mark.parametrize(
    ("theta", "dtype_key", "tokenizer_json"),
    [(10000.0, "torch_dtype", True), (5000000.0, "dtype", True), (5000000.0, "torch_dtype", False)],
)
def test_a_folder_published_for_457_loads_correctly(
    folder: Path,
    tmp_path: Path,
    student: Student,
    prompt: Prompt,
    theta: float,
    dtype_key: str,
    tokenizer_json: bool,
) -> None:
    path = _write_as_457(
        folder / "student", tmp_path / "published", theta=theta, dtype_key=dtype_key, tokenizer_json=tokenizer_json
    )
    loaded = load_student(path, dtype="float32")
    assert loaded.model.config.text_config.rope_parameters == {
        "rope_type": "default",
        "rope_theta": theta,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    }
    tokenizer = loaded.tokenizer
    assert tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert tokenizer.added_tokens_decoder == student.tokenizer.added_tokens_decoder
    assert tokenizer.special_tokens_map == student.tokenizer.special_tokens_map
    assert tokenizer.all_special_ids == student.tokenizer.all_special_ids
    assert tokenizer(PROBE)["input_ids"] == student.tokenizer(PROBE)["input_ids"]
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert loaded.eos_id == student.eos_id and loaded.model.generation_config.eos_token_id == student.eos_id
    builders = [PromptBuilder(each, VideoConfig(num_frames=4)) for each in (loaded, student)]
    assert torch.equal(builders[0].banned_ids, builders[1].banned_ids)
    assert torch.equal(builders[0].build(prompt.question).input_ids, prompt.input_ids)
    expected = _logits(_set_theta(student, theta).model, prompt)
    assert (_logits(loaded.model, prompt) - expected).abs().max() < 1e-6
    # The other theta gives other logits, so that equal logits are meaningful.
    other = _logits(_set_theta(student, 15000000.0 - theta).model, prompt)
    assert (other - expected).abs().max() > 1e-3
    export_student(loaded, tmp_path / "export")
    assert (_logits(load_student(tmp_path / "export", dtype="float32").model, prompt) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda text: (text.pop("rope_theta"), text["rope_parameters"].pop("rope_theta")),
            r"config\.json: expected one rope theta.*got none; restore",
            id="no theta",
        ),
        pytest.param(
            lambda text: text.update(rope_theta=5000000.0),
            r"got \[5000000\.0, 10000\.0\]; restore the settings",
            id="two thetas",
        ),
        pytest.param(
            lambda text: text["rope_scaling"].update(mrope_section=[8, 4, 4]),
            r"expected the same settings in rope_parameters and .*'mrope_section': \[8, 4, 4\]",
            id="two sections",
        ),
        pytest.param(
            lambda text: text.update(rope_scaling="linear"),
            r"config\.json: rope_scaling: expected an object, got 'linear'; restore",
            id="scaling as text",
        ),
        pytest.param(
            lambda text: text.update(rope_parameters=[1]),
            r"config\.json: rope_parameters: expected an object, got \[1\]; restore",
            id="parameters as a list",
        ),
        pytest.param(
            lambda text: text.update(rope_theta=[5e6]),
            r"config\.json: rope_theta: expected a number, got \[5000000\.0\]; restore",
            id="theta as a list",
        ),
        pytest.param(
            lambda text: text["rope_parameters"].update(rope_theta="5e6"),
            r"config\.json: rope_theta: expected a number, got '5e6'; restore",
            id="theta as text",
        ),
    ],
)
def test_rope_settings_that_versions_read_differently_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = Path(shutil.copytree(folder / "student", tmp_path / "student"))
    _edit(path / "config.json", lambda config: change(config["text_config"]))
    with pytest.raises(ModelError, match=message):
        load_student(path, dtype="float32")


def test_generation_settings_that_cannot_be_exported_are_refused(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder / "student", tmp_path / "student"))
    settings = path / "generation_config.json"
    _edit(settings, lambda config: config.update(do_sample=False, temperature=0.7))
    with pytest.raises(
        ModelError, match=r"generation_config\.json: .*in `temperature`: .*set `do_sample=True` or unset"
    ):
        load_student(path, dtype="float32")
    # These are the settings published with Qwen3-VL.
    _edit(settings, lambda config: config.update(do_sample=True, top_p=0.8, top_k=20, repetition_penalty=1.0))
    export_student(load_student(path, dtype="float32"), tmp_path / "export")
    assert _read(tmp_path / "export" / "generation_config.json")["temperature"] == 0.7
