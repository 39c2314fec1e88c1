"""Run a transformers model up to its language-model head, and pass hidden states and head to a loss inside forward.

The loss must run inside forward because DDP, FSDP and ZeRO-3 hook into it. A loss computed after forward would use a
sharded head, or its gradient would not be reduced.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Inputs of the loss that the model's body does not accept.
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")
# Config fields by which model families multiply their logits before the softcap, and the exponent of each.
LOGIT_FACTORS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# Model types for which logits_scaling multiplies instead of dividing.
MULTIPLIED_BY_SCALING = ("hyperclovax",)


class Head(NamedTuple):
    """An unsharded language-model head on this device: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, D].
        bias: [V], or None.
        softcap: softcap of the logits, or None.
        scale: factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def arguments(self, temperature: float = 1.0) -> dict[str, Any]:
        """Return bias, softcap and temperature for the losses of rmsd_fast.losses.

        cap_c(s*x)/T = cap_{c/s}(x) / (T/s), so a factor of the logits needs no separate argument.
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "softcap": softcap, "temperature": temperature / self.scale}


def add_head_call(model: nn.Module, *, check_loss: bool = False) -> None:
    """Make this model accept `model(..., head_call=f)`, which runs its body and returns f(hidden, head, **loss inputs).

    hidden is [B, L, D], and the loss inputs are the LOSS_INPUTS that the caller passed. Without head_call, the
    model behaves as before. The first head_call compares the model's own logits with those of the head, because weights
    are gathered and autocast is active at that point. Calling this function again for the same model repeats the check.

    Args:
        model: a transformers model with a language-model head.
        check_loss: whether the check also compares the model's own loss for labels.
    Raises:
        RuntimeError: a fused loss cannot replace the model's head; the message gives the reason. The check at the first
            head_call may also raise this error.
    """
    _check_model(model)
    model._head_is_checked, model._check_loss = False, check_loss
    if hasattr(model, "_forward_without_head"):
        return
    # Use an attribute instead of a closure, so that a deep copy uses its own forward.
    model._forward_without_head = model.forward

    # Keep the signature of the class, because trainers read the model's inputs from it.
    @functools.wraps(type(model).forward)
    def forward(self: nn.Module, *args: Any, head_call: Any = None, **kwargs: Any) -> Any:
        if head_call is None:
            return self._forward_without_head(*args, **kwargs)
        if not self._head_is_checked:
            _check_logits(self, next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
            self._head_is_checked = True
        for_loss = {name: kwargs.pop(name) for name in LOSS_INPUTS if name in kwargs}
        body = self.base_model(*args, **{**kwargs, "use_cache": False, "return_dict": True})
        return head_call(body.last_hidden_state, read_head(self), **for_loss)

    model.forward = types.MethodType(forward, model)


def base_of(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_head(model: nn.Module) -> Head:
    """Return the head of a model, gathered if it is sharded. Call this inside the model's forward.

    ZeRO-3 gathers a parameter that is read inside its model's forward, and gathers it again for backward. FSDP2 has
    already gathered the parameters of its root module there.
    """
    layer = model.get_output_embeddings()
    weight, bias = whole(layer.weight), whole(layer.bias)
    if weight.numel() == 0:
        raise RuntimeError(
            f"{type(model).__name__}: expected the head's weight, got an empty tensor, as ZeRO-3 leaves parameters "
            "outside their model's forward; call the wrapped model, or train with ZeRO-2"
        )
    text = _text_config(model)
    return Head(weight, bias, getattr(text, "final_logit_softcapping", None), _logit_scale(text))


def whole(parameter: Tensor | None) -> Tensor | None:
    """Return a head's parameter, gathered if it is a DTensor.

    Raises:
        RuntimeError: the DTensor is trained. Its gradient would not be reduced over the processes outside the forward
            of its own module.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"head: expected a frozen or unsharded parameter, got a trained one sharded over {parameter.device_mesh}, "
            "whose gradient would not be reduced. FSDP2 does this to an output embedding that is its own unit, and "
            "tensor parallelism to every one; leave it in the root unit (no fully_shard on it), or freeze it"
        )
    return parameter.full_tensor()


def shifted_rows(hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return hidden states as rows [T, D], and the target of each row, int64 [T]; -100 means no target.

    Args:
        hidden: hidden states, [B, L, D].
        labels: labels, [B, L]. The position before a label predicts it, and the last position predicts nothing.
        shift_labels: labels that are already shifted by one, [B, L]; labels is then ignored.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels: expected labels or shift_labels among the model's inputs, got neither")
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    return hidden.flatten(0, 1), shift_labels.to(hidden.device).flatten()


def same_dtype(hidden: Tensor, head: Head, *, float32: bool = False) -> tuple[Tensor, Head]:
    """Return hidden states and head in the dtype in which the model's own head would compute.

    This is autocast's dtype if autocast is enabled, otherwise the head's. float32=True forces float32.
    """
    dtype = head.weight.dtype
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if float32:
        dtype = torch.float32
    bias = None if head.bias is None else head.bias.to(dtype)
    return hidden.to(dtype), head._replace(weight=head.weight.to(dtype), bias=bias)


def _check_model(model: nn.Module) -> None:
    name = type(model).__name__
    missing = [
        attribute for attribute in ("config", "base_model", "get_output_embeddings") if not hasattr(model, attribute)
    ]
    if missing:
        raise RuntimeError(f"{name}: expected a transformers model, got a model without {', '.join(missing)}")
    config, text = model.config, _text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise RuntimeError(f"{name}: encoder-decoder models are not supported")
    if model.base_model is model:
        raise RuntimeError(f"{name}: expected a model with a language-model head, got a body without one")
    layer = model.get_output_embeddings()
    # A LoRA or quantized layer has another type and forward, so its weight alone is not the head.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise RuntimeError(
            f"{name}: expected torch.nn.Linear as the head, got {type(layer).__module__}.{type(layer).__name__}; a "
            "fused loss uses only its weight and would ignore an adapter or quantization, so leave the output "
            "embedding out of target_modules and modules_to_save"
        )
    if getattr(text, "output_router_logits", False):
        raise RuntimeError(f"{name}: output_router_logits adds a router loss that is not computed here; disable it")
    _logit_scale(text)


def _check_logits(model: nn.Module, device: torch.device) -> None:
    """Compare the model's own forward with body and head on four tokens.

    Model families differ in the operations after the head, and in the loss that they compute.
    """
    # Check again, because adapters and wrappers may have been added in the meantime.
    _check_model(model)
    name = type(model).__name__
    # The last label is at a masked position, because causal losses count it anyway.
    labels = torch.tensor([[-100, 2, -100, 1]], device=device)
    batch = {
        "input_ids": torch.tensor([[1, 2, 1, 2]], device=device),
        "attention_mask": torch.tensor([[1, 1, 1, 0]], device=device),
        "use_cache": False,
    }
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model_output = model._forward_without_head(**batch, **({"labels": labels} if model._check_loss else {}))
            body = model.base_model(**batch, return_dict=True)
            hidden, head = same_dtype(body.last_hidden_state, read_head(model))
            with torch.autocast(device.type, enabled=False):
                expected = head.scale * F.linear(hidden, head.weight, head.bias).float()
    finally:
        for module, mode in training:
            module.training = mode
    expected = expected if head.softcap is None else head.softcap * torch.tanh(expected / head.softcap)
    logits = model_output.logits.float()
    # Loose enough for 16-bit rounding, but tight enough to detect a missing factor or term.
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected, rtol=0.01, atol=0.01 * float(logits.abs().max())
    ):
        raise RuntimeError(
            f"{name}: cannot be fused, because its logits are not its body's last hidden states times its head's "
            f"weight, with the factors of its config ({', '.join(LOGIT_FACTORS)}, final_logit_softcapping)"
        )
    if model._check_loss:
        shifted = F.cross_entropy(logits[0, :-1], labels[0, 1:])
        if not torch.allclose(model_output.loss.float(), shifted, rtol=1e-4):
            raise RuntimeError(
                f"{name}: cannot be fused, because its loss for labels is not the mean cross entropy of labels shifted "
                f"by one, which the fused loss computes (four tokens: expected {float(shifted):.6g}, got "
                f"{float(model_output.loss):.6g})"
            )


def _text_config(model: nn.Module) -> Any:
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _logit_scale(text: Any) -> float:
    scale = 1.0
    for field, power in LOGIT_FACTORS.items():
        value = getattr(text, field, None)
        if value is not None:
            multiplies = power == 1 or getattr(text, "model_type", "") in MULTIPLIED_BY_SCALING
            scale *= value if multiplies else 1 / value
    if not scale > 0:
        raise RuntimeError(f"model config: expected a factor above 0 for the logits, got {scale}")
    return float(scale)
