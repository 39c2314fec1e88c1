"""Convert video frames to the patches of a vision tower: bicubic antialiased resize, normalization and patch order.

    x = clamp(round(W_y round(W_x frame)), 0, 255)      uint8, torch's resize of uint8 on CPU
    v = (x - 255 mean) / (255 std)                      float32, rounded once to the result's dtype
    patches[(t, h, w, mh, mw), (c, tp, py, px)]         t: pairs of frames; h, w: blocks of merge x merge patches

W_x and W_y are cubic weights (a = -0.5), stretched by the downscaling factor. On CUDA, the resize is in floating point,
as in HF's processors on CUDA, and values are not rounded between the axes. On real clips, 85-89% of the CPU and CUDA
values agree, and no value differs by more than 3 levels.

Bytes moved: F C H W read and N C tp patch^2 itemsize written (64 frames of 720p to 832 x 448, float32: 177 + 286 MB).
The resized clip is never stored in memory; torch's own operations would write and read 286 MB three times.

Source: the processors of Qwen2.5-VL (patch 14) and Qwen3-VL (patch 16); Pillow's resize.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from ..implementations import resolve_impl

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IMPLEMENTATIONS = ("auto", "triton", "native", "torch")
MAX_CHANNELS = 4
MAX_PATCH = 64


def video_patches(
    frames: Tensor,
    *,
    height: int,
    width: int,
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Resize frames to (height, width), normalize them, and return their patches in the order of pixel_values_videos.

    The result has no gradient.

    Args:
        frames: video frames, [F, C, H, W] with C in 1..4, uint8, any strides. If the last group of temporal_patch_size
            frames is incomplete, as for a single image, its last frame is repeated.
        height: height after the resize, a multiple of patch_size * merge_size.
        width: width after the resize, a multiple of patch_size * merge_size. Frames of the final size are not resized.
        patch_size: height and width of a patch, in 1..64.
        temporal_patch_size: number of frames in a patch, >= 1.
        merge_size: the patches are ordered in blocks of merge_size x merge_size, >= 1.
        mean: mean of each channel, [C], on the scale 0..1.
        std: standard deviation of each channel, [C], on the scale 0..1, > 0.
        dtype: dtype of the result, float32, bfloat16 or float16. The arithmetic is float32.
        impl: "native", "triton", "torch", or "auto": Triton on CUDA, and on CPU the compiled op, or torch if the op was
            not built.
    Returns:
        Patches, [ceil(F / temporal) * height/patch * width/patch, C * temporal * patch * patch], on the device of
        frames.
    Raises:
        ValueError: a shape or a number is out of range.
        TypeError: frames are not uint8, or dtype is not supported.
        RuntimeError: the implementation does not support the call.
    """
    _check_frames(frames, height, width, impl)
    for name, value in (("temporal_patch_size", temporal_patch_size), ("merge_size", merge_size)):
        checks.check_count(name, value)
    checks.check_count("patch_size", patch_size, MAX_PATCH)
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(
            f"height and width: expected multiples of {factor} (patch_size * merge_size), got {height} and {width}; "
            "round them with smart_resize"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    mean_C, std_C = (_per_channel(name, v, frames) for name, v in (("mean", mean), ("std", std)))
    sizes = (height, width, patch_size, temporal_patch_size, merge_size)
    return _form(impl, frames).video_patches(frames, *sizes, mean_C, std_C, dtype)


def resize_frames(frames: Tensor, *, height: int, width: int, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Resize frames with bicubic antialiased interpolation, rounded to uint8. The result has no gradient.

    Args:
        frames: video frames, [F, C, H, W] with C in 1..4, uint8, any strides.
        height: height after the resize, >= 1.
        width: width after the resize, >= 1.
        out: tensor to write and return, [F, C, height, width], uint8, contiguous, for example a slice of a memory map.
            It must not overlap with frames. None allocates a new tensor.
        impl: as in `video_patches`.
    Returns:
        The resized frames, [F, C, height, width], uint8, contiguous.
    Raises:
        ValueError: a shape or a number is out of range.
        TypeError: frames or out are not uint8.
        RuntimeError: the implementation does not support the call.
    """
    _check_frames(frames, height, width, impl)
    shape = (*frames.shape[:2], height, width)
    if out is None:
        out = torch.empty(shape, dtype=torch.uint8, device=frames.device)
    checks.check_tensor("out", out)
    if out.dtype != torch.uint8:
        raise TypeError(f"out: expected uint8, got {out.dtype}")
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"out: expected shape {list(shape)}, contiguous, got {list(out.shape)} with strides {out.stride()}"
        )
    checks.check_device("out", out, frames)
    if (height, width) == tuple(frames.shape[2:]):
        return out.copy_(frames)
    _form(impl, frames).resize_frames_(out, frames)
    return out


def resize_in_float(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 frames in floating point, like HF's processors on CUDA. Works on any device."""
    if (height, width) == tuple(frames.shape[2:]):
        return frames
    resized = F.interpolate(frames.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


class TorchForm:
    """Implementation with torch operations, on any device; the reference for the other implementations."""

    @staticmethod
    def resized(frames: Tensor, height: int, width: int) -> Tensor:
        if frames.device.type != "cpu":
            return resize_in_float(frames, height, width)
        if (height, width) == tuple(frames.shape[2:]):
            return frames
        if frames.shape[3] == 1 or height * width == 1:
            # torch 2.13 misinterprets the memory format of some one-pixel axes, and then reads out of bounds or raises.
            # A new channels-last copy is safe.
            rows = frames.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
            frames = rows.permute(0, 3, 1, 2)
        return F.interpolate(frames, size=(height, width), mode="bicubic", antialias=True, align_corners=False)

    @classmethod
    def resize_frames_(cls, out: Tensor, frames: Tensor) -> None:
        out.copy_(cls.resized(frames, *out.shape[2:]))

    @classmethod
    def video_patches(
        cls,
        frames: Tensor,
        height: int,
        width: int,
        patch: int,
        span: int,
        merge: int,
        mean: Tensor,
        std: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        return cut_patches(cls.resized(frames, height, width), patch, span, merge, mean, std, dtype)


def cut_patches(
    frames: Tensor, patch: int, span: int, merge: int, mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return the patches of frames of the final size. mean and std [C] are on the scale 0..255."""
    if missing := -frames.shape[0] % span:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    count, channels, height, width = frames.shape
    values = frames.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)).to(dtype)
    rows, columns = height // (merge * patch), width // (merge * patch)
    grid = values.reshape(count // span, span, channels, rows, merge, patch, columns, merge, patch)
    return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * span * patch * patch)


def _form(impl: str, frames: Tensor):
    resolved = resolve_impl(impl, frames, triton_dtypes=(torch.uint8,), native_dtypes=(torch.uint8,))
    if resolved == "torch":
        return TorchForm
    module = {"native": "native_patches", "triton": "triton_patches"}[resolved]
    return importlib.import_module(f".{module}", __package__)


def _check_frames(frames: Tensor, height: int, width: int, impl: str) -> None:
    checks.check_choice("impl", impl, IMPLEMENTATIONS)
    checks.check_frames("frames", frames, MAX_CHANNELS)
    checks.check_count("height", height)
    checks.check_count("width", width)


def _per_channel(name: str, values: Sequence[float], frames: Tensor) -> Tensor:
    """Return 255 * values as float32 [C], rounded as in HF's processors."""
    if len(values) != frames.shape[1]:
        raise ValueError(f"{name}: expected {frames.shape[1]} numbers, one per channel of frames, got {len(values)}")
    for value in values:
        checks.check_number(name, value, above=0.0 if name == "std" else None)
    # Compute these values on the CPU; copying a few bytes to a GPU does not wait for the device.
    return torch.tensor(values, dtype=torch.float32).mul(255).to(frames.device, non_blocking=True)
