"""Test that transparent pictures are shown on white and are refused if no pixel is visible."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from picture_files import LEVELS_16, grey_row, pixels, refusal, row_of, skip_unless_written, write_png, write_tiff
from PIL import Image

from rmsd_fast.data.pictures import _rgb

# The pixels are invisible (hidden black), half visible, and opaque. A color c at 128/255 on white is c*128/255 + 127: 0
# gives 127, 10 gives 132.02, 20 gives 137.04, 30 gives 142.06.
CLEAR_HALF_FULL = [(0, 0, 0, 0), (10, 20, 30, 128), (10, 20, 30, 255)]
ON_WHITE = [(255, 255, 255), (132, 137, 142), (10, 20, 30)]


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.webp", "x.tga"])
def test_transparent_areas_show_white(tmp_path: Path, name: str) -> None:
    row_of("RGBA", CLEAR_HALF_FULL).save(tmp_path / name, **({"lossless": True} if "webp" in name else {}))
    assert pixels(tmp_path / name) == [ON_WHITE]


def test_transparent_avif_shows_white(tmp_path: Path) -> None:
    skip_unless_written("x.avif")
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((200, 0, 0, 255), (32, 0, 64, 64))
    image.save(tmp_path / "x.avif", quality=100)
    rows = pixels(tmp_path / "x.avif")
    assert rows[5][5] == (255, 255, 255) and rows[5][60][0] > 190 and max(rows[5][60][1:]) < 10


def test_transparent_gray_and_palettes_show_white(tmp_path: Path) -> None:
    row_of("LA", [(0, 0), (0, 128), (40, 255)]).save(tmp_path / "la.png")
    row_of("LA", [(0, 0), (0, 128), (40, 255)]).save(tmp_path / "la.tiff")
    assert grey_row(tmp_path / "la.png") == grey_row(tmp_path / "la.tiff") == [255, 127, 40]
    image = row_of("P", [0, 1, 2])
    image.putpalette([0, 0, 0, 10, 20, 30, 10, 20, 30])
    image.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")
    assert pixels(tmp_path / "p.png") == [ON_WHITE]
    image.save(tmp_path / "p.gif", transparency=0)
    assert pixels(tmp_path / "p.gif") == [[(255, 255, 255), (10, 20, 30), (10, 20, 30)]]
    opaque = row_of("P", [0, 1, 1])
    opaque.putpalette([0, 0, 0, 10, 20, 30])
    opaque.save(tmp_path / "opaque.gif")
    assert pixels(tmp_path / "opaque.gif") == [[(0, 0, 0), (10, 20, 30), (10, 20, 30)]]


def test_image_modes_that_no_plugin_opens() -> None:
    """Pillow's plugins convert these modes, but programs that extend Pillow may not."""
    for mode in ("RGBa", "PA"):
        image = row_of("RGBA", [(0, 0, 0, 0), (0, 255, 0, 255)]).convert(mode)
        assert _rgb("x", image).tolist() == [[[255] * 3, [0, 255, 0]]], mode
    premultiplied = row_of("LA", [(0, 0), (0, 128), (40, 255)]).convert("La")
    assert _rgb("x", premultiplied).tolist() == [[[255] * 3, [127] * 3, [40] * 3]]
    # Hue 0 is red, and hue 85 of 255 is a third of the circle.
    assert _rgb("x", row_of("HSV", [(0, 255, 255), (85, 255, 255)])).tolist() == [[[255, 0, 0], [0, 255, 0]]]


def test_associated_alpha_shows_white(tmp_path: Path) -> None:
    # The colors are premultiplied by alpha: 5, 10, 15 at 128 are 10, 20, 30.
    data = bytes([0, 0, 0, 0, 5, 10, 15, 128, 10, 20, 30, 255])
    path = write_tiff(tmp_path / "x.tiff", data, [8] * 4, 2, width=3, tag_338=1)
    (row,) = pixels(path)
    assert row[0] == (255, 255, 255) and row[2] == (10, 20, 30)
    assert np.abs(np.array(row[1]) - (132, 137, 142)).max() <= 1


def test_a_transparent_color_shows_white(tmp_path: Path) -> None:
    row_of("RGB", [(1, 2, 3), (1, 2, 4)]).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "rgb.png") == [[(255, 255, 255), (1, 2, 4)]]
    row_of("L", [7, 8]).save(tmp_path / "l.png", transparency=7)
    assert grey_row(tmp_path / "l.png") == [255, 8]
    row_of("1", [0, 255]).save(tmp_path / "1.png", transparency=0)
    assert grey_row(tmp_path / "1.png") == [255, 255]
    # The gray has 4 bits, with values 3 and 5 of 15. The transparent color is given in 4 bits too, and 5 / 15 of 255 is
    # 85.
    write_png(tmp_path / "l4.png", (2, 1), 4, 0, [b"\x35"], tRNS=struct.pack(">H", 3))
    assert grey_row(tmp_path / "l4.png") == [255, 85]
    write_png(tmp_path / "l2.png", (4, 1), 2, 0, [b"\x1b"], tRNS=struct.pack(">H", 1))
    assert grey_row(tmp_path / "l2.png") == [0, 255, 170, 255]
    grey = np.array([LEVELS_16], dtype=">u2").tobytes()
    write_png(tmp_path / "l16.png", (8, 1), 16, 0, [grey], tRNS=struct.pack(">H", 129))
    assert grey_row(tmp_path / "l16.png") == [0, 0, 255, 1, 127, 128, 255, 255]
    rgb = struct.pack(">6H", 256, 0, 0, 257, 0, 0)
    write_png(tmp_path / "rgb16.png", (2, 1), 16, 2, [rgb], tRNS=struct.pack(">3H", 256, 0, 0))
    assert "got a 16-bit transparent color; save it as an 8-bit PNG" in refusal(tmp_path / "rgb16.png")


def write_bmp(path: Path, compression: int, alpha_mask: int | None, pixels_bgra: list[tuple[int, ...]]) -> Path:
    """Write a one-row BMP with 32 bits per pixel; alpha_mask=None writes the oldest header, which has no mask."""
    data = b"".join(map(bytes, pixels_bgra))
    size = 40 if alpha_mask is None else 108
    masks = struct.pack("<3I", 0xFF0000, 0xFF00, 0xFF) if compression == 3 else b""
    more = masks if alpha_mask is None else (masks + struct.pack("<I", alpha_mask)).ljust(68, b"\0")
    header = struct.pack("<IiiHHIIiiII", size, len(pixels_bgra), 1, 1, 32, compression, len(data), 0, 0, 0, 0)
    at = 14 + len(header) + len(more)
    path.write_bytes(b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + header + more + data)
    return path


def write_tga(path: Path, kind: int, bits: int, alpha_bits: int, data: bytes) -> Path:
    """Write a TGA with one row of two pixels, stored from the top left."""
    path.write_bytes(struct.pack("<BBBHHBHHHHBB", 0, 0, kind, 0, 0, 0, 0, 0, 2, 1, bits, 32 | alpha_bits) + data)
    return path


INVISIBLE = (
    "expected visible pixels, got a picture that is almost entirely transparent; if its colors are meant to show, "
)


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.webp", "x.tga", "x.ico"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_a_picture_without_a_visible_pixel_is_refused(tmp_path: Path, name: str, mode: str) -> None:
    if (mode, name) in [("LA", "x.webp"), ("LA", "x.ico")]:
        pytest.skip("the format has no gray with alpha")
    image = Image.new(mode, (16, 16), (200, 10, 20, 0) if mode == "RGBA" else (200, 0))
    image.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "x.webp" else {}))
    assert refusal(tmp_path / name, in_pixels=True).startswith(f"{INVISIBLE}remove the alpha channel")


def test_a_picture_with_too_few_visible_pixels_is_refused(tmp_path: Path) -> None:
    image = Image.new("RGBA", (400, 250), (200, 10, 20, 0))
    for alpha, visible in ((1, False), (7, False), (8, True), (255, True)):
        # One pixel of 100,000 is set.
        image.putpixel((3, 5), (0, 0, 0, alpha))
        image.save(tmp_path / "x.png")
        if visible:
            # The pixel is black at alpha/255 on white.
            assert pixels(tmp_path / "x.png")[5][3] == (255 - alpha,) * 3
        else:
            assert refusal(tmp_path / "x.png", in_pixels=True).startswith(INVISIBLE)
    # One picture has one visible pixel of 160,000; in the other every pixel is nearly transparent.
    image = Image.new("RGBA", (400, 400), (200, 10, 20, 0))
    image.putpixel((3, 5), (0, 0, 0, 255))
    image.save(tmp_path / "one.png")
    Image.new("LA", (4, 4), (0, 7)).save(tmp_path / "faint.png")
    grey = np.full((400, 400), 129, dtype=">u2")
    grey[5, 3] = 7
    write_png(tmp_path / "l16.png", (400, 400), 16, 0, [row.tobytes() for row in grey], tRNS=struct.pack(">H", 129))
    for name in ("one.png", "faint.png", "l16.png"):
        assert refusal(tmp_path / name, in_pixels=True).startswith(INVISIBLE)


def test_invisible_palettes_and_color_keys_are_refused(tmp_path: Path) -> None:
    image = row_of("P", [0, 1, 1])
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "p.png", transparency=b"\0\0")
    row_of("RGB", [(1, 2, 3)] * 2).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    grey = np.array([[129, 129]], dtype=">u2").tobytes()
    write_png(tmp_path / "l16.png", (2, 1), 16, 0, [grey], tRNS=struct.pack(">H", 129))
    for name in ("p.png", "rgb.png", "l16.png"):
        assert refusal(tmp_path / name, in_pixels=True).startswith(INVISIBLE)


def test_unused_alpha_of_bmp_is_opaque(tmp_path: Path) -> None:
    """Windows programs leave the fourth byte 0. It is alpha only if the header has a mask for it."""
    row = [(30, 20, 10, 0), (60, 50, 40, 0)]
    for compression, mask in ((0, None), (3, None), (3, 0)):
        path = write_bmp(tmp_path / "x.bmp", compression, mask, row)
        assert pixels(path) == [[(10, 20, 30), (40, 50, 60)]], (compression, mask)
    path = write_bmp(tmp_path / "x.bmp", 3, 0xFF000000, row)
    assert refusal(path, in_pixels=True).startswith(INVISIBLE)
    path = write_bmp(tmp_path / "x.bmp", 3, 0xFF000000, [(30, 20, 10, 255), (60, 50, 40, 0)])
    assert pixels(path) == [[(10, 20, 30), (255, 255, 255)]]


@pytest.mark.parametrize("alpha", [0, 99, 255])
def test_unused_alpha_of_tga_is_opaque(tmp_path: Path, alpha: int) -> None:
    """The header states how many bits of each pixel are alpha, but Pillow always treats a fourth byte as alpha."""
    data = bytes([30, 20, 10, alpha, 60, 50, 40, alpha])
    assert pixels(write_tga(tmp_path / "x.tga", 2, 32, 0, data)) == [[(10, 20, 30), (40, 50, 60)]]
    assert grey_row(write_tga(tmp_path / "l.tga", 3, 16, 0, bytes([7, alpha, 8, alpha]))) == [7, 8]
    path = write_tga(tmp_path / "x.tga", 2, 32, 8, data)
    if alpha == 0:
        assert refusal(path, in_pixels=True).startswith(INVISIBLE)
    elif alpha == 255:
        assert pixels(path) == [[(10, 20, 30), (40, 50, 60)]]
    else:
        # A color c at 99/255 on white is c * 99 / 255 + 156.
        assert np.abs(np.array(pixels(path)[0]) - [(160, 164, 168), (172, 175, 179)]).max() <= 1
