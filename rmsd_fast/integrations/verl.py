"""Fused head, a clipped policy loss and log-ratio distillation losses for verl.

    from rmsd_fast.integrations import verl as fused
    fused.register_policy_loss("rmsd")                  # actor.policy_loss.loss_mode=rmsd
    fused.register_distillation_loss("rmsd_k3", kl="k3")   # distillation_loss.loss_mode=rmsd_k3
    fused.install_fused_head()                          # actor's use_fused_kernels=True, with any backend

verl's workers are separate processes. Each of them imports the module named by model.external_lib or the environment
variable VERL_USE_EXTERNAL_MODULES once. Put these calls at the top level of a module and set one of the two to its
name. Importing this module itself has no effect.

verl itself adds KL and entropy terms to a policy loss, so the registered loss does not include them. This module is
written for verl 0.9.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rmsd_fast.integrations.head import whole
from rmsd_fast.losses import linear_logprob
from rmsd_kernels.heads.policy_formula import clipped_objective, guarded_exp, kl_estimate

try:
    from verl.trainer.ppo import core_algos
except ImportError as error:
    raise ImportError(f"rmsd_fast.integrations.verl needs verl ({error}); pip install verl") from error

POLICY_ARGUMENTS = (
    "old_log_prob",
    "log_prob",
    "advantages",
    "response_mask",
    "loss_agg_mode",
    "config",
    "rollout_is_weights",
)
DISTILLATION_ARGUMENTS = ("config", "distillation_config", "model_output", "data")
# Modules and names where verl's models look up their fused head at each forward pass.
HEADS = (
    ("verl.utils.experimental.torch_functional", "FusedLinearForPPO"),
    ("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy"),
)


class FusedLinear(nn.Module):
    """Compute log-probs and entropies from hidden states and head: verl's FusedLinearForPPO with the fused losses.

    Args:
        chunk_size: argument of verl, ignored; see memory_budget_bytes.
        impl_backend: argument of verl, ignored.
        memory_budget_bytes: memory budget for logits, see rmsd_fast.losses.
    """

    def __init__(
        self, chunk_size: int = 512, impl_backend: str = "torch", *, memory_budget_bytes: int | None = None
    ) -> None:
        super().__init__()
        self.memory_budget_bytes = memory_budget_bytes

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Return (log_probs, entropy), both float32 with the shape of input_ids.

        Args:
            hidden_states: hidden states, [..., D].
            vocab_weights: weight of the head, [V, D].
            input_ids: token that each position predicts, [...].
            temperature: one value, or one per position in the shape of input_ids.
        Raises:
            RuntimeError: vocab_weights is a trained DTensor.
        """
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"input_ids: expected shape {list(hidden_states.shape[:-1])}, that of hidden_states without its last "
                f"axis, got {list(input_ids.shape)}"
            )
        vocab_weights = whole(vocab_weights)
        dtype = vocab_weights.dtype
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if isinstance(temperature, Tensor) and temperature.ndim:
            temperature = temperature.expand(input_ids.shape).flatten()
        with torch.autocast(device, enabled=False):
            logp, entropy = linear_logprob(
                hidden_states.flatten(0, -2).to(dtype),
                vocab_weights.to(dtype),
                input_ids.flatten().to(torch.int64),
                temperature=temperature,
                # All positions are scored, and verl removes padding later.
                ignore_index=None,
                return_entropy=True,
                memory_budget_bytes=self.memory_budget_bytes,
            )
        return logp.view(input_ids.shape), entropy.view(input_ids.shape)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Replace verl's function of this name. Return (log_probs, entropy), both float32 [T] for any shape of labels.

    Raises:
        RuntimeError: the head is split over a tensor-parallel group, or a reduction is requested.
    """
    if reduction != "none" or (dist_process_group is not None and dist_process_group.size() > 1):
        raise RuntimeError(
            f"fused head: expected reduction='none' and no tensor-parallel group, got reduction={reduction!r} and a "
            f"vocabulary split over {dist_process_group}"
        )
    logp, entropy = FusedLinear()(hidden, weight, labels, temperature)
    return logp.flatten(), entropy.flatten()


def install_fused_head() -> Callable[[], None]:
    """Make verl's models in this process use the fused head, regardless of their backend.

    This replaces module-level names, because verl offers no other hook. Models of verl's Megatron engine bind their
    head at import and are not affected.

    Returns:
        A function that restores verl's own head.
    Raises:
        RuntimeError: this version of verl lacks a name to replace; the message names it.
    """
    ours = {"FusedLinearForPPO": FusedLinear, "linear_cross_entropy": linear_cross_entropy}
    targets = [(_module(path, name), name) for path, name in HEADS]
    before = [(module, name, getattr(module, name)) for module, name in targets]
    for module, name in targets:
        setattr(module, name, ours[name])

    def restore() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return restore


def register_policy_loss(name: str = "rmsd", *, importance_level: str = "token") -> Callable[..., Any]:
    """Register the clipped policy loss of rmsd_fast.losses with verl, and return it.

    loss = -w * min(r*A, clip(r, 1-clip_ratio_low, 1+clip_ratio_high)*A), aggregated by verl's loss_agg_mode. Unlike
    verl's "vanilla", it has no second clip for negative advantages (clip_ratio_c), and its log-ratio is clamped only
    from above, at 80, where exp would overflow.

    Args:
        name: name of the loss in verl's settings.
        importance_level: "token" or "sequence". With "sequence", r is the exponential of the response's mean log-ratio,
            as in gspo.
    Raises:
        ValueError: the name is already registered.
        RuntimeError: this version of verl calls its policy losses with other arguments.
    """
    if importance_level not in ("token", "sequence"):
        raise ValueError(f"importance_level: expected 'token' or 'sequence', got {importance_level!r}")
    registry = _module("verl.trainer.ppo.core_algos", "POLICY_LOSS_REGISTRY").POLICY_LOSS_REGISTRY
    _check_free(name, registry)
    _check_arguments(registry.get("vanilla"), POLICY_ARGUMENTS, "the policy loss 'vanilla'")

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        mask = response_mask.bool()
        # Padding may hold any value, including NaN, and must not reach a gradient.
        log_ratio = torch.where(mask, log_prob - old_log_prob, torch.zeros_like(log_prob))
        count = mask.sum(-1, keepdim=True).clamp(min=1)
        level = log_ratio if importance_level == "token" else (log_ratio.sum(-1, keepdim=True) / count)
        ratio = guarded_exp(level)
        low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
        high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
        objective, clipped = clipped_objective(ratio, advantages, low, high)
        if rollout_is_weights is not None:
            objective = objective * rollout_is_weights
        loss = core_algos.agg_loss(
            loss_mat=-objective, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
        tokens = mask.sum().clamp(min=1)
        # Return numbers, like verl's own policy losses. Otherwise verl would read the tensors one by one.
        return loss, {
            "actor/pg_clipfrac": ((clipped & mask).sum() / tokens).item(),
            "actor/ppo_kl": (-log_ratio.detach().sum() / tokens).item(),
            "actor/pg_clipfrac_lower": 0.0,
        }

    return core_algos.register_policy_loss(name)(policy_loss)


def register_distillation_loss(
    name: str = "rmsd_k3", *, kl: str = "k3", kl_log_ratio_clip: float | None = None
) -> Callable[..., Any]:
    """Register an estimator of KL(student || teacher) from the teacher's log-probs of the sampled tokens; return it.

    With d = teacher - student: "k1" = -d, "k2" = d²/2, "k3" = exp(d) - d - 1. Unlike verl's own losses, which clamp d
    at 20 and the value at 10, they are exact.

    Args:
        name: name of the loss in verl's settings.
        kl: "k1", "k2" or "k3".
        kl_log_ratio_clip: if set to c, clamp d to [-c, c].
    Raises:
        ValueError: the name is already registered, or kl is unknown.
        RuntimeError: this version of verl has no registry of distillation losses.
    """
    if kl not in ("k1", "k2", "k3"):
        raise ValueError(f"kl: expected 'k1', 'k2' or 'k3', got {kl!r}; the full KL needs the teacher's vocabulary")
    losses = _module("verl.trainer.distillation.losses", "register_distillation_loss")
    metrics = _module("verl.utils.metric", "Metric")
    to_padded = _module("verl.workers.utils.padding", "no_padding_2_padding").no_padding_2_padding
    _check_free(name, losses.DISTILLATION_LOSS_REGISTRY)
    _check_arguments(losses.DISTILLATION_LOSS_REGISTRY.get("k3"), DISTILLATION_ARGUMENTS, "the distillation loss 'k3'")

    def distillation_loss(
        config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        if kl == "k1" and not distillation_config.distillation_loss.use_policy_gradient:
            raise ValueError(
                f"{name}: the expected gradient of k1 as a loss is zero; set use_policy_gradient, or register k2 or k3"
            )
        student = to_padded(model_output["log_probs"], data)
        teacher = to_padded(data["teacher_logprobs"], data).squeeze(-1)
        mask = data["response_mask"]
        mask = (mask.to_padded_tensor(0) if mask.is_nested else mask).bool()
        # Padding contributes 0 and no gradient.
        losses_BL = kl_estimate(student, torch.where(mask, teacher.detach(), student.detach()), kl, kl_log_ratio_clip)
        losses_BL = torch.where(mask, losses_BL, torch.zeros_like(losses_BL))
        mean = losses_BL.detach().abs().sum() / mask.sum().clamp(min=1)
        return losses_BL, {"distillation/abs_loss": metrics.Metric(metrics.AggregationType.MEAN, mean)}

    settings = losses.DistillationLossSettings(names=[name], use_estimator=True)
    return losses.register_distillation_loss(settings)(distillation_loss)


def _module(path: str, name: str) -> ModuleType:
    """Return a module of verl, and check that it contains `name`."""
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise RuntimeError(f"verl: expected the module {path}, got none ({error}); install verl 0.9") from error
    if not hasattr(module, name):
        raise RuntimeError(f"verl: expected {path}.{name}, got a version without it; install verl 0.9")
    return module


def _check_free(name: str, registry: dict[str, Any]) -> None:
    if name in registry:
        raise ValueError(f"name: {name!r} is already registered; verl has {', '.join(registry)}; choose another name")


def _check_arguments(function: Callable[..., Any] | None, expected: tuple[str, ...], what: str) -> None:
    actual = tuple(inspect.signature(function).parameters) if function is not None else ()
    if actual != expected:
        raise RuntimeError(
            f"{what}: expected arguments {', '.join(expected)}, got {', '.join(actual) or 'none'}; install verl 0.9"
        )
