"""Compare FusedTrainer with transformers' own Trainer on the CPU: loss of every step, evaluation and final weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason="needs accelerate (extra: test)")
from media_files import noise_frames
from PIL import Image
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from rmsd_fast.config import VideoConfig
from rmsd_fast.data.preprocess import video_patches
from rmsd_fast.data.prompts import PromptBuilder
from rmsd_fast.data.records import Question
from rmsd_fast.integrations.hf import FusedLossMixin, FusedTrainer
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.models.students import load_student

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "tied head": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    "own head": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "softcap": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0, attn_implementation="eager")
    ),
    "multiplied logits": lambda: Cohere2ForCausalLM(Cohere2Config(**SHAPE, head_dim=16, logit_scale=0.25)),
    "divided logits": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)),
}


def model(family: str = "tied head") -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family]()


def examples(count: int = 40, vocabulary: int = 97) -> list[dict[str, torch.Tensor]]:
    """Return token rows of 6 to 13; the first three are a prompt, and every fifth row has only one scored token."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        ids = torch.randint(3, vocabulary, (6 + (number * 5) % 8,), generator=generator)
        labels = ids.clone()
        labels[: -1 if number % 5 == 0 else 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
        "labels": torch.full((len(rows), length), -100),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
    }
    for number, row in enumerate(rows):
        size = len(row["input_ids"])
        batch["input_ids"][number, :size] = row["input_ids"]
        batch["labels"][number, :size] = row["labels"]
        batch["attention_mask"][number, :size] = 1
    return batch


def build(
    cls, folder: Path, *, family: str = "tied head", trained: torch.nn.Module | None = None, **options
) -> Trainer:
    extra = {name: options.pop(name) for name in ("compute_loss_func", "model_init") if name in options}
    defaults = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.05,
        # With plain SGD, weights differ as gradients do. Adam would amplify rounding errors where a gradient is near
        # zero.
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    if "model_init" not in extra:
        extra["model"] = trained if trained is not None else model(family)
    return cls(args=arguments, train_dataset=examples(), eval_dataset=examples(7), data_collator=collate, **extra)


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.tensor([float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry])


def assert_same_training(own: Trainer, fused: Trainer, family: str) -> None:
    """Compare float32 runs: losses within 1e-5, and weights within 1e-4 of the distance that they moved."""
    assert len(losses(own)) == own.args.max_steps
    torch.testing.assert_close(losses(fused), losses(own), rtol=1e-5, atol=0.0)
    before, after, fused_after = model(family).state_dict(), own.model.state_dict(), fused.model.state_dict()
    moved = max((after[name] - before[name]).abs().max() for name in before)
    apart = max((after[name] - fused_after[name]).abs().max() for name in before)
    assert moved > 2e-3, "the model learned nothing, so the comparison is meaningless"
    assert apart <= 1e-4 * moved, f"weights moved by {moved:.3g} and differ by {apart:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_training_equals_that_of_the_library(family: str, tmp_path: Path) -> None:
    own, fused = build(Trainer, tmp_path, family=family), build(FusedTrainer, tmp_path, family=family)
    own.train()
    fused.train()
    assert_same_training(own, fused, family)
    assert fused.evaluate()["eval_loss"] == pytest.approx(own.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6},
        {"average_tokens_across_devices": False},
    ],
    ids=["checkpointing", "no accumulation", "tokens of this device"],
)
def test_settings_of_the_trainer(options: dict, tmp_path: Path) -> None:
    own, fused = build(Trainer, tmp_path, **options), build(FusedTrainer, tmp_path, **options)
    own.train()
    fused.train()
    assert_same_training(own, fused, "tied head")


def test_accumulation_does_not_change_the_loss(tmp_path: Path) -> None:
    """Six rows at once and three times two rows give the same steps, because all six share one divisor."""
    whole = build(FusedTrainer, tmp_path, gradient_accumulation_steps=1, per_device_train_batch_size=6)
    parts = build(FusedTrainer, tmp_path)
    whole.train()
    parts.train()
    assert_same_training(whole, parts, "tied head")


def test_a_model_that_counts_no_tokens(tmp_path: Path) -> None:
    """Without num_items_in_batch, the library takes the mean of each micro-batch, and so does the fused loss."""
    trainers = []
    for cls in (Trainer, FusedTrainer):
        counting_none = model()
        counting_none.accepts_loss_kwargs = False
        trainers.append(build(cls, tmp_path, trained=counting_none))
        trainers[-1].train()
    assert_same_training(*trainers, "tied head")


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """The head and hidden states are rounded to bfloat16 as the library's head rounds them."""
    own, fused = build(Trainer, tmp_path, bf16=True), build(FusedTrainer, tmp_path, bf16=True)
    own.train()
    fused.train()
    torch.testing.assert_close(losses(fused), losses(own), rtol=2e-3, atol=0.0)
    exact = build(Trainer, tmp_path)
    exact.train()
    assert (losses(own) - losses(exact)).abs().max() > 0, "autocast had no effect, so the comparison is meaningless"


def test_logits_are_returned_if_requested(tmp_path: Path) -> None:
    own, fused = build(Trainer, tmp_path), build(FusedTrainer, tmp_path)
    expected, found = own.predict(examples(7)), fused.predict(examples(7))
    assert found.predictions.shape == expected.predictions.shape and found.predictions.shape[-1] == 97
    torch.testing.assert_close(torch.tensor(found.predictions), torch.tensor(expected.predictions))
    assert found.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)
    batch = collate(examples(2))
    loss, outputs = fused.compute_loss(fused.model, dict(batch), return_outputs=True)
    assert outputs.logits.shape[-1] == 97 and loss.requires_grad
    # The model itself is unchanged for generation and for all other callers.
    torch.testing.assert_close(fused.model(**batch).loss, own.model(**batch).loss)


def test_logits_are_not_computed(tmp_path: Path) -> None:
    """After the check of the model, training and loss-only evaluation never call the head, but predictions do."""
    trainer = build(FusedTrainer, tmp_path)
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    trainer.evaluate()
    assert len(calls) == 1
    trainer.predict(examples(3))
    assert len(calls) > 1


def test_model_init_is_fused_too(tmp_path: Path) -> None:
    own, fused = (
        build(Trainer, tmp_path, model_init=lambda: model()),
        build(FusedTrainer, tmp_path, model_init=lambda: model()),
    )
    own.train()
    fused.train()
    assert_same_training(own, fused, "tied head")


def test_shifted_labels(tmp_path: Path) -> None:
    trainer = build(FusedTrainer, tmp_path)
    batch = collate(examples(3))
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    again = trainer.compute_loss(trainer.model, {**batch, "shift_labels": shifted})
    torch.testing.assert_close(again, loss)
    with pytest.raises(ValueError, match="labels: expected labels or shift_labels among the inputs"):
        trainer.compute_loss(trainer.model, {"input_ids": batch["input_ids"]})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, "torch_compile"),
        ({"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_unsupported_settings_are_refused(options: dict, named: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="does not support") as caught:
        build(FusedTrainer, tmp_path, **options)
    assert named in str(caught.value)


def test_a_trainer_with_its_own_loss_is_refused(tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(RuntimeError, match=r"Own\.compute_loss \(a custom loss\)"):
        build(type("Mixed", (FusedLossMixin, Own), {}), tmp_path)


def test_a_video_language_model(tmp_path: Path) -> None:
    """The body of Qwen3-VL takes the pixels of a picture, and loss and gradients equal those of the library."""
    build_tiny_student(tmp_path / "student", texts=["What colour?"], layers=1)
    Image.fromarray(noise_frames(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    results = []
    for cls in (Trainer, FusedTrainer):
        student = load_student(tmp_path / "student", dtype="float32")
        student.model.train().requires_grad_(True)
        question = Question(
            id="q", question="What colour?", task_type="open", videos=(), images=(str(tmp_path / "a.png"),)
        )
        prompt = PromptBuilder(student, VideoConfig(max_image_pixels=4096)).build(question)
        (picture,) = prompt.media
        answer = torch.tensor([5, 6, 7, student.eos_id])
        batch = {
            "input_ids": torch.cat([prompt.input_ids, answer])[None],
            "labels": torch.cat([torch.full_like(prompt.input_ids, -100), answer])[None],
            "mm_token_type_ids": torch.cat([prompt.mm_token_type_ids, torch.zeros_like(answer)])[None],
            "pixel_values": video_patches(picture.pixels, picture.preprocessor),
            "image_grid_thw": torch.tensor([picture.grid_thw]),
        }
        trainer = build(cls, tmp_path, trained=student.model)
        loss = trainer.compute_loss(student.model, batch, num_items_in_batch=torch.tensor(8))
        loss.backward()
        gradients = {name: p.grad for name, p in student.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), gradients))
    (loss, gradients), (fused_loss, fused_gradients) = results
    torch.testing.assert_close(fused_loss, loss, rtol=1e-5, atol=0.0)
    assert gradients.keys() == fused_gradients.keys() and any("visual" in name for name in gradients)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    assert scale > 1e-2
    assert all((fused_gradients[name] - gradient).abs().max() <= 1e-5 * scale for name, gradient in gradients.items())


def test_import_without_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "rmsd_fast.integrations.hf", raising=False)
    with pytest.raises(ImportError, match=r"rmsd_fast\.integrations\.hf needs transformers .*pip install 'rmsd-fast"):
        importlib.import_module("rmsd_fast.integrations.hf")
