"""The files that the benchmark of the media path reads: made once, from frames computed here, and reused.

They lie in runs/made/bench-video, which git ignores; delete the folder to have them made anew.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.records import REPOSITORY

FOLDER = REPOSITORY / "runs" / "made" / "bench-video"
FPS = 30.0
# Frames of 720p computed at once: 80 MB.
_CHUNK = 30
# Pixels per frame that the background, and the window in front of it, move.
_PAN, _DRIFT = 3, 5


def scene(first: int, count: int, height: int, width: int) -> Tensor:
    """Frames first, first + 1, ... of an endless scene, uint8 [count, 3, height, width].

    A textured background pans, a textured window crosses it, and each frame has grain of its own: h264 at its default
    quality makes a few Mbit/s of 720p from it.
    """
    generator = torch.Generator().manual_seed(7)

    def texture(cells: int, high: int, wide: int, detail: float) -> Tensor:
        coarse = torch.rand(1, 3, max(2, high // cells), max(2, wide // cells), generator=generator)
        smooth = F.interpolate(coarse, size=(high, wide), mode="bicubic").clamp(0, 1)[0]
        return (smooth * (1 - detail) + torch.rand(3, high, wide, generator=generator) * detail) * 225 + 10

    background = texture(40, height, 2 * width, 0.25)
    side = height // 3
    window = texture(12, side, side, 0.2)
    grain = torch.randn(3, height + 64, width + 64, generator=generator) * 4.0
    out = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for place, number in enumerate(range(first, first + count)):
        at = number * _PAN % width
        frame = background[:, :, at : at + width].clone()
        x, y = number * _DRIFT % (width - side), number * 2 % (height - side)
        frame[:, y : y + side, x : x + side] = window
        dy, dx = number * 29 % 64, number * 37 % 64
        frame += grain[:, dy : dy + height, dx : dx + width]
        out[place] = frame.round_().clamp_(0, 255).to(torch.uint8)
    return out


def encoded(path: Path, *, frames: int, height: int, width: int, gop: int) -> Path:
    """An h264 file in MP4 with a key frame every `gop` frames and no others; made where it is not there yet."""
    if path.exists():
        return path
    from torchcodec.encoders import Encoder

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
    encoder = Encoder()
    stream = encoder.add_video(
        height=height,
        width=width,
        frame_rate=FPS,
        codec="libx264",
        pixel_format="yuv420p",
        preset="veryfast",
        extra_options={"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0"},
    )
    with encoder.open_file(str(unfinished)):
        for first in range(0, frames, _CHUNK):
            stream.add_frames(scene(first, min(_CHUNK, frames - first), height, width))
    unfinished.replace(path)
    return path


def long_video(gop: int) -> Path:
    """60 s of 720p."""
    return encoded(FOLDER / f"720p-60s-gop{gop}.mp4", frames=1800, height=720, width=1280, gop=gop)


def short_video(seconds: int) -> Path:
    """720p with a key frame each second."""
    return encoded(FOLDER / f"720p-{seconds}s.mp4", frames=int(seconds * FPS), height=720, width=1280, gop=30)


def copies(path: Path, folder: Path, count: int) -> list[Path]:
    """Files of the same video with different content hashes: each ends with a `free` box of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    content, made = path.read_bytes(), []
    for number in range(count):
        free = f"copy {number:08d}".encode()
        made.append(folder / f"{path.stem}-{number}.mp4")
        made[-1].write_bytes(content + (8 + len(free)).to_bytes(4, "big") + b"free" + free)
    return made
