"""What can be said of a media file without decoding it: that it is a whole, plain file; a hash of its content."""

from __future__ import annotations

import hashlib
import os
import stat

# Boxes of an MP4 file that a truncated one may end in.
_BOXES = (b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"uuid", b"meta", b"mfra", b"sidx", b"styp")
# Text at a file's beginning; longer than any container's magic number.
_HEAD = 64
_TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
# A container that begins with text.
_Y4M = b"YUV4MPEG2"


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


def check_file(path: str, max_file_mib: int) -> None:
    """Raise MediaError unless this is a plain, readable, complete file of a sensible size that is no playlist."""
    size = stat_file(path, max_file_mib).st_size
    try:
        _refuse_playlist(path)
        _refuse_truncated(path, size)
    except OSError as error:
        raise _unreadable(path, error) from error


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


def _refuse_playlist(path: str) -> None:
    """Refuse text whatever the file is called: FFmpeg takes it for a playlist, which may name files anywhere."""
    with open(path, "rb") as file:
        head = file.read(4096)
    start = head[:_HEAD]
    if b"<mpd" in head.lower() or b"#EXTM3U" in head or (set(start) <= _TEXT and not start.startswith(_Y4M)):
        raise MediaError(f"{path}: expected a video or picture, got text or a playlist; drop the question")


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
