"""Test the clock of video files: timestamps and spans in every container, and files that cannot be seeked."""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path

import pytest
import torch
from damaged_files import with_durations
from media_files import (
    decode_video,
    ffmpeg,
    ffmpeg_version,
    noise_frames,
    numbered_frames,
    numbers_of,
    run_advice,
    write_clip,
)
from PIL import Image

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.media_file import MediaError, video_command
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import Frames, MediaRequest, Preview, PreviewRequest, read_layout, read_media, read_preview
from rmsd_fast.models.families.qwen3_vl import media_text
from rmsd_fast.report_page.films import Films

PREPROCESSOR = Preprocessor()
FRAMES, FPS = 60, 10.0
NAMES = ("clip.mp4", "audio.m4a", "both.mp4", "cut.mp4")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 6 s of numbered frames, 6 s of audio, both together, and both cut at 1.3 s."""
    from torchcodec.encoders import AudioEncoder, VideoEncoder

    folder = tmp_path_factory.mktemp("made")
    VideoEncoder(numbered_frames(FRAMES), frame_rate=FPS).to_file(
        folder / "clip.mp4", codec="libx264", pixel_format="yuv420p", extra_options={"g": "20"}
    )
    tone = torch.sin(torch.arange(6 * 48000) / 20)[None] / 2
    AudioEncoder(tone, sample_rate=48000).to_file(folder / "audio.m4a")
    ffmpeg("-i", folder / "clip.mp4", "-i", folder / "audio.m4a", "-c", "copy", folder / "both.mp4")
    ffmpeg("-ss", 1.3, "-i", folder / "both.mp4", "-c", "copy", folder / "cut.mp4")
    return folder


def request(path: Path, **options: object) -> MediaRequest:
    return MediaRequest(str(path), "video", VideoConfig(num_frames=6), PREPROCESSOR, check_frames=False, **options)


def read(path: Path, span: tuple | None = None) -> Frames:
    """Check that the layout agrees with the decoded frames, and return the frames."""
    frames, layout = read_media(request(path, span=span)), read_layout(request(path, span=span))
    assert (layout.timestamps_s, layout.grid_thw) == (frames.timestamps_s, frames.grid_thw)
    return frames


LATE = ("-itsoffset", 2, "-i", "clip.mp4", "-i", "audio.m4a")
# Each entry gives the command that makes the file, the time of its first frame, and the tolerance of that time.
CLOCKS = [
    ("video alone", "x.mp4", ("-i", "clip.mp4"), 0.0, 0),
    ("video and audio", "x.mp4", ("-i", "both.mp4"), 0.0, 0),
    # Matroska and FLV delay the video by 21 ms for the audio, and Opus starts 7 ms before 0.
    ("delay of AAC", "x.mkv", ("-i", "both.mp4"), 0.0, 0),
    ("delay of AAC", "x.flv", ("-i", "both.mp4"), 0.0, 0),
    ("start of Opus", "x.mkv", ("-i", "both.mp4", "-c:a", "libopus"), 0.0, 0),
    ("video 40 ms late", "x.mp4", ("-itsoffset", 0.04, *LATE[2:]), 0.0, 0),
    ("video 100 ms late", "x.mp4", ("-itsoffset", 0.1, *LATE[2:]), 0.1, 1e-6),
    ("video late", "x.mp4", LATE, 2.0, 1e-6),
    ("video late", "x.mkv", LATE, 2.0, 0.03),
    ("audio late", "x.mp4", ("-i", "clip.mp4", "-itsoffset", 2, "-i", "audio.m4a"), 0.0, 0),
    # These files start later than 0: with an edit list, in Matroska, without an edit list, and in fragments.
    ("all late", "x.mp4", ("-i", "clip.mp4", "-output_ts_offset", 5), 0.0, 0),
    ("all late", "x.mkv", ("-i", "clip.mp4", "-output_ts_offset", 5), 0.0, 0),
    ("all late, video later", "x.mp4", (*LATE, "-output_ts_offset", 3), 2.0, 0.03),
    ("no edit list", "x.mp4", ("-i", "clip.mp4", "-use_editlist", 0), 0.0, 0),
    ("fragments", "x.mp4", ("-i", "clip.mp4", "-movflags", "frag_keyframe+empty_moov"), 0.0, 0),
    ("no index", "x.mkv", ("-i", "clip.mp4", "-live", 1), 0.0, 0),
]


def make(folder: Path, made: Path, name: str, arguments: tuple) -> Path:
    codec = () if "-c:a" in arguments else ("-c", "copy")
    video = ("-c:v", "copy") if "-c:a" in arguments else ()
    ffmpeg(*(made / word if word in NAMES else word for word in arguments), *codec, *video, folder / name)
    return folder / name


@pytest.mark.parametrize(("what", "name", "arguments", "first", "within"), CLOCKS)
def test_stamps_and_spans_are_those_of_the_file(
    tmp_path: Path, made: Path, what: str, name: str, arguments: tuple, first: float, within: float
) -> None:
    path = make(tmp_path, made, name, arguments)
    frames = read(path)
    # These are the values of linspace(0, 59, 6), rounded.
    numbers = [0, 12, 24, 35, 47, 59]
    assert numbers_of(frames.pixels) == numbers
    if within == 0:
        # The times equal bit for bit what the processors of the model families compute.
        assert frames.timestamps_s == tuple(number / FPS for number in numbers)
    assert frames.timestamps_s == pytest.approx([first + number / FPS for number in numbers], abs=within + 1e-9)
    assert frames.duration_s == pytest.approx(first + 6.0, abs=within + 1e-9)
    # The span from 2.35 s to 4.45 s has the frames first shown at 2.4 s to 4.4 s. A late start moves them by less than
    # one frame.
    part = read(path, (2.35, 4.45))
    shown = [2.4, 2.8, 3.2, 3.6, 4.0, 4.4]
    assert part.timestamps_s == pytest.approx(shown, abs=within + 1e-9)
    assert numbers_of(part.pixels) == [round((time - first) * FPS) for time in shown]
    assert numbers_of(read(path, (None, first + 0.55)).pixels) == [0, 1, 2, 3, 4, 5]
    assert numbers_of(read(path, (first + 5.35, None)).pixels) == [54, 55, 56, 57, 58, 59]


def test_the_earliest_audio_counts(tmp_path: Path, made: Path) -> None:
    """Players and FFmpeg choose the first audio stream, which starts at 3 s; another stream starts at 1 s."""
    late, early = ("-itsoffset", 3, "-i", made / "both.mp4"), ("-itsoffset", 1, "-i", made / "audio.m4a")
    maps = ("-map", "0:v", "-map", "0:a", "-map", "1:a", "-disposition:a:0", "default", "-disposition:a:1", 0)
    for name in ("x.mp4", "x.mkv"):
        ffmpeg(*late, *early, *maps, "-c", "copy", tmp_path / name)
        frames = read(tmp_path / name)
        assert frames.timestamps_s[0] == pytest.approx(2.0, abs=0.03)


def test_prompts_state_the_times_of_the_file(tmp_path: Path, made: Path) -> None:
    late = read(make(tmp_path, made, "x.mp4", LATE))
    # The pairs are at 2.0 and 3.2 s, 4.4 and 5.5 s, and 6.7 and 7.9 s.
    text = media_text(late, PREPROCESSOR)
    assert [piece.rpartition("<")[2] for piece in text.split(" seconds>")[:-1]] == ["2.6", "5.0", "7.3"]


def test_error_for_a_span_without_frames_gives_their_range(tmp_path: Path, made: Path) -> None:
    path = make(tmp_path, made, "x.mp4", LATE)
    message = r"between 0 s and 1\.9 s: expected at least 2, got 0; its video runs from 2 to 8 s; check start"
    for call in (read_media, read_layout):
        with pytest.raises(MediaError, match=message):
            call(request(path, span=(None, 1.9)))


def test_a_variable_frame_rate_on_a_late_clock(tmp_path: Path, made: Path) -> None:
    # The video has ten frames of 0.1 s and then ten of 0.5 s. Frames 0, 4, 8, 11, 15 and 19 begin at 0, 0.4, 0.8, 1.5,
    # 3.5 and 5.5 s.
    from torchcodec.encoders import VideoEncoder

    path = tmp_path / "even.mp4"
    VideoEncoder(numbered_frames(20), frame_rate=FPS).to_file(
        path, codec="libx264", pixel_format="yuv420p", extra_options={"bf": "0"}
    )
    path.write_bytes(with_durations(path.read_bytes(), [1] * 10 + [5] * 10))
    late = tmp_path / "late.mp4"
    ffmpeg("-itsoffset", 2, "-i", path, "-i", made / "audio.m4a", "-c", "copy", late)
    frames = read_media(request(late))
    assert frames.timestamps_s == pytest.approx((2.0, 2.4, 2.8, 3.5, 5.5, 7.5), abs=1e-3)
    assert numbers_of(frames.pixels) == [0, 4, 8, 11, 15, 19]
    part = read_media(request(late, span=(3.0, 6.0)))
    assert min(part.timestamps_s) >= 2.9 and max(part.timestamps_s) <= 6.0
    # Compute the start time of a frame from its number.
    begins = [2 + (number / 10 if number < 10 else 1 + (number - 10) / 2) for number in numbers_of(part.pixels)]
    assert part.timestamps_s == pytest.approx(begins, abs=1e-3)


def test_a_clip_cut_without_encoding_is_read(made: Path) -> None:
    """The edit list starts at frame 13, and the decoder alone finds no frame before key frame 20."""
    frames = read(made / "cut.mp4")
    # The file has 47 frames, and these are the values of linspace(0, 46, 6), rounded.
    taken = [0, 9, 18, 28, 37, 46]
    assert numbers_of(frames.pixels) == [13 + number for number in taken]
    assert frames.timestamps_s == tuple(number / FPS for number in taken)
    assert numbers_of(read(made / "cut.mp4", (0.15, 0.75)).pixels) == [15, 16, 17, 18, 19, 20]


def read_or_follow(path: Path, folder: Path, **options: object) -> tuple[str, Frames]:
    """Return the message that refuses the file, and the frames of the file that the suggested command makes.

    Another version of FFmpeg may read the file. Then the message is empty and the frames are those of the file itself.
    """
    try:
        return "", read_media(request(path, **options))
    except MediaError as error:
        text = str(error)
    return text, read_media(request(run_advice(text, folder), **options))


def test_transport_streams_are_refused_with_a_command_that_keeps_the_clock(tmp_path: Path, made: Path) -> None:
    path = make(tmp_path, made, "x.ts", LATE)
    text, frames = read_or_follow(path, tmp_path, span=(3.0, 8.0))
    # Other FFmpeg versions may find the frames.
    assert text or ffmpeg_version() != 5
    if text:
        assert f"re-encode it with `ffmpeg -i {path} -c:v libx264 -crf 18 -pix_fmt yuv420p {tmp_path}/x.mp4`" in text
        assert "got a transport stream, which has no index" in text or "cannot seek in this file" in text
    # ffmpeg may fill the first two seconds with the first frame. Later frames keep their original times.
    expected = [(time - 2.0) * FPS for time in frames.timestamps_s]
    assert all(abs(number - wanted) <= 1 for number, wanted in zip(numbers_of(frames.pixels), expected, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.h264", ("-c", "copy", "-f", "h264")),
        ("x.hevc", ("-c:v", "libx265", "-x265-params", "log-level=none", "-f", "hevc")),
        ("x.m2v", ("-c:v", "mpeg2video", "-r", 25)),
        ("x.m4v", ("-c:v", "mpeg4", "-f", "m4v")),
        ("x.obu", ("-c:v", "libaom-av1", "-cpu-used", 8, "-t", 1)),
    ],
)
def test_streams_without_a_clock_are_refused(tmp_path: Path, made: Path, name: str, arguments: tuple) -> None:
    """FFmpeg would assume 25 frames per second if the file states no rate."""
    ffmpeg("-i", made / "clip.mp4", *arguments, tmp_path / name)
    for call in (read_media, read_layout):
        with pytest.raises(MediaError, match="got a raw stream, which has no index and no clock; re-encode") as caught:
            call(request(tmp_path / name))
    text = str(caught.value)
    # For this file the command alone is enough, because its rate is FFmpeg's default.
    if name == "x.m2v":
        frames = read(run_advice(text.partition(", its rate")[0], tmp_path))
        assert frames.timestamps_s == (0.0, 1.2, 2.4, 3.56, 4.76, 5.96)


def test_avi_with_b_frames_is_refused_with_a_command_that_works(tmp_path: Path, made: Path) -> None:
    ffmpeg("-i", made / "clip.mp4", "-c:v", "mpeg4", "-bf", 2, tmp_path / "x.avi")
    text, frames = read_or_follow(tmp_path / "x.avi", tmp_path)
    refused = "cannot be decoded" in text or "cannot seek in this file" in text
    # Other FFmpeg versions may find the frames.
    assert refused or (not text and ffmpeg_version() != 5)
    # AVI stores no presentation times, so the first frame may come one frame late.
    shown = [time * FPS for time in frames.timestamps_s]
    assert all(abs(number - at) <= 1 for number, at in zip(numbers_of(frames.pixels), shown, strict=True))


def write_animation(path: Path, *, hidden: tuple[int, int, int, int] | None, **options: object) -> Path:
    """Write ten pictures of 0.1 s with odd sizes: a red square on a transparent or a blue background."""
    pictures = []
    for number in range(10):
        picture = Image.new("RGBA", (65, 63), hidden or (0, 0, 255, 255))
        picture.paste((255, 0, 0, 255), (number * 4, 20, number * 4 + 20, 40))
        pictures.append(picture if hidden else picture.convert("RGB"))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=100, **options)
    return path


def ground_and_square(frames: Frames) -> tuple[list[int], list[int]]:
    """Return the color of a corner and the color at the center of the square in the first frame."""
    return frames.pixels[0, :, 2, 60].tolist(), frames.pixels[0, :, 30, 8].tolist()


def test_gif_is_a_video_with_a_white_background(tmp_path: Path) -> None:
    for hidden, ground in (((0, 0, 0, 0), [255, 255, 255]), (None, [0, 0, 255])):
        path = write_animation(tmp_path / "x.gif", hidden=hidden, disposal=2)
        frames = read(path)
        assert frames.timestamps_s == (0.0, 0.2, 0.4, 0.5, 0.7, 0.9)
        corner, square = ground_and_square(frames)
        assert corner == ground and square == [255, 0, 0]


@pytest.mark.parametrize(
    ("name", "codec", "found"),
    [
        ("x.png", (), "got one with an alpha channel"),
        ("x.webp", (), "got an animated WebP, which FFmpeg cannot read|got one with an alpha channel"),
        ("x.mov", ("prores_ks", "-pix_fmt", "yuva444p10le"), "got one with an alpha channel"),
        ("x.webm", ("libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", 5, "-b:v", 0), "got one with an alpha channel"),
    ],
)
def test_transparent_animations_are_refused_with_a_command_that_adds_white(
    tmp_path: Path, name: str, codec: tuple, found: str
) -> None:
    path = write_animation(tmp_path / ("made.png" if codec else name), hidden=(0, 0, 0, 0))
    if codec:
        ffmpeg("-i", path, "-c:v", *codec, tmp_path / name)
        path = tmp_path / name
    for call in (read_media, read_layout):
        with pytest.raises(MediaError, match=found) as caught:
            call(request(path))
    frames = read(run_advice(str(caught.value), tmp_path))
    assert frames.timestamps_s == pytest.approx((0.0, 0.2, 0.4, 0.5, 0.7, 0.9))
    corner, square = ground_and_square(frames)
    assert min(corner) > 245 and square[0] > 225 and max(square[1:]) < 30


def test_frames_without_times_are_refused(tmp_path: Path, made: Path) -> None:
    options = ("-c", "copy", "-avoid_negative_ts", "disabled", "-output_ts_offset", -1)
    ffmpeg("-i", made / "both.mp4", *options, tmp_path / "x.mkv")
    with pytest.raises(MediaError, match="expected a presentation time for each frame, got frames without one"):
        read_layout(request(tmp_path / "x.mkv"))


def test_an_opaque_animated_png_is_a_video(tmp_path: Path) -> None:
    corner, square = ground_and_square(read(write_animation(tmp_path / "x.png", hidden=None)))
    assert corner == [0, 0, 255] and square == [255, 0, 0]


def test_commands_can_be_pasted() -> None:
    tail = "-c:v libx264 -crf 18 -pix_fmt yuv420p"
    assert video_command("clips/a.ts", b"") == f"ffmpeg -i clips/a.ts {tail} clips/a.mp4"
    assert video_command("a.mp4", b"") == f"ffmpeg -i a.mp4 {tail} a-new.mp4"
    words = shlex.split(video_command("it's a clip.ts", b""))
    assert words[2] == "it's a clip.ts" and words[-1] == "it's a clip.mp4"
    assert video_command("a", b"") == f"ffmpeg -i a {tail} a.mp4"
    # The command names a file even if the file no longer exists.
    assert video_command("/nowhere/a.avi") == f"ffmpeg -i /nowhere/a.avi {tail} /nowhere/a.mp4"


def preview(path: Path, kind: str, count: int) -> Preview:
    return read_preview(PreviewRequest(str(path), kind, count, longest_px=96, max_file_mib=16))


def half_visible(path: Path) -> None:
    """Write a picture whose left half is transparent with black pixels and whose right half is green."""
    picture = Image.new("RGBA", (64, 2), (0, 0, 0, 0))
    picture.paste((0, 128, 0, 255), (32, 0, 64, 2))
    picture.save(path)


def test_previews_show_the_frames_and_times_of_decoding(tmp_path: Path, made: Path) -> None:
    late = make(tmp_path, made, "x.mp4", LATE)
    shown, frames = preview(late, "video", 6), read(late)
    assert shown.times_s == frames.timestamps_s and shown.frames.shape == (6, 64, 64, 3)
    assert numbers_of(torch.from_numpy(shown.frames).permute(0, 3, 1, 2)) == [0, 12, 24, 35, 47, 59]
    # The file has two seconds of audio alone, followed by six seconds of video.
    assert shown.seconds == frames.duration_s == pytest.approx(8.0)
    # A preview has at most as many frames as the video, and at least one.
    assert len(preview(late, "video", 100).times_s) == FRAMES and preview(late, "video", 1).times_s == (2.0,)
    half_visible(tmp_path / "x.png")
    shown = preview(tmp_path / "x.png", "image", 6)
    assert (shown.times_s, shown.seconds) == ((), None)
    assert shown.frames.tolist() == [[[[255] * 3] * 32 + [[0, 128, 0]] * 32] * 2]
    gif = write_animation(tmp_path / "x.gif", hidden=None)
    assert preview(gif, "video", 3).times_s == pytest.approx((0.0, 0.4, 0.9))
    with pytest.raises(MediaError, match="expected one picture, got an animation"):
        preview(gif, "image", 3)
    with pytest.raises(MediaError, match=r"expected at most data\.max_file_mib=0"):
        read_preview(PreviewRequest(str(gif), "video", 3, longest_px=64, max_file_mib=0))


def test_the_report_shows_previews(tmp_path: Path, made: Path) -> None:
    late = make(tmp_path, made, "x.mp4", LATE)
    half_visible(tmp_path / "x.png")
    with Films(timeout_s=60.0, max_file_mib=16) as films:
        captions = [caption for _, caption in films.read(str(late), is_video=True).shots]
        ((source, caption),) = films.read(str(tmp_path / "x.png"), is_video=False).shots
    assert captions == ["2.0 s", "2.8 s", "3.7 s", "4.5 s", "5.4 s", "6.2 s", "7.1 s", "7.9 s"]
    shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert caption == "picture" and shown.getpixel((2, 1)) == (255, 255, 255)


def test_previews_are_decoded_in_parts(tmp_path: Path, monkeypatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4", noise_frames(9, 64, 96))
    at_once = preview(clip, "video", 5).frames
    monkeypatch.setattr("rmsd_fast.data.video_file.RAW_BYTES", 2 * 3 * 64 * 96)
    in_parts = preview(clip, "video", 5).frames
    assert (at_once == in_parts).all() and at_once.shape == (5, 64, 96, 3)
    whole = decode_video(clip, VideoConfig(num_frames=5), PREPROCESSOR)
    assert torch.equal(torch.from_numpy(at_once).permute(0, 3, 1, 2), whole.pixels)
