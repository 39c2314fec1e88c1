"""Test long videos: a vision tower that encodes a video in parts, and 768 frames of a video of half an hour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models import students
from rmsd_fast.models.students import Student, encode_media, load_student

FAMILIES = ("qwen3_vl", "qwen2_5_vl")


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
