"""Test the public losses: implementations agree, arguments are checked, and importing loads only torch."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from rmsd_fast import losses

T, D, V = 23, 8, 37


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[[0, 7, 22]] = -100
    return hidden, weight, targets


def vector(seed):
    return torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(value, inputs):
    return [g.clone() for g in torch.autograd.grad(value, inputs)]


# For 20 scored rows and one head, 5 rows per chunk give full chunks, 7 give a ragged last chunk, and 1 byte gives
# single rows.
BUDGETS = [rows * 8 * V for rows in (5, 7)] + [1, None]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["logprob", "cross_entropy", "policy", "full_kl", "divergence", "topk"])
def test_torch_in_chunks_equals_the_reference(name, budget, head):
    hidden, weight, targets = head
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    common = {"bias": bias, "temperature": vector(1).abs() + 0.5, "softcap": 3.0}
    other = {"ref_hidden": hidden.detach() + 0.1, "ref_weight": weight.detach() * 0.9, "ref_bias": bias.detach()}
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:4] for i in range(T)])

    def call(**kw):
        if name == "logprob":
            logp, entropy = losses.linear_logprob(hidden, weight, targets, return_entropy=True, **common, **kw)
            return (logp * vector(2) + entropy * vector(3)).sum()
        if name == "cross_entropy":
            return losses.linear_cross_entropy(hidden, weight, targets, token_weights=vector(2).abs(), **common, **kw)
        if name in ("policy", "full_kl"):
            settings = {"kl": "full" if name == "full_kl" else "k3", "kl_coef": 0.3, "entropy_coef": 0.1, **other}
            result = losses.linear_policy_loss(hidden, weight, targets, vector(4), **settings, **common, **kw)
            # The sum includes the metrics, so they are compared too.
            return result.loss + 0 * sum(result.metrics.values()), result.metrics
        teacher = vector(5).unsqueeze(1) + torch.linspace(-1, 1, V, dtype=torch.float64)
        source = {"teacher_topk": (teacher[:, :4], ids)} if name == "topk" else {"teacher_logits": teacher}
        temperature = common["temperature"]
        return losses.linear_divergence(hidden, weight, kind="jsd", temperature=temperature, **source, **kw)

    inputs = (hidden, weight) if name in ("divergence", "topk") else (hidden, weight, bias)
    results = [call(impl="torch", memory_budget_bytes=budget), call(impl="reference"), call()]
    if isinstance(results[0], tuple):
        metrics = [result[1] for result in results]
        results = [result[0] for result in results]
        assert metrics[0].keys() == metrics[1].keys()
        assert all(torch.allclose(metrics[0][key], metrics[1][key], atol=1e-12) for key in metrics[0])
    expected = gradients(results[1], inputs)
    for result in (results[0], results[2]):
        assert torch.allclose(result, results[1], atol=1e-13, rtol=1e-12)
        for ours, reference in zip(gradients(result, inputs), expected, strict=True):
            assert torch.allclose(ours, reference, atol=1e-12)


def test_chunks_are_bit_identical_between_runs(head):
    hidden, weight, targets = (t.detach().float() if t.is_floating_point() else t for t in head)
    hidden.requires_grad_(), weight.requires_grad_()
    runs = []
    for _ in range(2):
        loss = losses.linear_cross_entropy(hidden, weight, targets, memory_budget_bytes=4000)
        runs.append([loss.detach(), *gradients(loss, (hidden, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def largest_saved(function) -> int:
    """Return the number of elements of the largest tensor that autograd keeps for backward."""
    sizes = [0]

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return max(sizes)


def test_the_budget_limits_the_saved_tensors(head):
    hidden, weight, targets = head
    rows = 4
    budget = rows * 8 * V
    call = lambda **kw: losses.linear_logprob(hidden, weight, targets, **kw)  # noqa: E731
    assert largest_saved(lambda: call(impl="reference")) >= 20 * V
    assert largest_saved(lambda: call(memory_budget_bytes=budget)) <= max(rows * V, D * V, T * D)


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed(hidden_grad, weight_grad, head):
    hidden, weight = head[0].detach(), head[1].detach()
    hidden.requires_grad_(hidden_grad), weight.requires_grad_(weight_grad)
    loss = losses.linear_cross_entropy(hidden, weight, head[2], memory_budget_bytes=9000)
    assert loss.requires_grad is (hidden_grad or weight_grad)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None) is hidden_grad and (weight.grad is not None) is weight_grad


def test_strided_inputs(head):
    hidden, weight, targets = head
    wide = torch.stack([hidden.detach(), hidden.detach()], dim=2)[..., 0]
    transposed = weight.detach().T.contiguous().T
    assert not wide.is_contiguous() and not transposed.is_contiguous()
    doubled = torch.stack([targets, targets], dim=1)[:, 0]
    assert torch.allclose(
        losses.linear_logprob(wide, transposed, doubled), losses.linear_logprob(hidden, weight, targets), atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_are_float32(dtype, head):
    hidden, weight = (t.detach().to(dtype).requires_grad_() for t in head[:2])
    targets = head[2]
    truth = losses.linear_cross_entropy(hidden.double(), weight.double(), targets, impl="reference")
    loss = losses.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6 if dtype == torch.float32 else 1e-2)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    policy = losses.linear_policy_loss(hidden, weight, targets, torch.ones(T))
    assert policy.loss.dtype == torch.float32 and policy.metrics["rows"].dtype == torch.float32
    values = losses.last_token_values(hidden, torch.tensor([0, 3]), weight[0])
    assert values.dtype == torch.float32


@pytest.mark.parametrize("impl", ["triton", "native", "fastest", None])
def test_a_missing_implementation_is_refused(impl, head):
    scores, index = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    calls = [
        lambda: losses.linear_logprob(*head, impl=impl),
        lambda: losses.linear_cross_entropy(*head, impl=impl),
        lambda: losses.linear_policy_loss(*head, vector(0), impl=impl),
        lambda: losses.linear_divergence(*head[:2], teacher_hidden=head[0], teacher_weight=head[1], impl=impl),
        lambda: losses.last_token_values(head[0], index, head[1][0], impl=impl),
        lambda: losses.pairwise_discriminator_loss(scores, scores, index, index, scores, impl=impl),
        lambda: losses.discriminator_loss(
            head[0], torch.tensor([0, 1]), head[1][0], index, index, scores.double(), num_students=1, impl=impl
        ),
    ]
    known = impl in ("triton", "native")
    expected = f"'{impl}' does not support.*use 'auto'" if known else f"expected one of 'auto', .*got {impl!r}"
    for call in calls:
        with pytest.raises(RuntimeError if known else ValueError, match=expected):
            call()


def test_a_budget_without_effect_is_refused(head):
    with pytest.raises(ValueError, match="no effect with impl='reference'"):
        losses.linear_logprob(*head, impl="reference", memory_budget_bytes=1)
    with pytest.raises(ValueError, match="memory_budget_bytes"):
        losses.linear_logprob(*head, memory_budget_bytes=0)


def partitioned():
    """Return a parameter in the state that ZeRO-3 leaves it in outside of a forward pass."""
    weight = torch.nn.Parameter(torch.zeros(0))
    weight.ds_id = 0
    return weight


def test_a_head_sharded_by_dtensor_is_refused(head):
    class Sharded(torch.Tensor):
        def full_tensor(self):
            return self

    with pytest.raises(ValueError, match=r"weight: .*DTensor; pass weight.full_tensor\(\)"):
        losses.linear_logprob(head[0], head[1].detach().as_subclass(Sharded), head[2])


BAD_SCORING = [
    ({"hidden": torch.zeros(2, 3, D)}, ValueError, "hidden: expected shape \\[T, D\\]"),
    ({"weight": torch.zeros(V, D + 1)}, ValueError, f"weight: expected shape \\[V, {D}\\] with V >= 1"),
    ({"weight": partitioned()}, ValueError, "ZeRO-3 has partitioned.*GatheredParameters"),
    ({"weight": torch.zeros(V, D)}, TypeError, "dtype of hidden, torch.float64, got torch.float32"),
    ({"hidden": [[1.0]]}, TypeError, "hidden: expected a torch.Tensor, got list"),
    ({"targets": torch.zeros(T + 1, dtype=torch.int64)}, ValueError, f"targets: expected shape \\[{T}\\]"),
    ({"targets": torch.zeros(T)}, TypeError, "targets: expected torch.int64, got torch.float32"),
    ({"targets": torch.full((T,), V)}, ValueError, f"0..{V - 1} or ignore_index=-100, got values from {V}"),
    ({"targets": torch.full((T,), -1)}, ValueError, "got values from -1"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0"),
    ({"temperature": float("nan")}, ValueError, "temperature"),
    ({"temperature": torch.zeros(T)}, ValueError, "temperature: expected finite values above 0"),
    ({"temperature": torch.ones(T - 1)}, ValueError, "temperature: expected shape"),
    ({"softcap": -1.0}, ValueError, "softcap"),
    ({"bias": torch.zeros(V - 1)}, ValueError, "bias: expected shape"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SCORING)
def test_invalid_scoring_arguments(change, error, message, head):
    arguments = {**dict(zip(("hidden", "weight", "targets"), head, strict=True)), **change}
    for function, extra in (
        (losses.linear_logprob, {}),
        (losses.linear_cross_entropy, {}),
        (losses.linear_policy_loss, {"advantages": vector(0)}),
    ):
        with pytest.raises(error, match=message):
            function(**arguments, **extra)


BAD_POLICY = [
    ({"advantages": torch.zeros(T - 1)}, ValueError, "advantages: expected shape"),
    ({"advantages": None}, TypeError, "advantages: expected a torch.Tensor"),
    ({"advantages": torch.zeros(T, dtype=torch.int64)}, TypeError, "advantages: expected a floating dtype"),
    ({"old_logp": torch.zeros(1)}, ValueError, "old_logp"),
    ({"kl": "k4"}, ValueError, "kl: expected one of 'k1', 'k2', 'k3', 'full', got 'k4'"),
    ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1: expected ref_logp, or ref_hidden"),
    ({"kl_coef": -1.0}, ValueError, "kl_coef"),
    ({"kl_coef": 0.1, "kl": "full", "ref_logp": torch.zeros(T)}, ValueError, "kl='full': expected ref_hidden"),
    ({"ref_hidden": torch.zeros(T, D)}, ValueError, "both or neither"),
    ({"ref_hidden": torch.zeros(T, 4), "ref_weight": torch.zeros(V - 1, 4)}, ValueError, f"V={V}"),
    ({"ref_bias": torch.zeros(V)}, ValueError, "ref_bias: has no effect"),
    ({"kl_log_ratio_clip": 0.0, "ref_logp": torch.zeros(T)}, ValueError, "kl_log_ratio_clip"),
    ({"kl_log_ratio_clip": 1.0, "kl": "full"}, ValueError, "no effect with kl='full'"),
    ({"clip_low": -0.1}, ValueError, "clip_low"),
    ({"importance_level": "word"}, ValueError, "importance_level: expected one of 'token', 'sequence'"),
    ({"importance_level": "sequence"}, ValueError, "cu_seqlens: expected the edges"),
    ({"cu_seqlens": torch.tensor([0, T - 1])}, ValueError, f"T={T}"),
    ({"cu_seqlens": torch.tensor([0, 5, 3, T])}, ValueError, "never decrease"),
    ({"cu_seqlens": torch.tensor([0.0, T])}, TypeError, "cu_seqlens: expected torch.int32"),
    ({"tis_cap": 2.0}, ValueError, "tis_cap: expected rollout_logp"),
    ({"normalizer": -1.0}, ValueError, "normalizer"),
    ({"normalizer": torch.ones(2)}, ValueError, "normalizer: expected one number"),
    ({"token_weights": torch.ones(T + 1)}, ValueError, "token_weights"),
    ({"entropy_coef": float("inf")}, ValueError, "entropy_coef"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_POLICY)
def test_invalid_policy_arguments(change, error, message, head):
    with pytest.raises(error, match=message):
        losses.linear_policy_loss(*head, **{"advantages": vector(0), **change})


def test_one_reference_and_its_bias(head):
    hidden, weight, targets = head
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    with pytest.raises(ValueError, match="got both"):
        losses.linear_policy_loss(hidden, weight, targets, vector(0), ref_logp=vector(1), **reference)
    with pytest.raises(ValueError, match="ref_bias: expected"):
        losses.linear_policy_loss(hidden, weight, targets, vector(0), bias=torch.zeros(V), **reference)


def test_invalid_divergence_arguments(head):
    hidden, weight, _ = head
    logits = torch.zeros(T, V)
    cases = [
        ({}, ValueError, "exactly one of.*got 0"),
        ({"teacher_logits": logits, "teacher_hidden": hidden, "teacher_weight": weight}, ValueError, "got 2"),
        ({"teacher_hidden": hidden}, ValueError, "expected both"),
        ({"teacher_logits": logits[:, 1:]}, ValueError, "teacher_logits: expected shape"),
        ({"teacher_topk": (logits[:, :2], torch.zeros(T, 2))}, ValueError, "teacher_topk\\[1\\]: expected int64"),
        ({"teacher_topk": (logits[:, :2], torch.full((T, 2), V))}, ValueError, f"0..{V - 1}"),
        ({"teacher_logits": logits, "kind": "kl"}, ValueError, "kind: expected one of 'forward_kl'"),
        ({"teacher_logits": logits, "alpha": 0.5}, ValueError, "alpha: has no effect"),
        ({"teacher_logits": logits, "kind": "jsd", "alpha": 1.0}, ValueError, "alpha"),
        ({"teacher_logits": logits, "vocab_clip": 0.0}, ValueError, "vocab_clip: expected a finite number above 0"),
        (
            {"hidden": hidden.float(), "weight": weight.float(), "teacher_logits": logits}
            | {"vocab_clip": 0.1, "impl": "native"},
            RuntimeError,
            "'native' does not support this call: csrc/ does not implement this loss; use 'auto' or 'torch'",
        ),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            losses.linear_divergence(**({"hidden": hidden, "weight": weight} | change))


PAIRS = {
    "student_scores": torch.zeros(2),
    "teacher_scores": torch.zeros(3),
    "student_index": torch.tensor([0, 1]),
    "teacher_index": torch.tensor([2, 0]),
    "quality": torch.ones(2),
}
BAD_PAIRS = [
    ({"student_index": torch.tensor([0, 2])}, ValueError, "student_index: expected values in 0..1"),
    ({"teacher_index": torch.tensor([3, 0])}, ValueError, "teacher_index: expected values in 0..2"),
    ({"teacher_index": torch.tensor([-1, 0])}, ValueError, "teacher_index"),
    ({"teacher_index": torch.tensor([0])}, ValueError, "teacher_index: expected shape \\[2\\]"),
    ({"student_index": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "student_index: expected torch.int64"),
    ({"quality": torch.tensor([0.5, float("nan")])}, ValueError, "quality: expected values in \\[0, 1\\]"),
    ({"quality": torch.tensor([0.5, 1.1])}, ValueError, "quality"),
    ({"quality": torch.ones(3)}, ValueError, "quality: expected shape \\[2\\]"),
    ({"pair_weight": torch.tensor([1.0, -1.0])}, ValueError, "pair_weight: expected finite values >= 0"),
    ({"score_l2": -1.0}, ValueError, "score_l2"),
    ({"normalizer": float("nan")}, ValueError, "normalizer"),
    ({"l2_normalizer": -1}, ValueError, "l2_normalizer"),
    ({"student_scores": torch.zeros(2, 1)}, ValueError, "student_scores: expected shape"),
    ({"student_scores": torch.tensor(0.0)}, ValueError, "student_scores: expected shape"),
    ({"teacher_scores": torch.zeros(3, dtype=torch.int64)}, TypeError, "teacher_scores: expected a floating dtype"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_PAIRS)
def test_invalid_pairs(change, error, message):
    assert losses.pairwise_discriminator_loss(**PAIRS).loss.isfinite()
    with pytest.raises(error, match=message):
        losses.pairwise_discriminator_loss(**{**PAIRS, **change})


def test_invalid_value_arguments(head):
    hidden, weight = head[0], head[1][0]
    index = torch.tensor([0, 1])
    cases = [
        ((hidden[0], index, weight), {}, ValueError, "hidden: expected a tensor \\[T, D\\]"),
        ((hidden, torch.tensor([T]), weight), {}, ValueError, f"last_index: expected values in 0..{T - 1}"),
        ((hidden, torch.tensor([-1]), weight), {}, ValueError, "last_index"),
        ((hidden, index, head[1]), {}, ValueError, f"weight: expected shape \\[{D}\\]"),
        ((hidden, index, weight), {"bias": torch.zeros(2)}, ValueError, "bias: expected one element"),
        ((hidden, index, weight), {"norm_weight": torch.zeros(2)}, ValueError, "norm_weight"),
    ]
    for args, kw, error, message in cases:
        with pytest.raises(error, match=message):
            losses.last_token_values(*args, **kw)
    with pytest.raises(ValueError, match="num_students: expected 0..2"):
        losses.discriminator_loss(hidden, index, weight, index[:0], index[:0], torch.zeros(0), num_students=3)
    # nn.Linear keeps its bias in shape [1].
    plain = losses.last_token_values(hidden, index, weight)
    assert torch.allclose(losses.last_token_values(hidden, index, weight, bias=torch.ones(1)), plain + 1)


def test_module_forms(head):
    hidden, weight, targets = head
    functions = {
        losses.LinearLogprob: losses.linear_logprob,
        losses.LinearCrossEntropy: losses.linear_cross_entropy,
        losses.LinearPolicyLoss: losses.linear_policy_loss,
        losses.LinearDivergence: losses.linear_divergence,
        losses.LastTokenValues: losses.last_token_values,
        losses.PairwiseDiscriminatorLoss: losses.pairwise_discriminator_loss,
        losses.DiscriminatorHeadLoss: losses.discriminator_loss,
    }
    for module, function in functions.items():
        assert module().function is function and not list(module().parameters())
    module = losses.LinearPolicyLoss(temperature=0.8, kl="k2", kl_coef=0.1)
    assert "kl='k2'" in repr(module)
    ours = module(hidden, weight, targets, vector(0), ref_logp=vector(1))
    settings = {"temperature": 0.8, "kl": "k2", "kl_coef": 0.1}
    assert torch.equal(
        ours.loss, losses.linear_policy_loss(hidden, weight, targets, vector(0), ref_logp=vector(1), **settings).loss
    )
    overridden = module(hidden, weight, targets, vector(0), kl_coef=0.0)
    assert torch.equal(overridden.loss, losses.linear_policy_loss(*head, vector(0), temperature=0.8).loss)
    with pytest.raises(TypeError, match="unknown settings tempratur; expected some of"):
        losses.LinearPolicyLoss(tempratur=0.8)


def test_every_public_function_takes_impl():
    for name in losses.__all__:
        value = getattr(losses, name)
        if inspect.isfunction(value):
            assert inspect.signature(value).parameters["impl"].default == "auto"


def test_importing_loads_torch_only():
    """Besides torch and its imports, only the standard library and our two packages are imported."""
    code = """
import sys, torch, torch.utils.checkpoint
before = {name.split(".")[0] for name in sys.modules}
from rmsd_fast.losses import LinearPolicyLoss, linear_policy_loss
loaded = {name.split(".")[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
print(sorted(loaded))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_environment()
    )
    assert result.stdout.strip() == "['rmsd_fast', 'rmsd_kernels']"


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
