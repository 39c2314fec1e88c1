"""Check combinations of settings: which models they require, which are incompatible, and which have no effect."""

from __future__ import annotations

from dataclasses import fields
from urllib.parse import urlsplit

from rmsd_fast.config import (
    ACCURACY_STEPS,
    JUDGED,
    OF_IMAGES,
    REQUEST_FIELDS,
    STAGES,
    SUBTITLED,
    TASK_TYPES,
    TRACKERS,
    VIEWS,
    MadeConfig,
    RolloutConfig,
    RunConfig,
    SettingsError,
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
    *("rollout.temperature", "rollout.cuda_graphs"),
)
# Settings of `teacher` that are about the answers of the pool. The others say how to score answers of any kind.
_OF_POOLS = (
    *("responses", "hinted", "parse", "max_unanswered_share", "min_quality", "filter", "empty_pools", "weighting"),
    *("weight_power", "open_quality"),
)
# Settings of these sections that only matter in training.
_NOT_EVALUATED = ("evaluate.every_steps", "evaluate.samples", "made.label_share")
# What an evaluation has in place of settings of training.
_IN_PLACE = {
    "rollout.max_new_tokens": "evaluate.max_new_tokens",
    "rollout.prompts_per_batch": "evaluate.prompts_per_batch",
    "rollout.n": "evaluate.rollouts",
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


def teaches(settings: RunConfig, step: int) -> bool:
    """Return whether a step of stage 2, counted from 0, uses the self-teacher."""
    teacher, credit = settings.self_teacher, settings.credit
    weighted = credit.magnitude == "teacher" and (not credit.magnitude_steps or step < credit.magnitude_steps)
    in_time = not teacher.until_step or step < teacher.until_step
    return teacher.kind != "none" and in_time and (weighted or settings.kd.kind != "none")


def teaching_steps(settings: RunConfig) -> int:
    """Return the number of steps of stage 2 that use the self-teacher. They are the first ones."""
    steps = settings.distill.steps if "distill" in settings.stages else 0
    return next((step for step in range(steps) if not teaches(settings, step)), steps)


def quotes_pool(settings: RunConfig) -> bool:
    """Return whether the self-teacher is told answers of the teacher pool."""
    teacher = settings.self_teacher
    return "distill" in settings.stages and teacher.kind != "none" and "best_answer" in teacher.views


def has_pool(settings: RunConfig) -> bool:
    """Return whether the run has a teacher pool, which may be generated."""
    return bool(settings.teacher.pool) or settings.made.enabled


def uses_pool(settings: RunConfig) -> bool:
    """Return whether the run cannot do without a teacher pool."""
    imitates = bool({"sft", "control"} & set(settings.stages))
    chosen = settings.reward.unlabeled == "teacher" or settings.teacher.empty_pools == "drop"
    return imitates or chosen or quotes_pool(settings) or uses_discriminator(settings)


def weights_tokens(settings: RunConfig) -> bool:
    """Return whether the tokens of a rollout may have different advantages."""
    return settings.kd.kind != "none" or settings.credit.magnitude != "none" or settings.credit.position != "none"


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


def check_room(settings: RunConfig, response: int, what: str) -> None:
    """Raise SettingsError if the longest prompt and a response of `response` tokens do not fit one forward pass.

    `what` names the response in the message.
    """
    longest = settings.data.max_prompt_tokens + response
    if settings.micro_tokens < longest:
        raise SettingsError(
            f"micro_tokens: expected room for data.max_prompt_tokens={settings.data.max_prompt_tokens} and {what} "
            f"({response} tokens) together, {longest}, got {settings.micro_tokens}; raise it, or lower the other two"
        )


def check_together(settings: RunConfig, *, trains: bool = True) -> None:
    """Check settings that are valid on their own but may conflict.

    Args:
        settings: the settings.
        trains: whether the program trains. If not, settings that only matter in training may conflict.
    Raises:
        SettingsError: two settings conflict; the message says which one to change.
    """
    if trains:
        _check_stages(settings)
    check_evaluated(settings)
    if trains:
        _check_training(settings)


def check_evaluated(settings: RunConfig) -> None:
    """Check settings of evaluations. The messages name settings that rmsd_fast.evaluate reads.

    Raises:
        SettingsError: two settings conflict; the message says which one to change.
    """
    if settings.evaluate.prompt == "benchmark" and not settings.evaluate.benchmark:
        raise SettingsError(
            "evaluate.prompt=benchmark: expected evaluate.benchmark, since only questions of a benchmark have its "
            "prompt, got none; set evaluate.benchmark, or evaluate.prompt=rmsd"
        )
    _check_reranker(settings)
    _check_judge(settings)
    _check_subtitles(settings)
    evaluate = settings.evaluate
    if evaluate.without_video and (not evaluate.benchmark or evaluate.benchmark in OF_IMAGES):
        raise SettingsError(
            "evaluate.without_video: expected a benchmark about videos, got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; set evaluate.without_video=false"
        )
    video = settings.video
    if (video.num_frames is None) == (video.fps is None):
        raise SettingsError(
            "video.num_frames and video.fps cannot both be set: use video.num_frames=null with video.fps=2, "
            f"or video.fps=null with video.num_frames=16 (got {video.num_frames} and {video.fps})"
        )
    for low, high in (
        ("min_frames", "max_frames"),
        ("min_video_pixels", "max_video_pixels"),
        ("min_image_pixels", "max_image_pixels"),
    ):
        least, most = getattr(video, low), getattr(video, high)
        if least > most:
            raise SettingsError(f"video.{low}={least}: expected at most video.{high}={most}; change one of the two")
    _check_made(settings.made)


def _check_stages(settings: RunConfig) -> None:
    if settings.stages != [s for s in STAGES if s in settings.stages] or not settings.stages:
        raise SettingsError(
            f"stages: expected a subsequence of {list(STAGES)}, got {settings.stages}; set e.g. stages=[sft]"
        )
    if "warm_up" in settings.stages and not uses_discriminator(settings):
        raise SettingsError(
            "stages: warm_up trains the discriminator, which reward.alpha=0 does not use; leave warm_up out, e.g. "
            "stages=[sft,distill]"
        )


def _check_training(settings: RunConfig) -> None:
    if makes_rollouts(settings):
        # An end token is appended to truncated rollouts before the discriminator reads them.
        check_room(
            settings, settings.rollout.max_new_tokens + 1, "a rollout of rollout.max_new_tokens and its end token"
        )
        _check_replay(settings)
        _check_servers(settings.rollout)
    if (uses_vllm(settings) or uses_servers(settings)) and settings.model.quantize != "none":
        raise SettingsError(
            "rollout.engine: expected hf with model.quantize, since vLLM would sample with weights that are not "
            f"quantized, got {settings.rollout.engine} with model.quantize={settings.model.quantize}; set "
            "rollout.engine=hf or model.quantize=none"
        )
    _check_self_teacher(settings)
    if "distill" in settings.stages:
        _check_gradient(settings)
    _check_adapter(settings)
    _check_export(settings)
    if settings.made.label_share < 1 and settings.teacher.unlabeled == "refuse":
        raise SettingsError(
            "made.label_share: expected 1, since teacher.unlabeled=refuse needs every ground truth, got "
            f"{settings.made.label_share:g}; set teacher.unlabeled=agreement"
        )
    if settings.made.enabled and not settings.teacher.pool and settings.teacher.responses > settings.made.responses:
        raise SettingsError(
            f"teacher.responses: expected at most made.responses={settings.made.responses}, the answers that are "
            f"generated per question, got {settings.teacher.responses}; set made.responses={settings.teacher.responses}"
        )
    if settings.runtime.offload_optimizer and settings.runtime.optimizer == "adamw_8bit":
        raise SettingsError(
            "runtime.optimizer: expected adamw with runtime.offload_optimizer=true, since bitsandbytes updates 8-bit "
            "states in host memory about a hundred times slower, got adamw_8bit; choose one of the two"
        )
    trackers = settings.runtime.trackers
    if not set(trackers) <= set(TRACKERS) or len(set(trackers)) < len(trackers):
        raise SettingsError(
            f"runtime.trackers: expected some of {list(TRACKERS)}, each at most once, got {trackers}; set e.g. "
            "runtime.trackers=[tensorboard,wandb]"
        )
    if not settings.name or "/" in settings.name:
        raise SettingsError(f"name: expected a folder name without '/', got {settings.name!r}")


def _check_gradient(settings: RunConfig) -> None:
    """Raise SettingsError if stage 2 has steps without a gradient other than that of the KL."""
    teacher, kd, steps = settings.self_teacher, settings.kd, settings.distill.steps
    rewarded = rewards_rollouts(settings)
    if (rewarded or settings.reward.kl_in_reward > 0) and settings.rollout.n < 2:
        raise SettingsError(
            "rollout.n: expected 2 or more if a reward has a weight, since the advantage of a single rollout is 0, "
            f"got {settings.rollout.n}; set e.g. rollout.n=8, or all weights of reward to 0 with kd.kind=k1"
        )
    if rewarded:
        return
    if kd.kind == "none":
        raise SettingsError(
            "kd.kind: expected k1 or avsd if no reward has a weight, since stage 2 has nothing else to learn from, got "
            "none; give a reward a weight, e.g. reward.delta=0.4, or set kd.kind=k1"
        )
    if 0 < teacher.until_step < steps:
        raise SettingsError(
            "self_teacher.until_step: expected 0 if no reward has a weight, since steps without the self-teacher learn "
            f"nothing then, got {teacher.until_step} of distill.steps={steps}; set self_teacher.until_step=0, or lower "
            "distill.steps"
        )


def _check_self_teacher(settings: RunConfig) -> None:
    teacher, kd, credit = settings.self_teacher, settings.kd, settings.credit
    used_by = [
        *([f"kd.kind={kd.kind}"] if kd.kind != "none" else []),
        *([f"credit.magnitude={credit.magnitude}"] if credit.magnitude != "none" else []),
    ]
    if used_by and teacher.kind == "none":
        raise SettingsError(
            f"self_teacher.kind: expected frozen, live or ema, whose log-probs {used_by[0]} needs, got none; set e.g. "
            "self_teacher.kind=frozen self_teacher.views=[answer]"
        )
    if not set(teacher.views) <= set(VIEWS) or len(set(teacher.views)) < len(teacher.views):
        raise SettingsError(
            f"self_teacher.views: expected some of {list(VIEWS)}, each at most once, got {teacher.views}; set e.g. "
            "self_teacher.views=[answer]"
        )
    if teacher.kind == "none":
        return
    if not used_by:
        raise SettingsError(
            f"self_teacher.kind: expected none, since neither kd.kind nor credit.magnitude uses a self-teacher, got "
            f"{teacher.kind}; set kd.kind=k1 or credit.magnitude=teacher, or self_teacher.kind=none"
        )
    if not teacher.views:
        raise SettingsError(
            "self_teacher.views: expected one or more hints, without which the self-teacher knows no more than the "
            "student, got none; set e.g. self_teacher.views=[answer]"
        )
    if kd.kind == "avsd" and len(teacher.views) < 2:
        raise SettingsError(
            "self_teacher.views: expected two or more with kd.kind=avsd, which weighs teachers by their agreement, "
            f"got {teacher.views}; add a view, or set kd.kind=k1"
        )
    if credit.magnitude == "teacher" and not rewards_rollouts(settings):
        raise SettingsError(
            "credit.magnitude: expected none if no reward has a weight, since it weights the advantages of the "
            "rewards, got teacher; give a reward a weight, e.g. reward.delta=0.4, or set credit.magnitude=none"
        )
    if "distill" in settings.stages:
        longest = teacher.max_hint_tokens + settings.rollout.max_new_tokens
        check_room(settings, longest, "a hint of self_teacher.max_hint_tokens and a rollout of rollout.max_new_tokens")


def _check_replay(settings: RunConfig) -> None:
    rollout, teacher = settings.rollout, settings.self_teacher
    replays = rollout.engine == "replay"
    if replays and "distill" in settings.stages and teacher.kind != "none":
        raise SettingsError(
            "rollout.engine: expected hf, vllm or vllm_server with a self-teacher, whose log-probs are compared with "
            "those of the policy, while a dump has those of the run that wrote it, got replay with "
            f"self_teacher.kind={teacher.kind}; set rollout.engine=hf, or self_teacher.kind=none"
        )
    if replays and not rollout.replay:
        raise SettingsError(
            "rollout.replay: expected the folder of a dump with rollout.engine=replay, got nothing; set rollout.replay "
            "to the folder that a run has written with rollout.dump"
        )
    if rollout.replay and not replays:
        raise SettingsError(
            f"rollout.engine: expected replay with rollout.replay={rollout.replay}, got {rollout.engine}; set "
            "rollout.engine=replay, or leave rollout.replay empty"
        )
    if replays and rollout.dump:
        raise SettingsError(
            f"rollout.dump: expected nothing with rollout.engine=replay, since rollout.replay={rollout.replay} already "
            f"has these rollouts, got {rollout.dump}; leave rollout.dump empty"
        )


def _check_servers(rollout: RolloutConfig) -> None:
    serves, urls = rollout.engine == "vllm_server", rollout.server_urls
    if serves and not urls:
        raise SettingsError(
            "rollout.server_urls: expected one or more URLs with rollout.engine=vllm_server, got none; start a server "
            "with python -m rmsd_fast.serve_rollouts, and set rollout.server_urls=[http://127.0.0.1:8400]"
        )
    if urls and not serves:
        raise SettingsError(
            f"rollout.engine: expected vllm_server with rollout.server_urls={urls}, got {rollout.engine}; set "
            "rollout.engine=vllm_server, or leave rollout.server_urls empty"
        )
    for url in urls:
        if not _is_address(url):
            raise SettingsError(
                f"rollout.server_urls: expected http://<host>:<port>, got {url!r}; set e.g. "
                "rollout.server_urls=[http://127.0.0.1:8400]"
            )
    if len(set(urls)) < len(urls):
        raise SettingsError(f"rollout.server_urls: expected different servers, got {urls}; name each of them once")


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        plain = parts.path in ("", "/") and not (parts.query or parts.fragment or parts.username or parts.password)
        return parts.scheme == "http" and bool(parts.hostname) and bool(parts.port) and plain
    except ValueError:
        return False


def refuse_evaluation_only(settings: RunConfig) -> None:
    """Raise SettingsError for what only rmsd_fast.evaluate does: rank or judge answers, or ask without videos."""
    if settings.evaluate.without_video:
        raise SettingsError(
            "evaluate.without_video: expected false in training, whose report would show the scores as those with "
            "videos, got true; leave it out, and evaluate the run's export/ with it"
        )
    if settings.evaluate.judge.endpoint:
        raise SettingsError(
            "evaluate.judge.endpoint: expected none in training, since only rmsd_fast.evaluate asks a judge, got "
            f"{settings.evaluate.judge.endpoint}; leave it out, and evaluate the run's export/ with it"
        )
    if settings.evaluate.reranker:
        raise SettingsError(
            "evaluate.reranker: expected none in training, since only rmsd_fast.evaluate ranks responses, got "
            f"{settings.evaluate.reranker}; leave it out, and evaluate the run's export/ with it"
        )


def _check_export(settings: RunConfig) -> None:
    if settings.discriminator.export and settings.model.quantize != "none":
        raise SettingsError(
            "discriminator.export: expected false with model.quantize, since the weights of the discriminator would be "
            f"rounded again and score differently, got true with model.quantize={settings.model.quantize}; set "
            "discriminator.export=false or model.quantize=none"
        )


def _check_reranker(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.reranker:
        return
    if evaluate.rollouts < 2:
        raise SettingsError(
            "evaluate.reranker: expected evaluate.rollouts of 2 or more, the sampled responses that it chooses from, "
            f"got {evaluate.rollouts}; set e.g. evaluate.rollouts=8"
        )
    # An end token is appended to truncated responses.
    check_room(settings, evaluate.max_new_tokens + 1, "a response of evaluate.max_new_tokens and its end token")


def _check_judge(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.judge.endpoint:
        return
    if evaluate.benchmark not in JUDGED:
        raise SettingsError(
            f"evaluate.judge.endpoint: expected a benchmark with judged answers ({', '.join(JUDGED)}), got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; leave the judge out"
        )
    if not evaluate.judge.model:
        raise SettingsError("evaluate.judge.model: expected the name of a model, got nothing; set it")
    if evaluate.parse != "lenient":
        raise SettingsError(
            "evaluate.parse: expected lenient with evaluate.judge, since a judge reads answers in any form, got "
            f"{evaluate.parse}; set evaluate.parse=lenient"
        )
    if evaluate.rollouts:
        raise SettingsError(
            "evaluate.rollouts: expected 0 with evaluate.judge, since only greedy answers are judged, got "
            f"{evaluate.rollouts}; leave one of the two out"
        )
    for name in evaluate.judge.extra_body:
        if name in REQUEST_FIELDS:
            raise SettingsError(
                f"evaluate.judge.extra_body: expected other fields, got {name!r}, which the evaluation sets; remove it"
            )


def _check_subtitles(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.subtitles:
        return
    if evaluate.benchmark not in SUBTITLED:
        raise SettingsError(
            f"evaluate.subtitles: expected a benchmark with subtitles ({', '.join(SUBTITLED)}), got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; set evaluate.subtitles=false"
        )
    if evaluate.without_video:
        raise SettingsError(
            "evaluate.subtitles: expected false with evaluate.without_video, since subtitles are those of the shown "
            "frames, got true; leave one of the two out"
        )
    if evaluate.prompt != "benchmark":
        raise SettingsError(
            "evaluate.subtitles: expected evaluate.prompt=benchmark, whose prompt has a place for them, got "
            f"evaluate.prompt={evaluate.prompt}; set evaluate.prompt=benchmark"
        )


def _check_adapter(settings: RunConfig) -> None:
    model, mode, zero = settings.model, settings.discriminator.mode, settings.runtime.zero_stage
    lora = model.adapter == "lora"
    judged = uses_discriminator(settings)
    if judged and mode == "shared" and not lora:
        raise SettingsError(
            "discriminator.mode=shared: expected model.adapter=lora, since policy and discriminator can only share "
            f"weights that are not trained, got model.adapter={model.adapter}; set discriminator.mode=separate or head"
        )
    if judged and mode == "head" and zero == 3 and not lora and uses_reference(settings):
        raise SettingsError(
            "runtime.zero_stage: expected 0, 1 or 2 with discriminator.mode=head, since the head reads the reference, "
            "got 3; set runtime.zero_stage=2"
        )
    if model.quantize == "nf4" and not lora:
        raise SettingsError(
            "model.quantize=nf4: expected model.adapter=lora, since quantized weights cannot be trained, got "
            f"model.adapter={model.adapter}; set model.adapter=lora or model.quantize=none"
        )
    if not lora:
        return
    if model.quantize == "nf4" and zero == 3:
        raise SettingsError(
            "runtime.zero_stage: expected at most 2 with model.quantize=nf4, since ZeRO-3 cannot split quantized "
            "weights, got 3; set runtime.zero_stage=2"
        )
    for name in ("lm_head", "embed_tokens"):
        if name in model.lora_targets:
            raise SettingsError(
                f"model.lora_targets: expected layers of the language model's body, got {name!r}, whose weight the "
                "fused losses read without adapters; leave it out"
            )
    if not model.lora_targets:
        raise SettingsError("model.lora_targets: expected one or more layers, got none; set e.g. [q_proj,v_proj]")
    for section, stages in (("sft", {"sft"}), ("distill", {"control", "warm_up", "distill"})):
        if stages & set(settings.stages) and getattr(settings, section).train_vision:
            raise SettingsError(
                f"{section}.train_vision: expected false with model.adapter=lora, since the vision tower has no "
                f"adapters, got true; set {section}.train_vision=false"
            )
    if zero == 3 and judged and mode != "separate":
        raise SettingsError(
            f"runtime.zero_stage: expected at most 2 with discriminator.mode={mode}, since ZeRO-3 cannot split a "
            "backbone that two engines share, got 3; set discriminator.mode=separate, or runtime.zero_stage=2, which "
            "splits the states of the adapters"
        )
    if zero == 0 and judged and mode == "shared":
        raise SettingsError(
            "runtime.zero_stage: expected 1 or 2 with discriminator.mode=shared, since ZeRO-0 sums the gradients of "
            "all adapters of the backbone, got 0; set runtime.zero_stage=2"
        )


def _check_made(made: MadeConfig) -> None:
    if not made.tasks or len(set(made.tasks)) < len(made.tasks) or not set(made.tasks) <= set(TASK_TYPES):
        raise SettingsError(
            f"made.tasks: expected some of {list(TASK_TYPES)}, each at most once, got {made.tasks}; "
            "set e.g. made.tasks=[temporal,open]"
        )
    if made.questions_per_clip > len(made.tasks):
        raise SettingsError(
            f"made.questions_per_clip: expected at most {len(made.tasks)}, the number of made.tasks, since the "
            f"questions about a clip have different task types, got {made.questions_per_clip}; set "
            f"made.questions_per_clip={len(made.tasks)}"
        )
    if made.teacher == "blind" and made.source != "clips":
        raise SettingsError(
            "made.teacher=blind: expected made.source=clips, since the teacher errs on contents of generated clips, "
            f"got made.source={made.source}; choose another made.teacher"
        )


def refuse_useless(settings: RunConfig, written_keys: list[str], where: str, *, trains: bool = True) -> None:
    """Raise SettingsError if one of the written keys has no effect in combination with the other settings.

    Args:
        settings: the settings.
        written_keys: names of the settings that were written.
        where: where they were written, for the message.
        trains: whether the program trains.
    """
    stages, distill = settings.stages, settings.distill
    rolls_out, control = makes_rollouts(settings), "control" in stages
    # With dropped questions, matching also decides which questions a stage has.
    drops = settings.teacher.empty_pools == "drop" and (rolls_out or control)
    warm_up, judged = "warm_up" in stages, uses_discriminator(settings)
    matched = judged or drops or settings.reward.unlabeled == "teacher"
    # The best answer is chosen among those that can be matched.
    chosen = matched or quotes_pool(settings)
    # If a pool is needed, its absence is the fault.
    poolless = not has_pool(settings) and not uses_pool(settings)
    teacher, credit = settings.self_teacher, settings.credit
    only_magnitude = credit.magnitude == "teacher" and settings.kd.kind == "none"
    own_clips = settings.made.enabled and settings.made.source == "clips"
    needles = settings.made.enabled and settings.made.source == "needles"
    # Evaluations decode with rollout.cuda_graphs, and sample at rollout.temperature.
    sampled = settings.evaluate.rollouts or not trains
    evaluated = ("cuda_graphs", "temperature") if sampled else ("cuda_graphs",)
    of_rollouts = [f"rollout.{f.name}" for f in fields(settings.rollout) if f.name not in evaluated]
    # (settings, whether they have no effect, reason and what to write); a name that ends in "." is a whole section.
    rules = [
        (["sft."], "sft" not in stages and not control, "stage sft is not in stages; add it to stages"),
        (
            [f"distill.{f.name}" for f in fields(distill) if f.name not in ("batch_size", "train_vision")],
            "distill" not in stages and not control,
            "stage distill is not in stages; add it to stages",
        ),
        (["distill."], not rolls_out and not control, "no stage uses it; add distill to stages"),
        (
            [f"distill.{name}" for name in ("kl", "kl_coef", "tis_cap", "sequence_mask_cap", "aggregation")],
            "distill" not in stages,
            "stage distill is not in stages, and the control has no policy loss; add distill to stages",
        ),
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
        ([*of_rollouts, "reward."], not rolls_out, "no stage samples rollouts; add warm_up or distill to stages"),
        (
            ["rollout.vllm_kv_cache_gib"],
            settings.rollout.engine not in ("vllm", "vllm_server"),
            f"rollout.engine={settings.rollout.engine} has no cache of this size; set rollout.engine=vllm",
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
        (["distill.kl"], distill.kl_coef == 0, "distill.kl_coef is 0; give it a weight"),
        (
            ["self_teacher.", "credit.", "kd."],
            "distill" not in stages,
            "stage distill is not in stages; add it to stages",
        ),
        (
            [f"self_teacher.{f.name}" for f in fields(settings.self_teacher) if f.name != "kind"],
            settings.self_teacher.kind == "none",
            "self_teacher.kind is none; set self_teacher.kind=frozen",
        ),
        (
            ["self_teacher.ema_rate", "self_teacher.ema_every"],
            settings.self_teacher.kind != "ema",
            f"self_teacher.kind={settings.self_teacher.kind} has no average; set self_teacher.kind=ema",
        ),
        (
            ["credit.magnitude_clip", "credit.magnitude_mix", "credit.magnitude_steps"],
            settings.credit.magnitude == "none",
            "credit.magnitude is none; set credit.magnitude=teacher",
        ),
        (
            ["credit.position_least", "credit.position_start", "credit.position_width"],
            settings.credit.position == "none",
            "credit.position is none; set credit.position=sigmoid",
        ),
        (
            ["credit.position", "credit.position_least", "credit.position_start", "credit.position_width"],
            credit.position_least == 1,
            "with credit.position_least=1, all weights are 1; set a lower value",
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
        (["kd.coef", "kd.gap_clip"], settings.kd.kind == "none", "kd.kind is none; set kd.kind=k1"),
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
        (
            ["teacher.filter"],
            settings.teacher.filter == "imitation" and "sft" not in stages and not control,
            "no stage imitates; set teacher.filter=none",
        ),
        (["discriminator.lr"], "distill" not in stages, "stage distill is not in stages; add it to stages"),
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
        (
            ["video.min_frames", "video.max_frames"],
            settings.video.num_frames is not None,
            "it only applies to video.fps, and video.num_frames is set; set video.num_frames=null and video.fps=2",
        ),
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
        (
            ["teacher.numeric_eps"],
            settings.teacher.numeric_metric != "epsilon",
            "teacher.numeric_metric is mra; set teacher.numeric_metric=epsilon",
        ),
        (
            ["runtime.offload_optimizer"],
            settings.runtime.zero_stage == 0,
            "ZeRO-0 cannot offload the optimizer; set runtime.zero_stage=2",
        ),
    ]
    for prefixes, useless, reason in rules:
        for key in written_keys:
            if useless and any(key == name or (name.endswith(".") and key.startswith(name)) for name in prefixes):
                raise SettingsError(f"{where}: {key} has no effect: {reason}, or leave {key} out")
