"""Set up and run processes: ignore lost output streams, and end with the parent process."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rmsd_fast.files import is_disk_error

_PR_SET_PDEATHSIG = 1


class LenientStream:
    """Wrap a text stream. Writes that fail are dropped without an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        # ValueError: the file is closed.
        except (OSError, ValueError):
            pass
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal that still exists."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_process() -> None:
    """Set up the process before the program imports or opens anything.

    If any of the descriptors 0 to 2 is closed, open it to /dev/null. Otherwise the next opened file would reuse it and
    receive everything that libraries print. Ignore SIGHUP, which is sent when the terminal closes. Make a rank end with
    its launcher.
    """
    end_with_launcher()
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # open() returns the lowest free number.
            os.open(os.devnull, os.O_RDWR)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def run_main(main: Callable[[], int]) -> int:
    """Prepare the process, run the main function of a program, and return the exit code.

    If nothing reads the output any more, as after `--dry-run | head -1`, the program ends without a message, with the
    code of a process that SIGPIPE has ended. A context of `lenient_output` lets it finish instead. An interrupt that
    the program does not handle itself, as during its imports, ends it with one line.
    """
    prepare_process()
    code = 128 + signal.SIGPIPE
    try:
        code = main()
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        tell("interrupted")
    except BrokenPipeError:
        # Pipes to other processes break too.
        if not (_has_lost_reader(1) or _has_lost_reader(2)):
            raise
    finally:
        # The interpreter would flush the rest of the output into the pipe at its end, and print an error.
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        if _has_lost_reader(1):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code


def _has_lost_reader(descriptor: int) -> bool:
    """Return whether a descriptor is a pipe without a reader."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def lenient_output() -> Iterator[None]:
    """Keep the program running inside the context if its terminal, pipe or log is gone.

    If a full disk ends a thread of a library, such as TensorBoard's, print one line.
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
    """Print a message to stderr once per node: only the first process prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends for any reason (Linux only)."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # The parent ended before the call.
            os.kill(os.getpid(), signal.SIGKILL)


def end_with_launcher() -> None:
    """Let the kernel kill a rank of torchrun when torchrun ends.

    Otherwise it would keep training, and interfere with the ranks of the resumed run.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent()
    if os.getppid() == 1:
        # If the parent is process 1, torchrun has ended, unless torchrun itself is process 1 of a container.
        with suppress(OSError):
            if b"torch" not in Path("/proc/1/cmdline").read_bytes():
                os.kill(os.getpid(), signal.SIGKILL)
