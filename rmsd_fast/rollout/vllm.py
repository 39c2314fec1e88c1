"""Sample with vLLM in this process, which is the training process or that of a rollout server.

This module, `vllm_group` and `vllm_process` have everything that depends on vLLM. vLLM gets token ids and vision
features of the training model, so prompts, pixels and vision tower are those of the trainer. It samples without the
banned ids, and each log-prob is corrected to that over the whole vocabulary.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import ModelError, SettingsError, first_line
from rmsd_fast.models.families import family_of
from rmsd_fast.models.students import DTYPES
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.samples import Completion, Request, advice
from rmsd_fast.rollout.vllm_group import TensorGroup
from rmsd_fast.rollout.vllm_process import GIB, REQUEST, BannedMask, check_plain, check_vllm, shut_down, start_engine

FAMILY = "Qwen3-VL"
# Tokens that vLLM processes in one pass at most. A medium must fit too.
BATCH_TOKENS = 8192
# Responses of an evaluation that are decoded together at most. With more, logits take much memory: those of 256
# responses take 0.6 GiB in 4 copies of float32 and a vocabulary of 151,936.
MOST_ANSWERS = 256


def check_family(student_family: str, path: str, engine: str = "vllm", *, section: str = "rollout") -> None:
    """Raise ModelError if a model family was not tested with vLLM. `section` has the setting `engine`."""
    if student_family != FAMILY:
        raise ModelError(
            f"{path}: expected a {FAMILY} model with {section}.engine={engine}, got a {student_family} model; "
            f"set {section}.engine=hf"
        )


def check_length(
    text_config: Any,
    *,
    dtype: str,
    max_tokens: int,
    kv_cache_gib: float,
    tensor_parallel: int = 1,
    section: str = "rollout",
) -> None:
    """Raise SettingsError if a prompt and its response are too long for the model or for vLLM's KV cache.

    Args:
        text_config: configuration of the language model.
        dtype: `model.dtype`.
        max_tokens: most tokens of a prompt and its response.
        kv_cache_gib: size of the KV cache in GiB.
        tensor_parallel: number of processes that hold one copy of the model, each with a part of the heads.
        section: section of the settings `engine` and `max_new_tokens`.
    """
    both = f"data.max_prompt_tokens and {section}.max_new_tokens together, {max_tokens}"
    if max_tokens > text_config.max_position_embeddings:
        raise SettingsError(
            f"data.max_prompt_tokens: expected at most {text_config.max_position_embeddings}, max_position_embeddings "
            f"in config.json, for {both}; lower one of them, or set {section}.engine=hf"
        )
    least = cache_gib(text_config, dtype=dtype, max_tokens=max_tokens, tensor_parallel=tensor_parallel)
    if least > kv_cache_gib:
        raise SettingsError(
            f"rollout.vllm_kv_cache_gib: expected at least {least:.3g}, the keys and values for "
            f"{both}, got {kv_cache_gib:g}; raise it, or lower one of the two"
        )


def cache_gib(text_config: Any, *, dtype: str, max_tokens: int, tensor_parallel: int = 1) -> float:
    """Return the GiB of the keys and values of so many tokens on a process; see `check_length`."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    heads = max(1, text_config.num_key_value_heads // tensor_parallel)
    of_token = 2 * text_config.num_hidden_layers * heads * head_dim * DTYPES[dtype].itemsize
    return of_token * max_tokens / GIB


def answered_together(questions: int, rollouts: int) -> int:
    """Return the number of responses that vLLM decodes together in an evaluation; the others of a batch wait.

    Args:
        questions: questions of a batch, each with a greedy answer.
        rollouts: sampled answers of each.
    """
    return min(questions * (1 + rollouts), MOST_ANSWERS)


def batch_tokens(max_tokens: int) -> int:
    """Return the most tokens of one pass of vLLM, for prompts and responses of at most `max_tokens`."""
    return max(BATCH_TOKENS, max_tokens)


class VllmSampler:
    """Sample with an engine of vLLM in this process; see `Sampler`.

    It has all weights of the model, or with `tensor_parallel` a part of them. A server uses `add` and `step` instead of
    `sample`, so that requests of several processes are decoded together.

    Args:
        folder: folder of the model.
        config: its configuration.
        banned_ids: ids that must not be sampled, int64.
        eos_id: id that ends a response.
        dtype: `model.dtype`.
        max_tokens: most tokens of a prompt and its response.
        sequences: number of responses of this process that are decoded together.
        kv_cache_gib: size of the KV cache on this process's device in GiB.
        device: device of this process.
        processes: number of processes, which start their engines together.
        tensor_parallel: number of processes with consecutive ranks that hold one copy of the model.
        sleeps: whether the engine frees the GPU's memory except during rollouts.
        section: section of the settings `engine` and `max_new_tokens`, for messages.
    Raises:
        NotInstalled: vLLM is missing or was not tested, or packs weights so that they cannot be updated.
        ModelError: the model is of an untested family, or vLLM cannot load it.
        SettingsError: the KV cache is too small for one response.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Any,
        *,
        banned_ids: torch.Tensor,
        eos_id: int,
        dtype: str,
        max_tokens: int,
        sequences: int,
        kv_cache_gib: float,
        device: torch.device,
        processes: int = 1,
        tensor_parallel: int = 1,
        sleeps: bool = False,
        section: str = "rollout",
    ) -> None:
        check_vllm(section=section)
        check_family(family_of(config).title, str(folder), section=section)
        self._advice = advice(section)
        self.max_tokens, self.dtype, self.device = max_tokens, DTYPES[dtype], device
        self._eos_id = eos_id
        self._mask = BannedMask(banned_ids, eos_id)
        self._sleeps = sleeps and device.type == "cuda"
        self._asleep = False
        self._numbers = itertools.count()
        # By number: the request, the number of its responses, and vLLM's name of it.
        self._running: dict[int, tuple[Request, int, str]] = {}
        self._corrections: dict[tuple[int, int, int], float] = {}
        self._engine = start_engine(
            self._mask,
            device,
            section,
            model=str(folder),
            dtype=dtype,
            max_model_len=max_tokens,
            # The engines of a group decode the responses of all its processes.
            max_num_seqs=sequences * tensor_parallel,
            max_num_batched_tokens=batch_tokens(max_tokens),
            kv_cache_memory_bytes=int(kv_cache_gib * GIB),
            # vLLM only checks that this share of the GPU is free, since the size of the KV cache is given.
            gpu_memory_utilization=0.01,
            # Compilation is for GPUs: on a CPU, it takes longer than a test.
            enforce_eager=device.type == "cpu",
            enable_sleep_mode=self._sleeps,
            **({"distributed_executor_backend": "external_launcher"} if processes > 1 else {}),
            # Groups are not parts of one data-parallel engine, in which all would wait for the slowest in each step.
            tensor_parallel_size=tensor_parallel,
            # vLLM's own sum over GPUs maps memory of other processes, which nobody has tried while the engine sleeps.
            disable_custom_all_reduce=True,
        )
        self._group = TensorGroup(tensor_parallel)
        core = self._engine.engine_core.engine_core
        # vLLM's own finalizer would destroy the process group of the training.
        self._engine.engine_core._finalizer.detach()
        weakref.finalize(self, shut_down, core).atexit = False
        self._model = core.model_executor.driver_worker.worker.model_runner.get_model()
        check_plain(self._model, section)
        self._sleep()

    def load(self, weights: Iterator[tuple[str, torch.Tensor]], names: list[str]) -> None:
        """Copy weights into vLLM's model; see `Sampler`."""
        self._wake()
        taken: list[str] = []

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, value in weights:
                yield name, value
                taken.append(name)

        with torch.no_grad():
            loaded = self._model.load_weights(watched())
        expected = {self._name_of(name) for name in names}
        if loaded != expected:
            raise RolloutError(
                f"weights in vLLM: expected {len(expected)} to be loaded, got {len(loaded)}; first difference: "
                f"{min(loaded ^ expected)}; {self._advice}"
            )
        if taken != names:
            missing = [name for name in names if name not in set(taken)]
            raise RolloutError(
                f"weights in vLLM: expected it to take {len(names)}, it took {len(taken)}; first missing: "
                f"{(missing or ['none, but their order has changed'])[0]}; {self._advice}"
            )

    def _name_of(self, name: str) -> str:
        """Return the name of a weight in vLLM's model, which fuses some layers."""
        for start, ours in self._model.hf_to_vllm_mapper.orig_to_new_prefix.items():
            if name.startswith(start):
                name = ours + name.removeprefix(start)
                break
        for fused, parts in self._model.packed_modules_mapping.items():
            for part in parts:
                name = name.replace(f".{part}.", f".{fused}.")
        return name

    def commit(self) -> dict[str, int]:
        """Forget what was computed with earlier weights, and return `weight_sums`; see `Sampler`."""
        self._forget()
        return self.weight_sums()

    def _forget(self) -> None:
        """Forget keys, values and media that were computed with earlier weights."""
        if not self._engine.reset_prefix_cache():
            raise RolloutError(f"vLLM could not reset its prefix cache; {self._advice}")
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()

    def weight_sums(self) -> dict[str, int]:
        """Return the sum of `bit_sum` over each group of vLLM's language model, without padding of the vocabulary."""
        return self._group.weight_sums(self._model)

    def _sleep(self) -> None:
        """Free the GPU's memory for training. Level 2 would drop the weights that are not copied in each step."""
        if self._sleeps:
            self._engine.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def sample(self, requests: list[tuple[Request, Sampling]]) -> list[list[Completion]]:
        """Return the completions of all requests; see `Sampler`."""
        self._wake()
        every, own = self._group.gather(requests, self.dtype, self.device)
        finished: dict[int, list[Completion]] = {}
        try:
            numbers = [self.add(request, sampling) for request, sampling in every]
            while self._engine.has_unfinished_requests():
                finished |= self.step()
        except BaseException:
            self.abort()
            raise
        self._sleep()
        drawn = [finished[number] for number in numbers]
        self._group.check_equal(drawn)
        return drawn[own]

    def close(self) -> None:
        """Do nothing: the engine ends with this object."""

    def add(self, request: Request, sampling: Sampling) -> int:
        """Begin a request, and return its number."""
        if not self._running:
            self._corrections = {}
            self._mask.begin()
        number = next(self._numbers)
        inputs = self._inputs(request)
        self._check_prompt(request, inputs, sampling)
        try:
            name = self._engine.add_request(str(number), inputs, self._params(request, sampling, number))
        except Exception as error:
            raise self._failed(error) from error
        self._running[number] = request, sampling.n, name
        return number

    def step(self) -> dict[int, list[Completion]]:
        """Decode one token of each response, and return the completions of requests that have ended, by number."""
        try:
            outputs = [output for output in self._engine.step() if output.finished]
        except Exception as error:
            raise self._failed(error) from error
        if not outputs:
            return {}
        self._corrections |= self._mask.take()
        drawn = {int(output.request_id): self._completions(output) for output in outputs}
        if not self._running:
            self._drop_media()
        return drawn

    def _drop_media(self) -> None:
        """Drop the features of all requests, which have ended.

        vLLM would keep them for requests with the same media, which do not come: keys differ between calls.
        """
        try:
            # An empty step removes the last requests, with their features, from vLLM's batch.
            self._engine.step()
        except Exception as error:
            raise self._failed(error) from error
        self._engine.reset_encoder_cache()

    def abort(self) -> None:
        """End all requests in progress."""
        running, self._running = self._running, {}
        self._engine.abort_request([name for _, _, name in running.values()], internal=True)

    def _failed(self, error: Exception) -> Exception:
        """Return the error to raise. Running out of memory has its own message."""
        if isinstance(error, torch.OutOfMemoryError):
            return error
        return RolloutError(
            f"vLLM failed while it generated responses ({type(error).__name__}: {first_line(error)}); {self._advice}"
        )

    def _inputs(self, request: Request) -> Any:
        """Return vLLM's form of a processed prompt: token ids, vision features and their places."""
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import (
            MultiModalFieldConfig,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            MultiModalKwargsItems,
            PlaceholderRange,
        )

        ids = request.input_ids.tolist()
        if not request.media:
            return tokens_input(ids, cache_salt=request.salt)
        items: dict[str, list] = {}
        hashes: dict[str, list] = {}
        ranges: dict[str, list] = {}
        for medium in request.media:
            kind, start, end = medium.kind, medium.start, medium.end
            # vLLM splits the features of the deepstack layers off again.
            embeds = medium.embeds(self.dtype)
            flat = MultiModalFieldConfig.flat(kind, [slice(0, len(embeds))]).field
            single = MultiModalFieldConfig.batched(kind, keep_on_cpu=True).field
            fields = {
                f"{kind}_embeds": MultiModalFieldElem(data=embeds, field=flat),
                f"{kind}_grid_thw": MultiModalFieldElem(data=torch.tensor(medium.grid_thw), field=single),
            }
            is_embed = request.mm_token_type_ids[start:end] != 0
            items.setdefault(kind, []).append(MultiModalKwargsItem(fields))
            hashes.setdefault(kind, []).append(medium.key)
            ranges.setdefault(kind, []).append(PlaceholderRange(start, end - start, is_embed=is_embed))
        return mm_input(ids, MultiModalKwargsItems(items), hashes, ranges, cache_salt=request.salt)

    def _check_prompt(self, request: Request, inputs: Any, sampling: Sampling) -> None:
        """Raise RolloutError if a prompt is too long, or if it or its response has other positions in vLLM."""
        from vllm.multimodal.inputs import MultiModalFeatureSpec

        name = f"question {request.question_id!r}"
        tokens = len(request.input_ids) + sampling.max_new_tokens
        if tokens > self.max_tokens:
            raise RolloutError(
                f"{name}: expected a prompt and response of at most {self.max_tokens} tokens, got {tokens}; lower "
                "video.max_video_pixels or raise data.max_prompt_tokens"
            )
        features = [
            MultiModalFeatureSpec(data=item, modality=kind, identifier="", mm_position=place)
            for kind, places in inputs.get("mm_placeholders", {}).items()
            for item, place in zip(inputs["mm_kwargs"][kind], places, strict=True)
        ]
        positions, delta = self._model.get_mrope_input_positions(inputs["prompt_token_ids"], features)
        if not torch.equal(positions, request.position_ids):
            raise RolloutError(f"{name}: expected the trainer's position ids in vLLM, got others; {self._advice}")
        # vLLM adds this difference to the index of each token of the response.
        first = len(request.input_ids) + delta
        if first != request.next_position:
            raise RolloutError(
                f"{name}: expected the response to begin at position {request.next_position} in vLLM, got {first}; "
                f"{self._advice}"
            )

    def _params(self, request: Request, sampling: Sampling, number: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            n=sampling.n,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # vLLM adds the index of the response.
            seed=request.seed,
            # Two copies of a question have the same seeds, but may diverge by rounding.
            extra_args={REQUEST: number},
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            stop_token_ids=[self._eos_id],
            ignore_eos=True,
            detokenize=False,
        )

    def _completions(self, output: Any) -> list[Completion]:
        """Return the completions of a request that has ended, after checking vLLM's output."""
        number = int(output.request_id)
        request, n, _ = self._running.pop(number)
        name = f"question {request.question_id!r}"
        if output.prompt_token_ids != request.input_ids.tolist():
            raise RolloutError(f"{name}: expected the trainer's prompt ids in vLLM, got others; {self._advice}")
        if len(output.outputs) != n:
            raise RolloutError(f"{name}: expected {n} responses, got {len(output.outputs)}; {self._advice}")
        completions = []
        for index, completion in enumerate(sorted(output.outputs, key=lambda completion: completion.index)):
            ids, seed = list(completion.token_ids), request.seed + index
            steps = [self._corrections.pop((number, seed, position), None) for position in range(len(ids))]
            if not ids or completion.logprobs is None or len(completion.logprobs) != len(ids) or None in steps:
                raise RolloutError(
                    f"{name}: expected tokens with log-probs in response {index}, got {len(ids)} tokens and "
                    f"{len(completion.logprobs or ())} log-probs; {self._advice}"
                )
            logp = [chosen[i].logprob + step for i, chosen, step in zip(ids, completion.logprobs, steps, strict=True)]
            completions.append(
                Completion(
                    torch.tensor(ids, dtype=torch.int64),
                    torch.tensor(logp, dtype=torch.float32),
                    -sum(math.expm1(step) for step in steps) / len(steps),
                )
            )
        return completions
