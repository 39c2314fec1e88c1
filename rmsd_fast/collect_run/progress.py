"""Show the progress of a collection on one line: answers, rate, failures, cost so far and projected."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time

from rmsd_fast.collect_run.config import CollectConfig, cost_of
from rmsd_fast.collect_run.loop import Collection
from rmsd_fast.data.errors import counted
from rmsd_fast.process import tell

# Interval of the line in seconds, on a terminal and in a log.
TERMINAL_S, LOG_S = 1.0, 30.0


class Progress:
    """The progress line of a collection.

    Args:
        collection: the collection.
        collect: its settings.
        wanted: number of answers to collect.
        present: number of answers that the cost of the pool before includes.
    """

    def __init__(self, collection: Collection, collect: CollectConfig, wanted: int, present: int) -> None:
        self._collection, self._collect = collection, collect
        self._wanted, self._present = wanted, present
        self._start_s = time.monotonic()

    async def show(self) -> None:
        """Print the line until the task is cancelled."""
        terminal = sys.stderr.isatty()
        while True:
            await asyncio.sleep(TERMINAL_S if terminal else LOG_S)
            end = "\r" if terminal else "\n"
            print(self.line() + ("\x1b[K" if terminal else ""), end=end, file=sys.stderr, flush=True)

    def line(self) -> str:
        """Return the line."""
        collection = self._collection
        done, seconds = collection.added, time.monotonic() - self._start_s
        rate = done / seconds if seconds else 0.0
        in_flight = sum(pacer.in_flight for client in collection.clients for pacer in client.pacers)
        limit = sum(pacer.limit for client in collection.clients for pacer in client.pacers)
        parts = [f"{done:,} of {self._wanted:,} answers, {rate:.1f}/s"]
        parts.append(f"{in_flight} in flight (limit {limit:.0f})")
        parts += [self._cost(done), self._failures()]
        if collection.stopped:
            parts.append(f"stopping: {collection.stopped}; waiting for {counted(in_flight, 'request')}")
        elif done and done < self._wanted:
            parts.append(f"{_duration((self._wanted - done) / rate)} left")
        return ", ".join(part for part in parts if part)

    def _cost(self, done: int) -> str:
        """Return cost, or tokens if a price is unknown, so far and projected to all answers."""
        spent = self._collection.budget.spent
        whole = (self._present + self._wanted) / (self._present + done) if self._present + done else math.nan
        cost = cost_of(self._collect, *spent)
        if math.isfinite(cost):
            return f"cost {cost:,.2f}" + (f" of about {cost * whole:,.2f}" if math.isfinite(whole) else "")
        return f"{sum(spent):,} tokens"

    def _failures(self) -> str:
        counts: dict[str, int] = {}
        for client in self._collection.clients:
            for kind, number in client.counts.items():
                if kind not in ("requests", "answered"):
                    counts[kind] = counts.get(kind, 0) + number
        return (
            "failures: " + " ".join(f"{kind} {number:,}" for kind, number in sorted(counts.items())) if counts else ""
        )


async def run_with_signals(collection: Collection, progress: Progress) -> int:
    """Run a collection, and show its progress. Return the number of the signal that stopped it, or 0.

    The first Ctrl-C or SIGTERM lets the requests in flight finish; the second one cancels them.
    """
    loop = asyncio.get_running_loop()
    work = asyncio.create_task(collection.run())
    numbers: list[int] = []

    def end(name: str, number: int) -> None:
        if numbers:
            work.cancel()
            return
        numbers.append(number)
        tell(f"\n{name}: waiting for the requests in flight; once more to cancel them")
        collection.stop(name)

    for number, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        loop.add_signal_handler(number, end, name, number)
    line = asyncio.create_task(progress.show())
    try:
        await work
    except asyncio.CancelledError:
        tell("the requests in flight were cancelled")
    finally:
        line.cancel()
    return numbers[0] if numbers else 0


def summary(collection: Collection, collect: CollectConfig, lacking: int, short: str = "") -> list[str]:
    """Return the lines at the end of a collection.

    Args:
        collection: the collection.
        collect: its settings.
        lacking: number of answers that the pool still lacks.
        short: warning about videos with few frames; "" = none.
    """
    requests = sum(client.counts["requests"] for client in collection.clients)
    cost = cost_of(collect, *collection.budget.spent)
    price = f", cost {cost:,.2f}" if math.isfinite(cost) else ""
    prompt, completion = collection.budget.spent
    lines = [
        f"collected {counted(collection.added, 'answer')} in {counted(requests, 'request')}; the pool has used "
        f"{prompt:,} prompt and {completion:,} completion tokens{price}"
    ]
    if collection.refused:
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in collection.refused.most_common())
        lines.append(f"rejected for good: {counted(collection.refused.total(), 'answer')} ({reasons})")
    if collection.gave_up:
        lines.append(f"failed for now: {counted(collection.gave_up, 'answer')}; start again to collect them")
    if collection.stopped:
        lines.append(f"stopped: {collection.stopped}")
    if lacking:
        lines.append(f"still missing: {counted(lacking, 'answer')}")
    if short:
        lines.append(f"warning: {short}")
    return lines


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
