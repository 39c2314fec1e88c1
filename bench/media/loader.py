"""Whole readers: what a step waits for its data, what a second epoch costs, and memory over many videos.

ahead: `PromptLoader` under a step of a fixed number of matrix products, with and without decode-ahead and cache.
epochs: the same without a step: all data of an epoch, first and second. flat: distinct small videos through one
`MediaReader` with a small cache.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
import torch

from bench.media.process import Work
from rmsd_fast.config import DataConfig, VideoConfig
from rmsd_fast.data.loader import PromptLoader
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import MediaRequest

# One product of this side squared in float32, 2 * 1024³ flop.
_SIDE = 1024
_FRAMES = 16


def data_config(**changes: Any) -> DataConfig:
    return DataConfig(**{"decoder": "cpu", "decode_threads": 2} | changes)


def warm_reader(data: DataConfig, warm: str, **options: Any) -> MediaReader:
    """Return a reader whose worker has started: a run pays for that once. warm: a small file."""
    reader = MediaReader(data, **options)
    reader.read(MediaRequest(warm, "video", VideoConfig(num_frames=2), Preprocessor()))
    return reader


def _loader(
    stack: ExitStack, data: DataConfig, paths: list[str], warm: str, ahead: int = 0, per_step: int = 1
) -> PromptLoader:
    """Return a loader of these videos, a question about each; the stack closes it."""
    from bench.prefix.groups import HIDDEN, LAYERS, TEXTS, load

    reader = warm_reader(data, warm)
    stack.callback(reader.close)
    facts = {"question": TEXTS[0], "task_type": "temporal", "answer": "0.0 to 1.0"}
    builder = PromptBuilder(load(HIDDEN, LAYERS, "float32", "cpu"), VideoConfig(num_frames=_FRAMES), reader)
    loader = PromptLoader(
        builder,
        [Question(id=f"q{i}", videos=(path,), **facts) for i, path in enumerate(paths)],
        stage="bench",
        seed=0,
        positions_per_step=per_step,
        rank=0,
        size=1,
        threads=data.decode_threads,
        ahead=ahead,
        max_prompt_tokens=16384,
    )
    stack.callback(loader.close)
    return loader


def _take_steps(
    loader: PromptLoader, first: int, last: int, last_step: int, products: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of waiting for data and of computing, by step. products: a step's work in the main thread."""
    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    waits, computes = [], []
    for step in range(first, last):
        start = time.perf_counter()
        prompts = loader.step(step, last_step)
        waits.append(time.perf_counter() - start)
        assert all(len(prompt.media) == 1 for prompt in prompts)
        start = time.perf_counter()
        for _ in range(products):
            torch.mm(left, right)
        computes.append(time.perf_counter() - start)
    return waits, computes


def _work(open_loaders: Any, run: Any) -> Work:
    """Loaders that `open_loaders(stack)` returns, and `run(loaders)`, which returns the facts of a call."""

    def prepare() -> tuple[ExitStack, Any]:
        stack = ExitStack()
        return stack, open_loaders(stack)

    return Work(lambda state: run(state[1]), prepare, lambda state: state[0].close(), lambda _: [], facts=dict)


def ahead(paths: list[str], warm: str, steps_ahead: int, cache_mib: int, per_step: int, products: int) -> Work:
    """Two epochs. A step's data has to be there when it begins; the first step's is never ahead of anything."""
    data = data_config(cache_mib=cache_mib, decode_ahead=steps_ahead)
    per_epoch = len(paths) // per_step

    def run(loader: PromptLoader) -> dict[str, Any]:
        waits, computes = _take_steps(loader, 0, 2 * per_epoch, 2 * per_epoch, products)
        return {
            "first_wait_s": waits[0],
            "epoch_1_wait_s": sum(waits[1:per_epoch]) / (per_epoch - 1),
            "epoch_2_wait_s": sum(waits[per_epoch:]) / per_epoch,
            "compute_s": sum(computes) / len(computes),
            "waits_s": waits,
        }

    return _work(lambda stack: _loader(stack, data, paths, warm, steps_ahead, per_step), run)


def epochs(paths: list[str], warm: str, cache: str) -> Work:
    """Two epochs of data alone. With the disk cache the second one has a new reader, as the next run has."""

    def open_loaders(stack: ExitStack) -> list[PromptLoader]:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-video-"))
        if cache == "memory":
            return [_loader(stack, data_config(cache_mib=1024), paths, warm)] * 2
        return [_loader(stack, data_config(cache_mib=0, disk_cache=f"{folder}/cache"), paths, warm) for _ in range(2)]

    def run(loaders: list[PromptLoader]) -> dict[str, Any]:
        count, facts = len(paths), {}
        for number, loader in enumerate(loaders):
            start = time.perf_counter()
            _take_steps(loader, number * count, (number + 1) * count, 2 * count, 0)
            facts[f"epoch_{number + 1}_s"] = time.perf_counter() - start
        return facts

    return _work(open_loaders, run)


def flat(paths: list[str], warm: str, cache_mib: int, every: int) -> Work:
    """Each video is read once, its pixels looked at; memory, descriptors and processes after every so many."""

    def run(reader: MediaReader) -> dict[str, Any]:
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

    prepare = partial(warm_reader, data_config(cache_mib=cache_mib), warm)
    return Work(run, prepare, lambda reader: reader.close(), lambda _: [], facts=dict)


def _usage() -> dict[str, float]:
    """Pages that processes share, as forked workers do, count by their share (PSS)."""
    own = psutil.Process()
    below = own.children(recursive=True)
    return {
        "own_mib": own.memory_full_info().pss / 2**20,
        "workers_mib": sum(process.memory_full_info().pss for process in below) / 2**20,
        "descriptors": sum(process.num_fds() for process in (own, *below)),
        "processes": len(below),
    }


AHEAD = {
    "decoded when asked": partial(ahead, steps_ahead=0, cache_mib=0),
    "one step ahead": partial(ahead, steps_ahead=1, cache_mib=0),
    "one step ahead, memory cache": partial(ahead, steps_ahead=1, cache_mib=1024),
}
EPOCHS = {"memory cache": partial(epochs, cache="memory"), "disk cache, new reader": partial(epochs, cache="disk")}
FLAT = {"one reader": flat}
