"""Reads media for a run: from the caches, else in a worker that can be killed, or on the GPU."""

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

from rmsd_fast.config import DataConfig, NotInstalled, SettingsError
from rmsd_fast.data.decode_worker import Nursery, Worker, WorkerLost
from rmsd_fast.data.media_cache import ByteLru, DiskCache
from rmsd_fast.data.video import Frames, Inspection, MediaError, MediaRequest, read_media, stat_file

log = logging.getLogger("rmsd_fast")
Result = TypeVar("Result")

# Decodes on the GPU that never came back. Their threads cannot be ended; so many are no fault of the files.
MOST_HANGS = 3


class MediaReader:
    """Frames of media files, decoded once and kept as long as there is room. Safe with several threads.

    Two threads that ask for the same frames at once wait for one decode. A file found bad is not opened again until it
    changes. Close it at the end; it is a context manager.

    Args:
        data: decoder, time-out, caches and checks.
        device: of the model. On CUDA frames that were decoded on the CPU come in pinned memory.
    Attributes:
        decoder: "cpu" or "cuda", what `data.decoder` came to.
        decoder_reason: why `auto` came to "cpu" on a CUDA machine, else "".
    """

    def __init__(self, data: DataConfig, device: torch.device | str = "cpu") -> None:
        self.data, self.device = data, torch.device(device)
        self.decoder, self.decoder_reason = choose_decoder(data.decoder, self.device)
        self._memory: ByteLru[Frames] = ByteLru(data.cache_mib * 2**20)
        self._disk = DiskCache(data.disk_cache, int(data.disk_cache_gib * 2**30)) if data.disk_cache else None
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._inspected: dict[tuple, Inspection] = {}
        self._bad: dict[tuple, str] = {}
        self._flights: dict[str, Future[Frames]] = {}
        self._nursery: Nursery | None = None
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._closed = False
        self._hangs = 0
        self._stream = torch.cuda.Stream(self.device) if self.decoder == "cuda" else None

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, also in the middle of a file; a thread that waits for one gets a RuntimeError."""
        with self._lock:
            self._closed = True
            idle, busy, nursery = self._idle, list(self._busy), self._nursery
            self._idle, self._nursery = [], None
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.kill()
        if nursery is not None:
            nursery.close()

    def take_counts(self) -> dict[str, int]:
        """COUNTS since the last call: files decoded, hits of the caches, damaged disk entries, faults of decoders."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if self._disk is not None:
            counts["disk_rebuilt"], self._disk.corrupt = self._disk.corrupt, 0
        return {name: counts[name] for name in COUNTS}

    def inspect(self, request: MediaRequest) -> Inspection:
        """Content hash and grid of a file, no pixel decoded; remembered until the file changes."""
        request = self._complete(request)
        identity = self._identity(request)
        if identity not in self._inspected:
            self._inspected[identity] = self._remember_bad(
                identity, lambda: self._in_worker(lambda worker, limit: worker.inspect(request, limit))
            )
        return self._inspected[identity]

    def read(self, request: MediaRequest) -> Frames:
        """Frames of a file.

        Raises:
            MediaError: the file cannot be used.
            NotInstalled, SettingsError: nothing can be decoded here, or with these settings.
        """
        request = self._complete(request)
        key = request.key(self.inspect(request).digest, self.decoder)
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if mine:
                flight = self._flights[key] = Future()
        if not mine:
            return flight.result()
        try:
            flight.set_result(self._load(key, request))
        except BaseException as error:
            flight.set_exception(error)
        finally:
            with self._lock:
                del self._flights[key]
        return flight.result()

    def _load(self, key: str, request: MediaRequest) -> Frames:
        frames = self._memory.get(key)
        if frames is not None:
            self._count("memory_hits")
            return frames
        frames = self._disk.get(key) if self._disk is not None else None
        if frames is not None:
            self._count("disk_hits")
        else:
            frames = replace(self._remember_bad(self._identity(request), lambda: self._decode(request)), key=key)
            self._count("decoded")
            if frames.decoder == "cpu fallback":
                self._count("cpu_fallbacks")
                log.warning("%s: NVDEC cannot decode this video, the CPU did", request.path)
            if self._disk is not None:
                self._disk.put(key, frames)
        if self.device.type == "cuda" and not frames.pixels.is_cuda:
            # Copies from pinned memory need not be waited for.
            frames = replace(frames, pixels=frames.pixels.pin_memory())
        self._memory.put(key, frames, frames.pixels.nbytes)
        return frames

    def _decode(self, request: MediaRequest) -> Frames:
        if self.decoder == "cuda" and request.kind == "video":
            return self._on_cuda(request)
        return self._in_worker(lambda worker, limit: worker.read(request, limit))

    def _on_cuda(self, request: MediaRequest) -> Frames:
        """Decode with NVDEC in a thread of its own: one that hangs is left behind."""
        done: Future[Frames] = Future()

        def work() -> None:
            try:
                # On a stream of its own: the model's kernels neither wait nor are waited for.
                with torch.cuda.stream(self._stream):
                    frames = read_media(request, device=str(self.device))
                    self._stream.synchronize()
                done.set_result(frames)
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=work, name="nvdec", daemon=True).start()
        try:
            return done.result(timeout=self.data.decode_timeout_s)
        except NotDone:
            self._count("timeouts")
            self._hangs += 1
            if self._hangs > MOST_HANGS:
                raise NotInstalled(
                    f"{self._hangs} videos were not decoded on the GPU within data.decode_timeout_s="
                    f"{self.data.decode_timeout_s:g}; use data.decoder=cpu, whose processes can be ended"
                ) from None
            raise MediaError(
                f"{request.path}: not decoded on the GPU within data.decode_timeout_s={self.data.decode_timeout_s:g}; "
                "re-encode it, drop the question, or raise the limit"
            ) from None

    def _in_worker(self, call: Callable[[Worker, float], Result]) -> Result:
        """What the call gives in some worker; tried once more after a crash, as memory may have run out by chance."""
        for last in (False, True):
            worker = self._take_worker()
            try:
                return call(worker, self.data.decode_timeout_s)
            except WorkerLost as lost:
                if self._closed:
                    raise RuntimeError("the media reader was closed") from lost
                self._count("timeouts" if lost.timed_out else "crashes")
                if last or lost.timed_out:
                    raise
            finally:
                self._give_back(worker)
        raise AssertionError("not reached")

    def _take_worker(self) -> Worker:
        with self._lock:
            if self._closed:
                raise RuntimeError("the media reader was closed")
            if self._nursery is None:
                self._nursery = Nursery()
            worker = self._idle.pop() if self._idle else self._nursery.worker()
            self._busy.add(worker)
            return worker

    def _give_back(self, worker: Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            if worker.lost:
                return
            if not self._closed:
                self._idle.append(worker)
                return
        worker.close()

    def _complete(self, request: MediaRequest) -> MediaRequest:
        return replace(request, check_frames=self.data.check_frames, max_file_mib=self.data.max_file_mib)

    def _identity(self, request: MediaRequest) -> tuple:
        """The request and the state of its file; raises MediaError where there is none, or it is known to be bad."""
        found = stat_file(request)
        wanted = hashlib.blake2b(repr(request).encode(), digest_size=16).digest()
        identity = (wanted, found.st_size, found.st_mtime_ns, found.st_ino)
        if identity in self._bad:
            raise MediaError(self._bad[identity])
        return identity

    def _remember_bad(self, identity: tuple, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except MediaError as error:
            self._bad[identity] = str(error)
            raise

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


COUNTS = ("decoded", "memory_hits", "disk_hits", "disk_rebuilt", "timeouts", "crashes", "cpu_fallbacks")


def choose_decoder(wanted: str, device: torch.device) -> tuple[str, str]:
    """What decodes, "cpu" or "cuda", and why it is not CUDA where `auto` could have taken it.

    Raises:
        SettingsError: data.decoder=cuda without a CUDA device.
        NotInstalled: data.decoder=cuda where a test video cannot be decoded with it.
    """
    if wanted == "cpu" or (wanted == "auto" and device.type != "cuda"):
        return "cpu", ""
    if device.type != "cuda":
        raise SettingsError("data.decoder=cuda: expected a CUDA device, got none; write data.decoder=cpu or auto")
    reason = why_not_cuda(device)
    if reason and wanted == "cuda":
        raise NotInstalled(f"data.decoder=cuda: {reason}; use torchcodec >= 0.17 with CUDA, or data.decoder=cpu")
    return ("cpu", reason) if reason else ("cuda", "")


def why_not_cuda(device: torch.device) -> str:
    """Empty where a small video, made here, is decoded by NVDEC; else what happened."""
    try:
        from torchcodec.decoders import VideoDecoder
        from torchcodec.encoders import VideoEncoder

        with TemporaryDirectory() as folder:
            path = os.fspath(Path(folder) / "probe.mp4")
            pixels = (torch.arange(4 * 3 * 256 * 256) % 251).to(torch.uint8).view(4, 3, 256, 256)
            VideoEncoder(pixels, frame_rate=10).to_file(path, pixel_format="yuv420p")
            decoder = VideoDecoder(path, device=str(device))
            found = decoder.get_frames_at(indices=[0, 3]).data
            if not found.is_cuda or decoder.cpu_fallback:
                return f"a test video was decoded on the CPU ({decoder.cpu_fallback})"
            return ""
    except Exception as error:
        return f"a test video could not be decoded with CUDA ({str(error).strip().splitlines()[:1] or [type(error)]})"
