"""Build the forward and backward passes of a step: micro-batches of prompts and responses, as rows on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rmsd_fast.config import SettingsError
from rmsd_fast.data.micro_batches import MicroBatch, plan_micro_batches
from rmsd_fast.data.packing import Rows, make_rows
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.cost import balance_weights
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.process_group import global_max
from rmsd_fast.stages.state import StageState


@dataclass(frozen=True)
class Pass:
    """The inputs of one forward and backward pass of a model.

    Attributes:
        prompts: prompts of the micro-batch.
        rows: the prompts with their responses, on this process's device.
        features: vision features of the prompts; None if each model encodes its own.
        batch: indices of these prompts and responses in the step.
        last: whether this is the last pass of its model in the step.
    """

    prompts: list[Prompt]
    rows: Rows
    features: MediaFeatures | None
    batch: MicroBatch
    last: bool

    @property
    def filler(self) -> bool:
        """Whether this pass only repeats another pass, so that all processes run the same number of passes."""
        return self.batch.filler

    @property
    def indices(self) -> list[tuple[int, int]]:
        """Index of the prompt in the step, and of the response among those of the prompt, in the order of the rows."""
        pairs = zip(self.batch.prompts, self.batch.responses, strict=True)
        return [(i, r) for i, chosen in pairs for r in chosen]

    def backward(self, engine: Engine, loss: torch.Tensor) -> None:
        """Add the gradients of this pass to the engine's. A filler adds zeros."""
        engine.backward(0.0 * loss if self.filler else loss, last=self.last)


def passes(
    state: StageState,
    prompts: list[Prompt],
    responses: list[list[torch.Tensor]],
    features: MediaFeatures | None,
    leads: list[list[torch.Tensor]] | None = None,
) -> Iterator[Pass]:
    """Yield the passes over the prompts with their responses, the same number on every process.

    Args:
        state: state of the stage.
        prompts: prompts of the step on this process.
        responses: token ids of each prompt's responses, int64 [R] each.
        features: vision features of the prompts; None if each model encodes its own.
        leads: tokens before each response that are read but not scored, int64 [H] each; None = none.
    Raises:
        SettingsError: on all processes, if a prompt with one response exceeds `micro_tokens` on any process.
    """
    lengths = [[len(ids) for ids in answers] for answers in responses]
    if leads is not None:
        pairs = zip(lengths, leads, strict=True)
        lengths = [[n + len(lead) for n, lead in zip(of, stems, strict=True)] for of, stems in pairs]
    batches = _plan(state, prompts, lengths)
    for number, batch in enumerate(batches):
        read = [prompts[i] for i in batch.prompts]
        chosen, stems = _chosen(responses, batch), None if leads is None else _chosen(leads, batch)
        rows = make_rows(state.settings.packing, read, chosen, stems, pad_id=state.builder.eos_id)
        rows = rows.to(state.world.device)
        selected = None if features is None else features.select(batch.prompts)
        yield Pass(read, rows, selected, batch, last=number == len(batches) - 1)


def _chosen(lists: list[list[torch.Tensor]], batch: MicroBatch) -> list[list[torch.Tensor]]:
    return [[lists[i][r] for r in places] for i, places in zip(batch.prompts, batch.responses, strict=True)]


def _plan(state: StageState, prompts: list[Prompt], lengths: list[list[int]]) -> list[MicroBatch]:
    """Return the micro-batches of this process. If planning fails, inform the other processes before raising."""
    agreed = False

    def agree(count: int) -> int:
        nonlocal agreed
        agreed = True
        most = global_max({"count": count, "fault": 0}, state.world)
        if most["fault"]:
            raise SettingsError("another process has a prompt that exceeds micro_tokens; see its message above")
        return int(most["count"])

    try:
        return plan_micro_batches(
            [len(prompt.input_ids) for prompt in prompts],
            lengths,
            packing=state.settings.packing,
            micro_tokens=state.settings.micro_tokens,
            weights=balance_weights(state.student.model.config),
            ids=[prompt.question.id for prompt in prompts],
            agree=agree,
        )
    except SettingsError:
        if not agreed:
            global_max({"count": 0, "fault": 1}, state.world)
        raise
