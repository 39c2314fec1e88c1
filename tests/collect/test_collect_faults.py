"""Collect from servers that fail in every way, and check that nothing is lost, doubled or asked more than necessary."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from collect_runs import answers, collect_plainly, collect_with_signals, expected, plain_questions
from teacher_server import RIGHT, Act, TeacherServer, completion, error

# At most as long as a line of the pool in these tests.
LINE_BYTES = 300


class Faulty:
    """30% 429, 10% 5xx, 5% hangs, 5% garbage, 5% short replies and 5% resets in the middle of a body."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.injected: Counter[str] = Counter()

    def __call__(self, request: dict, number: int) -> Act:
        n = request.get("n", 1)
        draw = self._random.random()
        limits = {"429": 0.30, "5xx": 0.40, "hang": 0.45, "garbage": 0.50, "short": 0.55, "reset": 0.60}
        fault = next((name for name, limit in limits.items() if draw < limit), "")
        whole = completion(*[RIGHT] * n)
        if fault == "short" and n == 1:
            return whole
        if fault:
            self.injected[fault] += 1
        match fault:
            case "429":
                return error(429, "slow down", retry_after_ms="5")
            case "5xx":
                return error(self._random.choice([500, 502, 503]), "bad", retry_after="0.005")
            case "hang":
                return Act(kind="hang")
            case "garbage":
                return Act(self._random.choice([b"<html><title>Oops</title>", b"{", b"", b"[1]", b'{"choices": 3}']))
            case "short":
                return completion(*[RIGHT] * self._random.randint(1, n - 1))
            case "reset":
                return Act(whole.body, kind="reset")
        return whole


def quick_retries(monkeypatch) -> None:
    monkeypatch.setattr("rmsd_fast.collect_run.client.FIRST_BACKOFF_S", 0.005)


@pytest.mark.parametrize("count", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_nothing_is_lost_or_doubled_under_faults(tmp_path, count, monkeypatch):
    quick_retries(monkeypatch)
    questions = plain_questions(tmp_path, count)
    script = Faulty(seed=1)
    out = tmp_path / "pool.jsonl"
    with TeacherServer(script, keep=False) as server:
        collection = collect_plainly(
            questions, [server.url], out, "collect.timeout_s=0.5", "collect.attempts=30", "collect.start_concurrency=32"
        )
    lines = out.read_text().splitlines()
    assert set(answers(out)) == expected(count) and len(lines) == 4 * count
    assert set(script.injected) == {"429", "5xx", "hang", "garbage", "short", "reset"}
    needed = count + script.injected.total()
    print(f"{server.count} requests, {needed} needed, faults {dict(script.injected)}")
    assert server.count <= 1.05 * needed
    assert collection.gave_up == 0 and threading.active_count() < 20


def forked(work: Callable[[], int]) -> int:
    """Do some work in a forked process, whose exit code it returns. Return the process id."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return child


def killed_collection(questions, url: str, out, size: int, delay_s: float) -> bool:
    """Collect in a forked process, and kill it some time after the pool has a size. Return whether it ended before."""
    settings = ["collect.start_concurrency=4"]
    child = forked(lambda: collect_plainly(questions, [url], out, *settings).gave_up)
    while not out.exists() or out.stat().st_size < size:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            assert done[1] == 0
            return True
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_collections_continue(tmp_path, kills):
    """Each restart keeps all complete lines, and the final pool is the same as without kills."""
    questions = plain_questions(tmp_path, 400)
    draw, out = random.Random(3), tmp_path / "pool.jsonl"
    before: list[str] = []

    def answer(request, number) -> Act:
        time.sleep(0.001)
        return completion(*[RIGHT] * request.get("n", 1))

    with TeacherServer(answer, keep=False) as server:
        for size in sorted(draw.uniform(0, 0.9 * 1600 * LINE_BYTES) for _ in range(kills)):
            ended = killed_collection(questions, server.url, out, size, draw.uniform(0, 0.01))
            assert not ended
            after = out.read_text().split("\n")[:-1] if out.exists() else []
            assert after[: len(before)] == before
            before = after
        collect_plainly(questions, [server.url], out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 1600 and {(line["id"], line["k"]) for line in lines} == expected(400)
    # Only the requests in flight at a kill are sent twice.
    assert server.count <= 400 + kills * 64


@pytest.mark.parametrize(("number", "twice"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_signals_wait_for_the_requests_in_flight(tmp_path, number, twice):
    questions, out = plain_questions(tmp_path, 100), tmp_path / "pool.jsonl"

    def slow(request, place) -> Act:
        # Every tenth request has to be sent again after a long pause, which a signal ends.
        if place % 10 == 9:
            return error(503, "later", retry_after="60")
        return replace(completion(*[RIGHT] * 4), delay_s=30.0 if twice else 0.3)

    def work() -> int:
        return collect_with_signals(questions, server.url, out, "collect.start_concurrency=4")

    with TeacherServer(slow, keep=False) as server:
        child = forked(work)
        while server.count < (4 if twice else 10):
            time.sleep(0.01)
        os.kill(child, number)
        if twice:
            time.sleep(0.2)
            os.kill(child, number)
        start = time.monotonic()
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == number
    assert time.monotonic() - start < 10
    # All replies are in the pool, and nothing more was requested.
    pool = answers(out) if out.exists() and out.stat().st_size else {}
    assert len(pool) == (0 if twice else 4 * (server.count - server.count // 10)) and server.count < 40
