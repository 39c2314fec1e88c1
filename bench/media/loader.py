"""Whole readers: what a step waits for its data, what a second epoch costs, and memory over many videos.

ahead: `PromptLoader` under a step of a fixed number of matrix products, with and without decode-ahead and cache.
epochs: the same without a step: all data of an epoch, first and second. flat: distinct small videos through one
`MediaReader` with a small cache.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.media.work import Work, descendants
from rmsd_fast.config import DataConfig, VideoConfig

# One product of this side squared in float32, 2 * 1024³ flop.
_SIDE = 1024
_FRAMES = 16


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(**{"decoder": "cpu", "decode_threads": 2} | changes)


@functools.cache
def _student() -> Any:
    from bench.prefix.groups import HIDDEN, LAYERS, load

    return load(HIDDEN, LAYERS, "float32", "cpu")


def _warm_reader(data: DataConfig, warm: str) -> Any:
    """A reader whose worker has started: a run pays for that once."""
    from rmsd_fast.data.media import MediaReader
    from rmsd_fast.data.preprocess import Preprocessor
    from rmsd_fast.data.video import MediaRequest

    reader = MediaReader(data)
    reader.read(MediaRequest(warm, "video", VideoConfig(num_frames=2), Preprocessor()))
    return reader


def _loader(reader: Any, paths: list[str], *, ahead: int, per_step: int) -> Any:
    from bench.prefix.groups import TEXTS
    from rmsd_fast.data.loader import PromptLoader
    from rmsd_fast.data.prompts import PromptBuilder
    from rmsd_fast.data.records import Question

    questions = [
        Question(id=f"q{i}", question=TEXTS[0], task_type="temporal", videos=(path,), answer="0.0 to 1.0")
        for i, path in enumerate(paths)
    ]
    return PromptLoader(
        PromptBuilder(_student(), VideoConfig(num_frames=_FRAMES), reader),
        questions,
        stage="bench",
        seed=0,
        positions_per_step=per_step,
        rank=0,
        size=1,
        threads=reader.data.decode_threads,
        ahead=ahead,
        max_prompt_tokens=16384,
    )


def _compute(products: int) -> float:
    """A step's work in the main thread; returns its seconds."""
    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    start = time.perf_counter()
    for _ in range(products):
        torch.mm(left, right)
    return time.perf_counter() - start


def _take_steps(loader: Any, first: int, last: int, last_step: int, products: int) -> tuple[list[float], list[float]]:
    """Seconds of waiting for data and of computing, by step."""
    waits, computes = [], []
    for step in range(first, last):
        start = time.perf_counter()
        prompts = loader.step(step, last_step)
        waits.append(time.perf_counter() - start)
        assert all(len(prompt.media) == 1 for prompt in prompts)
        computes.append(_compute(products))
    return waits, computes


def ahead(paths: list[str], warm: str, steps_ahead: int, cache_mib: int, per_step: int, products: int) -> Work:
    """Two epochs. A step's data has to be there when it begins; the first step's is never ahead of anything."""
    data = data_config(cache_mib=cache_mib, decode_ahead=steps_ahead)
    per_epoch = len(paths) // per_step

    def prepare() -> tuple[Any, Any]:
        folder = tempfile.TemporaryDirectory(prefix="bench-video-")
        reader = _warm_reader(data, warm)
        loader = _loader(reader, paths, ahead=steps_ahead, per_step=per_step)
        return loader, (reader, folder)

    def run(state: tuple[Any, Any]) -> dict[str, Any]:
        waits, computes = _take_steps(state[0], 0, 2 * per_epoch, 2 * per_epoch, products)
        return {
            "first_wait_s": waits[0],
            "epoch_1_wait_s": sum(waits[1:per_epoch]) / (per_epoch - 1),
            "epoch_2_wait_s": sum(waits[per_epoch:]) / per_epoch,
            "compute_s": sum(computes) / len(computes),
            "waits_s": waits,
        }

    return Work(run, prepare, _close, output=lambda result: [], facts=lambda result: result)


def epochs(paths: list[str], warm: str, cache: str) -> Work:
    """Two epochs of data alone. With the disk cache the second one has a new reader, as the next run has."""

    def prepare() -> tuple[Any, Any]:
        folder = tempfile.TemporaryDirectory(prefix="bench-video-")
        where = str(Path(folder.name) / "cache") if cache == "disk" else ""
        data = data_config(cache_mib=1024 if cache == "memory" else 0, disk_cache=where)
        readers = [_warm_reader(data, warm)]
        readers.append(_warm_reader(data, warm) if cache == "disk" else readers[0])
        loaders = [_loader(reader, paths, ahead=0, per_step=1) for reader in readers]
        return loaders, (*set(readers), folder)

    def run(state: tuple[Any, Any]) -> dict[str, Any]:
        half = len(paths)
        facts: dict[str, Any] = {}
        for number, loader in enumerate(state[0]):
            start = time.perf_counter()
            _take_steps(loader, number * half, (number + 1) * half, 2 * half, 0)
            facts[f"epoch_{number + 1}_s"] = time.perf_counter() - start
        return facts

    def clean(state: tuple[Any, Any]) -> None:
        state[0][0].close()
        _close((state[0][1], state[1]))

    return Work(run, prepare, clean, output=lambda result: [], facts=lambda result: result)


def _close(state: tuple[Any, Any]) -> None:
    loader, (*readers, folder) = state
    loader.close()
    for reader in readers:
        reader.close()
    folder.cleanup()


def flat(paths: list[str], warm: str, cache_mib: int, every: int) -> Work:
    """Each video is read once, its pixels looked at; memory, descriptors and processes after every so many."""
    from rmsd_fast.data.preprocess import Preprocessor
    from rmsd_fast.data.video import MediaRequest

    def prepare() -> Any:
        return _warm_reader(data_config(cache_mib=cache_mib), warm)

    def run(reader: Any) -> dict[str, Any]:
        def read(path: str) -> int:
            request = MediaRequest(path, "video", VideoConfig(num_frames=8), Preprocessor())
            # Memory that is mapped counts once it was touched.
            return int(reader.read(request).pixels.sum())

        marks = []
        with ThreadPoolExecutor(reader.data.decode_threads) as pool:
            for first in range(0, len(paths), every):
                list(pool.map(read, paths[first : first + every]))
                marks.append({"videos": first + every, **_usage()})
        return {"marks": marks, "decoded": reader.take_counts()["decoded"]}

    return Work(run, prepare, lambda reader: reader.close(), output=lambda result: [], facts=lambda result: result)


def _usage() -> dict[str, float]:
    below = descendants(os.getpid())
    return {
        "own_mib": _share_mib(os.getpid()),
        "workers_mib": sum(_share_mib(pid) for pid in below),
        "descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *below)),
        "processes": len(below),
    }


def _share_mib(pid: int) -> float:
    """Resident memory of a process; pages that it shares, as forked workers do, count by its share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


AHEAD = {
    "decoded when asked": functools.partial(ahead, steps_ahead=0, cache_mib=0),
    "one step ahead": functools.partial(ahead, steps_ahead=1, cache_mib=0),
    "one step ahead, memory cache": functools.partial(ahead, steps_ahead=1, cache_mib=1024),
}
EPOCHS = {
    "memory cache": functools.partial(epochs, cache="memory"),
    "disk cache, new reader": functools.partial(epochs, cache="disk"),
}
FLAT = {"one reader": flat}
