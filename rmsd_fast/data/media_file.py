"""Media files without decoding: checks, the kind of content, a hash, and the command that makes a usable video."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from pathlib import Path

# Boxes of an MP4 file that a truncated one may end in.
_BOXES = (b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"meta", b"mfra", b"sidx", b"styp")
# A file is text if its first bytes are; this is longer than any container's magic number.
_TEXT_BYTES = 64
_TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
# A video container that begins with text, and pictures that do: PPM and its kin, XPM, XBM.
_Y4M = b"YUV4MPEG2"
_PICTURE_TEXT = re.compile(rb"P[1-7Ff]\s|/\* XPM \*/|#define \w+_width ")
_HEAD_BYTES = 4096
# What a file may be instead of a picture, by how it begins, and what to do about it.
_FETCH, _EXPORT, _CONVERT = "fetch the file itself", "export it as PNG", "save it as PNG or JPEG"
_LIST_AS_VIDEO = "list it under videos"
_TEXTS = (
    (rb"(?i)<!doctype html|<html", "an HTML page", _FETCH),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (rb"(?i)<svg|<(\?xml|!doctype svg).*<svg", "an SVG drawing", _EXPORT),
    (rb"%!PS", "a PostScript drawing", _EXPORT),
)
_CONTENTS = (
    *_TEXTS,
    (rb"\xc5\xd0\xd3\xc6", "a PostScript drawing", _EXPORT),
    (rb"%PDF-", "a PDF document", _EXPORT),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive", "unpack it"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC picture", _CONVERT),
    (rb".{4}ftypavi", "an AVIF picture", _CONVERT),
    (rb"\xff\x0a|.{4}JXL ", "a JPEG XL picture", _CONVERT),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF or raw file of a kind that Pillow does not read", _CONVERT),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|BM.{4}\0", "a picture whose header is damaged", "fetch it again"),
    (rb".{4}ftyp", "an MP4 or MOV video", _LIST_AS_VIDEO),
    (rb"\x1aE\xdf\xa3", "a Matroska or WebM video", _LIST_AS_VIDEO),
    (rb"RIFF.{4}AVI ", "an AVI video", _LIST_AS_VIDEO),
    (rb"FLV\x01", "an FLV video", _LIST_AS_VIDEO),
    (rb"G.{187}G.{187}G", "a transport stream", _LIST_AS_VIDEO),
    (rb"\0\0\x01\xba", "a program stream", _LIST_AS_VIDEO),
)
# Matroska, and its element AlphaMode with the value 1.
_MATROSKA, _ALPHA_MODE = b"\x1aE\xdf\xa3", b"\x53\xc0\x81\x01"
_WITHOUT_INDEX = ("a transport stream", "a program stream")
# FFmpeg filters. H.264 halves the resolution of colours, so sides must be even; those of videos are.
_EVEN_SIDES = "scale=trunc(iw/2)*2:trunc(ih/2)*2"
_ON_WHITE = "format=rgba,split[a][b];[a]lutrgb=r=255:g=255:b=255:a=255[w];[w][b]overlay=format=auto"
# Streams without a container (H.264, H.265, MPEG-1, MPEG-2) begin with a start code and one of these bytes.
_RAW_STREAM = re.compile(rb"\0?\0\0\x01[\x06\x09\x27\x40\x42\x46\x67\xb3]")


class MediaError(RuntimeError):
    """A media file that cannot be used. The message says which file, what is wrong and what to do."""


def stat_file(path: str, max_file_mib: int) -> os.stat_result:
    """State of a file. Opens nothing, so no pipe or device can hold it up.

    Raises:
        MediaError: it is missing, no plain file, empty, or larger than `max_file_mib`.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"{path}: no such file; check the path in the question file and data.media_root") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise MediaError(f"{path}: expected a file, got {what}; check the path in the question file")
    if found.st_size == 0:
        raise MediaError(f"{path}: the file is empty; fetch it again or drop the question")
    if found.st_size > max_file_mib * 2**20:
        raise MediaError(
            f"{path}: expected at most data.max_file_mib={max_file_mib}, got {found.st_size / 2**20:.0f} MiB; cut it, "
            "or raise the limit"
        )
    return found


def check_file(path: str, max_file_mib: int, *, picture: bool = False) -> None:
    """Raise MediaError unless this is a plain, readable, complete file of a sensible size that is not text.

    Args:
        picture: whether it is to be read as a picture. Some formats of pictures are text.
    """
    size = stat_file(path, max_file_mib).st_size
    try:
        _refuse_text(path, picture)
        _refuse_truncated(path, size)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_head(path: str) -> bytes:
    """Return the beginning of a file, long enough for `name_content`."""
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def name_content(head: bytes) -> tuple[str, str] | None:
    """Return what a file is by its beginning, with what to do about it; None if it is not known."""
    return _first_match(_CONTENTS, head)


def video_command(path: str, head: bytes | None = None, *, flatten: bool = False) -> str:
    """Return the command that makes a video of a file that cannot be read as it is, for error messages.

    Audio is kept: it may start before the video, and then the file's clock starts with it.

    Args:
        path: the file.
        head: its beginning; None reads it.
        flatten: put transparent pictures on white.
    """
    head = _head_or_nothing(path) if head is None else head
    source = Path(path)
    target = source.with_suffix(".mp4") if source.suffix.lower() != ".mp4" else source.with_stem(f"{source.stem}-new")
    before = ""
    if _is_animated_webp(head):
        # FFmpeg cannot read it; Pillow can, and writes a PNG that FFmpeg reads.
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


def unseekable_video(path: str) -> str | None:
    """Return what a file is if decoders find its frames unreliably or not at all, by its beginning; otherwise None."""
    head = _head_or_nothing(path)
    if _RAW_STREAM.match(head):
        return "a raw stream, which has no index and no clock (its rate may have to be given: -framerate before -i)"
    if _is_animated_webp(head):
        return "an animated WebP, which FFmpeg does not read"
    what, _ = name_content(head) or ("", "")
    return f"{what}, which has no index" if what in _WITHOUT_INDEX else None


def file_digest(path: str) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                digest.update(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _refuse_text(path: str, picture: bool) -> None:
    """Refuse text whatever the file is called: FFmpeg may take it for a playlist, which may name files anywhere."""
    head = read_head(path)
    start = head[:_TEXT_BYTES]
    if b"<mpd" in head.lower() or b"#EXTM3U" in head:
        what, advice = "a playlist", "fetch the video that it names"
    elif set(start) <= _TEXT and not start.startswith(_Y4M) and not (picture and _PICTURE_TEXT.match(start)):
        what, advice = _first_match(_TEXTS, head) or ("text", "check the path in the question file")
    else:
        return
    raise MediaError(f"{path}: expected a video or picture, got {what}; {advice}, or drop the question")


def _refuse_truncated(path: str, size: int) -> None:
    """Refuse an MP4 or MOV file that ends before its last box does: decoders take what is left as a shorter video."""
    with open(path, "rb") as file:
        head = file.read(8)
        if head[4:] != b"ftyp":
            return
        offset, seen = 0, set()
        # A box is 4 bytes of size and 4 of type; size 1 means that 8 bytes of size follow, 0 that it fills the file.
        while len(head) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if length == 1:
                length = int.from_bytes(file.read(8), "big")
            if length == 0:
                return
            offset += max(length, 8)
            if offset > size:
                if {b"moov", b"mdat"} <= seen and kind not in _BOXES:
                    return  # tags that some programs append
                raise MediaError(
                    f"{path}: truncated: expected at least {offset} bytes, got {size}; "
                    "fetch it again or drop the question"
                )
            seen.add(kind)
            file.seek(offset)
            head = file.read(8)


def _unreadable(path: str, error: OSError) -> MediaError:
    return MediaError(f"{path}: cannot be opened ({error.strerror}); check the file or drop the question")


def has_alpha_aside(path: str) -> bool:
    """Return whether a WebM holds its transparency in a second stream, which FFmpeg's own decoders ignore."""
    return _alpha_decoder(_head_or_nothing(path)) != ""


def _alpha_decoder(head: bytes) -> str:
    """Return the name of the FFmpeg decoder that reads a WebM's transparency; empty if it has none."""
    if not head.startswith(_MATROSKA) or _ALPHA_MODE not in head:
        return ""
    return "libvpx" if b"V_VP8" in head else "libvpx-vp9"


def _first_match(contents: tuple[tuple[bytes, str, str], ...], head: bytes) -> tuple[str, str] | None:
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return next(((what, advice) for pattern, what, advice in contents if re.match(pattern, head, re.DOTALL)), None)


def _head_or_nothing(path: str) -> bytes:
    """Return the beginning of a file for a message about it; nothing if the file is gone."""
    try:
        return read_head(path)
    except OSError:
        return b""


def _is_animated_webp(head: bytes) -> bool:
    """Return whether an extended WebP says, in the flags behind its first chunk's size, that it is animated."""
    return head[8:16] == b"WEBPVP8X" and head[20:21] > b"" and bool(head[20] & 2)
