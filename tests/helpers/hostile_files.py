"""Make files that try to have a library read other files, run a program, or never end."""

from __future__ import annotations

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from damaged_files import encoded
from media_files import noise_frames, write_clip
from PIL import Image

PROGRAMS = ("gs", "ffmpeg", "ffprobe", "convert", "magick", "inkscape", "rsvg-convert", "pdftoppm", "7z", "python")
# FFmpeg and Pillow might not interpret these names as files.
STRANGE_NAMES = ("concat:secret.mp4", "subfile,,start,0,end,99,,:x.mp4", "a%03d.png", "file:x.mp4", "-i.mp4", "data:x")


def dash(secret: Path, before: str = "") -> str:
    return (
        f'{before}<?xml version="1.0"?>\n<MPD type="static" profiles="urn:mpeg:dash:profile:isoff-live:2011">\n<Period>'
        '<AdaptationSet><Representation id="0" mimeType="video/mp4">'
        f"<BaseURL>{secret}</BaseURL></Representation></AdaptationSet></Period></MPD>\n"
    )


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, before: bytes = b"", data: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def contents(secret: Path) -> dict[str, bytes]:
    """Return files by name; each may lead a library to `secret` or keep it busy forever."""
    mpd = dash(secret).encode()
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({secret}) run showpage\n%%EOF\n".encode()
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{secret}" width="9" height="9"/></svg>'.encode()
    loop = b"II*\0\x08\0\0\0" + struct.pack("<H", 1) + struct.pack("<HHII", 256, 4, 1, 64) + struct.pack("<I", 8)
    return {
        "hls.mp4": hls,
        "hls-bom.mp4": b"\xef\xbb\xbf" + hls,
        "hls.png": hls,
        "dash.mp4": mpd,
        "dash-comment.mp4": dash(secret, "\ufeff").encode().replace(b"\n<MPD", b"<!--" + b"x" * 5000 + b"-->\n<MPD"),
        "dash-utf16.mp4": dash(secret).encode("utf-16"),
        "dash-in-gif.gif": b"GIF89a" + mpd,
        "dash-in-matroska.mkv": b"\x1aE\xdf\xa3" + mpd,
        "dash-in-avi.avi": b"RIFF\x10\x10\x10\x10AVI " + mpd,
        "dash-in-flv.flv": b"FLV\x01\x05" + mpd,
        "dash-in-asf.wmv": b"0&\xb2u\x8ef\xcf\x11" + mpd,
        "dash-in-png.png": b"\x89PNG\r\n\x1a\n" + mpd,
        "imf.mxf": f"<CompositionPlaylist><Id>{secret}</Id></CompositionPlaylist>".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile '{secret}'\n".encode(),
        "concat-comment.mp4": f"# {'x' * 3000}\nffconcat version 1.0\nfile '{secret}'\n".encode(),
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
        "avisynth.avs": f'AVISource("{secret}")\n'.encode(),
        "vobsub.idx": f"# VobSub index file, v7\nid: en, index: 0\nfile: {secret}\n".encode(),
        "picture.svg": svg,
        "svg.png": svg,
        "eps.png": script,
        "eps-dos.png": struct.pack("<IIIIIIIH", 0xC6D3D0C5, 30, len(script), 0, 0, 0, 0, 0xFFFF) + script,
        "drawing.wmf": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "pdf.png": b"%PDF-1.7\n" + bytes(99),
        "archive.mp4": b"PK\x03\x04" + bytes(99),
        "page.mp4": f'<!doctype html><video src="file://{secret}">'.encode(),
        "bomb.png": png(60000, 60000),
        "text-bomb.png": png(4, 4, before=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))) * 3),
        "loop.tiff": loop + bytes(99),
        "samples.mp4": samples(),
    }


def samples() -> bytes:
    """Return an MP4 that claims 200 million samples of one byte in a table of 16 bytes."""
    box = lambda kind, data: struct.pack(">I", 8 + len(data)) + kind + data  # noqa: E731
    stsz = box(b"stsz", struct.pack(">III", 0, 1, 200_000_000))
    stts = box(b"stts", struct.pack(">IIII", 0, 1, 200_000_000, 1))
    table = box(b"stbl", stsz + stts + box(b"stsc", struct.pack(">II", 0, 0)) + box(b"stco", struct.pack(">II", 0, 0)))
    return box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"trak", box(b"mdia", box(b"minf", table))))


def make_secret(folder: Path) -> Path:
    """Write a magenta video outside of the media root; nothing else here is magenta."""
    frames = noise_frames(20, 64, 96) // 16
    frames[:, 0] += 230
    frames[:, 2] += 230
    return write_clip(folder / "secret.mp4", frames)


def make_hostile(folder: Path, secret: Path) -> dict[str, Path]:
    """Write all of the files by name, and a picture of the same color next to `secret`."""
    paths = {}
    for name, data in contents(secret).items():
        paths[name] = folder / name
        paths[name].write_bytes(data)
    # Each name has a harmless video, and pictures exist that a series of these names would match.
    clip = encoded(folder / "harmless.mp4")
    picture = secret.with_name("magenta.png")
    Image.new("RGB", (64, 64), (255, 0, 255)).save(picture)
    for number in range(9):
        (folder / f"a{number:03}.png").symlink_to(picture)
    for name in STRANGE_NAMES:
        paths[name] = folder / name
        paths[name].write_bytes(clip)
    os.mkfifo(folder / "pipe.mp4")
    (folder / "zero.mp4").symlink_to("/dev/zero")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    return paths | {name: folder / name for name in ("pipe.mp4", "zero.mp4", "loop.mp4")}


def is_magenta(pixels: torch.Tensor) -> bool:
    """Return whether pixels [F, 3, H, W] have the color of the secret."""
    red, green, blue = pixels.float().mean((0, 2, 3))
    return bool(red > 180 and blue > 180 and green < 60)


def shown(shot: tuple[str, str]) -> torch.Tensor:
    """Return the pixels [1, 3, H, W] of a picture in the report."""
    picture = Image.open(io.BytesIO(base64.b64decode(shot[0].partition(",")[2])))
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
