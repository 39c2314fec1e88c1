"""Use the folder that tools/offline/wheels.py made for one run: nothing is installed, and processes get paths.

Wheels are unzipped and not installed: unzipping needs no pip and cannot change the environment. pip's other tasks are
done here or not needed. Tags are compared with this Python and its C library. Scripts and console entry points are not
needed, because a run starts modules. A wheel whose .data folder has more than scripts is refused. Entry points of
plugins are read from .dist-info, which is on the path with the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = "contents.json"
NATIVE = Path("kernels", "rmsd_kernels", "_native.abi3.so")
# Benchmarks measure the machine's own build of these libraries, and a copy on the path would hide it.
PROTECTED = frozenset({"torch", "triton", "transformers", "numpy"})
# torchcodec is linked with these libraries. PyAV's wheel has them under other names.
FFMPEG = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")
FFMPEG_WHEEL, FFMPEG_FOLDER = "av", "av.libs"
AGAIN = "run `python -m tools.offline.wheels DIR` again"


@dataclass(frozen=True)
class Packages:
    """The packages that a run received.

    Fields:
        environment: variables for child processes, as complete values that keep the previous entries after ours. The
            loader reads LD_LIBRARY_PATH when a process starts, so setting it in a running process has no effect.
        taken: distribution -> version.
        skipped: distribution -> reason why the copy in the folder is not used.
        left_out: packages that the folder was made without -> reason.
        native: a sentence about the native library.
    """

    environment: dict[str, str]
    taken: dict[str, str]
    skipped: dict[str, str]
    left_out: dict[str, str]
    native: str


def prepare(folder: Path, into: Path, *, checkout: Path = ROOT) -> Packages:
    """Unpack `folder` into `into`, which is empty or missing, and copy the native library to `checkout` if it has none.

    Raises:
        ValueError: the folder is damaged, incomplete, made for another Python, or has forbidden content; or `into` is
            not empty.
    """
    folder, into = Path(folder).resolve(), Path(into).resolve()
    contents = _checked(folder)
    into.mkdir(parents=True, exist_ok=True)
    if any(into.iterdir()):
        raise ValueError(f"{into}: expected an empty folder to unpack into; name another or empty it")
    taken: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for entry in contents["files"]:
        name, wheel = entry["name"], folder / entry["file"]
        if wheel.suffix != ".whl":
            continue
        reason = _why_not(wheel)
        if reason:
            skipped[name] = reason
        else:
            taken[name] = entry["version"]
        if not reason or name == FFMPEG_WHEEL:
            # The machine's PyAV may have another FFmpeg, but torchcodec always gets this FFmpeg.
            _unzip(wheel, into, beginning=FFMPEG_FOLDER + "/" if reason else "")
    environment = {"PYTHONPATH": _in_front_of("PYTHONPATH", into)}
    if (into / FFMPEG_FOLDER).is_dir():
        link_ffmpeg(into / FFMPEG_FOLDER)
        environment["LD_LIBRARY_PATH"] = _in_front_of("LD_LIBRARY_PATH", into / FFMPEG_FOLDER)
    left_out = {entry["name"]: entry["why"] for entry in contents["left_out"]}
    return Packages(environment, taken, skipped, left_out, _place_native(folder, contents["files"], checkout))


def _checked(folder: Path) -> dict:
    """Return the contents, after comparing every file with its sha256."""
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        complete, python, files = contents["complete"], contents["python"], contents["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONTENTS}: expected what tools.offline.wheels writes ({error!r}); {AGAIN}"
        ) from None
    if not complete:
        raise ValueError(f"{folder}: its creation was interrupted; {AGAIN}")
    running = ".".join(map(str, sys.version_info[:2]))
    if python != running:
        raise ValueError(
            f"{folder} was made for Python {python}, but this is {running}; {AGAIN} with --python {running}"
        )
    for entry in files:
        path = folder / entry["file"]
        found = sha256_of(path) if path.is_file() else "no such file"
        if found != entry["sha256"]:
            raise ValueError(f"{path}: expected sha256 {entry['sha256']}, got {found}; {AGAIN}")
        if path.suffix == ".whl" and parse_wheel_filename(path.name)[0] in PROTECTED:
            raise ValueError(f"{path}: this library must be the machine's own; take it out of PINS and {AGAIN}")
    return contents


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def native_sources(checkout: Path) -> list[Path]:
    """Return the sources of the native library."""
    return [checkout / "setup.py", *sorted((checkout / "csrc").iterdir())]


def sources_sha256(checkout: Path) -> str:
    """Return a single hash of all sources, because a library of other sources may give other numbers."""
    lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in native_sources(checkout))
    return hashlib.sha256(lines.encode()).hexdigest()


def _why_not(wheel: Path) -> str:
    """Return the reason why a wheel is not used, or an empty text."""
    name, version, _, tags = parse_wheel_filename(wheel.name)
    own = next((found.version for found in metadata.distributions(name=name)), None)
    if own is not None and Version(own) >= version:
        return f"{own} is installed here"
    return "" if tags & set(sys_tags()) else f"{wheel.name} does not fit this Python, processor or C library"


def _unzip(wheel: Path, into: Path, beginning: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(beginning)]
        data = [name for name in members if name.split("/")[0].endswith(".data") and not name.endswith("/")]
        lost = [name for name in data if name.split("/")[1] != "scripts"]
        if lost:
            raise ValueError(f"{wheel}: unzipping would lose {lost[0]}; pin a version without it in PINS and {AGAIN}")
        archive.extractall(into, [name for name in members if name not in data])


def link_ffmpeg(folder: Path) -> list[Path]:
    """Link FFmpeg's libraries from a wheel under the names that other libraries look for.

    auditwheel puts a hash into the name and the SONAME of a library, so the ELF file no longer has the SONAME that
    FFmpeg gave it. The name still does: libavcodec-5e6b81c2.so.62.28.102 was libavcodec.so.62. The links are next to
    the libraries because the loader searches the folder of the name it opened ($ORIGIN) for further libraries.

    Raises:
        ValueError: a library is missing or occurs twice.
    """
    links = []
    for name in FFMPEG:
        pattern = re.compile(rf"lib{name}(?:-[0-9a-f]+)?\.so\.(\d+)\.[\d.]+")
        found = [match for match in map(pattern.fullmatch, os.listdir(folder)) if match]
        if len(found) != 1:
            names = [match[0] for match in found]
            raise ValueError(f"{folder}: expected one library lib{name}-HASH.so.N.N, got {names}; pin another PyAV")
        links.append(folder / f"lib{name}.so.{found[0][1]}")
        links[-1].symlink_to(found[0][0])
    return links


def _in_front_of(variable: str, folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), os.environ.get(variable))))


def _place_native(folder: Path, files: list[dict], checkout: Path) -> str:
    """Copy the native library into the checkout, where git ignores it, if the checkout has none and the copy fits."""
    target = checkout / NATIVE
    if target.is_file():
        return "the checkout has its own native library"
    entry = next((entry for entry in files if entry["file"] == NATIVE.name), None)
    if entry is None:
        return "the folder has no native library"
    if entry["sources"] != sources_sha256(checkout):
        return f"the folder's native library was built from other sources than this checkout's; {AGAIN}"
    part = target.with_name(f".{os.getpid()}{NATIVE.name}")
    try:
        shutil.copy(folder / NATIVE.name, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return f"the folder's native library was copied to {target}"
