"""Sampling N responses to one prompt: the `hf` engine on a shared prefix against generate() of transformers.

- `ours`: HfRollout as in a run; on CUDA with graphs, and `ours, eager` without.
- `generate`: `model.generate(num_return_sequences=N)`, in which each sequence has its own copy of the prompt's K/V.
- `vllm`: the engine of a run with rollout.engine=vllm, where vLLM is installed. `vllm, weights` sends it all weights.
- `…, first token`: the same call for one token, which is the prefill. The difference is the decoding.

Model, prompt, temperature and banned ids are the same, and no response ends early. The prompt is text, because plain
generate would also encode a video N times, which is not what is compared here. Ours and vLLM also return the log-prob
of each token. Tokens per second count new tokens only, and the time of the whole call.

Before timing, all decode greedily in float32 with the small student, on a prompt of the case's length, and must give
equal tokens; on CUDA with and without graphs. `launches_per_token` counts the operations that a decode step runs: on
CPU those that compute or copy, each of which would launch at least one kernel; on CUDA the launches of the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig

from bench.core.measure import OURS, Effort, Unavailable, Variant, facts_of, main_time, measure, numbers_of
from bench.prefix.groups import HIDDEN, LAYERS, load, make_builder
from bench.rollout.vllm_way import VllmWay
from bench.step.models import CONFIG_4B, CONFIG_TOY, SMALL, Sizes, World, make_student, settings_of
from rmsd_fast.data.prompts import Prompt, PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.models.students import Student
from rmsd_fast.rollout.base import Sampling
from rmsd_fast.rollout.copied import CopyRollout
from rmsd_fast.rollout.hf import HfRollout

NAME = "rollout"

EAGER_STEPS, GENERATE, VLLM, FIRST, WEIGHTS = "ours, eager", "generate", "vllm", "first token", "weights"
NEW_TOKENS = 64
_COUNTED_TOKENS = (2, 6)
# Operations of torch that only describe memory, or allocate it.
_NO_KERNEL = frozenset(
    f"aten::{name}"
    for name in (
        *("view", "as_strided", "_unsafe_view", "_reshape_alias", "alias", "detach", "detach_", "expand", "transpose"),
        *("slice", "select", "unsqueeze", "squeeze", "permute", "t", "numpy_T", "unfold", "split", "lift_fresh"),
        *("empty", "empty_strided", "empty_like", "resize_", "set_", "resolve_conj", "resolve_neg", "result_type"),
        *("_local_scalar_dense", "is_nonzero", "item", "can_cast", "unbind", "narrow", "chunk", "split_with_sizes"),
    )
)
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")


@dataclass(frozen=True)
class Case:
    """N responses of `response` new tokens to a prompt of `prefix` tokens."""

    prefix: int
    count: int
    response: int = NEW_TOKENS
    dtype: str = "float32"
    device: str = "cpu"
    sizes: Sizes = SMALL

    @property
    def name(self) -> str:
        return f"P{self.prefix}-N{self.count}-R{self.response}-{self.dtype}"


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        # A smaller student would only show the host's time.
        shapes = ((2048, 8),) if quick else ((2048, 8), (8192, 8))
        return [Case(*shape, dtype="bfloat16", device=device, sizes=CONFIG_4B) for shape in shapes]
    shapes = ((512, 4),) if quick else tuple((p, n) for p in (512, 2048) for n in (4, 8, 16))
    return [Case(*shape) for shape in shapes]


def toy_cases(device: str) -> list[Case]:
    return [Case(64, 2, 6, "bfloat16", device, CONFIG_TOY)]


def make_prompt(builder: PromptBuilder, tokens: int) -> Prompt:
    """Random plain tokens."""
    banned = {*builder.banned_ids.tolist(), builder.eos_id}
    allowed = torch.tensor([i for i in range(len(builder.tokenizer)) if i not in banned])
    ids = allowed[torch.randint(len(allowed), (tokens,), generator=torch.Generator().manual_seed(tokens))]
    positions = torch.arange(tokens).expand(3, -1)
    return Prompt(Question("text", "", "open"), ids, torch.zeros_like(ids), positions, ())


class Rig:
    """A student, a prompt, and all ways to sample responses of exactly so many tokens."""

    def __init__(self, student: Student, prefix: int, device: torch.device):
        self.student, self.model, self.prefix, self.device = student, student.model.eval(), prefix, device
        self.builder = make_builder(student)
        self.prompt = make_prompt(self.builder, prefix)
        self.banned = torch.cat([self.builder.banned_ids, torch.tensor([self.builder.eos_id])])

    def ours(self, sampling: Sampling, *, cuda_graphs: bool = True) -> Tensor:
        """Return the sampled ids, [N, R]."""
        engine = HfRollout(self.builder, prompts_per_batch=1, device=self.device, cuda_graphs=cuda_graphs)
        engine.banned_ids = self.banned.to(self.device)
        return self._ids_of(engine, sampling)

    def vllm(self, sampling: Sampling) -> Tensor:
        """Return the sampled ids, [N, R]."""
        return self._ids_of(self.vllm_way.engine, sampling)

    def start_vllm(self, *, response: int, sequences: int) -> None:
        """Start vLLM, for responses of so many tokens. Raises: Unavailable."""
        self.vllm_way = VllmWay(
            self.student, self.builder, self.banned, max_tokens=self.prefix + response, sequences=sequences
        )

    def send_weights(self) -> Tensor:
        """Send all weights to vLLM."""
        self.vllm_way.send_weights()
        return torch.zeros(())

    def _ids_of(self, engine: HfRollout | CopyRollout, sampling: Sampling) -> Tensor:
        (group,) = engine.generate(self.model, [self.prompt], sampling)
        return torch.stack([rollout.token_ids for rollout in group])

    def generate(self, sampling: Sampling) -> Tensor:
        """Return the sampled ids, [N, R]."""
        sampled = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        config = GenerationConfig(
            **(sampled if sampling.temperature else {"do_sample": False}),
            num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_new_tokens,
            suppress_tokens=self.banned.tolist(),
            eos_token_id=None,
            pad_token_id=self.builder.eos_id,
        )
        ids = self.prompt.input_ids[None].to(self.device)
        types = self.prompt.mm_token_type_ids[None].to(self.device)
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, generation_config=config
        )
        return out[:, ids.shape[1] :].cpu()


def make_rig(case: Case) -> Rig:
    device = torch.device(case.device)
    if case.sizes is SMALL:
        student = load(HIDDEN, LAYERS, case.dtype, case.device)
    else:
        settings = settings_of(case.sizes, "padded", case.prefix, case.response, 1, case.count)
        student = make_student(case.sizes, settings, World(0, 1, 0, device))
    return Rig(student, case.prefix, device)


@functools.cache
def gate(prefix: int, response: int, device: str) -> int:
    """Return the number of greedy tokens that all ways agree on. AssertionError: they differ."""
    rig = Rig(load(HIDDEN, LAYERS, "float32", device), prefix, torch.device(device))
    greedy = Sampling(1, 0.0, response)
    expected = rig.generate(greedy)
    assert expected.shape == (1, response)
    ways = [rig.ours(greedy)] + ([rig.ours(greedy, cuda_graphs=False)] if device == "cuda" else [])
    with suppress(Unavailable):
        rig.start_vllm(response=response, sequences=1)
        ways.append(rig.vllm(greedy))
    for ids in ways:
        assert torch.equal(ids, expected), f"greedy tokens differ: {ids.tolist()}, generate {expected.tolist()}"
    return response


def launches_per_token(run: Callable[[int], object], device: torch.device) -> float | None:
    """Return the operations (on CPU) or launches (on CUDA) that a further token takes. None: the profiler fails."""
    counts = []
    for tokens in _COUNTED_TOKENS:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        try:
            with profile(activities=activities) as session:
                run(tokens)
            events = session.events()
        except RuntimeError:
            return None
        if device.type == "cuda":
            counts.append(sum(event.name.startswith(_LAUNCHES) for event in events))
        else:
            counts.append(sum(_operations(event) for event in events if event.cpu_parent is None))
    fewer, more = _COUNTED_TOKENS
    return (counts[1] - counts[0]) / (more - fewer)


def _operations(event) -> int:
    """Return the operations inside an event that compute or copy, or 1 if it is such an operation itself."""
    inside = sum(map(_operations, event.cpu_children))
    return inside or int(event.name.startswith("aten::") and event.name not in _NO_KERNEL)


@torch.no_grad()
def measure_rollout(case: Case, effort: Effort) -> dict[str, object]:
    """Measure what the record of a case says beside its shape."""
    device, rig = torch.device(case.device), make_rig(case)
    agreed = gate(case.prefix, case.response, case.device)
    seeds = iter(range(1 << 30))

    def sampling(tokens: int) -> Sampling:
        return Sampling(case.count, 1.0, tokens, seed=next(seeds))

    ways = {OURS: rig.ours, GENERATE: rig.generate}
    if case.device == "cuda":
        ways[EAGER_STEPS] = functools.partial(rig.ours, cuda_graphs=False)
    not_run: dict[str, str] = {}
    try:
        rig.start_vllm(response=case.response, sequences=case.count)
        ways[VLLM] = rig.vllm
    except Unavailable as reason:
        not_run[VLLM] = str(reason)

    def variant(name: str, way: Callable[[Sampling], Tensor], tokens: int) -> Variant:
        def forward() -> Tensor:
            ids = way(sampling(tokens))
            assert ids.shape == (case.count, tokens), f"{name}: expected {case.count} x {tokens}, got {ids.shape}"
            return torch.tensor(float(ids.numel()))

        return Variant(name, forward)

    variants = [variant(name, way, case.response) for name, way in ways.items()]
    variants += [variant(f"{name}, {FIRST}", ways[name], 1) for name in ways if name != EAGER_STEPS]
    if VLLM in ways:
        variants.append(Variant(f"{VLLM}, {WEIGHTS}", rig.send_weights))
    # A call takes seconds, and plain generate is what the goal is against, so it gets as many rounds.
    samples = measure(variants, replace(effort, least_rounds=effort.always_rounds, slow_s=120.0), device)
    numbers = numbers_of(samples, variants, baseline=None)
    for name in ways:
        own, first = numbers[name], numbers[f"{OURS if name == EAGER_STEPS else name}, {FIRST}"]
        own["tokens_per_s"] = case.count * case.response / main_time(own) * 1e3
        own["decode_ms_per_token"] = (main_time(own) - main_time(first)) / (case.response - 1)
        own["launches_per_token"] = launches_per_token(lambda tokens, way=ways[name]: way(sampling(tokens)), device)
    # The machine may slow down between two rounds, so the claim rests on their ratios too.
    of_rounds = {name: samples[name].timings for name in ways}
    shared = sorted(set.intersection(*(set(timings) for timings in of_rounds.values())))
    for name in ways:
        ratios = [of_rounds[name][i].total_ms / of_rounds[OURS][i].total_ms for i in shared]
        numbers[name]["times_ours_by_round"] = median(ratios) if ratios else None
    return {"variants": numbers, "greedy_tokens_equal": agreed, "not_run": not_run}


@pytest.mark.timeout(1800)
def test_rollout(case: Case, effort: Effort, publish) -> None:
    text = {"P": case.prefix, "N": case.count, "R": case.response}
    publish(facts_of(NAME, case, text) | {"student": case.sizes.name} | measure_rollout(case, effort))
