"""SIGTERM and Ctrl-C: at once where nothing is lost by that, after the step and its checkpoint in training."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Of torchrun each process may get a signal twice, at about the same time, and of a key that is held down many times. A
# later one is a new request.
_REPEATED_S = 5.0


class Stopped(BaseException):
    """SIGTERM came, and what could be saved is saved. Not an error.

    together: all processes end here, with 0. Otherwise one of several leaves the others, whom the launcher ends.
    """

    def __init__(self, text: str, *, together: bool = False) -> None:
        super().__init__(text)
        self.together = together


class StopSignal:
    """SIGTERM ends the program at once by `Stopped`; within `deferred` it is only noted, and asked for by `asked`.

    SIGHUP counts as SIGTERM where a launcher passes it on; it kills what is left after 30 s.

    Python ignores what is raised while an object is being deleted: `check` raises again what was lost.

    Attributes:
        run_folder: of the run, once there is one.
    """

    def __init__(self) -> None:
        self.run_folder: Path | None = None
        self._terminated = self._interrupted = False
        self._deferred = False
        self._raised_s = -_REPEATED_S
        handlers = {signal.SIGTERM: self._terminate, signal.SIGINT: self._interrupt}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            handlers[signal.SIGHUP] = self._terminate
        self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _terminate(self, number: int, frame: Any) -> None:
        first, self._terminated = not self._terminated, True
        if self._deferred:
            if first and os.environ.get("RANK", "0") == "0":
                # Not by print: the signal may have come within one.
                with suppress(OSError):
                    os.write(2, b"\nSIGTERM: the run ends as soon as it can be continued from there\n")
        elif time.monotonic() - self._raised_s >= _REPEATED_S:
            raise self.stopped()

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        if time.monotonic() - self._raised_s >= _REPEATED_S:
            self._raised_s = time.monotonic()
            raise KeyboardInterrupt

    @property
    def advice(self) -> str:
        """What the user can do after the end."""
        return f"continue with --resume {self.run_folder}" if self.run_folder else "nothing was written"

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, SIGTERM is only noted: between two steps all processes agree on it, and save what they have."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end. Raises a KeyboardInterrupt that was lost."""
        if self._interrupted:
            raise KeyboardInterrupt
        return self._terminated

    def stopped(self, what: str = "", *, together: bool = False) -> Stopped:
        """Return the exception to raise; further signals do not interrupt it on its way.

        what: is saved, in words, before the advice.
        """
        self._raised_s = time.monotonic()
        return Stopped(f"{what}; {self.advice}" if what else self.advice, together=together)

    def check(self) -> None:
        """End the program where it was asked to end before."""
        if self.asked:
            raise self.stopped()

    def ignore(self) -> None:
        """Ignore further signals: the program is ending."""
        for number in self._former:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
