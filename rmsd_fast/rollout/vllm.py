"""Generate rollouts with vLLM in the training process, with weights that are proven to be the policy's.

This module and `vllm_process` have everything that depends on vLLM. vLLM has its own copy of the language model. Before
each step's rollouts, `update` copies the weights that training has changed, and compares a sum over the bits of all
weights of each layer with that of the policy. vLLM gets token ids and vision features of the training model, so
prompts, pixels and vision tower are those of the trainer. It samples without the banned ids, and each log-prob is
corrected to that over the whole vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import ModelError, SettingsError, first_line
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.models.students import DTYPES, MediaFeatures, Student, encode_media
from rmsd_fast.rollout.base import PolicyEngine, Rollout, RolloutError, Sampling
from rmsd_fast.rollout.vllm_process import GIB, PROMPT_INDEX, check_plain, check_vllm, shut_down, start_engine
from rmsd_fast.rollout.weights import SourceWeight, bit_sum, group_sums, source_weights, stream, weight_group

FAMILY = "Qwen3-VL"
# Tokens that vLLM processes in one pass at most. A medium must fit too.
BATCH_TOKENS = 8192


def check_family(student_family: str, path: str) -> None:
    """Raise ModelError if the rollouts of a model family were not tested with vLLM."""
    if student_family != FAMILY:
        raise ModelError(
            f"{path}: expected a {FAMILY} model with rollout.engine=vllm, got a {student_family} model; set "
            "rollout.engine=hf"
        )


def check_length(text_config: Any, *, dtype: str, max_tokens: int, kv_cache_gib: float) -> None:
    """Raise SettingsError if a prompt and its response are too long for the model or for vLLM's KV cache.

    Args:
        text_config: configuration of the language model.
        dtype: `model.dtype`.
        max_tokens: most tokens of a prompt and its response.
        kv_cache_gib: size of the KV cache in GiB.
    """
    both = f"data.max_prompt_tokens and rollout.max_new_tokens together, {max_tokens}"
    if max_tokens > text_config.max_position_embeddings:
        raise SettingsError(
            f"data.max_prompt_tokens: expected at most {text_config.max_position_embeddings}, max_position_embeddings "
            f"in config.json, for {both}; lower one of them, or set rollout.engine=hf"
        )
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    of_token = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim * DTYPES[dtype].itemsize
    if of_token * max_tokens > kv_cache_gib * GIB:
        raise SettingsError(
            f"rollout.vllm_kv_cache_gib: expected at least {of_token * max_tokens / GIB:.3g}, the keys and values for "
            f"{both}, got {kv_cache_gib:g}; raise it, or lower one of the two"
        )


def batch_tokens(max_tokens: int) -> int:
    """Return the most tokens of one pass of vLLM, for prompts and responses of at most `max_tokens`."""
    return max(BATCH_TOKENS, max_tokens)


class VllmRollout:
    """Generate rollouts with an engine of vLLM in this process. Each process has an engine with all weights.

    Args:
        student: the student that is trained.
        builder: builder of the prompts, which also decodes responses.
        folder: folder of the model that the stage starts from.
        dtype: `model.dtype`.
        max_tokens: most tokens of a prompt and its response.
        sequences: number of responses that are decoded together.
        kv_cache_gib: size of the engine's KV cache in GiB.
        device: device of this process.
        processes: number of processes.
    Raises:
        NotInstalled: vLLM is missing or was not tested, or packs weights so that they cannot be updated.
        ModelError: the model is of an untested family, or vLLM cannot load it.
        SettingsError: the KV cache is too small for one response.
    """

    runs_policy = False

    def __init__(
        self,
        student: Student,
        builder: PromptBuilder,
        folder: str | Path,
        *,
        dtype: str,
        max_tokens: int,
        sequences: int,
        kv_cache_gib: float,
        device: torch.device,
        processes: int,
    ) -> None:
        check_vllm()
        check_family(student.family.title, str(folder))
        self.builder, self.device, self.max_tokens = builder, device, max_tokens
        self._dtype = DTYPES[dtype]
        self._sleeps = device.type == "cuda"
        self._asleep = False
        self._calls = 0
        self._engine, self._mask = start_engine(
            builder,
            device,
            model=str(folder),
            dtype=dtype,
            max_model_len=max_tokens,
            max_num_seqs=sequences,
            max_num_batched_tokens=batch_tokens(max_tokens),
            kv_cache_memory_bytes=int(kv_cache_gib * GIB),
            # vLLM only checks that this share of the GPU is free, since the size of the KV cache is given.
            gpu_memory_utilization=0.01,
            # Compilation is for GPUs: on a CPU, it takes longer than a test.
            enforce_eager=device.type == "cpu",
            enable_sleep_mode=self._sleeps,
            **({"distributed_executor_backend": "external_launcher"} if processes > 1 else {}),
            data_parallel_size=processes,
        )
        core = self._engine.engine_core.engine_core
        # vLLM's own finalizer would destroy the process group of the training.
        self._engine.engine_core._finalizer.detach()
        weakref.finalize(self, shut_down, core).atexit = False
        self._model = core.model_executor.driver_worker.worker.model_runner.get_model()
        check_plain(self._model)
        self._vocabulary = student.model.config.text_config.vocab_size
        self._frozen_sums: dict[str, torch.Tensor] | None = None
        self._sleep()

    def update(self, policy: PolicyEngine, version: int) -> None:
        """Copy the weights that training has changed, and check that all weights are those of the policy.

        See `RolloutEngine`. Prefixes and media that vLLM has stored are forgotten.
        """
        self._wake()
        weights = source_weights(policy)
        trained = [weight for weight in weights if weight.trained]
        sums, sent = self._send(policy, trained)
        names = [weight.name for weight in trained]
        if sent != names:
            missing = [name for name in names if name not in set(sent)]
            raise RolloutError(
                f"rollout step {version}: expected vLLM to take {len(names)} weights, it took {len(sent)}; first "
                f"missing: {missing[0]}; {_ADVICE}"
            )
        self._forget()
        self._compare(policy, weights, sums, version)

    def _send(self, policy: PolicyEngine, weights: list[SourceWeight]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Copy weights into vLLM's model. Return the sums of their groups, and the names of those that vLLM took."""
        sums: dict[str, torch.Tensor] = {}
        sent: list[str] = []

        def watched() -> Iterator[tuple[str, torch.Tensor]]:
            for name, value in stream(policy, weights):
                value = value.to(self._dtype)
                group = weight_group(name)
                sums[group] = bit_sum(value) + sums.get(group, 0)
                yield name, value
                sent.append(name)

        with torch.no_grad():
            loaded = self._model.load_weights(watched())
        expected = {self._name_of(weight.name) for weight in weights}
        if loaded != expected:
            different = sorted(loaded ^ expected)
            raise RolloutError(
                f"weights in vLLM: expected {len(expected)} to be loaded, got {len(loaded)}; first difference: "
                f"{different[0]}; {_ADVICE}"
            )
        return sums, sent

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

    def _compare(
        self, policy: PolicyEngine, weights: list[SourceWeight], sums: dict[str, torch.Tensor], version: int
    ) -> None:
        """Raise RolloutError if the engine's weights are not those of the policy.

        Args:
            policy: engine of the policy.
            weights: all weights of the language model.
            sums: sums of the groups of trained weights.
            version: number of the rollout step.
        """
        if self._frozen_sums is None:
            frozen = stream(policy, [weight for weight in weights if not weight.trained])
            self._frozen_sums = group_sums((name, value.to(self._dtype)) for name, value in frozen)
        expected = {
            group: sums.get(group, 0) + self._frozen_sums.get(group, 0) for group in sums.keys() | self._frozen_sums
        }
        held = self.weight_sums()
        groups = sorted(expected.keys() | held.keys())
        # One copy to the host for all groups.
        none = torch.zeros((), dtype=torch.int64, device=self.device)
        pairs = torch.stack([torch.stack([expected.get(g, none), held.get(g, none)]) for g in groups]).tolist()
        wrong = [group for group, (ours, theirs) in zip(groups, pairs, strict=True) if ours != theirs]
        if wrong:
            raise RolloutError(
                f"rollout step {version}: expected the policy's weights in vLLM, got others in {', '.join(wrong)} "
                f"({len(wrong)} of {len(groups)} groups); {_ADVICE}"
            )

    def weight_sums(self) -> dict[str, torch.Tensor]:
        """Return the sum of `bit_sum` over each group of vLLM's language model, without padding of the vocabulary."""
        named = (
            (name, param[: self._vocabulary] if weight_group(name) in ("embeddings", "head") else param)
            for name, param in self._model.named_parameters()
            if weight_group(name) != "vision"
        )
        return group_sums(named)

    def _forget(self) -> None:
        """Forget keys, values and media that were computed with earlier weights."""
        if not self._engine.reset_prefix_cache():
            raise RolloutError(f"vLLM could not reset its prefix cache; {_ADVICE}")
        self._engine.reset_mm_cache()
        self._engine.reset_encoder_cache()

    def _sleep(self) -> None:
        """Free the GPU's memory for training. Level 2 would drop the weights that are not copied in each step."""
        if self._sleeps:
            self._engine.sleep(level=1)
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    @torch.no_grad()
    def generate(
        self,
        model: torch.nn.Module,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        features: MediaFeatures | None = None,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Return N rollouts per prompt; see `RolloutEngine`.

        Sampling is seeded by (seed, step, id, index). A rollout does not depend on the rest of its batch, except for
        rounding.

        Args:
            model: the policy's model, whose vision tower encodes the media if `features` is None.
            prompts: prompts to answer.
            sampling: sampling parameters. Greedy decoding needs n = 1.
            features: vision features of the prompts.
            policy_version: version to record in the rollouts.
        Raises:
            RolloutError: vLLM read another prompt than the trainer, or a rollout is empty or incomplete.
        """
        self._wake()
        features = encode_media(model, prompts) if features is None else features
        self._calls += 1
        self._mask.begin(sampling.temperature or 1.0)
        requests = {}
        for index, prompt in enumerate(prompts):
            inputs = self._inputs(prompt, features, index)
            self._check_prompt(prompt, inputs, sampling)
            requests[str(index)] = inputs, self._params(prompt, sampling, index)
        finished = self._run(requests)
        corrections = self._mask.take()
        groups = [
            self._rollouts(prompt, index, finished[str(index)], sampling, corrections, policy_version)
            for index, prompt in enumerate(prompts)
        ]
        self._sleep()
        return groups

    def _run(self, requests: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
        """Run requests to their end, and return vLLM's outputs by their keys."""
        finished, running = {}, []
        try:
            for key, (inputs, params) in requests.items():
                running.append(self._engine.add_request(key, inputs, params))
            # With several processes, this waits for all of them in each step.
            while self._engine.has_unfinished_requests():
                finished |= {output.request_id: output for output in self._engine.step() if output.finished}
        except BaseException as error:
            self._engine.abort_request(running, internal=True)
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            raise RolloutError(
                f"vLLM failed while it sampled rollouts ({type(error).__name__}: {first_line(error)}); {_ADVICE}"
            ) from error
        return finished

    def _inputs(self, prompt: Prompt, features: MediaFeatures, index: int) -> Any:
        """Return vLLM's form of a processed prompt: token ids, vision features and their places."""
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import (
            MultiModalFieldConfig,
            MultiModalFieldElem,
            MultiModalKwargsItem,
            MultiModalKwargsItems,
            PlaceholderRange,
        )

        ids = prompt.input_ids.tolist()
        # Prefixes are shared only within one call, and therefore only with the same weights.
        salt = f"call-{self._calls}"
        if not prompt.media:
            return tokens_input(ids, cache_salt=salt)
        items: dict[str, list] = {}
        hashes: dict[str, list] = {}
        ranges: dict[str, list] = {}
        spans = _media_spans(prompt)
        for medium, frames, (start, end) in zip(features.media_of(index), prompt.media, spans, strict=True):
            kind = frames.kind
            layers = [features.pooled[medium], *(layer[medium] for layer in features.deepstack)]
            # vLLM splits the features of the deepstack layers off again.
            embeds = torch.cat(layers, -1).to(self._dtype)
            flat = MultiModalFieldConfig.flat(kind, [slice(0, len(embeds))]).field
            single = MultiModalFieldConfig.batched(kind, keep_on_cpu=True).field
            fields = {
                f"{kind}_embeds": MultiModalFieldElem(data=embeds, field=flat),
                f"{kind}_grid_thw": MultiModalFieldElem(data=torch.tensor(frames.grid_thw), field=single),
            }
            is_embed = prompt.mm_token_type_ids[start:end] != 0
            items.setdefault(kind, []).append(MultiModalKwargsItem(fields))
            # Questions about one video share its features, which are then the same tensor.
            hashes.setdefault(kind, []).append(f"{salt}-{layers[0].data_ptr()}-{len(embeds)}")
            ranges.setdefault(kind, []).append(PlaceholderRange(start, end - start, is_embed=is_embed))
        return mm_input(ids, MultiModalKwargsItems(items), hashes, ranges, cache_salt=salt)

    def _check_prompt(self, prompt: Prompt, inputs: Any, sampling: Sampling) -> None:
        """Raise RolloutError if a prompt is too long, or if it or its response has other positions in vLLM."""
        from vllm.multimodal.inputs import MultiModalFeatureSpec

        name = f"question {prompt.question.id!r}"
        tokens = len(prompt.input_ids) + sampling.max_new_tokens
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
        if not torch.equal(positions, prompt.position_ids):
            raise RolloutError(f"{name}: expected the trainer's position ids in vLLM, got others; {_ADVICE}")
        # vLLM adds this difference to the index of each token of the response.
        first = len(prompt.input_ids) + delta
        if first != prompt.next_position:
            raise RolloutError(
                f"{name}: expected the response to begin at position {prompt.next_position} in vLLM, got {first}; "
                f"{_ADVICE}"
            )

    def _params(self, prompt: Prompt, sampling: Sampling, index: int) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        return SamplingParams(
            n=sampling.n,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # vLLM adds the index of the response.
            seed=_seed(sampling, prompt.question.id),
            # Two copies of a question have the same seeds, but may diverge by rounding.
            extra_args={PROMPT_INDEX: index},
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            stop_token_ids=[self.builder.eos_id],
            ignore_eos=True,
            detokenize=False,
        )

    def _rollouts(
        self,
        prompt: Prompt,
        prompt_index: int,
        output: Any,
        sampling: Sampling,
        corrections: dict[tuple[int, int, int], float],
        policy_version: int,
    ) -> list[Rollout]:
        """Return the rollouts of a prompt, after checking vLLM's output."""
        name = f"question {prompt.question.id!r}"
        if output.prompt_token_ids != prompt.input_ids.tolist():
            raise RolloutError(f"{name}: expected the trainer's prompt ids in vLLM, got others; {_ADVICE}")
        if len(output.outputs) != sampling.n:
            raise RolloutError(f"{name}: expected {sampling.n} rollouts, got {len(output.outputs)}; {_ADVICE}")
        group = []
        for index, completion in enumerate(sorted(output.outputs, key=lambda completion: completion.index)):
            ids, seed = list(completion.token_ids), _seed(sampling, prompt.question.id) + index
            steps = [corrections.get((prompt_index, seed, position)) for position in range(len(ids))]
            if not ids or completion.logprobs is None or len(completion.logprobs) != len(ids) or None in steps:
                raise RolloutError(
                    f"{name}: expected tokens with log-probs in rollout {index}, got {len(ids)} tokens and "
                    f"{len(completion.logprobs or ())} log-probs; {_ADVICE}"
                )
            logp = [chosen[i].logprob + step for i, chosen, step in zip(ids, completion.logprobs, steps, strict=True)]
            # Where the logits are not finite, the mask has chosen the end token.
            group.append(
                Rollout(
                    question_id=prompt.question.id,
                    index=index,
                    token_ids=torch.tensor(ids, dtype=torch.int64),
                    text=self.builder.decode_response(ids),
                    logp=torch.tensor(logp, dtype=torch.float32),
                    truncated=ids[-1] != self.builder.eos_id,
                    policy_version=policy_version,
                    banned_mass=-sum(math.expm1(step) for step in steps) / len(steps),
                )
            )
        return group


_ADVICE = "set rollout.engine=hf, and report this with the versions in run.json"


def _seed(sampling: Sampling, question_id: str) -> int:
    """Return the seed of a question's first rollout. The others have the following numbers."""
    name = f"{sampling.seed}/{sampling.step}/{question_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 2


def _media_spans(prompt: Prompt) -> Iterator[tuple[int, int]]:
    """Yield the first and the last place + 1 of each medium in the prompt.

    vLLM looks for the `<|vision_start|>` of a video's first frame, so that belongs to the video.
    """
    places = prompt.mm_token_type_ids.nonzero()[:, 0].tolist()
    done = 0
    for frames in prompt.media:
        tokens = math.prod(frames.grid_thw) // frames.preprocessor.merge_size**2
        yield places[done] - (frames.kind == "video"), places[done + tokens - 1] + 1
        done += tokens
