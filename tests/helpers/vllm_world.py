"""A process group for tests that run vLLM in their own process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rmsd_fast.runtime.process_group import World, start, stop


@contextmanager
def vllm_world() -> Iterator[World]:
    """Start a process group inside the context, in which vLLM compiles nothing: on a CPU, that takes half a minute.

    Several modules of tests can use it one after the other.
    """
    # Undoing a monkeypatch would delete the setting, which the next module needs.
    with torch._dynamo.config.patch(disable=True):
        yield start()
        state = sys.modules.get("vllm.distributed.parallel_state")
        if state is not None:
            # vLLM would use its groups again, which end with this process group.
            state.destroy_model_parallel()
            if state._WORLD is not None:
                state._WORLD.destroy()
            state._WORLD = state._NODE_COUNT = None
        stop()
