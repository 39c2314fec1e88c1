"""Define all settings of a run as dataclasses, filled from a YAML recipe and overridden by `section.field=value`.

Bounds of numbers and lists of allowed values are given next to the default. The string below a field is its
documentation, which `--help` prints. Sources are arXiv ids; "open" means that the paper does not specify the setting
and the value is ours. Unknown keys, and settings that have no effect, are errors (`SettingsError`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rmsd_fast.config.errors import CheckpointError, ModelError, NotInstalled, SettingsError, UserError, first_line
from rmsd_fast.config.evaluation import EvaluateConfig, JudgeConfig
from rmsd_fast.config.fields import (
    ACCURACY_STEPS,
    BENCHMARKS,
    DIFFERENCES,
    DIVERGENCES,
    FORMATS,
    JUDGED,
    MEASURES,
    MEDIA_VIEW,
    OF_IMAGES,
    RECIPES,
    REQUEST_FIELDS,
    STAGES,
    STUDENTS,
    SUBTITLED,
    TEACHERS,
    TRACKERS,
    VIEWS,
    WORDINGS,
    choice,
    number,
)
from rmsd_fast.config.inputs import DataConfig, MadeConfig, ModelConfig, TeacherConfig, VideoConfig
from rmsd_fast.config.method import (
    CreditConfig,
    DiscriminatorConfig,
    DistillConfig,
    KdConfig,
    RewardConfig,
    RolloutConfig,
    SelfTeacherConfig,
    SftConfig,
)
from rmsd_fast.config.running import CheckpointConfig, RuntimeConfig

__all__ = [
    "ACCURACY_STEPS",
    "BENCHMARKS",
    "DIFFERENCES",
    "DIVERGENCES",
    "FORMATS",
    "JUDGED",
    "MEASURES",
    "MEDIA_VIEW",
    "OF_IMAGES",
    "RECIPES",
    "REQUEST_FIELDS",
    "STAGES",
    "STUDENTS",
    "SUBTITLED",
    "TEACHERS",
    "TRACKERS",
    "VIEWS",
    "WORDINGS",
    "CheckpointConfig",
    "CheckpointError",
    "CreditConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "DistillConfig",
    "EvaluateConfig",
    "JudgeConfig",
    "KdConfig",
    "MadeConfig",
    "ModelConfig",
    "ModelError",
    "NotInstalled",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RuntimeConfig",
    "SelfTeacherConfig",
    "SettingsError",
    "SftConfig",
    "TeacherConfig",
    "UserError",
    "VideoConfig",
    "choice",
    "first_line",
    "number",
]


@dataclass
class RunConfig:
    """One run."""

    name: str = "run"
    """First part of the run folder's name."""
    output: str = "runs"
    """Folder in which the run folder `<name>-<time>` is created."""
    seed: int = number(0, least=0, most=2**32 - 1)
    """Seed for data order, matching, rollouts and the initial heads."""
    stages: list[str] = field(default_factory=lambda: ["sft", "warm_up", "distill"])
    """Stages to run: a subsequence of [sft, control, warm_up, distill]. `control` starts from the stage-1 student and
    imitates for as many steps as stage 2 has, with its questions, batch size and learning rate. The evaluation then
    shows whether stage 2 is better than more imitation."""
    packing: str = choice("shared", of=("shared", "padded"))
    """`shared` = a prompt is computed once for all its responses, in policy, reference and discriminator; `padded` =
    once for each response, in rows `[prompt | response | padding]` with transformers' attention (slower, for
    comparison)."""
    micro_tokens: int = number(32768, least=1)
    """Maximum number of tokens in a forward pass on one process, including padding. A question's responses are split
    over several passes only if they do not fit in one; the longest prompt and the longest response must fit
    together."""
    made: MadeConfig = field(default_factory=MadeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    self_teacher: SelfTeacherConfig = field(default_factory=SelfTeacherConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    kd: KdConfig = field(default_factory=KdConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
