"""The report: complete and partial runs, damaged files, untrusted text, the picture."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rmsd_fast.config import RunConfig, TeacherConfig
from rmsd_fast.data.clips import make_clips
from rmsd_fast.data.records import load_questions
from rmsd_fast.method.answers import CLOSED_TASKS, TASK_TYPES
from rmsd_fast.report import ReportError, main, write_picture, write_report
from rmsd_fast.report_page.evaluation import difference_name, interval, verdict
from rmsd_fast.report_page.run_folder import load_run
from rmsd_fast.report_page.samples import response_html, thumbnails, visible
from rmsd_fast.report_page.style import DARK, LIGHT, SERIES_COLOURS
from rmsd_fast.report_page.svg import Series, curve_chart, number, smooth, stacked_chart, thin, ticks, value_range
from rmsd_fast.settings import to_yaml
from rmsd_fast.teacher.diagnostics import pool_statistics
from rmsd_fast.teacher.simulated import simulate_teacher

VOID = {"meta", "br", "img", "input", "link", "hr"}
EVIL = '<script>alert("pwned")</script><img src=x onerror=alert(1)>'
STUDENTS = ("untrained", "stage1", "stage2")


class Page(HTMLParser):
    """Checks that tags are balanced; collects tags with attributes, ids and the text outside style and script."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]} at {self.getpos()}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def made_metrics(rng: random.Random, steps: dict[str, int]) -> list[dict]:
    """Lines of metrics.jsonl such as a run might write."""
    rows = []
    for step in range(1, steps.get("sft", 0) + 1):
        fall = math.exp(-step / (0.25 * steps["sft"]))
        work = {"tokens": rng.randint(1500, 1900), "lr": 2e-3 * min(step / 30, 1.0)}
        rows.append(
            {"stage": "sft", "step": step, "loss": 0.35 + 2.6 * fall + rng.gauss(0, 0.06), **work}
            | {"grad_norm": 0.8 + fall + abs(rng.gauss(0, 0.2)), "rate/tokens_per_s": rng.gauss(5600, 240)}
            | {"seconds/data": 0.02, "seconds/policy": 0.25 + rng.random() * 0.05, "seconds/optimizer": 0.02}
            | {"seconds/step": 0.32, "memory/peak_mib": 812.0, "samples/bad": 0, "samples/skipped_steps": 0}
        )
    for stage in ("warm_up", "distill"):
        for step in range(1, steps.get(stage, 0) + 1):
            rows.append({"stage": stage, "step": step, **made_discriminator_metrics(rng, stage, step)})
            if stage == "distill":
                rows[-1] |= made_policy_metrics(rng, step / steps[stage])
    return rows


def made_discriminator_metrics(rng: random.Random, stage: str, step: int) -> dict:
    accuracy = min(0.99, 0.5 + (0.012 * step if stage == "warm_up" else 0.32) + rng.gauss(0, 0.03))
    student = rng.gauss(-0.4, 0.1)
    return {
        "discriminator/loss": 0.6 - 0.3 * (accuracy - 0.5) + rng.gauss(0, 0.02),
        "discriminator/pair_accuracy": accuracy,
        "discriminator/margin": 2 * (accuracy - 0.5) + rng.gauss(0, 0.05),
        "discriminator/length_correlation": rng.gauss(0.12 if stage == "warm_up" else 0.36, 0.08),
        "discriminator/grad_norm": abs(rng.gauss(1.4, 0.4)),
        "discriminator/score_student": student,
        "discriminator/score_teacher": student + 2 * (accuracy - 0.5),
        "seconds/rollout": 1.6 + rng.random() * 0.4,
        "seconds/vision": 0.05,
        "seconds/matching": 0.004,
        "seconds/discriminator": 0.4,
        "seconds/step": 3.2,
        "tokens": 4200,
        "tokens_unique": 1750,
        "rate/tokens_per_s": rng.gauss(1300, 80),
        "rate/unique_tokens_per_s": rng.gauss(540, 40),
        "rate/shared_prefix_ratio": 2.4,
        "memory/peak_mib": 1204.0,
        "samples/bad": 2 if stage == "distill" and step > 30 else 0,
        "samples/skipped_steps": 0,
    }


def made_policy_metrics(rng: random.Random, share: float) -> dict:
    raw = {
        "discriminator": rng.gauss(-0.4, 0.1),
        "outer": min(1.0, 0.93 + 0.05 * share + rng.gauss(0, 0.01)),
        "task": min(1.0, 0.9 + 0.07 * share + rng.gauss(0, 0.015)),
        "content": min(1.0, 0.52 + 0.12 * share + rng.gauss(0, 0.05)),
    }
    rewards = {f"reward/{name}/raw": value for name, value in raw.items()}
    weights = {"discriminator": 0.4, "outer": 0.1, "task": 0.1, "content": 0.4}
    rewards |= {f"reward/{name}/weighted": weights[name] * value for name, value in raw.items()}
    return rewards | {
        "reward/total": sum(weights[name] * value for name, value in raw.items()),
        "policy/loss": rng.gauss(0.0, 0.02),
        "policy/kl": 0.012 * share + abs(rng.gauss(0, 0.002)),
        "policy/entropy": 0.9 - 0.2 * share + rng.gauss(0, 0.02),
        "policy/ratio": rng.gauss(1.0, 0.001),
        "policy/clip_fraction": 0.0,
        # One spike: it has to be named and must not flatten the rest.
        "policy/grad_norm": 60.0 if 0.5 < share <= 0.5085 else abs(rng.gauss(0.8, 0.2)),
        "policy/logp": rng.gauss(-0.8, 0.05),
        "advantage/zero_groups": abs(rng.gauss(0.1, 0.03)),
        "teacher/quality": rng.gauss(0.71, 0.02),
        "teacher/valid_share": rng.gauss(0.97, 0.01),
        "teacher/kept_share": rng.gauss(0.72, 0.03),
        "teacher/empty_groups": rng.choice([0.0, 0.0, 0.03]),
        "rollout/tokens_mean": 38 + 6 * share + rng.gauss(0, 1),
        "rollout/truncated_share": abs(rng.gauss(0.02, 0.01)),
        "rollout/valid_share": rng.gauss(0.95, 0.01),
        "rollout/content": raw["content"],
        "seconds/reference": 0.3,
        "seconds/policy": 0.7,
        "seconds/optimizer": 0.05,
        "extra/of_a_later_version": rng.random(),
    }


def made_evaluation(students: tuple[str, ...] = STUDENTS, n: int = 75) -> dict:
    levels = {"untrained": 0.0, "stage1": 0.72, "stage2": 0.735}
    floors = {"mcq": 0.29, "temporal": 0.46, "spatial": 0.36, "numeric": 0.23, "ocr": 0.25, "open": 1.0}
    answers = {"mcq": "B", "temporal": "1.00 to 5.00", "spatial": "250,250,750,750", "numeric": "3", "ocr": "ABC"}
    shift = dict(zip(TASK_TYPES, (0.12, 0.08, 0.2, -0.05, -0.48, 0.2), strict=True))

    def entry(mean: float, count: int) -> dict:
        mean = min(max(mean, 0.0), 1.0)
        half = 1.96 * math.sqrt(max(mean * (1 - mean), 0.01) / count)
        return {"mean": mean, "low": max(mean - half, 0), "high": min(mean + half, 1), "n": count, "valid_share": 0.97}

    def student(name: str) -> dict:
        level = levels[name]
        tasks = {task: entry(level + (shift[task] if level else 0.01), n) for task in TASK_TYPES}
        closed = sum(tasks[task]["mean"] for task in CLOSED_TASKS) / len(CLOSED_TASKS)
        return {"tasks": tasks, "closed": entry(closed, 5 * n), "all": entry(closed, 6 * n)}

    measured = {name: student(name) for name in students}

    def difference(after: str, before: str) -> dict:
        def pair(a: dict, b: dict) -> dict:
            mean = a["mean"] - b["mean"]
            return {"mean": mean, "low": mean - 0.04, "high": mean + 0.04, "n": a["n"]}

        tasks = {t: pair(measured[after]["tasks"][t], measured[before]["tasks"][t]) for t in TASK_TYPES}
        return {"tasks": tasks, "closed": pair(measured[after]["closed"], measured[before]["closed"])}

    return {
        "questions": 6 * n,
        "teacher_simulated": True,
        "seed": 0,
        "floors": {t: {"score": floors[t], "answer": answers.get(t, "any text"), "n": n} for t in TASK_TYPES},
        "students": measured,
        "differences": {f"{b}-{a}": difference(b, a) for a, b in zip(students, students[1:], strict=False)},
    }


def made_run(folder: Path, material, *, steps: dict[str, int] | None = None) -> Path:
    """A whole run folder as a training would leave it: made clips, a simulated teacher's statistics, noisy curves."""
    rng = random.Random(7)
    folder.mkdir(parents=True)
    config = RunConfig(name="quickstart")
    config.made.enabled = True
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = made_metrics(rng, steps or {"sft": 200, "warm_up": 20, "distill": 120})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps(made_evaluation()))
    train, heldout = load_questions(material.train), load_questions(material.heldout)
    responses = simulate_teacher(train, k=4, seed=0, error_rate=0.35)
    pool: dict[str, list] = {}
    for response in responses:
        pool.setdefault(response.id, []).append(response)
    (folder / "teacher.json").write_text(json.dumps(pool_statistics(pool, train, TeacherConfig())))
    answers = {r.id: r.text for r in simulate_teacher(heldout, k=1, seed=3, error_rate=0.3)}
    lines = []
    for name in STUDENTS:
        for i, question in enumerate(heldout):
            text = answers[question.id] if name != "untrained" else "the the<answer> red red red"
            score = 0.0 if name == "untrained" else (1.0, 0.0, 0.62)[i % 3]
            lines.append(
                {"student": name, "id": question.id, "task_type": question.task_type, "question": question.question}
                | {"options": question.options, "answer": question.answer, "videos": list(question.videos)}
                | {"images": [], "response": text, "score": score, "valid": name != "untrained", "truncated": False}
            )
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "recipe": "quickstart",
        "started": "2026-01-01T12:00:00",
        "finished": "2026-01-01T12:05:42",
        "world_size": 2,
        "hardware": "CPU, 2 cores",
        "versions": {"rmsd_fast": "0.1.0", "torch": "2.13.0"},
    }
    (folder / "run.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("made"), train_clips=6, heldout_clips=2, questions_per_clip=6, seed=0)


@pytest.fixture
def run(tmp_path, material) -> Path:
    return made_run(tmp_path / "quickstart-20260101-120000", material)


@pytest.fixture
def bare(tmp_path) -> Path:
    """A run folder that holds its settings only, as it is just after the start."""
    folder = tmp_path / "bare-20260102-030405"
    folder.mkdir()
    (folder / "config.yaml").write_text("name: bare\nseed: 3\n")
    return folder


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_nothing_is_fetched(text: str, page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "audio", "video")
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), (tag, name, value)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not re.search(r"url\s*\(|@import", text)
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def test_page_of_a_whole_run(run: Path) -> None:
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
    # Two clips of six questions, eight frames each; every question once, with three answers.
    assert sum(a.get("class") == "card sample" for _, a in page.tags) == 12
    assert page.count("img") == 96
    assert sum((a.get("class") or "").startswith("answer ") for _, a in page.tags) == 36
    assert "highest value 60 lies outside the picture" in page.text
    # Correlation is around 0.36 in stage 2: the warning is said in words; bad samples are shown as there are some.
    assert re.search(r"Warning: correlation is above 0\.3 on \d+ of 120 steps", page.text)
    assert "bad samples" in page.text
    assert not list(run.glob("*.tmp*"))


def test_hover_data_are_the_logged_values(run: Path) -> None:
    _, page = read(write_report(run))
    plots = [json.loads(a["data-plot"]) for t, a in page.tags if t == "svg" and "data-plot" in a]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if row["stage"] == "sft"]
    loss = next(p for p in plots if p["y"][0]["name"] == "loss")
    assert loss["x"] == list(range(1, 201))
    assert loss["y"][0]["v"] == pytest.approx(losses, rel=1e-3)


def test_script_is_the_one_that_the_page_allows(run: Path) -> None:
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
        "teacher.json": "No statistics of the teacher pool",
    }
    assert said.get(missing, "quickstart") in page.text
    assert ("Stage 2: adversarial" in page.text) == (missing not in ("distill", "metrics.jsonl"))
    if missing == "distill":
        assert "stage 1 − untrained" in page.text and "stage 2 − stage 1" not in page.text
    if missing == "run.json":
        # The start is in the folder's name, the duration is what the steps took.
        assert "2026-01-01 12:00" in page.text and "in training steps" in page.text


def test_a_run_that_has_only_begun(bare: Path) -> None:
    for content in (None, ""):
        if content is not None:
            (bare / "metrics.jsonl").write_text(content)
            (bare / "samples.jsonl").write_text(content)
        _, page = read(write_report(bare))
        assert "bare" in page.text and "2026-01-02 03:04" in page.text
        assert "simulated" not in page.text


@pytest.mark.parametrize("value", [1.0, None, "NaN"])
def test_one_step_and_values_that_are_not_finite(bare: Path, value) -> None:
    row = {"stage": "distill", "step": 1, "policy/loss": 0.5, "seconds/step": 1.0, "discriminator/pair_accuracy": 1.0}
    text = json.dumps(row) + "\n" + json.dumps({**row, "step": 2, "policy/loss": value}) + "\n"
    (bare / "metrics.jsonl").write_text(text.replace('"NaN"', "NaN"))
    _, page = read(write_report(bare))
    assert ("1 values were not finite" in page.text) == (value != 1.0)
    assert "Warning: pair accuracy is above 0.95 on 2 of 2 steps" in page.text


def test_a_step_logged_twice_counts_as_logged_last(bare: Path) -> None:
    rows = [{"stage": "sft", "step": s, "loss": v} for s, v in ((1, 3.0), (2, 2.5), (2, 2.0), (3, 1.0))]
    (bare / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = load_run(bare).metrics["sft"]["loss"]
    assert curve.steps == (1, 2, 3) and curve.values == (3.0, 2.0, 1.0)


def test_control_run_is_called_what_it_is(run: Path) -> None:
    config = RunConfig(name="control")
    config.distill.objective = "sft"
    (run / "config.yaml").write_text(to_yaml(config))
    assert "control (more imitation) − stage 1" in read(write_report(run))[1].text


def test_hostile_text_stays_text(run: Path) -> None:
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


def test_media_that_are_gone_or_damaged_become_placeholders(run: Path, tmp_path: Path) -> None:
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
    ((source, caption),) = thumbnails(str(tmp_path / "still.png"))
    assert caption == "picture" and source.startswith("data:image/jpeg;base64,")


def test_thumbnails_are_evenly_spaced_frames(material) -> None:
    import base64
    import io

    from PIL import Image

    clip = sorted(material.clips.glob("*.mp4"))[0]
    shown = thumbnails(str(clip), count=4)
    # Clips have 8 frames at 1 per second: frames 0, 2.33, 4.67 and 7 rounded.
    assert [caption for _, caption in shown] == ["0.0 s", "2.0 s", "5.0 s", "7.0 s"]
    image = Image.open(io.BytesIO(base64.b64decode(shown[0][0].partition(",")[2])))
    assert image.size == (64, 64) and image.format == "JPEG"
    assert len(thumbnails(str(clip), count=20)) == 8


# ---- damaged inputs


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"stage": "sft", "step"', "expected a JSON object"),
        ("[1, 2]", "expected a JSON object, got list"),
        ('{"stage": "sft"}', "a whole number 'step', got 'sft' and None"),
        ('{"step": 3, "loss": 1.0}', "a text 'stage'"),
        ('{"stage": "sft", "step": true}', "got 'sft' and True"),
    ],
)
def test_damaged_metrics_are_named_by_line(run: Path, capsys, line: str, words: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = line
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(run)]) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl:5:" in message and words in message
    assert not (run / "report.html").exists()


def test_an_unfinished_last_line_is_left_out_and_said(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "distill", "st')
    assert "the last line (341) is unfinished and was left out" in read(write_report(run))[1].text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation.json", "{", "expected a JSON object"),
        ("evaluation.json", '{"students": [1]}', "field 'students'"),
        ("evaluation.json", '{"floors": {"mcq": [0.3, "B"]}}', "field 'floors'"),
        ("evaluation.json", '{"students": {"stage1": {"tasks": {"mcq": 0.5}}}}', "field 'tasks' of 'stage1'"),
        ("samples.jsonl", "x\n{}\n", "samples.jsonl:1:"),
        ("teacher.json", "[]", "expected a JSON object, got list"),
        ("run.json", "no", "run.json"),
        ("config.yaml", "a: [1", "expected YAML settings"),
        ("config.yaml", "- 1\n- 2\n", "expected a mapping of settings"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, content: str, words: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(ReportError, match=re.escape(words)) as caught:
        write_report(run)
    assert name in str(caught.value)


def test_folders_that_are_no_run(tmp_path: Path, capsys) -> None:
    for target in (tmp_path, tmp_path / "nothing"):
        assert main([str(target)]) == 2
    err = capsys.readouterr().err
    assert "not a run: it has no config.yaml" in err and "found nothing" in err
    assert not list(tmp_path.iterdir())


def test_program(run: Path, tmp_path: Path) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rmsd_fast.report", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    output = tmp_path / "page.html"
    done = call(run, "--output", output)
    assert done.returncode == 0 and done.stdout.strip() == str(output), done.stderr
    assert output.is_file() and not (run / "report.html").exists()
    refused = call(run, "--output", output, "--picture", tmp_path / "x.svg")
    assert refused.returncode == 2 and "exclude each other" in refused.stderr
    gone = call(run, "--output", tmp_path / "no folder" / "page.html")
    assert gone.returncode == 2 and "no folder" in gone.stderr and "Traceback" not in gone.stderr


# ---- the picture


def test_picture(run: Path, tmp_path: Path, bare: Path) -> None:
    path = tmp_path / "accuracy.svg"
    assert main([str(run), "--picture", str(path)]) == 0
    root = ElementTree.fromstring(path.read_text())
    texts = " ".join("".join(e.itertext()) for e in root.iter() if e.tag.endswith("text"))
    for words in (*TASK_TYPES, "untrained", "stage 1", "stage 2", "simulated", "pair accuracy"):
        assert words in texts, words
    assert "prefers-color-scheme: dark" in path.read_text()
    assert not (run / "report.html").exists()
    with pytest.raises(ReportError, match=r"nothing to draw"):
        write_picture(bare, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_colours_have_contrast() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for theme in (LIGHT, DARK):
        for i in range(1, SERIES_COLOURS + 1):
            assert contrast(theme[f"s{i}"], theme["card"]) >= 3
        for name in ("ink", "muted", "good", "bad"):
            assert contrast(theme[name], theme["card"]) >= 4.5, name
        for name in ("ink", "muted", "s1"):
            assert contrast(theme[name], theme["page"]) >= 4.5, name
        assert contrast(theme["ink"], theme["note"]) >= 4.5


# ---- parts, by hand


def test_smoothing_by_hand() -> None:
    assert smooth([1.0, 5.0, 3.0]) == [1.0, 5.0, 3.0]
    values = [float(i % 2) for i in range(24)]
    out = smooth(values)
    # 24 points: one neighbour on each side, at the ends the one there is.
    assert out[0] == out[-1] == 0.5
    assert out[1] == pytest.approx(1 / 3) and out[2] == pytest.approx(2 / 3)
    values[10] = math.nan
    assert smooth(values)[10] == pytest.approx((values[9] + values[11]) / 2)


def test_thinning_keeps_spikes() -> None:
    values = [0.0] * 5000
    values[1234], values[4321] = 9.0, -7.0
    steps, kept = thin(range(5000), values, 600)
    assert len(kept) <= 600 and max(kept) == 9.0 and min(kept) == -7.0
    assert steps == sorted(steps) and steps[kept.index(9.0)] == 1234


def test_ticks_and_numbers() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.5, 1.0]
    assert ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.3, 0.3, 5) == [-0.2, 0.0, 0.2]
    assert ticks(0, 390, 5) == [0, 100, 200, 300]
    assert ticks(2.0, 2.0) == [2.0]
    written = [number(v) for v in (0, 0.12345, 12.345, 123.4, 1234.5, 12345.0, 2.5e6, 2e-6, -0.5, math.nan, None)]
    assert written == ["0", "0.123", "12.3", "123", "1234", "12.3k", "2.5M", "2e-6", "-0.5", "–", "–"]


def test_range_leaves_single_spikes_out() -> None:
    calm = tuple(1.0 + 0.1 * (i % 5) for i in range(100))
    steps = tuple(range(100))
    low, high, remark = value_range([Series("x", steps, calm)])
    assert low < 1.0 < 1.4 < high < 1.6 and remark == ""
    low, high, remark = value_range([Series("x", steps, (*calm[:-1], 1e4))])
    assert high < 2 and "highest value 10k" in remark
    low, high, _ = value_range([Series("x", (1, 2), (0.7, 0.7))])
    assert low < 0.7 < high
    assert value_range([Series("x", (1,), (math.nan,))])[:2] == (0.0, 1.0)


def test_gap_in_a_curve_where_it_is_not_finite() -> None:
    svg = curve_chart("t", "h", [Series("x", (1, 2, 3, 4), (1.0, 2.0, math.inf, 4.0))])
    # The first path of that class is the legend's swatch.
    _, path = re.findall(r'class="l1" d="([^"]*)"', svg)
    assert path.count("M") == 2 and path.count("L") == 1
    assert "1 values were not finite" in svg


def test_stacked_shares() -> None:
    parts = [Series("rollout", (1, 2), (3.0, 3.0)), Series("policy", (1, 2), (1.0, 1.0))]
    page = Page(stacked_chart("Seconds", "", parts))
    assert "rollout 75%" in page.text and "policy 25%" in page.text


def test_intervals_in_words() -> None:
    entry = {"mean": 0.6213, "low": 0.55, "high": 0.692, "n": 75}
    assert interval(entry) == "62.1 [55.0, 69.2]"
    assert interval({"mean": 0.02, "low": -0.01, "high": 0.05}, sign=True) == "+2.0 [−1.0, +5.0]"
    assert interval(None) == interval({"mean": math.nan}) == "–"
    assert verdict({"low": 0.01, "high": 0.2}) == ("up", "above 0")
    assert verdict({"low": -0.2, "high": -0.01}) == ("down", "below 0")
    assert verdict({"low": 0.0, "high": 0.2}) == ("same", "contains 0")
    assert verdict({}) == ("same", "no interval")
    assert difference_name("stage2-stage1", {"stage1": "stage 1", "stage2": "stage 2"}) == "stage 2 − stage 1"


def test_response_markup_by_hand() -> None:
    tag = '<span class="tag">&lt;{}&gt;</span>'.format
    text = "<think>a<b</think><answer>B</answer>"
    assert response_html(text) == (f"{tag('think')}a&lt;b{tag('/think')}{tag('answer')}<b>B</b>{tag('/answer')}")
    assert visible("a\x00\ud800\tb\r\n<") == "a\ufffd\ufffd\tb\n&lt;"
