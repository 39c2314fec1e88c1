"""Provide responses, rows of a packed pass and a fake cache for the tests of shared prompts in models."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from family_students import FamilyPrompt, encode, pack_inputs, pixels_of
from torch import nn

from rmsd_fast.models.shared_prefix import run_shared_prefix
from rmsd_kernels import SharedPrefixPlan

# Two groups have different lengths, so that a test fails if segments are mixed up, and one response has a single token.
LENGTHS = [[5, 3, 1], [4, 2]]
Responses = list[list[torch.Tensor]]
Media = Callable[[nn.Module, list[FamilyPrompt]], dict]


def make_responses(lengths: list[list[int]] = LENGTHS) -> Responses:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(3, 80, (length,), generator=generator) for length in group] for group in lengths]


def plan_of(prompts: list[FamilyPrompt], responses: Responses) -> SharedPrefixPlan:
    lengths = [[len(response) for response in group] for group in responses]
    device = prompts[0].input_ids.device
    return SharedPrefixPlan.from_lengths([len(prompt.input_ids) for prompt in prompts], lengths, device=device)


def takes_features(model: nn.Module) -> bool:
    """Return whether the model takes `mm_encoder_outputs`, as all families do since transformers 5.18."""
    return "mm_encoder_outputs" in inspect.signature(model.model.forward).parameters


def media_of(model: nn.Module, prompts: list[FamilyPrompt]) -> dict:
    """Return features of the prompts' media if the model accepts them, otherwise their pixels."""
    return {"mm_encoder_outputs": encode(model, prompts)} if takes_features(model) else pixels_of(model, prompts)


def packed_rows(
    model: nn.Module, prompts: list[FamilyPrompt], responses: Responses, media: Media = media_of
) -> list[torch.Tensor]:
    """Return the hidden states [P + R, D] of every `[prefix | response]` from one packed pass."""
    inputs = pack_inputs(prompts, responses)
    plan = plan_of(prompts, responses)
    hidden = run_shared_prefix(model.model, plan, **inputs, **media(model, prompts))[0]
    prefixes = hidden[: plan.prefix_tokens].split(plan.prefix_lengths)
    by_response = iter(hidden[plan.prefix_tokens :].split([len(response) for group in responses for response in group]))
    return [
        torch.cat([prefix, next(by_response)]) for prefix, group in zip(prefixes, responses, strict=True) for _ in group
    ]


class CausalCache:
    """A fake cache that attends each row causally to itself, like an empty cache, and records its arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...], tuple[int, ...], float]] = []

    def attend(
        self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.seen.append((layer_idx, tuple(query.shape), tuple(key.shape), scale))
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return output.transpose(1, 2)
