"""Preprocess pixels like a model family's processor: choice of frames, size, normalization and order of patches.

The results equal those of transformers' Qwen3-VL and Qwen2-VL video processors and its Qwen2-VL image processor
(tests/media/test_preprocessing.py), without torchvision or transformers. The pixels are computed by
`rmsd_kernels.resize_frames` and `rmsd_kernels.video_patches`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import rmsd_kernels
from rmsd_fast.config import ModelError, SettingsError, VideoConfig

# Largest ratio of the longest to the shortest side that the family's processors accept.
MAX_ASPECT_RATIO = 200
# The per-frame cap is never below this multiple of the lower budget (as in the family's processor).
FRAME_CAP_FLOOR = 1.05
# Prefixes of names in a model folder that identify a video processor: Qwen3-VL's, or that of Qwen2-VL and Qwen2.5-VL.
FAMILIES = {"qwen3_vl": ("qwen3vl", "qwen3_vl"), "qwen2_vl": ("qwen2vl", "qwen2_vl", "qwen2_5_vl", "qwen25vl")}


@dataclass(frozen=True)
class Preprocessor:
    """Preprocessing settings of a model, read from its folder by `load_preprocessor`.

    Means and standard deviations are per RGB channel on the 0-1 scale. Resizing is always bicubic and antialiased.
    `family` is the key of FAMILIES whose rules choose frames and sizes.
    """

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    family: str = "qwen3_vl"

    @property
    def repeats_frames(self) -> bool:
        """Whether a video with fewer frames than `video.num_frames` has some of them more than once."""
        return self.family == "qwen3_vl"

    @property
    def factor(self) -> int:
        """Return the side of one vision token in pixels. Heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the number of patches along time, height and width for `frames` resized frames."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size


def load_preprocessor(folder: str | Path) -> Preprocessor:
    """Read patch sizes and normalization from a model folder.

    Reads `video_preprocessor_config.json`, then `processor_config.json` (section `video_processor`), then
    `preprocessor_config.json`. Image settings, if there are any, must agree with the video settings.

    Raises:
        ModelError: a file is missing or does not hold a JSON object, a value is missing or wrong, or the settings are
            not supported.
    """
    folder = Path(folder)
    joint = _read_json(folder / "processor_config.json")
    video = _read_json(folder / "video_preprocessor_config.json") or joint.get("video_processor")
    image = _read_json(folder / "preprocessor_config.json") or joint.get("image_processor")
    family = _family([video or {}, image or {}, joint, _read_json(folder / "config.json")])
    parsed = [_parse_preprocessor(settings, folder, family) for settings in (video, image) if settings]
    if not parsed:
        raise ModelError(
            f"{folder}: expected video_preprocessor_config.json or preprocessor_config.json, got neither; "
            "copy them from the original model folder"
        )
    if parsed[0] != parsed[-1]:
        raise ModelError(
            f"{folder}: expected the same preprocessing for images and videos, got {parsed[-1]} and {parsed[0]}; "
            "models of the Qwen-VL families share these settings, so check the two JSON files"
        )
    return parsed[0]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}); restore it from the original model folder"
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _family(files: list[dict[str, Any]]) -> str:
    """Return the family of the first name that identifies one.

    Names of image processors do not identify it, because Qwen3-VL uses the image processor of Qwen2-VL.
    """
    for settings in files:
        for key in ("video_processor_type", "processor_class", "model_type"):
            name = str(settings.get(key, "")).lower()
            for family, starts in FAMILIES.items():
                if name.startswith(starts):
                    return family
    return "qwen3_vl"


def _parse_preprocessor(settings: dict[str, Any], folder: Path, family: str) -> Preprocessor:
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
            family=family,
        )
    except KeyError as error:
        raise ModelError(f"{folder}: the preprocessor settings lack {error.args[0]!r}; restore them") from error
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder}: the preprocessor settings have an invalid value ({error}); restore them"
        ) from error


def frame_indices(total: int, fps: float, settings: VideoConfig, preprocessor: Preprocessor) -> list[int]:
    """Return the indices of the frames taken from a video, spaced evenly like those of the model family's processor.

    Qwen3-VL takes the first and the last frame, and repeats frames if `num_frames` exceeds the number of frames.
    Qwen2-VL and Qwen2.5-VL take the first frame of equal parts, and a multiple of `temporal_patch_size`. If the video
    has fewer than `num_frames` frames, they take all of its frames (transformers rejects such videos).

    Args:
        total: number of frames in the video, at least `temporal_patch_size`.
        fps: frame rate in Hz.
        settings: `num_frames` takes exactly that many frames. `fps` takes that many per second, within [min_frames,
            max_frames], at most `total`, and at least one temporal patch.
        preprocessor: the model's preprocessing settings.
    Raises:
        SettingsError: as `check_frame_counts`.
        ValueError: there are fewer frames than in a temporal patch, or the frame rate is not above 0.
    """
    check_frame_counts(settings, preprocessor)
    needed = preprocessor.temporal_patch_size
    if total < needed or fps <= 0:
        raise ValueError(f"expected a video of at least {needed} frames and a frame rate, got {total} at {fps} Hz")
    choose = _spread_qwen3 if preprocessor.family == "qwen3_vl" else _spread_qwen2
    return choose(total, fps, settings, needed)


def frame_rule(settings: VideoConfig, family: str = "qwen3_vl") -> dict[str, Any]:
    """Return the settings with which `frame_indices` chooses frames. `family` is added if it is not the default."""
    names = ("num_frames",) if settings.fps is None else ("fps", "min_frames", "max_frames")
    rule = {name: getattr(settings, name) for name in names}
    return rule if family == "qwen3_vl" else rule | {"family": family}


def check_frame_counts(settings: VideoConfig, preprocessor: Preprocessor) -> None:
    """Raise SettingsError if the settings could choose fewer frames of a video than a temporal patch has."""
    if (settings.num_frames is None) == (settings.fps is None):
        raise SettingsError(
            f"video.num_frames={settings.num_frames} and video.fps={settings.fps}: expected exactly one of them; "
            "set the other to null"
        )
    names = ("num_frames",) if settings.fps is None else ("min_frames", "max_frames")
    for name in names:
        if getattr(settings, name) < preprocessor.temporal_patch_size:
            raise SettingsError(
                f"video.{name}: expected at least {preprocessor.temporal_patch_size}, the frames of one "
                f"temporal patch, got {getattr(settings, name)}; raise it"
            )


def _spread_qwen3(total: int, fps: float, settings: VideoConfig, span: int) -> list[int]:
    if settings.num_frames is not None:
        count = settings.num_frames
    else:
        count = int(total / fps * settings.fps)
        count = min(max(count, settings.min_frames), settings.max_frames, total)
    # float64 and rounding half to even give the same values as numpy's linspace().round() in the processor.
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().to(torch.int64).tolist()


def _spread_qwen2(total: int, fps: float, settings: VideoConfig, span: int) -> list[int]:
    if settings.num_frames is not None:
        count = min(round(settings.num_frames / span), total // span) * span
    else:
        most = min(settings.max_frames, total) // span * span
        count = int(min(max(total / fps * settings.fps, settings.min_frames), most)) // span * span
    # The processor steps in float32. If the step is rounded down, arange yields one index too many, past the end.
    return torch.arange(0, total, total / count).int().tolist()[:count]


def smart_resize(
    num_frames: int, height: int, width: int, *, factor: int, temporal_factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the nearest height and width that are multiples of `factor` and keep T*H*W within the budgets.

    For images, pass `temporal_factor` 1 and `num_frames` 1: a side below `factor` is then not enlarged first.

    Raises:
        ValueError: there are fewer frames than `temporal_factor`, a frame is empty, or an aspect ratio is above 200.
    """
    if num_frames < temporal_factor:
        raise ValueError(f"expected at least {temporal_factor} frames, got {num_frames}")
    if height < 1 or width < 1:
        raise ValueError(f"expected frames of at least 1x1 pixel, got {width}x{height}")
    size = f"{width}x{height}"
    if temporal_factor > 1 and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(f"expected an aspect ratio of at most {MAX_ASPECT_RATIO}, got {ratio:.0f} ({size})")
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
    """Return a video's height and width after resizing, with the cap per frame. Raises as `smart_resize`."""
    share = min(settings.max_frame_pixels, settings.max_video_pixels // num_frames)
    per_frame = max(share, int(settings.min_video_pixels * FRAME_CAP_FLOOR))
    # Qwen2-VL's processor computes the size of each frame separately, as for an image.
    whole = preprocessor.family == "qwen3_vl"
    return smart_resize(
        num_frames if whole else 1,
        height,
        width,
        factor=preprocessor.factor,
        temporal_factor=preprocessor.temporal_patch_size if whole else 1,
        min_pixels=settings.min_video_pixels,
        max_pixels=per_frame * (num_frames if whole else 1),
    )


def image_size(height: int, width: int, settings: VideoConfig, preprocessor: Preprocessor) -> tuple[int, int]:
    """Return height and width of an image after resizing. Raises ValueError as `smart_resize`."""
    return smart_resize(
        1,
        height,
        width,
        factor=preprocessor.factor,
        temporal_factor=1,
        min_pixels=settings.min_image_pixels,
        max_pixels=settings.max_image_pixels,
    )


def video_patches(pixels: torch.Tensor, preprocessor: Preprocessor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the patches of resized frames in the format of the model's vision tower.

    Frames are uint8 [F, C, H, W], patches [N, C * span * patch²].

    All arithmetic is in float32, regardless of the dtype.
    """
    patches = rmsd_kernels.video_patches(
        pixels,
        height=pixels.shape[-2],
        width=pixels.shape[-1],
        patch_size=preprocessor.patch_size,
        temporal_patch_size=preprocessor.temporal_patch_size,
        merge_size=preprocessor.merge_size,
        mean=preprocessor.image_mean,
        std=preprocessor.image_std,
        dtype=torch.float32 if dtype == torch.float64 else dtype,
    )
    return patches.to(dtype)
