"""Write picture files for tests, some byte by byte, and read their pixels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from rmsd_fast.data import pictures
from rmsd_fast.data.media_file import MediaError, open_media

# The 16-bit levels map to round(v * 255 / 65535) = round(v / 257): 128 / 257 = 0.498, 129 / 257 = 0.502, and so on.
LEVELS_16 = [0, 128, 129, 257, 32767, 32768, 65407, 65535]
LEVELS_8 = [0, 0, 1, 1, 127, 128, 255, 255]


def picture_size(path: Path) -> tuple[int, int]:
    with open_media(str(path), 100, picture=True) as media:
        return pictures.picture_size(media)


def read_picture(path: Path) -> np.ndarray:
    with open_media(str(path), 100, picture=True) as media:
        return pictures.read_picture(media)


def pixels(path: Path) -> list[list[tuple[int, ...]]]:
    """Return rows of RGB pixels, after checking that the header gives the same size."""
    picture = read_picture(path)
    assert picture.dtype == np.uint8 and picture.shape[:2] == picture_size(path)
    return [[tuple(pixel) for pixel in row] for row in picture.tolist()]


def grey_row(path: Path) -> list[int]:
    (row,) = pixels(path)
    assert all(red == green == blue for red, green, blue in row)
    return [red for red, _, _ in row]


def refusal(path: Path, *, in_pixels: bool = False) -> str:
    """Return the error message, which is the same if only the size is read unless `in_pixels` is set."""
    with pytest.raises(MediaError) as caught:
        read_picture(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    if in_pixels:
        assert min(picture_size(path)) > 0
    else:
        with pytest.raises(MediaError) as caught:
            picture_size(path)
        assert str(caught.value) == text
    return text.removeprefix(f"{path}: ")


def skip_unless_written(name: str) -> None:
    if name.endswith(".avif") and not features.check("avif"):
        pytest.skip("this Pillow does not support AVIF")


def row_of(mode: str, values: list) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


def write_png(path: Path, size: tuple[int, int], bits: int, colour: int, rows: list[bytes], **chunks: bytes) -> Path:
    """Write a PNG byte by byte; `colour` is PNG's color type, and `chunks` precede the pixels."""

    def chunk(kind: str, data: bytes) -> bytes:
        body = kind.encode() + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in chunks.items())
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + body + chunk("IDAT", data) + chunk("IEND", b""))
    return path


def write_tiff(path: Path, data: bytes, bits: list[int], photometric: int, *, width: int, **more: int) -> Path:
    """Write a little-endian TIFF of one row; `bits` are per channel, and `more` has further tags, such as tag_338=1."""
    depths = struct.pack(f"<{len(bits)}H", *bits)
    # The values of a tag are stored in it if they fit into four bytes, and otherwise after the pixels.
    at = int.from_bytes(depths, "little") if len(depths) <= 4 else 8 + len(data)
    numbers = {256: width, 257: 1, 259: 1, 262: photometric, 273: 8, 277: len(bits), 278: 1, 279: len(data)}
    numbers |= {int(name.removeprefix("tag_")): value for name, value in more.items()}
    tags = {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in numbers.items()}
    tags[258] = struct.pack("<HHII", 258, 3, len(bits), at)
    data += depths if len(depths) > 4 else b""
    data += b"\0" * (len(data) % 2)
    entries = struct.pack("<H", len(tags)) + b"".join(tags[tag] for tag in sorted(tags)) + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + entries)
    return path
