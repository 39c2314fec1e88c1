"""Fill a folder with the packages that a CUDA machine without a network lacks for the benchmarks.

    python -m tools.offline.wheels DIR [--python 3.12] [--limit-mb 60]

The command itself needs a network. The target machine is Linux on x86-64 (glibc) and has torch's CUDA 13 build and the
packages in PRESENT. DIR then has wheels, the native library of this checkout and contents.json (what, why, sha256, what
was left out), which packages.py uses. A repeated or resumed run keeps the files whose pin and sha256 still match.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from tools.offline.packages import CONTENTS, NATIVE, ROOT, native_sources, sha256_of, sources_sha256

MB = 10**6


@dataclass(frozen=True)
class Pin:
    """One distribution; with `sdist`, the index has no wheel, and the wheel built here must be pure Python."""

    name: str
    version: str
    group: str
    why: str
    sdist: bool = False


# The groups are in order of importance, and those in REQUIRED are always included.
GROUPS = ("native", "deepspeed", "omegaconf", "torchcodec", "liger-kernel", "cut-cross-entropy", "trl")
REQUIRED = GROUPS[:3]
# Versions are those of constraints-cpu.txt if it has the library and no comment says otherwise.
PINS = (
    Pin("deepspeed", "0.19.8", "deepspeed", "the trainer", sdist=True),
    Pin("hjson", "3.1.0", "deepspeed", "deepspeed requires it"),
    Pin("pydantic", "2.14.3", "deepspeed", "deepspeed requires it"),
    Pin("pydantic-core", "2.50.4", "deepspeed", "pydantic requires exactly this version"),
    Pin("annotated-types", "0.8.0", "deepspeed", "pydantic requires it"),
    Pin("typing-inspection", "0.4.5", "deepspeed", "pydantic requires it"),
    Pin("typing-extensions", "4.16.0", "deepspeed", "pydantic requires 4.16, the machine may have an older one"),
    Pin("omegaconf", "2.4.0", "omegaconf", "the settings; unlike 2.3 it needs no antlr4-python3-runtime"),
    Pin("torchcodec", "0.17.0", "torchcodec", "decodes video; the first whose hardware decoder cache is safe"),
    # Version 19 has FFmpeg 9, which is too new for the torchcodec of CPU runs. With 18 both decode with FFmpeg 8.
    Pin("av", "18.1.0", "torchcodec", "carries FFmpeg's libraries for torchcodec; a peer of the media path"),
    Pin("liger-kernel", "0.8.5", "liger-kernel", "peer of the fused heads"),
    Pin("cut-cross-entropy", "25.1.1", "cut-cross-entropy", "peer of the fused heads"),
    Pin("trl", "1.16.0", "trl", "peer of the fused heads"),
    Pin("datasets", "5.2.0", "trl", "trl requires it"),
    Pin("dill", "0.4.1", "trl", "datasets requires it"),
    Pin("multiprocess", "0.70.19", "trl", "datasets requires it"),
)
# This list is as of November 2026.
LEFT_OUT = {
    "quack-kernels": "needs nvidia-cutlass-dsl, whose libraries take 92 MB for CUDA 13 and as much for CUDA 12",
    "flash-attn-4": "needs quack-kernels and nvidia-cutlass-dsl (see quack-kernels)",
    "verl": "its import needs Ray and tensordict, and it wants transformers < 5.11",
    "decord": "13.6 MB, more than the rest leaves free; PyAV is there to compare with",
}
# The wheels require these packages, and the machine is assumed to have them.
PRESENT = frozenset(
    {"accelerate", "einops", "filelock", "fsspec", "huggingface-hub", "jinja2", "msgpack", "ninja", "numpy"}
    | {"packaging", "pandas", "psutil", "py-cpuinfo", "pyarrow", "pyyaml", "torch", "tqdm", "transformers", "triton"}
    | {"xxhash"}
)
# pip compares platform tags literally, and a machine with glibc 2.39 or later accepts all of these.
PLATFORMS = (*(f"manylinux_2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 24, 17)), "manylinux2014", "manylinux1")
PART = ".part"
NO_NETWORK = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "Failed to establish", "ProxyError")


class CannotPrepare(RuntimeError):
    """The folder cannot be made; the message gives the reason and the next action."""


def collect(folder: Path, python: str, limit_bytes: int) -> dict:
    """Make or complete the folder, and return its contents as written to contents.json.

    Raises:
        CannotPrepare: no network, a package that is not available, foreign files in the folder, or a limit that is too
            low.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise CannotPrepare("the native library is built here: expected Linux on x86-64; run this on such a machine")
    part = folder / PART
    part.mkdir(parents=True, exist_ok=True)
    entries = _kept(folder, python)

    def add(made: Path, **facts: object) -> None:
        facts |= {"file": made.name, "bytes": made.stat().st_size, "sha256": sha256_of(made)}
        entries[facts["name"]] = facts
        # The file is listed before it is written, because an unlisted file would be treated as foreign.
        _write(folder, python, entries.values())
        os.replace(made, folder / made.name)

    # The native library comes first, because it needs no network and fails early without a compiler.
    sources = sources_sha256(ROOT)
    if entries.get("native", {}).get("sources") != sources:
        why = "the ops of csrc/ for CPU"
        add(_native_library(part), name="native", version=sources[:12], group="native", why=why, sources=sources)
    for pin in PINS:
        if pin.name not in entries:
            print(f"fetching {pin.name} {pin.version}", flush=True)
            add(_fetch(pin, part, python), name=pin.name, version=pin.version, group=pin.group, why=pin.why)
    kept, left = choose([entries[name] for name in ("native", *(pin.name for pin in PINS))], limit_bytes)
    _check_requirements([folder / entry["file"] for entry in kept if entry["name"] != "native"], python)
    for entry in left:
        (folder / entry["file"]).unlink()
    left_out = [{key: entry[key] for key in ("name", "version", "bytes", "why")} for entry in left]
    left_out += [{"name": name, "why": why} for name, why in LEFT_OUT.items()]
    contents = _write(folder, python, kept, complete=True, limit_bytes=limit_bytes, left_out=left_out)
    shutil.rmtree(part)
    return contents


def choose(entries: list[dict], limit_bytes: int) -> tuple[list[dict], list[dict]]:
    """Choose whole groups by importance, and return the kept entries and the excluded entries with the reason in `why`.

    Raises:
        CannotPrepare: the required groups exceed the limit.
    """
    kept: list[dict] = []
    left: list[dict] = []
    for group in GROUPS:
        members = [entry for entry in entries if entry["group"] == group]
        size, before = (sum(entry["bytes"] for entry in some) for some in (members, kept))
        if before + size <= limit_bytes:
            kept += members
            continue
        free = f"{(limit_bytes - before) / MB:.1f} of {limit_bytes / MB:g} MB were left"
        why = f"the group {group} takes {size / MB:.1f} MB, {free}"
        if group in REQUIRED:
            raise CannotPrepare(f"{why}, and it is never left out; raise --limit-mb")
        left += [entry | {"why": why} for entry in members]
    return kept, left


def _kept(folder: Path, python: str) -> dict[str, dict]:
    """Return entries of an earlier run with valid files, and remove its other files; foreign files are an error."""
    files, same_python = [], True
    try:
        if (folder / CONTENTS).exists():
            old = json.loads((folder / CONTENTS).read_text())
            files, same_python = old["files"], old["python"] == python
    except (ValueError, KeyError, TypeError) as error:
        raise CannotPrepare(f"{folder / CONTENTS} is damaged ({error!r}); empty the folder or name another") from None
    strange = sorted(set(os.listdir(folder)) - {entry["file"] for entry in files} - {CONTENTS, PART})
    if strange:
        raise CannotPrepare(
            f"{folder} has files that this command did not write: {', '.join(strange)}; name another folder"
        )
    pins = {pin.name: pin for pin in PINS}
    entries: dict[str, dict] = {}
    for entry in files:
        pin, path = pins.get(entry["name"]), folder / Path(entry["file"]).name
        current = pin.version == entry["version"] and same_python if pin else entry["name"] == "native"
        if current and path.is_file() and sha256_of(path) == entry["sha256"]:
            entries[entry["name"]] = entry | ({"group": pin.group, "why": pin.why} if pin else {})
        else:
            path.unlink(missing_ok=True)
    _write(folder, python, entries.values())
    return entries


def _write(folder: Path, python: str, entries: Iterable[dict], *, complete: bool = False, **others: object) -> dict:
    files = list(entries)
    contents = {"complete": complete, "python": python, "total_bytes": sum(entry["bytes"] for entry in files)}
    contents |= {**others, "files": files}
    (folder / PART / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")
    os.replace(folder / PART / CONTENTS, folder / CONTENTS)
    return contents


def _native_library(part: Path) -> Path:
    """Return a copy of the library in the checkout if that is newer than its sources, otherwise build the library."""
    built, copy = ROOT / NATIVE, part / NATIVE.name
    if built.is_file() and built.stat().st_mtime >= max(path.stat().st_mtime for path in native_sources(ROOT)):
        shutil.copy(built, copy)
        return copy
    print("building the native library", flush=True)
    options = ("--no-deps", "--no-build-isolation", "-w", str(part))
    _pip("the native library", "wheel", *options, str(ROOT), RMSD_FAST_NATIVE="1")
    (wheel,) = part.glob("rmsd_fast-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        copy.write_bytes(archive.read(f"rmsd_kernels/{NATIVE.name}"))
    return copy


def _fetch(pin: Pin, part: Path, python: str) -> Path:
    """Download or build one wheel into `part`, which is emptied first."""
    shutil.rmtree(part)
    part.mkdir()
    requirement = f"{pin.name}=={pin.version}"
    if pin.sdist:
        # DeepSpeed's own ops are not needed. Without them, the wheel is pure Python and works on every machine.
        options = ["--no-build-isolation", "-w", str(part)]
        _pip(requirement, "wheel", "--no-deps", *options, requirement, DS_BUILD_OPS="0")
    else:
        options = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", "-d", str(part)]
        options += [f"--abi={abi}" for abi in ("cp" + python.replace(".", ""), "abi3", "none")]
        options += [f"--platform={name}_x86_64" for name in PLATFORMS]
        _pip(requirement, "download", "--no-deps", *options, requirement)
    (made,) = part.glob("*.whl")
    # A private index may offer another build of the same version, for example torchcodec 0.17.0+cpu.
    if str(parse_wheel_filename(made.name)[1]) != pin.version or (pin.sdist and not made.match("*-py3-none-any.whl")):
        raise CannotPrepare(f"expected the plain wheel of {requirement}, pip gave {made.name}; check its indexes")
    return made


def _pip(what: str, command: str, *arguments: str, **variables: str) -> None:
    """Run pip for `what`, and raise CannotPrepare with the likely reason if it fails."""
    full = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, "-q", *arguments]
    done = subprocess.run(full, capture_output=True, text=True, env=os.environ | variables, check=False)
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if "No module named pip" in output:
        raise CannotPrepare(f"pip is needed and not in {sys.executable}: run {sys.executable} -m ensurepip")
    if any(sign in output for sign in NO_NETWORK):
        raise CannotPrepare(f"{what}: pip cannot reach its index; repeat this where there is a network (it resumes)")
    what_next = "pin another version in PINS, or fix the problem that pip reports"
    raise CannotPrepare(f"{what} is not available for Linux on x86-64; {what_next}:\n{output.strip()[-1500:]}")


def _check_requirements(wheels: list[Path], python: str) -> None:
    """Raise CannotPrepare if a wheel requires a package that neither another wheel nor PRESENT provides."""
    versions = {name: version for name, version, *_ in (parse_wheel_filename(wheel.name) for wheel in wheels)}
    target = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    missing = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            texts = BytesParser().parsebytes(archive.read(name)).get_all("Requires-Dist") or ()
        for requirement in map(Requirement, texts):
            name = canonicalize_name(requirement.name)
            met = requirement.specifier.contains(versions[name]) if name in versions else name in PRESENT
            if not met and (requirement.marker is None or requirement.marker.evaluate(target)):
                missing.append(f"{wheel.name} requires {requirement}")
    if missing:
        raise CannotPrepare("\n".join([*missing, "neither PINS nor PRESENT has it: add or change a pin"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.offline.wheels", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    pythons = [f"3.{minor}" for minor in range(11, 15)]
    parser.add_argument(
        "--python", choices=pythons, default="3.12", help="Python version of the CUDA machine (default: %(default)s)"
    )
    parser.add_argument(
        "--limit-mb", type=float, default=60, help="limit for the total size, 10^6 bytes (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    try:
        contents = collect(given.folder.resolve(), given.python, round(given.limit_mb * MB))
    except (CannotPrepare, OSError) as error:
        print(f"tools.offline.wheels: {error}", file=sys.stderr)
        return 1
    for entry in contents["files"]:
        print(f"{entry['bytes'] / MB:8.2f} MB  {entry['name']} {entry['version']}: {entry['why']}")
    print(f"{contents['total_bytes'] / MB:8.2f} MB of {given.limit_mb:g} in {given.folder}")
    for entry in contents["left_out"]:
        print(f"left out: {entry['name']}: {entry['why']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
