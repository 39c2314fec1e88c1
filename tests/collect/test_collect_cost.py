"""Measure the collector's own cost: CPU time per reply with 64 requests in flight, and memory over many questions."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from collect_runs import collect_plainly, plain_questions
from teacher_server import RIGHT, TeacherServer, completion

# An answer of usual length.
LONG = RIGHT.replace("I look at it.", "The person takes a cup from the table and pours white liquid into it. " * 12)
IN_FLIGHT = ["collect.start_concurrency=64", "collect.max_concurrency=64"]


@contextmanager
def server_process(text: str, delay_s: float):
    """Run a server in a process of its own, so that its CPU time is not counted. Yield its URL."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        act = completion(text, text, text, text)
        act.delay_s = delay_s
        with TeacherServer(lambda request, number: act, keep=False) as server:
            os.write(writing, server.url.encode())
            signal.pause()
    try:
        yield os.read(reading, 100).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_cpu_time_per_reply(tmp_path):
    questions = plain_questions(tmp_path, 1000)
    with server_process(LONG, delay_s=0.1) as url:
        # The first replies also import modules.
        collect_plainly(questions[:64], [url], tmp_path / "first.jsonl", *IN_FLIGHT)
        start_s = time.process_time()
        collect_plainly(questions, [url], tmp_path / "pool.jsonl", *IN_FLIGHT)
        each_ms = 1000 * (time.process_time() - start_s) / len(questions)
    print(f"{each_ms:.2f} ms of CPU time per reply with 4 answers")
    # 0.8 ms for HTTP, 0.1 ms for each answer. The machine of a test may be slow.
    assert each_ms < 2 * 2


@pytest.mark.slow
def test_memory_is_flat(tmp_path):
    """Requests and replies do not accumulate: only the index of the pool grows, by some 200 bytes for each answer."""
    questions, out = plain_questions(tmp_path, 5_000), tmp_path / "pool.jsonl"
    sizes: list[tuple[int, float]] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            sizes.append((out.stat().st_size if out.exists() else 0, resident_mib()))

    thread = threading.Thread(target=watch)
    with server_process(LONG, delay_s=0.0) as url:
        thread.start()
        collect_plainly(questions, [url], out, *IN_FLIGHT)
        ended.set()
        thread.join()
    whole = out.stat().st_size
    assert whole > 2 * 10 * 2**20
    shown = [next(mib for size, mib in sizes if size >= share * whole) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    print(f"MiB at 10, 30, 50, 70 and 90% of {whole / 2**20:.0f} MiB:", [round(mib) for mib in shown])
    # All texts together are more than twice this size.
    assert shown[-1] < shown[0] + 10


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
