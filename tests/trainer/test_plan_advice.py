"""Test what dry runs say about vLLM and a judge, without loading either."""

from __future__ import annotations

import json

import pytest

from rmsd_fast.settings import load_settings
from rmsd_fast.stages.plan import describe_plan

TEXT = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=65536)
TEXT |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]))
VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
VISION |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)


@pytest.fixture
def shape(tmp_path):
    """Return a folder with a config.json alone."""
    config = dict(model_type="qwen3_vl", tie_word_embeddings=True, text_config=TEXT, vision_config=VISION)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def plan(shape, *overrides, gpu_gib=None):
    stages = ("stages=[distill]", f"model.path={shape}", "data.heldout=")
    return describe_plan(load_settings("rmsd_qwen3vl_4b", [*stages, *overrides]), gpu_gib)


def test_a_smaller_cache_of_vllm_is_advised(shape):
    text, ready = plan(shape, "rollout.engine=vllm", "rollout.vllm_kv_cache_gib=20", gpu_gib=24)
    assert not ready and "DOES NOT FIT" in text
    (line,) = [line for line in text.splitlines() if "set rollout.vllm_kv_cache_gib=10, planned" in line]
    assert float(line.rsplit(" ", 2)[1]) < 24


def test_a_model_that_cannot_be_split_is_named_without_its_weights(shape):
    text, ready = plan(
        shape, "rollout.engine=vllm", "rollout.tensor_parallel=3", "rollout.vllm_kv_cache_gib=1", gpu_gib=80
    )
    assert not ready
    assert "rollout.tensor_parallel: expected a divisor of 4, num_attention_heads in config.json, got 3" in text


def test_the_judge_is_named(shape):
    judge = ("self_teacher.judge.endpoint=http://localhost:8000/v1", "self_teacher.judge.model=m")
    teacher = ("self_teacher.kind=live", "self_teacher.views=[feedback]", "kd.kind=k1")
    text, _ = plan(shape, *judge, *teacher, "distill.batch_size=16", "rollout.n=4")
    assert "judge: m at http://localhost:8000/v1 (not asked yet), up to 64 requests in each step" in text
