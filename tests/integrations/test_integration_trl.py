"""Compare FusedGRPOTrainer with TRL's own GRPOTrainer on the CPU: loss of every step, metrics and final weights."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs trl (extra: test)")
from datasets import Dataset
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

from rmsd_fast.integrations.trl import FusedGRPOMixin, FusedGRPOTrainer
from rmsd_fast.made.student import build_tokenizer

VOCABULARY = 400
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    # The logits are wide enough that temperature, softcap and scale have an effect.
    "initializer_range": 0.3,
    "vocab_size": VOCABULARY,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
FAMILIES = {
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    "gemma2": (
        Gemma2ForCausalLM,
        lambda: Gemma2Config(**SHAPE, final_logit_softcapping=2.0, attn_implementation="eager"),
    ),
    "cohere2": (Cohere2ForCausalLM, lambda: Cohere2Config(**SHAPE, logit_scale=0.25)),
}


def make_tokenizer():
    built = build_tokenizer(["the red square moves left and right of the blue one"] * 20, VOCABULARY)
    built.padding_side = "left"
    return built


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> dict[str, Path]:
    """Write a tiny model of each family to disk, because TRL loads the reference from the path of the policy."""
    made = {}
    for name, (cls, config) in FAMILIES.items():
        torch.manual_seed(5)
        made[name] = tmp_path_factory.mktemp("trl") / name
        cls(config()).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def reward(completion_ids: list[list[int]], **_) -> list[float]:
    """Return a reward that differs within a group and depends only on the tokens."""
    return [sum(token % 7 == 1 for token in ids) + 0.1 * len(ids) for ids in completion_ids]


def settings(folder: Path, **options) -> GRPOConfig:
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 0.05,
        # With plain SGD, weights differ as gradients do. Adam would amplify rounding errors where a gradient is near
        # zero.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 11,
    }
    return GRPOConfig(output_dir=str(folder / "out"), **{**defaults, **options})


def prompts(count: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"the red square {i}" if i % 2 else f"moves {i}" for i in range(count)]})


def build(cls, folder: Path, tokenizer, *, options: dict | None = None, **extra) -> GRPOTrainer:
    arguments = settings(folder, **(options or {}))
    family = folder.name
    model = FAMILIES[family][0].from_pretrained(folder, dtype=torch.float32)
    model.config._name_or_path = str(folder)
    return cls(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=prompts(),
        processing_class=tokenizer,
        **extra,
    )


def trained(cls, folder: Path, tokenizer, **extra) -> GRPOTrainer:
    trainer = build(cls, folder, tokenizer, **extra)
    trainer.train()
    return trainer


def history(trainer: GRPOTrainer, name: str) -> list[float]:
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def assert_same(own: GRPOTrainer, fused: GRPOTrainer, start: Path) -> None:
    """Compare float32 runs: values within 1e-5, and weights within 1e-4 of the distance that they moved."""
    losses, fused_losses = torch.tensor(history(own, "loss")), torch.tensor(history(fused, "loss"))
    assert len(losses) == own.args.max_steps
    assert (losses - fused_losses).abs().max() <= 1e-5 * losses.abs().max() + 1e-6
    before = FAMILIES[start.name][0].from_pretrained(start, dtype=torch.float32).state_dict()
    after, fused_after = own.model.state_dict(), fused.model.state_dict()
    moved = max((after[name] - before[name]).abs().max() for name in before)
    apart = max((after[name] - fused_after[name]).abs().max() for name in before)
    assert moved > 1e-3, "the model learned nothing, so the comparison is meaningless"
    assert apart <= 1e-4 * moved, f"weights moved by {moved:.3g} and differ by {apart:.3g}"


CASES = {
    # Each entry gives name: (family, GRPOConfig options, objective that "auto" chooses).
    "dapo on-policy": ("qwen3", {"loss_type": "dapo"}, "policy"),
    "grpo with kl, off-policy": (
        "qwen3",
        {
            "loss_type": "grpo",
            "beta": 0.1,
            "use_bias_correction_kl": False,
            "num_iterations": 2,
            "temperature": 0.8,
            "epsilon": 0.02,
            "epsilon_high": 0.03,
        },
        "policy",
    ),
    "grpo, kl weighted by the ratio": ("qwen3", {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2}, "log_prob"),
    "sequence ratios": (
        "qwen3",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2, "epsilon": 0.02},
        "policy",
    ),
    "bnpo, softcap": (
        "gemma2",
        {"loss_type": "bnpo", "beta": 0.05, "use_bias_correction_kl": False, "temperature": 0.7},
        "policy",
    ),
    "dr_grpo, logit scale": ("cohere2", {"loss_type": "dr_grpo", "steps_per_generation": 4}, "policy"),
    "luspo, truncated masked": (
        "qwen3",
        {
            "loss_type": "luspo",
            "importance_sampling_level": "sequence",
            "mask_truncated_completions": True,
            "learning_rate": 0.01,
        },
        "policy",
    ),
    "cispo": ("qwen3", {"loss_type": "cispo", "epsilon_high": 2.0, "num_iterations": 2}, "log_prob"),
    "sapo, softcap": ("gemma2", {"loss_type": "sapo", "num_iterations": 2}, "log_prob"),
    "entropy bonus": ("cohere2", {"loss_type": "dapo", "entropy_coef": 0.02, "beta": 0.1}, "log_prob"),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_trl(case: str, folders, tokenizer) -> None:
    family, options, objective = CASES[case]
    own = trained(GRPOTrainer, folders[family], tokenizer, options=options)
    fused = trained(FusedGRPOTrainer, folders[family], tokenizer, options=options)
    assert fused.fused_objective == objective
    assert_same(own, fused, folders[family])
    for name in ("reward", "entropy", "kl", "clip_ratio/region_mean"):
        if name == "clip_ratio/region_mean" and options.get("importance_sampling_level") == "sequence":
            continue
        ours, theirs = history(fused, name), history(own, name)
        assert len(ours) == len(theirs), name
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), name
    if "epsilon" in options:
        clipped = history(fused, "clip_ratio/region_mean")
        assert any(0 < share < 1 for share in clipped), f"the clip had no effect: {clipped}"


def micro_batch(steps: int = 2) -> dict[str, torch.Tensor]:
    """Return the input of TRL's loss: 4 ragged rows, tool tokens, and one row without scored tokens."""
    generator = torch.Generator().manual_seed(9)
    completion_mask = (torch.arange(7) < torch.tensor([7, 4, 1, 0]).unsqueeze(1)).long()
    return {
        "prompt_ids": torch.randint(4, 300, (4, 5), generator=generator),
        "prompt_mask": (torch.arange(5) >= torch.tensor([0, 2, 1, 3]).unsqueeze(1)).long(),
        "completion_ids": torch.randint(4, 300, (4, 7), generator=generator),
        "completion_mask": completion_mask,
        "tool_mask": torch.tensor([[1, 1, 0, 0, 1, 1, 1]] * 4),
        "advantages": torch.randn(4, generator=generator),
        "old_per_token_logps": -5 + 0.3 * torch.randn(4, 7, generator=generator),
        "ref_per_token_logps": -5 + 0.3 * torch.randn(4, 7, generator=generator),
        "importance_sampling_ratio": torch.rand(4, 7, generator=generator) * 2,
        "num_items_in_batch": completion_mask.sum() * steps,
    }


@pytest.fixture(scope="module")
def pair(folders, tokenizer) -> tuple[GRPOTrainer, FusedGRPOTrainer]:
    """Return both trainers with the settings of a run with vLLM."""
    options = {"beta": 0.1, "use_bias_correction_kl": False, "steps_per_generation": 4}
    made = tuple(build(cls, folders["qwen3"], tokenizer, options=options) for cls in (GRPOTrainer, FusedGRPOTrainer))
    for trainer in made:
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
        trainer.current_gradient_accumulation_steps = 2
    return made


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo"])
@pytest.mark.parametrize("training", [True, False])
def test_tool_tokens_and_engine_mismatch(loss_type: str, training: bool, pair) -> None:
    """These settings need vLLM or tools in whole runs, so one micro-batch goes through both losses."""
    results = []
    for trainer in pair:
        trainer.loss_type = loss_type
        trainer._metrics["train" if training else "eval"].clear()
        trainer.model.train(training).zero_grad()
        loss = trainer.compute_loss(trainer.model, micro_batch())
        loss.backward()
        log = trainer._metrics["train" if training else "eval"]
        results.append((loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}, log))
    (loss, gradients, log), (fused_loss, fused_gradients, fused_log) = results
    assert trainer.fused_objective == "policy"
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=1e-6)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert scale > 1e-3
    for name, gradient in gradients.items():
        assert (fused_gradients[name] - gradient).abs().max() <= 1e-5 * scale, name
    for name in ("kl", "entropy", "clip_ratio/region_mean"):
        assert fused_log[name] == pytest.approx(log[name], rel=1e-5), name


@pytest.mark.parametrize("objective", ["policy", "log_prob"])
def test_a_batch_without_a_scored_token(objective: str, pair, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pair[1]
    monkeypatch.setattr(trainer, "fused_objective", objective)
    batch = micro_batch()
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    trainer.model.train().zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    # Gradients are zeros and not None, because other processes wait for them.
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_inputs_besides_text_are_not_dropped(pair) -> None:
    trainer = pair[1]
    assert trainer.fused_objective == "policy"
    with pytest.raises(RuntimeError, match="expected a batch with text only, got input_features; use 'log_prob'"):
        trainer.compute_loss(trainer.model, micro_batch() | {"input_features": torch.zeros(4, 2), "num_images": None})


@pytest.mark.parametrize("objective", ["policy", "log_prob"])
def test_autocast_and_a_float32_head(objective: str, folders, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries round 16-bit numbers in another order, so the bound is that of bfloat16; dtypes are equal."""
    options = {"bf16": True, "loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False}
    dtypes = []

    def noting(function):
        def noted(hidden, weight, *args, **kwargs):
            dtypes.append({hidden.dtype, weight.dtype})
            return function(hidden, weight, *args, **kwargs)

        return noted

    for part, name in (("trl_head", "linear_logprob"), ("trl", "linear_policy_loss")):
        module = importlib.import_module(f"rmsd_fast.integrations.{part}")
        monkeypatch.setattr(module, name, noting(getattr(module, name)))
    for head_in_float32 in (False, True):
        losses = []
        for cls, extra in ((GRPOTrainer, {}), (FusedGRPOTrainer, {"fused_objective": objective})):
            trainer = build(
                cls,
                folders["qwen3"],
                tokenizer,
                options={**options, "cast_lm_head_to_fp32": head_in_float32},
                **extra,
            )
            trainer.current_gradient_accumulation_steps = 1
            trainer.model = trainer.accelerator.prepare_model(trainer.model).train()
            losses.append(trainer.compute_loss(trainer.model, micro_batch()).detach())
        assert losses[1].dtype == torch.float32
        assert dtypes == [{torch.float32 if head_in_float32 else torch.bfloat16}]
        dtypes.clear()
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)


def test_evaluation_loss(folders, tokenizer) -> None:
    """A KL term is used, because the rest of the on-policy loss does not depend on the log-probs."""
    options = {"per_device_eval_batch_size": 4, "beta": 0.1, "use_bias_correction_kl": False}
    values = []
    for cls in (GRPOTrainer, FusedGRPOTrainer):
        trainer = build(cls, folders["qwen3"], tokenizer, options=options)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        torch.manual_seed(3)
        values.append(trainer.evaluate(prompts(4))["eval_loss"])
    assert values[1] == pytest.approx(values[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_type": "cispo", "epsilon_high": 2.0}, "loss_type='cispo'"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"beta": 0.1}, "use_bias_correction_kl"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold=1.0"),
    ],
)
def test_policy_objective_names_unsupported_settings(options: dict, named: str, folders, tokenizer) -> None:
    with pytest.raises(RuntimeError, match="fused_objective='policy'") as caught:
        build(FusedGRPOTrainer, folders["qwen3"], tokenizer, options=options, fused_objective="policy")
    assert named in str(caught.value)


def test_other_refusals(folders, tokenizer) -> None:
    with pytest.raises(ValueError, match="fused_objective: expected one of auto, policy, log_prob"):
        build(FusedGRPOTrainer, folders["qwen3"], tokenizer, fused_objective="fast")
    with pytest.raises(RuntimeError, match="torch_compile"):
        build(FusedGRPOTrainer, folders["qwen3"], tokenizer, options={"torch_compile": True})

    class Adapted(GRPOTrainer):
        """A head with an adapter as PEFT adds it: another type with another forward."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            adapter = type("LoraLinear", (torch.nn.Linear,), {"forward": lambda self, x: 2 * x @ self.weight.T})
            self.model.lm_head.__class__ = adapter

    with pytest.raises(RuntimeError, match="expected torch.nn.Linear as the head, got .*LoraLinear"):
        build(type("Mixed", (FusedGRPOMixin, Adapted), {}), folders["qwen3"], tokenizer)


def test_a_loss_of_another_version_is_left_to_trl(folders, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy objective reimplements the loss of TRL 1.16, and later versions may add a term."""
    monkeypatch.setattr("trl.__version__", "1.17.0")
    assert build(FusedGRPOTrainer, folders["qwen3"], tokenizer).fused_objective == "log_prob"
    with pytest.raises(RuntimeError, match=r"does not support trl 1\.17\.0, whose loss may have terms"):
        build(FusedGRPOTrainer, folders["qwen3"], tokenizer, fused_objective="policy")


def test_other_trl_versions_are_refused(folders, tokenizer) -> None:
    class Other(GRPOTrainer):
        """A version whose model does not have fused_lm_head."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.forward = types.MethodType(lambda self, **kwargs: None, self.model)
            del self.epsilon_high

    with pytest.raises(
        RuntimeError, match="got a version without epsilon_high, a fused_lm_head argument on the model's forward"
    ):
        build(type("Mixed", (FusedGRPOMixin, Other), {}), folders["qwen3"], tokenizer)

    class Elsewhere(GRPOTrainer):
        """A subclass that computes its log-probs from logits."""

        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **_):
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
            logp = logits.log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0][:, -logits_to_keep:]
            return logp, torch.zeros_like(logp), None

    trainer = build(type("Mixed", (FusedGRPOMixin, Elsewhere), {}), folders["qwen3"], tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(RuntimeError, match="without the fused head"):
        trainer.compute_loss(trainer.model, micro_batch())


@pytest.mark.slow
def test_two_processes(folders, tmp_path: Path) -> None:
    """Two processes use ZeRO-3 and DDP, and FSDP2 in Trainer, with the same bounds as a single process."""
    pytest.importorskip("deepspeed", reason="needs deepspeed (extra: train)")
    shutil.copytree(folders["qwen3"], tmp_path / "qwen3")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).parent / "sharded_trainers.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**environment, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 8
    for case, result in results.items():
        assert result["moved"] > 2e-3 and result["apart"] <= 1e-4 * result["moved"], (case, result)
        assert result.get("losses", 0.0) <= 1e-5, (case, result)


def test_import_without_trl_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "rmsd_fast.integrations.trl", raising=False)
    with pytest.raises(ImportError, match=r"rmsd_fast\.integrations\.trl needs trl .*pip install trl"):
        importlib.import_module("rmsd_fast.integrations.trl")
