"""pytest plugin of bench.cuda: a JSON line per finished test as soon as it is known, and no test begun after a given
time. Without it what a stopped pytest has found would be lost.

Environment: RMSD_BENCH_LOG, the file that lines are appended to; RMSD_BENCH_UNTIL, unix time in seconds.
A line: {"test", "outcome": passed, failed or skipped, "seconds", "reason"}.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

NO_TIME = "no time left"


def seconds_left() -> float:
    """Until RMSD_BENCH_UNTIL; infinite without it."""
    until = os.environ.get("RMSD_BENCH_UNTIL")
    return float(until) - time.time() if until else float("inf")


def has_deadline() -> bool:
    return "RMSD_BENCH_UNTIL" in os.environ


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if seconds_left() <= 0:
        pytest.skip(NO_TIME)


def pytest_configure(config: pytest.Config) -> None:
    # Processes of pytest-xdist report to the one that started them.
    if os.environ.get("RMSD_BENCH_LOG") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Log(Path(os.environ["RMSD_BENCH_LOG"])))


class _Log:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that is skipped or fails before its call has none.
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            self._write(report.nodeid, report.outcome, report.duration, _reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._write(report.nodeid, report.outcome, 0.0, _reason(report))

    def _write(self, test: str, outcome: str, seconds: float, reason: str) -> None:
        line = {"test": test, "outcome": outcome, "seconds": round(seconds, 3), "reason": reason}
        with self.path.open("a") as out:
            out.write(json.dumps(line) + "\n")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """One line; empty for what passed."""
    found = report.longrepr
    if found is None:
        return ""
    if isinstance(found, tuple):
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    lines = (crash.message if crash else str(found)).strip().splitlines()
    # Of an error while collecting, the last line is the exception.
    return (lines[0] if crash else lines[-1])[:500] if lines else ""
