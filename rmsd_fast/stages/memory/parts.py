"""The memory plan of a run: bytes by stage, phase and what they are for."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmsd_fast.models.pass_memory import ACTIVATIONS, HEADS, VISION

GIB = 2**30
WEIGHTS, GRADIENTS, OPTIMIZER, BUCKETS, ROLLOUT, MEDIA, CONTEXT = (
    *("weights", "gradients", "optimizer", "buckets", "rollout", "media"),
    "CUDA context",
)
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, BUCKETS, ACTIVATIONS, HEADS, VISION, ROLLOUT, MEDIA, CONTEXT)
# CUDA's context, its modules and cuBLAS' workspaces. Not measured here: an estimate for recent GPUs and drivers.
CONTEXT_BYTES = GIB // 2


@dataclass(frozen=True)
class StagePlan:
    """Bytes of a stage on one process's device.

    Attributes:
        phases: bytes of each phase, by what they are for (PARTS).
        host: bytes in host memory: caches, frames and offloaded states. On a CPU, these are in `phases`.
    """

    phases: dict[str, dict[str, int]]
    host: int = 0

    @property
    def peak(self) -> str:
        """The phase with the highest total."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on one process's device, by stage. `device` is "cuda" or "cpu"."""

    device: str
    stages: dict[str, StagePlan] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of the stage that needs most."""
        return max(stage.total for stage in self.stages.values())

    def table(self) -> list[str]:
        """Return the lines of a table with a column per stage, in GiB, or in MiB if the total is below 10 GiB."""
        unit, name = (GIB, "GiB") if self.total >= 10 * GIB else (2**20, "MiB")
        plans = list(self.stages.values())
        rows = [(name, list(self.stages))]
        sizes = {part: [plan.parts.get(part, 0) for plan in plans] for part in PARTS}
        sizes |= {"total": [plan.total for plan in plans], "host memory": [plan.host for plan in plans]}
        rows += [(part, [f"{size / unit:,.2f}" for size in of_part]) for part, of_part in sizes.items() if any(of_part)]
        rows.insert(-1 if any(plan.host for plan in plans) else len(rows), ("peak in", [plan.peak for plan in plans]))
        width = 2 + max(len(cell) for _, cells in rows for cell in cells)
        return [f"{part:<14}" + "".join(cell.rjust(width) for cell in cells) for part, cells in rows]
