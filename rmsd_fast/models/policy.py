"""The student as the trainer calls it: rows in, whatever the loss makes of hidden states and head out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.students import MediaFeatures, RowBatch, encode_media, forward_hidden

Result = TypeVar("Result")


class Policy(nn.Module):
    """Wraps the language model so that body, head and loss run inside one module call.

    ZeRO-3 gathers a parameter when its module runs, so a head weight that a fused loss multiplies itself has to be
    touched inside the engine's forward: hence the loss comes in as `head`.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self,
        prompts: list[Prompt],
        rows: RowBatch,
        features: MediaFeatures | None,
        head: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Result],
    ) -> Result:
        """Apply `head(hidden [T, D], weight [V, D], targets [T])` to the positions that predict a response token.

        T runs over the rows in order, and over each row's response tokens in order. features=None encodes the media
        here, with a gradient where the vision tower is trained.
        """
        if features is None:
            features = encode_media(self.model, prompts)
        hidden = forward_hidden(self.model, rows, features)
        predicts = rows.response_mask[:, 1:]
        return head(hidden[:, :-1][predicts], self.model.lm_head.weight, rows.input_ids[:, 1:][predicts])
