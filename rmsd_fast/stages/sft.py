"""Stage 1: imitation of T_best, L = -log pi(T_best | V, Q) (arXiv 2603.11423). Also the control of stage 2."""

from __future__ import annotations

from functools import partial

from rmsd_fast.config import RunConfig
from rmsd_fast.data.prompts import Prompt
from rmsd_fast.losses import linear_cross_entropy
from rmsd_fast.models.students import make_rows
from rmsd_fast.runtime.distributed import global_sum
from rmsd_fast.stages.state import RunState, StepResult, apply_or_discard, micro_batches, prompt_tokens


def step(state: RunState, prompts: list[Prompt], settings: RunConfig) -> StepResult:
    """One optimiser step on this process's prompts: mean cross entropy over all response tokens of the global batch."""
    responses = [_imitated(state, prompt) for prompt in prompts]
    tokens = sum(len(response) for response in responses)
    counts = global_sum({"response": tokens, "all": tokens + prompt_tokens(prompts)}, state.world)
    batches = micro_batches(list(zip(prompts, responses, strict=True)), settings.sft.micro_batch)
    head = partial(linear_cross_entropy, normalizer=counts["response"], ignore_index=None)
    total = 0.0
    with state.timer("forward_backward"):
        for number, batch in enumerate(batches):
            own = [prompt for prompt, _ in batch]
            rows = make_rows(own, [ids for _, ids in batch], range(len(own)), pad_id=state.builder.eos_id)
            loss = state.policy(own, rows.to(state.world.device), None, head)
            state.policy.backward(loss, last=number == len(batches) - 1)
            total += loss.detach()
    with state.timer("optimizer"):
        (norm,), skipped = apply_or_discard(state, [state.policy], settings)
    loss = global_sum({"loss": float(total)}, state.world)["loss"]
    return StepResult({"loss": loss, "grad_norm": norm, "tokens": counts["all"]}, skipped)


def _imitated(state: RunState, prompt: Prompt):
    targets = state.targets[prompt.question.id]
    return targets.token_ids[targets.imitate]
