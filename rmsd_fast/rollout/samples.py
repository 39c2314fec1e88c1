"""What goes to an engine with its own copy of the language model, and what comes back: requests and completions.

A request has the trainer's token ids, positions and vision features, so that an engine decodes no media and expands no
prompt. It can therefore run in the training process or in another one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import Rollout, Sampling


def advice(section: str = "rollout", *, remedy: str = "") -> str:
    """Return what to do about a fault of an engine that `<section>.engine` has chosen.

    `remedy` is a setting that avoids the fault; "" = `<section>.engine=hf`.
    """
    versions = "the versions in run.json" if section == "rollout" else "the installed versions"
    return f"set {remedy or f'{section}.engine=hf'}, and report this with {versions}"


@dataclass(frozen=True)
class Medium:
    """One video or image of a request.

    Attributes:
        kind: "video" or "image".
        grid_thw: patches along time, height and width.
        start, end: its first place in the prompt, and its last place + 1.
        layers: its vision features, followed by those of each deepstack layer, each [tokens, D]; or one tensor with
            all of them side by side.
        key: name of the features. Equal keys have equal features.
    """

    kind: str
    grid_thw: tuple[int, int, int]
    start: int
    end: int
    layers: tuple[torch.Tensor, ...]
    key: str

    def embeds(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the features of all layers side by side, [tokens, layers * D]. A single tensor is not copied."""
        joined = self.layers[0] if len(self.layers) == 1 else torch.cat(self.layers, -1)
        return joined.to(dtype)


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        question_id: id of the question, for messages.
        input_ids: int64 [P].
        mm_token_type_ids: int64 [P]: 0 text, 1 image, 2 video.
        position_ids: int64 [3, P].
        media: its media, in the order of their places.
        seed: seed of the first response. The others have the following numbers.
        salt: prefixes are shared only between requests with the same salt.
    """

    question_id: str
    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    media: tuple[Medium, ...]
    seed: int
    salt: str

    @property
    def next_position(self) -> int:
        """The position of the first response token."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: int64 [R]; at least one.
        logp: log-probs of these ids over the whole vocabulary, float32 [R].
        banned_mass: probability of the ids that must not be sampled, mean over the tokens.
    """

    token_ids: torch.Tensor
    logp: torch.Tensor
    banned_mass: float


class Sampler(Protocol):
    """A copy of the language model that samples.

    Attributes:
        dtype: dtype of its weights.
    """

    dtype: torch.dtype

    def load(self, weights: Iterator[tuple[str, torch.Tensor]], names: list[str]) -> None:
        """Take over weights, by their names in transformers. All ranks call this together.

        Args:
            weights: names and values in `dtype`. A value is valid until the next one is asked for.
            names: the names that `weights` yields.
        Raises:
            RolloutError: not exactly these weights were taken.
        """

    def commit(self) -> dict[str, int]:
        """Forget what was computed with earlier weights, and return the sums of `bit_sum` of each group of weights."""

    def sample(self, requests: list[tuple[Request, Sampling]]) -> list[list[Completion]]:
        """Return the completions of each request, `n` of its sampling, in order.

        Raises:
            RolloutError: a request is too long or was read differently, or a completion is empty or incomplete.
        """

    def close(self) -> None:
        """Tell servers that the run has ended."""


def make_request(
    prompt: Prompt, index: int, features: MediaFeatures, sampling: Sampling, *, salt: str, key: str
) -> Request:
    """Return the request of a prompt, without copying features.

    Args:
        prompt: the prompt.
        index: its index in `features`.
        features: vision features of all prompts.
        sampling: sampling parameters.
        salt: see `Request`.
        key: start of the keys of the media.
    """
    media = []
    for medium, frames, (start, end) in zip(features.media_of(index), prompt.media, _media_spans(prompt), strict=True):
        layers = (features.pooled[medium], *(layer[medium] for layer in features.deepstack))
        # Questions about one video share its features, which are then the same tensor.
        name = f"{key}-{layers[0].data_ptr()}-{len(layers[0])}"
        media.append(Medium(frames.kind, tuple(frames.grid_thw), start, end, layers, name))
    return Request(
        prompt.question.id,
        prompt.input_ids,
        prompt.mm_token_type_ids,
        prompt.position_ids,
        tuple(media),
        request_seed(sampling, prompt.question.id),
        salt,
    )


def rollouts_of(
    prompt: Prompt, completions: Iterable[Completion], builder: PromptBuilder, policy_version: int
) -> list[Rollout]:
    """Return the rollouts of a prompt."""
    return [
        Rollout(
            question_id=prompt.question.id,
            index=index,
            token_ids=completion.token_ids,
            text=builder.decode_response(completion.token_ids),
            logp=completion.logp,
            # Where the logits are not finite, the mask has chosen the end token.
            truncated=int(completion.token_ids[-1]) != builder.eos_id,
            policy_version=policy_version,
            banned_mass=completion.banned_mass,
        )
        for index, completion in enumerate(completions)
    ]


def request_seed(sampling: Sampling, question_id: str) -> int:
    """Return the seed of a question's first rollout. The others have the following numbers."""
    name = f"{sampling.seed}/{sampling.step}/{question_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 2


def _media_spans(prompt: Prompt) -> Iterator[tuple[int, int]]:
    """Yield the first and the last place + 1 of each medium in the prompt.

    vLLM looks for the `<|vision_start|>` of a video's first frame, so that belongs to the video.
    """
    places = prompt.mm_token_type_ids.nonzero()[:, 0].tolist()
    done = 0
    for frames in prompt.media:
        tokens = math.prod(frames.grid_thw) // frames.preprocessor.merge_size**2
        yield places[done] - (frames.kind == "video"), places[done + tokens - 1] + 1
        done += tokens
