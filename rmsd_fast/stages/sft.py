"""Stage 1: imitation of teacher responses, L = -log pi(T | V, Q) (arXiv 2603.11423). Also the control of stage 2."""

from __future__ import annotations

from functools import partial

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_cross_entropy
from rmsd_fast.runtime.distributed import global_sum
from rmsd_fast.stages.state import (
    RunState,
    StepResult,
    apply_or_discard,
    encode_step,
    micro_batches,
    rows_of,
    select_features,
)


def step(state: RunState, prompts: list[Prompt], settings: RunConfig, *, train_vision: bool) -> StepResult:
    """One optimiser step on this process's prompts: mean cross entropy over all response tokens of the global batch."""
    responses = [_imitated(state, prompt) for prompt in prompts]
    tokens = sum(len(ids) for own in responses for ids in own)
    samples = tokens + sum(len(prompt.input_ids) * len(own) for prompt, own in zip(prompts, responses, strict=True))
    counts = global_sum({"response": tokens, "samples": samples}, state.world)
    # Under ZeRO-3 the tower's weights are there within the engine's forward alone.
    features = None if train_vision or settings.runtime.zero_stage == 3 else encode_step(state, prompts, settings)
    batches = micro_batches(state, prompts, responses, settings)
    head = partial(linear_cross_entropy, normalizer=counts["response"], ignore_index=None)
    total, computed = 0.0, 0
    with state.timer("forward_backward"):
        for number, batch in enumerate(batches):
            rows = rows_of(state, batch, prompts, responses, settings)
            own = [prompts[i] for i in batch.prompts]
            loss = state.policy(own, rows, select_features(features, batch.prompts), head)
            loss = 0.0 * loss if batch.filler else loss
            state.policy.backward(loss, last=number == len(batches) - 1)
            total += loss.detach()
            computed += rows.input_ids.numel()
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard([state.policy])
    sums = global_sum({"loss": float(total), "computed": computed}, state.world)
    metrics = {
        "loss": sums["loss"],
        "grad_norm": norm,
        "tokens": counts["samples"],
        "tokens_computed": sums["computed"],
    }
    return StepResult(metrics, skipped)


def _imitated(state: RunState, prompt: Prompt):
    targets = state.targets[prompt.question.id]
    return [state.builder.encode_response(targets.answers[k].text) for k in targets.imitate]
