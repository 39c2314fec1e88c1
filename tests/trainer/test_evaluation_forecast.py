"""Test what an evaluation says before it starts: prompts, media, memory, time, and settings without effect."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import WORLD, tiny_settings
from train_runs import SIX_TASKS, environment
from warm_process import run_program

from rmsd_fast.config import RunConfig, SettingsError
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.setting_rules import evaluation
from rmsd_fast.setting_rules.useless import is_evaluated
from rmsd_fast.settings import load_settings, save_settings, settings_as_dict
from rmsd_fast.stages import evaluation_forecast
from rmsd_fast.stages.build import load
from rmsd_fast.stages.evaluation import _Clock, time_questions
from rmsd_fast.stages.evaluation_batches import largest_batches, plan_batches, spread
from rmsd_fast.stages.evaluation_forecast import (
    BatchTime,
    check_evaluation_memory,
    describe_evaluation,
    describe_protocol,
    describe_questions,
    duration,
    forecast_line,
    read_lengths,
)
from rmsd_fast.stages.material import Material, prepare_material
from rmsd_fast.stages.memory import GIB, EvaluatedBatches, plan_evaluation

CUDA = replace(WORLD, device=torch.device("cuda", 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def material(folder: Path) -> Material:
    return prepare_material(tiny_settings(folder), WORLD)


def test_lengths_are_those_of_the_prompts(folder: Path, material: Material, tmp_path: Path) -> None:
    settings = tiny_settings(folder, "evaluate.num_frames=6")
    questions = list(material.heldout)
    lost = replace(questions[0], id="lost", videos=(str(tmp_path / "lost.mp4"),))
    damaged = replace(questions[1], id="damaged", videos=(str(tmp_path / "damaged.mp4"),))
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    special = replace(questions[2], id="special", question="<|im_end|>")
    asked = [*questions, lost, damaged, special]
    with MediaReader(settings.data) as media:
        lengths = read_lengths(material.model_path, asked, settings, media, WORLD)
        student = load(material.model_path, settings, WORLD)
        builder = PromptBuilder(student, replace(settings.video, num_frames=6), media)
        tokens = sorted(len(builder.build(question).input_ids) for question in questions)
        assert lengths.read == len(asked) and lengths.tokens == tokens
        reasons = {name: reason for name, (reason, _) in lengths.faults.items()}
        assert reasons == {"lost": "missing_media", "damaged": "unreadable_media", "special": "refused_question"}
        # Prompts that are one token too long.
        settings.data.max_prompt_tokens = tokens[-1] - 1
        short = read_lengths(material.model_path, questions, settings, media, WORLD)
        longest = tokens.count(tokens[-1])
        assert short.tokens == tokens[:-longest]
        assert [reason for reason, _ in short.faults.values()] == ["prompt_too_long"] * longest
        assert read_lengths(material.model_path, questions, settings, media, WORLD, most=2).read == 2
    lines = describe_questions(asked, lengths, settings)
    videos = len({question.videos for question in asked})
    assert lines[0] == f"questions: {len(asked)} questions about {videos} videos"
    assert lines[1] == f"MISSING: 1 of {videos} media files, first {tmp_path / 'lost.mp4'}"
    assert "6 frames of each video, at most 8,192 tokens in a call of its tower" in lines[2]
    assert f"prompts: {tokens[0]} to {tokens[-1]} tokens, median" in lines[3]
    assert lines[4].startswith(f"UNUSABLE: 3 of the {len(asked)} questions read would score 0 (")
    for part in ("missing_media 1", "unreadable_media 1", "refused_question 1", "lost.mp4"):
        assert part in lines[4]


def test_a_dry_run_finds_questions_without_a_clock(folder: Path, material: Material, tmp_path: Path) -> None:
    settings = tiny_settings(folder)
    build_tiny_student(tmp_path / "student", texts=["When?"], layers=2, family="qwen2_5_vl")
    (video,) = material.heldout[0].videos
    whole = Question(id="whole", question="When?", task_type="temporal", videos=(video,), answer="0 to 1")
    section = replace(whole, id="section", spans=((1.0, 2.0),))
    with MediaReader(settings.data) as media:
        lengths = read_lengths(str(tmp_path / "student"), [whole, section], settings, media, WORLD)
        assert list(lengths.faults) == ["section"] and "which prompts of Qwen2.5-VL do not state" in str(lengths.faults)
        # Prompts of Qwen3-VL state times.
        assert not read_lengths(material.model_path, [whole, section], settings, media, WORLD).faults
        lines, _ = describe_evaluation(
            material.model_path, [replace(whole, videos=("no.mp4",))], settings, WORLD, media
        )
        assert lines[-1] == "memory: not planned, since no prompt could be read"


def test_the_protocol_names_what_changes_the_score() -> None:
    settings = load_settings(
        "benchmarks",
        [
            *(
                "evaluate.benchmark=mathvista",
                "evaluate.parse=lenient",
                "evaluate.judge.endpoint=http://localhost:1/v1",
            ),
            *("evaluate.judge.model=judge", "data.heldout=math.json"),
        ],
        trains=False,
    )
    assert describe_protocol("student", settings) == (
        "model: student; mathvista, prompt benchmark, parsing lenient, judge judge at http://localhost:1/v1 (not asked "
        "yet)"
    )


def test_spread_is_even() -> None:
    assert spread(range(8), 4) == [1, 3, 5, 7] and spread(range(100), 2) == [25, 75]
    assert spread(range(3), 4) == [0, 1, 2] and spread([], 4) == []


def test_the_plan_of_an_evaluation(folder: Path, material: Material) -> None:
    settings = tiny_settings(folder, "evaluate.prompts_per_batch=4", "evaluate.max_new_tokens=10", "data.cache_mib=3")
    settings.data.max_prompt_tokens = 100
    config = json.loads((Path(material.model_path) / "config.json").read_text())
    plan = plan_evaluation(settings, config, device="cpu")
    weights = sum(p.numel() for p in load(material.model_path, settings, WORLD).model.parameters())
    for phase in plan.phases.values():
        assert phase["weights"] == 4 * weights
        # 8 frames of up to 99 vision tokens of 2 x 32 x 32 pixels, for this batch and the next one.
        assert phase["media"] == 2 * 4 * 99 * 2 * 32 * 32 * 3 + 3 * 2**20
    # The features of 4 videos, in 1 + 3 layers of width 64, are there while answers are decoded.
    layers = 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    assert plan.phases["answers"]["vision"] == 4 * 99 * layers * 64 * 4
    # A smaller bound takes less in the tower, and in a prefill of one prompt per pass.
    settings.micro_tokens = 50
    bounded = plan_evaluation(settings, config, device="cpu")
    assert bounded.phases["answers"] | {"rollout": 0} == plan.phases["answers"] | {"rollout": 0}
    assert bounded.phases["answers"]["rollout"] < 0.6 * plan.phases["answers"]["rollout"]
    features = plan.phases["answers"]["vision"]
    ratio = (bounded.phases["vision"]["vision"] - features) / (plan.phases["vision"]["vision"] - features)
    assert 0 < ratio < 0.5
    # Sampled answers have their own phase, with as many rows.
    settings.evaluate.rollouts = 2
    sampled = plan_evaluation(settings, config, device="cpu")
    assert set(sampled.phases) == {"vision", "answers", "samples"}
    assert sampled.phases["samples"]["rollout"] <= sampled.phases["answers"]["rollout"]
    # A reranker has the weights of the student, whose head is tied, and stays on the device.
    settings.evaluate.reranker = "discriminator"
    settings.micro_tokens = 400
    ranked = plan_evaluation(settings, config, device="cpu").phases
    assert ranked["answers"]["weights"] == 2 * 4 * weights
    # It encodes the videos itself while the student's features stay, and reads them with the responses.
    assert ranked["reranker vision"]["vision"] == ranked["vision"]["vision"] + features
    assert ranked["reranker"]["vision"] == 2 * features and ranked["reranker"]["activations"] > 0


def test_the_prefill_of_an_evaluation_does_not_grow_with_its_prompts(folder: Path, material: Material) -> None:
    """Beyond keys and values, whose bytes are counted by hand."""
    config = json.loads((Path(material.model_path) / "config.json").read_text())
    text = config["text_config"]
    token = 2 * 4 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"]
    beyond = {}
    for prompts in (1, 8, 16):
        settings = tiny_settings(folder, f"evaluate.prompts_per_batch={prompts}", "evaluate.max_new_tokens=10")
        settings.data.max_prompt_tokens = settings.micro_tokens = 900
        rollout = plan_evaluation(settings, config, device="cpu").phases["answers"]["rollout"]
        beyond[prompts] = rollout - 900 * prompts * token
    assert beyond[8] < 1.5 * beyond[1] and beyond[16] < 2 * beyond[1]
    # Questions about one video are prefilled together, however long they are.
    settings.micro_tokens = 100
    shared = EvaluatedBatches(questions=16, media=1)
    answers = plan_evaluation(settings, config, device="cpu", batches=shared).phases["answers"]
    settings.micro_tokens = 10**6
    assert plan_evaluation(settings, config, device="cpu", batches=shared).phases["answers"] == answers


def test_an_evaluation_that_does_not_fit_is_refused(
    folder: Path, material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings(folder, "evaluate.prompts_per_batch=16", "evaluate.num_frames=16")
    # 16 questions about different videos.
    asked = [replace(material.heldout[0], id=f"{index}", videos=(f"{index}.mp4",)) for index in range(16)]
    assert check_evaluation_memory(material.model_path, asked, 200, settings, WORLD)[0].startswith("memory: ")
    monkeypatch.setattr(evaluation_forecast, "device_room", lambda device: (2 * GIB, "2.0 GiB are free"))
    planned, free = check_evaluation_memory(material.model_path, asked, 200, settings, CUDA)
    assert "planned per process, at most in" in planned and free == "2.0 GiB are free"
    total = evaluation_forecast._plan(settings, _config(material), asked, 200, CUDA).total
    settings.evaluate.prompts_per_batch = 4
    four = evaluation_forecast._plan(settings, _config(material), asked, 200, CUDA).total
    settings.evaluate.prompts_per_batch = 16
    monkeypatch.setattr(evaluation_forecast, "device_room", lambda device: (four, "little is free"))
    with pytest.raises(SettingsError) as refused:
        check_evaluation_memory(material.model_path, asked, 200, settings, CUDA)
    assert f"got a plan of {evaluation_forecast._size(total)} with prompts of 200 tokens" in str(refused.value)
    assert "set evaluate.prompts_per_batch=4, planned" in str(refused.value)
    settings.runtime.check_memory = False
    assert "expected at most" in check_evaluation_memory(material.model_path, asked, 200, settings, CUDA)[-1]


def test_advice_names_what_lowers_the_plan(folder: Path, material: Material) -> None:
    asked = [replace(material.heldout[0], id=f"{index}", videos=(f"{index}.mp4",)) for index in range(16)]

    def advice(*overrides: str) -> tuple[str, str]:
        settings = tiny_settings(folder, "evaluate.prompts_per_batch=16", *overrides)

        def planned(changed: RunConfig):
            return evaluation_forecast._plan(changed, _config(material), asked, 200, WORLD)

        return planned(settings).peak, evaluation_forecast._advice(settings, asked, planned, 1)

    # Many tokens of each answer: a smaller call of the tower changes nothing.
    peak, answers = advice("evaluate.max_new_tokens=100000", "micro_tokens=8192")
    assert peak == "answers"
    expected = "lower evaluate.prompts_per_batch, video.num_frames or video.max_video_pixels, or use a larger GPU"
    assert answers == expected
    peak, vision = advice("evaluate.max_new_tokens=1", "evaluate.num_frames=16", "micro_tokens=8192")
    assert peak == "vision" and "micro_tokens" in vision and "evaluate.num_frames or video.max_video_pixels" in vision


def _config(material: Material) -> dict:
    return json.loads((Path(material.model_path) / "config.json").read_text())


def test_time_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    # Reading and answering share the cores of a CPU, and overlap otherwise.
    batch = BatchTime(questions=4, read_s=6.0, answer_s=2.0)
    assert batch.seconds_per_question(torch.device("cpu")) == 2.0
    assert batch.seconds_per_question(torch.device("cuda")) == 1.5
    assert forecast_line(1.8, 400, 16) == "time: about 12 min for 400 questions, 30 min per 1,000 (from 16 questions)"
    assert [duration(hours) for hours in (0.5 / 3600, 40 / 3600, 0.5, 2.05)] == [
        "0.5 s",
        "40 s",
        "30 min",
        "2 h 03 min",
    ]

    now = [0.0]
    monkeypatch.setattr("rmsd_fast.stages.evaluation.time.perf_counter", lambda: now[0])
    clock = _Clock([["q"] * 4] * 10, replace(WORLD, size=2))
    lines = []
    # The first batch includes the compilation of kernels. The others take 12, 3, 3 and 6 s.
    for end in (100, 112, 115, 118, 124):
        now[0] = end
        lines.append(clock.answered())
    # 12 s for 4 questions of each of the two processes: 1.5 s per question, 64 left. Then 18 s for 24 questions.
    assert lines[1] == "time: about 2 min for 64 questions, 25 min per 1,000 (from 8 questions)"
    assert lines[3] == "time: about 36 s for 48 questions, 12 min per 1,000 (from 24 questions)"
    assert lines[0] == lines[2] == lines[4] == ""


def test_a_batch_of_the_evaluation_is_timed_with_cold_caches(folder: Path, material: Material) -> None:
    settings = tiny_settings(folder, "evaluate.prompts_per_batch=4", "evaluate.max_new_tokens=3")
    # 3 questions about each of 3 videos, so that a batch has one video.
    clips = list(dict.fromkeys(question.videos for question in material.heldout))[:3]
    first = material.heldout[0]
    asked = [replace(first, id=f"{index}", videos=clips[index % 3]) for index in range(9)]
    batches = plan_batches(asked, 4, 1)
    assert [[q.id for q in batch] for batch in batches] == [["0", "3", "6"], ["1", "4", "7"], ["2", "5", "8"]]
    assert (largest_batches(batches).questions, largest_batches(batches).media) == (3, 1)
    with MediaReader(settings.data) as media:
        student = load(material.model_path, settings, WORLD)
        line = time_questions(student, asked, settings, WORLD, media)
        # The video of the batch, and before it one of the question that compiles kernels.
        assert media.take_counts()["decoded"] == 2
        lines, lengths = describe_evaluation(material.model_path, asked, settings, WORLD, media)
        assert "for 9 questions" in line and line.endswith("(from 3 questions)")
        assert lines[0] == f"model: {material.model_path}; own questions, prompt rmsd, parsing strict"
        assert lengths.read == 9 and any(text.startswith("memory: ") for text in lines)
        # Without another batch, the timed one is the whole evaluation, and there are fewer batches than processes.
        line = time_questions(student, asked[:1], settings, WORLD, media)
        assert "for 1 question," in line and line.endswith("(from 1 question)")


def test_the_plan_is_that_of_the_questions(folder: Path, material: Material) -> None:
    settings = tiny_settings(folder, "evaluate.prompts_per_batch=16", "evaluate.max_new_tokens=10", "data.cache_mib=64")
    config, first = _config(material), material.heldout[0]

    def plan(videos: int, each: int):
        asked = [replace(first, id=f"{i}", videos=(f"{i % videos}.mp4",)) for i in range(videos * each)]
        return evaluation_forecast._plan(settings, config, asked, 100, WORLD)

    layers = 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    # Two questions are a batch of two, whatever prompts_per_batch says. 8 frames have up to 99 tokens.
    assert plan(2, 1).phases["answers"]["vision"] == 2 * 99 * layers * 64 * 4
    assert plan(1, 4).phases["answers"]["vision"] == 99 * layers * 64 * 4
    # Questions about one video share its frames, features, and keys and values.
    shared, apart = plan(1, 4).phases["answers"], plan(4, 1).phases["answers"]
    assert shared["media"] - 64 * 2**20 == (apart["media"] - 64 * 2**20) / 4 and shared["rollout"] < apart["rollout"]
    texts = [replace(first, id=f"{i}", videos=()) for i in range(4)]
    text_only = evaluation_forecast._plan(settings, config, texts, 100, WORLD)
    assert text_only.phases["answers"]["vision"] == 0 and text_only.phases["answers"]["media"] == 64 * 2**20
    # A smaller call of the tower takes less, and no call can be smaller than an image or a frame.
    settings.video.max_frame_pixels = 25 * 32 * 32
    sizes = []
    for settings.micro_tokens in (25, 50, 75, 150, 300):
        sizes.append(plan(4, 1).phases["vision"]["vision"])
    assert sizes == sorted(set(sizes))
    picture = replace(first, videos=(), images=("a.png",))
    sizes = []
    for settings.micro_tokens in (10, 50, 99):
        sizes.append(evaluation_forecast._plan(settings, config, [picture], 100, WORLD).phases["vision"]["vision"])
    assert len(set(sizes)) == 1


def test_a_dry_run_of_the_program(folder: Path, material: Material, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    shutil.copytree(folder, made)
    tasks = [setting for setting in SIX_TASKS if setting.startswith("made.")]
    settings = [*tasks, "made.train_clips=12", "made.heldout_clips=3", "made.student_layers=2"]
    arguments = ["quickstart", f"made.folder={made}", *settings, "evaluate.rollouts=0", "evaluate.max_new_tokens=4"]

    def rehearse(*overrides: str) -> subprocess.CompletedProcess:
        return run_program("rmsd_fast.evaluate", [*arguments, *overrides, "--dry-run"], environment(), timeout_s=300)

    before = sorted(tmp_path.rglob("*"))
    done = rehearse()
    assert done.returncode == 0, done.stderr[-3000:]
    starts = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert starts == ["model", "questions", "frames", "prompts", "memory", "time", "ready"]
    assert sorted(tmp_path.rglob("*")) == before
    # One of three videos is damaged, so a third of the questions cannot be used.
    sorted(made.glob("*/clips/heldout-*.mp4"))[0].write_bytes(b"no video")
    done = rehearse()
    assert done.returncode == 2 and "UNUSABLE: 3 of the 9 questions" in done.stdout, done.stdout + done.stderr[-3000:]
    expected = "not ready: 3 of 9 questions cannot be used, which is more than data.max_bad_share=0.05 of them"
    assert done.stdout.splitlines()[-1] == expected
    # A missing file is reported in the same way.
    sorted(made.glob("*/clips/heldout-*.mp4"))[0].unlink()
    done = rehearse()
    assert done.returncode == 2 and "MISSING: 1 of 3 media files" in done.stdout and "time: " in done.stdout
    assert done.stdout.splitlines()[-1] == expected
    assert rehearse("data.max_bad_share=0.5").stdout.splitlines()[-1] == "ready"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("distill.lr=1", "distill.lr has no effect: rmsd_fast.evaluate does not train"),
        ("sft.steps=4", "sft.steps has no effect: rmsd_fast.evaluate does not train"),
        ("data.train=a.jsonl", "data.train has no effect: rmsd_fast.evaluate does not train"),
        ("evaluate.every_steps=4", "evaluate.every_steps has no effect: rmsd_fast.evaluate does not train"),
        ("rollout.max_new_tokens=4", "rollout.max_new_tokens has no effect: .* set evaluate.max_new_tokens"),
        ("rollout.prompts_per_batch=4", "no effect: .* set evaluate.prompts_per_batch"),
        ("output=runs", "output has no effect: rmsd_fast.evaluate does not train; set --output"),
        ("teacher.responses=2", "teacher.responses has no effect"),
        ("model.adapter=lora", "model.adapter has no effect"),
        ("made.label_share=0.5", "made.label_share has no effect"),
        ("rollout.temperature=0.5", "rollout.temperature has no effect: answers are greedy"),
        ("evaluate.num_frame=4", "unknown setting evaluate.num_frame; did you mean evaluate.num_frames?"),
    ],
)
def test_overrides_without_effect_are_refused(override: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_settings("quickstart", ["evaluate.rollouts=0", override], trains=False)


@pytest.mark.parametrize("override", ["video.num_frames=8", "video.fps=2", "video.min_frames=4", "video.max_frames=9"])
def test_frames_of_training_do_not_replace_those_of_evaluations(override: str) -> None:
    with pytest.raises(SettingsError, match=r"has no effect: evaluate.num_frames=64 replaces it; set evaluate.num_fra"):
        load_settings("rmsd_qwen3vl_4b", [override], trains=False)
    changed = ["evaluate.num_frames=null", "video.num_frames=null", "video.fps=2", "video.max_frames=9"]
    assert load_settings("rmsd_qwen3vl_4b", changed, trains=False).video.max_frames == 9


def test_a_file_may_hold_settings_of_training(tmp_path: Path) -> None:
    load_settings("quickstart", ["evaluate.rollouts=4", "rollout.temperature=0.5", "video.num_frames=4"], trains=False)
    save_settings(load_settings("quickstart", ["stages=[sft]"]), tmp_path / "config.yaml")
    # Prompts of an evaluation may be longer than a pass of training.
    settings = load_settings(str(tmp_path / "config.yaml"), ["data.max_prompt_tokens=100000"], trains=False)
    assert settings.stages == ["sft"] and settings.data.max_prompt_tokens > settings.micro_tokens
    # An earlier version had fewer settings, so the file has not all of them.
    text = (tmp_path / "config.yaml").read_text()
    older = "\n".join(line for line in text.splitlines() if "student_family" not in line)
    (tmp_path / "older.yaml").write_text(older)
    assert isinstance(load_settings(str(tmp_path / "older.yaml"), trains=False), RunConfig)
    # A run saved it, so a training does not object to settings without effect either.
    assert isinstance(load_settings(str(tmp_path / "older.yaml")), RunConfig)


def test_unknown_settings_of_a_file_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sft:\n  step: 4\n  target: best\nteacher:\n  spatial_format: pixels\nevaluate:\n  frames: 3\n")
    # Settings of training are left out with a warning, and settings of evaluations refused.
    with pytest.raises(SettingsError) as refused:
        load_settings(str(path), trains=False)
    first, *rest = str(refused.value).splitlines()
    assert first == (
        f"recipe {path}: 2 settings are unknown to this version; delete or rename them (in a copy, if a run wrote the "
        "file):"
    )
    assert rest[0].startswith("  teacher.spatial_format was removed: ")
    assert rest[1].startswith("  unknown setting evaluate.frames; did you mean ")
    warning = capsys.readouterr().err
    assert "only mattered in training: sft.step, sft.target" in warning and warning.count("warning") == 1
    with pytest.raises(SettingsError) as refused:
        load_settings(str(path))
    first, *rest = str(refused.value).splitlines()
    assert ": 4 settings are unknown to this version" in first
    assert rest[0] == "  unknown setting sft.step; did you mean sft.steps?"
    assert rest[1] == "  unknown setting sft.target; did you mean sft.responses=best, all or random?"
    # What the removed setting said still holds.
    path.write_text("teacher:\n  spatial_format: relative\nsft:\n  target: best\n  steps: 7\n")
    assert load_settings(str(path), trains=False).sft.steps == 7
    assert "training: teacher.spatial_format, sft.target" in capsys.readouterr().err
    # A mistake in a name of evaluations is not taken for a setting of training.
    path.write_text("data:\n  max_prompt_token: 4\n")
    with pytest.raises(SettingsError, match="did you mean data.max_prompt_tokens"):
        load_settings(str(path), trains=False)


def test_recipes_are_checked_for_settings_without_effect(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("made:\n  enabled: false\n  heldout_clips: 4\nsft:\n  lr: 1.0\nstages: [distill]\n")
    with pytest.raises(SettingsError, match=r"made.heldout_clips has no effect: no material is generated"):
        load_settings(str(path), trains=False)
    # Settings of training do not matter here.
    path.write_text("sft:\n  lr: 1.0\nstages: [distill]\nevaluate:\n  rollouts: 2\n")
    assert load_settings(str(path), trains=False).evaluate.rollouts == 2


@pytest.mark.parametrize(
    "conflict",
    [
        "stages: [distill, sft]",
        "stages: [warm_up]\nreward:\n  alpha: 0.0",
        "model:\n  quantize: nf4",
        "model:\n  quantize: nf4\n  adapter: lora\nrollout:\n  engine: vllm\nruntime:\n  zero_stage: 3",
        "rollout:\n  engine: vllm_server",
        "discriminator:\n  mode: shared\n  export: true\nmodel:\n  quantize: nf4",
        "self_teacher:\n  kind: frozen",
        "runtime:\n  offload_optimizer: true\n  optimizer: adamw_8bit\n  trackers: [unknown]",
        "teacher:\n  responses: 9\nmade:\n  enabled: true\n  label_share: 0.5",
        "micro_tokens: 100",
    ],
)
def test_conflicts_of_training_do_not_matter(conflict: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(conflict + "\n")
    load_settings(str(path), trains=False)
    with pytest.raises(SettingsError):
        load_settings(str(path))


def test_advice_names_settings_of_evaluations() -> None:
    # All settings that the messages of check_evaluated and of the functions that it calls name.
    functions = {node.name: node for node in ast.parse(inspect.getsource(evaluation)).body if hasattr(node, "name")}
    reached, todo = set(), ["check_evaluated"]
    while todo:
        name = todo.pop()
        if name in functions and name not in reached:
            reached.add(name)
            todo += [node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name)]
    texts = [
        node.value
        for name in reached
        for node in ast.walk(functions[name])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    sections = settings_as_dict(RunConfig()).items()
    names = [f"{section}.{name}" for section, values in sections if isinstance(values, dict) for name in values]
    keys = {key for key in names if any(re.search(rf"(?<![\w.]){re.escape(key)}(?![\w])", text) for text in texts)}
    assert {"video.num_frames", "evaluate.parse", "made.tasks"} <= keys
    assert len(reached) > 4 and [key for key in keys if not is_evaluated(key)] == []
