"""SIGTERM and Ctrl-C: at once where nothing is lost by that, after the step and its checkpoint in training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class Stopped(BaseException):
    """SIGTERM came, and what could be saved is saved. Not an error: the program ends with 0."""


class StopSignal:
    """Turns SIGTERM into `Stopped`. Within `deferred` it only asks for the end, which `asked` tells.

    A second one changes nothing: processes of torchrun get it twice where the whole group is signalled, once from there
    and once from torchrun, which kills what is left after 30 s by default.

    Ctrl-C stays a KeyboardInterrupt, but one that is lost is raised again: Python ignores those that come while an
    object is being deleted.

    Attributes:
        run_folder: of the run, once there is one.
    """

    def __init__(self) -> None:
        self.run_folder: Path | None = None
        self._terminated = self._interrupted = self._deferred = False
        self._former = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._terminate),
            signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt),
        }

    def _terminate(self, number: int, frame: Any) -> None:
        if self._terminated:
            return
        self._terminated = True
        if not self._deferred:
            raise Stopped(self.advice)
        if os.environ.get("RANK", "0") == "0":
            # Not by print: the signal may have come within one.
            with suppress(OSError):
                os.write(2, b"\nSIGTERM: the run ends after this step and its checkpoint\n")

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    @property
    def advice(self) -> str:
        """What the user can do after the end."""
        return f"continue with --resume {self.run_folder}" if self.run_folder else "nothing was written"

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, SIGTERM is only noted; at the end it is for the caller to have asked."""
        if self._terminated:
            raise Stopped(self.advice)
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def asked(self) -> bool:
        """Whether this process was asked to end. Raises a KeyboardInterrupt that was lost."""
        if self._interrupted:
            raise KeyboardInterrupt
        return self._terminated

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
