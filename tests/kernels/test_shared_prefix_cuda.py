"""Test when the CUDA kernels of shared_prefix_attention serve a call, how they are called, and their error.

Fake kernels and meta tensors prove without a GPU that torch's flash attention and FlashAttention-3 are called according
to their schemas. Tests marked cuda compare the real kernels with dense masked attention.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from shared_prefix_cases import (
    HEADS,
    PLAN,
    ROWS,
    STAND_IN,
    check_errors,
    dense,
    error,
    largest_error,
    one_call_per_response,
    random_rows,
    stand_in_attend,
    stand_in_backward,
    with_gradients,
)
from torch import Tensor

from rmsd_kernels import DecodePlan, SharedPrefixPlan, shared_prefix_attention, shared_prefix_decode
from rmsd_kernels.shared_prefix import attention as op
from rmsd_kernels.shared_prefix import backends, cuda, decode, segments


def test_flash_error_says_why_it_cannot_serve_the_call(monkeypatch):
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
    with pytest.raises(RuntimeError, match="impl: 'flash' does not support this call: .* got a tensor on meta"):
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
    used = lengths._replace(used_keys=edges[:2])
    assert cuda.torch_flash(q, k, k, used, False, 0.3)[0].shape == out.shape
    got, lse = cuda.torch_flash(q[None], k[None], k[None], None, False, 0.3)
    assert got.shape == (1, 9, 4, 16) and lse.shape == (1, 4, 9)


FA3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, Tensor? seqused_k=None, float softcap=0.0, int num_splits=0) "
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
    """Install a fake FlashAttention-3 whose ops have the given schemas, for one test."""
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

    # torch omits arguments that equal the defaults of the schema.
    def run_forward(
        q, k, v, k_new=None, out=None, cu_q=None, cu_k=None, longest_q=None, longest_k=None, scale=None, causal=False,
        used=None, *others,
    ):  # fmt: skip
        assert k_new is None and out is None and not others
        lengths = None if cu_q is None else cuda.Lengths(cu_q, cu_k, longest_q, longest_k, used)
        out, lse = stand_in_attend(q, k, v, lengths, causal, scale)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def run_backward(
        d_out, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, longest_q, longest_k, scale, causal=False,
        deterministic=False,
    ):  # fmt: skip
        lengths = cuda.Lengths(cu_q, cu_k, longest_q, longest_k)
        gradients = stand_in_backward(d_out, q, k, v, out, lse, lengths, causal, scale)
        for output, gradient in zip((dq, dk, dv), gradients, strict=True):
            assert output.is_contiguous()
            output.copy_(gradient)
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


def test_flash_attn_3_reads_only_the_used_tokens_of_a_buffer(flash_attn_3, monkeypatch):
    flash_attn_3()
    plan = DecodePlan.from_counts([5, 7], [2, 1])
    q, prefix_k, prefix_v = (torch.randn(n, heads, 8) for n, heads in ((3, 4), (12, 2), (12, 2)))
    own_k, own_v = (torch.randn(3, 6, 2, 8).transpose(1, 2) for _ in range(2))
    step = (q, prefix_k, prefix_v)
    expected = shared_prefix_decode(*step, own_k[:, :, :4], own_v[:, :, :4], plan)
    monkeypatch.setattr(decode, "backend_of", lambda q, impl: cuda.flash_attn_3())
    used = torch.full((3,), 4, dtype=torch.int32)
    out = shared_prefix_decode(*step, own_k, own_v, plan, own_lengths=used)
    assert (out - expected).abs().max() <= 1e-5


def test_flash_attn_3_with_another_interface_is_refused(flash_attn_3):
    flash_attn_3(FA3_FORWARD.replace("is_causal", "causal").replace("Tensor? k_new=None", "Tensor? k_new"))
    with pytest.raises(RuntimeError, match=r"fwd does not accept \['is_causal'\] and also requires \['k_new'\]"):
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
    # These are the heads of Qwen3-VL-4B. Segments have several blocks of queries and keys, and the last blocks are not
    # full.
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
    """The test runs on CUDA, and on the CPU with a fake kernel that rounds like these kernels."""
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
    # One call rounds probabilities and the result. Two calls round both results and then their merge. These are 3
    # roundings of similar size instead of 2, so the error is sqrt(3 / 2) = 1.22 times as large.
    check_errors(ours, others, truth, plan, 1.35)


@pytest.mark.cuda
def test_cuda_calls_with_an_existing_plan_do_not_synchronize():
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
