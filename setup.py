"""Build both packages and, if a C++ compiler and torch's headers are available, the native CPU ops.

All static metadata is in pyproject.toml. The native library uses torch's stable ABI and nothing of Python's, so one
cp310-abi3 wheel works with torch 2.11 and later. Without a compiler, the wheel is pure Python.

RMSD_FAST_NATIVE   unset   build the native ops if possible, otherwise report the reason and continue
                   1       fail if the native ops cannot be built
                   0       leave the native ops out
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup

MODE = os.environ.get("RMSD_FAST_NATIVE", "")
OLDEST_TORCH = (2, 11)


def find_torch() -> Path:
    """Return the folder of the installed torch without importing it; raise RuntimeError if it is missing or too old."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise RuntimeError("torch is not importable in this build (install torch first, then use --no-build-isolation)")
    folder = Path(spec.origin).parent
    version = (folder / "version.py").read_text()
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise RuntimeError(f"torch >= {'.'.join(map(str, OLDEST_TORCH))} is needed, found {version.splitlines()[:2]}")
    return folder


def check_compiler() -> None:
    """Raise RuntimeError unless the C++ compiler of the build can make a shared library with C++20."""
    command = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <cmath>\n#include <vector>\nint probe() { return int(std::exp(0.0)); }\n")
        command += ["-std=c++20", "-shared", "-fPIC", str(source), "-o", str(Path(folder) / "probe.so")]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            last_line = (getattr(error, "stderr", "") or "").strip().splitlines()[-1:] or [str(error)]
            raise RuntimeError(f"no working C++20 compiler: {last_line[0]} (install g++, or set CXX)") from None


def native_extensions() -> list[Extension]:
    if MODE not in ("", "0", "1"):
        raise SystemExit(f"RMSD_FAST_NATIVE: expected unset, 0 or 1, got {MODE!r}")
    if MODE == "0":
        # Remove the library of an earlier build, which an editable install would still load.
        Path(__file__).with_name("kernels").joinpath("rmsd_kernels", "_native.abi3.so").unlink(missing_ok=True)
        print("rmsd-fast: native ops left out (RMSD_FAST_NATIVE=0)", file=sys.stderr)
        return []
    try:
        torch_folder = find_torch()
        check_compiler()
    except RuntimeError as error:
        if MODE == "1":
            raise SystemExit(f"rmsd-fast: RMSD_FAST_NATIVE=1, but {error}") from None
        print(f"rmsd-fast: building WITHOUT native ops: {error}", file=sys.stderr)
        return []
    return [
        Extension(
            "rmsd_kernels._native",
            sources=[
                "csrc/register.cpp",
                "csrc/head_rows.cpp",
                "csrc/divergence_rows.cpp",
                "csrc/row_kernels.cpp",
                "csrc/video_frames.cpp",
                "csrc/video_kernels.cpp",
            ],
            depends=[
                *("csrc/head_rows.h", "csrc/row_common.h", "csrc/row_kernels.h"),
                *("csrc/video_frames.h", "csrc/video_kernels.h", "csrc/video_loops.inl"),
            ],
            include_dirs=[str(torch_folder / "include")],
            library_dirs=[str(torch_folder / "lib")],
            # The symbols of the stable ABI are in libtorch_cpu, which the loader finds in the running process.
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],
            # Fast-math is not used, so NaN and infinity keep their meaning. Without -fno-trapping-math, the row loop
            # vectorizes only in part (2.6 times slower, GCC 12). -fopenmp-simd lets only the marked sums be reordered.
            extra_compile_args=[
                *("-std=c++20", "-O3", "-g0", "-fvisibility=hidden"),
                *("-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
            ],
            language="c++",
            py_limited_api=True,
            optional=MODE != "1",
        )
    ]


extensions = native_extensions()
setup(
    packages=[*find_packages(include=["rmsd_fast", "rmsd_fast.*"]), *find_packages("kernels")],
    ext_modules=extensions,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
