"""Estimate from the pool alone what stage 2 leads to: the quality of the weighted teacher answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rmsd_fast.config import TeacherConfig
from rmsd_fast.data.records import Question
from rmsd_fast.method.answers import CLOSED_TASKS
from rmsd_fast.teacher.pool_estimates import estimates
from rmsd_fast.teacher.scores import Scores
from rmsd_fast.teacher.targets import Targets, build_targets

POWERS = (1.0, 2.0, 4.0)
# Weightings by name: those of `teacher.weighting` and `teacher.weight_power`.
WEIGHTINGS = ("uniform", *(f"power_{power:g}" for power in POWERS))


def stage2_gain(questions: Sequence[Question], scores: Scores, cfg: TeacherConfig) -> dict | None:
    """Return the quality that the discriminator leads to, for several weightings, next to that of single answers.

    All numbers are means over the same questions: those with ground truth and an answer that is kept at tau, as in the
    forecast of a run. Each question counts with its first `cfg.responses` answers.

    Args:
        questions: questions; those without ground truth are left out.
        scores: result of score_pool.
        cfg: teacher settings.
    Returns:
        {"responses": K, "min_quality": tau, "tasks": {task: group}, "closed": group}, or None if no answer is kept. A
        group is {"questions", "without", "random", "uniform", "power_1", "power_2", "power_4", "best",
        "power_1-uniform", "power_4-power_1", "best-power_1"}:

        - questions, without: number of questions with and without a kept answer;
        - random: mean quality of all K answers, which is the expected quality of one random answer;
        - uniform, power_1, …: teacher.targets.Targets.target_quality for `teacher.weighting=uniform`, and for
          `teacher.weight_power` 1, 2 and 4;
        - best: quality of the best answer;
        - the rest: paired differences. All are estimates, with intervals over questions.
    """
    asked = [question for question in questions if question.has_truth and scores[question.id]]
    first = {question.id: scores[question.id][: cfg.responses] for question in asked}
    built = {
        name: build_targets(asked, first, weighting, lambda text: None, seed=0, imitate="all")
        for name, weighting in _weightings(cfg).items()
    }
    tasks = {}
    for task in CLOSED_TASKS:
        group = _group([question for question in asked if question.task_type == task], built)
        if group is not None:
            tasks[task] = group
    closed = _group(asked, built)
    if closed is None:
        return None
    return {"responses": cfg.responses, "min_quality": cfg.min_quality, "tasks": tasks, "closed": closed}


def _weightings(cfg: TeacherConfig) -> dict[str, TeacherConfig]:
    filtered = replace(cfg, filter="both", weighting="quality", weight_power=1.0)
    powers = [replace(filtered, weight_power=power) for power in POWERS]
    return dict(zip(WEIGHTINGS, [replace(filtered, weighting="uniform"), *powers], strict=True))


def _group(questions: Sequence[Question], built: dict[str, dict[str, Targets]]) -> dict | None:
    uniform = built["uniform"]
    # A high power can round the weights of poor answers to 0; those questions are left out for all weightings.
    members = [q.id for q in questions if all(targets[q.id].target_quality is not None for targets in built.values())]
    if not members:
        return None
    values = {
        "random": np.array([np.mean([answer.quality for answer in uniform[name].answers]) for name in members]),
        **{
            weighting: np.array([built[weighting][name].target_quality for name in members]) for weighting in WEIGHTINGS
        },
        "best": np.array([float(uniform[name].quality.max()) for name in members]),
    }
    differences = (("power_1", "uniform"), ("power_4", "power_1"), ("best", "power_1"))
    return {
        "questions": len(members),
        "without": len(questions) - len(members),
        **estimates(values | {f"{after}-{before}": values[after] - values[before] for after, before in differences}),
    }
