"""Decoding of videos and images: the right frames, upright and in RGB, and files that cannot be used."""

from __future__ import annotations

import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from media_files import noise_frames, write_clip, write_images

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.video import MediaError, Preprocessor, decode_image, decode_video, video_patches

PREPROCESSOR = Preprocessor()


def test_decode_video_takes_the_right_frames(tmp_path: Path) -> None:
    levels = torch.arange(10).mul(25).to(torch.uint8).view(10, 1, 1, 1).expand(10, 3, 64, 96).contiguous()
    clip = write_clip(tmp_path / "levels.mp4", levels, fps=5.0)
    frames = decode_video(clip, VideoConfig(num_frames=4), PREPROCESSOR)
    assert frames.kind == "video" and frames.grid_thw == (2, 4, 6)
    assert frames.pixels.dtype == torch.uint8 and frames.pixels.shape == (4, 3, 64, 96)
    assert frames.timestamps_s == (0.0, 0.6, 1.2, 1.8)
    # Frames 0, 3, 6 and 9; h264 keeps flat grey to within a few levels.
    got = frames.pixels.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(got, torch.tensor([0.0, 75.0, 150.0, 225.0]), rtol=0, atol=4)


def test_decode_video_of_odd_count_has_a_whole_grid(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(9, 64, 64))
    frames = decode_video(clip, VideoConfig(num_frames=5), PREPROCESSOR)
    assert frames.grid_thw == (3, 4, 4) and len(frames.pixels) == 5
    assert len(video_patches(frames.pixels, PREPROCESSOR)) == 3 * 4 * 4


def test_rotation_in_the_file_is_applied(tmp_path: Path) -> None:
    pixels = torch.zeros(4, 3, 64, 96, dtype=torch.uint8)
    pixels[:, :, :, :32] = 255
    data = bytearray(write_clip(tmp_path / "clip.mp4", pixels).read_bytes())
    # Display matrix of the track header (version 0: 40 bytes behind the box type): a quarter turn clockwise.
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
    rotated = tmp_path / "rotated.mp4"
    rotated.write_bytes(data)
    frames = decode_video(rotated, VideoConfig(num_frames=2), PREPROCESSOR)
    assert frames.pixels.shape[-2:] == (96, 64)
    # The white third, left before, is on top.
    assert frames.pixels[:, :, :28].float().mean() > 245 and frames.pixels[:, :, 36:].float().mean() < 10


def test_threads_decode_the_same_file_at_once(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(12, 64, 64))
    settings = VideoConfig(num_frames=6)
    alone = decode_video(clip, settings, PREPROCESSOR).pixels
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda _: decode_video(clip, settings, PREPROCESSOR).pixels, range(8)))
    assert all(torch.equal(pixels, alone) for pixels in together)


def _damaged(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.mp4"
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
        return path
    if kind == "audio only":
        from torchcodec.encoders import AudioEncoder

        AudioEncoder(torch.zeros(1, 8000), sample_rate=8000).to_file(path)
        return path
    if kind == "garbage":
        path.write_bytes(bytes(range(256)) * 20)
        return path
    if kind == "empty":
        path.touch()
        return path
    frames = 1 if kind == "one frame" else 20
    data = write_clip(path, noise_frames(frames, 64, 64), faststart=kind == "truncated fast-start").read_bytes()
    if kind.startswith("truncated"):
        # The fast-start file keeps its index and half of its pictures: a decoder alone takes it for a shorter video.
        start = data.index(b"mdat") if kind == "truncated fast-start" else 0
        path.write_bytes(data[: start + (len(data) - start) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("folder", "no such file"),
        ("empty", "the file is empty"),
        ("garbage", "cannot be decoded"),
        ("truncated", "truncated: expected at least"),
        ("truncated fast-start", "truncated: expected at least"),
        ("audio only", "cannot be decoded"),
        ("one frame", "too few frames: expected at least 2, got 1"),
    ],
)
def test_unusable_videos_name_path_and_reason(tmp_path: Path, kind: str, message: str) -> None:
    path = _damaged(tmp_path, kind)
    with pytest.raises(MediaError) as caught:
        decode_video(path, VideoConfig(num_frames=4), PREPROCESSOR)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert ".cpp" not in str(caught.value)


def test_settings_that_leave_too_few_frames_are_no_fault_of_the_file(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(6, 64, 64))
    with pytest.raises(ValueError, match=r"raise video\.num_frames"):
        decode_video(clip, VideoConfig(num_frames=1), PREPROCESSOR)


@pytest.mark.parametrize("module", ["raise RuntimeError('Could not load libtorchcodec')", None])
def test_without_torchcodec_or_ffmpeg_says_what_to_install(
    tmp_path: Path, repository: Path, module: str | None
) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"something")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(repository)!r}]
{"sys.modules['torchcodec'] = None" if module is None else ""}
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.video import MediaError, Preprocessor, decode_video
try:
    decode_video({str(tmp_path / "clip.mp4")!r}, VideoConfig(), Preprocessor())
except RuntimeError as error:
    assert not isinstance(error, MediaError)
    print(error)
"""
    if module is not None:
        (tmp_path / "torchcodec").mkdir()
        (tmp_path / "torchcodec" / "__init__.py").write_text(module + "\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install torchcodec" in done.stdout and "apt-get install ffmpeg" in done.stdout


def test_images_become_rgb_and_upright(tmp_path: Path) -> None:
    images = write_images(tmp_path)
    settings = VideoConfig()
    for name, path in images.items():
        frames = decode_image(path, settings, PREPROCESSOR)
        height, width = (96, 64) if name == "turned" else (64, 96)
        assert frames.kind == "image" and frames.timestamps_s == ()
        assert frames.pixels.shape == (1, 3, height, width) and frames.grid_thw == (1, height // 16, width // 16)
        assert len(video_patches(frames.pixels, PREPROCESSOR)) == height // 16 * width // 16
    grey = decode_image(images["grey"], settings, PREPROCESSOR).pixels
    assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    upright = decode_image(images["rgb"], settings, PREPROCESSOR).pixels.float()
    turned = decode_image(images["turned"], settings, PREPROCESSOR).pixels.float()
    # A quarter clockwise: the left column comes to the top; JPEG keeps smooth blobs to a few levels.
    assert (upright.rot90(-1, (2, 3)) - turned).abs().mean() < 3


@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "truncated", "extreme"])
def test_unusable_images_name_path_and_reason(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    path = tmp_path / "image.png"
    if kind == "empty":
        path.touch()
    elif kind == "garbage":
        path.write_bytes(b"no picture at all")
    elif kind == "truncated":
        Image.fromarray(torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "extreme":
        Image.new("RGB", (2010, 10)).save(path)
    with pytest.raises(MediaError, match=r"image\.png: ") as caught:
        decode_image(path, VideoConfig(), PREPROCESSOR)
    assert kind != "extreme" or "aspect ratio" in str(caught.value)
