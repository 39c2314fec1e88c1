"""A moving average of the weights that an engine trains, in float32 and split over the ranks like its master weights.

At a learning rate of 1e-6 and a rate of 0.01, an average in bfloat16 would hardly move, because most of its updates are
smaller than half of the distance between two bfloat16 numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from rmsd_fast.files import write_tensors
from rmsd_fast.runtime.engine import Engine


class MovingAverage:
    """The average, which starts as the weights of the engine.

    Args:
        engine: the engine.
        rate: share of the engine's weights that an update adds, in (0, 1].
    """

    def __init__(self, engine: Engine, rate: float) -> None:
        self.engine, self.rate = engine, rate
        # Tensors of this rank, like the engine's master weights.
        self.values = [master.detach().clone() for master in engine.masters()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the share `rate` of the engine's current weights: average += rate * (weights - average)."""
        torch._foreach_lerp_(self.values, [master.detach() for master in self.engine.masters()], self.rate)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the engine's model compute with the average inside the context, rounded to the model's dtype.

        All ranks must enter and leave together. Do not call `backward` or `step` inside. The engine's own weights are
        untouched: its parameters refer to other memory meanwhile. Under ZeRO-3, all ranks hold all weights inside.
        """
        engine = self.engine
        trained = dict(engine.module.named_parameters())
        params = [trained[name] for name in engine.names]
        # What this rank holds of each parameter.
        held = [param.ds_tensor for param in params] if engine.zero_stage == 3 else params
        current = [shard.data for shard in held]
        with engine.replaced_parts():
            values, start = self._held_values(current[0]), 0
            for shard in held:
                numel = shard.numel()
                shard.data = values[start : start + numel].view(shard.shape)
                start += numel
            try:
                with engine.full_weights():
                    yield
            finally:
                for shard, data in zip(held, current, strict=True):
                    shard.data = data

    def _held_values(self, like: Tensor) -> Tensor:
        """Return the values of what this rank holds of each parameter, one after the other, in dtype and on the device
        of `like`."""
        part = like.new_empty(sum(value.numel() for value in self.values))
        # Converting one value after the other needs no second copy of all values.
        for slot, value in zip(part.split([value.numel() for value in self.values]), self.values, strict=True):
            slot.copy_(value.flatten())
        engine = self.engine
        if engine.zero_stage in (0, 3) or engine.world.size == 1:
            return part
        # Padding is at the end of the last rank's part.
        whole = part.new_empty(len(part) * engine.world.size)
        dist.all_gather_into_tensor(whole, part)
        return whole

    def save(self, folder: Path) -> None:
        """Write this rank's part, without a collective. The files are those of `Engine.save`, without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        engine = self.engine
        if engine.world.is_main:
            (folder / "engine.json").write_text(json.dumps(engine.layout(), indent=1) + "\n", encoding="utf-8")
            write_tensors(folder / "weights.safetensors", {})
        if engine.world.is_main or engine.zero_stage > 0:
            write_tensors(folder / engine.part_name(), {f"master.{i}": value for i, value in enumerate(self.values)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Restore what `save` has written, also with another number of ranks or another ZeRO stage.

        Raises:
            CheckpointError: it belongs to another model.
        """
        engine = self.engine
        stored = engine.saved_states(folder)
        part = stored.part(self.values, engine.zero_stage, engine.world.size, engine.world.rank)
        for i, value in enumerate(self.values):
            value.copy_(part[f"master.{i}"])

    def close(self) -> None:
        """Free the average."""
        self.values = []
