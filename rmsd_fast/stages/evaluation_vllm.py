"""Answer the questions of an evaluation with vLLM in this process.

The student's vision tower encodes the media, as with transformers, and vLLM has the only copy of the language model on
the device. Greedy and sampled requests of a batch are added together, in the order of the questions: those about one
prompt, and those about one video, which are adjacent, share the prefix that vLLM has cached.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.folders import resolve_folder
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.students import MediaFeatures, Student
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.copied import CopyRollout
from rmsd_fast.rollout.hf import encode_shown
from rmsd_fast.rollout.samples import advice
from rmsd_fast.rollout.vllm import VllmSampler, answered_together
from rmsd_fast.runtime.process_group import World
from rmsd_fast.stages.build import load
from rmsd_fast.stages.evaluation import AnswerEngine, Answers
from rmsd_fast.stages.protocol import video_of

SECTION = "evaluate"


def load_answering(path: str, settings: RunConfig, world: World) -> tuple[Student, AnswerEngine | None]:
    """Load a student, and start the engine that answers for it, see `evaluate.engine`; None = its own model.

    All processes call it together.

    Args:
        path: folder or Hub name of the student.
        settings: settings of the evaluation.
        world: this process in the run.
    """
    if settings.evaluate.engine == "hf":
        return load(path, settings, world), None
    student = load(path, settings, world, only_tower=True)
    return student, VllmAnswers(path, student, settings, world)


class VllmAnswers:
    """Generate answers with vLLM. Each process has an engine of its own, and waits for no other one.

    The student's language model is in host memory. It is compared with the weights in vLLM, and then freed.

    Args:
        path: folder or Hub name of the student.
        student: the student.
        settings: settings of the evaluation.
        world: this process in the run.
    Raises:
        NotInstalled: vLLM is missing or was not tested.
        ModelError: the model is of an untested family, or vLLM cannot load it.
        SettingsError: the KV cache is too small for one response.
        RolloutError: vLLM has other weights than the student.
    """

    def __init__(self, path: str, student: Student, settings: RunConfig, world: World) -> None:
        evaluate, self._model = settings.evaluate, student.model
        builder = PromptBuilder(student, video_of(settings))
        self._tokens_per_call = settings.micro_tokens
        sampler = VllmSampler(
            resolve_folder(path),
            student.model.config,
            banned_ids=builder.banned_ids,
            eos_id=builder.eos_id,
            dtype=settings.model.dtype,
            max_tokens=settings.data.max_prompt_tokens + evaluate.max_new_tokens,
            sequences=answered_together(evaluate.prompts_per_batch, evaluate.rollouts),
            kv_cache_gib=settings.rollout.vllm_kv_cache_gib,
            device=world.device,
            processes=world.size,
            section=SECTION,
        )
        self.copy = CopyRollout(sampler, builder)
        expects = f"{SECTION}.engine: expected the student's weights"
        self.copy.send(_Source(student.model, world.device), expects, advice(SECTION))
        # A later use of these weights is an error instead of wrong.
        for part in (student.model.model.language_model, student.model.lm_head):
            part.to("meta")

    @torch.no_grad()
    def answer(self, prompts: list[Prompt], greedy: Sampling, sampled: Sampling | None = None) -> Answers:
        """Return the responses to each prompt; see `AnswerEngine`. They do not depend on earlier batches.

        Raises:
            RolloutError: vLLM failed, read another prompt than the student, or a response is incomplete.
        """
        features = _side_by_side(encode_shown(self._model, prompts, tokens_per_call=self._tokens_per_call))
        first, *others = self.copy.draw(prompts, [greedy, sampled] if sampled else [greedy], features)
        return first, others[0] if others else None


class _Source:
    """The language model of a student as the source of weights, which are on the device only while they are read.

    It has what `PolicyEngine` asks for.
    """

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        self.module, self._device = Policy(model), device
        # Nothing is trained.
        self.names: list[str] = []

    @contextmanager
    def gathered(self, params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        params = list(params)
        held = [param.data for param in params]
        for param in params:
            param.data = param.data.to(self._device)
        try:
            yield
        finally:
            for param, value in zip(params, held, strict=True):
                param.data = value


def _side_by_side(features: MediaFeatures) -> MediaFeatures:
    """Return features whose `pooled` has all layers of a medium side by side, once for equal media.

    Requests about one medium then share a tensor, instead of joining the layers again for each of them.
    """
    joined: dict[int, torch.Tensor] = {}
    for medium, pooled in enumerate(features.pooled):
        if id(pooled) not in joined:
            joined[id(pooled)] = torch.cat([pooled, *(layer[medium] for layer in features.deepstack)], -1)
    return MediaFeatures([joined[id(pooled)] for pooled in features.pooled], [], features.kinds, features.counts)
