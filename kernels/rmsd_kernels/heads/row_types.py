"""The records that the loops, the autograd functions and all row back ends share.

The fields of `HeadCall`, `PolicyTerms`, `PolicySettings`, `Needs` and `Execution` are also the arguments of the ops in
`loops`, see `ops.record_op`: a field is added in one place.
"""

from typing import NamedTuple

from torch import Tensor

# exp(80) = 5.5e34 is finite in float32, and so is its product with an advantage.
EXP_LIMIT = 80.0


class HeadCall(NamedTuple):
    """A head and what it is applied to; vectors in the accumulation dtype, the reference without a gradient."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [T], int64
    temperature: Tensor | None  # [T]; None = 1
    softcap: float | None
    ignore_index: int | None
    ref_hidden: Tensor | None = None  # [T, D']
    ref_weight: Tensor | None = None  # [V, D']
    ref_bias: Tensor | None = None  # [V]
    full_kl: bool = False  # whether the exact KL from the reference is asked for


class PolicySettings(NamedTuple):
    """The arguments of linear_policy_loss that are neither tensors nor about the head. Made by `of`."""

    kl: str = "k3"  # how a reference is measured
    kl_loss: str = "none"  # what of it enters the loss: "none" or the same
    kl_coef: float = 0.0
    kl_log_ratio_clip: float | None = None
    clip_low: float = 0.0
    clip_high: float = 0.0
    importance_level: str = "token"
    tis_cap: float | None = None
    sequence_mask_cap: float | None = None
    entropy_coef: float = 0.0

    @classmethod
    def of(cls, *, kl: str, kl_coef: float, **others) -> "PolicySettings":
        """A coefficient of 0 adds nothing at all, as 0 * inf would be NaN; nothing else asks whether it is 0."""
        return cls(kl=kl, kl_loss=kl if kl_coef else "none", kl_coef=kl_coef, **others)


class PolicyTerms(NamedTuple):
    """The policy loss of a row, scale * (-w * min(r*A, clip(r)*A) + kl_coef*KL - entropy_coef*H).

    r = exp(logp - old_logp), or 1 with its gradient; w = min(exp(logp - rollout_logp), tis_cap), a constant, or 1.
    """

    scale: Tensor  # [n], weight of the row / normalizer
    advantage: Tensor  # [n], A times the importance correction where that is known beforehand
    old_logp: Tensor | None = None  # [n]; None = on-policy
    ref_logp: Tensor | None = None  # [n], for k1, k2, k3
    rollout_logp: Tensor | None = None  # [n], where the policy itself is the old one
    settings: PolicySettings = PolicySettings()

    def rows(self, index) -> "PolicyTerms":
        """The terms of some of the rows."""
        return PolicyTerms(*(t[index] if isinstance(t, Tensor) else t for t in self))


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Execution(NamedTuple):
    """How an op runs: the implementation, and bytes of logits at once (0: as recorded in `chunks`)."""

    impl: str
    budget: int


class RowInputs(NamedTuple):
    """How z is made. All but targets in the accumulation dtype (float32; float64 for float64 logits)."""

    targets: Tensor  # int64 [n]
    target_logit: Tensor  # [n]
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # [n]; None = 1
    softcap: float | None


class RowStats(NamedTuple):
    """Of each row [n]: log-prob of the target, entropy, log-sum-exp, and with a reference sum p (log p - log r)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    full_kl: Tensor | None


class RowReference(NamedTuple):
    """Logits of the reference head for the exact KL, never written, and what `score` found in them."""

    logits: Tensor  # [n, V]
    bias: Tensor | None  # [V]
    lse: Tensor  # [n]
    logp: Tensor  # [n]
