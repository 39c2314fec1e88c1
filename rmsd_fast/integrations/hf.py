"""Fused cross entropy for transformers' Trainer: from hidden states to loss without storing logits.

    from rmsd_fast.integrations.hf import FusedTrainer     # in place of transformers.Trainer
    class MyTrainer(FusedLossMixin, SomeTrainer): ...       # for a subclass that keeps Trainer's compute_loss
    class MyTrainer(FusedLossMixin, trl.SFTTrainer): ...    # TRL 1.16, or a subclass of its SFTTrainer

The loss equals the library's own for causal language models: labels shifted by one, -100 ignored, and the sum over the
batch's tokens divided by num_items_in_batch. Gradient accumulation and data parallelism therefore give the same
results. Evaluation that requests predictions still gets logits from the library's own forward.

TRL's SFTTrainer requests log-probs, entropy and accuracy of each token from its model, and computes loss and metrics
from them. With that trainer, the mixin answers the request and leaves everything else to TRL: loss types, metrics and
packing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmsd_fast.integrations.head import Head, add_head_call, base_of, same_dtype, shifted_rows
from rmsd_fast.losses import linear_cross_entropy

try:
    from transformers import Trainer
    from transformers.loss.loss_utils import ForCausalLMLoss
except ImportError as error:
    raise ImportError(
        f"rmsd_fast.integrations.hf needs transformers ({error}); pip install 'rmsd-fast[train]' accelerate"
    ) from error


SFT_TRAINER = ("trl.trainer.sft_trainer", "SFTTrainer")


class FusedLossMixin:
    """Add the fused loss to a Trainer class. List the mixin before the trainer among the base classes.

    Args:
        memory_budget_bytes: memory budget for logits, see rmsd_fast.losses.
    Raises:
        RuntimeError: the fused loss does not support a setting of the trainer or the model; the message names it.
            Problems that only a forward pass can detect (see add_head_call) are raised at the first step.
    """

    def __init__(self, *args: Any, memory_budget_bytes: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_budget_bytes = memory_budget_bytes
        self._loss_only = False
        self._fused_calls = 0
        self._is_sft = any((cls.__module__, cls.__name__) == SFT_TRAINER for cls in type(self).__mro__)
        _refuse_settings(self)
        if self._is_sft:
            _prepare_sft(self)
        else:
            _prepare(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        _prepare(model)
        return model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the fused loss, or the library's own loss if the caller requests outputs, which require logits."""
        if self._is_sft:
            calls = self._fused_calls
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self._fused_calls == calls:
                raise RuntimeError(
                    f"{type(self).__name__}: expected a call of the model with fused_lm_head=True, as in TRL 1.16, got "
                    "a loss without the fused head; install trl==1.16.0"
                )
            return result
        if return_outputs and not self._loss_only:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            raise ValueError(f"labels: expected labels or shift_labels among the inputs, got {sorted(inputs)}")
        inputs = {**inputs, "head_call": self._fused_loss}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Run the library's own step. If only the loss is requested, it is computed without logits."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._loss_only = False

    def _fused_loss(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        hidden, head = same_dtype(hidden, head)
        rows, targets = shifted_rows(hidden, labels, shift_labels)
        with torch.autocast(rows.device.type, enabled=False):
            loss = linear_cross_entropy(
                rows,
                head.weight,
                targets,
                normalizer=num_items_in_batch,
                memory_budget_bytes=self.memory_budget_bytes,
                **head.arguments(),
            )
        return {"loss": loss}

    def _per_token(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        from rmsd_fast.integrations.trl_head import per_token_output

        self._fused_calls += 1
        hidden, head = same_dtype(hidden, head)
        return per_token_output(
            hidden,
            head,
            labels,
            shift_labels,
            num_items_in_batch,
            with_top1=True,
            memory_budget_bytes=self.memory_budget_bytes,
        )


class FusedTrainer(FusedLossMixin, Trainer):
    """transformers.Trainer with a fused cross entropy."""


def _prepare(model: nn.Module) -> None:
    base = base_of(model)
    add_head_call(base, check_loss=True)
    if getattr(base, "loss_function", None) is not ForCausalLMLoss:
        raise RuntimeError(
            f"{type(base).__name__}: expected transformers' ForCausalLMLoss as its loss, which the fused cross entropy "
            f"replaces, got {getattr(base, 'loss_function', None)}"
        )


def _prepare_sft(trainer: Any) -> None:
    # Import trl here, because it is needed only if its trainer is among the base classes.
    from rmsd_fast.integrations.trl_head import answer_fused_head, missing_hooks

    missing = missing_hooks(trainer.model)
    if missing:
        raise RuntimeError(
            f"{type(trainer).__name__}: expected the SFTTrainer of TRL 1.16, got one without {', '.join(missing)}; "
            "install trl==1.16.0"
        )
    answer_fused_head(trainer.model, trainer._per_token)


def _refuse_settings(trainer: Any) -> None:
    after = type(trainer).__mro__[type(trainer).__mro__.index(FusedLossMixin) + 1 :]
    owner = next(cls for cls in after if "compute_loss" in vars(cls))
    arguments = trainer.args
    refused = {
        "label_smoothing_factor": arguments.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "torch_compile": bool(getattr(arguments, "torch_compile", False)),
        "use_liger_kernel (its fused cross entropy)": bool(getattr(arguments, "use_liger_kernel", False)),
        "nn.DataParallel (several GPUs in one process; start with torchrun)": arguments.n_gpu > 1,
        "sequence or context parallelism": getattr(trainer.accelerator, "parallelism_config", None) is not None,
        f"{owner.__module__}.{owner.__name__}.compute_loss (a custom loss)": owner is not Trainer
        and not trainer._is_sft,
    }
    names = [name for name, on in refused.items() if on]
    if names:
        raise RuntimeError(
            f"the fused loss does not support: {', '.join(names)}; leave it out, or train without the fused loss"
        )
