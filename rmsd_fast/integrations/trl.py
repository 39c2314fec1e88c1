"""Fused head for TRL's GRPOTrainer and SFTTrainer.

    from rmsd_fast.integrations.trl import FusedGRPOTrainer     # in place of trl.GRPOTrainer
    class MyTrainer(FusedGRPOMixin, SomeGRPOTrainer): ...        # for a subclass of it
    from rmsd_fast.integrations.trl import FusedSFTTrainer      # in place of trl.SFTTrainer, see `hf`
    class MyTrainer(FusedLossMixin, SomeSFTTrainer): ...

GRPO has two objectives, selected by `fused_objective`:

- "policy": compute the whole loss from hidden states in one pass (6TDV of work, no logits kept). Requires TRL settings
  of a clipped ratio with a k3 KL. Prompt, padding, tool and masked tokens are never multiplied by the head.
- "log_prob": use TRL's own loss on log-probs and entropies of the fused head. Exact for every loss_type.
- "auto" (default): "policy" if every setting allows it, otherwise "log_prob". `trainer.fused_objective` holds the
  choice.

Both return TRL's loss, and also compute old and reference log-probs with the fused head. With "policy", TRL's metrics
are logged with two exceptions. clip_ratio/low_* and high_* of off-policy steps are missing, because their per-token
values are never computed. clip_ratio/region_mean is a mean over tokens in which tokens whose vLLM importance ratio is 0
never count as clipped (TRL counts them like others). This module is written for TRL 1.16, whose trainers call their
model with `fused_lm_head=True`. Versions of TRL that do not are rejected, and "policy" requires 1.16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from rmsd_fast.integrations.head import Head, base_of, same_dtype, shifted_rows
from rmsd_fast.integrations.hf import FusedLossMixin
from rmsd_fast.losses import linear_policy_loss

try:
    import trl
    from trl import GRPOTrainer, SFTTrainer

    from rmsd_fast.integrations.trl_head import answer_fused_head, missing_hooks, per_token_output
except ImportError as error:
    raise ImportError(
        f"rmsd_fast.integrations.trl needs trl ({error}); pip install trl==1.16.0, keeping the installed torch "
        "(Python 3.11 or later)"
    ) from error

OBJECTIVES = ("auto", "policy", "log_prob")
# Loss types with a clipped ratio, which differ only in the weights of the tokens.
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
# All keys of a text batch in TRL 1.16. sampling_per_token_logps is already included in importance_sampling_ratio.
TEXT_INPUTS = (
    "prompt_ids",
    "prompt_mask",
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "num_items_in_batch",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)
USED = (
    "model",
    "accelerator",
    "args",
    "temperature",
    "beta",
    "epsilon_low",
    "epsilon_high",
    "loss_type",
    "importance_sampling_level",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "aux_loss_enabled",
    "max_completion_length",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "_metrics",
    "_entropy_bonus_enabled",
    "_compute_loss",
    "_get_per_token_logps_and_entropies",
)


class FusedGRPOMixin:
    """Add the fused head to a GRPOTrainer class. List the mixin before the trainer among the base classes.

    Args:
        fused_objective: "auto", "policy" or "log_prob"; see the module docstring.
        memory_budget_bytes: memory budget for logits, see rmsd_fast.losses.
    Raises:
        RuntimeError: this version of TRL lacks a required hook, or a setting or the model is not supported.
    """

    def __init__(
        self, *args: Any, fused_objective: str = "auto", memory_budget_bytes: int | None = None, **kwargs: Any
    ) -> None:
        if fused_objective not in OBJECTIVES:
            raise ValueError(f"fused_objective: expected one of {', '.join(OBJECTIVES)}, got {fused_objective!r}")
        super().__init__(*args, **kwargs)
        _check_version(self)
        refused = {
            "router_aux_loss_coef (mixture-of-experts models)": self.aux_loss_enabled,
            "torch_compile": getattr(self.args, "torch_compile", False),
            "use_liger_kernel (its own loss)": getattr(self.args, "use_liger_kernel", False),
        }
        if any(refused.values()):
            names = ", ".join(name for name, given in refused.items() if given)
            raise RuntimeError(f"the fused head does not support {names}; leave it out")
        unmapped = unmapped_settings(self)
        if fused_objective == "policy" and unmapped:
            raise RuntimeError(
                f"fused_objective='policy' does not support {', '.join(unmapped)}; use 'log_prob' or 'auto'"
            )
        if fused_objective == "auto":
            fused_objective = "log_prob" if unmapped else "policy"
        self.fused_objective = fused_objective
        self.memory_budget_bytes = memory_budget_bytes
        self._fused_calls = 0
        answer_fused_head(self.model, functools.partial(self._log_probs, with_entropy=True))
        if getattr(self, "ref_model", None) is not None:
            reference = self.accelerator.unwrap_model(self.ref_model)
            answer_fused_head(reference, functools.partial(self._log_probs, with_entropy=False))

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        calls = self._fused_calls
        loss = (
            super()._compute_loss(model, inputs) if self.fused_objective == "log_prob" else self._policy(model, inputs)
        )
        if self._fused_calls == calls:
            raise RuntimeError(
                f"trl {trl.__version__}: expected a call of the model with fused_lm_head=True, got a loss without the "
                "fused head; install trl==1.16.0"
            )
        return loss

    def _dtyped(self, hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
        self._fused_calls += 1
        return same_dtype(hidden, head, float32=self.args.cast_lm_head_to_fp32)

    def _log_probs(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        *,
        with_entropy: bool,
    ) -> Any:
        hidden, head = self._dtyped(hidden, head)
        return per_token_output(
            hidden,
            head,
            labels,
            shift_labels,
            num_items_in_batch,
            temperature=self.temperature,
            with_entropy=with_entropy,
            memory_budget_bytes=self.memory_budget_bytes,
        )

    def _policy(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return TRL's loss of a micro-batch, computed in one pass over the head."""
        extra_inputs = [name for name, value in inputs.items() if value is not None and name not in TEXT_INPUTS]
        if extra_inputs:
            raise RuntimeError(
                f"fused_objective='policy': expected a batch with text only, got {', '.join(extra_inputs)}; use "
                "'log_prob'"
            )
        completion = inputs["completion_ids"]
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        ids = torch.cat([inputs["prompt_ids"], completion], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -completion.shape[1] :] = completion.masked_fill(~mask, -100)
        with self.accelerator.autocast():
            result = model(
                input_ids=ids,
                attention_mask=attention,
                labels=labels,
                fused_lm_head=True,
                head_call=functools.partial(self._policy_head, inputs=inputs, mask=mask),
            )
        self._log_policy(result["metrics"], inputs)
        return result["loss"]

    def _policy_head(
        self, hidden: Tensor, head: Head, labels: Tensor, *, inputs: dict[str, Any], mask: Tensor
    ) -> dict[str, Any]:
        hidden, head = self._dtyped(hidden, head)
        rows, targets = shifted_rows(hidden, labels, None)
        scored = targets != -100
        lengths = mask.sum(1)

        def per_row(values: Tensor | None) -> Tensor | None:
            """Return [B, C] or [B, 1] as one value per scored row. Rows and mask have the same order."""
            return None if values is None else values.expand(mask.shape)[mask].float()

        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        if self.use_vllm and self.vllm_importance_sampling_correction:
            # A factor >= 0 of the advantage scales only the policy term, as in TRL.
            advantages = advantages * inputs["importance_sampling_ratio"]
        weights, normalizer = self._normalization(inputs, lengths)
        edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        with torch.autocast(rows.device.type, enabled=False):
            loss, metrics = linear_policy_loss(
                rows[scored],
                head.weight,
                targets[scored],
                per_row(advantages),
                old_logp=per_row(inputs.get("old_per_token_logps")),
                ref_logp=per_row(inputs["ref_per_token_logps"]) if self.beta else None,
                kl_coef=float(self.beta),
                clip_low=float(self.epsilon_low),
                clip_high=float(self.epsilon_high),
                # All rows passed above are scored.
                ignore_index=None,
                importance_level=self.importance_sampling_level,
                cu_seqlens=edges,
                token_weights=per_row(weights),
                normalizer=normalizer,
                memory_budget_bytes=self.memory_budget_bytes,
                **head.arguments(self.temperature),
            )
        return {"loss": loss, "metrics": metrics}

    def _normalization(self, inputs: dict[str, Any], lengths: Tensor) -> tuple[Tensor | None, Any]:
        """Return the token weight of each sequence, [B, 1], and the divisor, by loss_type.

        Args:
            inputs: TRL's batch.
            lengths: number of scored tokens of each sequence, [B].
        """
        batch = len(lengths)
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type == "grpo":
            return 1 / lengths.clamp(min=1).unsqueeze(1), batch * steps
        if self.loss_type == "bnpo":
            return None, lengths.sum().clamp(min=1) * steps
        if self.loss_type == "dr_grpo":
            return None, batch * self.max_completion_length * steps
        if self.loss_type == "luspo":
            return None, batch * steps
        # dapo divides by the tokens of the whole generation batch, scaled to one optimizer step in training.
        normalizer = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        return None, normalizer * steps / self.args.steps_per_generation if self.model.training else normalizer

    def _log_policy(self, metrics: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """Log TRL's metrics: means over the scored tokens of all processes."""
        log = self._metrics["train" if self.model.training else "eval"]
        names = {"entropy": "entropy"} | ({"kl": "kl"} if self.beta else {})
        if inputs.get("old_per_token_logps") is None:
            # The ratio is 1 everywhere, so nothing is clipped.
            for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max"):
                log[f"clip_ratio/{name}"].append(0.0)
        else:
            names["clip_fraction"] = "clip_ratio/region_mean"
        rows = metrics["rows"].float()
        sums = self.accelerator.reduce(torch.stack([rows, *(metrics[name] * rows for name in names)]), reduction="sum")
        for name, total in zip(names.values(), (sums[1:] / sums[0].clamp(min=1)).tolist(), strict=True):
            log[name].append(total)


class FusedGRPOTrainer(FusedGRPOMixin, GRPOTrainer):
    """trl.GRPOTrainer with the fused head."""


class FusedSFTTrainer(FusedLossMixin, SFTTrainer):
    """trl.SFTTrainer with the fused head."""


def unmapped_settings(trainer: GRPOTrainer) -> list[str]:
    """Return settings, with values, that the one-pass policy loss does not support; they require 'log_prob'."""
    arguments = trainer.args
    unsupported = {
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in CLIPPED,
        f"delta={arguments.delta}": arguments.delta is not None,
        f"off_policy_mask_threshold={trainer.off_policy_mask_threshold}": trainer.off_policy_mask_threshold is not None,
        f"top_entropy_quantile={trainer.top_entropy_quantile}": trainer.top_entropy_quantile < 1,
        "entropy_coef or use_adaptive_entropy": trainer._entropy_bonus_enabled,
        "use_bias_correction_kl": arguments.use_bias_correction_kl and trainer.beta != 0,
        f"beta={trainer.beta}": trainer.beta < 0,
        f"epsilon={trainer.epsilon_low}": trainer.epsilon_low < 0 or trainer.epsilon_high < 0,
        f"importance_sampling_level={trainer.importance_sampling_level!r}": trainer.importance_sampling_level
        not in ("token", "sequence"),
        "a model with a vision tower": hasattr(base_of(trainer.model).config, "vision_config"),
        f"trl {trl.__version__}, whose loss may have terms that 1.16 lacks": not trl.__version__.startswith("1.16."),
    }
    # "policy" would not call a subclass's replacement of these methods.
    mro = type(trainer).__mro__
    after = mro[mro.index(FusedGRPOMixin) + 1 :]
    for method, classes in (("_compute_loss", after), ("_get_per_token_logps_and_entropies", mro)):
        owner = next(cls for cls in classes if method in vars(cls))
        unsupported[f"{owner.__name__}.{method}"] = owner is not GRPOTrainer
    return [name for name, on in unsupported.items() if on]


def _check_version(trainer: GRPOTrainer) -> None:
    missing = [name for name in USED if not hasattr(trainer, name)]
    options = ("delta", "use_bias_correction_kl", "cast_lm_head_to_fp32", "steps_per_generation")
    missing += [f"args.{name}" for name in options if not hasattr(trainer.args, name)]
    missing += missing_hooks(trainer.model)
    if missing:
        raise RuntimeError(
            f"trl {trl.__version__}: expected trl 1.16, got a version without {', '.join(missing)}; install trl==1.16.0"
        )
