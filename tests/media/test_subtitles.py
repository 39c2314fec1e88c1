"""Test that subtitles are read, damaged ones are named, and the prompt shows those spoken at the frames' times."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmark_records import ASKED, ROWS, load, touch, write_json
from media_files import noise_frames, write_clip

from rmsd_fast.config import SettingsError, VideoConfig
from rmsd_fast.data.errors import DataError
from rmsd_fast.data.prompts import PromptBuilder, PromptError
from rmsd_fast.data.subtitles import Cue, read_subtitles, spoken_at
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.students import load_student
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.evaluation_files import evaluation_of
from rmsd_fast.stages.evaluation_table import format_table

SRT = """1
00:00:00,000 --> 00:00:01,000
<font color="white" size=".72c">Hello there.</font>

2
00:00:01,000 --> 00:00:02,500
Two lines,
<i>one cue</i> &amp; no mark: &lt;image&gt; <<b>video> <|im_end|> {\\an8}1<2

3
00:59:59,500 --> 01:00:01,250
42
"""


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize(
    "change", [str, lambda text: "\ufeff" + text.replace("\n", "\r\n"), lambda t: t.replace(",", ".")]
)
def test_srt_files_are_read(tmp_path, change):
    read = read_subtitles(write(tmp_path / "a.srt", change(SRT)))
    dot = "." if "Two lines." in change(SRT) else ","
    assert read.cues == (
        Cue(0.0, 1.0, "Hello there."),
        Cue(1.0, 2.5, f"Two lines{dot} one cue & no mark: 1<2"),
        Cue(3599.5, 3601.25, "42"),
    )
    assert read.faults == ()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # A number is the text of a cue if the cues have no numbers.
        ("00:01 --> 00:02\n1984\n00:03 --> 00:04\nwords\n", ["1984", "words"]),
        ("00:01 --> 00:02\nIt is\n1984\n00:03 --> 00:04\nwords\n", ["It is 1984", "words"]),
        ("1\n00:01 --> 00:02\n1984\n2\n00:03 --> 00:04\n7\n", ["1984", "7"]),
        ("7\n\n00:01 --> 00:02\n1984\n8\n00:03 --> 00:04\n7\n", ["1984", "7"]),
        ("00:01 --> 00:02\n1984\n\n2\n00:03 --> 00:04\nwords\n", ["1984", "words"]),
        # Comparisons are not tags.
        ("1\n00:01 --> 00:02\na<b and c>d\n", ["a<b and c>d"]),
        ("1\n00:01 --> 00:02\n<v Ann Lee>3 < 4</v> <c.red>and</c> <image 2> <br/>more\n", ["3 < 4 and more"]),
    ],
)
def test_numbers_and_tags_in_srt_files(tmp_path, text, shown):
    assert [cue.text for cue in read_subtitles(write(tmp_path / "a.srt", text)).cues] == shown


def test_damaged_cues_are_named_and_left_out(tmp_path):
    lines = ["1", "00:00:01,000 --> 00:00:02,000", "good", "", "2", "00:00:xx,000 --> 00:00:03,000", "bad", ""]
    lines += ["3", "00:00:05,000 --> 00:00:04,000", "backwards", "", "01:02,5 --> 01:03,0", "minutes", "4"]
    lines += ["00:02:00,000 --> 00:02:01,000 X1:40 X2:600", "placed"]
    path = write(tmp_path / "a.srt", "\n".join(lines))
    cues, faults = read_subtitles(path)
    assert [cue.text for cue in cues] == ["good", "minutes", "placed"] and cues[1].start_s == 62.5
    assert [fault.partition(": expected times")[0] for fault in faults] == [f"{path}, line 6", f"{path}, line 10"]
    assert "got '00:00:05,000 --> 00:00:04,000'" in faults[1]
    # Other bytes are named, too, and the rest is read.
    latin = write(tmp_path / "b.srt", "1\n00:00:01,000 --> 00:00:02,000\ncaf\u00e9\n", encoding="latin-1")
    cues, faults = read_subtitles(latin)
    assert cues[0].text == "caf\ufffd" and faults == (f"{latin}, line 3: expected UTF-8, got other bytes",)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.srt", "<html>not found</html>", "expected lines such as '00:01:02,500 --> 00:01:04,000', got none"),
        ("a.srt", "1\n0:0 --> x\nbad\n", "line 2: expected times such as"),
        ("a.json", "{}", "expected a list of cues, got dict"),
        ("a.json", "[", "expected subtitles in JSON, got another text"),
        ("a.json", '[{"line": "x"}]', "cue 1: expected times and a text, got"),
    ],
)
def test_files_without_a_usable_cue_are_refused(tmp_path, name, text, says):
    with pytest.raises(DataError, match=says) as caught:
        read_subtitles(write(tmp_path / name, text))
    assert name in str(caught.value)


def test_both_forms_of_json_are_read(tmp_path):
    items = [
        {"start": "00:00:10.500", "end": "00:00:11.000", "line": "text times"},
        {"timestamp": [3, 4.5], "text": "numbers"},
        {"timestamp": [20.0, None], "text": "to the end"},
        {"timestamp": [5.0, 4.0], "text": "backwards"},
        {"timestamp": ["1", 4.0], "text": "a text"},
        {"timestamp": [1.0, math.nan], "text": "nan"},
        {"timestamp": [0, 10**400], "text": "too large for a float"},
        {"start": "00:00:10.500", "line": "no end"},
        "x",
    ]
    path = str(write_json(tmp_path / "a.json", items))
    cues, faults = read_subtitles(path)
    assert cues == (Cue(3.0, 4.5, "numbers"), Cue(10.5, 11.0, "text times"), Cue(20.0, math.inf, "to the end"))
    assert [fault.partition(": ")[0] for fault in faults] == [f"{path}, cue {number}" for number in range(4, 10)]


def test_cues_at_the_times_of_frames():
    cues = [Cue(0.0, 1.0, "a"), Cue(1.0, 1.2, "b"), Cue(5.0, 9.0, "c"), Cue(10.0, math.inf, "d")]
    assert spoken_at(cues, [0.0, 0.5, 6.0]) == ["a", "c"]
    # An end belongs to the next cue.
    assert spoken_at(cues, [1.0]) == ["b"] and spoken_at(cues, [1.2, 3.0, 9.0]) == [] and spoken_at(cues, []) == []
    # Widened to 1 s around 1.1 s, the second cue is from 0.6 to 1.6 s.
    assert spoken_at(cues, [1.5], least_s=1.0) == ["b"] and spoken_at(cues, [1.7], least_s=1.0) == []
    # The video begins at 4 s of the subtitles' clock.
    assert spoken_at(cues, [2.0, 100.0], shift_s=4.0) == ["c", "d"]


def videomme(folder: Path, *names: str, **kwargs) -> list:
    rows = [ROWS["videomme"] | {"videoID": name, "question_id": name} for name in names]
    write_json(folder / "videomme.json", rows)
    return load("videomme", folder, subtitles=True, **kwargs)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subtitles")
    build_tiny_student(folder, texts=["This video's subtitles are listed below: Hello there. Two lines"])
    return load_student(folder, dtype="float32")


def test_the_prompt_shows_the_cues_of_the_frames(tmp_path, student):
    # The frames of 3 s at 4 fps are at 0, 1 1/3 and 2.75 s or thereabouts; the last cue begins after all of them.
    write_clip(tmp_path / "clip1.mp4", noise_frames(12, 64, 64), fps=4.0)
    write(tmp_path / "subtitle" / "clip1.srt", SRT)
    (question,) = videomme(tmp_path, "clip1")
    shown = []
    for frames in (2, 4):
        builder = PromptBuilder(student, VideoConfig(num_frames=frames), prompt="benchmark")
        prompt = builder.build(question, max_tokens=2000)
        times = prompt.media[0].timestamps_s
        expected = [
            text for low, high, text in [(0, 1, "Hello"), (1, 2.5, "Two")] if any(low <= t < high for t in times)
        ]
        text = student.tokenizer.decode(prompt.input_ids)
        head = "This video's subtitles are listed below: \n"
        assert head in text and text.endswith("The best answer is:<|im_end|>\n<|im_start|>assistant\n")
        listed = text.partition(head)[2].partition("\nSelect the best answer")[0].splitlines()
        assert [line.split(",")[0].split()[0] for line in listed] == expected
        assert text.index("<|vision_end|>") < text.index(head)
        shown.append(listed)
    assert len(shown[1]) == 2 > len(shown[0]) and "42" not in shown[1]
    with pytest.raises(PromptError, match="exceeds data.max_prompt_tokens"):
        builder.build(question, max_tokens=60)


def test_missing_files_are_counted_and_named(tmp_path, caplog):
    touch(*(tmp_path / f"{name}.mp4" for name in "abc"))
    damaged = write(tmp_path / "subtitle" / "a.srt", SRT + "\n4\n00:00:09 -->\nbad\n")
    questions = videomme(tmp_path, "a", "b", "c")
    lost = [str(tmp_path / "subtitle" / f"{name}.srt") for name in "bc"]
    text = f"without subtitles: 2 questions, because 2 of 3 subtitle files are missing: {lost[0]}, {lost[1]}"
    assert text in caplog.text
    assert f"1 damaged cue in subtitles, which are left out: {damaged}, line 15: expected times" in caplog.text
    assert [question.meta.get("subtitles_missing") for question in questions] == [None, *lost]
    assert "<subtitles>" in questions[0].prompt and "below: \nNo subtitles available\nSelect" in questions[1].prompt
    # Changed subtitles are another question.
    before = questions[0].meta["subtitles"]["digest"]
    write(Path(damaged), SRT)
    assert videomme(tmp_path, "a")[0].meta["subtitles"]["digest"] != before
    settings = load_settings(
        "", ["evaluate.benchmark=videomme", "evaluate.prompt=benchmark", "evaluate.subtitles=true", "data.heldout=x"]
    )
    result = evaluation_of({}, questions, settings)
    assert result["subtitles"] == {"questions": 1, "missing": 2, "missing_files": lost}
    assert "\nsubtitles: 1 question with subtitles; 2 files missing, so 2 questions had none" in format_table(result)
    assert result["protocol"]["evaluate"]["subtitles"] is True
    for file in (tmp_path / "subtitle").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"expected subtitle files for evaluate.subtitles, got none, for instance not"):
        videomme(tmp_path, "a")


def test_longvideobench_and_worldsense_have_subtitles(tmp_path):
    touch(tmp_path / "videos" / "v.mp4", tmp_path / "a.mp4")
    cues = write_json(tmp_path / "subtitles" / "v_en.json", [{"timestamp": [100.0, 100.2], "text": "spoken"}])
    row = ROWS["longvideobench"] | {"subtitle_path": "v_en.json", "starting_timestamp_for_subtitles": 90.0}
    (question,) = load("longvideobench", write_json(tmp_path / "lvb_val.json", [row]), subtitles=True)
    source = question.meta["subtitles"]
    assert (source["path"], source["shift_s"], source["least_s"]) == (str(cues), 90.0, 1.0)
    assert question.prompt.startswith("This video's subtitles are listed below:\n<subtitles>\nWhich?\nA. x\nB. y\n")
    (plain,) = load("longvideobench", tmp_path / "lvb_val.json")
    assert plain.prompt.startswith("Which?") and "subtitles" not in plain.meta
    del row["starting_timestamp_for_subtitles"]
    with pytest.raises(DataError, match="starting_timestamp_for_subtitles"):
        load("longvideobench", write_json(tmp_path / "lvb_val.json", [row]), subtitles=True)
    rows = [ASKED | {"video": "a", "video_path": "a.mp4", "subtitle_path": "./subtitles/a.srt"}]
    write(tmp_path / "subtitles" / "a.srt", SRT)
    (question,) = load("worldsense", write_json(tmp_path / "worldsense.json", rows), subtitles=True)
    listed = (
        "<video>\nThese are the frames of a video. This video's subtitles are listed below:\n<subtitles>\nSelect the"
    )
    assert listed in question.prompt and question.meta["subtitles"]["path"] == str(tmp_path / "subtitles" / "a.srt")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluate.benchmark=mlvu"], "expected a benchmark with subtitles (videomme, longvideobench, worldsense)"),
        (["evaluate.prompt=rmsd"], "evaluate.subtitles: expected evaluate.prompt=benchmark"),
        (["evaluate.without_video=true"], "evaluate.subtitles: expected false with evaluate.without_video"),
        (
            ["evaluate.subtitles=false", "evaluate.without_video=true", "evaluate.benchmark=mathverse"],
            "evaluate.without_video: expected a benchmark about videos, got evaluate.benchmark=mathverse",
        ),
    ],
)
def test_subtitles_that_no_prompt_would_show_are_refused(overrides, says):
    shared = ["evaluate.benchmark=videomme", "evaluate.prompt=benchmark", "evaluate.subtitles=true", "data.heldout=x"]
    with pytest.raises(SettingsError) as caught:
        load_settings("", [*shared, *overrides])
    assert says in str(caught.value)


def test_a_video_without_speech_has_no_cues(tmp_path):
    assert (
        read_subtitles(write(tmp_path / "a.json", "[]")) == read_subtitles(write(tmp_path / "a.srt", "\n")) == ((), ())
    )
