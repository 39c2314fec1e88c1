"""Test the needles: videos of half an hour with an event, their questions, and what a number of frames can show."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.media.needles import ceiling, seen_share
from rmsd_fast.config import SettingsError
from rmsd_fast.data.records import load_questions
from rmsd_fast.made.clips import COLORS, MadeMaterial
from rmsd_fast.made.needles import EVENT_COLORS, is_heldout_start, make_needles, render_needle
from rmsd_fast.settings import load_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeMaterial:
    return make_needles(tmp_path_factory.mktemp("needles"), train_clips=10, heldout_clips=8, seed=0)


def event_frames(frames: torch.Tensor, color: str) -> list[int]:
    """Return the frames whose corners have the color."""
    corners = frames[:, :, [0, 0, 31, 31], [0, 31, 0, 31]].float()
    expected = torch.tensor(COLORS[color]).float()[None, :, None]
    return ((corners - expected).abs().amax((1, 2)) < 12).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("color", EVENT_COLORS)
def test_the_event_is_on_its_frames_only(color: str) -> None:
    frames = render_needle(color, 1796, 4, random.Random(1))
    assert frames.shape == (1800, 3, 32, 32) and frames.dtype == torch.uint8
    assert event_frames(frames, color) == [1796, 1797, 1798, 1799]
    others = frames[:1796]
    # All other frames are gray on black, and no frame has a single color, which would be taken for damage.
    assert torch.equal(others[:, 0], others[:, 1]) and torch.equal(others[:, 1], others[:, 2])
    assert (frames.amax((2, 3)) > frames.amin((2, 3))).any(1).all()


def test_files_show_what_the_questions_ask(made: MadeMaterial) -> None:
    decoders = pytest.importorskip("torchcodec.decoders", reason="needs torchcodec and FFmpeg", exc_type=Exception)
    train = load_questions(made.train, media_root=made.folder)
    heldout = load_questions(made.heldout, media_root=made.folder)
    assert Counter(q.meta["groups"]["event_s"] for q in train) == dict.fromkeys(
        ("1 s", "4 s", "16 s", "64 s", "256 s"), 2
    )
    assert Counter(q.meta["groups"]["event_s"] for q in heldout) == {
        "1 s": 4,
        "4 s": 1,
        "16 s": 1,
        "64 s": 1,
        "256 s": 1,
    }
    assert Counter(q.answer for q in heldout) == dict.fromkeys("ABCD", 2)
    for question in (*train, *heldout):
        event = question.meta["event"]
        assert question.options == EVENT_COLORS and question.options["ABCD".index(question.answer)] == event["color"]
        assert is_heldout_start(event["color"], event["start"]) == question.id.startswith("heldout")
    for question in (train[0], heldout[0]):
        event, length = question.meta["event"], int(question.meta["groups"]["event_s"].split()[0])
        frames = decoders.VideoDecoder(question.videos[0])[:]
        assert len(frames) == 1800
        assert event_frames(frames, event["color"]) == list(range(event["start"], event["start"] + length))


def test_equal_settings_reuse_the_folder_and_others_are_refused(made: MadeMaterial) -> None:
    parent = made.folder.parent
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    assert make_needles(parent, train_clips=10, heldout_clips=8, seed=0) == made
    assert {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == before
    settings = json.loads((made.folder / "made.json").read_text())
    other = Path(f"{made.folder}-other")
    other.mkdir()
    (other / "made.json").write_text(json.dumps(settings | {"seed": 1}))
    other.rename(parent / "moved")
    made.folder.rename(other)
    (parent / "moved").rename(made.folder)
    with pytest.raises(SettingsError, match="expected generated clips with the settings"):
        make_needles(parent, train_clips=10, heldout_clips=8, seed=0)


def test_the_share_that_frames_can_show() -> None:
    # One-second events: F of the 1,800 frames, so that the best score with four options is F/1800 + (1 - F/1800) / 4.
    for family in ("qwen3_vl", "qwen2_vl"):
        for frames in (16, 128, 768, 1800):
            assert seen_share(frames, 1, family) == frames / 1800
        # 128 frames are at most 15 s apart, and 16 frames 120 s.
        assert seen_share(128, 16, family) == 1 and seen_share(16, 121, family) == 1 and seen_share(16, 100, family) < 1
    # Frames 0, 900 (899.5 rounded to even) and 1799 show an event of 10 s that starts at 0, at 891 to 900 or at 1790.
    assert seen_share(3, 10, "qwen3_vl") == 12 / 1791
    # Frames 0 and 900 show one that starts at 0, or at 891 to 900.
    assert seen_share(2, 10, "qwen2_vl") == 11 / 1791
    assert ceiling(0.0) == 0.25 and ceiling(1.0) == 1.0 and ceiling(128 / 1800) == pytest.approx(0.30333, abs=1e-5)


def test_settings() -> None:
    settings = load_settings("needles")
    assert settings.made.source == "needles" and settings.stages == ["sft"] and settings.video.num_frames == 128
    with pytest.raises(SettingsError, match=r"has no effect: a video of made\.source=needles has one question"):
        load_settings("needles", ["made.questions_per_clip=1"])
    with pytest.raises(SettingsError, match="the set of real clips is fixed"):
        load_settings("needles", ["made.source=real_clips", "made.train_clips=5"])
    with pytest.raises(SettingsError, match=r"made\.student_family has no effect"):
        load_settings("needles", ["model.path=x", "made.student_family=qwen3_vl"])
