"""Media back end on CPU: the compiled ops of csrc/ on uint8 frames of any strides, 1 to 4 channels.

The resize is bit-identical to torch.nn.functional.interpolate on uint8. Each frame is read once and its result is
written once. In between, a thread buffers only the rows that an output row needs, a few hundred KB. Groups of frames
are distributed over torch's threads; one thread processes a single frame. Nothing here is differentiable.

Raises (all functions):
    RuntimeError: the library is not available (see native.why_not), or the op does not support a shape or dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def resize_frames_(out: Tensor, frames: Tensor) -> None:
    """Write frames [F, C, H, W], resized, to out [F, C, height, width], uint8 and contiguous."""
    _ops().resize_frames_(out, frames)


def video_patches(
    frames: Tensor,
    height: int,
    width: int,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the patches of frames. mean and std [C] are float32 on CPU, on the scale 0..255."""
    return _ops().video_patches(frames, height, width, patch_size, temporal_patch_size, merge_size, mean, std, dtype)


def _ops():
    if not native.available():
        raise RuntimeError(f"native_patches: native ops are not available: {native.why_not()}")
    return torch.ops.rmsd_kernels
