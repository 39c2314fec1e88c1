"""Video files: their clock, and their frames by number or by time.

The clock of a file is at 0 where its first stream starts, pictures or sound. Most players show this clock and
`ffmpeg -ss` counts in it, so annotators use it. The decoder's own times are another clock: those of a transport stream
start anywhere. Times counted from the first picture would be wrong where the sound starts earlier.

Encoders of sound start it a little before the pictures; such delays, below LEAST_LATE_S, are left out. So in nearly all
files the first picture is at 0, and stamps are frame number over frame rate to the bit, as the processors of the model
families compute them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rmsd_fast.config import NotInstalled
from rmsd_fast.data.media_file import MediaError, has_alpha_aside, unseekable_video, video_command

# Decoded frames held before they are resized: a few hundred of 4K at once would be gigabytes.
RAW_BYTES = 32 * 2**20
# AVI stores no times of display, so FFmpeg shows the first frame late by as many frames as the decoder holds back.
MOST_DELAY_S = 0.25
# Encoders of sound start it this much before the pictures: AAC by 21 to 46 ms, Opus by 7 ms, MP3 by 25 ms.
LEAST_LATE_S = 0.05
# FFmpeg's number for a time that is not known is minus 9e15 seconds, in some unit.
_NO_TIME_S = 1e12
# Pixel formats with an alpha channel. FFmpeg drops it, which leaves what was hidden behind it.
_ALPHA = re.compile(r"rgba|bgra|argb|abgr|ya\d|yuva|gbrap|vuya|ayuv")
# torchcodec's messages begin with the C++ function and file they come from.
_SOURCE_LINE = re.compile(r"^\w+, \S+\.\w+:\d+, ")
NO_TORCHCODEC = (
    "videos are decoded by torchcodec, which cannot be loaded here ({reason}). Install it "
    "(`pip install torchcodec==0.13.0` for CPU builds of torch, `torchcodec>=0.17` for CUDA builds) and the shared "
    "libraries of FFmpeg 4 to 8 (Debian and Ubuntu: `apt-get install ffmpeg`)."
)


class CpuFallback(RuntimeError):
    """NVDEC cannot decode this video. Not a fault of the file: the CPU may."""


@dataclass(frozen=True)
class Clip:
    """An opened video and its clock.

    Fields:
        decoder: torchcodec's, which has scanned the whole file, so that counts and times are those of the content.
        frames: number of frames.
        fps: their average rate.
        begin_s, end_s: the decoder's times of the first frame, and of the end of the last.
        late_s: the first frame's time on the file's clock.
    """

    path: str
    device: str
    decoder: Any
    frames: int
    fps: float
    height: int
    width: int
    begin_s: float
    end_s: float
    late_s: float

    def stamp(self, index: int) -> float:
        """Time of a frame on the file's clock at a constant rate, as the family's processors stamp frames."""
        return self.late_s + index / self.fps

    def middle(self, index: int) -> float:
        """The decoder's time in the middle of a frame at a constant rate, where rounding does no harm."""
        return min(self.begin_s + (index + 0.5) / self.fps, math.nextafter(self.end_s, self.begin_s))


def open_clip(path: str, device: str = "cpu") -> Clip:
    """Open a video and scan it for frames, without decoding them.

    Raises:
        MediaError: it is damaged, has no pictures, or transparent ones.
        NotInstalled: torchcodec or FFmpeg is not installed.
    """
    decoder = _open_video(path, device=device)
    metadata = decoder.metadata
    frames, fps, height, width = metadata.num_frames, metadata.average_fps, metadata.height, metadata.width
    if not frames or not (fps and 0 < fps < math.inf) or not height or not width:
        raise MediaError(f"{path}: no video frames were found; replace the file or drop the question")
    # The colour that FFmpeg puts behind transparent parts of GIF is white.
    transparent = metadata.codec != "gif" and _ALPHA.match(metadata.pixel_format or "")
    if transparent or has_alpha_aside(path):
        raise MediaError(
            f"{path}: expected opaque pictures, got an alpha channel, and transparent parts would show hidden colours; "
            f"put it on white with `{video_command(path, flatten=True)}`"
        )
    begin, end = metadata.begin_stream_seconds, metadata.end_stream_seconds
    if not abs(begin) < _NO_TIME_S:
        raise MediaError(
            f"{path}: expected a time of display for each frame, got frames without one; re-encode it with "
            f"`{video_command(path)}`, or drop the question"
        )
    return Clip(path, device, decoder, frames, fps, height, width, begin, end, _lateness(path, begin))


def decode(
    clip: Clip, indices: list[int], by_time: bool, take: Callable[[int, torch.Tensor], object]
) -> tuple[float, ...]:
    """Decode frames and return their stamps.

    Args:
        by_time: take what is shown at the times that the frames have at a constant rate, rather than frames by number.
        take: gets the frames [N, 3, H, W], a few at a time, and how many came before them.
    """
    try:
        return _decode_with(clip, clip.decoder, indices, by_time, take)
    except MediaError as error:
        # FFmpeg's own seeking finds frames that the decoder's list of key frames does not lead to: those between the
        # start of an edit list and the next key frame, and in some AVI the last ones.
        try:
            decoder = _open_video(clip.path, device=clip.device, seek_mode="approximate")
            return _decode_with(clip, decoder, indices, True, take)
        except MediaError:
            raise error from None


def _decode_with(
    clip: Clip, decoder: Any, indices: list[int], by_time: bool, take: Callable[[int, torch.Tensor], object]
) -> tuple[float, ...]:
    """The same with one decoder, which may also have found other frames."""
    per_call = max(1, RAW_BYTES // (3 * clip.height * clip.width))
    times: list[float] = []
    for start in range(0, len(indices), per_call):
        chosen = indices[start : start + per_call]
        try:
            if by_time:
                batch = decoder.get_frames_played_at(seconds=[clip.middle(index) for index in chosen])
            else:
                batch = decoder.get_frames_at(indices=chosen)
        except (RuntimeError, ValueError, IndexError) as error:
            raise _media_error(clip.path, error) from error
        if clip.device != "cpu" and decoder.cpu_fallback:
            raise CpuFallback(str(decoder.cpu_fallback))
        height, width = batch.data.shape[-2:]
        if (height, width) != (clip.height, clip.width):
            raise MediaError(
                f"{clip.path}: expected frames of {clip.width}x{clip.height} as in its header, got {width}x{height}; "
                f"re-encode it with `{video_command(clip.path)}`, or drop the question"
            )
        take(start, batch.data)
        times += batch.pts_seconds.tolist()
    return _timestamps(clip, indices, times, by_time)


def _timestamps(clip: Clip, indices: list[int], times: list[float], by_time: bool) -> tuple[float, ...]:
    """Stamps of frames: those of a constant rate, or with a variable rate the true times.

    Args:
        times: when the decoder says that the frames are shown.
    Raises:
        MediaError: these are not the frames that were asked for. In files that cannot be sought in well (transport
            streams, some AVI) torchcodec then gives the next ones it finds, and no error.
    """
    if by_time:
        wrong = any(time > clip.middle(index) + 1e-3 for index, time in zip(indices, times, strict=True))
    else:
        steps = zip(indices, indices[1:], times, times[1:], strict=False)
        wrong = any((later <= earlier) != (b == a) for a, b, earlier, later in steps)
        wrong = wrong or (indices[0] == 0 and times[0] - clip.begin_s > MOST_DELAY_S)
    if wrong:
        raise MediaError(
            f"{clip.path}: expected the frames numbered {indices[0]} to {indices[-1]}, got others: this file cannot be "
            f"sought in; re-encode it with `{video_command(clip.path)}`, or drop the question"
        )
    since = [time - clip.begin_s for time in times]
    if any(abs(time - index / clip.fps) > 0.5 / clip.fps + 1e-3 for index, time in zip(indices, since, strict=True)):
        return tuple(clip.late_s + time for time in since)
    return tuple(map(clip.stamp, indices))


def _lateness(path: str, begin_s: float) -> float:
    """How long after the file's first stream its pictures start, in seconds.

    torchcodec tells where streams of pictures and of sound start, and not where the file does.
    """
    from torchcodec.decoders import AudioDecoder

    try:
        sound_s = AudioDecoder(path).metadata.begin_stream_seconds_from_header
    # There is no sound, or none that can be decoded.
    except (RuntimeError, ValueError):
        return 0.0
    late_s = 0.0 if sound_s is None else begin_s - sound_s
    return late_s if late_s >= LEAST_LATE_S else 0.0


def _open_video(path: str, *, device: str = "cpu", seek_mode: str = "exact") -> Any:
    # torchcodec raises RuntimeError or OSError on import where the FFmpeg libraries are missing.
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise NotInstalled(NO_TORCHCODEC.format(reason=reason)) from error
    try:
        return VideoDecoder(path, dimension_order="NCHW", num_ffmpeg_threads=1, device=device, seek_mode=seek_mode)
    except ValueError as error:
        raise MediaError(
            f"{path}: expected a video, got a file without pictures; replace it or drop the question"
        ) from error
    except RuntimeError as error:
        raise _media_error(path, error) from error


def _media_error(path: str, error: Exception) -> MediaError:
    reason = _SOURCE_LINE.sub("", str(error).strip().split("\n", 1)[0]).strip() or type(error).__name__
    if what := unseekable_video(path):
        return MediaError(
            f"{path}: expected a video that can be sought in, got {what} ({reason}); re-encode it with "
            f"`{video_command(path)}`, or drop the question"
        )
    # What FFmpeg cannot open, its program cannot either.
    encode = "" if reason.startswith("Could not open") else f", re-encode it with `{video_command(path)}`"
    return MediaError(f"{path}: cannot be decoded ({reason}); fetch it again{encode} or drop the question")
