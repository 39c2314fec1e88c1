"""Handle SIGTERM and Ctrl-C.

During training, SIGTERM ends the program after a step and a checkpoint; otherwise it ends the program immediately.
Ctrl-C always ends the program immediately. Inside `draining`, either one lets the requests in flight finish.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Under torchrun, each process may receive a signal twice at about the same time, and a key that is held down sends it
# many times. A signal that arrives after more than this many seconds is a new request.
_REPEATED_S = 5.0


class Stopped(BaseException):
    """The program stops after SIGTERM, with its state saved where possible. This is not an error.

    Args:
        text: message for the user.
        together: whether all processes end here, with exit code 0. Otherwise this process may end alone, and the
            launcher ends the others.
    """

    def __init__(self, text: str, *, together: bool = False) -> None:
        super().__init__(text)
        self.together = together


class StopSignal:
    """Handle SIGTERM and Ctrl-C.

    SIGTERM ends the program immediately by raising `Stopped`. Inside `deferred`, it is only recorded, and `asked`
    returns it. A SIGHUP passed on by a launcher is treated as SIGTERM. The launcher kills remaining processes after
    30 s.

    Python ignores exceptions that are raised while an object is being deleted, so `check` raises a lost exception
    again.

    Attributes:
        run_folder: folder of the run, or None before it is created.
        output: the file that a repeated command continues, or None.
        otherwise: what the user can do if there is neither.
        requests: how often the program was asked to end inside `draining`.
    """

    def __init__(self) -> None:
        self.run_folder: Path | None = None
        self.output: Path | None = None
        self.otherwise = "nothing was written"
        self._terminated = self._interrupted = False
        self._deferred = self._draining = False
        self._drained_s = -_REPEATED_S
        self.requests = 0
        self._raised_s = -_REPEATED_S
        handlers = {signal.SIGTERM: self._terminate, signal.SIGINT: self._interrupt}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            handlers[signal.SIGHUP] = self._terminate
        self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _terminate(self, number: int, frame: Any) -> None:
        first, self._terminated = not self._terminated, True
        if self._draining:
            self._count("SIGTERM")
        elif self._deferred:
            if first and os.environ.get("RANK", "0") == "0":
                # Do not use print, because the signal may have interrupted a print.
                with suppress(OSError):
                    os.write(2, b"\nSIGTERM: the run ends after this step and its checkpoint\n")
        elif time.monotonic() - self._raised_s >= _REPEATED_S:
            raise self.stopped()

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        if self._draining:
            self._count("Ctrl-C")
        elif time.monotonic() - self._raised_s >= _REPEATED_S:
            self._raised_s = time.monotonic()
            raise KeyboardInterrupt

    def _count(self, name: str) -> None:
        if time.monotonic() - self._drained_s < _REPEATED_S:
            return
        self._drained_s = time.monotonic()
        self.requests += 1
        if self.requests == 1 and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):
                os.write(2, f"\n{name}: waiting for the requests in flight; once more to cancel them\n".encode())

    @contextmanager
    def draining(self) -> Iterator[None]:
        """Only count signals inside the context, in `requests`, so that paid replies can arrive. Then call `check`."""
        self._draining, self.requests, self._drained_s = True, 0, -_REPEATED_S
        try:
            yield
        finally:
            self._draining = False

    @property
    def advice(self) -> str:
        """What the user can do after the program has ended."""
        if self.run_folder:
            return f"continue with --resume {self.run_folder}"
        return f"run the same command again to continue {self.output}" if self.output else self.otherwise

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record SIGTERM inside the context. All processes then agree between two steps to save and stop."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end. Raises KeyboardInterrupt if an earlier one was lost."""
        if self._interrupted:
            raise KeyboardInterrupt
        return self._terminated

    def stopped(self, what: str = "", *, together: bool = False) -> Stopped:
        """Return the exception to raise. Further signals do not interrupt its handling.

        Args:
            what: text about what is saved, printed before the advice.
            together: whether all processes end together.
        """
        self._raised_s = time.monotonic()
        return Stopped(f"{what}; {self.advice}" if what else self.advice, together=together)

    def check(self) -> None:
        """End the program if it was asked to end."""
        if self.asked:
            raise self.stopped()

    def ignore(self) -> None:
        """Ignore further signals, because the program is ending."""
        for number in self._former:
            signal.signal(number, signal.SIG_IGN)

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
