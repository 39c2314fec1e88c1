"""Test the memory plan with numbers worked out by hand and against what autograd saves in a real model."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from bench.core.records import REPOSITORY, read_lines
from bench.memory.__main__ import EVALUATIONS
from bench.memory.report import evaluations_table, modes_table, plan_table
from rmsd_fast import train_run
from rmsd_fast.config import RECIPES, ModelConfig, RunConfig, SettingsError
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models import pass_memory
from rmsd_fast.models.families import family_of
from rmsd_fast.models.pass_memory import (
    ACTIVATIONS,
    HEADS,
    PassSettings,
    RowShape,
    _with_layers,
    attention_bytes,
    complete_config,
    count_pass,
    count_prefill,
    count_vision,
)
from rmsd_fast.models.quantize import BYTES_PER_WEIGHT, quantize
from rmsd_fast.models.shared_prefix import enable_shared_prefix
from rmsd_fast.rollout.shared_cache import PrefixCache
from rmsd_fast.runtime.engine_memory import EngineMemory, engine_memory
from rmsd_fast.settings import load_settings
from rmsd_fast.stages import memory, memory_advice
from rmsd_fast.stages import plan as stage_plan
from rmsd_fast.stages.memory import GIB, Parameters, count_parameters, needs, plan_memory
from rmsd_fast.stages.memory.planner import TAIL_TOKENS, StagePlanner
from rmsd_fast.stages.memory_advice import check_memory, fit_lines
from rmsd_fast.train import main
from rmsd_kernels.heads.chunks import workspace_bytes
from rmsd_kernels.shared_prefix.attention import SharedPrefixPlan

STAGES = "stages=[sft,distill]"
TEXT = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
TEXT |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]))
VISION = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)
VISION |= dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
QWEN3_VL = {"model_type": "qwen3_vl", "tie_word_embeddings": True}
CONFIG = complete_config(QWEN3_VL | {"text_config": TEXT, "vision_config": VISION})
# As in the files of the family, the settings of the language model are at the top.
FLAT = TEXT | dict(model_type="qwen2_5_vl", rope_scaling=dict(type="mrope", mrope_section=[4, 2, 2]))
del FLAT["rope_parameters"]
FLAT |= {"vision_config": dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64)}
FLAT["vision_config"] |= dict(fullatt_block_indexes=[1])


def planner(settings: RunConfig, size: Parameters, stage: str) -> StagePlanner:
    return StagePlanner(needs.StageNeeds(settings, CONFIG, size, 2, "cuda", stage))


def test_parameter_count_of_the_4b_student():
    # The shape is that of Qwen3-VL-4B, whose published size is 4.4 billion parameters.
    size = count_parameters(config_4b(), ModelConfig(adapter="lora", lora_rank=4, lora_targets=["q_proj", "down_proj"]))
    assert 4.3e9 < size.total < 4.6e9
    assert 0.3e9 < size.vision < 0.5e9
    assert size.largest == 151936 * 2560 and size.head == 0
    # 36 layers with q and o of 2560 x 4096, k and v of 2560 x 1024, and three of 2560 x 9728.
    assert size.quantizable == 36 * 2560 * (2 * 4096 + 2 * 1024 + 3 * 9728)
    assert size.largest_quantizable == 2560 * 9728
    # 36 layers of 2560 x 4096 and 9728 x 2560.
    assert size.adapter == 36 * 4 * (2560 + 4096 + 9728 + 2560)
    assert size.largest_of_adapter == 4 * 9728
    for target in ("mlp", "w1"):
        with pytest.raises(SettingsError, match=rf"model\.lora_targets: expected linear layers .* got '{target}'"):
            count_parameters(config_4b(), ModelConfig(adapter="lora", lora_targets=[target]))


def config_4b() -> dict:
    text = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)
    text |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
    vision = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560)
    return QWEN3_VL | {"text_config": text, "vision_config": vision | {"deepstack_visual_indexes": [5, 11, 17]}}


def test_the_saved_activations_by_hand():
    """T = 20 + 2 * 8 = 36 tokens in float32: 4 bytes per number."""
    shape = RowShape("shared", (20,), ((8, 8),), (0,))
    cfg = ModelConfig(dtype="float32", gradient_checkpointing=False)
    sizes = {layers: count_pass(_layers(layers), cfg, shape, PassSettings("cpu", "discriminator")) for layers in (5, 6)}
    # A layer keeps per token: before and after scaling in two norms of D=64, and their outputs, 6 * 64; before and
    # after scaling in the norms of 4 + 2 heads of 16, 2 * 96, and the inverse deviations, 2 + 6; rotated q and k and v
    # and the output of attention, 64 + 32 + 32 + 64, and its log-sum-exp, 4; gate, its activation, up and their
    # product, 4 * 96.
    per_token = 6 * 64 + 2 * 96 + 8 + 192 + 4 + 4 * 96
    # The residual before each norm is kept once: it is also what the norm reads.
    assert sizes[6][ACTIVATIONS] - sizes[5][ACTIVATIONS] == 36 * 4 * per_token


def test_checkpointed_layers_keep_their_input():
    # Enough tokens that the peak is not that of the gradient of the embeddings.
    shape = RowShape("shared", (200,), ((80, 80),), (0,))
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        cfg = ModelConfig(dtype=dtype, gradient_checkpointing=True)
        five, six = (
            count_pass(_layers(layers), cfg, shape, PassSettings("cpu", "policy"))[ACTIVATIONS] for layers in (5, 6)
        )
        assert six - five == 360 * 64 * width


def test_the_plan_counts_a_self_teacher():
    taught = ["self_teacher.views=[answer]", "kd.kind=k1", "reward.alpha=0", STAGES, "micro_tokens=40000"]
    plans, size = {}, count_parameters(CONFIG, ModelConfig())
    trained = size.total - size.vision
    for kind in ("frozen", "live", "ema"):
        settings = load_settings("rmsd_qwen3vl_4b", [*taught, f"self_teacher.kind={kind}"])
        plans[kind] = plan_memory(settings, CONFIG, processes=2, device="cuda").stages["distill"].phases
    # Float32 and split over two processes; in the pass, bfloat16 and whole, with the part that was gathered.
    states = {kind: phases["optimizer" if "optimizer" in phases else "policy"] for kind, phases in plans.items()}
    assert states["ema"]["optimizer"] - states["live"]["optimizer"] == 4 * -(-trained // 2)
    teacher = {kind: phases["teacher"] for kind, phases in plans.items()}
    assert teacher["ema"]["weights"] - teacher["live"]["weights"] == 2 * (trained + -(-trained // 2))
    # The frozen teacher reads the rollouts twice, with and without a hint, up to micro_tokens.
    assert teacher["frozen"][ACTIVATIONS] >= teacher["live"][ACTIVATIONS]
    rollout, hint = 1024 + TAIL_TOKENS, 512
    for more, expected in (
        (["self_teacher.kind=live"], [rollout + hint] * 8),
        (["self_teacher.kind=frozen"], [rollout] * 8 + [rollout + hint] * 8),
        (["self_teacher.kind=live", "kd.kind=avsd", "self_teacher.views=[answer,cue]"], [rollout + hint] * 16),
    ):
        settings = load_settings("rmsd_qwen3vl_4b", [*taught, *more])
        assert planner(settings, size, "distill")._hinted() == expected


def test_the_plan_counts_a_divergence(simple_counts, monkeypatch):
    passes = []
    monkeypatch.setattr(needs, "_counted_pass", lambda config, model, shape, how: passes.append(how) or {})
    taught = ["self_teacher.views=[answer]", "reward.alpha=0", STAGES, "micro_tokens=40000", "rollout.n=2"]
    size, width, vocabulary = count_parameters(CONFIG, ModelConfig()), 64, 512
    unrewarded = [f"{name}=0" for name in ("distill.kl_coef", "reward.beta", "reward.eta", "reward.delta")]
    planners = {}
    for kind, distilled, more in (
        ("frozen", "k1", []),
        ("frozen", "forward_kl", []),
        ("ema", "k1", []),
        ("ema", "forward_kl", []),
        ("live", "forward_kl", unrewarded),
    ):
        settings = load_settings(
            "rmsd_qwen3vl_4b", [*taught, f"self_teacher.kind={kind}", f"kd.kind={distilled}", *more]
        )
        planners[kind, distilled] = planner(settings, size, "distill")
    plans = {case: planner.distillation() for case, planner in planners.items()}
    for kind in ("frozen", "ema"):
        plain, whole = plans[kind, "k1"], plans[kind, "forward_kl"]
        # Hidden states of 64 questions per process wait in host memory, in bfloat16.
        assert whole.host - plain.host == 64 * 2 * 1024 * width * 2
        head = vocabulary * width * 2 if kind == "ema" else 0
        for phase in ("teacher", "policy"):
            assert whole.phases[phase]["weights"] - plain.phases[phase]["weights"] == head
    # The policy's passes hold logits of the teacher, its hidden states, and gradients of each loss that has any.
    expected = {("frozen", "k1"): (0, 1), ("frozen", "forward_kl"): (1, 2), ("live", "forward_kl"): (1, 1)}
    for case, counts in expected.items():
        sizes = planners[case].needs.one_pass([1024] * 2, "policy")
        how, scored = passes[-1], planners[case].needs._rows([1024] * 2).scored
        assert (how.reference_heads, how.losses) == counts
        assert sizes.get(HEADS, 0) == counts[0] * scored * width * 2
    # Comparing the most probable tokens adds a pass of the policy, with blocks of float32 logits.
    settings = load_settings(
        "rmsd_qwen3vl_4b", [*taught, "self_teacher.kind=live", "kd.kind=k1", "credit.prune=overlap"]
    )
    pruned = planner(settings, size, "distill").distillation().phases
    assert pruned["student"][HEADS] == 256 << 20 == pruned["teacher"][HEADS]
    shape = RowShape("shared", (20,), ((8, 8),), (0,))
    found = []
    for how in (PassSettings("cpu", "policy"), PassSettings("cpu", "policy", reference_heads=1, losses=2)):
        phases = pass_memory._count_with(_layers(2), ModelConfig(dtype="bfloat16"), shape, how)
        found.append(phases["heads"][HEADS])
    # 16 rows of logits of the teacher, gradients of 16 hidden states and the head, and the value of the second loss.
    assert found[1] - found[0] == 16 * vocabulary * 2 + (16 + vocabulary) * width * 2 + 2


def test_the_plan_counts_a_teacher_of_its_own_and_other_media(tmp_path):
    taught = ["kd.kind=k1", "reward.alpha=0", STAGES, "micro_tokens=40000"]
    larger = config_4b()
    larger["text_config"] |= dict(vocab_size=512, hidden_size=128, num_hidden_layers=2)
    larger["vision_config"] |= dict(depth=2, hidden_size=64, out_hidden_size=128, deepstack_visual_indexes=[0, 1])
    (tmp_path / "config.json").write_text(json.dumps(larger))
    size = count_parameters(larger, ModelConfig())

    def phases(*overrides, zero=2):
        settings = load_settings("rmsd_qwen3vl_4b", [*taught, *overrides, f"runtime.zero_stage={zero}"])
        return plan_memory(settings, CONFIG, processes=2, device="cuda").stages["distill"].phases

    live = phases("self_teacher.kind=live", "self_teacher.views=[answer]")
    for zero in (2, 3):
        plain = phases("self_teacher.kind=live", "self_teacher.views=[answer]", zero=zero)
        other = phases("self_teacher.kind=path", f"self_teacher.path={tmp_path}", zero=zero)
        # Its weights are in bfloat16, whole, and there in all phases.
        for name in ("policy", "rollout", "teacher"):
            assert other[name]["weights"] - plain[name]["weights"] == 2 * size.total
    # A token has the features of three layers of 128 numbers, and the student's of two layers of 64 are kept.
    features = {name: phase.get("vision", 0) for name, phase in other.items()}
    tokens, rest = divmod(features["teacher"] - plain["teacher"]["vision"], 2 * 3 * 128)
    assert tokens > 1000 and rest == 0
    assert "teacher vision" in other and "teacher vision" not in live
    # With other media, frames and features of a step exist twice.
    shown = phases("self_teacher.kind=live", "self_teacher.views=[answer,media]")
    assert shown["teacher"]["vision"] == 2 * live["teacher"]["vision"]
    cache = 1024 * 2**20
    assert shown["policy"]["media"] - cache == 2 * (live["policy"]["media"] - cache)


def test_the_plan_counts_imitated_responses():
    plans, size = {}, count_parameters(CONFIG, ModelConfig())
    # Each process has one question.
    common = ["reward.alpha=0", STAGES, "micro_tokens=40000", "distill.batch_size=2"]
    for selection in ("", "quality", "aligned"):
        named = [f"teacher.selection={selection}", "distill.sft_coef=0.05"] if selection else []
        settings = load_settings("rmsd_qwen3vl_4b", [*common, *named])
        plans[selection] = planner(settings, size, "distill").distillation().phases
    plain, imitates, aligned = plans.values()
    # A response of 1,024 tokens, with the hidden states of all responses once more and a second gradient of the head.
    scored = 8 * 1024 + 1024
    assert imitates["policy"][HEADS] - plain["policy"][HEADS] >= 2 * 64 * (512 + scored)
    for phase in ("policy", "reference"):
        assert imitates[phase][ACTIVATIONS] > plain[phase][ACTIVATIONS]
    assert "selection" not in imitates
    # Four answers are read without a gradient, of 9 responses that the reference reads.
    assert 0 < aligned["selection"][ACTIVATIONS] < imitates["reference"][ACTIVATIONS]
    settings = load_settings("rmsd_qwen3vl_4b", ["stages=[sft]", "teacher.selection=aligned"])
    assert "selection" in planner(settings, size, "sft").imitation().phases


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_count_equals_what_autograd_saves(dtype, adapter):
    from rmsd_fast.models.adapters import POLICY, add_adapter
    from rmsd_fast.models.students import DTYPES, freeze

    saved = {}
    for layers in (2, 3):
        config = Qwen3VLConfig(**_layers(layers))
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
        cfg = ModelConfig(dtype=dtype, adapter=adapter, lora_rank=4, gradient_checkpointing=False)
        enable_shared_prefix(model)
        if adapter == "lora":
            add_adapter(model, POLICY, cfg, seed=0)
        freeze(model, train_vision=False)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {}

        def keep(tensor, known=known, storages=storages):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                # Holding the tensor keeps its address from being used again.
                storages[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.model.language_model(
                inputs_embeds=torch.randn(1, 36, 64, dtype=DTYPES[dtype]),
                position_ids=torch.arange(36).expand(3, 1, 36),
                shared_prefix=SharedPrefixPlan.from_lengths([20], [[8, 8]]),
                use_cache=False,
            ).last_hidden_state
        saved[layers] = sum(size for size, _ in storages.values())
        del hidden
    counted = [
        count_pass(_layers(n), cfg, RowShape("shared", (20,), ((8, 8),), (0,)), PassSettings("cpu", "discriminator"))
        for n in (5, 6)
    ]
    assert counted[1][ACTIVATIONS] - counted[0][ACTIVATIONS] == saved[3] - saved[2]


@pytest.mark.parametrize("trains", ["policy", "discriminator", ""])
@pytest.mark.parametrize("train_vision", [False, True])
def test_a_deep_model_is_continued_exactly(trains, train_vision):
    shape = RowShape("shared", (200,), ((80, 80),), (9,))
    for checkpointing in (True, False):
        cfg = ModelConfig(dtype="float32", gradient_checkpointing=checkpointing)
        settings = PassSettings("cpu", trains, train_vision=train_vision and bool(trains))
        whole = pass_memory._count_with(_layers(7), cfg, shape, settings)
        highest = max(sum(sizes.values()) for sizes in whole.values())
        assert sum(count_pass(_layers(7), cfg, shape, settings).values()) == highest


def test_prefill_keeps_keys_and_values():
    shape = RowShape("shared", (20, 12), ((), ()), (0, 0))
    cfg = ModelConfig(dtype="bfloat16")
    sizes = [sum(count_prefill(_layers(n), cfg, shape, "cpu", PrefixCache).values()) for n in (5, 6)]
    # K and V of 32 tokens with 2 heads of 16 in 2 bytes.
    assert sizes[1] - sizes[0] == 2 * 32 * 2 * 16 * 2


def test_workspace_of_the_heads_by_hand():
    weight = torch.empty(151936, 2560, dtype=torch.bfloat16, device="meta")
    row = 151936 * 2
    # Without d_weight: as many whole tiles of 128 rows as 512 MiB hold, 1664 of at most 1766.
    assert workspace_bytes(4096, weight, device="cuda", need_weight=False) == 1664 * row
    # With a reference's logits, two heads of 512 MiB each.
    assert workspace_bytes(4096, weight, device="cuda", need_weight=False, buffers=2) == 2 * 1664 * row
    # A trained head needs chunks for at most 5 sums: 820 rows of 4096, so the default is larger.
    assert workspace_bytes(4096, weight, device="cuda", need_weight=True) == 1664 * row
    # 16384 rows: 3277 per sum, 26 tiles.
    assert workspace_bytes(16384, weight, device="cuda", need_weight=True) == 3328 * row
    # On CPU the default is 256 MiB, in chunks of equal size: 4096 rows in 5 chunks of 832, the tiles of 32.
    assert workspace_bytes(4096, weight, device="cpu", need_weight=False) == 832 * row
    assert workspace_bytes(100, weight, device="cpu", need_weight=False) == 100 * row


def test_buffers_of_attention_by_hand():
    shape = RowShape("shared", (20,), ((8, 8),), (0,))
    q, k = torch.empty(36, 4, 16), torch.empty(36, 2, 16)
    # float32: the largest call is the prefix, 20 * 64 * 4, and the responses over it have 16 rows.
    assert attention_bytes("cpu", shape, q, k, backward=False) == 20 * 64 * 4
    # dq of 20 tokens, and dk and dv.
    assert attention_bytes("cpu", shape, q, k, backward=True) == 20 * (64 + 2 * 32) * 4
    q, k = q.bfloat16(), k.bfloat16()
    # dq in float32, and dk and dv of each of 4 heads in bfloat16, of all 36 tokens.
    assert attention_bytes("cuda", shape, q, k, backward=True) == 36 * (4 * 64 + 2 * 2 * 64)
    assert attention_bytes("cuda", shape, q, k, backward=False) == 16 * 64 * 2
    # A single response is part of its prompt's segment.
    alone = RowShape("shared", (20,), ((8,),), (0,))
    assert attention_bytes("cuda", alone, q[:28], k[:28], backward=False) == 0


def test_padded_rows_repeat_keys_and_hold_a_mask():
    cfg = ModelConfig(dtype="float32", gradient_checkpointing=False)
    shape = RowShape("padded", (20,), ((8, 8),), (0,))
    assert shape.rows == (2, 28)
    five, six = (count_pass(_layers(n), cfg, shape, PassSettings("cpu", "discriminator"))[ACTIVATIONS] for n in (5, 6))
    # As for packed rows, but with k and v of all 4 heads, and the layer's own mask of numbers, 28 per token.
    per_token = 6 * 64 + 2 * 96 + 8 + 4 * 64 + 4 + 4 * 96 + 28
    assert six - five == 2 * 28 * 4 * per_token
    # Flash attention takes neither a mask nor copies of the two heads of k and v.
    flash = PassSettings("cpu", "discriminator", masked=False)
    five, six = (count_pass(_layers(n), cfg, shape, flash)[ACTIVATIONS] for n in (5, 6))
    assert six - five == 2 * 28 * 4 * (per_token - 28 - 2 * 2 * 16)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # N = 100 parameters, the largest of 40, 2 processes: 50 on each.
        ({}, EngineMemory(optimizer=600, gradients=200, bucket=200, reduction=200 + 160)),
        ({"device": "cpu"}, EngineMemory(optimizer=600, gradients=200, bucket=200, reduction=200 + 160, step=400)),
        ({"dtype": "float32"}, EngineMemory(optimizer=600, gradients=200, bucket=400, reduction=600, step=200)),
        (
            {"dtype": "float32", "processes": 1},
            EngineMemory(optimizer=1200, gradients=400, bucket=400, reduction=400, step=400),
        ),
        ({"zero_stage": 0}, EngineMemory(optimizer=1200, gradients=200, reduction=200, step=400)),
        (
            {"zero_stage": 0, "dtype": "float32", "device": "cpu"},
            EngineMemory(optimizer=800, gradients=400, reduction=400, step=320),
        ),
        ({"zero_stage": 1}, EngineMemory(optimizer=600, lasting=400, gradients=200, reduction=600)),
        # 2 bytes per moment pair and a block of 256: two scales. On CPU five temporaries of 4 bytes.
        (
            {"optimizer": "adamw_8bit"},
            EngineMemory(optimizer=(4 + 2) * 50 + 8, gradients=200, bucket=200, reduction=360),
        ),
        (
            {"optimizer": "adamw_8bit", "device": "cpu"},
            EngineMemory(optimizer=(4 + 2) * 50 + 8, gradients=200, bucket=200, reduction=360, step=20 * 50),
        ),
        (
            {"optimizer": "adamw_8bit", "zero_stage": 0, "dtype": "float32", "device": "cpu"},
            EngineMemory(optimizer=2 * 100 + 8, gradients=400, reduction=400, step=20 * 40),
        ),
        (
            {"offload": True},
            EngineMemory(gradients=200, bucket=200 + 80, reduction=360, host=(12 + 4 + 2) * 50),
        ),
        (
            {"offload": True, "dtype": "float32"},
            EngineMemory(bucket=400 + 160, reduction=600, host=(12 + 4 + 4 + 4) * 50),
        ),
    ],
)
def test_engines_by_hand(overrides, expected):
    settings = {"zero_stage": 2, "dtype": "bfloat16", "offload": False, "processes": 2, "device": "cuda"}
    assert engine_memory(100, 40, **settings | overrides) == expected


def parameters(**sizes: int) -> Parameters:
    return Parameters(**dict.fromkeys(Parameters._fields, 0) | sizes)


def test_the_states_of_a_stage_by_hand(monkeypatch):
    """Bytes in bfloat16: 2 per weight of a copy, and per trained parameter 4 of gradient and 12 of optimizer."""
    size = parameters(total=10 * GIB, vision=GIB, adapter=GIB // 4, largest=GIB, largest_of_adapter=2**20)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    for name in ("_counted_pass", "_counted_prefill", "_counted_vision"):
        monkeypatch.setattr(needs, name, lambda *_: {"vision": 0})
    config = config_4b()
    adapters = ["model.adapter=lora"]
    for overrides, processes, gib in (
        # Policy, discriminator and reference; 9 Gi parameters of each of the first two are trained.
        ([], 1, 3 * 20 + 2 * 9 * 16),
        ([], 2, 3 * 20 + 2 * 9 * 16 / 2),
        (["distill.kl_coef=0"], 1, 2 * 20 + 2 * 9 * 16),
        # The head reads the reference, or a copy without a reference.
        (["discriminator.mode=head"], 1, 2 * 20 + 9 * 16),
        (["discriminator.mode=head", "distill.kl_coef=0"], 1, 2 * 20 + 9 * 16),
        # Adapters of a quarter Gi parameters. The reference is the policy's backbone.
        ([*adapters], 1, 2 * 20 + 2 * 0.25 * 18),
        ([*adapters, "discriminator.mode=shared"], 1, 20 + 2 * 0.25 * 18),
        ([*adapters, "discriminator.mode=head"], 1, 20 + 0.25 * 18),
    ):
        settings = load_settings("rmsd_qwen3vl_4b", overrides)
        plan = plan_memory(settings, config, processes=processes, device="cuda")
        parts = plan.stages["distill"].phases["policy"]
        states = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
        # The scalar head has 2,561 parameters.
        assert states / GIB == pytest.approx(gib, abs=1e-3), (overrides, parts)


def test_8_bit_moments_are_those_of_bitsandbytes():
    optim = pytest.importorskip("bitsandbytes.optim")
    weight = torch.nn.Parameter(torch.zeros(100_000))
    optimizer = optim.AdamW8bit([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    held = sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2"))
    sizes = {"zero_stage": 0, "dtype": "float32", "offload": False, "processes": 1, "device": "cuda"}
    # 391 blocks of 256.
    assert held == 2 * 100_000 + 2 * 4 * 391
    assert engine_memory(100_000, 100_000, optimizer="adamw_8bit", **sizes).optimizer == held


def test_quantized_weights_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.language_model = torch.nn.Sequential(torch.nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16))
    quantize(model, torch.device("cpu"))
    weight = model.model.language_model[0].weight
    state = weight.quant_state
    held = weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    # 8,192 blocks of 64, in 32 blocks of 256.
    assert held == 512 * 1024 // 2 + 8192 + 4 * 32 == BYTES_PER_WEIGHT * 512 * 1024


def test_quantized_backbones_by_hand(monkeypatch):
    """8 of 10 Gi weights are quantized: 16 GiB in bfloat16, and 8 * (4 / 8 + 1 / 64 + 4 / 16384) in nf4."""
    size = parameters(total=10 * GIB, adapter=GIB // 4, quantizable=8 * GIB, largest_quantizable=GIB // 8)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    for name in ("_counted_pass", "_counted_prefill", "_counted_vision"):
        monkeypatch.setattr(needs, name, lambda *_: {"vision": 0})
    backbone = 20 - 16 + 8 * 0.515869140625
    adapter = 0.5
    for stages, mode, stage, gib in (
        ("[sft,distill]", "shared", "sft", backbone + adapter),
        # Policy, discriminator, and the frozen adapter of stage 1.
        ("[sft,distill]", "shared", "distill", backbone + 3 * adapter),
        ("[distill]", "shared", "distill", backbone + 2 * adapter),
        ("[sft,distill]", "separate", "distill", 2 * (backbone + 2 * adapter)),
        ("[sft,distill]", "head", "distill", backbone + 2 * adapter),
    ):
        changes = ["model.quantize=nf4", f"stages={stages}", f"discriminator.mode={mode}"]
        settings = load_settings("rmsd_qwen3vl_4b_lora", changes)
        phases = plan_memory(settings, config_4b(), processes=1, device="cuda").stages[stage].phases
        assert phases["policy"]["weights"] / GIB == pytest.approx(gib, abs=1e-4), (stages, mode, stage)


def test_a_quantized_layer_holds_its_whole_weight_in_a_pass():
    layer = torch.nn.Linear(64, 96, bias=False)
    inputs, grad = torch.empty(10, 64, requires_grad=True), torch.empty(10, 96)
    live = pass_memory.LiveBytes([layer.weight, inputs, grad], "cpu", RowShape("shared", (10,), ((),), (0,)))
    with live:
        output = pass_memory._multiply_as_nf4(layer, inputs)
        assert live.peaks["forward"] == {ACTIVATIONS: 4 * (96 * 64 + 10 * 96)}
        # Nothing but the output is kept.
        assert live.live == {ACTIVATIONS: 4 * 10 * 96}
        live.phase = "backward"
        output.backward(grad)
    assert live.peaks["backward"] == {ACTIVATIONS: 4 * (10 * 96 + 96 * 64 + 10 * 64)}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantizing_adds_no_activations_that_grow_with_depth(checkpointing):
    shape = RowShape("shared", (200,), ((80, 80),), (0,))
    growth = []
    for quantized in ("none", "nf4"):
        cfg = ModelConfig(adapter="lora", lora_rank=4, gradient_checkpointing=checkpointing, quantize=quantized)
        sizes = [count_pass(_layers(n), cfg, shape, PassSettings("cpu", "policy"))[ACTIVATIONS] for n in (5, 6)]
        growth.append(sizes[1] - sizes[0])
    assert growth[0] == growth[1] > 0


def test_the_other_family_is_planned(monkeypatch):
    config = complete_config(FLAT)
    assert complete_config(config) == config and config["text_config"]["hidden_size"] == 64
    cfg = ModelConfig(dtype="bfloat16")
    shape = RowShape("shared", (20, 12), ((), ()), (0, 0))
    sizes = [sum(count_prefill(_with_layers(config, n), cfg, shape, "cpu", PrefixCache).values()) for n in (5, 6)]
    # K and V of 32 tokens with 2 heads of 16 in 2 bytes.
    assert sizes[1] - sizes[0] == 2 * 32 * 2 * 16 * 2
    # 12 frames of 4 x 28 x 28 pixels in pairs are 24 tokens of 64 numbers. No layers have features of their own.
    changes = ["video.num_frames=12", "video.max_frame_pixels=3136", "sft.batch_size=1"]
    settings = load_settings("rmsd_qwen25vl_7b_lora", changes)
    monkeypatch.setattr(needs, "_counted_vision", lambda *_: {"vision": 0})
    plan = plan_memory(settings, FLAT, processes=1, device="cuda")
    assert plan.stages["distill"].phases["policy"]["vision"] == 32 * 24 * 64 * 2
    # Decoded frames have 3 bytes per pixel, in this step and in those ahead.
    assert settings.data.decode_ahead == 1
    frames = 2 * 32 * 12 * 3136 * 3 + settings.data.cache_mib * 2**20
    assert plan.stages["distill"].phases["policy"]["media"] == frames


def test_the_tower_with_windows_takes_what_the_model_takes():
    from rmsd_fast.models.students import DTYPES
    from rmsd_fast.models.vision_attention import FRAMES

    config = complete_config(FLAT)
    cfg = ModelConfig(dtype="float32")
    # 3 steps of 32 tokens: 8 x 16 patches, with two windows of 8 x 8 patches.
    planned = count_vision(config, cfg, RowShape("shared", (1,), ((),), (96,), 3), "cpu")["vision"]
    family = family_of(config)
    model = family.model_class._from_config(
        family.config_class(**config), dtype=DTYPES[cfg.dtype], attn_implementation="sdpa"
    )
    model.set_attn_implementation({"vision_config": FRAMES})
    patches, grid = torch.zeros(384, 3 * 2 * 14 * 14), torch.tensor([[3, 8, 16]])
    inputs = family.tower_inputs(model.config.vision_config, grid)
    known = [*model.parameters(), *model.buffers(), *(value for value in inputs.values() if torch.is_tensor(value))]
    live = pass_memory.LiveBytes(known, "cpu", RowShape("shared", (1,), ((),), (96,)))
    with torch.no_grad(), live:
        model.model.visual(patches, grid_thw=grid, **inputs)
    assert live.peaks["forward"] == {ACTIVATIONS: planned}


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("config", [CONFIG, FLAT], ids=["qwen3_vl", "qwen2_5_vl"])
def test_a_trained_tower_is_continued_exactly(config, packing):
    config = complete_config(config)
    shape = RowShape(packing, (200,), ((80, 80),), (9,))
    cfg, settings = ModelConfig(dtype="float32"), PassSettings("cpu", "policy", train_vision=True)
    whole = pass_memory._count_with(_with_layers(config, 6), cfg, shape, settings)
    highest = max(sum(sizes.values()) for sizes in whole.values())
    assert sum(count_pass(_with_layers(config, 6), cfg, shape, settings).values()) == highest


def test_dry_run_of_the_other_family(tmp_path, capsys):
    build_tiny_student(tmp_path / "student", texts=["a"], layers=2, family="qwen2_5_vl")
    command = ["rmsd_qwen25vl_7b_lora", f"model.path={tmp_path / 'student'}", "--dry-run", "--gpu-gib", "80"]
    # Questions and teacher answers are missing.
    assert main(command) == 2
    told = capsys.readouterr().out
    assert "fits in 80.0 GiB" in told and re.search(r"vision +\d", told) and "not ready: provide" in told


def test_graphs_of_decoding_steps_hold_logits_of_their_own(simple_counts):
    """4 prompts of 8 rows, in the vocabulary of Qwen3-VL: 26 bytes per logit."""

    def rollout_bytes(device: str, *overrides: str) -> int:
        settings = load_settings("rmsd_qwen3vl_4b_lora_24gb", ["rollout.max_new_tokens=1024", *overrides])
        stages = plan_memory(settings, config_4b(), processes=1, device=device).stages
        return stages["distill"].phases["rollout"]["rollout"]

    logits = 32 * 151936 * 26
    assert rollout_bytes("cuda") - rollout_bytes("cuda", "rollout.cuda_graphs=false") == logits
    assert rollout_bytes("cpu") == rollout_bytes("cpu", "rollout.cuda_graphs=false")


def test_quantizing_is_named_if_it_makes_a_run_fit(simple_counts):
    settings = load_settings("rmsd_qwen3vl_4b_lora")
    plan = plan_memory(settings, config_4b(), processes=1, device="cuda")
    found = fit_lines(settings, config_4b(), plan, plan.total - 4 * GIB, 1)
    changed = load_settings("rmsd_qwen3vl_4b_lora", ["model.quantize=nf4"])
    total = plan_memory(changed, config_4b(), processes=1, device="cuda").total
    assert f"set model.quantize=nf4, planned {total / GIB:.1f} GiB" in found
    # Full training cannot be quantized.
    full = load_settings("rmsd_qwen3vl_4b")
    plan = plan_memory(full, config_4b(), processes=1, device="cuda")
    found = fit_lines(full, config_4b(), plan, plan.total - GIB, 1)
    assert any("adamw_8bit" in line for line in found) and not any("nf4" in line for line in found)


def _layers(number: int) -> dict:
    return _with_layers(CONFIG, number)


def config_8b() -> dict:
    text = dict(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36)
    text |= dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096)
    vision |= {"deepstack_visual_indexes": [8, 16, 24]}
    return QWEN3_VL | {"text_config": text, "vision_config": vision, "tie_word_embeddings": False}


# Sizes of Qwen/Qwen2.5-VL-7B-Instruct, in the form of its config.json.
CONFIG_7B = dict(model_type="qwen2_5_vl", vocab_size=152064, hidden_size=3584, intermediate_size=18944)
CONFIG_7B |= dict(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False)
CONFIG_7B |= dict(rope_theta=1000000.0, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]})
CONFIG_7B |= dict(vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, in_chans=3))


@pytest.mark.parametrize(
    ("recipe", "config", "processes", "gpu_gb"),
    [
        ("rmsd_qwen3vl_4b", config_4b(), 8, 80),
        ("rmsd_qwen3vl_4b_lora", config_4b(), 1, 80),
        ("rmsd_qwen3vl_4b_lora_24gb", config_4b(), 1, 24),
        ("rmsd_qwen3vl_8b_lora_80gb", config_8b(), 1, 80),
        ("rmsd_qwen25vl_7b_lora", CONFIG_7B, 1, 80),
    ],
)
def test_the_head_of_a_recipe_tells_its_plan(recipe, config, processes, gpu_gb):
    settings = load_settings(recipe)
    plan = plan_memory(settings, config, processes=processes, device="cuda")
    told = re.search(r"Memory plan, per GPU: ([\d.]+) GiB", (RECIPES / f"{recipe}.yaml").read_text())
    assert told and told[1] == f"{plan.total / GIB:.1f}"
    assert plan.total < 0.9 * gpu_gb * 1e9
    if recipe.endswith("24gb"):
        # The goal: 2k prompts, 512 response tokens, N=8, recomputed layers.
        assert (settings.data.max_prompt_tokens, settings.rollout.max_new_tokens, settings.rollout.n) == (2048, 512, 8)
        assert settings.model.gradient_checkpointing and plan.total < 22e9


@pytest.fixture
def simple_counts(monkeypatch):
    """Replace the counted passes: 1 MiB per token, or 10 MiB without recomputation; 1 GiB per prompt of a prefill."""

    def count(config, model, shape, how):
        checkpointing = json.loads(model)["gradient_checkpointing"]
        return {"activations": shape.rows[0] * shape.rows[1] * (1 if checkpointing else 10) * 2**20}

    monkeypatch.setattr(needs, "_counted_pass", count)
    monkeypatch.setattr(needs, "_counted_prefill", lambda config, model, shape, _: {"a": len(shape.prefixes) * GIB})
    monkeypatch.setattr(needs, "_counted_vision", lambda *_: {"vision": 0})


def test_settings_that_make_it_fit(simple_counts):
    overrides = ["model.gradient_checkpointing=false", "data.max_prompt_tokens=512", "micro_tokens=4096"]
    overrides += ["rollout.prompts_per_batch=2", "made.train_clips=8"]
    settings = load_settings("quickstart", overrides)
    plan = plan_memory(settings, CONFIG, processes=1, device="cuda")
    # 4096 tokens of 10 MiB.
    assert plan.stages["distill"].parts["activations"] == 40 * GIB
    assert fit_lines(settings, CONFIG, plan, 2 * plan.total, 1) == []
    (close,) = fit_lines(settings, CONFIG, plan, plan.total, 1)
    assert "less than a tenth is left" in close
    # Either of the two is enough: 4 GiB with recomputation, or 20 GiB with half of the tokens.
    first, *found = fit_lines(settings, CONFIG, plan, 24 * GIB, 1)
    assert first.startswith("memory: expected at most 24.0 GiB per process, got a plan of ")
    for change in ("model.gradient_checkpointing=true", "micro_tokens=2048"):
        told = next(line for line in found if line.startswith(f"set {change}, planned "))
        changed = plan_memory(load_settings("quickstart", [*overrides, change]), CONFIG, processes=1, device="cuda")
        assert told.endswith(f"{changed.total / GIB:.1f} GiB") and changed.total <= 24 * GIB
    assert not any("prompts_per_batch" in line or "zero_stage=1" in line for line in found)
    # No single change is enough; the smallest micro_tokens is the longest prompt with a teacher answer of 1,024 tokens.
    _, both = fit_lines(settings, CONFIG, plan, 4 * GIB, 1)
    assert "model.gradient_checkpointing=true" in both and "micro_tokens=" in both
    *_, none = fit_lines(settings, CONFIG, plan, GIB // 2, 1)
    assert "use a smaller model, a larger GPU, or more GPUs" in none


def test_a_run_is_refused_before_its_models_are_loaded(simple_counts, monkeypatch, caplog):
    settings = load_settings("quickstart", ["model.gradient_checkpointing=false"])
    given = {"processes": 1, "device": torch.device("cuda")}
    monkeypatch.setattr(memory_advice, "device_room", lambda _: (24 * GIB, "23.5 GiB of the GPU's 80.0 GiB are free"))
    with pytest.raises(SettingsError, match=r"memory: expected at most 24\.0 GiB .*model\.gradient_checkpointing=true"):
        check_memory(settings, CONFIG, **given)
    with pytest.raises(SettingsError, match=r"\(23\.5 GiB of the GPU's 80\.0 GiB are free\); set .*check_memory=false"):
        check_memory(settings, CONFIG, **given)
    assert "exceeds 24.0 GiB; looking for settings that fit" in caplog.text
    monkeypatch.setattr(memory_advice, "device_room", lambda _: (1000 * GIB, ""))
    (line,) = check_memory(settings, CONFIG, **given)
    assert line.startswith("memory planned per process: ")
    # A CPU's memory is not checked.
    monkeypatch.setattr(memory_advice, "device_room", lambda _: (0, ""))
    assert len(check_memory(settings, CONFIG, processes=1, device=torch.device("cpu"))) == 1


def test_dry_run_for_a_gpu_that_is_not_here(simple_counts, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(stage_plan, "_model", lambda *_: (tmp_path, f"model.path: {tmp_path}", ""))
    settings = load_settings("quickstart")
    text, ready = stage_plan.describe_plan(settings, 1000)
    assert ready and "fits in 1000.0 GiB" in text and re.search(r"\n    total +\d", text)
    text, ready = stage_plan.describe_plan(settings, 8)
    assert not ready
    assert "DOES NOT FIT: memory: expected at most 8.0 GiB" in text
    assert text.endswith("not ready: change the settings above so that the run fits")


def test_dry_run_with_only_config_json(simple_counts, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    settings = load_settings("quickstart", [f"model.path={tmp_path}"])
    text, ready = stage_plan.describe_plan(settings, 1000)
    assert not ready and f"MISSING: {tmp_path}" in text
    assert "fits in 1000.0 GiB" in text and re.search(r"\n    total +\d", text)
    assert "DOES NOT FIT" in stage_plan.describe_plan(settings, 8)[0]
    # A config that cannot be read is listed, and is no crash.
    (tmp_path / "config.json").write_text("{")
    text, ready = stage_plan.describe_plan(settings, 8)
    assert not ready and "MISSING" in text and "memory: could not be planned (JSONDecodeError: " in text


def test_a_fault_of_the_plan_does_not_end_a_run(monkeypatch, tmp_path, caplog):
    build_tiny_student(tmp_path / "student", texts=["a"], layers=2)
    settings = load_settings("quickstart", [f"model.path={tmp_path / 'student'}"])

    def fail(*_, **__):
        raise ZeroDivisionError("no layers")

    monkeypatch.setattr(memory, "count_parameters", fail)
    text, ready = stage_plan.describe_plan(settings, 8)
    assert ready and "memory: could not be planned (ZeroDivisionError: no layers)" in text
    world = SimpleNamespace(size=1, device=torch.device("cuda"))
    assert train_run._plan_memory(settings, settings.model.path, world) == []
    assert "memory: not planned (ZeroDivisionError: no layers)" in caplog.text
    caplog.clear()
    settings.runtime.check_memory = False
    assert train_run._plan_memory(settings, "no/folder", world) == [] and not caplog.text
    settings.runtime.check_memory = True
    settings.model.adapter, settings.model.lora_targets = "lora", ["w1"]
    monkeypatch.undo()
    with pytest.raises(SettingsError, match=r"model\.lora_targets"):
        train_run._plan_memory(settings, settings.model.path, world)


def test_only_the_first_process_plans(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stage_plan, "describe_plan", lambda *_: pytest.fail("planned"))
    assert main(["quickstart", "--dry-run"]) == 0 and not capsys.readouterr().out


def test_dry_run_without_the_model_says_so():
    text, _ = stage_plan.describe_plan(load_settings("rmsd_qwen3vl_4b"), 80)
    assert "memory: cannot be planned before Qwen/Qwen3-VL-4B-Instruct is downloaded" in text
    assert "MISSING: --gpu-gib: " in text
    text, ready = stage_plan.describe_plan(load_settings("quickstart"), 80)
    assert not ready and "MISSING: --gpu-gib: " in text
    assert stage_plan.describe_plan(load_settings("quickstart"))[1]


@pytest.mark.parametrize("size", ["0", "-1", "nan", "large"])
def test_a_wrong_size_of_the_gpu(size, capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--dry-run", f"--gpu-gib={size}"])
    assert f"--gpu-gib: expected a size in GiB above 0, got '{size}'" in capsys.readouterr().err


def test_gpu_gib_needs_a_dry_run(capsys):
    assert main(["quickstart", "--gpu-gib", "24"]) == 2
    assert "--gpu-gib: expected --dry-run" in capsys.readouterr().err


def test_the_manual_shows_the_records():
    text = (REPOSITORY / "docs" / "memory.md").read_text()
    for table in (plan_table(), evaluations_table(), modes_table()):
        assert "\n".join(table) in text
    results = REPOSITORY / "bench" / "results"
    evaluations, steps = (read_lines(results / f"{name}.jsonl") for name in ("evaluation_memory", "memory"))
    records = steps + evaluations
    assert len(steps) >= 8 and {record["case"] for record in evaluations} == {case.name for case in EVALUATIONS}
    assert all(abs(record["planned"] / record["peak"] - 1) < 0.15 for record in records)


def test_zero_3_gathers_all_weights_for_rollouts(simple_counts, monkeypatch):
    size = parameters(total=10**10, largest=10**8)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    settings = load_settings("rmsd_qwen3vl_4b", ["runtime.zero_stage=3", "distill.kl_coef=0", "reward.alpha=0", STAGES])
    phases = plan_memory(settings, config_4b(), processes=4, device="cuda").stages["distill"].phases
    # A quarter of the weights, and 10**9 gathered elements in passes, in 2 bytes.
    assert phases["policy"]["weights"] == 2 * (10**10 // 4 + 10**9)
    assert phases["rollout"]["weights"] == 2 * (10**10 // 4 + 10**10)


def test_vllm_holds_its_weights_and_cache_during_rollouts(simple_counts, monkeypatch):
    size = parameters(total=10**10, largest=10**8)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    engine = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=3", "rollout.prompts_per_batch=4", "rollout.n=2"]
    settings = load_settings(
        "rmsd_qwen3vl_4b", [*engine, "runtime.zero_stage=3", "data.max_prompt_tokens=15000", STAGES]
    )
    config = config_4b()
    text = config["text_config"]
    hidden, mlp, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    tokens = 15000 + settings.rollout.max_new_tokens
    # Weights, buffers of three deepstack layers, cache; then the larger of one layer's tensors and logits.
    state = 2 * (10**10 + 3 * tokens * hidden) + 3 * memory.GIB
    largest = max(2 * tokens * (3 * mlp + 6 * hidden), 8 * vocabulary * 18)
    plan = plan_memory(settings, config, processes=4, device="cuda").stages["distill"]
    assert plan.phases["rollout"]["rollout"] == state + largest
    assert "rollout" not in plan.phases["policy"]
    # Under ZeRO-3, nothing is gathered for the rollouts, and vLLM's weights sleep in host memory.
    assert plan.phases["rollout"]["weights"] == plan.phases["policy"]["weights"]
    hf = load_settings("rmsd_qwen3vl_4b", ["runtime.zero_stage=3", "data.max_prompt_tokens=15000", STAGES])
    assert plan.host == plan_memory(hf, config, processes=4, device="cuda").stages["distill"].host + 2 * 10**10
    on_cpu = plan_memory(settings, config, processes=4, device="cpu").stages["distill"]
    assert on_cpu.phases["policy"]["rollout"] == state
    assert on_cpu.phases["rollout"]["rollout"] == state + largest


def test_processes_hold_a_part_of_vllms_weights(simple_counts, monkeypatch):
    """16 processes on a model with 8 heads of keys and values of 128 elements, so that each has one of them."""
    size = parameters(total=10**10, largest=10**8)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    engine = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=3", "rollout.prompts_per_batch=4", "rollout.n=2"]
    common = ["data.max_prompt_tokens=15000", "distill.batch_size=64", "sft.batch_size=64", STAGES]
    config = config_4b()
    text = config["text_config"]
    hidden, mlp, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    assert (text["num_key_value_heads"], text["head_dim"]) == (8, 128)

    def plan(*more):
        settings = load_settings("rmsd_qwen3vl_4b", [*engine, *common, *more])
        return settings, plan_memory(settings, config, processes=16, device="cuda").stages["distill"]

    settings, whole = plan()
    _, parts = plan("rollout.tensor_parallel=16")
    # In each layer, the group has 8 further heads of keys and of values.
    weights = 2 * (10**10 + text["num_hidden_layers"] * 8 * 2 * 128 * hidden) // 16
    tokens = 15000 + settings.rollout.max_new_tokens
    state = weights + 2 * 3 * tokens * hidden + 3 * memory.GIB
    # The logits are those of the responses to 4 questions of each process.
    largest = max(2 * tokens * (3 * mlp // 16 + 6 * hidden), 16 * 8 * vocabulary * 18)
    assert parts.phases["rollout"]["rollout"] == state + largest
    assert whole.host - parts.host == 2 * 10**10 - weights
    # The features of 4 questions, and of those of the whole group.
    of_question = settings.video.max_video_pixels // (32 * 32 * 2) * 4 * hidden * 2
    assert whole.phases["rollout"]["vision"] == (4 + 4) * of_question
    assert parts.phases["rollout"]["vision"] == (4 + 16 * 4) * of_question


def test_vllms_weights_are_split_to_make_it_fit(simple_counts, monkeypatch):
    """The quickstart's student has 2 heads, and 6 processes form groups of 2, or of 1 on nodes with 3 processes."""
    monkeypatch.setattr(memory, "count_parameters", lambda *_: parameters(total=10**10, largest=10**8))
    sizes = ["data.max_prompt_tokens=512", "micro_tokens=2048", "sft.batch_size=6", "distill.batch_size=6", STAGES]
    engine = ["rollout.engine=vllm", "rollout.vllm_kv_cache_gib=1", "runtime.zero_stage=3"]
    settings = load_settings("quickstart", [*sizes, *engine])
    plan = plan_memory(settings, CONFIG, processes=6, device="cuda")
    found = fit_lines(settings, CONFIG, plan, plan.total - 8 * GIB, 6)
    # Half of 10^10 weights in 4 bytes.
    expected = f"set rollout.tensor_parallel=2, planned {(plan.total - 2 * 10**10) / GIB:.1f} GiB"
    assert expected in found and not any("parallel=3" in line or "parallel=6" in line for line in found), found
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert not any("tensor_parallel" in line for line in fit_lines(settings, CONFIG, plan, plan.total - 8 * GIB, 6))


def test_servers_hold_no_memory_of_the_gpu(simple_counts, monkeypatch):
    """Two questions at once on each of two servers, whose features are joined on the GPU and sent from the host."""
    size = parameters(total=10**10, largest=10**8)
    monkeypatch.setattr(memory, "count_parameters", lambda *_: size)
    common = ["runtime.zero_stage=3", "data.max_prompt_tokens=15000", "rollout.prompts_per_batch=2", STAGES]
    urls = ["rollout.engine=vllm_server", "rollout.server_urls=[http://a:1,http://b:1]"]
    settings, hf = (load_settings("rmsd_qwen3vl_4b", [*common, *more]) for more in (urls, []))
    config = config_4b()
    plan = plan_memory(settings, config, processes=4, device="cuda").stages["distill"]
    expected = plan_memory(hf, config, processes=4, device="cuda").stages["distill"]
    assert "rollout" not in plan.phases["rollout"] and plan.phases["policy"] == expected.phases["policy"]
    assert plan.phases["rollout"]["weights"] == plan.phases["policy"]["weights"]
    questions, hidden = settings.distill.batch_size // 4, config["text_config"]["hidden_size"]
    # A token of 32 x 32 pixels in 2 frames has features of four layers in 2 bytes.
    of_question = settings.video.max_video_pixels // (32 * 32 * 2) * 4 * hidden * 2
    assert plan.phases["rollout"]["vision"] == (questions + 4) * of_question
    assert plan.host == expected.host + max(256 * 2**20, 2 * 10**8, 4 * of_question)
    on_cpu = plan_memory(settings, config, processes=4, device="cpu").stages["distill"]
    assert on_cpu.phases["rollout"]["rollout"] == 4 * of_question
