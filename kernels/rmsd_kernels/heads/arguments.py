"""Checked arguments of a public function in the form that the loops take."""

import torch
from torch import Tensor

from .. import checks
from ..implementations import IMPLEMENTATIONS
from ..ops import accumulation_dtype
from .row_types import Execution, HeadCall


def head_call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int | None,
) -> HeadCall:
    """A HeadCall without a reference."""
    return HeadCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets.contiguous(),
        temperature=temperature_of_rows(temperature, hidden),
        softcap=None if softcap is None else float(softcap),
        ignore_index=ignore_index,
    )


def temperature_of_rows(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """[T] in the accumulation dtype; None where it is 1 for all rows."""
    if not isinstance(temperature, Tensor):
        if temperature == 1.0:
            return None
        temperature = torch.full((), temperature, dtype=accumulation_dtype(hidden), device=hidden.device)
    heat = temperature.detach().to(device=hidden.device, dtype=accumulation_dtype(hidden))
    return heat.expand(len(hidden)).contiguous()


def execution_of(impl: str, memory_budget_bytes: int | None) -> Execution:
    """How the loops run, from checked arguments of a public function."""
    checks.check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    if memory_budget_bytes is None:
        return Execution(impl, 0)
    checks.check_number("memory_budget_bytes", memory_budget_bytes, above=0.0)
    if impl == "reference":
        raise ValueError("memory_budget_bytes: has no effect with impl='reference'; leave it out or use 'torch'")
    return Execution(impl, max(1, int(memory_budget_bytes)))
