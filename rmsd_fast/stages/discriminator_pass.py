"""Run the discriminator in stage 2 and its warm-up: one forward pass gives rewards and loss (arXiv 2603.11423)."""

from __future__ import annotations

from itertools import accumulate

import torch

from rmsd_fast.config import RunConfig
from rmsd_fast.data.transfer import to_device
from rmsd_fast.losses import pairwise_discriminator_loss
from rmsd_fast.method.matching import Pairs
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.process_group import global_sum
from rmsd_fast.stages.groups import DistinctTexts, RolloutGroup, distinct_texts, make_order_pairs, make_pairs
from rmsd_fast.stages.passes import Pass, passes
from rmsd_fast.stages.state import StageState
from rmsd_fast.stages.step_metrics import Metric, mean

# Margins up to this size count as ties. Equal texts of a group share one score, so their margin is exactly 0.
TIE = 1e-5


def discriminator_pass(
    state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None
) -> tuple[dict[str, Metric], int, int]:
    """Score every distinct response of the step once, back-propagate L_D, and store the scores in the groups.

    The scores are used in the rewards of the rollouts. After the call, the engine's gradients are complete but not
    applied, so the scores come from the weights before the update. If a group is split over several micro-batches, its
    pair loss needs the scores of all of them. In this case, all processes first run an additional pass without
    gradients.

    Returns:
        This process's part of the metrics, the number of tokens of the teacher responses, each with its own prompt,
        and the number of tokens that the model processed.
    """
    settings, engine = state.settings, state.discriminator
    texts = [distinct_texts(group, state.builder) for group in groups]
    responses = [distinct.responses for distinct in texts]
    step_passes = list(passes(state, [group.prompt for group in groups], responses, features))
    positions = [_positions(step_pass, responses) for step_pass in step_passes]
    pairs = make_pairs(groups, settings)
    counts = global_sum(
        {
            "pairs": pairs.normalizer,
            "quality": float((pairs.pair_weight * pairs.quality).sum()),
            "scores": sum(len(group.rollouts) + len(group.kept) for group in groups),
            "split": sum(_is_split(step_pass, responses) for step_pass in step_passes),
        },
        state.world,
    )
    split = counts["split"] > 0
    if split:
        with torch.no_grad():
            scores = _in_order(
                step_passes,
                positions,
                [engine(step_pass.prompts, step_pass.rows, step_pass.features) for step_pass in step_passes],
            )
        scores.requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(scores, texts, groups, settings, counts), scores)
    scored = []
    for step_pass, pass_positions in zip(step_passes, positions, strict=True):
        scores = engine(step_pass.prompts, step_pass.rows, step_pass.features)
        if step_pass.filler:
            loss = scores.sum()
        elif split:
            # Only the gradient of this value is meaningful: it equals the gradient of the loss over whole groups.
            loss = (scores * gradient[pass_positions]).sum()
        else:
            chosen = step_pass.batch.prompts
            loss = _loss(scores, [texts[i] for i in chosen], [groups[i] for i in chosen], settings, counts)
        step_pass.backward(engine, loss)
        scored.append(scores.detach())
    scores = _in_order(step_passes, positions, scored).cpu()
    _hand_out(scores, groups, texts)
    record = {
        "discriminator/loss": _loss(scores, texts, groups, settings, counts),
        **_record(scores, texts, pairs),
        "discriminator/content_correlation": (correlation, *_content_sums(groups)),
    }
    computed = sum(step_pass.rows.input_ids.numel() for step_pass in step_passes) * (2 if split else 1)
    teacher_tokens = sum(
        len(group.prompt.input_ids) + len(distinct.responses[index])
        for group, distinct in zip(groups, texts, strict=True)
        for index in distinct.teachers
    )
    return record, teacher_tokens, computed


def _loss(
    scores: torch.Tensor,
    texts: list[DistinctTexts],
    groups: list[RolloutGroup],
    settings: RunConfig,
    counts: dict[str, float],
) -> torch.Tensor:
    """Return the contribution of the given groups to L_D; the loss is the sum over all groups and processes.

    Args:
        scores: scores of the distinct texts, group after group, [R].
        texts: distinct texts of these groups.
        groups: these groups.
        settings: settings of the run.
        counts: normalizers of L_D over the global batch: pairs, their qualities, and scores of both sides.
    """
    cfg = settings.discriminator
    pairs = make_pairs(groups, settings)
    students, teachers, quality, weight, index = to_device([*pairs[:4], _index_of_sides(texts)], scores.device)
    sides = scores[index]
    normalizer = max(counts[cfg.normalizer], 1e-12)
    loss = pairwise_discriminator_loss(
        *sides.split([sum(len(t.students) for t in texts), sum(len(t.teachers) for t in texts)]),
        students,
        teachers,
        quality,
        pair_weight=weight,
        normalizer=normalizer,
        score_l2=cfg.score_l2,
        l2_normalizer=counts["scores"],
    ).loss
    if cfg.order_weight:
        worse, better, gap, weight = to_device([*make_order_pairs(groups)[:4]], scores.device)
        ordered = pairwise_discriminator_loss(
            sides, sides, worse, better, gap, pair_weight=weight, normalizer=normalizer
        ).loss
        loss = loss + cfg.order_weight * ordered
    return loss


def _index_of_sides(texts: list[DistinctTexts]) -> torch.Tensor:
    """Return the index among the distinct texts of each rollout, then of each kept teacher response, int64."""
    students, teachers, start = [], [], 0
    for distinct in texts:
        students += [start + index for index in distinct.students]
        teachers += [start + index for index in distinct.teachers]
        start += len(distinct.responses)
    return torch.tensor(students + teachers, dtype=torch.int64)


def _is_split(step_pass: Pass, responses: list[list[torch.Tensor]]) -> bool:
    """Return whether a pass reads only some of a group's responses."""
    pairs = zip(step_pass.batch.prompts, step_pass.batch.responses, strict=True)
    return not step_pass.filler and any(len(chosen) < len(responses[i]) for i, chosen in pairs)


def _positions(step_pass: Pass, responses: list[list[torch.Tensor]]) -> torch.Tensor:
    """Return the index of each response of a pass among all responses of the step, int64, on the pass's device."""
    starts = list(accumulate(map(len, responses), initial=0))
    positions = torch.tensor([starts[i] + r for i, r in step_pass.indices])
    return to_device([positions], step_pass.rows.input_ids.device)[0]


def _in_order(step_passes: list[Pass], positions: list[torch.Tensor], scores: list[torch.Tensor]) -> torch.Tensor:
    """Return the scores of the whole step, group after group, from the scores of its passes."""
    real = [number for number, step_pass in enumerate(step_passes) if not step_pass.filler]
    joined = torch.cat([scores[number] for number in real])
    order = torch.cat([positions[number] for number in real])
    return torch.empty_like(joined).index_copy_(0, order, joined)


def _hand_out(scores: torch.Tensor, groups: list[RolloutGroup], texts: list[DistinctTexts]) -> None:
    """Store the scores in the groups. A question without a teacher response has no discriminator reward."""
    sizes = [len(group.rollouts) for group in groups] + [len(group.kept) for group in groups]
    sides = scores[_index_of_sides(texts)].float().split(sizes)
    for group, student_scores, teacher_scores in zip(groups, sides[: len(groups)], sides[len(groups) :], strict=True):
        group.d_score = student_scores if group.kept else torch.zeros(len(student_scores))
        group.teacher_d_score = teacher_scores


def _record(scores: torch.Tensor, texts: list[DistinctTexts], pairs: Pairs) -> dict[str, Metric]:
    """Return this process's part of the score metrics, with pairs weighted as in the loss. All tensors are on CPU."""
    sizes = [[len(t.students) for t in texts], [len(t.teachers) for t in texts]]
    index, weight = _index_of_sides(texts), pairs.pair_weight.double()
    both = scores[index].double()
    students, teachers = both.split([sum(sizes[0]), sum(sizes[1])])
    margin = teachers[pairs.teacher_index] - students[pairs.student_index]
    # A tie counts as half, as in the area under a ROC curve.
    correct = (margin > TIE) + 0.5 * (margin.abs() <= TIE)
    lengths = torch.tensor([len(ids) for distinct in texts for ids in distinct.responses])[index]
    question = torch.cat([torch.arange(len(side)).repeat_interleave(torch.tensor(side)) for side in sizes])
    return {
        "discriminator/pair_accuracy": (mean, (weight * correct).sum(), weight.sum()),
        "discriminator/margin": (mean, (weight * margin).sum(), weight.sum()),
        "discriminator/length_correlation": (correlation, *sums_within_questions(lengths, both, question)),
        "discriminator/score_student": (mean, students.sum(), len(students)),
        "discriminator/score_teacher": (mean, teachers.sum(), len(teachers)),
    }


def sums_within_questions(
    values: torch.Tensor, scores: torch.Tensor, question: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return this process's sums for the `correlation` of values and scores, centered within each question.

    A question whose answers are long and score high is not evidence of a length bias, so only differences between
    responses to the same question are used.

    Args:
        values: a property of each response, such as its length, [R].
        scores: discriminator scores of these responses, [R].
        question: index of each response's question, int64 [R].
    Returns:
        Sums of the squared values, of the squared scores and of their products, and R.
    """
    x, y = (_centered(of_response.double(), question) for of_response in (values, scores))
    return x.square().sum(), y.square().sum(), (x * y).sum(), len(scores)


def _content_sums(groups: list[RolloutGroup]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return the sums for the correlation of content reward and score among the rollouts to a ground truth."""
    scored = [group for group in groups if group.kept and group.prompt.question.has_truth]
    if not scored:
        return (*(torch.zeros((), dtype=torch.float64),) * 3, 0)
    question = torch.arange(len(scored)).repeat_interleave(torch.tensor([len(group.rollouts) for group in scored]))
    content, scores = (torch.cat([getattr(group, name) for group in scored]) for name in ("content", "d_score"))
    return sums_within_questions(content, scores, question)


def _centered(values: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(question)
    means = torch.zeros(len(counts), dtype=values.dtype).index_add_(0, question, values) / counts
    return values - means[question]


def correlation(xx: float, yy: float, xy: float, responses: float) -> float | None:
    """Return the correlation of values and scores within questions, or None if either is constant."""
    if xx == 0 or yy <= responses * TIE**2:
        return None
    return xy / (xx * yy) ** 0.5
