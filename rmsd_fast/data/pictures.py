"""Read picture files as upright 8-bit RGB, and their size without decoding them.

A picture is either read as a viewer would show it, or rejected with a message that describes the problem:

- Transparent parts become white. A picture with almost no visible pixels is rejected, because some programs write alpha
  0 for opaque pixels. Alpha is ignored if a TGA or BMP file says that it is not used.
- 16-bit gray is scaled to 0-255, and so are floats from 0 to 1. Other ranges of integers and floats are rejected,
  because no format defines black and white for them. Pillow itself keeps the upper 8 bits of 16-bit color, which is at
  most one level below the scaled value. 10-bit or 12-bit values stored in 16 bits look nearly black, as they do in
  viewers.
- CMYK, YCbCr and LAB are converted to RGB by Pillow. Color profiles are ignored, as the processors of model families
  ignore them.
- The EXIF orientation is applied. Other EXIF tags are not read, so they may be damaged. Orientations in XMP
  are ignored, as browsers ignore them.
- A JPEG without its last bytes is read if no pixel needs them (see `_complete_jpeg`). Wrong data inside a JPEG is not
  detected, because any bytes are valid picture data.
- Animations and multi-page files are rejected. Some formats hold several versions of one picture: reduced copies in
  TIFF, sizes in ICO, layers in PSD, second views in MPO. Their first or largest picture is read.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from rmsd_fast.config import NotInstalled, first_line
from rmsd_fast.data.containers import AVIF, name_content
from rmsd_fast.data.media_file import MediaError, MediaFile

# Larger pictures need gigabytes while they are read. Pillow warns above the same limit.
MOST_PIXELS = 89_478_485
# A pixel with a lower alpha differs from a white background by at most 7 of 255 levels, which is invisible. Programs
# leave such pixels, and a few pixels with any alpha, in transparent pictures: 9 of 1000x1000 are not content.
LEAST_ALPHA, LEAST_VISIBLE = 8, 1e-5
# Values of the EXIF orientation that swap height and width.
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)
# TIFF tags.
_SUBFILE_TYPE, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC = 254, 256, 257, 258, 262
# Bits of NewSubfileType: a reduced copy of another picture, and a transparency mask for another picture.
_REDUCED, _MASK = 1, 4
_WHITE_IS_ZERO = 0
# Formats whose "frames" are versions of one picture.
_VERSIONS_OF_ONE = ("MPO", "PSD", "ICO", "ICNS", "CUR")
# Formats that Pillow may identify, regardless of the file's name. Pillow supports more formats, but reads some of them
# with other programs, such as EPS with Ghostscript.
_FORMATS = ("AVIF", "BMP", "CUR", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD")
_FORMATS += ("QOI", "SGI", "TGA", "TIFF", "WEBP", "XBM", "XPM")
# Offset of the TGA byte whose low 4 bits are the number of alpha bits per pixel.
_TGA_ALPHA_BITS = 17
# Formats whose 16-bit values run from 0 to 65535. Pillow opens some of them in its 32-bit mode "I".
_SIXTEEN_BIT = ("PNG", "PPM", "TIFF", "JPEG2000")
_SIXTEEN_BIT_AS_I = ("PNG", "PPM")
_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
_TO_RGB = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
# A PNG with 2 or 4 bits per pixel states its transparent gray in those bits. Pillow scales only the pixels.
_SCALE_OF_KEY = {"L;2": 85, "L;4": 17}
# A JPEG marker other than stuffed bytes, fill bytes and restarts.
_JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
_RESTART_INTERVAL = 0xDD
_RESTARTS = 8
# Number of rows that are hashed at once.
_STRIP = 256


def picture_size(media: MediaFile) -> tuple[int, int]:
    """Return height and width of the upright picture. Decodes only ICO and ICNS. Raises as `read_picture`."""
    with _opened(media) as image:
        width, height = image.size
        if image.format == "TIFF":
            # Some versions of Pillow swap width and height here, others when the pixels are read.
            width, height = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
        elif image.format in ("ICO", "ICNS"):
            # The size in the index of these formats may differ from the size of the picture.
            image.load()
            width, height = image.size
        return (width, height) if _orientation(media, image) in _QUARTER_TURNS else (height, width)


def read_picture(media: MediaFile) -> np.ndarray:
    """Return the upright picture, uint8 [H, W, 3].

    Raises:
        MediaError: the file is damaged or truncated, does not hold exactly one picture, shows nothing, or its values
            have no defined black and white.
        NotInstalled: Pillow is not installed.
    """
    with _opened(media) as image:
        scale = _SCALE_OF_KEY.get(_raw_mode(image), 1)
        orientation = _orientation(media, image)
        if image.format == "TIFF":
            # Pillow itself rotates TIFF files when it reads their pixels, and would also apply an orientation in XMP.
            orientation = 1
            image.info.pop("xmp", None)
        image = _loaded(media, image)
        if scale > 1 and "transparency" in image.info:
            image.info["transparency"] *= scale
        if image.format == "TGA" and image.mode in ("RGBA", "LA") and not media.head[_TGA_ALPHA_BITS] & 15:
            image = image.convert(image.mode.removesuffix("A"))
        return np.ascontiguousarray(_upright(_rgb(media.path, image), orientation))


@contextmanager
def _opened(media: MediaFile) -> Iterator[Any]:
    """Open a Pillow image of one picture without reading its pixels. Errors inside the context become MediaError."""
    try:
        from PIL import Image, UnidentifiedImageError, features
    except ImportError as error:
        raise NotInstalled("images are read by Pillow, which is not installed: `pip install pillow`") from error
    path = media.path
    try:
        Image.init()
        with Image.open(media.name, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise MediaError(
                    f"{path}: expected at most {MOST_PIXELS} pixels, got {image.width}x{image.height}; scale it down"
                )
            _refuse_several(media, image)
            _refuse_deep_color_key(path, image)
            yield image
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        what, advice = name_content(media.head) or ("an unsupported format", "save it as PNG or JPEG")
        # Pillow reads AVIF since version 11.3 if it was built with libavif.
        if what == AVIF and "avif" in features.modules and features.check_module("avif"):
            what, advice = "a damaged AVIF picture", "fetch it again"
        raise MediaError(f"{path}: expected a picture, got {what}; {advice}, or drop the question") from error
    # Pillow's plugins raise arbitrary exceptions for damaged files.
    except Exception as error:
        reason = first_line(error).replace(media.name, "the file")
        raise MediaError(
            f"{path}: cannot be decoded ({reason}); fetch it again, save it again as PNG, or drop the question"
        ) from error


def _refuse_several(media: MediaFile, image: Any) -> None:
    """Raise MediaError unless the file holds one picture."""
    path = media.path
    count = 1 if image.format in _VERSIONS_OF_ONE else getattr(image, "n_frames", 1)
    if image.format == "TIFF":
        if _subfile_type(image) & _REDUCED:
            raise MediaError(
                f"{path}: expected a picture, got a reduced copy of one, as in raw files of cameras; export the picture"
                " as PNG or JPEG"
            )
        if count > 1:
            count = _full_pages(image, count)
            if count > 1:
                raise MediaError(
                    f"{path}: expected one picture, got a TIFF file of {count} pages; save the relevant page as PNG"
                )
    if count > 1:
        raise MediaError(
            f"{path}: expected one picture, got an animation of {count} pictures ({image.format}); save one of them as "
            f"PNG, or use it as a video after `{media.command()}`"
        )


def _full_pages(image: Any, pages: int) -> int:
    """Return the number of pages of a TIFF file that are neither reduced copies nor masks of other pages."""
    full = 0
    for page in range(pages):
        image.seek(page)
        full += not _subfile_type(image) & (_REDUCED | _MASK)
    image.seek(0)
    return full


def _subfile_type(image: Any) -> int:
    value = image.tag_v2.get(_SUBFILE_TYPE, 0)
    return value if isinstance(value, int) else 0


def _raw_mode(image: Any) -> str:
    """Return the storage mode of a PNG's pixels, for example "RGB;16B"; empty for other formats."""
    layout = image.tile[0][3] if image.format == "PNG" and image.tile else ""
    return layout if isinstance(layout, str) else str(layout[0])


def _refuse_deep_color_key(path: str, image: Any) -> None:
    """Reject a 16-bit transparent color: Pillow keeps only 8 bits, so it may match other colors."""
    if "transparency" in image.info and _raw_mode(image) == "RGB;16B":
        raise MediaError(
            f"{path}: expected transparency as an alpha channel, got a 16-bit transparent color; save it as an "
            "8-bit PNG"
        )


def _orientation(media: MediaFile, image: Any) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or EXIF cannot be parsed."""
    from PIL import Image

    try:
        if image.format == "TIFF":
            value = image.tag_v2.get(_ORIENTATION, 1)
        else:
            # `getexif` is not used, because it decodes a PNG without EXIF, and takes an orientation from XMP.
            exif = Image.Exif()
            exif.load(_png_exif(media) if image.format == "PNG" else image.info.get("exif", b""))
            value = exif.get(_ORIENTATION, 1)
    # Pillow raises arbitrary exceptions for damaged EXIF, and the pixels may be intact.
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _png_exif(media: MediaFile) -> bytes:
    """Return the EXIF of a PNG, which may come after its pixels; empty if it has none."""
    with open(media.name, "rb") as file:
        file.seek(8)
        # A chunk is a 4-byte size, a 4-byte type, the data, and a 4-byte checksum.
        while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"eXIf":
                return file.read(length)
            file.seek(length + 4, 1)
    return b""


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror [H, W, 3] according to an EXIF orientation."""
    if orientation in _QUARTER_TURNS:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _loaded(media: MediaFile, image: Any) -> Any:
    """Return the image with its pixels read. If a JPEG lacks only its end marker, the marker is added."""
    try:
        image.load()
        return image
    except OSError as error:
        if image.format not in ("JPEG", "MPO") or "truncated" not in str(error):
            raise
        with open(media.name, "rb") as file:
            # A last 0xff is half of a marker, or half of an escape pair that stands for one byte.
            data = file.read().rstrip(b"\xff")
        # Its pixels would be a third copy, in addition to the two that are compared.
        image.close()
        whole = _complete_jpeg(data)
        if whole is None:
            raise MediaError(
                f"{media.path}: truncated: picture data is missing; fetch it again or drop the question"
            ) from error
        return whole


def _complete_jpeg(data: bytes) -> Any | None:
    """Return a JPEG without an end marker, with its pixels read; None unless the data holds all of them.

    The decoder does not report missing data, but fills it with gray. The file is therefore decoded several times, with
    nothing and with different noise in place of the missing bytes. If the pixels are the same each time, they do not
    depend on these bytes.
    """
    from PIL import Image

    complete, restarts = _scans(data)
    if not complete:
        return None
    whole = Image.open(io.BytesIO(data + _END_OF_IMAGE))
    pixels = _digest(whole)
    # Without restarts, two kinds of noise are enough, because the decoder skips none of it.
    for seed in range(_RESTARTS if restarts else 2):
        with Image.open(io.BytesIO(data + _noise(seed) + _END_OF_IMAGE)) as image:
            if _digest(image) != pixels:
                return None
    return whole


def _digest(image: Any) -> bytes:
    """Return a hash of the pixels without copying all of them."""
    digest = hashlib.blake2b(digest_size=16)
    for top in range(0, image.height, _STRIP):
        digest.update(image.crop((0, top, image.width, min(top + _STRIP, image.height))).tobytes())
    return digest.digest()


def _noise(seed: int) -> bytes:
    """Return invalid picture data that contains restart markers.

    A decoder that searches for a restart marker skips the data before it, and stops at a marker that is too far ahead.
    Each seed therefore begins with a different marker. Each part is longer than the data of the largest block of
    pixels, because an incomplete block is left out.
    """
    generator = random.Random(seed)
    parts = [generator.randbytes(4096).replace(b"\xff", b"") for _ in range(_RESTARTS)]
    return b"".join(part + bytes([0xFF, 0xD0 + (seed + number) % _RESTARTS]) for number, part in enumerate(parts))


def _scans(data: bytes) -> tuple[bool, bool]:
    """Return whether a JPEG's scans contain all bits of all coefficients, and whether it may have restart markers."""
    at, missing, restarts = 2, {None}, False
    while match := _JPEG_MARKER.search(data, at):
        kind, start = match[1][0], match.end()
        body = data[start + 2 : start + int.from_bytes(data[start : start + 2], "big")]
        at = start + 2 + len(body)
        restarts = restarts or kind == _RESTART_INTERVAL
        if kind in _START_OF_FRAME:
            missing = {(component, index) for component in body[6::3] for index in range(64)}
        elif kind == _START_OF_SCAN and len(body) == 4 + 2 * body[0]:
            first, last, bits = body[-3:]
            # The lower four bits are the number of bits still to come.
            if bits & 15 == 0:
                missing -= {(part, index) for part in body[1:-3:2] for index in range(first, last + 1)}
    return not missing, restarts


def _rgb(path: str, image: Any) -> np.ndarray:
    """Return the pixels of a loaded image as RGB on white, uint8 [H, W, 3]."""
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return np.repeat(_gray(path, image)[:, :, None], 3, axis=2)
    palette_alpha = image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"
    if image.mode in _WITH_ALPHA or palette_alpha or "transparency" in image.info:
        # Pillow has no direct conversion from this mode to RGBA.
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        _check_visible(path, np.asarray(alpha) >= LEAST_ALPHA)
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=alpha)
        return np.array(white)
    if image.mode not in _TO_RGB:
        raise MediaError(f"{path}: expected a picture in gray or color, got mode {image.mode}; save it as 8-bit PNG")
    return np.array(image.convert("RGB"))


def _gray(path: str, image: Any) -> np.ndarray:
    """Convert pixels of more than 8 bits to 8 bits, [H, W]."""
    values = np.asarray(image)
    sixteen = image.format in (_SIXTEEN_BIT if image.mode.startswith("I;16") else _SIXTEEN_BIT_AS_I)
    if image.mode != "F" and sixteen:
        bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
        most = 2**bits - 1
        levels = (values.astype(np.uint32) * 255 + most // 2) // most
    elif image.mode == "F" and values.min() >= 0 and values.max() <= 1:
        levels = np.rint(np.multiply(values, 255, dtype=np.float64))
    else:
        raise MediaError(
            f"{path}: expected 8 or 16 bits per channel, or floats from 0 to 1, got mode {image.mode} with values from "
            f"{values.min():g} to {values.max():g}; scale them to 0-255 and save an 8-bit PNG, or drop the question"
        )
    levels = levels.astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    key = image.info.get("transparency")
    if key is None:
        return levels
    clear = values == key
    _check_visible(path, ~clear)
    return np.where(clear, np.uint8(255), levels)


def _check_visible(path: str, visible: np.ndarray) -> None:
    """Raise MediaError if almost no pixels of a picture are visible; visible: bool [H, W]."""
    if np.count_nonzero(visible) < LEAST_VISIBLE * visible.size:
        raise MediaError(
            f"{path}: expected visible pixels, got a picture that is almost entirely transparent; if its colors are "
            "meant to show, remove the alpha channel, or drop the question"
        )
