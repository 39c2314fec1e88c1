"""The fused head with the interface of TRL's trainers: `model(..., labels=labels, fused_lm_head=True)`.

TRL 1.16 provides its own chunked head for that argument. This module makes a single model use the fused losses instead.
Other calls are unchanged, and the trainers' own code computes loss and metrics from the result.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.trainer import utils as trl_utils

from rmsd_fast.integrations.head import Head, add_head_call, base_of, shifted_rows
from rmsd_fast.losses import linear_logprob

# Memory budget for logits of the few rows whose most likely token has to be computed.
TOP1_BUDGET_BYTES = 64 << 20


def missing_hooks(model: nn.Module) -> list[str]:
    """Return the missing parts of TRL's fused head: its output class, or its argument of this model's forward."""
    missing = [] if hasattr(trl_utils, "FusedCausalLMOutput") else ["trl.trainer.utils.FusedCausalLMOutput"]
    forward = vars(base_of(model)).get("forward")
    if forward is None or "fused_lm_head" not in inspect.signature(forward, follow_wrapped=False).parameters:
        missing.append("a fused_lm_head argument on the model's forward")
    return missing


def answer_fused_head(model: nn.Module, head_call: Callable[..., Any]) -> None:
    """Make this model handle `fused_lm_head=True` with head_call(hidden, head, **loss inputs); see add_head_call.

    If a caller passes its own head_call, it is used instead.
    """
    model = base_of(model)
    add_head_call(model)
    # Use the unbound function, so that a deep copy of the model passes itself.
    inner = model.forward.__func__

    @functools.wraps(type(model).forward)
    def forward(this: nn.Module, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            kwargs.setdefault("head_call", head_call)
        return inner(this, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def per_token_output(
    hidden: Tensor,
    head: Head,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    with_top1: bool = False,
    memory_budget_bytes: int | None = None,
) -> Any:
    """Return the output of TRL's own head: a FusedCausalLMOutput with values [B, L-1], 0 at positions without a label.

    Args:
        hidden: hidden states, [B, L, D], in the dtype of the head.
        head: the model's head.
        labels: labels as passed to the model.
        shift_labels: shifted labels as passed to the model.
        num_items_in_batch: normalizer as passed to the model; None means the number of labels.
        temperature: temperature of the logits.
        with_entropy: whether to return entropies.
        with_top1: whether to return, for each label, if it is the most likely token (the first one in a tie).
        memory_budget_bytes: memory budget for logits, see rmsd_fast.losses.
    """
    rows, targets = shifted_rows(hidden, labels, shift_labels)
    scored = targets != -100
    rows, targets = rows[scored], targets[scored]
    with torch.autocast(rows.device.type, enabled=False):
        result = linear_logprob(
            rows,
            head.weight,
            targets,
            ignore_index=None,
            return_entropy=with_entropy,
            memory_budget_bytes=memory_budget_bytes,
            **head.arguments(temperature),
        )
        logp, entropy = result if with_entropy else (result, None)
        top1 = is_most_likely(rows, head, targets, logp) if with_top1 else None

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.new_zeros(scored.shape).masked_scatter(scored, values).view(len(hidden), -1)

    normalizer = scored.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return trl_utils.FusedCausalLMOutput(
        loss=-logp.sum() / normalizer,
        log_probs=spread(logp),
        entropy=spread(entropy),
        is_top1=spread(top1),
        label_mask=scored.view(len(hidden), -1),
    )


@torch.no_grad()
def is_most_likely(rows: Tensor, head: Head, targets: Tensor, logp: Tensor) -> Tensor:
    """Return whether each target is the first of the most likely tokens, bool [T].

    A token with p > 1/2 always is. Only the remaining rows are multiplied by the head again.
    """
    top1 = logp > -math.log(2)
    unsure = (~top1).nonzero().flatten()
    rows_at_once = max(1, TOP1_BUDGET_BYTES // (head.weight.shape[0] * head.weight.element_size()))
    for index in unsure.split(rows_at_once):
        # Scale and softcap do not change the order of the logits.
        logits = F.linear(rows[index], head.weight, head.bias)
        top1[index] = logits.argmax(-1) == targets[index]
    return top1
