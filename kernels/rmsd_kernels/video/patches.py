"""Video frames to the patches of a vision tower: bicubic antialiased resize, normalisation and patch order in one pass.

    x = clamp(round(W_y round(W_x frame)), 0, 255)      uint8, the resize of torch's CPU route for uint8
    v = (x - 255 mean) / (255 std)                      float32, rounded once to the result's dtype
    patches[(t, h, w, mh, mw), (c, tp, py, px)]         t: pairs of frames; h, w: blocks of merge x merge patches

W_x and W_y are cubic weights (a = -0.5) stretched by the shrink. On CUDA the resize is that of the float route, what
HF's processors do there: no rounding between the axes. Of real clips 85-89% of the values are the same on both, none
further than 3 levels apart.

Bytes moved: F C H W read and N C tp patch^2 itemsize written (64 frames of 720p to 832 x 448, float32: 177 + 286 MB);
the resized clip is never in memory. torch's own operations write 286 MB three times on the way, and read them back.

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
    """Normalised patches of frames resized to (height, width), as `pixel_values_videos` has them. No gradient.

    Args:
        frames: uint8 [F, C, H, W] with C in 1..4, any strides. A last frame without a partner (and the one frame of an
            image) is repeated.
        height, width: multiples of patch_size * merge_size. Frames of that size are not resized.
        mean, std: of each channel, on the scale 0..1.
        dtype: of the result, float32, bfloat16 or float16; the arithmetic is float32.
        impl: "auto" (Triton on CUDA; on CPU the compiled op, or torch where it was not built), "native", "triton" or
            "torch".
    Returns:
        [ceil(F / temporal) * height/patch * width/patch, C * temporal * patch * patch] on the device of frames.
    Raises:
        TypeError: frames are not uint8, or dtype is another. ValueError: a shape or a number. RuntimeError: the asked
        implementation cannot run.
    """
    _check_frames(frames, height, width, impl)
    for name, value in (("temporal_patch_size", temporal_patch_size), ("merge_size", merge_size)):
        checks.check_count(name, value)
    checks.check_count("patch_size", patch_size, MAX_PATCH)
    factor = patch_size * merge_size
    if height % factor or width % factor:
        raise ValueError(
            f"height and width: expected multiples of {factor} (patch_size * merge_size), got {height} and {width}; "
            "round them as smart_resize does"
        )
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    mean_C, std_C = (_per_channel(name, v, frames) for name, v in (("mean", mean), ("std", std)))
    sizes = (height, width, patch_size, temporal_patch_size, merge_size)
    return _form(impl, frames).video_patches(frames, *sizes, mean_C, std_C, dtype)


def resize_frames(frames: Tensor, *, height: int, width: int, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Bicubic, antialiased resize, rounded to uint8. No gradient.

    Args:
        frames: uint8 [F, C, H, W] with C in 1..4, any strides.
        out: uint8 [F, C, height, width], contiguous, that is written and returned (a slice of a file's mapping, say);
            it does not overlap with frames. None: a new tensor.
        impl: as in `video_patches`.
    Returns:
        uint8 [F, C, height, width], contiguous.
    Raises:
        As `video_patches`.
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
    """The float route: what HF's processors do with uint8 frames on CUDA, on any device."""
    if (height, width) == tuple(frames.shape[2:]):
        return frames
    resized = F.interpolate(frames.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255).round_().to(torch.uint8)


class TorchForm:
    """The same in torch's own operations, on any device; the reference of the others."""

    @staticmethod
    def resized(frames: Tensor, height: int, width: int) -> Tensor:
        if frames.device.type != "cpu":
            return resize_in_float(frames, height, width)
        if (height, width) == tuple(frames.shape[2:]):
            return frames
        if frames.shape[3] == 1 or height * width == 1:
            # torch 2.13 takes some one-pixel axes for another memory format: it reads beyond the frames or raises. A
            # fresh channels-last copy is safe.
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
    """Patches of frames that have their final size; mean and std [C] in units of pixels."""
    if missing := -frames.shape[0] % span:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    count, channels, height, width = frames.shape
    values = frames.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1)).to(dtype)
    rows, columns = height // (merge * patch), width // (merge * patch)
    grid = values.reshape(count // span, span, channels, rows, merge, patch, columns, merge, patch)
    return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * span * patch * patch)


def _form(impl: str, frames: Tensor):
    chosen = resolve_impl(impl, frames, triton_dtypes=(torch.uint8,), native_dtypes=(torch.uint8,))
    if chosen == "torch":
        return TorchForm
    module = {"native": "native_patches", "triton": "triton_patches"}[chosen]
    return importlib.import_module(f".{module}", __package__)


def _check_frames(frames: Tensor, height: int, width: int, impl: str) -> None:
    checks.check_choice("impl", impl, IMPLEMENTATIONS)
    checks.check_frames("frames", frames, MAX_CHANNELS)
    checks.check_count("height", height)
    checks.check_count("width", width)


def _per_channel(name: str, values: Sequence[float], frames: Tensor) -> Tensor:
    """255 * values as float32 [C], with the roundings of HF's processors."""
    if len(values) != frames.shape[1]:
        raise ValueError(f"{name}: expected {frames.shape[1]} numbers, one per channel of frames, got {len(values)}")
    for value in values:
        checks.check_number(name, value, above=0.0 if name == "std" else None)
    # Made on the CPU: so few bytes are copied to a GPU without waiting for it.
    return torch.tensor(values, dtype=torch.float32).mul(255).to(frames.device, non_blocking=True)
