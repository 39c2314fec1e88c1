"""Stage 2 (adversarial distillation) and the discriminator's warm-up before it (arXiv 2603.11423).

One step: vision once per video -> rollouts -> matching -> one discriminator forward for rewards and L_D -> log-probs
under self-teacher and reference -> policy forward and backward -> both optimizer steps, or none.
"""

from __future__ import annotations

from rmsd_fast.config import ACCURACY_STEPS
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import Rollout, Sampling
from rmsd_fast.runtime.process_group import any_rank, global_sum
from rmsd_fast.setting_rules.uses import (
    compared_tokens,
    distills_vocabulary,
    imitates_in_stage2,
    teaches,
    uses_discriminator,
    warm_up_steps,
    weights_tokens,
)
from rmsd_fast.stages.degeneration import degeneration_record
from rmsd_fast.stages.discriminator_pass import discriminator_pass
from rmsd_fast.stages.feedback import set_hints
from rmsd_fast.stages.groups import RolloutGroup, group_record, make_group, quality_record, set_advantages
from rmsd_fast.stages.imitation import imitated_tokens, set_imitated
from rmsd_fast.stages.parity import check_parity
from rmsd_fast.stages.policy_pass import policy_pass, reference_pass
from rmsd_fast.stages.state import StageState, StepResult, apply_or_discard, encode_step
from rmsd_fast.stages.step_metrics import global_metrics
from rmsd_fast.stages.teach import teach
from rmsd_fast.stages.token_credit import set_token_advantages
from rmsd_fast.stages.top_tokens import read_top_tokens
from rmsd_fast.stages.uncertainty import WeighedStep, learn_weights, weigh_terms
from rmsd_fast.stages.vocabulary import Distilled


def warm_up_step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run one optimizer step of the discriminator on rollouts of a fixed policy.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        number: step within the warm-up, counted from 0.
    """
    settings = state.settings
    rollouts, features = roll_out(state, prompts, number)
    if rollouts is None:
        return StepResult({"tokens": 0}, skipped=True)
    parity = check_parity(state, prompts, rollouts, features, number)
    with state.timer("matching"):
        groups = [
            make_group(prompt, drawn, state.targets[prompt.question.id], settings, step=number)
            for prompt, drawn in zip(prompts, rollouts, strict=True)
        ]
    with state.timer("discriminator"):
        scored, teacher_tokens, computed = discriminator_pass(state, groups, features)
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard([state.discriminator])
    work = {"tokens": _rollout_tokens(groups) + teacher_tokens, "tokens_computed": computed}
    described = {**group_record(groups, settings), **degeneration_record(groups, state.builder)}
    metrics = global_metrics({**scored, **described, **work}, state.world)
    finished = _has_learned(state, metrics["discriminator/pair_accuracy"])
    return StepResult({**metrics, **parity, "discriminator/grad_norm": norm}, skipped, groups, finished)


def forecast(state: StageState, prompts: list[Prompt]) -> dict[str, float | None] | None:
    """Return the metrics that show what stage 2 can gain, from the rollouts of one batch and without training.

    Args:
        state: state of the stage.
        prompts: prompts of this process, for instance those of the first step.
    Returns:
        The metrics over all processes; None if the student's logits are not finite.
    """
    rollouts, _ = roll_out(state, prompts, 0)
    if rollouts is None:
        return None
    groups = [
        make_group(prompt, drawn, state.targets[prompt.question.id], state.settings, step=0)
        for prompt, drawn in zip(prompts, rollouts, strict=True)
    ]
    return global_metrics(quality_record(groups), state.world)


def _has_learned(state: StageState, accuracy: float | None) -> bool:
    """Return whether the pair accuracy, averaged over the latest steps, has reached `discriminator.warm_up_accuracy`.

    Each step measures it before the update, on questions that the discriminator has not been trained on in this epoch.
    """
    enough = state.settings.discriminator.warm_up_accuracy
    if enough is None or accuracy is None:
        return False
    state.accuracies = [*state.accuracies, accuracy][-ACCURACY_STEPS:]
    return len(state.accuracies) == ACCURACY_STEPS and sum(state.accuracies) / ACCURACY_STEPS >= enough


def step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run one optimizer step of policy and discriminator.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        number: step within stage 2, counted from 0.
    """
    settings = state.settings
    # The step number that seeds rollouts and matches continues from the warm-up, so that no draws are repeated.
    rollout_step = warm_up_steps(settings) + number
    rollouts, features = roll_out(state, prompts, rollout_step)
    if rollouts is None:
        return StepResult({"tokens": 0}, skipped=True)
    parity = check_parity(state, prompts, rollouts, features, number)
    with state.timer("matching"):
        groups = [
            make_group(prompt, drawn, state.targets[prompt.question.id], settings, step=rollout_step)
            for prompt, drawn in zip(prompts, rollouts, strict=True)
        ]
    selected = set_imitated(state, groups, features) if imitates_in_stage2(settings) else {}
    # Sum here, while the device is idle. Between reference and policy, the sum would wait for the reference's passes.
    counts = global_sum(
        {
            "tokens": sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts),
            "sequences": sum(len(group.rollouts) for group in groups),
            "imitated": sum(len(group.imitated) for group in groups if group.imitated is not None),
        },
        state.world,
    )
    engines, scored = [state.policy], {}
    tokens, computed = _rollout_tokens(groups) + imitated_tokens(groups), 0
    if uses_discriminator(settings):
        with state.timer("discriminator"):
            scored, teacher_tokens, computed = discriminator_pass(state, groups, features)
        # The discriminator reads the rollouts again.
        tokens += _rollout_tokens(groups) + teacher_tokens
        engines.append(state.discriminator)
    hinted = set_hints(state, groups, step=number)
    distilled = _ask_teacher(state, groups, features, number) if teaches(settings, number) else None
    with state.timer("reference"):
        policy_passes = reference_pass(state, groups, features)
    for group in groups:
        set_advantages(group, settings)
    credited = set_token_advantages(groups, settings, step=number) if weights_tokens(settings) else {}
    weighed = None if state.term_weights is None else weigh_terms(state, groups, features, counts)
    with state.timer("policy"):
        trained, trained_tokens = policy_pass(state, groups, policy_passes, counts, weighed, distilled)
    with state.timer("optimizer"):
        norms, skipped = apply_or_discard(engines)
        if not skipped:
            _follow(state, weighed, number)
    work = {"tokens": tokens, "tokens_computed": computed + trained_tokens}
    described = {**group_record(groups, settings), **degeneration_record(groups, state.builder)}
    learned = {} if weighed is None else weighed.record
    record = {**described, **trained, **hinted, **credited, **selected, **learned, **work, **scored}
    metrics = global_metrics(record, state.world)
    metrics["policy/grad_norm"] = norms[0]
    if scored:
        metrics["discriminator/grad_norm"] = norms[1]
    return StepResult({**metrics, **parity}, skipped, groups)


def _ask_teacher(
    state: StageState, groups: list[RolloutGroup], features: MediaFeatures | None, number: int
) -> Distilled | None:
    """Store what the self-teacher says about the rollouts in the groups; return its distributions if they are used."""
    with state.timer("teacher"):
        top, student_top = compared_tokens(state.settings, number)
        head = teach(state, groups, features, top=top)
        if top:
            read_top_tokens(state, groups, features, top=top, student_top=student_top)
    return Distilled(head) if distills_vocabulary(state.settings, number) else None


def _follow(state: StageState, weighed: WeighedStep | None, number: int) -> None:
    """Update what follows the policy after each of its steps: learned weights of terms, and the moving average."""
    if weighed is not None:
        learn_weights(state, weighed)
    # After the last step with the self-teacher, nothing reads the average.
    due = (number + 1) % state.settings.self_teacher.ema_every == 0 and teaches(state.settings, number + 1)
    if state.average is not None and due:
        state.average.update()


def roll_out(
    state: StageState, prompts: list[Prompt], rollout_step: int
) -> tuple[list[list[Rollout]] | None, MediaFeatures | None]:
    """Return the rollouts of each prompt, and the vision features that all three models share.

    The features are None if each model encodes its own. If the policy's logits were not finite on any process, both
    results are None on all processes.
    """
    settings = state.settings
    sampling = Sampling(
        n=settings.rollout.n,
        temperature=settings.rollout.temperature,
        max_new_tokens=settings.rollout.max_new_tokens,
        seed=settings.seed,
        step=rollout_step,
    )
    state.policy.module.activate()
    with state.timer("sync"):
        state.rollouts.update(state.policy, rollout_step)
    # An engine with its own weights needs only the vision features of the training model.
    with state.policy.full_weights(None if state.rollouts.runs_policy else state.student.model.model.visual):
        features = encode_step(state, prompts)
        with state.timer("rollout"):
            rollouts = state.rollouts.generate(
                state.student.model, prompts, sampling, features=features, policy_version=rollout_step
            )
    if state.dump is not None:
        with state.timer("rollout"):
            # The rollouts of the forecast are those of the first step, which writes them again.
            state.dump.write(rollouts, rollout_step)
    if any_rank(not all(rollout.finite for drawn in rollouts for rollout in drawn), state.world):
        return None, None
    return rollouts, None if state.train_vision else features


def _rollout_tokens(groups: list[RolloutGroup]) -> int:
    """Count the tokens of the rollouts without sharing: each rollout with its own prompt."""
    return sum(len(group.prompt.input_ids) + len(rollout.token_ids) for group in groups for rollout in group.rollouts)
