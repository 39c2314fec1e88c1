"""Media back end on CPU: the compiled ops of csrc/ on uint8 frames of any strides, 1 to 4 channels.

The resize equals torch.nn.functional.interpolate on uint8 bit for bit. A frame is read once and its result is written
once; between them stand the rows that an output row needs, a few hundred KB per thread. Groups of frames are spread
over torch's threads; a single frame is one thread's. Nothing is differentiable here.

Raises (all functions):
    RuntimeError: the library is not there (see native.why_not), or a shape or dtype is not what the op takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native


def resize_frames_(out: Tensor, frames: Tensor) -> None:
    """out [F, C, height, width], uint8 and contiguous, becomes frames [F, C, H, W] resized."""
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
    """Patches of frames; mean and std [C] are float32 in units of pixels, on CPU."""
    return _ops().video_patches(frames, height, width, patch_size, temporal_patch_size, merge_size, mean, std, dtype)


def _ops():
    if not native.available():
        raise RuntimeError(f"native_video: native ops are not available: {native.why_not()}")
    return torch.ops.rmsd_kernels
