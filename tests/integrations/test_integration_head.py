"""Test which models accept a fused loss: refusals, the check at the first step, copies, and sharded heads."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate (extra: test)")
from test_integration_hf import SHAPE, build, collate, examples, losses, model
from transformers import (
    BartConfig,
    BartForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3ForCausalLM,
)

from rmsd_fast.integrations.head import add_head_call, read_head
from rmsd_fast.integrations.hf import FusedTrainer


def test_unsupported_models_are_refused(tmp_path: Path) -> None:
    adapted = model()
    adapted.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 97, bias=False))
    masked = model()
    masked.loss_function = torch.nn.functional.mse_loss
    cases = [
        (adapted, "expected torch.nn.Linear as the head, got .*Sequential"),
        (masked, "expected transformers' ForCausalLMLoss"),
        (model().model, "Qwen3Model"),
        (
            OlmoeForCausalLM(OlmoeConfig(**SHAPE, num_experts=2, num_experts_per_tok=1, output_router_logits=True)),
            "output_router_logits",
        ),
        (torch.nn.Linear(2, 2), "got a model without config, base_model, get_output_embeddings"),
    ]
    for refused, message in cases:
        with pytest.raises(RuntimeError, match=message):
            build(FusedTrainer, tmp_path, trained=refused)


def hooked() -> torch.nn.Module:
    changed = model()
    changed.lm_head.register_forward_hook(lambda _, __, output: 1.5 * output)
    return changed


def with_own_forward() -> torch.nn.Module:
    changed = model("own head")
    changed.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, 1.5 * changed.lm_head.weight)
    return changed


def modern_bert() -> torch.nn.Module:
    shape = {name: value for name, value in SHAPE.items() if name not in ("initializer_range", "num_key_value_heads")}
    return ModernBertDecoderForCausalLM(ModernBertDecoderConfig(**shape))


def bart() -> torch.nn.Module:
    return BartForCausalLM(BartConfig(vocab_size=97, d_model=32, decoder_layers=1))


class LossByAttention(Qwen3ForCausalLM):
    """A model that ignores labels at positions outside of its attention mask."""

    def forward(self, input_ids, attention_mask, labels=None, **kwargs):
        seen = None if labels is None else labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=seen, **kwargs)


NOT_ITS_LOGITS = "its logits are not its body's last hidden states"
NOT_ITS_LOSS = "is not the mean cross entropy of labels shifted"
CHECKED = {
    "a layer between body and head": (modern_bert, NOT_ITS_LOGITS),
    "a hook on the head": (hooked, NOT_ITS_LOGITS),
    "a head with another forward": (with_own_forward, NOT_ITS_LOGITS),
    # The forward of this model uses labels unshifted, regardless of what its loss_function does.
    "unshifted labels": (bart, NOT_ITS_LOSS),
    "a mask of its own": (lambda: LossByAttention(model().config), NOT_ITS_LOSS),
}


@pytest.mark.parametrize("case", CHECKED)
def test_a_model_that_computes_something_else_is_refused_at_its_first_step(case: str, tmp_path: Path) -> None:
    make, message = CHECKED[case]
    trainer = build(FusedTrainer, tmp_path, trained=make())
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_the_check_of_a_model_has_no_side_effects() -> None:
    """Casts that the check caches under autocast without a gradient must not be used by the step."""
    checked = model()
    checked.train()
    checked.model.layers[0].eval()
    add_head_call(checked)
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        loss = checked(**collate(examples(2)), head_call=lambda hidden, head, labels: (hidden @ head.weight.T).mean())
    assert checked._head_is_checked
    assert checked.training and not checked.model.layers[0].training and checked.model.layers[1].training
    assert torch.equal(torch.random.get_rng_state(), state)
    loss.backward()
    assert all(parameter.grad is not None for parameter in checked.parameters())


def test_the_check_runs_under_the_autocast_of_the_trainer(tmp_path: Path) -> None:
    """A layer that accepts only 16 bits, like some attention kernels, works only under autocast."""
    picky = model()
    picky.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, output: check(output))

    def check(output: torch.Tensor) -> None:
        if output.dtype != torch.bfloat16:
            raise RuntimeError("the layer supports only 16 bits")

    trainer = build(FusedTrainer, tmp_path, trained=picky, bf16=True)
    trainer.train()
    assert len(losses(trainer)) == 5


def test_a_copied_model_uses_its_own_weights() -> None:
    source = model("own head")
    add_head_call(source)
    twin = copy.deepcopy(source)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    batch = collate(examples(2))
    assert not twin(**batch).logits.any() and source(**batch).logits.any()
    assert not twin(**batch, head_call=lambda hidden, head, labels: head.weight).any()


def test_a_sharded_head(tmp_path: Path) -> None:
    """A trained DTensor head is refused because its gradient would not be reduced; a frozen one is gathered."""
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = model("own head")
        weight = sharded.lm_head.weight.detach()
        sharded.lm_head.weight = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
        with pytest.raises(RuntimeError, match=r"got a trained one sharded over DeviceMesh.*leave it in"):
            read_head(sharded)
        sharded.lm_head.weight.requires_grad_(False)
        assert type(read_head(sharded).weight) is torch.Tensor
        torch.testing.assert_close(read_head(sharded).weight, weight)
    finally:
        torch.distributed.destroy_process_group()
