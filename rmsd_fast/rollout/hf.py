"""Generate rollouts with transformers in the training process, on shared prefixes.

The prompts of a batch are prefilled in packed rows of limited length. Their K/V are stored once, and all N responses of
a prompt read them. With `share_media`, the beginnings of prompts about the same media are prefilled and stored once as
well. decode.py samples the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from rmsd_fast.data.packing import media_places
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.transfer import to_device
from rmsd_fast.models.shared_prefix import run_shared_prefix, shared_prefix_enabled
from rmsd_fast.models.students import MediaFeatures, embed, encode_media
from rmsd_fast.rollout.base import PolicyEngine, Rollout, Sampling, sampling_noise
from rmsd_fast.rollout.decode import LOOK_EVERY, Decoder, Graphs
from rmsd_fast.rollout.media_prefix import SharedBeginnings, shared_beginnings, whole_prompts
from rmsd_fast.rollout.shared_cache import DecodeCache, PrefixCache, join_caches


class Decoded(NamedTuple):
    """The responses of a batch, S = B*N rows of up to R tokens; see `Decoder`."""

    tokens: torch.Tensor
    logp: torch.Tensor
    banned_mass: torch.Tensor


class HfRollout:
    """Generate rollouts with the model that is being trained. Under ZeRO-3, call it inside `Engine.full_weights`.

    Args:
        builder: builder of the prompts, which also decodes responses.
        prompts_per_batch: number of questions that are decoded together.
        device: device of the model.
        cuda_graphs: whether decoding is captured in CUDA graphs. It has no effect on other devices.
        share_media: whether prompts of a batch whose tokens and media are equal up to the end of their media share this
            beginning. Logits change by rounding only.
        tokens_per_call: maximum number of vision tokens in a call of the vision tower, see `encode_media`, and of
            tokens in a pass of the prefill, which has at least one prompt, or one beginning with all prompts that share
            it. None means no limit.
        look_every: number of tokens between two looks at which rows have ended; None means LOOK_EVERY of the device.
            The sampled tokens do not depend on it.
    """

    runs_policy = True

    def __init__(
        self,
        builder: PromptBuilder,
        *,
        prompts_per_batch: int,
        device: torch.device,
        cuda_graphs: bool = True,
        share_media: bool = False,
        tokens_per_call: int | None = None,
        look_every: int | None = None,
    ):
        self.builder = builder
        self.prompts_per_batch = prompts_per_batch
        self.device = device
        self.cuda_graphs = cuda_graphs and device.type == "cuda"
        self.share_media = share_media
        self.tokens_per_call = tokens_per_call
        self.look_every = look_every or LOOK_EVERY[device.type]
        self.banned_ids = builder.banned_ids.to(device)

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Do nothing: the rollouts are those of the training model itself."""

    def encode(self, model: torch.nn.Module, prompts: list[Prompt]) -> MediaFeatures:
        """Return the vision features of prompts, for several calls of `generate`."""
        return encode_shown(model, prompts, tokens_per_call=self.tokens_per_call)

    def close(self) -> None:
        """Do nothing: this engine uses no server."""

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
        rollouts = []
        with _generating(model):
            for start in range(0, len(prompts), self.prompts_per_batch):
                batch = prompts[start : start + self.prompts_per_batch]
                if features is None:
                    encoded = encode_media(model, batch, tokens_per_call=self.tokens_per_call)
                else:
                    encoded = features.select(range(start, start + len(batch)))
                beginnings = shared_beginnings(batch, encoded) if self.share_media else None
                order = range(len(batch)) if beginnings is None else beginnings.order
                if beginnings is not None:
                    # Prompts with the same beginning must be adjacent.
                    batch, encoded = [batch[index] for index in order], encoded.select(order)
                decoded = self._decode(model, batch, encoded, sampling)
                groups = self._collect(batch, decoded, sampling, policy_version)
                rollouts += [group for _, group in sorted(zip(order, groups, strict=True), key=itemgetter(0))]
        return rollouts

    def _decode(self, model, prompts: list[Prompt], features: MediaFeatures, sampling: Sampling) -> Decoded:
        """Return all responses. Nothing else of the batch stays alive, so that the next batch can use its memory."""
        prefix, hidden = self._prefill(model, prompts, features)
        positions = torch.tensor([p.next_position for p in prompts], device=self.device)
        noise = np.stack([sampling_noise(sampling, p.question.id, i) for p in prompts for i in range(sampling.n)])
        decoder = Decoder(
            model,
            DecodeCache(prefix, [sampling.n] * len(prompts)),
            positions.repeat_interleave(sampling.n),
            torch.from_numpy(noise).to(self.device),
            temperature=sampling.temperature,
            banned_ids=self.banned_ids,
            eos_id=self.builder.eos_id,
        )
        graphs = Graphs(self.device) if self.cuda_graphs else None
        first = (t.repeat_interleave(sampling.n, 0) for t in (hidden, model.lm_head(hidden)))
        decoder.run(*first, look_every=self.look_every, graphs=graphs)
        if graphs is not None:
            graphs.close()
        return Decoded(decoder.tokens, decoder.logp, decoder.banned_mass)

    def _prefill(self, model, prompts: list[Prompt], features: MediaFeatures) -> tuple[PrefixCache, torch.Tensor]:
        """Return the K/V of the prompts and their last hidden states, [B, D].

        With `share_media`, prompts with the same beginning must be adjacent.
        """
        shared = shared_beginnings(prompts, features) if self.share_media else None
        beginnings = whole_prompts(prompts) if shared is None else shared
        passes = [self._prefill_part(model, prompts, features, part) for part in beginnings.split(self.tokens_per_call)]
        caches, hidden = zip(*passes, strict=True)
        return join_caches(caches), torch.cat(hidden)

    def _prefill_part(
        self, model, prompts: list[Prompt], features: MediaFeatures, part: SharedBeginnings
    ) -> tuple[PrefixCache, torch.Tensor]:
        """Run one forward pass over some of the prompts. Only the result stays alive."""
        cache = PrefixCache(part.lengths, part.suffixes, device=self.device)
        row = _packed_row(prompts, part)
        first = [group[0] for group in part.groups]
        input_ids, position_ids, places, last = to_device(row, self.device)
        hidden = run_shared_prefix(
            model.model.language_model,
            cache,
            position_ids=position_ids,
            **embed(model, input_ids, features, first, places),
        )
        return cache, hidden[0, last]

    def _collect(
        self, prompts: list[Prompt], decoded: Decoded, sampling: Sampling, policy_version: int
    ) -> list[list[Rollout]]:
        tokens, logp, banned_mass = (tensor.cpu() for tensor in decoded)
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
                        banned_mass=float(banned_mass[number, :length].mean()),
                    )
                )
            groups.append(group)
        return groups


@torch.no_grad()
def encode_shown(model: torch.nn.Module, prompts: list[Prompt], *, tokens_per_call: int | None) -> MediaFeatures:
    """Return the vision features of prompts to answer, computed as in `HfRollout`; see `encode_media`."""
    with _generating(model):
        return encode_media(model, prompts, tokens_per_call=tokens_per_call)


@contextmanager
def _generating(model: torch.nn.Module) -> Iterator[None]:
    """Enable eval mode and shared prefixes inside the context."""
    was_training = model.training
    model.eval()
    try:
        with shared_prefix_enabled(model):
            yield
    finally:
        model.train(was_training)


def _packed_row(prompts: list[Prompt], beginnings: SharedBeginnings) -> list[torch.Tensor]:
    """Return ids [1, T], positions [3, 1, T], places of the media, and the rows of the prompts' last tokens, [B].

    The row has the beginnings, followed by what follows them, group by group. A beginning may be a whole prompt.
    """
    pairs = list(zip(beginnings.groups, beginnings.lengths, strict=True))
    heads = [(prompts[group[0]], slice(0, length)) for group, length in pairs]
    tails = [(prompts[index], slice(length, None)) for group, length in pairs for index in group]
    starts = [0, *accumulate(beginnings.lengths)]
    if beginnings.suffixes is None:
        last = starts[1:]
    else:
        last = list(accumulate((length for group in beginnings.suffixes for length in group), initial=starts[-1]))[1:]
    return [
        torch.cat([prompt.input_ids[tokens] for prompt, tokens in heads + tails])[None],
        torch.cat([prompt.position_ids[:, tokens] for prompt, tokens in heads + tails], 1)[:, None],
        media_places([prompt for prompt, _ in heads], starts[:-1]),
        torch.tensor(last) - 1,
    ]
