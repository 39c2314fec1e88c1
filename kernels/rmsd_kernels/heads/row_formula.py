"""Compute the parts of the reference losses within a row of logits.

    z = softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature       (bias, softcap, temperature: optional)
    log pi = log_softmax(z)

Logits are computed by a GEMM in the dtype of hidden. Later computations are float64 for float64 inputs and float32
otherwise.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import accumulation_dtype


class RowScores(NamedTuple):
    """Scores of n rows: log-prob of the target and entropy; with a reference, also its log-prob and the exact KL."""

    logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    full_kl: Tensor | None


def score_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    keep: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    entropy_grad: bool,
    ref: tuple[Tensor, Tensor, Tensor | None] | None = None,
    full_kl: bool = False,
) -> RowScores:
    """Return RowScores of the rows `keep`. The entropy has a gradient only if entropy_grad; the reference has none."""
    scale, target = temperature_rows(temperature, keep, hidden), targets[keep]
    logp_V = head_logits(hidden[keep], weight, bias, scale, softcap).log_softmax(dim=-1)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -expectation(logp_V, logp_V)
    if ref is None:
        return RowScores(_pick(logp_V, target), entropy, None, None)
    with torch.no_grad():
        ref_hidden, ref_weight, ref_bias = ref
        ref_V = head_logits(ref_hidden[keep], ref_weight, ref_bias, scale, softcap).log_softmax(dim=-1)
    full = expectation(logp_V, logp_V - ref_V) if full_kl else None
    return RowScores(_pick(logp_V, target), entropy, _pick(ref_V, target), full)


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, softcap: float | None
) -> Tensor:
    """Return z of the module docstring, [n, V]. scale is the temperature of each row, [n]."""
    logits = F.linear(hidden, weight).to(accumulation_dtype(hidden))
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if scale is None else logits / scale.unsqueeze(1)


def divergence_of_rows(
    teacher: Tensor, student: Tensor, kind: str, alpha: float | None, vocab_clip: float | None = None
) -> Tensor:
    """Return the divergence [n] between log-probabilities [n, V] of teacher and student, as in linear_divergence."""
    terms = divergence_terms(teacher, student, kind, alpha)
    if vocab_clip is not None:
        clipped = terms.detach() > vocab_clip
        # A summand may be infinite, and the gradient of a clamp would then be 0 * inf.
        teacher, student = teacher.masked_fill(clipped, 0.0), student.masked_fill(clipped, 0.0)
        terms = divergence_terms(teacher, student, kind, alpha).masked_fill(clipped, vocab_clip)
    return terms.sum(dim=-1)


def divergence_terms(teacher: Tensor, student: Tensor, kind: str, alpha: float | None) -> Tensor:
    """Return the summands [n, V] of `divergence_of_rows`, one for each entry of the vocabulary."""
    if kind == "forward_kl":
        return _weighted(teacher, teacher - student)
    if kind == "reverse_kl":
        return _weighted(student, student - teacher)
    alpha = {"jsd": 0.5, "skew_kl": 0.1}[kind] if alpha is None else alpha
    share = torch.tensor(alpha, dtype=student.dtype, device=student.device)
    mixture = torch.logaddexp(teacher + share.log(), student + (1 - share).log())
    skew = _weighted(teacher, teacher - mixture)
    return skew if kind == "skew_kl" else alpha * skew + (1 - alpha) * _weighted(student, student - mixture)


def expectation(log_probability: Tensor, value: Tensor) -> Tensor:
    """Return the sum over the vocabulary of exp(log_probability) * value. A probability of 0 contributes 0."""
    return _weighted(log_probability, value).sum(dim=-1)


def _weighted(log_probability: Tensor, value: Tensor) -> Tensor:
    impossible = log_probability == -float("inf")
    return log_probability.exp() * value.masked_fill(impossible, 0.0)


def _pick(logp_V: Tensor, target: Tensor) -> Tensor:
    vocabulary = logp_V.shape[-1]
    valid = (target >= 0) & (target < vocabulary)
    picked = logp_V.gather(-1, target.clamp(0, vocabulary - 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(valid, picked, torch.full_like(picked, float("nan")))


def temperature_rows(temperature: float | Tensor, keep: Tensor, hidden: Tensor) -> Tensor | None:
    """Return the temperature of each kept row, or None for the number 1, which saves a pass over the logits."""
    if isinstance(temperature, Tensor):
        rows = temperature.detach().to(device=hidden.device, dtype=accumulation_dtype(hidden))
        return rows[keep] if rows.ndim else rows.expand(len(keep))
    if temperature == 1.0:
        return None
    return torch.full((len(keep),), temperature, dtype=accumulation_dtype(hidden), device=hidden.device)
