"""GRPO in a plain PyTorch loop, with a policy loss that never stores the logits of the whole batch.

A tiny language model learns to write even tokens. Replace `build_model` and `reward` with your own; the rest stays.

    python examples/grpo_loop.py        # a few seconds on a CPU
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rmsd_fast.losses import linear_logprob, linear_policy_loss
from rmsd_fast.method.advantages import group_advantages

VOCABULARY, PAD, END = 64, 0, 1
STEPS, PROMPTS, ROLLOUTS, LONGEST = 40, 4, 8, 12
TEMPERATURE = 1.0


def build_model() -> Qwen3ForCausalLM:
    """Return a language model with random weights. In your loop, use AutoModelForCausalLM.from_pretrained(...)."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen3ForCausalLM(config)


def reward(responses: Tensor, written: Tensor) -> Tensor:
    """Return the share of even tokens of each response. responses, written: [B, R]; written is False in padding."""
    return ((responses % 2 == 0) & written).sum(1) / written.sum(1)


@torch.no_grad()
def roll_out(model: Qwen3ForCausalLM, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Return ROLLOUTS responses per prompt [B, R], and which of their tokens were generated."""
    # Top-p and top-k are off, because the loss scores the distribution that was sampled from.
    rows = model.generate(
        prompts.repeat_interleave(ROLLOUTS, 0),
        attention_mask=torch.ones_like(prompts).repeat_interleave(ROLLOUTS, 0),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LONGEST,
    )
    responses = rows[:, prompts.shape[1] :]
    ends_before = (responses == END).cumsum(1) - (responses == END).long()
    return responses, ends_before == 0


def predicting_states(model: Qwen3ForCausalLM, rows: Tensor, attention: Tensor, length: int) -> Tensor:
    """Return the hidden states [B * R, D] that predict the last `length` tokens of each row."""
    # Run the body without its head, because these losses avoid the logits [B, L, V].
    hidden = model.model(input_ids=rows, attention_mask=attention).last_hidden_state
    # The state at t predicts the token at t + 1.
    return hidden[:, -length - 1 : -1].flatten(0, 1)


def main() -> tuple[float, float]:
    """Train, and return the mean reward of the first and of the last five steps."""
    torch.manual_seed(0)
    policy = build_model()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    history = []
    for step in range(STEPS):
        prompts = torch.randint(2, VOCABULARY, (PROMPTS, 6))
        responses, written = roll_out(policy, prompts)
        rewards = reward(responses, written)
        # Advantages are normalized among the rollouts of one prompt. A group with equal rewards gets zeros.
        advantages = group_advantages(rewards.view(PROMPTS, ROLLOUTS)).flatten()

        rows = torch.cat([prompts.repeat_interleave(ROLLOUTS, 0), responses], 1)
        attention = torch.cat([torch.ones(len(rows), prompts.shape[1], dtype=torch.bool), written], 1)
        length = responses.shape[1]
        # Ignored rows are not part of any matrix product, so padding costs nothing in the head.
        targets = responses.masked_fill(~written, -100).flatten()
        with torch.no_grad():
            states = predicting_states(reference, rows, attention, length)
            ref_logp = linear_logprob(states, reference.lm_head.weight, targets, temperature=TEMPERATURE)
        loss, metrics = linear_policy_loss(
            predicting_states(policy, rows, attention, length),
            policy.lm_head.weight,
            targets,
            advantages.repeat_interleave(length),
            # With one optimizer step per batch, old_logp is not needed: the ratio is 1 and its gradient stays.
            ref_logp=ref_logp,
            kl="k3",
            kl_coef=1e-3,
            temperature=TEMPERATURE,
            # Divide by the count of the whole batch. All micro-batches get the same count, and their losses add up.
            normalizer=written.sum(),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(rewards.mean().item())
        if step % 10 == 0 or step == STEPS - 1:
            kl, entropy = metrics["kl"].item(), metrics["entropy"].item()
            print(f"step {step:2}  reward {history[-1]:.3f}  KL {kl:.4f}  entropy {entropy:.3f}")
    return sum(history[:5]) / 5, sum(history[-5:]) / 5


if __name__ == "__main__":
    first, last = main()
    print(f"mean reward: {first:.3f} in the first five steps, {last:.3f} in the last five")
