"""Generate rollouts with transformers in the training process, on shared prefixes.

The prompts of a batch are prefilled in one packed row. Their K/V are stored once, and all N responses of a prompt read
them.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch

from rmsd_fast.data.packing import media_places
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.transfer import to_device
from rmsd_fast.models.shared_prefix import run_shared_prefix, shared_prefix_enabled
from rmsd_fast.models.students import MediaFeatures, embed, encode_media
from rmsd_fast.rollout.base import PolicyEngine, Rollout, Sampling, sampling_noise
from rmsd_fast.rollout.shared_cache import DecodeCache, PrefixCache


class HfRollout:
    """Generate rollouts with the model that is being trained. Under ZeRO-3, call it inside `Engine.full_weights`.

    Args:
        builder: builder of the prompts, which also decodes responses.
        prompts_per_batch: number of questions that are decoded together.
        device: device of the model.
    """

    runs_policy = True

    def __init__(self, builder: PromptBuilder, *, prompts_per_batch: int, device: torch.device):
        self.builder = builder
        self.prompts_per_batch = prompts_per_batch
        self.device = device
        self.banned_ids = builder.banned_ids.to(device)

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Do nothing: the rollouts are those of the training model itself."""

    @torch.no_grad()
    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Return N rollouts per prompt; see `RolloutEngine`.

        The call enables eval mode and shared prefixes, and restores the model afterward.
        """
        was_training = model.training
        model.eval()
        try:
            rollouts = []
            with shared_prefix_enabled(model):
                for start in range(0, len(prompts), self.prompts_per_batch):
                    batch = prompts[start : start + self.prompts_per_batch]
                    if features is None:
                        encoded = encode_media(model, batch)
                    else:
                        encoded = features.select(range(start, start + len(batch)))
                    tokens, logp = self._decode(model, batch, encoded, sampling)
                    rollouts += self._collect(batch, tokens, logp, sampling, policy_version)
            return rollouts
        finally:
            model.train(was_training)

    def _decode(
        self, model, prompts: list[Prompt], features: MediaFeatures, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sampled ids [B*N, R] and their log-probs [B*N, R]. After a row's end token, the ids are -1."""
        prefix, logits = self._prefill(model, prompts, features)
        cache = DecodeCache(prefix, [sampling.n] * len(prompts))
        logits = logits.repeat_interleave(sampling.n, 0)
        next_position = torch.tensor([p.next_position for p in prompts], device=self.device)
        next_position = next_position.repeat_interleave(sampling.n)
        noise = np.stack([sampling_noise(sampling, p.question.id, i) for p in prompts for i in range(sampling.n)])
        noise = torch.from_numpy(noise).to(self.device)

        tokens = torch.full(noise.shape, -1, dtype=torch.long, device=self.device)
        logps = torch.zeros(noise.shape, device=self.device)
        # `rows` are the rows of `tokens` that are still in the batch; `active` marks the rows that have not ended.
        rows = torch.arange(len(tokens), device=self.device)
        active = torch.ones_like(rows, dtype=torch.bool)
        for t in range(sampling.max_new_tokens):
            chosen, logp = self._choose(logits, noise[rows, t], sampling.temperature)
            tokens[rows, t] = torch.where(active, chosen, -1)
            logps[rows, t] = torch.where(active, logp, 0.0)
            active = active & (chosen != self.builder.eos_id)
            # This is the only synchronization of a decoding step.
            left = 0 if t + 1 == sampling.max_new_tokens else int(active.sum())
            if left == 0:
                break
            if 2 * left <= len(rows):
                # Drop rows that have ended, so that one long response does not keep them in the batch.
                kept = active.nonzero()[:, 0]
                cache.keep(kept)
                rows, active, chosen = rows[kept], active[kept], chosen[kept]
            hidden = run_shared_prefix(
                model.model.language_model,
                cache,
                input_ids=chosen[:, None],
                position_ids=(next_position[rows] + t)[None, :, None].expand(3, -1, -1),
            )
            logits = model.lm_head(hidden[:, -1])
        return tokens, logps

    def _prefill(self, model, prompts: list[Prompt], features: MediaFeatures) -> tuple[PrefixCache, torch.Tensor]:
        """Run one forward pass over the packed prompts, and return their K/V and the next-token logits [B, V]."""
        lengths = [len(p.input_ids) for p in prompts]
        cache = PrefixCache(lengths, device=self.device)
        ends = list(accumulate(lengths))
        input_ids, position_ids, places, last = to_device(
            [
                torch.cat([p.input_ids for p in prompts])[None],
                torch.cat([p.position_ids for p in prompts], 1)[:, None],
                media_places(prompts, [0, *ends[:-1]]),
                torch.tensor(ends) - 1,
            ],
            self.device,
        )
        hidden = run_shared_prefix(
            model.model.language_model,
            cache,
            position_ids=position_ids,
            **embed(model, input_ids, features, list(range(len(prompts))), places),
        )
        return cache, model.lm_head(hidden[0, last])

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor, temperature: float):
        """Return the next ids [rows] and their log-probs, by inverting the cumulative distribution in float64.

        For rows whose logits are not finite, return the end token and NaN.
        """
        logits = logits.float()
        finite = torch.isfinite(logits).all(-1)
        logits[:, self.banned_ids] = -torch.inf
        if temperature == 0:
            chosen = logits.argmax(-1)
            logp = logits.log_softmax(-1)
        else:
            logp = (logits / temperature).log_softmax(-1)
            cdf = logp.double().exp().cumsum(-1)
            # With right=True, an id with probability 0 has an empty interval and is never chosen.
            chosen = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
            chosen = chosen.clamp_max(logits.shape[-1] - 1)
        chosen = torch.where(finite, chosen, self.builder.eos_id)
        return chosen, torch.where(finite, logp.gather(-1, chosen[:, None])[:, 0], torch.nan)

    def _collect(self, prompts, tokens, logp, sampling: Sampling, policy_version: int) -> list[list[Rollout]]:
        tokens, logp = tokens.cpu(), logp.cpu()
        groups = []
        for row, prompt in enumerate(prompts):
            group = []
            for index in range(sampling.n):
                number = row * sampling.n + index
                length = int((tokens[number] >= 0).sum())
                ids = tokens[number, :length].clone()
                group.append(
                    Rollout(
                        question_id=prompt.question.id,
                        index=index,
                        token_ids=ids,
                        text=self.builder.decode_response(ids),
                        logp=logp[number, :length].clone(),
                        truncated=int(ids[-1]) != self.builder.eos_id,
                        policy_version=policy_version,
                    )
                )
            groups.append(group)
        return groups
