"""Inputs of the head benchmarks, and the error check that precedes every timing.

Softmax: `random` draws hidden states and weights at random, so logits have a standard deviation of 1 and every token a
probability near 1/V. `peaked` aligns each hidden state with the head's row of one token, so that this token has a
probability of about 0.95 and the entropy is about 0.7 nat, as in a trained model. It is the target in 4 of 5 rows.
Mask: the percentage of rows, chosen at random, whose target is -100.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench.core.measure import facts_of

VOCABULARY = 151936
IGNORED = -100
# The peak's logit minus the log-sum-exp of all others: sigmoid(3) = 0.953.
_PEAK_MARGIN = 3.0
_SEQUENCE = 256
GATE_TOKENS = 32
# Rows of a chunk in the gate: all at once (the default budget), 4 chunks whose sum of d_weight is rounded each time,
# and 8, which are summed in float32. The two small budgets also make log-probs compute their logits twice. A chunk has
# at least 4 rows: for fewer, MKL adds up the V products of d_logits @ weight in another order, with 10 times the error
# (at V = 151936 and D = 256 in float32, torch.mm of exact d_logits in 3 rows is 8.9e-6 of the largest value off, in 4
# or 16 rows 9.0e-7). Chunks of real shapes are never so short, and eager code has all rows in one product.
_GATE_CHUNK_ROWS = (None, 8, 4)


@dataclass(frozen=True)
class Case:
    """One shape and condition of a loss.

    bench: the name of its records. kind: of a divergence, whose inputs have a teacher.
    """

    tokens: int
    hidden: int
    dtype: torch.dtype
    mask: int = 0
    softmax: str = "random"
    head: str = "trainable"
    device: str = "cpu"
    vocabulary: int = VOCABULARY
    temperature: float = 1.0
    bench: str = ""
    kind: str = ""

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = f"-{self.kind}" if self.kind else ""
        return f"T{self.tokens}-D{self.hidden}-{dtype}-mask{self.mask}-{self.softmax}-{self.head}{kind}"

    def facts(self) -> dict[str, object]:
        shape = {"T": self.tokens, "D": self.hidden, "V": self.vocabulary}
        conditions = {"mask_percent": self.mask, "softmax": self.softmax, "head": self.head}
        conditions |= {"temperature": self.temperature} | ({"kind": self.kind} if self.kind else {})
        return facts_of(self.bench, self, shape) | conditions


class HeadInputs(NamedTuple):
    """hidden [T, D], weight [V, D], targets [T]. For the policy loss advantages, ref_logp and rollout_logp [T], with
    sequences of equal length. count: the number of scored rows. ignore_index: None if no row is masked, as in the
    trainer. teacher_hidden [T, D]: near the student's, as in distillation; the teacher's head has the same weights.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    ref_logp: Tensor
    rollout_logp: Tensor
    sequences: int
    count: int
    temperature: float
    ignore_index: int | None
    teacher_hidden: Tensor | None

    @property
    def differentiable(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def scored(self) -> Tensor:
        return self.targets != IGNORED


@functools.lru_cache(maxsize=2)
def _head_weight(hidden: int, dtype: torch.dtype, device: str, vocabulary: int) -> Tensor:
    """Return the head of a width. Two stay in memory, for check and timing, each of 0.8 GB at D=2560 in bfloat16."""
    weight = torch.empty(vocabulary, hidden, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    for rows in weight.split(8192):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) / hidden**0.5)
    return weight


def head_inputs(case: Case) -> HeadInputs:
    """Return the tensors of a case; cases of one width share the head."""
    device, weight = case.device, _head_weight(case.hidden, case.dtype, case.device, case.vocabulary)
    generator = torch.Generator(device).manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    targets = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator, device=device)
    if case.softmax == "peaked":
        peak = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator, device=device)
        rows = weight[peak].float()
        hidden = (_peak_logit(case) * rows / rows.square().sum(dim=1, keepdim=True)).to(case.dtype)
        targets = torch.where(torch.arange(case.tokens, device=device) % 5 == 4, targets, peak)
    else:
        hidden = draw(case.tokens, case.hidden).to(case.dtype)
    sequences = max(case.tokens // _SEQUENCE, 2)
    advantages = draw(sequences).repeat_interleave(case.tokens // sequences)
    logp = target_logp(hidden, weight, targets, case.temperature)
    ref_logp, rollout_logp = ((logp + scale * draw(case.tokens)).clamp(max=-1e-4) for scale in (0.1, 0.01))
    if case.mask:
        order = torch.randperm(case.tokens, generator=generator, device=device)
        targets[order[: case.tokens * case.mask // 100]] = IGNORED
    weight = weight.detach().requires_grad_(case.head == "trainable")
    per_row = (advantages, ref_logp, rollout_logp, sequences)
    masked = case.tokens * case.mask // 100
    teacher = hidden.roll(1, 0) * 0.3 + hidden if case.kind else None
    facts = (case.tokens - masked, case.temperature, IGNORED if case.mask else None, teacher)
    return HeadInputs(hidden.requires_grad_(), weight, targets, *per_row, *facts)


def _peak_logit(case: Case) -> float:
    """b with b = log V + b² / 2D + margin: a peak of b makes the other logits normal with variance b² / D."""
    return case.hidden * (1 - (1 - 2 * (math.log(case.vocabulary) + _PEAK_MARGIN) / case.hidden) ** 0.5)


def target_logp(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int = 256) -> Tensor:
    """Return float32 log-probabilities without a gradient, from eager torch in small blocks, not from measured code."""
    with torch.no_grad():
        parts = [
            ((h @ weight.t()).float() / temperature).log_softmax(-1).gather(1, t[:, None])[:, 0]
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(parts)


class Errors(NamedTuple):
    """Largest absolute difference from float64 for the values and each gradient, and the bound on it.

    ours: the largest over all chunk sizes.
    """

    ours: dict[str, float]
    eager: dict[str, float]
    bound: dict[str, float]


Loss = Callable[[HeadInputs], Tensor]
# Ours, with memory_budget_bytes.
BudgetedLoss = Callable[[HeadInputs, int | None], Tensor]


@functools.cache
def checked(case: Case, ours: BudgetedLoss, eager: Loss, buffers: int = 1) -> Errors:
    """Check, on a case with few tokens, that ours is at most twice as far from float64 as eager in the same dtype.

    Ours runs in one chunk and in several, as it does for long shapes (_GATE_CHUNK_ROWS). `ours` and `eager` return
    values per row, or a scalar; their sum is differentiated. The float64 reference is `eager` on the same rounded
    inputs. Because eager may be exact by chance, the bound also allows 1e-6 of the largest value, and for the values in
    16 bits their rounding unit / 32 (means and sums of rounded logits).

    Args:
        buffers: the number of heads whose logits share the budget.
    Raises:
        AssertionError: with the numbers, if ours is too far off.
    """
    small = head_inputs(case)
    wide = small._replace(
        hidden=small.hidden.detach().double().requires_grad_(),
        weight=small.weight.detach().double().requires_grad_(small.weight.requires_grad),
        advantages=small.advantages.double(),
        ref_logp=small.ref_logp.double(),
        rollout_logp=small.rollout_logp.double(),
        teacher_hidden=None if small.teacher_hidden is None else small.teacher_hidden.double(),
    )
    truth, other = _outputs(eager, wide), _outputs(eager, small)
    ours_err, eager_err, bound = dict.fromkeys(truth, 0.0), {}, {}
    for name, exact in truth.items():
        eager_err[name] = _distance(other[name], exact)
        unit = torch.finfo(case.dtype).eps / 32 if name == "value" else 0.0
        bound[name] = 2 * eager_err[name] + max(1e-6, unit) * exact.abs().max().item()
    for rows in _GATE_CHUNK_ROWS:
        budget = None if rows is None else rows * buffers * case.vocabulary * case.dtype.itemsize
        got = _outputs(lambda x, budget=budget: ours(x, budget), small)
        found = {name: _distance(got[name], exact) for name, exact in truth.items()}
        faults = [name for name in bound if not found[name] <= bound[name]]
        chunk = "in one chunk" if rows is None else f"in chunks of {rows} rows"
        assert not faults, f"{case.bench} {case.name} {chunk}: {faults} too far from float64: {found}, bound {bound}"
        ours_err = {name: max(ours_err[name], found[name]) for name in found}
    return Errors(ours_err, eager_err, bound)


def _outputs(loss: Loss, inputs: HeadInputs) -> dict[str, Tensor]:
    value = loss(inputs)
    wanted = {"hidden gradient": inputs.hidden, "weight gradient": inputs.weight}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(value.sum(), list(wanted.values()))
    return {"value": value.detach(), **dict(zip(wanted, gradients, strict=True))}


def _distance(values: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference, computed in blocks because a float64 copy of a head takes gigabytes."""
    if values.ndim < 2:
        return (values.double() - exact).abs().max().item()
    return max((v.double() - e).abs().max().item() for v, e in zip(values.split(8192), exact.split(8192), strict=True))
