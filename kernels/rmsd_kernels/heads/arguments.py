"""Convert checked arguments of a public function to the records that the loops expect."""

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
    """Return a HeadCall without a reference."""
    return HeadCall(
        hidden=hidden,
        weight=weight,
        bias=bias,
        targets=targets.contiguous(),
        temperature=per_row_temperature(temperature, hidden),
        softcap=None if softcap is None else float(softcap),
        ignore_index=ignore_index,
    )


def per_row_temperature(temperature: float | Tensor, hidden: Tensor) -> Tensor | None:
    """Return the temperature as [T] in the accumulation dtype, or None if it is the number 1."""
    if not isinstance(temperature, Tensor):
        if temperature == 1.0:
            return None
        temperature = torch.full((), temperature, dtype=accumulation_dtype(hidden), device=hidden.device)
    temperature = temperature.detach().to(device=hidden.device, dtype=accumulation_dtype(hidden))
    return temperature.expand(len(hidden)).contiguous()


def execution_of(impl: str, memory_budget_bytes: int | None) -> Execution:
    """Return the Execution for the public arguments `impl` and `memory_budget_bytes`."""
    checks.check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    if memory_budget_bytes is None:
        return Execution(impl, 0)
    checks.check_number("memory_budget_bytes", memory_budget_bytes, above=0.0)
    if impl == "reference":
        raise ValueError("memory_budget_bytes: has no effect with impl='reference'; leave it out or use 'torch'")
    return Execution(impl, max(1, int(memory_budget_bytes)))
