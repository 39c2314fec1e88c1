"""Compute the vision attention of the Qwen towers in a few calls instead of one call per frame.

In a tower of Qwen2.5-VL or Qwen3-VL, every frame (or window) attends only to itself. Without flash-attn, transformers
splits the patches by `cu_seqlens` and calls attention once per frame. This module calls `scaled_dot_product_attention`
on [F, H, L, d] once per frame size, or `varlen_attn` once on CUDA in half precision. The results equal those of the
loop. The name of our implementation contains "flash" because transformers passes `cu_seqlens` only to such
implementations.
"""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

FRAMES = "rmsd_flash_frames"
# Families whose vision tower attends within frames and passes `cu_seqlens`. Other towers are already batched.
FRAME_FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def vision_implementation(model: PreTrainedModel) -> str | None:
    """Return the name of the best attention for the model's vision tower, or None if it should not be changed.

    This is flash-attn 2 if it is installed and the weights are on CUDA in half precision, otherwise ours. A tower that
    already uses a flash attention, and towers of families other than Qwen2.5-VL and Qwen3-VL, are not changed.
    """
    config = model.config
    if config.model_type not in FRAME_FAMILIES or "flash" in (config.vision_config._attn_implementation or ""):
        return None
    on_cuda = model.device.type == "cuda" and model.dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if on_cuda and is_flash_attn_2_available() else FRAMES


def frame_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Compute attention in which every frame attends only to itself, without a mask. Differentiable.

    Args:
        query: patches of all frames, one frame after the other, [S, H, d]. S may be 0.
        key: same layout.
        value: same layout.
        cu_seqlens: starts of the frames, and S at the end, int32 [F + 1]. The values are read on the host (a device
            sync on CUDA) only if `varlen_attn` cannot be used: for fp32 or fp64, a head size that is not a multiple of
            8 or above 256, or a scale other than 1 / sqrt(d).
        max_seqlen: number of patches of the largest frame. A tensor is read on the host.
        scale: factor of the scores; None means 1 / sqrt(d).
    Returns:
        The attention output, [S, H, d].
    Raises:
        ValueError: `cu_seqlens` does not end at S. Not checked if `varlen_attn` is used, because its values are not
            read then.
    """
    if not len(query):
        return torch.empty_like(query)
    size = query.shape[-1]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if half and size % 8 == 0 and size <= 256 and (scale is None or math.isclose(scale, size**-0.5)):
        starts, longest = cu_seqlens.to(torch.int32), int(max_seqlen)
        return varlen_attn(query, key, value, starts, starts, longest, longest)
    starts = cu_seqlens.tolist()
    if starts[-1] != len(query):
        raise ValueError(f"cu_seqlens: expected the last value {len(query)}, the number of patches, got {starts[-1]}")
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    # Frames of equal size are usually adjacent. Windows at the right and lower edges are not, so rows are sorted once.
    moved = None
    if sum(a != b for a, b in zip(lengths, lengths[1:], strict=False)) >= len(set(lengths)):
        moved = torch.cat([torch.arange(starts[frame], starts[frame + 1]) for frame in order]).to(query.device)
        query, key, value = (rows.index_select(0, moved) for rows in (query, key, value))
        lengths = [lengths[frame] for frame in order]
    outputs = []
    for start, frames, length in _runs(lengths):
        batch = [
            rows[start : start + frames * length].unflatten(0, (frames, length)).transpose(1, 2)
            for rows in (query, key, value)
        ]
        outputs.append(scaled_dot_product_attention(*batch, scale=scale).transpose(1, 2).flatten(0, 1))
    output = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
    return output if moved is None else output.index_select(0, torch.argsort(moved))


def _runs(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Return (first row, frames, length) of every run of frames of equal length. Empty frames are left out."""
    begins = [0, *accumulate(lengths)]
    runs: list[tuple[int, int, int]] = []
    for begin, length in zip(begins, lengths, strict=False):
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((begin, 1, length))
    return [run for run in runs if run[2]]


def _frames_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Call `frame_attention` with the signature of transformers: [1, H, S, d] in, [1, S, H, d] out."""
    if cu_seq_lens_q is None or attention_mask is not None or dropout > 0.0 or query.shape[0] != 1:
        raise ValueError(
            f"{FRAMES} in {type(module).__name__}: expected cu_seq_lens_q, one row, no attention mask and no dropout; "
            "it is for the vision towers of Qwen2.5-VL and Qwen3-VL, so set another attention for this module"
        )
    rows = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    longest = cu_seq_lens_q.diff().max() if max_length_q is None else max_length_q
    return frame_attention(*rows, cu_seq_lens_q, longest, scale=scaling).unsqueeze(0), None


AttentionInterface.register(FRAMES, _frames_forward)
