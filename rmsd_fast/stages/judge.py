"""The discriminator in stage 2 and its warm-up: one forward gives the rewards and the loss (arXiv 2603.11423)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.micro_batches import MicroBatch
from rmsd_fast.losses import pairwise_discriminator_loss
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.distributed import any_rank, global_sum
from rmsd_fast.stages.groups import Group, Judged, judged_responses, make_pairs
from rmsd_fast.stages.state import RunState, micro_batches, rows_of, select_features


@dataclass(frozen=True)
class _PairLoss:
    """L_D of some groups as a function of their scores; the sum over all groups and processes is the loss."""

    groups: list[Group]
    judged: list[Judged]
    settings: RunConfig
    normalizer: float
    scores_in_all: float

    def __call__(self, scores: list[torch.Tensor], chosen: list[int]) -> torch.Tensor:
        """scores: of the chosen groups, [distinct responses] each."""
        students, teachers = self.sides(scores, chosen)
        pairs = make_pairs([self.groups[i] for i in chosen], self.settings)
        device = students.device
        return pairwise_discriminator_loss(
            students,
            teachers,
            pairs.student_index.to(device),
            pairs.teacher_index.to(device),
            pairs.quality.to(device),
            pair_weight=pairs.pair_weight.to(device),
            normalizer=self.normalizer,
            score_l2=self.settings.discriminator.score_l2,
            l2_normalizer=self.scores_in_all,
        ).loss

    def sides(self, scores: list[torch.Tensor], chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the rollouts and of the kept teacher responses, group after group."""
        judged = [self.judged[i] for i in chosen]
        return (
            torch.cat([own[one.students] for own, one in zip(scores, judged, strict=True)]),
            torch.cat([own[one.teachers] for own, one in zip(scores, judged, strict=True)]),
        )


def judge(
    state: RunState, groups: list[Group], features: MediaFeatures | None, settings: RunConfig
) -> dict[str, float]:
    """Score every distinct response of the step once, back-propagate L_D, leave the scores in the groups as rewards.

    The engine's gradients are complete afterwards and not applied. Scores are those before the update. Where a group
    did not fit one micro-batch its pairs meet only after all of it is scored: then a pass without gradient comes first.

    Returns:
        Sums over this process for `judge_metrics`.
    """
    judged = [judged_responses(group, state.builder) for group in groups]
    prompts, responses = [group.prompt for group in groups], [one.responses for one in judged]
    batches = micro_batches(state, prompts, responses, settings)
    pairs = make_pairs(groups, settings)
    counts = global_sum(
        {
            "pairs": pairs.normalizer,
            "quality": float((pairs.pair_weight * pairs.quality).sum()),
            "scores": sum(len(group.rollouts) + len(group.kept) for group in groups),
        },
        state.world,
    )
    normalizer = max(counts[settings.discriminator.normalizer], 1e-12)
    pair_loss = _PairLoss(groups, judged, settings, normalizer, counts["scores"])

    def forward(batch: MicroBatch) -> list[torch.Tensor]:
        rows = rows_of(state, batch, prompts, responses, settings)
        scores = state.discriminator(
            [prompts[i] for i in batch.prompts], rows, select_features(features, batch.prompts)
        )
        return list(scores.split([len(own) for own in batch.responses]))

    whole = [len(own) for own in responses]
    split = any_rank(any(len(r) < whole[i] for b in batches if not b.filler for i, r in _parts(b)), state.world)
    gradients = _score_gradients(pair_loss, batches, forward, whole) if split else None
    found: list[list[torch.Tensor]] = []
    for number, batch in enumerate(batches):
        scores = forward(batch)
        if batch.filler:
            loss = 0.0 * torch.cat(scores).sum()
        elif gradients is None:
            loss = pair_loss(scores, batch.prompts)
        else:
            # Its value means nothing; its gradient is that of the whole group's loss.
            loss = sum((s * gradients[i][r]).sum() for s, (i, r) in zip(scores, _parts(batch), strict=True))
        state.discriminator.backward(loss, last=number == len(batches) - 1)
        found.append([one.detach() for one in scores])
    scores = _together(batches, found, whole)
    return _hand_out(pair_loss, scores, responses)


def _parts(batch: MicroBatch) -> list[tuple[int, list[int]]]:
    return list(zip(batch.prompts, batch.responses, strict=True))


def _together(batches: list[MicroBatch], found: list[list[torch.Tensor]], whole: list[int]) -> list[torch.Tensor]:
    """Scores of each group, put together from the micro-batches."""
    scores = [found[0][0].new_zeros(count) for count in whole]
    for batch, own in zip(batches, found, strict=True):
        if not batch.filler:
            for (group, responses), part in zip(_parts(batch), own, strict=True):
                scores[group][responses] = part
    return scores


def _score_gradients(pair_loss: _PairLoss, batches: list[MicroBatch], forward, whole: list[int]) -> list[torch.Tensor]:
    """dL_D/dscore of every response, from a pass without gradient."""
    with torch.no_grad():
        scores = _together(batches, [forward(batch) for batch in batches], whole)
    scores = [own.requires_grad_() for own in scores]
    return list(torch.autograd.grad(pair_loss(scores, list(range(len(scores)))), scores))


def _hand_out(
    pair_loss: _PairLoss, scores: list[torch.Tensor], responses: list[list[torch.Tensor]]
) -> dict[str, float]:
    """Rewards of the rollouts, and the sums for the metrics; a question without a teacher has no D reward."""
    everything = list(range(len(scores)))
    loss = pair_loss(scores, everything)
    students, teachers = pair_loss.sides([own.cpu() for own in scores], everything)
    lengths = [torch.tensor([len(ids) for ids in own]) for own in responses]
    start = 0
    for group in pair_loss.groups:
        own = students[start : start + len(group.rollouts)]
        group.d_score = own.float() if group.kept else torch.zeros(len(own))
        start += len(own)
    pairs = make_pairs(pair_loss.groups, pair_loss.settings)
    return _sums(students, teachers, torch.cat(pair_loss.sides(lengths, everything)), pairs, float(loss))


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


def _sums(students, teachers, lengths, pairs, loss: float) -> dict[str, float]:
    students, teachers, lengths = students.double(), teachers.double(), lengths.double()
    scores = torch.cat([students, teachers])
    margin = teachers[pairs.teacher_index] - students[pairs.student_index]
    weight = pairs.pair_weight.double()
    found = torch.stack(
        [
            scores.new_tensor(loss),
            scores.new_tensor(len(students)),
            scores.new_tensor(len(teachers)),
            students.sum(),
            teachers.sum(),
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
    return dict(zip(_SUMS, found, strict=True))


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
