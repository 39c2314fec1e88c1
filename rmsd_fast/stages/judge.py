"""The discriminator in stage 2 and its warm-up: one forward gives the rewards and the loss (arXiv 2603.11423)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.micro_batches import MicroBatch
from rmsd_fast.losses import pairwise_discriminator_loss
from rmsd_fast.method.matching import Pairs
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.distributed import any_rank, global_sum
from rmsd_fast.stages.groups import Group, Judged, judged_responses, make_pairs
from rmsd_fast.stages.state import RunState, is_split, micro_batches, rows_of, select_features


@dataclass(frozen=True)
class _PairLoss:
    """L_D of some groups as a function of their scores; the sum over all groups and processes is the loss."""

    groups: list[Group]
    judged: list[Judged]
    settings: RunConfig
    normalizer: float
    scores_in_all: float

    @property
    def all_groups(self) -> list[int]:
        return list(range(len(self.groups)))

    def __call__(self, scores: torch.Tensor, chosen: list[int]) -> torch.Tensor:
        """scores: of the distinct responses of the chosen groups, group after group."""
        students, teachers = self.sides(scores, chosen)
        pairs = make_pairs([self.groups[i] for i in chosen], self.settings)
        device = scores.device
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

    def sides(self, scores: torch.Tensor, chosen: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """From one value per distinct response, those of the rollouts and those of the kept teacher responses."""
        students, teachers, start = [], [], 0
        for judged in (self.judged[i] for i in chosen):
            students += [start + place for place in judged.students]
            teachers += [start + place for place in judged.teachers]
            start += len(judged.responses)
        index = torch.tensor(students + teachers, dtype=torch.int64).to(scores.device)
        return scores[index].split([len(students), len(teachers)])


def judge(
    state: RunState, groups: list[Group], features: MediaFeatures | None, settings: RunConfig
) -> dict[str, float]:
    """Score every distinct response of the step once, back-propagate L_D, leave the scores in the groups as rewards.

    The engine's gradients are complete afterwards and not applied. Scores are those before the update. Where a group
    did not fit one micro-batch its pairs meet only after all of it is scored: then a pass without gradient comes first,
    on all processes.

    Returns:
        Sums over this process for `judge_metrics`, and `computed`, the tokens that went through the model.
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
    computed = 0

    def forward(batch: MicroBatch) -> torch.Tensor:
        nonlocal computed
        rows = rows_of(state, batch, prompts, responses, settings)
        computed += rows.input_ids.numel()
        own = [prompts[i] for i in batch.prompts]
        return state.discriminator(own, rows, select_features(features, batch.prompts))

    places = [_places(batch, responses) for batch in batches]
    gradient = None
    if any_rank(is_split(batches, responses), state.world):
        with torch.no_grad():
            scores = _in_order(batches, places, [forward(batch) for batch in batches])
        scores.requires_grad_()
        (gradient,) = torch.autograd.grad(pair_loss(scores, pair_loss.all_groups), scores)
    parts = []
    for number, (batch, place) in enumerate(zip(batches, places, strict=True)):
        scores = forward(batch)
        if batch.filler:
            loss = 0.0 * scores.sum()
        elif gradient is None:
            loss = pair_loss(scores, batch.prompts)
        else:
            # Its value means nothing; its gradient is that of the loss of whole groups.
            loss = (scores * gradient[place.to(scores.device)]).sum()
        state.discriminator.backward(loss, last=number == len(batches) - 1)
        parts.append(scores.detach())
    scores = _in_order(batches, places, parts).cpu()
    _hand_out(pair_loss, scores)
    return {**_sums(pair_loss, scores, pairs), "computed": computed}


def _places(batch: MicroBatch, responses: list[list[torch.Tensor]]) -> torch.Tensor:
    """Where a micro-batch's responses stand among those of the whole step, group after group."""
    starts = list(accumulate((len(own) for own in responses), initial=0))
    pairs = zip(batch.prompts, batch.responses, strict=True)
    return torch.tensor([starts[i] + r for i, own in pairs for r in own])


def _in_order(batches: list[MicroBatch], places: list[torch.Tensor], parts: list[torch.Tensor]) -> torch.Tensor:
    """Scores of the whole step, group after group."""
    real = [number for number, batch in enumerate(batches) if not batch.filler]
    scores = torch.cat([parts[number] for number in real])
    order = torch.cat([places[number] for number in real]).to(scores.device)
    return torch.empty_like(scores).index_copy_(0, order, scores)


def _hand_out(pair_loss: _PairLoss, scores: torch.Tensor) -> None:
    """Leave the scores in the groups as rewards; a question without a teacher has no discriminator reward."""
    students, teachers = pair_loss.sides(scores, pair_loss.all_groups)
    students = students.split([len(group.rollouts) for group in pair_loss.groups])
    teachers = teachers.split([len(group.kept) for group in pair_loss.groups])
    for group, rollout_scores, teacher_scores in zip(pair_loss.groups, students, teachers, strict=True):
        group.d_score = rollout_scores.float() if group.kept else torch.zeros(len(rollout_scores))
        group.teacher_d_score = teacher_scores.float()


TIE = 1e-5


def _sums(pair_loss: _PairLoss, scores: torch.Tensor, pairs: Pairs) -> dict[str, float]:
    """This process's sums for `judge_metrics`."""
    students, teachers = (side.double() for side in pair_loss.sides(scores, pair_loss.all_groups))
    margin = teachers[pairs.teacher_index] - students[pairs.student_index]
    weight = pairs.pair_weight.double()
    sums = {
        "d_loss": pair_loss(scores, pair_loss.all_groups),
        "d_students": len(students),
        "d_teachers": len(teachers),
        "d_score_student": students.sum(),
        "d_score_teacher": teachers.sum(),
        "d_weight": weight.sum(),
        # Equal texts score the same up to rounding: a tie counts half, as in the area under a ROC curve.
        "d_correct": (weight * ((margin > TIE) + 0.5 * (margin.abs() <= TIE))).sum(),
        "d_margin": (weight * margin).sum(),
    }
    lengths = torch.tensor([len(ids) for judged in pair_loss.judged for ids in judged.responses])
    lengths = torch.cat(pair_loss.sides(lengths, pair_loss.all_groups))
    sizes = [[len(group.rollouts) for group in pair_loss.groups], [len(group.kept) for group in pair_loss.groups]]
    question = torch.cat([torch.arange(len(side)).repeat_interleave(torch.tensor(side)) for side in sizes])
    sums |= length_sums(lengths, torch.cat([students, teachers]), question)
    return {name: float(value) for name, value in sums.items()}


def length_sums(lengths: torch.Tensor, scores: torch.Tensor, question: torch.Tensor) -> dict[str, float]:
    """Return this process's sums for `length_correlation`, centred within each question.

    A question with long answers and high scores is no sign of a length bias, so only the differences between the
    responses to one question count.

    Args:
        lengths, scores: of all responses that D reads, rollouts and teacher responses, [R].
        question: index of each response's question, int64 [R].
    """
    x, y = (_centred(values.double(), question) for values in (lengths, scores))
    return {"d_xx": float(x.square().sum()), "d_yy": float(y.square().sum()), "d_xy": float((x * y).sum())}


def _centred(values: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(question)
    means = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, question, values) / counts
    return values - means[question]


def length_correlation(sums: dict[str, float]) -> float | None:
    """Return the correlation between length and score within questions; None where one of them does not differ."""
    responses = sums["d_students"] + sums["d_teachers"]
    if sums["d_xx"] == 0 or sums["d_yy"] <= responses * TIE**2:
        return None
    return sums["d_xy"] / (sums["d_xx"] * sums["d_yy"]) ** 0.5


def judge_metrics(sums: dict[str, float]) -> dict[str, float | None]:
    """Means over the global batch, by the names of metrics.jsonl; pairs weigh as much as in the loss.

    None stands for what a step does not tell: without a pair there is no accuracy.
    """

    def mean(total: str, count: str) -> float | None:
        return sums[total] / sums[count] if sums[count] else None

    return {
        "discriminator/loss": sums["d_loss"],
        "discriminator/pair_accuracy": mean("d_correct", "d_weight"),
        "discriminator/margin": mean("d_margin", "d_weight"),
        "discriminator/length_correlation": length_correlation(sums),
        "discriminator/score_student": mean("d_score_student", "d_students"),
        "discriminator/score_teacher": mean("d_score_teacher", "d_teachers"),
    }
