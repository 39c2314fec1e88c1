"""A group = one question of the step with its N rollouts and its teacher's responses; pairs, rewards and advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt, PromptBuilder, ResponseError
from rmsd_fast.method.advantages import degenerate_groups, group_advantages
from rmsd_fast.method.answers import has_outer_format, has_task_format, is_empty_answer, parse_answer
from rmsd_fast.method.matching import Pairs, expected_pairs, sample_matches, sampled_pairs
from rmsd_fast.method.rewards import RewardWeights, composite_advantages, composite_reward
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.teacher.targets import Targets, content_score


@dataclass
class Group:
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


def make_group(prompt: Prompt, rollouts: list[Rollout], targets: Targets, settings: RunConfig, *, step: int) -> Group:
    """Match a question's rollouts with its teacher responses and compute the rewards that need no model."""
    question = prompt.question
    texts = [rollout.text for rollout in rollouts]
    matches = None
    if settings.discriminator.pairing == "sampled" and targets.has_teacher:
        matches = sample_matches(targets.p, len(rollouts), seed=settings.seed, step=step, question_id=question.id)
    return Group(
        prompt=prompt,
        rollouts=rollouts,
        targets=targets,
        outer=torch.tensor([float(has_outer_format(text)) for text in texts]),
        task=torch.tensor([float(has_task_format(text, question.task_type, question.options)) for text in texts]),
        content=torch.tensor([content_score(text, question, settings.teacher) for text in texts]),
        matches=matches,
        kept=torch.nonzero(targets.p > 0).flatten().tolist(),
        valid=sum(parse_answer(text, question.task_type, question.options) is not None for text in texts),
    )


def make_pairs(groups: list[Group], settings: RunConfig) -> Pairs:
    """Pairs over the rollouts of the groups in order, and over their kept teacher responses in order."""
    counts = [len(group.rollouts) for group in groups]
    quality = [group.targets.quality[group.kept] for group in groups]
    if settings.discriminator.pairing == "expected":
        return expected_pairs(counts, [group.targets.p[group.kept] for group in groups], quality)
    matches = [_among_kept(group) for group in groups]
    return sampled_pairs(counts, matches, quality)


def _among_kept(group: Group) -> torch.Tensor | None:
    if group.matches is None:
        return None
    place = {k: position for position, k in enumerate(group.kept)}
    return torch.tensor([place[int(k)] for k in group.matches])


@dataclass(frozen=True)
class Judged:
    """What the discriminator reads of a group: each distinct text once.

    responses: int64 [R] each. students: for each rollout, its place in `responses`; teachers: the same for each kept
    teacher response.
    """

    responses: list[torch.Tensor]
    students: list[int]
    teachers: list[int]


def judged_responses(group: Group, builder: PromptBuilder) -> Judged:
    """Rollouts and kept teacher responses as the discriminator reads them; fills `group.teacher_ids`.

    Both sides are the encoding of their text with the end token, also where a rollout was cut: neither tokenisation nor
    a missing end token can tell them apart.
    """
    place: dict[tuple[int, ...], int] = {}
    students = [_canonical_ids(rollout, builder) for rollout in group.rollouts]
    group.teacher_ids = [builder.encode_response(group.targets.answers[k].text) for k in group.kept]
    places = [place.setdefault(tuple(ids.tolist()), len(place)) for ids in (*students, *group.teacher_ids)]
    responses = [torch.tensor(ids) for ids in place]
    return Judged(responses, places[: len(students)], places[len(students) :])


def _canonical_ids(rollout: Rollout, builder: PromptBuilder) -> torch.Tensor:
    """A rollout encoded as a teacher's text would be, cut to one token more than were sampled."""
    ids = rollout.token_ids
    own = torch.cat([ids, ids.new_tensor([builder.eos_id])]) if rollout.truncated else ids
    try:
        canonical = builder.encode_response(rollout.text)
    except ResponseError:
        # The text spells a special token out of plain pieces. Its own ids hold no special one, generation bans them.
        return own
    # Bytes that are no text become replacement characters, of three tokens each: a longest response would not fit.
    return canonical if len(canonical) <= len(own) else torch.cat([canonical[: len(own) - 1], canonical[-1:]])


def set_advantages(group: Group, settings: RunConfig) -> None:
    """Fill reward and advantages of a group whose d_score (and log_ratio, for kl_in_reward) are known."""
    reward = settings.reward
    d_score = group.d_score if len(group.d_score) else torch.zeros_like(group.content)
    if reward.score_clip is not None:
        d_score = d_score.clamp(-reward.score_clip, reward.score_clip)
    weights = RewardWeights(reward.alpha, reward.beta, reward.eta, reward.delta)
    parts = (d_score, group.outer, group.task, group.content)
    group.reward = composite_reward(*parts, weights=weights)
    if not reward.kl_in_reward:
        group.advantages = composite_advantages(*parts, weights=weights, normalization=reward.normalization)
        return
    group.reward = group.reward - reward.kl_in_reward * group.log_ratio
    if reward.normalization == "sum_then_gn":
        group.advantages = group_advantages(group.reward)
    else:
        group.advantages = composite_advantages(*parts, weights=weights, normalization="gn_then_sum")
        group.advantages = group.advantages - reward.kl_in_reward * group_advantages(group.log_ratio)


def group_sums(groups: list[Group], settings: RunConfig) -> dict[str, float]:
    """Sums over this process's groups; `group_metrics` turns their global sums into means."""
    weights = settings.reward
    sums = {"groups": float(len(groups))}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sums["rollouts"] = len(rollouts)
    sums["rollout_tokens"] = sum(len(rollout.token_ids) for rollout in rollouts)
    sums["truncated"] = sum(rollout.truncated for rollout in rollouts)
    sums["empty"] = sum(is_empty_answer(rollout.text) for rollout in rollouts)
    sums["valid"] = sum(group.valid for group in groups)
    for name, weight in (("outer", weights.beta), ("task", weights.eta), ("content", weights.delta)):
        raw = sum(float(getattr(group, name).sum()) for group in groups)
        sums[f"{name}_raw"], sums[f"{name}_weighted"] = raw, weight * raw
    sums["discriminator_raw"] = sum(float(group.d_score.sum()) for group in groups)
    sums["discriminator_weighted"] = weights.alpha * sums["discriminator_raw"]
    sums["total"] = sum(float(group.reward.sum()) for group in groups)
    sums["with_advantages"] = sum(len(group.advantages) > 0 for group in groups)
    sums["flat_groups"] = sum(float(degenerate_groups(group.advantages)) for group in groups if len(group.advantages))
    responses = [(q, v) for group in groups for q, v in zip(group.targets.quality, group.targets.valid, strict=True)]
    sums["teacher_responses"] = len(responses)
    sums["teacher_quality"] = sum(float(q) for q, _ in responses)
    sums["teacher_valid"] = sum(v for _, v in responses)
    sums["teacher_kept"] = sum(len(group.kept) for group in groups)
    sums["empty_groups"] = sum(not group.kept for group in groups)
    return {name: float(value) for name, value in sums.items()}


def group_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the global batch, by the names of metrics.jsonl."""
    rollouts, responses = sums["rollouts"], max(1.0, sums["teacher_responses"])
    metrics = {
        "rollout/tokens_mean": sums["rollout_tokens"] / rollouts,
        "rollout/truncated_share": sums["truncated"] / rollouts,
        "rollout/empty_share": sums["empty"] / rollouts,
        "rollout/valid_share": sums["valid"] / rollouts,
        "teacher/quality": sums["teacher_quality"] / responses,
        "teacher/valid_share": sums["teacher_valid"] / responses,
        "teacher/kept_share": sums["teacher_kept"] / responses,
        "teacher/empty_share": sums["empty_groups"] / sums["groups"],
    }
    if sums["with_advantages"]:
        metrics["advantage/zero_share"] = sums["flat_groups"] / sums["with_advantages"]
        metrics["reward/total"] = sums["total"] / rollouts
    for name in ("discriminator", "outer", "task", "content"):
        metrics[f"reward/{name}/raw"] = sums[f"{name}_raw"] / rollouts
        metrics[f"reward/{name}/weighted"] = sums[f"{name}_weighted"] / rollouts
    return metrics
