"""Media back end in Triton: resize, normalization and patch order of uint8 frames in one pass, for CUDA tensors.

A program of one warp computes one channel of one patch: patch^2 values that are adjacent in the result. Each value is a
sum over the vertical taps of sums over the horizontal taps, computed directly from the uint8 frame. Downscaling by s
takes (4 s + 1)^2 loads per value, nearly all of them from the L1 cache, and stores nothing between frame and patch. The
eight values of a lane share a column, so a tap's weight is loaded once for all of them.

The resize is in floating point (see video_patches): float32 weights and sums, x before y, clamped and rounded to an
integer. Then (x - mean) / std is computed with IEEE division. A sum within float32 rounding error of a tie may be
rounded up or down, a difference of one level.

The kernels are compiled once per dtype and patch size. Sizes, strides and numbers of taps are run-time arguments.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import device_of

# Kernels are not recompiled for other clip sizes or for other alignments of a slice of frames.
SIZES = [
    *("stride_f", "stride_c", "stride_y", "stride_x", "frames", "in_height", "in_width", "height", "width"),
    *("taps_x", "taps_y", "channels", "temporal", "merge"),
]
SLICED = ["frames_ptr", "out_ptr"]
WARPS = 1
# A tile of resized frames has 32 bytes per row, one memory sector.
TILE_ROWS, TILE_COLUMNS = 8, 32
# Adding and subtracting this number rounds to the nearest integer, ties to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def _resized(
    plane_ptr, start_x_ptr, weight_x_ptr, start_y_ptr, weight_y_ptr, row, col, stride_y, stride_x, in_height, in_width,
    height, width, taps_x, taps_y,
):  # fmt: skip
    """Return the output pixels (row [R], col [C]) of one channel of one frame, float32 [R, C], integers in 0..255."""
    # Pixels beyond the frame repeat the last row or column; they are not stored.
    row = tl.minimum(row, height - 1)
    col = tl.minimum(col, width - 1)
    start_y = tl.load(start_y_ptr + row)
    start_x = tl.load(start_x_ptr + col)
    total = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
    for i in range(0, taps_y):
        weight_y = tl.load(weight_y_ptr + i * height + row)
        # Taps beyond the input have weight 0.
        y = tl.minimum(start_y + i, in_height - 1).to(tl.int64)
        line_ptr = plane_ptr + (y * stride_y)[:, None]
        line = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
        for k in range(0, taps_x):
            weight_x = tl.load(weight_x_ptr + k * width + col)
            x = tl.minimum(start_x + k, in_width - 1).to(tl.int64)
            line += tl.load(line_ptr + (x * stride_x)[None, :]).to(tl.float32) * weight_x[None, :]
        total += line * weight_y[:, None]
    total = tl.minimum(tl.maximum(total, 0.0), 255.0)
    return (total + ROUND) - ROUND


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def _patches_kernel(
    frames_ptr, out_ptr, mean_ptr, std_ptr, start_x_ptr, weight_x_ptr, start_y_ptr, weight_y_ptr,
    stride_f, stride_c, stride_y, stride_x, frames, in_height, in_width, height, width, taps_x, taps_y,
    channels, temporal, merge,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Programs of one patch have adjacent ids because they read the same cache lines.
    program = tl.program_id(0)
    slot = program % temporal
    channel = (program // temporal) % channels
    patch = program // (temporal * channels)
    # patch = (((t * rows + h) * columns + w) * merge + mh) * merge + mw
    blocks_x = width // (PATCH * merge)
    blocks_y = height // (PATCH * merge)
    mw = patch % merge
    mh = (patch // merge) % merge
    block = patch // (merge * merge)
    w = (block % blocks_x) * merge + mw
    h = (block // blocks_x % blocks_y) * merge + mh
    # The last frame is repeated to complete its group.
    frame = tl.minimum(block // (blocks_x * blocks_y) * temporal + slot, frames - 1)
    plane_ptr = frames_ptr + frame.to(tl.int64) * stride_f + channel.to(tl.int64) * stride_c
    y = tl.arange(0, BLOCK)
    x = tl.arange(0, BLOCK)
    pixels = _resized(
        plane_ptr, start_x_ptr, weight_x_ptr, start_y_ptr, weight_y_ptr, h * PATCH + y, w * PATCH + x,
        stride_y, stride_x, in_height, in_width, height, width, taps_x, taps_y,
    )  # fmt: skip
    values = tl.div_rn(pixels - tl.load(mean_ptr + channel), tl.load(std_ptr + channel) + tl.zeros_like(pixels))
    offset = ((patch.to(tl.int64) * channels + channel) * temporal + slot) * (PATCH * PATCH)
    inside = (y < PATCH)[:, None] & (x < PATCH)[None, :]
    tl.store(out_ptr + offset + (y * PATCH)[:, None] + x[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SLICED)
def _resize_kernel(
    frames_ptr, out_ptr, start_x_ptr, weight_x_ptr, start_y_ptr, weight_y_ptr,
    stride_f, stride_c, stride_y, stride_x, in_height, in_width, height, width, taps_x, taps_y, channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = program % channels
    tile = program // channels
    tiles_x = tl.cdiv(width, COLUMNS)
    tiles_y = tl.cdiv(height, ROWS)
    frame = (tile // (tiles_x * tiles_y)).to(tl.int64)
    row = (tile // tiles_x % tiles_y) * ROWS + tl.arange(0, ROWS)
    col = (tile % tiles_x) * COLUMNS + tl.arange(0, COLUMNS)
    plane_ptr = frames_ptr + frame * stride_f + channel.to(tl.int64) * stride_c
    pixels = _resized(
        plane_ptr, start_x_ptr, weight_x_ptr, start_y_ptr, weight_y_ptr, row, col,
        stride_y, stride_x, in_height, in_width, height, width, taps_x, taps_y,
    )  # fmt: skip
    out_row = (frame * channels + channel) * height + row
    inside = (row < height)[:, None] & (col < width)[None, :]
    tl.store(out_ptr + (out_row * width)[:, None] + col[None, :], pixels.to(tl.uint8), mask=inside)


@functools.lru_cache(maxsize=256)
def axis_weights(size: int, out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first input pixel of each output pixel, int32 [out], and its taps' weights, float32 [taps, out].

    An axis that keeps its size has one tap with weight 1. The weights are computed in float64 and take a few KB.
    """
    if size == out:
        start, weights = torch.arange(out), torch.ones(1, out)
    else:
        scale = size / out
        support = 2.0 * max(scale, 1.0)
        center = scale * (torch.arange(out, dtype=torch.float64) + 0.5)
        start = (center - support + 0.5).long().clamp_(min=0)
        count = (center + support + 0.5).long().clamp_(max=size) - start
        tap = torch.arange(int(count.max()))[:, None]
        distance = ((tap + start - center + 0.5) / max(scale, 1.0)).abs()
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0)) * (tap < count)
        weights = weights / weights.sum(0)
    return start.int().to(device), weights.float().contiguous().to(device)


def resize_frames_(out: Tensor, frames: Tensor) -> None:
    """Write frames [F, C, H, W], resized, to out [F, C, height, width], uint8 and contiguous."""
    count, channels, in_height, in_width = frames.shape
    height, width = out.shape[2:]
    tables = (axis_weights(in_width, width, frames.device), axis_weights(in_height, height, frames.device))
    programs = count * channels * triton.cdiv(height, TILE_ROWS) * triton.cdiv(width, TILE_COLUMNS)
    _check_programs(programs)
    with device_of(frames):
        _resize_kernel[(programs,)](
            *(frames, out, *tables[0], *tables[1], *frames.stride(), in_height, in_width, height, width),
            *(len(tables[0][1]), len(tables[1][1]), channels),
            ROWS=TILE_ROWS,
            COLUMNS=TILE_COLUMNS,
            num_warps=WARPS,
        )


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
    """Return the patches of frames. mean and std [C] are float32 on the device of frames, on the scale 0..255."""
    count, channels, in_height, in_width = frames.shape
    groups = triton.cdiv(count, temporal_patch_size)
    patches = groups * (height // patch_size) * (width // patch_size)
    values = channels * temporal_patch_size * patch_size * patch_size
    out = torch.empty(patches, values, dtype=dtype, device=frames.device)
    tables = (axis_weights(in_width, width, frames.device), axis_weights(in_height, height, frames.device))
    programs = patches * channels * temporal_patch_size
    _check_programs(programs)
    with device_of(frames):
        _patches_kernel[(programs,)](
            *(frames, out, mean, std, *tables[0], *tables[1], *frames.stride(), count, in_height, in_width),
            *(height, width, len(tables[0][1]), len(tables[1][1]), channels, temporal_patch_size, merge_size),
            PATCH=patch_size,
            BLOCK=triton.next_power_of_2(patch_size),
            num_warps=WARPS,
        )
    return out


def _check_programs(programs: int) -> None:
    if programs >= 2**31:
        raise ValueError(
            f"frames: expected fewer than 2^31 tiles in a call, got {programs}; pass fewer frames at a time"
        )
