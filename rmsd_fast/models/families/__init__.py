"""The families of students. Each has a module of its own, and the trainer asks nothing else about a family."""

from __future__ import annotations

from typing import Any

from rmsd_fast.config import ModelError
from rmsd_fast.models.families.family import Family
from rmsd_fast.models.families.qwen2_5_vl import QWEN2_5_VL
from rmsd_fast.models.families.qwen3_vl import QWEN3_VL

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES = {family.model_type: family for family in (QWEN3_VL, QWEN2_5_VL)}
# Families that users are likely to try, and why they are refused.
REFUSED = {
    "qwen3_vl_moe": (
        "the loss that balances its experts is a mean over all tokens of a forward pass, so it would depend on packing "
        "and on the micro-batches of a step"
    ),
    "qwen2_vl": "it was not tested; Qwen2.5-VL is its successor",
}


def family_of(config: Any, where: str = "model.path") -> Family:
    """Return the family of a model.

    Args:
        config: configuration of the model, or the content of its config.json.
        where: the model in the error message.
    Raises:
        ModelError: the family is not supported.
    """
    name = config.get("model_type") if isinstance(config, dict) else config.model_type
    if name in FAMILIES:
        return FAMILIES[name]
    reason = f" ({REFUSED[name]})" if name in REFUSED else ""
    examples = " or ".join(f"a {family.title} model, e.g. {family.example}" for family in FAMILIES.values())
    raise ModelError(
        f"{where}: expected a model of family {' or '.join(FAMILIES)}, got {name!r}{reason}; set model.path to "
        f"{examples}"
    )
