"""transformers' Trainer with a fused cross entropy: hidden states to loss, without logits.

    from rmsd_fast.integrations.hf import FusedTrainer     # in place of transformers.Trainer
    class MyTrainer(FusedLossMixin, SomeTrainer): ...       # for a subclass that keeps Trainer's compute_loss
    class MyTrainer(FusedLossMixin, trl.SFTTrainer): ...    # TRL 1.16, or a subclass of its SFTTrainer

Same loss as the library's own for causal language models: labels shifted by one, -100 left out, sum over the batch's
tokens divided by num_items_in_batch, so gradient accumulation and data parallelism give what they give there.
Evaluation that asks for predictions still gets logits, from the library's own forward.

TRL's SFTTrainer asks its model for log-probs, entropy and accuracy of each token and makes loss and metrics of them.
Before it, the mixin answers that request and leaves all else to TRL: the loss types, the metrics, packing.
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
    """Put before a Trainer class. memory_budget_bytes: of the logits that are alive at a time (rmsd_fast.losses).

    Raises:
        RuntimeError: a setting of the trainer, or the model, that the fused loss cannot carry over; names it. What
            only a forward pass can show (see add_head_call) is raised at the first step.
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
        """Fused, unless the caller wants outputs too: those need logits, and come from the library's own loss."""
        if self._is_sft:
            calls = self._fused_calls
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if self._fused_calls == calls:
                raise RuntimeError(
                    f"{type(self).__name__}: the loss was computed without the fused head; looked for a call of the "
                    "model with fused_lm_head=True, as TRL 1.16 makes it"
                )
            return result
        if return_outputs and not self._loss_only:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            raise ValueError(f"labels: expected them among the inputs for a cross entropy, got {sorted(inputs)}")
        inputs = {**inputs, "head_call": self._fused_loss}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The library's own; where only the loss is asked for, it is computed without logits."""
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
            f"{type(base).__name__}: its loss is {getattr(base, 'loss_function', None)}, expected transformers' "
            "ForCausalLMLoss, which the fused cross entropy stands for"
        )


def _prepare_sft(trainer: Any) -> None:
    # trl is there, as its trainer is among the base classes; without such a trainer it is not needed.
    from rmsd_fast.integrations.trl_head import answer_fused_head, missing_hooks

    missing = missing_hooks(trainer.model)
    if missing:
        raise RuntimeError(
            f"{type(trainer).__name__}: looked for {', '.join(missing)} and did not find it; the fused loss works with "
            "the SFTTrainer of TRL 1.16"
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
        f"{owner.__module__}.{owner.__name__}.compute_loss (a loss of its own)": owner is not Trainer
        and not trainer._is_sft,
    }
    names = [name for name, on in refused.items() if on]
    if names:
        raise RuntimeError(f"the fused loss cannot carry over: {', '.join(names)}; leave it out, or train without")
