"""Find settings that have no effect in combination with the others."""

from __future__ import annotations

from dataclasses import fields

from rmsd_fast.config import ACCURACY_STEPS, DIVERGENCES, MEDIA_VIEW, EvaluateConfig, RunConfig, SettingsError
from rmsd_fast.setting_rules.uses import (
    has_policy_gradient,
    has_pool,
    imitates_in_stage2,
    makes_rollouts,
    quotes_pool,
    rewards_rollouts,
    shows_hints,
    teaching_steps,
    uses_discriminator,
    uses_frozen_tower,
    uses_pool,
)

# Settings that rmsd_fast.evaluate reads; a name that ends in "." is a whole section. Some only determine the name of a
# generated student, such as made.responses.
_EVALUATED = (
    *("made.", "video.", "evaluate.", "seed", "packing", "micro_tokens", "runtime.check_memory"),
    *("data.heldout", "data.format", "data.task_type", "data.media_root", "data.follow_symlinks"),
    *("data.max_prompt_tokens", "data.decoder", "data.decode_threads", "data.decode_timeout_s", "data.max_file_mib"),
    *("data.check_frames", "data.cache_mib", "data.disk_cache", "data.disk_cache_gib", "data.max_bad_share"),
    *("model.path", "model.dtype", "model.attention", "model.liger", "model.quantize"),
    *("teacher.unlabeled", "teacher.numeric_metric", "teacher.numeric_eps", "teacher.ocr_metric"),
    *("rollout.temperature", "rollout.cuda_graphs", "rollout.vllm_kv_cache_gib"),
)
# Settings of `teacher` that are about the answers of the pool. The others say how to score answers of any kind.
_OF_POOLS = (
    *("responses", "hinted", "parse", "max_unanswered_share", "min_quality", "filter", "empty_pools", "weighting"),
    *("weight_power", "open_quality", "selection"),
)
# Settings of these sections that only matter in training.
_NOT_EVALUATED = ("evaluate.every_steps", "evaluate.samples", "made.label_share")
# What an evaluation has in place of settings of training.
_IN_PLACE = {
    "rollout.max_new_tokens": "evaluate.max_new_tokens",
    "rollout.prompts_per_batch": "evaluate.prompts_per_batch",
    "rollout.n": "evaluate.rollouts",
    "rollout.engine": "evaluate.engine",
    "data.train": "data.heldout",
    "output": "--output",
}


# Settings, whether they have no effect, and the reason with what to write. A name that ends in "." is a whole section.
_Rule = tuple[list[str], bool, str]


def is_evaluated(key: str) -> bool:
    """Return whether rmsd_fast.evaluate reads a setting."""
    within = any(key == name or (name.endswith(".") and key.startswith(name)) for name in _EVALUATED)
    return within and key not in _NOT_EVALUATED


def refuse_training_settings(settings: RunConfig, written_keys: list[str]) -> None:
    """Raise SettingsError if an override of rmsd_fast.evaluate has no effect on an evaluation."""
    of_video = ("video.num_frames", "video.fps", "video.min_frames", "video.max_frames")
    for key in written_keys:
        if not is_evaluated(key):
            instead = f"set {_IN_PLACE[key]}" if key in _IN_PLACE else f"leave {key} out"
            raise SettingsError(
                f"override: {key} has no effect: rmsd_fast.evaluate does not train; {instead}. A recipe or a run's "
                "config.yaml may contain it"
            )
        if key in of_video and settings.evaluate.num_frames is not None:
            raise SettingsError(
                f"override: {key} has no effect: evaluate.num_frames={settings.evaluate.num_frames} replaces it; set "
                f"evaluate.num_frames, or evaluate.num_frames=null with {key}"
            )
        if key == "rollout.temperature" and not settings.evaluate.rollouts:
            raise SettingsError(
                f"override: {key} has no effect: answers are greedy; leave {key} out, or sample more of them with "
                "evaluate.rollouts"
            )
        if reason := _other_engine(key, settings.evaluate):
            raise SettingsError(f"override: {key} has no effect: {reason}, or leave {key} out")


def _other_engine(key: str, evaluate: EvaluateConfig) -> str:
    """Return why a setting of `rmsd_fast.evaluate` has no effect with `evaluate.engine`, or ""."""
    uses_vllm = evaluate.engine == "vllm"
    if key == "rollout.vllm_kv_cache_gib" and not uses_vllm:
        return f"evaluate.engine={evaluate.engine} has no cache of this size; set evaluate.engine=vllm"
    if key == "rollout.cuda_graphs" and uses_vllm:
        return "vLLM captures its own graphs; set evaluate.engine=hf"
    if key == "model.liger" and uses_vllm and not evaluate.reranker:
        return "vLLM has kernels of its own; set evaluate.engine=hf"
    return ""


def refuse_useless(settings: RunConfig, written_keys: list[str], where: str, *, trains: bool = True) -> None:
    """Raise SettingsError if one of the written keys has no effect in combination with the other settings.

    Args:
        settings: the settings.
        written_keys: names of the settings that were written.
        where: where they were written, for the message.
        trains: whether the program trains.
    """
    rules = [
        *_of_stages(settings),
        *_of_rollouts(settings, trains=trains),
        *_of_self_teacher(settings),
        *_of_token_credit(settings),
        *_of_pools(settings),
        *_of_made(settings, trains=trains),
        *_of_evaluations(settings),
        *_of_models(settings, trains=trains),
        *_of_data(settings),
    ]
    for prefixes, useless, reason in rules:
        for key in written_keys:
            if useless and any(key == name or (name.endswith(".") and key.startswith(name)) for name in prefixes):
                raise SettingsError(f"{where}: {key} has no effect: {reason}, or leave {key} out")


def _of_stages(settings: RunConfig) -> list[_Rule]:
    """Return the rules of imitation, policy and discriminator."""
    stages, distill = settings.stages, settings.distill
    rolls_out = makes_rollouts(settings)
    control, warm_up = "control" in stages, "warm_up" in stages
    return [
        (["sft."], "sft" not in stages and not control, "stage sft is not in stages; add it to stages"),
        (
            [f"distill.{f.name}" for f in fields(distill) if f.name not in ("batch_size", "train_vision")],
            "distill" not in stages and not control,
            "stage distill is not in stages; add it to stages",
        ),
        (["distill."], not rolls_out and not control, "no stage uses it; add distill to stages"),
        (
            [
                f"distill.{name}"
                for name in ("kl", "kl_coef", "tis_cap", "sequence_mask_cap", "aggregation", "sft_coef")
            ],
            "distill" not in stages,
            "stage distill is not in stages, and the control has no policy loss; add distill to stages",
        ),
        (["distill.kl"], distill.kl_coef == 0, "distill.kl_coef is 0; give it a weight"),
        (
            ["distill.tis_cap", "distill.sequence_mask_cap"],
            settings.kd.kind in DIVERGENCES and not has_policy_gradient(settings),
            f"kd.kind={settings.kd.kind} is not corrected, and nothing else has a gradient; give a reward a weight",
        ),
        (
            [f"sft.{f.name}" for f in fields(settings.sft) if f.name != "responses"],
            "sft" not in stages,
            "stage sft is not in stages, and the control uses distill.* instead; set distill.*",
        ),
        (["discriminator."], not uses_discriminator(settings), "no discriminator is trained; set reward.alpha > 0"),
        (
            ["discriminator.warm_up_steps", "discriminator.warm_up_lr", "discriminator.warm_up_accuracy"],
            not warm_up,
            "stage warm_up is not in stages; add it to stages",
        ),
        (
            ["discriminator.warm_up_accuracy"],
            settings.discriminator.warm_up_steps < ACCURACY_STEPS,
            f"it averages {ACCURACY_STEPS} steps; set discriminator.warm_up_steps={ACCURACY_STEPS} or more",
        ),
        (["discriminator.lr"], "distill" not in stages, "stage distill is not in stages; add it to stages"),
    ]


def _of_rollouts(settings: RunConfig, *, trains: bool) -> list[_Rule]:
    """Return the rules of rewards and rollouts."""
    # Evaluations decode with rollout.cuda_graphs, and sample at rollout.temperature. A file may have settings of both
    # engines; on the command line, `refuse_training_settings` refuses those of the other one.
    sampled = settings.evaluate.rollouts or not trains
    evaluated = ("cuda_graphs", *(["temperature"] * bool(sampled)), *(["vllm_kv_cache_gib"] * (not trains)))
    of_rollouts = [f"rollout.{f.name}" for f in fields(settings.rollout) if f.name not in evaluated]
    stages = settings.stages
    rolls_out = makes_rollouts(settings)
    judged = uses_discriminator(settings)
    return [
        (
            ["reward."],
            rolls_out and "distill" not in stages,
            "the warm-up does not compute rewards; add distill to stages",
        ),
        (
            ["reward.normalization"],
            not rewards_rollouts(settings) and settings.reward.kl_in_reward == 0,
            "no reward has a weight; give one a weight, e.g. reward.delta=0.4",
        ),
        (
            ["reward.score_clip", "reward.score_sd_offset", "reward.score_groups"],
            not judged,
            "no discriminator is trained; set reward.alpha > 0",
        ),
        (
            ["reward.unlabeled"],
            settings.teacher.unlabeled == "refuse",
            "teacher.unlabeled=refuse requires every ground truth; set teacher.unlabeled=agreement",
        ),
        (
            ["reward.unlabeled"],
            settings.reward.delta == 0,
            "reward.delta is 0, so there is no content reward; give it a weight",
        ),
        (
            ["reward.score_sd_offset"],
            settings.reward.normalization == "sum_then_gn",
            "sum_then_gn does not normalize the scores; set reward.normalization=gn_then_sum",
        ),
        ([*of_rollouts, "reward."], not rolls_out, "no stage samples rollouts; add warm_up or distill to stages"),
        (
            ["rollout.vllm_kv_cache_gib"],
            trains and settings.rollout.engine not in ("vllm", "vllm_server"),
            f"rollout.engine={settings.rollout.engine} has no cache of this size; set rollout.engine=vllm",
        ),
        (
            ["rollout.tensor_parallel"],
            settings.rollout.engine != "vllm",
            "several servers each hold the whole model; use servers with larger GPUs"
            if settings.rollout.engine == "vllm_server"
            else f"rollout.engine={settings.rollout.engine} does not split the model; set rollout.engine=vllm",
        ),
        (
            ["rollout.log_questions"],
            settings.rollout.log_every_steps == 0,
            "rollout.log_every_steps is 0, so no rollouts are written; set rollout.log_every_steps=10",
        ),
        (
            ["rollout.prompts_per_batch"],
            settings.rollout.engine == "replay",
            "rollout.engine=replay generates nothing; set rollout.engine=hf",
        ),
        (
            ["rollout.parity_every", "rollout.parity_bound"],
            settings.rollout.engine == "replay",
            "rollout.engine=replay has rollouts of another run, whose weights may differ; set rollout.engine=hf",
        ),
    ]


def _of_self_teacher(settings: RunConfig) -> list[_Rule]:
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


def _of_token_credit(settings: RunConfig) -> list[_Rule]:
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


def _of_pools(settings: RunConfig) -> list[_Rule]:
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


def _of_made(settings: RunConfig, *, trains: bool) -> list[_Rule]:
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


def _of_evaluations(settings: RunConfig) -> list[_Rule]:
    """Return the rules of evaluations."""
    stages, distill = settings.stages, settings.distill
    return [
        (
            ["evaluate.every_steps"],
            not {"distill", "control"} & set(stages),
            "only distill and control are evaluated during training; add one of them to stages",
        ),
        (
            ["evaluate.every_steps"],
            settings.evaluate.every_steps >= distill.steps,
            f"stage 2 ends after distill.steps={distill.steps}; set a lower value",
        ),
        (
            ["evaluate.judge."],
            not settings.evaluate.judge.endpoint,
            "there is no judge; set evaluate.judge.endpoint",
        ),
        (
            ["evaluate."],
            not settings.data.heldout and not settings.made.enabled,
            "there are no held-out questions; set data.heldout",
        ),
    ]


def _of_models(settings: RunConfig, *, trains: bool) -> list[_Rule]:
    """Return the rules of the model and its training."""
    return [
        (
            ["model.lora_rank", "model.lora_alpha", "model.lora_targets"],
            settings.model.adapter == "none",
            "model.adapter=none trains no adapters; set model.adapter=lora",
        ),
        (
            ["model.attention"],
            settings.packing == "shared",
            "packing=shared uses its own attention; set packing=padded",
        ),
        (
            ["runtime.offload_optimizer"],
            settings.runtime.zero_stage == 0,
            "ZeRO-0 cannot offload the optimizer; set runtime.zero_stage=2",
        ),
    ]


def _of_data(settings: RunConfig) -> list[_Rule]:
    """Return the rules of questions and media."""
    return [
        (
            ["video.min_frames", "video.max_frames"],
            settings.video.num_frames is not None,
            "it only applies to video.fps, and video.num_frames is set; set video.num_frames=null and video.fps=2",
        ),
        (
            ["data.format", "data.task_type"],
            settings.evaluate.benchmark and not settings.data.train,
            "evaluate.benchmark says how to read the questions",
        ),
        (
            ["data.task_type"],
            settings.data.format == "rmsd",
            "records with data.format=rmsd specify their task type; choose another data.format",
        ),
        (["data.disk_cache_gib"], not settings.data.disk_cache, "data.disk_cache is empty; give it a folder"),
        (
            ["data.embedding_cache_mib"],
            not uses_frozen_tower(settings),
            "embeddings are cached only with a frozen vision tower, and not in stage 1 under ZeRO-3; set "
            "distill.train_vision=false or sft.train_vision=false",
        ),
    ]
