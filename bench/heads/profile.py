"""All that the benchmarks know of the internals of rmsd_kernels.heads and rmsd_kernels.video.

Kernels under other launch settings than the package's, rows per chunk, and the parts of a call by the names of its
kernels. The launchers repeat `triton_rows.policy_` and `triton_patches`; a test compares the results of both.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.core.launches import Event
from bench.core.measure import Unavailable
from bench.heads.peers import CLIP, KL_COEF, TEMPERATURE
from rmsd_kernels import video_patches
from rmsd_kernels.heads.chunks import chunk_rows, default_budget
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs
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
    *(Setting(32, columns, 1) for columns in (8192, 16384)),
    *(Setting(16, columns, 1) for columns in (4096, 8192)),
    *(Setting(8, columns, 1) for columns in (2048, 4096)),
    Setting(16, 8192, 3),
)
OTHER_STAGES = (2, 3)
MEDIA_WARPS = (1, 2, 4)


def default_setting(vocabulary: int, itemsize: int) -> Setting:
    from rmsd_kernels import triton_launch

    chosen = triton_launch.row_launch(vocabulary, itemsize)
    return Setting(chosen.warps, chosen.block, triton_launch.STAGES)


def _need_triton(tensor: Tensor) -> None:
    if not can_run_triton(tensor):
        raise Unavailable(f"Triton kernels do not run on a tensor on {tensor.device.type}")


class PolicyRows:
    """A chunk of logits [n, V] and what the policy kernel needs beside it, as in bench_policy_loss."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(7)
        self.original = torch.empty(rows, vocabulary, dtype=dtype, device=device)
        for part in self.original.split(128):
            part.copy_(torch.randn(part.shape, generator=generator, device=device))
        self.logits = self.original.clone()
        self.targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
        picked = self.original.gather(1, self.targets[:, None])[:, 0].float()
        temperature = torch.full((rows,), TEMPERATURE, device=device)
        self.inputs = RowInputs(self.targets, picked, None, temperature, None)
        self.advantage = torch.randn(rows, generator=generator, device=device)
        self.scale = torch.full((rows,), 1.0 / rows, device=device)
        # About the log-probs themselves.
        z = self.original[:1].float() / TEMPERATURE
        ref_logp = picked / TEMPERATURE - torch.logsumexp(z, dim=-1)
        settings = PolicySettings.of(kl="k3", kl_coef=KL_COEF, clip_low=CLIP, clip_high=CLIP)
        self.terms = PolicyTerms(self.scale, self.advantage, ref_logp=ref_logp, settings=settings)

    def restore(self) -> None:
        self.logits.copy_(self.original)

    def by_the_package(self) -> None:
        name = "triton_rows" if can_run_triton(self.logits) else "torch_rows"
        importlib.import_module(f"rmsd_kernels.heads.{name}").policy_(self.logits, self.inputs, self.terms)

    def launcher(self, setting: Setting) -> Callable[[], Any]:
        """A call that launches the kernel with the setting on logits, in place. Raises: Unavailable."""
        _need_triton(self.logits)
        from rmsd_kernels.heads import triton_rows
        from rmsd_kernels.triton_launch import LOAD_BYTES, REGISTERS_OF_AN_SM

        stats = triton_rows._new_stats(self.logits, False)
        arguments = triton_rows._policy_arguments(self.logits, self.inputs, stats, self.terms, None)
        kernel = triton_rows._policy_kernel[(len(self.logits),)]
        lane = LOAD_BYTES // self.logits.element_size()
        block = {"BLOCK": setting.columns, "LANE": lane, "STAGES": setting.stages}
        # 255 is the most that a thread can have.
        registers = min(255, REGISTERS_OF_AN_SM // (32 * setting.warps))
        return lambda: kernel(**arguments, **block, num_warps=setting.warps, maxnreg=registers)

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


def rows_per_chunk(
    tokens: int, vocabulary: int, itemsize: int, weight: Tensor, trains_head: bool, budget: int | None = None
) -> int:
    """Rows of logits that the package computes at once; budget: memory_budget_bytes of the call."""
    row_bytes = vocabulary * itemsize
    budget = budget or default_budget(tokens, row_bytes, weight, trains_head)
    return chunk_rows(tokens, row_bytes, budget, weight.device.type)


GEMMS = ("GEMM logits", "GEMM d_hidden", "GEMM d_weight")
ROWS, REST, COPIES, ALL_GEMMS = "row kernel", "other kernels", "copies", "GEMMs"
_ROW_KERNELS = ("_policy_kernel", "_score_kernel", "_gradient_kernel")
# What cuBLAS calls its kernels, in small letters; _SUM adds up the parts of the GEMM before it.
_SUM = "splitkreduce"
_GEMM_WORDS = ("gemm", "nvjet", "cutlass", "xmma", _SUM)


def parts_of(timeline: Sequence[Event], gemms: Sequence[str]) -> dict[str, dict]:
    """Launches and ms of each part of a call. Of the GEMMs between two other kernels those after a row kernel are
    d_hidden and then d_weight, all others logits; as one where that does not come out even.
    """
    found: dict[str, list[float]] = {}
    products, after_row, last = Counter(), 0, GEMMS[0]
    for event in timeline:
        name = event.name.lower()
        if event.is_copy:
            part = COPIES
        elif any(word in name for word in _ROW_KERNELS):
            part, after_row = ROWS, 1
        elif any(word in name for word in _GEMM_WORDS):
            if _SUM not in name:
                last = GEMMS[min(after_row, 2)]
                after_row += after_row > 0
                products[last] += 1
            part = last
        else:
            part, after_row = REST, 0
        found.setdefault(part, []).append(event.us)
    if len({products[name] for name in gemms}) > 1 or products.keys() - set(gemms):
        found[ALL_GEMMS] = [us for name in GEMMS for us in found.pop(name, ())]
    return {name: {"launches": len(times), "ms": sum(times) / 1e3} for name, times in found.items()}
