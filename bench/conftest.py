"""Options, cases and reporting of the benchmarks."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from bench.core.goals import CLAIM_CASES, GOALS
from bench.core.measure import Effort, Variant, main_time
from bench.core.memory import keep_freed_memory
from bench.core.records import save
from bench.core.report import case_text
from bench.cuda.section_log import has_deadline

QUICK = Effort(seconds=1.0, most_rounds=5, slow_s=3.0, gate_vocabulary=19072)
FULL = Effort(seconds=5.0, most_rounds=9, slow_s=15.0, always_rounds=7)
# On CUDA, calls take milliseconds.
ON_CUDA = Effort(seconds=1.5, most_rounds=20, slow_s=3.0, least_rounds=3, always_rounds=10)
TOY = Effort(seconds=0.1, most_rounds=2, slow_s=5.0, always_rounds=2)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes with the real vocabulary")
    parser.addoption("--toy", action="store_true", help="tiny shapes on any device: a rehearsal, no measurement")
    parser.addoption("--claims", action="store_true", help="run only CPU cases that have their own goal")
    parser.addoption(
        "--record",
        metavar="PLACE",
        type=Path,
        help="append each record to PLACE/<bench>.jsonl, or to PLACE itself if it ends in .jsonl; the newest "
        "record wins",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Applies to all variants, as if their buffers were preallocated.
    keep_freed_memory()
    # torch's own compiler imports a deprecated function of torch.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method:DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize `case` with the module's `cases(quick, device)`, or `toy_cases(device)` with --toy, and
    `condition_case` with its `conditions(quick, device)`.
    """
    name, toy = getattr(metafunc.module, "NAME", ""), metafunc.config.getoption("toy")
    for argument, function, suffix in (("case", "cases", ""), ("condition_case", "conditions", "-conditions")):
        if argument in metafunc.fixturenames:
            if toy:
                make = getattr(metafunc.module, "toy_cases", None)
                cases = make(device_name()) if make and argument == "case" else []
            else:
                cases = getattr(metafunc.module, function)(metafunc.config.getoption("quick"), device_name())
            if metafunc.config.getoption("claims"):
                cases = [case for case in cases if (getattr(case, "bench", name), case.name + suffix) in CLAIM_CASES]
            none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="no case for this device and size"))
            metafunc.parametrize(argument, cases or [none], ids=_id)


def _id(case: Any) -> str | None:
    """Return the name of a case and, where a file has several benchmarks, of its own."""
    name = getattr(case, "name", None)
    return f"{case.bench}-{name}" if hasattr(case, "bench") else name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """If the run has a deadline, run cases that have a goal first, because it may end before the others."""
    if has_deadline():
        promised = {(goal.bench, goal.case) for goal in GOALS if goal.device == device_name()}
        items.sort(key=lambda item: _case_of(item) not in promised and not getattr(item.module, "FIRST", False))


def _case_of(item: pytest.Item) -> tuple[str, str]:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return getattr(case, "bench", getattr(item.module, "NAME", "")), getattr(case, "name", "")


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> bool:
    """Whether this is a rehearsal."""
    return request.config.getoption("toy")


@pytest.fixture
def quick(request: pytest.FixtureRequest, toy: bool) -> bool:
    """Whether to use small shapes, whose records support no claims."""
    return request.config.getoption("quick") or toy


@pytest.fixture
def effort(request: pytest.FixtureRequest, toy: bool) -> Effort:
    if toy:
        return TOY
    if device_name() == "cuda":
        return ON_CUDA
    return QUICK if request.config.getoption("quick") else FULL


@pytest.fixture(autouse=True)
def _free() -> None:
    """Free the previous case's tensors, and the compiled graphs that hold some of them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def publish(request: pytest.FixtureRequest, capsys, quick: bool) -> Callable[[dict], dict]:
    """Return a function that prints and saves a record, and returns it as saved."""

    def run(record: dict) -> dict:
        record = {**record, "quick": quick}
        with capsys.disabled():
            print("\n" + case_text(record), flush=True)
        if request.config.getoption("record"):
            save(record, request.config.getoption("record"))
        return record

    return run


@pytest.fixture
def report(benchmark, publish: Callable[[dict], dict], quick: bool) -> Callable[[dict, Variant], None]:
    """Return a function that publishes a record, then lets pytest-benchmark repeat our call for its own JSON."""

    def run(record: dict, ours: Variant) -> None:
        benchmark.extra_info.update(publish(record))
        device = torch.device(record["device"])

        def call() -> None:
            ours()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        seconds = main_time(record["variants"][record["baseline"]]) / 1e3
        benchmark.pedantic(call, rounds=max(1, min(5, int((1.0 if quick else 3.0) / seconds))))

    return run
