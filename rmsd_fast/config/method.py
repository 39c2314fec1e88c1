"""Settings of the method: imitation, discriminator, rewards, rollouts, distillation and self-teachers."""

from __future__ import annotations

from dataclasses import dataclass, field

from rmsd_fast.config.evaluation import JudgeConfig
from rmsd_fast.config.fields import DIVERGENCES, choice, number


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
