"""Read an engine's saved states for another number of ranks or another ZeRO stage than they were saved with.

Master weights and moments are ranges of one vector: the trained parameters, flattened and laid end to end in the order
of `engine.json`. ZeRO-0 holds all of it on every rank. ZeRO-1 and ZeRO-2 pad it and give each rank an equal range.
ZeRO-3 pads each parameter and gives each rank an equal part of every parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rmsd_fast.config import CheckpointError
from rmsd_fast.data.errors import counted
from rmsd_fast.files import read_tensors


class Piece(NamedTuple):
    """`length` elements at `start` of the vector, and at `local` of one rank's tensors laid end to end."""

    start: int
    local: int
    length: int


def pieces(numels: Sequence[int], zero_stage: int, ranks: int, rank: int, held: int) -> list[Piece]:
    """Return the pieces of the vector that one rank holds.

    Args:
        numels: number of elements of each trained parameter.
        zero_stage: 0 to 3.
        ranks: number of ranks.
        rank: the rank.
        held: number of elements of the rank's tensors, with padding.
    """
    if zero_stage == 0:
        return [Piece(0, 0, sum(numels))]
    if zero_stage < 3:
        start = rank * held
        length = min(held, sum(numels) - start)
        return [Piece(start, 0, length)] if length > 0 else []
    found, start, local = [], 0, 0
    for numel in numels:
        part = part_size(numel, ranks)
        length = min(part, numel - rank * part)
        if length > 0:
            found.append(Piece(start + rank * part, local, length))
        start, local = start + numel, local + part
    return found


def part_size(numel: int, ranks: int) -> int:
    """Return the number of elements, with padding, that each rank holds of a parameter under ZeRO-3."""
    return -(-numel // ranks)


class SavedEngine:
    """The files of `Engine.save`. Their tensors are mapped into memory and read only where they are needed.

    Args:
        folder: folder of the engine in a checkpoint.
        zero_stage: ZeRO stage that it was saved with.
        ranks: number of ranks that it was saved with.
        numels: number of elements of each trained parameter, in the order of `engine.json`.
    Raises:
        CheckpointError: the files do not hold exactly these parameters.
    """

    def __init__(self, folder: Path, zero_stage: int, ranks: int, numels: Sequence[int]) -> None:
        self.folder, self.zero_stage, self.numels = folder, zero_stage, numels
        self.ranks = ranks if zero_stage else 1
        self.parts = [read_tensors(folder / f"rank_{rank:05d}.safetensors") for rank in range(self.ranks)]
        self.whole = read_tensors(folder / "weights.safetensors") if zero_stage != 3 else {}
        self.masters = [_numbered(part, "master") for part in self.parts]
        self.pieces = [
            pieces(numels, zero_stage, self.ranks, rank, sum(map(torch.numel, masters)))
            for rank, masters in enumerate(self.masters)
        ]
        for masters, held in zip(self.masters, self.pieces, strict=True):
            room = sum(map(torch.numel, masters))
            if any(piece.local + piece.length > room for piece in held):
                raise self._other_parameters()
        if sum(piece.length for held in self.pieces for piece in held) != sum(numels):
            raise self._other_parameters()

    def _other_parameters(self) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: expected states of {sum(self.numels):,} trained elements in the files of {self.ranks} "
            "ranks, got a different number; restore the checkpoint, or start a run from the exported model"
        )

    def weight(self, name: str, start: int, length: int) -> Tensor:
        """Return the elements `start` to `start + length` of a flattened weight."""
        # Only the last rank's part has padding under ZeRO-3, and it is at its end.
        parts = [part[f"weight.{name}"] for part in self.parts] if self.zero_stage == 3 else [self.whole[name]]
        return torch.cat([*_views(parts, start, length)]) if length else parts[0].new_empty(0)

    def buffer(self, name: str) -> Tensor:
        """Return a buffer, which every rank has saved whole."""
        return self.parts[0][f"weight.{name}"] if self.zero_stage == 3 else self.whole[name]

    def part(self, masters: Sequence[Tensor], zero_stage: int, ranks: int, rank: int) -> dict[str, Tensor]:
        """Return what `Engine.save` writes to one rank's file, for any ZeRO stage and number of ranks.

        Args:
            masters: float32 tensors that the rank's optimizer updates.
            zero_stage: ZeRO stage of the rank's engine.
            ranks: number of ranks.
            rank: the rank.
        Raises:
            CheckpointError: the optimizer's states cannot be divided among other ranks.
        """
        if zero_stage == self.zero_stage and (zero_stage == 0 or ranks == self.ranks):
            return self.parts[rank if zero_stage else 0]
        return self.states(masters, pieces(self.numels, zero_stage, ranks, rank, sum(map(torch.numel, masters))))

    def states(self, masters: Sequence[Tensor], held: Sequence[Piece]) -> dict[str, Tensor]:
        """Return master weights and AdamW's states under the names, and in the shapes, of `Engine.save`.

        Args:
            masters: float32 tensors that the new rank's optimizer updates.
            held: pieces of the vector in these tensors.
        Raises:
            CheckpointError: the optimizer has states that do not have one number for each element.
        """
        found = {f"master.{i}": value for i, value in enumerate(self._spread(self.masters, masters, held))}
        kinds = {key.split(".", 2)[2] for part in self.parts for key in part if key.startswith("state.")}
        for kind in sorted(kinds):
            sources = [_states_of(part, kind, masters) for part, masters in zip(self.parts, self.masters, strict=True)]
            if kind == "step":
                # Parameters without gradients have fewer steps, which ZeRO 1 to 3 do not distinguish either.
                steps = torch.stack([step for source in sources for step in source if step is not None]).max()
                values = [steps.clone() for _ in masters]
            else:
                values = self._spread(
                    [self._complete(source, kind, i) for i, source in enumerate(sources)], masters, held
                )
            found |= {f"state.{i}.{kind}": value for i, value in enumerate(values)}
        return found

    def _complete(self, source: list[Tensor | None], kind: str, rank: int) -> list[Tensor]:
        """Return the states of a rank's tensors, with zeros for parameters that have had no gradients."""
        complete = []
        for state, master in zip(source, self.masters[rank], strict=True):
            if state is None:
                state = master.new_zeros(()).expand(master.shape)
            elif state.shape != master.shape:
                raise CheckpointError(
                    f"{self.folder}: {kind}: expected optimizer states with one number for each weight, got "
                    f"{tuple(state.shape)} for {tuple(master.shape)}, which cannot be redistributed "
                    f"(runtime.optimizer=adamw_8bit); resume with {counted(self.ranks, 'process', 'processes')} and "
                    f"runtime.zero_stage={self.zero_stage}"
                )
            complete.append(state)
        return complete

    def _spread(
        self, sources: Sequence[list[Tensor]], masters: Sequence[Tensor], held: Sequence[Piece]
    ) -> list[Tensor]:
        """Return tensors with the shapes of `masters`, filled from the ranks' tensors; padding is 0."""
        filled = [torch.zeros(master.shape, dtype=torch.float32) for master in masters]
        for into in held:
            for source, saved in zip(sources, self.pieces, strict=True):
                for piece in saved:
                    first = max(into.start, piece.start)
                    length = min(into.start + into.length, piece.start + piece.length) - first
                    if length > 0:
                        _copy(
                            source, piece.local + first - piece.start, filled, into.local + first - into.start, length
                        )
        return filled


def _numbered(part: dict[str, Tensor], kind: str) -> list[Tensor]:
    """Return the tensors `kind.0`, `kind.1`, … of a file."""
    return [part[f"{kind}.{i}"] for i in range(sum(key.startswith(f"{kind}.") for key in part))]


def _states_of(part: dict[str, Tensor], kind: str, masters: Sequence[Tensor]) -> list[Tensor | None]:
    return [part.get(f"state.{i}.{kind}") for i in range(len(masters))]


def _copy(source: Sequence[Tensor], start: int, target: Sequence[Tensor], at: int, length: int) -> None:
    """Copy `length` elements between two lists of tensors, each laid end to end."""
    values = list(_views(source, start, length))
    for view in _views(target, at, length):
        done = 0
        while done < len(view):
            taken = values[0][: len(view) - done]
            view[done : done + len(taken)].copy_(taken)
            done += len(taken)
            values[0] = values[0][len(taken) :]
            if not len(values[0]):
                values.pop(0)


def _views(tensors: Sequence[Tensor], start: int, length: int) -> Iterator[Tensor]:
    """Yield one-dimensional views of the elements `start` to `start + length` of tensors laid end to end."""
    for tensor in tensors:
        if start < tensor.numel() and length > 0:
            view = tensor.reshape(-1)[start : start + length]
            yield view
            length -= len(view)
        start = max(0, start - tensor.numel())
