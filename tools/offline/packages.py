"""The folder that tools/offline/wheels.py made, put to use for one run: nothing is installed, processes get paths.

Wheels are unzipped, not given to pip: that needs no pip and cannot touch the environment. What pip would do besides is
done here or not missed: tags are compared with this Python and its C library; scripts and console entry points are for
people, a run starts modules; a wheel whose .data folder holds more than scripts is refused. Plugins' entry points are
read from .dist-info, which lies on the path with the rest.
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
# What is measured is the machine's own build of these; a copy on the path would hide it.
PROTECTED = frozenset({"torch", "triton", "transformers", "numpy"})
# The libraries that torchcodec is linked with. PyAV's wheel has them, under other names.
FFMPEG = ("avcodec", "avdevice", "avfilter", "avformat", "avutil", "swresample", "swscale")
FFMPEG_WHEEL, FFMPEG_FOLDER = "av", "av.libs"
AGAIN = "run `python -m tools.offline.wheels DIR` again"


@dataclass(frozen=True)
class Packages:
    """What a run got.

    Fields:
        environment: variables for child processes, whole values; what was set before stays, behind ours. The loader
            reads LD_LIBRARY_PATH when a process starts, so setting it in the running one has no effect.
        taken: distribution -> version.
        skipped: distribution -> why the folder's is not used.
        left_out: what the folder was made without -> why.
        native: what became of the native library, a sentence.
    """

    environment: dict[str, str]
    taken: dict[str, str]
    skipped: dict[str, str]
    left_out: dict[str, str]
    native: str


def prepare(folder: Path, into: Path, *, checkout: Path = ROOT) -> Packages:
    """Unpack `folder` into `into`, empty or missing, and give `checkout` the native library if it has none.

    Raises:
        ValueError: the folder is damaged, unfinished, made for another Python, or carries what it must not; or `into`
            is not empty.
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
            # The machine's PyAV may carry another FFmpeg; torchcodec gets this one all the same.
            _unzip(wheel, into, beginning=FFMPEG_FOLDER + "/" if reason else "")
    environment = {"PYTHONPATH": _in_front_of("PYTHONPATH", into)}
    if (into / FFMPEG_FOLDER).is_dir():
        link_ffmpeg(into / FFMPEG_FOLDER)
        environment["LD_LIBRARY_PATH"] = _in_front_of("LD_LIBRARY_PATH", into / FFMPEG_FOLDER)
    left_out = {entry["name"]: entry["why"] for entry in contents["left_out"]}
    return Packages(environment, taken, skipped, left_out, _place_native(folder, contents["files"], checkout))


def _checked(folder: Path) -> dict:
    """The contents, after every file was compared with its sha256."""
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        complete, python, files = contents["complete"], contents["python"], contents["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONTENTS}: expected what tools.offline.wheels writes ({error!r}); {AGAIN}"
        ) from None
    if not complete:
        raise ValueError(f"{folder}: its making was interrupted; {AGAIN}")
    running = ".".join(map(str, sys.version_info[:2]))
    if python != running:
        raise ValueError(f"{folder} was made for Python {python}, this is {running}; {AGAIN} with --python {running}")
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
    """What the native library is built from."""
    return [checkout / "setup.py", *sorted((checkout / "csrc").iterdir())]


def sources_sha256(checkout: Path) -> str:
    """One hash for all: a library of other sources may give other numbers."""
    lines = "".join(f"{path.name} {sha256_of(path)}\n" for path in native_sources(checkout))
    return hashlib.sha256(lines.encode()).hexdigest()


def _why_not(wheel: Path) -> str:
    """Why a wheel is not used, or empty."""
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
    """Give FFmpeg's libraries in a folder from a wheel the names under which other libraries look for them.

    auditwheel puts a hash into a library's name and its SONAME, so that the ELF file no longer holds the SONAME that
    FFmpeg gave it; the name does: libavcodec-5e6b81c2.so.62.28.102 was libavcodec.so.62. The links lie beside the
    libraries because the loader searches the folder of the name it opened ($ORIGIN) for the libraries needed next.

    Raises:
        ValueError: a library is missing or there twice.
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
    """Copy the native library into the checkout, where git ignores it, unless there is one or it would not fit."""
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
