"""Media files to vision patches: decoding, frame choice, resizing and patch order of the Qwen3-VL family.

The numbers are those of transformers' Qwen3-VL video processor and Qwen2-VL image processor (difference 0.0 on CPU, see
tests/test_video.py), in plain torch: neither torchvision nor transformers is needed. torchcodec and Pillow are imported
when a file is decoded.

A file that cannot be used raises `MediaError`: one bad sample, which the caller may replace. A machine that cannot
decode at all raises a plain `RuntimeError`.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rmsd_fast.config import ModelError, NotInstalled, SettingsError, VideoConfig

# Longest side over shortest side that the family's processors accept.
MAX_ASPECT_RATIO = 200
# The per-frame cap never falls below this multiple of the lower budget (as in the family's processor).
FRAME_CAP_FLOOR = 1.05

# torchcodec's messages begin with the C++ function and file they come from.
_SOURCE_LINE = re.compile(r"^\w+, \S+\.\w+:\d+, ")
NO_TORCHCODEC = (
    "videos are decoded by torchcodec, which cannot be loaded here ({reason}). Install it "
    "(`pip install torchcodec==0.13.0` for CPU builds of torch, `torchcodec>=0.17` for CUDA builds) and the shared "
    "libraries of FFmpeg 4 to 8 (Debian and Ubuntu: `apt-get install ffmpeg`)."
)


class MediaError(RuntimeError):
    """A media file that cannot be used. The message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Preprocessor:
    """What a model expects of its pixels; read from the model's own folder by `load_preprocessor`.

    Means and deviations are per RGB channel on the 0-1 scale. Resizing is always bicubic and antialiased.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Pixels of one vision token's side; heights and widths are multiples of it."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True)
class Frames:
    """One decoded video or image.

    Fields:
        pixels: uint8 [F, 3, H, W], resized. An image has F = 1.
        timestamps_s: time of each frame in seconds, F values; empty for an image.
        grid_thw: patches along time, height and width.
        kind: "video" or "image".
        preprocessor: what they were resized for; `video_patches` needs it to cut them.
    """

    pixels: torch.Tensor
    timestamps_s: tuple[float, ...]
    grid_thw: tuple[int, int, int]
    kind: str
    preprocessor: Preprocessor = Preprocessor()


def load_preprocessor(folder: str | Path) -> Preprocessor:
    """Read patch sizes and normalisation from a model folder.

    Looks at `video_preprocessor_config.json`, then `processor_config.json` (section `video_processor`), then
    `preprocessor_config.json`; the image settings, where given, have to agree with those of videos.

    Raises:
        ValueError: no such file, a file that is no JSON object, a missing key, settings that this code does not follow.
    """
    folder = Path(folder)
    joint = _read_json(folder / "processor_config.json")
    video = _read_json(folder / "video_preprocessor_config.json") or joint.get("video_processor")
    image = _read_json(folder / "preprocessor_config.json") or joint.get("image_processor")
    found = [_parse_preprocessor(settings, folder) for settings in (video, image) if settings]
    if not found:
        raise ModelError(
            f"{folder}: expected video_preprocessor_config.json or preprocessor_config.json, found neither; "
            "copy them from the original model folder"
        )
    if found[0] != found[-1]:
        raise ModelError(
            f"{folder}: images and videos are preprocessed differently ({found[-1]} and {found[0]}); "
            "models of the Qwen3-VL family share these settings, so check the two JSON files"
        )
    return found[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not readable as JSON ({error}); restore it from the original model folder"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _parse_preprocessor(settings: dict[str, Any], folder: Path) -> Preprocessor:
    for key, needed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
        if settings.get(key, needed) not in (needed, None):
            raise ModelError(f"{folder}: preprocessing with {key}={settings[key]!r} is not supported, only {needed!r}")
    try:
        return Preprocessor(
            patch_size=int(settings["patch_size"]),
            temporal_patch_size=int(settings["temporal_patch_size"]),
            merge_size=int(settings["merge_size"]),
            image_mean=tuple(float(value) for value in settings["image_mean"]),
            image_std=tuple(float(value) for value in settings["image_std"]),
        )
    except KeyError as error:
        raise ModelError(f"{folder}: the preprocessor settings lack {error.args[0]!r}") from error


def frame_indices(total: int, fps: float, settings: VideoConfig) -> list[int]:
    """Indices of the frames taken from a video: evenly spaced, first and last included.

    Args:
        total: frames in the video.
        fps: its frame rate in Hz.
        settings: `num_frames` takes exactly that many (indices repeat in a shorter video); `fps` takes that many per
            second, within [min_frames, max_frames] and at most `total`.
    Raises:
        ValueError: neither or both of `num_frames` and `fps` are set, or the counts are not positive.
    """
    if (settings.num_frames is None) == (settings.fps is None):
        raise ValueError(
            f"video.num_frames={settings.num_frames} and video.fps={settings.fps}: exactly one of them has to be set; "
            "give the other as null"
        )
    if total < 1 or fps <= 0:
        raise ValueError(f"expected a video with frames and a frame rate, got {total} frames at {fps} Hz")
    if settings.num_frames is not None:
        count = settings.num_frames
    else:
        count = int(total / fps * settings.fps)
        count = min(max(count, settings.min_frames), settings.max_frames, total)
    if count < 1:
        raise SettingsError(f"expected at least one frame per video, got {count}; raise video.num_frames or video.fps")
    # float64 and rounding half to even are what numpy's linspace().round() gives, which the processor uses.
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().to(torch.int64).tolist()


def smart_resize(
    num_frames: int, height: int, width: int, *, factor: int, temporal_factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width nearest to the given ones that are multiples of `factor` and keep T*H*W within the budgets.

    `temporal_factor` 1 with `num_frames` 1 is the rule for images: there a side below `factor` is not enlarged first.

    Raises:
        ValueError: fewer frames than `temporal_factor`, an empty frame, or an aspect ratio above 200.
    """
    if num_frames < temporal_factor:
        raise ValueError(f"expected at least {temporal_factor} frames, got {num_frames}")
    if height < 1 or width < 1:
        raise ValueError(f"expected frames of at least 1x1 pixel, got {width}x{height}")
    if temporal_factor > 1 and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.0f} ({width}x{height})")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    volume = round(num_frames / temporal_factor) * temporal_factor * new_height * new_width
    pixels = num_frames * height * width
    if volume > max_pixels:
        shrink = math.sqrt(pixels / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / pixels)
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def video_size(
    num_frames: int, height: int, width: int, settings: VideoConfig, preprocessor: Preprocessor
) -> tuple[int, int]:
    """Height and width of a video after resizing, with the cap per frame. Raises ValueError as `smart_resize`."""
    share = min(settings.max_frame_pixels, settings.max_video_pixels // num_frames)
    per_frame = max(share, int(settings.min_video_pixels * FRAME_CAP_FLOOR))
    return smart_resize(
        num_frames,
        height,
        width,
        factor=preprocessor.factor,
        temporal_factor=preprocessor.temporal_patch_size,
        min_pixels=settings.min_video_pixels,
        max_pixels=per_frame * num_frames,
    )


def image_size(height: int, width: int, settings: VideoConfig, preprocessor: Preprocessor) -> tuple[int, int]:
    """Height and width of an image after resizing. Raises ValueError as `smart_resize`."""
    return smart_resize(
        1,
        height,
        width,
        factor=preprocessor.factor,
        temporal_factor=1,
        min_pixels=settings.min_image_pixels,
        max_pixels=settings.max_image_pixels,
    )


def resize_frames(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic, antialiased resize of uint8 frames [F, C, H, W], rounded to uint8."""
    if pixels.shape[-2:] == (height, width):
        return pixels.contiguous()
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def decode_video(path: str | Path, settings: VideoConfig, preprocessor: Preprocessor) -> Frames:
    """Decode the chosen frames of a video and resize them. Opens its own decoder, so threads may call it at once.

    Rotation stored in the file is applied.

    Raises:
        MediaError: the file is missing, empty, damaged, holds no video or too few frames.
        NotInstalled: torchcodec or FFmpeg is not installed.
    """
    _require_file(path)
    _refuse_truncated(path)
    decoder_class = _video_decoder()
    try:
        decoder = decoder_class(str(path), dimension_order="NCHW", num_ffmpeg_threads=1)
        total, fps = decoder.metadata.num_frames, decoder.metadata.average_fps
    # torchcodec raises RuntimeError for damaged files, ValueError for files without a video stream.
    except (RuntimeError, ValueError) as error:
        raise _media_error(path, error) from error
    needed = preprocessor.temporal_patch_size
    if not total or not fps:
        raise MediaError(f"{path}: no video frames were found; replace the file or drop the question")
    if total < needed:
        raise MediaError(
            f"{path}: too few frames: expected at least {needed}, got {total}; "
            "ask about it as an image, or drop the question"
        )
    indices = frame_indices(total, fps, settings)
    if len(indices) < needed:
        raise SettingsError(f"expected at least {needed} frames per video, got {len(indices)}; raise video.num_frames")
    try:
        pixels = decoder.get_frames_at(indices=indices).data
        height, width = video_size(len(indices), *pixels.shape[-2:], settings, preprocessor)
    except (RuntimeError, ValueError, IndexError) as error:
        raise _media_error(path, error) from error
    grid = (-(-len(indices) // needed), height // preprocessor.patch_size, width // preprocessor.patch_size)
    timestamps_s = tuple(index / fps for index in indices)
    return Frames(resize_frames(pixels, height, width), timestamps_s, grid, "video", preprocessor)


def decode_image(path: str | Path, settings: VideoConfig, preprocessor: Preprocessor) -> Frames:
    """Read an image (EXIF orientation applied, converted to RGB) and resize it.

    Raises:
        MediaError: the file is missing, empty or damaged, or no image.
        NotInstalled: Pillow is not installed.
    """
    _require_file(path)
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise NotInstalled("images are read by Pillow, which is not installed: `pip install pillow`") from error
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
        height, width = image_size(image.height, image.width, settings, preprocessor)
    # Pillow reports damage with several types, among them SyntaxError and its own decompression-bomb error.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _media_error(path, error) from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    pixels = resize_frames(pixels.permute(0, 3, 1, 2).contiguous(), height, width)
    grid = (1, height // preprocessor.patch_size, width // preprocessor.patch_size)
    return Frames(pixels, (), grid, "image", preprocessor)


def video_patches(pixels: torch.Tensor, preprocessor: Preprocessor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalised patches in the order of the vision tower: (t, h, w, merge_h, merge_w) by (channel, time, y, x).

    Args:
        pixels: uint8 [F, C, H, W]; H and W are multiples of `preprocessor.factor`. A last frame without a partner
            (and the one frame of an image) is repeated.
        dtype: of the result; the arithmetic is float32.
    Returns:
        [T * H/patch * W/patch, C * temporal_patch * patch * patch] on the device of `pixels`.
    Raises:
        TypeError: pixels are not uint8. ValueError: another shape.
    """
    if pixels.dtype != torch.uint8:
        raise TypeError(f"expected uint8 pixels, got {pixels.dtype}")
    patch, merge, span = preprocessor.patch_size, preprocessor.merge_size, preprocessor.temporal_patch_size
    if pixels.ndim != 4 or pixels.shape[-2] % preprocessor.factor or pixels.shape[-1] % preprocessor.factor:
        raise ValueError(
            f"expected frames [F, C, H, W] with H and W multiples of {preprocessor.factor}, got {tuple(pixels.shape)}"
        )
    if missing := -pixels.shape[0] % span:
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
    frames, channels, height, width = pixels.shape
    # 0-1 scale and normalisation in one step: (x/255 - mean)/std = (x - 255 mean)/(255 std).
    mean = torch.tensor(preprocessor.image_mean, device=pixels.device).mul(255).view(-1, 1, 1)
    std = torch.tensor(preprocessor.image_std, device=pixels.device).mul(255).view(-1, 1, 1)
    grid = pixels.float().sub_(mean).div_(std).to(dtype)
    grid = grid.view(
        frames // span, span, channels, height // (merge * patch), merge, patch, width // (merge * patch), merge, patch
    )
    grid = grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return grid.reshape(-1, channels * span * patch * patch)


def _require_file(path: str | Path) -> None:
    path = Path(path)
    try:
        found, size = path.is_file(), path.stat().st_size if path.is_file() else 0
        with open(path, "rb") if found else nullcontext():
            pass
    except OSError as error:
        raise MediaError(f"{path}: cannot be opened ({error.strerror}); check the file or drop the question") from error
    if not found:
        raise MediaError(f"{path}: no such file; check the path in the question file and data.media_root")
    if size == 0:
        raise MediaError(f"{path}: the file is empty; fetch it again or drop the question")


def _refuse_truncated(path: str | Path) -> None:
    """Refuse an MP4 or MOV file that ends before its last box does: decoders take what is left as a shorter video."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        if head[4:] != b"ftyp":
            return
        offset = 0
        # A box is 4 bytes of size and 4 of type; size 1 means that 8 bytes of size follow, 0 that it fills the file.
        while len(head) == 8:
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length == 0:
                return
            offset += max(length, 8)
            if offset > size:
                raise MediaError(
                    f"{path}: truncated: expected at least {offset} bytes, got {size}; "
                    "fetch it again or drop the question"
                )
            file.seek(offset)
            head = file.read(8)


def _media_error(path: str | Path, error: Exception) -> MediaError:
    reason = _SOURCE_LINE.sub("", str(error).strip().split("\n", 1)[0]).strip() or type(error).__name__
    return MediaError(f"{path}: cannot be decoded ({reason}); fetch it again, re-encode it or drop the question")


def _video_decoder() -> type:
    # torchcodec raises RuntimeError or OSError on import where the FFmpeg libraries are missing.
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise NotInstalled(NO_TORCHCODEC.format(reason=reason)) from error
    return VideoDecoder
