"""Test that the fused heads equal the reference in float64 and have a bounded error in lower precisions."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from head_cases import CASES, CLIPPED_CASES, D, Inputs, T, V, run
from triton_cases import repair_interpreter

from rmsd_fast import losses
from rmsd_kernels import native, ops
from rmsd_kernels.heads import chunks, loops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    repair_interpreter()
# 33 scored rows and one head give 9 ragged chunks (a 16-bit d_weight is summed in float32) or 5 (it is rounded per
# chunk).
SMALL = {torch.float64: 4 * V * 8, torch.float32: 4 * V * 4, torch.bfloat16: 4 * V * 2}
BUDGETS = {"small": 1, "medium": 7 / 4}


def budget_of(name, dtype):
    return None if name == "default" else int(BUDGETS[name] * SMALL[dtype])


# The interpreter is slow, so each kernel has one case with all of its options.
INTERPRETER_CASES = ["logprob_shaped", "logprob_frozen", "cross_entropy", "policy_full", "policy_tis_on", "jsd"]
INTERPRETER_CASES += ["reverse_kl_clipped"]
ERROR_CASES = INTERPRETER_CASES if INTERPRETED else list(CASES)
SEEDS = 2 if INTERPRETED else 5


def implementations():
    if INTERPRETED:
        return ["triton"]
    on_gpu = pytest.param("triton", marks=pytest.mark.cuda)
    return ["torch", *(["native"] if native.available() else []), on_gpu]


def device_of(impl):
    return "cuda" if impl == "triton" and not INTERPRETED else "cpu"


def needs_interpreter():
    return pytest.mark.skipif(INTERPRETED, reason="the interpreter runs only the Triton cases")


@needs_interpreter()
@pytest.mark.parametrize("budget", ["small", "default"])
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_reference(case, budget):
    limit = budget_of(budget, torch.float64)
    ours = run(case, Inputs(torch.float64), impl="torch", memory_budget_bytes=limit)
    for got, expected in zip(ours, run(case, Inputs(torch.float64), impl="reference"), strict=True):
        assert torch.allclose(got, expected, atol=1e-13, rtol=1e-11)


# Chunks are cut before an implementation is called, so in the interpreter two cases run without them.
IN_ONE_CHUNK = ("cross_entropy", "policy_full")


@pytest.mark.parametrize("budget", ["small", "default"] if INTERPRETED else ["small", "medium", "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("case", ERROR_CASES)
def test_error_is_at_most_twice_that_of_eager(case, impl, dtype, budget):
    if impl == "native" and case in CLIPPED_CASES:
        pytest.skip("csrc/ does not implement vocab_clip")
    if INTERPRETED and budget == "default" and case not in IN_ONE_CHUNK:
        pytest.skip("the interpreter is slow")
    limit = budget_of(budget, dtype)
    errors, bars, scales = [], [], []
    # The error of a scalar may be small by chance, so the largest error over several inputs is compared.
    for seed in range(SEEDS):
        truth = run(case, Inputs(torch.float64, rounded=dtype, device=device_of(impl), seed=seed), impl="reference")
        eager = run(case, Inputs(dtype, device=device_of(impl), seed=seed), impl="reference")
        ours = run(case, Inputs(dtype, device=device_of(impl), seed=seed), impl=impl, memory_budget_bytes=limit)
        assert all(got.dtype == bar.dtype and got.isfinite().all() for got, bar in zip(ours, eager, strict=True))
        errors.append([(got - exact).abs().max() for got, exact in zip(ours, truth, strict=True)])
        bars.append([(bar - exact).abs().max() for bar, exact in zip(eager, truth, strict=True)])
        scales.append([exact.abs().max() for exact in truth])
    error, bar, scale = (torch.tensor(t).amax(0) for t in (errors, bars, scales))
    # The floor is eight units in the last place of float32, at the scale of the compared values.
    assert (error <= 2 * bar + 1e-6 * scale.clamp(min=1.0)).all(), (error / bar).tolist()


@pytest.mark.parametrize("impl", implementations())
def test_two_runs_are_bit_identical(impl):
    for case in ("policy_full", "cross_entropy", "logprob_shaped", "jsd"):
        inputs = [Inputs(torch.bfloat16, device=device_of(impl)) for _ in range(2)]
        if INTERPRETED and case != "policy_full":
            # The interpreter is slow and runs one program after the other, so only memory that a kernel leaves
            # unwritten could differ.
            for x in inputs:
                x.keep_rows(8)
        runs = [run(case, x, impl=impl, memory_budget_bytes=4000) for x in inputs]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", implementations())
def test_logp_is_never_above_zero(impl):
    """With bfloat16 logits only, logp of a certain token would be up to 0.06 nat."""
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, D, generator=g).to(device_of(impl), torch.bfloat16)
    weight = torch.randn(V, D, generator=g).to(device_of(impl), torch.bfloat16)
    targets = (hidden.float() @ weight.float().T * 4).argmax(1)
    logp = losses.linear_logprob(hidden * 4, weight, targets, impl=impl)
    assert (logp <= 0).all() and (logp > -1e-2).any()
    logp = losses.linear_logprob(hidden, weight, targets, impl=impl)
    exact = losses.linear_logprob(hidden.double(), weight.double(), targets, impl="reference")
    plain = losses.linear_logprob(hidden, weight, targets, impl="reference")
    assert (logp - exact).abs().mean() < 0.6 * (plain - exact).abs().mean()


@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("kind", ["empty", "one", "all_ignored"])
def test_few_rows(impl, kind):
    rows = {"empty": 0, "one": 1, "all_ignored": 3}[kind]
    device = device_of(impl)
    hidden, weight = (torch.randn(n, 4, device=device).requires_grad_() for n in (rows, 7))
    targets = torch.full((rows,), -100 if kind == "all_ignored" else 2, device=device)
    calls = [
        lambda **kw: losses.linear_cross_entropy(hidden, weight, targets, **kw),
        lambda **kw: losses.linear_logprob(hidden, weight, targets, **kw).sum(),
        lambda **kw: losses.linear_policy_loss(hidden, weight, targets, torch.ones(rows, device=device), **kw).loss,
        lambda **kw: losses.linear_divergence(hidden, weight, teacher_hidden=hidden, teacher_weight=weight * 2, **kw),
    ]
    for call in calls:
        results = []
        for which in (impl, "reference"):
            hidden.grad = weight.grad = None
            loss = call(impl=which)
            loss.backward()
            results.append((loss.detach(), hidden.grad, weight.grad))
        for got, expected in zip(*results, strict=True):
            assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("impl", implementations())
def test_extreme_logits(impl):
    """Logits of +-1e4 make targets certain or impossible; the results are compared with float64."""
    device = device_of(impl)
    hidden = torch.tensor([[1e4], [-1e4], [1.0]], device=device)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device)
    targets = torch.tensor([0, 0, 2], device=device)
    results = {}
    for which, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        h, w = (t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight))
        logp, entropy = losses.linear_logprob(h, w, targets, return_entropy=True, impl=which)
        (logp + entropy).sum().backward()
        results[which] = [logp.detach(), entropy.detach(), h.grad, w.grad]
    assert results[impl][0][0] == 0 and results[impl][0][1] == pytest.approx(-2e4)
    for got, expected in zip(results[impl], results["reference"], strict=True):
        assert torch.allclose(got.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", implementations())
def test_rows_without_ignore_index_need_no_lookup(impl):
    x = Inputs(torch.float32, device=device_of(impl))
    x.targets = x.targets.clamp(min=0)
    a = losses.linear_logprob(x.hidden, x.weight, x.targets, ignore_index=None, impl=impl)
    assert torch.equal(a, losses.linear_logprob(x.hidden, x.weight, x.targets, impl=impl))
    a = losses.linear_policy_loss(x.hidden, x.weight, x.targets, x.advantages, ignore_index=None, impl=impl)
    b = losses.linear_policy_loss(x.hidden, x.weight, x.targets, x.advantages, impl=impl)
    assert torch.equal(a.loss, b.loss) and a.metrics["rows"] == T


@needs_interpreter()
@pytest.mark.parametrize("impl", implementations())
def test_second_backward(impl):
    x = Inputs(torch.float32, device=device_of(impl))
    loss = CASES["policy_k3"](Inputs(torch.float32, device=device_of(impl)), impl=impl)[0]
    assert not loss.requires_grad
    x.hidden.requires_grad_()
    loss = losses.linear_cross_entropy(x.hidden, x.weight, x.targets, impl=impl)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran a second time.*call the loss again"):
        loss.backward()
    # If backward recomputes the logits, it consumes nothing.
    x.hidden.grad, weight = None, x.weight.clone().requires_grad_()
    loss = losses.linear_logprob(x.hidden, weight, x.targets, impl=impl, memory_budget_bytes=1).sum()
    loss.backward(retain_graph=True)
    once = x.hidden.grad.clone()
    loss.backward()
    assert torch.equal(x.hidden.grad, 2 * once)


@needs_interpreter()
@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize(
    "case", ["logprob", "logprob_frozen", "cross_entropy", "policy_full", "policy_sequence", "jsd"]
)
def test_compiles_without_graph_breaks(case, impl):
    def call(hidden, weight, bias):
        y = Inputs.__new__(Inputs)
        # Assign the fields one by one and read them outside, because Dynamo in torch 2.11 does not support an object's
        # __dict__.
        for name, value in {**fields, "hidden": hidden, "weight": weight, "bias": bias}.items():
            setattr(y, name, value)
        return CASES[case](y, impl=impl, memory_budget_bytes=SMALL[torch.float32])

    torch._dynamo.reset()
    x = Inputs(torch.float32, device=device_of(impl))
    fields, results = vars(x), []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        leaves = [leaf.clone().requires_grad_() for leaf in x.leaves]
        outputs = function(*leaves)
        outputs[0].backward()
        results.append([*(t.detach() for t in outputs), *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-6)


@needs_interpreter()
@pytest.mark.slow
def test_compiles_with_inductor():
    x = Inputs(torch.float32)

    def call(hidden, weight):
        result = losses.linear_policy_loss(hidden, weight, x.targets, x.advantages, ref_logp=x.ref, kl_coef=0.1)
        return result.loss * 2

    results = []
    for function in (call, torch.compile(call, fullgraph=True)):
        leaves = [leaf.clone().requires_grad_() for leaf in x.leaves[:2]]
        loss = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


@needs_interpreter()
@pytest.mark.parametrize("case", ["logprob", "policy_full", "jsd", "cross_entropy_plain"])
def test_ops_pass_opcheck(case, monkeypatch):
    """Check the schema, fake tensors and mutation of every op of the loops, as the case calls it."""
    seen = []
    for name in ("head_score", "head_gradient", "head_policy", "head_divergence", "scale_"):
        op = getattr(loops, name)

        def record(*args, op=op, **records):
            flat, values = (op.op, op.values(**records)) if records else (op, args)
            seen.append((flat, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in values]))
            return flat(*values)

        monkeypatch.setattr(loops, name, record)
    x = Inputs(torch.float32)
    # Stored logits of ignored rows are uninitialized, so they would differ between two calls.
    x.targets = x.targets.clamp(min=0)
    run(case, x, impl="torch")
    assert seen
    for op, args in seen:
        torch.library.opcheck(op, tuple(args))


@needs_interpreter()
def test_triton_through_the_interpreter():
    """Run the cases of this file on the Triton kernels, in a process where Triton runs them on CPU tensors."""
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        __file__,
        "-k",
        "error or few or extreme or advantage or identical or zero",
    ]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("live", [0, 14] if INTERPRETED else [0, 1, 14])
def test_rows_without_advantage_cost_no_backward(impl, live, monkeypatch):
    """Rows of groups with equal rewards are scored for the metrics but skipped in the backward GEMMs."""
    x = Inputs(torch.float32, device=device_of(impl))
    x.advantages = torch.where(torch.arange(T, device=x.targets.device) < live, 1.0, 0.0)
    x.targets = x.targets.clamp(min=0)
    ours = run("policy_on", x, impl=impl)
    seen = []
    add = chunks.Gradients.add
    monkeypatch.setattr(chunks.Gradients, "add", lambda self, *a: (seen.append(len(a[2])), add(self, *a)))
    for ignore_index in (-100, None):
        seen.clear()
        again = run("policy_on", x, impl=impl, ignore_index=ignore_index, memory_budget_bytes=SMALL[torch.float32])
        assert sum(seen) == live
        for a, b, c in zip(ours, again, run("policy_on", x, impl="reference"), strict=True):
            assert torch.allclose(a, b, atol=1e-6) and torch.allclose(a, c, atol=1e-6)


@needs_interpreter()
def test_float16_gradients_survive_a_large_normalizer():
    """In a mean over 1e7 tokens with loss scaling, gradients of single logits underflow float16."""
    upstream, gradients = 2.0**20, []
    for dtype in (torch.float16, torch.float64):
        x = Inputs(dtype, rounded=torch.float16)
        impl = "torch" if dtype == torch.float16 else "reference"
        leaves = [t.clone().requires_grad_() for t in (x.hidden, x.weight)]
        settings = {"old_logp": x.old, "ref_logp": x.ref, "kl_coef": 0.1, "normalizer": 1e7}
        loss = losses.linear_policy_loss(*leaves, x.targets, x.advantages, impl=impl, **settings).loss
        (loss * upstream).backward()
        gradients.append([t.grad.double() for t in leaves])
    for got, exact in zip(*gradients, strict=True):
        assert exact.abs().max() > 0.01
        assert (got - exact).abs().max() < 0.005 * exact.abs().max()


@needs_interpreter()
@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("chunk_rows", [512, 103, 32])
def test_a_16_bit_d_weight_has_no_bias(impl, chunk_rows):
    """Test the signed error, because truncated sums would all be too small."""
    generator = torch.Generator().manual_seed(0)
    device, rows, dim, vocabulary = device_of(impl), 512, 64, 600
    hidden = torch.randn(rows, dim, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(vocabulary, dim, generator=generator).div(8).to(device, torch.bfloat16)
    targets = torch.randint(vocabulary, (rows,), generator=generator).to(device)
    upstream = torch.empty(rows).uniform_(-1, 2, generator=generator).to(device)

    def d_weight(dtype, **options):
        leaf = weight.to(dtype).requires_grad_()
        logp = losses.linear_logprob(hidden.to(dtype), leaf, targets, **options)
        (logp * upstream).sum().backward()
        return leaf.grad.double()

    exact = d_weight(torch.float64, impl="reference")
    # Measure the bias toward or away from 0, which is zero for rounding to nearest.
    error = (
        d_weight(torch.bfloat16, impl=impl, memory_budget_bytes=chunk_rows * vocabulary * 2) - exact
    ) * exact.sign()
    assert error.mean().abs() <= 4 * error.std() / error.numel() ** 0.5


@needs_interpreter()
@pytest.mark.parametrize("tokens", [2048, 20000, 32768, 34400, 40000, 50000, 51300, 60000, 200000])
def test_chunks_of_a_16_bit_d_weight(tokens):
    """Use at most MAX_ROUNDINGS chunks if that takes no more memory than a sum in float32."""
    vocabulary, dim = 151936, 2560
    weight = torch.empty(vocabulary, dim, dtype=torch.bfloat16, device="meta")
    row_bytes, usual = 2 * vocabulary, chunks.DEFAULT_BUDGET_BYTES["cpu"]
    budget = chunks.default_budget(tokens, row_bytes, weight, need_weight=True)
    number = -(-tokens // chunks.chunk_rows(tokens, row_bytes, budget, "cpu"))

    def peak(chunk_bytes: float, in_float32: bool) -> float:
        """Return the peak size of the chunk and d_weight; a float32 sum is converted after its chunk was freed."""
        size = vocabulary * dim
        return max(chunk_bytes + 4 * size, 6 * size) if in_float32 else chunk_bytes + 2 * size

    few = max(usual, tokens / chunks.MAX_ROUNDINGS * row_bytes)
    if number <= chunks.MAX_ROUNDINGS:
        assert peak(budget, False) <= 1.01 * peak(4 * vocabulary * dim, True) + 2 * vocabulary * dim
        assert budget <= 1.02 * few
    else:
        assert peak(budget, True) + 2 * vocabulary * dim <= 1.01 * peak(few, False)


@needs_interpreter()
def test_other_weights_get_chunks_of_the_usual_size():
    usual = chunks.DEFAULT_BUDGET_BYTES["cpu"]
    for dtype, need_weight in ((torch.bfloat16, False), (torch.float32, True)):
        weight = torch.empty(151936, 2560, dtype=dtype, device="meta")
        assert chunks.default_budget(20000, 151936 * dtype.itemsize, weight, need_weight=need_weight) == usual


@needs_interpreter()
def test_loops_compute_outside_of_autocast(monkeypatch):
    seen, score = [], loops.torch_rows.score

    def watch(*arguments, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return score(*arguments, **options)

    monkeypatch.setattr(loops.torch_rows, "score", watch)
    x = Inputs(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses.linear_logprob(x.hidden, x.weight, x.targets, impl="torch")
        assert torch.is_autocast_enabled("cpu")
        monkeypatch.setattr(loops.torch_rows, "score", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            losses.linear_logprob(x.hidden, x.weight, x.targets, impl="torch")
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def reduction_flags() -> list:
    return [get() for get, _ in ops._reduction_flags()]


@needs_interpreter()
@pytest.mark.parametrize("flags", [(True, True), (False, False), (False, True)])
def test_cublas_flags_are_restored(flags):
    """Both flags are restored, also after an error and after nested use."""
    before = reduction_flags()
    try:
        for _, set_flags in ops._reduction_flags():
            set_flags(*flags)
        with ops.full_precision_sums(), ops.full_precision_sums():
            assert reduction_flags() == [(False, False)] * 2
        with pytest.raises(ZeroDivisionError), ops.full_precision_sums():
            1 / 0  # noqa: B018
        assert reduction_flags() == [flags] * 2
    finally:
        for (_, set_flags), value in zip(ops._reduction_flags(), before, strict=True):
            set_flags(*value)


@needs_interpreter()
def test_cublas_flags_are_restored_after_overlapping_threads():
    before, first, second = reduction_flags(), threading.Event(), threading.Event()

    def outer():
        with ops.full_precision_sums():
            first.set()
            assert second.wait(10)

    thread = threading.Thread(target=outer)
    thread.start()
    assert first.wait(10)
    with ops.full_precision_sums():
        second.set()
        thread.join(10)
        # The other thread has left the block, and this thread is still inside.
        assert reduction_flags() == [(False, False)] * 2
    assert reduction_flags() == before


@needs_interpreter()
@pytest.mark.parametrize("impl", ["torch", *(["native"] if native.available() else [])])
@pytest.mark.parametrize("case", ["logprob_shaped", "policy_full", "cross_entropy", "jsd"])
def test_padded_rows_of_logits_do_not_change_results(case, impl, monkeypatch):
    """On CUDA, rows are padded if the size of the vocabulary is not a multiple of 64."""
    expected = run(case, Inputs(torch.float32), impl=impl)

    def padded(like, rows, vocabulary, dtype=None):
        return like.new_full((rows, vocabulary + 19), float("nan"), dtype=dtype)[:, :vocabulary]

    monkeypatch.setattr(chunks, "empty_logits", padded)
    monkeypatch.setattr(loops, "empty_logits", padded)
    found = run(case, Inputs(torch.float32), impl=impl)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


@needs_interpreter()
def test_rows_of_logits_are_aligned_on_cuda():
    class OnCuda:
        """Provide the attributes of a CUDA tensor that empty_logits reads."""

        device = torch.device("cuda")

        @staticmethod
        def new_empty(rows: int, width: int, dtype=None) -> torch.Tensor:
            return torch.empty(rows, width, dtype=dtype)

    for vocabulary, width in ((50257, 50304), (151936, 151936), (7, 64)):
        logits = chunks.empty_logits(OnCuda, 3, vocabulary)
        assert logits.shape == (3, vocabulary) and logits.stride() == (width, 1)
    assert chunks.empty_logits(torch.empty(1), 3, 7).is_contiguous()


@needs_interpreter()
def test_unknown_arguments_of_an_op_are_refused():
    x = Inputs(torch.float32)
    call = loops.HeadCall(x.hidden, x.weight, None, x.targets, None, None, -100)
    known = {"call": call, "keep": False, "execution": loops.Execution("torch", 0)}
    loops.head_score(**known)
    with pytest.raises(TypeError, match="head_score: expected the arguments"):
        loops.head_score(**known, budget=3)
    with pytest.raises(TypeError, match="expected a HeadCall, got tuple"):
        loops.head_score(**known | {"call": tuple(call)})
