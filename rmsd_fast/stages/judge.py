"""The discriminator in stage 2 and its warm-up: one forward gives the rewards and the loss (arXiv 2603.11423)."""

from __future__ import annotations

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.losses import pairwise_discriminator_loss
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.distributed import global_sum
from rmsd_fast.stages.groups import Group, judged_rows, make_pairs
from rmsd_fast.stages.state import RunState, micro_batches, select_features


def judge(
    state: RunState, groups: list[Group], features: MediaFeatures | None, settings: RunConfig
) -> dict[str, float]:
    """Score every response of the step once, back-propagate L_D, and leave the scores in the groups as rewards.

    The engine's gradients are complete afterwards and not applied. Scores are those before the update.

    Returns:
        Sums over this process for `judge_metrics`.
    """
    batches = micro_batches(list(range(len(groups))), settings.distill.micro_prompts)
    pairs_of = [make_pairs([groups[i] for i in batch], settings) for batch in batches]
    counts = global_sum(
        {
            "pairs": sum(pairs.normalizer for pairs in pairs_of),
            "quality": sum(float((pairs.pair_weight * pairs.quality).sum()) for pairs in pairs_of),
            "scores": sum(len(group.rollouts) + len(group.kept) for group in groups),
        },
        state.world,
    )
    normalizer = max(counts[settings.discriminator.normalizer], 1e-12)
    sums: dict[str, float] = dict.fromkeys(_SUMS, 0.0)
    for number, (batch, pairs) in enumerate(zip(batches, pairs_of, strict=True)):
        own = [groups[i] for i in batch]
        rows, students = judged_rows(own, state.builder)
        rows = rows.to(state.world.device)
        scores = state.discriminator([g.prompt for g in own], rows, select_features(features, batch))
        pairs = pairs._replace(
            **{name: getattr(pairs, name).to(scores.device) for name in pairs._fields if name != "normalizer"}
        )
        loss = pairwise_discriminator_loss(
            scores[:students],
            scores[students:],
            pairs.student_index,
            pairs.teacher_index,
            pairs.quality,
            pair_weight=pairs.pair_weight,
            normalizer=normalizer,
            score_l2=settings.discriminator.score_l2,
            l2_normalizer=counts["scores"],
        ).loss
        state.discriminator.backward(loss, last=number == len(batches) - 1)
        _hand_out(own, scores.detach()[:students].float().cpu())
        _add_sums(sums, scores.detach(), rows.response_lengths, students, pairs, loss.detach())
    return sums


def _hand_out(groups: list[Group], scores: torch.Tensor) -> None:
    """Rewards of the rollouts; a question without a teacher has no D reward."""
    start = 0
    for group in groups:
        own = scores[start : start + len(group.rollouts)]
        group.d_score = own if group.kept else torch.zeros_like(own)
        start += len(group.rollouts)


TIE = 1e-5
_SUMS = [
    "d_loss",
    "d_students",
    "d_teachers",
    "d_score_student",
    "d_score_teacher",
    "d_weight",
    "d_correct",
    "d_margin",
    "d_n",
    "d_x",
    "d_y",
    "d_xx",
    "d_yy",
    "d_xy",
]


def _add_sums(sums: dict[str, float], scores, lengths, students: int, pairs, loss) -> None:
    scores, lengths = scores.double(), lengths.to(scores.device).double()
    margin = scores[students:][pairs.teacher_index] - scores[:students][pairs.student_index]
    weight = pairs.pair_weight.double()
    found = torch.stack(
        [
            loss.double(),
            scores.new_tensor(students),
            scores.new_tensor(len(scores) - students),
            scores[:students].sum(),
            scores[students:].sum(),
            weight.sum(),
            # Equal texts score the same up to rounding: a tie counts half, as in the area under a ROC curve.
            (weight * ((margin > TIE) + 0.5 * (margin.abs() <= TIE))).sum(),
            (weight * margin).sum(),
            scores.new_tensor(len(scores)),
            lengths.sum(),
            scores.sum(),
            lengths.square().sum(),
            scores.square().sum(),
            (lengths * scores).sum(),
        ]
    ).tolist()
    for name, value in zip(_SUMS, found, strict=True):
        sums[name] += value


def judge_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the global batch, by the names of metrics.jsonl; pairs weigh as much as in the loss."""
    weight, n = max(sums["d_weight"], 1e-12), sums["d_n"]
    covariance = sums["d_xy"] / n - sums["d_x"] / n * sums["d_y"] / n
    spread = (sums["d_xx"] / n - (sums["d_x"] / n) ** 2) * (sums["d_yy"] / n - (sums["d_y"] / n) ** 2)
    return {
        "discriminator/loss": sums["d_loss"],
        "discriminator/pair_accuracy": sums["d_correct"] / weight,
        "discriminator/margin": sums["d_margin"] / weight,
        "discriminator/length_correlation": covariance / spread**0.5 if spread > 1e-12 else 0.0,
        "discriminator/score_student": sums["d_score_student"] / max(sums["d_students"], 1.0),
        "discriminator/score_teacher": sums["d_score_teacher"] / max(sums["d_teachers"], 1.0),
    }
