"""Identify media files by their first bytes, and compute how long a video must be from the sizes in its headers.

Videos are accepted by their first bytes. FFmpeg reads more formats, but some of them (HLS, DASH, IMF and concat
scripts) are lists of other files, which may be stored anywhere. Such lists are text, but a check for text alone misses
some of them, for example lists that begin with a long comment in a non-Latin script. Formats that are not listed here
are therefore rejected.

Decoders read a truncated video as a shorter one, usually without an error. `Container.needed` detects truncation from
the sizes of the file's chunks. It cannot detect these cases:

- truncation exactly between two chunks if no size covers the whole file: fragmented MP4, FLV, MXF, IVF, and Matroska
  and AVI whose writer could not go back to fill in the size, as in live recordings;
- truncation of a broadcast ASF, a transport or program stream, DV, Y4M, NUT, or a stream without a container: these
  formats store no sizes;
- missing data inside a file of the right size, as in downloads that preallocate their space.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO, Literal

# This many bytes are enough to identify a file. Matroska's tracks may follow several KiB of padding.
HEAD_BYTES = 2**16
# FFmpeg searches this many bytes, up to the first zero, for the words that mark a file as a list of other files.
PROBED_BYTES = 2**20
_LIST = re.compile(rb"<mpd|<compositionplaylist", re.IGNORECASE)
# A file is text if its first bytes are text. All magic numbers of containers are shorter than 64 bytes.
_TEXT_BYTES = 64
_TEXT = frozenset(b"\t\n\r" + bytes(range(32, 127)))
# Picture formats that begin with text: PPM and related formats, XPM, XBM.
_PICTURE_TEXT = re.compile(rb"P[1-7Ff]\s|/\* XPM \*/|#define \w+_width ")

# Files that are neither videos nor pictures: first bytes, description, advice.
_FETCH, _EXPORT, _CONVERT = "fetch the file itself", "export it as PNG", "save it as PNG or JPEG"
_OTHERS = (
    (rb"#EXTM3U|ffconcat version", "a playlist", "fetch the video that it names"),
    (rb"(?i)<!doctype html|<html", "an HTML page", _FETCH),
    (rb"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (rb"(?i)<svg|<(\?xml|!doctype svg).*<svg", "an SVG drawing", _EXPORT),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing", _EXPORT),
    (rb"%PDF-", "a PDF document", _EXPORT),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive", "unpack it"),
    (rb"RIFF.{4}WAVE|ID3|fLaC|\xff[\xf2\xf3\xfb]", "an audio file", "name the video"),
)
RAW_STREAM = "a raw stream"
# For these formats, decoders find no frames, or return frames other than the requested ones.
WITHOUT_INDEX = ("a transport stream", "a program stream")
AVIF = "an AVIF picture"
# Pictures that Pillow cannot open.
_PICTURES = (
    # The AVIF brand may follow a more general one.
    (rb".{4}ftyp(avi|(mif1|msf1).{4}(.{4}){0,8}?avi[fs])", AVIF, _CONVERT),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC picture", _CONVERT),
    (rb"\xff\x0a|.{4}JXL ", "a JPEG XL picture", _CONVERT),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF or raw file of a kind that Pillow cannot read", _CONVERT),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF.{4}WEBP|BM.{4}\0", "a picture with a damaged header", "fetch it again"),
)

# In every container, these bytes are enough to compute a chunk's size.
_CHUNK_HEAD = 32
_BOXES = frozenset(b"ftyp moov mdat moof free skip wide uuid meta mfra sidx ssix styp emsg prft pnot".split())
# Matroska elements: the file, its segment and cluster, and the children of both.
_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"
_ELEMENTS = frozenset(
    bytes.fromhex(name)
    for name in (
        *("1a45dfa3", "18538067", "114d9b74", "1549a966", "1654ae6b", "1f43b675", "1c53bb6b", "1941a469", "1043a770"),
        *("1254c367", "ec", "bf", "e7", "a3", "a0", "ab", "a7", "af", "5854"),
    )
)
_RIFF_CHUNK = re.compile(rb"RIFF|LIST|JUNK|idx1|ix\d\d|\d\d(d[bc]|wb|pc|tx)")
# ASF objects (header, data, indexes) by the first bytes of their GUIDs, and the file properties, which hold the flags.
_ASF_OBJECTS = (b"0&\xb2u", b"6&\xb2u", b"\x90\x08\x003", b"\xd3)\xe2\xd6", b"\xf8\x03\xb1\xfe", b"\xd0?\xb7<")
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_FLAGS_AT, _ASF_BROADCAST = 88, 1
# Display size: DisplayWidth and DisplayHeight in Matroska; vprp in AVI, where the height comes first.
_SIZED = rb"(?:\x81(.)|\x82(..)|\x83(...)|\x84(....))"
_MATROSKA_DISPLAY = re.compile(rb"\x54\xb0" + _SIZED + rb"\x54\xba" + _SIZED, re.DOTALL)
_AVI_DISPLAY = re.compile(rb"vprp.{24}(..)(..)", re.DOTALL)
# MP4's pixel aspect ratio box: the width, then the height of a pixel.
_MP4_PIXEL = re.compile(rb"\0\0\0\x10pasp(....)(....)", re.DOTALL)
# One hour of video takes 1 to 2 MiB.
_LONGEST_MOVIE_HEADER = 2**26
_FLV_TAGS = (8, 9, 18)
_OGG_LONGEST_PAGE, _OGG_END_OF_STREAM = 27 + 255 + 255 * 255, 4


@dataclass(frozen=True)
class Container:
    """A video file format.

    Fields:
        name: name used in messages.
        start: pattern of a file's first bytes.
        needed: function that returns the minimum size of a file, given the file and its size; None if the format stores
            no sizes.
    """

    name: str
    start: re.Pattern[bytes]
    needed: Callable[[BinaryIO, int], int] | None = None


def container_of(head: bytes) -> Container | None:
    """Return the container that a file with these first bytes has, or None."""
    return next((container for container in CONTAINERS if container.start.match(head)), None)


def is_text(head: bytes) -> bool:
    """Return whether a file is text, except for picture formats that begin with text."""
    return set(head[:_TEXT_BYTES]) <= _TEXT and not _PICTURE_TEXT.match(head)


def lists_files(head: bytes) -> bool:
    """Return whether FFmpeg might read a file as a list of other files, given its first PROBED_BYTES."""
    return bool(_LIST.search(head.partition(b"\0")[0]))


def name_content(head: bytes) -> tuple[str, str] | None:
    """Return a description of a file that Pillow cannot open, and advice; None if the format is unknown."""
    if known := _first_match((*_OTHERS, *_PICTURES), head):
        return known
    container = container_of(head)
    return (container.name, "list it under videos") if container else None


def name_other(head: bytes) -> tuple[str, str] | None:
    """Return a description of a file that is not a video, and advice; None if the format is unknown."""
    if lists_files(head):
        return "a playlist", "fetch the video that it names"
    if known := _first_match(_OTHERS, head):
        return known
    if set(head[:_TEXT_BYTES]) <= _TEXT:
        return "text", "check the path in the question file"
    return ("a picture", "list it under images") if _first_match(_PICTURES, head) else None


def _first_match(contents: tuple[tuple[bytes, str, str], ...], head: bytes) -> tuple[str, str] | None:
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
    return next(((what, advice) for pattern, what, advice in contents if re.match(pattern, head, re.DOTALL)), None)


def pixel_aspect(file: BinaryIO, size: int, width: int, height: int) -> float | None:
    """Return the pixel aspect ratio (width / height) stored in a container, or None.

    For VP8, VP9 and AV1, only the container stores it. Players prefer the container to the stream.

    Args:
        size: size of the file in bytes.
        width, height: size of the stored frames, before rotation.
    """
    head = file.read(HEAD_BYTES)
    if head.startswith(b"\x1aE\xdf\xa3"):
        wide, high = _numbers(_MATROSKA_DISPLAY.search(head), "big")
        wide, high = wide * height, high * width
    elif head.startswith(b"RIFF"):
        high, wide = _numbers(_AVI_DISPLAY.search(head), "little")
        wide, high = wide * height, high * width
    else:
        wide, high = _numbers(_MP4_PIXEL.search(_movie_header(file, size)), "big")
    return wide / high if wide and high else None


def _numbers(match: re.Match[bytes] | None, order: Literal["big", "little"]) -> tuple[int, int]:
    first, second = (value for value in match.groups() if value is not None) if match else (b"", b"")
    return int.from_bytes(first, order), int.from_bytes(second, order)


def _movie_header(file: BinaryIO, size: int) -> bytes:
    """Return the `moov` box of an MP4 file; empty if there is none."""
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(_CHUNK_HEAD)
        length = _box(head, size - at)
        if length is None or head[4:8] == b"moov":
            file.seek(at)
            return file.read(min(length or 0, _LONGEST_MOVIE_HEADER))
        at += length
    return b""


def _walk(file: BinaryIO, size: int, measure: Callable[[bytes, int], int | None], at: int = 0) -> int:
    """Return the end offset of the last chunk that begins inside the file.

    Args:
        measure: function that returns the length of a chunk, given its first bytes and the number of remaining bytes;
            None if no chunk begins there, as in tags that some programs append.
        at: offset of the first chunk.
    """
    while at < size:
        file.seek(at)
        length = measure(file.read(_CHUNK_HEAD), size - at)
        if length is None:
            break
        at += length
    return at


def _box(head: bytes, left: int) -> int | None:
    """Measure an MP4 box: 4 bytes of size, 4 of type.

    With size 1, 8 bytes of size follow. With size 0, the box extends to the end of the file.
    """
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        length = int.from_bytes(head[8:16], "big")
    # Data of unknown type that exceeds the file is a tag after the last box.
    return length if length >= 8 and (length <= left or head[4:8] in _BOXES) else None


def _element(head: bytes, left: int) -> int | None:
    """Measure a Matroska element. An element of unknown size is entered, so only its header counts."""
    # The number of leading zero bits is the number of bytes that follow, both for the name and for the size.
    name = head[: 9 - head[0].bit_length()]
    first = head[len(name)] if len(head) > len(name) else 0
    width = 9 - first.bit_length()
    if name not in _ELEMENTS or width > 8:
        return None
    value = int.from_bytes(head[len(name) : len(name) + width], "big") & (2 ** (7 * width) - 1)
    if value == 2 ** (7 * width) - 1:
        return len(name) + width if name in (_SEGMENT, _CLUSTER) else None
    return len(name) + width + value


def _riff_chunk(head: bytes, left: int) -> int | None:
    """Measure an AVI or WebP chunk. Files above 1 GiB have several chunks named RIFF.

    Programs that cannot seek back leave 0 or the largest number as the size of a list. Such a list is entered.
    """
    length = int.from_bytes(head[4:8], "little")
    if head[:4] in (b"RIFF", b"LIST") and length in (0, 2**32 - 1):
        return 12
    length += 8 + length % 2
    if head[:4] == b"RIFF" and left < length <= left + 9:
        # Some programs also count the 8 header bytes, or a padding byte that they do not write.
        return left
    return length if _RIFF_CHUNK.match(head) else None


def _asf_object(head: bytes, left: int) -> int | None:
    length = int.from_bytes(head[16:24], "little")
    return length if head.startswith(_ASF_OBJECTS) and length >= 24 else None


def _asf_needed(file: BinaryIO, size: int) -> int:
    """Measure an ASF file by its objects, unless a flag in its header marks it as a broadcast, which has no sizes."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    flags = head.find(_ASF_PROPERTIES) + _ASF_FLAGS_AT
    broadcast = _ASF_FLAGS_AT <= flags < len(head) and head[flags] & _ASF_BROADCAST
    return 0 if broadcast else _walk(file, size, _asf_object)


def _flv_needed(file: BinaryIO, size: int) -> int:
    file.seek(5)
    # 4 bytes before the first tag and after each tag hold the length of the previous tag. The last 4 may be missing.
    return _walk(file, size, _flv_tag, int.from_bytes(file.read(4), "big") + 4)


def _flv_tag(head: bytes, left: int) -> int | None:
    length = 11 + int.from_bytes(head[1:4], "big")
    return (left if length <= left < length + 4 else length + 4) if head[0] & 31 in _FLV_TAGS else None


def _mxf_packet(head: bytes, left: int) -> int | None:
    """Measure an MXF packet: a 16-byte key, then its size in one byte, or in as many bytes as the low 7 bits state."""
    if not head.startswith(b"\x06\x0e\x2b\x34"):
        return None
    if len(head) < 17:
        return 17
    width = head[16] & 127 if head[16] > 127 else 0
    return 17 + width + (int.from_bytes(head[17 : 17 + width], "big") if width else head[16])


def _ivf_needed(file: BinaryIO, size: int) -> int:
    file.seek(6)
    first = int.from_bytes(file.read(2), "little")
    return _walk(file, size, lambda head, left: 12 + int.from_bytes(head[:4], "little"), first)


def _png_chunk(head: bytes, left: int) -> int | None:
    return 12 + int.from_bytes(head[:4], "big") if head[4:8].isalpha() and head[4:8] != b"IEND" else None


def _gif_needed(file: BinaryIO, size: int) -> int:
    """Walk the blocks of a GIF to its trailer byte."""

    def palette(flags: bytes) -> int:
        return 3 * 2 ** ((flags[0] & 7) + 1) if flags and flags[0] & 128 else 0

    file.seek(10)
    at = 13 + palette(file.read(1))
    while at < size:
        file.seek(at)
        head = file.read(10)
        if head[:1] not in (b"!", b","):
            return at + 1 if head[:1] == b";" else 0
        file.seek(at + (2 if head[:1] == b"!" else 11 + palette(head[9:10])))
        # Sub-blocks of up to 255 bytes, each after its length. The last one has length 0.
        while length := int.from_bytes(file.read(1), "big"):
            file.seek(length, 1)
        at = file.tell()
    return at + 1


def _ogg_needed(file: BinaryIO, size: int) -> int:
    """Return the size of an Ogg file; one more byte if its last page is not marked as the end of its stream."""
    start = max(0, size - 2 * _OGG_LONGEST_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS\0")
    page = tail[at:] if at >= 0 else b""
    if len(page) < 27 or not page[5] & _OGG_END_OF_STREAM:
        return size + 1
    # A page is 27 bytes, the segment lengths, and the segments.
    lengths = page[27 : 27 + page[26]]
    return start + at + 27 + page[26] + sum(lengths)


def _container(name: str, start: bytes, needed: Callable[[BinaryIO, int], int] | None = None) -> Container:
    return Container(name, re.compile(start, re.DOTALL), needed)


CONTAINERS = (
    # Old MOV files have no `ftyp`. Words that may occur in a text count as boxes only after a size below 16 MiB.
    _container(
        "an MP4 or MOV video",
        rb".{4}(ftyp|moov|moof|mdat|styp|sidx|jP  )|\0.{3}(free|skip|wide|uuid|pnot)",
        partial(_walk, measure=_box),
    ),
    _container("a Matroska or WebM video", rb"\x1aE\xdf\xa3", partial(_walk, measure=_element)),
    _container("an AVI video", rb"RIFF.{4}AVI[ \x19]", partial(_walk, measure=_riff_chunk)),
    _container("a WebP picture", rb"RIFF.{4}WEBP", partial(_walk, measure=_riff_chunk)),
    _container("an ASF or WMV video", rb"0&\xb2u\x8ef\xcf\x11", _asf_needed),
    _container("an FLV video", rb"FLV\x01", _flv_needed),
    _container("an Ogg video", rb"OggS\0", _ogg_needed),
    _container("a GIF animation", rb"GIF8[79]a", _gif_needed),
    _container("a PNG animation", rb"\x89PNG\r\n\x1a\n", partial(_walk, at=8, measure=_png_chunk)),
    _container("an MXF video", rb"\x06\x0e\x2b\x34", partial(_walk, measure=_mxf_packet)),
    _container("an IVF video", rb"DKIF\0\0", _ivf_needed),
    _container("a Y4M video", rb"YUV4MPEG2 "),
    _container("a NUT video", rb"nut/multimedia container\0"),
    _container("a RealMedia video", rb"\.RMF\0"),
    _container("a DV video", rb"\x1f\x07\0"),
    _container("a WTV recording", rb"\xb7\xd8\0 7I\xda\x11"),
    _container("a program stream", rb"\0\0\x01\xba"),
    _container("a GXF video", rb"\0\0\0\0\x01\xbc"),
    # Streams without a container: start codes of MPEG-1 to MPEG-4, H.264 and H.265, and the first unit of AV1.
    _container(RAW_STREAM, rb"\0{2,3}\x01[^\0]|\x12\0\x0a"),
    # Packets of 188 bytes. Blu-ray adds 4 bytes before each packet, error correction adds 16 bytes after it.
    _container("a transport stream", rb".{0,203}?G((.{187}G){2}|(.{191}G){2}|(.{203}G){2})"),
)
