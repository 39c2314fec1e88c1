"""Find settings of teachers, and of generated material, that have no effect in combination with the others."""

from __future__ import annotations

from dataclasses import fields

from rmsd_fast.config import DIVERGENCES, MEDIA_VIEW, RunConfig
from rmsd_fast.setting_rules.uses import (
    has_pool,
    imitates_in_stage2,
    makes_rollouts,
    quotes_pool,
    shows_hints,
    teaching_steps,
    uses_discriminator,
    uses_pool,
)

# Settings of `teacher` that are about the answers of the pool. The others say how to score answers of any kind.
_OF_POOLS = (
    *("responses", "hinted", "parse", "max_unanswered_share", "min_quality", "filter", "empty_pools", "weighting"),
    *("weight_power", "open_quality", "selection"),
)
# Settings, whether they have no effect, and the reason with what to write. A name that ends in "." is a whole section.
Rule = tuple[list[str], bool, str]


def of_self_teacher(settings: RunConfig) -> list[Rule]:
    """Return the rules of the self-teacher, and of token credit as a whole."""
    stages, distill, teacher, credit = settings.stages, settings.distill, settings.self_teacher, settings.credit
    only_magnitude = credit.magnitude == "teacher" and settings.kd.kind == credit.prune == "none"
    # Stage 1 can show hints without a self-teacher.
    shown = {"kind", "views", "max_hint_tokens"} if shows_hints(settings) else {"kind"}
    of_teacher = ["self_teacher.judge.", *(f"self_teacher.{f.name}" for f in fields(teacher) if f.name not in shown)]
    return [
        (
            [*of_teacher, "self_teacher.kind", "credit.", "kd."],
            "distill" not in stages,
            "stage distill is not in stages; add it to stages",
        ),
        (
            of_teacher,
            settings.self_teacher.kind == "none",
            "self_teacher.kind is none; set self_teacher.kind=frozen",
        ),
        (
            ["self_teacher.ema_rate", "self_teacher.ema_every"],
            settings.self_teacher.kind != "ema",
            f"self_teacher.kind={settings.self_teacher.kind} has no average; set self_teacher.kind=ema",
        ),
        (
            ["self_teacher.path"],
            teacher.kind not in ("none", "path"),
            f"self_teacher.kind={teacher.kind} has the student's weights; set self_teacher.kind=path",
        ),
        (
            ["self_teacher.max_hint_tokens"],
            not set(teacher.views) - {MEDIA_VIEW},
            "self_teacher.views has no texts; add e.g. answer to self_teacher.views",
        ),
        (
            ["self_teacher.judge."],
            "feedback" not in teacher.views,
            "the judge writes feedback, which is not in self_teacher.views; add feedback to self_teacher.views",
        ),
        (
            ["self_teacher.judge."],
            not teacher.judge.endpoint,
            "there is no judge; set self_teacher.judge.endpoint",
        ),
        (
            ["self_teacher.ema_every"],
            teacher.ema_every >= teaching_steps(settings),
            f"the average is used for {teaching_steps(settings)} steps, before its first update; set a lower value",
        ),
        (
            ["self_teacher.until_step"],
            teacher.until_step >= distill.steps,
            f"stage 2 ends after distill.steps={distill.steps}; set a lower value",
        ),
        (
            ["self_teacher.until_step"],
            only_magnitude and 0 < credit.magnitude_steps <= teacher.until_step,
            f"credit.magnitude_steps={credit.magnitude_steps} ends the use of the self-teacher; set a lower value",
        ),
    ]


def of_token_credit(settings: RunConfig) -> list[Rule]:
    """Return the rules of token credit and distillation."""
    credit = settings.credit
    return [
        (
            [f"credit.magnitude_{name}" for name in ("clip", "mix", "steps", "topk")],
            settings.credit.magnitude == "none",
            "credit.magnitude is none; set credit.magnitude=teacher",
        ),
        (
            ["credit.position_least", "credit.position_start", "credit.position_width"],
            settings.credit.position == "none",
            "credit.position is none; set credit.position=sigmoid",
        ),
        (
            [f"credit.prune_{name}" for name in ("topk", "overlap", "decay", "floor")],
            settings.credit.prune == "none",
            "credit.prune is none; set credit.prune=overlap",
        ),
        (
            ["credit.uncertainty_lr_factor"],
            settings.credit.uncertainty == "none",
            "credit.uncertainty is none; set credit.uncertainty=task",
        ),
        (
            ["credit.position", "credit.position_least", "credit.position_start", "credit.position_width"],
            credit.position_least == 1,
            "with credit.position_least=1, all weights are 1; set a lower value",
        ),
        (["kd.coef", "kd.gap_clip"], settings.kd.kind == "none", "kd.kind is none; set kd.kind=k1"),
        (
            ["kd.gap_clip"],
            settings.kd.kind in DIVERGENCES,
            f"kd.kind={settings.kd.kind} has no advantages of its own; set kd.vocab_clip",
        ),
        (
            ["kd.vocab_clip", "kd.temperature"],
            settings.kd.kind not in DIVERGENCES,
            f"kd.kind={settings.kd.kind} has no divergence over the vocabulary; set kd.kind=forward_kl",
        ),
    ]


def of_pools(settings: RunConfig) -> list[Rule]:
    """Return the rules of the teacher pool."""
    stages = settings.stages
    rolls_out = makes_rollouts(settings)
    control = "control" in stages
    judged = uses_discriminator(settings)
    # With dropped questions, matching also decides which questions a stage has.
    drops = settings.teacher.empty_pools == "drop" and (rolls_out or control)
    matched = judged or drops or settings.reward.unlabeled == "teacher"
    # The best answer is chosen among those that can be matched.
    chosen = matched or quotes_pool(settings)
    late = imitates_in_stage2(settings)
    selects = late or ({"sft", "control"} & set(stages) and settings.sft.responses == "best")
    # If a pool is needed, its absence is the fault.
    poolless = not has_pool(settings) and not uses_pool(settings)
    return [
        (
            ["teacher.min_quality"],
            settings.teacher.filter == "none",
            "teacher.filter is none; set teacher.filter=both",
        ),
        (
            ["teacher.min_quality", "teacher.filter"],
            settings.teacher.filter == "matching" and not chosen,
            "teacher.filter=matching only applies when a discriminator is trained; set teacher.filter=both",
        ),
        (
            [f"teacher.{name}" for name in _OF_POOLS],
            poolless,
            "there is no teacher pool; set teacher.pool",
        ),
        (["teacher.weighting"], not chosen, "no discriminator is trained; add warm_up and set reward.alpha > 0"),
        (
            ["teacher.weight_power"],
            not matched or settings.teacher.weighting == "uniform",
            "weights follow the quality only with a discriminator and teacher.weighting=quality; change one of these",
        ),
        (
            ["teacher.empty_pools"],
            not rolls_out and not control,
            "no stage uses it; add distill or control to stages",
        ),
        (
            ["teacher.filter"],
            settings.teacher.filter == "imitation" and "sft" not in stages and not control and not late,
            "no stage imitates; set teacher.filter=none",
        ),
        (
            ["teacher.selection"],
            not selects,
            "no stage imitates the best response; set distill.sft_coef, or sft.responses=best with stage sft",
        ),
        (
            ["teacher.selection"],
            settings.teacher.responses == 1 and not settings.teacher.hinted,
            "with teacher.responses=1 there is nothing to choose from; set teacher.responses=2 or more",
        ),
        (
            ["teacher.numeric_eps"],
            settings.teacher.numeric_metric != "epsilon",
            "teacher.numeric_metric is mra; set teacher.numeric_metric=epsilon",
        ),
    ]


def of_made(settings: RunConfig, *, trains: bool) -> list[Rule]:
    """Return the rules of generated material."""
    own_clips = settings.made.enabled and settings.made.source == "clips"
    needles = settings.made.enabled and settings.made.source == "needles"
    return [
        (
            ["made.student_hidden", "made.student_layers", "made.student_family"],
            bool(settings.model.path),
            "model.path sets the student; leave model.path empty",
        ),
        (
            ["made.responses", "made.teacher", "made.teacher_error_rate", "made.wording"],
            trains and bool(settings.teacher.pool),
            "teacher.pool sets the pool; leave teacher.pool empty",
        ),
        (
            ["made.label_share"],
            trains and bool(settings.data.train),
            "data.train sets the questions; leave data.train empty",
        ),
        (
            ["made.teacher_error_rate"],
            settings.made.teacher != "noisy",
            f"made.teacher={settings.made.teacher} has its own errors; set made.teacher=noisy",
        ),
        (
            ["made.wording"],
            "open" not in settings.made.tasks,
            "open is not in made.tasks; add it to made.tasks",
        ),
        (
            [f"made.{f.name}" for f in fields(settings.made) if f.name != "enabled"],
            not settings.made.enabled,
            "no material is generated; set made.enabled=true",
        ),
        (
            ["made.train_clips", "made.heldout_clips", "made.questions_per_clip", "made.tasks", "made.label_share"],
            not own_clips and not needles,
            "the set of real clips is fixed; set made.source=clips",
        ),
        (
            ["made.questions_per_clip", "made.tasks"],
            needles,
            "a video of made.source=needles has one question of type mcq; set made.source=clips",
        ),
        (
            ["made.wording"],
            not own_clips,
            "only open answers about generated clips are paraphrased; set made.source=clips",
        ),
    ]
