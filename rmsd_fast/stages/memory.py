"""Plan the memory of a run: the bytes on each process's device, per stage, at the step's highest point.

A step goes through phases one after the other: rollouts, discriminator, reference, policy, optimizers. What each holds
is added up, and a stage needs the most of any phase, not the sum of all. The plan assumes the longest prompts and
responses that the settings allow, and full micro-batches.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from rmsd_fast.config import ModelConfig, RunConfig
from rmsd_fast.models.adapters import target_layers
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import find_folder
from rmsd_fast.models.pass_memory import (
    ACTIVATIONS,
    HEADS,
    VISION,
    PassSettings,
    RowShape,
    complete_config,
    count_pass,
    count_prefill,
    count_vision,
)
from rmsd_fast.models.quantize import BYTES_PER_WEIGHT, quantizable_layers
from rmsd_fast.rollout.protocol import BUCKET_BYTES
from rmsd_fast.rollout.shared_cache import BLOCK, PrefixCache
from rmsd_fast.rollout.vllm import batch_tokens
from rmsd_fast.runtime.engine import LARGEST_BUCKET
from rmsd_fast.runtime.engine_memory import EngineMemory, engine_memory
from rmsd_fast.setting_rules.uses import (
    aligns_imitation,
    compared_tokens,
    distills_vocabulary,
    has_policy_gradient,
    imitates_in_stage2,
    samples_reference,
    shows_media,
    uses_discriminator,
    uses_ema,
    uses_other_teacher,
    uses_reference,
    uses_servers,
    uses_vllm,
)
from rmsd_kernels.heads.topk import TEMPORARY_BYTES

GIB = 2**30
WEIGHTS, GRADIENTS, OPTIMIZER, BUCKETS, ROLLOUT, MEDIA, CONTEXT = (
    *("weights", "gradients", "optimizer", "buckets", "rollout", "media"),
    "CUDA context",
)
PARTS = (WEIGHTS, GRADIENTS, OPTIMIZER, BUCKETS, ACTIVATIONS, HEADS, VISION, ROLLOUT, MEDIA, CONTEXT)
# CUDA's context, its modules and cuBLAS' workspaces. Not measured here: an estimate for recent GPUs and drivers.
CONTEXT_BYTES = GIB // 2
# ZeRO-3 keeps up to so many gathered elements (stage3_max_live_parameters of DeepSpeed).
_MOST_GATHERED = 1_000_000_000
_PIXEL_BYTES = 3
# `<|im_end|>`, a line break, and the opening of the response.
TAIL_TOKENS = 8


class Parameters(NamedTuple):
    """Numbers of parameters.

    Of the whole model, its vision tower, an untied head, one adapter, the largest parameter, the largest of an adapter,
    the weights that `model.quantize` stores in 4 bits, and the largest of these.
    """

    total: int
    vision: int
    head: int
    adapter: int
    largest: int
    largest_of_adapter: int
    quantizable: int
    largest_quantizable: int


@dataclass(frozen=True)
class StagePlan:
    """Bytes of a stage on one process's device.

    Attributes:
        phases: bytes of each phase, by what they are for (PARTS).
        host: bytes in host memory: caches, frames and offloaded states. On a CPU, these are in `phases`.
    """

    phases: dict[str, dict[str, int]]
    host: int = 0

    @property
    def peak(self) -> str:
        """The phase with the highest total."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes at the peak, by what they are for."""
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run on one process's device, by stage. `device` is "cuda" or "cpu"."""

    device: str
    stages: dict[str, StagePlan] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of the stage that needs most."""
        return max(stage.total for stage in self.stages.values())

    def table(self) -> list[str]:
        """Return the lines of a table with a column per stage, in GiB, or in MiB if the total is below 10 GiB."""
        unit, name = (GIB, "GiB") if self.total >= 10 * GIB else (2**20, "MiB")
        plans = list(self.stages.values())
        rows = [(name, list(self.stages))]
        sizes = {part: [plan.parts.get(part, 0) for plan in plans] for part in PARTS}
        sizes |= {"total": [plan.total for plan in plans], "host memory": [plan.host for plan in plans]}
        rows += [(part, [f"{size / unit:,.2f}" for size in of_part]) for part, of_part in sizes.items() if any(of_part)]
        rows.insert(-1 if any(plan.host for plan in plans) else len(rows), ("peak in", [plan.peak for plan in plans]))
        width = 2 + max(len(cell) for _, cells in rows for cell in cells)
        return [f"{part:<14}" + "".join(cell.rjust(width) for cell in cells) for part, cells in rows]


@dataclass(frozen=True)
class EvaluatedBatches:
    """The largest batches of an evaluation.

    Attributes:
        questions: most questions of a batch.
        media: most questions of a batch that are about different media; 0 = all are about text.
        images: whether any question has images.
    """

    questions: int
    media: int
    images: bool = False


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
    size = count_parameters(config, settings.model)
    stages = {}
    for stage in settings.stages:
        planner = _Planner(settings, config, size, processes, device, stage)
        stages[stage] = planner.imitation() if stage in ("sft", "control") else planner.distillation()
    return MemoryPlan(device, stages)


def teacher_config(settings: RunConfig) -> dict[str, Any]:
    """Return the contents of the config.json of `self_teacher.path`; {} if there is no such teacher or it is not here.

    Raises:
        ModelError: the path is neither a folder nor a valid Hub name.
    """
    folder = (
        find_folder(settings.self_teacher.path, setting="self_teacher.path") if uses_other_teacher(settings) else None
    )
    path = folder / "config.json" if folder else None
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}


def plan_evaluation(
    settings: RunConfig, config: dict[str, Any], *, device: str, batches: EvaluatedBatches | None = None
) -> StagePlan:
    """Return the plan of `rmsd_fast.evaluate` on one process, which holds one model and answers batches.

    Args:
        settings: settings of the evaluation, with `video` as in evaluations.
        config: contents of the student's config.json.
        device: "cuda" or "cpu", where the evaluation will be.
        batches: the batches; None = full batches of questions about different videos.
    Raises:
        ModelError: the family is not supported.
    """
    config = complete_config(config)
    planner = _Planner(settings, config, count_parameters(config, settings.model), 1, device, "evaluate")
    if batches is not None:
        planner.questions, planner.media, planner.images = batches.questions, batches.media, batches.images
    return planner.evaluation()


def count_parameters(config: dict[str, Any], model_config: ModelConfig) -> Parameters:
    """Count the parameters of a model by the contents of its config.json, without allocating weights.

    Raises:
        SettingsError: a target of the adapters is not a linear layer of the language model.
        ModelError: the family is not supported.
    """
    return _count_parameters(
        _key(complete_config(config)),
        model_config.adapter,
        model_config.lora_rank,
        tuple(model_config.lora_targets),
    )


@functools.lru_cache(maxsize=8)
def _count_parameters(config: str, adapter: str, rank: int, targets: tuple[str, ...]) -> Parameters:
    with torch.device("meta"):
        family = family_of(json.loads(config))
        model = family.model_class(family.config_class(**json.loads(config)))
    distinct = {id(p): p.numel() for p in model.parameters()}
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    layers = target_layers(model, list(targets)) if adapter == "lora" else []
    quantizable = [layer.weight.numel() for layer in quantizable_layers(model).values()]
    return Parameters(
        total=sum(distinct.values()),
        vision=sum(p.numel() for p in model.model.visual.parameters()),
        head=0 if head is embeddings else head.numel(),
        adapter=sum(rank * (layer.in_features + layer.out_features) for layer in layers),
        largest=max(distinct.values()),
        largest_of_adapter=max((rank * max(layer.in_features, layer.out_features) for layer in layers), default=0),
        quantizable=sum(quantizable),
        largest_quantizable=max(quantizable),
    )


class _Planner:
    """Plan one stage."""

    def __init__(
        self, settings: RunConfig, config: dict, size: Parameters, processes: int, device: str, stage: str
    ) -> None:
        self.settings, self.config, self.size = settings, config, size
        self.processes, self.device, self.stage = processes, device, stage
        training = settings.sft if stage == "sft" else settings.distill
        self.train_vision = training.train_vision and stage != "evaluate"
        batch = settings.evaluate.prompts_per_batch if stage == "evaluate" else training.batch_size
        self.questions = max(1, batch // processes)
        # Prompts for the student, and for a self-teacher with other media.
        self.prompts_each = 2 if shows_media(settings) and stage in ("warm_up", "distill") else 1
        # Questions of an evaluation may be about the same media, which are then encoded and prefilled once.
        self.media, self.images = self.questions, False
        self.width = 2 if settings.model.dtype == "bfloat16" else 4
        self.lora = settings.model.adapter == "lora"
        self.quantized = settings.model.quantize == "nf4"
        # The frozen adapter of stage 1, on which a quantized run trains new ones.
        self.starts = self.quantized and "sft" in settings.stages and stage != "sft"
        self.text = config["text_config"]
        family, vision = family_of(config), config["vision_config"]
        # Of the pooled and of each deepstack layer.
        self.feature_layers = 1 + family.deepstack_layers(family.config_class(**config))
        self.step_frames = vision["temporal_patch_size"]
        self.pixels_per_token = self.step_frames * (vision["patch_size"] * vision["spatial_merge_size"]) ** 2

    def imitation(self) -> StagePlan:
        """Return the plan of stage 1 or the control."""
        counts = {"best": 1, "random": 1, "all": self.settings.teacher.responses}
        hinted = self.stage == "sft" and self.settings.sft.hinted_share > 0
        hint = self.settings.self_teacher.max_hint_tokens + TAIL_TOKENS if hinted else 0
        responses = [hint + self.settings.rollout.max_new_tokens] * counts[self.settings.sft.responses]
        policy = self._engine(self._trained_by_policy(), self._largest())
        own = self.size.total + (self.size.adapter if self.lora else 0)
        held = self._states([policy], {"split": own}, copies=1)
        phases = {}
        if not self._inside:
            phases["vision"] = self._add(held, self._tower(), gradients=policy.lasting)
        if aligns_imitation(self.settings):
            phases["selection"] = self._selection(held, policy.lasting)
        phases |= self._passes("policy", held, policy, policy.lasting + policy.gradients, responses)
        return self._plan(phases, [policy])

    def distillation(self) -> StagePlan:
        """Return the plan of the warm-up or stage 2, which hold the same models."""
        settings, mode = self.settings, self.settings.discriminator.mode
        judged, referenced = uses_discriminator(settings), uses_reference(settings)
        policy = self._engine(self._trained_by_policy(), self._largest())
        engines = [policy]
        weights = {"split": self.size.total + (self.size.adapter if self.lora else 0), "whole": 0}
        if judged:
            head = self.text["hidden_size"] + 1
            trained = head + {"head": 0, "shared": self.size.adapter}.get(
                mode, self._trained_by_policy() - self.size.head
            )
            engines.append(self._engine(trained, self._largest() if mode != "head" else head))
            weights["split"] += head + (self.size.adapter if self.lora and mode != "head" else 0)
            weights["split"] += self.size.total - self.size.head if mode == "separate" else 0
        if not self.lora and (referenced or (judged and mode == "head")):
            # ZeRO-3 does not split a reference.
            weights["whole" if referenced else "split"] += self.size.total
        held = self._states(engines, weights, copies=2 if judged and mode == "separate" else 1)
        other = self._planner_of_teacher()
        if other is not None:
            # Like a reference, it is not split by ZeRO-3.
            held[WEIGHTS] += self.width * other.size.total + other._changed_by_nf4()
        lasting = sum(engine.lasting for engine in engines)
        if uses_vllm(settings) and self.device == "cpu":
            # On a CPU, vLLM does not sleep between rollouts.
            held[ROLLOUT] = self._vllm_state()
        average = EngineMemory()
        if uses_ema(settings):
            average = self._average(self._trained_by_policy())
            held = self._add(held, {OPTIMIZER: average.optimizer})
        phases = {}
        if settings.rollout.engine != "replay":
            phases["rollout"] = self._add(held, self._rollout(), self._gathered(), gradients=lasting)
        phases["vision"] = self._add(held, self._tower(), self._gathered(), gradients=lasting)
        drawn = [settings.rollout.max_new_tokens + 1] * settings.rollout.n
        answers = [settings.rollout.max_new_tokens] * settings.teacher.responses
        gradients = lasting
        if judged:
            gradients += engines[1].gradients
            kind = "discriminator" if mode != "head" else ""
            phases |= self._passes("discriminator", held, engines[1], gradients, drawn + answers, kind=kind)
        engines.append(average)
        if self.stage == "warm_up":
            return self._plan(phases, engines)
        if imitates_in_stage2(settings):
            if settings.teacher.selection == "aligned":
                phases["selection"] = self._selection(held, lasting)
            # The policy's passes, which the reference reads too, contain one teacher response per question.
            drawn = drawn + answers[:1]
        if other is not None:
            phases |= self._other_teacher(other, held, gradients)
        elif settings.self_teacher.kind != "none":
            # A trained tower encodes the media of a pass inside of it.
            more = 0 if self.train_vision else self.prompts_each - 1
            shown = {VISION: more * self._features(self.questions)}
            rows = self._pass(self._hinted(), "", adapted=settings.self_teacher.kind != "frozen")
            phases["teacher"] = self._add(held, rows, shown, {WEIGHTS: average.step}, gradients=gradients)
        if any(compared_tokens(settings)):
            blocks = {HEADS: TEMPORARY_BYTES[self.device]}
            phases["teacher"] = self._add(phases["teacher"], blocks, gradients=gradients)
            phases["student"] = self._add(held, self._pass(drawn, "", adapted=True), blocks, gradients=gradients)
        # What the teacher's passes leave for a divergence is held from them on.
        for name, size in self._kept_of_teacher().items():
            held = self._add(held, {name: size})
            phases["teacher"][name] = phases["teacher"].get(name, 0) + size
        if referenced:
            rows = self._pass(drawn, "")
            phases["reference"] = self._add(held, rows, gradients=gradients)
        gradients += policy.gradients
        phases |= self._passes("policy", held, policy, gradients, drawn)
        return self._plan(phases, engines)

    def evaluation(self) -> StagePlan:
        """Return the plan of an evaluation, which decodes the media of the next batch while it answers one.

        The passes of a reranker are not planned, only its weights.
        """
        evaluate, rollouts = self.settings.evaluate, self.settings.evaluate.rollouts
        reranker = self.size.total - self.size.head if evaluate.reranker else 0
        held = {
            WEIGHTS: self.width * (self.size.total + reranker) + self._changed_by_nf4(),
            MEDIA: self._frames(ahead=1) if self._frames_on_device else 0,
            CONTEXT: CONTEXT_BYTES if self.device == "cuda" else 0,
        }
        phases = {
            "vision": held | self._tower(),
            "answers": held | self._generation(self.questions, 1, evaluate.max_new_tokens),
        }
        if rollouts:
            prompts = min(self.questions, max(1, evaluate.prompts_per_batch // rollouts))
            phases["samples"] = held | self._generation(prompts, rollouts, evaluate.max_new_tokens)
        return StagePlan(phases, 0 if self._frames_on_device else self._frames(ahead=1))

    def _average(self, trained: int) -> EngineMemory:
        """Return the bytes of a moving average of so many weights; `step` are those of a pass with it."""
        ranks = self.processes if self.settings.runtime.zero_stage else 1
        part = -(-trained // ranks)
        # A pass has all of the average in the dtype of the model, and this process's part before it is gathered. ZeRO-3
        # gathers all weights, beyond those that it gathers for other passes.
        in_pass = trained + (part if ranks > 1 else 0)
        if self.settings.runtime.zero_stage == 3:
            in_pass = part + max(0, self.size.total - _MOST_GATHERED)
        on_host = self.settings.runtime.offload_optimizer and self.device == "cuda"
        states = {"host" if on_host else "optimizer": 4 * part}
        return EngineMemory(step=self.width * in_pass, **states)

    def _planner_of_teacher(self) -> _Planner | None:
        """Return a planner with the sizes of the model of `self_teacher.path`; None if there is no such teacher."""
        config = teacher_config(self.settings)
        if not config:
            return None
        config = complete_config(config)
        size = count_parameters(config, self.settings.model)
        other = _Planner(self.settings, config, size, self.processes, self.device, self.stage)
        # Its tower is not trained, and it has no adapter of stage 1.
        other.train_vision = other.starts = False
        return other

    def _other_teacher(self, other: _Planner, held: dict[str, int], gradients: int) -> dict[str, dict[str, int]]:
        """Return the phases of a teacher with weights of its own. The student's vision features are kept meanwhile.

        The plan assumes that its vision tower differs from the student's.
        """
        student = {} if self.train_vision else {VISION: self._features(self.questions)}
        rows = other._pass(self._hinted(), "")
        rows[VISION] += (self.prompts_each - 1) * other._features(self.questions)
        return {
            "teacher vision": self._add(held, other._tower(), student, gradients=gradients),
            "teacher": self._add(held, rows, student, gradients=gradients),
        }

    def _selection(self, held: dict[str, int], gradients: int) -> dict[str, int]:
        """Return the bytes of the passes that score the best responses of each question, see `teacher.selection`."""
        teacher = self.settings.teacher
        answers = [self.settings.rollout.max_new_tokens] * (teacher.responses + teacher.hinted)
        return self._add(held, self._pass(answers, "", adapted=True), gradients=gradients)

    def _kept_of_teacher(self) -> dict[str, int]:
        """Return the bytes on the device that the self-teacher's passes leave for a divergence over the vocabulary."""
        if not distills_vocabulary(self.settings):
            return {}
        # The average's head; that of another teacher is part of its model.
        head = self.text["vocab_size"] * self.text["hidden_size"] * self.width
        kept = {WEIGHTS: head if uses_ema(self.settings) and not self.lora else 0}
        return kept | ({HEADS: self._teacher_hidden()} if self.device == "cpu" else {})

    def _teacher_hidden(self) -> int:
        """Return the bytes in host memory of the self-teacher's hidden states of a step's rollouts."""
        rollout = self.settings.rollout
        tokens = self.questions * rollout.n * rollout.max_new_tokens
        return tokens * self._teacher_width() * self.width if distills_vocabulary(self.settings) else 0

    def _teacher_width(self) -> int:
        """Return the hidden size of the self-teacher."""
        config = teacher_config(self.settings)
        return (complete_config(config)["text_config"] if config else self.text)["hidden_size"]

    def _hinted(self) -> list[int]:
        """Return the tokens after each prompt in the self-teacher's passes: hints, ends of the turn, and rollouts."""
        settings = self.settings
        teacher, drawn = settings.self_teacher, settings.rollout.max_new_tokens + TAIL_TOKENS
        views = max(1, len(teacher.views)) if settings.kd.kind == "avsd" else 1
        hinted = [drawn + (teacher.max_hint_tokens if teacher.views else 0)] * (views * settings.rollout.n)
        plain = [drawn] * settings.rollout.n if teacher.kind == "frozen" and samples_reference(settings) else []
        return plain + hinted

    @property
    def _inside(self) -> bool:
        """Whether the imitation encodes media inside of the engine's forward."""
        return self.train_vision or self.settings.runtime.zero_stage == 3

    def _trained_by_policy(self) -> int:
        return self.size.adapter if self.lora else self.size.total - (0 if self.train_vision else self.size.vision)

    def _largest(self) -> int:
        return self.size.largest_of_adapter if self.lora else self.size.largest

    def _engine(self, trained: int, largest: int) -> EngineMemory:
        runtime = self.settings.runtime
        return engine_memory(
            trained,
            largest,
            zero_stage=runtime.zero_stage,
            dtype=self.settings.model.dtype,
            offload=runtime.offload_optimizer,
            optimizer=runtime.optimizer,
            processes=self.processes,
            device=self.device,
        )

    def _states(self, engines: list[EngineMemory], elements: dict[str, int], *, copies: int) -> dict[str, int]:
        """Return what is held in all phases.

        Args:
            engines: the engines.
            elements: numbers of weights that ZeRO-3 splits, and of others.
            copies: number of backbones with adapters, of which `model.quantize` stores most weights in 4 bits.
        """
        split, whole = elements["split"], elements.get("whole", 0)
        gathered = 0
        if self.settings.runtime.zero_stage == 3:
            gathered = min(self.size.total, _MOST_GATHERED)
            split = -(-split // self.processes)
        held = {
            WEIGHTS: self.width * (split + whole + gathered) + copies * self._changed_by_nf4(),
            OPTIMIZER: sum(engine.optimizer for engine in engines),
            MEDIA: self._frames() if self._frames_on_device else 0,
            CONTEXT: CONTEXT_BYTES if self.device == "cuda" else 0,
        }
        if self.device == "cpu":
            held[MEDIA] += self._embedding_cache()
            held[OPTIMIZER] += sum(engine.host for engine in engines)
        return held

    def _changed_by_nf4(self) -> int:
        """Return the difference that `model.quantize` makes to the bytes of a backbone, with its frozen adapter."""
        if not self.quantized:
            return 0
        start = self.width * self.size.adapter if self.starts else 0
        return start - int((self.width - BYTES_PER_WEIGHT) * self.size.quantizable)

    def _gathered(self) -> dict[str, int]:
        """Return the bytes of weights that ZeRO-3 gathers for rollouts, beyond those that it gathers for passes."""
        settings = self.settings
        if settings.runtime.zero_stage != 3 or uses_vllm(settings) or uses_servers(settings):
            return {}
        more = self.size.total - _MOST_GATHERED
        return {WEIGHTS: self.width * max(0, more)}

    def _add(self, held: dict[str, int], *parts: dict[str, int], gradients: int = 0) -> dict[str, int]:
        total = held | {GRADIENTS: gradients}
        for sizes in parts:
            for name, size in sizes.items():
                total[name] = total.get(name, 0) + size
        return total

    def _passes(
        self, name: str, held: dict, engine: EngineMemory, gradients: int, responses: list[int], kind: str = "policy"
    ) -> dict[str, dict[str, int]]:
        """Return the phases of a model's forward and backward, its sum of gradients, and its optimizer step."""
        sizes = self._pass(responses, kind, scores=name == "policy")
        buckets = {BUCKETS: engine.bucket}
        # Buckets that are full before the end are summed while most activations are still held.
        early = {BUCKETS: engine.bucket + engine.reduction} if self._fills_buckets else buckets
        return {
            name: self._add(held, sizes, early, gradients=gradients),
            f"{name} sums": self._add(held, {BUCKETS: engine.bucket + engine.reduction}, gradients=gradients),
            f"{name} step": self._add(held, {BUCKETS: engine.step}, gradients=gradients),
        }

    @property
    def _fills_buckets(self) -> bool:
        return self._trained_by_policy() > LARGEST_BUCKET and self.settings.runtime.zero_stage >= 2

    def _pass(self, responses: list[int], kind: str, *, scores: bool = True, adapted: bool = False) -> dict[str, int]:
        """Return the bytes of a pass.

        Args:
            responses: tokens after each prompt, in one list for each prompt.
            kind: what the pass trains, or "" for a pass without gradients.
            scores: whether the tokens are scored by the language model's head.
            adapted: whether a pass without gradients reads the policy's adapter.
        """
        settings = self.settings
        shape = self._rows(responses)
        full_kl = (
            kind == "policy" and self.stage == "distill" and settings.distill.kl == "full" and settings.distill.kl_coef
        )
        divergence = kind == "policy" and self.stage == "distill" and distills_vocabulary(settings)
        inside = self.train_vision or (self.stage in ("sft", "control") and self._inside)
        how = PassSettings(
            device=self.device,
            trains=kind,
            train_vision=self.train_vision and bool(kind),
            # The reference and a scalar head alone read the backbone without trained adapters. A frozen adapter adds as
            # much to their passes, and nothing to passes that have another one.
            adapted=bool(kind) or self.starts or adapted,
            reference_heads=int(bool(full_kl or divergence)),
            losses=2 if divergence and has_policy_gradient(settings) else 1,
            scores=scores,
            masked=settings.model.attention != "flash_attention_2",
        )
        sizes = dict(_counted_pass(_key(self.config), _model_key(settings.model), shape, how))
        # Inside of the pass, a frozen tower encodes only the media of the pass, and the features of a trained one are
        # counted with its activations.
        features = self._features(len(shape.prefixes) if inside else self.questions)
        features = 0 if self.train_vision else features
        sizes[VISION] = sizes.get(VISION, 0) + features
        copies = shape.scored * self.text["hidden_size"] if full_kl else 0
        copies += shape.scored * self._teacher_width() if divergence else 0
        if kind == "policy" and self.stage == "distill" and imitates_in_stage2(settings):
            # Both losses have a gradient of the head, and copies of the hidden states that they read.
            head = 0 if self.lora else self.text["vocab_size"] * self.text["hidden_size"]
            copies += head + shape.scored * self.text["hidden_size"]
        if copies:
            sizes[HEADS] = sizes.get(HEADS, 0) + copies * self.width
        return sizes

    def _rows(self, responses: list[int]) -> RowShape:
        """Return the largest micro-batch of a step's questions within micro_tokens."""
        settings = self.settings
        prefix, budget = settings.data.max_prompt_tokens, settings.micro_tokens
        prefixes, groups = [], []
        if settings.packing == "padded":
            left = max(1, budget // (prefix + max(responses)))
            while left > 0 and len(prefixes) < self.questions:
                prefixes.append(prefix)
                groups.append(tuple(responses[:left]))
                left -= len(groups[-1])
        else:
            left = budget
            while left > 1 and len(prefixes) < self.questions:
                prefixes.append(min(prefix, left - 1))
                left -= prefixes[-1]
                group = []
                for length in responses:
                    group.append(min(length, left))
                    left -= group[-1]
                    if not left:
                        break
                groups.append(tuple(group))
        vision = tuple(min(self._vision_tokens(), length - 1) for length in prefixes)
        return RowShape(settings.packing, tuple(prefixes), tuple(groups), vision, self._steps())

    def _rollout(self) -> dict[str, int]:
        """Return the bytes of generating one batch of rollouts."""
        rollout = self.settings.rollout
        if uses_vllm(self.settings):
            state = self._vllm_state() if self.device == "cuda" else 0
            return {ROLLOUT: state + self._vllm_pass(), VISION: 2 * self._features(self.questions)}
        if uses_servers(self.settings):
            if self.device == "cpu":
                return {ROLLOUT: self._sent(), VISION: self._features(self.questions)}
            # The features of a message are joined on the GPU.
            return {VISION: self._features(self.questions) + self._features(self._messages)}
        return self._generation(min(rollout.prompts_per_batch, self.questions), rollout.n, rollout.max_new_tokens)

    @property
    def _messages(self) -> int:
        """Return the number of questions that are sent to servers at once."""
        rollout = self.settings.rollout
        return min(self.questions, rollout.prompts_per_batch * len(rollout.server_urls))

    def _sent(self) -> int:
        """Return the bytes in host memory of messages to servers: a bucket of weights, or questions with features."""
        return max(BUCKET_BYTES, self.size.largest * self.width, self._features(self._messages))

    def _vllm_state(self) -> int:
        """Return the bytes that vLLM holds while it is awake: all weights, buffers for deepstack, and the KV cache."""
        buffers = (self.feature_layers - 1) * self._vllm_tokens * self.text["hidden_size"]
        return (self.size.total + buffers) * self.width + int(self.settings.rollout.vllm_kv_cache_gib * GIB)

    def _vllm_pass(self) -> int:
        """Return the bytes of vLLM's largest pass: an estimate, which was not measured on a GPU."""
        text, rollout = self.text, self.settings.rollout
        layer = 3 * text["intermediate_size"] + 6 * text["hidden_size"]
        rows = min(rollout.prompts_per_batch, self.questions) * rollout.n
        # Logits, in float32 the same scaled, their log-softmax, and noise.
        logits = rows * text["vocab_size"] * (self.width + 4 * 4)
        return max(self._vllm_tokens * layer * self.width, logits)

    @property
    def _vllm_tokens(self) -> int:
        return batch_tokens(self.settings.data.max_prompt_tokens + self.settings.rollout.max_new_tokens)

    def _generation(self, prompts: int, rows: int, tokens: int) -> dict[str, int]:
        settings, text = self.settings, self.text
        prefix = settings.data.max_prompt_tokens
        head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        of_layer = 2 * text["num_key_value_heads"] * head_dim * self.width
        vision, media = self._shown_tokens(), min(self.media, prompts)
        # Questions about the same media share everything up to the end of these.
        beside = prompts - media
        prefixes = (prefix,) * media + (prefix - vision,) * beside
        shape = RowShape("shared", prefixes, ((),) * prompts, (vision,) * media + (0,) * beside)
        prefill = sum(_counted_prefill(_key(self.config), _model_key(settings.model), shape, self.device).values())
        # Buffers of the rows' own tokens grow in blocks; the last growth copies one buffer of a layer's keys or values.
        own = prompts * rows * BLOCK * -(-tokens // BLOCK) * of_layer
        cache = text["num_hidden_layers"] * (sum(prefixes) * of_layer + own) + own // 2
        # Logits in the dtype of the model, in float32 if that is another, their log-softmax, and in float64 the
        # probabilities and their sums.
        number = self.width + (4 if self.width == 2 else 0) + 4 + 8 + 8
        logits = prompts * rows * text["vocab_size"] * number
        # The graph of a step keeps its memory while the first step of the next block runs eagerly.
        logits *= 2 if self.device == "cuda" and settings.rollout.cuda_graphs else 1
        # The last layer's dequantized weight is freed before the logits.
        whole = self.size.largest_quantizable * self.width if self.quantized else 0
        return {ROLLOUT: max(prefill, cache + max(logits, whole)), VISION: self._features(self.media)}

    def _tower(self) -> dict[str, int]:
        """Return the bytes of encoding the step's media, which is done in calls of at most micro_tokens tokens."""
        tokens = self._shown_tokens()
        total = self.media * tokens
        if not total:
            return {}
        bound, undivided = min(total, self.settings.micro_tokens), min(tokens, self._undivided_tokens())
        in_call, steps = max(bound, undivided), self._steps()
        videos, rest = divmod(in_call, tokens)
        if undivided > bound:
            steps = 1
        elif not videos:
            # A video that does not fit into a call is split between temporal patches.
            steps = -(-steps * in_call // tokens)
        in_videos = (tokens,) * videos + ((rest,) if rest else ())
        count = len(in_videos)
        shape = RowShape("shared", (1,) * count, ((),) * count, in_videos, steps)
        sizes = dict(_counted_vision(_key(self.config), _model_key(self.settings.model), shape, self.device))
        if in_call < total:
            # The features of several calls are copied to their place. Those of a call are part of its bytes.
            sizes[VISION] += self._features(self.media)
        if not self._frames_on_device:
            sizes[VISION] += in_call * self.pixels_per_token * _PIXEL_BYTES
        return sizes

    def _undivided_tokens(self) -> int:
        """Return the most vision tokens of what the tower encodes in one call: a temporal patch or an image."""
        video = self.settings.video
        patch = video.max_frame_pixels * self.step_frames // self.pixels_per_token
        image = video.max_image_pixels * self.step_frames // self.pixels_per_token if self.images else 0
        return max(1, patch, image)

    def _steps(self) -> int:
        video = self.settings.video
        return -(-(video.num_frames or video.max_frames) // self.step_frames)

    def _vision_tokens(self) -> int:
        """Return the most vision tokens of a video."""
        video = self.settings.video
        by_frames = self._steps() * max(1, video.max_frame_pixels * self.step_frames // self.pixels_per_token)
        return min(video.max_video_pixels // self.pixels_per_token, by_frames)

    def _features(self, questions: int) -> int:
        """Return the bytes of the pooled and deepstack features of so many questions."""
        return self._feature_bytes(questions * self._shown_tokens())

    def _feature_bytes(self, tokens: int) -> int:
        return tokens * self.feature_layers * self.text["hidden_size"] * self.width

    def _shown_tokens(self) -> int:
        """Return the most vision tokens of a prompt of the allowed length: those of a video or, if any, of images."""
        if not self.media:
            return 0
        # A prompt may have several images.
        most = self.settings.data.max_prompt_tokens - 1
        return most if self.images else min(self._vision_tokens(), most)

    @property
    def _frames_on_device(self) -> bool:
        """Whether decoded frames are on the device. decoder=auto uses the GPU if it can decode there."""
        return self.device == "cpu" or self.settings.data.decoder != "cpu"

    def _frames(self, ahead: int | None = None) -> int:
        """Return the bytes of decoded frames: those of the step and the steps ahead, and the cache."""
        data = self.settings.data
        ahead = data.decode_ahead if ahead is None else ahead
        of_medium = self._shown_tokens() * self.pixels_per_token * _PIXEL_BYTES
        cache = data.cache_mib * 2**20
        # Questions about the same media share their frames if the cache holds them until the last one is read.
        media = self.media if cache >= data.decode_threads * of_medium else self.questions
        return (1 + ahead) * self.prompts_each * media * of_medium + cache

    def _embedding_cache(self) -> int:
        return 0 if self.train_vision else self.settings.data.embedding_cache_mib * 2**20

    def _plan(self, phases: dict[str, dict[str, int]], engines: list[EngineMemory]) -> StagePlan:
        host = 0
        if self.device != "cpu":
            host = sum(engine.host for engine in engines) + self._embedding_cache()
            host += 0 if self._frames_on_device else self._frames()
            host += self._teacher_hidden() if self.stage == "distill" else 0
            if uses_vllm(self.settings) and self.stage in ("warm_up", "distill"):
                # vLLM keeps its weights in host memory while it sleeps.
                host += self.size.total * self.width
            if uses_servers(self.settings) and self.stage in ("warm_up", "distill"):
                host += self._sent()
        return StagePlan(phases, host)


def _key(config: dict) -> str:
    return json.dumps(config, sort_keys=True)


def _model_key(model: ModelConfig) -> str:
    return json.dumps(asdict(model), sort_keys=True)


def _model_of(key: str) -> ModelConfig:
    return ModelConfig(**json.loads(key))


@functools.lru_cache(maxsize=64)
def _counted_pass(config: str, model: str, shape: RowShape, how: PassSettings) -> dict[str, int]:
    return count_pass(json.loads(config), _model_of(model), shape, how)


@functools.lru_cache(maxsize=64)
def _counted_prefill(config: str, model: str, shape: RowShape, device: str) -> dict[str, int]:
    return count_prefill(json.loads(config), _model_of(model), shape, device, PrefixCache)


@functools.lru_cache(maxsize=64)
def _counted_vision(config: str, model: str, shape: RowShape, device: str) -> dict[str, int]:
    return count_vision(json.loads(config), _model_of(model), shape, device)
