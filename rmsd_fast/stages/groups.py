"""Groups: one question of a step with its N rollouts and teacher responses, their pairs, rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt, PromptBuilder, ResponseError
from rmsd_fast.data.records import Question
from rmsd_fast.method.advantages import degenerate_groups
from rmsd_fast.method.answers import has_outer_format, has_task_format, is_empty_answer, parse_answer
from rmsd_fast.method.hints import Hint
from rmsd_fast.method.matching import Pairs, expected_pairs, order_pairs, sample_matches, sampled_pairs
from rmsd_fast.method.quality import quality_against, quality_score
from rmsd_fast.method.rewards import RewardWeights, composite_advantages, composite_reward
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.setting_rules.uses import has_pool, rewards_rollouts, uses_discriminator
from rmsd_fast.stages.step_metrics import Metric, mean
from rmsd_fast.teacher.scores import quality_settings
from rmsd_fast.teacher.targets import Targets
from rmsd_kernels import TopK


@dataclass
class RolloutGroup:
    """One question with its N rollouts and its teacher responses. Float tensors are [N] and on the CPU.

    Attributes:
        prompt: prompt of the question.
        rollouts: rollouts of the student.
        targets: teacher responses of the question.
        outer: outer-format reward of each rollout.
        task: task-format reward of each rollout.
        content: content reward of each rollout.
        matches: index of each rollout's matched teacher response, int64 [N]; None if matches are not sampled.
        kept: indices of the teacher responses that matching can choose (p > 0).
        valid: number of rollouts whose answer parses.
        d_score: discriminator score of each rollout; empty without a discriminator.
        teacher_d_score: discriminator score of each kept teacher response; empty without a discriminator.
        log_ratio: k1 estimate of the KL to the reference, mean over the tokens; empty if the reward does not use it.
        reward: total reward of each rollout; empty in the warm-up.
        advantages: advantage of each rollout; empty in the warm-up.
        ref_logp: the reference's log-probs of each rollout's tokens, [R] each; empty unless the self-teacher's passes
            have computed them.
        hints: what the self-teacher is told about each rollout; empty unless a step has a self-teacher.
        teacher_logp: the self-teacher's log-probs of each rollout's tokens with each hint, [M, R] each; M is 0 for a
            rollout without hints, and the list is empty if no rollout has any.
        teacher_hidden: the self-teacher's hidden states that predict each rollout's tokens, [R, D] each, in the dtype
            of the model, or None for a rollout without hints; empty without hints, unless a divergence needs them, and
            after the policy's passes.
        teacher_top: the self-teacher's most probable tokens at each position of the rollouts, [R, k] each, or
            None for a rollout without hints; empty without hints, or if nothing compares them.
        student_top: those of the policy, [R, k'] each, and its log-probs of the teacher's tokens and of the sampled
            one, [R, k + 1].
        token_advantages: advantage of each rollout's tokens, [R] each; empty if all tokens have that of the rollout.
        token_terms: the terms that add up to these, by name, [R] each: pg, of the rewards, and kd, of the self-teacher.
        token_weights: weight of each rollout's tokens, [R] each; empty if all are 1.
        imitated: token ids of the teacher response that the policy also imitates, int64 [R]; None if there is none.
        sft_weight: learned weight of its cross entropy; 1 without `credit.uncertainty`.
    """

    prompt: Prompt
    rollouts: list[Rollout]
    targets: Targets
    outer: torch.Tensor
    task: torch.Tensor
    content: torch.Tensor
    matches: torch.Tensor | None
    kept: list[int]
    valid: int
    d_score: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    teacher_d_score: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    log_ratio: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    reward: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    hints: list[list[Hint]] = field(default_factory=list)
    ref_logp: list[torch.Tensor] = field(default_factory=list)
    teacher_logp: list[torch.Tensor] = field(default_factory=list)
    teacher_hidden: list[torch.Tensor | None] = field(default_factory=list)
    teacher_top: list[TopK | None] = field(default_factory=list)
    student_top: list[TopK] = field(default_factory=list)
    token_advantages: list[torch.Tensor] = field(default_factory=list)
    token_weights: list[torch.Tensor] = field(default_factory=list)
    token_terms: list[dict[str, torch.Tensor]] = field(default_factory=list)
    imitated: torch.Tensor | None = None
    sft_weight: float = 1.0


def make_group(
    prompt: Prompt, rollouts: list[Rollout], targets: Targets, settings: RunConfig, *, step: int
) -> RolloutGroup:
    """Match a question's rollouts with its teacher responses and compute the rewards that need no model."""
    question, options = prompt.question, prompt.question.options
    texts = [rollout.text for rollout in rollouts]
    content = _content(question, texts, targets, settings)
    matches = None
    if settings.discriminator.pairing == "sampled" and targets.has_teacher:
        matches = sample_matches(targets.p, len(rollouts), seed=settings.seed, step=step, question_id=question.id)
    return RolloutGroup(
        prompt=prompt,
        rollouts=rollouts,
        targets=targets,
        outer=torch.tensor([float(has_outer_format(text)) for text in texts]),
        task=torch.tensor([float(has_task_format(text, question.task_type, options)) for text in texts]),
        content=torch.tensor(content),
        matches=matches,
        kept=torch.nonzero(targets.p > 0).flatten().tolist(),
        valid=sum(parse_answer(text, question.task_type, options) is not None for text in texts),
    )


def _content(question: Question, texts: list[str], targets: Targets, settings: RunConfig) -> list[float]:
    """Return the content reward of each rollout; zeros for open questions and, by default, without ground truth."""
    metric = {"options": question.options, **quality_settings(settings.teacher)}
    if question.has_truth:
        return [quality_score(text, question.task_type, question.answer, **metric) for text in texts]
    if question.is_unlabeled and settings.reward.unlabeled == "teacher":
        answers = [answer.text for answer in targets.answers]
        # With teacher.weighting=uniform, invalid answers can be matched too.
        weights = [p * valid for p, valid in zip(targets.p.tolist(), targets.valid, strict=True)]
        return quality_against(texts, answers, weights, question.task_type, **metric)
    return [0.0] * len(texts)


def make_pairs(groups: list[RolloutGroup], settings: RunConfig) -> Pairs:
    """Return the pairs of the groups. They index the concatenated rollouts and the concatenated kept responses."""
    counts = [len(group.rollouts) for group in groups]
    quality = [group.targets.weight[group.kept] for group in groups]
    if settings.discriminator.pairing == "expected":
        return expected_pairs(counts, [group.targets.p[group.kept] for group in groups], quality)
    matches = [_among_kept(group) for group in groups]
    return sampled_pairs(counts, matches, quality)


def make_order_pairs(groups: list[RolloutGroup]) -> Pairs:
    """Return the pairs that order the rollouts, and the kept responses, of questions with ground truth by quality.

    They index the concatenated rollouts followed by the concatenated kept responses.
    """
    # Like the other pairs, they come from groups with a teacher, which the normalizer of the loss counts.
    quality = [group.content if group.kept else torch.zeros_like(group.content) for group in groups]
    quality += [_true_quality(group)[group.kept] for group in groups]
    return order_pairs(quality)


def _true_quality(group: RolloutGroup) -> torch.Tensor:
    """Return the quality of the teacher's responses; zeros without ground truth, where it is only their agreement."""
    has_truth = group.prompt.question.has_truth
    return group.targets.quality if has_truth else torch.zeros_like(group.targets.quality)


def _among_kept(group: RolloutGroup) -> torch.Tensor | None:
    if group.matches is None:
        return None
    position_of = {k: position for position, k in enumerate(group.kept)}
    return torch.tensor([position_of[int(k)] for k in group.matches])


@dataclass(frozen=True)
class DistinctTexts:
    """The texts of a group that the discriminator reads, each distinct text once.

    Attributes:
        responses: token ids of the texts, int64 [R] each.
        students: index in `responses` of each rollout.
        teachers: index in `responses` of each kept teacher response.
    """

    responses: list[torch.Tensor]
    students: list[int]
    teachers: list[int]


def distinct_texts(group: RolloutGroup, builder: PromptBuilder) -> DistinctTexts:
    """Return rollouts and kept teacher responses as the discriminator reads them.

    Both sides are encoded from their text and end with the end token, even if a rollout was truncated. The
    discriminator can therefore use neither the tokenization nor a missing end token to tell them apart. The only
    exception is a rollout that spells a special token with ordinary tokens; it keeps its own tokens.
    """
    index_of: dict[tuple[int, ...], int] = {}
    students = [canonical_ids(rollout, builder) for rollout in group.rollouts]
    teachers = [builder.encode_response(group.targets.answers[k].text) for k in group.kept]
    indices = [index_of.setdefault(tuple(ids.tolist()), len(index_of)) for ids in (*students, *teachers)]
    responses = [torch.tensor(ids) for ids in index_of]
    return DistinctTexts(responses, indices[: len(students)], indices[len(students) :])


def canonical_ids(rollout: Rollout, builder: PromptBuilder) -> torch.Tensor:
    """Encode a rollout like a teacher response, cut to at most one token more than were sampled, int64 [R]."""
    ids = rollout.token_ids
    sampled = torch.cat([ids, ids.new_tensor([builder.eos_id])]) if rollout.truncated else ids
    try:
        canonical = builder.encode_response(rollout.text)
    except ResponseError as error:
        if error.reason != "special_token":
            raise
        # The text spells a special token with ordinary tokens. The sampled ids contain no special token, because
        # generation bans them.
        return sampled
    # Invalid UTF-8 bytes become replacement characters of three tokens each, so a response of maximum length could
    # exceed the limit.
    return canonical if len(canonical) <= len(sampled) else torch.cat([canonical[: len(sampled) - 1], canonical[-1:]])


def set_advantages(group: RolloutGroup, settings: RunConfig) -> None:
    """Compute reward and advantages of a group whose d_score (and log_ratio, for kl_in_reward) are known."""
    reward = settings.reward
    components = (_rewarded_score(group, settings), group.outer, group.task, group.content)
    weights = RewardWeights(reward.alpha, reward.beta, reward.eta, reward.delta)
    penalty = {"log_ratio": group.log_ratio, "kl_in_reward": reward.kl_in_reward}
    group.reward = composite_reward(*components, weights=weights, **penalty)
    group.advantages = composite_advantages(
        *components,
        weights=weights,
        normalization=reward.normalization,
        score_sd_offset=reward.score_sd_offset,
        **penalty,
    )


def _rewarded_score(group: RolloutGroup, settings: RunConfig) -> torch.Tensor:
    """Return the discriminator scores as they enter the reward; zeros without a discriminator."""
    reward = settings.reward
    if not len(group.d_score) or not _score_counts(group, reward.score_groups):
        return torch.zeros_like(group.content)
    clip = reward.score_clip
    return group.d_score if clip is None else group.d_score.clamp(-clip, clip)


def _score_counts(group: RolloutGroup, score_groups: str) -> bool:
    """Return whether the discriminator score is part of the group's reward, see `reward.score_groups`."""
    if score_groups == "flat_content":
        return bool(degenerate_groups(group.content))
    if score_groups == "teacher_ahead" and group.kept and group.prompt.question.has_truth:
        # Qualities are float32 numbers.
        return float(group.content.double().mean()) < group.targets.target_quality - 1e-6
    return True


def quality_record(groups: list[RolloutGroup], *, pool: bool = True) -> dict[str, Metric]:
    """Return this process's part of the metrics that show what stage 2 can gain on closed questions.

    Only questions with ground truth and a teacher response count, so that all of the metrics refer to the same
    questions. Without a `pool`, those with ground truth count, and there are no metrics of teacher responses.
    """
    closed = [g for g in groups if (g.kept or not pool) and g.prompt.question.has_truth]
    student = sum(float(group.content.mean()) for group in closed)
    signal = sum(not bool(degenerate_groups(group.content)) for group in closed)
    record: dict[str, Metric] = {
        "rollout/quality": (mean, student, len(closed)),
        "rollout/signal_share": (mean, signal, len(closed)),
    }
    if not pool:
        return record
    target = sum(group.targets.target_quality for group in closed)
    best = sum(float(group.targets.quality.max()) for group in closed)
    return record | {
        "teacher/target_quality": (mean, target, len(closed)),
        "teacher/best_quality": (mean, best, len(closed)),
        "teacher/headroom": (mean, target - student, len(closed)),
    }


def _answer_record(groups: list[RolloutGroup]) -> dict[str, Metric]:
    answers = [(q, v) for group in groups for q, v in zip(group.targets.quality, group.targets.valid, strict=True)]
    return {
        "teacher/quality": (mean, sum(float(q) for q, _ in answers), len(answers)),
        "teacher/valid_share": (mean, sum(v for _, v in answers), len(answers)),
        "teacher/kept_share": (mean, sum(len(group.kept) for group in groups), len(answers)),
        "teacher/empty_share": (mean, sum(not group.kept for group in groups), len(groups)),
    }


def group_record(groups: list[RolloutGroup], settings: RunConfig) -> dict[str, Metric]:
    """Return this process's part of the metrics of rollouts, teacher responses and rewards."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    record: dict[str, Metric] = {
        "rollout/tokens_mean": (mean, sum(len(rollout.token_ids) for rollout in rollouts), len(rollouts)),
        "rollout/truncated_share": (mean, sum(rollout.truncated for rollout in rollouts), len(rollouts)),
        "rollout/empty_share": (mean, sum(is_empty_answer(rollout.text) for rollout in rollouts), len(rollouts)),
        "rollout/valid_share": (mean, sum(group.valid for group in groups), len(rollouts)),
    }
    masses = [rollout.banned_mass for rollout in rollouts]
    if None not in masses:
        lengths = [len(rollout.token_ids) for rollout in rollouts]
        total = sum(mass * length for mass, length in zip(masses, lengths, strict=True))
        record["rollout/banned_mass"] = (mean, total, sum(lengths))
    pool = has_pool(settings)
    record |= quality_record(groups, pool=pool)
    if pool:
        record |= _answer_record(groups)
    if pool and not uses_discriminator(settings):
        # Without a discriminator, nothing leads to its target.
        del record["teacher/target_quality"], record["teacher/headroom"]
    # The warm-up has no advantages.
    if all(len(group.advantages) for group in groups):
        if rewards_rollouts(settings):
            flat = sum(float(degenerate_groups(group.advantages)) for group in groups)
            record["advantage/zero_share"] = (mean, flat, len(groups))
        record["reward/total"] = (mean, sum(float(group.reward.sum()) for group in groups), len(rollouts))
    weights = settings.reward
    judged = (("discriminator", "d_score", weights.alpha),) if uses_discriminator(settings) else ()
    for name, component, weight in (
        *judged,
        ("outer", "outer", weights.beta),
        ("task", "task", weights.eta),
        ("content", "content", weights.delta),
    ):
        raw = sum(float(getattr(group, component).sum()) for group in groups)
        used = raw if name != "discriminator" else sum(float(_rewarded_score(g, settings).sum()) for g in groups)
        record[f"reward/{name}/raw"] = (mean, raw, len(rollouts))
        record[f"reward/{name}/weighted"] = (mean, weight * used, len(rollouts))
    return record
