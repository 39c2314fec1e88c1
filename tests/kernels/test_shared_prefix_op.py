"""Test shared_prefix_attention against dense masked attention, and the op under autograd and torch.compile."""

from __future__ import annotations

import threading

import pytest
import torch
from shared_prefix_cases import (
    HEADS,
    PLAN,
    ROWS,
    STAND_IN,
    check_errors,
    dense,
    largest_error,
    random_rows,
    with_gradients,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmsd_kernels import SharedPrefixPlan, attention_calls, shared_prefix_attention
from rmsd_kernels.shared_prefix import attention as op
from rmsd_kernels.shared_prefix import segments

PATHS = ["flash", "torch", "torch in chunks", "CUDA with a stand-in"]


@pytest.fixture
def path(request, monkeypatch) -> str:
    """Return the value of `impl` that makes a call use the named code path."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(segments, "_SCORES", 50)
        return "torch"
    if request.param == "CUDA with a stand-in":
        monkeypatch.setattr(op, "backend_of", lambda q, impl: STAND_IN)
        return "flash"
    return request.param


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("row", ROWS)
def test_fp64_equals_dense_attention(row, heads, path):
    plan = SharedPrefixPlan.from_lengths(*ROWS[row])
    inputs = random_rows(plan, heads)
    d_out = torch.randn_like(inputs[0])
    ours = with_gradients(lambda *rows: shared_prefix_attention(*rows, plan, scale=0.4, impl=path), inputs, d_out)
    truth = with_gradients(lambda *rows: dense(*rows, plan, scale=0.4), inputs, d_out)
    assert largest_error(ours, truth) <= 1e-12


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_gradcheck(path):
    plan = SharedPrefixPlan.from_lengths([3, 2], [[2, 1], [2]])
    inputs = random_rows(plan, size=4)
    assert torch.autograd.gradcheck(lambda *rows: shared_prefix_attention(*rows, plan, impl=path), inputs)


def test_numbers_by_hand():
    # All scores are 0, so all visible values have equal weight: 3, (3 + 5) / 2, (3 + 5 + 10) / 3, (3 + 5 + 10 + 2) / 4.
    plan = SharedPrefixPlan.from_lengths([2], [[2]])
    v = torch.tensor([3.0, 5.0, 10.0, 2.0]).reshape(4, 1, 1)
    for impl in ("flash", "torch"):
        out = shared_prefix_attention(torch.zeros(4, 1, 1), torch.ones(4, 1, 1), v, plan, impl=impl)
        assert torch.allclose(out.flatten(), torch.tensor([3.0, 4.0, 6.0, 5.0]))


def test_one_response_is_plain_causal_attention():
    plan = SharedPrefixPlan.from_lengths([7], [[5]])
    q, k, v = random_rows(plan)
    rows = (t.transpose(0, 1) for t in (q, k, v))
    causal = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(0, 1)
    assert largest_error([shared_prefix_attention(q, k, v, plan)], [causal]) <= 1e-12


@pytest.mark.parametrize("impl", ["flash", "torch"])
@pytest.mark.parametrize(
    ("prefixes", "responses", "heads", "size"),
    [
        ([256], [[32] * 6], (8, 2), 64),
        # Both parts have equal weight, which maximizes the effect of rounding both.
        ([64], [[128] * 4], (4, 2), 32),
        # One part has almost no weight, and the block sizes of the kernel differ from those of the dense call.
        ([700], [[100, 1]], (4, 4), 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_close_to_that_of_dense_attention(prefixes, responses, heads, size, impl, dtype):
    plan = SharedPrefixPlan.from_lengths(prefixes, responses)
    rounded = random_rows(plan, heads, size, dtype)
    d_out = torch.randn(rounded[0].shape).to(dtype)

    def run(function, cast: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(cast).requires_grad_() for t in rounded]
        return with_gradients(function, inputs, d_out.to(cast))

    truth = run(lambda *rows: dense(*rows, plan), torch.float64)
    of_dense = run(lambda *rows: dense(*rows, plan), dtype)
    ours = run(lambda *rows: shared_prefix_attention(*rows, plan, impl=impl), dtype)
    check_errors(ours, of_dense, truth, plan, 1.2)


@pytest.mark.parametrize(
    ("impl", "device", "dtype"),
    [
        ("flash", "cpu", torch.float32),
        ("torch", "cpu", torch.float32),
        pytest.param("flash", "cuda", torch.bfloat16, marks=pytest.mark.cuda),
    ],
)
def test_a_response_does_not_affect_the_others(impl, device, dtype):
    plan = SharedPrefixPlan.from_lengths([40, 33], [[20, 20, 7], [20, 64]], device=device)
    inputs = [t.detach() for t in random_rows(plan, size=16, dtype=dtype)]
    d_out = torch.randn_like(inputs[0])

    def run() -> list[Tensor]:
        rows = [t.clone().requires_grad_() for t in inputs]
        return with_gradients(lambda *rows: shared_prefix_attention(*rows, plan, impl=impl), rows, d_out)

    before = run()
    changed = slice(plan.prefix_tokens + 20, plan.prefix_tokens + 40)
    for t in inputs:
        t[changed] = torch.randn_like(t[changed])
    others = torch.ones(plan.tokens, dtype=torch.bool, device=device)
    others[changed] = False
    # The changed response contributes to the gradients of the keys and values of its prefix.
    other_keys = others.clone()
    other_keys[:40] = False
    unchanged = (others, others, other_keys, other_keys)
    for a, b, rows_to_compare in zip(before, run(), unchanged, strict=True):
        assert not torch.equal(a[changed], b[changed])
        # CUDA sums dQ with atomic operations in any order, so one rounding to 16 bits may differ.
        slack = 0 if a is before[0] or device == "cpu" else 2**-7 * float(a.abs().max())
        assert float((a[rows_to_compare] - b[rows_to_compare]).abs().max()) <= slack
    inputs[2][changed] = float("nan")
    after = run()
    # dV depends only on the probabilities and d_out.
    assert [bool(t[changed].isnan().any()) for t in after] == [True, True, True, False]
    assert not any(t[rows_to_compare].isnan().any() for t, rows_to_compare in zip(after, unchanged, strict=True))


@pytest.mark.parametrize("impl", ["flash", "torch"])
def test_order_of_responses_does_not_change_results(impl):
    lengths, order = [3, 5, 5, 2], [2, 0, 3, 1]
    plan = SharedPrefixPlan.from_lengths([6], [lengths])
    reordered_plan = SharedPrefixPlan.from_lengths([6], [[lengths[i] for i in order]])
    inputs = [t.detach() for t in random_rows(plan)]
    d_out = torch.randn_like(inputs[0])

    def reorder(t: Tensor) -> Tensor:
        prefix, *responses = t.split([6, *lengths])
        return torch.cat([prefix, *(responses[i] for i in order)])

    def run(plan, inputs, d_out):
        inputs = [t.requires_grad_() for t in inputs]
        return with_gradients(lambda *rows: shared_prefix_attention(*rows, plan, impl=impl), inputs, d_out)

    expected = [reorder(t) for t in run(plan, inputs, d_out)]
    assert largest_error(run(reordered_plan, [reorder(t.detach()) for t in inputs], reorder(d_out)), expected) <= 1e-12


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("layout", ["heads first", "last dimension apart", "rows apart"])
def test_strided_inputs_and_gradients(layout, path):
    inputs = [t.detach() for t in random_rows(PLAN)]
    expected = shared_prefix_attention(*inputs, PLAN, impl="torch")

    def stored(t: Tensor) -> Tensor:
        if layout == "heads first":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "last dimension apart":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.cat([t, t], dim=-1)[..., : t.shape[-1]]

    strided = [stored(t).requires_grad_() for t in inputs]
    assert not strided[0].is_contiguous()
    out = shared_prefix_attention(*strided, PLAN, impl=path)
    assert out.is_contiguous() and largest_error([out], [expected]) <= 1e-12
    # The gradient of a sum is an expanded scalar.
    gradients = torch.autograd.grad(out.sum(), strided)
    plain = [t.requires_grad_() for t in inputs]
    assert largest_error(gradients, torch.autograd.grad(dense(*plain, PLAN).sum(), plain)) <= 1e-12


def arguments(plan: SharedPrefixPlan) -> tuple:
    return plan.lengths, plan.segments, plan.group_queries, plan.group_keys, 0.5, "auto"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, v = random_rows(PLAN, dtype=dtype)
    torch.library.opcheck(op._forward, (q, k, v, *arguments(PLAN)))
    constants = [t.detach() for t in (q, k, v)]
    out, lse = op._forward(*constants, *arguments(PLAN))
    torch.library.opcheck(op._backward, (torch.randn_like(out), *constants, out, lse, *arguments(PLAN)))


def test_compiled_code_works_for_every_plan():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, plan):
        return shared_prefix_attention(2 * q, k, v, plan) + 1

    def run(function, plan):
        inputs = random_rows(plan)
        torch.manual_seed(0)
        return with_gradients(lambda *rows: function(*rows, plan), inputs, torch.randn_like(inputs[0])), inputs

    def check(row):
        plan = SharedPrefixPlan.from_lengths(*row)
        torch.manual_seed(1)
        ours, _ = run(compiled, plan)
        torch.manual_seed(1)
        truth, _ = run(lambda q, k, v, plan: shared_prefix_attention(2 * q, k, v, plan) + 1, plan)
        assert largest_error(ours, truth) <= 1e-12

    # After the first call, the number of tokens, responses and groups changes.
    check(([9], [[4, 4]]))
    check(([8], [[5, 1]]))
    check(([8], [[5, 1, 3]]))
    check(([8, 4], [[5, 1, 3], [2]]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for row in ROWS.values():
            check(row)


def test_compiled_calls_are_counted():
    plan = SharedPrefixPlan.from_lengths([4], [[2]])
    inputs = random_rows(plan)
    compiled = torch.compile(lambda *rows: shared_prefix_attention(*rows, plan), fullgraph=True, backend="aot_eager")
    compiled(*inputs)
    before = attention_calls()
    out = compiled(*inputs)
    assert attention_calls() == before + 1
    out.sum().backward()
    assert attention_calls() == before + 1


def test_calls_are_counted_per_thread():
    inputs = random_rows(PLAN)
    before = attention_calls()
    counts = []

    def other_thread():
        counts.append(attention_calls())
        shared_prefix_attention(*inputs, PLAN)
        counts.append(attention_calls())

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert counts == [0, 1] and attention_calls() == before
    shared_prefix_attention(*inputs, PLAN)
    assert attention_calls() == before + 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpoints(use_reentrant):
    inputs = random_rows(PLAN)
    d_out = torch.randn_like(inputs[0])

    def layer(q, k, v):
        return shared_prefix_attention(q.sin(), k, v, PLAN).cos()

    before = attention_calls()
    ours = with_gradients_of(lambda *rows: checkpoint(layer, *rows, use_reentrant=use_reentrant), inputs, d_out)
    assert attention_calls() == before + 2
    assert largest_error(ours, with_gradients_of(layer, inputs, d_out)) == 0


def with_gradients_of(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    # Reentrant checkpoints support only backward().
    inputs = [t.detach().requires_grad_() for t in inputs]
    function(*inputs).backward(d_out)
    return [t.grad for t in inputs]


def test_gradients_are_computed_once():
    inputs = random_rows(PLAN)
    out = shared_prefix_attention(*inputs, PLAN)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_unneeded_gradients():
    q, k, v = random_rows(PLAN)
    frozen = shared_prefix_attention(q, k.detach(), v.detach(), PLAN)
    whole = shared_prefix_attention(q, k, v, PLAN)
    weights = torch.randn_like(q)
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), q)[0] for out in (frozen, whole)))
    assert not shared_prefix_attention(*(t.detach() for t in (q, k, v)), PLAN).requires_grad


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_matches_scaled_dot_product_attention(compiled):
    q, k, v = random_rows(PLAN, dtype=torch.float32)

    def run(*rows):
        return shared_prefix_attention(*rows, PLAN)

    function = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with torch.autocast("cpu", torch.bfloat16):
        # Rotary embeddings make q and k float32, while v comes from a bfloat16 projection.
        out = function(q, k, v.detach().bfloat16())
        torch.autograd.grad(out.float().sum(), (q, k))
    expected = shared_prefix_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), PLAN)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("prefixes", "responses", "message"),
    [
        ([], [], "prefix_lengths: expected at least one prefix"),
        ([3], [[1], [2]], "response_lengths: expected one list per prefix, 1, got 2"),
        ([3, 0], [[1], [2]], r"prefix_lengths\[1\]: expected at least 1 token, got 0"),
        ([3, 2], [[1], [2, 0]], r"response_lengths\[1\]\[1\]: expected at least 1 token, got 0; leave the response"),
    ],
)
def test_invalid_plans_are_refused(prefixes, responses, message):
    with pytest.raises(ValueError, match=message):
        SharedPrefixPlan.from_lengths(prefixes, responses)


def test_lengths_are_integers():
    for prefixes, responses, name in (([3.5], [[2]], "prefix_lengths"), ([3], [[2, 1.9]], r"response_lengths\[0\]")):
        with pytest.raises(TypeError, match=rf"{name}: expected a list of integers, got \[.*\.\d\]"):
            SharedPrefixPlan.from_lengths(prefixes, responses)
    plan = SharedPrefixPlan.from_lengths(torch.tensor([3]), [torch.tensor([2, 1])])
    assert (plan.prefix_lengths, plan.response_lengths) == ((3,), ((2, 1),))


def test_plan():
    plan = SharedPrefixPlan.from_lengths([5, 2, 3], [[2, 1], [], [4]])
    assert (plan.tokens, plan.prefix_tokens) == (17, 10)
    assert plan.lengths.tolist() == [3, 5, 2, 3, 2, 0, 1, 2, 1, 4]
    assert plan.segments.tolist() == [0, 5, 7, 10, 12, 13, 17]
    assert plan.group_queries.tolist() == [0, 3, 3, 7] and plan.group_keys.tolist() == [0, 5, 7, 10]
    moved = plan.to("meta")
    assert moved.device.type == "meta" and moved.lengths is plan.lengths and moved.tokens == 17


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda q, k, v: (q[:-1], k[:-1], v[:-1]), ValueError, "q: expected the plan's T=36 rows, got 35"),
        (lambda q, k, v: (q[0], k, v), ValueError, r"q: expected shape \[T, H, d\]"),
        (lambda q, k, v: (q, k[:-1], v[:-1]), ValueError, "k: expected the 36 rows of q, got 35"),
        (lambda q, k, v: (q, k, v[:, :1]), ValueError, r"v: expected shape \[T, Hkv, d\]"),
        (lambda q, k, v: (q, k[..., :4], v[..., :4]), ValueError, "d=8"),
        (lambda q, k, v: (q[:, :3], k, v), ValueError, "k: expected a number of heads that divides the 3 heads"),
        (lambda q, k, v: (q, k.float(), v), TypeError, "k: expected the dtype of q, torch.float64, got torch.float32"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), TypeError, "q: expected a floating dtype"),
        (lambda q, k, v: (q, k, v.to("meta")), ValueError, "v: expected device cpu, got meta"),
    ],
)
def test_invalid_tensors_are_refused(change, kind, message):
    rows = change(*(t.detach() for t in random_rows(PLAN)))
    with pytest.raises(kind, match=message):
        shared_prefix_attention(*rows, PLAN)


def test_invalid_settings_are_refused():
    rows = random_rows(PLAN)
    with pytest.raises(ValueError, match="plan: expected a SharedPrefixPlan, got tuple"):
        shared_prefix_attention(*rows, ([5], [[2]]))
    with pytest.raises(ValueError, match="plan: expected device cpu, got meta; use plan.to"):
        shared_prefix_attention(*rows, PLAN.to("meta"))
    with pytest.raises(ValueError, match="impl"):
        shared_prefix_attention(*rows, PLAN, impl="triton")
