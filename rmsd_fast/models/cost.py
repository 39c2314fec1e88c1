"""Count the FLOPs of a token and of an attended pair in the decoder, to balance micro-batches.

`bench/step/flops.py` counts the rest of a step. `config` is a transformers config, or the same settings as nested
dicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def balance_weights(config: Any) -> tuple[int, int]:
    """Return (FLOPs per token, FLOPs per attended pair) of the decoder's forward: `weights` of `plan_micro_batches`.

    Only matrix products are counted, with 2 FLOPs per multiply-add: q, k, v, o, gate, up and down per token and layer,
    and scores and weighted values per attended (query, key) pair and layer. The ratio of the two is the same in forward
    and backward, and for policy and discriminator. The vision tower is left out, because it runs once per step and not
    per micro-batch.

    Raises:
        ValueError: the decoder is a mixture of experts, or a size is missing.
    """
    text = text_sizes(config)
    hidden, heads, layers = text["hidden_size"], text["num_attention_heads"], text["num_hidden_layers"]
    projections = 2 * hidden * text["head_dim"] * (heads + text["num_key_value_heads"])
    per_token = 2 * layers * (projections + 3 * hidden * text["intermediate_size"])
    return per_token, 4 * layers * heads * text["head_dim"]


def text_sizes(config: Any) -> dict[str, Any]:
    """Return the sizes of a dense decoder by their names in the config. A missing `head_dim` is computed."""
    text = read_setting(config, "text_config")
    text = config if text is None else text
    if read_setting(text, "num_experts"):
        raise ValueError("text_config: expected a dense decoder, got a mixture of experts, whose FLOPs are not counted")
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    sizes = read_sizes(text, "text_config", names)
    head_dim = read_setting(text, "head_dim")
    return sizes | {"head_dim": head_dim or sizes["hidden_size"] // sizes["num_attention_heads"]}


def read_sizes(config: Any, part: str, names: str) -> dict[str, Any]:
    """Return the settings in `names`, separated by spaces. Raise ValueError, naming `part`, if any is missing."""
    sizes = {name: read_setting(config, name) for name in names.split()}
    missing = [name for name, size in sizes.items() if size is None]
    if missing:
        raise ValueError(f"{part}: expected {', '.join(missing)}; FLOPs are known only for dense decoders")
    return sizes


def read_setting(config: Any, name: str) -> Any:
    """Return a setting of a config or a mapping, or None if it is missing."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
