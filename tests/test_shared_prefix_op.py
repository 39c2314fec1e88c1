"""shared_prefix_attention against dense masked attention, and what the op promises to autograd and torch.compile."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from shared_prefix_cases import (
    HEADS,
    ROWS,
    STAND_IN,
    dense,
    one_call_per_response,
    random_rows,
    stand_in_attend,
    stand_in_backward,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmsd_kernels import SharedPrefixPlan, attention_calls, shared_prefix_attention
from rmsd_kernels import shared_prefix as op
from rmsd_kernels import shared_prefix_backends as backends
from rmsd_kernels import shared_prefix_cuda as cuda
from rmsd_kernels import shared_prefix_segments as segments

PLAN = SharedPrefixPlan.from_lengths(*ROWS["uneven groups"])
PATHS = ["flash", "torch", "torch in chunks", "CUDA with a stand-in"]


@pytest.fixture
def path(request, monkeypatch) -> str:
    """impl of a call that takes the named way through the code."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(segments, "_SCORES", 50)
        return "torch"
    if request.param == "CUDA with a stand-in":
        monkeypatch.setattr(op, "backend_of", lambda q, impl: STAND_IN)
        return "flash"
    return request.param


def with_gradients(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def largest_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, truth, strict=True))


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
    # Scores are 0, so everything that is seen weighs the same: 3, (3 + 5) / 2, (3 + 5 + 10) / 3, (3 + 5 + 10 + 2) / 4.
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
        # Both parts weigh the same: the case in which rounding each of them tells the most.
        ([64], [[128] * 4], (4, 2), 32),
        # A part of almost no weight, and the kernel's block sizes differ from those of the dense call.
        ([700], [[100, 1]], (4, 4), 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_that_of_dense_attention(prefixes, responses, heads, size, impl, dtype):
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


def error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).norm())


def check_errors(ours: list[Tensor], others: list[Tensor], truth: list[Tensor], plan, bound: float) -> None:
    # Prefixes and responses apart, as the errors of one could hide behind the other's.
    for part in (slice(0, plan.prefix_tokens), slice(plan.prefix_tokens, None)):
        for a, b, exact in zip(ours, others, truth, strict=True):
            assert error(a[part], exact[part]) <= bound * error(b[part], exact[part])


@pytest.mark.parametrize(
    ("impl", "device", "dtype"),
    [
        ("flash", "cpu", torch.float32),
        ("torch", "cpu", torch.float32),
        pytest.param("flash", "cuda", torch.bfloat16, marks=pytest.mark.cuda),
    ],
)
def test_a_response_does_not_touch_the_others(impl, device, dtype):
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
    # The changed response has its share in the gradients of its prefix's keys and values.
    other_keys = others.clone()
    other_keys[:40] = False
    places = (others, others, other_keys, other_keys)
    for a, b, place in zip(before, run(), places, strict=True):
        assert not torch.equal(a[changed], b[changed])
        # CUDA adds dQ up by atomic operations, in any order: one rounding to 16 bit may come out otherwise.
        slack = 0 if a is before[0] or device == "cpu" else 2**-7 * float(a.abs().max())
        assert float((a[place] - b[place]).abs().max()) <= slack
    inputs[2][changed] = float("nan")
    after = run()
    # dV is made of probabilities and d_out alone.
    assert [bool(t[changed].isnan().any()) for t in after] == [True, True, True, False]
    assert not any(t[place].isnan().any() for t, place in zip(after, places, strict=True))


@pytest.mark.parametrize("impl", ["flash", "torch"])
def test_order_of_responses_does_not_matter(impl):
    lengths, order = [3, 5, 5, 2], [2, 0, 3, 1]
    plan = SharedPrefixPlan.from_lengths([6], [lengths])
    other = SharedPrefixPlan.from_lengths([6], [[lengths[i] for i in order]])
    inputs = [t.detach() for t in random_rows(plan)]
    d_out = torch.randn_like(inputs[0])

    def reorder(t: Tensor) -> Tensor:
        prefix, *responses = t.split([6, *lengths])
        return torch.cat([prefix, *(responses[i] for i in order)])

    def run(plan, inputs, d_out):
        inputs = [t.requires_grad_() for t in inputs]
        return with_gradients(lambda *rows: shared_prefix_attention(*rows, plan, impl=impl), inputs, d_out)

    expected = [reorder(t) for t in run(plan, inputs, d_out)]
    assert largest_error(run(other, [reorder(t.detach()) for t in inputs], reorder(d_out)), expected) <= 1e-12


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("layout", ["heads first", "last dimension apart", "rows apart"])
def test_strides(layout, path):
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
    # The gradient of a sum is an expanded number.
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


def test_compiled_code_serves_every_plan():
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

    # The first call, then other numbers of tokens, of responses and of groups.
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
    # Reentrant checkpoints know backward() alone.
    inputs = [t.detach().requires_grad_() for t in inputs]
    function(*inputs).backward(d_out)
    return [t.grad for t in inputs]


def test_gradients_are_made_once():
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
def test_autocast_as_scaled_dot_product_attention(compiled):
    q, k, v = random_rows(PLAN, dtype=torch.float32)

    def run(*rows):
        return shared_prefix_attention(*rows, PLAN)

    function = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    with torch.autocast("cpu", torch.bfloat16):
        # Rotary embeddings leave float32 beside the values of a bfloat16 projection.
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
def test_bad_plans(prefixes, responses, message):
    with pytest.raises(ValueError, match=message):
        SharedPrefixPlan.from_lengths(prefixes, responses)


def test_lengths_are_integers():
    for prefixes, responses, name in (([3.5], [[2]], "prefix_lengths"), ([3], [[2, 1.9]], r"response_lengths\[0\]")):
        with pytest.raises(TypeError, match=rf"{name}: expected integers, got \[.*\.\d\]"):
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
def test_bad_tensors(change, kind, message):
    rows = change(*(t.detach() for t in random_rows(PLAN)))
    with pytest.raises(kind, match=message):
        shared_prefix_attention(*rows, PLAN)


def test_bad_settings():
    rows = random_rows(PLAN)
    with pytest.raises(ValueError, match="plan: expected a SharedPrefixPlan, got tuple"):
        shared_prefix_attention(*rows, ([5], [[2]]))
    with pytest.raises(ValueError, match="plan: expected device cpu, got meta; use plan.to"):
        shared_prefix_attention(*rows, PLAN.to("meta"))
    with pytest.raises(ValueError, match="impl"):
        shared_prefix_attention(*rows, PLAN, impl="triton")


def test_flash_that_cannot_serve_the_call_says_why(monkeypatch):
    def like(dtype: torch.dtype, size: int = 64) -> Tensor:
        return torch.empty(2, 2, size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert cuda.why_not(like(torch.bfloat16)) == ""
    assert "float32" in cuda.why_not(like(torch.float32))
    assert "got 60" in cuda.why_not(like(torch.float16, 60)) and "got 264" in cuda.why_not(like(torch.float16, 264))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "got 7.5" in cuda.why_not(like(torch.bfloat16))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in cuda.why_not(like(torch.bfloat16))
    unknown = like(torch.float32).to("meta")
    with pytest.raises(RuntimeError, match="impl: 'flash' cannot serve this call: .* got a tensor on meta"):
        backends.backend_of(unknown, "flash")
    assert backends.backend_of(unknown, "auto") is segments.EXPLICIT
    with pytest.raises(RuntimeError, match="float8"):
        backends.backend_of(like(torch.float32).to(torch.float8_e4m3fn), "flash")


def test_torch_flash_kernels_are_called_by_their_schema():
    q, k, out = (torch.empty(9, n, 16, dtype=torch.bfloat16, device="meta") for n in (4, 2, 4))
    edges = torch.empty(3, dtype=torch.int32, device="meta")
    lengths = cuda.Lengths(edges, edges, 5, 5)
    got, lse = cuda.torch_flash(q, k, k, lengths, True, 0.3)
    assert got.shape == out.shape and lse.shape == (4, 9) and lse.dtype == torch.float32
    gradients = cuda.torch_flash_backward(out, q, k, k, out, lse, lengths, True, 0.3)
    assert [t.shape for t in gradients] == [q.shape, k.shape, k.shape]
    got, lse = cuda.torch_flash(q[None], k[None], k[None], None, False, 0.3)
    assert got.shape == (1, 9, 4, 16) and lse.shape == (1, 4, 9)


FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, float softcap=0.0, int num_splits=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
FA3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, bool is_causal=False, "
    "bool deterministic=False) -> Tensor"
)


@pytest.fixture
def flash_attn_3(monkeypatch):
    """Installs a stand-in for FlashAttention-3 whose ops have the given schemas, for one test."""
    libraries = []

    def install(forward: str = FA3_FORWARD, backward: str | None = FA3_BACKWARD) -> None:
        library = torch.library.Library("flash_attn_3", "FRAGMENT")
        libraries.append(library)
        library.define(forward)
        library.impl("fwd", run_forward, "CPU")
        if backward:
            library.define(backward)
            library.impl("bwd", run_backward, "CPU")
        monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
        cuda.flash_attn_3.cache_clear()

    # torch leaves arguments at their schema's defaults out.
    def run_forward(
        q, k, v, k_new=None, out=None, cu_q=None, cu_k=None, longest_q=None, longest_k=None, scale=None, causal=False,
        *others,
    ):  # fmt: skip
        assert k_new is None and out is None and not others
        lengths = None if cu_q is None else cuda.Lengths(cu_q, cu_k, longest_q, longest_k)
        out, lse = stand_in_attend(q, k, v, lengths, causal, scale)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def run_backward(
        d_out, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, longest_q, longest_k, scale, causal=False,
        deterministic=False,
    ):  # fmt: skip
        lengths = cuda.Lengths(cu_q, cu_k, longest_q, longest_k)
        gradients = stand_in_backward(d_out, q, k, v, out, lse, lengths, causal, scale)
        for given, made in zip((dq, dk, dv), gradients, strict=True):
            assert given.is_contiguous()
            given.copy_(made)
        return q.new_empty(0)

    yield install
    cuda.flash_attn_3.cache_clear()
    for library in libraries:
        library._destroy()


def test_flash_attn_3_is_called_by_its_schema(flash_attn_3, monkeypatch):
    flash_attn_3()
    monkeypatch.setattr(op, "backend_of", lambda q, impl: cuda.flash_attn_3())
    inputs = random_rows(PLAN)
    d_out = torch.randn_like(inputs[0])
    ours = with_gradients(lambda *rows: shared_prefix_attention(*rows, PLAN), inputs, d_out)
    assert largest_error(ours, with_gradients(lambda *rows: dense(*rows, PLAN), inputs, d_out)) <= 1e-12


def test_flash_attn_3_with_another_interface_is_refused(flash_attn_3):
    flash_attn_3(FA3_FORWARD.replace("is_causal", "causal").replace("Tensor? k_new=None", "Tensor? k_new"))
    with pytest.raises(RuntimeError, match=r"fwd does not know \['is_causal'\] and demands \['k_new'\]"):
        cuda.flash_attn_3()


def test_flash_attn_3_without_a_backward_is_refused(flash_attn_3):
    flash_attn_3(backward=None)
    with pytest.raises(RuntimeError, match="no op flash_attn_3::bwd; install another version"):
        cuda.flash_attn_3()


@pytest.mark.cuda
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
def test_cuda_flash_equals_dense(row, heads, size):
    check_cuda_flash(SharedPrefixPlan.from_lengths(*ROWS[row], device="cuda"), heads, size)


@pytest.mark.cuda
def test_cuda_flash_equals_dense_at_the_size_of_a_model():
    # The heads of Qwen3-VL-4B; segments of several blocks of queries and keys, the last ones not full.
    plan = SharedPrefixPlan.from_lengths([700, 257], [[130, 64, 1], [129, 200]], device="cuda")
    check_cuda_flash(plan, (32, 8), 128)


def check_cuda_flash(plan: SharedPrefixPlan, heads: tuple[int, int], size: int) -> None:
    inputs = random_rows(plan, heads, size, torch.bfloat16)
    d_out = torch.randn_like(inputs[0])
    ours = with_gradients(lambda *rows: shared_prefix_attention(*rows, plan, impl="flash"), inputs, d_out)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = with_gradients(lambda *rows: dense(*rows, plan), exact, d_out.double())
    for a, b in zip(ours, truth, strict=True):
        assert a.dtype == torch.bfloat16 and error(a, b) <= 0.01 * float(b.norm()) + 1e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize(("prefixes", "responses"), [([1024, 700], [[128] * 6, [64, 200]]), ([256], [[256] * 4])])
def test_16_bit_error_of_kernels_that_round_both_parts(prefixes, responses, device, monkeypatch):
    """On CUDA, and on the CPU with a stand-in that rounds as these kernels do."""
    kernel = cuda.TORCH_FLASH
    if device == "cpu":
        kernel = STAND_IN
        monkeypatch.setattr(op, "backend_of", lambda q, impl: STAND_IN)
    plan = SharedPrefixPlan.from_lengths(prefixes, responses, device=device)
    inputs = random_rows(plan, (8, 2), 64, torch.bfloat16)
    d_out = torch.randn_like(inputs[0])
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = with_gradients(lambda *rows: dense(*rows, plan), exact, d_out.double())
    ours = with_gradients(lambda *rows: shared_prefix_attention(*rows, plan), inputs, d_out)
    others = one_call_per_response(kernel, *(t.detach() for t in inputs), d_out, plan)
    # One call rounds probabilities and the result; two calls round both results, and their sum again: 3 roundings of
    # about one size against 2 are an error of sqrt(3 / 2) = 1.22 times as much.
    check_errors(ours, others, truth, plan, 1.35)


@pytest.mark.cuda
def test_cuda_calls_by_a_plan_at_hand_use_no_synchronising_op_of_torch():
    plan = SharedPrefixPlan.from_lengths(*ROWS["uneven groups"], device="cuda")
    inputs = random_rows(plan, size=64, dtype=torch.bfloat16)
    shared_prefix_attention(*inputs, plan).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        shared_prefix_attention(*inputs, plan).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_other_dtypes_take_the_explicit_form(dtype):
    plan = SharedPrefixPlan.from_lengths(*ROWS["uneven groups"], device="cuda")
    inputs = random_rows(plan, dtype=dtype)
    d_out = torch.randn_like(inputs[0])
    ours = with_gradients(lambda *rows: shared_prefix_attention(*rows, plan), inputs, d_out)
    truth = with_gradients(lambda *rows: dense(*rows, plan), inputs, d_out)
    assert largest_error(ours, truth) <= (1e-12 if dtype == torch.float64 else 1e-4)
