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
    rows_tokens = sum(len(prompt.input_ids) * len(own) for prompt, own in zip(prompts, responses, strict=True))
    counts = global_sum(
        {
            "response": tokens,
            "all": tokens + rows_tokens,
            "unique": tokens + sum(len(prompt.input_ids) for prompt in prompts),
        },
        state.world,
    )
    features = None
    if not train_vision:
        with state.policy.full_weights():
            features = encode_step(state, prompts)
    batches = micro_batches(state, prompts, responses, settings)
    head = partial(linear_cross_entropy, normalizer=counts["response"], ignore_index=None)
    total = 0.0
    with state.timer("forward_backward"):
        for number, batch in enumerate(batches):
            rows = rows_of(state, batch, prompts, responses, settings)
            own = [prompts[i] for i in batch.prompts]
            loss = state.policy(own, rows, select_features(features, batch.prompts), head)
            loss = 0.0 * loss if batch.filler else loss
            state.policy.backward(loss, last=number == len(batches) - 1)
            total += loss.detach()
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard(state, [state.policy], settings)
    loss = global_sum({"loss": float(total)}, state.world)["loss"]
    metrics = {"loss": loss, "grad_norm": norm, "tokens": counts["all"], "tokens_unique": counts["unique"]}
    return StepResult(metrics, skipped)


def _imitated(state: RunState, prompt: Prompt):
    targets = state.targets[prompt.question.id]
    return [targets.token_ids[k] for k in targets.imitate]
