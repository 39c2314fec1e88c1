"""Define the records that the loops, the autograd functions and all row back ends share.

The fields of `HeadCall`, `PolicyTerms`, `PolicySettings`, `Needs` and `Execution` are also the arguments of the ops in
`loops` (see `ops.record_op`), so a new field has to be added only here.
"""

from typing import NamedTuple

from torch import Tensor

# exp(80) = 5.5e34 is finite in float32, and so is its product with an advantage.
EXP_LIMIT = 80.0


class HeadCall(NamedTuple):
    """A head and its inputs. Vectors are in the accumulation dtype; the reference has no gradient."""

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
    full_kl: bool = False  # whether to compute the exact KL from the reference


class PolicySettings(NamedTuple):
    """The arguments of linear_policy_loss that are neither tensors nor part of the head. Create it with `of`."""

    kl: str = "k3"  # KL estimate of the metrics
    kl_loss: str = "none"  # KL estimate in the loss: the same, or "none"
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
        """Return the settings, with kl_loss="none" if kl_coef is 0, because 0 * inf would be NaN."""
        return cls(kl=kl, kl_loss=kl if kl_coef else "none", kl_coef=kl_coef, **others)


class PolicyTerms(NamedTuple):
    """The policy loss of a row: scale * (-w * min(r*A, clip(r)*A) + kl_coef*KL - entropy_coef*H).

    With old_logp, r = exp(logp - old_logp); otherwise r has the value 1 and keeps its gradient. With rollout_logp,
    w = min(exp(logp - rollout_logp), tis_cap), detached; otherwise w is 1.
    """

    scale: Tensor  # [n], weight of the row / normalizer
    advantage: Tensor  # [n], A, times the importance correction if it is known before the head runs
    old_logp: Tensor | None = None  # [n]; None = on-policy
    ref_logp: Tensor | None = None  # [n], for k1, k2, k3
    rollout_logp: Tensor | None = None  # [n], only on-policy, when the correction depends on logp
    settings: PolicySettings = PolicySettings()

    def rows(self, index) -> "PolicyTerms":
        """Return the terms of the rows `index`."""
        return PolicyTerms(*(t[index] if isinstance(t, Tensor) else t for t in self))


class Needs(NamedTuple):
    """Flags for the gradients that are needed."""

    hidden: bool
    weight: bool
    bias: bool


class Execution(NamedTuple):
    """The implementation of an op, and the bytes of logits that may exist at once (0: the defaults of `chunks`)."""

    impl: str
    budget: int


class RowInputs(NamedTuple):
    """Inputs of z other than the logits, in the accumulation dtype (float64 for float64, otherwise float32)."""

    targets: Tensor  # int64 [n]
    target_logit: Tensor  # [n]
    bias: Tensor | None  # [V]
    temperature: Tensor | None  # [n]; None = 1
    softcap: float | None


class RowStats(NamedTuple):
    """Results [n]: log-prob of the target, entropy, log-sum-exp, and, with a reference, sum p (log p - log r)."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    full_kl: Tensor | None


class RowReference(NamedTuple):
    """Logits of the reference head for the exact KL, which are only read, and the results of `score` for them."""

    logits: Tensor  # [n, V]
    bias: Tensor | None  # [V]
    lse: Tensor  # [n]
    logp: Tensor  # [n]
