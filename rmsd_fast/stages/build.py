"""Build the models and engines that a stage works on."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rmsd_fast.config import ModelError, RunConfig, SettingsError
from rmsd_fast.data.errors import DataError, counted
from rmsd_fast.data.media import MediaReader
from rmsd_fast.data.media_cache import ByteLru
from rmsd_fast.data.prompts import PromptBuilder, ResponseError
from rmsd_fast.method.natural import REASONS
from rmsd_fast.models.adapters import DISCRIMINATOR, POLICY, add_adapter, add_start, check_base, read_quantized_base
from rmsd_fast.models.discriminator import Discriminator
from rmsd_fast.models.folders import model_digests, resolve_folder
from rmsd_fast.models.liger import use_liger
from rmsd_fast.models.policy import Policy
from rmsd_fast.models.quantize import QuantizedBase, import_bitsandbytes, quantize
from rmsd_fast.models.shared_prefix import enable_shared_prefix, unsupported
from rmsd_fast.models.students import Student, freeze, load_student
from rmsd_fast.models.teacher_folder import equal_towers
from rmsd_fast.rollout.base import RolloutEngine
from rmsd_fast.rollout.copied import CopyRollout
from rmsd_fast.rollout.hf import HfRollout
from rmsd_fast.rollout.replay import ReplayRollout
from rmsd_fast.runtime.engine import Engine
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.runtime.process_group import World
from rmsd_fast.runtime.term_weights import TermWeights
from rmsd_fast.setting_rules.evaluation import check_room
from rmsd_fast.setting_rules.uses import (
    imitates_in_stage2,
    loss_terms,
    reads_hints,
    uses_discriminator,
    uses_ema,
    uses_other_teacher,
    uses_reference,
)
from rmsd_fast.stages.hints import missing_hint_media, read_hints
from rmsd_fast.stages.material import Material
from rmsd_fast.stages.rollout_servers import connect
from rmsd_fast.stages.state import StageState
from rmsd_fast.teacher.targets import Targets, build_targets

log = logging.getLogger("rmsd_fast")


def load(path: str, settings: RunConfig, world: World, *, only_tower: bool = False) -> Student:
    """Load a student onto this process's device.

    With `model.quantize=nf4`, an export of a quantized run is its quantized base model with the exported adapter.

    Args:
        path: folder or Hub name of the student.
        settings: settings of the run.
        world: this process in the run.
        only_tower: whether the language model stays in host memory.
    Raises:
        NotInstalled: bitsandbytes is needed but not installed.
        SettingsError: the base model of an export was quantized in another dtype.
        ModelError: the student cannot be loaded, or the base model of an export has changed.
    """
    quantizes, dtype = settings.model.quantize == "nf4", settings.model.dtype
    if quantizes:
        # Loading a large model takes minutes, so a missing package is reported before.
        import_bitsandbytes()
    folder = resolve_folder(path)
    base = read_quantized_base(folder) if quantizes else None
    student = load_student(
        check_base(base, folder, dtype=dtype) if base else folder,
        dtype=dtype,
        attn_implementation=settings.model.attention,
        liger=use_liger(settings.model.liger, world.device),
    )
    if quantizes:
        quantize(student.model, world.device)
        student.base = base or QuantizedBase(path, dtype, model_digests(folder))
    if base:
        add_start(student.model, folder)
    return prepare(student, path, settings, world, only_tower=only_tower)


def prepare(student: Student, path: str, settings: RunConfig, world: World, *, only_tower: bool = False) -> Student:
    """Move a student to this process's device and set its attention implementation according to the settings.

    With `only_tower`, only its vision tower is moved.
    """
    # Move the student first, because the attention of the vision tower depends on the device.
    (student.model.model.visual if only_tower else student.model).to(world.device)
    reason = unsupported(student.model)
    if reason:
        raise ModelError(
            f"{path}: prompts cannot be shared, {reason}; rollouts and evaluations share prompts "
            "with every packing, so change config.json or use another model"
        )
    if settings.packing == "shared":
        enable_shared_prefix(student.model)
    return student


def build_imitation(
    path: str,
    settings: RunConfig,
    world: World,
    material: Material,
    media: MediaReader | None = None,
    *,
    stage: str,
) -> StageState:
    """Build the state of stage 1, or of the control of stage 2: the student and its engine.

    Args:
        path: folder of the model to start from.
        settings: settings of the run.
        world: this process in the run.
        material: checked inputs of the run.
        media: reader of the videos and images.
        stage: "sft" or "control".
    """
    training = settings.sft if stage == "sft" else settings.distill
    student = load(path, settings, world)
    builder = PromptBuilder(student, settings.video, media)
    targets = read_targets(material, builder, settings, world)
    # Faults of hints that only stage 2 uses must not appear after hours of stage 1.
    missing = missing_hint_media(material, settings, world)
    hints = read_hints(material, builder, targets, settings, world, missing) if reads_hints(settings) else {}
    if stage == "sft" and settings.sft.hinted_share:
        hints = read_hints(material, builder, targets, settings, world, missing, apart=True)
    if settings.model.adapter == "lora":
        add_adapter(student.model, POLICY, settings.model, seed=settings.seed)
    policy = make_policy(student, settings, training.train_vision)
    policy = make_engine(policy, settings, world, training.lr, training.weight_decay)
    room = 0 if training.train_vision else settings.data.embedding_cache_mib * 2**20
    features = ByteLru(room) if room else None
    return StageState(
        settings,
        world,
        student,
        builder,
        targets,
        PhaseTimer(world.device),
        policy,
        train_vision=training.train_vision,
        hints=hints,
        hinted_share=settings.sft.hinted_share if stage == "sft" else 0.0,
        features=features,
    )


def read_targets(material: Material, builder: PromptBuilder, settings: RunConfig, world: World) -> dict[str, Targets]:
    """Return the targets of the training questions, without the answers that this student cannot be trained on.

    An answer is left out if the student's tokenizer cannot encode it or if it does not fit into `micro_tokens`.

    Raises:
        SettingsError: more than `data.max_bad_share` of the answers are left out, most of them because of
            `micro_tokens`.
        DataError: more than `data.max_bad_share` of the answers are left out, most of them for other reasons.
    """
    hint = settings.self_teacher.max_hint_tokens if "sft" in settings.stages and settings.sft.hinted_share else 0
    room = settings.micro_tokens - settings.data.max_prompt_tokens - hint
    refused: dict[str, list[str]] = {}
    asked = longest = 0

    def refuse(text: str) -> str | None:
        nonlocal asked, longest
        asked += 1
        try:
            builder.check_response(text)
            # A token has at least one byte, so only a text that might be too long needs to be tokenized.
            tokens = len(builder.encode_response(text)) if len(text.encode()) >= room else 0
            reason = "too_long" if tokens > room else None
            longest = max(longest, tokens)
        except ResponseError as error:
            reason = error.reason
        if reason:
            refused.setdefault(reason, []).append(text)
        return reason

    targets = build_targets(
        material.train, material.scores, settings.teacher, refuse, seed=settings.seed, imitate=settings.sft.responses
    )
    number = sum(map(len, refused.values()))
    if number > settings.data.max_bad_share * asked:
        most = max(refused, key=lambda reason: len(refused[reason]))
        if most == "too_long":
            check_room(settings, longest + hint, "the longest teacher response" + " with a hint" * bool(hint))
        raise DataError(
            f"teacher pool: {number:,} of {counted(asked, 'answer')} cannot be used to train this student: "
            f"{', '.join(f'{reason} {len(texts):,}' for reason, texts in refused.items())} ({most}: {REASONS[most]}), "
            f"first: {refused[most][0]!r:.80}; use a pool and a model that match, teacher.parse=natural instead of "
            "strict, or raise data.max_bad_share"
        )
    for reason, texts in refused.items():
        if world.is_main:
            log.warning("%s left out: %s; first: %.80r", counted(len(texts), "answer"), REASONS[reason], texts[0])
    return targets


def build_distillation(
    path: str, settings: RunConfig, world: World, material: Material, media: MediaReader | None = None
) -> StageState:
    """Build the state of warm-up and stage 2: policy, discriminator and reference, all from the stage-1 student.

    With adapters, the reference is the policy's backbone without them, and the discriminator can share it too.
    See `build_imitation` for the arguments.
    """
    state = build_imitation(path, settings, world, material, media, stage="distill")
    if imitates_in_stage2(settings) and not any(targets.top for targets in state.targets.values()):
        raise SettingsError(
            "distill.sft_coef: expected questions with a usable response, got none that passes "
            f"teacher.filter={settings.teacher.filter} with teacher.min_quality={settings.teacher.min_quality:g}; "
            "check the pool with python -m rmsd_fast.pool check, or set distill.sft_coef=0"
        )
    state.rollouts = make_rollouts(state, path, settings, world)
    if uses_reference(settings):
        lora = settings.model.adapter == "lora"
        # It runs in the policy's engine, which gathers its weights under ZeRO-3.
        without = partial(state.policy, adapted=False)
        state.reference = without if lora else make_reference(load(path, settings, world))
    if uses_other_teacher(settings):
        teacher = load(settings.self_teacher.path, settings, world)
        state.teacher = make_reference(teacher)
        if not state.train_vision:
            with state.policy.full_weights(state.student.model.model.visual):
                state.shares_tower = equal_towers(teacher.model, state.student.model)
    if uses_ema(settings):
        state.average = MovingAverage(state.policy, settings.self_teacher.ema_rate)
    if settings.credit.uncertainty != "none" and "distill" in settings.stages:
        features = state.student.model.config.text_config.hidden_size
        terms = {"features": features, "seed": settings.seed, "world": world}
        state.term_weights = TermWeights(settings.credit.uncertainty, loss_terms(settings), **terms)
    if uses_discriminator(settings):
        discriminator = _discriminator(state, path)
        state.discriminator = make_engine(discriminator, settings, world, settings.discriminator.lr)
    return state


def make_rollouts(state: StageState, path: str, settings: RunConfig, world: World) -> RolloutEngine:
    """Return the engine that samples the rollouts, see `rollout.engine`.

    Args:
        state: state of the stage, with its student.
        path: folder of the model that the stage starts from.
        settings: settings of the run.
        world: this process in the run.
    """
    rollout = settings.rollout
    if rollout.engine == "vllm":
        from rmsd_fast.rollout.vllm import VllmSampler

        sampler = VllmSampler(
            resolve_folder(path),
            state.student.model.config,
            banned_ids=state.builder.banned_ids,
            eos_id=state.builder.eos_id,
            dtype=settings.model.dtype,
            max_tokens=settings.data.max_prompt_tokens + rollout.max_new_tokens,
            sequences=rollout.prompts_per_batch * rollout.n,
            kv_cache_gib=rollout.vllm_kv_cache_gib,
            device=world.device,
            processes=world.size,
            tensor_parallel=rollout.tensor_parallel,
            sleeps=True,
        )
        return CopyRollout(sampler, state.builder)
    if rollout.engine == "vllm_server":
        return CopyRollout(connect(path, settings, world), state.builder)
    if rollout.engine == "replay":
        return ReplayRollout(Path(rollout.replay), state.builder, rank=world.rank)
    return HfRollout(
        state.builder,
        prompts_per_batch=rollout.prompts_per_batch,
        device=world.device,
        cuda_graphs=rollout.cuda_graphs,
        tokens_per_call=settings.micro_tokens,
    )


def make_policy(student: Student, settings: RunConfig, train_vision: bool) -> Policy:
    """Return the module that the policy's engine trains."""
    freeze(student.model, train_vision=train_vision)
    _checkpoint_layers(student.model, settings)
    return Policy(student.model).train()


def make_reference(student: Student) -> Policy:
    """Return the frozen module that computes log-probs of the reference, or of a teacher of its own."""
    return Policy(student.model).eval().requires_grad_(False)


def make_discriminator(student: Student, settings: RunConfig, *, shared: bool = False) -> Discriminator:
    """Return the module that the discriminator's engine trains: the model, or an adapter of its own, and a scalar head.

    Args:
        student: the stage-1 student.
        settings: settings of the run.
        shared: whether the policy uses the same model.
    """
    if settings.model.adapter == "lora":
        add_adapter(student.model, DISCRIMINATOR, settings.model, seed=settings.seed)
    freeze(student.model, train_vision=settings.distill.train_vision)
    _checkpoint_layers(student.model, settings)
    return Discriminator(student.model, keeps_lm_head=shared, **_head(settings)).train()


def make_discriminator_head(backbone: torch.nn.Module, settings: RunConfig) -> Discriminator:
    """Return the discriminator of which only the scalar head is trained, on a backbone without adapters."""
    discriminator = Discriminator(backbone, keeps_lm_head=True, adapter=None, **_head(settings))
    discriminator.requires_grad_(False)
    discriminator.value_weight.requires_grad_(True)
    discriminator.value_bias.requires_grad_(True)
    return discriminator


def _head(settings: RunConfig) -> dict[str, Any]:
    return {"seed": settings.seed, "zero_head": settings.discriminator.head == "zero"}


def _discriminator(state: StageState, path: str) -> Discriminator:
    """Return the discriminator of stage 2 on a model of its own or a shared one, see `discriminator.mode`."""
    settings, mode = state.settings, state.settings.discriminator.mode
    if mode == "shared":
        return make_discriminator(state.student, settings, shared=True)
    if mode == "separate":
        return make_discriminator(load(path, settings, state.world), settings)
    if settings.model.adapter == "lora":
        return make_discriminator_head(state.student.model, settings)
    backbone = state.reference.model if state.reference else load(path, settings, state.world).model
    return make_discriminator_head(backbone, settings)


def _checkpoint_layers(model, settings: RunConfig) -> None:
    if settings.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_engine(
    module: Policy | Discriminator, settings: RunConfig, world: World, lr: float, weight_decay: float = 0.0
) -> Engine:
    only_head = isinstance(module, Discriminator) and settings.discriminator.mode == "head"
    return Engine(
        module,
        lr=lr,
        weight_decay=weight_decay,
        optimizer=settings.runtime.optimizer,
        zero_stage=settings.runtime.zero_stage,
        grad_clip=settings.runtime.grad_clip,
        dtype=settings.model.dtype,
        offload_optimizer=settings.runtime.offload_optimizer,
        # A frozen backbone is that of the model which the stage starts from, and is not written again.
        save_frozen=settings.model.adapter == "none" and not only_head,
        world=world,
    )
