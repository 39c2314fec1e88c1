"""Test the fused heads with other layouts and dtypes, autocast, autograd tools, and torch.compile with new sizes."""

import pytest
import torch
import torch._dynamo.testing
from head_cases import CASES, REF_HEAD, D, Inputs, T, V, run
from torch.utils.checkpoint import checkpoint
from undefined_gradient import Drop

from rmsd_fast import losses
from rmsd_kernels import native

IMPLS = ["torch", *(["native"] if native.available() else [])]
HEADS = [torch.float32, torch.bfloat16]


def spread(values):
    """Return the values as a view of every second element of a larger tensor."""
    wide = torch.stack([values, torch.full_like(values, 7)], dim=-1)
    assert not wide[..., 0].is_contiguous() or values.numel() < 2
    return wide[..., 0]


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("dtype", HEADS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", ["logprob_shaped", "cross_entropy", "policy_k1_entropy", "policy_tis_on", "policy_full", "jsd"]
)
def test_strided_inputs(case, impl, dtype, ignored):
    results = []
    for layout in (lambda t: t, spread):
        x = Inputs(dtype)
        if not ignored:
            x.targets = x.targets.clamp(min=0)
        for name, value in vars(x).items():
            if isinstance(value, torch.Tensor) and name != "cu_seqlens":
                setattr(x, name, layout(value))
        x.leaves = [layout(t.detach().clone()) for t in (x.hidden, x.weight, x.bias)]
        results.append([t.detach() for t in CASES[case](x, impl=impl, **({} if ignored else no_ignore(case)))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def no_ignore(case):
    return {} if case == "jsd" else {"ignore_index": None}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "float64", "bfloat16"])
def test_teacher_logits_of_any_layout_and_dtype(layout, impl):
    x = Inputs(torch.float32)
    logits = (x.ref_hidden @ x.ref_weight.T).detach()
    teacher_logits = {
        "transposed": lambda: logits.t().contiguous().t(),
        "expanded": lambda: logits[3].expand(T, V),
        "float64": lambda: logits.double(),
        "bfloat16": lambda: logits.bfloat16(),
    }[layout]()
    call = lambda **kw: losses.linear_divergence(x.hidden, x.weight, teacher_logits=teacher_logits, kind="jsd", **kw)  # noqa: E731
    assert torch.allclose(call(impl=impl), call(impl="reference"), rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["jsd", "policy_full", "policy_ref_head", "policy_sequence_full"])
@pytest.mark.parametrize("budget", [None, 4 * V * 4])
def test_another_head_in_another_dtype(case, impl, budget):
    """Train a float32 student with a bfloat16 teacher or reference."""
    results = []
    for which in (impl, "reference"):
        x = Inputs(torch.float32)
        x.ref_hidden, x.ref_weight = x.ref_hidden.bfloat16(), x.ref_weight.bfloat16()
        results.append(run(case, x, impl=which, **({} if which == "reference" else {"memory_budget_bytes": budget})))
    # The reference logits are bfloat16 in both forms. Only the target logit is more exact in the fused form.
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=0.05, atol=0.02)


def test_a_float16_head_with_a_bfloat16_student_is_refused():
    x = Inputs(torch.bfloat16)
    with pytest.raises(TypeError, match="ref_hidden: expected torch.bfloat16, float32 or bfloat16, got torch.float16"):
        CASES["policy_full"](_with(x, ref_hidden=x.ref_hidden.half(), ref_weight=x.ref_weight.half()))


def _with(x, **values):
    vars(x).update(values)
    return x


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["cross_entropy", "policy_full", "logprob", "jsd"])
def test_autocast_does_not_change_results(case, impl):
    plain = run(case, Inputs(torch.float32), impl=impl, memory_budget_bytes=4 * V * 4)
    x = Inputs(torch.float32)
    if case == "jsd":
        x.ref_hidden, x.ref_weight = x.ref_hidden.clone(), x.ref_weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        again = run(case, x, impl=impl, memory_budget_bytes=4 * V * 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("case", ["cross_entropy", "policy_k3", "logprob", "jsd"])
def test_float16_with_no_rows(case):
    hidden, weight = torch.zeros(0, 4, dtype=torch.float16).requires_grad_(), torch.ones(7, 4, dtype=torch.float16)
    none = torch.zeros(0)
    loss = {
        "cross_entropy": lambda: losses.linear_cross_entropy(hidden, weight, none.long()),
        "policy_k3": lambda: (
            losses.linear_policy_loss(hidden, weight, none.long(), none, ref_logp=none, kl_coef=1.0).loss
        ),
        "logprob": lambda: losses.linear_logprob(hidden, weight, none.long()).sum(),
        "jsd": lambda: losses.linear_divergence(
            hidden, weight, teacher_hidden=hidden, teacher_weight=weight, kind="jsd"
        ),
    }[case]()
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 4)


@pytest.mark.parametrize("kind", ["cross_entropy", "forward_kl"])
def test_float16_gradients_neither_vanish_nor_overflow(kind):
    """The sum of the gradients of 1700 rows of one token exceeds float16, but their mean does not."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.full((1700, 4), 40.0) + torch.randn(1700, 4, generator=generator)).half()
    weight = (torch.randn(50, 4, generator=generator) / 100).half()
    targets = torch.zeros(1700, dtype=torch.int64)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        h, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        impl = "torch" if dtype == torch.float16 else "reference"
        if kind == "cross_entropy":
            loss = losses.linear_cross_entropy(h, w, targets, impl=impl)
        else:
            teacher = torch.zeros(1700, 50).index_fill(1, torch.tensor([0]), 12.0)
            loss = losses.linear_divergence(h, w, teacher_logits=teacher, kind=kind, impl=impl)
        (loss * 128).backward()
        gradients.append([h.grad.double(), w.grad.double()])
    for got, exact in zip(*gradients, strict=True):
        assert (got - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", ["logprob", "logprob_frozen", "cross_entropy_plain", "jsd"])
def test_second_derivatives_are_refused(case, frozen, impl):
    x = Inputs(torch.float32)
    x.hidden.requires_grad_(), x.weight.requires_grad_(not frozen)
    body = torch.ones(D, requires_grad=True)
    x.hidden = torch.tanh(x.hidden * body)
    loss = CASES[case](x, impl=impl)[0]
    with pytest.raises(RuntimeError, match="no second derivatives.*impl='reference'"):
        torch.autograd.grad(loss, body, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_upstream_gradient_of_an_ignored_row_has_no_effect(frozen, impl):
    x = Inputs(torch.float32)
    x.hidden.requires_grad_()
    logp = losses.linear_logprob(x.hidden, x.weight.requires_grad_(not frozen), x.targets, impl=impl)
    logp.backward(torch.where(x.targets == -100, float("nan"), 1.0))
    assert x.hidden.grad.isfinite().all() and (x.hidden.grad[x.targets == -100] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_is_refused_under_saved_tensor_hooks_too(impl):
    """Saved-tensor hooks remove the version counters that autograd would use to detect the second backward."""
    for case in ("cross_entropy_plain", "logprob"):
        x = Inputs(torch.float32)
        x.hidden.requires_grad_(), x.weight.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            loss = CASES[case](x, impl=impl)[0] * 0.5
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="ran a second time.*call the loss again"):
            loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", ["cross_entropy_plain", "policy_k3", "jsd"])
def test_an_undefined_gradient_of_the_loss_gives_none_and_consumes_nothing(case, impl):
    x = Inputs(torch.float32)
    x.hidden.requires_grad_(), x.weight.requires_grad_()
    loss = CASES[case](x, impl=impl)[0]
    (gradient,) = torch.autograd.grad(Drop.apply(loss) + x.hidden.sum() * 2, x.hidden, retain_graph=True)
    assert torch.equal(gradient, torch.full_like(gradient, 2))
    loss.backward()
    assert x.hidden.grad.abs().max() > 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(reentrant, impl):
    x = Inputs(torch.float32)
    plain = run("policy_k3", x, impl=impl, upstream=1.0)
    x = Inputs(torch.float32)
    h, w = (t.clone().requires_grad_() for t in (x.hidden, x.weight))

    def loss(hidden, weight):
        settings = {"old_logp": x.old, "ref_logp": x.ref, "kl_coef": 0.1, "impl": impl}
        return losses.linear_policy_loss(hidden, weight, x.targets, x.advantages, **settings).loss

    checkpoint(loss, h, w, use_reentrant=reentrant).backward()
    assert torch.equal(h.grad, plain[-3]) and torch.equal(w.grad, plain[-2])


@pytest.mark.parametrize("impl", IMPLS)
def test_two_losses_on_one_head_add_up(impl):
    gradients = []
    for cases in (["policy_k3"], ["cross_entropy_plain"], ["logprob"], ["policy_k3", "cross_entropy_plain", "logprob"]):
        x = Inputs(torch.float32)
        h, w = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
        x.hidden, x.weight = h, w
        sum(CASES[case](x, impl=impl)[0] for case in cases).backward()
        gradients.append((h.grad, w.grad))
    for i in range(2):
        assert torch.allclose(gradients[3][i], gradients[0][i] + gradients[1][i] + gradients[2][i], atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_second_length_compiles_for_all_lengths(impl):
    """dynamic=True is not used, because torch 2.13 fails on symbolic floats in autograd functions."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, targets, advantages):
        return losses.linear_policy_loss(hidden, weight, targets, advantages, impl=impl).loss

    compiled = torch.compile(call, fullgraph=True, backend=frames)
    for rows in (9, 14, 31):
        x = Inputs(torch.float32)
        grads = []
        for function in (call, compiled):
            h, w = x.hidden[:rows].clone().requires_grad_(), x.weight.clone().requires_grad_()
            function(h, w, x.targets[:rows], x.advantages[:rows]).backward()
            grads.append((h.grad, w.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert frames.frame_count == 2


def test_discriminator_losses_compile():
    torch._dynamo.reset()
    student, teacher = torch.randn(4), torch.randn(3)
    i, k, quality = torch.arange(4), torch.tensor([0, 1, 2, 0]), torch.rand(4)

    def call(student, teacher):
        return losses.pairwise_discriminator_loss(student, teacher, i, k, quality, pair_weight=quality).loss

    assert torch.allclose(
        torch.compile(call, fullgraph=True, backend="aot_eager")(student, teacher), call(student, teacher)
    )


def test_unused_outputs_cost_nothing_in_backward(monkeypatch):
    """If the loss does not use entropy and exact KL, backward does not run the second head."""
    from rmsd_kernels.heads import loops

    seen, gradient = [], loops.head_gradient

    def record(**arguments):
        seen.append([arguments[name] for name in ("g_logp", "g_entropy", "g_full_kl")])
        return gradient(**arguments)

    monkeypatch.setattr(loops, "head_gradient", record)
    x = Inputs(torch.float32)
    h, w = x.hidden.requires_grad_(), x.weight.requires_grad_()
    losses.linear_logprob(h, w, x.targets, return_entropy=True)[0].sum().backward()
    settings = {name: getattr(x, name) for name in REF_HEAD} | {"kl": "full", "importance_level": "sequence"}
    losses.linear_policy_loss(h, w, x.targets, x.advantages, cu_seqlens=x.cu_seqlens, **settings).loss.backward()
    assert [[g is not None for g in g_of] for g_of in seen] == [[True, False, False]] * 2
    assert h.grad.shape == (T, D)


def test_parameters_themselves_are_saved_for_backward():
    """Saved-tensor hooks, offloading and ZeRO-3 recognize a parameter by identity."""
    x = Inputs(torch.float32)
    hidden, weight = x.hidden.requires_grad_(), torch.nn.Parameter(x.weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        losses.linear_logprob(hidden, weight, x.targets, impl="torch", return_entropy=True)
    assert any(tensor is weight for tensor in saved)
    assert any(tensor is hidden for tensor in saved)


def test_a_head_that_is_partitioned_before_backward_is_refused():
    x = Inputs(torch.float32)
    hidden, weight = x.hidden.requires_grad_(), torch.nn.Parameter(x.weight)
    logp, entropy = losses.linear_logprob(hidden, weight, x.targets, impl="torch", return_entropy=True)
    weight.ds_id = 0
    weight.data = torch.empty(0)
    with pytest.raises(
        ValueError, match="weight: expected a whole tensor, got a parameter that ZeRO-3 has partitioned"
    ):
        (logp + entropy).sum().backward()
