"""How a program lives with its surroundings: with output that is lost, and with a parent that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1


class LenientStream:
    """A text stream whose writes are lost, without an error, where they cannot be made."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Whether a terminal shows the stream; not one that is gone."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_going_without_output() -> None:
    """Let the program outlive its terminal, its pipes and its log. Call it before anything opens files.

    Descriptors 0 to 2 that are closed are opened to nowhere: else the next file would get one of them, and with it
    everything that libraries print. SIGHUP, which a closed terminal sends, is ignored; a launcher may act on its own.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, LenientStream):
            stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
            setattr(sys, name, LenientStream(stream))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def end_with_parent() -> None:
    """Have this process killed when the one that started it ends, however it ends. On Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It ended in between.
            os.kill(os.getpid(), signal.SIGKILL)
