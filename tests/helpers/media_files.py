"""Write media files for tests: real encodings of frames with known content."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames, MediaRequest, read_media


def noise_frames(frames: int, height: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Return uint8 [F, 3, H, W] with smooth random blobs that change from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def write_clip(path: Path, pixels: torch.Tensor, *, fps: float = 10.0, faststart: bool = False) -> Path:
    """Encode frames as H.264 in MP4; `faststart` puts the index before the pictures."""
    from torchcodec.encoders import VideoEncoder

    options = {"movflags": "+faststart"} if faststart else None
    VideoEncoder(pixels, frame_rate=fps).to_file(path, codec="libx264", pixel_format="yuv420p", extra_options=options)
    return path


def write_images(folder: Path) -> dict[str, Path]:
    """Write one picture in several modes and one with an EXIF orientation; return the paths by name."""
    from PIL import Image

    pixels = noise_frames(1, 70, 110)[0].permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # The orientation asks for a quarter turn clockwise.
    transparent = image.copy()
    transparent.putalpha(Image.fromarray(noise_frames(1, 70, 110, seed=1)[0, 0].numpy()))
    written = {"rgb": image, "grey": image.convert("L"), "rgba": transparent, "palette": image.quantize(16)}
    for name, picture in written.items():
        picture.save(folder / f"{name}.png")
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg")}


def decode_video(path: Path, settings: VideoConfig, preprocessor: Preprocessor, **options: object) -> Frames:
    """Return the frames of a whole video, read in this process; `options` are further fields of MediaRequest."""
    return read_media(MediaRequest(str(path), "video", settings, preprocessor, **options))


def decode_image(path: Path, settings: VideoConfig, preprocessor: Preprocessor) -> Frames:
    """Return the single frame of an image, read in this process."""
    return read_media(MediaRequest(str(path), "image", settings, preprocessor))


def numbered_frames(frames: int, *, step: int = 4) -> torch.Tensor:
    """Return uint8 [F, 3, 64, 64]: flat gray that encodes the number of each frame (see `numbers_of`)."""
    return torch.arange(frames).mul(step).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 64, 64).contiguous()


def numbers_of(pixels: torch.Tensor, *, step: int = 4) -> list[int]:
    """Return the numbers that frames of `numbered_frames` had before encoding."""
    return (pixels.float().mean((1, 2, 3)) / step).round().int().tolist()


def ffmpeg(*arguments: object) -> bytes:
    """Run the program ffmpeg and return what it writes to the output named "-".

    Skip the test if ffmpeg is not installed, because torchcodec needs only its libraries.
    """
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the program ffmpeg")
    command = ["ffmpeg", "-v", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    errors = done.stderr.decode(errors="replace")
    if "Unknown encoder" in errors:
        pytest.skip(f"this ffmpeg cannot make the file: {errors.strip()}")
    assert done.returncode == 0, errors
    return done.stdout


def ffmpeg_version() -> int:
    """Return the major version of ffmpeg; if several versions are installed, torchcodec loads the matching version."""
    text = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"version \D*(\d+)", text)[1])


def run_advice(message: str, folder: Path) -> Path:
    """Run the command in the backquotes of an error message with this interpreter, and return the file it writes."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the program ffmpeg")
    command = message[message.index("`") + 1 : message.rindex("`")]
    programs = folder / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, capture_output=True, stdin=subprocess.DEVNULL, env=environment)
    return Path(shlex.split(command)[-1])
