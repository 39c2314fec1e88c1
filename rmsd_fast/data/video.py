"""Read media files as resized uint8 frames: check the file, choose frames, decode, resize, and check the frames.

This module reads files in the calling thread. A run reads its files through `rmsd_fast.data.media`, which adds caches
and processes that can be killed. torchcodec and Pillow are imported when a file is opened. Times in spans and stamps
use the file's clock, which is described in `rmsd_fast.data.video_file`.

A file that cannot be used raises `MediaError`: it is one bad sample, which the caller may replace. A machine that
cannot decode at all raises a plain `RuntimeError`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch

import rmsd_kernels
from rmsd_fast.config import SettingsError, VideoConfig
from rmsd_fast.data.media_file import MediaError, MediaFile, open_media
from rmsd_fast.data.media_paths import Span
from rmsd_fast.data.pictures import picture_size, read_picture
from rmsd_fast.data.preprocess import Preprocessor, frame_indices, image_size, video_size
from rmsd_fast.data.video_file import Clip, decode, open_clip

# Part of every cache key. Increase it whenever the same file and settings would give different pixels or stamps.
# 2: transparent pictures on white, 16-bit gray scaled, stamps on the file's clock. 3: videos in their display aspect
# ratio. 4: with the rate of the chosen frames.
VERSION = 4
# If reference frames are lost, FFmpeg fills frames with gray (YUV 128, 128, 128), which is 128 or 130 in RGB.
LOST_GRAY = range(127, 133)

# The fields of VideoConfig that the frames of each kind depend on.
SETTINGS_OF = {
    "video": (
        *("num_frames", "fps", "min_frames", "max_frames"),
        *("min_video_pixels", "max_video_pixels", "max_frame_pixels"),
    ),
    "image": ("min_image_pixels", "max_image_pixels"),
}


@dataclass(frozen=True)
class MediaRequest:
    """A file or a part of it, and how to read it.

    Fields:
        path: the file.
        kind: "video" or "image".
        settings: frame choice and pixel budgets.
        preprocessor: the model's preprocessing settings.
        span: start and end in seconds on the file's clock (None = open); None instead of both reads the whole video.
        check_frames: whether to reject videos whose frames show damage (see `check_frames`).
        max_file_mib: maximum file size; larger files are rejected.
    """

    path: str
    kind: str
    settings: VideoConfig
    preprocessor: Preprocessor
    span: Span = None
    check_frames: bool = True
    max_file_mib: int = 16384

    def key(self, digest: str, device: str) -> str:
        """Return a hash of everything that determines the pixels, given the file's content and the decoding device."""
        chosen = [(name, getattr(self.settings, name)) for name in SETTINGS_OF[self.kind]]
        library = _version("pillow" if self.kind == "image" else "torchcodec")
        what = (VERSION, library, digest, device, self.kind, self.span, chosen, self.preprocessor, self.check_frames)
        return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Frames:
    """One decoded video or image.

    Fields:
        pixels: uint8 [F, 3, H, W], resized. An image has F = 1.
        timestamps_s: time of each frame on the file's clock in seconds, F values; empty for an image.
        grid_thw: number of patches along time, height and width.
        kind: "video" or "image".
        preprocessor: settings that the pixels were resized with; `video_patches` needs them.
        duration_s: end of the last frame of the whole video on the same clock, in seconds; None for an image.
        key: cache key; empty if the frames were not read through a cache.
        decoder: the device that decoded them, "cpu" or "cuda".
        frames_per_s: mean rate of the chosen frames in Hz, as the model families' processors compute it: their share
            of the video's or section's frames, times its frame rate. None for an image.
    """

    pixels: torch.Tensor
    timestamps_s: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    kind: str
    preprocessor: Preprocessor = field(default_factory=Preprocessor)
    duration_s: float | None = None
    key: str = ""
    decoder: str = "cpu"
    frames_per_s: float | None = None


@dataclass(frozen=True)
class MediaLayout:
    """The parts of a file's `Frames` that are known without decoding. Stamps assume a constant rate."""

    timestamps_s: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    kind: str


def read_layout(request: MediaRequest) -> MediaLayout:
    """Read a file's index without decoding anything. Raises as `read_media`, except for damage in the pictures."""
    with _opened(request) as media:
        if request.kind == "image":
            return MediaLayout((), request.preprocessor.grid(1, *_sized(request, *picture_size(media))), "image")
        # The headers may count frames that an edit list removes, or no frames. Scanning a file is cheaper than hashing.
        clip = open_clip(media)
        indices = _choose(request, clip)
        size = _sized(request, *clip.shown, len(indices))
        return MediaLayout(tuple(map(clip.stamp, indices)), request.preprocessor.grid(len(indices), *size), "video")


def read_media(
    request: MediaRequest, *, device: str = "cpu", allocate: Callable[[tuple[int, ...]], torch.Tensor] | None = None
) -> Frames:
    """Decode the chosen frames of a file and resize them. Thread-safe, because each call opens its own decoder.

    Args:
        request: the file and how to read it.
        device: "cuda:0" decodes a video with NVDEC and leaves the pixels there. Images are always read on the CPU.
        allocate: returns an uint8 tensor of the given shape for the resized frames; torch.empty by default.
    Raises:
        MediaError: the file is missing, empty, damaged, too large, a folder or a pipe, or contains too few frames.
        CpuFallback: the device is CUDA and cannot decode this video.
        NotInstalled: torchcodec, FFmpeg or Pillow is not installed.
        SettingsError: the settings request fewer frames than a temporal patch has (see `check_frame_counts`).
    """
    device = "cpu" if request.kind == "image" else device
    allocate = allocate or (lambda shape: torch.empty(shape, dtype=torch.uint8, device=device))
    with _opened(request) as media:
        if request.kind == "image":
            return _read_image(request, media, allocate)
        return _read_video(request, media, device, allocate)


def check_frames(path: str, pixels: torch.Tensor, different: int) -> None:
    """Raise MediaError if frames look like those of damaged streams, most of which decode without an error.

    Args:
        path: the file, for messages.
        pixels: uint8 [F, C, H, W].
        different: number of distinct frames of the file among them. With a variable rate, this may be 1.
    """
    if len(pixels) < 2:
        return
    low, high = pixels.amin((2, 3)), pixels.amax((2, 3))
    flat = (low == high).all(1)
    meant = "if this is intended, set data.check_frames=false"
    if flat.all():
        raise MediaError(f"{path}: each of the {len(pixels)} frames has a single color; fetch it again, or {meant}")
    lost = flat & (low >= LOST_GRAY.start).all(1) & (low < LOST_GRAY.stop).all(1)
    if lost.any():
        raise MediaError(
            f"{path}: {int(lost.sum())} of {len(pixels)} frames are the plain gray that replaces lost frames; the file "
            f"is damaged: fetch it again, or {meant}"
        )
    if different > 1 and all(torch.equal(pixels[0], frame) for frame in pixels[1:]):
        raise MediaError(f"{path}: the {len(pixels)} frames are all identical; fetch it again, or {meant}")


@dataclass(frozen=True)
class Preview:
    """Pictures or frames of a file for display.

    Fields:
        frames: uint8 [F, H, W, 3], in the display aspect ratio. A picture has F = 1.
        times_s: time of each frame on the file's clock in seconds; empty for a picture.
        seconds: end of a video's last frame on the same clock; None for a picture.
    """

    frames: np.ndarray
    times_s: tuple[float, ...]
    seconds: float | None


@dataclass(frozen=True)
class PreviewRequest:
    """A request for a picture, or for evenly spaced frames of a video, for display.

    Fields:
        path: the file.
        kind: "video" or "image".
        count: number of frames of a video; fewer if the video has fewer.
        longest_px: longer side of the result in pixels.
        x of the video to take frames from, as in MediaRequest.
    """

    path: str
    kind: str
    count: int
    longest_px: int
    max_file_mib: int
    span: Span = None


def read_preview(request: PreviewRequest) -> Preview:
    """Return the requested preview.

    Raises:
        MediaError, NotInstalled: as `read_media`.
    """
    with _opened(request) as media:
        if request.kind == "image":
            picture = torch.from_numpy(read_picture(media)).permute(2, 0, 1)[None]
            height, width = _within(request.longest_px, *picture.shape[2:])
            frames = rmsd_kernels.resize_frames(picture.contiguous(), height=height, width=width)
            return Preview(frames.permute(0, 2, 3, 1).numpy(), (), None)
        clip = open_clip(media)
        height, width = _within(request.longest_px, *clip.shown)
        first, total = _part(clip, request.span)
        if total < 1:
            raise _too_few(clip, request.span, 1, total)
        count = min(request.count, total)
        indices = [first + round(number * (total - 1) / max(count - 1, 1)) for number in range(count)]
        frames = torch.empty(count, 3, height, width, dtype=torch.uint8)

        def resize(start: int, batch: torch.Tensor) -> None:
            rmsd_kernels.resize_frames(batch, height=height, width=width, out=frames[start : start + len(batch)])

        stamps, _ = decode(clip, indices, request.span is not None, resize)
        return Preview(frames.permute(0, 2, 3, 1).numpy(), stamps, clip.length_s)


def _opened(request: MediaRequest | PreviewRequest) -> AbstractContextManager[MediaFile]:
    return open_media(request.path, request.max_file_mib, picture=request.kind == "image")


def _within(longest_px: int, height: int, width: int) -> tuple[int, int]:
    """Return height and width with the same aspect ratio that fit into `longest_px`, without enlarging."""
    scale = min(1.0, longest_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _read_video(
    request: MediaRequest, media: MediaFile, device: str, allocate: Callable[[tuple[int, ...]], torch.Tensor]
) -> Frames:
    clip = open_clip(media, device)
    indices = _choose(request, clip)
    count = len(indices)
    height, width = _sized(request, *clip.shown, count)
    pixels = allocate((count, 3, height, width))

    def resize(start: int, batch: torch.Tensor) -> None:
        rmsd_kernels.resize_frames(batch, height=height, width=width, out=pixels[start : start + len(batch)])

    stamps, different = decode(clip, indices, request.span is not None, resize)
    if request.check_frames:
        check_frames(request.path, pixels, different)
    return Frames(
        pixels,
        stamps,
        request.preprocessor.grid(count, height, width),
        "video",
        request.preprocessor,
        duration_s=clip.length_s,
        decoder=device.split(":")[0],
        frames_per_s=count / _part(clip, request.span)[1] * clip.fps,
    )


def _choose(request: MediaRequest, clip: Clip) -> list[int]:
    """Return the indices of the chosen frames; with a span, of frames inside it."""
    needed = request.preprocessor.temporal_patch_size
    first, total = _part(clip, request.span)
    if total < needed:
        raise _too_few(clip, request.span, needed, total)
    return [first + index for index in frame_indices(total, clip.fps, request.settings, request.preprocessor)]


def _part(clip: Clip, span: Span) -> tuple[int, int]:
    """Return the index of the first frame in a span, and the number of frames in it; None = all frames.

    Raises:
        MediaError: the span ends so far after the video that it must belong to a different file.
    """
    start, end = span or (None, None)
    if end is not None and end > clip.length_s + max(1.0, 0.05 * clip.length_s):
        raise MediaError(
            f"{clip.media.path}: expected a part that ends by {clip.length_s:g} s, the end of the video, got "
            f"{end:g} s; check start and end, or drop the question"
        )
    low = 0.0 if start is None else (start - clip.late_s) * clip.fps - 1e-6
    high = math.inf if end is None else (end - clip.late_s) * clip.fps + 1e-6
    first = math.ceil(min(max(low, 0.0), clip.frames))
    last = math.floor(max(min(high, clip.frames - 1), -1.0))
    return first, max(0, last - first + 1)


def _too_few(clip: Clip, span: Span, needed: int, total: int) -> MediaError:
    where, advice = "", "ask about it as an image"
    if span is not None:
        start, end = span
        where = f" between {start or 0:g} s and {'the end' if end is None else f'{end:g} s'}"
        advice = f"its video runs from {clip.late_s:g} to {clip.stamp(clip.frames):g} s; check start and end"
    return MediaError(
        f"{clip.media.path}: too few frames{where}: expected at least {needed}, got {total}; {advice}, or drop the "
        "question"
    )


def _sized(request: MediaRequest, height: int, width: int, frames: int = 0) -> tuple[int, int]:
    """Return height and width after resizing."""
    try:
        if request.kind == "image":
            return image_size(height, width, request.settings, request.preprocessor)
        return video_size(frames, height, width, request.settings, request.preprocessor)
    except SettingsError:
        raise
    except ValueError as error:
        raise MediaError(f"{request.path}: {error}; crop or pad it, or drop the question") from error


def _read_image(request: MediaRequest, media: MediaFile, allocate: Callable[[tuple[int, ...]], torch.Tensor]) -> Frames:
    picture = read_picture(media)
    height, width = _sized(request, *picture.shape[:2])
    raw = torch.from_numpy(picture).permute(2, 0, 1)[None]
    pixels = rmsd_kernels.resize_frames(raw, height=height, width=width, out=allocate((1, 3, height, width)))
    return Frames(pixels, (), request.preprocessor.grid(1, height, width), "image", request.preprocessor)


@functools.cache
def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package
