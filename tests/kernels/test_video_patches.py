"""Test the media functions: patch order, errors, the torch form, and the Triton kernels in their interpreter."""

from __future__ import annotations

import pytest
import torch
from native_video_cases import noise, smooth_frames
from torch import Tensor
from triton_cases import Case, interpret, main

from rmsd_kernels import resize_frames, video_patches
from rmsd_kernels.video.patches import resize_in_float

CASES: dict[str, Case] = {}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 values as they are stored; Triton's interpreter truncates to bfloat16 instead of rounding."""
    if dtype == torch.bfloat16 and values.device.type == "cpu":
        return (values.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    return values.to(dtype)


def check_patches(frames: Tensor, dtype: torch.dtype, **arguments) -> float:
    """Compare the kernel's patches with the float resize in torch, and return the share of different values."""
    small = resize_in_float(frames, arguments["height"], arguments["width"])
    got = video_patches(frames, impl="triton", dtype=dtype, **arguments)
    expected = as_stored(video_patches(small, impl="torch", **arguments), dtype)
    assert got.dtype == dtype and got.shape == expected.shape
    # A difference of one level is allowed where float32 sums fall on both sides of a tie.
    level = 1.0 / (255 * min(arguments["std"]))
    assert (got.double() - expected.double()).abs().max() <= level * (1.01 if dtype == torch.float32 else 2.0)
    share = (got != expected).float().mean().item()
    assert share < 5e-3
    return share


@case
def shrunk_channels_last_odd_count(device: torch.device, dtype: torch.dtype) -> float:
    frames = noise(3, 20, 50, 3).to(device).permute(0, 3, 1, 2)
    return check_patches(frames, dtype, height=16, width=32, merge_size=1, **CLIP)


@case
def enlarged_patches_of_14_of_an_image(device: torch.device, dtype: torch.dtype) -> float:
    frames = noise(1, 1, 20, 70).to(device)
    return check_patches(frames, dtype, height=28, width=56, patch_size=14, mean=(0.3,), std=(0.2,))


@case
def no_resize_every_second_column_of_two_channels(device: torch.device, dtype: torch.dtype) -> float:
    frames = noise(2, 2, 32, 128).to(device)[..., ::2]
    numbers = {"mean": (0.5, 0.4), "std": (0.25, 0.5)}
    assert check_patches(frames, dtype, height=32, width=64, **numbers) == 0.0
    return 0.0


@case
def resize_alone(device: torch.device, dtype: torch.dtype) -> float:
    """Check partial tiles, strong downscaling along one axis, and a write into an unaligned slice."""
    if dtype != torch.float32:
        return 0.0
    shares = []
    for shape, height, width in (((2, 3, 17, 40), 9, 35), ((1, 1, 90, 3), 2, 5)):
        frames = noise(*shape).to(device)
        room = torch.full((1 + shape[0] * shape[1] * height * width,), 7, dtype=torch.uint8, device=device)
        out = room[1:].view(*shape[:2], height, width)
        assert resize_frames(frames, height=height, width=width, out=out, impl="triton").data_ptr() == out.data_ptr()
        difference = (out.int() - resize_in_float(frames, height, width).int()).abs()
        assert difference.max() <= 1 and room[0] == 7
        shares.append((difference > 0).float().mean().item())
    assert max(shares) < 1e-2
    return max(shares)


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict]:
    pytest.importorskip("triton")
    return interpret(__file__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_in_the_interpreter(interpreted, name, dtype):
    record = interpreted[name, dtype]
    assert not record["failure"], record["failure"]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_kernels_on_cuda(name, dtype):
    CASES[name](torch.device("cuda"), dtype)


@pytest.mark.cuda
def test_a_clip_on_cuda_equals_torch_on_cuda_and_is_close_to_the_cpu():
    """Compare 720p at the model's size with HF's float resize on CUDA and the integer resize on the CPU."""
    frames = smooth_frames(4, 720, 1280)
    sizes = {"height": 448, "width": 832}
    got = resize_frames(frames.cuda(), **sizes)
    route = resize_frames(frames.cuda(), impl="torch", **sizes)
    difference = (got.int() - route.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    difference = (got.cpu().int() - resize_frames(frames, **sizes).int()).abs()
    assert difference.max() <= 3 and (difference == 0).float().mean() > 0.8
    # The channels are 2^31 bytes or more apart.
    far = torch.empty(2, 2**31 + 7, dtype=torch.uint8, device="cuda")[:, : 3 * 64 * 64].view(2, 3, 64, 64)
    far.copy_(frames[:2, :, :64, :64])
    assert torch.equal(resize_frames(far, height=32, width=32), resize_frames(far.clone(), height=32, width=32))


def test_float_resize_is_close_to_the_integer_resize():
    """The float resize, which the Triton kernels must match, is as close to the CPU's result as on real clips."""
    frames = smooth_frames(2, 180, 320)
    difference = (resize_in_float(frames, 112, 208).int() - resize_frames(frames, height=112, width=208).int()).abs()
    assert difference.max() <= 3 and (difference == 0).float().mean() > 0.8


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_patch_order_and_values_by_hand(impl):
    """The order is (t, h, w, mh, mw) by (c, tp, py, px), and values are (x / 255 - mean) / std."""
    patch, merge, span, height, width = 3, 2, 2, 12, 18
    frames = noise(3, 2, height, width)
    mean, std = (0.2, 0.6), (0.5, 0.25)
    sizes = {"height": height, "width": width, "patch_size": patch, "merge_size": merge, "temporal_patch_size": span}
    got = video_patches(frames, mean=mean, std=std, impl=impl, **sizes)
    assert got.shape == (2 * 4 * 6, 2 * span * patch * patch)
    for n, k in ((0, 0), (1, 0), (2, 5), (7, 13), (23, 35), (24, 9), (40, 17), (47, 26)):
        t, rest = divmod(n, 24)
        block, within = divmod(rest, merge * merge)
        row = (block // 3 * merge + within // merge) * patch
        column = (block % 3 * merge + within % merge) * patch
        c, rest = divmod(k, span * patch * patch)
        slot, rest = divmod(rest, patch * patch)
        pixel = frames[min(t * span + slot, 2), c, row + rest // patch, column + rest % patch].item()
        assert got[n, k].item() == pytest.approx((pixel / 255 - mean[c]) / std[c], abs=1e-6), (n, k)


def test_auto_uses_the_torch_form_if_nothing_was_built(monkeypatch):
    frames = noise(2, 3, 40, 50)
    expected = resize_frames(frames, height=24, width=32), video_patches(frames, height=32, width=64, **HALF)
    monkeypatch.setattr("rmsd_kernels.native.why_not", lambda: "taken away by this test")
    got = resize_frames(frames, height=24, width=32), video_patches(frames, height=32, width=64, **HALF)
    assert all(map(torch.equal, got, expected))
    with pytest.raises(RuntimeError, match="'native' does not support this call: taken away by this test"):
        resize_frames(frames, height=24, width=32, impl="native")


def test_torch_form_writes_into_out_and_keeps_one_pixel_axes_right():
    out = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    frames = torch.full((2, 3, 6, 4), 200, dtype=torch.uint8)
    assert resize_frames(frames, height=1, width=1, out=out, impl="torch").data_ptr() == out.data_ptr()
    assert out.unique().tolist() == [200]
    column = frames.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)[..., :1]
    assert resize_frames(column, height=5, width=3, impl="torch").unique().tolist() == [200]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"frames": None}, TypeError, "frames: expected a torch.Tensor, got NoneType"),
        ({"frames": torch.zeros(2, 3, 32, 32)}, TypeError, "frames: expected uint8, got torch.float32"),
        (
            {"frames": noise(2, 32, 32, 3)},
            ValueError,
            r"C in 1\.\.4, got \[2, 32, 32, 3\]; permute channels-last frames",
        ),
        ({"frames": noise(3, 32, 32)}, ValueError, r"expected shape \[F, C, H, W\]"),
        ({"frames": noise(0, 3, 32, 32)}, ValueError, "at least one frame and one pixel"),
        ({"height": 32.0}, TypeError, "height: expected an integer >= 1, got float 32.0"),
        ({"width": 0}, ValueError, "width: expected an integer >= 1, got 0"),
        ({"height": 48}, ValueError, r"height and width: expected multiples of 32 .* got 48 and 32; round them"),
        ({"patch_size": 65}, ValueError, r"patch_size: expected an integer in 1\.\.64, got 65"),
        ({"merge_size": True}, TypeError, "merge_size: expected an integer >= 1, got bool True"),
        ({"temporal_patch_size": 0}, ValueError, "temporal_patch_size: expected an integer >= 1"),
        ({"mean": (0.5,)}, ValueError, "mean: expected 3 numbers, one per channel of frames, got 1"),
        ({"std": (0.5, 0.0, 0.5)}, ValueError, "std: expected a finite number above 0, got 0.0"),
        ({"mean": (0.5, float("nan"), 0.5)}, ValueError, "mean: expected a finite number, got nan"),
        ({"dtype": torch.float64}, TypeError, "dtype: expected float32, bfloat16 or float16, got torch.float64"),
        ({"impl": "reference"}, ValueError, "impl: expected one of 'auto', 'triton', 'native', 'torch'"),
        ({"impl": "triton"}, RuntimeError, "'triton' does not support this call"),
    ],
)
def test_error_messages_of_refused_calls(change, error, message):
    arguments = {"frames": noise(2, 3, 32, 32), "height": 32, "width": 32, **HALF} | change
    with pytest.raises(error, match=message):
        video_patches(arguments.pop("frames"), **arguments)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8), TypeError, "out: expected uint8, got torch.float32"),
        (noise(2, 3, 8, 9), ValueError, r"out: expected shape \[2, 3, 8, 8\], contiguous, got \[2, 3, 8, 9\]"),
        (noise(2, 3, 8, 16)[..., ::2], ValueError, "with strides"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8, device="meta"), ValueError, "out: expected device cpu, got meta"),
        ([1], TypeError, "out: expected a torch.Tensor, got list"),
    ],
)
def test_refusals_of_out(out, error, message):
    with pytest.raises(error, match=message):
        resize_frames(noise(2, 3, 9, 9), height=8, width=8, out=out)


if __name__ == "__main__":
    main(CASES)
