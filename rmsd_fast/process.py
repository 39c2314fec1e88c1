"""How a program lives with its surroundings: with output that is lost, and with a parent that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rmsd_fast.files import is_disk_error

_PR_SET_PDEATHSIG = 1


class LenientStream:
    """A text stream whose writes are lost, without an error, where they cannot be made."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        # A ValueError is that of a closed file.
        except (OSError, ValueError):
            pass
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


def prepare_process() -> None:
    """What a program does before it imports or opens anything.

    Descriptors 0 to 2 that are closed are opened to nowhere: otherwise the next file would get one of them, and with it
    everything that libraries print. SIGHUP, which a closed terminal sends, is ignored. A rank ends with its launcher.
    """
    end_with_launcher()
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free.
            os.open(os.devnull, os.O_RDWR)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextmanager
def lenient_output() -> Iterator[None]:
    """Inside, the program outlives its terminal, its pipes and its log.

    Threads of libraries that end at a full disk say so in one line; TensorBoard has one.
    """
    former, hook = (sys.stdout, sys.stderr), threading.excepthook

    def tell(ended: Any) -> None:
        if not is_disk_error(ended.exc_value):
            hook(ended)
            return
        print(f"{ended.exc_value} ({ended.thread.name if ended.thread else 'a thread'} ends)", file=sys.stderr)

    nowhere = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout, sys.stderr = (LenientStream(nowhere if stream is None else stream) for stream in former)
    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = hook
        sys.stdout, sys.stderr = former
        nowhere.close()


def tell(message: str) -> None:
    """Print a message to stderr that all processes of this node have alike: the first one prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)


def end_with_parent() -> None:
    """Have this process killed when the one that started it ends, however it ends. On Linux only."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It ended in between.
            os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Have a rank of torchrun killed when torchrun ends: it would train on, and meet the ranks of the resumed run."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent()
    if os.getppid() == 1:
        # Adopted, as torchrun has ended already; unless torchrun is the first process of a container.
        with suppress(OSError):
            if b"torch" not in Path("/proc/1/cmdline").read_bytes():
                os.kill(os.getpid(), signal.SIGKILL)
