"""Rollouts with transformers in the training process: a prompt is prefilled once for all its N, then decoded."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache

from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures, encode_media, gather_features
from rmsd_fast.rollout.base import Rollout, Sampling, sampling_noise


class HfRollout:
    """Decodes with the model that is being trained.

    prompts_per_batch: questions decoded together. Under ZeRO-3 call it inside `Engine.full_weights`.
    """

    def __init__(self, builder: PromptBuilder, *, prompts_per_batch: int, device: torch.device):
        self.builder = builder
        self.prompts_per_batch = prompts_per_batch
        self.device = device
        self.banned_ids = builder.banned_ids.to(device)

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
        """N rollouts per prompt; see `RolloutEngine`. The model is put in eval mode and back."""
        was_training = model.training
        model.eval()
        try:
            rollouts = []
            for start in range(0, len(prompts), self.prompts_per_batch):
                batch = prompts[start : start + self.prompts_per_batch]
                own = None if features is None else features.select(range(start, start + len(batch)))
                tokens, logp = self._decode(model, batch, own or encode_media(model, batch), sampling)
                rollouts += self._collect(batch, tokens, logp, sampling, policy_version)
            return rollouts
        finally:
            model.train(was_training)

    def _decode(
        self, model, prompts: list[Prompt], features: MediaFeatures, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sampled ids [B*N, R] and their log-probs [B*N, R]; after a row's end token the ids are -1."""
        cache, mask, logits = self._prefill(model, prompts, features)
        rows = len(prompts) * sampling.n
        cache.batch_repeat_interleave(sampling.n)
        mask = mask.repeat_interleave(sampling.n, 0)
        logits = logits.repeat_interleave(sampling.n, 0)
        next_position = torch.tensor([p.next_position for p in prompts], device=self.device)
        next_position = next_position.repeat_interleave(sampling.n)
        noise = np.stack([sampling_noise(sampling, p.question.id, i) for p in prompts for i in range(sampling.n)])
        noise = torch.from_numpy(noise).to(self.device)

        tokens = torch.full((rows, sampling.max_new_tokens), -1, dtype=torch.long, device=self.device)
        logps = torch.zeros(rows, sampling.max_new_tokens, device=self.device)
        active = torch.ones(rows, dtype=torch.bool, device=self.device)
        for t in range(sampling.max_new_tokens):
            chosen, logp = self._choose(logits, noise[:, t], sampling.temperature)
            tokens[:, t] = torch.where(active, chosen, -1)
            logps[:, t] = torch.where(active, logp, 0.0)
            active = active & (chosen != self.builder.eos_id)
            if t + 1 == sampling.max_new_tokens or not bool(active.any()):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            hidden = model.model(
                input_ids=chosen[:, None],
                attention_mask=mask,
                position_ids=(next_position + t)[None, :, None].expand(3, -1, -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = model.lm_head(hidden[:, -1])
        return tokens, logps

    def _prefill(
        self, model, prompts: list[Prompt], features: MediaFeatures
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """One forward over the left-padded prompts; each video is encoded once."""
        longest = max(len(p.input_ids) for p in prompts)
        input_ids = torch.full((len(prompts), longest), self.builder.eos_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.input_ids)
            input_ids[row, start:] = prompt.input_ids
            mask[row, start:] = 1
            positions[:, row, start:] = prompt.position_ids
        cache = DynamicCache(config=model.config.text_config)
        mask = mask.to(self.device)
        hidden = model.model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask,
            position_ids=positions.to(self.device),
            mm_encoder_outputs=gather_features(features, list(range(len(prompts)))),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return cache, mask, model.lm_head(hidden[:, -1])

    def _choose(self, logits: torch.Tensor, noise: torch.Tensor, temperature: float):
        """Next ids [rows] and their log-probs, by inversion of the cumulative distribution in float64."""
        logits = logits.float()
        logits[:, self.banned_ids] = -torch.inf
        if temperature == 0:
            chosen = logits.argmax(-1)
            return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        logp = (logits / temperature).log_softmax(-1)
        cdf = logp.double().exp().cumsum(-1)
        # right=True: an id of probability 0 has an empty interval and is never chosen.
        chosen = torch.searchsorted(cdf, (noise * cdf[:, -1])[:, None], right=True)[:, 0]
        chosen = chosen.clamp_max(logits.shape[-1] - 1)
        return chosen, logp.gather(-1, chosen[:, None])[:, 0]

    def _collect(self, prompts, tokens, logp, sampling: Sampling, policy_version: int) -> list[list[Rollout]]:
        tokens, logp = tokens.cpu(), logp.cpu()
        groups = []
        for row, prompt in enumerate(prompts):
            group = []
            for index in range(sampling.n):
                place = row * sampling.n + index
                length = int((tokens[place] >= 0).sum())
                ids = tokens[place, :length].clone()
                group.append(
                    Rollout(
                        question_id=prompt.question.id,
                        index=index,
                        token_ids=ids,
                        text=self.builder.decode_response(ids),
                        logp=logp[place, :length].clone(),
                        truncated=int(ids[-1]) != self.builder.eos_id,
                        policy_version=policy_version,
                    )
                )
            groups.append(group)
        return groups
