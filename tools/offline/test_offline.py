"""Test the folder of wheels for a CUDA machine without a network: its creation, checks and use, without downloads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools.offline import packages as cuda_packages
from tools.offline import wheels as cuda_wheels
from tools.offline.packages import FFMPEG, NATIVE, link_ffmpeg, prepare, sha256_of, sources_sha256
from tools.offline.wheels import GROUPS, LEFT_OUT, MB, PINS, CannotPrepare, Pin, choose, collect

PYTHON = ".".join(map(str, sys.version_info[:2]))
ROOT = Path(__file__).resolve().parents[2]


def make_wheel(
    folder: Path, name: str, version: str = "1.0", *, files=None, requires: tuple[str, ...] = (), tags="py3-none-any"
) -> Path:
    """Write a wheel with one module of the distribution's name, or with `files` (path -> content)."""
    module = re.sub(r"[-_.]+", "_", name)
    info = f"{module}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    path = folder / f"{module}-{version}-{tags}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        for member, content in (files or {f"{module}.py": f"version = {version!r}\n"}).items():
            archive.writestr(member, content)
    return path


def list_contents(folder: Path, **changes: object) -> None:
    """Write contents.json for the files in the folder."""
    files = []
    for path in sorted(folder.iterdir()):
        name, version = path.name.split("-")[:2] if path.suffix == ".whl" else ("native", "0")
        files.append({"name": name, "version": version, "file": path.name, "sha256": sha256_of(path), "sources": "0"})
    left_out = [{"name": "quack-kernels", "why": "too large"}]
    contents = {"complete": True, "python": PYTHON, "files": files, "left_out": left_out} | changes
    (folder / "contents.json").write_text(json.dumps(contents))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "wheels"
    path.mkdir()
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout that has a place for the native library but no library."""
    path = tmp_path / "checkout"
    (path / "csrc").mkdir(parents=True)
    (path / "csrc" / "register.cpp").write_text("int ops;\n")
    (path / "setup.py").write_text("build()\n")
    (path / NATIVE).parent.mkdir(parents=True)
    return path


def run_child(code: str, environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_children_import_unpacked_packages_first(folder, checkout, tmp_path, monkeypatch) -> None:
    older = tmp_path / "older"
    older.mkdir()
    (older / "strange_peer.py").write_text("version = '0.1'\n")
    (older / "another.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(older))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    make_wheel(folder, "strange-peer", "1.5")
    list_contents(folder)
    packages = prepare(folder, tmp_path / "into", checkout=checkout)
    assert packages.taken == {"strange_peer": "1.5"} and not packages.skipped
    assert packages.left_out == {"quack-kernels": "too large"}
    # Without FFmpeg in the folder, the variable does not change.
    assert packages.environment == {"PYTHONPATH": f"{tmp_path / 'into'}:{older}"}
    code = "import another, strange_peer; from importlib import metadata; print(strange_peer.version, end=' ');"
    assert run_child(code + "print(metadata.version('strange-peer'))", packages.environment) == "1.5 1.5"


def test_installed_packages_of_the_same_or_a_newer_version_are_kept(folder, checkout, tmp_path) -> None:
    installed = pytest.__version__
    make_wheel(folder, "pytest", installed)
    make_wheel(folder, "setuptools", "9999.0")
    make_wheel(folder, "strange_peer", tags="cp27-cp27m-win32")
    list_contents(folder)
    packages = prepare(folder, tmp_path / "into", checkout=checkout)
    assert packages.taken == {"setuptools": "9999.0"}
    assert packages.skipped["pytest"] == f"{installed} is installed here"
    assert packages.skipped["strange_peer"].endswith("does not fit this Python, processor or C library")
    assert not (tmp_path / "into" / "pytest.py").exists()


@pytest.mark.parametrize("name", ["torch", "triton", "transformers", "NumPy"])
def test_benchmarked_libraries_are_refused(folder, checkout, tmp_path, name: str) -> None:
    make_wheel(folder, name, "9999.0")
    list_contents(folder)
    with pytest.raises(ValueError, match="must be the machine's own"):
        prepare(folder, tmp_path / "into", checkout=checkout)


def test_a_damaged_folder_is_refused_before_anything_is_unpacked(folder, checkout, tmp_path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "into", checkout=checkout)
        assert not (tmp_path / "into").exists()

    refused("expected what tools.offline.wheels writes")
    wheel = make_wheel(folder, "strange-peer")
    list_contents(folder, complete=False)
    refused("was interrupted")
    (folder / "contents.json").unlink()
    list_contents(folder, python="3.4")
    refused(rf"made for Python 3.4, but this is {PYTHON}; .*--python {PYTHON}")
    (folder / "contents.json").unlink()
    list_contents(folder)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    refused("expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}")
    wheel.unlink()
    refused("got no such file")
    (folder / "contents.json").write_text("[1")
    refused("expected what tools.offline.wheels writes")


def test_unpacking_needs_an_empty_folder(folder, checkout, tmp_path) -> None:
    list_contents(folder)
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="expected an empty folder"):
        prepare(folder, tmp_path, checkout=checkout)


def test_scripts_are_skipped_and_misplaced_files_are_refused(folder, checkout, tmp_path) -> None:
    make_wheel(folder, "a", files={"a.py": "", "a-1.0.data/scripts/a": "#!python\n"})
    list_contents(folder)
    prepare(folder, tmp_path / "into", checkout=checkout)
    assert sorted(os.listdir(tmp_path / "into")) == ["a-1.0.dist-info", "a.py"]
    (folder / "contents.json").unlink()
    make_wheel(folder, "b", files={"b-1.0.data/purelib/b.py": ""})
    list_contents(folder)
    with pytest.raises(ValueError, match="unzipping would lose b-1.0.data/purelib/b.py"):
        prepare(folder, tmp_path / "again", checkout=checkout)


# The names are those in PyAV's wheel, with the major version of each.
AV_LIBS = {f"lib{name}-5e6b81c2.so.{60 + index}.28.102": name for index, name in enumerate(FFMPEG)}


def test_links_have_the_original_library_names(tmp_path) -> None:
    for name in (*AV_LIBS, "libx264-d6533a8d.so.165", "libavcodec_extra-0.so.1.2"):
        (tmp_path / name).write_text("")
    links = link_ffmpeg(tmp_path)
    assert [link.name for link in links] == [f"lib{name}.so.{60 + index}" for index, name in enumerate(FFMPEG)]
    assert [os.readlink(link) for link in links] == list(AV_LIBS)
    (tmp_path / "libavcodec-00.so.59.1.1").write_text("")
    for link in links:
        link.unlink()
    with pytest.raises(ValueError, match="expected one library libavcodec-HASH"):
        link_ffmpeg(tmp_path)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to make shared libraries")
def test_children_load_ffmpeg_from_the_wheel_without_its_python_part(folder, checkout, tmp_path, monkeypatch) -> None:
    """As auditwheel leaves them, one of two libraries needs the other by its hashed name; the rest are stand-ins."""
    build = tmp_path / "build"
    build.mkdir()
    (build / "util.c").write_text("int answer(void) { return 42; }\n")
    (build / "codec.c").write_text("int answer(void); int twice(void) { return 2 * answer(); }\n")
    of = {name: file for file, name in AV_LIBS.items()}
    util, codec = of["avutil"], of["avcodec"]
    for source, name, more in (("util.c", util, []), ("codec.c", codec, [util, "-Wl,-rpath,$ORIGIN"])):
        command = ["gcc", "-shared", "-fPIC", source, *more, f"-Wl,-soname,{name}", "-o", name]
        subprocess.run(command, cwd=build, check=True)
    libraries = {f"av.libs/{name}": b"" for name in AV_LIBS}
    libraries |= {f"av.libs/{name}": (build / name).read_bytes() for name in (util, codec)}
    make_wheel(folder, "av", "18.1.0", files=libraries | {"av/__init__.py": ""})
    list_contents(folder)
    # The machine has a newer PyAV.
    own = tmp_path / "own" / "av-99.0.dist-info"
    own.mkdir(parents=True)
    (own / "METADATA").write_text("Metadata-Version: 2.1\nName: av\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(own.parent)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    into = tmp_path / "into"
    packages = prepare(folder, into, checkout=checkout)
    assert packages.skipped == {"av": "99.0 is installed here"} and os.listdir(into) == ["av.libs"]
    assert packages.environment["LD_LIBRARY_PATH"] == str(into / "av.libs")
    code = "import ctypes; print(ctypes.CDLL('libavcodec.so.60').twice(), ctypes.CDLL('libavutil.so.64').answer());"
    code += "print(sum('avutil' in line and 'r-xp' in line for line in open('/proc/self/maps')))"
    # avutil is found once through $ORIGIN and once through its link, but is loaded once.
    assert run_child(code, packages.environment).split() == ["84", "42", "1"]


def test_the_native_library_is_copied_if_it_is_missing_and_fits(folder, checkout, tmp_path) -> None:
    library = checkout / NATIVE
    list_contents(folder)
    assert "has no native library" in prepare(folder, tmp_path / "1", checkout=checkout).native
    (folder / "contents.json").unlink()
    (folder / NATIVE.name).write_bytes(b"ELF")
    list_contents(folder)
    assert "built from other sources" in prepare(folder, tmp_path / "2", checkout=checkout).native
    assert not library.exists()
    contents = json.loads((folder / "contents.json").read_text())
    contents["files"][0]["sources"] = sources_sha256(checkout)
    (folder / "contents.json").write_text(json.dumps(contents))
    assert "copied to" in prepare(folder, tmp_path / "3", checkout=checkout).native
    assert library.read_bytes() == b"ELF" and os.listdir(library.parent) == [NATIVE.name]
    library.write_bytes(b"own")
    assert "has its own" in prepare(folder, tmp_path / "4", checkout=checkout).native
    assert library.read_bytes() == b"own"


def entries_of(**sizes_mb: float) -> list[dict]:
    return [
        {"name": group, "group": group, "why": "", "bytes": round(sizes_mb[group.replace("-", "_")] * MB)}
        for group in reversed(GROUPS)
    ]


@pytest.mark.parametrize(
    ("limit_mb", "left_names"),
    [
        (58.5, []),
        (58.4, ["trl"]),
        (56.4, ["cut-cross-entropy", "trl"]),
        # A less important package is kept if it fits into the space that a large package leaves.
        (52.0, ["torchcodec"]),
        (7.0, ["torchcodec", "liger-kernel", "trl"]),
        (5.0, ["torchcodec", "liger-kernel", "cut-cross-entropy", "trl"]),
    ],
)
def test_a_limit_excludes_the_least_important_packages_first(limit_mb: float, left_names: list[str]) -> None:
    entries = entries_of(
        native=1, deepspeed=3, omegaconf=1, torchcodec=48, liger_kernel=3, cut_cross_entropy=0.5, trl=2
    )
    limit_bytes = round(limit_mb * MB)
    kept, left = choose(entries, limit_bytes)
    assert [entry["name"] for entry in left] == left_names
    assert {entry["name"] for entry in kept} == set(GROUPS) - set(left_names)
    assert sum(entry["bytes"] for entry in kept) <= limit_bytes
    assert all(f"of {limit_mb:g} MB were left" in entry["why"] for entry in left)


def test_a_limit_never_excludes_required_packages() -> None:
    entries = entries_of(native=1, deepspeed=3, omegaconf=1, torchcodec=1, liger_kernel=1, cut_cross_entropy=1, trl=1)
    with pytest.raises(
        CannotPrepare, match="the group omegaconf takes 1.0 MB, 0.5 of 4.5 MB were left, and it is never left out"
    ):
        choose(entries, 4_500_000)


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Replace pip with a function that writes tiny wheels, and return its requests in order."""
    asked: list[str] = []

    def pip(what: str, command: str, *arguments: str, **variables: str) -> None:
        name, version = what.split("==")
        asked.append(name)
        make_wheel(Path(arguments[arguments.index("-d" if command == "download" else "-w") + 1]), name, version)

    def native_library(part: Path) -> Path:
        (part / NATIVE.name).write_bytes(b"ELF")
        return part / NATIVE.name

    monkeypatch.setattr(cuda_wheels, "_pip", pip)
    monkeypatch.setattr(cuda_wheels, "_native_library", native_library)
    return asked


def test_the_folder_is_complete_and_a_repeated_run_fetches_nothing(folder, fetched, checkout, tmp_path) -> None:
    contents = collect(folder, PYTHON, MB)
    assert fetched == [pin.name for pin in PINS]
    assert sorted(os.listdir(folder)) == sorted([*(entry["file"] for entry in contents["files"]), "contents.json"])
    assert contents["total_bytes"] == sum(entry["bytes"] for entry in contents["files"]) < MB
    assert {entry["name"]: entry["why"] for entry in contents["left_out"]} == LEFT_OUT
    assert json.loads((folder / "contents.json").read_text()) == contents
    fetched.clear()
    assert collect(folder, PYTHON, MB) == contents and not fetched
    packages = prepare(folder, tmp_path / "into", checkout=checkout)
    assert set(packages.taken) | set(packages.skipped) == {pin.name for pin in PINS}
    assert packages.left_out == LEFT_OUT


def test_an_interrupted_run_resumes_and_fetches_changed_or_damaged_files_again(folder, fetched, monkeypatch) -> None:
    working = cuda_wheels._pip

    def interrupted(what: str, *arguments: str, **variables: str) -> None:
        if what.startswith("omegaconf"):
            raise KeyboardInterrupt
        working(what, *arguments, **variables)

    monkeypatch.setattr(cuda_wheels, "_pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(folder, PYTHON, MB)
    there = list(fetched)
    assert "deepspeed" in there and json.loads((folder / "contents.json").read_text())["complete"] is False
    monkeypatch.setattr(cuda_wheels, "_pip", working)
    # The run stopped between the list and the file.
    (folder / "hjson-3.1.0-py3-none-any.whl").unlink()
    collect(folder, PYTHON, MB)
    assert fetched[len(there) :] == ["hjson", *(pin.name for pin in PINS if pin.name not in there)]

    fetched.clear()
    (damaged,) = folder.glob("trl-*.whl")
    damaged.write_bytes(b"")
    changed = [Pin("av", "18.2.0", pin.group, pin.why) if pin.name == "av" else pin for pin in PINS]
    monkeypatch.setattr(cuda_wheels, "PINS", [pin for pin in changed if pin.name != "dill"])
    collect(folder, PYTHON, MB)
    assert fetched == ["av", "trl"]
    assert [path.name for path in folder.glob("av-*")] == ["av-18.2.0-py3-none-any.whl"]
    assert not list(folder.glob("dill-*"))
    fetched.clear()
    collect(folder, "3.14", MB)
    assert len(fetched) == len(PINS) - 1


def test_packages_beyond_the_limit_are_not_in_the_folder(folder, fetched) -> None:
    sizes = {entry["name"]: entry["bytes"] for entry in collect(folder, PYTHON, MB)["files"]}
    last = {pin.name for pin in PINS if pin.group == "trl"}
    contents = collect(folder, PYTHON, sum(sizes.values()) - 1)
    left = {entry["name"]: entry for entry in contents["left_out"] if entry["name"] not in LEFT_OUT}
    assert set(left) == last and all(entry["bytes"] == sizes[name] for name, entry in left.items())
    assert not last & {path.name.split("-")[0] for path in folder.iterdir()}


def test_foreign_files_are_neither_removed_nor_listed(folder, fetched, capsys) -> None:
    (folder / "torch-2.11.0-py3-none-any.whl").write_bytes(b"mine")
    with pytest.raises(CannotPrepare, match=r"did not write: torch-2.11.0-py3-none-any.whl; name another folder"):
        collect(folder, PYTHON, MB)
    assert (folder / "torch-2.11.0-py3-none-any.whl").read_bytes() == b"mine" and not fetched
    assert cuda_wheels.main([str(folder)]) == 1
    assert capsys.readouterr().err.startswith("tools.offline.wheels: ")
    (folder / "contents.json").write_text("{}")
    with pytest.raises(CannotPrepare, match="is damaged"):
        collect(folder, PYTHON, MB)


def test_an_unmet_requirement_is_an_error(tmp_path) -> None:
    met = ('torch>=2; extra == "gpu"', 'strange; python_version < "3.9"', "TorchCodec>=0.17", "numpy", "Py_CpuInfo")
    wheels = [make_wheel(tmp_path, "a", requires=met), make_wheel(tmp_path, "torchcodec", "0.17.0")]
    cuda_wheels._check_requirements(wheels, "3.12")
    wheels.append(make_wheel(tmp_path, "b", requires=("torchcodec>0.17", "strange")))
    with pytest.raises(CannotPrepare) as caught:
        cuda_wheels._check_requirements(wheels, "3.12")
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["b-1.0-py3-none-any.whl requires torchcodec>0.17", "b-1.0-py3-none-any.whl requires strange"]


@pytest.mark.parametrize("version", ["0.17.0+cpu", "0.17.1"])
def test_another_build_of_a_version_is_refused(tmp_path, monkeypatch, version: str) -> None:
    part = tmp_path / "part"
    part.mkdir()
    monkeypatch.setattr(cuda_wheels, "_pip", lambda *arguments, **variables: make_wheel(part, "torchcodec", version))
    with pytest.raises(CannotPrepare, match="expected the plain wheel of torchcodec==0.17.0, pip gave torchcodec-0.17"):
        cuda_wheels._fetch(Pin("torchcodec", "0.17.0", "torchcodec", ""), part, "3.12")


def test_errors_for_pip_failures_state_the_cause(tmp_path, monkeypatch) -> None:
    options = ("--no-deps", "-d", str(tmp_path), "--retries", "1", "strange-peer==1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(CannotPrepare, match=r"(?s)strange-peer==1 is not available .* in PINS, or .*ERROR: "):
        cuda_wheels._pip("strange-peer==1", "download", "--no-index", *options)
    # No server listens on port 9.
    with pytest.raises(CannotPrepare, match="strange-peer==1: pip cannot reach its index"):
        cuda_wheels._pip("strange-peer==1", "download", "--index-url", "http://127.0.0.1:9/simple", *options)


def test_pins_equal_the_tested_versions() -> None:
    lines = (ROOT / "constraints-cpu.txt").read_text().splitlines()
    tested = dict(re.match(r"([\w.-]+)==(\S+)", line).groups() for line in lines if line[0] != "#")
    tested = {name.replace("_", "-").lower(): version for name, version in tested.items()}
    differing = {pin.name for pin in PINS if tested.get(pin.name, pin.version) != pin.version}
    assert differing == {"torchcodec"}
    assert {pin.group for pin in PINS} == set(GROUPS) - {"native"}
    assert not {pin.name for pin in PINS} & (cuda_packages.PROTECTED | set(LEFT_OUT))
