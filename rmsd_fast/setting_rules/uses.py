"""What a run uses, which follows from several settings: models, stages of a step, engines and the pool."""

from __future__ import annotations

from rmsd_fast.config import DIVERGENCES, MEDIA_VIEW, RunConfig


def uses_reference(settings: RunConfig) -> bool:
    """Return whether stage 2 computes log-probs of its rollouts under the stage-1 student."""
    compared = settings.distill.kl_coef > 0 or settings.reward.kl_in_reward > 0
    return "distill" in settings.stages and (compared or settings.self_teacher.kind == "frozen")


def samples_reference(settings: RunConfig) -> bool:
    """Return whether stage 2 needs the reference's log-probs of the sampled tokens, and not only its hidden states."""
    in_loss = settings.distill.kl_coef > 0 and settings.distill.kl != "full"
    return in_loss or settings.reward.kl_in_reward > 0


def uses_ema(settings: RunConfig) -> bool:
    """Return whether stage 2 keeps a moving average of the policy's weights."""
    return "distill" in settings.stages and settings.self_teacher.kind == "ema"


def uses_other_teacher(settings: RunConfig) -> bool:
    """Return whether the self-teacher of stage 2 is a model of its own."""
    return "distill" in settings.stages and settings.self_teacher.kind == "path"


def weighs_magnitude(settings: RunConfig, step: int) -> bool:
    """Return whether the magnitude weights of a step of stage 2, counted from 0, may differ from 1."""
    credit = settings.credit
    return credit.magnitude == "teacher" and (not credit.magnitude_steps or step < credit.magnitude_steps)


def teaches(settings: RunConfig, step: int) -> bool:
    """Return whether a step of stage 2, counted from 0, uses the self-teacher."""
    teacher, credit = settings.self_teacher, settings.credit
    weighted = weighs_magnitude(settings, step)
    in_time = not teacher.until_step or step < teacher.until_step
    used = weighted or settings.kd.kind != "none" or credit.prune != "none"
    return teacher.kind != "none" and in_time and used


def distills_vocabulary(settings: RunConfig, step: int = 0) -> bool:
    """Return whether a step of stage 2, counted from 0, has a divergence from the self-teacher's distributions."""
    return settings.kd.kind in DIVERGENCES and teaches(settings, step)


def compared_tokens(settings: RunConfig, step: int = 0) -> tuple[int, int]:
    """Return how many most probable tokens of the self-teacher a step of stage 2 needs, and how many of the student.

    Both are 0 unless log-probs are renormalized or the overlap is computed.
    """
    credit = settings.credit
    if not teaches(settings, step):
        return 0, 0
    overlap = credit.prune_topk if credit.prune == "overlap" else 0
    renormalized = credit.magnitude_topk if weighs_magnitude(settings, step) else 0
    return max(overlap, renormalized), overlap


def has_policy_gradient(settings: RunConfig) -> bool:
    """Return whether the policy loss of stage 2 can have a gradient, apart from that of the distillation."""
    compared = settings.distill.kl_coef > 0 or settings.reward.kl_in_reward > 0
    return rewards_rollouts(settings) or compared


def teaching_steps(settings: RunConfig) -> int:
    """Return the number of steps of stage 2 that use the self-teacher. They are the first ones."""
    steps = settings.distill.steps if "distill" in settings.stages else 0
    return next((step for step in range(steps) if not teaches(settings, step)), steps)


def reads_hints(settings: RunConfig) -> bool:
    """Return whether stage 2 has a self-teacher that is told anything."""
    teacher = settings.self_teacher
    return "distill" in settings.stages and teacher.kind != "none" and bool(teacher.views)


def asks_judge(settings: RunConfig) -> bool:
    """Return whether a judge writes feedback about each rollout of stage 2."""
    teacher = settings.self_teacher
    return reads_hints(settings) and "feedback" in teacher.views and bool(teacher.judge.endpoint)


def shows_media(settings: RunConfig) -> bool:
    """Return whether the self-teacher of stage 2 is shown other media than the student."""
    return reads_hints(settings) and MEDIA_VIEW in settings.self_teacher.views


def together(settings: RunConfig) -> bool:
    """Return whether one self-teacher reads all views."""
    return settings.kd.kind != "avsd"


def always_scored(settings: RunConfig) -> bool:
    """Return whether the self-teacher also scores rollouts of questions without hints, or all rollouts get feedback."""
    return settings.self_teacher.kind == "path" or asks_judge(settings)


def question_views(settings: RunConfig) -> list[str]:
    """Return the views of `self_teacher.views` that are about questions, and not about rollouts."""
    return [view for view in settings.self_teacher.views if view != "feedback" or not asks_judge(settings)]


def shows_hints(settings: RunConfig) -> bool:
    """Return whether a stage shows hints to a model: stage 2 to the self-teacher, or stage 1 to the student."""
    return reads_hints(settings) or ("sft" in settings.stages and settings.sft.hinted_share > 0)


def quotes_pool(settings: RunConfig) -> bool:
    """Return whether hints contain answers of the teacher pool."""
    return shows_hints(settings) and "best_answer" in settings.self_teacher.views


def imitates_in_stage2(settings: RunConfig) -> bool:
    """Return whether the loss of stage 2 contains the cross entropy of teacher responses."""
    return "distill" in settings.stages and settings.distill.sft_coef > 0


def aligns_imitation(settings: RunConfig) -> bool:
    """Return whether stage 1 and the control choose the imitated responses by their overlap with the student."""
    imitates = bool({"sft", "control"} & set(settings.stages))
    return imitates and settings.sft.responses == "best" and settings.teacher.selection == "aligned"


def has_pool(settings: RunConfig) -> bool:
    """Return whether the run has a teacher pool, which may be generated."""
    return bool(settings.teacher.pool) or settings.made.enabled


def uses_pool(settings: RunConfig) -> bool:
    """Return whether the run cannot do without a teacher pool."""
    imitates = bool({"sft", "control"} & set(settings.stages))
    chosen = settings.reward.unlabeled == "teacher" or settings.teacher.empty_pools == "drop"
    read = imitates_in_stage2(settings) or quotes_pool(settings)
    return imitates or chosen or read or uses_discriminator(settings)


def weights_tokens(settings: RunConfig) -> bool:
    """Return whether the tokens of a rollout may have different advantages."""
    credit = settings.credit
    return settings.kd.kind != "none" or {credit.magnitude, credit.position, credit.prune, credit.uncertainty} != {
        "none"
    }


def loss_terms(settings: RunConfig) -> list[str]:
    """Return the terms of stage 2's loss that `credit.uncertainty` weighs: some of pg, kd and sft, in this order."""
    used = {
        "pg": rewards_rollouts(settings) or settings.reward.kl_in_reward > 0,
        "kd": settings.kd.kind != "none",
        "sft": imitates_in_stage2(settings),
    }
    return [name for name, is_used in used.items() if is_used]


def uncertainty_lr_factor(settings: RunConfig) -> float:
    """Return the learning rate of log-variances as a multiple of that of the policy (defaults: arXiv 2603.21426)."""
    credit = settings.credit
    return credit.uncertainty_lr_factor or {"task": 1000.0, "instance": 10.0}[credit.uncertainty]


def rewards_rollouts(settings: RunConfig) -> bool:
    """Return whether any component of the reward has a weight, so that rollouts can have advantages of their own.

    The KL penalty of the reward does not count: it only keeps the policy where it is.
    """
    reward = settings.reward
    return max(reward.alpha, reward.beta, reward.eta, reward.delta) > 0


def uses_discriminator(settings: RunConfig) -> bool:
    """Return whether this run trains a discriminator, that is, whether its score has a weight in the reward."""
    return makes_rollouts(settings) and settings.reward.alpha > 0


def makes_rollouts(settings: RunConfig) -> bool:
    """Return whether any stage samples rollouts."""
    return "warm_up" in settings.stages or "distill" in settings.stages


def uses_vllm(settings: RunConfig) -> bool:
    """Return whether any stage samples its rollouts with vLLM in the training process."""
    return makes_rollouts(settings) and settings.rollout.engine == "vllm"


def uses_servers(settings: RunConfig) -> bool:
    """Return whether any stage samples its rollouts with servers."""
    return makes_rollouts(settings) and settings.rollout.engine == "vllm_server"


def warm_up_steps(settings: RunConfig) -> int:
    """Return the number of steps of the warm-up, 0 without one. Stage 2 continues to count rollout steps from there."""
    return settings.discriminator.warm_up_steps if "warm_up" in settings.stages else 0


def stage_sizes(settings: RunConfig) -> dict[str, tuple[int, int]]:
    """Return steps and questions per step of each stage of a run."""
    late = settings.distill
    sizes = {
        "sft": (settings.sft.steps, settings.sft.batch_size),
        "control": (late.steps, late.batch_size),
        "warm_up": (settings.discriminator.warm_up_steps, late.batch_size),
        "distill": (late.steps, late.batch_size),
    }
    return {stage: size for stage, size in sizes.items() if stage in settings.stages}


def rollout_steps(settings: RunConfig) -> range:
    """Return the rollout steps of a run, counted from 0 over warm-up and stage 2."""
    return range(warm_up_steps(settings) + (settings.distill.steps if "distill" in settings.stages else 0))


def uses_frozen_tower(settings: RunConfig) -> bool:
    """Return whether any stage encodes media outside of the training passes, with a frozen vision tower."""
    imitation = {"sft": settings.sft, "control": settings.distill}
    if settings.runtime.zero_stage < 3 and any(
        stage in settings.stages and not training.train_vision for stage, training in imitation.items()
    ):
        return True
    return makes_rollouts(settings) and not settings.distill.train_vision
