"""What a stage needs: the bytes of its passes, rollouts, vision features and frames on one process.

The longest prompts and responses that the settings allow are assumed, and full micro-batches.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

from rmsd_fast.config import ModelConfig, RunConfig
from rmsd_fast.models.families import family_of
from rmsd_fast.models.folders import find_folder
from rmsd_fast.models.pass_memory import (
    HEADS,
    VISION,
    PassSettings,
    RowShape,
    complete_config,
    count_pass,
    count_prefill,
    count_vision,
)
from rmsd_fast.models.quantize import BYTES_PER_WEIGHT
from rmsd_fast.rollout.protocol import BUCKET_BYTES
from rmsd_fast.rollout.shared_cache import BLOCK, PrefixCache
from rmsd_fast.rollout.vllm import answered_together, batch_tokens
from rmsd_fast.setting_rules.uses import (
    distills_vocabulary,
    has_policy_gradient,
    imitates_in_stage2,
    shows_media,
    uses_other_teacher,
    uses_servers,
    uses_vllm,
)
from rmsd_fast.stages.memory.parameters import Parameters
from rmsd_fast.stages.memory.parts import GIB, ROLLOUT

_PIXEL_BYTES = 3


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


class StageNeeds:
    """What the parts of one stage take on one process, in bytes.

    Args:
        settings: settings of the run.
        config: complete contents of the model's config.json.
        count: its numbers of parameters.
        processes: number of processes.
        device: "cuda" or "cpu".
        stage: a stage of the run, or "evaluate".
        of_teacher: whether the model is that of `self_teacher.path`, whose tower is not trained and which has no
            adapter of stage 1.
        batches: the batches of an evaluation; None = full batches of questions about different videos.
        limit: most tokens of a prompt that vLLM is started for; None = `data.max_prompt_tokens`.
    """

    def __init__(
        self,
        settings: RunConfig,
        config: dict,
        count: Parameters,
        processes: int,
        device: str,
        stage: str,
        *,
        of_teacher: bool = False,
        batches: EvaluatedBatches | None = None,
        limit: int | None = None,
    ) -> None:
        self.settings, self.config, self.count = settings, config, count
        self.processes, self.device, self.stage = processes, device, stage
        training = settings.sft if stage == "sft" else settings.distill
        self.train_vision = training.train_vision and stage != "evaluate" and not of_teacher
        batch = settings.evaluate.prompts_per_batch if stage == "evaluate" else training.batch_size
        questions = max(1, batch // processes)
        batches = batches or EvaluatedBatches(questions, media=questions)
        # Prompts for the student, and for a self-teacher with other media.
        self.prompts_each = 2 if shows_media(settings) and stage in ("warm_up", "distill") else 1
        # Questions of an evaluation may be about the same media, which are then encoded and prefilled once.
        self.questions, self.media, self.images = batches.questions, batches.media, batches.images
        self.limit = limit or settings.data.max_prompt_tokens
        self.width = 2 if settings.model.dtype == "bfloat16" else 4
        self.lora = settings.model.adapter == "lora"
        self.quantized = settings.model.quantize == "nf4"
        # The frozen adapter of stage 1, on which a quantized run trains new ones.
        self.starts = self.quantized and "sft" in settings.stages and stage != "sft" and not of_teacher
        self.text = config["text_config"]
        family, vision = family_of(config), config["vision_config"]
        # Of the pooled and of each deepstack layer.
        self.feature_layers = 1 + family.deepstack_layers(family.config_class(**config))
        self.step_frames = vision["temporal_patch_size"]
        self.pixels_per_token = self.step_frames * (vision["patch_size"] * vision["spatial_merge_size"]) ** 2

    def changed_by_nf4(self) -> int:
        """Return the difference that `model.quantize` makes to the bytes of a backbone, with its frozen adapter."""
        if not self.quantized:
            return 0
        start = self.width * self.count.adapter if self.starts else 0
        return start - int((self.width - BYTES_PER_WEIGHT) * self.count.quantizable)

    def one_pass(
        self, responses: list[int], kind: str, *, scores: bool = True, adapted: bool = False
    ) -> dict[str, int]:
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
        inside = self.train_vision or (self.stage in ("sft", "control") and self.encodes_inside)
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
        features = self.features(len(shape.prefixes) if inside else self.questions)
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

    def rollout(self) -> dict[str, int]:
        """Return the bytes of generating one batch of rollouts."""
        rollout = self.settings.rollout
        if uses_vllm(self.settings):
            state = self.vllm_state() if self.device == "cuda" else 0
            # The features of the process, and copies of those of its group.
            held = (1 + rollout.tensor_parallel) * self.features(self.questions)
            return {ROLLOUT: state + self.vllm_pass(), VISION: held}
        if uses_servers(self.settings):
            if self.device == "cpu":
                return {ROLLOUT: self.sent(), VISION: self.features(self.questions)}
            # The features of a message are joined on the GPU.
            return {VISION: self.features(self.questions) + self.features(self._messages)}
        return self.generation(min(rollout.prompts_per_batch, self.questions), rollout.n, rollout.max_new_tokens)

    @property
    def _messages(self) -> int:
        """Return the number of questions that are sent to servers at once."""
        rollout = self.settings.rollout
        return min(self.questions, rollout.prompts_per_batch * len(rollout.server_urls))

    def sent(self) -> int:
        """Return the bytes in host memory of messages to servers: a bucket of weights, or questions with features."""
        return max(BUCKET_BYTES, self.count.largest * self.width, self.features(self._messages))

    def vllm_weights(self) -> int:
        """Return the bytes of the weights that vLLM holds on this process: all, or a part of them.

        Norms and the vision tower's positions, which are not split, are less than 1% and counted as if they were.
        """
        text, processes = self.text, self._vllm_parts
        of_head = 2 * text["num_hidden_layers"] * self._head_dim * text["hidden_size"]
        # Each process has at least one head of keys and values.
        repeated = of_head * max(0, processes - text["num_key_value_heads"])
        return -(-(self.count.total + repeated) // processes) * self.width

    def vllm_state(self) -> int:
        """Return the bytes that vLLM holds while it is awake: weights, buffers for deepstack, and the KV cache."""
        buffers = (self.feature_layers - 1) * self._vllm_tokens * self.text["hidden_size"]
        cache = int(self.settings.rollout.vllm_kv_cache_gib * GIB)
        return self.vllm_weights() + buffers * self.width + cache

    def vllm_pass(self) -> int:
        """Return the bytes of vLLM's largest pass: an estimate, which was not measured on a GPU."""
        text, rollout = self.text, self.settings.rollout
        layer = 3 * text["intermediate_size"] // self._vllm_parts + 6 * text["hidden_size"]
        # Each process has the logits of the responses of its group.
        rows = min(rollout.prompts_per_batch, self.questions) * rollout.n * self._vllm_parts
        if self.stage == "evaluate":
            rows = answered_together(self.questions, self.settings.evaluate.rollouts)
        # Logits, in float32 the same scaled, their log-softmax, and noise.
        logits = rows * text["vocab_size"] * (self.width + 4 * 4)
        return max(self._vllm_tokens * layer * self.width, logits)

    @property
    def _vllm_parts(self) -> int:
        """Return the number of processes that hold one copy of the model in vLLM. Evaluations do not split it."""
        return 1 if self.stage == "evaluate" else self.settings.rollout.tensor_parallel

    @property
    def _head_dim(self) -> int:
        return self.text.get("head_dim") or self.text["hidden_size"] // self.text["num_attention_heads"]

    @property
    def _vllm_tokens(self) -> int:
        section = self.settings.evaluate if self.stage == "evaluate" else self.settings.rollout
        return batch_tokens(self.limit + section.max_new_tokens)

    def generation(self, prompts: int, rows: int, tokens: int) -> dict[str, int]:
        """Return the bytes of generating so many responses (rows) of so many tokens to each of a batch of prompts."""
        settings, text = self.settings, self.text
        prefix = settings.data.max_prompt_tokens
        of_layer = self._kv_bytes()
        vision, media = self._shown_tokens(), min(self.media, prompts)
        # Questions about the same media share everything up to the end of these.
        beside = prompts - media
        stored = media * prefix + beside * (prefix - vision)
        # Buffers of the rows' own tokens grow in blocks; the last growth copies one buffer of a layer's keys or values.
        own = prompts * rows * BLOCK * -(-tokens // BLOCK) * of_layer
        cache = text["num_hidden_layers"] * (stored * of_layer + own) + own // 2
        # Logits in the dtype of the model, in float32 if that is another, their log-softmax, and in float64 the
        # probabilities and their sums.
        number = self.width + (4 if self.width == 2 else 0) + 4 + 8 + 8
        logits = prompts * rows * text["vocab_size"] * number
        # The graph of a step keeps its memory while the first step of the next block runs eagerly.
        logits *= 2 if self.device == "cuda" and settings.rollout.cuda_graphs else 1
        # The last layer's dequantized weight is freed before the logits.
        whole = self.count.largest_quantizable * self.width if self.quantized else 0
        prefill = self._prefill(media, beside)
        return {ROLLOUT: max(prefill, cache + max(logits, whole)), VISION: self.features(self.media)}

    def _prefill(self, media: int, beside: int) -> int:
        """Return the most bytes while prompts are prefilled, including the keys and values of earlier passes.

        A pass has at most `micro_tokens` tokens, or one video with all questions about it.

        Args:
            media: number of prompts about different media.
            beside: number of prompts that share the beginning of another one; the plan assumes the same one for all.
        """
        settings, prefix, vision = self.settings, self.settings.data.max_prompt_tokens, self._shown_tokens()
        # Prompts about text alone share nothing.
        groups, shared = (media, beside) if media else (beside, 0)
        first = prefix + shared * (prefix - vision)
        in_pass = min(groups, 1 + max(0, settings.micro_tokens - first) // prefix)
        lengths = (prefix,) * in_pass + (prefix - vision,) * shared
        shown = (vision,) * in_pass + (0,) * shared
        shape = RowShape("shared", lengths, ((),) * len(lengths), shown)
        counted = sum(_counted_prefill(_key(self.config), _model_key(settings.model), shape, self.device).values())
        if in_pass == groups:
            return counted
        # The keys and values of all passes are joined layer by layer, first keys and then values.
        layers, of_layer, earlier = self.text["num_hidden_layers"], self._kv_bytes(), (groups - in_pass) * prefix
        joined = (earlier + sum(lengths)) * (layers * of_layer + of_layer // 2)
        return max(earlier * layers * of_layer + counted, joined)

    def _kv_bytes(self) -> int:
        """Return the bytes of the keys and values of a token in one layer."""
        return 2 * self.text["num_key_value_heads"] * self._head_dim * self.width

    def tower(self) -> dict[str, int]:
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
            sizes[VISION] += self.features(self.media)
        if not self.frames_on_device:
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

    def features(self, questions: int) -> int:
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
    def frames_on_device(self) -> bool:
        """Whether decoded frames are on the device. decoder=auto uses the GPU if it can decode there."""
        return self.device == "cpu" or self.settings.data.decoder != "cpu"

    def frames(self, ahead: int | None = None) -> int:
        """Return the bytes of decoded frames: those of the step and the steps ahead, and the cache."""
        data = self.settings.data
        ahead = data.decode_ahead if ahead is None else ahead
        of_medium = self._shown_tokens() * self.pixels_per_token * _PIXEL_BYTES
        cache = data.cache_mib * 2**20
        # Questions about the same media share their frames if the cache holds them until the last one is read.
        media = self.media if cache >= data.decode_threads * of_medium else self.questions
        return (1 + ahead) * self.prompts_each * media * of_medium + cache

    def embedding_cache(self) -> int:
        return 0 if self.train_vision else self.settings.data.embedding_cache_mib * 2**20

    def teacher_hidden(self) -> int:
        """Return the bytes in host memory of the self-teacher's hidden states of a step's rollouts."""
        rollout = self.settings.rollout
        tokens = self.questions * rollout.n * rollout.max_new_tokens
        return tokens * self._teacher_width() * self.width if distills_vocabulary(self.settings) else 0

    def _teacher_width(self) -> int:
        """Return the hidden size of the self-teacher."""
        config = teacher_config(self.settings)
        return (complete_config(config)["text_config"] if config else self.text)["hidden_size"]

    @property
    def encodes_inside(self) -> bool:
        """Whether the imitation encodes media inside of the engine's forward."""
        return self.train_vision or self.settings.runtime.zero_stage == 3

    def trained_by_policy(self) -> int:
        return self.count.adapter if self.lora else self.count.total - (0 if self.train_vision else self.count.vision)


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
