"""Test alarms and rollouts in the report: boxes, bars, order, and damaged or untrusted lines."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from report_files import EVIL, Page, assert_nothing_is_fetched, made_run, read

from rmsd_fast.made.clips import make_clips
from rmsd_fast.report import ReportError, write_report
from rmsd_fast.report_page.films import MOST_LOST, Films
from rmsd_fast.report_page.marks import box_overlay, response_mark, time_line, truth_mark
from rmsd_fast.report_page.rollouts import token_credit_html
from rmsd_fast.report_page.samples import film_strip, question_html


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("made"), train_clips=6, heldout_clips=2, questions_per_clip=6, seed=0)


@pytest.fixture(scope="module")
def clip(material) -> str:
    """Return a video of 8 s with 64x64 pixels."""
    return str(sorted(material.clips.glob("*.mp4"))[0])


@pytest.fixture(scope="module")
def films():
    with Films(timeout_s=60.0, max_file_mib=16) as films:
        yield films


@pytest.fixture
def run(tmp_path, material) -> Path:
    return made_run(tmp_path / "quickstart-20260101-120000", material)


def response(answer: str) -> str:
    return f"<think>t</think><answer>{answer}</answer>"


def rollout(answer: str, advantage: float | None = 0.0, **more) -> dict:
    return {
        "text": response(answer),
        "tokens": 12,
        "truncated": False,
        "outer": 1.0,
        "task": 1.0,
        "content": 0.5,
        "d_score": 0.25,
        "reward": 0.5,
        "advantage": advantage,
        **more,
    }


def line(clip: str, task: str, truth: str, teacher: list[str], rollouts: list[dict], **more) -> dict:
    return {
        "stage": "distill",
        "step": 1,
        "id": f"q-{task}",
        "task_type": task,
        "question": "Where?",
        "options": None,
        "answer": truth,
        "videos": [clip],
        "images": [],
        "spans": [],
        "duration": 8.0,
        "teacher": [
            {"k": k, "text": response(answer), "quality": 0.5, "p": 0.5, "d_score": 0.75}
            for k, answer in enumerate(teacher)
        ],
        "rollouts": rollouts,
    } | more


def write_lines(run: Path, *lines: dict) -> None:
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def section(text: str) -> str:
    return text[text.index('<h2 id="rollouts">') : text.index('<h2 id="teacher">')]


def test_boxes_by_hand() -> None:
    marks = [
        *truth_mark("spatial", "100,200,300,600"),
        *response_mark("T0", 1, "spatial", response("100,200,300,600")),
        *response_mark("R0", 2, "spatial", response("-50,0,2000,500")),
        *response_mark("R1", 2, "spatial", response("-50,0,2000,500")),
        # These are drawn although the format around them is broken. The entries below have no box.
        *response_mark("R2", 2, "spatial", "<answer>1,2,3,4</answer>"),
        *response_mark("R3", 2, "spatial", response("300,200,100,600")),
        *response_mark("R4", 2, "spatial", response("somewhere")),
        *response_mark("R5", 2, "spatial", "<answer>1,2,3,4"),
        *response_mark("R6", 2, "mcq", response("A")),
    ]
    svg = box_overlay(marks)
    assert 'viewBox="0 0 1000 1000" preserveAspectRatio="none"' in svg
    assert re.findall(r'class="m-(\w+)" x="(\S+)" y="(\S+)" width="(\S+)" height="(\S+)"><title>(.*?)<', svg) == [
        ("truth", "100", "200", "200", "400", "ground truth: 100,200,300,600"),
        ("1", "100", "200", "200", "400", "T0: 100,200,300,600"),
        ("2", "0", "0", "1000", "500", "R0, R1: -50,0,2000,500"),
        ("2", "1", "2", "2", "2", "R2: 1,2,3,4"),
    ]
    assert box_overlay(truth_mark("spatial", None)) == ""


def test_bars_by_hand() -> None:
    marks = [
        *truth_mark("temporal", "2.0 to 5.0"),
        *response_mark("R0", 2, "temporal", response("1 to 3")),
        *response_mark("R1", 2, "temporal", response("1 to 3")),
        *response_mark("R2", 2, "temporal", response("6 to 99")),
        *response_mark("R3", 2, "temporal", response("5 to 2")),
    ]
    html = time_line(marks, 8.0, (4.0, None))
    lanes = re.findall(r"<span>([^<]*)</span>.*?<b class=\"m-(\w+)\" style=\"(.*?)\"></b></div><span>(.*?)<", html)
    assert lanes == [
        ("ground truth", "truth", "left:25.00%;width:37.50%", "2 to 5 s"),
        ("R0, R1", "2", "left:12.50%;width:25.00%", "1 to 3 s"),
        ("R2", "2", "left:75.00%;width:25.00%", "6 to 99 s"),
    ]
    assert html.count('class="span" style="left:50.00%;width:50.00%"') == 3
    assert "clip of 8 s" in html and '<i style="left:50.00%">4</i>' in html
    # If the length of a clip is unknown, the axis ends with the last interval.
    assert "left:0.00%;width:100.00%" in time_line(truth_mark("temporal", "0 to 4"), None)
    assert time_line(truth_mark("spatial", "1,2,3,4"), 8.0) == time_line([], 8.0) == ""


@pytest.mark.parametrize("length", [0.0, -1.0, 5e-324, float("inf"), float("nan")])
def test_without_a_length_nothing_is_drawn(length) -> None:
    assert time_line(truth_mark("temporal", "0 to 4"), length) == ""
    assert time_line(truth_mark("temporal", "0 to 5e-324"), None) == ""


def test_the_file_length_takes_precedence(clip, tmp_path, films) -> None:
    from PIL import Image

    film = films.read(clip, is_video=True)
    assert (film.seconds, len(film.shots), film.fault) == (8.0, 8, "")
    picture = Image.new("RGB", (90, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    film = films.read(str(tmp_path / "turned.jpg"), is_video=False)
    assert (film.seconds, len(film.shots)) == (None, 1)
    film = films.read(str(tmp_path / "gone.mp4"), is_video=True)
    assert film.shots == [] and "no such file" in film.fault


def test_a_video_that_starts_late_is_drawn_on_its_own_clock(clip, tmp_path, films) -> None:
    late = tmp_path / "late.mkv"
    command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "sine=d=12", "-itsoffset", "4", "-i", clip]
    subprocess.run([*command, "-c:v", "copy", str(late)], check=True)
    film = films.read(str(late), is_video=True)
    assert film.shots[0][1] == "4.0 s" and film.seconds == pytest.approx(12.0, abs=0.1)
    # In some data sets, the duration in the record is that of the stream, so the file is more reliable.
    row = {"videos": [str(late)], "images": [], "duration": 8.0}
    strip = film_strip(row, truth_mark("temporal", "9 to 12"), {}, films)
    # The bar is at 9 of 12 s, and the audio ends a little later.
    assert re.search(r"left:7[45]\.\d+%", strip)


def test_a_hanging_file_delays_the_page_but_does_not_prevent_it(tmp_path, clip, monkeypatch) -> None:
    """The reader never answers, as for a file on a disk that was removed."""
    monkeypatch.setattr("rmsd_fast.data.decode_worker.START_S", 60.0)
    hanging = []
    for number in range(MOST_LOST + 1):
        hanging.append(tmp_path / f"{number}.mp4")
        hanging[-1].write_bytes(Path(clip).read_bytes())
    with Films(timeout_s=0.0, max_file_mib=16) as films:
        faults = [films.read(str(path), is_video=True).fault for path in hanging]
    assert all("not read within" in fault for fault in faults[:MOST_LOST])
    assert faults[MOST_LOST] == f"not read, because {MOST_LOST} files before it could not be read"


def test_files_that_the_run_could_not_use_are_not_tried_again(clip) -> None:
    row = {"videos": [clip], "images": [], "error": "clip.mp4: <truncated>"}
    strip = film_strip(row, [], {}, None)
    assert "clip.mp4: &lt;truncated&gt;" in strip and "<img" not in strip


def test_media_are_read_once(clip, monkeypatch, films) -> None:
    row = {"videos": [clip], "images": []}
    film_strip(row, [], {}, films)
    monkeypatch.setattr(films, "_film", lambda *_: pytest.fail("the file was read again"))
    assert film_strip(row, [], {}, films).count("<img") == 8


def test_frames_come_from_the_part_that_is_shown(clip, films) -> None:
    """The clip has 8 frames, one per second."""
    film = films.read(clip, is_video=True, span=(4.0, 6.0))
    assert [caption for _, caption in film.shots] == ["4.0 s", "5.0 s", "6.0 s"] and film.seconds == 8.0
    assert [caption for _, caption in films.read(clip, is_video=True, span=(None, 1.5)).shots] == ["0.0 s", "1.0 s"]
    assert [caption for _, caption in films.read(clip, is_video=True, span=(6.0, None)).shots] == ["6.0 s", "7.0 s"]
    # The other parts of the file are stored separately.
    assert len(films.read(clip, is_video=True).shots) == 8
    assert "too few frames between" in films.read(clip, is_video=True, span=(1e308, None)).fault
    assert "expected a part that ends by 8 s" in films.read(clip, is_video=True, span=(20.0, 30.0)).fault
    # Each video has its own part.
    row = {"videos": [clip, clip, clip], "images": [], "spans": [[2, 3], None, [5, "x"]]}
    strip = film_strip(row, [], {}, films)
    assert re.findall(r"<figcaption>(\d)\.0 s", strip) == [*"23", *"01234567", *"01234567"]
    strip = film_strip({"videos": [clip], "spans": [[2, 3]]}, truth_mark("temporal", "2 to 3"), {}, films)
    assert re.findall(r"<figcaption>(\d)\.0 s", strip) == [*"23"] and 'class="span" style="left:25.00%' in strip


def test_the_file_size_limit_is_that_of_the_run(run, clip) -> None:
    write_lines(run, line(clip, "temporal", "0 to 4", [], [rollout("0 to 4")]))
    text, _ = read(write_report(run))
    assert "<img" in section(text)
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"max_file_mib: \d+", "max_file_mib: 0", settings))
    text, page = read(write_report(run))
    assert "<img" not in text and "expected at most data.max_file_mib=0" in page.text


def test_an_error_without_a_message_shows_its_type(tmp_path, clip, monkeypatch) -> None:
    def fail() -> None:
        raise OSError

    monkeypatch.setattr("rmsd_fast.data.decode_worker.ForkServer", fail)
    with Films(timeout_s=60.0, max_file_mib=16) as films:
        assert films.read(clip, is_video=True).fault == "OSError"


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["tea", "milk"], ["A. tea", "B. milk"]),
        (["A. tea", "B. milk"], ["A. tea", "B. milk"]),
        (["[A] tea", "[B] milk"], ["A. tea", "B. milk"]),
        # The options are names, and only one of them looks like an option with its letter.
        (["A. Lincoln", "G. Washington"], ["A. A. Lincoln", "B. G. Washington"]),
    ],
)
def test_options_are_shown_as_in_the_prompt(options, shown) -> None:
    html = question_html({"question": "Which?", "options": options, "answer": "B"})
    assert re.findall(r"<li>(.*?)</li>", html) == [shown[0], f"<b>{shown[1]}</b> (true)"]


def test_answers_about_several_media_are_not_drawn(clip, films) -> None:
    row = {"videos": [clip, clip], "images": []}
    strip = film_strip(row, truth_mark("spatial", "1,2,3,4"), {"truth": "x"}, films)
    assert strip.count("<img") == 16 and "<rect" not in strip


def test_boxes_are_drawn_over_every_frame(run, clip) -> None:
    row = line(clip, "spatial", "0,0,500,500", ["0,0,500,500"], [rollout("500,500,1000,1000")])
    write_lines(run, row)
    text, page = read(write_report(run))
    assert_nothing_is_fetched(text, page)
    shown = section(text)
    for box in ('m-truth" x="0" y="0" width="500"', 'm-1" x="0" y="0"', 'm-2" x="500" y="500" width="500"'):
        assert shown.count(f'<rect class="{box}') == 8, box
    assert shown.count('class="swatch') == 3


def test_bars_are_drawn_below_the_frames(run, clip) -> None:
    row = line(clip, "temporal", "2.0 to 4.0", ["2 to 6"], [rollout("0 to 2")], spans=[[2.0, 6.0]])
    write_lines(run, row)
    shown = section(read(write_report(run))[0])
    for bar in ("m-truth", "m-1", "m-2"):
        assert shown.count(f'<b class="{bar}"') == 1
    assert 'class="span" style="left:25.00%;width:50.00%"' in shown and "clip of 8 s" in shown
    # A missing clip has the length that training recorded.
    write_lines(run, row | {"videos": ["/nowhere/gone.mp4"], "duration": 16.0})
    shown = section(read(write_report(run))[0])
    assert "clip of 16 s" in shown and "left:12.50%;width:12.50%" in shown and "no frames of gone.mp4" in shown


def test_evaluation_samples_are_drawn_the_same(run) -> None:
    rows = [json.loads(row) for row in (run / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row["response"] = response({"spatial": "0,0,250,250", "temporal": "1 to 2"}.get(row["task_type"], "x"))
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = read(write_report(run))
    shown = text[text.index('<h2 id="samples">') :]
    # Two clips have one question of either kind, and three students have their own colors.
    for colour in ("truth", "1", "2", "6"):
        assert shown.count(f'<rect class="m-{colour}"') == 16, colour
        assert shown.count(f'<b class="m-{colour}"') == 2, colour


def test_rollouts_are_ordered_by_advantage(run, clip) -> None:
    rollouts = [rollout("A", -1.5), rollout("B", 1.25, match=2, truncated=True, log_ratio=0.5), rollout("C", None)]
    row = line(clip, "mcq", "B", ["B", "A"], [*rollouts, rollout("B", 1.25, match=2, truncated=True, log_ratio=0.5)])
    row["teacher"][1] |= {"p": 0.0, "quality": 0.0, "d_score": None}
    write_lines(run, row)
    shown = section(read(write_report(run))[0])
    names = re.findall(r'<div class="answer ?(\w*)"><header><b>(.*?)</b><span>(.*?)</span>', shown)
    assert names == [
        ("", "T0", "q 0.5 · p 0.5 · D 0.75"),
        ("unused", "T1", "q 0 · not used"),
        ("good", "R1, R3", "advantage 1.25 · D 0.25"),
        ("", "R2", "D 0.25"),
        ("bad", "R0", "advantage −1.5 · D 0.25"),
    ]
    assert "reward 0.5 · outer 1 · task 1 · content 0.5 · k1 0.5 · tokens 12 · cut · matched with T2" in shown


def test_a_run_without_a_discriminator(run, clip) -> None:
    row = line(clip, "open", "x", ["y"], [rollout("z", 0.5, d_score=None)], answer=None)
    row["teacher"][0]["d_score"] = None
    write_lines(run, row)
    shown = section(read(write_report(run))[0])
    assert "q 0.5 · p 0.5</span>" in shown and "advantage 0.5</span>" in shown
    assert "Ground truth: none (open question)" in shown


def test_first_middle_and_last_step_of_each_stage_are_shown(run, clip) -> None:
    steps = [("warm_up", 1), ("warm_up", 8), *(("distill", step) for step in (1, 11, 21, 31, 41))]
    rows = [
        line(clip, "mcq", "A", [], [rollout("A")], stage=stage, step=step, id=f"{stage}-{step}-{i}")
        for stage, step in steps
        for i in range(6)
    ]
    write_lines(run, *rows)
    text, _ = read(write_report(run))
    shown = section(text)
    assert re.findall(r"<details( open)?><summary>(.*?)</summary>", shown) == [
        ("", "Step 1"),
        (" open", "Step 8"),
        ("", "Step 1"),
        ("", "Step 21"),
        (" open", "Step 41"),
    ]
    assert shown.count("card sample") == 5 * 4
    assert shown.count("2 more questions of this step are in rollouts.jsonl") == 5
    assert "distill-21-3" in shown and "distill-21-4" not in shown and "distill-11-0" not in shown


def test_hostile_rollouts_are_escaped(run) -> None:
    evil = f"{EVIL}\ud800\x00"
    row = line(f"/nowhere/{evil}.mp4", "temporal", f"1 to 2{evil}", ["1 to 2"], [rollout("0 to 1e308", d_score=EVIL)])
    row |= {"id": evil, "question": evil, "options": [evil], "spans": [[EVIL, {}]], "duration": EVIL, "stage": evil}
    row["teacher"][0] |= {"k": evil, "quality": EVIL, "p": [1], "text": response("1 to 2") + evil}
    row["rollouts"].append({"text": evil, "tokens": evil, "match": evil, "advantage": "1"})
    row["rollouts"].append({"text": {"a": evil}})
    write_lines(run, row, line("x", evil, evil, [], [], videos=[{"path": evil}, 5], images=None))
    text, page = read(write_report(run))
    assert_nothing_is_fetched(text, page)
    assert page.count("script") == 1 and "<script>alert" not in text
    assert section(text).count("&lt;script&gt;") > 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "1"}, "an integer 'step'"),
        ({"teacher": None}, "field 'teacher': expected a list of objects"),
        ({"rollouts": ["x"]}, "field 'rollouts': expected a list of objects"),
        ({"videos": 5}, "field 'videos': expected a list or null"),
        ({"options": "ab"}, "field 'options': expected a list or null"),
    ],
)
def test_damaged_rollouts_are_reported_by_line(run, clip, change, words) -> None:
    good = line(clip, "mcq", "A", [], [])
    write_lines(run, good, good | change)
    with pytest.raises(ReportError, match=re.escape(words)) as caught:
        write_report(run)
    assert "rollouts.jsonl:2:" in str(caught.value)


def test_an_unfinished_last_line_is_skipped(run, clip) -> None:
    write_lines(run, line(clip, "mcq", "A", [], [rollout("A")]))
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"stage": "distill", "st')
    _, page = read(write_report(run))
    assert "rollouts.jsonl: the last line (2) is unfinished and was left out" in page.text


def test_a_run_without_rollouts_says_so(run) -> None:
    assert "No rollouts were logged" in read(write_report(run))[1].text


def test_alarms_are_shown_above_the_headline_numbers(run) -> None:
    """The length correlation of the synthetic run is about 0.36 in stage 2, and everything else is within bounds."""
    text, page = read(write_report(run))
    alarms = re.search(r'<section class="note alarms">.*?</section>', text, re.S).group()
    assert alarms.count("<li>") == 1
    assert "the discriminator judges by length" in alarms and "What to do:" in alarms
    assert re.search(r"Stage 2, step \d+: discriminator/length_correlation is 0\.\d+ over 10 steps", page.text)
    assert "expected -0.3 to 0.3" in alarms
    assert text.index("note alarms") < text.index('<div class="tiles">')


def test_a_run_without_alarms_has_no_alarm_box(run) -> None:
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("discriminator/length_correlation", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = read(write_report(run))
    assert "note alarms" not in text and "<h2>Alarms" not in text
    assert Page(text).count("section") == 0


def test_token_credit_colors_the_text(run, clip) -> None:
    credit = [["<think>", 0.04], ["é<b>", 1.0], [" no", -0.5], [" so", 0.26]]
    write_lines(run, line(clip, "open", "it", ["a"], [rollout("a", 1.0, token_credit=credit), rollout("b", 0.0)]))
    write_report(run)
    text = section((run / "report.html").read_text())
    assert (
        '<pre class="text">&lt;think&gt;<span class="up4" title="1">é&lt;b&gt;</span>'
        '<span class="down2" title="−0.5"> no</span><span class="up1" title="0.26"> so</span></pre>' in text
    )
    # Without credit, and with a damaged one, the text is shown as always.
    for damaged in (None, [], {"a": 1}, [["a"]], [["a", "b"]], [["a", None]], [["a", 0.0]]):
        shown = token_credit_html(damaged)
        assert shown == ("a" if damaged == [["a", 0.0]] else "")
