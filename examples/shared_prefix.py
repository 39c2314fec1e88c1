"""One image and four responses in one packed pass, from pixels to the gradients of LoRA adapters.

A tiny Qwen3-VL with random weights computes the prompt once for all four responses. The log-probs are compared with
those of four separate rows.

    python examples/shared_prefix.py        # a few seconds on a CPU; without peft it trains all weights
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from rmsd_fast.losses import linear_logprob, linear_policy_loss
from rmsd_fast.method.advantages import group_advantages
from rmsd_fast.models.shared_prefix import disable_shared_prefix, enable_shared_prefix, run_shared_prefix
from rmsd_kernels import SharedPrefixPlan, video_patches

VOCABULARY, IMAGE, VIDEO, START, END, WIDTH = 97, 90, 91, 92, 93, 64


def build_model() -> Qwen3VLForConditionalGeneration:
    """Return a Qwen3-VL with random weights. In your code, use Qwen3VLForConditionalGeneration.from_pretrained(...)."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": rope,
    }
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))


def add_adapters(model: nn.Module) -> nn.Module:
    """Return the model with LoRA adapters on the decoder's attention, if peft is installed."""
    if importlib.util.find_spec("peft") is None:
        return model
    from peft import LoraConfig, get_peft_model

    # Adapters start at 0 by default. These adapters do not, so that the comparison covers them.
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False)
    return get_peft_model(model, config)


def positions_of(model: nn.Module, prompt: Tensor, grid: Tensor, responses: list[Tensor]) -> Tensor:
    """Return positions [3, 1, T] of the packed row; each response continues where the prompt ends."""
    row = prompt[None]
    positions, _ = model.model.get_rope_index(
        row, (row == IMAGE).int(), image_grid_thw=grid, attention_mask=torch.ones_like(row)
    )
    follow = [(positions.max() + 1 + torch.arange(len(ids))).expand(3, 1, -1) for ids in responses]
    return torch.cat([positions, *follow], -1)


def main() -> float:
    """Return the largest difference between log-probs of the packed pass and of separate rows."""
    torch.manual_seed(0)
    trained = add_adapters(build_model())
    # Take the transformers model inside peft's wrapper, whose layers have the adapters.
    model = trained.get_base_model() if hasattr(trained, "get_base_model") else trained

    # An image is a clip of two equal frames. 64 x 96 pixels give 4 x 6 patches, and 2 x 2 patches give a token.
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    pixels = video_patches(image.expand(2, -1, -1, -1), height=64, width=96, mean=(0.5,) * 3, std=(0.5,) * 3)
    grid = torch.tensor([[1, 4, 6]])
    prompt = torch.tensor([5, 6, START, *[IMAGE] * 6, END, 7, 8, 9])
    # In your code, these are the responses of your rollout engine and their rewards.
    responses = [torch.randint(10, 80, (length,)) for length in (5, 3, 7, 1)]
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.0]))

    enable_shared_prefix(model)
    lengths = [len(ids) for ids in responses]
    plan = SharedPrefixPlan.from_lengths([len(prompt)], [lengths])
    hidden = run_shared_prefix(
        model.model,
        plan,
        input_ids=torch.cat([prompt, *responses])[None],
        position_ids=positions_of(model, prompt, grid, responses),
        pixel_values=pixels,
        image_grid_thw=grid,
    )
    # The last row of the prompt predicts the first token of every response. The plan gives the predicting rows.
    states, targets = hidden[0, plan.predicting_rows()], torch.cat(responses)
    token_advantages = advantages.repeat_interleave(torch.tensor(lengths))
    loss, _ = linear_policy_loss(states, model.lm_head.weight, targets, token_advantages, ignore_index=None)
    loss.backward()
    gradients = [weight.grad for weight in trained.parameters() if weight.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    print(f"{plan.tokens} tokens in the packed row, {len(gradients)} trained tensors, gradient norm {norm:.4f}")

    with torch.no_grad():
        packed = linear_logprob(states, model.lm_head.weight, targets, ignore_index=None).split(lengths)
        # Restore the model's own attention, and use one row per response.
        disable_shared_prefix(model)
        apart = 0.0
        for ids, shared in zip(responses, packed, strict=True):
            row = torch.cat([prompt, ids])[None]
            media = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (row == IMAGE).int()}
            logits = model(input_ids=row, **media).logits[0, len(prompt) - 1 : -1]
            separate = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            apart = max(apart, (shared - separate).abs().max().item())
    return apart


if __name__ == "__main__":
    print(f"largest difference to the log-probs of separate rows: {main():.1e}")
