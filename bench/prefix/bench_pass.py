"""One training pass of the policy over one group, with the prompt processed once or copied for each of M responses.

- `shared M=…`: a packed row with prompt and video once (as in the trainer).
- `padded M=12`: a row `[prompt | response]` for each response; the video is encoded once (packing=padded).
- `copies M=12`: the same rows; the video is encoded for each, as in trainers whose batch is a list of samples.

A pass is the frozen vision tower, a forward with the fused cross entropy on all response tokens, and a backward into
every parameter of the language model. Gradients of the other variants are compared with ours in the timed shape.
`predicted_s` is the time for the FLOPs of `bench.step.flops` at the rates that the same process measures (`rates`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.core.measure import Variant, differences_of, facts_of, measure, numbers_of
from bench.prefix.groups import HIDDEN, LAYERS, Case, load, make_builder, make_prompt, make_responses, media_each
from bench.step.flops import PASS_FLOPS, Load
from bench.step.rates import predicted_seconds, rates
from rmsd_fast.data.packing import make_rows
from rmsd_fast.losses import linear_cross_entropy
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.shared_prefix import enable_shared_prefix
from rmsd_fast.models.students import encode_media, freeze

NAME = "shared_prefix"

BASE = "shared M=12"
WAYS = (("shared", 12), ("padded", 12), ("copies", 12), ("shared", 9), ("shared", 1), ("copies", 1))


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        # With a student this small, a GPU would be launch-bound. On GPUs use bench_attention and bench_step.
        return []
    sizes = [(512, 64)] if quick else [(1024, 64), (1024, 128), (2048, 64), (2048, 128), (2048, 256), (4096, 128)]
    return [Case(prefix, response) for prefix, response in sizes]


def make_variant(way: str, m: int, case: Case) -> tuple[Variant, Load, object]:
    """Return the variant, its load and its model's config. All variants share weights, prompt and responses."""
    student = load(HIDDEN, LAYERS, case.dtype, case.device)
    freeze(student.model, train_vision=False)
    builder = make_builder(student)
    prompt = make_prompt(builder, case.prefix, 0)
    responses = make_responses(builder, 12, case.response, seed=1)[:m]
    policy = Policy(student.model)
    if way == "shared":
        enable_shared_prefix(student.model)
    rows = make_rows("shared" if way == "shared" else "padded", [prompt], [responses], pad_id=0)
    prompts, encode = [prompt], encode_media
    if way == "copies":
        prompts, rows, encode = [prompt] * m, media_each(rows), partial(encode_media, distinct=False)
    rows = rows.to(case.device)
    wanted = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    head = partial(linear_cross_entropy, normalizer=m * case.response, ignore_index=None)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            features = encode(student.model, prompts)
        return policy(prompts, rows, features, head)

    variant = Variant(f"{way} M={m}", forward, lambda loss: torch.autograd.grad(loss, wanted))
    read = Load(len(prompt.input_ids), [case.response] * m, [frames.grid_thw for frames in prompt.media])
    return variant, read, student.model.config


@pytest.mark.timeout(1800)
def test_shared_prefix(case: Case, effort, report) -> None:
    made = [make_variant(way, m, case) for way, m in WAYS]
    variants, config = [variant for variant, _, _ in made], made[0][2]
    device = torch.device(case.device)
    # Copies of long prompts are slow, but they are the baseline, so they always get two rounds.
    samples = measure(variants, replace(effort, slow_s=120.0), device, base=BASE)
    rate = rates(config, case.prefix, getattr(torch, case.dtype), device)
    numbers = numbers_of(samples, variants, baseline=None)
    for (way, _), (variant, read, _) in zip(WAYS, made, strict=True):
        flops = PASS_FLOPS[way](config, [read], backward=True)
        numbers[variant.name] |= {"predicted_s": predicted_seconds(flops, rate), "flop": flops.total}
    differences = differences_of(samples)
    for way in ("padded M=12", "copies M=12"):
        worst = max(differences[way].values())
        assert worst < (1e-3 if case.dtype == "float32" else 5e-2), (
            f"{way}: gradients differ by {worst:.1e} of their norm"
        )
    shape = {"P": made[0][1].prefix, "R": case.response, "D": HIDDEN, "layers": LAYERS}
    record = facts_of(NAME, case, shape, BASE) | {"rates": rate, "variants": numbers}
    record["differences"] = {name: max(own.values()) for name, own in differences.items() if "M=12" in name}
    report(record, variants[0])
