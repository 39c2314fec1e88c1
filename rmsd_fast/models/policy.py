"""Wrap the student for the trainer: it takes rows and returns the result of a loss on hidden states and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from rmsd_fast.data.packing import Rows, gather_rows
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.adapters import POLICY, activate, adapted_layers
from rmsd_fast.models.students import MediaFeatures, encode_in_pass, forward_hidden

Result = TypeVar("Result")


class Policy(nn.Module):
    """Wrap the language model so that body, head and loss run inside one module call.

    ZeRO-3 gathers a parameter when its module runs. A fused loss multiplies by the head's weight itself, so it must run
    inside the engine's forward. It is therefore passed in as `head`.

    Args:
        model: the language model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._adapted = tuple(adapted_layers(model).values())

    def activate(self) -> None:
        """Use the policy's adapter in passes that do not go through it, such as generation."""
        activate(self._adapted, POLICY)

    def forward(
        self,
        prompts: list[Prompt],
        rows: Rows,
        features: MediaFeatures | None,
        head: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Result],
        *,
        adapted: bool = True,
    ) -> Result:
        """Apply `head(hidden [S, D], weight [V, D], targets [S])` to the positions that predict a response token.

        The S positions belong to the rows' responses, in order. If features is None, the media are encoded here, with a
        gradient if the vision tower is trained. With adapted=False, a model with adapters computes without them.
        """
        activate(self._adapted, POLICY if adapted else None)
        if features is None:
            features = encode_in_pass(self.model, prompts)
        hidden = forward_hidden(self.model, rows, features)
        return head(gather_rows(hidden.flatten(0, 1), rows), self.model.lm_head.weight, rows.targets)
