"""Test the costs of a token and of an attended pair, and their effect on micro-batches."""

from __future__ import annotations

import pytest

from rmsd_fast.data.micro_batches import plan_micro_batches
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
    }
}


def test_weights_by_hand() -> None:
    """The model has 2 layers, D=6, 2 heads of 3, 1 kv head, ffn 5 and 7 words."""
    text = {
        "hidden_size": 6,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 7,
    }
    # q has 6x6 weights, k and v 6x3 each, o 6x6, and the MLP three times 6x5, which is 198 weights per layer. The head
    # size is 6 / 2.
    assert balance_weights({"text_config": text}) == balance_weights(text) == (2 * 2 * 198, 2 * 4 * 6)
    assert balance_weights(text | {"head_dim": 4}) == (2 * 2 * 234, 2 * 4 * 8)


def test_weights_balance_micro_batches() -> None:
    """A long prompt costs more than the same number of tokens in short responses."""
    prefixes, responses = [16000, 1000, 1000], [[100], [152] * 100, [152] * 100]

    def prompts_of(weights: tuple[float, float]) -> list[list[int]]:
        plan = plan_micro_batches(prefixes, responses, packing="shared", micro_tokens=40000, weights=weights)
        return [batch.prompts for batch in plan]

    # The first result joins two of the prompts. The more expensive micro-batch comes first.
    assert prompts_of((1, 0)) == [[0, 1], [2]]
    assert prompts_of(balance_weights(QWEN3_VL_4B)) == [[1, 2], [0]]


def test_errors_name_the_missing_field() -> None:
    text = dict(QWEN3_VL_4B["text_config"])
    with pytest.raises(ValueError, match="mixture of experts"):
        balance_weights({"text_config": text | {"num_experts": 8}})
    text.pop("intermediate_size")
    with pytest.raises(ValueError, match="text_config: expected intermediate_size"):
        balance_weights({"text_config": text})
