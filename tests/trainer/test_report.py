"""Test the report with complete and partial runs, damaged files and untrusted text, and test the picture."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_files import EVIL, assert_nothing_is_fetched, made_evaluation, made_run, read
from train_runs import environment
from warm_process import run_program

from rmsd_fast.made.clips import make_clips
from rmsd_fast.method.answers import TASK_TYPES
from rmsd_fast.report import ReportError, main, write_picture, write_report
from rmsd_fast.report_page.films import Films
from rmsd_fast.report_page.run_folder import load_run
from rmsd_fast.report_page.teacher import teacher_section


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("made"), train_clips=6, heldout_clips=2, questions_per_clip=6, seed=0)


@pytest.fixture
def run(tmp_path, material) -> Path:
    return made_run(tmp_path / "quickstart-20260101-120000", material)


@pytest.fixture
def bare(tmp_path) -> Path:
    """Return a run folder that has only its settings, as it has just after the start."""
    folder = tmp_path / "bare-20260102-030405"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: bare\nseed: 3\n")
    return folder


def test_page_of_a_complete_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    text, page = read(path)
    assert_nothing_is_fetched(text, page)
    assert page.count("script") == 1
    for words in (
        "quickstart",
        "2026-01-01 12:00",
        "5 min 42 s",
        "CPU, 2 cores",
        "torch 2.13.0",
        "The teacher was simulated",
        "Stage 1: imitation",
        "Discriminator warm-up",
        "Stage 2: adversarial",
        "sd within a question",
        "stage 2 − stage 1",
        "contains 0",
        "above 0",
        "extra/of_a_later_version",
        "always “B”",
        "heldout",
    ):
        assert words in page.text, words
    # There are two clips of six questions with eight frames each, and every question appears once with three answers.
    assert sum(a.get("class") == "card sample" for _, a in page.tags) == 12
    assert page.count("img") == 96
    assert sum((a.get("class") or "").startswith("answer ") for _, a in page.tags) == 36
    assert "highest value 60 is outside the chart" in page.text
    # The correlation is about 0.36 in stage 2, so the warning appears as text. Bad samples are listed because some
    # exist.
    assert re.search(r"Warning: correlation is above 0\.3 on \d+ of 120 steps", page.text)
    assert "bad samples" in page.text
    assert not list(run.glob("*.tmp*"))


def test_meaning_of_open_answers_has_a_row(run: Path) -> None:
    lead = "state color, shape and place correctly"
    text, page = read(write_report(run))
    assert lead not in page.text and '<th scope="row">meaning</th>' not in text
    evaluation = made_evaluation()
    evaluation["students"]["stage2"]["meaning"] = {"mean": 0.625, "low": 0.51, "high": 0.73, "n": 75}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text, page = read(write_report(run))
    assert lead in page.text and page.text.count("62.5 [51.0, 73.0]") >= 1
    # The row is in the table of scores. No differences are measured, so the other students have dashes.
    assert '<th scope="row">meaning</th><td>75</td><td>–</td><td>–</td><td>–</td><td>62.5 [51.0, 73.0]</td>' in text
    assert text.count('<th scope="row">meaning</th>') == 1


def test_groups_readings_and_samples_have_a_table(run: Path) -> None:
    text, page = read(write_report(run))
    assert 'aria-label="Further scores"' not in text and "clustered by video" not in page.text
    evaluation, entry = made_evaluation(), {"mean": 0.625, "low": 0.51, "high": 0.73, "n": 75}
    evaluation["videos"] = 25
    student = evaluation["students"]["stage2"]
    student["lenient"] = {"closed": entry, "tasks": {}}
    student["groups"] = {"duration": {"<short>": {**entry, "low": None, "high": None}}, "damaged": 3}
    student["sampled"] = {"tasks": {}, "pass": {"1": entry, "4": {**entry, "mean": 0.8}}, "majority": None}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    text, page = read(write_report(run))
    assert "clustered by video" in page.text
    for label, cell in (
        ("closed, any clear statement", "62.5 [51.0, 73.0]"),
        # A group about one video has no interval.
        ("duration: &lt;short&gt;", "62.5"),
        ("pass@1", "62.5 [51.0, 73.0]"),
        ("pass@4", "80.0 [51.0, 73.0]"),
    ):
        assert f'<th scope="row">{label}</th><td>75</td><td>–</td><td>–</td><td>{cell}</td>' in text, label


def test_hover_data_are_the_logged_values(run: Path) -> None:
    _, page = read(write_report(run))
    plots = [json.loads(a["data-plot"]) for t, a in page.tags if t == "svg" and "data-plot" in a]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if row["stage"] == "sft"]
    loss = next(p for p in plots if p["y"][0]["name"] == "loss")
    assert loss["x"] == list(range(1, 201))
    assert loss["y"][0]["v"] == pytest.approx(losses, rel=1e-3)


def test_the_script_matches_the_content_security_policy(run: Path) -> None:
    import base64
    import hashlib

    text, page = read(write_report(run))
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.parametrize(
    "missing", ["metrics.jsonl", "evaluation.json", "samples.jsonl", "teacher.json", "run.json", "distill"]
)
def test_partial_runs(run: Path, missing: str) -> None:
    if missing == "distill":
        lines = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join(x for x in lines if '"stage": "sft"' in x) + "\n")
        (run / "evaluation.json").write_text(json.dumps(made_evaluation(("untrained", "stage1"))))
    else:
        (run / missing).unlink()
    _, page = read(write_report(run))
    said = {
        "metrics.jsonl": "No training step has been logged",
        "evaluation.json": "has not been evaluated",
        "samples.jsonl": "No answers were kept",
        "teacher.json": "no statistics of the teacher pool",
    }
    assert said.get(missing, "quickstart") in page.text
    assert ("Stage 2: adversarial" in page.text) == (missing not in ("distill", "metrics.jsonl"))
    if missing == "distill":
        assert "stage 1 − untrained" in page.text and "stage 2 − stage 1" not in page.text
    if missing == "run.json":
        # The start time comes from the folder's name, and the duration is the total time of the steps.
        assert "2026-01-01 12:00" in page.text and "in training steps" in page.text


def test_a_run_that_has_just_started(bare: Path) -> None:
    for content in (None, ""):
        if content is not None:
            (bare / "metrics.jsonl").write_text(content)
            (bare / "samples.jsonl").write_text(content)
        _, page = read(write_report(bare))
        assert "bare" in page.text and "2026-01-02 03:04" in page.text
        assert "simulated" not in page.text


@pytest.mark.parametrize("value", [1.0, None, "NaN"])
def test_one_step_and_non_finite_values(bare: Path, value) -> None:
    row = {"stage": "distill", "step": 1, "policy/loss": 0.5, "seconds/step": 1.0, "discriminator/pair_accuracy": 1.0}
    text = json.dumps(row) + "\n" + json.dumps({**row, "step": 2, "policy/loss": value}) + "\n"
    (bare / "metrics.jsonl").write_text(text.replace('"NaN"', "NaN"))
    _, page = read(write_report(bare))
    assert ("1 value was not finite" in page.text) == (value != 1.0)
    assert "Warning: pair accuracy is above 0.95 on 2 of 2 steps" in page.text


def test_the_last_record_of_a_repeated_step_is_used(bare: Path) -> None:
    rows = [{"stage": "sft", "step": s, "loss": v} for s, v in ((1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0))]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = load_run(bare).metrics["sft"]["loss"]
    assert curve.steps == (1, 2, 3) and curve.values == (3.0, 2.0, 1.0)


def test_the_control_of_stage_2_is_shown(run: Path) -> None:
    path = run / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["students"]["control"] = evaluation["students"]["stage1"]
    for key in ("control-stage1", "stage2-control"):
        evaluation["differences"][key] = evaluation["differences"]["stage2-stage1"]
    path.write_text(json.dumps(evaluation))
    text = read(write_report(run))[1].text
    assert "control − stage 1" in text and "stage 2 − control" in text
    # The first tile shows the student that the run is for.
    assert "Closed tasks, stage 2" in text and "Closed tasks, control" not in text


def test_hostile_text_is_escaped(run: Path) -> None:
    evil = f"<think>{EVIL}</think><answer>{EVIL}\ud800\x00</answer></pre></article>"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"response": evil, "question": EVIL, "options": [EVIL, '" onload="x'], "answer": EVIL, "id": EVIL}
        row |= {"task_type": EVIL, "videos": [f"/nowhere/{EVIL}.mp4"]}
    rows.append({**rows[0], "student": EVIL, "error": EVIL})
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluation = made_evaluation()
    evaluation["floors"]["mcq"]["answer"] = EVIL
    evaluation["students"][EVIL] = evaluation["students"]["stage2"]
    evaluation["differences"][EVIL] = evaluation["differences"]["stage2-stage1"]
    evaluation["students"]["stage1"]["tasks"][EVIL] = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    teacher = json.loads((run / "teacher.json").read_text())
    teacher["tasks"][EVIL] = teacher["tasks"]["mcq"]
    teacher["all"]["reasons"] |= {EVIL: EVIL}
    teacher["parse"] = EVIL
    (run / "teacher.json").write_text(json.dumps(teacher))
    (run / "run.json").write_text(json.dumps({"recipe": EVIL, "hardware": EVIL, "versions": {EVIL: EVIL}}))
    (run / "config.yaml").write_text(json.dumps({"name": EVIL, "seed": EVIL}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": EVIL, "step": 1, EVIL: 1.0, f"seconds/{EVIL}": 1.0}) + "\n")
    text, page = read(write_report(run))
    assert_nothing_is_fetched(text, page)
    assert page.count("script") == 1 and "alert(" not in re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    assert page.count("img") == 0
    assert page.text.count('alert("pwned")') > 30
    picture = write_picture(run, run / "picture.svg").read_text()
    assert not [e for e in ElementTree.fromstring(picture).iter() if e.tag.endswith("script")]


def test_missing_or_damaged_media_become_placeholders(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is no video" * 40)
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["videos"] = [[str(tmp_path / "gone.mp4")], [str(broken)], [str(tmp_path)], []][i % 12 % 4]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page = read(write_report(run))
    assert page.count("img") == 0
    assert "no frames of gone.mp4: no such file" in page.text
    assert "no frames of broken.mp4" in page.text
    assert "no media recorded" in page.text


def test_pictures_are_shown_too(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (900, 450), (200, 30, 30, 255)).save(tmp_path / "still.png")
    with Films(timeout_s=60.0, max_file_mib=16) as films:
        ((source, caption),) = films.read(str(tmp_path / "still.png"), is_video=False).shots
    assert caption == "picture" and source.startswith("data:image/jpeg;base64,")
    assert _jpeg_of(source).size == (240, 120)


def _jpeg_of(source: str):
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def test_previews_are_evenly_spaced_frames(material) -> None:
    clip = sorted(material.clips.glob("*.mp4"))[0]
    with Films(timeout_s=60.0, max_file_mib=16) as films:
        shots = films.read(str(clip), is_video=True).shots
    # The clips have 8 frames at 1 per second.
    assert [caption for _, caption in shots] == [f"{second}.0 s" for second in range(8)]
    image = _jpeg_of(shots[0][0])
    assert image.size == (64, 64) and image.format == "JPEG"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"stage": "sft", "step"', "expected a JSON object"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"stage": "sft"}', "an integer 'step', got 'sft' and None"),
        ('{"step": 3, "loss": 1.0}', "a string 'stage'"),
        ('{"stage": "sft", "step": true}', "got 'sft' and True"),
    ],
)
def test_damaged_metrics_are_reported_by_line(run: Path, capsys, line: str, words: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(run)]) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl:5:" in message and words in message
    assert not (run / "report.html").exists()


def test_an_unfinished_last_line_is_skipped_with_a_note(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "distill", "st')
    assert "the last line (341) is unfinished and was left out" in read(write_report(run))[1].text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation.json", "{", "expected a JSON object"),
        ("evaluation.json", '{"students": [1]}', "field 'students'"),
        ("evaluation.json", '{"floors": {"mcq": [0.3, "B"]}}', "field 'floors'"),
        ("evaluation.json", '{"progress": {}}', "field 'progress'"),
        ("evaluation.json", '{"progress": [{"step": 5, "students": {"stage2": 1}}]}', "field 'progress'"),
        ("evaluation.json", '{"students": {"stage1": {"tasks": {"mcq": 0.5}}}}', "field 'tasks' of 'stage1'"),
        ("samples.jsonl", "x\n{}\n", "samples.jsonl:1:"),
        ("samples.jsonl", '{}\n{"videos": 5}\n', "samples.jsonl:2: field 'videos'"),
        ("samples.jsonl", '{"options": "A"}\n', "samples.jsonl:1: field 'options'"),
        ("samples.jsonl", json.dumps({"options": ["x"] * 27}), "samples.jsonl:1: field 'options': expected at most 26"),
        ("teacher.json", "[]", "expected a JSON object, got list"),
        ("teacher.json", '{"all": 3, "tasks": {}}', "field 'all'"),
        ("run.json", "no", "run.json"),
        ("config.yaml", "a: [1", "expected YAML settings"),
        ("config.yaml", "- 1\n- 2\n", "expected a mapping of settings"),
    ],
)
def test_damaged_files_are_reported(run: Path, name: str, content: str, words: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(ReportError, match=re.escape(words)) as caught:
        write_report(run)
    assert name in str(caught.value)


def test_numbers_too_large_for_a_float_are_infinite(run: Path) -> None:
    huge = "9" * 400
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"stage": "distill", "step": 9999, "policy/kl": {huge}}}\n')
    (run / "samples.jsonl").write_text(f'{{"id": "q", "score": {huge}, "duration": -{huge}}}\n')
    (run / "evaluation.json").write_text(f'{{"students": {{"stage1": {{"tasks": {{"mcq": {{"mean": {huge}}}}}}}}}}}')
    assert write_report(run).is_file()


def test_folders_that_are_not_runs(tmp_path: Path, capsys) -> None:
    for target in (tmp_path, tmp_path / "nothing"):
        assert main([str(target)]) == 2
    err = capsys.readouterr().err
    assert "a run folder with a config.yaml, got none" in err and "got no such folder" in err
    assert not list(tmp_path.iterdir())


def test_program(run: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess:
        return run_program("rmsd_fast.report", [*map(str, arguments)], environment(), timeout_s=120)

    output = tmp_path / "page.html"
    done = call(run, "--output", output)
    assert done.returncode == 0 and done.stdout.strip() == str(output), done.stderr
    assert output.is_file() and not (run / "report.html").exists()
    refused = call(run, "--output", output, "--picture", tmp_path / "x.svg")
    assert refused.returncode == 2 and "cannot be combined" in refused.stderr
    gone = call(run, "--output", tmp_path / "no folder" / "page.html")
    assert gone.returncode == 2 and "in an existing folder" in gone.stderr and "Traceback" not in gone.stderr
    assert main([str(run), "--output", str(tmp_path)]) == 2


def test_picture(run: Path, tmp_path: Path, bare: Path) -> None:
    path = tmp_path / "accuracy.svg"
    assert main([str(run), "--picture", str(path)]) == 0
    root = ElementTree.fromstring(path.read_text())
    texts = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))
    for words in (*TASK_TYPES, "untrained", "stage 1", "stage 2", "simulated", "pair accuracy"):
        assert words in texts, words
    assert "prefers-color-scheme: dark" in path.read_text()
    assert not (run / "report.html").exists()
    with pytest.raises(ReportError, match="evaluate the run first"):
        write_picture(bare, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_the_page_states_how_teacher_answers_were_read():
    group = {"questions": 2, "responses": 8, "mean": 0.5, "valid_share": 0.75, "as_sent_share": 0.25}
    group["reasons"] = {"two_answers": 1, "truncated": 1}
    text = teacher_section({"tasks": {"mcq": group}, "all": group, "parse": "natural", "responses": 4})
    assert (
        "Read with teacher.parse=natural. Why answers could not be used: several different answers were given: 1, "
        in text
    )
    assert "valid as sent %" in text and "<td>25.0</td>" in text
    # Runs of earlier versions do not record the reasons.
    del group["reasons"]
    assert "Why answers" not in teacher_section({"tasks": {"mcq": group}, "all": group, "responses": 4})
    unlabeled = "Closed questions without ground truth: 2. The quality of a response to them is its agreement with the"
    for count, shown in ((0, False), (2, True)):
        text = teacher_section({"tasks": {"mcq": group}, "all": group | {"unlabeled": count}, "responses": 4})
        assert (unlabeled in text) == shown
