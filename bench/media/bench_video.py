"""The media path against the libraries that users have instead, on the same files.

- decode: a 720p video of 60 s, a key frame every 30 or 250 frames, to its 16 or 64 chosen frames; PyAV, decord, OpenCV.
- preprocess: these frames to the patches of the vision tower; Qwen3-VL's own video processor.
- file: both together, ours through a `MediaReader` and its worker.
- ahead, epochs: what a step waits for its data; what a second epoch costs. flat: memory over 1,000 videos.
- cuda: decoding by NVDEC and patches on the GPU. Runs where there is one; nothing is claimed without.

Each variant has a process of its own (process.py). Frames and patches of all variants are compared before they are
timed. Files are made once (files.py).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.core.goals import GOPS, MOST_LEVELS, SIZES, verdicts
from bench.core.measure import OURS, Unavailable, in_turns, spread
from bench.media import files
from bench.media.process import VariantProcess
from bench.media.variants import PARTS
from rmsd_fast.config import VideoConfig
from rmsd_fast.data.preprocess import Preprocessor, frame_indices

NAME = "media"
pytestmark = pytest.mark.timeout(1800)


@dataclass(frozen=True)
class Pace:
    """Rounds: between least and most, while a variant's calls took less than `seconds`; slow ones `least_slow`."""

    seconds: float
    least: int
    most: int
    least_slow: int = 2
    # Slow: a first call longer than this, and so many times the CPU seconds of the fastest.
    slow_s: float = 3.0
    slow_times: float = 2.0


# Left out by --quick.
SLOW = ("PyAV sequential", "OpenCV grab", "PyAV, HF processor")
FULL, QUICK = Pace(15.0, 4, 9), Pace(0.5, 1, 3, least_slow=1)
# Time on a GPU is scarce, and what is compared differs by a factor.
ON_CUDA = Pace(4.0, 3, 9)


@contextlib.contextmanager
def started(
    part: str, arguments: dict[str, Any], threads: int = 1, names: list[str] | None = None
) -> Iterator[tuple[dict[str, VariantProcess], dict[str, str]]]:
    """The processes of a part's variants, and why others do not run here. Ours has to."""
    running: dict[str, VariantProcess] = {}
    not_run: dict[str, str] = {}
    try:
        for name in names or PARTS[part]:
            taken = inspect.signature(PARTS[part][name]).parameters
            own = {key: value for key, value in arguments.items() if key in taken}
            running[name] = VariantProcess(part, name, own, threads)
        for name, process in list(running.items()):
            try:
                process.ready()
            except Unavailable as error:
                if name == OURS:
                    raise
                not_run[name] = str(error)
                running.pop(name).close()
        yield running, not_run
    finally:
        for process in running.values():
            process.close()


def interleaved(calls: dict[str, Callable[[], dict]], pace: Pace) -> dict[str, list[dict]]:
    """Calls of each variant, in rounds whose order turns."""
    found: dict[str, list[dict]] = {name: [] for name in calls}
    for index, name in in_turns(list(calls), pace.most):
        own, first = found[name], [calls[0]["cpu_s"] for calls in found.values() if calls]
        slow = own and own[0]["cpu_s"] > max(pace.slow_s, pace.slow_times * min(first))
        least = min(pace.least, pace.least_slow) if slow else pace.least
        if index < least or (not slow and sum(call["wall_s"] for call in own) < pace.seconds):
            own.append(calls[name]())
    return found


def numbers(calls: list[dict]) -> dict[str, Any]:
    """Of one variant: spreads of what is measured, the last of other facts, and the number of rounds."""
    own: dict[str, Any] = {"rounds": len(calls)}
    for key, value in calls[-1].items():
        measured = key.endswith("_s") and isinstance(value, float)
        own[key] = spread([call[key] for call in calls]) if measured else value
    return own


def frame_differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Mean over all frames, and of the frame that differs most, in levels of 256. Both [F, H, W, 3]."""
    assert ours.shape == theirs.shape, f"frames: expected {ours.shape}, got {theirs.shape}"
    far = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(ours, theirs, strict=True)]
    return {"mean": sum(far) / len(far), "worst_frame": max(far)}


def patch_differences(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Largest difference in levels of 256, before normalisation, and after it."""
    assert ours.shape == theirs.shape, f"patches: expected {ours.shape}, got {theirs.shape}"
    levels = values = 0.0
    for first in range(0, len(ours), 1024):
        a, b = (array[first : first + 1024] for array in (ours, theirs))
        values = max(values, float(np.abs(a - b).max()))
        levels = max(levels, float(np.abs(np.rint(a * 127.5 + 127.5) - np.rint(b * 127.5 + 127.5)).max()))
    return {"levels": int(levels), "values": values}


def measured(
    part: str,
    arguments: dict[str, Any],
    pace: Pace,
    compare: Callable[[np.ndarray, np.ndarray], dict[str, float]] | None = None,
    *,
    warm_up: bool = False,
    threads: int = 1,
) -> dict[str, Any]:
    """Return variants, differences and what did not run.

    compare: of the results of two variants. Peaks come from a last call, whose results are compared; None: the part has
    neither. warm_up: a call of each that does not count; where calls take seconds its share would be too small to
    notice.
    """
    files.FOLDER.mkdir(parents=True, exist_ok=True)
    names = [name for name in PARTS[part] if pace is not QUICK or name not in SLOW]
    differences: dict[str, dict[str, float]] = {}
    with (
        started(part, arguments, threads, names) as (running, not_run),
        tempfile.TemporaryDirectory(dir=files.FOLDER) as folder,
    ):
        if warm_up:
            for process in running.values():
                process.call()
        calls = interleaved({name: process.call for name, process in running.items()}, pace)
        variants = {name: numbers(own) for name, own in calls.items()}
        expected = Path(folder) / "ours.npy"
        for name, process in running.items() if compare else ():
            result = expected if name == OURS else Path(folder) / "theirs.npy"
            variants[name] |= process.memory(result)
            if name != OURS and result.exists():
                shown = [np.load(path, mmap_mode="r") for path in (expected, result)]
                if shown[0].shape == shown[1].shape or part != "cuda":
                    differences[name] = compare(*shown)
                result.unlink()
        libraries = {name: process.library for name, process in running.items() if process.library}
    return {"variants": variants, "differences": differences, "not_run": not_run, "libraries": libraries}


def whole_runs(most: int) -> Pace:
    """Return the pace of parts whose variants are whole runs: so many calls each, in turned order."""
    return Pace(0.0, most, most, least_slow=most)


@pytest.fixture
def finish(publish: Callable[[dict], dict], capsys) -> Callable[..., None]:
    """Publish the record of a case, and print what it says about the goals."""

    def run(name: str, part: str, shape: dict[str, Any], found: dict[str, Any], device: str = "cpu") -> None:
        record = {"bench": NAME, "name": name, "part": part, "shape": shape, "device": device, **found}
        publish(record)
        with capsys.disabled():
            for verdict in verdicts([record], device, [NAME]):
                if verdict.where == f"{NAME} {name}":
                    print("{:12s} {}: {}".format(*verdict), flush=True)

    return run


@pytest.fixture
def pace(quick: bool) -> Pace:
    return QUICK if quick else FULL


def chosen(frames: int) -> list[int]:
    """Indices of the frames that a run takes of 1,800."""
    return frame_indices(1800, files.FPS, VideoConfig(num_frames=frames), Preprocessor())


def read_once(path: Path) -> str:
    """The path of a file that is in the page cache now."""
    with path.open("rb") as file:
        while file.read(1 << 22):
            pass
    return str(path)


def skip_large(frames: int, quick: bool) -> None:
    if quick and frames > min(SIZES):
        pytest.skip("--quick: 16 frames alone")


@pytest.fixture(scope="session")
def warm() -> str:
    """A small file."""
    return str(files.encoded(files.FOLDER / "64x64.mp4", frames=8, height=64, width=64, gop=8))


def decoded(frames: int) -> str:
    """A file of the chosen frames of the 60 s video; made where it is not there yet."""
    path = files.FOLDER / f"720p-{frames}-frames.npy"
    if not path.exists():
        arguments = {"path": str(files.long_video(30)), "indices": chosen(frames)}
        with started("decode", arguments, names=[OURS]) as (running, _):
            unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
            running[OURS].memory(unfinished)
            unfinished.replace(path)
    return str(path)


def make_files() -> None:
    """What `test_cuda` reads; bench.cuda has it made beside its first sections."""
    files.long_video(30)
    decoded(64)


@pytest.mark.parametrize("gop", GOPS)
@pytest.mark.parametrize("frames", SIZES)
def test_decode(frames: int, gop: int, quick: bool, pace: Pace, finish) -> None:
    skip_large(frames, quick)
    if quick and gop > min(GOPS):
        pytest.skip("--quick: a key frame every 30 frames alone")
    arguments = {"path": read_once(files.long_video(gop)), "indices": chosen(frames)}
    found = measured("decode", arguments, pace, frame_differences)
    far = {name: own["worst_frame"] for name, own in found["differences"].items()}
    assert all(levels <= MOST_LEVELS for levels in far.values()), f"other frames than ours: {far}"
    finish(f"decode-720p-{frames}f-gop{gop}", "decode", {"frames": frames, "GOP": gop}, found)


@pytest.mark.parametrize("frames", SIZES)
def test_preprocess(frames: int, quick: bool, pace: Pace, finish) -> None:
    skip_large(frames, quick)
    found = measured("preprocess", {"raw": decoded(frames)}, pace, patch_differences, warm_up=True)
    finish(f"preprocess-720p-{frames}f", "preprocess", {"frames": frames}, found)


@pytest.mark.parametrize("frames", SIZES)
def test_file(frames: int, quick: bool, pace: Pace, finish, warm: str) -> None:
    skip_large(frames, quick)
    arguments = {"path": read_once(files.long_video(30)), "indices": chosen(frames), "warm": warm}
    found = measured("file", arguments, pace, patch_differences)
    finish(f"file-720p-{frames}f-gop30", "file", {"frames": frames, "GOP": 30}, found)


@pytest.fixture
def clips(quick: bool, tmp_path: Path) -> list[str]:
    """Distinct 720p clips of 6 s."""
    return [str(path) for path in files.copies(files.short_video(6), tmp_path, 2 if quick else 12)]


def test_ahead(quick: bool, finish, warm: str, clips: list[str]) -> None:
    per_step = 1 if quick else 2
    # A step about 1.5 times as long as one worker decodes its prompts, 0.45 s each, at 95 GFLOP/s.
    arguments = {"paths": clips, "warm": warm, "per_step": per_step, "products": per_step * 32}
    found = measured("ahead", arguments, whole_runs(1 if quick else 2))
    shape = {"clips": len(clips), "a step": per_step}
    finish("ahead-720p", "ahead", shape, found)


def test_epochs(quick: bool, finish, warm: str, clips: list[str]) -> None:
    found = measured("epochs", {"paths": clips, "warm": warm}, whole_runs(1 if quick else 3))
    finish("epochs-720p", "epochs", {"clips": len(clips), "frames": 16}, found)


def test_flat(quick: bool, finish, warm: str, tmp_path: Path) -> None:
    count = 200 if quick else 1000
    larger = files.encoded(files.FOLDER / "360p.mp4", frames=24, height=360, width=640, gop=12)
    small = files.copies(Path(warm), tmp_path / "small", count - count // 10)
    large = files.copies(larger, tmp_path / "large", count // 10)
    paths = [str(large.pop() if number % 10 == 9 else small.pop()) for number in range(count)]
    found = measured("flat", {"paths": paths, "warm": warm, "cache_mib": 32, "every": 100}, whole_runs(1))
    finish("flat", "flat", {"videos": count}, found)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; prepared, nothing is claimed without")
def test_cuda(toy: bool, finish, warm: str) -> None:
    if toy:
        pytest.skip("--toy: see test_toy")
    path = read_once(files.long_video(30))
    arguments = {"path": path, "indices": chosen(64), "warm": warm, "raw": decoded(64)}
    # The CPU route may have all cores.
    found = measured("cuda", arguments, ON_CUDA, patch_differences, warm_up=True, threads=len(os.sched_getaffinity(0)))
    finish("cuda-720p-64f-gop30", "cuda", {"frames": 64, "GOP": 30}, found, device="cuda")


def test_toy(toy: bool, finish, warm: str) -> None:
    """What `test_cuda` does, with a tiny file and on the CPU."""
    if not toy:
        pytest.skip("a rehearsal, with --toy alone")
    indices = frame_indices(8, files.FPS, VideoConfig(num_frames=4), Preprocessor())
    found = measured("file", {"path": warm, "indices": indices, "warm": warm}, QUICK, patch_differences)
    finish("toy", "file", {"frames": 4, "GOP": 8}, found)
