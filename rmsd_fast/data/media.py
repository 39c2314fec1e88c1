"""Read media for a run from the caches, in a worker that can be killed, or on the GPU."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch

from rmsd_fast.config import DataConfig, NotInstalled, SettingsError, UserError, first_line
from rmsd_fast.data.decode_worker import MOST_ANSWERS, ForkServer, NotStarted, Worker, WorkerLost
from rmsd_fast.data.media_cache import ByteLru, DiskCache, held_bytes
from rmsd_fast.data.media_file import MediaError, NotNow, stat_file, undecodable, video_command
from rmsd_fast.data.video import Frames, MediaLayout, MediaRequest, read_media
from rmsd_fast.data.video_file import CpuFallback

log = logging.getLogger("rmsd_fast")
Result = TypeVar("Result")

# After this many consecutive files that could not be read or timed out, the machine is at fault, not the files.
MOST_HANGS = 3
# Maximum number of starts of the decoder process without any result.
MOST_STARTS = 3
# Counts since the last call of `take_counts`: decoded files, cache hits and failures.
COUNTS = ("decoded", "memory_hits", "disk_hits", "disk_rebuilt", "timeouts", "crashes", "cpu_fallbacks")


class MediaUnreachable(UserError, RuntimeError):
    """Several consecutive files could not be read or timed out."""


class MediaReader:
    """Decode the frames of media files once, and keep them while they fit into the caches. Thread-safe.

    If two threads request the same frames at the same time, they are decoded once. A file that was found to be bad is
    not opened again until it changes. Close the reader at the end, or use it as a context manager.

    Args:
        data: decoder, timeout, caches and checks.
        device: device of the model. If CUDA decodes, frames are on this device; if the CPU decodes for CUDA, they are
            in pinned memory.
    Attributes:
        decoder: "cpu" or "cuda", as resolved from `data.decoder`.
        decoder_reason: why `auto` resolved to "cpu" on a CUDA machine, otherwise "".
    """

    def __init__(self, data: DataConfig, device: torch.device | str = "cpu") -> None:
        self.data, self.device = data, torch.device(device)
        self.decoder, self.decoder_reason = choose_decoder(data.decoder, self.device)
        self._memory: ByteLru[Frames] = ByteLru(data.cache_mib * 2**20)
        self._disk = DiskCache(data.disk_cache, int(data.disk_cache_gib * 2**30)) if data.disk_cache else None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        # A few hundred bytes per file and kind of request.
        self._layouts: dict[tuple, MediaLayout] = {}
        self._digests: dict[tuple, str] = {}
        self._bad: dict[tuple, str] = {}
        self._flights: dict[str, Future[Frames]] = {}
        # Start it now, so that its imports (two seconds) overlap with those of the model.
        self._fork_server: ForkServer | None = ForkServer()
        self._starts = 1
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False
        self._failures_in_a_row = 0
        self._warned_of_fallback = False
        self._stream = torch.cuda.Stream(self.device) if self.decoder == "cuda" else None

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, even in the middle of a file. A thread that waits for a worker gets a RuntimeError."""
        with self._lock:
            self._closed = True
            idle, busy, fork_server = self._idle, list(self._busy), self._fork_server
            self._idle, self._fork_server = [], None
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.kill()
        if fork_server is not None:
            fork_server.close()

    def take_counts(self) -> dict[str, int]:
        """Return COUNTS since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if self._disk is not None:
            counts["disk_rebuilt"], self._disk.corrupt = self._disk.corrupt, 0
        return {name: counts[name] for name in COUNTS}

    def layout(self, request: MediaRequest) -> MediaLayout:
        """Return stamps and grid of a file's frames, from the caches or from the file's headers."""
        request = self._complete(request)
        state = self._state(request)
        if state not in self._layouts:
            key = self._key(request, state)
            kept = self._memory.get(key) or (self._disk.peek(key) if self._disk is not None else None)
            self._layouts[state] = (
                MediaLayout(kept.timestamps_s, kept.grid_thw, kept.kind)
                if kept is not None
                else self._in_worker(state, lambda worker, limit: worker.layout(request, limit))
            )
        return self._layouts[state]

    def read(self, request: MediaRequest) -> Frames:
        """Return the frames of a file.

        Raises:
            MediaError: the file cannot be used.
            MediaUnreachable, NotInstalled, SettingsError: nothing can be read on this machine, or with these settings.
        """
        request = self._complete(request)
        state = self._state(request)
        key = self._key(request, state)
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if mine:
                flight = self._flights[key] = Future()
        if not mine:
            return flight.result()
        try:
            flight.set_result(self._load(key, request, state))
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[key]
        return flight.result()

    def _key(self, request: MediaRequest, state: tuple) -> str:
        """Return the cache key. It depends on the file's content, which is hashed once per file."""
        file = state[1:]
        if file not in self._digests:
            self._digests[file] = self._in_worker(state, lambda worker, limit: worker.digest(request, limit))
        return request.key(self._digests[file], self.decoder)

    def _load(self, key: str, request: MediaRequest, state: tuple) -> Frames:
        frames = self._memory.get(key)
        if frames is not None:
            self._count("memory_hits")
            return frames
        frames = self._disk.get(key) if self._disk is not None else None
        if frames is not None:
            self._count("disk_hits")
        else:
            frames = replace(self._decode(request, state), key=key)
            if self._state(request) != state:
                raise MediaError(
                    f"{request.path}: the file changed while it was read; do not modify media during a run"
                )
            self._count("decoded")
            if self._disk is not None:
                self._disk.put(key, frames)
        if self.decoder == "cuda":
            frames = replace(frames, pixels=frames.pixels.to(self.device))
        elif self.device.type == "cuda":
            # Copies from pinned memory do not block the host.
            frames = replace(frames, pixels=frames.pixels.pin_memory())
        self._memory.put(key, frames, held_bytes(frames.pixels))
        return frames

    def _decode(self, request: MediaRequest, state: tuple) -> Frames:
        if self.decoder == "cuda" and request.kind == "video":
            try:
                return self._on_cuda(request, state)
            except CpuFallback as reason:
                self._count("cpu_fallbacks")
                if not self._warned_of_fallback:
                    self._warned_of_fallback = True
                    log.warning(
                        "%s: NVDEC cannot decode this video, so the CPU decodes it (%s); further videos are counted in "
                        "media/cpu_fallbacks",
                        request.path,
                        reason,
                    )
        return self._in_worker(state, lambda worker, limit: worker.read(request, limit))

    def _on_cuda(self, request: MediaRequest, state: tuple) -> Frames:
        """Decode with NVDEC in a separate thread. A thread that hangs is abandoned."""
        done: Future[Frames] = Future()

        def work() -> None:
            try:
                # Use a separate stream, so that decoding and the model's kernels do not wait for each other.
                with torch.cuda.stream(self._stream):
                    frames = read_media(request, device=str(self.device))
                    self._stream.synchronize()
                done.set_result(frames)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="nvdec", daemon=True).start()
        limit = self.data.decode_timeout_s
        try:
            frames = done.result(timeout=limit)
        except NotDone:
            lost = WorkerLost(
                f"{request.path}: not decoded on the GPU within data.decode_timeout_s={limit:g}; re-encode it with "
                f"`{video_command(request.path, b'')}`, drop the question, or raise the limit",
                timed_out=True,
            )
            raise self._bad_file(state, lost) from None
        except MediaError as error:
            raise self._bad_file(state, error) from error
        # A RuntimeError may also come from the device, for example if its memory is full.
        except (UserError, RuntimeError):
            raise
        except Exception as error:
            raise self._bad_file(state, undecodable(request.path, error)) from error
        self._failures_in_a_row = 0
        return frames

    def _in_worker(self, state: tuple, call: Callable[[Worker, float], Result]) -> Result:
        """Return the result of a call in any worker. After a crash, try once more: memory may have run out by chance.

        If a worker ends together with its fork server, the file is not the cause.
        """
        crashed = False
        while True:
            worker = self._take_worker()
            try:
                result = call(worker, self.data.decode_timeout_s)
                self._starts = self._failures_in_a_row = 0
                return result
            except NotStarted:
                self._drop_fork_server(worker.fork_server)
            except MediaError as error:
                if self._closed:
                    raise RuntimeError("the media reader was closed") from error
                if isinstance(error, WorkerLost) and not error.timed_out and not worker.fork_server.is_there():
                    self._drop_fork_server(worker.fork_server)
                    continue
                if not isinstance(error, WorkerLost) or error.timed_out or crashed:
                    raise self._bad_file(state, error) from error
                self._count("crashes")
                crashed = True
            finally:
                self._give_back(worker)

    def _bad_file(self, state: tuple, error: MediaError) -> Exception:
        """Return the error to raise. Remember the file as bad, unless the machine has failed."""
        if isinstance(error, WorkerLost):
            self._count("timeouts" if error.timed_out else "crashes")
        here = isinstance(error, NotNow) or (isinstance(error, WorkerLost) and error.timed_out)
        self._failures_in_a_row = self._failures_in_a_row + 1 if here else 0
        if self._failures_in_a_row >= MOST_HANGS:
            return MediaUnreachable(
                f"{self._failures_in_a_row} files in a row were not read, or not in time, the last: {error}. Check "
                "that their disk can be reached and that the machine is not overloaded"
            )
        if not isinstance(error, NotNow):
            self._bad[state] = str(error)
        return error

    def _take_worker(self) -> Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("the media reader was closed")
            if self._fork_server is None:
                if self._starts == MOST_STARTS:
                    raise NotInstalled(
                        f"the decoder process has ended {self._starts} times in a row; see its messages above"
                    )
                self._starts += 1
                self._fork_server = ForkServer()
            while self._idle:
                worker = self._idle.pop()
                if worker.is_there():
                    break
                # The system or a user killed it in the meantime.
                worker.close()
            else:
                worker = self._fork_server.worker()
            self._busy.add(worker)
            return worker

    def _drop_fork_server(self, fork_server: ForkServer) -> None:
        """Use a new fork server for the next worker, unless another thread has already replaced this one."""
        with self._lock:
            if self._fork_server is not fork_server:
                return
            self._fork_server = None
            idle, self._idle = self._idle, []
        fork_server.close()
        for worker in idle:
            worker.close()

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.lost:
                return
            if not self._closed and worker.answers < MOST_ANSWERS:
                self._idle.append(worker)
                return
        worker.close()

    def _complete(self, request: MediaRequest) -> MediaRequest:
        return replace(request, check_frames=self.data.check_frames, max_file_mib=self.data.max_file_mib)

    def _state(self, request: MediaRequest) -> tuple:
        """Return the request's digest and its file's state. Raise MediaError if the file is missing or known as bad."""
        file = stat_file(request.path, request.max_file_mib)
        wanted = hashlib.blake2b(repr(request).encode(), digest_size=16).digest()
        state = (wanted, request.path, file.st_size, file.st_mtime_ns, file.st_ino)
        if state in self._bad:
            raise MediaError(self._bad[state])
        return state

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def choose_decoder(wanted: str, device: torch.device) -> tuple[str, str]:
    """Return the decoder, "cpu" or "cuda", and the reason if `auto` did not choose CUDA on a CUDA device.

    Raises:
        SettingsError: data.decoder=cuda without a CUDA device.
        NotInstalled: data.decoder=cuda, but a test video cannot be decoded with CUDA.
    """
    if wanted == "cpu" or (wanted == "auto" and device.type != "cuda"):
        return "cpu", ""
    if device.type != "cuda":
        raise SettingsError("data.decoder=cuda: expected a CUDA device, got none; set data.decoder=cpu or auto")
    reason = why_not_cuda(device)
    if reason and wanted == "cuda":
        raise NotInstalled(f"data.decoder=cuda: {reason}; use torchcodec >= 0.17 with CUDA, or data.decoder=cpu")
    return ("cpu", reason) if reason else ("cuda", "")


def why_not_cuda(device: torch.device) -> str:
    """Return "" if NVDEC decodes a small test video, otherwise the reason for the failure."""
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.encoders import VideoEncoder

        with TemporaryDirectory() as folder:
            path = os.fspath(Path(folder) / "probe.mp4")
            pixels = (torch.arange(4 * 3 * 256 * 256) % 251).to(torch.uint8).view(4, 3, 256, 256)
            VideoEncoder(pixels, frame_rate=10).to_file(path, pixel_format="yuv420p")
            decoder = VideoDecoder(path, device=str(device))
            frames = decoder.get_frames_at(indices=[0, 3]).data
            if not frames.is_cuda or decoder.cpu_fallback:
                return f"a test video was decoded on the CPU ({decoder.cpu_fallback})"
            return ""
    except Exception as error:
        text = first_line(error)
        return f"a test video could not be decoded with CUDA ({text})"
