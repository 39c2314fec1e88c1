"""The colocated vLLM engine of a run, as one of the ways of the rollout benchmark."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.core.measure import Unavailable
from rmsd_fast.config import NotInstalled, first_line
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.models.export import write_model
from rmsd_fast.models.students import Student
from rmsd_fast.rollout.copied import CopyRollout
from rmsd_fast.rollout.vllm import VllmSampler
from rmsd_fast.rollout.vllm_process import GIB, check_vllm


class FullyTrained:
    """A model on one device whose weights all change in training, as `CopyRollout.update` sees it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.module = SimpleNamespace(model=model)
        self.names = [f"model.{name}" for name, _ in model.named_parameters()]

    def gathered(self, params: Iterable[torch.nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()


class VllmWay:
    """vLLM with the weights of a student.

    Args:
        student: the student.
        builder: builder of its prompts.
        banned_ids: ids that must not be sampled.
        max_tokens: most tokens of a prompt and its response.
        sequences: number of responses that are decoded together.
    Raises:
        Unavailable: vLLM is not installed, or its version was not tested.
    """

    def __init__(
        self, student: Student, builder: PromptBuilder, banned_ids: torch.Tensor, *, max_tokens: int, sequences: int
    ) -> None:
        try:
            check_vllm()
        except NotInstalled as error:
            raise Unavailable(first_line(error)) from error
        model = student.model
        folder = tempfile.TemporaryDirectory(prefix="bench-vllm-")
        weakref.finalize(self, folder.cleanup)
        write_model(student, Path(folder.name))
        text = model.config.text_config
        of_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
        sampler = VllmSampler(
            folder.name,
            model.config,
            banned_ids=banned_ids,
            eos_id=builder.eos_id,
            dtype=str(model.dtype).removeprefix("torch."),
            max_tokens=max_tokens,
            sequences=sequences,
            # Room for responses that do not share the prompt. Blocks of vLLM are not filled to their end.
            kv_cache_gib=1.5 * of_token * max_tokens * sequences / GIB,
            device=model.device,
        )
        self.engine, self._policy = CopyRollout(sampler, builder), FullyTrained(model)
        self.send_weights()

    def send_weights(self) -> None:
        """Send all weights of the language model, and compare their sums, as a run does before each rollout."""
        self.engine.update(self._policy, 0)
