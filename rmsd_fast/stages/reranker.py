"""Rank the sampled responses of an evaluation with an exported discriminator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rmsd_fast.config import ModelError, RunConfig
from rmsd_fast.data.micro_batches import plan_micro_batches
from rmsd_fast.data.packing import pack
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.cost import balance_weights
from rmsd_fast.models.discriminator import Discriminator
from rmsd_fast.models.discriminator_folder import load_discriminator
from rmsd_fast.models.folders import resolve_folder
from rmsd_fast.models.liger import use_liger
from rmsd_fast.models.shared_prefix import shared_prefix_enabled
from rmsd_fast.models.students import Student, encode_media
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages.build import prepare
from rmsd_fast.stages.groups import canonical_ids


class Reranker:
    """Score responses as the discriminator does in training.

    Args:
        discriminator: the discriminator, on the device of this process.
        micro_tokens: maximum number of tokens in a forward pass.
    """

    def __init__(self, discriminator: Discriminator, *, micro_tokens: int) -> None:
        self._discriminator, self._micro_tokens = discriminator, micro_tokens

    @torch.no_grad()
    def score(
        self, prompts: list[Prompt], rollouts: Sequence[Sequence[Rollout]], builder: PromptBuilder
    ) -> list[list[float | None]]:
        """Return the score of each response to each prompt; None if its logits were not finite.

        A prompt is computed once for all of its responses, unless they exceed `micro_tokens` together. Equal texts are
        scored once.

        Args:
            prompts: the prompts.
            rollouts: the responses to each prompt.
            builder: builder of the prompts.
        Raises:
            ModelError: a score is not finite.
        """
        distinct: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        places: list[list[int | None]] = []
        for index_of, drawn in zip(distinct, rollouts, strict=True):
            ids = [tuple(canonical_ids(rollout, builder).tolist()) if rollout.finite else None for rollout in drawn]
            places.append([None if key is None else index_of.setdefault(key, len(index_of)) for key in ids])
        scores = self._score(prompts, [[torch.tensor(ids) for ids in index_of] for index_of in distinct])
        return [
            [None if place is None else of_prompt[place] for place in places_of]
            for of_prompt, places_of in zip(scores, places, strict=True)
        ]

    def _score(self, prompts: list[Prompt], responses: list[list[torch.Tensor]]) -> list[list[float]]:
        model = self._discriminator.model
        device = self._discriminator.value_weight.device
        scores = [[0.0] * len(of_prompt) for of_prompt in responses]
        batches = plan_micro_batches(
            [len(prompt.input_ids) for prompt in prompts],
            [[len(ids) for ids in of_prompt] for of_prompt in responses],
            packing="shared",
            micro_tokens=self._micro_tokens,
            weights=balance_weights(model.config),
            ids=[prompt.question.id for prompt in prompts],
        )
        features = encode_media(model, prompts, tokens_per_call=self._micro_tokens) if batches else None
        with shared_prefix_enabled(model):
            for batch in batches:
                pairs = list(zip(batch.prompts, batch.responses, strict=True))
                rows = pack([prompts[i] for i in batch.prompts], [[responses[i][r] for r in of] for i, of in pairs])
                read = [prompts[i] for i in batch.prompts]
                values = self._discriminator(read, rows.to(device), features.select(batch.prompts)).tolist()
                for (i, r), value in zip(((i, r) for i, of in pairs for r in of), values, strict=True):
                    scores[i][r] = value
        for prompt, of_prompt in zip(prompts, scores, strict=True):
            if not all(map(_is_finite, of_prompt)):
                raise ModelError(
                    f"evaluate.reranker: expected finite scores, got {of_prompt} for question {prompt.question.id!r}; "
                    "set model.dtype=float32, or use the discriminator of another run"
                )
        return scores


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def load_reranker(student: Student, settings: RunConfig, world: World) -> Reranker:
    """Load the discriminator `evaluate.reranker` onto this process's device.

    Args:
        student: the student whose responses it ranks.
        settings: settings of the evaluation.
        world: this process in the run.
    Raises:
        ModelError: the folder does not hold a discriminator, or it reads other prompts than the student.
    """
    path = settings.evaluate.reranker
    discriminator, reader = load_discriminator(
        path,
        dtype=settings.model.dtype,
        attn_implementation=settings.model.attention,
        liger=use_liger(settings.model.liger, world.device),
    )
    _check_same_prompts(path, reader, student)
    prepare(reader, path, settings, world)
    discriminator.to(world.device)
    return Reranker(discriminator, micro_tokens=settings.micro_tokens)


def _check_same_prompts(path: str, reader: Student, student: Student) -> None:
    """Raise ModelError if the discriminator reads other token ids or pixels than the student."""
    for what, expected, got in (
        ("family", student.family.model_type, reader.family.model_type),
        ("vocabulary", student.tokenizer.get_vocab(), reader.tokenizer.get_vocab()),
        ("chat template", student.tokenizer.chat_template, reader.tokenizer.chat_template),
        ("preprocessor", student.preprocessor, reader.preprocessor),
    ):
        if expected != got:
            shown = f" ({expected}, not {got})" if what == "family" else ""
            raise ModelError(
                f"evaluate.reranker: expected a discriminator with the student's {what}, got another one in "
                f"{resolve_folder(path)}{shown}; use a discriminator that was trained from the same base model"
            )
