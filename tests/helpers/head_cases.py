"""Define calls of the fused heads that cover every code path, for every implementation."""

import torch

from rmsd_fast import losses

T, D, V = 37, 48, 301
IGNORED = [0, 11, 12, 36]
EDGES = [0, 9, 9, 20, T]


class Inputs:
    """Random inputs in one dtype, rounded to the dtype `rounded` first, so that several dtypes have equal numbers."""

    def __init__(self, dtype, rounded=None, device="cpu", peak=3.0, seed=0):
        g = torch.Generator().manual_seed(seed)

        def make(*shape, scale=1.0):
            values = torch.randn(*shape, generator=g) * scale
            return values.to(rounded or dtype).to(device=device, dtype=dtype)

        self.hidden, self.weight = make(T, D), make(V, D, scale=peak / D**0.5)
        self.bias = make(V)
        self.ref_hidden, self.ref_weight = self.hidden + make(T, D, scale=0.125), self.weight + make(V, D, scale=1 / 64)
        if rounded is not None:
            self.ref_hidden, self.ref_weight = (t.to(rounded).to(dtype) for t in (self.ref_hidden, self.ref_weight))
        self.targets = torch.randint(V, (T,), generator=g).to(device)
        # Half of the targets are likely tokens, as in training.
        top = (self.hidden.float() @ self.weight.float().T).argmax(1)
        self.targets = torch.where(torch.arange(T, device=device) % 2 == 0, top, self.targets)
        self.targets[IGNORED] = -100
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        row = lambda low, high: torch.empty(T).uniform_(low, high, generator=g).to(device, accumulate)  # noqa: E731
        self.advantages, self.weights, self.temperature = row(-2, 2), row(0.1, 2), row(0.5, 1.5)
        self.upstream, self.upstream_entropy = row(-1, 1), row(-1, 1)
        with torch.no_grad():
            exact = losses.linear_logprob(self.hidden.double(), self.weight.double(), self.targets, impl="reference")
        exact = exact.to(accumulate)
        self.old, self.ref, self.rollout = exact + row(-0.4, 0.4), exact + row(-1, 1), exact + row(-0.5, 0.5)
        self.cu_seqlens = torch.tensor(EDGES, device=device)
        self.ids = torch.stack([torch.randperm(V, generator=g)[:7] for _ in range(T)]).to(device)
        self.leaves = [self.hidden, self.weight, self.bias]

    def keep_rows(self, count):
        """Drop all rows but the first ones, for cases without sequences."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and len(value) == T:
                setattr(self, name, value[:count].clone())
        self.leaves = [self.hidden, self.weight, self.bias]


def _policy(**settings):
    def call(x, **kw):
        arguments = {k: getattr(x, v) if isinstance(v, str) and hasattr(x, v) else v for k, v in settings.items()}
        result = losses.linear_policy_loss(x.hidden, x.weight, x.targets, x.advantages, **arguments, **kw)
        return result.loss, *(result.metrics[k] for k in sorted(result.metrics))

    return call


def _logprob(**settings):
    def call(x, **kw):
        arguments = {k: getattr(x, v) if isinstance(v, str) else v for k, v in settings.items()}
        logp, entropy = losses.linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True, **arguments, **kw)
        return (logp * x.upstream + entropy * x.upstream_entropy).sum(), logp, entropy

    return call


def _frozen(x, **kw):
    logp = losses.linear_logprob(x.hidden, x.weight.detach(), x.targets, temperature=x.temperature, **kw)
    return (logp * x.upstream).sum(), logp


def _scores_only(x, **kw):
    with torch.no_grad():
        return losses.linear_logprob(x.hidden, x.weight, x.targets, bias=x.bias, return_entropy=True, **kw)


def _cross_entropy(x, **kw):
    temperature, weights = x.temperature, x.weights.clone()
    weights[5] = 0.0
    return (
        losses.linear_cross_entropy(
            x.hidden, x.weight, x.targets, bias=x.bias, temperature=temperature, token_weights=weights, **kw
        ),
    )


def _divergence(kind, teacher, **settings):
    def call(x, **kw):
        source = {
            "head": {"teacher_hidden": x.ref_hidden, "teacher_weight": x.ref_weight},
            "logits": {"teacher_logits": (x.ref_hidden @ x.ref_weight.T).detach()},
            "topk": {"teacher_topk": ((x.ref_hidden @ x.ref_weight.T).detach().gather(1, x.ids), x.ids)},
        }[teacher]
        arguments = {k: getattr(x, v) if isinstance(v, str) else v for k, v in settings.items()}
        return (losses.linear_divergence(x.hidden, x.weight, kind=kind, **source, **arguments, **kw),)

    return call


REF_HEAD = {"ref_hidden": "ref_hidden", "ref_weight": "ref_weight"}
SHAPED = {"bias": "bias", "temperature": "temperature", "softcap": 4.0}
CASES = {
    "logprob": _logprob(),
    "logprob_shaped": _logprob(**SHAPED),
    "logprob_frozen": _frozen,
    "logprob_scores_only": _scores_only,
    "cross_entropy": _cross_entropy,
    "cross_entropy_plain": lambda x, **kw: (losses.linear_cross_entropy(x.hidden, x.weight, x.targets, **kw),),
    "policy_on": _policy(),
    "policy_k3": _policy(old_logp="old", ref_logp="ref", kl_coef=0.1),
    "policy_k2_clipped": _policy(ref_logp="ref", kl="k2", kl_coef=0.1, kl_log_ratio_clip=0.5, token_weights="weights"),
    "policy_k1_entropy": _policy(old_logp="old", ref_logp="ref", kl="k1", kl_coef=0.1, entropy_coef=0.2, **SHAPED),
    "policy_ref_head": _policy(kl_coef=0.3, normalizer=50.0, **REF_HEAD),
    "policy_full": _policy(
        old_logp="old", kl="full", kl_coef=0.3, entropy_coef=0.1, temperature="temperature", **REF_HEAD
    ),
    "policy_full_measured": _policy(kl="full", **REF_HEAD),
    "policy_sequence": _policy(old_logp="old", importance_level="sequence", cu_seqlens="cu_seqlens", entropy_coef=0.1),
    "policy_sequence_full": _policy(
        old_logp="old", importance_level="sequence", cu_seqlens="cu_seqlens", kl="full", kl_coef=0.2, **REF_HEAD
    ),
    "policy_tis_on": _policy(rollout_logp="rollout", tis_cap=1.2, ref_logp="ref", kl_coef=0.1),
    "policy_tis_off": _policy(
        old_logp="old", rollout_logp="rollout", tis_cap=1.2, sequence_mask_cap=1.1, cu_seqlens="cu_seqlens"
    ),
    "policy_mask_on": _policy(rollout_logp="rollout", sequence_mask_cap=1.05, cu_seqlens="cu_seqlens"),
    "forward_kl": _divergence("forward_kl", "head"),
    "reverse_kl": _divergence("reverse_kl", "logits", temperature="temperature", token_weights="weights"),
    "jsd": _divergence("jsd", "head", alpha=0.3),
    "skew_kl": _divergence("skew_kl", "logits"),
    "forward_kl_clipped": _divergence("forward_kl", "head", vocab_clip=0.02, token_weights="weights"),
    "reverse_kl_clipped": _divergence("reverse_kl", "logits", vocab_clip=0.02, temperature="temperature"),
    "jsd_clipped": _divergence("jsd", "head", vocab_clip=0.005),
    "skew_kl_clipped": _divergence("skew_kl", "logits", vocab_clip=0.02),
    "topk_clipped": _divergence("forward_kl", "topk", vocab_clip=0.02),
    "topk": _divergence("jsd", "topk", temperature="temperature"),
}

# Divergences with vocab_clip.
CLIPPED_CASES = {name for name in CASES if name.endswith("_clipped") and not name.startswith("policy")}


def run(case, x, upstream=0.7, **kw):
    """Return detached outputs and the gradients of hidden, weight and bias (zeros if there is no bias)."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in x.leaves]
    x.hidden, x.weight, x.bias = leaves
    outputs = CASES[case](x, **kw)
    if outputs[0].requires_grad:
        (outputs[0] * upstream).backward()
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return [t.detach() for t in (*outputs, *gradients)]
