"""Copy small tensors to a device in one transfer. Each blocking copy makes the host wait until the device is idle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Tensors start at multiples of this many bytes, because kernels are recompiled for pointers not aligned to 16.
ALIGNMENT = 128


def to_device(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return copies of CPU tensors on a device, made by one transfer that does not block the host.

    Args:
        tensors: tensors on the CPU, of any shapes and dtypes, without a graph.
        device: device of the copies, which are views of one buffer.
    """
    device = torch.device(device)
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    staged = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for part, tensor in zip(_views(staged, starts, tensors), tensors, strict=True):
        part.copy_(tensor)
    # torch keeps the pinned buffer until the copy is complete.
    return _views(staged.to(device, non_blocking=True), starts, tensors)


def _views(buffer: Tensor, starts: list[int], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of a byte buffer with the shapes and dtypes of the tensors."""
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=True)
    ]
