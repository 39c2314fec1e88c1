"""One optimizer step of a student of the shape of Qwen3-VL-4B by the trainer's own engine, on one GPU.

For bench_step.py, where two full optimizers do not fit beside three models: twice this time is added to the steps that
are recorded without. A process of its own, since the largest tensors of all are made here. DeepSpeed with AdamW:
float32 master weights, moments and gradients of as many decoder layers as fit with them, all 36 if 92 GB are there;
`scaled`: the seconds of all layers are those measured times their parameters over those measured. Medians, after real
backwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import pytest
import torch

from bench.core.measure import quantiles
from bench.core.records import load_run, save
from bench.cuda.section_log import NO_TIME, seconds_left
from bench.prefix.groups import make_prompt, make_responses
from bench.step import bench_step, models
from bench.step.sweep import attempt, is_apart
from bench.step.way import StepCase
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.packing import pack
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.losses import linear_logprob
from rmsd_fast.models.students import encode_media
from rmsd_fast.stages.build import make_engine, make_policy
from rmsd_fast.stages.state import apply_or_discard

NAME = "optimizer"
# With less, half of the layers: making the model and its engine, and compiling, take most of it.
SHORT_S = 22.0


def cases(quick: bool, device: str) -> list[StepCase]:
    return bench_step.cases(True, device)[:1] if device == "cuda" else []


def toy_cases(device: str) -> list[StepCase]:
    return bench_step.toy_cases(device)[-1:]


def time_optimizer(sizes: models.Sizes, world: models.World, layers: int, prefix: int, rounds: int = 3) -> dict:
    """Return the seconds of an optimizer step of one full model of so many layers, after real backwards.

    `seconds` is scaled to all layers by parameters. The device has to be empty.
    """
    settings = models.settings_of(sizes, "shared", 2 * prefix, 32, 1, 2)
    student = models.make_student(sizes, settings, world, layers)
    builder, policy = PromptBuilder(student, VideoConfig()), make_policy(student, settings, train_vision=False)
    prompts = [make_prompt(builder, prefix, 0)]
    rows = pack(prompts, [make_responses(builder, 2, 32, seed=1)]).to(world.device)
    with torch.no_grad():
        features = encode_media(student.model, prompts)
    trained, counts = sum(p.numel() for p in policy.parameters() if p.requires_grad), models.counts_of(sizes)
    engine, times = make_engine(policy, settings, world, 0.0), []
    try:
        for _ in range(1 + rounds):
            loss = -engine(prompts, rows, features, partial(linear_logprob, ignore_index=None)).mean()
            engine.backward(loss, last=True)
            models.synchronize(world.device)
            began = time.perf_counter()
            _, skipped = apply_or_discard([engine])
            models.synchronize(world.device)
            times.append(time.perf_counter() - began)
            assert not skipped
    finally:
        engine.close()
    # The first makes the moments, and compiles kernels.
    measured = median(times[1:])
    facts = {"layers": layers, "parameters": trained, "rounds": rounds, "scaled": trained != counts.trained}
    return {"seconds": measured * counts.trained / trained, "measured_s": measured, **facts}


def measure_optimizer(case: StepCase, world: models.World) -> dict:
    """Run `time_optimizer` with as many layers as fit, fewer if they do not fit after all or time is short.

    Raises: RuntimeError.
    """
    layers = models.layers_that_fit(case.sizes, case.room or models.free_bytes(world.device))
    if seconds_left() < SHORT_S:
        layers = max(1, layers // 2)
    while True:
        one = partial(time_optimizer, case.sizes, world, layers, min(512, case.prefix))
        found, reason, memory = attempt(one, partial(models.free_bytes, world.device))
        if not reason:
            return found
        layers = layers * 3 // 4
        if not memory or not layers:
            raise RuntimeError(reason)


@pytest.fixture(scope="module")
def world():
    yield models.start()
    models.stop()


@pytest.mark.timeout(300)
def test_optimizer(
    case: StepCase, world: models.World, publish: Callable[[dict], dict], request: pytest.FixtureRequest, quick: bool
) -> None:
    if seconds_left() <= 0:
        pytest.skip(NO_TIME)
    if not is_apart(case, world.device):
        pytest.skip("the steps have their optimizers")
    place = request.config.getoption("record")
    # Steps of this run that were measured before.
    steps = load_run(place) if place is not None and place.suffix == ".jsonl" else []
    steps = list(filter(bench_step.lacks_optimizer, steps))
    optimizer = measure_optimizer(case, world)
    own = {"rounds": optimizer["rounds"], "forward": quantiles([1e3 * optimizer["measured_s"]])}
    record = {"bench": NAME, "case": case.sizes.name, "device": case.device, "quick": quick}
    publish(record | {"baseline": "one step", "variants": {"one step": own}, "optimizer": optimizer})
    for step in steps:
        save(bench_step.with_optimizer(step, optimizer), place)
