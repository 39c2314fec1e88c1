"""Test the needles: videos of half an hour with an event, their questions, and what a number of frames can show."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench.media.needles import ceiling, is_seen, page, read
from rmsd_fast.config import SettingsError
from rmsd_fast.data.records import Question, load_questions
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


def needle(index: int, start: int, length: int) -> Question:
    meta = {"event": {"color": "red", "start": start}, "groups": {"event_s": f"{length} s"}}
    return Question(id=f"q{index}", question="?", task_type="mcq", options=EVENT_COLORS, answer="A", meta=meta)


def test_the_ceiling_is_that_of_the_questions() -> None:
    # Two frames of Qwen2-VL are the seconds 0 and 900. They show the events at 0 and 891 to 900 of 10 s.
    starts = (0, 1, 890, 891, 900, 901)
    asked = [needle(index, start, 10) for index, start in enumerate(starts)]
    assert [is_seen(question, 2, "qwen2_vl") for question in asked] == [True, False, False, True, True, False]
    assert ceiling(asked, 2, "qwen2_vl") == (3 + 3 / 4) / 6
    # 16 frames are 112 or 113 s apart, and 128 frames 14 or 15 s.
    assert ceiling([needle(0, start, 113) for start in range(0, 1600, 7)], 16, "qwen2_vl") == 1.0
    assert ceiling([needle(0, start, 1) for start in range(1800)], 128, "qwen2_vl") == (128 + 1672 / 4) / 1800


def test_the_page_has_counts_and_the_ceilings_of_its_questions(tmp_path: Path) -> None:
    # The frames are the seconds 0 and 900, which show one of two events of 1 s, and the event of 4 s.
    asked = [needle(0, 900, 1), needle(1, 901, 1), needle(2, 898, 4)]
    answers = [
        {"id": q.id, "cluster": q.id, "task_type": "mcq", "groups": q.meta["groups"], "score": score}
        | {"strict": score, "lenient": score}
        for q, score in zip(asked, (1.0, 0.0, 1.0), strict=True)
    ]
    protocol = {"video": {"num_frames": 2}, "versions": {"torch": "2.13"}}
    for name, kept in (("a", answers), ("b", answers[:2])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"seed": 3, "protocol": protocol}))
        (tmp_path / f"{name}.predictions.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in kept))
    questions = {question.id: question for question in asked}
    evaluations = [
        read(f"{trained}={tmp_path / name}.json", questions, "qwen2_vl") for trained, name in ((2, "a"), (8, "b"))
    ]
    text = page(evaluations, "trained at commit x")
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("|")}
    # (1 + 1/4) / 2, in both columns.
    assert rows["1 s"].count("0.500 [") == 2 and rows["1 s"].count("ceiling 0.625") == 2
    assert rows["1 s"].endswith("| 2, 2 |") and rows["4 s"] == "| 4 s | 1.000, ceiling 1.000 |  | 1, 0 |"
    assert rows["1 s, seen"].count("1.000, ceiling 1.000") == 2
    assert rows["1 s, not seen"].count("0.000, ceiling 0.250") == 2 and rows["16 s"].endswith("| 0, 0 |")
    assert "with seed 3" in text and "torch 2.13; trained at commit x." in text
    with pytest.raises(ValueError, match="expected the same versions and seed"):
        page([evaluations[0], evaluations[1] | {"seed": 4}], "")


def test_settings() -> None:
    settings = load_settings("needles")
    assert settings.made.source == "needles" and settings.stages == ["sft"] and settings.video.num_frames == 128
    with pytest.raises(SettingsError, match=r"has no effect: a video of made\.source=needles has one question"):
        load_settings("needles", ["made.questions_per_clip=1"])
    with pytest.raises(SettingsError, match="the set of real clips is fixed"):
        load_settings("needles", ["made.source=real_clips", "made.train_clips=5"])
    with pytest.raises(SettingsError, match=r"made\.student_family has no effect"):
        load_settings("needles", ["model.path=x", "made.student_family=qwen3_vl"])
