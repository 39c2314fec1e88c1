"""Runs a transformers model up to its language-model head and hands hidden states and head to a loss, inside forward.

Inside, because DDP, FSDP and ZeRO-3 do their work around the model's forward: a loss computed after it would see a head
that is sharded or a gradient that nobody reduces.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a loss takes and a model's body does not.
LOSS_INPUTS = ("labels", "shift_labels", "num_items_in_batch")
# Configuration fields by which model families multiply their logits before the softcap, and the power they enter with.
LOGIT_FACTORS = {"logit_scale": 1, "output_multiplier": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
# Here the field of that name multiplies.
MULTIPLIED_BY_SCALING = ("hyperclovax",)


class Head(NamedTuple):
    """A language-model head, whole on this device: logits = softcap(scale * (hidden @ weight.T + bias)).

    weight [V, D], bias [V] or None, softcap None = none.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float

    def arguments(self, temperature: float = 1.0) -> dict[str, Any]:
        """bias, softcap and temperature for the losses of rmsd_fast.losses.

        cap_c(s*x)/T = cap_{c/s}(x) / (T/s), so a factor on the logits needs no argument of its own.
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"bias": self.bias, "softcap": softcap, "temperature": temperature / self.scale}


def add_head_call(model: nn.Module, *, check_loss: bool = False) -> None:
    """Give this one model `model(..., head_call=f)`: its body runs, the result is f(hidden, head, **loss inputs).

    hidden is [B, L, D]; loss inputs are those of LOSS_INPUTS that the caller gave. Without head_call the model is what
    it was. Its first head_call compares its logits, and with check_loss its loss for labels, with what stands for them:
    there weights are whole and autocast is on, if ever. A second call for the same model asks for that check again.

    Raises:
        RuntimeError: the model's head is nothing that a fused loss may replace; says what it found. Also by that check.
    """
    _check_model(model)
    model._head_is_checked, model._check_loss = False, check_loss
    if hasattr(model, "_forward_without_head"):
        return
    # An attribute, not a closure: copy.deepcopy then binds the copy's own.
    model._forward_without_head = model.forward

    # The signature stays that of the class: trainers read from it which inputs the model takes.
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
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_head(model: nn.Module) -> Head:
    """Head of a model, gathered where it is sharded. To be called inside the model's forward.

    ZeRO-3 gathers a parameter that is read inside its model's forward, and again for backward; FSDP2 has gathered those
    of its root module there.
    """
    layer = model.get_output_embeddings()
    weight, bias = whole(layer.weight), whole(layer.bias)
    if weight.numel() == 0:
        raise RuntimeError(
            f"{type(model).__name__}: the head's weight is empty, as ZeRO-3 leaves parameters outside their model's "
            "forward; call the wrapped model, or train with ZeRO-2"
        )
    text = _text_config(model)
    return Head(weight, bias, getattr(text, "final_logit_softcapping", None), _logit_scale(text))


def whole(parameter: Tensor | None) -> Tensor | None:
    """A head's parameter, gathered where it is a DTensor that is not trained.

    Raises:
        RuntimeError: it is trained. Outside its own module's forward nobody reduces its gradient over the processes.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the head is trained and sharded over {parameter.device_mesh}, as FSDP2 leaves an output embedding that "
            "is a unit of its own, and tensor parallelism any; its gradient would not be reduced. Leave it in the root "
            "unit (no fully_shard on it), or freeze it"
        )
    return parameter.full_tensor()


def shifted_rows(hidden: Tensor, labels: Tensor | None, shift_labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Hidden states [B, L, D] as rows [T, D] and the target of each, int64 [T], -100 where there is none.

    labels [B, L]: the position before a label predicts it, and the last position predicts nothing. shift_labels [B, L]:
    already moved by one.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels: expected labels or shift_labels among the model's inputs, got neither")
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    return hidden.flatten(0, 1), shift_labels.to(hidden.device).flatten()


def same_dtype(hidden: Tensor, head: Head, *, float32: bool = False) -> tuple[Tensor, Head]:
    """Hidden states and head in the dtype that the model's own head would compute in.

    That is autocast's where autocast is on, else the head's; float32=True: float32 whatever else holds.
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
        raise RuntimeError(f"{name}: expected a transformers model, looked for {', '.join(missing)} and found none")
    config, text = model.config, _text_config(model)
    if getattr(config, "is_encoder_decoder", False):
        raise RuntimeError(f"{name}: encoder-decoder models are not supported")
    if model.base_model is model:
        raise RuntimeError(f"{name}: expected a model with a language-model head on a body, got a body alone")
    layer = model.get_output_embeddings()
    # A LoRA or quantised layer is another type with another forward: its weight alone is not the head.
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise RuntimeError(
            f"{name}: the head is a {type(layer).__module__}.{type(layer).__name__}, expected torch.nn.Linear: a fused "
            "loss multiplies by its weight alone, so an adapter or a quantisation on it would be dropped. Leave the "
            "output embedding out of target_modules and modules_to_save"
        )
    if getattr(text, "output_router_logits", False):
        raise RuntimeError(f"{name}: output_router_logits adds a router loss that is not computed here; switch it off")
    _logit_scale(text)


def _check_logits(model: nn.Module, device: torch.device) -> None:
    """Four tokens through the model's own forward, and through body and head: families differ in what follows a head,
    and in the loss that they make of it."""
    # Once more: adapters and wrappers may have come since.
    _check_model(model)
    name = type(model).__name__
    # The last label stands at a masked position: causal losses count it all the same.
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
            own = model._forward_without_head(**batch, **({"labels": labels} if model._check_loss else {}))
            body = model.base_model(**batch, return_dict=True)
            hidden, head = same_dtype(body.last_hidden_state, read_head(model))
            with torch.autocast(device.type, enabled=False):
                expected = head.scale * F.linear(hidden, head.weight, head.bias).float()
    finally:
        for module, mode in training:
            module.training = mode
    expected = expected if head.softcap is None else head.softcap * torch.tanh(expected / head.softcap)
    logits = own.logits.float()
    # Loose enough for 16-bit rounding, tight for a factor or a term that is missing.
    if logits.shape != expected.shape or not torch.allclose(
        logits, expected, rtol=0.01, atol=0.01 * float(logits.abs().max())
    ):
        raise RuntimeError(
            f"{name}: its logits are not its head's weight on its body's last hidden states, followed by the factors "
            f"of its configuration ({', '.join(LOGIT_FACTORS)}, final_logit_softcapping); it cannot be fused"
        )
    if model._check_loss:
        shifted = F.cross_entropy(logits[0, :-1], labels[0, 1:])
        if not torch.allclose(own.loss.float(), shifted, rtol=1e-4):
            raise RuntimeError(
                f"{name}: its loss for labels is not the mean cross entropy of labels shifted by one (four tokens gave "
                f"{float(own.loss):.6g}, expected {float(shifted):.6g}), which the fused loss stands for"
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
        raise RuntimeError(f"the model's configuration multiplies its logits by {scale}; expected a factor above 0")
    return float(scale)
