"""Check the rollout engine against the trainer: log-probs, media, and weights after an update."""

from __future__ import annotations

import dataclasses

import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.data.video import Frames
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.rollout.base import Rollout
from rmsd_fast.runtime.process_group import any_rank, global_sum
from rmsd_fast.stages import distill, sft
from rmsd_fast.stages.findings import Finding, Sample, Show
from rmsd_fast.stages.parity import LogProbs, Parity, bound_of, compare, recorded, score_rollouts
from rmsd_fast.stages.state import StageState, encode_step

# Learning rates of the steps after which an engine with old weights must be seen, until the change is large enough.
UPDATE_LRS = (1e-3, 1e-2, 1e-1)


def examine_rollouts(state: StageState, sample: Sample, show: Show) -> None:
    """Compare the log-probs of rollout engine and trainer, and check that both see the media."""
    prompts = sample.prompts
    rollouts, features = distill.roll_out(state, prompts, 0)
    if rollouts is None:
        show(Finding("log-probs", "fault", "the student's logits are not finite; use another model or model.dtype"))
        return
    together = score_rollouts(state, prompts, rollouts, features)
    noise = _noise(state, prompts, rollouts, features, together)
    text = f"the trainer with one question per pass against several: {noise.text()}"
    show(Finding("noise", "ok", text, dataclasses.asdict(noise)))
    show(_parity(state, "log-probs", rollouts, together))
    show(_media_seen(state, prompts, rollouts, together, noise))


def _noise(
    state: StageState,
    prompts: list[Prompt],
    rollouts: list[list[Rollout]],
    features: MediaFeatures | None,
    together: LogProbs,
) -> Parity:
    """Compare the trainer with itself: the same tokens, one question per pass. No engine can agree better than this."""
    alone: LogProbs = {}
    for i, (prompt, drawn) in enumerate(zip(prompts, rollouts, strict=True)):
        of_prompt = score_rollouts(state, [prompt], [drawn], None if features is None else features.select([i]))
        alone |= {(i, r): logp for (_, r), logp in of_prompt.items()}
    return compare(alone, together, state.world)


def _parity(state: StageState, name: str, rollouts: list[list[Rollout]], trainer: LogProbs) -> Finding:
    parity, bound = compare(trainer, recorded(rollouts), state.world), bound_of(state.settings)
    text = f"engine {state.settings.rollout.engine} against trainer: {parity.text()}"
    numbers = {**dataclasses.asdict(parity), "bound": bound}
    if parity.within(bound):
        return Finding(name, "ok", text, numbers)
    text += (
        f"\nexpected at most {bound:g} for each question: the engine has other weights, prompts or media than the "
        "trainer, or computes with less precision"
    )
    return Finding(name, "fault", text, numbers)


def _media_seen(
    state: StageState, prompts: list[Prompt], rollouts: list[list[Rollout]], trainer: LogProbs, noise: Parity
) -> Finding:
    """Give each prompt the pixels of other media. The trainer's log-probs must change, and the engine must follow.

    The engine follows if the log-probs of its new rollouts are those of the trainer with these media, and not those of
    the trainer with the former ones.
    """
    with_media = [i for i, prompt in enumerate(prompts) if prompt.media]
    if any_rank(not with_media, state.world):
        return Finding("media", "skipped", "some process has no question with media")
    before = [prompts[i] for i in with_media]
    others = [_with_other_media(prompt, prompts) for prompt in before]
    drawn, features = distill.roll_out(state, others, 0)
    if drawn is None:
        return Finding("media", "fault", "with other media, the student's logits are not finite")
    same_tokens = score_rollouts(state, others, [rollouts[i] for i in with_media], features)
    former = {(place, r): trainer[i, r] for place, i in enumerate(with_media) for r in range(len(rollouts[i]))}
    change = compare(former, same_tokens, state.world)
    engine = recorded(drawn)
    with_others = score_rollouts(state, others, drawn, features)
    with state.policy.full_weights(), torch.no_grad():
        features = encode_step(state, before)
    with_former = score_rollouts(state, before, drawn, None if state.train_vision else features)
    blind = sum(
        2 * _distance(with_former, engine, i) < _distance(with_others, engine, i) for i in range(len(with_media))
    )
    sums = global_sum({"blind": blind, "questions": len(with_media)}, state.world)
    numbers = {"trainer_change": change.mean, "engine_blind": sums["blind"], "questions": sums["questions"]}
    text = f"with other media, the trainer's log-probs of the same tokens change by {change.mean:.2g} on average"
    if not change.mean > 2 * noise.mean:
        return Finding("media", "fault", f"{text}, no more than the noise: the trainer does not see them", numbers)
    if sums["blind"]:
        text += f"; the engine's rollouts of {sums['blind']:.0f} of {sums['questions']:.0f} questions do not follow"
        return Finding("media", "fault", f"{text}: the engine does not see the media", numbers)
    return Finding("media", "ok", f"{text}, and the engine's rollouts follow", numbers)


def _distance(first: LogProbs, second: LogProbs, question: int) -> float:
    """Return the mean absolute difference over the rollouts of a question."""
    pairs = [(logp, second[place]) for place, logp in first.items() if place[0] == question]
    return float((torch.cat([a for a, _ in pairs]).double() - torch.cat([b for _, b in pairs]).double()).abs().mean())


def _with_other_media(prompt: Prompt, prompts: list[Prompt]) -> Prompt:
    """Return the prompt with the pixels of another question's media of the same size, or else with inverted pixels."""
    every = [frames for other in prompts for frames in other.media]

    def other(frames: Frames) -> Frames:
        for candidate in every:
            if candidate.pixels.shape == frames.pixels.shape and not torch.equal(candidate.pixels, frames.pixels):
                return dataclasses.replace(frames, pixels=candidate.pixels, key="")
        return dataclasses.replace(frames, pixels=255 - frames.pixels.flip(0), key="")

    return dataclasses.replace(prompt, media=tuple(map(other, prompt.media)))


def after_update(state: StageState, sample: Sample) -> Finding:
    """Change the policy's weights so much that old ones cannot pass for new ones, and compare the log-probs again."""
    name, bound = "new weights", bound_of(state.settings)
    rollouts, features = distill.roll_out(state, sample.prompts, 3)
    if rollouts is None:
        return Finding(name, "fault", "the student's logits are not finite")
    before = score_rollouts(state, sample.prompts, rollouts, features)
    for lr in UPDATE_LRS:
        state.policy.set_lr(lr)
        # Imitation always has a gradient. That of stage 2 is zero if all rollouts of a question earn the same reward.
        skipped = sft.step(state, sample.prompts, 3).skipped
        change = compare(before, score_rollouts(state, sample.prompts, rollouts, features), state.world)
        if skipped or change.mean > 3 * bound:
            break
    if skipped or not change.mean > 3 * bound:
        text = (
            f"the training steps changed the log-probs by {change.mean:.2g}, too little for an engine with old weights"
        )
        return Finding(name, "warning", f"not decided: {text} to be seen", {"change": change.mean})
    drawn, features = distill.roll_out(state, sample.prompts, 4)
    if drawn is None:
        return Finding(
            name, "warning", f"not decided: after a step at a learning rate of {lr:g}, logits are not finite"
        )
    found = _parity(state, name, drawn, score_rollouts(state, sample.prompts, drawn, features))
    text = f"{found.text}\nthe update has changed the log-probs of the earlier rollouts by {change.mean:.2g}"
    return dataclasses.replace(found, text=text, numbers={**found.numbers, "change": change.mean})
