"""Stage 1, and the control of stage 2: imitate teacher responses, L = -log pi(T | V, Q) (arXiv 2603.11423)."""

from __future__ import annotations

from functools import partial

import torch

from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_cross_entropy
from rmsd_fast.method.matching import uniform
from rmsd_fast.models.students import MediaFeatures
from rmsd_fast.runtime.process_group import global_sum
from rmsd_fast.setting_rules.uses import aligns_imitation
from rmsd_fast.stages.imitation import selected_answers
from rmsd_fast.stages.passes import passes
from rmsd_fast.stages.state import StageState, StepResult, apply_or_discard, encode_step
from rmsd_fast.stages.step_metrics import Metric, global_metrics


def step(state: StageState, prompts: list[Prompt], number: int) -> StepResult:
    """Run one optimizer step on this process's prompts: mean cross entropy over all response tokens of the batch.

    The mean is over the global batch.

    Args:
        state: state of the stage.
        prompts: prompts of this process.
        number: step within the stage, counted from 0. It chooses the questions that are shown with a hint.
    """
    # Under ZeRO-3, the tower's weights are available only inside the engine's forward.
    inside = state.train_vision or state.settings.runtime.zero_stage == 3
    features = None if inside else encode_step(state, prompts)
    responses, selected = _imitated(state, prompts, features)
    tokens = sum(len(ids) for answers in responses for ids in answers)
    copies = [len(prompt.input_ids) * len(answers) for prompt, answers in zip(prompts, responses, strict=True)]
    normalizer = global_sum({"tokens": tokens}, state.world)["tokens"]
    leads = None
    if state.hinted_share:
        prompts, leads = _with_hints(state, prompts, responses, number)
    head = partial(linear_cross_entropy, normalizer=normalizer, ignore_index=None)
    total, computed = 0.0, 0
    with state.timer("forward_backward"):
        for step_pass in passes(state, prompts, responses, features, leads):
            loss = state.policy(step_pass.prompts, step_pass.rows, step_pass.features, head)
            step_pass.backward(state.policy, loss)
            total += 0.0 if step_pass.filler else loss.detach()
            computed += step_pass.rows.input_ids.numel()
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard([state.policy])
    record = {**selected, "loss": total, "tokens": tokens + sum(copies), "tokens_computed": computed}
    return StepResult({**global_metrics(record, state.world), "grad_norm": norm}, skipped)


def _with_hints(
    state: StageState, prompts: list[Prompt], responses: list[list[torch.Tensor]], number: int
) -> tuple[list[Prompt], list[list[torch.Tensor]]]:
    """Return the prompts up to the end of the user's text, and what precedes each of their responses.

    This is the end of the turn. For a share of the questions, which each step draws again, one of their hints is before
    it.
    """
    most, seed = state.settings.self_teacher.max_hint_tokens, state.settings.seed
    bodies, leads = [], []
    for prompt, answers in zip(prompts, responses, strict=True):
        identity = prompt.question.id
        body, tail = state.builder.split(prompt)
        texts = [hint.text for hint in state.hints[identity] if hint.text]
        if texts and uniform("hinted", seed, number, identity, index=0) < state.hinted_share:
            text = texts[int(uniform("hint", seed, number, identity, index=0) * len(texts))]
            tail = torch.cat([state.builder.encode_hint(text, max_tokens=most), tail])
        bodies.append(body)
        leads.append([tail] * len(answers))
    return bodies, leads


def _imitated(
    state: StageState, prompts: list[Prompt], features: MediaFeatures | None
) -> tuple[list[list[torch.Tensor]], dict[str, Metric]]:
    """Return the token ids of each prompt's imitated responses, and the metrics of their choice."""
    if aligns_imitation(state.settings):
        answers, record = selected_answers(state, prompts, features)
        return [[] if answer is None else [answer] for answer in answers], record
    targets = [state.targets[prompt.question.id] for prompt in prompts]
    return [[state.builder.encode_response(t.answers[k].text) for k in t.imitate] for t in targets], {}
