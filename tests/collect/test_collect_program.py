"""Test the program: media in requests, training on its pool, settings, keys, signals and estimates."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from collect_runs import FAST, answers, expected, run, write_questions
from material import WORLD
from media_files import noise_frames, write_clip
from PIL import Image
from teacher_server import Act, TeacherServer, completion, error, question_of, right

from rmsd_fast import collect, environment
from rmsd_fast.collect_run.config import TEACHERS, CollectConfig, Teacher, load_collection, teachers
from rmsd_fast.collect_run.loop import Collection
from rmsd_fast.collect_run.progress import Progress, summary
from rmsd_fast.collect_run.requests import sample_seed
from rmsd_fast.collect_run.store import lock_pool
from rmsd_fast.config import RECIPES, SettingsError, TeacherConfig
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import load_questions
from rmsd_fast.made.clips import make_clips
from rmsd_fast.settings import load_settings, to_yaml
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.teacher.pool import load_pool
from rmsd_fast.teacher.pool_analysis import analyze_pool
from rmsd_fast.teacher.targets import build_targets


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("made"), train_clips=6, heldout_clips=1, questions_per_clip=2, seed=0)


class Knowing:
    """Answers from the ground truth. The seed of a request shows which question it is."""

    def __init__(self, questions) -> None:
        self._by_seed = {sample_seed(0, question.id, 0): question for question in questions}
        self.seen: dict[str, dict] = {}

    def __call__(self, request, number) -> Act:
        question = self._by_seed[request["seed"]]
        self.seen[question.id] = request
        whole = f"<think>I look at the clip.</think><answer>{question.answer}</answer>"
        natural = f"The answer is: {question.answer}" if question.task_type == "mcq" else whole
        return completion(whole, whole, natural, natural)


@pytest.fixture(scope="module")
def collected(clips, tmp_path_factory):
    """Return the questions, the pool and the requests of a collection about generated clips."""
    questions, out = load_questions(clips.train), tmp_path_factory.mktemp("pool") / "pool.jsonl"
    script = Knowing(questions)
    with TeacherServer(script) as server:
        assert run(clips.train, server.url, out, "video.num_frames=4") == 0
        assert server.count == len(questions)
    return questions, out, script.seen


def test_training_reads_the_pool(collected, clips, tmp_path):
    questions, out, _ = collected
    files = [f"data.train={clips.train}", f"teacher.pool={out}", f"data.heldout={clips.heldout}"]
    small = ["made.train_clips=6", "made.heldout_clips=1", "made.student_layers=1", f"made.folder={tmp_path}"]
    settings = load_settings("quickstart_long", [*files, *small])
    material = prepare_material(load_settings("quickstart_long", [*files, *small, "video.num_frames=4"]), WORLD)
    assert material.statistics["all"]["best_share"] == material.statistics["all"]["valid_share"] == 1.0
    assert "frames" not in "".join(material.summary.warnings)
    targets = build_targets(questions, material.scores, settings.teacher, lambda text: None, seed=0, imitate="best")
    assert all(targets[question.id].has_teacher and targets[question.id].imitate for question in questions)
    warned = prepare_material(settings, WORLD).summary.warnings
    (warning,) = [text for text in warned if "frames" in text]
    assert "the teacher saw video.num_frames=4, the student sees video.num_frames=8" in warning


def test_the_teacher_sees_the_prompt_and_the_frames_of_the_student(collected):
    questions, out, seen = collected
    for question in questions:
        content = seen[question.id]["messages"][-1]["content"]
        *media, text = content
        assert text == {"type": "text", "text": question_text(question)}
        assert [part["text"] for part in media[::2]] == [f"<{t:.1f} seconds>" for t in (0, 2, 5, 7)]
        for part in media[1::2]:
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)
    response = answers(out)[questions[0].id, 0]
    assert response.sampling["frames"] == {"num_frames": 4} and response.key.count("-") == 2


@pytest.mark.parametrize("video_as", ["base64", "file"])
def test_whole_videos(clips, tmp_path, video_as):
    out = tmp_path / "pool.jsonl"
    lines = clips.train.read_text().splitlines(keepends=True)[:1]
    (tmp_path / "q.jsonl").write_text("".join(lines))
    root = f"data.media_root={clips.train.parent}"
    with TeacherServer() as server:
        assert run(tmp_path / "q.jsonl", server.url, out, root, f"collect.video_as={video_as}", "--k", "1") == 0
    (part, _) = server.requests[0]["messages"][-1]["content"]
    path = clips.train.parent / json.loads(lines[0])["videos"][0]
    if video_as == "file":
        assert part == {"type": "video_url", "video_url": {"url": path.as_uri()}}
    else:
        assert part["video_url"]["url"] == f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    (response,) = answers(out).values()
    assert response.sampling["frames"] == video_as


def test_missing_media_are_named_and_tried_again(tmp_path, capsys, caplog):
    questions, out = write_questions(tmp_path, 2), tmp_path / "pool.jsonl"
    record = {
        "id": "gone",
        "images": ["gone.png"],
        "question": "<image>Which?",
        "task_type": "open",
        "system": "Be brief.",
    }
    with questions.open("a") as file:
        file.write(json.dumps(record) + "\n")
    with TeacherServer() as server:
        assert run(questions, server.url, out, "data.max_bad_share=1") == 2
        assert "data.max_bad_share has no effect" in capsys.readouterr().err
        assert run(questions, server.url, out) == 1
        assert set(answers(out)) == expected(2)
        assert "question 'gone': media:" in caplog.text and "gone.png: no such file" in caplog.text
        assert "rejected for good: 4 answers (media 4)\nstill missing: 4 answers" in capsys.readouterr().out
        (tmp_path / "picture.png").rename(tmp_path / "gone.png")
        assert run(questions, server.url, out) == 0
    assert len(answers(out)) == 12 and not out.with_name("pool.failed.jsonl").exists()
    system, user = server.requests[-1]["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]


def test_missing_answers_are_counted_once(tmp_path, capsys):
    """With several models, with rejections that are not noted, and with rejections of earlier collections."""
    questions, out = write_questions(tmp_path, 3), tmp_path / "pool.jsonl"
    (tmp_path / "picture.png").rename(tmp_path / "gone.png")
    with TeacherServer() as server:
        assert run(questions, server.url, out, "--model", "n") == 1
        assert "(media 12)\nstill missing: 12 answers" in capsys.readouterr().out
        (tmp_path / "gone.png").rename(tmp_path / "picture.png")
        server.script = lambda request, number: error(400, "no")
        assert run(questions, server.url, out) == 2
        text = capsys.readouterr().out
        assert "still missing: 12 answers" in text and "rejected for good" not in text

        def script(request, number):
            return error(400, "no") if " 2?" in question_of(request) else right(request, number)

        server.script = script
        assert run(questions, server.url, out, "--k", "2") == 1
        assert "(refused 2)\nstill missing: 2 answers" in capsys.readouterr().out
        server.script = right
        (tmp_path / "questions.jsonl").write_text((tmp_path / "questions.jsonl").read_text().replace("in 0?", "in 7?"))
        assert run(questions, server.url, out, "--k", "2") == 1
        assert "still missing: 2 answers" in capsys.readouterr().out


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    questions, out = write_questions(tmp_path, 2), tmp_path / "pools" / "pool.jsonl"
    out.parent.mkdir()
    # Both files end in the middle of an append.
    out.write_text('{"id": "q0", "k": 0, "text": "B"}\n{"id": "q0", "k": 1, "te')
    failed = out.with_name("pool.failed.jsonl")
    failed.write_text('{"id": "q1", "k": [0], "key": "a-b-c", "reason": "refused"}\n{"id')
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    # The lock is that of a collector that is writing at the same time.
    with lock_pool(out):
        assert run(questions, "http://h/v1", out, "--dry-run") == 0
    out.with_name(f".{out.name}.lock").unlink()
    assert "1 answer to 2 questions" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


def test_costs_in_the_report_are_those_of_the_replies(tmp_path):
    questions, out = write_questions(tmp_path, 3), tmp_path / "pool.jsonl"
    with TeacherServer() as server:
        assert run(questions, server.url, out, "--model", "n", "--k", "3") == 0
    analysis = analyze_pool(load_pool(out), load_questions(questions), TeacherConfig(), simulated=False)
    # Two replies of 100 and 20 tokens for each question: one with two answers of m, one with one of n.
    prompt, completed = analysis["usage"]["prompt_tokens"], analysis["usage"]["completion_tokens"]
    assert (prompt["answers"], prompt["total"]) == (9, pytest.approx(600)) and completed["total"] == pytest.approx(120)
    assert prompt["per_answer"] == pytest.approx(600 / 9)
    assert {model["model"]: model["prompt_tokens"] for model in analysis["models"]} == {"m": 50.0, "n": 100.0}


def test_a_student_that_is_not_on_this_machine(tmp_path, capsys):
    questions, out = write_questions(tmp_path, 1), tmp_path / "pool.jsonl"
    (tmp_path / "r.yaml").write_text("model: {path: Qwen/Never-Downloaded}\n")
    with TeacherServer() as server:
        assert run(questions, server.url, out, "--recipe", str(tmp_path / "r.yaml")) == 0
    assert "model.path=Qwen/Never-Downloaded: expected a downloaded model, got none" in capsys.readouterr().err


def test_k_of_zero_is_an_error(tmp_path, capsys):
    assert run(write_questions(tmp_path, 1), "http://h/v1", tmp_path / "p.jsonl", "--k", "0") == 2
    assert "collect.k: expected 1 to 100000, got 0" in capsys.readouterr().err


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, capsys):
    questions, out = write_questions(tmp_path, 5), tmp_path / "pool.jsonl"
    prices = ["collect.input_price=2", "collect.output_price=10"]
    with TeacherServer() as server:
        assert run(questions, server.url, out, "--dry-run", *prices) == 0
        assert server.count == 0 and not list(tmp_path.glob("*pool*"))
    text = capsys.readouterr().out
    assert "to collect: 20 answers in about 5 requests to m" in text
    # 20 answers of 400 tokens cost 0.08.
    assert "8,000 of answers, whose length is assumed" in text and "cost, estimated: 0.08" in text


def test_videos_with_few_frames_are_named(tmp_path, capsys):
    write_clip(tmp_path / "clip.mp4", noise_frames(9, 64, 64))
    questions = write_questions(tmp_path, 2, videos=["clip.mp4"], images=None)
    named = f"1 video has fewer frames than video.num_frames=16, such as {tmp_path / 'clip.mp4'} with 9; some frames"
    with TeacherServer() as server:
        assert run(questions, server.url, tmp_path / "dry.jsonl", "--dry-run") == 0
        assert f"among the sampled questions, {named} are sent more than once" in capsys.readouterr().out
        assert run(questions, server.url, tmp_path / "p.jsonl", "--k", "1") == 0
        assert f"warning: {named}" in capsys.readouterr().out
        parts = server.requests[0]["messages"][0]["content"]
        assert sum(part["type"] == "image_url" for part in parts) == 16
        assert len({part["text"] for part in parts if "seconds>" in part.get("text", "")}) == 9
        for settings in (["video.num_frames=9"], ["video.num_frames=null", "video.fps=30"]):
            assert (
                run(questions, server.url, tmp_path / "p.jsonl", "--k", "1", "collect.changed=replace", *settings) == 0
            )
            assert "fewer frames" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_ends_cleanly_on_a_signal(tmp_path):
    questions, out = write_questions(tmp_path, 100), tmp_path / "pool.jsonl"

    def slow(request, place) -> Act:
        return replace(right(request, place), delay_s=0.5)

    with TeacherServer(slow, keep=False) as server:
        arguments = ["--endpoint", server.url, "--model", "m", "--out", str(out), *FAST, "collect.start_concurrency=4"]
        process = subprocess.Popen(
            [sys.executable, "-m", "rmsd_fast.collect", str(questions), *arguments],
            env=os.environ | {"OPENAI_API_KEY": "sk-secret"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while server.count < 6:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=30)
        assert process.returncode == 143
        # All replies that were requested are in the pool.
        assert 6 <= server.count < 30 and len(answers(out)) == 4 * server.count
        assert "stopped: SIGTERM" in stdout and "still missing:" in stdout
        assert "waiting for the requests in flight" in stderr and "Traceback" not in stderr
        assert "sk-secret" not in stdout + stderr + out.read_text()


def test_settings_of_a_run_stay_as_they_were():
    assert "collect" not in to_yaml(load_settings("quickstart"))
    settings = load_collection("rmsd_qwen3vl_4b", ["collect.k=8"])
    assert settings.collect.k == 8 and settings.video.max_video_pixels == 8388608


def test_a_recipe_may_add_to_that_of_a_teacher(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: hosted\nvideo: {num_frames: 32}\ncollect: {model: [x], k: 2}\n")
    settings = load_collection(str(tmp_path / "mine.yaml"), ["collect.k=3"])
    assert (settings.video.num_frames, settings.collect.model, settings.collect.k) == (32, ["x"], 3)
    assert settings.collect.token_limit == "max_completion_tokens"
    with pytest.raises(SettingsError, match="no such file; give a YAML file or one of: .*hosted.*quickstart"):
        load_collection("elsewhere", [])
    # A run does not accept the section, because it would have no effect.
    with pytest.raises(SettingsError, match=r"unknown setting collect\.k"):
        load_settings("quickstart", ["collect.k=3"])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["sft.steps=3"], "override: sft.steps has no effect: a collection reads collect.*, video.*, data.{format"),
        (["data.train=q.jsonl"], "data.train has no effect"),
        (["collect.kk=3"], "unknown setting collect.kk; did you mean collect.k?"),
        (["collect.k=0"], "collect.k: expected 1 to 100000, got 0"),
        (["collect.temperature=hot"], "collect.temperature"),
        (["collect.video_as=gif"], "collect.video_as: expected one of frames, base64, file"),
        (["collect.endpoint=[localhost:8000]"], "collect.endpoint: expected a URL such as http://localhost:8000/v1"),
        (["collect.endpoint=[ftp://x/v1]"], "collect.endpoint: expected a URL such as"),
        (["collect.endpoint=['http://me:hunter2@host/v1']"], "expected a URL without user, password and query"),
        (["collect.endpoint=['http://host/v1?key=hunter2']"], "expected a URL without user, password and query"),
        (["collect.endpoint=[http://a,http://a]"], "collect.endpoint: expected different values"),
        (["collect.model=[a,b,c]", "collect.endpoint=[http://a,http://b]"], "or one for each of the 3 models, got 2"),
        (["collect.max_cost=5"], "collect.max_cost: expected prices, got no collect.input_price"),
        (["collect.extra_body={n: 3}"], "collect.extra_body: expected other fields, got 'n'"),
        (["collect.extra_body={stream: true}"], "got 'stream'"),
        (["video.fps=2"], "video.num_frames and video.fps cannot both be set"),
    ],
)
def test_refused_settings(overrides, says):
    with pytest.raises(SettingsError) as caught:
        load_collection("", overrides)
    assert says in str(caught.value) and "hunter2" not in str(caught.value)


def test_keys_come_from_the_environment(monkeypatch, caplog):
    def keys(**changes):
        return [teacher.keys for teacher in teachers(CollectConfig(model=["m"], **changes))]

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    hosts = ["https://a.com/v1/", "https://b.com/v1/chat/completions"]
    assert keys(endpoint=hosts[:1]) == [("",)]
    monkeypatch.setenv("OPENAI_API_KEY", "k1\n")
    monkeypatch.setenv("OTHER", "k2")
    assert keys(endpoint=hosts[:1]) == [("k1",)]
    # The default key is never sent without encryption; one that the user names is.
    assert keys(endpoint=["http://a.com/v1"]) == keys(endpoint=["http://localhost:1/v1"]) == [("",)]
    assert "http://a.com/v1: OPENAI_API_KEY is sent only with https" in caplog.text
    assert keys(endpoint=["http://a.com/v1"], api_key_env=["OTHER"]) == [("k2",)]
    assert keys(endpoint=hosts, api_key_env=["OPENAI_API_KEY", "OTHER"]) == [("k1", "k2")]
    for ports in (["http://localhost:1/v1", "http://127.0.0.1:2/v1"], ["https://a.com:1/v1", "https://a.com:2/v1"]):
        assert keys(endpoint=ports, api_key_env=["OTHER"]) == [("k2", "k2")]
    assert keys(endpoint=hosts, api_key_env=[]) == [("", "")]
    assert [teacher.keys for teacher in teachers(load_collection("vllm", []).collect)] == [("",)]
    for changes, says in (
        ({"endpoint": hosts}, "so that no server gets the key of another one"),
        ({"endpoint": hosts[:1], "api_key_env": ["GONE"]}, "expected a key in the variable GONE, got nothing"),
        ({}, "collect.endpoint: expected a value, got nothing; set --endpoint"),
    ):
        with pytest.raises(SettingsError, match=re.escape(says)):
            keys(**changes)
    monkeypatch.setenv("OTHER", "k€y")
    with pytest.raises(SettingsError, match="expected printable ASCII in OTHER") as caught:
        keys(endpoint=hosts[:1], api_key_env=["OTHER"])
    assert "k€y" not in str(caught.value)
    both = teachers(CollectConfig(model=["a", "b"], endpoint=hosts[:1]))
    assert [(teacher.model, teacher.endpoints) for teacher in both] == [
        ("a", ("https://a.com/v1",)),
        ("b", ("https://a.com/v1",)),
    ]


@pytest.mark.parametrize("recipe", sorted(path.stem for path in TEACHERS.glob("*.yaml")))
def test_recipes_of_teachers(recipe, repository):
    settings = load_collection(recipe, [])
    assert settings.collect.endpoint
    assert f"`{recipe}`" in (repository / "docs" / "collect.md").read_text()
    # `--recipe` accepts recipes of runs as well.
    assert not (RECIPES / f"{recipe}.yaml").exists()


def test_print_config_and_help(tmp_path, capsys):
    arguments = ["q", "--out", "p", "--recipe", "vllm", "--model", "Qwen/X:free", "--endpoint", "http://h:1/v1"]
    assert collect.main([*arguments, "--k", "2", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert set(shown) == {"collect", "video", "data", "teacher"} and "train" not in shown["data"]
    assert shown["collect"]["model"] == ["Qwen/X:free"] and shown["collect"]["k"] == 2
    with pytest.raises(SystemExit):
        collect.main(["--help"])
    text = capsys.readouterr().out
    assert "collect.endpoint=[]" in text and "video.num_frames=16" in text and "sft.steps" not in text
    # Only settings that a collection reads, which are those of `--print-config`.
    listed = re.findall(r"^  (\w+)\.(\w+)=", text.partition("settings (section.field")[2], re.MULTILINE)
    assert listed == [(section, name) for section in ("video", "data", "teacher", "collect") for name in shown[section]]


def test_commands_and_settings_in_the_manual_exist(repository, capsys):
    text = (repository / "docs" / "collect.md").read_text()
    commands = re.findall(r"-m rmsd_fast\.collect (q.*)", text.replace("\\\n", " "))
    for command in commands:
        assert collect.main([*shlex.split(command), "--print-config"]) == 0
    assert len(commands) == 3 and "first" in capsys.readouterr().out
    overrides = re.findall(r"`(collect\.\w+=[^`]+)`", text)
    assert len(overrides) >= 8 and load_collection("", [o for o in overrides if "video_as" not in o])
    names = set(re.findall(r"collect\.(\w+)", text)) - {"md", "py"}
    assert names <= set(CollectConfig.__dataclass_fields__)
    assert {"endpoint", "model", "k", "max_cost", "changed", "api_key_env"} <= names


def test_the_progress_line_and_the_summary(tmp_path):
    settings = load_collection("", ["collect.input_price=10", "collect.output_price=20"])
    store = SimpleNamespace(spent=(0, 0))
    collection = Collection([], settings, store, None, [Teacher("m", ("http://h",), ("",))], "qwen3_vl")
    progress = Progress(collection, settings.collect, wanted=400, present=100)
    collection.added, collection.budget.spent = 100, (1_000_000, 500_000)
    collection.clients[0].counts.update({"requests": 40, "answered": 25, "429": 10, "timeout": 5})
    line = progress.line()
    assert line.startswith("100 of 400 answers, ") and line.endswith(" left")
    assert "0 in flight (limit 8), cost 20.00 of about 50.00, failures: 429 10 timeout 5" in line
    collection.refused["filtered"] = 4
    collection.gave_up = 8
    collection.stop("Ctrl-C")
    assert "stopping: Ctrl-C; waiting for 0 requests" in progress.line()
    assert summary(collection, settings.collect, 300) == [
        "collected 100 answers in 40 requests; the pool has used 1,000,000 prompt and 500,000 completion tokens, cost "
        "20.00",
        "rejected for good: 4 answers (filtered 4)",
        "failed for now: 8 answers; start again to collect them",
        "stopped: Ctrl-C",
        "still missing: 300 answers",
    ]


def test_missing_packages_are_named(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "httpx2" else found(name))
    monkeypatch.setattr(environment, "__file__", "/nowhere/rmsd_fast/environment.py")
    assert collect.main([]) == 2
    assert "has no httpx2; run `make setup`, or pip install 'rmsd-fast[collect,video]'" in capsys.readouterr().err
