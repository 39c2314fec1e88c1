"""Find settings that have no effect in combination with the others."""

from __future__ import annotations

from dataclasses import fields

from rmsd_fast.config import ACCURACY_STEPS, DIVERGENCES, EvaluateConfig, RunConfig, SettingsError
from rmsd_fast.setting_rules.useless_teaching import Rule, of_made, of_pools, of_self_teacher, of_token_credit
from rmsd_fast.setting_rules.uses import (
    has_policy_gradient,
    makes_rollouts,
    rewards_rollouts,
    uses_discriminator,
    uses_frozen_tower,
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


def is_evaluated(key: str) -> bool:
    """Return whether rmsd_fast.evaluate reads a setting."""
    within = any(key == name or (name.endswith(".") and key.startswith(name)) for name in _EVALUATED)
    return within and key not in _NOT_EVALUATED


def refuse_training_settings(settings: RunConfig, written_keys: list[str]) -> None:
    """Raise SettingsError if an override of rmsd_fast.evaluate has no effect on an evaluation."""
    of_video = ("video.num_frames", "video.fps", "video.min_frames", "video.max_frames")
    for key in written_keys:
        if key == "rollout.tensor_parallel":
            raise SettingsError(
                f"override: {key} has no effect: with evaluate.engine=vllm, each process of an evaluation holds the "
                f"whole model; leave {key} out"
            )
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
        *of_self_teacher(settings),
        *of_token_credit(settings),
        *of_pools(settings),
        *of_made(settings, trains=trains),
        *_of_evaluations(settings),
        *_of_models(settings, trains=trains),
        *_of_data(settings),
    ]
    for prefixes, useless, reason in rules:
        for key in written_keys:
            if useless and any(key == name or (name.endswith(".") and key.startswith(name)) for name in prefixes):
                raise SettingsError(f"{where}: {key} has no effect: {reason}, or leave {key} out")


def _of_stages(settings: RunConfig) -> list[Rule]:
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


def _of_rollouts(settings: RunConfig, *, trains: bool) -> list[Rule]:
    """Return the rules of rewards and rollouts."""
    # Evaluations decode with rollout.cuda_graphs, and sample at rollout.temperature. A file may have settings of both
    # engines; on the command line, `refuse_training_settings` refuses those of the other one.
    evaluated = ["cuda_graphs"]
    if settings.evaluate.rollouts or not trains:
        evaluated.append("temperature")
    if not trains:
        evaluated.append("vllm_kv_cache_gib")
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


def _of_evaluations(settings: RunConfig) -> list[Rule]:
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


def _of_models(settings: RunConfig, *, trains: bool) -> list[Rule]:
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


def _of_data(settings: RunConfig) -> list[Rule]:
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
