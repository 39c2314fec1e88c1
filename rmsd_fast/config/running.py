"""Settings of the optimizer, the numerics and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmsd_fast.config.fields import choice, number


@dataclass
class RuntimeConfig:
    """DeepSpeed and numerics."""

    zero_stage: int = choice(2, of=(0, 1, 2, 3))
    """ZeRO stage of both engines: 0, 1, 2 or 3."""
    optimizer: str = choice("adamw", of=("adamw", "adamw_8bit"))
    """`adamw` = torch's, with float32 moments, or `adamw_8bit` = that of bitsandbytes, whose moments take 2 bytes per
    trained weight instead of 8 and are rounded (extra `quantize`; not with `runtime.offload_optimizer`)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1-3 on CUDA)."""
    check_memory: bool = True
    """Plan the memory at the start, and do not start if the plan exceeds the memory of the GPU."""
    grad_clip: float = number(1.0, least=0)
    """Maximum global gradient norm of both engines (open)."""
    max_skipped_steps: int = number(5, least=1)
    """Abort after this many consecutive steps whose logits, loss or gradient were not finite."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Programs that also get the metrics and sample rollouts: some of [tensorboard, wandb, trackio], or none, []. wandb
    and trackio are extras, and their own environment variables choose server and account. `name` is their project."""


@dataclass
class CheckpointConfig:
    """Checkpoints and resume."""

    every_steps: int = number(50, least=0)
    """Interval in steps of a stage for writing checkpoints. One is always written at the end of a stage and before an
    evaluation during it (`evaluate.every_steps`); 0 = only then."""
    keep: int = number(2, least=1)
    """Number of most recent checkpoints to keep."""
