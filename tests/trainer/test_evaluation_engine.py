"""Test `evaluate.engine` without vLLM: rules, messages, the memory plan, and what an evaluation records."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from material import WORLD, tiny_material, tiny_settings

from rmsd_fast.config import ModelError, NotInstalled, SettingsError
from rmsd_fast.data.records import Question
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.program import _out_of_memory
from rmsd_fast.rollout.samples import Medium
from rmsd_fast.rollout.vllm import MOST_ANSWERS, answered_together
from rmsd_fast.setting_rules.evaluation import refuse_evaluation_only
from rmsd_fast.settings import load_settings, save_settings
from rmsd_fast.stages import evaluation_forecast
from rmsd_fast.stages.evaluation_forecast import describe_protocol
from rmsd_fast.stages.evaluation_vllm import _side_by_side
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.memory import GIB, plan_evaluation
from rmsd_fast.stages.protocol import differences_of, evaluation_identity, protocol_of

VLLM = "evaluate.engine=vllm"
ASKED = [Question("1", "?", "mcq", videos=("a.mp4",), options=("a", "b"), answer="A")]
CUDA = replace(WORLD, device=torch.device("cuda", 0))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return folder, tiny_material(folder)


@pytest.fixture
def vllm_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.1")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["rollout.engine=vllm"], "rollout.engine has no effect: .* set evaluate.engine"),
        (["rollout.tensor_parallel=2"], "rollout.tensor_parallel has no effect: .* each process .* the whole model"),
        (["rollout.vllm_kv_cache_gib=4"], "evaluate.engine=hf has no cache of this size; set evaluate.engine=vllm"),
        ([VLLM, "rollout.cuda_graphs=false"], "no effect: vLLM captures its own graphs; set evaluate.engine=hf"),
        ([VLLM, "model.liger=off"], "model.liger has no effect: vLLM has kernels of its own"),
        ([VLLM, "evaluate.rollouts=0", "rollout.temperature=1"], "rollout.temperature has no effect"),
        ([VLLM, "evaluate.rollouts=2", "rollout.temperature=0.005"], "expected 0.01 or more with evaluate.engine=vllm"),
        (["evaluate.engine=vllm_server"], "evaluate.engine: expected one of hf, vllm, got 'vllm_server'"),
        ([VLLM, "model.quantize=nf4"], "evaluate.engine: expected hf with model.quantize, .* model.quantize=none"),
    ],
)
def test_settings_that_conflict_or_have_no_effect(overrides, says):
    with pytest.raises(SettingsError, match=says):
        load_settings("quickstart", overrides, trains=False)


def test_settings_that_have_an_effect():
    cache = load_settings("quickstart", [VLLM, "rollout.vllm_kv_cache_gib=4"], trains=False).rollout.vllm_kv_cache_gib
    assert cache == 4
    ranked = [VLLM, "evaluate.rollouts=2", "evaluate.reranker=d", "model.liger=off", "micro_tokens=40000"]
    assert load_settings("quickstart", ranked, trains=False).model.liger == "off"


def test_training_refuses_vllm_in_its_evaluations():
    settings = load_settings("quickstart", [VLLM])
    with pytest.raises(SettingsError, match=r"evaluate.engine: expected hf in training, .* got vllm; leave it out"):
        refuse_evaluation_only(settings)
    # vLLM would also raise the temperature of rollouts.
    with pytest.raises(SettingsError, match="expected 0.01 or more with rollout.engine=vllm, .* set rollout.engine=hf"):
        load_settings("quickstart", ["rollout.engine=vllm", "rollout.temperature=0.001", "stages=[distill]"])


def test_files_of_runs_with_vllm_are_recipes_of_both_engines(tmp_path):
    """The file of a run names all settings, and that of a person some of them."""
    run = load_settings("quickstart", ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=4", "stages=[sft,distill]"])
    save_settings(run, tmp_path / "config.yaml")
    (tmp_path / "own.yaml").write_text("base: quickstart\nrollout: {engine: vllm, vllm_kv_cache_gib: 4}\n")
    for name in ("config.yaml", "own.yaml"):
        for engine in ("hf", "vllm"):
            settings = load_settings(str(tmp_path / name), [f"evaluate.engine={engine}"], trains=False)
            assert (settings.evaluate.engine, settings.rollout.vllm_kv_cache_gib) == (engine, 4)


def test_an_evaluation_is_refused_before_it_starts(made, tmp_path, vllm_is_installed, monkeypatch):
    folder, material = made

    def prepare(*overrides, path=""):
        settings = tiny_settings(folder, *overrides)
        settings.evaluate.engine, settings.model.path = "vllm", path
        return prepare_material(settings, WORLD, training=False)

    assert prepare().model_path == material.model_path
    with pytest.raises(SettingsError, match=r"vllm_kv_cache_gib: expected at least .* and evaluate.max_new_tokens to"):
        prepare("rollout.engine=vllm", "rollout.vllm_kv_cache_gib=1e-4")
    build_tiny_student(tmp_path / "other", texts=["When?"], layers=2, family="qwen2_5_vl")
    with pytest.raises(ModelError, match="expected a Qwen3-VL model with evaluate.engine=vllm, .* evaluate.engine=hf"):
        prepare(path=str(tmp_path / "other"))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.31.0")
    with pytest.raises(NotInstalled, match=r"evaluate.engine=vllm: .*, got 0.31.0; .* or set evaluate.engine=hf"):
        prepare()

    def version(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(NotInstalled, match=r"evaluate.engine=vllm: .* got none; .* or set evaluate.engine=hf"):
        prepare()


def test_the_protocol_names_engine_and_version(vllm_is_installed):
    hf, vllm = (load_settings("quickstart", [f"evaluate.engine={name}"], trains=False) for name in ("hf", "vllm"))
    changes = differences_of(protocol_of(hf), protocol_of(vllm))
    assert changes == ["evaluate.engine: vllm, not hf", "versions.vllm: 0.32.1, not absent"]
    assert "engine vllm" in describe_protocol("m", vllm) and "engine" not in describe_protocol("m", hf)
    # Requests that fit into the cache are computed together, which changes rounding.
    other = load_settings("quickstart", [VLLM, "rollout.vllm_kv_cache_gib=4"], trains=False)
    identities = [evaluation_identity(settings, ASKED, {"hash": "1"}) for settings in (vllm, other)]
    assert differences_of(*identities) == ["vllm_kv_cache_gib: 4.0, not 8.0"]


def test_the_plan_has_one_language_model_and_the_cache(made):
    folder, material = made
    sizes = ("evaluate.prompts_per_batch=4", "evaluate.rollouts=3", "evaluate.max_new_tokens=10")
    settings = tiny_settings(folder, *sizes, "data.cache_mib=3")
    settings.data.max_prompt_tokens = 100
    config = json.loads((Path(material.model_path) / "config.json").read_text())
    hf = plan_evaluation(settings, config, device="cuda")
    settings.evaluate.engine, settings.rollout.vllm_kv_cache_gib = "vllm", 0.5
    # The recipe may be that of a run with groups of processes. An evaluation has none.
    settings.rollout.tensor_parallel = 2
    plan = plan_evaluation(settings, config, device="cuda")
    assert set(hf.phases) == {"vision", "answers", "samples"} and set(plan.phases) == {"start", "vision", "answers"}
    total, tower = hf.phases["answers"]["weights"], plan.phases["answers"]["weights"]
    assert 0 < tower < total and plan.phases["vision"]["weights"] == tower
    layers = 1 + len(config["vision_config"]["deepstack_visual_indexes"])
    # vLLM has all weights, buffers for the deepstack layers of 8,192 tokens of width 64, and its cache.
    state = total + (layers - 1) * 8192 * 64 * 4 + GIB // 2
    assert plan.phases["vision"]["rollout"] == plan.phases["start"]["rollout"] == state
    # 16 answers are fewer logits than the activations of a pass over 8,192 tokens.
    text = config["text_config"]
    layer = 8192 * (3 * text["intermediate_size"] + 6 * 64) * 4
    assert plan.phases["answers"]["rollout"] == state + layer
    # The features of 4 videos are held twice while those of the last one are joined.
    assert plan.phases["answers"]["vision"] == 2 * hf.phases["answers"]["vision"]
    # The engine is started for the longest prompts that are allowed, even if those of the evaluation are shorter.
    longer = plan_evaluation(settings, config, device="cuda", limit=20_000)
    state += (layers - 1) * (20_010 - 8192) * 64 * 4
    assert longer.phases["vision"]["rollout"] == state and longer.phases["vision"]["vision"] > 0
    # On a CPU, the student's language model is there until its weights were compared.
    assert plan_evaluation(settings, config, device="cpu").phases["start"]["weights"] == total
    assert (answered_together(4, 3), answered_together(64, 8)) == (16, MOST_ANSWERS)


def test_a_smaller_cache_is_the_first_advice(made):
    folder, material = made
    asked = [replace(material.heldout[0], id=f"{index}", videos=(f"{index}.mp4",)) for index in range(4)]
    settings = tiny_settings(folder, "evaluate.prompts_per_batch=4")
    settings.evaluate.engine, settings.rollout.vllm_kv_cache_gib = "vllm", 32.0
    config = json.loads((Path(material.model_path) / "config.json").read_text())

    def planned(changed):
        return evaluation_forecast._plan(changed, config, asked, 200, CUDA)

    room = planned(settings).total - 20 * GIB
    least = evaluation_forecast._least_cache(settings, config)
    assert least == 1
    advice = evaluation_forecast._advice(settings, asked, planned, room, least)
    assert advice.startswith("set rollout.vllm_kv_cache_gib=8, planned")
    # A cache that a prompt and its response do not fit into is no advice.
    assert "set rollout.vllm_kv_cache_gib" not in evaluation_forecast._advice(settings, asked, planned, room, 16)
    settings.evaluate.engine = "hf"
    assert evaluation_forecast._least_cache(settings, config) == 0


def test_out_of_memory_names_the_cache():
    settings = load_settings("quickstart", [VLLM, "rollout.vllm_kv_cache_gib=12"], trains=False)
    text = _out_of_memory(settings, torch.OutOfMemoryError("full"), None, trains=False)
    assert "rollout.vllm_kv_cache_gib=12 (vLLM's cache)" in text and "cuda_graphs" not in text


def test_equal_media_share_their_joined_features():
    first, second, deep = torch.ones(2, 3), torch.full((4, 3), 2.0), torch.full((2, 3), 5.0)
    other = torch.zeros(4, 3)
    features = MediaFeatures([first, second, first], [[deep, other, deep]], ["video"] * 3, [1, 2])
    joined = _side_by_side(features)
    assert joined.pooled[0] is joined.pooled[2] and joined.pooled[0].tolist() == [[1.0] * 3 + [5.0] * 3] * 2
    assert joined.pooled[1].shape == (4, 6) and joined.deepstack == [] and joined.counts == [1, 2]
    # vLLM reads this tensor, and a copy only in another dtype.
    medium = Medium("video", (1, 2, 4), 0, 2, (joined.pooled[0],), "key")
    assert medium.embeds(torch.float32) is joined.pooled[0]
    layers = Medium("video", (1, 2, 4), 0, 2, (first, deep), "key")
    assert torch.equal(layers.embeds(torch.float32), joined.pooled[0])
