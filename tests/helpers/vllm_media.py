"""What vLLM keeps of the media of earlier requests, for tests."""

from __future__ import annotations

import gc
import weakref

import pytest


class WatchedMedia:
    """Watch the vision features that a sampler gives to vLLM.

    Args:
        sampler: the `VllmSampler`.
        patch: undoes the change.
    """

    def __init__(self, sampler, patch: pytest.MonkeyPatch) -> None:
        self._runner = sampler._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._given: list[weakref.ref] = []
        inputs = sampler._inputs

        def watched(request):
            prompt = inputs(request)
            for kind, items in prompt.get("mm_kwargs", {}).items():
                self._given += [weakref.ref(item[f"{kind}_embeds"].data) for item in items]
            return prompt

        patch.setattr(sampler, "_inputs", watched)

    def kept(self) -> dict[str, int]:
        """Return the numbers of features that vLLM was given, that still exist, and that are in vLLM's caches."""
        gc.collect()
        return {
            "given": len(self._given),
            "alive": sum(given() is not None for given in self._given),
            "encoded": len(self._runner.encoder_cache),
            "requests": len(self._runner.requests),
        }
