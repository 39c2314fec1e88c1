"""Processes that read media files and can be killed: a file that hangs or crashes a decoder costs one sample, no run.

`Nursery` starts one process, which imports torch and torchcodec once and forks workers on demand (10 ms each; a new
interpreter takes 2 s). A `Worker` serves one thread. It sends back a description of the frames and the descriptor of
an anonymous piece of memory that holds the pixels, so they are never copied and /dev/shm is not needed. When the
process that started them ends, however it ends, the workers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from rmsd_fast.config import NotInstalled, UserError
from rmsd_fast.data.video import Frames, Inspection, MediaError, MediaRequest, inspect_media, read_media
from rmsd_kernels import native

# For the first answer of a worker: the nursery may still be importing, on a busy machine or a slow disk.
START_S = 300.0
_PR_SET_PDEATHSIG = 1


class WorkerLost(MediaError):
    """The worker is gone and has to be replaced: killed after its time, or ended by itself. timed_out tells which."""

    def __init__(self, message: str, *, timed_out: bool):
        super().__init__(message)
        self.timed_out = timed_out


class Nursery:
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
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rmsd_fast.data.decode_worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # A Ctrl-C is for the program, which then closes its workers.
            start_new_session=True,
            env={**os.environ, **quiet, **path},
        )
        theirs.close()

    def worker(self) -> Worker:
        """A new worker, at once; it answers as soon as the nursery has started."""
        ours, theirs = socket.socketpair()
        with self._lock:
            try:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            except OSError as error:
                raise NotInstalled("the process that starts decoders has ended; see its message above") from error
            finally:
                theirs.close()
        return Worker(ours)

    def close(self) -> None:
        """End the nursery; its workers end when they are closed."""
        self._control.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Worker:
    """This side of one worker process. For one thread at a time."""

    def __init__(self, ours: socket.socket) -> None:
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        self.pid: int | None = None
        self.lost = False

    def inspect(self, request: MediaRequest, timeout_s: float) -> Inspection:
        """`inspect_media` there. Raises what it raises, and WorkerLost."""
        return self._call("inspect", request, timeout_s)

    def read(self, request: MediaRequest, timeout_s: float) -> Frames:
        """`read_media` there; the pixels lie in memory that both processes see. Raises as `inspect`."""
        frames, shape = self._call("read", request, timeout_s)
        _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
        return replace(frames, pixels=_mapped(descriptors[0], shape))

    def kill(self) -> None:
        """End the process, at once; from any thread. One that waits for it gets a WorkerLost."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close this side; an idle process then ends by itself."""
        self.lost = True
        self._connection.close()
        self._socket.close()

    def _call(self, operation: str, request: MediaRequest, timeout_s: float) -> Any:
        if self.pid is None:
            self.pid = self._start()
        try:
            self._connection.send((operation, request))
            if not self._connection.poll(timeout_s):
                self.kill()
                self.close()
                raise WorkerLost(
                    f"{request.path}: not decoded within data.decode_timeout_s={timeout_s:g}; re-encode it, drop the "
                    "question, or raise the limit",
                    timed_out=True,
                )
            status, value = self._connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            raise WorkerLost(
                f"{request.path}: the process that decoded it ended (a crash in the decoder, or out of memory); "
                "re-encode it or drop the question",
                timed_out=False,
            ) from error
        if status == "bad":
            raise MediaError(value)
        if status == "error":
            raise value
        return value

    def _start(self) -> int:
        try:
            if self._connection.poll(START_S):
                return self._connection.recv()
        except (EOFError, OSError):
            pass
        raise NotInstalled("the process that decodes media did not start; see its message above")


def _mapped(descriptor: int, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 tensor over the memory of a descriptor, which is closed; the memory lives as long as tensors over it."""
    try:
        memory = mmap.mmap(descriptor, math.prod(shape))
    finally:
        os.close(descriptor)
    return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


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
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    torch.set_num_threads(1)
    connection = Connection(os.dup(ours.fileno()))
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

        try:
            if operation == "inspect":
                answer = ("ok", inspect_media(request))
            else:
                frames = read_media(request, allocate=allocate)
                answer = ("ok", (replace(frames, pixels=torch.empty(0)), tuple(frames.pixels.shape)))
                del frames
        except MediaError as error:
            answer = ("bad", str(error))
        except UserError as error:
            answer = ("error", error)
        except Exception:
            answer = ("error", RuntimeError(f"{request.path}: failed while decoding:\n{traceback.format_exc()}"))
        connection.send(answer)
        if operation == "read" and answer[0] == "ok":
            socket.send_fds(ours, [b"p"], descriptors[-1:])
        for descriptor in descriptors:
            os.close(descriptor)


def main(descriptor: int) -> None:
    """The nursery's life: fork a worker for each descriptor that comes in."""
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
        if os.fork() == 0:
            control.close()
            status = 1
            try:
                _serve(socket.socket(fileno=descriptors[0]))
                status = 0
            finally:
                os._exit(status)
        os.close(descriptors[0])


if __name__ == "__main__":
    main(int(sys.argv[1]))
