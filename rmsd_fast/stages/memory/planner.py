"""Add up what a stage holds in each of its phases."""

from __future__ import annotations

from rmsd_fast.models.pass_memory import HEADS, VISION, complete_config
from rmsd_fast.runtime.engine import LARGEST_BUCKET
from rmsd_fast.runtime.engine_memory import EngineMemory, engine_memory
from rmsd_fast.setting_rules.uses import (
    aligns_imitation,
    compared_tokens,
    distills_vocabulary,
    imitates_in_stage2,
    samples_reference,
    uses_discriminator,
    uses_ema,
    uses_reference,
    uses_servers,
    uses_vllm,
)
from rmsd_fast.stages.memory.needs import StageNeeds, teacher_config
from rmsd_fast.stages.memory.parameters import count_parameters
from rmsd_fast.stages.memory.parts import (
    BUCKETS,
    CONTEXT,
    CONTEXT_BYTES,
    GRADIENTS,
    MEDIA,
    OPTIMIZER,
    ROLLOUT,
    WEIGHTS,
    StagePlan,
)
from rmsd_kernels.heads.topk import TEMPORARY_BYTES

# ZeRO-3 keeps up to so many gathered elements (stage3_max_live_parameters of DeepSpeed).
_MOST_GATHERED = 1_000_000_000
# `<|im_end|>`, a line break, and the opening of the response.
TAIL_TOKENS = 8


class StagePlanner:
    """Plan one stage.

    Args:
        needs: what its parts take.
    """

    def __init__(self, needs: StageNeeds) -> None:
        self.needs, self.count = needs, needs.count
        self.settings, self.stage = needs.settings, needs.stage

    def imitation(self) -> StagePlan:
        """Return the plan of stage 1 or the control."""
        counts = {"best": 1, "random": 1, "all": self.settings.teacher.responses}
        hinted = self.stage == "sft" and self.settings.sft.hinted_share > 0
        hint = self.settings.self_teacher.max_hint_tokens + TAIL_TOKENS if hinted else 0
        responses = [hint + self.settings.rollout.max_new_tokens] * counts[self.settings.sft.responses]
        policy = self._engine(self.needs.trained_by_policy(), self._largest())
        own = self.count.total + (self.count.adapter if self.needs.lora else 0)
        held = self._states([policy], {"split": own}, copies=1)
        phases = {}
        if not self.needs.encodes_inside:
            phases["vision"] = self._add(held, self.needs.tower(), gradients=policy.lasting)
        if aligns_imitation(self.settings):
            phases["selection"] = self._selection(held, policy.lasting)
        phases |= self._passes("policy", held, policy, policy.lasting + policy.gradients, responses)
        return self._plan(phases, [policy])

    def distillation(self) -> StagePlan:
        """Return the plan of the warm-up or stage 2, which hold the same models."""
        settings, mode = self.settings, self.settings.discriminator.mode
        judged, referenced = uses_discriminator(settings), uses_reference(settings)
        policy = self._engine(self.needs.trained_by_policy(), self._largest())
        engines = [policy]
        weights = {"split": self.count.total + (self.count.adapter if self.needs.lora else 0), "whole": 0}
        if judged:
            head = self.needs.text["hidden_size"] + 1
            trained = head + {"head": 0, "shared": self.count.adapter}.get(
                mode, self.needs.trained_by_policy() - self.count.head
            )
            engines.append(self._engine(trained, self._largest() if mode != "head" else head))
            weights["split"] += head + (self.count.adapter if self.needs.lora and mode != "head" else 0)
            weights["split"] += self.count.total - self.count.head if mode == "separate" else 0
        if not self.needs.lora and (referenced or (judged and mode == "head")):
            # ZeRO-3 does not split a reference.
            weights["whole" if referenced else "split"] += self.count.total
        held = self._states(engines, weights, copies=2 if judged and mode == "separate" else 1)
        other = self._needs_of_teacher()
        if other is not None:
            # Like a reference, it is not split by ZeRO-3.
            held[WEIGHTS] += self.needs.width * other.count.total + other.changed_by_nf4()
        lasting = sum(engine.lasting for engine in engines)
        if uses_vllm(settings) and self.needs.device == "cpu":
            # On a CPU, vLLM does not sleep between rollouts.
            held[ROLLOUT] = self.needs.vllm_state()
        average = EngineMemory()
        if uses_ema(settings):
            average = self._average(self.needs.trained_by_policy())
            held = self._add(held, {OPTIMIZER: average.optimizer})
        phases = {}
        if settings.rollout.engine != "replay":
            phases["rollout"] = self._add(held, self.needs.rollout(), self._gathered(), gradients=lasting)
        phases["vision"] = self._add(held, self.needs.tower(), self._gathered(), gradients=lasting)
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
            more = 0 if self.needs.train_vision else self.needs.prompts_each - 1
            shown = {VISION: more * self.needs.features(self.needs.questions)}
            rows = self.needs.one_pass(self._hinted(), "", adapted=settings.self_teacher.kind != "frozen")
            phases["teacher"] = self._add(held, rows, shown, {WEIGHTS: average.step}, gradients=gradients)
        if any(compared_tokens(settings)):
            blocks = {HEADS: TEMPORARY_BYTES[self.needs.device]}
            phases["teacher"] = self._add(phases["teacher"], blocks, gradients=gradients)
            phases["student"] = self._add(
                held, self.needs.one_pass(drawn, "", adapted=True), blocks, gradients=gradients
            )
        # What the teacher's passes leave for a divergence is held from them on.
        for name, size in self._kept_of_teacher().items():
            held = self._add(held, {name: size})
            phases["teacher"][name] = phases["teacher"].get(name, 0) + size
        if referenced:
            rows = self.needs.one_pass(drawn, "")
            phases["reference"] = self._add(held, rows, gradients=gradients)
        gradients += policy.gradients
        phases |= self._passes("policy", held, policy, gradients, drawn)
        return self._plan(phases, engines)

    def evaluation(self) -> StagePlan:
        """Return the plan of an evaluation, which decodes the media of the next batch while it answers one.

        With vLLM, only the tower of the student is kept.
        """
        evaluate, rollouts = self.settings.evaluate, self.settings.evaluate.rollouts
        copied = evaluate.engine == "vllm"
        reranker = self.count.total - self.count.head if evaluate.reranker else 0
        kept = self.count.vision if copied else self.count.total
        held = {
            WEIGHTS: self.needs.width * (kept + reranker) + self.needs.changed_by_nf4(),
            MEDIA: self.needs.frames(ahead=1) if self.needs.frames_on_device else 0,
            CONTEXT: CONTEXT_BYTES if self.needs.device == "cuda" else 0,
        }
        if copied:
            phases = self._answered_by_vllm(held)
            # vLLM stays awake.
            held[ROLLOUT] = self.needs.vllm_state()
        else:
            phases = {
                "vision": held | self.needs.tower(),
                "answers": held | self.needs.generation(self.needs.questions, 1, evaluate.max_new_tokens),
            }
        if rollouts and not copied:
            prompts = min(self.needs.questions, max(1, evaluate.prompts_per_batch // rollouts))
            phases["samples"] = held | self.needs.generation(prompts, rollouts, evaluate.max_new_tokens)
        if reranker:
            # A reranker has a vision tower of its own, and the student's features stay.
            features = {VISION: self.needs.features(self.needs.media)}
            scores = self.needs.one_pass([evaluate.max_new_tokens + 1] * rollouts, "", scores=False)
            phases["reranker vision"] = self._add(held, self.needs.tower(), features)
            phases["reranker"] = self._add(held, scores | features, features)
        return StagePlan(phases, 0 if self.needs.frames_on_device else self.needs.frames(ahead=1))

    def _answered_by_vllm(self, held: dict[str, int]) -> dict[str, dict[str, int]]:
        """Return the phases of an evaluation with vLLM, which is awake all the time.

        When it starts, the weights of the student's language model are in host memory, and on a GPU one after the
        other. The features of a batch are joined, medium by medium, and vLLM reads the joined ones.
        """
        needs, state = self.needs, self.needs.vllm_state()
        sent = self.count.largest if needs.device == "cuda" else self.count.total - self.count.vision
        held = held | {ROLLOUT: state}
        answers = {ROLLOUT: state + needs.vllm_pass(), VISION: 2 * needs.features(needs.media)}
        return {
            "start": held | {WEIGHTS: needs.width * (self.count.vision + sent), MEDIA: 0},
            "vision": held | needs.tower(),
            "answers": held | answers,
        }

    def _average(self, trained: int) -> EngineMemory:
        """Return the bytes of a moving average of so many weights; `step` are those of a pass with it."""
        ranks = self.needs.processes if self.settings.runtime.zero_stage else 1
        part = -(-trained // ranks)
        # A pass has all of the average in the dtype of the model, and this process's part before it is gathered. ZeRO-3
        # gathers all weights, beyond those that it gathers for other passes.
        in_pass = trained + (part if ranks > 1 else 0)
        if self.settings.runtime.zero_stage == 3:
            in_pass = part + max(0, self.count.total - _MOST_GATHERED)
        on_host = self.settings.runtime.offload_optimizer and self.needs.device == "cuda"
        states = {"host" if on_host else "optimizer": 4 * part}
        return EngineMemory(step=self.needs.width * in_pass, **states)

    def _needs_of_teacher(self) -> StageNeeds | None:
        """Return the needs of the model of `self_teacher.path`; None if there is no such teacher."""
        config = teacher_config(self.settings)
        if not config:
            return None
        config = complete_config(config)
        count = count_parameters(config, self.settings.model)
        return StageNeeds(
            self.settings, config, count, self.needs.processes, self.needs.device, self.stage, of_teacher=True
        )

    def _other_teacher(self, other: StageNeeds, held: dict[str, int], gradients: int) -> dict[str, dict[str, int]]:
        """Return the phases of a teacher with weights of its own. The student's vision features are kept meanwhile.

        The plan assumes that its vision tower differs from the student's.
        """
        student = {} if self.needs.train_vision else {VISION: self.needs.features(self.needs.questions)}
        rows = other.one_pass(self._hinted(), "")
        rows[VISION] += (self.needs.prompts_each - 1) * other.features(self.needs.questions)
        return {
            "teacher vision": self._add(held, other.tower(), student, gradients=gradients),
            "teacher": self._add(held, rows, student, gradients=gradients),
        }

    def _selection(self, held: dict[str, int], gradients: int) -> dict[str, int]:
        """Return the bytes of the passes that score the best responses of each question, see `teacher.selection`."""
        teacher = self.settings.teacher
        answers = [self.settings.rollout.max_new_tokens] * (teacher.responses + teacher.hinted)
        return self._add(held, self.needs.one_pass(answers, "", adapted=True), gradients=gradients)

    def _kept_of_teacher(self) -> dict[str, int]:
        """Return the bytes on the device that the self-teacher's passes leave for a divergence over the vocabulary."""
        if not distills_vocabulary(self.settings):
            return {}
        # The average's head; that of another teacher is part of its model.
        head = self.needs.text["vocab_size"] * self.needs.text["hidden_size"] * self.needs.width
        kept = {WEIGHTS: head if uses_ema(self.settings) and not self.needs.lora else 0}
        return kept | ({HEADS: self.needs.teacher_hidden()} if self.needs.device == "cpu" else {})

    def _hinted(self) -> list[int]:
        """Return the tokens after each prompt in the self-teacher's passes: hints, ends of the turn, and rollouts."""
        settings = self.settings
        teacher, drawn = settings.self_teacher, settings.rollout.max_new_tokens + TAIL_TOKENS
        views = max(1, len(teacher.views)) if settings.kd.kind == "avsd" else 1
        hinted = [drawn + (teacher.max_hint_tokens if teacher.views else 0)] * (views * settings.rollout.n)
        plain = [drawn] * settings.rollout.n if teacher.kind == "frozen" and samples_reference(settings) else []
        return plain + hinted

    def _largest(self) -> int:
        return self.count.largest_of_adapter if self.needs.lora else self.count.largest

    def _engine(self, trained: int, largest: int) -> EngineMemory:
        runtime = self.settings.runtime
        return engine_memory(
            trained,
            largest,
            zero_stage=runtime.zero_stage,
            dtype=self.settings.model.dtype,
            offload=runtime.offload_optimizer,
            optimizer=runtime.optimizer,
            processes=self.needs.processes,
            device=self.needs.device,
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
            gathered = min(self.count.total, _MOST_GATHERED)
            split = -(-split // self.needs.processes)
        held = {
            WEIGHTS: self.needs.width * (split + whole + gathered) + copies * self.needs.changed_by_nf4(),
            OPTIMIZER: sum(engine.optimizer for engine in engines),
            MEDIA: self.needs.frames() if self.needs.frames_on_device else 0,
            CONTEXT: CONTEXT_BYTES if self.needs.device == "cuda" else 0,
        }
        if self.needs.device == "cpu":
            held[MEDIA] += self.needs.embedding_cache()
            held[OPTIMIZER] += sum(engine.host for engine in engines)
        return held

    def _gathered(self) -> dict[str, int]:
        """Return the bytes of weights that ZeRO-3 gathers for rollouts, beyond those that it gathers for passes."""
        settings = self.settings
        if settings.runtime.zero_stage != 3 or uses_vllm(settings) or uses_servers(settings):
            return {}
        more = self.count.total - _MOST_GATHERED
        return {WEIGHTS: self.needs.width * max(0, more)}

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
        sizes = self.needs.one_pass(responses, kind, scores=name == "policy")
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
        return self.needs.trained_by_policy() > LARGEST_BUCKET and self.settings.runtime.zero_stage >= 2

    def _plan(self, phases: dict[str, dict[str, int]], engines: list[EngineMemory]) -> StagePlan:
        host = 0
        if self.needs.device != "cpu":
            host = sum(engine.host for engine in engines) + self.needs.embedding_cache()
            host += 0 if self.needs.frames_on_device else self.needs.frames()
            host += self.needs.teacher_hidden() if self.stage == "distill" else 0
            if uses_vllm(self.settings) and self.stage in ("warm_up", "distill"):
                # vLLM keeps its weights in host memory while it sleeps.
                host += self.needs.vllm_weights()
            if uses_servers(self.settings) and self.stage in ("warm_up", "distill"):
                host += self.needs.sent()
        return StagePlan(phases, host)
