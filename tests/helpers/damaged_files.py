"""Write media files with each fault that the program promises to survive, made from real encodings.

As a program, it reads each file as a run does and prints the outcome as a Markdown table.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from media_files import noise_frames, write_clip

FRAMES, HEIGHT, WIDTH, FPS = 20, 64, 96, 10.0


def moving(frames: int = FRAMES) -> torch.Tensor:
    return noise_frames(frames, HEIGHT, WIDTH)


def encoded(path: Path, **options: str) -> bytearray:
    """Return the bytes of a valid clip, with the index after the pictures and pictures in display order."""
    from torchcodec.encoders import VideoEncoder

    VideoEncoder(moving(), frame_rate=FPS).to_file(
        path, codec="libx264", pixel_format="yuv420p", extra_options={"bf": "0", **options}
    )
    return bytearray(path.read_bytes())


def _one_frame(path: Path) -> None:
    write_clip(path, moving(1))


def _empty(path: Path) -> None:
    path.touch()


def _garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def _playlist(path: Path) -> None:
    """Write a playlist that names a video elsewhere; FFmpeg would follow it regardless of the file's name."""
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{path.parent.parent}/secret.ts\n#EXT-X-ENDLIST\n")


def _dash_playlist(path: Path) -> None:
    """Write a playlist in XML after a comment that is neither short nor ASCII."""
    path.write_text(
        f'<?xml version="1.0"?>\n<!--{"é" * 5000}-->\n<MPD type="static" '
        'profiles="urn:mpeg:dash:profile:isoff-live:2011">\n<Period><AdaptationSet><Representation id="0" '
        f'mimeType="video/mp4"><BaseURL>{path.parent.parent}/secret.mp4</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>\n",
        encoding="utf-8",
    )


def _concat_script(path: Path) -> None:
    """Write a script that lets FFmpeg read other files, with a comment that is not ASCII."""
    path.write_text("ffconcat version 1.0\n# é\nfile 'secret.mp4'\n", encoding="utf-8")


def _folder(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path) -> None:
    """Write a sparse file of 32 GiB with a plausible beginning."""
    path.write_bytes(encoded(path)[:500])
    os.truncate(path, 32 * 2**30)


def _truncated(path: Path) -> None:
    data = encoded(path)
    path.write_bytes(data[: len(data) // 2])


def _truncated_fast_start(path: Path) -> None:
    """Write the index and half of the pictures, which a decoder alone takes for a shorter video."""
    data = encoded(path, movflags="+faststart")
    start = data.index(b"mdat")
    path.write_bytes(data[: start + (len(data) - start) // 2])


def _truncated_as(container: str, codec: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        from torchcodec.encoders import VideoEncoder

        whole = path.with_suffix(f".{container}")
        VideoEncoder(moving(), frame_rate=FPS).to_file(whole, codec=codec, pixel_format="yuv420p")
        data = whole.read_bytes()
        path.write_bytes(data[: len(data) * 6 // 10])

    return write


def _audio_only(path: Path) -> None:
    from torchcodec.encoders import AudioEncoder

    AudioEncoder(torch.zeros(1, 8000), sample_rate=8000).to_file(path)


def flip(data: bytes, count: int, seed: int) -> bytes:
    """Return the file with this number of changed bytes in its pictures."""
    start, end = data.index(b"mdat") + 8, data.index(b"moov")
    generator, flipped = random.Random(seed), bytearray(data)
    for _ in range(count):
        flipped[generator.randrange(start, end)] ^= generator.randrange(1, 256)
    return bytes(flipped)


def _flipped(path: Path) -> None:
    """Write a file with many flipped bytes, for which the decoder returns plain gray frames and no error.

    How many frames are gray depends on the order of decoding and on the memory that the decoder reuses.
    """
    from torchcodec.decoders import VideoDecoder

    data = bytes(encoded(path, g="10"))
    for seed in range(100):
        path.write_bytes(flip(data, 40, seed))
        try:
            pixels = VideoDecoder(str(path)).get_frames_at(list(range(FRAMES))).data
        except RuntimeError:
            continue
        # The damage starts at the first frame, so that every choice of frames shows it.
        if (pixels[0] == pixels[0, 0, 0, 0]).all() and not (pixels[-1] == pixels[-1, 0, 0, 0]).all():
            return
    raise AssertionError("no flip gave a gray frame")


def _slightly_flipped(path: Path) -> None:
    """Write a file with one flipped byte that the decoder does not detect."""
    from torchcodec.decoders import VideoDecoder

    data = bytes(encoded(path))
    for seed in range(100):
        path.write_bytes(flip(data, 1, seed))
        try:
            VideoDecoder(str(path)).get_frames_at(list(range(FRAMES)))
            return
        except RuntimeError:
            continue
    raise AssertionError("every flip was detected")


def _lost_frames(path: Path) -> None:
    """Write a video whose first half is the gray that FFmpeg shows for lost frames."""
    frames = moving()
    frames[: FRAMES // 2] = 128
    write_clip(path, frames)


def _single_color(path: Path) -> None:
    write_clip(path, torch.zeros(FRAMES, 3, HEIGHT, WIDTH, dtype=torch.uint8))


def _frozen(path: Path) -> None:
    """Write a video with the same picture in every frame, encoded independently."""
    from torchcodec.encoders import VideoEncoder

    still = moving(1).expand(FRAMES, -1, -1, -1).contiguous()
    VideoEncoder(still, frame_rate=FPS).to_file(
        path, codec="libx264", pixel_format="yuv420p", extra_options={"g": "1", "qp": "20"}
    )


def _variable_rate(path: Path) -> None:
    data = encoded(path)
    path.write_bytes(with_durations(data, [1] * 10 + [5] * 10))


def _rotated(path: Path) -> None:
    data = encoded(path)
    turn(data, HEIGHT)
    path.write_bytes(data)


def turn(data: bytearray, height: int) -> None:
    """Make a clip of this height display a quarter turn clockwise."""
    # Write the display matrix of the track header (version 0: 40 bytes after the box type).
    start = data.index(b"tkhd") + 44
    data[start : start + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, height << 16, 0, 1 << 30)


def with_durations(data: bytes, factors: list[int]) -> bytes:
    """Return the clip with the duration of each frame multiplied by a factor; the index must follow the pictures."""
    at = data.index(b"stts")
    size, _, _, entries, count, delta = struct.unpack(">I4sIIII", data[at - 4 : at + 20])
    assert entries == 1 and count == len(factors), "expected a constant rate"
    table = b"".join(struct.pack(">II", 1, factor * delta) for factor in factors)
    box = struct.pack(">I4sII", 16 + len(table), b"stts", 0, len(factors)) + table
    out = bytearray(data[: at - 4] + box + data[at - 4 + size :])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
        where = out.index(name) - 4
        (length,) = struct.unpack(">I", out[where : where + 4])
        out[where : where + 4] = struct.pack(">I", length + len(box) - size)
    # The durations of movie, track, media and edit list grow equally. FFmpeg uses those of the frames.
    where = out.index(b"elst") + 12
    (length,) = struct.unpack(">I", out[where : where + 4])
    out[where : where + 4] = struct.pack(">I", length * sum(factors) // len(factors))
    return bytes(out)


@dataclass(frozen=True)
class Fault:
    """A fault of a media file.

    make: writes the file; None if no file exists. message: a part of the error message; "" if the file is used.
    in_pixels: only decoding detects the fault.
    """

    name: str
    make: Callable[[Path], None] | None
    message: str
    in_pixels: bool = False


FAULTS = (
    Fault("missing", None, "no such file"),
    Fault("folder", _folder, "expected a file, got a folder"),
    Fault("fifo", _fifo, "got a pipe, socket or device"),
    Fault("empty", _empty, "the file is empty"),
    Fault("huge (32 GiB, sparse)", _huge, "data.max_file_mib"),
    Fault("garbage", _garbage, "got an unknown kind of file"),
    Fault("playlist of files elsewhere", _playlist, "got a playlist"),
    Fault("DASH playlist behind a comment", _dash_playlist, "got a playlist"),
    Fault("concat script", _concat_script, "got a playlist"),
    Fault("truncated", _truncated, "truncated: expected at least"),
    Fault("truncated fast-start", _truncated_fast_start, "truncated: expected at least"),
    Fault("truncated Matroska", _truncated_as("mkv", "libx264"), "truncated: expected at least"),
    Fault("truncated AVI", _truncated_as("avi", "mpeg4"), "truncated: expected at least"),
    Fault("truncated WebM", _truncated_as("webm", "libvpx-vp9"), "truncated: expected at least"),
    Fault("audio only", _audio_only, "got a file without a video stream"),
    Fault("one frame", _one_frame, "too few frames: expected at least 2, got 1"),
    Fault("many flipped bytes", _flipped, "fetch it again, or if this is intended", True),
    Fault("lost frames", _lost_frames, "2 of 4 frames are the plain gray that replaces lost frames", True),
    Fault("one flipped byte", _slightly_flipped, ""),
    Fault("single color", _single_color, "a single color", True),
    Fault("frozen picture", _frozen, "are all identical", True),
    Fault("variable frame rate", _variable_rate, ""),
    Fault("rotated", _rotated, ""),
)


def make(fault: Fault, folder: Path) -> Path:
    """Return the file with this fault."""
    path = folder / f"{fault.name.replace(' ', '-').replace(',', '')}.mp4"
    if fault.make is not None:
        fault.make(path)
    return path


def main() -> None:
    import signal
    import tempfile

    from rmsd_fast.config import DataConfig, VideoConfig
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.data.media_file import MediaError
    from rmsd_fast.data.preprocess import Preprocessor
    from rmsd_fast.data.records import DataError, load_questions
    from rmsd_fast.data.video import MediaRequest

    print("| file | what happens |\n|---|---|")
    with tempfile.TemporaryDirectory() as name, MediaReader(DataConfig()) as reader:
        folder = Path(name)

        def read(path: Path, frames: int = 8) -> str:
            request = MediaRequest(str(path), "video", VideoConfig(num_frames=frames), Preprocessor())
            try:
                frames_read = reader.read(request)
            except MediaError as error:
                return str(error).replace(f"{folder}/", "")
            height, width = frames_read.pixels.shape[-2:]
            stamps = ", ".join(f"{at:.1f}" for at in frames_read.timestamps_s)
            return f"used: {len(frames_read.pixels)} frames of {width}x{height} at {stamps} s"

        for fault in FAULTS:
            print(f"| {fault.name} | {read(make(fault, folder))} |")
        healthy = folder / "healthy.mp4"
        encoded(healthy)
        read(healthy)
        reader.data.decode_timeout_s = 1.0
        os.kill(reader._idle[0].pid, signal.SIGSTOP)
        print(f"| decoder hangs | {read(healthy, 6)} |")
        reader.data.decode_timeout_s = 60.0
        read(healthy, 10)
        os.kill(reader._idle[0].pid, signal.SIGSEGV)
        print(f"| decoder crashes once | {read(healthy, 4)} |")
        (folder / "in").mkdir()
        (folder / "in" / "q.jsonl").write_text(
            '{"id": "q", "question": "?", "task_type": "open", "videos": ["../healthy.mp4"]}\n'
        )
        try:
            load_questions(folder / "in" / "q.jsonl")
        except DataError as error:
            print(f"| outside the media root | the run does not start: {str(error).replace(f'{folder}/', '')} |")


if __name__ == "__main__":
    sys.exit(main())
