"""Test frame selection, sizes and patches against hand-computed numbers and the processors of the model families."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import decode_image, noise_frames, write_images
from PIL import Image

from rmsd_fast.config import SettingsError, VideoConfig
from rmsd_fast.data.preprocess import (
    Preprocessor,
    check_frame_counts,
    frame_indices,
    image_size,
    load_preprocessor,
    smart_resize,
    video_patches,
    video_size,
)
from rmsd_kernels import resize_frames

PREPROCESSOR = Preprocessor()
# Qwen2-VL uses the means and deviations of CLIP and patches of 14.
QWEN2 = Preprocessor(
    14, 2, 2, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), family="qwen2_vl"
)


@pytest.mark.parametrize(
    ("total", "fps", "settings", "expected"),
    [
        (10, 10.0, VideoConfig(num_frames=4), [0, 3, 6, 9]),
        # The exact values 2.25, 4.5 and 6.75 are rounded, and halves go to the even neighbor.
        (10, 10.0, VideoConfig(num_frames=5), [0, 2, 4, 7, 9]),
        # More frames are requested than the video has, so indices repeat.
        (3, 10.0, VideoConfig(num_frames=5), [0, 0, 1, 2, 2]),
        # 100 frames at 25 Hz last 4 s. A rate of 1.5 per second gives 6 frames, 19.8 apart.
        (100, 25.0, VideoConfig(num_frames=None, fps=1.5), [0, 20, 40, 59, 79, 99]),
        # The rate asks for 2 frames, but at least 4 are taken.
        (100, 100.0, VideoConfig(num_frames=None, fps=2.0), [0, 33, 66, 99]),
        # The count is at most max_frames and at most the number of frames in the video.
        (100, 10.0, VideoConfig(num_frames=None, fps=10.0, max_frames=2), [0, 99]),
        (3, 10.0, VideoConfig(num_frames=None, fps=1.0), [0, 1, 2]),
    ],
)
def test_frame_indices(total: int, fps: float, settings: VideoConfig, expected: list[int]) -> None:
    assert frame_indices(total, fps, settings, PREPROCESSOR) == expected


@pytest.mark.parametrize(
    ("total", "fps", "settings", "expected"),
    [
        # Each index is the first frame of one of four equal parts, so the last frame of the video is not taken.
        (10, 10.0, VideoConfig(num_frames=4), [0, 2, 5, 7]),
        # The count is even. If the file has fewer frames, the count is that of the file.
        (10, 10.0, VideoConfig(num_frames=3), [0, 2, 5, 7]),
        (5, 10.0, VideoConfig(num_frames=8), [0, 1, 2, 3]),
        # 4 s at 1.3 per second are 5.2 frames, which gives 4.
        (100, 25.0, VideoConfig(num_frames=None, fps=1.3), [0, 25, 50, 75]),
        (100, 100.0, VideoConfig(num_frames=None, fps=2.0), [0, 25, 50, 75]),
    ],
)
def test_frame_indices_of_qwen2(total: int, fps: float, settings: VideoConfig, expected: list[int]) -> None:
    assert frame_indices(total, fps, settings, QWEN2) == expected


def test_frame_indices_of_qwen2_stay_within_the_video() -> None:
    """Steps rounded down would give one more frame, past the end."""
    for total in range(8, 400):
        for settings in (VideoConfig(num_frames=30), VideoConfig(num_frames=None, fps=2.0)):
            indices = frame_indices(total, 25.0, settings, QWEN2)
            assert len(indices) % 2 == 0 and indices[-1] < total


@pytest.mark.parametrize("settings", [VideoConfig(num_frames=4, fps=1.0), VideoConfig(num_frames=None)])
def test_frame_indices_needs_exactly_one_of_count_and_rate(settings: VideoConfig) -> None:
    with pytest.raises(SettingsError, match="expected exactly one of them"):
        frame_indices(10, 10.0, settings, PREPROCESSOR)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl"])
def test_frame_counts_never_fall_below_a_temporal_patch(family: str) -> None:
    """Settings that could do this for some video are refused for all videos, so that none of them ends a run."""
    preprocessor = Preprocessor(family=family, temporal_patch_size=3)
    for settings in (
        VideoConfig(num_frames=2),
        VideoConfig(num_frames=None, fps=2.0, min_frames=2),
        VideoConfig(num_frames=None, fps=2.0, min_frames=3, max_frames=2),
    ):
        with pytest.raises(SettingsError, match="frames: expected at least 3, the frames of one temporal patch"):
            check_frame_counts(settings, preprocessor)
    for settings in (VideoConfig(num_frames=3), VideoConfig(num_frames=None, fps=0.01, min_frames=3, max_frames=5)):
        assert all(len(frame_indices(total, 10.0, settings, preprocessor)) >= 3 for total in range(3, 200))
    with pytest.raises(ValueError, match="a video of at least 3 frames and a frame rate, got 2 at 10.0 Hz"):
        frame_indices(2, 10.0, VideoConfig(num_frames=3), preprocessor)


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((8, 64, 64), (4096, 10**9), (64, 64)),
        # 100/32 = 3.1 and 200/32 = 6.25.
        ((8, 100, 200), (4096, 10**9), (96, 192)),
        # 8*480*640 is 18.75 times the budget. The sides shrink by 4.33 to 3.46 and 4.62 steps of 32, rounded down.
        ((8, 480, 640), (4096, 8 * 128 * 128), (96, 128)),
        # The size is a quarter of the lower budget, so the sides double.
        ((8, 32, 32), (8 * 64 * 64, 10**9), (64, 64)),
        # The shorter side is first enlarged to 32.
        ((2, 10, 20), (1024, 10**9), (32, 64)),
        # A side is never below one step, regardless of the budget.
        ((2, 64, 64), (1, 100), (32, 32)),
    ],
)
def test_smart_resize(size: tuple[int, int, int], budget: tuple[int, int], expected: tuple[int, int]) -> None:
    got = smart_resize(*size, factor=32, temporal_factor=2, min_pixels=budget[0], max_pixels=budget[1])
    assert got == expected


@pytest.mark.parametrize(
    ("size", "message"),
    [((1, 64, 64), "at least 2 frames, got 1"), ((2, 1, 300), "aspect ratio"), ((2, 0, 64), "at least 1x1")],
)
def test_smart_resize_refuses(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        smart_resize(*size, factor=32, temporal_factor=2, min_pixels=1, max_pixels=10**9)


def test_frame_cap_limits_short_videos_and_shared_budget_limits_long_videos() -> None:
    settings = VideoConfig(min_video_pixels=1024, max_video_pixels=16 * 64 * 64, max_frame_pixels=96 * 96)
    # 4 frames could have 128x128 pixels each, but the cap allows 96x96. 16 frames share the budget, with 64x64 each.
    assert video_size(4, 320, 320, settings, PREPROCESSOR) == (96, 96)
    assert video_size(16, 320, 320, settings, PREPROCESSOR) == (64, 64)
    # Qwen2-VL's budgets apply to one frame, so 4 frames of 56x56 are enlarged to the lower budget.
    few = VideoConfig(min_video_pixels=84 * 84, max_video_pixels=4 * 112 * 112, max_frame_pixels=10**6)
    assert video_size(4, 56, 56, few, QWEN2) == (84, 84) and video_size(4, 280, 280, few, QWEN2) == (112, 112)
    # Images have their own budgets.
    settings = VideoConfig(min_image_pixels=1024, max_image_pixels=64 * 64)
    assert image_size(320, 320, settings, PREPROCESSOR) == (64, 64)


def test_patch_order_and_scale() -> None:
    pixels = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    patches = video_patches(pixels, PREPROCESSOR)
    assert patches.shape == (2 * 4 * 6, 3 * 2 * 16 * 16)
    # Compute one pixel by hand: frame 3, channel 2, y=37, x=70. It is in time step 1 (frame 1 of it), in patch row 2
    # and column 4 (offsets 5 and 6). The merge block is in row 1 of 2 and column 2 of 3, and the patch is its first:
    # row = 24 + (1*3 + 2)*4.
    row, column = 24 + (1 * 3 + 2) * 4, 2 * 512 + 1 * 256 + 5 * 16 + 6
    assert patches[row, column] == (pixels[3, 2, 37, 70].float() - 127.5) / 127.5
    # Check all pixels with loops over the documented order.
    for t, y, x in [(0, 0, 0), (1, 3, 5), (0, 1, 4), (1, 2, 1)]:
        block = (y // 2) * 3 + x // 2
        row = t * 24 + block * 4 + (y % 2) * 2 + x % 2
        expected = pixels[2 * t : 2 * t + 2, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].transpose(0, 1)
        torch.testing.assert_close(patches[row], ((expected.float() - 127.5) / 127.5).reshape(-1), rtol=0, atol=0)


def test_an_unpaired_last_frame_is_repeated() -> None:
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    padded = torch.cat([pixels, pixels[-1:]])
    assert torch.equal(video_patches(pixels, PREPROCESSOR), video_patches(padded, PREPROCESSOR))


def test_patches_refuse_invalid_input() -> None:
    with pytest.raises(TypeError, match="uint8"):
        video_patches(torch.zeros(2, 3, 32, 32), PREPROCESSOR)
    with pytest.raises(ValueError, match="multiples of 32"):
        video_patches(torch.zeros(2, 3, 32, 48, dtype=torch.uint8), PREPROCESSOR)


def test_patches_in_bfloat16_are_rounded_once() -> None:
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    exact = video_patches(pixels, PREPROCESSOR)
    assert torch.equal(video_patches(pixels, PREPROCESSOR, dtype=torch.bfloat16), exact.to(torch.bfloat16))


def test_load_preprocessor_reads_either_layout(tmp_path: Path) -> None:
    settings = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.1] * 3,
        "image_std": [1] * 3,
    }
    expected = Preprocessor(14, 2, 2, (0.1, 0.1, 0.1), (1.0, 1.0, 1.0))
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"video_processor": settings, "image_processor": settings})
    )
    assert load_preprocessor(tmp_path) == expected
    (tmp_path / "processor_config.json").unlink()
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(settings))
    assert load_preprocessor(tmp_path) == expected
    assert expected.factor == 28
    # The family comes from the names of the processors, otherwise from the model's. The name of an image processor does
    # not determine it.
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**settings, "image_processor_type": "Qwen2VLImageProcessorFast"})
    )
    assert load_preprocessor(tmp_path).family == "qwen3_vl"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert load_preprocessor(tmp_path).family == "qwen2_vl"
    (tmp_path / "video_preprocessor_config.json").write_text(
        json.dumps({**settings, "video_processor_type": "Qwen3VLVideoProcessor"})
    )
    assert load_preprocessor(tmp_path).family == "qwen3_vl"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "got neither"),
        ({"preprocessor_config.json": "{"}, "cannot be read as JSON"),
        ({"preprocessor_config.json": "[1]"}, "expected a JSON object, got list"),
        ({"preprocessor_config.json": '{"patch_size": 16}'}, "lack 'temporal_patch_size'"),
        ({"preprocessor_config.json": '{"resample": 2}'}, "resample=2 is not supported"),
    ],
)
def test_load_preprocessor_refuses(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_preprocessor(tmp_path)


# Each case gives frames, height, width, lower and upper budget, and the cap per frame in tokens. There is one case per
# branch: unchanged size; odd count; enlarging to the lower budget; shrinking to the upper budget; the cap; the floor of
# the cap; a side below one token; the shape of 720p.
VIDEO_CASES = [
    (4, 64, 96, 1024, 10**8, 768),
    (5, 70, 90, 1024, 10**8, 768),
    (3, 33, 40, 3 * 96 * 96, 10**8, 768),
    (8, 200, 312, 1024, 8 * 96 * 96, 768),
    (6, 240, 180, 1024, 10**8, 12),
    (6, 240, 234, 64 * 64, 6 * 32 * 32, 1),
    (2, 20, 90, 1024, 10**8, 768),
    (7, 180, 320, 4096, 25165824, 30),
]
IMAGE_CASES = [(64, 96, 1024, 10**8), (70, 111, 1024, 10**8), (20, 45, 64 * 64, 10**8), (300, 201, 1024, 96 * 96)]
# Each case gives frames, height, width, the lower budget of a frame, the tokens that all frames share, and the cap of a
# frame in pixels.
QWEN2_CASES = [(4, 84, 112, 784, 10**6, 10**8), (5, 90, 70, 112 * 112, 10**6, 10**8), (6, 200, 300, 784, 200, 10**8)]
QWEN2_CASES += [(2, 200, 300, 784, 10**6, 112 * 112), (4, 20, 300, 784, 10**6, 10**8)]
# Each case gives the frames in the video, its rate, and the requested number of frames or frames per second.
RATES = [
    (132, 25.0, 16, None),
    (132, 25.0, 64, None),
    (250, 29.97, None, 2.0),
    (7, 30.0, None, 1.0),
    (5, 9.0, 9, None),
]

ORACLE = """
import warnings; warnings.filterwarnings("ignore")
from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor
from transformers.image_utils import load_image
from transformers.video_utils import VideoMetadata
job = torch.load(sys.argv[1])
half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
video = Qwen3VLVideoProcessor(**half)
image = Qwen2VLImageProcessor(patch_size=16, merge_size=2, temporal_patch_size=2, **half)
out = {"videos": [], "images": [], "files": [], "indices": [], "videos2": [], "indices2": []}
for pixels, low, high, cap in job["videos"]:
    video.max_video_tokens = cap
    got = video(videos=[pixels], do_sample_frames=False, cap_pixels_per_frame=True,
                size={"shortest_edge": low, "longest_edge": high}, return_tensors="pt")
    out["videos"].append((got["pixel_values_videos"], got["video_grid_thw"]))
for pixels, low, high in job["images"]:
    got = image(images=[pixels], size={"shortest_edge": low, "longest_edge": high}, return_tensors="pt")
    out["images"].append((got["pixel_values"], got["image_grid_thw"]))
for path in job["files"]:
    got = image(images=[load_image(path)], size={"shortest_edge": 4096, "longest_edge": 4194304}, return_tensors="pt")
    out["files"].append((got["pixel_values"], got["image_grid_thw"]))
for total, fps, count, rate in job["rates"]:
    video.fps = None if count else rate
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    out["indices"].append(video.sample_frames(metadata, num_frames=count, fps=rate).tolist())
video = Qwen2VLVideoProcessor()
for pixels, low, share, cap in job["videos2"]:
    video.max_video_tokens = share
    got = video(videos=[pixels], do_sample_frames=False, cap_pixels_per_frame=True,
                size={"shortest_edge": low, "longest_edge": cap}, return_tensors="pt")
    out["videos2"].append((got["pixel_values_videos"], got["video_grid_thw"]))
for total, fps, count, rate in job["rates"]:
    video.fps = None if count else rate
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    enough = count is None or count <= total
    out["indices2"].append(video.sample_frames(metadata, num_frames=count, fps=rate).tolist() if enough else None)
torch.save(out, sys.argv[2])
"""


def test_equal_to_the_processors_of_transformers(tmp_path: Path, run_with_torchvision) -> None:
    videos = [(noise_frames(f, h, w, seed=f), low, high, cap) for f, h, w, low, high, cap in VIDEO_CASES]
    videos.append((torch.randint(0, 256, (4, 3, 150, 130), dtype=torch.uint8), 1024, 4 * 100 * 100, 768))
    images = [(noise_frames(1, h, w, seed=h)[0], low, high) for h, w, low, high in IMAGE_CASES]
    (tmp_path / "images").mkdir()
    files = write_images(tmp_path / "images")
    # transformers shows the colors that transparent areas hide, so it gets the picture on white.
    on_white = Image.open(files["rgba"])
    colour, alpha = np.split(np.asarray(on_white).astype(int), [3], axis=2)
    Image.fromarray(((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)).save(tmp_path / "white.png")
    theirs_files = [str(tmp_path / "white.png" if name == "rgba" else path) for name, path in files.items()]
    videos2 = [(noise_frames(f, h, w, seed=f), low, share, cap) for f, h, w, low, share, cap in QWEN2_CASES]
    job = {"videos": videos, "images": images, "files": theirs_files, "rates": RATES, "videos2": videos2}
    torch.save(job, tmp_path / "job.pt")
    run_with_torchvision(ORACLE, str(tmp_path / "job.pt"), str(tmp_path / "out.pt"))
    theirs = torch.load(tmp_path / "out.pt")

    for (pixels, low, high, cap), (patches, grid) in zip(videos, theirs["videos"], strict=True):
        settings = VideoConfig(min_video_pixels=low, max_video_pixels=high, max_frame_pixels=cap * 32 * 32)
        height, width = video_size(len(pixels), *pixels.shape[-2:], settings, PREPROCESSOR)
        assert grid.tolist() == [[-(-len(pixels) // 2), height // 16, width // 16]]
        ours = video_patches(resize_frames(pixels, height=height, width=width), PREPROCESSOR)
        assert (ours - patches).abs().max() == 0.0
    for (pixels, low, share, cap), (patches, grid) in zip(videos2, theirs["videos2"], strict=True):
        whole = int(share * 28 * 28 * 0.9) * 2
        settings = VideoConfig(min_video_pixels=low, max_video_pixels=whole, max_frame_pixels=cap)
        height, width = video_size(len(pixels), *pixels.shape[-2:], settings, QWEN2)
        assert grid.tolist() == [list(QWEN2.grid(len(pixels), height, width))]
        ours = video_patches(resize_frames(pixels, height=height, width=width), QWEN2)
        # The processor multiplies where this code divides: one unit in the last place of values up to 2.7.
        assert (ours - patches).abs().max() < 1e-6
    for (pixels, low, high), (patches, grid) in zip(images, theirs["images"], strict=True):
        settings = VideoConfig(min_image_pixels=low, max_image_pixels=high)
        height, width = image_size(*pixels.shape[-2:], settings, PREPROCESSOR)
        assert grid.tolist() == [[1, height // 16, width // 16]]
        ours = video_patches(resize_frames(pixels[None], height=height, width=width), PREPROCESSOR)
        assert (ours - patches).abs().max() == 0.0
    for path, (patches, grid) in zip(files.values(), theirs["files"], strict=True):
        frames = decode_image(path, VideoConfig(), PREPROCESSOR)
        assert [list(frames.grid_thw)] == grid.tolist()
        assert (video_patches(frames.pixels, PREPROCESSOR) - patches).abs().max() == 0.0
    for (total, fps, count, rate), indices, indices2 in zip(RATES, theirs["indices"], theirs["indices2"], strict=True):
        settings = VideoConfig(num_frames=count, fps=rate)
        assert frame_indices(total, fps, settings, PREPROCESSOR) == indices
        assert indices2 is None or frame_indices(total, fps, settings, QWEN2) == indices2
