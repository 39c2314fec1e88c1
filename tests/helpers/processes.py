"""Wait for processes that tests have started."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path


def wait_until_gone(pid: int) -> None:
    """Wait until the process has ended, even if its parent has not reaped it; raise AssertionError after 20 s."""
    for _ in range(400):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still running")


def descendants(pid: int) -> list[int]:
    """Return the ids of the processes that this process and its children have started and that have not ended."""
    found = []
    # A process may be ending.
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, file.read_text().split()):
                found += [child, *descendants(child)]
    return found
