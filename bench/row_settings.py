"""Kernels of the row back end and of the media path under other launch settings than their own.

Launched here as `triton_rows.policy_` and `triton_video_patches.video_patches` launch them; a test holds the results of
both ways against each other, so that neither can change alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.peers import CLIP, KL_COEF, Unavailable
from rmsd_kernels import video_patches
from rmsd_kernels.heads.torch_rows import PolicyTerms, RowInputs
from rmsd_kernels.implementations import can_run_triton


class Setting(NamedTuple):
    """Launch settings of a row kernel: warps of a program, columns at a time, loads under way."""

    warps: int
    columns: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.warps} warps, {self.columns} columns, {self.stages} stages"


# Without spilled registers when compiled for compute capability 9.0 in 16 bit. A program of 32 warps has an SM to
# itself, two of 16 share one, and so on: then more rows are under way at once than an L2 cache holds.
FIRST = (
    *(Setting(4, columns, 3) for columns in (1024, 2048, 4096)),
    *(Setting(8, columns, 3) for columns in (2048, 4096, 8192)),
    *(Setting(16, columns, 3) for columns in (4096, 8192)),
    Setting(32, 16384, 1),
)
OTHER_STAGES = (1, 2, 4)
MEDIA_WARPS = (1, 2, 4)


def default_setting(vocabulary: int, itemsize: int) -> Setting:
    from rmsd_kernels import triton_launch

    columns = triton_launch.block_of(vocabulary, itemsize, two_rows=False)
    return Setting(triton_launch.WARPS, columns, triton_launch.STAGES)


def _need_triton(tensor: Tensor) -> None:
    if not can_run_triton(tensor):
        raise Unavailable(f"Triton kernels do not run on a tensor on {tensor.device.type}")


class PolicyRows:
    """A chunk of logits [n, V] and what the policy kernel needs beside it, as in bench_linear_policy_loss."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(7)
        self.original = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        for part in self.original.split(128):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        self.logits = self.original.clone()
        self.targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        picked = self.original.gather(1, self.targets[:, None])[:, 0].float()
        self.inputs = RowInputs(self.targets, picked, None, None, None)
        self.advantage = torch.randn(rows, generator=generator, device=device)
        self.scale = torch.full((rows,), 1.0 / rows, device=device)
        # About the log-probs themselves.
        self.ref_logp = picked - torch.logsumexp(self.original[:1].float(), dim=-1)

    def restore(self) -> None:
        self.logits.copy_(self.original)

    def by_the_package(self) -> None:
        name = "triton_rows" if can_run_triton(self.logits) else "torch_rows"
        settings = (KL_COEF, None, CLIP, CLIP, 0.0)
        terms = PolicyTerms(self.scale, self.advantage, None, self.ref_logp, "k3", *settings)
        importlib.import_module(f"rmsd_kernels.heads.{name}").policy_(self.logits, self.inputs, terms)

    def launcher(self, setting: Setting) -> Callable[[], Any]:
        """A call that launches the kernel with the setting on logits, in place. Raises: Unavailable."""
        _need_triton(self.logits)
        from rmsd_kernels.heads import triton_rows
        from rmsd_kernels.triton_launch import row_vectors

        stats = triton_rows._new_stats(self.logits, False)
        vectors = {"scale": self.scale, "advantage": self.advantage, "old_logp": None, "ref_logp": self.ref_logp}
        arguments = triton_rows._row_arguments(self.logits, self.inputs, stats, None)
        arguments += row_vectors(self.logits, **vectors)
        arguments += [KL_COEF, None, 1.0 - CLIP, 1.0 + CLIP, 0.0, "k3", False]
        kernel = triton_rows._policy_kernel[(len(self.logits),)]
        block = {"BLOCK": setting.columns, "STAGES": setting.stages}
        return lambda: kernel(*arguments, **block, num_warps=setting.warps)

    @property
    def bytes(self) -> int:
        """One read and one write of the chunk: what the kernel moves where a row is still in the cache when it is read
        again."""
        return 2 * self.logits.numel() * self.logits.element_size()


class Media:
    """uint8 frames [F, 3, H, W] that become patches of [height, width] as Qwen3-VL takes them, in bfloat16."""

    PATCH, TEMPORAL, MERGE = 16, 2, 2

    def __init__(self, frames: int, source: tuple[int, int], target: tuple[int, int], device: str) -> None:
        generator = torch.Generator(device).manual_seed(8)
        shape = (frames, 3, *source)
        self.frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator, device=device)
        self.height, self.width = target
        self.half = torch.full((3,), 127.5, device=device)
        self.out = self.by_the_package()

    def by_the_package(self) -> Tensor:
        sizes = {"patch_size": self.PATCH, "temporal_patch_size": self.TEMPORAL, "merge_size": self.MERGE}
        sizes |= {"height": self.height, "width": self.width}
        half, impl = (0.5, 0.5, 0.5), "triton" if can_run_triton(self.half) else "auto"
        return video_patches(self.frames, **sizes, mean=half, std=half, dtype=torch.bfloat16, impl=impl)

    def launcher(self, warps: int) -> Callable[[], Any]:
        """A call that launches the kernel with so many warps and writes self.out. Raises: Unavailable."""
        _need_triton(self.half)
        from rmsd_kernels.video import triton_patches as video

        count, channels, in_height, in_width = self.frames.shape
        device = self.frames.device
        tables = (
            video.axis_weights(in_width, self.width, device),
            video.axis_weights(in_height, self.height, device),
        )
        kernel = video._patches_kernel[(len(self.out) * channels * self.TEMPORAL,)]
        pointers = (self.frames, self.out, self.half, self.half, *tables[0], *tables[1])
        sizes = (*self.frames.stride(), count, in_height, in_width, self.height, self.width)
        sizes += (len(tables[0][1]), len(tables[1][1]), channels, self.TEMPORAL, self.MERGE)
        return lambda: kernel(*pointers, *sizes, PATCH=self.PATCH, BLOCK=self.PATCH, num_warps=warps)

    @property
    def bytes(self) -> int:
        """Every frame read once, every patch written once."""
        return self.frames.numel() + self.out.numel() * self.out.element_size()


def registers(compiled: Any) -> dict[str, int]:
    """Registers per thread and spills of a launched kernel; empty where triton does not tell."""
    found = {"registers": getattr(compiled, "n_regs", None), "spills": getattr(compiled, "n_spills", None)}
    return {name: value for name, value in found.items() if value is not None}
