"""Processes that read media files and can be killed: a file that hangs or crashes a decoder costs one sample, no run.

`ForkServer` starts one process, which imports torch and torchcodec once and forks workers on demand (10 ms each; a new
interpreter takes 2 s). A `Worker` serves one thread. It sends back a description of the frames and the descriptor of
an anonymous piece of memory that holds the pixels, so they are never copied and /dev/shm is not needed. When the
process that started them ends, however it ends, the workers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Signals to all processes of a job are for the program, also while this one imports. Without the program it ends.
if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

import torch

from rmsd_fast.config import UserError
from rmsd_fast.data.media_file import NOT_NOW, MediaError, NotNow, media_digest, undecodable, unreadable, video_command
from rmsd_fast.data.video import (
    Frames,
    MediaLayout,
    MediaRequest,
    Preview,
    PreviewRequest,
    read_layout,
    read_media,
    read_preview,
)
from rmsd_fast.process import end_with_parent
from rmsd_kernels import native

# For the first answer of a worker: the fork server may still be importing, on a busy machine or a slow disk.
START_S = 300.0
# Memory that a worker may take for itself beside what it starts with. The frames that it gives back do not count.
# 4K video takes some hundred MiB, the largest picture that is read 1.5 GiB.
MOST_MEMORY_BYTES = 4 * 2**30
# A worker is replaced after so many answers: decoders and allocators that hold on to memory stay bounded.
MOST_ANSWERS = 200


class WorkerLost(MediaError):
    """The worker is gone and has to be replaced: killed after its time, or ended by itself. timed_out tells which."""

    def __init__(self, message: str, *, timed_out: bool):
        super().__init__(message)
        self.timed_out = timed_out


class NotStarted(RuntimeError):
    """The worker ended before its first answer, or never came. The file is not the reason."""


class ForkServer:
    """The process that forks workers. Safe to use from several threads."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        # One thread each: there are as many workers as are wanted, and a process with threads cannot be forked safely.
        quiet = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        path = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rmsd_fast.data.decode_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # A Ctrl-C is for the program, which then closes its workers.
            start_new_session=True,
            env={**os.environ, **quiet, **path},
        )
        theirs.close()

    def worker(self) -> Worker:
        """A new worker, at once; it answers as soon as the fork server has started, or is lost if that has ended."""
        ours, theirs = socket.socketpair()
        with self._lock, contextlib.suppress(OSError):
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        theirs.close()
        return Worker(ours, self)

    def is_there(self) -> bool:
        """Return whether the process is alive."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the fork server, and its workers with it."""
        self._control.close()
        self.process.kill()
        self.process.wait()


class Worker:
    """This side of one worker process. For one thread at a time; `kill` may come from any."""

    def __init__(self, ours: socket.socket, fork_server: ForkServer) -> None:
        self.fork_server = fork_server
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self.pid: int | None = None
        self.lost = False
        self.answers = 0

    def layout(self, request: MediaRequest, timeout_s: float) -> MediaLayout:
        """`read_layout` there. Raises what it raises, WorkerLost and NotStarted."""
        return self._call("layout", request, timeout_s)

    def digest(self, request: MediaRequest, timeout_s: float) -> str:
        """`media_digest` there. Raises as `layout`."""
        return self._call("digest", request, timeout_s)

    def read(self, request: MediaRequest, timeout_s: float) -> Frames:
        """`read_media` there; the pixels lie in memory that both processes see. Raises as `layout`."""
        return self._call("read", request, timeout_s)

    def preview(self, request: PreviewRequest, timeout_s: float) -> Preview:
        """`read_preview` there. Raises as `layout`."""
        return self._call("preview", request, timeout_s)

    def is_there(self) -> bool:
        """Return whether an idle worker's process is alive, which has nothing to say meanwhile."""
        try:
            return not self.lost and not self._connection.poll(0)
        except OSError:
            return False

    def kill(self) -> None:
        """End the process, at once. A thread that waits for it gets a WorkerLost."""
        if self.pid is not None and not self.lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close this side; an idle process then ends by itself."""
        self.lost = True
        self._connection.close()
        self._socket.close()

    def _call(self, operation: str, request: MediaRequest | PreviewRequest, timeout_s: float) -> Any:
        """The worker's answer. Whatever keeps it from being read whole ends the worker: its next one would be torn."""
        if self.pid is None:
            self._start()
        try:
            end = time.monotonic() + timeout_s
            self._connection.send((operation, request))
            self._wait(timeout_s)
            status, value = self._connection.recv()
            self.answers += 1
            if status == "frames":
                frames, shape = value
                self._wait(max(1.0, end - time.monotonic()))
                _, (descriptor,), _, _ = socket.recv_fds(self._socket, 1, 1)
                return replace(frames, pixels=_mapped(descriptor, shape))
        except TimeoutError as error:
            self.kill()
            self.close()
            raise WorkerLost(
                f"{request.path}: not read within data.decode_timeout_s={timeout_s:g}; {_repair(request)}, drop the "
                "question, or raise the limit",
                timed_out=True,
            ) from error
        # A closed socket has no descriptor to unpack.
        except (EOFError, OSError, ValueError) as error:
            self.kill()
            self.close()
            raise WorkerLost(
                f"{request.path}: the process that decoded it ended (a crash in the decoder, or out of memory); "
                f"{_repair(request)} or drop the question",
                timed_out=False,
            ) from error
        except BaseException:
            self.kill()
            self.close()
            raise
        if status == "bad":
            raise MediaError(value)
        if status == "not now":
            raise NotNow(value)
        if status == "error":
            raise value
        return value

    def _start(self) -> None:
        try:
            self._wait(START_S)
            self.pid = self._connection.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise NotStarted("the process that decodes media did not start") from error

    def _wait(self, timeout_s: float) -> None:
        if not self._connection.poll(timeout_s):
            raise TimeoutError


def _repair(request: MediaRequest | PreviewRequest) -> str:
    """What to do about a file that the decoder hangs or crashes at. Opens nothing: its disk may be what hangs."""
    return (
        f"re-encode it with `{video_command(request.path, b'')}`" if request.kind == "video" else "save it again as PNG"
    )


def _mapped(descriptor: int, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 tensor over the memory of a descriptor, which is closed; the memory lives as long as tensors over it.

    Not by Python's mmap, which keeps a descriptor open for each mapping: caches hold thousands.
    """
    try:
        path = f"/dev/fd/{descriptor}"
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)
    finally:
        os.close(descriptor)


def _anonymous_memory(size: int) -> int:
    """Descriptor of `size` bytes that no file name leads to."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rmsd-frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _serve(ours: socket.socket) -> None:
    """A worker's life: answer requests until the other side closes."""
    end_with_parent()
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_MEMORY_BYTES,) * 2)
        # Where memory runs out, a file is lost rather than the run.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    os.nice(10)  # where the CPU trains too, training goes first (bench/results/media-demo.md)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    warnings.simplefilter("ignore")  # what libraries think of a file; what matters comes as an error
    torch.set_num_threads(1)
    connection = Connection(os.dup(ours.fileno()))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(os.getpid())
    while True:
        try:
            operation, request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        descriptors: list[int] = []

        def allocate(shape: tuple[int, ...], descriptors: list[int] = descriptors) -> torch.Tensor:
            descriptors.append(_anonymous_memory(math.prod(shape)))
            return _mapped(os.dup(descriptors[-1]), shape)

        answer = _answer(operation, request, allocate)
        connection.send(answer)
        if answer[0] == "frames":
            socket.send_fds(ours, [b"p"], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        # Frames of many sizes leave holes in the heap: 150 MiB after 2,000 videos, given back in 0.2 ms.
        if trim is not None:
            trim(0)


def _answer(
    operation: str, request: MediaRequest | PreviewRequest, allocate: Callable[[tuple[int, ...]], torch.Tensor]
) -> tuple:
    """What is sent back: ("ok", value), ("frames", (frames without pixels, shape)), ("bad" or "not now", text), or
    ("error", it).
    """
    try:
        if operation == "layout":
            return "ok", read_layout(request)
        if operation == "digest":
            return "ok", media_digest(request.path)
        if operation == "preview":
            return "ok", read_preview(request)
        frames = read_media(request, allocate=allocate)
        return "frames", (replace(frames, pixels=torch.empty(0)), tuple(frames.pixels.shape))
    except NotNow as error:
        return "not now", str(error)
    except MediaError as error:
        return "bad", str(error)
    except UserError as error:
        return "error", error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NOT_NOW:
            return "not now", str(unreadable(request.path, error))
        traceback.print_exc()
        return "bad", str(undecodable(request.path, error))


def main(descriptor: int) -> None:
    """The fork server's life: fork a worker for each descriptor that comes in."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers are not waited for
    control = socket.socket(fileno=descriptor)
    # Where it cannot be loaded the first request says so.
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        import torchcodec.decoders  # noqa: F401
    native.available()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        try:
            child = os.fork() == 0
        except OSError:
            child = False  # the other side sees its worker lost
        if child:
            control.close()
            status = 1
            try:
                _serve(socket.socket(fileno=descriptors[0]))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(descriptors[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
