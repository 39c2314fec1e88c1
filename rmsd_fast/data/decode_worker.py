"""Read media files in processes that can be killed, so that a hanging or crashing decoder does not end the run.

`ForkServer` starts one process, which imports torch and torchcodec once and forks workers on demand (10 ms each; a new
interpreter takes 2 s). A `Worker` serves one thread. It returns a description of the frames and the file descriptor of
the anonymous memory that holds the pixels, so pixels are never copied and /dev/shm is not needed. The workers end when
the process that started them ends for any reason.
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

# Signals sent to all processes of a job are intended for the program, even during the imports here. This process ends
# when the program ends.
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

# Time limit for a worker's first answer. The fork server may still be importing, on a busy machine or a slow disk.
START_S = 300.0
# Memory that a worker may allocate in addition to its initial memory, not counting returned frames. 4K video takes a
# few hundred MiB, and the largest accepted picture takes 1.5 GiB.
MOST_MEMORY_BYTES = 4 * 2**30
# A worker is replaced after this many answers, to limit the memory that decoders and allocators retain.
MOST_ANSWERS = 200


class WorkerLost(MediaError):
    """The worker has ended and must be replaced.

    `timed_out` is True if it was killed at the time limit, and False if it ended by itself.
    """

    def __init__(self, message: str, *, timed_out: bool):
        super().__init__(message)
        self.timed_out = timed_out


class NotStarted(RuntimeError):
    """The worker ended before its first answer or never started, so the file is not the cause."""


class ForkServer:
    """The process that forks workers. Safe to use from several threads."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        # Each worker has one thread. Workers run in parallel, and a process with threads cannot be forked safely.
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
            # Ctrl-C is intended for the program, which then closes its workers.
            start_new_session=True,
            env={**os.environ, **quiet, **path},
        )
        theirs.close()

    def worker(self) -> Worker:
        """Return a new worker without waiting.

        It answers after the fork server has started, and is lost if the fork server has ended.
        """
        ours, theirs = socket.socketpair()
        with self._lock, contextlib.suppress(OSError):
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        theirs.close()
        return Worker(ours, self)

    def is_there(self) -> bool:
        """Return whether the process is alive."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the fork server and its workers."""
        self._control.close()
        self.process.kill()
        self.process.wait()


class Worker:
    """The parent's side of one worker process. Use it from one thread at a time; any thread may call `kill`."""

    def __init__(self, ours: socket.socket, fork_server: ForkServer) -> None:
        self.fork_server = fork_server
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self.pid: int | None = None
        self.lost = False
        self.answers = 0

    def layout(self, request: MediaRequest, timeout_s: float) -> MediaLayout:
        """Call `read_layout` in the worker. Raises the same errors, WorkerLost and NotStarted."""
        return self._call("layout", request, timeout_s)

    def digest(self, request: MediaRequest, timeout_s: float) -> str:
        """Call `media_digest` in the worker. Raises as `layout`."""
        return self._call("digest", request, timeout_s)

    def read(self, request: MediaRequest, timeout_s: float) -> Frames:
        """Call `read_media` in the worker; the pixels are in memory shared by both processes. Raises as `layout`."""
        return self._call("read", request, timeout_s)

    def preview(self, request: PreviewRequest, timeout_s: float) -> Preview:
        """Call `read_preview` in the worker. Raises as `layout`."""
        return self._call("preview", request, timeout_s)

    def is_there(self) -> bool:
        """Return whether an idle worker's process is alive and has sent no data since its last answer."""
        try:
            return not self.lost and not self._connection.poll(0)
        except OSError:
            return False

    def kill(self) -> None:
        """End the process immediately. A thread that waits for it gets a WorkerLost."""
        if self.pid is not None and not self.lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the parent's side. An idle process then ends by itself."""
        self.lost = True
        self._connection.close()
        self._socket.close()

    def _call(self, operation: str, request: MediaRequest | PreviewRequest, timeout_s: float) -> Any:
        """Return the worker's answer.

        If an answer is not read completely, end the worker, because its next answer would be corrupted.
        """
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
        # A closed socket sends no descriptor to unpack.
        except (EOFError, OSError, ValueError) as error:
            self.kill()
            self.close()
            raise WorkerLost(
                f"{request.path}: the decoder process ended (a crash in the decoder, or out of memory); "
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
            raise NotStarted("the decoder process did not start") from error

    def _wait(self, timeout_s: float) -> None:
        if not self._connection.poll(timeout_s):
            raise TimeoutError


def _repair(request: MediaRequest | PreviewRequest) -> str:
    """Return advice for a file that hangs or crashes the decoder. Do not open it, because its disk may be hanging."""
    return (
        f"re-encode it with `{video_command(request.path, b'')}`" if request.kind == "video" else "save it again as PNG"
    )


def _mapped(descriptor: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a uint8 tensor over the memory of a descriptor, and close the descriptor.

    The memory lives as long as any tensor over it. Python's mmap is not used because it keeps a descriptor open for
    each mapping, and caches hold thousands of them.
    """
    try:
        path = f"/dev/fd/{descriptor}"
        return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)
    finally:
        os.close(descriptor)


def _anonymous_memory(size: int) -> int:
    """Return the descriptor of `size` bytes of memory without a file name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rmsd-frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _serve(ours: socket.socket) -> None:
    """Answer requests in a worker until the other side closes.

    Raises:
        BrokenPipeError, ConnectionResetError: the program has ended while the worker was busy.
    """
    end_with_parent()
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_MEMORY_BYTES,) * 2)
        # If memory runs out, the kernel should kill this process rather than the run.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    os.nice(10)  # if the CPU trains too, training has priority (bench/results/media-demo.md)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # exists in glibc
    warnings.simplefilter("ignore")  # libraries warn about files; everything that matters is raised as an error
    torch.set_num_threads(1)
    connection = Connection(os.dup(ours.fileno()))
    connection.send(os.getpid())
    while True:
        try:
            operation, request = connection.recv()
        except EOFError:
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
        # Frames of many sizes fragment the heap: 150 MiB after 2,000 videos, released in 0.2 ms.
        if trim is not None:
            trim(0)


def _answer(
    operation: str, request: MediaRequest | PreviewRequest, allocate: Callable[[tuple[int, ...]], torch.Tensor]
) -> tuple:
    """Return the message to send.

    It is ("ok", value), ("frames", (frames without pixels, shape)), ("bad" or "not now", text) or ("error", error).
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
    """Run the fork server: fork a worker for each descriptor that arrives."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # avoids zombies without waiting for workers
    control = socket.socket(fileno=descriptor)
    # If it cannot be loaded, the first request reports it.
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
            child = False  # the parent detects that its worker is lost
        if child:
            control.close()
            status = 1
            try:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    _serve(socket.socket(fileno=descriptors[0]))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(descriptors[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
