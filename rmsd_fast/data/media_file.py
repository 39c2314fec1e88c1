"""Check media files without decoding them: type of content, hash, and the command that produces a usable video."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOMEM, ESTALE
from pathlib import Path
from typing import BinaryIO

from rmsd_fast.data.containers import (
    HEAD_BYTES,
    PROBED_BYTES,
    RAW_STREAM,
    WITHOUT_INDEX,
    container_of,
    is_text,
    lists_files,
    name_other,
)
from rmsd_fast.files import DISK_ERRORS, file_digest

# Matroska's magic number, and its AlphaMode element with the value 1.
_MATROSKA, _ALPHA_MODE = b"\x1aE\xdf\xa3", b"\x53\xc0\x81\x01"
# FFmpeg filter. H.264 halves the resolution of colors, so sides must be even; the sides of videos already are.
_EVEN_SIDES = "scale=trunc(iw/2)*2:trunc(ih/2)*2"
_ON_WHITE = "format=rgba,split[a][b];[a]lutrgb=r=255:g=255:b=255:a=255[w];[w][b]overlay=format=auto"
# Errors of the machine, not of the file.
NOT_NOW = (*DISK_ERRORS, EMFILE, ENFILE, ENOMEM, ESTALE)


class MediaError(RuntimeError):
    """A media file that cannot be used. The message names the file, the problem and what to do."""


class NotNow(MediaError):
    """This machine could not read the file at this time. The file may be fine."""


def stat_file(path: str, max_file_mib: int) -> os.stat_result:
    """Return the state of a file without opening it, so a pipe or device cannot block.

    Raises:
        MediaError: the file is missing, empty, larger than `max_file_mib`, or a folder, pipe, socket or device.
    """
    try:
        state = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{path}: no such file; check the path in the question file and data.media_root") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(state.st_mode):
        what = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, socket or device"
        raise MediaError(f"{path}: expected a file, got {what}; check the path in the question file")
    if state.st_size == 0:
        raise MediaError(f"{path}: the file is empty; fetch it again or drop the question")
    if state.st_size > max_file_mib * 2**20:
        raise MediaError(
            f"{path}: expected at most data.max_file_mib={max_file_mib}, got {state.st_size / 2**20:.0f} MiB; shorten "
            "it, or raise the limit"
        )
    return state


@dataclass(frozen=True)
class MediaFile:
    """An opened media file.

    Libraries get its descriptor instead of its name, so they read exactly this file. A name could also refer to a file
    that replaced it after the check, or to a picture sequence.

    Fields:
        path: path as given by the user, for messages.
        file: file object, open for reading.
        size: size in bytes.
        head: first bytes, enough to identify the format.
    """

    path: str
    file: BinaryIO
    size: int
    head: bytes

    @property
    def name(self) -> str:
        """Return the name under which libraries open the file."""
        return f"/dev/fd/{self.file.fileno()}"

    def command(self, *, flatten: bool = False) -> str:
        """Return the command that makes a usable video of the file; see `video_command`."""
        return video_command(self.path, self.head, flatten=flatten)


@contextmanager
def open_media(path: str, max_file_mib: int, *, picture: bool = False) -> Iterator[MediaFile]:
    """Open a file of acceptable size that is a complete video, or a picture if `picture` is set.

    Args:
        picture: whether Pillow will read the file as a picture. Pillow identifies formats and truncation itself.
    Raises:
        MediaError: the file is not acceptable.
    """
    stat_file(path, max_file_mib)
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise unreadable(path, error) from error
    with file:
        try:
            # Check the opened file, because it may have been replaced after the check above.
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise MediaError(f"{path}: expected a file, got another kind; check the path in the question file")
            media = MediaFile(path, file, os.fstat(file.fileno()).st_size, file.read(HEAD_BYTES))
            if picture:
                _refuse_text(media)
            else:
                _refuse_other_kinds(media)
                _refuse_truncated(media)
        except OSError as error:
            raise unreadable(path, error) from error
        yield media


def video_command(path: str, head: bytes = b"", *, flatten: bool = False) -> str:
    """Return the command that converts a file into a usable video, for error messages.

    Audio is kept: it may start before the video, and the file's clock then starts with it.

    Args:
        path: the file.
        head: its first bytes, if known.
        flatten: whether to put transparent pictures on white.
    """
    source = Path(path)
    target = source.with_suffix(".mp4") if source.suffix.lower() != ".mp4" else source.with_stem(f"{source.stem}-new")
    before = ""
    if _is_animated_webp(head):
        # FFmpeg cannot read it. Pillow can, and writes a PNG that FFmpeg reads.
        source, flatten = source.with_name(f"{source.stem}-animated.png"), True
        save = "import sys; from PIL import Image; Image.open(sys.argv[1]).save(sys.argv[2], save_all=True)"
        before = f"{shlex.join(['python', '-c', save, path, str(source)])} && "
    decoder = f"-c:v {_alpha_decoder(head)} " if _alpha_decoder(head) else ""
    filters = ""
    if flatten or head.startswith(b"\x89PNG"):
        filters = f" -filter_complex {shlex.quote(f'{_ON_WHITE},{_EVEN_SIDES}')}"
    elif head.startswith(b"GIF8") or head[4:11] == b"ftypavi":
        filters = f" -vf {shlex.quote(_EVEN_SIDES)}"
    names = [shlex.quote(str(name)) for name in (source, target)]
    return f"{before}ffmpeg {decoder}-i {names[0]}{filters} -c:v libx264 -crf 18 -pix_fmt yuv420p {names[1]}"


def unseekable_video(head: bytes) -> str | None:
    """Return a file's format if decoders cannot find its frames reliably, otherwise None. `head` is its first bytes."""
    if _is_animated_webp(head):
        return "an animated WebP, which FFmpeg cannot read"
    container = container_of(head)
    return f"{container.name}, which has no index" if container and container.name in WITHOUT_INDEX else None


def media_digest(path: str) -> str:
    """Return a hash of a media file's content. Raise MediaError if it cannot be read."""
    try:
        return file_digest(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _refuse_text(media: MediaFile) -> None:
    if is_text(media.head):
        what, advice = name_other(media.head) or ("text", "check the path in the question file")
        raise MediaError(f"{media.path}: expected a picture, got {what}; {advice}, or drop the question")


def _refuse_other_kinds(media: MediaFile) -> None:
    """Reject files not identified as a video, regardless of name: FFmpeg may read them as a list of other files."""
    path, head = media.path, media.head
    if b"\0" not in head:
        media.file.seek(len(head))
        head += media.file.read(PROBED_BYTES - len(head))
    container = container_of(head)
    if container is None or lists_files(head):
        what, advice = name_other(head) or (
            "an unknown kind of file",
            f"fetch it again, re-encode it with `{video_command(path)}`",
        )
        raise MediaError(f"{path}: expected a video, got {what}; {advice}, or drop the question")
    if container.name == RAW_STREAM:
        raise MediaError(
            f"{path}: expected a video with a clock, got {RAW_STREAM}, which has no index and no clock; re-encode "
            f"it with `{media.command()}`, with its rate given by -framerate before -i, or drop the question"
        )


def _refuse_truncated(media: MediaFile) -> None:
    """Reject a file that ends before its last chunk ends, because decoders would read it as a shorter video."""
    media.file.seek(0)
    container = container_of(media.head)
    needed = container.needed(media.file, media.size) if container and container.needed else 0
    if needed > media.size:
        raise MediaError(
            f"{media.path}: truncated: expected at least {needed} bytes, got {media.size}; fetch it again or drop the "
            "question"
        )


def undecodable(path: str, error: Exception) -> MediaError:
    """Return the error for a file, usually a damaged one, for which a library raised an unexpected exception."""
    return MediaError(f"{path}: cannot be decoded ({type(error).__name__}: {error}); drop the question")


def unreadable(path: str, error: OSError) -> MediaError:
    """Return the error for a file that the operating system could not read."""
    if error.errno in NOT_NOW:
        return NotNow(
            f"{path}: cannot be read on this machine ({error.strerror}); check its memory, its disks and its limit on "
            "open files"
        )
    return MediaError(f"{path}: cannot be opened ({error.strerror}); check the file or drop the question")


def has_alpha_aside(head: bytes) -> bool:
    """Return whether a WebM stores its transparency in a second stream, which FFmpeg's own decoders ignore."""
    return _alpha_decoder(head) != ""


def _alpha_decoder(head: bytes) -> str:
    """Return the name of the FFmpeg decoder that reads a WebM's transparency; empty if it has none."""
    if not head.startswith(_MATROSKA) or _ALPHA_MODE not in head:
        return ""
    return "libvpx" if b"V_VP8" in head else "libvpx-vp9"


def _is_animated_webp(head: bytes) -> bool:
    """Return whether the flags of an extended WebP, after its first chunk's size, mark it as animated."""
    return head[8:16] == b"WEBPVP8X" and head[20:21] > b"" and bool(head[20] & 2)
