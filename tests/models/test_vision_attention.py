"""Test vision attention batched over frames against transformers' loop over frames, alone and in the towers."""

from __future__ import annotations

import copy

import pytest
import torch
from family_students import build_family, compute_in_float64
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rmsd_fast.models import vision_attention
from rmsd_fast.models.vision_attention import FRAMES, frame_attention, vision_implementation

# The cases are equal frames, two frame sizes, sizes that recur, as windows at edges do, single patches, and one frame.
FRAME_SIZES = [[6, 6, 6], [4, 4, 9, 9, 9], [4, 2, 4, 2, 1, 4, 2], [1, 1, 1], [7]]


def make_rows(sizes: list[int], dtype: torch.dtype, *, heads: int = 2, size: int = 8) -> list[torch.Tensor]:
    """Return query, key and value [S, H, d], strided as the fused projection of a tower leaves them."""
    fused = torch.randn(sum(sizes), 3, heads, size, dtype=torch.float64).to(dtype)
    return list(fused.requires_grad_().unbind(1))


def loop(rows: list[torch.Tensor], sizes: list[int], scale: float | None = None) -> torch.Tensor:
    """Return [S, H, d] from one attention call per frame."""
    frames = zip(*(part.transpose(0, 1)[None].split(sizes, dim=2) for part in rows), strict=True)
    return torch.cat([scaled_dot_product_attention(*frame, scale=scale)[0].transpose(0, 1) for frame in frames])


def edges(sizes: list[int]) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def with_gradients(output: torch.Tensor, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(output)
    return [output, *torch.autograd.grad((output * weight).sum(), rows)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("sizes", FRAME_SIZES, ids=str)
def test_equals_one_call_per_frame(sizes: list[int], scale: float | None, dtype: torch.dtype, tolerance: float) -> None:
    rows = make_rows(sizes, dtype)
    wanted = with_gradients(loop(rows, sizes, scale), rows)
    found = with_gradients(frame_attention(*rows, edges(sizes), max(sizes), scale=scale), rows)
    for ours, oracle in zip(found, wanted, strict=True):
        assert ours.shape == oracle.shape
        assert (ours - oracle).abs().max() <= tolerance * oracle.abs().max()


def test_equals_hand_computed_values() -> None:
    # Two frames of two patches have equal scores, so each patch gets the mean value of its own frame.
    value = torch.tensor([1.0, 3.0, 10.0, 20.0]).view(4, 1, 1)
    output = frame_attention(torch.zeros(4, 1, 1), torch.ones(4, 1, 1), value, edges([2, 2]), 2)
    assert output.flatten().tolist() == [2.0, 2.0, 15.0, 15.0]


@pytest.mark.parametrize(("sizes", "calls"), [([6] * 50, 1), ([4] * 20 + [9] * 30, 2), ([4, 2, 4, 2, 1, 4, 2], 3)])
def test_calls_attention_once_per_frame_size(sizes: list[int], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def counted(query: torch.Tensor, *rest: torch.Tensor, **options: float) -> torch.Tensor:
        shapes.append(tuple(query.shape))
        return scaled_dot_product_attention(query, *rest, **options)

    monkeypatch.setattr(vision_attention, "scaled_dot_product_attention", counted)
    frame_attention(*make_rows(sizes, torch.float32), edges(sizes), max(sizes))
    assert len(shapes) == calls
    assert sum(frames * length for frames, _, length, _ in shapes) == sum(sizes)


def test_edges_that_do_not_end_at_the_last_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="cu_seqlens: expected the last value 6, the number of patches, got 5"):
        frame_attention(*make_rows([6], torch.float32), edges([3, 2]), 3)


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_no_patches(sizes: list[int]) -> None:
    output = frame_attention(*make_rows([], torch.float32), edges(sizes), 0)
    assert output.shape == (0, 2, 8) and output.dtype == torch.float32


def tower_output(model: nn.Module, pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Return the features of the tower, including deepstack, and the gradient of each of its weights."""
    model.zero_grad()
    features = model.model.visual(pixels.to(model.dtype), grid_thw=grids, return_dict=True)
    outputs = [features.pooler_output, *(getattr(features, "deepstack_features", None) or [])]
    generator = torch.Generator().manual_seed(4)
    sum((part * torch.randn(part.shape, generator=generator).to(part)).sum() for part in outputs).backward()
    return outputs + [weight.grad for weight in model.model.visual.parameters()]


# The grids are a video of three frames, an image, and a video with odd edges in windows of 2 x 2 merged patches.
GRIDS = torch.tensor([[3, 4, 8], [1, 6, 6], [2, 6, 10]])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_towers_equal_the_loop(name: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = compute_in_float64(build_family(name), monkeypatch)
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), 24, dtype=torch.float64)
    wanted = tower_output(model, pixels, GRIDS)
    assert vision_implementation(model) == FRAMES
    model.set_attn_implementation({"vision_config": FRAMES})
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    for ours, oracle in zip(tower_output(model, pixels, GRIDS), wanted, strict=True):
        # The gradient of a key bias is only rounding error.
        assert (ours - oracle).abs().max() <= 1e-12 * max(oracle.abs().max(), 1.0)


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "smolvlm"])
def test_towers_that_attend_to_whole_images_are_unchanged(name: str) -> None:
    assert vision_implementation(build_family(name)) is None


def test_a_tower_on_flash_attention_is_unchanged() -> None:
    model = build_family("qwen3_vl")
    model.config.vision_config._attn_implementation_internal = "flash_attention_3"
    assert vision_implementation(model) is None


def test_flash_attention_is_chosen_if_it_is_installed_and_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("qwen3_vl").bfloat16()
    monkeypatch.setattr(vision_attention, "is_flash_attn_2_available", lambda: True)
    assert vision_implementation(model) == FRAMES
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert vision_implementation(model) == "flash_attention_2"
    assert vision_implementation(model.float()) == FRAMES


def test_a_tower_without_frame_edges_is_refused() -> None:
    model = build_family("internvl")
    model.set_attn_implementation({"vision_config": FRAMES})
    with pytest.raises(ValueError, match="InternVLVisionAttention: expected cu_seq_lens_q.*set another attention"):
        model.model.get_image_features(torch.randn(1, 3, 8, 8))


@pytest.mark.cuda
@pytest.mark.parametrize("sizes", FRAME_SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 72), (torch.float16, 64), (torch.bfloat16, 12)])
def test_equals_one_call_per_frame_on_cuda(sizes: list[int], dtype: torch.dtype, size: int) -> None:
    rows = [part.detach().cuda().requires_grad_() for part in make_rows(sizes, dtype, size=size)]
    exact = [part.detach().double().requires_grad_() for part in rows]
    truth = with_gradients(loop(exact, sizes), exact)
    eager = with_gradients(loop(rows, sizes), rows)
    found = with_gradients(frame_attention(*rows, edges(sizes).cuda(), max(sizes)), rows)
    for ours, oracle, other in zip(found, truth, eager, strict=True):
        assert (ours - oracle).abs().max() <= 2 * (other - oracle).abs().max() + 1e-3


@pytest.mark.cuda
def test_half_precision_on_cuda_with_known_max_seqlen_does_not_synchronize() -> None:
    rows = [part.detach().cuda() for part in make_rows([6, 6, 4], torch.bfloat16)]
    starts = edges([6, 6, 4]).cuda()
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            frame_attention(*rows, starts, 6)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_towers_on_cuda_equal_the_loop() -> None:
    model = build_family("qwen3_vl").cuda()
    pixels, grids = torch.randn(int(GRIDS.prod(-1).sum()), 24, device="cuda"), GRIDS.cuda()
    wanted = tower_output(copy.deepcopy(model), pixels, grids)
    model.set_attn_implementation({"vision_config": FRAMES})
    for ours, oracle in zip(tower_output(model, pixels, grids), wanted, strict=True):
        assert (ours - oracle).abs().max() <= 1e-4 * max(oracle.abs().max(), 1.0)
