"""Open video files, determine their clock, and decode frames by number or by time.

The clock of a file is 0 at the start of its first stream, video or audio. Players show this clock (mpv by default) and
`ffmpeg -ss` uses it, so annotators also use it. It differs from the decoder's clock, which may start at any value, as
in transport streams. It also does not start at the first frame: if the audio starts 2 s earlier, the first frame is at
2 s.

Audio encoders make the audio start slightly before the video. Delays below LEAST_LATE_S are ignored, because neither
players nor stamps of 0.1 s show them. In nearly all files, the first frame is therefore at 0, and stamps are frame
number / frame rate, bit-identical to those of the model families' processors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rmsd_fast.config import NotInstalled, first_line
from rmsd_fast.data.containers import pixel_aspect
from rmsd_fast.data.media_file import MediaError, MediaFile, has_alpha_aside, unseekable_video

# Decoded frames held at a time before they are resized. A few hundred 4K frames would take gigabytes.
RAW_BYTES = 32 * 2**20
# AVI stores no presentation times, so FFmpeg shows the first frame late, by the decoder's delay in frames.
MOST_DELAY_S = 0.25
# Audio encoders start the audio slightly before the video: AAC by 21 to 46 ms, Opus by 7 ms, MP3 by 25 ms.
LEAST_LATE_S = 0.05
# FFmpeg marks an unknown time with the lowest 64-bit integer, about -9e15 s.
_NO_TIME_S = 1e12
# In real videos, pixels are at most 4 times as wide as high, or as high as wide.
_MOST_PIXEL_ASPECT = 16
_LEAST_PIXEL_STRETCH = 0.01
# Upper bound on the number of streams in a file. The loop over them ends at the first number without a stream.
_MOST_STREAMS = 64
# Pixel formats with an alpha channel. torchcodec drops it, which exposes the colors of transparent parts.
_ALPHA = re.compile(r"rgba|bgra|argb|abgr|ya\d|yuva|gbrap|vuya|ayuv")
# torchcodec's messages begin with the C++ function, file and line that they come from.
_SOURCE_LINE = re.compile(r"^\w+, \S+\.\w+:\d+, ")
NO_TORCHCODEC = (
    "videos are decoded by torchcodec, which cannot be loaded here ({reason}). Install it "
    "(`pip install torchcodec==0.13.0` for CPU builds of torch, `torchcodec>=0.17` for CUDA builds) and the shared "
    "libraries of FFmpeg 4 to 8 (Debian and Ubuntu: `apt-get install ffmpeg`)."
)


class CpuFallback(RuntimeError):
    """NVDEC cannot decode this video. The file may be fine, and the CPU may be able to decode it."""


@dataclass(frozen=True)
class Clip:
    """An opened video and its clock.

    Fields:
        media: the file.
        device: device that decodes it.
        decoder: torchcodec's decoder, which has scanned the whole file, so that counts and times describe the actual
            content.
        frames: number of frames.
        fps: average frame rate.
        height, width: size of the stored frames after rotation.
        shown: height and width with square pixels. DVDs and cameras may store non-square pixels. As in players, the
            side that is displayed longer is enlarged.
        begin_s, end_s: the decoder's times of the start of the first frame and the end of the last frame.
        late_s: the first frame's time on the file's clock.
    """

    media: MediaFile
    device: str
    decoder: Any
    frames: int
    fps: float
    height: int
    width: int
    shown: tuple[int, int]
    begin_s: float
    end_s: float
    late_s: float

    @property
    def length_s(self) -> float:
        """Return the end of the last frame on the file's clock, in seconds."""
        return self.late_s + (self.end_s - self.begin_s)

    def stamp(self, index: int) -> float:
        """Return a frame's time on the file's clock at a constant rate, as the model families' processors do."""
        return self.late_s + index / self.fps

    def middle(self, index: int) -> float:
        """Return the decoder's time in the middle of a frame at a constant rate, where rounding is harmless."""
        return min(self.begin_s + (index + 0.5) / self.fps, math.nextafter(self.end_s, self.begin_s))


def open_clip(media: MediaFile, device: str = "cpu") -> Clip:
    """Open a video and scan it for frames without decoding them. The file must stay open for `decode`.

    Raises:
        MediaError: the file is damaged, has no video, or its video has transparency.
        NotInstalled: torchcodec or FFmpeg is not installed.
    """
    decoder = _open_video(media, device=device)
    metadata = decoder.metadata
    frames, fps, height, width = metadata.num_frames, metadata.average_fps, metadata.height, metadata.width
    if not frames or not (fps and 0 < fps < math.inf) or not height or not width:
        raise MediaError(f"{media.path}: expected video frames, got none; replace the file or drop the question")
    # In GIF, FFmpeg makes transparent parts white.
    transparent = metadata.codec != "gif" and _ALPHA.match(metadata.pixel_format or "")
    if transparent or has_alpha_aside(media.head):
        raise MediaError(
            f"{media.path}: expected an opaque video, got one with an alpha channel, whose hidden colors would show; "
            f"put it on white with `{media.command(flatten=True)}`"
        )
    begin, end = metadata.begin_stream_seconds, metadata.end_stream_seconds
    if not abs(begin) < _NO_TIME_S:
        raise MediaError(
            f"{media.path}: expected a presentation time for each frame, got frames without one; re-encode it with "
            f"`{media.command()}`, or drop the question"
        )
    shown = _shown_size(media, height, width, metadata)
    return Clip(media, device, decoder, frames, fps, height, width, shown, begin, end, _lateness(media, begin))


def _shown_size(media: MediaFile, height: int, width: int, metadata: Any) -> tuple[int, int]:
    """Return height and width of upright frames as players show them, with square pixels."""
    turned = bool(metadata.rotation and round(metadata.rotation / 90) % 2)
    # The aspect ratio refers to the pixels before rotation.
    stored = (height, width) if turned else (width, height)
    media.file.seek(0)
    stated = pixel_aspect(media.file, media.size, *stored)
    aspect = stated or float(metadata.pixel_aspect_ratio or 1)
    if not 1 / _MOST_PIXEL_ASPECT <= aspect <= _MOST_PIXEL_ASPECT:
        raise MediaError(
            f"{media.path}: expected pixels at most {_MOST_PIXEL_ASPECT} times as wide as high or as high as wide, got "
            f"{aspect:.3g} times; fetch it again or drop the question"
        )
    # Programs that scale videos write such ratios to compensate for sides rounded to whole pixels.
    if abs(aspect - 1) < _LEAST_PIXEL_STRETCH:
        return height, width
    if turned:
        aspect = 1 / aspect
    return (height, round(width * aspect)) if aspect >= 1 else (round(height / aspect), width)


def decode(
    clip: Clip, indices: list[int], by_time: bool, take: Callable[[int, torch.Tensor], object]
) -> tuple[tuple[float, ...], int]:
    """Decode frames. Return their stamps and the number of distinct frames.

    Stamps assume a constant rate. If the rate is variable, they are the true times.

    Args:
        clip: the opened video.
        indices: frame numbers.
        by_time: take the frames shown at the times that the frame numbers have at a constant rate, rather than frames
            by number.
        take: function that receives the number of earlier frames and the next few frames, [N, 3, H, W].
    """
    try:
        times = _decode_with(clip, clip.decoder, indices, by_time, take)
        _refuse_others(clip, indices, times, late=by_time, order=not by_time)
    except MediaError as error:
        # FFmpeg's own seeking finds frames that cannot be reached through the decoder's list of key frames: those
        # between the start of an edit list and the next key frame, and the last ones in some AVI files.
        try:
            decoder = _open_video(clip.media, device=clip.device, seek_mode="approximate")
            times = _decode_with(clip, decoder, indices, True, take)
            _refuse_others(clip, indices, times, late=True, order=True)
        except MediaError:
            raise error from None
    different = len(set(times))
    since = [time - clip.begin_s for time in times]
    # If the rate is variable, return the true times.
    if any(abs(time - index / clip.fps) > 0.5 / clip.fps + 1e-3 for index, time in zip(indices, since, strict=True)):
        return tuple(clip.late_s + time for time in since), different
    return tuple(map(clip.stamp, indices)), different


def _decode_with(
    clip: Clip, decoder: Any, indices: list[int], by_time: bool, take: Callable[[int, torch.Tensor], object]
) -> list[float]:
    """Decode frames with one decoder and return the decoder's times of them. Arguments as in `decode`."""
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
            raise _media_error(clip.media, error) from error
        if clip.device != "cpu" and decoder.cpu_fallback:
            raise CpuFallback(str(decoder.cpu_fallback))
        height, width = batch.data.shape[-2:]
        if (height, width) != (clip.height, clip.width):
            raise MediaError(
                f"{clip.media.path}: expected frames of {clip.width}x{clip.height} as in its header, got "
                f"{width}x{height}; re-encode it with `{clip.media.command()}`, or drop the question"
            )
        take(start, batch.data)
        times += batch.pts_seconds.tolist()
    return times


def _refuse_others(clip: Clip, indices: list[int], times: list[float], *, late: bool, order: bool) -> None:
    """Raise MediaError if the decoder's times show that it returned frames other than those requested.

    If seeking fails, as in transport streams and some AVI files, torchcodec returns the next frames that it finds,
    without an error.

    Args:
        late: whether to reject frames that are shown later than at a constant rate.
        order: whether to reject frames whose times are not in the order of their numbers, and a frame 0 that is not the
            first frame.
    """
    wrong = late and any(time > clip.middle(index) + 1e-3 for index, time in zip(indices, times, strict=True))
    if order:
        steps = zip(indices, indices[1:], times, times[1:], strict=False)
        wrong = wrong or any((later <= earlier) != (b == a) for a, b, earlier, later in steps)
        wrong = wrong or (indices[0] == 0 and times[0] - clip.begin_s > MOST_DELAY_S)
    if wrong:
        raise MediaError(
            f"{clip.media.path}: expected the frames numbered {indices[0]} to {indices[-1]}, got others, because the "
            f"decoder cannot seek in this file; re-encode it with `{clip.media.command()}`, or drop the question"
        )


def _lateness(media: MediaFile, begin_s: float) -> float:
    """Return how long after the file's first stream its video starts, in seconds.

    torchcodec returns the start of video and audio, but not of the file. Subtitles and data are ignored.
    """
    late_s = max((begin_s - audio_s for audio_s in _audio_starts(media)), default=0.0)
    return late_s if late_s >= LEAST_LATE_S else 0.0


def _audio_starts(media: MediaFile) -> list[float]:
    """Return the start of each audio stream that can be decoded, in seconds on the decoder's clock."""
    from torchcodec.decoders import AudioDecoder

    try:
        AudioDecoder(media.name)
    # There is no audio. This is the usual case and needs only one check.
    except (RuntimeError, ValueError):
        return []
    starts = []
    for index in range(_MOST_STREAMS):
        try:
            starts.append(AudioDecoder(media.name, stream_index=index).metadata.begin_stream_seconds_from_header)
        except (RuntimeError, ValueError) as error:
            if "not a valid stream" in str(error):
                break
    return [start for start in starts if start is not None]


def _open_video(media: MediaFile, *, device: str = "cpu", seek_mode: str = "exact") -> Any:
    # If the FFmpeg libraries are missing, importing torchcodec raises RuntimeError or OSError.
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise NotInstalled(NO_TORCHCODEC.format(reason=first_line(error))) from error
    try:
        return VideoDecoder(
            media.name, dimension_order="NCHW", num_ffmpeg_threads=1, device=device, seek_mode=seek_mode
        )
    except ValueError as error:
        raise MediaError(
            f"{media.path}: expected a video, got a file without a video stream; replace it or drop the question"
        ) from error
    except RuntimeError as error:
        raise _media_error(media, error) from error


def _media_error(media: MediaFile, error: Exception) -> MediaError:
    reason = _SOURCE_LINE.sub("", first_line(error)).strip().replace(media.name, "the file")
    if what := unseekable_video(media.head):
        return MediaError(
            f"{media.path}: expected a seekable video, got {what} ({reason}); re-encode it with "
            f"`{media.command()}`, or drop the question"
        )
    # If the libraries cannot open a file, the ffmpeg program cannot either.
    encode = "" if reason.startswith("Could not open") else f", re-encode it with `{media.command()}`"
    return MediaError(f"{media.path}: cannot be decoded ({reason}); fetch it again{encode} or drop the question")
