"""Test evaluations with real vLLM on the CPU: answers of transformers, proven weights, resume, and planted faults.

These tests run with a Python that has vLLM and the trainer (`make test-vllm`).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import tiny_material, tiny_settings
from media_files import write_images
from test_vllm_engine import trainer_logp
from train_runs import SIX_TASKS, environment
from vllm_media import WatchedMedia
from vllm_world import vllm_world

from rmsd_fast import evaluate
from rmsd_fast.config import SettingsError
from rmsd_fast.data.media import MediaReader
from rmsd_fast.models.export import export_student
from rmsd_fast.models.students import load_student
from rmsd_fast.rollout.base import RolloutError
from rmsd_fast.rollout.vllm import VllmSampler
from rmsd_fast.runtime.stop_signal import StopSignal
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import evaluation
from rmsd_fast.stages.answer_records import NOT_FINITE
from rmsd_fast.stages.build import load
from rmsd_fast.stages.evaluation import answer_questions
from rmsd_fast.stages.evaluation_vllm import VllmAnswers, load_answering

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
NORM = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def world():
    with vllm_world() as world:
        yield world


@torch.no_grad()
def distinct_student(source, folder):
    """Export a student whose answers differ between questions: random changes to its language model."""
    student = load_student(source, dtype="float32")
    generator = torch.Generator().manual_seed(1)
    for p in student.model.model.language_model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))
    export_student(student, folder)
    return str(folder)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Return the settings' folder, a student, and questions with the same video, two videos, an image, and none."""
    folder = tmp_path_factory.mktemp("vllm")
    made = tiny_material(folder)
    first, *rest = made.heldout
    other = next(question for question in rest if question.videos != first.videos)
    (folder / "images").mkdir()
    image = str(write_images(folder / "images")["rgb"])
    questions = [
        *made.heldout,
        replace(first, id="two", videos=first.videos + other.videos),
        replace(other, id="image", images=(image,)),
        replace(first, id="text", videos=()),
        replace(first, id="lost", videos=(str(folder / "lost.mp4"),)),
    ]
    return SimpleNamespace(folder=folder, path=distinct_student(made.model_path, folder / "student"), asked=questions)


def settings_of(material, *overrides, engine="vllm"):
    sizes = ("evaluate.max_new_tokens=10", "data.max_prompt_tokens=600", "micro_tokens=700", "model.dtype=float32")
    settings = tiny_settings(material.folder, *sizes, *overrides)
    settings.evaluate.engine, settings.rollout.vllm_kv_cache_gib = engine, 0.1
    return settings


@pytest.fixture(scope="module")
def media(material, world):
    with MediaReader(settings_of(material).data, world.device) as reader:
        yield reader


@pytest.fixture(scope="module")
def loaded(material, world):
    """Return a student whose language model vLLM has taken over, and the engine."""
    student, engine = load_answering(
        material.path, settings_of(material, "evaluate.rollouts=4", "evaluate.prompts_per_batch=64"), world
    )
    assert isinstance(engine, VllmAnswers)
    return student, engine


@pytest.fixture(scope="module")
def answers(material, world, media, loaded):
    """Return a function that answers all questions with settings and an engine."""

    def answer(*overrides, engine="vllm"):
        settings = settings_of(material, *overrides, engine=engine)
        student, vllm = loaded if engine == "vllm" else (load(material.path, settings, world), None)
        return answer_questions(student, material.asked, settings, world, media, name="x", engine=vllm)

    return answer


def test_greedy_answers_are_those_of_hf(answers):
    got, expected = (answers(engine=engine) for engine in ("vllm", "hf"))
    assert got == expected
    assert len({record["response"] for record in got}) > 4
    assert [record["id"] for record in got if "error" in record] == ["lost"]


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(material, answers, monkeypatch):
    drawn = []
    record = evaluation.with_samples

    def watched(greedy, question, responses, *args):
        drawn[-1][question.id] = [text for text, _, _ in responses]
        return record(greedy, question, responses, *args)

    monkeypatch.setattr(evaluation, "with_samples", watched)
    sampled = ("evaluate.rollouts=4", "rollout.temperature=1.5")
    records = []
    for other in ("evaluate.prompts_per_batch=64", "evaluate.prompts_per_batch=2", "seed=5"):
        drawn.append({})
        records.append(answers(*sampled, other))
    assert drawn[0] == drawn[1] and records[0] == records[1]
    assert drawn[2] != drawn[0] and len(drawn[0]) == len(material.asked) - 1
    assert all(len(set(texts)) == 4 for texts in drawn[0].values())
    # The greedy answers are those of an evaluation without samples.
    greedy = [record["response"] for record in answers()]
    assert [record["response"] for record in records[0]] == greedy


def test_log_probs_are_those_of_hf_at_both_temperatures(material, world, media, loaded):
    """A batch has requests with temperature 0, whose log-probs are those at temperature 1, and others.

    With 24 frames of two videos, a prompt is longer than two blocks of vLLM's cache, which its requests share.
    """
    settings = settings_of(material, "evaluate.rollouts=2", "rollout.temperature=0.7", "evaluate.num_frames=24")
    student, engine = loaded
    model = load(material.path, settings, world)
    clusters = {question.id: "" for question in material.asked}
    answering = evaluation.Answering(student, settings, world, media, clusters, engine=engine)
    (built,) = answering.prompts_ahead([[q for q in material.asked if q.id in ("two", "image", "text")]])
    prompts = [prompt for _, prompt in built]
    asked = answering._greedy, answering._sampled
    groups = engine.answer(prompts, *asked)
    hf = evaluation.HfAnswers(model, answering._builder, settings, world)
    greedy, _ = hf.answer(prompts, asked[0])
    for (got,), (expected,) in zip(groups[0], greedy, strict=True):
        assert torch.equal(got.token_ids, expected.token_ids)
        assert torch.allclose(got.logp, expected.logp, atol=1e-4)
        assert got.banned_mass == pytest.approx(expected.banned_mass, abs=1e-5)
    trainer = SimpleNamespace(student=model, builder=answering._builder)
    for prompt, group in zip(prompts, groups[1], strict=True):
        for rollout in group:
            logp, mass = trainer_logp(trainer, prompt, rollout, 0.7)
            assert torch.allclose(rollout.logp.double(), logp, atol=1e-4)
            assert rollout.banned_mass == pytest.approx(mass, abs=1e-5)


def test_a_prompt_is_prefilled_once(material, world, media, loaded, monkeypatch):
    """Greedy and sampled requests share all full blocks of their prompt, and questions those up to their difference."""
    _, engine = loaded
    core = engine.copy.sampler._engine.engine_core.engine_core
    schedule, tokens = core.scheduler.schedule, []

    def counted(*args, **kwargs):
        output = schedule(*args, **kwargs)
        tokens.append(output.total_num_scheduled_tokens)
        return output

    monkeypatch.setattr(core.scheduler, "schedule", counted)
    settings = settings_of(material, "evaluate.rollouts=4", "evaluate.max_new_tokens=1", "evaluate.num_frames=24")
    first = next(question for question in material.asked if question.id == "two")
    asked = [first, replace(first, id="again", question=f"{first.question} Why?")]
    answering = evaluation.Answering(loaded[0], settings, world, media, {q.id: "" for q in asked}, engine=engine)
    (built,) = answering.prompts_ahead([asked])
    answering.answer(built)
    ids = [prompt.input_ids for _, prompt in built]
    block = core.vllm_config.cache_config.block_size
    common = int((ids[0] == ids[1][: len(ids[0])]).long().cumprod(0).sum())
    # A request computes at least its last token, and what follows the last full block that is there already.
    own = [len(row) - (len(row) - 1) // block * block for row in ids]
    assert min(map(len, ids)) > 2 * block and common > block
    assert sum(tokens) == len(ids[0]) + 4 * own[0] + len(ids[1]) - common // block * block + 4 * own[1]


def test_features_do_not_outlive_their_batch(material, loaded, answers, monkeypatch):
    """`answers` has several batches, after which no weights are sent."""
    watched = WatchedMedia(loaded[1].copy.sampler, monkeypatch)
    answers("evaluate.prompts_per_batch=8")
    kept = watched.kept()
    assert kept.pop("given") >= len(material.asked) - 2
    assert kept == {"alive": 0, "encoded": 0, "requests": 0}


def test_only_the_tower_of_the_student_is_kept(loaded):
    model = loaded[0].model
    devices = {name.startswith("model.visual."): p.device.type for name, p in model.named_parameters()}
    assert devices == {True: "cpu", False: "meta"} and model.device.type == "cpu"


def test_weights_that_did_not_arrive_are_caught(material, world, monkeypatch):
    settings = settings_of(material)
    student = load(material.path, settings, world, only_tower=True)
    with torch.no_grad():
        student.model.model.language_model.layers[1].mlp.up_proj.weight.view(torch.int32)[0, 0] += 1

    def pretend(self, weights, names):
        assert [name for name, _ in weights] == names

    monkeypatch.setattr(VllmSampler, "load", pretend)
    expected = (
        r"evaluate.engine: expected the student's weights in vLLM, got others in layers.1 \(1 of 4 groups\); set "
        "evaluate.engine=hf, and report this"
    )
    with pytest.raises(RolloutError, match=expected):
        VllmAnswers(material.path, student, settings, world)
    # The student can still be used.
    assert not any(p.is_meta for p in student.model.parameters())


def test_a_cache_without_room_for_one_response(material, world):
    settings = settings_of(material)
    settings.rollout.vllm_kv_cache_gib = 0.0002
    expected = r"rollout.vllm_kv_cache_gib: expected room for .*lower data.max_prompt_tokens or evaluate.max_new_tokens"
    with pytest.raises(SettingsError, match=expected):
        load_answering(material.path, settings, world)


@torch.no_grad()
def test_logits_that_are_not_finite(material, world, media, loaded, answers):
    """They are recorded as with hf, for greedy and sampled answers."""
    overrides = ("evaluate.rollouts=2", "rollout.temperature=1")
    norm = dict(loaded[1].copy.sampler._model.named_parameters())[NORM]
    before = norm.clone()
    norm.fill_(torch.nan)
    try:
        got = answers(*overrides)
    finally:
        norm.copy_(before)
    settings = settings_of(material, *overrides, engine="hf")
    student = load(material.path, settings, world)
    student.model.model.language_model.norm.weight.fill_(torch.nan)
    assert got == answer_questions(student, material.asked, settings, world, media, name="x")
    assert {record["error"] for record in got[:-1]} == {NOT_FINITE} and {record["sampled"] for record in got} == {0.0}


def test_an_engine_that_fails_can_be_used_again(loaded, answers, monkeypatch):
    vllm = loaded[1].copy.sampler._engine
    step, steps = vllm.step, iter(range(3))

    def failing():
        if next(steps, None) is None:
            raise RuntimeError("the device has failed")
        return step()

    expected = answers()
    monkeypatch.setattr(vllm, "step", failing)
    with pytest.raises(RolloutError, match=r"\(RuntimeError: the device has failed\); set evaluate.engine=hf, and rep"):
        answers()
    monkeypatch.undo()
    assert answers() == expected


def test_a_dry_run(material, world, capsys):
    settings = settings_of(material, "evaluate.rollouts=2")
    settings.model.path = material.path
    assert evaluate.rehearse(settings, world)
    said = capsys.readouterr().out
    assert ", engine vllm" in said and "time: " in said and said.endswith("ready\n")
    assert "planned per process, at most in" in said


def test_a_killed_evaluation_continues_with_the_same_result(tmp_path, material, world):
    """Kill the program in the middle, continue with two processes, and compare with one that was not interrupted.

    A kill leaves any number of batches, and each process answers its share without waiting for the other one.
    """
    tasks = [setting for setting in SIX_TASKS if setting.startswith("made.")]
    sizes = ["made.train_clips=12", "made.heldout_clips=12", "evaluate.prompts_per_batch=4", "data.cache_mib=16"]
    answered = ["evaluate.engine=vllm", "rollout.vllm_kv_cache_gib=0.1", "evaluate.max_new_tokens=24"]
    answered += ["evaluate.rollouts=2", "rollout.temperature=1", "data.max_prompt_tokens=500", "model.dtype=float32"]
    shared = [*tasks, *sizes, *answered, f"made.folder={tmp_path / 'made'}", f"model.path={material.path}"]

    def begin(output, log, processes=1):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        program = [*(launcher if processes > 1 else []), "-m", "rmsd_fast.evaluate"]
        return subprocess.Popen(
            [sys.executable, *program, "quickstart", *shared, "--output", str(output)],
            env={**environment(), "TORCHDYNAMO_DISABLE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    signals = StopSignal()
    try:
        evaluate.evaluate(load_settings("quickstart", shared, trains=False), world, signals, whole)
    finally:
        signals.restore()
    part = tmp_path / "killed.predictions.jsonl.part0"
    with (tmp_path / "first.log").open("w") as log:
        first = begin(killed, log)
    while first.poll() is None and not (part.exists() and len(part.read_bytes().splitlines()) > 9):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not killed.exists() and 9 < len(part.read_bytes().splitlines()) < 34
    with (tmp_path / "second.log").open("w") as log:
        second = begin(killed, log, processes=2)
    code, said = second.wait(timeout=300), (tmp_path / "second.log").read_text()
    assert code == 0 and "continuing an interrupted evaluation" in said, said
    results = [path.with_suffix(".predictions.jsonl").read_bytes() for path in (whole, killed)]
    assert results[0] == results[1] and len(results[0].splitlines()) == 36
    assert whole.read_bytes() == killed.read_bytes()
    assert len({json.loads(line)["response"] for line in results[0].splitlines()}) > 8
    protocol = json.loads(whole.read_text())["protocol"]
    assert protocol["evaluate"]["engine"] == "vllm" and protocol["versions"]["vllm"].startswith("0.32")
