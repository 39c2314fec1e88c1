"""Test that pictures of all pixel formats are read as they are displayed, or refused by name."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from media_files import decode_image, decode_video, run_advice
from picture_files import (
    LEVELS_8,
    LEVELS_16,
    grey_row,
    picture_size,
    pixels,
    refusal,
    row_of,
    skip_unless_written,
    write_png,
    write_tiff,
)
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from rmsd_fast.config import VideoConfig
from rmsd_fast.data import pictures
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.video import MediaRequest, read_layout, read_media


@pytest.mark.parametrize("name", ["x.png", "little.tiff", "big.tiff", "packed.tiff", "x.pgm", "x.jp2"])
def test_16_bit_gray_is_scaled(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(np.array([LEVELS_16], dtype=">u2" if name == "big.tiff" else "<u2"))
    if name == "x.pgm":
        (tmp_path / name).write_bytes(b"P5 8 1 65535\n" + np.array(LEVELS_16, dtype=">u2").tobytes())
    else:
        image.save(tmp_path / name, **({"compression": "tiff_deflate"} if name == "packed.tiff" else {}))
    assert grey_row(tmp_path / name) == LEVELS_8


def test_tiff_with_12_bits_and_with_inverted_gray(tmp_path: Path) -> None:
    # Of a maximum of 4095, the values 0, 1365 and 4095 map to 0, 85 and 255. Two pixels take three bytes.
    path = write_tiff(tmp_path / "12.tiff", bytes.fromhex("000555FFF000"), [12], 1, width=4)
    assert grey_row(path) == [0, 85, 255, 0]
    data = np.array([0, 257, 65535], dtype="<u2").tobytes()
    path = write_tiff(tmp_path / "reversed.tiff", data, [16], 0, width=3)
    assert grey_row(path) == [255, 254, 0]


@pytest.mark.parametrize("name", ["x.tiff", "x.pfm"])
def test_floats_from_0_to_1_are_scaled(tmp_path: Path, name: str) -> None:
    # 0.25 * 255 = 63.75, and 0.5 * 255 = 127.5 rounds half to even.
    Image.fromarray(np.array([[0, 0.25, 0.5, 1]], dtype=np.float32)).save(tmp_path / name)
    assert grey_row(tmp_path / name) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [
        ([0, 128, 70000], np.int32, "mode I with values from 0 to 70000"),
        ([-5, 3], np.int32, "mode I with values from -5 to 3"),
        ([0, 2.5], np.float32, "mode F with values from 0 to 2.5"),
        ([-0.5, 1], np.float32, "mode F with values from -0.5 to 1"),
        ([0, np.nan], np.float32, "mode F with values from nan to nan"),
    ],
)
def test_values_without_a_defined_range_are_refused(tmp_path: Path, values: list, kind: type, found: str) -> None:
    Image.fromarray(np.array([values], dtype=kind)).save(tmp_path / "x.tiff")
    expected = f"expected 8 or 16 bits per channel, or floats from 0 to 1, got {found}; scale them to 0-255"
    assert refusal(tmp_path / "x.tiff", in_pixels=True).startswith(expected)


def test_16_bit_color_keeps_its_upper_8_bits(tmp_path: Path) -> None:
    """Pillow keeps the upper byte, so a value is at most one level below its scaled value (65279 / 257 = 254.0)."""
    row = struct.pack(">6H", 0, 255, 256, 32768, 65279, 65535)
    write_png(tmp_path / "x.png", (2, 1), 16, 2, [row])
    assert pixels(tmp_path / "x.png") == [[(0, 0, 1), (128, 254, 255)]]


def test_cmyk_ycbcr_lab_and_bilevel(tmp_path: Path) -> None:
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)]
    seen = [(255, 255, 255), (0, 255, 255), (0, 0, 0), (255, 0, 0)]
    row_of("CMYK", inks).save(tmp_path / "cmyk.tiff")
    assert pixels(tmp_path / "cmyk.tiff") == [seen]
    # The file is written as Adobe does: with its marker and inverted, and Pillow inverts too.
    image = row_of("CMYK", inks).resize((64, 16), Image.Resampling.NEAREST)
    image.save(tmp_path / "cmyk.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "cmyk.jpg").read_bytes()
    got = np.array(pixels(tmp_path / "cmyk.jpg"))[8, 8::16]
    assert np.abs(got - seen).max() <= 3
    # Ordinary JPEGs are YCbCr: Y 76, Cb 85 and Cr 255 give a red of 76 + 1.402 * 127 = 254.
    Image.new("YCbCr", (8, 8), (76, 85, 255)).save(tmp_path / "ycbcr.jpg", quality=100)
    assert np.abs(np.array(pixels(tmp_path / "ycbcr.jpg")) - (254, 0, 0)).max() <= 1
    # L is stored as 255ths of 100. The red of sRGB has L 54.29, a 80.81, b 69.89 under D50, and L 50.2 is gray 120.
    data = bytes([255, 0, 0, 138, 81, 70, 128, 0, 0])
    write_tiff(tmp_path / "lab.tiff", data, [8] * 3, 8, width=3)
    got = np.array(pixels(tmp_path / "lab.tiff")[0])
    assert np.abs(got - [(255, 255, 255), (255, 0, 0), (120, 120, 120)]).max() <= 5
    for name in ("1.png", "1.tiff", "1.pbm", "1.bmp"):
        row_of("1", [0, 255, 255, 0]).save(tmp_path / name)
        assert grey_row(tmp_path / name) == [0, 255, 255, 0]


@pytest.mark.parametrize(("size", "shown"), [((1, 1), (64, 64)), ((150, 1), (800, 32)), ((1, 200), (32, 928))])
def test_pictures_of_one_pixel(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    Image.new("RGB", size, (0, 128, 0)).save(tmp_path / "x.png")
    frames = decode_image(tmp_path / "x.png", VideoConfig(), Preprocessor())
    assert frames.pixels.shape[:1:-1] == shown
    assert frames.pixels.amax((0, 2, 3)).tolist() == frames.pixels.amin((0, 2, 3)).tolist() == [0, 128, 0]


def test_extreme_shapes_are_refused_with_their_own_size(tmp_path: Path) -> None:
    Image.new("RGB", (640, 1)).save(tmp_path / "x.png")
    request = MediaRequest(str(tmp_path / "x.png"), "image", VideoConfig(), Preprocessor())
    for read in (read_media, read_layout):
        with pytest.raises(MediaError, match=r"aspect ratio of at most 200, got 640 \(640x1\); crop or pad it"):
            read(request)


# The picture has three by two stored pixels, and the table gives the displayed picture for each orientation.
STORED = ["abc", "def"]
SEEN = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}


def letters(rows: list[list[tuple[int, ...]]]) -> list[str]:
    return ["".join(chr(ord("a") + round(red / 50)) for red, _, _ in row) for row in rows]


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.webp", "x.jpg", "x.avif", "grey.png", "deep.png", "alpha.png"])
@pytest.mark.parametrize("orientation", SEEN)
def test_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    skip_unless_written(name)
    values = np.array([[(ord(letter) - ord("a")) * 50 for letter in row] for row in STORED], dtype=np.uint8)
    # Blocks of 16 x 16 pixels keep their values to a few levels in lossy formats.
    image = Image.fromarray(values).resize((48, 32), Image.Resampling.NEAREST)
    if name == "deep.png":
        image = Image.fromarray(np.asarray(image).astype("<u2") * 257)
    elif name != "grey.png":
        image = image.convert("RGBA" if name == "alpha.png" else "RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, **({"quality": 95} if name in ("x.jpg", "x.avif", "x.webp") else {}))
    rows = pixels(tmp_path / name)
    assert letters([row[8::16] for row in rows[8::16]]) == SEEN[orientation]
    request = MediaRequest(str(tmp_path / name), "image", VideoConfig(), Preprocessor())
    assert read_layout(request).grid_thw == read_media(request).grid_thw


def jpeg_with_exif(path: Path, exif: bytes) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32), (200, 100, 0)).save(buffer, "JPEG")
    data = buffer.getvalue()
    body = b"Exif\0\0" + exif
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:])
    return path


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (b"", False),
        (b"II*\0\x08\0\0", False),
        (b"nothing of TIFF", False),
        # The header announces three tags and the file has one and a half: an orientation, and a description that lies
        # past the end.
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHHHII", 3, 0x0112, 3, 1, 6, 0, 0x010E, 2, 99, 9999), True),
        # These orientations do not exist, and one of them is not a number.
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 9, 0, 0), False),
        (b"II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, 2, 2, b"6\0\0\0", 0), False),
    ],
)
def test_damaged_exif_does_not_matter(tmp_path: Path, exif: bytes, turned: bool) -> None:
    rows = pixels(jpeg_with_exif(tmp_path / "x.jpg", exif))
    assert (len(rows), len(rows[0])) == ((48, 32) if turned else (32, 48))
    assert np.abs(np.array(rows) - (200, 100, 0)).max() <= 3


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tiff", "packed.tiff"])
def test_an_orientation_in_xmp_is_ignored(tmp_path: Path, name: str) -> None:
    """Browsers ignore it too. Pillow's own `getexif` uses it if EXIF has no orientation."""
    image, options = Image.new("RGB", (48, 32), (200, 100, 0)), {"xmp": XMP}
    if name == "x.png":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif "tiff" in name:
        options = {"tiffinfo": {700: XMP}} | ({"compression": "tiff_lzw"} if name == "packed.tiff" else {})
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as saved:
        assert saved.getexif()[0x0112] == 6
    assert np.array(pixels(tmp_path / name)).shape == (32, 48, 3)


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path: Path, monkeypatch) -> None:
    exif = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 0)
    before = write_png(tmp_path / "before.png", (3, 1), 8, 0, [b"abc"], eXIf=exif)
    data = before.read_bytes()
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + len(exif)]
    after = tmp_path / "after.png"
    after.write_bytes(data.replace(chunk, b"").replace(b"\0\0\0\0IEND", chunk + b"\0\0\0\0IEND"))
    plain = write_png(tmp_path / "plain.png", (3, 1), 8, 0, [b"abc"])
    assert grey_row(plain) == [97, 98, 99]
    for path in (before, after):
        assert pixels(path) == [[(97,) * 3], [(98,) * 3], [(99,) * 3]]
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert [picture_size(path) for path in (before, after, plain)] == [(3, 1), (3, 1), (1, 3)]


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"progressive": True, "restart_marker_blocks": 2}],
    ids=["baseline", "progressive", "restarts", "progressive restarts"],
)
def test_a_jpeg_may_lack_its_end_marker_but_no_pixels(tmp_path: Path, options: dict) -> None:
    coarse = np.random.default_rng(3).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    path = tmp_path / "x.jpg"
    Image.fromarray(coarse).resize((99, 81), Image.Resampling.NEAREST).save(path, quality=85, **options)
    data, whole = path.read_bytes(), pixels(path)
    for missing in (1, 2):
        path.write_bytes(data[:-missing])
        assert pixels(path) == whole
    for missing in [*range(3, 60), 500, 1000, len(data) // 2]:
        path.write_bytes(data[:-missing])
        assert (
            refusal(path, in_pixels=True) == "truncated: picture data is missing; fetch it again or drop the question"
        )


@pytest.mark.parametrize(("options", "times"), [({}, 3), ({"restart_marker_blocks": 4}, 9)])
def test_how_often_a_jpeg_without_an_end_is_decoded(tmp_path: Path, monkeypatch, options: dict, times: int) -> None:
    Image.effect_noise((64, 64), 80).save(tmp_path / "x.jpg", **options)
    (tmp_path / "x.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:-2])
    digest, calls = pictures._digest, []
    monkeypatch.setattr(pictures, "_digest", lambda image: calls.append(image) or digest(image))
    pixels(tmp_path / "x.jpg")
    assert len(calls) == times


def test_a_progressive_jpeg_that_lacks_whole_scans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path, progressive=True)
    data = path.read_bytes()
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    for at in scans[1:]:
        path.write_bytes(data[:at])
        assert refusal(path, in_pixels=True).startswith("truncated: picture data is missing")


@pytest.mark.parametrize("name", ["x.png", "x.gif", "x.webp", "x.bmp", "x.tiff", "x.ppm", "x.avif", "x.jp2", "x.tga"])
def test_other_truncated_pictures_are_refused(tmp_path: Path, name: str) -> None:
    skip_unless_written(name)
    Image.effect_noise((96, 96), 80).convert("RGB").save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        # WebP and AVIF state their length at the start.
        refusal(tmp_path / name, in_pixels=name not in ("x.webp", "x.avif"))


def test_a_damaged_avif_is_not_reported_as_an_unknown_format(tmp_path: Path) -> None:
    """Advice to save the file as PNG would not help if complete AVIF files can be read."""
    skip_unless_written("x.avif")
    path = tmp_path / "x.avif"
    Image.effect_noise((96, 96), 80).convert("RGB").save(path)
    data = path.read_bytes()
    # The brand may follow a more general brand.
    for start in (data[:100], data[:8] + b"mif1" + data[12:100]):
        path.write_bytes(start)
        assert refusal(path).startswith("expected a picture, got a damaged AVIF picture; fetch it again, or")


def test_without_avif_support_the_error_asks_for_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(features.modules, "avif", raising=False)
    (tmp_path / "x.avif").write_bytes(b"\0\0\0\x18ftypavif" + bytes(12))
    assert "got an AVIF picture; save it as PNG or JPEG" in refusal(tmp_path / "x.avif")


def three_pictures() -> list[Image.Image]:
    return [Image.new("RGB", (65, 63), colour) for colour in ("red", "lime", "blue")]


def save_all(path: Path, pictures: list[Image.Image], **options: object) -> Path:
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.avif"])
def test_animations_are_refused_with_a_command_that_works(tmp_path: Path, name: str) -> None:
    skip_unless_written(name)
    path = save_all(tmp_path / name, three_pictures(), duration=100)
    text = refusal(path)
    assert text.startswith(
        f"expected one picture, got an animation of 3 pictures ({path.suffix[1:].upper()}); save one"
    )
    with pytest.raises(MediaError, match="an animation of 3 pictures"):
        picture_size(path)
    if name == "x.avif":
        return
    written = run_advice(text, tmp_path)
    assert written == tmp_path / "x.mp4"
    frames = decode_video(written, VideoConfig(num_frames=3), Preprocessor(), check_frames=False)
    assert frames.timestamps_s == pytest.approx((0.0, 0.1, 0.2))
    assert frames.pixels.float().mean((2, 3)).argmax(1).tolist() == [0, 1, 2]


def test_tiff_with_several_pages(tmp_path: Path) -> None:
    path = save_all(tmp_path / "pages.tiff", three_pictures())
    expected = "expected one picture, got a TIFF file of 3 pages; save the relevant page as PNG"
    assert refusal(path) == expected
    with pytest.raises(MediaError, match="a TIFF file of 3 pages"):
        picture_size(path)
    # The second and third pages are a reduced copy and a mask (NewSubfileType 1 and 4).
    red, copy, mask = three_pictures()
    copy.encoderinfo, mask.encoderinfo = {"tiffinfo": {254: 1}}, {"tiffinfo": {254: 4}}
    path = save_all(tmp_path / "copies.tiff", [red, copy, mask])
    assert pixels(path)[0][0] == (255, 0, 0)
    # The first page is a reduced copy. The real picture is stored elsewhere, as in raw files of cameras.
    red.save(tmp_path / "raw.tiff", tiffinfo={254: 1})
    assert refusal(tmp_path / "raw.tiff").startswith("expected a picture, got a reduced copy of one")


def test_versions_of_one_picture_count_as_one(tmp_path: Path) -> None:
    for name in ("x.gif", "x.webp"):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(
            tmp_path / name, save_all=True, **({"lossless": True} if "w" in name else {})
        )
        assert pixels(tmp_path / name)[0][0] == (255, 0, 0)
    # Phones add a second view or a gain map.
    red, green, _ = three_pictures()
    path = save_all(tmp_path / "x.mpo", [red, green])
    assert pixels(path)[0][0][0] > 250 and max(pixels(path)[0][0][1:]) < 5
    # An icon has several sizes, and the largest is read.
    red.resize((64, 64)).save(tmp_path / "x.ico", sizes=[(16, 16), (64, 64)])
    assert np.array(pixels(tmp_path / "x.ico")).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"<!DOCTYPE html><html><body>not found</body></html>" + b" " * 64, "got an HTML page; fetch the file itself"),
        ("\ufeff<html><title>页面不存在</title></html>".encode(), "got an HTML page; fetch the file itself"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "got an SVG drawing; export it as PNG"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
            "got a Git LFS pointer; fetch the file itself",
        ),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "got a PDF document; export it as PNG"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n" + b" " * 64,
            "got a PostScript drawing; export it as PNG",
        ),
        (b"\xc5\xd0\xd3\xc6" + bytes(60), "got a PostScript drawing; export it as PNG"),
        (b"PK\x03\x04" + bytes(60), "got an archive; unpack it"),
        (b"\0\0\0\x18ftypheic" + bytes(12), "got a HEIC picture; save it as PNG or JPEG"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "got an MP4 or MOV video; list it under videos"),
        ((b"G" + bytes(187)) * 3, "got a transport stream; list it under videos"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "got a picture with a damaged header; fetch it again"),
        (bytes(range(256)), "got an unsupported format; save it as PNG or JPEG"),
        (b"just words", "got text; check the path in the question file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_name_the_type_of_other_files(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    request = MediaRequest(str(path), "image", VideoConfig(), Preprocessor())
    for read in (read_media, read_layout):
        with pytest.raises(MediaError) as caught:
            read(request)
        assert str(caught.value).startswith(f"{path}: expected a ") and found in str(caught.value)


def test_reading_a_picture_starts_no_program(tmp_path: Path, monkeypatch) -> None:
    """Pillow has Ghostscript draw an EPS file, which this test would detect, also after the binary DOS header."""
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    eps = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(script), 0, 0, 0, 0, 0xFFFF) + script
    with Image.open(io.BytesIO(eps)) as image, contextlib.suppress(OSError):
        image.load()
    assert ran.exists()  # Check that the test would detect a started program.
    ran.unlink()
    (tmp_path / "x.png").write_bytes(eps)
    for read in (read_media, read_layout):
        with pytest.raises(MediaError, match="got a PostScript drawing"):
            read(MediaRequest(str(tmp_path / "x.png"), "image", VideoConfig(), Preprocessor()))
    assert not ran.exists()


def test_pictures_whose_bytes_look_like_text(tmp_path: Path) -> None:
    (tmp_path / "x.ppm").write_bytes(b"P6\n40 8\n255\n" + b"abc" * 320)
    (tmp_path / "plain.ppm").write_bytes(b"P3\n40 8\n255\n" + b"97 98 99\n" * 320)
    for name in ("x.ppm", "plain.ppm"):
        request = MediaRequest(str(tmp_path / name), "image", VideoConfig(), Preprocessor())
        assert read_media(request).pixels.amax((0, 2, 3)).tolist() == [97, 98, 99]
        with pytest.raises(MediaError, match="got text"):
            read_media(MediaRequest(str(tmp_path / name), "video", VideoConfig(), Preprocessor()))
    Image.new("1", (40, 8), 0).save(tmp_path / "x.xbm")
    request = MediaRequest(str(tmp_path / "x.xbm"), "image", VideoConfig(), Preprocessor())
    assert read_media(request).pixels.max() == 0
