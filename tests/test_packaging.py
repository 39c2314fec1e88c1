"""Test wheels, which have both packages, the recipes and the native library if it was built, and `make test-vllm`."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rmsd_kernels import native

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md")
FOLDERS = ("rmsd_fast", "kernels", "csrc")


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel from a copy of the sources, so that the tree does not change and no built library is used."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, source / name)
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    inherited = {key: value for key, value in os.environ.items() if key not in ("CXX", "RMSD_FAST_NATIVE")}
    return subprocess.run(
        [*command, "-w", str(folder / "dist"), str(source)],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=300,
        check=False,
    )


def contents(folder: Path) -> tuple[str, set[str]]:
    """Return the name of the only wheel in folder/dist and its files."""
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist())


def sources_that_belong_in_a_wheel() -> set[str]:
    fast = {path.relative_to(ROOT) for path in (ROOT / "rmsd_fast").rglob("*.py")}
    recipes = {path.relative_to(ROOT) for path in (ROOT / "rmsd_fast").glob("*/*.yaml")}
    kernels = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")}
    assert fast and recipes and kernels
    return {path.as_posix() for path in fast | recipes | kernels}


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without `__init__.py` works in the source tree but is missing from the wheel."""
    sources = [path for part in ("rmsd_fast", "kernels/rmsd_kernels") for path in (ROOT / part).rglob("*.py")]
    folders = {path.parent for path in sources}
    bare = sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file())
    assert not bare, f"add an __init__.py to {bare}"


def test_wheel_without_a_compiler_is_pure_and_complete(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, CXX="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "building WITHOUT native ops: no working C++20 compiler" in done.stdout + done.stderr
    name, files = contents(tmp_path)
    assert name.endswith("-py3-none-any.whl")
    assert sources_that_belong_in_a_wheel() <= files
    assert any(file.endswith("licenses/LICENSE") for file in files)
    assert not [file for file in files if file.endswith((".so", ".cpp"))]
    assert {file.split("/")[0] for file in files if ".dist-info" not in file} == {"rmsd_fast", "rmsd_kernels"}


def test_missing_compiler_is_fatal_if_native_ops_are_required(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, CXX="/bin/false", RMSD_FAST_NATIVE="1")
    assert done.returncode != 0
    assert "RMSD_FAST_NATIVE=1, but no working C++20 compiler" in done.stdout + done.stderr


@pytest.mark.skipif(not native.available(), reason=f"no native ops in this environment: {native.why_not()}")
def test_wheel_built_with_a_compiler_has_a_working_library(tmp_path: Path) -> None:
    done = build_wheel(tmp_path, RMSD_FAST_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    name, files = contents(tmp_path)
    assert "-cp310-abi3-" in name
    assert sources_that_belong_in_a_wheel() | {"rmsd_kernels/_native.abi3.so"} <= files
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    code = (
        "import torch; from rmsd_kernels import linear_logprob, native; print(native.__file__)\n"
        "logp = linear_logprob(torch.zeros(1, 2), torch.ones(4, 2), torch.tensor([2]), impl='native')\n"
        "print(logp.exp().item())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    path, value = ran.stdout.split()
    assert Path(path).is_relative_to(tmp_path / "site")
    assert float(value) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("mode", "message"), [("0", "native ops left out"), ("yes", "expected unset, 0 or 1, got 'yes'")]
)
def test_native_switch(tmp_path: Path, mode: str, message: str) -> None:
    done = build_wheel(tmp_path, RMSD_FAST_NATIVE=mode)
    assert message in done.stdout + done.stderr
    assert (done.returncode == 0) == (mode == "0")


@pytest.mark.parametrize(
    ("arguments", "collector", "rollouts"),
    [
        ("", "tests/collect", "tests/rollout"),
        ("tests/collect -k cost", "tests/collect -k cost", ""),
        ("tests/rollout -k sync", "", "tests/rollout -k sync"),
    ],
)
def test_the_rollouts_of_vllm_are_tested_with_its_python(arguments: str, collector: str, rollouts: str) -> None:
    done = _test_vllm(arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", "").splitlines()
    runs = [re.search(r"(\S+)/bin/python -m pytest .* -m vllm +(.*)", line) for line in lines if "-m vllm" in line]
    assert [(run[1], run[2].strip()) for run in runs] == [
        (venv, tests) for venv, tests in (("own", collector), ("theirs", rollouts)) if tests
    ]


@pytest.mark.parametrize("arguments", ["-k sync", "tests/collect tests/rollout", "tests/method"])
def test_the_python_of_vllm_tests_must_be_clear(arguments: str) -> None:
    done = _test_vllm(arguments)
    assert done.returncode == 2
    assert f"ARGS: expected tests in either tests/collect or tests/rollout, got '{arguments}'" in done.stderr


def _test_vllm(arguments: str) -> subprocess.CompletedProcess:
    """Print the commands of `make test-vllm` without running them."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    made = ["make", "-n", "test-vllm", "SET=cpu", "VENV=own", "VLLM_PYTHON=theirs/bin/python", f"ARGS={arguments}"]
    return subprocess.run(made, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_version_and_extras_of_the_installed_package() -> None:
    import rmsd_fast

    assert importlib.metadata.version("rmsd-fast") == rmsd_fast.__version__
    extras = importlib.metadata.metadata("rmsd-fast").get_all("Provides-Extra")
    assert {"train", "video", "vllm", "gpu", "test"} <= set(extras)


def test_every_pin_is_within_the_declared_range() -> None:
    """constraints-cpu.txt has the tested versions, and pyproject.toml must not exclude them."""
    from packaging.requirements import Requirement

    pins = [
        Requirement(line) for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if line[:1] not in "#"
    ]
    version = {pin.name.lower().replace("_", "-"): next(iter(pin.specifier)).version for pin in pins}
    declared = [Requirement(text) for text in importlib.metadata.requires("rmsd-fast") or []]
    tested = [requirement for requirement in declared if "vllm" not in str(requirement)]
    assert len(tested) > 10
    for requirement in tested:
        name = requirement.name.lower().replace("_", "-")
        assert name in version, f"{name} is declared in pyproject.toml but not pinned in constraints-cpu.txt"
        assert requirement.specifier.contains(version[name]), f"{requirement} excludes the tested {version[name]}"
