"""Tensor parallelism: several processes hold one copy of the model in vLLM, and answer the same requests together.

Each process has an engine with a part of each large weight. The engines of a group run in lockstep: they get the same
requests in the same order and sample the same tokens, and vLLM adds up what they compute in each layer.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import gcd, prod
from typing import Any

import torch
import torch.distributed as dist

from rmsd_fast.config import SettingsError
from rmsd_fast.rollout.base import RolloutError, Sampling
from rmsd_fast.rollout.samples import Completion, Request, advice
from rmsd_fast.rollout.weights import group_sums, to_host, weight_group

# vLLM pads the vocabulary to a multiple of this number before it splits it.
VOCABULARY_MULTIPLE = 64


def check_split(config: Any, tensor_parallel: int, processes: int | None) -> None:
    """Raise SettingsError if vLLM cannot split a model among so many processes. The message has the possible numbers.

    Args:
        config: configuration of the model.
        tensor_parallel: `rollout.tensor_parallel`.
        processes: number of processes of the run; None = unknown.
    """
    text, vision = config.text_config, config.vision_config
    padded = -(-text.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    divisible = {
        "num_attention_heads": text.num_attention_heads,
        "intermediate_size": text.intermediate_size,
        f"vocab_size rounded up to a multiple of {VOCABULARY_MULTIPLE}": padded,
        "num_heads of vision_config": vision.num_heads,
        "intermediate_size of vision_config": vision.intermediate_size,
    }
    key_heads = text.num_key_value_heads

    def fault(processes: int) -> str:
        for name, size in divisible.items():
            if size % processes:
                return f"a divisor of {size}, {name} in config.json"
        if key_heads % processes and processes % key_heads:
            return f"a divisor or a multiple of {key_heads}, num_key_value_heads in config.json"
        return ""

    if expected := fault(tensor_parallel):
        sizes = [size for size, _ in _group_sizes(processes)] if processes else []
        smaller = (number for number in range(1, tensor_parallel) if not any(size % number for size in sizes))
        possible = [number for number in smaller if not fault(number)]
        raise SettingsError(
            f"rollout.tensor_parallel: expected {expected}, got {tensor_parallel}; set rollout.tensor_parallel="
            f"{' or '.join(map(str, possible))}"
        )


def check_groups(tensor_parallel: int, processes: int) -> None:
    """Raise SettingsError if the processes of a run cannot form groups of this size, each on one node.

    Args:
        tensor_parallel: `rollout.tensor_parallel`.
        processes: number of processes. torchrun gives that of each node to its processes.
    """
    for number, what in _group_sizes(processes):
        if number % tensor_parallel:
            raise SettingsError(
                f"rollout.tensor_parallel: expected a divisor of {number} ({what}), got {tensor_parallel}; set "
                f"rollout.tensor_parallel={gcd(number, tensor_parallel)}, or start a different number of processes"
            )


def _group_sizes(processes: int) -> list[tuple[int, str]]:
    """Return the numbers that groups must divide, and what they count."""
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return [(processes, "processes"), (of_node, "processes of a node")]


class TensorGroup:
    """The processes with consecutive ranks that hold one copy of the model.

    Create it after vLLM's engine, whose process groups it uses. All processes of the group call each method together.

    Args:
        size: number of processes, `rollout.tensor_parallel`.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        if size == 1:
            return
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        # Nothing uses this shared memory, and it would outlive a process that ends abruptly.
        group.mq_broadcaster = None
        self._rank, self._ranks = group.rank_in_group, group.ranks
        self._objects, self._tensors = group.cpu_group, group.device_group

    def _gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes of the group, which are pickled."""
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._objects)
        return values

    def gather(
        self, requests: list[tuple[Request, Sampling]], dtype: torch.dtype, device: torch.device
    ) -> tuple[list[tuple[Request, Sampling]], slice]:
        """Return the requests of all processes, in the order of the ranks, and the places of those of this process.

        The features of each medium are sent once, in `dtype`.
        """
        if self.size == 1:
            return requests, slice(0, len(requests))
        media = {medium.key: medium for request, _ in requests for medium in request.media}
        shapes = {
            key: (len(medium.layers[0]), sum(layer.shape[1] for layer in medium.layers))
            for key, medium in media.items()
        }
        described = [
            (replace(request, media=tuple(replace(medium, layers=()) for medium in request.media)), sampling)
            for request, sampling in requests
        ]
        every = self._gathered((described, shapes))
        gathered: list[tuple[Request, Sampling]] = []
        for rank, (of_rank, shapes_of_rank) in enumerate(every):
            sizes = [prod(shape) for shape in shapes_of_rank.values()]
            flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            if rank == self._rank:
                for part, medium in zip(flat.split(sizes), media.values(), strict=True):
                    part.copy_(medium.embeds(dtype).flatten())
            if sizes:
                dist.broadcast(flat, src=self._ranks[rank], group=self._tensors)
            parts = zip(shapes_of_rank.items(), flat.split(sizes), strict=True)
            features = {key: part.view(shape) for (key, shape), part in parts}
            gathered += [
                (replace(request, media=tuple(replace(m, layers=(features[m.key],)) for m in request.media)), sampling)
                for request, sampling in of_rank
            ]
        start = sum(len(of_rank) for of_rank, _ in every[: self._rank])
        return gathered, slice(start, start + len(requests))

    def check_equal(self, completions: Iterable[list[Completion]]) -> None:
        """Raise RolloutError if the processes have sampled different tokens."""
        if self.size == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        for completion in (completion for of_request in completions for completion in of_request):
            digest.update(f"{completion.token_ids.tolist()}".encode())
        if len(set(self._gathered(digest.digest()))) > 1:
            raise RolloutError(
                f"rollout.tensor_parallel={self.size}: expected the same tokens in all processes of a group, got "
                f"different ones; {advice(remedy='rollout.tensor_parallel=1')}"
            )

    def weight_sums(self, model: torch.nn.Module) -> dict[str, int]:
        """Return the sum of `bit_sum` over each group of the weights that the processes hold together.

        A weight that several processes have counts once. If its copies differ, the sum is wrong or cannot be computed.

        Raises:
            RolloutError: copies of a weight differ.
        """
        by_copies: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, part, copies in held_parts(model, self.size):
            by_copies.setdefault(copies, []).append((name, part))
        # Each copy counts equally, and each part `size` times.
        sums: dict[str, int] = {}
        for copies, named in by_copies.items():
            for group, value in to_host(group_sums(named)).items():
                sums[group] = sums.get(group, 0) + self.size // copies * value
        if self.size == 1:
            return sums
        every = self._gathered(sums)
        totals = {group: sum(of_rank[group] for of_rank in every) for group in sums}
        if uneven := [group for group, total in totals.items() if total % self.size]:
            raise RolloutError(
                f"weights in vLLM: expected equal copies of weights that are not split, in the {self.size} processes "
                f"of a group, got different ones in {', '.join(uneven)}; {advice()}"
            )
        return {group: total // self.size for group, total in totals.items()}


def held_parts(model: torch.nn.Module, processes: int) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield the weights of vLLM's language model that this process has, without padding of the vocabulary.

    Yields:
        The name, the part of the weight, and the number of processes that have the same part.
    """
    from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for name, param in model.named_parameters():
        if weight_group(name) == "vision":
            continue
        path, _, last = name.rpartition(".")
        layer = model.get_submodule(path)
        # vLLM can also keep a layer whole.
        copies = processes // getattr(layer, "tp_size", 1)
        if isinstance(layer, VocabParallelEmbedding):
            yield name, param[: layer.shard_indices.num_org_elements], copies
        elif isinstance(layer, QKVParallelLinear):
            # The heads of the keys and values may be fewer than the processes.
            rows = layer.num_heads * layer.head_size
            yield name, param[:rows], copies
            yield name, param[rows:], copies * layer.num_kv_head_replicas
        elif isinstance(layer, ColumnParallelLinear) or (isinstance(layer, RowParallelLinear) and last == "weight"):
            yield name, param, copies
        else:
            yield name, param, processes
