"""What the fused losses are compared with: eager torch, torch.compile and other libraries, imported as they are.

Every function takes HeadInputs and returns the callable that computes the loss (a scalar), or raises Unavailable with
the reason why it does not run here; `gather` collects both, so that no peer is left out without a word. Each peer gets
its own defaults. The losses are the same function for all: mean cross entropy over scored rows; sum of log-probs and
entropies weighted by constants; the GRPO loss on policy (ratio 1, clip 0.2) with 0.04 * k3 to given reference
log-probs, mean over scored rows; mean divergence against a teacher's head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.measure import Unavailable, Variant, available, need, with_gradients
from bench.heads.cases import IGNORED, HeadInputs

KL_COEF, CLIP = 0.04, 0.2
# Of the recipes' rollouts.
TEMPERATURE = 0.8
# Width of a vocabulary block where TRL calls its function.
_TRL_CHUNK = 32768

Loss = Callable[[], Tensor]
Build = Callable[[HeadInputs], Loss]


def need_cuda(inputs: HeadInputs, what: str) -> None:
    if inputs.hidden.device.type != "cuda":
        raise Unavailable(f"{what} for CUDA only")


def gather(
    peers: dict[str, Build], inputs: HeadInputs, *, score: bool = False, skip: dict[str, str] | None = None
) -> tuple[list[Variant], dict[str, str]]:
    """Variants that run here, and the reasons of those that do not.

    score: forward without gradients. skip: reasons that the benchmark itself has. inputs: of any kind that says what is
    `differentiable`.
    """
    losses, not_run = available({name: lambda b=build: b(inputs) for name, build in peers.items()}, skip or {})
    return [as_variant(name, loss, inputs, score) for name, loss in losses.items()], not_run


def as_variant(name: str, loss: Loss, inputs: HeadInputs, score: bool) -> Variant:
    """loss with its gradients, or on request without any."""
    compiles = name in COMPILES
    if score:
        return Variant(name, torch.no_grad()(loss), compiles=compiles)
    return with_gradients(name, loss, inputs.differentiable, compiles=compiles)


def eager_and_compiled(loss: Callable[[HeadInputs], Tensor]) -> dict[str, Build]:
    """A loss as eager code, and compiled afresh for each shape, as a user does who asks for speed."""

    def compiled(x: HeadInputs) -> Loss:
        torch._dynamo.reset()
        return functools.partial(torch.compile(loss, dynamic=False), x)

    return {"eager": lambda x: functools.partial(loss, x), "torch.compile": compiled}


# Cross entropy.


def eager_cross_entropy(x: HeadInputs) -> Tensor:
    return F.cross_entropy(_wide_logits(x.hidden, x.weight), x.targets, ignore_index=IGNORED)


def _wide_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return logits if logits.dtype == torch.float64 else logits.float()


def _cross_entropy_torch(x: HeadInputs) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 and later have)")
    return lambda: F.linear_cross_entropy(x.hidden, x.weight, x.targets, ignore_index=IGNORED)


def _cross_entropy_torch_chunked(x: HeadInputs) -> Loss:
    _cross_entropy_torch(x)
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(x.hidden, x.weight, x.targets, ignore_index=IGNORED, options=options)


def _cross_entropy_liger(x: HeadInputs) -> Loss:
    need_cuda(x, "Triton kernels,")
    loss = need("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED)
    return lambda: loss(x.weight, x.hidden, x.targets)


def _cross_entropy_cce(implementation: str) -> Build:
    def build(x: HeadInputs) -> Loss:
        if implementation != "torch_compile":
            need_cuda(x, "Triton kernels,")
        function = need("cut_cross_entropy").linear_cross_entropy
        own = {"impl": "torch_compile"} if implementation == "torch_compile" else {"impl": "cce"}
        own |= {"filter_eps": None} if implementation == "exact" else {}
        return lambda: function(x.hidden, x.weight, x.targets, ignore_index=IGNORED, **own)

    return build


# Log-prob and entropy: sum over scored rows of (g * logp + 0.01 * g' * entropy), g and g' constants of the rows.


def logprob_weights(x: HeadInputs) -> tuple[Tensor, Tensor]:
    """Upstream gradients [T] of log-prob and entropy, 0 in ignored rows."""
    scored = x.scored.to(x.advantages.dtype) / x.scored.sum()
    return -x.advantages * scored, 0.01 * x.ref_logp * scored


def eager_logprob(x: HeadInputs) -> tuple[Tensor, Tensor]:
    logp = _wide_logits(x.hidden, x.weight).log_softmax(-1)
    return logp.gather(1, x.targets.clamp(min=0)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def weighted_sum(scores: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor]) -> Tensor:
    (logp, entropy), (for_logp, for_entropy) = scores, weights
    return (logp * for_logp).sum() + (entropy * for_entropy).sum()


def _logprob_from(
    scores: Callable[[], tuple[Tensor, Tensor]], x: HeadInputs, rows: slice | Tensor = slice(None)
) -> Loss:
    """rows: those that are scored. Peers that have no ignored rows score all; the weights of ignored ones are 0."""
    for_logp, for_entropy = (weights[rows] for weights in logprob_weights(x))
    return lambda: weighted_sum(scores(), (for_logp, for_entropy))


def _logprob_trl(x: HeadInputs) -> Loss:
    apply, rows = _trl_function(), _scored_rows(x)
    targets = x.targets[rows]
    return _logprob_from(
        lambda: apply(x.hidden[rows], x.weight, None, targets, 1.0, _TRL_CHUNK, None, 1.0, ("entropy",))[:2], x, rows
    )


def _logprob_liger(x: HeadInputs) -> Loss:
    apply = getattr(need("liger_kernel.ops"), "LigerFusedLinearScaledCrossEntropyFunction", None)
    if apply is None:
        raise Unavailable("this liger-kernel has no LigerFusedLinearScaledCrossEntropyFunction")

    def scores() -> tuple[Tensor, Tensor]:
        loss, entropy = apply.apply(x.hidden, x.weight, x.targets, 1.0, IGNORED, 1, True)
        return -loss, entropy

    return _logprob_from(scores, x)


def _scored_rows(x: HeadInputs) -> slice | Tensor:
    """Rows that a trainer gathers before it calls a function without ignored rows, as TRL does on CUDA."""
    return slice(None) if bool(x.scored.all()) else torch.nonzero(x.scored).flatten()


def _trl_function() -> Callable[..., tuple[Tensor, ...]]:
    """TRL's chunked log-prob; its place and arguments have moved between versions."""
    function = getattr(need("trl.kernels"), "ChunkedLogProbFunction", None)
    if function is None:
        raise Unavailable("this trl has no trl.kernels.ChunkedLogProbFunction (1.16 has)")
    return function.apply


# Policy loss.


def grpo_of_logp(logp: Tensor, advantages: Tensor, ref_logp: Tensor, scored: Tensor) -> Tensor:
    """What a trainer does with per-token log-probs; all [T]."""
    ratio = torch.exp(logp - logp.detach())
    objective = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    d = ref_logp - logp
    per_row = -objective + KL_COEF * (torch.exp(d) - d - 1)
    return (per_row * scored).sum() / scored.sum()


def eager_policy_loss(x: HeadInputs) -> Tensor:
    logp = (_wide_logits(x.hidden, x.weight) / x.temperature).log_softmax(-1)
    logp = logp.gather(1, x.targets.clamp(min=0)[:, None])[:, 0]
    return grpo_of_logp(logp, x.advantages, x.ref_logp, x.scored.to(logp.dtype))


def _policy_trl(x: HeadInputs) -> Loss:
    apply, rows = _trl_function(), _scored_rows(x)
    targets, advantages, ref_logp, scored = (t[rows] for t in (x.targets, x.advantages, x.ref_logp, x.scored.float()))

    def loss() -> Tensor:
        logp = apply(x.hidden[rows], x.weight, None, targets, x.temperature, _TRL_CHUNK, None, 1.0, ())[0]
        return grpo_of_logp(logp, advantages, ref_logp, scored)

    return loss


def _policy_liger(x: HeadInputs) -> Loss:
    module = need("liger_kernel.chunked_loss")
    torch._dynamo.reset()
    settings = {"beta": KL_COEF, "epsilon_low": CLIP, "epsilon_high": CLIP, "temperature": x.temperature}
    function = module.LigerFusedLinearGRPOLoss(**settings, loss_type="dapo")
    shape = (x.sequences, -1)
    ids, mask = x.targets.clamp(min=0).view(shape), x.scored.float().view(shape)
    advantages, ref_logp = x.advantages.view(shape)[:, 0].contiguous(), x.ref_logp.view(shape)

    def loss() -> Tensor:
        hidden = x.hidden.view(*shape, x.hidden.shape[-1])
        return function(hidden, x.weight, ids, mask, advantages, ref_per_token_logps=ref_logp)[0]

    return loss


# Divergence against a teacher that has a head of its own, [T, D] and [V, D]; the teacher's tensors are constants.


def eager_divergence(x: HeadInputs, kind: str) -> Tensor:
    with torch.no_grad():
        teacher = _wide_logits(x.teacher_hidden, x.weight).log_softmax(-1)
    student = _wide_logits(x.hidden, x.weight).log_softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(student, teacher, log_target=True, reduction="sum") / len(x.hidden)
    mixture = torch.logaddexp(student, teacher) - 0.6931471805599453
    sides = (F.kl_div(mixture, side, log_target=True, reduction="sum") for side in (teacher, student))
    return sum(sides) / 2 / len(x.hidden)


def divergence_peers(kind: str) -> dict[str, Build]:
    """Peers of linear_divergence."""

    def liger(x: HeadInputs) -> Loss:
        if kind != "jsd":
            raise Unavailable("its chunked losses with heads have JSD, no forward KL of this form")
        module = need("liger_kernel.chunked_loss")
        torch._dynamo.reset()
        function = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        return lambda: function(x.hidden, x.weight, x.teacher_hidden, x.weight.detach(), x.targets)

    return eager_and_compiled(functools.partial(eager_divergence, kind=kind)) | {"Liger chunked JSD": liger}


COMPILES = {"torch.compile", "CCE torch_compile", "Liger chunked GRPO", "Liger chunked JSD"}
CROSS_ENTROPY: dict[str, Build] = {
    **eager_and_compiled(eager_cross_entropy),
    "torch linear_cross_entropy": _cross_entropy_torch,
    "torch l.c.e. chunked": _cross_entropy_torch_chunked,
    "Liger": _cross_entropy_liger,
    "CCE torch_compile": _cross_entropy_cce("torch_compile"),
    "CCE": _cross_entropy_cce("filtered"),
    "CCE exact": _cross_entropy_cce("exact"),
}
LOGPROB: dict[str, Build] = {
    **eager_and_compiled(lambda x: weighted_sum(eager_logprob(x), logprob_weights(x))),
    "TRL chunked": _logprob_trl,
    "Liger scaled CE": _logprob_liger,
}
POLICY: dict[str, Build] = {
    **eager_and_compiled(eager_policy_loss),
    "TRL chunked log-prob": _policy_trl,
    "Liger chunked GRPO": _policy_liger,
}
