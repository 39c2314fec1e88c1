"""Compare FusedLossMixin with TRL's SFTTrainer alone: losses, metrics and weights of every step."""

from __future__ import annotations

import functools
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs trl (extra: test)")
import test_integration_trl as grpo
from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from rmsd_fast.integrations.head import Head
from rmsd_fast.integrations.hf import FusedLossMixin
from rmsd_fast.integrations.trl import FusedSFTTrainer
from rmsd_fast.integrations.trl_head import is_most_likely
from rmsd_fast.losses import linear_logprob

METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens")


class Mixed(FusedLossMixin, SFTTrainer):
    """This is the class that a user writes."""


def text_rows(count: int = 40) -> Dataset:
    words = ["the red square", "moves left", "and right", "of the blue one"]
    return Dataset.from_dict({"text": [" ".join(words[i % 4 :] * (1 + i % 3)) + f" {i}" for i in range(count)]})


def prompt_rows(count: int = 40) -> Dataset:
    rows = text_rows(count)["text"]
    return Dataset.from_dict({"prompt": [f"the blue square {i}" for i in range(count)], "completion": list(rows)})


@functools.cache
def start(family: str) -> dict[str, torch.Tensor]:
    """Return weights that already know some of the words, so that accuracies are above 0."""
    model_class, config = grpo.FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config())
    batch = grpo.make_tokenizer()(list(text_rows()["text"]), return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(12):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def build(
    cls, folder: Path, *, family: str = "qwen3", rows: Dataset | None = None, options: dict | None = None, **extra
):
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.05,
        # With plain SGD, weights differ as gradients do. Adam would amplify rounding errors where a gradient is near
        # zero.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "max_length": 24,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    rows = text_rows() if rows is None else rows
    model_class, config = grpo.FAMILIES[family]
    model = model_class(config())
    model.load_state_dict(start(family))
    return cls(
        model=model,
        args=SFTConfig(output_dir=str(folder), **{**defaults, **(options or {})}),
        train_dataset=rows,
        eval_dataset=rows.select(range(7)),
        processing_class=grpo.make_tokenizer(),
        **extra,
    )


def trained_pair(folder: Path, **settings) -> tuple[SFTTrainer, SFTTrainer]:
    pair = tuple(build(cls, folder, **settings) for cls in (SFTTrainer, Mixed))
    for trainer in pair:
        trainer.start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
    return pair


def assert_same_training(own: SFTTrainer, fused: SFTTrainer) -> None:
    """Compare float32 runs: metrics within 1e-5, and weights within 1e-4 of the distance that they moved."""
    for name in METRICS:
        values = grpo.history(own, name)
        assert len(values) == own.args.max_steps, name
        assert grpo.history(fused, name) == pytest.approx(values, rel=1e-5, abs=1e-7), name
    assert any(0 < value < 1 for value in grpo.history(own, "mean_token_accuracy"))
    after, fused_after = dict(own.model.named_parameters()), dict(fused.model.named_parameters())
    assert own.start.keys() == fused.start.keys()
    moved = max(float((after[name].detach() - weight).abs().max()) for name, weight in own.start.items())
    apart = max(float((after[name] - fused_after[name]).detach().abs().max()) for name in own.start)
    assert moved > 2e-3, "the model learned nothing, so the comparison is meaningless"
    assert apart <= 1e-4 * moved, f"weights moved by {moved:.3g} and differ by {apart:.3g}"


CASES = {
    "text": {},
    "completions alone": {"rows": prompt_rows()},
    "prompts too": {"rows": prompt_rows(), "options": {"completion_only_loss": False}},
    "packed": {"options": {"packing": True, "gradient_accumulation_steps": 2}},
    "packed completions": {"rows": prompt_rows(), "options": {"packing": True}},
    "packed and cut": {"options": {"packing": True, "packing_strategy": "wrapped"}},
    "padding-free": {"options": {"padding_free": True, "max_length": None}},
    "dft": {"options": {"loss_type": "dft"}},
    "no accumulation": {"options": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}},
    "tokens of this device": {"options": {"average_tokens_across_devices": False}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "softcap": {"family": "gemma2"},
    "multiplied logits": {"family": "cohere2", "rows": prompt_rows()},
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_of_trl(case: str, tmp_path: Path) -> None:
    own, fused = trained_pair(tmp_path, **CASES[case])
    assert_same_training(own, fused)
    expected, found = own.evaluate(), fused.evaluate()
    for name in METRICS:
        assert found[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=1e-5), name


def test_packed_rows_keep_their_positions(tmp_path: Path) -> None:
    """Packed batches have positions and no mask; the test above compares the training itself."""
    batch = next(iter(build(Mixed, tmp_path, options={"packing": True}).get_train_dataloader()))
    assert "attention_mask" not in batch and int((batch["position_ids"] == 0).sum()) > 1


@pytest.mark.parametrize("options", [{}, {"packing": True}], ids=["text", "packed"])
def test_adapters(options: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (extra: test)")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    own, fused = trained_pair(tmp_path, options={**options, "learning_rate": 0.5}, peft_config=config)
    assert all("lora_" in name for name in own.start)
    assert_same_training(own, fused)


def test_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft (extra: test)")
    # TRL itself refuses the first case.
    for config in (
        peft.LoraConfig(target_modules=["lm_head"]),
        peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    ):
        with pytest.raises((ValueError, RuntimeError), match="lm_head|got peft"):
            build(Mixed, tmp_path, peft_config=config)


def test_prompt_tuning(tmp_path: Path) -> None:
    """peft puts learned tokens before the rows and pads the labels."""
    peft = pytest.importorskip("peft", reason="needs peft (extra: test)")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same_training(*trained_pair(tmp_path, options={"learning_rate": 20.0}, peft_config=config))


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """The head and hidden states are rounded to bfloat16 as TRL rounds them."""
    own, fused = trained_pair(tmp_path, options={"bf16": True})
    for name, tolerance in (("loss", 2e-3), ("entropy", 2e-3), ("mean_token_accuracy", 0.03)):
        assert grpo.history(fused, name) == pytest.approx(grpo.history(own, name), rel=tolerance, abs=tolerance), name
    exact = build(SFTTrainer, tmp_path)
    exact.train()
    assert grpo.history(exact, "loss") != grpo.history(own, "loss"), (
        "autocast had no effect, so the comparison is meaningless"
    )


def test_loss_gradients_and_metrics_in_float64(tmp_path: Path) -> None:
    """The comparison uses logits, because TRL's own head computes in float32 for every model dtype."""
    trainer = build(Mixed, tmp_path, rows=prompt_rows())
    model = trainer.model.double().train()
    batch = next(iter(trainer.get_train_dataloader()))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 17
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(17))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0.0, atol=1e-12)
    log_p = logits.log_softmax(-1)[scored]
    metrics = trainer._metrics["train"]
    assert metrics["entropy"] == [pytest.approx(float(-(log_p.exp() * log_p).sum(-1).mean()), rel=1e-12)]
    right = (log_p.argmax(-1) == targets[scored]).double().mean()
    assert metrics["mean_token_accuracy"] == [pytest.approx(float(right))]


def test_logits_are_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the check of the model, the head is never called, and the rows of its products fit the budget."""
    trainer = build(Mixed, tmp_path, memory_budget_bytes=4096)
    calls, budgets = [], set()
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))

    def noting(*args, memory_budget_bytes: int | None, **kwargs):
        budgets.add(memory_budget_bytes)
        return linear_logprob(*args, memory_budget_bytes=memory_budget_bytes, **kwargs)

    monkeypatch.setattr("rmsd_fast.integrations.trl_head.linear_logprob", noting)
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 1 and budgets == {4096}


def test_logits_are_returned_if_requested(tmp_path: Path) -> None:
    """As with TRL alone, an extra forward pass computes the logits, and the loss is fused."""
    predictions = []
    for cls in (SFTTrainer, Mixed):
        trainer = build(cls, tmp_path, options={"max_steps": 1})
        with pytest.warns(FutureWarning, match="return_outputs"):
            predictions.append(trainer.predict(trainer.eval_dataset))
    own, fused = predictions
    assert fused.predictions.shape == own.predictions.shape and fused.predictions.shape[-1] == grpo.VOCABULARY
    assert abs(fused.predictions - own.predictions).max() == 0
    assert fused.metrics["test_loss"] == pytest.approx(own.metrics["test_loss"], rel=1e-5)


def test_a_batch_without_a_label(tmp_path: Path) -> None:
    trainer = build(Mixed, tmp_path)
    ids = torch.randint(4, 300, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    loss = trainer.compute_loss(trainer.model.train(), batch)
    loss.backward()
    # Gradients are zeros and not None, because other processes wait for them.
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in trainer.model.parameters())


def test_a_subclass_keeps_its_loss_or_is_refused(tmp_path: Path) -> None:
    class Doubled(SFTTrainer):
        def compute_loss(self, *args, **kwargs):
            return 2 * super().compute_loss(*args, **kwargs)

    class FromLogits(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    losses = []
    for cls in (SFTTrainer, type("Mine", (FusedLossMixin, Doubled), {})):
        trainer = build(cls, tmp_path)
        losses.append(trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))))
    torch.testing.assert_close(losses[1], 2 * losses[0], rtol=1e-5, atol=0.0)
    trainer = build(type("Mine", (FusedLossMixin, FromLogits), {}), tmp_path)
    with pytest.raises(RuntimeError, match="Mine: .* got a loss without the fused head"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"label_smoothing_factor": 0.1}, "label_smoothing_factor"), ({"torch_compile": True}, "torch_compile")],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_unsupported_settings_are_refused(options: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"the fused loss does not support: {named}"):
        build(Mixed, tmp_path, options=options)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_loss_function_on_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not support: compute_loss_func"):
        build(Mixed, tmp_path, compute_loss_func=lambda *_, **__: 0)


def test_another_trl_is_refused(tmp_path: Path) -> None:
    class Other(SFTTrainer):
        """A version whose model does not have fused_lm_head."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model.forward = types.MethodType(lambda self, **kwargs: None, self.model)

    with pytest.raises(RuntimeError, match="got one without a fused_lm_head argument on the model's forward"):
        build(type("Mine", (FusedLossMixin, Other), {}), tmp_path)


def test_the_exported_class_is_the_mixin_before_sft_trainer() -> None:
    assert FusedSFTTrainer.__mro__[1:3] == (FusedLossMixin, SFTTrainer)


def test_the_most_likely_token() -> None:
    """The rows are certain, uncertain, biased and tied; of equal logits, the first counts."""
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(200, 8), torch.randn(50, 8), torch.randn(50)
    weight[7], bias[7] = weight[3], bias[3]
    head = Head(weight, bias, softcap=20.0, scale=2.0)
    logits = nn.functional.linear(rows, weight, bias)
    targets = logits.argmax(-1)
    targets[::3] = torch.randint(50, (len(targets[::3]),))
    targets[targets == 3][::2] = 7
    tied = logits.argmax(-1) == 3
    assert tied.any()
    targets[tied.nonzero()[0]] = 7
    logp = linear_logprob(rows, weight, targets, **head.arguments())
    assert (logp > -0.69).any() and (logp[targets == logits.argmax(-1)] < -0.7).any()
    assert torch.equal(is_most_likely(rows, head, targets, logp), targets == logits.argmax(-1))
