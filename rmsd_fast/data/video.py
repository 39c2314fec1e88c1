"""Media files to resized uint8 frames: checks of the file, decoding, frame choice, resizing, checks of the frames.

Here a file is read in the calling thread. A run reads its files through `rmsd_fast.data.media`, which adds caches and
processes that can be killed. torchcodec and Pillow are imported when a file is opened.

A file that cannot be used raises `MediaError`: one bad sample, which the caller may replace. A machine that cannot
decode at all raises a plain `RuntimeError`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import rmsd_kernels
from rmsd_fast.config import NotInstalled, SettingsError, VideoConfig
from rmsd_fast.data.media_file import MediaError, check_file
from rmsd_fast.data.preprocess import Preprocessor, frame_indices, image_size, video_size

# Raised whenever the same file and settings would give other pixels or stamps: part of every cache key.
VERSION = 1
# Decoded frames held before they are resized: a few hundred of 4K at once would be gigabytes.
RAW_BYTES = 32 * 2**20
# Larger pictures take gigabytes on the way (Pillow's own bound for a warning).
MOST_IMAGE_PIXELS = 89_478_485
# The grey (YUV 128, 128, 128) with which FFmpeg fills pictures whose references are lost is 128 or 130 in RGB.
LOST_GREY = range(127, 133)

# Which fields of VideoConfig the frames of each kind depend on.
SETTINGS_OF = {
    "video": (
        *("num_frames", "fps", "min_frames", "max_frames"),
        *("min_video_pixels", "max_video_pixels", "max_frame_pixels"),
    ),
    "image": ("min_image_pixels", "max_image_pixels"),
}
# AVI knows no times of display: with B frames torchcodec takes frames two or three late, which is let pass.
MOST_DELAY_S = 0.25
# Values of EXIF's orientation that exchange height and width.
_EXIF_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
# torchcodec's messages begin with the C++ function and file they come from.
_SOURCE_LINE = re.compile(r"^\w+, \S+\.\w+:\d+, ")
NO_TORCHCODEC = (
    "videos are decoded by torchcodec, which cannot be loaded here ({reason}). Install it "
    "(`pip install torchcodec==0.13.0` for CPU builds of torch, `torchcodec>=0.17` for CUDA builds) and the shared "
    "libraries of FFmpeg 4 to 8 (Debian and Ubuntu: `apt-get install ffmpeg`)."
)


@dataclass(frozen=True)
class MediaRequest:
    """A file, or a part of it, and what to make of it.

    Fields:
        path: the file.
        kind: "video" or "image".
        settings: frame choice and pixel budgets.
        preprocessor: of the model.
        span: start and end in seconds of the file's own time, None = open; None as a whole = the whole video.
        check_frames: refuse videos whose frames show damage (see `check_frames`).
        max_file_mib: refuse larger files.
    """

    path: str
    kind: str
    settings: VideoConfig
    preprocessor: Preprocessor
    span: tuple[float | None, float | None] | None = None
    check_frames: bool = True
    max_file_mib: int = 16384

    def key(self, digest: str, device: str) -> str:
        """Hash of everything that determines the pixels, given the file's content and the device that decodes."""
        chosen = [(name, getattr(self.settings, name)) for name in SETTINGS_OF[self.kind]]
        library = _version("pillow" if self.kind == "image" else "torchcodec")
        what = (VERSION, library, digest, device, self.kind, self.span, chosen, self.preprocessor, self.check_frames)
        return hashlib.blake2b(repr(what).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Frames:
    """One decoded video or image.

    Fields:
        pixels: uint8 [F, 3, H, W], resized. An image has F = 1.
        timestamps_s: time of each frame in seconds of the file, F values; empty for an image.
        grid_thw: patches along time, height and width.
        kind: "video" or "image".
        preprocessor: what they were resized for; `video_patches` needs it to cut them.
        duration_s: length of the whole video in seconds; None for an image.
        key: what caches know them by; empty where they were not read through one.
        decoder: "cpu" or "cuda", what decoded them.
    """

    pixels: torch.Tensor
    timestamps_s: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    kind: str
    preprocessor: Preprocessor = field(default_factory=Preprocessor)
    duration_s: float | None = None
    key: str = ""
    decoder: str = "cpu"


@dataclass(frozen=True)
class Layout:
    """What a file's headers say of its `Frames` to come; fields as there. Stamps are those of a constant rate."""

    timestamps_s: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    kind: str


class CpuFallback(RuntimeError):
    """NVDEC cannot decode this video. Not a fault of the file: the CPU may."""


def read_layout(request: MediaRequest) -> Layout:
    """Read a file's headers, no pixel. Raises as `read_media`."""
    check_file(request.path, request.max_file_mib)
    if request.kind == "image":
        with _opened_image(request.path) as image:
            turned = image.getexif().get(_EXIF_ORIENTATION, 1) in _QUARTER_TURNS
            size = image.size if turned else image.size[::-1]
        return Layout((), request.preprocessor.grid(1, *_sized(request, *size)), "image")
    try:
        metadata = _open_video(request.path, seek_mode="approximate").metadata
        indices = _choose(request, metadata)
    except MediaError:
        # Headers need not tell; the content does, at the price of reading it.
        metadata = _open_video(request.path).metadata
        indices = _choose(request, metadata)
    size = _sized(request, metadata.height, metadata.width, len(indices))
    stamps = tuple(index / metadata.average_fps for index in indices)
    return Layout(stamps, request.preprocessor.grid(len(indices), *size), "video")


def read_media(
    request: MediaRequest, *, device: str = "cpu", allocate: Callable[[tuple[int, ...]], torch.Tensor] | None = None
) -> Frames:
    """Decode the chosen frames of a file and resize them. Opens its own decoder, so threads may call it at once.

    Args:
        device: "cuda:0" decodes a video with NVDEC and leaves the pixels there; images are read on the CPU, to the CPU.
        allocate: makes the uint8 tensor of a shape that the resized frames go into; torch.empty by default.
    Raises:
        MediaError: the file is missing, empty, damaged, too large, no plain file, or holds too few frames.
        CpuFallback: device is CUDA, and it cannot decode this video.
        NotInstalled: torchcodec, FFmpeg or Pillow is not installed.
        SettingsError: the settings ask for fewer frames than one temporal patch has.
    """
    check_file(request.path, request.max_file_mib)
    device = "cpu" if request.kind == "image" else device
    allocate = allocate or (lambda shape: torch.empty(shape, dtype=torch.uint8, device=device))
    return _read_image(request, allocate) if request.kind == "image" else _read_video(request, device, allocate)


def check_frames(path: str, pixels: torch.Tensor, distinct: bool) -> None:
    """Raise MediaError where frames look like what decoders make of damaged streams, mostly without an error.

    Args:
        pixels: uint8 [F, C, H, W]. distinct: whether the file's frames that they come from are not all the same one.
    """
    if len(pixels) < 2 or not distinct:
        return
    low, high = pixels.amin((2, 3)), pixels.amax((2, 3))
    flat = (low == high).all(1)
    meant = "if that is meant, set data.check_frames=false"
    if flat.all():
        raise MediaError(f"{path}: each of the {len(pixels)} frames is of a single colour; fetch it again, or {meant}")
    lost = flat & (low >= LOST_GREY.start).all(1) & (low < LOST_GREY.stop).all(1)
    if lost.any():
        raise MediaError(
            f"{path}: {int(lost.sum())} of {len(pixels)} frames are the plain grey that stands for lost pictures; the "
            f"file is damaged, fetch it again, or {meant}"
        )
    if all(torch.equal(pixels[0], frame) for frame in pixels[1:]):
        raise MediaError(f"{path}: the {len(pixels)} frames are all the same; fetch it again, or {meant}")


def _read_video(request: MediaRequest, device: str, allocate: Callable[[tuple[int, ...]], torch.Tensor]) -> Frames:
    path = request.path
    decoder = _open_video(path, device=device)
    metadata = decoder.metadata
    indices = _choose(request, metadata)
    count = len(indices)
    height, width = _sized(request, metadata.height, metadata.width, count)
    pixels = allocate((count, 3, height, width))
    per_call = max(1, RAW_BYTES // (3 * metadata.height * metadata.width))
    times: list[float] = []
    for start in range(0, count, per_call):
        chosen = indices[start : start + per_call]
        batch = _decode(request, decoder, chosen)
        if device != "cpu" and decoder.cpu_fallback:
            raise CpuFallback(str(decoder.cpu_fallback))
        if batch.data.shape[-2:] != (metadata.height, metadata.width):
            raise MediaError(
                f"{path}: expected frames of {metadata.width}x{metadata.height} as in its header, got "
                f"{batch.data.shape[-1]}x{batch.data.shape[-2]}; re-encode it or drop the question"
            )
        out = pixels[start : start + len(chosen)]
        rmsd_kernels.resize_frames(batch.data, height=height, width=width, out=out)
        times += batch.pts_seconds.tolist()
    if request.check_frames:
        check_frames(path, pixels, distinct=len(set(indices)) > 1)
    return Frames(
        pixels,
        _timestamps(request, indices, times, metadata),
        request.preprocessor.grid(count, height, width),
        "video",
        request.preprocessor,
        duration_s=metadata.duration_seconds,
        decoder=device.split(":")[0],
    )


def _choose(request: MediaRequest, metadata: Any) -> list[int]:
    """Indices of the frames that are taken; with a span, of the frames in it."""
    path, needed = request.path, request.preprocessor.temporal_patch_size
    total, fps = metadata.num_frames, metadata.average_fps
    if not total or not (fps and 0 < fps < math.inf) or not metadata.height or not metadata.width:
        raise MediaError(f"{path}: no video frames were found; replace the file or drop the question")
    first, where = 0, ""
    if request.span is not None:
        start, end = request.span
        first = max(0, math.ceil((start or 0.0) * fps - 1e-6))
        last = total - 1 if end is None else min(total - 1, math.floor(end * fps + 1e-6))
        total, where = (
            max(0, last - first + 1),
            f" between {start or 0:g} s and {'the end' if end is None else f'{end:g} s'}",
        )
    if total < needed:
        raise MediaError(
            f"{path}: too few frames{where}: expected at least {needed}, got {total}; "
            f"{'check start and end' if where else 'ask about it as an image'}, or drop the question"
        )
    chosen = frame_indices(total, fps, request.settings, request.preprocessor)
    if len(chosen) < needed:
        raise SettingsError(f"expected at least {needed} frames per video, got {len(chosen)}; raise video.num_frames")
    return [first + index for index in chosen]


def _decode(request: MediaRequest, decoder: Any, indices: list[int]) -> Any:
    """torchcodec's FrameBatch."""
    try:
        if request.span is None:
            return decoder.get_frames_at(indices=indices)
        return decoder.get_frames_played_at(seconds=_middles(indices, decoder.metadata))
    except (RuntimeError, ValueError, IndexError) as error:
        raise _media_error(request.path, error) from error


def _middles(indices: list[int], metadata: Any) -> list[float]:
    """When the frames of these numbers are shown at a constant rate, in their middle, which is safe of rounding."""
    begin, end = metadata.begin_stream_seconds, metadata.end_stream_seconds
    return [min(begin + (index + 0.5) / metadata.average_fps, math.nextafter(end, begin)) for index in indices]


def _timestamps(request: MediaRequest, indices: list[int], times: list[float], metadata: Any) -> tuple[float, ...]:
    """Frame number over frame rate, as the family's processors stamp frames; with a variable rate the true times.

    Raises:
        MediaError: these are not the frames that were asked for. In files that cannot be sought in well (transport
            streams, some AVI) torchcodec then gives the next ones it finds, and no error.
    """
    fps, begin = metadata.average_fps, metadata.begin_stream_seconds or 0.0
    if request.span is not None:
        wrong = any(time > middle + 1e-3 for time, middle in zip(times, _middles(indices, metadata), strict=True))
    else:
        steps = zip(indices, indices[1:], times, times[1:], strict=False)
        wrong = any((later <= earlier) != (b == a) for a, b, earlier, later in steps)
        wrong = wrong or (indices[0] == 0 and times[0] - begin > MOST_DELAY_S)
    if wrong:
        raise MediaError(
            f"{request.path}: expected the frames numbered {indices[0]} to {indices[-1]}, got others: this file cannot "
            "be sought in; re-encode it (ffmpeg -i … out.mp4) or drop the question"
        )
    if any(abs(time - begin - index / fps) > 0.5 / fps + 1e-3 for index, time in zip(indices, times, strict=True)):
        return tuple(time - begin for time in times)
    return tuple(index / fps for index in indices)


def _sized(request: MediaRequest, height: int, width: int, frames: int = 0) -> tuple[int, int]:
    """Height and width after resizing."""
    try:
        if request.kind == "image":
            return image_size(height, width, request.settings, request.preprocessor)
        return video_size(frames, height, width, request.settings, request.preprocessor)
    except SettingsError:
        raise
    except ValueError as error:
        raise _media_error(request.path, error) from error


def _read_image(request: MediaRequest, allocate: Callable[[tuple[int, ...]], torch.Tensor]) -> Frames:
    from PIL import ImageOps

    with _opened_image(request.path) as image:
        rgb = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    height, width = _sized(request, *rgb.shape[:2])
    raw = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    pixels = rmsd_kernels.resize_frames(raw, height=height, width=width, out=allocate((1, 3, height, width)))
    return Frames(pixels, (), request.preprocessor.grid(1, height, width), "image", request.preprocessor)


@contextmanager
def _opened_image(path: str) -> Iterator[Any]:
    """A Pillow image, its pixels not read yet; damage found while it is open becomes a MediaError."""
    try:
        from PIL import Image
    except ImportError as error:
        raise NotInstalled("images are read by Pillow, which is not installed: `pip install pillow`") from error
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} are more than {MOST_IMAGE_PIXELS} pixels")
            yield image
    # Pillow's plugins report damage with whatever their parsing raises.
    except Exception as error:
        raise _media_error(path, error) from error


@functools.cache
def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _media_error(path: str, error: Exception) -> MediaError:
    reason = _SOURCE_LINE.sub("", str(error).strip().split("\n", 1)[0]).strip() or type(error).__name__
    return MediaError(f"{path}: cannot be decoded ({reason}); fetch it again, re-encode it or drop the question")


def _open_video(path: str, *, device: str = "cpu", seek_mode: str = "exact") -> Any:
    # torchcodec raises RuntimeError or OSError on import where the FFmpeg libraries are missing.
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise NotInstalled(NO_TORCHCODEC.format(reason=reason)) from error
    try:
        # Exact: the whole file is scanned for frames, so that counts and times are those of the content.
        return VideoDecoder(path, dimension_order="NCHW", num_ffmpeg_threads=1, device=device, seek_mode=seek_mode)
    # torchcodec raises RuntimeError for damaged files, ValueError for files without a video stream.
    except (RuntimeError, ValueError) as error:
        raise _media_error(path, error) from error
