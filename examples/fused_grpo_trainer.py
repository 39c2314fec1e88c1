"""TRL's GRPOTrainer with the fused losses: only an import and a class name change.

A tiny language model learns to write short responses. The example needs trl 1.16 and Python 3.11 or later.

    python examples/fused_grpo_trainer.py        # some seconds on a CPU
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig

# This import replaces: from trl import GRPOTrainer
from rmsd_fast.integrations.trl import FusedGRPOTrainer

WORDS = ("<pad>", "<end>", "a", "the", "red", "blue", "square", "circle", "moves", "left", "right", "stops")
STEPS = 16


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words. In your code, use AutoTokenizer.from_pretrained(...)."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="a", padding_side="left"
    )


def build_model() -> Qwen3ForCausalLM:
    """Return a language model with random weights. In your code, pass a name or a folder as GRPOTrainer's `model`."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config)


def reward_short(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Return a higher reward for a shorter completion."""
    return [-float(len(ids)) for ids in completion_ids]


def main() -> tuple[str, list[float]]:
    """Train, and return the objective that was used and the mean reward of each step."""
    torch.manual_seed(0)
    prompts = ["the red square moves", "a blue circle", "the circle stops left", "a square moves right"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=16,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = FusedGRPOTrainer(
            model=build_model(),
            reward_funcs=reward_short,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": prompts * 8}),
            processing_class=build_tokenizer(),
            # "policy" computes TRL's loss in one pass over the head, and "log_prob" is TRL's own loss on fused
            # log-probs. The default, "auto", chooses "policy" if the settings allow it.
            fused_objective="auto",
        )
        trainer.train()
    return trainer.fused_objective, [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


if __name__ == "__main__":
    objective, rewards = main()
    print(f"objective: {objective}")
    print(f"mean reward: {rewards[0]:.2f} in the first step, {rewards[-1]:.2f} in the last")
