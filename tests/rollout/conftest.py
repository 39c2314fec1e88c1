"""Checks of tests of rollout engines."""

from __future__ import annotations

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def _has_vllm(request):
    """Fail if only another Python has vLLM, which RMSD_VLLM_PYTHON names. A skip would look like a success."""
    if request.node.get_closest_marker("vllm"):
        assert importlib.util.find_spec("vllm"), (
            f"{sys.executable} does not have vLLM, which these tests import; run make test-vllm ARGS=tests/rollout"
        )
