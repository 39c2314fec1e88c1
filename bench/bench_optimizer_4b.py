"""One optimiser step of a student of the shape of Qwen3-VL-4B by the trainer's own engine, on one GPU.

For bench_step_4b, where two full optimisers do not fit beside three models: it adds twice this time to its passes. A
process of its own, since the largest tensors of all are made here. DeepSpeed with AdamW: float32 master weights,
moments and gradients of as many decoder layers as fit with them, all 36 where 92 GB are there; `scaled`: the seconds of
all layers are those measured times their parameters over those measured. After real backwards; medians.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from bench import bench_step_4b
from bench.measure import quantiles
from bench.records import save
from bench.section_log import NO_TIME, seconds_left
from bench.student_4b import free_bytes, layers_that_fit, time_optimizer
from bench.sweep_4b import StepCase, attempt, is_apart
from rmsd_fast.runtime.process_group import World, start, stop

# With less, half of the layers: making the model and its engine, and compiling, take most of it.
SHORT_S = 22.0


def cases(quick: bool, device: str) -> list[StepCase]:
    return bench_step_4b.cases(True, device)[:1]


def toy_cases(device: str) -> list[StepCase]:
    return bench_step_4b.toy_cases(device)[-1:]


def measure_optimizer(case: StepCase, world: World) -> Iterator[dict]:
    """`time_optimizer` of as many layers as fit, fewer where that count was too hopeful or time is short.

    Raises: RuntimeError.
    """
    layers = layers_that_fit(case.sizes, case.room or free_bytes(world.device))
    if seconds_left() < SHORT_S:
        layers = max(1, layers // 2)
    while True:
        rest = time_optimizer(case.sizes, world, layers, 128 if case.toy else 512)
        found, reason, memory = attempt(partial(next, rest), partial(free_bytes, world.device))
        if not reason:
            yield found
            yield from rest
            return
        layers = layers * 3 // 4
        if not memory or not layers:
            raise RuntimeError(reason)


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.mark.timeout(300)
def test_optimizer(case: StepCase, world: World, request: pytest.FixtureRequest, capsys, quick: bool) -> None:
    if seconds_left() <= 0:
        pytest.skip(NO_TIME)
    if not is_apart(case, world.device):
        pytest.skip("the steps have their optimisers")
    for optimizer in measure_optimizer(case, world):
        with capsys.disabled():
            print(f"\noptimizer_4b {case.sizes.name}: {optimizer}", flush=True)
        own = {"rounds": optimizer["rounds"], "forward": quantiles([1e3 * optimizer["measured_s"]])}
        record = {"bench": "optimizer_4b", "case": case.sizes.name, "device": case.device, "quick": quick}
        record |= {"baseline": "one step", "variants": {"one step": own}, "optimizer": optimizer}
        if request.config.getoption("record"):
            save(record, request.config.getoption("record"))
