"""Argument checks of the public losses. Messages name the argument, the expected value, the actual value, and a fix.

Shapes and dtypes are checked on any device. Values (targets in range, quality in [0, 1]) are checked for CPU tensors
only, and not inside torch.compile, because reading them on an accelerator would wait for the device in every step. On
accelerators, a target or index out of range gives NaN and is never dereferenced. RMSD_FAST_DEBUG=1 adds device-side
asserts.
"""

import math
import os

import torch
from torch import Tensor


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, prefix: str = "") -> None:
    """Check hidden [T, D] and weight [V, D], of one floating dtype and on one device, and bias [V]."""
    check_tensor(f"{prefix}hidden", hidden)
    check_tensor(f"{prefix}weight", weight)
    if hidden.ndim != 2:
        raise ValueError(f"{prefix}hidden: expected shape [T, D], got {list(hidden.shape)}; flatten batch and length")
    refuse_sharded(f"{prefix}hidden", hidden)
    refuse_sharded(f"{prefix}weight", weight)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"{prefix}weight: expected shape [V, {hidden.shape[1]}] with V >= 1, got {list(weight.shape)}")
    if not hidden.is_floating_point():
        raise TypeError(f"{prefix}hidden: expected a floating dtype, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{prefix}weight: expected the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast it")
    check_device(f"{prefix}weight", weight, hidden)
    if bias is not None:
        check_vector(f"{prefix}bias", bias, weight.shape[0], hidden)


def check_vector(name: str, values: Tensor, length: int, like: Tensor) -> None:
    """Check for a floating tensor of shape [length] on the device of `like`."""
    check_tensor(name, values)
    refuse_sharded(name, values)
    if values.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}; convert it with .float()")
    check_device(name, values, like)


def check_matrix(name: str, values: Tensor, shape: tuple[int, int], like: Tensor) -> None:
    """Check for a floating tensor of the given shape on the device of `like`."""
    check_tensor(name, values)
    if values.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {values.dtype}")
    check_device(name, values, like)


def check_index(name: str, index: Tensor, length: int | None, limit: int, like: Tensor) -> None:
    """Check for int64 [length] with values in 0..limit-1. length=None allows any length."""
    check_tensor(name, index)
    if index.ndim != 1 or (length is not None and len(index) != length):
        raise ValueError(f"{name}: expected shape [{'P' if length is None else length}], got {list(index.shape)}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected torch.int64, got {index.dtype}")
    check_device(name, index, like)
    if _readable(index) and not bool(((index >= 0) & (index < limit)).all()):
        raise ValueError(f"{name}: expected values in 0..{limit - 1}, got {_extremes(index)}")
    if not _readable(index) and os.environ.get("RMSD_FAST_DEBUG") == "1":
        torch._assert_async(((index >= 0) & (index < limit)).all(), f"{name}: expected values in 0..{limit - 1}")


def check_targets(targets: Tensor, hidden: Tensor, vocabulary: int, ignore_index: int | None) -> None:
    """Check for int64 [T] with values in 0..V-1 or equal to ignore_index."""
    check_tensor("targets", targets)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected shape [{len(hidden)}], one per row of hidden, got {list(targets.shape)}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected torch.int64, got {targets.dtype}")
    check_device("targets", targets, hidden)
    if _readable(targets):
        scored = targets[targets != ignore_index]
        if not bool(((scored >= 0) & (scored < vocabulary)).all()):
            raise ValueError(
                f"targets: expected values in 0..{vocabulary - 1} or ignore_index={ignore_index}, "
                f"got {_extremes(scored)}"
            )
    elif os.environ.get("RMSD_FAST_DEBUG") == "1":
        valid = (targets >= 0) & (targets < vocabulary)
        valid = valid if ignore_index is None else valid | (targets == ignore_index)
        torch._assert_async(valid.all(), f"targets: expected values in 0..{vocabulary - 1} or ignore_index")


def check_temperature(temperature: float | Tensor, hidden: Tensor) -> None:
    """Check for a number above 0, or a tensor of numbers above 0 with shape [T] or []."""
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            check_vector("temperature", temperature, len(hidden), hidden)
        if _readable(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
            raise ValueError("temperature: expected finite values above 0 in every row")
    else:
        check_number("temperature", temperature, above=0.0)


def check_number(name: str, value: float, *, above: float | None = None, least: float | None = None) -> None:
    """Check for a finite number > above and >= least."""
    # Inside torch.compile the number may be a symbol without a value.
    if torch.compiler.is_compiling():
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__} {value!r}")
    if not math.isfinite(value) or (above is not None and value <= above) or (least is not None and value < least):
        bound = f" above {above:g}" if above is not None else "" if least is None else f" >= {least:g}"
        raise ValueError(f"{name}: expected a finite number{bound}, got {value!r}")


def check_count(name: str, value: int, most: int | None = None) -> None:
    """Check for an integer in 1..most; most=None means no upper bound."""
    # Inside torch.compile the number may be a symbol without a value.
    if torch.compiler.is_compiling():
        return
    bound = "an integer >= 1" if most is None else f"an integer in 1..{most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected {bound}, got {type(value).__name__} {value!r}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: expected {bound}, got {value}")


def check_frames(name: str, frames: Tensor, channels: int) -> None:
    """Check for uint8 [F, C, H, W] with C in 1..channels and no empty axis."""
    check_tensor(name, frames)
    if frames.dtype != torch.uint8:
        raise TypeError(f"{name}: expected uint8, got {frames.dtype}; pass the frames as the decoder returned them")
    if frames.ndim != 4 or not 1 <= frames.shape[1] <= channels:
        raise ValueError(
            f"{name}: expected shape [F, C, H, W] with C in 1..{channels}, got {list(frames.shape)}; "
            "permute channels-last frames"
        )
    if 0 in frames.shape:
        raise ValueError(f"{name}: expected at least one frame and one pixel, got shape {list(frames.shape)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_normalizer(normalizer: float | Tensor | None, name: str = "normalizer") -> None:
    """Check for None, a number >= 0, or a tensor with one element."""
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"{name}: expected one number, got shape {list(normalizer.shape)}")
        check_not_negative(name, normalizer)
    elif normalizer is not None:
        check_number(name, normalizer, least=0.0)


def check_cu_seqlens(cu_seqlens: Tensor, hidden: Tensor) -> None:
    """Check for int32 or int64 [B+1] that starts at 0, never decreases and ends at T."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected shape [B+1] with B >= 1, got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: expected torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    check_device("cu_seqlens", cu_seqlens, hidden)
    if _readable(cu_seqlens):
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] != len(hidden) or sorted(edges) != edges:
            raise ValueError(f"cu_seqlens: expected edges from 0 to T={len(hidden)} that never decrease, got {edges}")


def check_scored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int | None,
) -> None:
    check_head(hidden, weight, bias)
    check_targets(targets, hidden, weight.shape[0], ignore_index)
    check_temperature(temperature, hidden)
    if softcap is not None:
        check_number("softcap", softcap, above=0.0)


def check_weights(token_weights: Tensor | None, normalizer: float | Tensor | None, hidden: Tensor) -> None:
    if token_weights is not None:
        check_vector("token_weights", token_weights, len(hidden), hidden)
    check_normalizer(normalizer)


def check_other_head(
    prefix: str, other_hidden: Tensor, other_weight: Tensor, other_bias: Tensor | None, hidden: Tensor, weight: Tensor
) -> None:
    """Check a second model's hidden states and head: D may differ, and T, V and device must agree."""
    check_head(other_hidden, other_weight, other_bias, prefix=prefix)
    if len(other_hidden) != len(hidden) or len(other_weight) != len(weight):
        raise ValueError(
            f"{prefix}hidden and {prefix}weight: expected T={len(hidden)} rows and V={len(weight)}, "
            f"got {len(other_hidden)} and {len(other_weight)}"
        )
    if other_hidden.dtype not in (hidden.dtype, torch.float32, torch.bfloat16):
        raise TypeError(
            f"{prefix}hidden: expected {hidden.dtype}, float32 or bfloat16, got {other_hidden.dtype}; cast it"
        )
    check_device(f"{prefix}hidden", other_hidden, hidden)


def check_not_negative(name: str, values: Tensor) -> None:
    """Check that all values are finite and >= 0 (CPU tensors only)."""
    if _readable(values) and not bool(((values >= 0) & values.isfinite()).all()):
        raise ValueError(f"{name}: expected finite values >= 0, got {_extremes(values)}")


def check_unit_interval(name: str, values: Tensor) -> None:
    """Check that all values are in [0, 1] and not NaN (CPU tensors only)."""
    if _readable(values) and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{name}: expected values in [0, 1], got {_extremes(values)}")


def refuse_sharded(name: str, weight: Tensor) -> None:
    """Raise ValueError for a sharded tensor, because its local rows would be treated as the whole vocabulary."""
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{name}: expected a whole tensor, got a DTensor; pass {name}.full_tensor()")
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        raise ValueError(
            f"{name}: expected a whole tensor, got a parameter that ZeRO-3 has partitioned; call the loss inside the "
            "module's forward, or stay inside deepspeed.zero.GatheredParameters until backward is done"
        )


def check_tensor(name: str, value: object) -> None:
    """Check that value is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    """Check that value is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}; move it there")


def _readable(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _extremes(values: Tensor) -> str:
    return f"values from {values.min().item()} to {values.max().item()}"
