"""The discriminator: the stage-1 student with a scalar head on the last response token (arXiv 2603.11423)."""

from __future__ import annotations

import torch
from torch import nn

from rmsd_fast.data.packing import Rows
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import last_token_values
from rmsd_fast.models.adapters import DISCRIMINATOR, activate, adapted_layers
from rmsd_fast.models.students import MediaFeatures, encode_in_pass, forward_hidden


class Discriminator(nn.Module):
    """Score responses: the hidden state of the last response token itself (not shifted by one), times a weight, plus a
    bias.

    Args:
        model: the student to start from. Its language-model head is not used.
        seed: seed of the value head's initial weights.
        zero_head: start with weights of 0, so that all scores are equal at first.
        keeps_lm_head: whether the language-model head stays, because the model is shared.
        adapter: the adapter that it uses, if the model has adapters; None = the backbone alone.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int,
        zero_head: bool = False,
        keeps_lm_head: bool = False,
        adapter: str | None = DISCRIMINATOR,
    ):
        super().__init__()
        self.model, self.adapter = model, adapter
        self._adapted = tuple(adapted_layers(model).values())
        if not keeps_lm_head and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
            # An untied head would not be trained but would still take memory and optimizer state.
            model.lm_head = None
        hidden_size = model.config.text_config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        reference = next(model.parameters())
        weight = torch.randn(hidden_size, generator=generator) / (hidden_size + 1) ** 0.5
        if zero_head:
            weight.zero_()
        self.value_weight = nn.Parameter(weight.to(reference))
        self.value_bias = nn.Parameter(torch.zeros(1, dtype=reference.dtype, device=reference.device))

    def forward(self, prompts: list[Prompt], rows: Rows, features: MediaFeatures | None) -> torch.Tensor:
        """Return the scores of the rows' responses, float32 [M]. features=None encodes the media here."""
        activate(self._adapted, self.adapter)
        if features is None:
            features = encode_in_pass(self.model, prompts)
        # With mode=head, nothing in the body is trained, so no activations have to be kept.
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        with torch.set_grad_enabled(trained):
            hidden = forward_hidden(self.model, rows, features)
        return last_token_values(hidden.flatten(0, 1), rows.last, self.value_weight, bias=self.value_bias[0])
