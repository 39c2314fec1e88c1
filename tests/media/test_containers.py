"""Test which video files are read, which are refused before FFmpeg opens them, and that cuts are detected."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
import torch
from media_files import ffmpeg, noise_frames

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.containers import CONTAINERS, container_of, pixel_aspect
from rmsd_fast.data.media_file import MediaError, open_media
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest, PreviewRequest, read_layout, read_media, read_preview
from rmsd_fast.data.video_file import decode, open_clip

SECONDS, FPS = 6, 10.0
VP8 = ("-c:v", "libvpx", "-b:v", "300k", "-deadline", "realtime", "-cpu-used", 8)
MPEG4 = ("-c:v", "mpeg4", "-bf", 0, "-c:a", "mp2")
FRAGMENTS = ("-movflags", "frag_keyframe+empty_moov+default_base_moof")
# Each entry has the file name and the command that makes it, for containers that state their length. "-" writes to a
# pipe, so the header cannot be completed at the end.
WHOLE = [
    ("x.mp4", ("-c", "copy")),
    ("faststart.mp4", ("-c", "copy", "-movflags", "+faststart")),
    ("fragments.mp4", ("-c", "copy", *FRAGMENTS)),
    ("dash.mp4", ("-c", "copy", "-movflags", "dash")),
    ("x.mov", ("-c", "copy")),
    ("x.3gp", ("-c", "copy")),
    ("x.mkv", ("-c", "copy")),
    ("live.mkv", ("-c", "copy", "-live", 1)),
    ("pipe.mkv", ("-c", "copy", "-f", "matroska", "-")),
    ("x.webm", (*VP8, "-c:a", "libopus")),
    ("live.webm", (*VP8, "-an", "-live", 1)),
    ("pipe.webm", (*VP8, "-an", "-f", "webm", "-")),
    ("x.avi", MPEG4),
    ("pipe.avi", (*MPEG4, "-f", "avi", "-")),
    ("x.wmv", ("-c:v", "wmv2", "-c:a", "wmav2")),
    ("x.asf", ("-c:v", "msmpeg4", "-an")),
    ("x.flv", ("-c", "copy")),
    ("pipe.flv", ("-c", "copy", "-f", "flv", "-")),
    ("x.ogv", ("-c:v", "libtheora", "-c:a", "libvorbis")),
    ("silent.ogv", ("-c:v", "libtheora", "-an")),
    ("x.gif", ("-an",)),
    ("x.png", ("-an", "-f", "apng")),
    ("x.mxf", ("-c:v", "mpeg2video", "-r", 25, "-an")),
    ("x.ivf", (*VP8, "-an")),
]
# These containers state no length. The last field says whether every version of FFmpeg reads the whole file.
OPEN_ENDED = [
    ("x.ts", ("-c", "copy"), False),
    ("x.m2ts", ("-c", "copy", "-mpegts_m2ts_mode", 1), False),
    ("x.mpg", ("-c:v", "mpeg2video", "-r", 25, "-c:a", "mp2"), False),
    ("pipe.asf", ("-c:v", "wmv2", "-an", "-f", "asf", "-"), True),
    ("x.y4m", ("-an",), True),
    ("x.dv", ("-c:v", "dvvideo", "-s", "720x576", "-pix_fmt", "yuv420p", "-r", 25, "-an", "-t", 1), True),
    ("x.nut", ("-c", "copy"), False),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a video with six seconds of moving pictures, a tone, and one key frame per second."""
    from torchcodec.encoders import AudioEncoder, VideoEncoder

    folder = tmp_path_factory.mktemp("source")
    VideoEncoder(noise_frames(int(SECONDS * FPS), 64, 96), frame_rate=FPS).to_file(
        folder / "video.mp4", codec="libx264", pixel_format="yuv420p", extra_options={"g": "10", "bf": "0"}
    )
    tone = torch.sin(torch.arange(SECONDS * 48000) / 20)[None] / 2
    AudioEncoder(tone, sample_rate=48000).to_file(folder / "audio.m4a")
    ffmpeg("-i", folder / "video.mp4", "-i", folder / "audio.m4a", "-c", "copy", folder / "source.mp4")
    return folder / "source.mp4"


def make(folder: Path, source: Path, name: str, arguments: tuple) -> Path:
    path = folder / name
    if arguments[-1] == "-":
        path.write_bytes(ffmpeg("-i", source, *arguments))
    else:
        ffmpeg("-i", source, *arguments, path)
    return path


def request(path: Path) -> MediaRequest:
    return MediaRequest(str(path), "video", VideoConfig(num_frames=6), Preprocessor())


def check_file(path: Path) -> None:
    with open_media(str(path), 100):
        pass


@pytest.mark.parametrize(("name", "arguments"), WHOLE, ids=[name for name, _ in WHOLE])
def test_a_video_is_read_whole_and_refused_if_it_was_cut(
    tmp_path: Path, source: Path, name: str, arguments: tuple
) -> None:
    path = make(tmp_path, source, name, arguments)
    check_file(path)
    # FFmpeg 5 cannot seek in most FLV files.
    if path.suffix != ".flv":
        frames = read_media(request(path))
        assert len(frames.pixels) == 6 and frames.duration_s == pytest.approx(SECONDS, abs=0.25)
    data = path.read_bytes()
    for share in (0.5, 0.6, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        for call in (read_media, read_layout):
            with pytest.raises(MediaError, match="truncated: expected at least [0-9]+ bytes, got [0-9]+; fetch it"):
                call(request(path))


@pytest.mark.parametrize(("name", "arguments", "is_read"), OPEN_ENDED, ids=[name for name, _, _ in OPEN_ENDED])
def test_containers_that_state_no_length(
    tmp_path: Path, source: Path, name: str, arguments: tuple, is_read: bool
) -> None:
    """These files pass the check whole and cut; some streams fail later because FFmpeg cannot seek in them."""
    path = make(tmp_path, source, name, arguments)
    check_file(path)
    if is_read:
        read_media(request(path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    check_file(path)


def test_a_cut_between_two_parts_of_a_live_recording_is_not_found(tmp_path: Path, source: Path) -> None:
    """Nothing in the file shows that more was to come. The docstring of the module documents this limit."""
    data = make(tmp_path, source, "x.mkv", ("-c", "copy", "-live", 1)).read_bytes()
    cluster = b"\x1f\x43\xb6\x75"
    at = data.index(cluster, len(data) // 2)
    (tmp_path / "x.mkv").write_bytes(data[:at])
    assert read_media(request(tmp_path / "x.mkv")).duration_s < SECONDS
    (tmp_path / "x.mkv").write_bytes(data[: at - 1])
    with pytest.raises(MediaError, match="truncated"):
        check_file(tmp_path / "x.mkv")


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "live.mkv", "x.avi", "x.wmv", "x.flv", "x.ogv", "x.gif", "x.png"])
def test_tags_after_a_complete_file_are_accepted(tmp_path: Path, source: Path, name: str) -> None:
    path = make(tmp_path, source, name, dict(WHOLE)[name])
    path.write_bytes(path.read_bytes() + b"TAG" + b"x" * 125)
    check_file(path)


def needed(data: bytes) -> int:
    return container_of(data).needed(io.BytesIO(data), len(data))


def riff(kind: bytes, body: bytes, size: int | None = None) -> bytes:
    return b"RIFF" + struct.pack("<I", len(body) + 4 if size is None else size) + kind + body


def test_avi_above_one_gibibyte_has_several_parts() -> None:
    """Check hand-computed values: each part has 8 bytes of header and the length that the header states."""
    first, second = riff(b"AVI ", bytes(100)), riff(b"AVIX", bytes(50))
    assert (len(first), len(second)) == (112, 62)
    assert needed(first + second) == 174
    assert needed(first + second[:40]) == 174 and needed(first[:60]) == 112
    assert needed(first + b"junk of a tagger") == 112


@pytest.mark.parametrize(
    ("stated", "length", "whole"),
    [
        (104, 112, True),
        # This length includes the 8 bytes of the header.
        (112, 112, True),
        (113, 112, False),
        # The length is odd, and the padding byte may or may not be written.
        (103, 111, True),
        (103, 112, True),
        # The length was never filled in.
        (0, 112, True),
        (2**32 - 1, 112, True),
    ],
)
def test_lengths_that_programs_write_into_avi(stated: int, length: int, whole: bool) -> None:
    data = riff(b"AVI ", bytes(length - 12), stated)
    assert (needed(data) <= len(data)) == whole


def test_a_cut_gif_is_refused(tmp_path: Path, source: Path) -> None:
    data = make(tmp_path, source, "x.gif", ("-an",)).read_bytes()
    assert data[-1:] == b";" and needed(data) == len(data)
    assert needed(data + b"\0" * 9) == len(data)
    # Every cut is refused, even if the last byte happens to equal the trailer of a GIF.
    small = data[:3000]
    assert all(needed(small[:length]) > length for length in range(13, len(small)))


def test_ogg_with_an_empty_last_page_is_read() -> None:
    def page(flags: int, parts: bytes) -> bytes:
        return b"OggS\0" + bytes([flags]) + bytes(20) + bytes([len(parts)]) + parts + bytes(sum(parts))

    first, last = page(2, bytes([255, 10])), page(4, b"")
    assert len(first) == 27 + 2 + 265 and needed(first + last) == len(first + last)
    assert needed(first) > len(first) and needed(first + last[:-1]) > len(first + last) - 1


MPD = b'<MPD type="static" profiles="urn:mpeg:dash:profile:isoff-live:2011"><BaseURL>/outside/</BaseURL></MPD>'
LONG_COMMENT = b"<!--" + "é".encode() * 5000 + b"-->"


@pytest.mark.parametrize(
    "data",
    [
        MPD,
        b'<?xml version="1.0"?>' + LONG_COMMENT + MPD,
        LONG_COMMENT + MPD.lower(),
        b"\xef\xbb\xbf" + LONG_COMMENT + MPD,
        # The playlist follows the beginning of a container. The third beginning is as long as the range that FFmpeg
        # searches.
        b"GIF89aAAAA" + MPD,
        b"YUV4MPEG2 W64 H64 F10:1\n" + MPD,
        b"\x1aE\xdf\xa3\x9f" + b"B" * 2**19 + MPD,
        b"G".ljust(188) * 3 + MPD,
        b"<!--free-->" + MPD,
        b"RIFFaaaaAVI\x19" + MPD,
        b"<CompositionPlaylist>",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n",
        b"#EXTM3U\n# \xc3\xa9\n#EXT-X-TARGETDURATION:9\n",
        b"ffconcat version 1.0\nfile 'sub.mp4'\n",
        "ffconcat version 1.0\n# é\nfile 'sub.mp4'\n".encode(),
        b"ffconcat version 1.0\n# \0\nfile 'sub.mp4'\n",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_lists_of_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    for call in (read_media, read_layout):
        with pytest.raises(MediaError, match="expected a video, got a playlist; fetch the video that it names"):
            call(request(path))
    with pytest.raises(MediaError, match="got a playlist"):
        read_preview(PreviewRequest(str(path), "video", 4, longest_px=256, max_file_mib=16))


@pytest.mark.parametrize(
    ("data", "found"),
    [
        # FFmpeg looks for a playlist after this tag.
        (b"ID3\x04\0\0\0\0\0\0#EXTM3U\n", "got an audio file; name the video"),
        (MPD.decode().encode("utf-16"), "got an unknown kind of file; fetch it again, re-encode it with `ffmpeg -i "),
        ("# une vidéo\n".encode() * 9, "got an unknown kind of file"),
        (b"# VobSub index file, v7\nid: en\n" * 9, "got text; check the path"),
        (b"<html><body>404</body></html>" * 9, "got an HTML page; fetch the file itself"),
        (b"PK\x03\x04" + bytes(60), "got an archive; unpack it"),
        (b"RIFF\x40\0\0\0WAVEfmt " + bytes(60), "got an audio file; name the video"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(60), "got a picture; list it under images"),
        (b"II*\0" + bytes(60), "got a picture; list it under images"),
        (bytes(range(256)), "got an unknown kind of file"),
        (bytes(512), "got an unknown kind of file"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_the_error_names_the_type_of_other_files(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(data)
    for call in (read_media, read_layout):
        with pytest.raises(MediaError) as caught:
            call(request(path))
        assert f"x.mp4: expected a video, {found}" in str(caught.value)


def test_image_sequence_patterns_in_file_names_are_not_expanded(tmp_path: Path, source: Path) -> None:
    """FFmpeg would read x001.png, x002.png and so on instead of x%03d.png, and these may be links to any file."""
    path = make(tmp_path, source, "x.png", ("-an", "-f", "apng", "-t", 1))
    other = make(tmp_path, source, "other.png", ("-vf", "negate", "-f", "image2", "-frames:v", 1))
    for number in range(1, 8):
        (tmp_path / f"x{number:03}.png").symlink_to(other)
    series = tmp_path / "x%03d.png"
    series.write_bytes(path.read_bytes())
    assert torch.equal(read_media(request(series)).pixels, read_media(request(path)).pixels)


def test_a_file_replaced_after_the_check_is_not_read(tmp_path: Path, source: Path) -> None:
    """Replace the file between the check and the decoder."""
    path = tmp_path / "x.mp4"
    path.write_bytes(source.read_bytes())
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXTINF:2,\n{source}\n#EXT-X-ENDLIST\n")
    with open_media(str(path), 100) as media:
        path.unlink()
        path.symlink_to(playlist)
        clip = open_clip(media)
        frames = []
        decode(clip, [0, 1], False, lambda start, batch: frames.append(batch))
    path.unlink()
    path.write_bytes(source.read_bytes())
    with open_media(str(path), 100) as media:
        expected = []
        decode(open_clip(media), [0, 1], False, lambda start, batch: expected.append(batch))
    assert torch.equal(frames[0], expected[0])


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x08wide\0\0\x10\0mdat", "an MP4 or MOV video"),
        (b"\0\1\0\0mdat", "an MP4 or MOV video"),
        (b"\0\0\0\x20free", "an MP4 or MOV video"),
        (b"Text of a free kind", None),
        (b"\0" * 7 + (b"G".ljust(188, b"\0") * 3), "a transport stream"),
        ((b"\0\0\0\0" + b"G".ljust(188, b"\0")) * 3, "a transport stream"),
        (b"G".ljust(204, b"\0") * 3, "a transport stream"),
        (b"\0\0\x01\xba\x44", "a program stream"),
        (b"\0\0\0\x01\x67\x64", "a raw stream"),
        (b"\0\0\0\x01\x40\x01", "a raw stream"),
        (b"\0\0\x01\xb3", "a raw stream"),
        (b".RMF\0\0\0\x12", "a RealMedia video"),
        (b"\0\0\x01\0\x01\0\x10\x10", None),
    ],
)
def test_file_types_are_detected_from_the_first_bytes(head: bytes, name: str | None) -> None:
    container = container_of(head + bytes(64))
    assert (container.name if container else None) == name
    assert len({container.name for container in CONTAINERS}) == len(CONTAINERS)


# Frames of 192x192 are displayed at 256x192.
SQUEEZED = "4/3"


def squeezed_circle(folder: Path) -> Path:
    """Write a video of a white circle, stored with pixels that are displayed 4/3 as wide as high."""
    from torchcodec.encoders import VideoEncoder

    y, x = torch.meshgrid(torch.arange(192.0), torch.arange(192.0), indexing="ij")
    inside = ((x - 95.5) * 4 / 3) ** 2 + (y - 95.5) ** 2 < 80**2
    pixels = (inside * 255).to(torch.uint8).expand(10, 3, -1, -1).contiguous()
    VideoEncoder(pixels, frame_rate=FPS).to_file(folder / "squeezed.mp4", codec="libx264", pixel_format="yuv420p")
    return folder / "squeezed.mp4"


def extent(frame: torch.Tensor) -> tuple[float, float]:
    """Return the height and width of the white shape in [3, H, W] with subpixel precision."""
    level = frame.float().mean(0) / 255
    return level.sum(0).max().item(), level.sum(1).max().item()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        # The aspect ratio is stated in the stream and in the container.
        ("x.mp4", ("-c:v", "libx264", "-vf", f"setsar={SQUEEZED}")),
        ("x.avi", ("-c:v", "mpeg4", "-vf", f"setsar={SQUEEZED}")),
        ("x.mxf", ("-c:v", "mpeg2video", "-r", 25, "-vf", f"setsar={SQUEEZED}")),
        # The aspect ratio is stated in the container only.
        ("alone.mp4", ("-c", "copy", "-aspect", "4:3")),
        ("alone.mov", ("-c", "copy", "-aspect", "4:3")),
        ("alone.mkv", ("-c", "copy", "-aspect", "4:3")),
        ("alone.avi", ("-c", "copy", "-aspect", "4:3")),
        ("alone.webm", ("-c:v", "libvpx-vp9", "-cpu-used", 8, "-deadline", "realtime", "-vf", f"setsar={SQUEEZED}")),
    ],
)
def test_a_circle_stays_a_circle(tmp_path: Path, name: str, arguments: tuple) -> None:
    ffmpeg("-i", squeezed_circle(tmp_path), *arguments, tmp_path / name)
    settings = VideoConfig(num_frames=2)
    wanted = MediaRequest(str(tmp_path / name), "video", settings, Preprocessor(), check_frames=False)
    frames = read_media(wanted)
    assert frames.pixels.shape[-2:] == (192, 256) and read_layout(wanted).grid_thw == frames.grid_thw == (1, 12, 16)
    high, wide = extent(frames.pixels[0])
    assert high == pytest.approx(160, rel=0.02) and wide == pytest.approx(160, rel=0.02)
    shown = read_preview(PreviewRequest(str(tmp_path / name), "video", 2, longest_px=256, max_file_mib=16))
    assert shown.frames.shape == (2, 192, 256, 3)
    high, wide = extent(torch.from_numpy(shown.frames[0]).permute(2, 0, 1))
    assert high == pytest.approx(160, rel=0.02) and wide == pytest.approx(160, rel=0.02)


@pytest.mark.parametrize(
    ("filters", "size"),
    [
        # The side that is displayed longer is enlarged, also in rotated videos.
        ("setsar=3/4", (256, 192)),
        ("setsar=1", (192, 192)),
        # Programs that scale videos leave ratios close to 1.
        ("setsar=427/426", (192, 192)),
        ("setsar=0", (192, 192)),
    ],
)
def test_pixel_aspect_ratios(tmp_path: Path, filters: str, size: tuple[int, int]) -> None:
    path = tmp_path / "x.mp4"
    ffmpeg("-i", squeezed_circle(tmp_path), "-c:v", "libx264", "-vf", filters, path)
    frames = read_media(MediaRequest(str(path), "video", VideoConfig(num_frames=2), Preprocessor(), check_frames=False))
    assert frames.pixels.shape[-2:] == size


def test_a_rotated_video_with_wide_pixels(tmp_path: Path) -> None:
    from damaged_files import turn

    path = tmp_path / "x.mp4"
    ffmpeg("-i", squeezed_circle(tmp_path), "-c:v", "libx264", "-vf", f"setsar={SQUEEZED}", path)
    data = bytearray(path.read_bytes())
    turn(data, 192)
    path.write_bytes(data)
    frames = read_media(MediaRequest(str(path), "video", VideoConfig(num_frames=2), Preprocessor(), check_frames=False))
    assert frames.pixels.shape[-2:] == (256, 192)
    assert extent(frames.pixels[0]) == pytest.approx((160, 160), rel=0.02)


def test_impossible_pixel_aspect_ratios_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    ffmpeg("-i", squeezed_circle(tmp_path), "-c:v", "libx264", "-vf", f"setsar={SQUEEZED}", path)
    data = path.read_bytes()
    box = data.index(b"pasp") + 4
    path.write_bytes(data[:box] + struct.pack(">II", 17, 1) + data[box + 8 :])
    with pytest.raises(MediaError, match=r"expected pixels at most 16 times as wide as high .*, got 17 times"):
        read_layout(request(path))
    # If the container states no ratio, the ratio of the stream is used.
    path.write_bytes(data[:box] + struct.pack(">II", 0, 0) + data[box + 8 :])
    assert pixel_aspect(io.BytesIO(path.read_bytes()), path.stat().st_size, 192, 192) is None
    assert read_layout(request(path)).grid_thw == (3, 12, 16)
