"""Provide frames for the tests of the media functions."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(*shape: int, extreme: bool = False) -> Tensor:
    """Return uint8 noise that depends only on the shape; `extreme` uses only the values 0 and 255."""
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))
    return (frames > 127).to(torch.uint8) * 255 if extreme else frames


def smooth_frames(count: int, height: int, width: int) -> Tensor:
    """Return uint8 [F, 3, H, W] with soft and hard edges and a little noise, like camera pictures."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    frames = []
    for f in range(count):
        waves = 128 + 80 * torch.sin(9 * x + f) * torch.cos(7 * y - f)
        disc = ((x - 0.3 - 0.05 * f) ** 2 + (y - 0.5) ** 2 < 0.04) * 60.0
        frames.append(torch.stack([waves + disc, waves - disc, 255 - waves]))
    clip = torch.stack(frames)
    return (clip + 2 * torch.randn(clip.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)
