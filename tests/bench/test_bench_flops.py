"""Test FLOPs against torch's own counter on a tiny model, by hand, and against published estimates for Qwen3-VL-4B."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.step.flops import Flops, Load, StepLoad, copies_flops, packed_flops, padded_flops, step_flops
from rmsd_fast.models.cost import balance_weights

QWEN3_VL_4B = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "vision_config": {
        "hidden_size": 1024,
        "depth": 24,
        "intermediate_size": 4096,
        "out_hidden_size": 2560,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}

# The keys are the prefix length in thousands of tokens and the response length. The values are, for each M, the ratio
# of shared to M=1 and the ratio of naive to shared.
ONE_MODEL = {
    (2, 128): [(1.05, 1.9), (1.21, 4.1), (1.43, 6.3), (1.80, 8.9)],
    (2, 512): [(1.19, 1.7), (1.74, 2.9), (2.49, 3.6), (3.79, 4.2)],
    (8, 128): [(1.02, 2.0), (1.07, 4.7), (1.13, 8.0), (1.25, 12.8)],
    (8, 512): [(1.06, 1.9), (1.25, 4.0), (1.50, 6.0), (1.95, 8.2)],
    (16, 512): [(1.04, 1.9), (1.15, 4.4), (1.30, 6.9), (1.56, 10.3)],
}
# The values for K=4, N=8 are the ratios to naive K=1, N=1 and to shared K=1, N=8, and the ratio of naive to shared.
WHOLE_STEP = {
    (2, 128): (1.03, 1.05, 6.7),
    (2, 512): (1.93, 1.10, 3.6),
    (2, 1024): (2.79, 1.11, 2.5),
    (8, 128): (0.78, 1.02, 8.8),
    (8, 512): (1.10, 1.06, 6.3),
    (8, 1024): (1.48, 1.08, 4.6),
    (16, 128): (0.74, 1.01, 9.3),
    (16, 512): (0.93, 1.04, 7.4),
    (16, 1024): (1.16, 1.06, 5.9),
}


def _video(tokens: int) -> list[tuple[int, int, int]]:
    """Return a video with this many vision tokens, 4 x 10 per frame pair."""
    return [(tokens // 40, 8, 20)]


@pytest.mark.parametrize(("prefix", "response"), ONE_MODEL)
def test_table_of_one_model(prefix: int, response: int) -> None:
    """Check all 40 entries to the given digits: 2, 8 and 16 thousand prompt tokens, all of them vision tokens.

    The tower and its mergers are trained, forward and backward, without the attention of the tower. The head runs on
    response rows.
    """
    tokens = 1000 * prefix

    def total(count_flops, responses: int) -> int:
        load = Load(tokens, [response] * responses, _video(tokens))
        flops = count_flops(QWEN3_VL_4B, [load], backward=True, train_vision=True)
        return flops.total - flops.vision_attention

    for responses, (over_one, naive) in zip((2, 5, 9, 16), ONE_MODEL[prefix, response], strict=True):
        shared = total(packed_flops, responses)
        assert shared / total(packed_flops, 1) == pytest.approx(over_one, abs=0.005)
        assert total(copies_flops, responses) / shared == pytest.approx(naive, abs=0.05)


@pytest.mark.parametrize(("prefix", "response"), WHOLE_STEP)
def test_table_of_a_whole_step(prefix: int, response: int) -> None:
    """Check the published ratios within 2.5 %; the naive discriminator has N + K rows."""
    tokens = 1000 * prefix

    def total(teachers: int, rollouts: int, mode: str) -> int:
        load = StepLoad(tokens, [response] * rollouts, [response] * teachers, _video(tokens))
        return step_flops(QWEN3_VL_4B, [load], mode).total

    shared = total(4, 8, "shared")
    found = (shared / total(1, 1, "copies"), shared / total(1, 8, "shared"), total(4, 8, "copies") / shared)
    assert found == pytest.approx(WHOLE_STEP[prefix, response], rel=0.025)


def test_packed_and_copied_flops_by_hand() -> None:
    """Use 2 layers, D=4, 2 heads of 3, 1 kv head, ffn 5, 7 words, and 10 tokens: prefix 5, responses 2 and 3."""
    config = SimpleNamespace(
        text_config=SimpleNamespace(
            hidden_size=4,
            intermediate_size=5,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=3,
            vocab_size=7,
        )
    )
    # q has 4x6 weights, k and v 4x3 each, o 6x4, and the MLP three times 4x5, which is 132 weights per layer.
    assert balance_weights(config) == (2 * 2 * 132, 2 * 4 * 6)
    # The prefix has 15 pairs, and the responses have 3 + 10 and 6 + 15.
    packed = packed_flops(config, [Load(5, [2, 3])])
    assert packed == Flops(dense=10 * 528, attention=(15 + 13 + 21) * 48, head=5 * 2 * 28)
    assert packed.total == 5280 + 2352 + 280
    # Rows of 7 and 8 tokens have 28 and 36 pairs; when padded, both have 8 tokens.
    assert copies_flops(config, [Load(5, [2, 3])]) == Flops(dense=15 * 528, attention=64 * 48, head=280)
    assert padded_flops(config, [Load(5, [2, 3])]) == Flops(dense=16 * 528, attention=72 * 48, head=280)
    trained = packed_flops(config, [Load(5, [2, 3])], backward=True, checkpointing=True)
    assert trained == Flops(dense=4 * 5280, attention=4 * 2352, head=3 * 280)
    assert packed_flops(config, [Load(5, [2, 3])], checkpointing=True, head=False) == Flops(5280, 2352)


def test_step_adds_up() -> None:
    groups = [StepLoad(500, [20, 30, 40], [25, 35], _video(448)), StepLoad(300, [10], [], _video(256))]
    written = [Load(500, [20, 30, 40], _video(448)), Load(300, [10], _video(256))]
    judged = [Load(500, [20, 30, 40, 25, 35], _video(448)), Load(300, [10], _video(256))]

    def one(count_flops, loads, **options):
        return count_flops(QWEN3_VL_4B, loads, **options)

    for mode, count_flops in (("shared", packed_flops), ("padded", padded_flops)):
        expected = one(count_flops, written, backward=True) + one(count_flops, written, vision=False)
        expected += one(count_flops, judged, backward=True, vision=False, head=False)
        assert step_flops(QWEN3_VL_4B, groups, mode) == expected
    # Every row encodes its media again.
    expected = one(copies_flops, written, backward=True) + one(copies_flops, written)
    expected += one(copies_flops, judged, backward=True, head=False)
    assert step_flops(QWEN3_VL_4B, groups, "copies") == expected


def test_vision_frames_attend_within_themselves() -> None:
    short = packed_flops(QWEN3_VL_4B, [Load(64, [1], [(1, 16, 16)])])
    longer = packed_flops(QWEN3_VL_4B, [Load(64, [1], [(4, 16, 16)])])
    larger = packed_flops(QWEN3_VL_4B, [Load(64, [1], [(1, 32, 32)])])
    assert longer.vision == larger.vision == 4 * short.vision
    assert longer.vision_attention == 4 * short.vision_attention
    assert larger.vision_attention == 16 * short.vision_attention


@pytest.fixture(scope="module")
def tiny_model():
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 300,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_heads": 2,
            "out_hidden_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        video_token_id=290,
        image_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    return Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("train_vision", [False, True])
def test_flops_equal_the_torch_counter(tiny_model, train_vision: bool) -> None:
    """Count forward and backward of one row with an image by module; eager attention computes all L^2 pairs."""
    model, config = tiny_model, tiny_model.config
    model.requires_grad_(True)
    model.model.visual.requires_grad_(train_vision)
    grid, length = (1, 8, 12), 40
    ids = torch.randint(0, 280, (1, length))
    ids[0, 3:27] = 291
    pixels = torch.randn(grid[1] * grid[2], 3 * 2 * 16 * 16)
    positions = torch.arange(length).expand(3, 1, length)
    for backward in (False, True):
        counter = FlopCounterMode(display=False)
        with counter:
            output = model(
                input_ids=ids,
                position_ids=positions,
                pixel_values=pixels,
                image_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=(ids == 291).long(),
                use_cache=False,
            )
            if backward:
                output.logits.sum().backward()
        load = Load(length - 5, [5], [grid])
        flops = packed_flops(config, [load], backward=backward, train_vision=train_vision)
        _, per_pair = balance_weights(config)
        passes = 3 if backward else 1
        pairs = length * (length + 1) // 2
        assert flops.attention == passes * per_pair * pairs
        # The model's head runs on all rows, and its eager attention also on masked pairs. Its rotary tables and the
        # interpolation of position embeddings are matrix products too, far below 1 %.
        expected = flops.total + passes * per_pair * (length**2 - pairs) + flops.head * (length - 5) // 5
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.005)
        assert counter.get_total_flops() >= expected


def test_errors_name_the_missing_field() -> None:
    with pytest.raises(ValueError, match="vision_config: expected .*depth"):
        packed_flops({"text_config": QWEN3_VL_4B["text_config"]}, [Load(64, [1], [(1, 16, 16)])])
    with pytest.raises(ValueError, match="mode: expected one of"):
        step_flops(QWEN3_VL_4B, [], "naive")
