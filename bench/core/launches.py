"""What a CUDA device does during a call: kernels by name, and device times that exclude the host.

This works around two profiler quirks. A session may silently lose its first kernels (pytorch issue 192021), so each
session starts with dummy marker kernels, calls are delimited by markers, and they are counted from the end. The
profiler also lists synchronizations and events as if they ran on the device; these are left out.

Before each call, a marker keeps the device busy so that the host gets ahead of it (see measure.time_once).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

from bench.core.measure import AHEAD_CYCLES, Timing, Unavailable, Variant, time_once

_SWEEP_BYTES = 256 << 20
# torch.cuda._sleep launches a kernel of this name.
_MARKER = "spin_kernel"
# Each further session in a process can lose one more kernel.
_LOST_AT_MOST, _CALLS = 128, 3
_NAME_LENGTH = 160
LEAST_CALLS = 20
_NO_WORK = ("Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event", "Event Record")
COUNTED = "torch.profiler"


class Event(NamedTuple):
    """One kernel, copy or fill on the device; times in µs."""

    name: str
    start: float
    end: float

    @property
    def us(self) -> float:
        return self.end - self.start

    @property
    def is_copy(self) -> bool:
        return self.name.startswith(("Memcpy", "Memset"))


def facts_of_call(timeline: Sequence[Event]) -> dict[str, Any]:
    """Return what a record says about the events of one call, in order.

    count: kernel launches; device_us: the time of all kernels and copies; span_us: from the first start to the last
    end; kernels, slowest first, and copies: {name: (launches, µs)}.
    """
    by_name: dict[bool, dict[str, list[float]]] = {False: defaultdict(list), True: defaultdict(list)}
    for event in timeline:
        by_name[event.is_copy][event.name[:_NAME_LENGTH]].append(event.us)
    kernels, copies = ({name: (len(us), sum(us)) for name, us in own.items()} for own in by_name.values())
    found = {"count": sum(number for number, _ in kernels.values()), "device_us": sum(event.us for event in timeline)}
    found["span_us"] = max(event.end for event in timeline) - timeline[0].start
    found["kernels"] = dict(sorted(kernels.items(), key=lambda item: -item[1][1]))
    return found | ({"copies": copies} if copies else {})


def count_launches(run: Callable[[], object], device: torch.device) -> list[Event] | None:
    """Warm up `run` and return the events of one call with cold caches, or None on CPU.

    Raises:
        Unavailable: the profiler does not work here; the message is the reason.
    """
    if device.type != "cuda":
        return None
    if ProfilerActivity.CUDA not in supported_activities():
        raise Unavailable("torch.profiler does not support CUDA activities here: CUPTI is missing")
    run()
    sweep = sweeper(device)
    torch.cuda.synchronize(device)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as session:
            for _ in range(_LOST_AT_MOST):
                torch.cuda._sleep(1)
            for _ in range(_CALLS):
                sweep()
                torch.cuda._sleep(AHEAD_CYCLES)
                run()
                torch.cuda._sleep(1)
            torch.cuda.synchronize(device)
        events = device_events(session.events())
    except RuntimeError as error:
        raise Unavailable(f"torch.profiler fails: {str(error).splitlines()[0][:200]}") from error
    return typical(calls_of(events))


def device_events(events: Iterable[Any]) -> list[Event]:
    """Return what ran on the device, in order, from the events of a session.

    Since torch 2.13, each event has an `activity_type`.
    """
    found = []
    for event in events:
        kind = getattr(event, "activity_type", None)
        if event.device_type != DeviceType.CUDA or event.name in _NO_WORK or event.is_user_annotation:
            continue
        if kind and not any(word in kind for word in ("kernel", "memcpy", "memset")):
            continue
        found.append(Event(event.name, event.time_range.start, event.time_range.end))
    return sorted(found, key=lambda event: event.start)


def calls_of(events: Sequence[Event]) -> list[list[Event]]:
    """Return the calls of a session, last first. Each is preceded by one sweep kernel and then a marker.

    Raises:
        Unavailable: if markers are missing or do not separate calls from sweeps.
    """
    marks = [place for place, event in enumerate(events) if _MARKER in event.name]
    between = [list(events[a + 1 : b]) for a, b in zip(marks, marks[1:], strict=False)][::-1]
    calls, sweeps = between[0 : 2 * _CALLS : 2], between[1 : 2 * _CALLS - 2 : 2]
    if len(calls) < _CALLS or any(len(sweep) != 1 for sweep in sweeps) or not all(calls):
        raise Unavailable(f"torch.profiler lost kernels: {len(events)} events, {len(marks)} markers")
    return calls


def typical(calls: list[list[Event]]) -> list[Event]:
    """Return the call with the median time among those with the most common number of launches."""
    usual, _ = Counter(map(len, calls)).most_common(1)[0]
    same = sorted((call for call in calls if len(call) == usual), key=lambda call: sum(event.us for event in call))
    return same[len(same) // 2]


def launches_of(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, object]:
    """Return the record fields `launches` (one entry per run) and `profiler` (their source, or why there are none)."""
    found: dict[str, dict] = {}
    try:
        for name, run in runs.items():
            own = count_launches(run, device)
            if own is None:
                return {"launches": {}, "profiler": "launches are counted on CUDA only"}
            found[name] = facts_of_call(own)
    except Unavailable as reason:
        return {"launches": found, "profiler": str(reason)}
    return {"launches": found, "profiler": COUNTED}


def sweeper(device: torch.device) -> Callable[[], object]:
    """Return a function that writes a buffer larger than a GPU's caches, in one kernel; on CPU it does nothing."""
    buffer = torch.empty(_SWEEP_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    return lambda: buffer.fill_(1)


def device_timings(
    variant: Variant, device: torch.device, calls: int = 10, prepare: Callable[[], object] | None = None
) -> list[Timing]:
    """Time `calls` calls of a variant that is already warmed up (see time_once).

    `prepare` runs before each call and is not timed.
    """
    found = []
    for _ in range(calls):
        if prepare is not None:
            prepare()
        found.append(time_once(variant, device))
    return found


def copy_gb_per_s(device: torch.device, size: int, seconds: float = 0.0) -> float:
    """Return the rate of a copy of `size` bytes on the device, counting bytes read and bytes written.

    seconds: as in `call_seconds`.
    """
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / call_seconds(lambda: target.copy_(source), device, seconds) / 1e9


def call_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the median time of a call in seconds. The calls take about `seconds`; there are at least LEAST_CALLS.

    Only the second half counts. The first half is a warm-up, because a power limit lowers a GPU's clock only after a
    while.
    """
    # The first calls load and choose kernels.
    _timed(run, device, 3)
    count = max(LEAST_CALLS, int(seconds / median(_timed(run, device, 3))))
    return median(_timed(run, device, count)[count // 2 :])


def _timed(run: Callable[[], object], device: torch.device, calls: int) -> list[float]:
    """Return the seconds that each call took."""
    if device.type != "cuda":
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False)]
