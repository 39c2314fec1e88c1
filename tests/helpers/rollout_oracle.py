"""Rollouts decoded with K/V that grow by one token per pass: the slow and plain form of rmsd_fast/rollout/decode.py.

A row's own keys and values are concatenated anew for each token, so no place of a buffer is ever unused, and nothing is
updated in place. The kernels are the same, so the results must have the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

from rmsd_fast.models.shared_prefix import run_shared_prefix, shared_prefix_enabled
from rmsd_fast.models.students import encode_media
from rmsd_fast.rollout.base import Sampling, sampling_noise
from rmsd_kernels.shared_prefix.decode import DecodePlan, shared_prefix_decode


class GrowingCache:
    """K/V of B rows, [B, Hkv, t, d] in each layer, on prefilled prompts."""

    def __init__(self, prefix, rows: list[int]):
        self.prefix = prefix
        self.owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
        self.keys = [None] * len(prefix.keys)
        self.values = [None] * len(prefix.keys)

    def attend(self, layer_idx, q, k, v, scale):
        for own, new in ((self.keys, k), (self.values, v)):
            own[layer_idx] = new if own[layer_idx] is None else torch.cat([own[layer_idx], new], 2)
        counts = torch.bincount(self.owner, minlength=len(self.prefix.prefix_lengths)).tolist()
        plan = DecodePlan.from_counts(self.prefix.prefix_lengths, counts)
        prefix = (self.prefix.keys[layer_idx], self.prefix.values[layer_idx])
        out = shared_prefix_decode(q[:, :, 0], *prefix, self.keys[layer_idx], self.values[layer_idx], plan, scale=scale)
        return out[:, None]

    def keep(self, rows: torch.Tensor) -> None:
        self.owner = self.owner[rows]
        for own in (self.keys, self.values):
            own[:] = [tensor if tensor is None else tensor[rows] for tensor in own]


@torch.no_grad()
def decode_plainly(engine, model, prompts, sampling: Sampling, *, look_every: int = 1):
    """Return ids, log-probs without banned ids, and log-probs over the whole vocabulary, a list of each per rollout.

    Args:
        engine: the engine whose prefill is used.
        model: the student's model.
        prompts: prompts of one batch.
        sampling: sampling parameters.
        look_every: number of tokens after which rows that have ended are dropped, if at most half are left.
    """
    was_training = model.training
    model.eval()
    try:
        with shared_prefix_enabled(model):
            return _decode(engine, model, prompts, sampling, look_every)
    finally:
        model.train(was_training)


def _decode(engine, model, prompts, sampling, look_every):
    prefix, hidden = engine._prefill(model, prompts, encode_media(model, prompts))
    logits = model.lm_head(hidden)
    cache = GrowingCache(prefix, [sampling.n] * len(prompts))
    logits = logits.repeat_interleave(sampling.n, 0)
    positions = torch.tensor([p.next_position for p in prompts]).repeat_interleave(sampling.n)
    noise = np.stack([sampling_noise(sampling, p.question.id, i) for p in prompts for i in range(sampling.n)])
    noise = torch.from_numpy(noise)
    results = [([], [], []) for _ in noise]
    rows = list(range(len(noise)))
    ended = set()
    for t in range(sampling.max_new_tokens):
        chosen, restricted, whole = _choose(engine, logits, noise[rows, t], sampling.temperature)
        for place, row in enumerate(rows):
            if row not in ended:
                for values, value in zip(results[row], (chosen, restricted, whole), strict=True):
                    values.append(value[place].item())
        ended |= {row for row, token in zip(rows, chosen.tolist(), strict=True) if token == engine.builder.eos_id}
        kept = [place for place, row in enumerate(rows) if row not in ended]
        if not kept or t + 1 == sampling.max_new_tokens:
            break
        if (t + 1) % look_every == 0 and 2 * len(kept) <= len(rows):
            cache.keep(torch.tensor(kept))
            rows, chosen = [rows[place] for place in kept], chosen[kept]
        hidden = run_shared_prefix(
            model.model.language_model,
            cache,
            input_ids=chosen[:, None],
            position_ids=(positions[rows] + t)[None, :, None].expand(3, -1, -1),
        )
        logits = model.lm_head(hidden[:, -1])
    return results


def _choose(engine, logits, noise, temperature):
    logits = logits.float()
    whole = (logits / (temperature or 1.0)).log_softmax(-1)
    logits = logits.clone()
    logits[:, engine.banned_ids] = -torch.inf
    if temperature == 0:
        chosen = logits.argmax(-1)
        restricted = logits.log_softmax(-1)
    else:
        restricted = (logits / temperature).log_softmax(-1)
        cdf = restricted.double().exp().cumsum(-1)
        chosen = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
    return (chosen, *(logp.gather(-1, chosen[:, None])[:, 0] for logp in (restricted, whole)))
