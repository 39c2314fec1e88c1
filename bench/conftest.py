"""Options, device and reporting of the benchmarks. What is measured and how stands in measure.py and memory.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from bench.claims import CLAIM_CASES
from bench.heads import Outcome
from bench.measure import Effort
from bench.memory import keep_freed_memory
from bench.records import save, table

QUICK = Effort(seconds=1.0, most_rounds=5, slow_s=3.0, limit_s=10.0, gate_vocabulary=19072)
FULL = Effort(seconds=5.0, most_rounds=9, slow_s=15.0, limit_s=60.0, always_rounds=7)
# Calls take milliseconds there.
ON_CUDA = Effort(seconds=1.5, most_rounds=20, slow_s=3.0, limit_s=60.0, least_rounds=3, always_rounds=10)
TOY = Effort(seconds=0.1, most_rounds=2, slow_s=5.0, limit_s=5.0, always_rounds=2)
# pytest-benchmark repeats our call, for its own JSON and comparison, about so long.
PEDANTIC_S = {True: 1.0, False: 3.0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes with the real vocabulary")
    parser.addoption("--toy", action="store_true", help="tiny shapes on any device: a rehearsal, no measurement")
    parser.addoption("--claims", action="store_true", help="only the cases whose numbers claims.py judges")
    parser.addoption(
        "--record",
        metavar="PLACE",
        type=Path,
        help="append each record to PLACE/<bench>.jsonl, or to PLACE where it is a .jsonl file; the newest counts",
    )


def pytest_configure(config: pytest.Config) -> None:
    # For all variants alike, as if each had its buffers allocated beforehand.
    keep_freed_memory()
    # torch's own compiler imports what torch deprecates.
    config.addinivalue_line("filterwarnings", "ignore:.torch.jit.script_method:DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`cases(quick, device)` of the bench file gives the cases of every test that asks for one, with --toy
    `toy_cases(device)`.
    """
    bench, toy = metafunc.module.__name__.rpartition("bench_")[2], metafunc.config.getoption("toy")
    for argument, function, suffix in (("case", "cases", ""), ("condition_case", "conditions", "-conditions")):
        if argument in metafunc.fixturenames:
            if toy:
                make = getattr(metafunc.module, "toy_cases", None)
                cases = make(device_name()) if make and argument == "case" else []
            else:
                cases = getattr(metafunc.module, function)(metafunc.config.getoption("quick"), device_name())
            if metafunc.config.getoption("claims"):
                cases = [case for case in cases if (bench, case.name + suffix) in CLAIM_CASES]
            none = pytest.param(None, id="none", marks=pytest.mark.skip(reason="no case for this device and size"))
            metafunc.parametrize(argument, cases or [none], ids=lambda case: getattr(case, "name", None))


def device_name() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def toy(request: pytest.FixtureRequest) -> bool:
    """A rehearsal."""
    return request.config.getoption("toy")


@pytest.fixture
def quick(request: pytest.FixtureRequest, toy: bool) -> bool:
    """Small shapes, whose records make no claims."""
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
    """Tensors of the case before are gone, and compiled graphs that hold some."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    gc.collect()


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark, capsys, quick: bool) -> Callable[[Outcome], None]:
    """Prints and saves the record, then lets pytest-benchmark time our call for its own JSON."""

    def run(outcome: Outcome) -> None:
        record = {**outcome.record, "quick": quick}
        with capsys.disabled():
            print(table(record), flush=True)
        if request.config.getoption("record"):
            save(record, request.config.getoption("record"))
        benchmark.extra_info.update(record)
        rounds = max(1, min(5, int(PEDANTIC_S[quick] / max(outcome.seconds, 1e-6))))
        device = torch.device(record["device"])

        def call() -> None:
            outcome.ours()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.pedantic(call, rounds=rounds)

    return run
