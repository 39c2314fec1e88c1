"""Test Qwen2.5-VL students against transformers: prompts, positions, pixels, features, rows, rollouts and folders.

The oracle is a process with transformers, its processor and torchvision, which gets the raw frames. Positions of text
after a long video are those of transformers 4.57. Name the interpreter of an environment that has it in
RMSD_FAST_TRANSFORMERS_457 (see test_export_versions.py) to compare them; without it, numbers worked out by hand remain.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from media_files import noise_frames, write_clip
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torchcodec.decoders import VideoDecoder
from transformers import AutoModelForImageTextToText

from rmsd_fast.config import ModelConfig, ModelError, VideoConfig
from rmsd_fast.data.packing import gather_rows, make_rows
from rmsd_fast.data.preprocess import Preprocessor, video_patches
from rmsd_fast.data.prompts import Prompt, PromptBuilder, PromptError
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames
from rmsd_fast.losses import linear_logprob
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.adapters import POLICY, adapted_layers, add_adapter
from rmsd_fast.models.export import export_student
from rmsd_fast.models.families import FAMILIES
from rmsd_fast.models.families.qwen2_5_vl import position_ids, seconds_per_step
from rmsd_fast.models.folders import open_folder
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix, unsupported
from rmsd_fast.models.students import Student, encode_media, forward_hidden, freeze, load_student
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.hf import HfRollout

TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]
VARIABLE = "RMSD_FAST_TRANSFORMERS_457"
VIDEO = VideoConfig(num_frames=4, min_video_pixels=3136, min_image_pixels=3136)
# Frames, height, width and rate. The longest has more time positions than rows and columns of tokens.
CLIPS = {"a": (9, 64, 96, 4.0), "b": (14, 90, 90, 7.0), "long": (24, 64, 96, 1.0)}
# Names of the media of each prompt; c is an image.
CASES = {
    "video": ["a"],
    "two videos": ["a", "b"],
    "image": ["c"],
    "videos and images": ["b", "c", "a", "c"],
    "text": [],
    "long video": ["long"],
    "long video and others": ["a", "long", "c"],
}
# transformers 5.3 to 5.23 places the text after a long video elsewhere, so the oracle gets these positions from us.
# They are compared with transformers 4.57 and with numbers worked out by hand below.
LONG = [name for name in CASES if name.startswith("long")]
RESPONSES = ("red", "a much longer answer", "<answer>B</answer>")

ORACLE = """
import warnings; warnings.filterwarnings("ignore")
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata
job = torch.load(sys.argv[1])
processor = AutoProcessor.from_pretrained(job["folder"])
model = AutoModelForImageTextToText.from_pretrained(job["folder"], dtype=torch.float32)
body, found = model.model, {}
for name, case in job["cases"].items():
    text = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
    size = {"shortest_edge": job["least"], "longest_edge": job["most"]}
    inputs = processor(
        text=[text],
        images=case["images"] or None,
        videos=[frames for frames, _ in case["videos"]] or None,
        images_kwargs={"size": size},
        videos_kwargs={
            "size": size,
            "cap_pixels_per_frame": True,
            "do_sample_frames": True,
            "num_frames": job["num_frames"],
            "video_metadata": [
                VideoMetadata(total_num_frames=len(frames), fps=fps) for frames, fps in case["videos"]
            ] or None,
        },
        return_tensors="pt",
    )
    inputs = dict(inputs)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    grids = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if key in inputs}
    out = {"inputs": inputs, "positions": body.get_rope_index(ids, types, **grids)[0][:, 0]}
    with torch.no_grad():
        if "pixel_values" in inputs:
            out["image"] = body.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        if "pixel_values_videos" in inputs:
            out["video"] = body.get_video_features(
                inputs["pixel_values_videos"], inputs["video_grid_thw"]
            ).pooler_output
        rows = []
        for response in case["responses"]:
            whole = {key: value for key, value in inputs.items() if key != "attention_mask"}
            whole["input_ids"] = torch.cat([ids[0], response])[None]
            whole["mm_token_type_ids"] = torch.cat([types[0], torch.zeros_like(response)])[None]
            if case["positions"] is not None:
                after = int(case["positions"].max()) + 1 + torch.arange(len(response)).expand(3, -1)
                whole["position_ids"] = torch.cat([case["positions"], after], 1)[:, None]
            hidden = body(**whole).last_hidden_state[0]
            logp = model.lm_head(hidden[len(ids[0]) - 1 : -1]).log_softmax(-1)
            rows.append((hidden, logp.gather(-1, response[:, None])[:, 0]))
        out["rows"] = rows
        index = body.get_rope_index
        if case["positions"] is not None:
            end = case["positions"].max() + 1 - ids.shape[1]
            body.get_rope_index = lambda *_, **__: (case["positions"][:, None], end.view(1, 1))
        generated = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, suppress_tokens=job["banned"], eos_token_id=job["eos"]
        )
        body.get_rope_index = index
        out["generated"] = generated[0, ids.shape[1] :].tolist()
    found[name] = out
torch.save({"processor": type(processor).__name__, "cases": found}, sys.argv[2])
"""

POSITIONS_457 = """
import sys, types
import torch, transformers
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
assert transformers.__version__.startswith("4.57"), transformers.__version__
job = torch.load(sys.argv[1])
body = types.SimpleNamespace(config=Qwen2_5_VLConfig.from_pretrained(job["folder"]))
out = {name: Qwen2_5_VLModel.get_rope_index(body, **inputs)[0][:, 0] for name, inputs in job["cases"].items()}
torch.save(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    build_tiny_student(folder / "student", texts=TEXTS, layers=2, family="qwen2_5_vl")
    for seed, (name, (frames, height, width, fps)) in enumerate(CLIPS.items()):
        write_clip(folder / f"{name}.mp4", noise_frames(frames, height, width, seed=seed), fps=fps)
    Image.fromarray(noise_frames(1, 70, 90, seed=9)[0].permute(1, 2, 0).numpy()).save(folder / "c.png")
    return folder


@pytest.fixture
def student(folder: Path) -> Student:
    return load_student(folder / "student", dtype="float32")


@pytest.fixture(scope="module")
def builder(folder: Path) -> PromptBuilder:
    return PromptBuilder(load_student(folder / "student", dtype="float32"), VIDEO)


def _question(folder: Path, media: list[str]) -> Question:
    """Return a question whose text has its media in the given order."""
    text = "".join("<image>" if name == "c" else "<video>" for name in media)
    return Question(
        id="-".join(media) or "text",
        question=f"{text}What is it?",
        task_type="open",
        videos=tuple(str(folder / f"{name}.mp4") for name in media if name != "c"),
        images=tuple(str(folder / f"{name}.png") for name in media if name == "c"),
    )


@pytest.fixture(scope="module")
def prompts(folder: Path, builder: PromptBuilder) -> dict[str, Prompt]:
    return {name: builder.build(_question(folder, media)) for name, media in CASES.items()}


@pytest.fixture(scope="module")
def responses(builder: PromptBuilder) -> list[torch.Tensor]:
    return [builder.encode_response(text) for text in RESPONSES]


@pytest.fixture(scope="module")
def oracle(
    folder: Path,
    builder: PromptBuilder,
    prompts: dict[str, Prompt],
    responses: list[torch.Tensor],
    run_with_torchvision: Any,
) -> dict[str, Any]:
    cases = {}
    picture = torch.from_numpy(np.array(Image.open(folder / "c.png"))).permute(2, 0, 1).contiguous()
    for name, media in CASES.items():
        content = [{"type": "image" if medium == "c" else "video"} for medium in media]
        text = prompts[name].question.question.rpartition(">")[2]
        text = builder.tokenizer.decode(prompts[name].input_ids).rpartition(text)[2].partition("<|im_end|>")[0]
        content.append({"type": "text", "text": f"What is it?{text}"})
        videos = [VideoDecoder(folder / f"{medium}.mp4")[:] for medium in media if medium != "c"]
        rates = [CLIPS[medium][3] for medium in media if medium != "c"]
        cases[name] = {
            "messages": [{"role": "user", "content": content}],
            "videos": list(zip(videos, rates, strict=True)),
            "images": [picture] * media.count("c"),
            "responses": responses,
            "positions": prompts[name].position_ids if name in LONG else None,
        }
    job = {
        "folder": str(folder / "student"),
        "cases": cases,
        "least": VIDEO.min_video_pixels,
        "most": VIDEO.max_frame_pixels,
        "num_frames": VIDEO.num_frames,
        "banned": builder.banned_ids.tolist(),
        "eos": builder.eos_id,
    }
    torch.save(job, folder / "job.pt")
    run_with_torchvision(ORACLE, str(folder / "job.pt"), str(folder / "found.pt"))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", CASES)
def test_prompts_pixels_and_positions_equal_those_of_the_processor(
    prompts: dict[str, Prompt], oracle: dict[str, Any], name: str
) -> None:
    prompt, theirs = prompts[name], oracle["cases"][name]
    inputs = theirs["inputs"]
    assert oracle["processor"] == "Qwen2_5_VLProcessor"
    assert prompt.input_ids.tolist() == inputs["input_ids"][0].tolist()
    assert prompt.mm_token_type_ids.tolist() == inputs["mm_token_type_ids"][0].tolist()
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        media = [frames for frames in prompt.media if frames.kind == kind]
        assert (pixels in inputs) == bool(media)
        if media:
            assert [list(frames.grid_thw) for frames in media] == inputs[f"{kind}_grid_thw"].tolist()
            ours = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in media])
            # The processor multiplies where this code divides: one unit in the last place of values up to 2.7.
            assert (ours - inputs[pixels]).abs().max() < 1e-6
    seconds = [seconds_per_step(frames) for frames in prompt.media if frames.kind == "video"]
    assert seconds == pytest.approx(torch.as_tensor(inputs.get("second_per_grid_ts", [])).tolist(), rel=1e-6)
    assert torch.equal(prompt.position_ids, theirs["positions"]) == (name not in LONG)


def test_features_equal_those_of_transformers(
    student: Student, prompts: dict[str, Prompt], oracle: dict[str, Any]
) -> None:
    with torch.no_grad():
        features = encode_media(student.model, list(prompts.values()))
    assert features.deepstack == []
    for number, name in enumerate(prompts):
        for kind in ("image", "video"):
            expected = oracle["cases"][name].get(kind, ())
            ours = [features.pooled[m] for m in features.media_of(number) if features.kinds[m] == kind]
            assert len(ours) == len(expected)
            for one, other in zip(ours, expected, strict=True):
                assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_rows_equal_those_of_transformers(
    student: Student,
    prompts: dict[str, Prompt],
    responses: list[torch.Tensor],
    oracle: dict[str, Any],
    packing: str,
) -> None:
    """Hidden states and log-probs of all prompts together equal those of each row alone, from the raw frames on."""
    asked = list(prompts.values())
    rows = make_rows(packing, asked, [responses] * len(asked), pad_id=student.pad_id)
    if packing == "shared":
        enable_shared_prefix(student.model)
    with torch.no_grad():
        hidden = forward_hidden(student.model, rows, encode_media(student.model, asked)).flatten(0, 1)
        predicting = gather_rows(hidden, rows)
        logp = linear_logprob(predicting, student.model.lm_head.weight, rows.targets)
    expected = [row for name in prompts for row in oracle["cases"][name]["rows"]]
    parts = zip(
        expected,
        predicting.split(rows.lengths_list),
        logp.split(rows.lengths_list),
        rows.last,
        strict=True,
    )
    for (theirs, their_logp), ours, our_logp, last in parts:
        assert (ours - theirs[-len(ours) - 1 : -1]).abs().max() < 1e-5
        assert (hidden[last] - theirs[-1]).abs().max() < 1e-5
        assert (our_logp - their_logp).abs().max() < 1e-5
    # Different media give different hidden states.
    assert (expected[0][0][-1] - expected[6][0][-1]).abs().max() > 1e-2


def test_greedy_rollouts_equal_generate(
    student: Student, builder: PromptBuilder, prompts: dict[str, Prompt], oracle: dict[str, Any]
) -> None:
    engine = HfRollout(builder, prompts_per_batch=4, device=torch.device("cpu"))
    groups = engine.generate(student.model, list(prompts.values()), Sampling(n=1, temperature=0.0, max_new_tokens=12))
    ours = {name: group[0].token_ids.tolist() for name, group in zip(prompts, groups, strict=True)}
    assert ours == {name: case["generated"] for name, case in oracle["cases"].items()}
    assert len(set(map(tuple, ours.values()))) > 1


def _frames(steps: int, rate: float, kind: str = "video") -> Frames:
    grid = (steps, 4, 6)
    preprocessor = Preprocessor(patch_size=14, family="qwen2_vl")
    return Frames(torch.zeros(0), (), grid, kind, preprocessor, frames_per_s=rate if kind == "video" else None)


def test_positions_by_hand(student: Student) -> None:
    """Two frames per second are one second per step, which is two positions, and 2 x 3 tokens per step."""
    types = torch.tensor([0, 0] + [2] * 18 + [0] + [1] * 6 + [0])
    media = [_frames(3, 2.0), _frames(1, 0.0, "image")]
    time, height, width = position_ids(student.model, types, types, media).tolist()
    assert time == [0, 1] + [2] * 6 + [4] * 6 + [6] * 6 + [7] + [8] * 6 + [11]
    assert height == [0, 1] + [2, 2, 2, 3, 3, 3] * 3 + [7] + [8, 8, 8, 9, 9, 9] + [11]
    assert width == [0, 1] + [2, 3, 4] * 6 + [7] + [8, 9, 10] * 2 + [11]
    # 1.6 frames per second are 2.5 positions per step, rounded down after the product.
    times = position_ids(student.model, types, types, [_frames(3, 1.6), media[1]])[0]
    assert times[2:20:6].tolist() == [2, 4, 7] and int(times[20]) == 8
    with pytest.raises(ValueError, match="frames_per_s: expected the rate of the chosen frames, got none"):
        position_ids(student.model, types, types, [replace(media[0], frames_per_s=None), media[1]])


def test_the_rate_of_a_section_is_that_of_its_frames(folder: Path, builder: PromptBuilder) -> None:
    """A section of 4 to 11 s of a video with a frame per second has 8 frames, of which 4 are taken."""
    question = replace(_question(folder, ["long"]), spans=((4.0, 11.0),))
    (frames,) = builder.build(question).media
    assert frames.timestamps_s == (4.0, 6.0, 8.0, 10.0) and frames.frames_per_s == 0.5
    by_rate = PromptBuilder(load_student(folder / "student", dtype="float32"), VideoConfig(num_frames=None, fps=0.5))
    # 24 frames at 1 Hz give 12, and two of them are four seconds.
    (frames,) = by_rate.build(_question(folder, ["long"])).media
    assert (len(frames.pixels), frames.frames_per_s, seconds_per_step(frames)) == (12, 0.5, 4.0)


def test_temporal_questions_need_frames_from_time_0(folder: Path, builder: PromptBuilder) -> None:
    """Prompts state no times, so two sections of a video look alike although their answers differ."""
    whole = replace(_question(folder, ["long"]), task_type="temporal", answer="5 to 6")
    builder.build(whole)
    with pytest.raises(PromptError, match=r"its frames begin at 4 s of the file's clock, which prompts of Qwen2\.5-VL"):
        builder.build(replace(whole, spans=((4.0, 11.0),)))


@pytest.mark.slow
def test_positions_equal_those_of_transformers_457(folder: Path, student: Student, prompts: dict[str, Prompt]) -> None:
    """4.57 rounds the seconds of a step down, so the steps of all videos here have whole seconds."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} is not set to an interpreter with transformers 4.57; see the top of this file")
    expected, cases = {}, {}
    for name, prompt in prompts.items():
        media = [replace(m, frames_per_s=2 / max(1, round(2 / m.frames_per_s))) if m.frames_per_s else m
                 for m in prompt.media]  # fmt: skip
        expected[name] = position_ids(student.model, prompt.input_ids, prompt.mm_token_type_ids, media)
        inputs = {"input_ids": prompt.input_ids[None]}
        for kind in ("image", "video"):
            grids = [frames.grid_thw for frames in media if frames.kind == kind]
            inputs |= {f"{kind}_grid_thw": torch.tensor(grids)} if grids else {}
        seconds = [seconds_per_step(frames) for frames in media if frames.kind == "video"]
        cases[name] = inputs | ({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})
    torch.save({"folder": str(folder / "student"), "cases": cases}, folder / "positions.pt")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    arguments = [python, "-c", POSITIONS_457, str(folder / "positions.pt"), str(folder / "positions457.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(folder / "positions457.pt")
    for name in CASES:
        assert torch.equal(expected[name], theirs[name]), name
        # Here, versions 5.3 to 5.23 differ.
        prompt, inputs = prompts[name], dict(cases[name])
        installed, _ = student.model.model.get_rope_index(
            inputs.pop("input_ids"), prompt.mm_token_type_ids[None], **inputs
        )
        assert torch.equal(installed[:, 0], theirs[name]) == (name not in LONG)


def _gradients(student: Student) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_transformers(
    student: Student, prompts: dict[str, Prompt], responses: list[torch.Tensor], packing: str, checkpointing: bool
) -> None:
    freeze(student.model, train_vision=True)
    asked = [prompts[name] for name in ("two videos", "image", "text")]
    weight = torch.randn(student.model.config.text_config.hidden_size)
    for prompt in asked:
        inputs: dict[str, torch.Tensor] = {}
        for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
            media = [frames for frames in prompt.media if frames.kind == kind]
            if media:
                inputs[pixels] = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in media])
                inputs[f"{kind}_grid_thw"] = torch.tensor([frames.grid_thw for frames in media])
        for response in responses:
            after = prompt.next_position + torch.arange(len(response)).expand(3, -1)
            hidden = student.model.model(
                input_ids=torch.cat([prompt.input_ids, response])[None],
                position_ids=torch.cat([prompt.position_ids, after], 1)[:, None],
                **inputs,
            ).last_hidden_state[0]
            (hidden[-len(response) - 1 : -1] @ weight).sum().backward()
    theirs = _gradients(student)
    student.model.zero_grad()
    if packing == "shared":
        enable_shared_prefix(student.model)
    if checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
        student.model.train()
    rows = make_rows(packing, asked, [responses] * len(asked), pad_id=student.pad_id)
    hidden = forward_hidden(student.model, rows, encode_media(student.model, asked))
    (gather_rows(hidden.flatten(0, 1), rows) @ weight).sum().backward()
    ours = _gradients(student)
    assert ours.keys() == theirs.keys() and "model.visual.patch_embed.proj.weight" in ours
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        # Softmax does not depend on a bias of all keys, so this gradient is zero but for rounding.
        assert scale > 1e-6 or name.endswith("k_proj.bias"), name
        assert (ours[name] - gradient).abs().max() <= 1e-4 * scale + 1e-5, name


def test_a_frozen_tower_has_no_gradient(student: Student, prompts: dict[str, Prompt]) -> None:
    freeze(student.model, train_vision=False)
    frozen = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in student.model.named_parameters() if ".visual." in name}
    assert not encode_media(student.model, [prompts["video"]]).pooled[0].requires_grad


def _as_on_the_hub(source: Path, target: Path) -> Path:
    """Write a copy of a student by hand with the files, spellings and weight names of the published Qwen2.5-VL."""
    shutil.copytree(source, target)
    for name in ("README.md", "video_preprocessor_config.json", "tiny_student.json"):
        (target / name).unlink()
    config = json.loads((target / "config.json").read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    for name in ("rope_parameters", "layer_types", "model_type", "bos_token_id"):
        text.pop(name)
    text["rope_scaling"] = {"type": "mrope", "mrope_section": text["rope_scaling"]["mrope_section"]}
    text |= {"use_sliding_window": False, "sliding_window": 32768, "torch_dtype": "bfloat16"}
    vision["in_chans"], vision["spatial_patch_size"] = vision.pop("in_channels"), 14
    del vision["model_type"]
    (target / "config.json").write_text(json.dumps({**config, **text}))
    image = json.loads((target / "preprocessor_config.json").read_text())
    size = image.pop("size")
    image |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    image["image_processor_type"] = "Qwen2VLImageProcessor"
    (target / "preprocessor_config.json").write_text(json.dumps(image))
    # Without a system turn, the published template writes one of its own.
    first = "{%- if messages[0].role != 'system' -%}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif -%}"
    template = (target / "chat_template.jinja").read_text()
    (target / "chat_template.jinja").unlink()
    (target / "chat_template.json").write_text(json.dumps({"chat_template": first + template}))
    weights = load_file(target / "model.safetensors")
    old = {"model.visual.": "visual.", "model.language_model.": "model."}
    renamed = {}
    for name, tensor in weights.items():
        for new, prefix in old.items():
            if name.startswith(new):
                name = prefix + name.removeprefix(new)
                break
        renamed[name] = tensor.clone()
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_folder_as_on_the_hub_is_the_same_student(
    folder: Path, tmp_path: Path, student: Student, prompts: dict[str, Prompt]
) -> None:
    published = load_student(_as_on_the_hub(folder / "student", tmp_path / "published"), dtype="float32")
    assert published.preprocessor == student.preprocessor
    rope = {"type": "mrope", **student.model.config.text_config.rope_parameters}
    assert published.model.config.text_config.rope_parameters == rope
    ours, theirs = student.model.state_dict(), published.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    question = prompts["two videos"].question
    built = PromptBuilder(published, VIDEO).build(question)
    text = student.tokenizer.decode(built.input_ids)
    assert text.startswith("<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n")
    assert text.endswith(student.tokenizer.decode(prompts["two videos"].input_ids))
    extra = len(built.input_ids) - len(prompts["two videos"].input_ids)
    assert torch.equal(built.position_ids[:, extra:] - extra, prompts["two videos"].position_ids)
    assert unsupported(published.model) is None
    # An export of it loads again, also with an adapter merged into it.
    add_adapter(published.model, POLICY, ModelConfig(adapter="lora", lora_rank=2), seed=0)
    layers = adapted_layers(published.model)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B[POLICY].weight, std=0.1)
    with torch.no_grad():
        expected = published.model(input_ids=torch.arange(20)[None]).logits
    export_student(published, tmp_path / "export", base_model="Qwen/Qwen2.5-VL-7B-Instruct")
    again, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert (again(input_ids=torch.arange(20)[None]).logits - expected).abs().max() < 1e-5
        assert (student.model(input_ids=torch.arange(20)[None]).logits - expected).abs().max() > 1e-3
        base = type(student.model).from_pretrained(tmp_path / "published", dtype=torch.float32)
        alone = PeftModel.from_pretrained(base, tmp_path / "export" / "adapter")(input_ids=torch.arange(20)[None])
    assert (alone.logits - expected).abs().max() < 1e-5
    open_folder(tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "`qwen2_5_vl`" in card and "transformers 5.3 to 5.23 lets it begin earlier" in card


def _edit(path: Path, change: Any) -> None:
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "video_preprocessor_config.json",
            lambda s: s.update(video_processor_type="Qwen3VLVideoProcessor"),
            r"the family: expected qwen2_vl as in config\.json, got qwen3_vl in the preprocessor",
        ),
        ("config.json", lambda s: s["text_config"].update(rope_theta=5.0), "expected one rope theta"),
        ("config.json", lambda s: s["vision_config"].update(depth="x"), "a configuration of a Qwen2.5-VL model"),
        ("config.json", lambda s: s["vision_config"].update(patch_size=16), "patch, temporal patch and merge size"),
    ],
)
def test_damaged_folders_are_refused(folder: Path, tmp_path: Path, file: str, change: Any, message: str) -> None:
    path = Path(shutil.copytree(folder / "student", tmp_path / "student"))
    open_folder(path)
    _edit(path / file, change)
    with pytest.raises(ModelError, match=message):
        open_folder(path)


def test_sliding_windows_are_refused(folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder / "student", tmp_path / "student"))
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None}
    _edit(path / "config.json", lambda config: config["text_config"].update(sliding))
    assert "sliding-window layers" in unsupported(load_student(path, dtype="float32").model)


def test_the_tiny_student_is_the_same_each_time_and_has_windows(folder: Path, tmp_path: Path) -> None:
    build_tiny_student(tmp_path / "again", texts=TEXTS, layers=2, family="qwen2_5_vl")
    for path in (folder / "student").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    with pytest.raises(ModelError, match="choose another folder"):
        build_tiny_student(tmp_path / "again", texts=TEXTS, layers=2)
    model = load_student(tmp_path / "again", dtype="float32").model
    assert isinstance(model, FAMILIES["qwen2_5_vl"].model_class)
    vision = model.config.vision_config
    # Both kinds of layers occur, and the frames here have more rows or columns of tokens than a window.
    assert vision.depth == 2 and list(vision.fullatt_block_indexes) == [1]
    assert vision.window_size // vision.patch_size // vision.spatial_merge_size == 2
    disable_shared_prefix(model)
