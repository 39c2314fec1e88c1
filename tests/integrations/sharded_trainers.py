"""Train in two processes with DDP and sharded weights, with the library's own loss and with the fused loss.

The program writes results.json to the folder in its argument. For each case it has the difference of losses and of
weights (or gradients), and the distance that the weights moved.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

BATCH = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}


def zero3(**sizes) -> dict:
    return {"zero_optimization": {"stage": 3}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0, **sizes}


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    import deepspeed

    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = dict(model.named_parameters())
    if not trainer.is_deepspeed_enabled:
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel", "DDP did not wrap the model"
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert all(hasattr(parameter, "ds_id") for parameter in parameters.values()), "ZeRO-3 did not shard the model"
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def apart(own: dict[str, torch.Tensor], fused: dict[str, torch.Tensor]) -> float:
    return max(float((own[name] - fused[name]).abs().max()) for name in own)


def fully_sharded(folder: Path, family: str) -> dict[str, float]:
    """Compare the gradients of one FSDP2 step with plain torch, and check that a sharded head is refused."""
    import pytest
    import test_integration_hf as hf
    from torch.distributed.fsdp import fully_shard

    from rmsd_fast.integrations.head import add_head_call
    from rmsd_fast.integrations.hf import FusedTrainer

    rank = torch.distributed.get_rank()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    batches = [hf.collate(hf.examples(4)[2 * part : 2 * part + 2]) for part in range(2)]
    tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    plain = hf.model(family)
    (sum(plain(**batch, num_items_in_batch=tokens).loss for batch in batches) / 2).backward()
    loss_of = hf.build(FusedTrainer, folder, family=family)._fused_loss
    sharded = hf.model(family)
    add_head_call(sharded)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded(**batches[rank], num_items_in_batch=tokens, head_call=loss_of)["loss"].backward()
    if family == "own head":
        alone = hf.model(family)
        add_head_call(alone)
        fully_shard(alone.lm_head, mesh=mesh)
        fully_shard(alone, mesh=mesh)
        with pytest.raises(RuntimeError, match="got a trained one sharded over DeviceMesh"):
            alone(**batches[rank], num_items_in_batch=tokens, head_call=loss_of)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    found = {name: parameter.grad.full_tensor() for name, parameter in sharded.named_parameters()}
    return {"apart": apart(expected, found), "moved": max(float(grad.abs().max()) for grad in expected.values())}


def trained(build, own_class, fused_class, before: dict[str, torch.Tensor], losses) -> dict[str, float]:
    """Build and train one trainer and then the other, because building sets the random numbers that training draws."""
    own = build(own_class)
    own.train()
    own_weights = whole_weights(own)
    fused = build(fused_class)
    fused.train()
    assert fused.accelerator.unwrap_model(fused.model)._head_is_checked
    return {
        "apart": apart(own_weights, whole_weights(fused)),
        "moved": apart(own_weights, before),
        "losses": float((losses(own) - losses(fused)).abs().max() / losses(own).abs().max()),
    }


def loss_history(trainer) -> torch.Tensor:
    return torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def main(folder: Path) -> None:
    import deepspeed

    # Otherwise DeepSpeed compiles an op for shared memory for a minute and a half.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo")
    results = {f"FSDP2, {family}": fully_sharded(folder, family) for family in ("own head", "tied head")}

    import test_integration_hf as hf
    import test_integration_sft as sft
    from transformers import Trainer
    from trl import SFTTrainer

    from rmsd_fast.integrations.hf import FusedTrainer
    from rmsd_fast.integrations.trl import FusedSFTTrainer

    before, sft_before = hf.model("own head").state_dict(), sft.start("qwen3")

    # DDP runs first, because a ZeRO-3 setting stays active.
    for name, setting in (("DDP", None), ("ZeRO-3", zero3(**BATCH))):

        def build_trainer(cls, setting=setting):
            return hf.build(cls, folder, family="own head", deepspeed=setting, max_steps=3)

        def build_sft(cls, setting=setting):
            return sft.build(cls, folder, options={"deepspeed": setting, "max_steps": 3})

        results[f"{name}, Trainer"] = trained(build_trainer, Trainer, FusedTrainer, before, hf.losses)
        results[f"{name}, SFTTrainer"] = trained(build_sft, SFTTrainer, FusedSFTTrainer, sft_before, loss_history)

    import test_integration_trl as grpo
    from safetensors.torch import load_file
    from trl import GRPOTrainer

    from rmsd_fast.integrations.trl import FusedGRPOTrainer

    tokenizer = grpo.make_tokenizer()
    sizes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    # from_pretrained is not used, because it shards what it loads while a ZeRO-3 setting is active.
    before = load_file(folder / "qwen3" / "model.safetensors")
    for objective in ("policy", "log_prob"):
        options = {
            "deepspeed": zero3(**sizes),
            "max_steps": 2,
            "num_iterations": 2,
            "beta": 0.1,
            "use_bias_correction_kl": False,
        }

        def build_grpo(cls, options=options, objective=objective):
            chosen = {"fused_objective": objective} if cls is FusedGRPOTrainer else {}
            return grpo.build(cls, folder / "qwen3", tokenizer, options=options, **chosen)

        results[f"ZeRO-3, GRPOTrainer, {objective}"] = trained(
            build_grpo, GRPOTrainer, FusedGRPOTrainer, before, loss_history
        )
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]))
    # Exit without destroying process groups that belong to several libraries.
    sys.stdout.flush()
    os._exit(0)
