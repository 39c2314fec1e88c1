"""Test long videos: a vision tower that encodes a video in parts, and 768 frames of a video of half an hour."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rmsd_fast.config import DataConfig, VideoConfig
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames
from rmsd_fast.made.clips import encode_clip
from rmsd_fast.made.needles import render_needle
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models import students
from rmsd_fast.models.pass_memory import LiveBytes, RowShape
from rmsd_fast.models.students import Student, encode_media, load_student
from rmsd_fast.models.vision_attention import vision_implementation
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.hf import HfRollout

FAMILIES = ("qwen3_vl", "qwen2_5_vl")
FRAMES = 768


@pytest.fixture(scope="module", params=FAMILIES)
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny_student(folder / "student", texts=["What is it?"], layers=2, family=request.param)
    return load_student(folder / "student", dtype="float32")


def noise(student: Student, frames: int, height: int, width: int, *, kind: str = "video") -> Frames:
    """Return frames of noise, `height` by `width` vision tokens each."""
    side, generator = student.preprocessor.factor, torch.Generator().manual_seed(frames)
    pixels = torch.randint(0, 256, (frames, 3, height * side, width * side), dtype=torch.uint8, generator=generator)
    grid = student.preprocessor.grid(frames, height * side, width * side)
    return Frames(pixels, (), grid, kind, student.preprocessor)


def prompt_of(*media: Frames) -> Prompt:
    places = sum(t * h * w // 4 for t, h, w in (frames.grid_thw for frames in media))
    ids = torch.zeros(places, dtype=torch.int64)
    return Prompt(Question(id="q", question="?", task_type="open"), ids, ids + 2, ids.expand(3, -1), media)


@pytest.mark.parametrize(
    ("tokens", "expected_calls"),
    [
        # A call has at least one temporal patch or one image.
        (1, [[6]] * 5 + [[12]] + [[2]] * 3),
        (7, [[6]] * 5 + [[12]] + [[6]]),
        (20, [[18], [12], [12, 6]]),
        (36, [[30], [12, 6]]),
        (48, [[30, 12, 6]]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_video_in_parts_has_the_features_of_the_whole(
    student: Student, dtype: torch.dtype, tokens: int, expected_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 9 frames are 5 temporal patches of 2x3 tokens, the last of which repeats a frame. The image has 12 tokens.
    prompt = prompt_of(noise(student, 9, 2, 3), noise(student, 1, 3, 4, kind="image"), noise(student, 6, 1, 2))
    calls: list[list[int]] = []
    run = students._run_tower

    def counted(model, media):
        calls.append([t * h * w // 4 for t, h, w in (frames.grid_thw for frames in media)])
        return run(model, media)

    monkeypatch.setattr(students, "_run_tower", counted)
    model = student.model.to(dtype)
    with torch.no_grad():
        whole = encode_media(model, [prompt])
        assert calls == [[30, 12, 6]]
        calls.clear()
        parts = encode_media(model, [prompt], tokens_per_call=tokens)
    assert calls == expected_calls
    # Matrix products of other sizes are rounded differently, so the bits may differ.
    bound = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for ours, expected in zip((parts.pooled, *parts.deepstack), (whole.pooled, *whole.deepstack), strict=True):
        assert len(ours) == len(expected) == 3
        for a, b in zip(ours, expected, strict=True):
            assert a.shape == b.shape and a.dtype == dtype
            assert (a - b).abs().max() <= bound * b.abs().max()


def test_the_bytes_of_the_tower_follow_the_bound_and_not_the_video(student: Student) -> None:
    model = student.model.to(torch.float32)
    model.set_attn_implementation({"vision_config": vision_implementation(model)})

    def peak(frames: int, tokens: int | None) -> int:
        total, kept = bytes_of_encoding(model, prompt_of(noise(student, frames, 2, 2)), tokens)
        return total - kept

    # In one call, twice the frames take twice the bytes. In parts of 32 tokens, only the features grow.
    whole, double = peak(64, None), peak(128, None)
    assert 1.9 < double / whole < 2.1
    parts, double_parts = peak(64, 32), peak(128, 32)
    assert double_parts < 1.2 * parts and parts < 0.4 * whole


def bytes_of_encoding(model: PreTrainedModel, prompt: Prompt, tokens: int | None) -> tuple[int, int]:
    """Return the bytes at the peak of `encode_media`, and those of its features."""
    pixels = [frames.pixels for frames in prompt.media]
    live = LiveBytes([*model.parameters(), *model.buffers(), *pixels], "cpu", RowShape("", (), (), ()))
    with torch.no_grad(), live:
        features = encode_media(model, [prompt], tokens_per_call=tokens)
    kept = sum(medium.nbytes for layer in (features.pooled, *features.deepstack) for medium in layer)
    return max(sum(counts.values()) for counts in live.peaks.values()), kept


def test_features_of_many_calls_exist_once(student: Student) -> None:
    model = student.model.to(torch.float32)
    model.set_attn_implementation({"vision_config": vision_implementation(model)})

    def peak(steps: int) -> tuple[int, int]:
        # One video in many parts, and media that share calls with parts of it.
        media = (noise(student, 1, 1, 2, kind="image"), noise(student, 2 * steps, 1, 4), noise(student, 2, 1, 2))
        return bytes_of_encoding(model, prompt_of(*media), 8)

    layers = 1 + student.family.deepstack_layers(model.config)
    (small, small_kept), (large, large_kept) = peak(40), peak(2000 // layers)
    assert large_kept > 1.5 * (small - small_kept)
    # Whatever the length of the video, the features and one call.
    assert large - large_kept <= 1.05 * (small - small_kept)


def test_parts_of_a_video_are_not_taken_for_the_video(student: Student) -> None:
    frames = replace(noise(student, 8, 2, 2), key="video", timestamps_s=tuple(map(float, range(8))))
    parts = [part for call in students._calls_of([frames], 8) for part in call]
    assert [part.timestamps_s for part in parts] == [(0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0)]
    assert [part.key for part in parts] == ["", ""] and [part.grid_thw for part in parts] == [(2, 4, 4)] * 2


def test_768_frames_of_half_an_hour_are_answered_like_by_plain_transformers(student: Student, tmp_path: Path) -> None:
    model = student.model.to(torch.float32)
    pixels = render_needle("red", 900, 4, random.Random(0))
    encode_clip(pixels, tmp_path / "long.mp4", long=True)
    question = Question(id="q", question="What is it?", task_type="open", videos=(str(tmp_path / "long.mp4"),))
    side = student.preprocessor.factor
    with MediaReader(DataConfig(decoder="cpu")) as media:
        builder = PromptBuilder(student, VideoConfig(num_frames=FRAMES, min_video_pixels=side**2), media)
        prompt = builder.build(question, max_tokens=8192)
        # The length is known from the headers alone.
        assert builder.length(question, max_tokens=8192) == len(prompt.input_ids)
    (frames,) = prompt.media
    assert frames.grid_thw == (FRAMES // 2, 2, 2) and frames.pixels.shape == (FRAMES, 3, side, side)
    assert int((prompt.mm_token_type_ids == 2).sum()) == FRAMES // 2
    if student.preprocessor.family == "qwen3_vl":
        seconds = [round(1799 * index / (FRAMES - 1)) for index in range(FRAMES)]
    else:
        seconds = torch.arange(0, 1800, 1800 / FRAMES).int().tolist()
    assert frames.timestamps_s == tuple(map(float, seconds))
    # The event is on the frames of its seconds, and on no other.
    red = (frames.pixels[:, 0, 2, 2] > 150) & (frames.pixels[:, 1, 2, 2] < 80)
    shown = [second for second, is_red in zip(seconds, red.tolist(), strict=True) if is_red]
    assert shown == [second for second in seconds if 900 <= second < 904] and shown

    sampling = Sampling(n=1, temperature=0.0, max_new_tokens=3)
    (whole,), (parts,) = (
        HfRollout(builder, prompts_per_batch=1, device=torch.device("cpu"), tokens_per_call=tokens).generate(
            model, [prompt], sampling
        )[0]
        for tokens in (None, 50)
    )
    assert torch.equal(whole.token_ids, parts.token_ids)
    torch.testing.assert_close(parts.logp, whole.logp, rtol=0, atol=1e-5)
    ids = torch.cat([prompt.input_ids, parts.token_ids])
    types = torch.cat([prompt.mm_token_type_ids, torch.zeros_like(parts.token_ids)])
    positions = {}
    if student.preprocessor.family != "qwen3_vl":
        # Versions 5.3 to 5.23 of transformers place the text after a video of Qwen2.5-VL elsewhere.
        later = torch.arange(len(parts.token_ids)) + prompt.next_position
        positions = {"position_ids": torch.cat([prompt.position_ids, later.expand(3, -1)], 1)[:, None]}
    with torch.no_grad():
        logits = model(
            input_ids=ids[None],
            mm_token_type_ids=types[None],
            pixel_values_videos=video_patches(frames.pixels, frames.preprocessor),
            video_grid_thw=torch.tensor([frames.grid_thw]),
            **positions,
        ).logits[0, len(prompt.input_ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, parts.token_ids[:, None])[:, 0]
    torch.testing.assert_close(parts.logp, expected, rtol=0, atol=1e-4)
