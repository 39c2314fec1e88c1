"""Test that the compiled media ops equal torch's resize and patches bit for bit, in every build of the loops."""

from __future__ import annotations

import ctypes
import mmap
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from native_video_cases import noise

from rmsd_kernels import native, resize_frames, video_patches
from rmsd_kernels.video import native_patches
from rmsd_kernels.video.patches import DTYPES, TorchForm

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native ops: {native.why_not()}")

LEVELS = {0: "portable", 1: "avx2", 2: "avx512"}
# Each case maps H, W to height, width and gives the channels.
SHAPES = {
    "several blocks of rows, columns read in place and staged": (40, 300, 24, 160, 3),
    "four channels, in place up to the last pixel": (20, 258, 40, 192, 4),
    "one channel, enlarged": (33, 31, 64, 96, 1),
    "two channels": (45, 70, 28, 56, 2),
    "one pixel": (1, 1, 32, 33, 3),
    "one row": (1, 90, 3, 70, 3),
    "one column": (90, 1, 70, 3, 3),
    "one pixel of result": (9, 7, 1, 1, 3),
    "shrunk 200-fold along y, x is kept": (600, 8, 3, 8, 3),
    "shrunk 200-fold along x, y is kept": (5, 1000, 5, 5, 3),
}
STATISTICS = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


@pytest.fixture(params=LEVELS, ids=LEVELS.get)
def level(request):
    """Run the test with each build of the loops that this processor supports."""
    if torch.ops.rmsd_kernels.cpu_level(request.param) != request.param:
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    yield request.param
    torch.ops.rmsd_kernels.cpu_level(max(LEVELS))


def layouts(frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the same frames in various memory layouts."""
    padded = F.pad(frames, (1, 2, 3, 1))
    inner = (..., slice(3, -1), slice(1, -2))
    return {
        "planes": frames,
        "NHWC, as torchcodec": frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "part of NHWC": padded.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[inner],
        "part of planes": padded[inner],
        "columns first": frames.transpose(2, 3).contiguous().transpose(2, 3),
        "mirrored copy of every second": frames.repeat_interleave(2, 3)[..., ::2],
    }


def resized(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    out = torch.full((*frames.shape[:2], height, width), 77, dtype=torch.uint8)
    native_patches.resize_frames_(out, frames)
    return out


@pytest.mark.parametrize("extreme", [False, True], ids=["noise", "0 and 255"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_resize_equals_torch(level, shape, extreme):
    in_height, in_width, height, width, channels = shape
    frames = noise(2, channels, in_height, in_width, extreme=extreme)
    expected = TorchForm.resized(frames, height, width)
    for name, view in layouts(frames).items():
        assert torch.equal(view, frames)
        assert torch.equal(resized(view, height, width), expected), name


def test_resize_of_random_sizes_equals_torch(level):
    rng = random.Random(level)
    for _ in range(150):
        # Results have at least 2 pixels, because without AVX2, torch 2.13 gives different numbers if an axis has one
        # pixel.
        size = [rng.choice((rng.randint(i, 12), rng.randint(i, 150), rng.randint(i, 500))) for i in (1, 1, 2, 2)]
        frames = noise(1, 3, *size[:2], extreme=rng.random() < 0.5)
        if rng.random() < 0.5:
            frames = frames.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(resized(frames, *size[2:]), TorchForm.resized(frames, *size[2:])), size


def test_hand_worked_resize():
    # From 2 to 1 pixel, the taps are at a distance of 0.5 on both sides with weights of 1/2 each: 2^14 / 2, rounded
    # half up.
    frames = torch.tensor([[[[10, 21]]]], dtype=torch.uint8)
    assert resized(frames, 1, 1).item() == 16
    # From 1 pixel to any number, all taps but one are outside, and the weights are divided by their sum.
    assert resized(frames[..., :1], 2, 3).unique().tolist() == [10]
    # When doubling, the taps of an output pixel are 1.75, 0.75, 0.25 and 1.25 away, with weights -3/128, 29/128,
    # 111/128 and -9/128. A pixel that only reaches beyond the edge with a negative weight is clamped to 0.
    row = torch.tensor([[[[0, 0, 0, 255, 255, 255]]]], dtype=torch.uint8)
    assert (
        resized(row, 1, 12).flatten().tolist() == [0] * 5 + [round(255 * 26 / 128), round(255 * 102 / 128)] + [255] * 5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "patch", "span", "merge"),
    [(3, 16, 2, 2), (1, 14, 2, 2), (2, 14, 2, 1), (4, 4, 3, 3), (2, 16, 1, 2)],
    ids=["odd F", "an image, patches of 14", "merge 1", "groups of 3, one short of 2 frames", "single frames"],
)
def test_patches_equal_the_torch_form(level, count, patch, span, merge, dtype):
    height, width = 2 * patch * merge, 3 * patch * merge
    sizes = {"patch_size": patch, "temporal_patch_size": span, "merge_size": merge}
    for in_height, in_width in ((50, 75), (height, width)):  # Frames are resized, and read in place or copied.
        for name, frames in layouts(noise(count, 3, in_height, in_width)).items():
            arguments = {"height": height, "width": width, "dtype": dtype, **sizes, **STATISTICS}
            got = video_patches(frames, impl="native", **arguments)
            assert torch.equal(got, video_patches(frames, impl="torch", **arguments)), name


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_patches_of_other_channels(level, channels):
    for frames in layouts(noise(2, channels, 40, 50)).values():
        arguments = {"height": 32, "width": 64, "mean": (0.4, 0.5, 0.6, 0.7)[:channels], "std": (0.25,) * channels}
        assert torch.equal(
            video_patches(frames, impl="native", **arguments), video_patches(frames, impl="torch", **arguments)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_very_small_and_very_large_values(level, dtype):
    """float16 results include values below 2^-14, exactly 0, and infinity beyond 65504."""
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for std in (3e-6, 7.6e-6, 1.0, 3e4, 1e6, 1e9):
        arguments = {"height": 16, "width": 16, "merge_size": 1, "mean": (0.5,), "std": (std,), "dtype": dtype}
        got, expected = (video_patches(frames, impl=impl, **arguments) for impl in ("native", "torch"))
        assert torch.equal(got, expected), std


def test_nothing_beyond_the_frames_is_read(level):
    """The last frame ends at the end of a mapping, so reading one more byte would kill the process."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    for shape in ((37, 66, 3), (16, 128, 3), (16, 130, 4), (33, 48, 1), (3, 1, 3), (18, 65, 2)):
        pixels = noise(*shape).contiguous()
        pages = -(-pixels.numel() // page)
        mapping = mmap.mmap(-1, (pages + 1) * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        assert libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
        last = torch.frombuffer(mapping, dtype=torch.uint8, count=pixels.numel(), offset=pages * page - pixels.numel())
        last.copy_(pixels.flatten())
        for frame in (last.view(shape).permute(2, 0, 1)[None], last.view(1, shape[2], *shape[:2])):
            for height, width in ((28, 56), (96, 100)):
                assert torch.equal(resized(frame, height, width), TorchForm.resized(frame.clone(), height, width))
        del last, frame


def test_out_is_written_in_place_and_nothing_next_to_it(level):
    """Use slices of one buffer, like those of a memory map."""
    buffer = torch.full((5, 3, 30, 50), 9, dtype=torch.uint8)
    frames = noise(3, 3, 45, 71)
    out = resize_frames(frames, height=30, width=50, out=buffer[1:4])
    assert out.data_ptr() == buffer[1:].data_ptr() and torch.equal(out, TorchForm.resized(frames, 30, 50))
    assert torch.equal(buffer[1:4], out) and (buffer[0] == 9).all() and (buffer[4] == 9).all()
    same_size = out.clone()
    assert torch.equal(resize_frames(same_size, height=30, width=50, out=buffer[:3]), same_size)
    with pytest.raises(RuntimeError, match="out: overlaps with frames"):
        resize_frames(buffer[1:4, :, :20], height=30, width=50, out=buffer[1:4])


def test_several_threads_at_once(level):
    frames = noise(4, 3, 90, 160).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    arguments = {"height": 64, "width": 96, **STATISTICS}
    patches, small = video_patches(frames, **arguments), resize_frames(frames, height=64, width=96)

    def work(i: int) -> bool:
        selected = slice(i % 3, i % 3 + 2)
        same = torch.equal(resize_frames(frames[selected], height=64, width=96), small[selected])
        return same and torch.equal(video_patches(frames, **arguments), patches)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(40)))


def test_torch_threads_and_forked_processes():
    """After a fork, torch's threads do not exist, and a single frame does not need them."""
    code = """
import os, torch
from rmsd_kernels import resize_frames, video_patches
frames = torch.randint(0, 256, (5, 3, 90, 160), dtype=torch.uint8)
arguments = {"height": 64, "width": 96, "mean": [0.5] * 3, "std": [0.5] * 3}
results = []
for threads in (1, 3):
    torch.set_num_threads(threads)
    results.append((video_patches(frames, **arguments), resize_frames(frames, height=64, width=96)))
assert all(map(torch.equal, *results))
child = os.fork()
if child == 0:
    same = torch.equal(resize_frames(frames[2:3], height=64, width=96), results[0][1][2:3])
    os._exit(0 if same else 7)
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    frames, ops, check = noise(3, 3, 40, 50), torch.ops.rmsd_kernels, torch.library.opcheck
    mean, std = torch.tensor([120.0, 110.0, 100.0]), torch.tensor([60.0, 61.0, 62.0])
    check(ops.video_patches.default, (frames, 32, 64, 16, 2, 2, mean, std, dtype))
    if dtype == torch.float32:
        check(ops.resize_frames_.default, (torch.zeros(3, 3, 24, 32, dtype=torch.uint8), frames))


def test_inside_torch_compile(monkeypatch):
    """Check that the in-place write is part of the graph."""
    assert native.available()  # Load the library, because tracing cannot load it.
    monkeypatch.setattr(native, "available", lambda: True)
    mean, std = torch.full((3,), 127.5), torch.full((3,), 127.5)

    def both(frames):
        out = torch.zeros(3, 3, 24, 32, dtype=torch.uint8)
        native_patches.resize_frames_(out, frames)
        return out + 1, native_patches.video_patches(frames, 32, 64, 16, 2, 2, mean, std, torch.bfloat16) * 2.0

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    frames = noise(3, 3, 40, 50)
    assert all(map(torch.equal, compiled(frames), both(frames)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.zeros(1, 3, 32, 32)}, "frames: expected uint8"),
        ({"frames": torch.zeros(1, 5, 32, 32, dtype=torch.uint8)}, r"expected shape \[F, C, H, W\] with C in 1..4"),
        ({"frames": torch.zeros(3, 32, 32, dtype=torch.uint8)}, r"expected shape \[F, C, H, W\]"),
        ({"frames": torch.zeros(0, 3, 32, 32, dtype=torch.uint8)}, "no empty axis"),
        ({"height": 0}, "height and width: expected numbers above 0"),
        ({"height": 48}, "expected multiples of 32, got 48 and 32"),
        ({"patch": 0}, r"patch: expected 1\.\.64"),
        ({"mean": torch.zeros(2)}, r"mean: expected shape \[3\]"),
        ({"std": torch.zeros(3).double()}, "std: expected float32"),
        ({"dtype": torch.float64}, "dtype: expected float32, bfloat16 or float16"),
    ],
)
def test_refusals_of_the_patches(change, message):
    arguments = {"frames": torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "height": 32, "width": 32, "patch": 16}
    arguments |= {"temporal": 2, "merge": 2, "mean": torch.ones(3), "std": torch.ones(3), "dtype": torch.float32}
    with pytest.raises(RuntimeError, match=message):
        native_patches.video_patches(*(arguments | change).values())


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2, 3, 8, 8), "out: expected a contiguous uint8 tensor"),
        (torch.zeros(2, 3, 8, 16, dtype=torch.uint8)[..., ::2], "out: expected a contiguous uint8 tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"out: expected the frames and channels of frames, \[2, 3,"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), "height and width: expected numbers above 0"),
    ],
)
def test_refusals_of_the_resize(out, message):
    with pytest.raises(RuntimeError, match=message):
        native_patches.resize_frames_(out, noise(2, 3, 9, 9))


def test_missing_library_is_reported(tmp_path):
    code = (
        "from pathlib import Path; import torch; from rmsd_kernels import native, resize_frames\n"
        f"native.LIBRARY = Path({str(tmp_path)!r}) / '_native.abi3.so'\n"
        "frames = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)\n"
        "print(resize_frames(frames, height=2, width=2).shape)\n"
        "try:\n    resize_frames(frames, height=2, width=2, impl='native')\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "[1, 3, 2, 2]" in done.stdout and "'native' does not support this call" in done.stdout
    assert "was not built" in done.stdout
