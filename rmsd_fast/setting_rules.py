"""What settings mean together: which models they ask for, what excludes what, and which of them have no effect."""

from __future__ import annotations

from dataclasses import fields

from rmsd_fast.config import STAGES, RunConfig, SettingsError


def uses_reference(settings: RunConfig) -> bool:
    """Whether stage 2 scores its rollouts with the stage-1 student."""
    policy = "distill" in settings.stages and settings.distill.objective == "policy"
    return policy and (settings.distill.kl_coef > 0 or settings.reward.kl_in_reward > 0)


def uses_discriminator(settings: RunConfig) -> bool:
    """Whether this run trains a discriminator at all (the reward gives it weight, and the policy is rewarded)."""
    late = "warm_up" in settings.stages or "distill" in settings.stages
    return late and settings.reward.alpha > 0 and settings.distill.objective == "policy"


def uses_frozen_tower(settings: RunConfig) -> bool:
    """Whether any stage encodes media apart from the training passes, with a tower that does not change."""
    late = {"warm_up", "distill"} & set(settings.stages)
    imitates = {"sft": settings.sft} if "sft" in settings.stages else {}
    imitates |= {"distill": settings.distill} if late and settings.distill.objective == "sft" else {}
    frozen = [not stage.train_vision and settings.runtime.zero_stage < 3 for stage in imitates.values()]
    return any(frozen) or bool(late and settings.distill.objective == "policy" and not settings.distill.train_vision)


def check_room(settings: RunConfig, response: int, what: str) -> None:
    """Raise SettingsError where the longest prompt and a response of so many tokens do not fit one forward pass."""
    longest = settings.data.max_prompt_tokens + response
    if settings.micro_tokens < longest:
        raise SettingsError(
            f"micro_tokens: expected room for data.max_prompt_tokens={settings.data.max_prompt_tokens} and {what} "
            f"({response} tokens) together, {longest}, got {settings.micro_tokens}; raise it, or lower these"
        )


def check_together(settings: RunConfig) -> None:
    """Refuse settings that are allowed one by one and not together.

    Raises:
        SettingsError: it says which of them to change.
    """
    if settings.stages != [s for s in STAGES if s in settings.stages] or not settings.stages:
        raise SettingsError(
            f"stages: expected some of {list(STAGES)}, in this order, got {settings.stages}; e.g. stages=[sft]"
        )
    if "warm_up" in settings.stages and not uses_discriminator(settings):
        raise SettingsError(
            "stages: warm_up trains the discriminator, and with reward.alpha=0 or distill.objective=sft there is none; "
            "leave it out, e.g. stages=[sft,distill]"
        )
    video = settings.video
    if (video.num_frames is None) == (video.fps is None):
        raise SettingsError(
            "video.num_frames and video.fps exclude each other: write video.num_frames=null with video.fps=2, "
            f"or video.fps=null with video.num_frames=16 (got {video.num_frames} and {video.fps})"
        )
    for low, high in (
        ("min_frames", "max_frames"),
        ("min_video_pixels", "max_video_pixels"),
        ("min_image_pixels", "max_image_pixels"),
    ):
        least, most = getattr(video, low), getattr(video, high)
        if least > most:
            raise SettingsError(f"video.{low}={least}: expected at most video.{high}={most}; change one of them")
    if {"warm_up", "distill"} & set(settings.stages) and settings.distill.objective == "policy":
        # The discriminator reads rollouts that were cut with an end token.
        check_room(settings, settings.rollout.max_new_tokens + 1, "a rollout of rollout.max_new_tokens and its end")
    if not settings.name or "/" in settings.name:
        raise SettingsError(f"name: expected a folder name without '/', got {settings.name!r}")


def refuse_useless(settings: RunConfig, given: list[str], where: str) -> None:
    """Raise for a setting that was written but changes nothing in the chosen mode."""
    stages, distill = settings.stages, settings.distill
    late = "warm_up" in stages or "distill" in stages
    control = distill.objective == "sft"
    warm_up, judged = "warm_up" in stages, uses_discriminator(settings)
    own_clips = settings.made.enabled and settings.made.source == "clips"
    # (settings, whether they have no effect, why and what to write); a name that ends in "." is a whole section
    rules = [
        (["sft."], "sft" not in stages and not control, "stage sft is not in stages; add it to stages"),
        (
            [f"distill.{f.name}" for f in fields(distill) if f.name not in ("batch_size", "train_vision")],
            "distill" not in stages,
            "stage distill is not in stages; add it to stages",
        ),
        (["distill."], not late, "no stage uses it; add warm_up or distill to stages"),
        (["reward."], late and "distill" not in stages, "the warm-up pays no rewards; add distill to stages"),
        (["reward.score_clip"], not judged, "no discriminator is trained; give reward.alpha > 0"),
        (["model.attention"], settings.packing == "shared", "shared prompts have their own; write packing=padded"),
        (
            ["teacher.min_quality"],
            not judged or settings.teacher.quality == "uniform",
            "it filters what the discriminator is matched with, by a quality that is not uniform",
        ),
        (
            ["made.student_hidden", "made.student_layers"],
            bool(settings.model.path),
            "model.path names the student",
        ),
        (
            ["made.responses", "made.teacher_error_rate"],
            bool(settings.teacher.pool),
            "teacher.pool names the pool",
        ),
        (["rollout.", "reward."], not late, "no stage makes rollouts; add warm_up or distill to stages"),
        (
            [
                "reward.",
                "rollout.",
                "distill.kl",
                "distill.kl_coef",
                "distill.tis_cap",
                "distill.sequence_mask_cap",
                "distill.aggregation",
            ],
            control,
            "distill.objective=sft imitates T_best without rollouts; write distill.objective=policy",
        ),
        (
            ["rollout.log_questions"],
            settings.rollout.log_every_steps == 0,
            "rollout.log_every_steps is 0, so no rollouts are written; write rollout.log_every_steps=10",
        ),
        (["distill.kl"], distill.kl_coef == 0, "distill.kl_coef is 0; give it a weight"),
        (
            [f"sft.{f.name}" for f in fields(settings.sft) if f.name != "responses"],
            "sft" not in stages,
            "stage sft is not in stages; the control takes distill.* for it",
        ),
        (["discriminator."], not uses_discriminator(settings), "no discriminator is trained; give reward.alpha > 0"),
        (
            ["discriminator.warm_up_steps", "discriminator.warm_up_lr"],
            not warm_up,
            "stage warm_up is not in stages; add it to stages",
        ),
        (["discriminator.lr"], "distill" not in stages, "stage distill is not in stages; add it to stages"),
        (
            [f"made.{f.name}" for f in fields(settings.made) if f.name != "enabled"],
            not settings.made.enabled,
            "nothing is made; write made.enabled=true",
        ),
        (
            ["made.train_clips", "made.heldout_clips", "made.questions_per_clip"],
            not own_clips,
            "the real clips are what they are; write made.source=clips",
        ),
        (
            ["video.min_frames", "video.max_frames"],
            settings.video.num_frames is not None,
            "they bound video.fps, and video.num_frames is given",
        ),
        (
            ["evaluate."],
            not settings.data.heldout and not settings.made.enabled,
            "there is nothing to evaluate on; give data.heldout",
        ),
        (["data.task_type"], settings.data.format == "rmsd", "records of our own format name their task type"),
        (["data.disk_cache_gib"], not settings.data.disk_cache, "there is no data.disk_cache; name a folder"),
        (
            ["data.embedding_cache_mib"],
            not uses_frozen_tower(settings),
            "embeddings are kept only where the vision tower is frozen, and not in stage 1 under ZeRO-3; set "
            "distill.train_vision=false or sft.train_vision=false",
        ),
        (["teacher.numeric_eps"], settings.teacher.numeric_metric != "epsilon", "teacher.numeric_metric is mra"),
        (["runtime.offload_optimizer"], settings.runtime.zero_stage == 0, "ZeRO-0 keeps it; use runtime.zero_stage=2"),
    ]
    for prefixes, useless, reason in rules:
        for key in given:
            if useless and any(key == name or (name.endswith(".") and key.startswith(name)) for name in prefixes):
                raise SettingsError(f"{where}: {key} has no effect: {reason}, or leave {key} out")
