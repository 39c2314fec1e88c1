"""Check combinations of settings that training reads."""

from __future__ import annotations

from urllib.parse import urlsplit

from rmsd_fast.config import DIVERGENCES, MEDIA_VIEW, STAGES, TRACKERS, VIEWS, RolloutConfig, RunConfig, SettingsError
from rmsd_fast.setting_rules.evaluation import check_evaluated, check_judge_model, check_room, check_temperature
from rmsd_fast.setting_rules.uses import (
    asks_judge,
    imitates_in_stage2,
    loss_terms,
    makes_rollouts,
    question_views,
    rewards_rollouts,
    uses_discriminator,
    uses_reference,
    uses_servers,
    uses_vllm,
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
    if uses_vllm(settings) or uses_servers(settings):
        check_temperature(settings.rollout.temperature, "rollout.engine", settings.rollout.engine)
    if (uses_vllm(settings) or uses_servers(settings)) and settings.model.quantize != "none":
        raise SettingsError(
            "rollout.engine: expected hf with model.quantize, since vLLM would sample with weights that are not "
            f"quantized, got {settings.rollout.engine} with model.quantize={settings.model.quantize}; set "
            "rollout.engine=hf or model.quantize=none"
        )
    _check_self_teacher(settings)
    if "distill" in settings.stages:
        _check_gradient(settings)
        _check_uncertainty(settings)
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
        alone = " but teacher answers, which stage 1 and the control imitate" if imitates_in_stage2(settings) else ""
        raise SettingsError(
            "kd.kind: expected k1 or another one if no reward has a weight, since stage 2 has nothing else to learn "
            f"from{alone}, got none; give a reward a weight, e.g. reward.delta=0.4, or set kd.kind=k1"
        )
    if 0 < teacher.until_step < steps:
        raise SettingsError(
            "self_teacher.until_step: expected 0 if no reward has a weight, since steps without the self-teacher learn "
            f"nothing then, got {teacher.until_step} of distill.steps={steps}; set self_teacher.until_step=0, or lower "
            "distill.steps"
        )


def _check_uncertainty(settings: RunConfig) -> None:
    form, terms = settings.credit.uncertainty, loss_terms(settings)
    if form != "none" and settings.kd.kind in DIVERGENCES:
        raise SettingsError(
            "kd.kind: expected none, k1 or avsd with credit.uncertainty, which weighs the advantages of tokens, got "
            f"{settings.kd.kind}; set kd.kind=k1, or credit.uncertainty=none"
        )
    if form == "none":
        return
    if len(terms) < 2:
        names = {"pg": "rewards", "kd": f"kd.kind={settings.kd.kind}", "sft": "distill.sft_coef"}
        raise SettingsError(
            "credit.uncertainty: expected two or more of rewards, kd.kind and distill.sft_coef, since a single term "
            f"would only be replaced by its logarithm, got {', '.join(names[name] for name in terms)}; set e.g. "
            "distill.sft_coef=1, or credit.uncertainty=none"
        )
    until, steps = settings.self_teacher.until_step, settings.distill.steps
    if "kd" in terms and 0 < until < steps:
        raise SettingsError(
            "self_teacher.until_step: expected 0 with credit.uncertainty, since the term of kd.kind would have no "
            f"value in later steps, got {until} of distill.steps={steps}; set self_teacher.until_step=0"
        )
    if form == "instance" and settings.distill.train_vision:
        raise SettingsError(
            "credit.uncertainty: expected none or task with distill.train_vision, since the network reads features of "
            "a frozen vision tower, got instance; set credit.uncertainty=task"
        )


def _check_self_teacher(settings: RunConfig) -> None:
    teacher, kd, credit = settings.self_teacher, settings.kd, settings.credit
    used_by = [
        *([f"kd.kind={kd.kind}"] if kd.kind != "none" else []),
        *([f"credit.magnitude={credit.magnitude}"] if credit.magnitude != "none" else []),
        *([f"credit.prune={credit.prune}"] if credit.prune != "none" else []),
    ]
    if used_by and teacher.kind == "none":
        raise SettingsError(
            f"self_teacher.kind: expected frozen, live, ema or path, whose log-probs {used_by[0]} needs, got none; set "
            "e.g. self_teacher.kind=frozen self_teacher.views=[answer]"
        )
    if not set(teacher.views) <= set(VIEWS) or len(set(teacher.views)) < len(teacher.views):
        raise SettingsError(
            f"self_teacher.views: expected some of {list(VIEWS)}, each at most once, got {teacher.views}; set e.g. "
            "self_teacher.views=[answer]"
        )
    if "sft" in settings.stages and settings.sft.hinted_share > 0 and not set(question_views(settings)) - {MEDIA_VIEW}:
        raise SettingsError(
            "self_teacher.views: expected one or more hints with a text for sft.hinted_share, which says how many "
            "questions are shown with them (a judge's feedback is about rollouts), got "
            f"{teacher.views}; set e.g. self_teacher.views=[answer]"
        )
    if teacher.kind == "none":
        return
    if not used_by:
        raise SettingsError(
            f"self_teacher.kind: expected none, since neither kd.kind nor credit.magnitude nor credit.prune uses a "
            f"self-teacher, got {teacher.kind}; set kd.kind=k1 or credit.magnitude=teacher, or self_teacher.kind=none"
        )
    if teacher.kind == "path" and not teacher.path:
        raise SettingsError(
            "self_teacher.path: expected the folder or Hub name of a model with self_teacher.kind=path, got nothing; "
            "set it, or another self_teacher.kind"
        )
    if not teacher.views and teacher.kind != "path":
        raise SettingsError(
            "self_teacher.views: expected one or more hints, without which the self-teacher knows no more than the "
            "student, got none; set e.g. self_teacher.views=[answer]"
        )
    if asks_judge(settings):
        check_judge_model(teacher.judge, "self_teacher.judge", "stage 2")
    if kd.kind == "avsd" and len(teacher.views) < 2:
        raise SettingsError(
            "self_teacher.views: expected two or more with kd.kind=avsd, which weighs teachers by their agreement, "
            f"got {teacher.views}; add a view, or set kd.kind=k1"
        )
    for name, compares in (("prune", credit.prune != "none"), ("magnitude_topk", credit.magnitude_topk > 0)):
        if kd.kind == "avsd" and compares:
            raise SettingsError(
                f"kd.kind: expected another one than avsd with credit.{name}={getattr(credit, name)}, which compares "
                f"the most probable tokens of a single self-teacher, got avsd; set kd.kind=k1, or leave credit.{name} "
                "out"
            )
    if credit.magnitude == "teacher" and not rewards_rollouts(settings):
        raise SettingsError(
            "credit.magnitude: expected none if no reward has a weight, since it weights the advantages of the "
            "rewards, got teacher; give a reward a weight, e.g. reward.delta=0.4, or set credit.magnitude=none"
        )
    if "distill" in settings.stages and set(teacher.views) - {MEDIA_VIEW}:
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


def _check_export(settings: RunConfig) -> None:
    if settings.discriminator.export and settings.model.quantize != "none":
        raise SettingsError(
            "discriminator.export: expected false with model.quantize, since the weights of the discriminator would be "
            f"rounded again and score differently, got true with model.quantize={settings.model.quantize}; set "
            "discriminator.export=false or model.quantize=none"
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
