"""Plan the memory of a run: the bytes on each process's device, per stage, at the step's highest point.

A step goes through phases one after the other: rollouts, discriminator, reference, policy, optimizers. What each holds
is added up, and a stage needs the most of any phase, not the sum of all. The plan assumes the longest prompts and
responses that the settings allow, and full micro-batches.
"""

from __future__ import annotations

from typing import Any

from rmsd_fast.config import RunConfig
from rmsd_fast.models.pass_memory import complete_config
from rmsd_fast.stages.memory.needs import EvaluatedBatches, StageNeeds, teacher_config
from rmsd_fast.stages.memory.parameters import Parameters, count_parameters
from rmsd_fast.stages.memory.parts import CONTEXT_BYTES, GIB, OPTIMIZER, WEIGHTS, MemoryPlan, StagePlan
from rmsd_fast.stages.memory.planner import StagePlanner

__all__ = [
    "CONTEXT_BYTES",
    "GIB",
    "OPTIMIZER",
    "WEIGHTS",
    "EvaluatedBatches",
    "MemoryPlan",
    "Parameters",
    "StagePlan",
    "count_parameters",
    "plan_evaluation",
    "plan_memory",
    "teacher_config",
]


def plan_memory(settings: RunConfig, config: dict[str, Any], *, processes: int, device: str) -> MemoryPlan:
    """Return the plan of a run.

    Args:
        settings: settings of the run.
        config: contents of the student's config.json.
        processes: number of processes.
        device: "cuda" or "cpu", where the run will be.
    Raises:
        SettingsError: a target of the adapters is not a linear layer of the language model.
        ModelError: the family is not supported.
    """
    config = complete_config(config)
    count = count_parameters(config, settings.model)
    stages = {}
    for stage in settings.stages:
        planner = StagePlanner(StageNeeds(settings, config, count, processes, device, stage))
        stages[stage] = planner.imitation() if stage in ("sft", "control") else planner.distillation()
    return MemoryPlan(device, stages)


def plan_evaluation(
    settings: RunConfig,
    config: dict[str, Any],
    *,
    device: str,
    batches: EvaluatedBatches | None = None,
    limit: int | None = None,
) -> StagePlan:
    """Return the plan of `rmsd_fast.evaluate` on one process, which holds one model and answers batches.

    Args:
        settings: settings of the evaluation, with `video` as in evaluations.
        config: contents of the student's config.json.
        device: "cuda" or "cpu", where the evaluation will be.
        batches: the batches; None = full batches of questions about different videos.
        limit: most tokens of a prompt that vLLM is started for; None = `data.max_prompt_tokens`.
    Raises:
        ModelError: the family is not supported.
    """
    config = complete_config(config)
    count = count_parameters(config, settings.model)
    needs = StageNeeds(settings, config, count, 1, device, "evaluate", batches=batches, limit=limit)
    return StagePlanner(needs).evaluation()
