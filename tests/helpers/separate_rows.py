"""Read what a step of stage 2 would apply, and compute log-probs on rows of their own to compare it with."""

from __future__ import annotations

import torch

from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.stages import distill


def step_gradients(state, prompts, monkeypatch, number=1):
    """Return groups, metrics and policy gradients of a step, which is not applied."""
    found = {}

    def keep(engines):
        named = state.policy.module.model.named_parameters()
        found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        for engine in engines:
            engine.discard()
        return [0.0] * len(engines), True

    monkeypatch.setattr(distill, "apply_or_discard", keep)
    result = distill.step(state, prompts, number)
    return result.groups, result.metrics, found


def plain_logits(model, prompt, ids, response):
    """Return the logits of a response after `ids`, float64 [R, V], by transformers on one row with its own pixels."""
    pixels = torch.cat([video_patches(frames.pixels, frames.preprocessor) for frames in prompt.media])
    row = torch.cat([ids, response])
    types = torch.zeros_like(row)
    types[: len(prompt.mm_token_type_ids)] = prompt.mm_token_type_ids
    types = types[: len(row)]
    return model(
        input_ids=row[None],
        mm_token_type_ids=types[None],
        pixel_values_videos=pixels.double(),
        video_grid_thw=torch.tensor([frames.grid_thw for frames in prompt.media]),
    ).logits[0, len(ids) - 1 : -1]


def plain_logp(model, prompt, ids, response, temperature):
    """Return log-probs of a response after `ids`, float64 [R]."""
    logits = plain_logits(model, prompt, ids, response)
    return torch.log_softmax(logits / temperature, -1).gather(1, response[:, None])[:, 0]
