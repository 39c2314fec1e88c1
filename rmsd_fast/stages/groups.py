"""A group = one question of the step with its N rollouts and its teacher's responses; pairs, rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt, PromptBuilder, ResponseError
from rmsd_fast.method.advantages import degenerate_groups
from rmsd_fast.method.answers import CLOSED_TASKS, has_outer_format, has_task_format, is_empty_answer, parse_answer
from rmsd_fast.method.matching import Pairs, expected_pairs, sample_matches, sampled_pairs
from rmsd_fast.method.quality import quality_score
from rmsd_fast.method.rewards import RewardWeights, composite_advantages, composite_reward
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.stages.step_metrics import Metric, mean
from rmsd_fast.teacher.scores import quality_settings
from rmsd_fast.teacher.targets import Targets


@dataclass
class RolloutGroup:
    """Float tensors are [N], on the CPU; `kept` are the teacher responses that matching can choose (p > 0).

    teacher_ids: int64 [R] of each kept teacher response, once the discriminator reads them.
    d_score, teacher_d_score: scores of the rollouts [N] and of the kept teacher responses; empty without a
    discriminator.
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
    teacher_ids: list[torch.Tensor] = field(default_factory=list)
    d_score: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    teacher_d_score: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    log_ratio: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    reward: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


def make_group(
    prompt: Prompt, rollouts: list[Rollout], targets: Targets, settings: RunConfig, *, step: int
) -> RolloutGroup:
    """Match a question's rollouts with its teacher responses and compute the rewards that need no model."""
    question, options = prompt.question, prompt.question.options
    texts = [rollout.text for rollout in rollouts]
    content = [0.0] * len(texts)
    # Open questions have no metric, hence no content reward.
    if question.task_type in CLOSED_TASKS:
        metric = {"answer": question.answer, "options": options, **quality_settings(settings.teacher)}
        content = [quality_score(text, question.task_type, **metric) for text in texts]
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


def make_pairs(groups: list[RolloutGroup], settings: RunConfig) -> Pairs:
    """Pairs over the rollouts of the groups in order, and over their kept teacher responses in order."""
    counts = [len(group.rollouts) for group in groups]
    quality = [group.targets.quality[group.kept] for group in groups]
    if settings.discriminator.pairing == "expected":
        return expected_pairs(counts, [group.targets.p[group.kept] for group in groups], quality)
    matches = [_among_kept(group) for group in groups]
    return sampled_pairs(counts, matches, quality)


def _among_kept(group: RolloutGroup) -> torch.Tensor | None:
    if group.matches is None:
        return None
    position_of = {k: position for position, k in enumerate(group.kept)}
    return torch.tensor([position_of[int(k)] for k in group.matches])


@dataclass(frozen=True)
class DistinctTexts:
    """What the discriminator reads of a group: each distinct text once.

    responses: the texts, int64 [R] each. students: for each rollout, its index in `responses`; teachers: the same for
    each kept teacher response.
    """

    responses: list[torch.Tensor]
    students: list[int]
    teachers: list[int]


def distinct_texts(group: RolloutGroup, builder: PromptBuilder) -> DistinctTexts:
    """Rollouts and kept teacher responses as the discriminator reads them; fills `group.teacher_ids`.

    Both sides are the encoding of their text with the end token, also where a rollout was cut: neither tokenisation nor
    a missing end token can tell them apart.
    """
    index_of: dict[tuple[int, ...], int] = {}
    students = [_canonical_ids(rollout, builder) for rollout in group.rollouts]
    group.teacher_ids = [builder.encode_response(group.targets.answers[k].text) for k in group.kept]
    indices = [index_of.setdefault(tuple(ids.tolist()), len(index_of)) for ids in (*students, *group.teacher_ids)]
    responses = [torch.tensor(ids) for ids in index_of]
    return DistinctTexts(responses, indices[: len(students)], indices[len(students) :])


def _canonical_ids(rollout: Rollout, builder: PromptBuilder) -> torch.Tensor:
    """A rollout encoded as a teacher's text would be, cut to one token more than were sampled."""
    ids = rollout.token_ids
    sampled = torch.cat([ids, ids.new_tensor([builder.eos_id])]) if rollout.truncated else ids
    try:
        canonical = builder.encode_response(rollout.text)
    except ResponseError:
        # The text spells a special token out of plain pieces. Its own ids hold no special one, generation bans them.
        return sampled
    # Bytes that are not text become replacement characters, of three tokens each: a longest response would not fit.
    return canonical if len(canonical) <= len(sampled) else torch.cat([canonical[: len(sampled) - 1], canonical[-1:]])


def set_advantages(group: RolloutGroup, settings: RunConfig) -> None:
    """Fill reward and advantages of a group whose d_score (and log_ratio, for kl_in_reward) are known."""
    reward = settings.reward
    d_score = group.d_score if len(group.d_score) else torch.zeros_like(group.content)
    if reward.score_clip is not None:
        d_score = d_score.clamp(-reward.score_clip, reward.score_clip)
    components = (d_score, group.outer, group.task, group.content)
    weights = RewardWeights(reward.alpha, reward.beta, reward.eta, reward.delta)
    penalty = {"log_ratio": group.log_ratio, "kl_in_reward": reward.kl_in_reward}
    group.reward = composite_reward(*components, weights=weights, **penalty)
    group.advantages = composite_advantages(*components, weights=weights, normalization=reward.normalization, **penalty)


def group_record(groups: list[RolloutGroup], settings: RunConfig) -> dict[str, Metric]:
    """This process's part of the metrics of rollouts, teacher responses and rewards."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    answers = [(q, v) for group in groups for q, v in zip(group.targets.quality, group.targets.valid, strict=True)]
    record: dict[str, Metric] = {
        "rollout/tokens_mean": (mean, sum(len(rollout.token_ids) for rollout in rollouts), len(rollouts)),
        "rollout/truncated_share": (mean, sum(rollout.truncated for rollout in rollouts), len(rollouts)),
        "rollout/empty_share": (mean, sum(is_empty_answer(rollout.text) for rollout in rollouts), len(rollouts)),
        "rollout/valid_share": (mean, sum(group.valid for group in groups), len(rollouts)),
        "teacher/quality": (mean, sum(float(q) for q, _ in answers), len(answers)),
        "teacher/valid_share": (mean, sum(v for _, v in answers), len(answers)),
        "teacher/kept_share": (mean, sum(len(group.kept) for group in groups), len(answers)),
        "teacher/empty_share": (mean, sum(not group.kept for group in groups), len(groups)),
    }
    # The warm-up has no advantages.
    if all(len(group.advantages) for group in groups):
        flat = sum(float(degenerate_groups(group.advantages)) for group in groups)
        record["advantage/zero_share"] = (mean, flat, len(groups))
        record["reward/total"] = (mean, sum(float(group.reward.sum()) for group in groups), len(rollouts))
    weights = settings.reward
    for name, component, weight in (
        ("discriminator", "d_score", weights.alpha),
        ("outer", "outer", weights.beta),
        ("task", "task", weights.eta),
        ("content", "content", weights.delta),
    ):
        raw = sum(float(getattr(group, component).sum()) for group in groups)
        record[f"reward/{name}/raw"] = (mean, raw, len(rollouts))
        record[f"reward/{name}/weighted"] = (mean, weight * raw, len(rollouts))
    return record
