"""Adapt the number of requests in flight to a server: additive increase, multiplicative decrease, and pauses."""

from __future__ import annotations

import asyncio
import math
from collections import deque


class Pacer:
    """Limit the requests in flight at one endpoint. It is used within one event loop.

    Each success raises the limit by 1/limit, so by 1 per round. An overload halves it, at most once for requests that
    started before the last cut, because these do not yet show its effect.

    Args:
        start: limit at the start.
        most: highest limit.
    Attributes:
        limit: the current limit.
        in_flight: number of requests in flight.
        failures, failed_s: number of rounds of failures since the last success, and the time of the last failure.
        paused_until_s: end of the pause that the server has asked for.
    """

    def __init__(self, start: int, most: int) -> None:
        self.limit, self._most = float(min(start, most)), most
        self.in_flight = 0
        self._is_open = False
        self.failures, self.failed_s = 0, -math.inf
        self._cut_s = self.paused_until_s = 0.0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def load(self) -> float:
        """Requests in flight or waiting, as a share of the limit."""
        return (self.in_flight + len(self._waiting)) / self.limit

    async def acquire(self) -> float:
        """Wait for a free place and the end of a pause. Return the time of the event loop, for `overloaded`."""
        loop = asyncio.get_running_loop()
        while not self._is_open and (self.in_flight + 1 > self.limit or loop.time() < self.paused_until_s):
            waiter = loop.create_future()
            self._waiting.append(waiter)
            if loop.time() < self.paused_until_s:
                loop.call_at(self.paused_until_s, self._wake)
            try:
                await waiter
            except asyncio.CancelledError:
                # The place that woke this request is free for the next one.
                self._wake()
                raise
        self.in_flight += 1
        return loop.time()

    def release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def failed(self, started_s: float) -> None:
        """Note the failure of a request that was started at this time. Requests in flight together fail as a round."""
        if started_s > self.failed_s:
            self.failures, self.failed_s = self.failures + 1, asyncio.get_running_loop().time()

    def succeeded(self) -> None:
        self.failures = 0
        self.limit = min(self._most, self.limit + 1 / self.limit)
        self._wake()

    def overloaded(self, started_s: float, pause_s: float | None) -> None:
        """Halve the limit after a request that was started at this time, and send nothing during the pause."""
        now = asyncio.get_running_loop().time()
        if started_s > self._cut_s:
            self.limit, self._cut_s = max(1.0, self.limit / 2), now
        if pause_s:
            self.paused_until_s = max(self.paused_until_s, now + pause_s)

    def open(self) -> None:
        """Let everything pass, because the collection stops and nothing more is sent."""
        self._is_open = True
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def _wake(self) -> None:
        free = self.limit - self.in_flight
        while free >= 1 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                free -= 1
