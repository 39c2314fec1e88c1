"""Several answers per question in one packed pass: LoRA adapters on a text model, trained by a plain loop.

A tiny Qwen3 with random weights computes each question once for all of its answers. At the end, the log-probs are
compared with those of separate rows.

    python examples/shared_prefix_text.py        # some seconds on a CPU; needs peft
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rmsd_fast.losses import linear_cross_entropy, linear_logprob
from rmsd_fast.models.shared_prefix import (
    disable_shared_prefix,
    enable_shared_prefix,
    run_shared_prefix,
    text_positions,
)
from rmsd_kernels import SharedPrefixPlan

STEPS = 20
END = 0
# Replace these samples with your own questions and the answers to imitate.
SAMPLES = {
    "What does the red square do after the blue circle stops?": ["It moves left.", "It goes left.", "Left."],
    "How many circles are there in the first half of the text?": ["There are two circles.", "Two."],
}


def build_model() -> Qwen3ForCausalLM:
    """Return a language model with random weights. In your code, use AutoModelForCausalLM.from_pretrained(...)."""
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        # The logits are wide, so that adapters alone can learn the answers.
        initializer_range=0.1,
    )
    return Qwen3ForCausalLM(config)


def tokenize(text: str) -> Tensor:
    """Return the bytes of a text. In your code, use the tokenizer with its chat template."""
    return torch.tensor(list(text.encode()))


def pack() -> tuple[SharedPrefixPlan, Tensor, Tensor]:
    """Return the layout of the packed row, its token ids [1, T] and the concatenated tokens of the answers [S]."""
    questions = [tokenize(question) for question in SAMPLES]
    answers = [[torch.cat([tokenize(text), torch.tensor([END])]) for text in group] for group in SAMPLES.values()]
    plan = SharedPrefixPlan.from_lengths([len(ids) for ids in questions], [[len(ids) for ids in g] for g in answers])
    targets = torch.cat([ids for group in answers for ids in group])
    return plan, torch.cat([*questions, targets])[None], targets


def predicting_states(model: PeftModel, plan: SharedPrefixPlan, ids: Tensor) -> Tensor:
    """Return for each token of an answer the hidden state that predicts it, [S, D]."""
    # Take the transformers model inside peft's wrapper, whose layers have the adapters.
    body = model.get_base_model().model
    hidden = run_shared_prefix(body, plan, input_ids=ids, position_ids=text_positions(plan))
    # The last row of a question predicts the first token of each answer. The plan gives the predicting rows.
    return hidden[0, plan.predicting_rows()]


def separate_logprobs(model: PeftModel) -> Tensor:
    """Return the answers' log-probs [S] from one row per answer, through peft's forward pass."""
    found = []
    for question, answers in SAMPLES.items():
        for answer in answers:
            prompt = tokenize(question)
            targets = torch.cat([tokenize(answer), torch.tensor([END])])
            logits = model(input_ids=torch.cat([prompt, targets])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(found)


def main() -> tuple[float, float, float]:
    """Train, and return the first loss, the last loss, and the largest difference to the log-probs of separate rows."""
    torch.manual_seed(0)
    # "all-linear" excludes the head, whose weight the loss reads directly.
    model = get_peft_model(build_model(), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    head = model.get_base_model().lm_head.weight
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    plan, ids, targets = pack()
    separate = sum(len(question) * len(answers) for question, answers in SAMPLES.items()) + len(targets)
    print(f"{plan.tokens} tokens in the packed row, {separate} in separate rows")

    # Enable after adding the adapters, because this call checks that the adapters are supported.
    enable_shared_prefix(model)
    losses = []
    for _ in range(STEPS):
        loss = linear_cross_entropy(predicting_states(model, plan, ids), head, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    with torch.no_grad():
        packed = linear_logprob(predicting_states(model, plan, ids), head, targets)
        # Restore the model's own attention for generate(), evaluation and everything else.
        disable_shared_prefix(model)
        return losses[0], losses[-1], (packed - separate_logprobs(model)).abs().max().item()


if __name__ == "__main__":
    first, last, apart = main()
    print(f"loss {first:.2f} in the first step, {last:.2f} in the last; difference to separate rows: {apart:.1e}")
