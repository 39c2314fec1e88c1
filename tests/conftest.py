"""Provide settings and fixtures for the whole suite. Processes that a test starts inherit the environment set here."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# These variables are set before torch is imported. Each process uses one thread, because tests start several processes
# on few cores. Hub access is off, so that a test which needs a model from a hub fails instead of hanging.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

REPOSITORY = Path(__file__).resolve().parent.parent

TORCHVISION_PRELUDE = """
import sys
import torch
if {folder!r}:
    sys.path.append({folder!r})
if torch.version.cuda is None:
    # The CUDA wheel of torchvision registers shapes for two ops that its library does not bring to a CPU torch.
    ops = torch.library.Library("torchvision", "DEF")
    ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import torchvision
"""


# If several processes share the suite, each takes whole files. The longest files come first, and then the other files
# with training runs, so that no long file remains at the end.
LONGEST = ("test_train_run.py", "test_attacks.py", "test_bench_cuda.py", "test_fused_heads.py")


def _place(item: pytest.Item) -> int:
    """Return the place of a test's file in the order of the suite; files of equal places keep their order."""
    if item.path.name in LONGEST:
        return LONGEST.index(item.path.name)
    return len(LONGEST) + (item.path.parent.name != "trainer")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=_place)
    skip_cuda = pytest.mark.skip(reason="needs a CUDA device, but torch.cuda.is_available() is False")
    skip_vllm = pytest.mark.skip(reason="needs vLLM, which is not installed here (make test-vllm installs it)")
    has_vllm = "RMSD_VLLM_PYTHON" in os.environ or importlib.util.find_spec("vllm") is not None
    for item in items:
        if not HAS_CUDA and item.get_closest_marker("cuda"):
            item.add_marker(skip_cuda)
        if not has_vllm and item.get_closest_marker("vllm"):
            item.add_marker(skip_vllm)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed the global random number generators of every test, regardless of what ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def run_with_torchvision() -> Callable[..., str]:
    """Run Python code with torchvision as an oracle and return its output; skip the test if torchvision is missing.

    The code runs in its own process, because transformers decides once per process whether to use torchvision, and our
    code must work without it. `make test` puts torchvision into <environment>/oracle, where only this fixture finds it.
    """
    folder = "" if importlib.util.find_spec("torchvision") else str(Path(sys.prefix) / "oracle")
    if folder and not (Path(folder) / "torchvision").is_dir():
        pytest.skip(f"torchvision (a test oracle only) is neither installed nor in {folder}")

    def run(code: str, *arguments: str, timeout_s: float = 300.0) -> str:
        script = TORCHVISION_PRELUDE.format(folder=folder) + code
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"oracle process failed:\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
