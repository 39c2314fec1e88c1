"""Test shared_prefix_decode against one attention per sequence and against the last row of shared_prefix_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from shared_prefix_cases import HEADS, STAND_IN
from torch import Tensor

from rmsd_kernels import DecodePlan, SharedPrefixPlan, attention_calls, shared_prefix_attention, shared_prefix_decode
from rmsd_kernels.shared_prefix import decode, segments

# Each case gives the prefix lengths and the sequences of each prefix. Equal groups are one dense call on CUDA, and
# finished groups are empty.
STEPS = {
    "one prefix": ([9], [4]),
    "one sequence": ([3], [1]),
    "uneven groups": ([5, 1, 7], [3, 1, 2]),
    "equal groups": ([4, 4], [3, 3]),
    "finished groups": ([4, 4, 2, 6], [0, 2, 0, 1]),
}
PATHS = ["flash", "torch", "torch in chunks", "CUDA with a stand-in"]


@pytest.fixture
def path(request, monkeypatch) -> str:
    """Return the value of `impl` that makes a call use the named code path."""
    if request.param == "torch in chunks":
        monkeypatch.setattr(segments, "_SCORES", 50)
        return "torch"
    if request.param == "CUDA with a stand-in":
        monkeypatch.setattr(decode, "backend_of", lambda q, impl: STAND_IN)
        return "flash"
    return request.param


def random_step(
    plan: DecodePlan, own: int, heads: tuple[int, int] = (4, 2), size: int = 8, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return q, prefix_k, prefix_v, own_k and own_v; own_k and own_v are views of larger buffers."""
    queries, keys = heads
    rows, tokens = sum(plan.rows), sum(plan.prefix_lengths)
    prefixes = [torch.randn(tokens, keys, size) for _ in range(2)]
    buffers = [torch.randn(rows, keys, own + 5, size)[:, :, :own] for _ in range(2)]
    step = [torch.randn(rows, queries, size), *prefixes, *buffers]
    # Moving a view to a device makes it contiguous, so the padding is added again afterward.
    step = [t.to(plan.group_queries.device, dtype) for t in step]
    return [*step[:3], *(F.pad(t, (0, 0, 0, 5), value=float("nan"))[:, :, :own] for t in step[3:])]


def one_by_one(q, prefix_k, prefix_v, own_k, own_v, plan: DecodePlan, scale: float | None = None) -> Tensor:
    """Return the expected result: each sequence attends to its own row of keys."""
    ends = torch.tensor([0, *plan.prefix_lengths]).cumsum(0).tolist()
    groups = [g for g, count in enumerate(plan.rows) for _ in range(count)]
    out = []
    for i, g in enumerate(groups):
        prefix = slice(ends[g], ends[g + 1])
        k, v = (
            torch.cat([shared[prefix].transpose(0, 1), own[i]], dim=1)
            for shared, own in ((prefix_k, own_k), (prefix_v, own_v))
        )
        out.append(F.scaled_dot_product_attention(q[i].unsqueeze(1), k, v, scale=scale, enable_gqa=True)[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("own", [1, 6])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_fp64_equals_one_by_one(step, heads, own, path):
    plan = DecodePlan.from_counts(*STEPS[step])
    tensors = random_step(plan, own, heads)
    out = shared_prefix_decode(*tensors, plan, scale=0.4, impl=path)
    assert out.is_contiguous() and (out - one_by_one(*tensors, plan, scale=0.4)).abs().max() <= 1e-12


def as_buffers(step: list[Tensor], room: int) -> list[Tensor]:
    """Return the step with own_k and own_v in buffers that are stored token by token, with large unused values."""
    q, prefix_k, prefix_v, *own = step
    buffers = [F.pad(t.transpose(1, 2), (0, 0, 0, 0, 0, room - t.shape[2]), value=1e4).contiguous() for t in own]
    return [q, prefix_k, prefix_v, *(t.transpose(1, 2) for t in buffers)]


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("own", [1, 6])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_only_used_tokens_of_buffers_count(step, heads, own, path):
    plan = DecodePlan.from_counts(*STEPS[step])
    tensors = random_step(plan, own, heads)
    expected = one_by_one(*tensors, plan)
    for room in (own, own + 3):
        buffers = as_buffers(tensors, room)
        used = torch.full((len(tensors[0]),), own, dtype=torch.int32)
        out = shared_prefix_decode(*buffers, plan, own_lengths=used, impl=path)
        assert (out - expected).abs().max() <= 1e-12


# Each case gives the suffix lengths and the sequences of each suffix, for the prefixes of UNEVEN. Equal suffixes are
# one dense call on CUDA, and finished ones are empty.
UNEVEN = ([5, 1, 7], [3, 1, 2])
SUFFIXES = {
    "one per sequence": ([2, 1, 3, 4, 1, 6], [1, 1, 1, 1, 1, 1]),
    "several sequences": ([2, 3, 4], [3, 1, 2]),
    "equal suffixes": ([3, 3, 3], [2, 2, 2]),
    "finished suffixes": ([2, 9, 1, 4, 5], [0, 3, 1, 0, 2]),
}


def with_suffixes(step: list[Tensor], suffixes: DecodePlan, suffix: list[Tensor]) -> list[Tensor]:
    """Return the step with each sequence's suffix in front of its own tokens."""
    ends = torch.tensor([0, *suffixes.prefix_lengths]).cumsum(0).tolist()
    owner = [group for group, count in enumerate(suffixes.rows) for _ in range(count)]
    own = []
    for keys, mine in zip(suffix, step[3:], strict=True):
        own.append([torch.cat([keys[ends[g] : ends[g + 1]].transpose(0, 1), mine[i]], 1) for i, g in enumerate(owner)])
    return [*step[:3], *own]


@pytest.mark.parametrize("path", PATHS, indirect=True)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("case", SUFFIXES)
def test_suffixes_stand_between_prefix_and_own_tokens(case, heads, path):
    plan, suffix_plan = DecodePlan.from_counts(*UNEVEN), DecodePlan.from_counts(*SUFFIXES[case])
    step = random_step(plan, 4, heads)
    suffix = [torch.randn(sum(suffix_plan.prefix_lengths), heads[1], 8, dtype=torch.float64) for _ in range(2)]
    expected = one_by_one(*with_suffixes(step, suffix_plan, suffix), plan)
    buffers, used = as_buffers(step, 6), torch.full((6,), 4, dtype=torch.int32)
    more = {"suffix_k": suffix[0], "suffix_v": suffix[1], "suffix_plan": suffix_plan}
    calls = attention_calls()
    for tensors, options in ((step, {}), (buffers, {"own_lengths": used})):
        out = shared_prefix_decode(*tensors, plan, **options, **more, impl=path)
        assert out.is_contiguous() and (out - expected).abs().max() <= 1e-12
    assert attention_calls() - calls == 2


def test_invalid_suffixes_are_refused():
    plan = DecodePlan.from_counts([4, 3], [2, 1])
    step = random_step(plan, 3)
    k, v = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    good = DecodePlan.from_counts([2, 2, 1], [1, 1, 1])
    for keys, values, suffix_plan, message in (
        (k, None, good, "expected a DecodePlan together with suffix_k and suffix_v"),
        (k, v, SharedPrefixPlan.from_lengths([4], [[2]]), "expected a DecodePlan together with suffix_k and suffix_v"),
        (k, v[:4], good, "expected shape"),
        (k[:, :1], v[:, :1], good, "suffix_k: expected the 2 heads of own_k, got 1"),
        (k[:4], v[:4], good, "expected B=3 sequences and Ts=4 tokens, got 3 and 5"),
        (k, v, DecodePlan.from_counts([2, 3], [1, 1]), "expected B=3 sequences and Ts=5 tokens, got 2 and 5"),
        (k, v, good.to("meta"), "suffix_plan: expected device cpu, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            shared_prefix_decode(*step, plan, suffix_k=keys, suffix_v=values, suffix_plan=suffix_plan)
    with pytest.raises(RuntimeError, match="has no gradient"):
        shared_prefix_decode(*step, plan, suffix_k=k.requires_grad_(), suffix_v=v, suffix_plan=good)


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_sequences_with_different_lengths(path):
    plan = DecodePlan.from_counts([5, 7], [4, 1])
    tensors = random_step(plan, 6)
    used = [2, 2, 6, 1, 3]
    out = shared_prefix_decode(*as_buffers(tensors, 8), plan, own_lengths=torch.tensor(used).int(), impl=path)
    for length in set(used):
        q, prefix_k, prefix_v, own_k, own_v = tensors
        expected = one_by_one(q, prefix_k, prefix_v, own_k[:, :, :length], own_v[:, :, :length], plan)
        rows = [row for row, of_row in enumerate(used) if of_row == length]
        assert (out[rows] - expected[rows]).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_give_the_bits_of_slices_on_cpu(dtype):
    """Sizes around those at which the CPU kernel changes its block sizes and its vector tails."""
    plan = DecodePlan.from_counts([300, 64], [4, 3])
    for own in (1, 7, 8, 15, 16, 33, 64, 130):
        tensors = random_step(plan, own, (4, 2), 32, dtype)
        used = torch.full((7,), own, dtype=torch.int32)
        out = shared_prefix_decode(*as_buffers(tensors, 192), plan, own_lengths=used)
        assert torch.equal(out, shared_prefix_decode(*tensors, plan))


def test_masked_buffers_are_within_rounding_of_slices():
    """The explicit form masks, as it must on CUDA. Products of other sizes are summed in another order."""
    plan = DecodePlan.from_counts([300, 64], [4, 3])
    for own in (1, 9, 64):
        tensors = random_step(plan, own, (4, 2), 32, torch.float32)
        used = torch.full((7,), own, dtype=torch.int32)
        out = shared_prefix_decode(*as_buffers(tensors, 128), plan, own_lengths=used, impl="torch")
        assert (out - shared_prefix_decode(*tensors, plan)).abs().max() <= 1e-6


@pytest.mark.parametrize("impl", ["flash", "torch"])
def test_16_bit_error(impl):
    plan = DecodePlan.from_counts([300, 64], [4, 3])
    tensors = random_step(plan, 64, (4, 2), 64, torch.bfloat16)
    exact = one_by_one(*(t.double() for t in tensors), plan)

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm())

    # flash rounds the two parts and their merge, whereas a single attention call rounds once.
    bound = {"flash": 2.0, "torch": 1.2}[impl]
    assert error(shared_prefix_decode(*tensors, plan, impl=impl)) <= bound * error(one_by_one(*tensors, plan))


@pytest.mark.parametrize("impl", ["flash", "torch"])
def test_16_bit_error_with_suffixes(impl):
    plan, suffix_plan = DecodePlan.from_counts([300, 500], [3, 3]), DecodePlan.from_counts([40, 60, 30], [1, 2, 3])
    step = random_step(plan, 33, (8, 2), 64, torch.bfloat16)
    suffix = list(torch.randn(2, 130, 2, 64).bfloat16())
    eager = one_by_one(*with_suffixes(step, suffix_plan, suffix), plan)
    exact_step, exact_suffix = [t.double() for t in step], [t.double() for t in suffix]
    exact = one_by_one(*with_suffixes(exact_step, suffix_plan, exact_suffix), plan)
    more = {"suffix_k": suffix[0], "suffix_v": suffix[1], "suffix_plan": suffix_plan}
    ours = shared_prefix_decode(*step, plan, **more, impl=impl)
    errors = [float((out.double() - exact).norm()) for out in (ours, eager)]
    # flash rounds three parts and two merges; 1.66 to 1.76 times were measured.
    assert errors[0] <= {"flash": 2.0, "torch": 1.2}[impl] * errors[1]


@pytest.mark.parametrize("path", PATHS, indirect=True)
def test_strided_inputs_and_gradients(path):
    plan = DecodePlan.from_counts([5, 7], [3, 1])
    tensors = random_step(plan, 3)
    expected = shared_prefix_decode(*tensors, plan, impl="torch")
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    out = shared_prefix_decode(*strided, plan, impl=path)
    assert out.is_contiguous() and (out - expected).abs().max() <= 1e-12


def test_decoding_is_the_last_row_of_the_packed_attention():
    row = SharedPrefixPlan.from_lengths([6, 4], [[5, 5], [5]])
    q, k, v = (torch.randn(row.tokens, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    expected = shared_prefix_attention(q, k, v, row)[10:].unflatten(0, (3, 5))[:, -1]
    own_k, own_v = (t[10:].unflatten(0, (3, 5)).transpose(1, 2) for t in (k, v))
    last = q[10:].unflatten(0, (3, 5))[:, -1]
    plan = DecodePlan.from_counts([6, 4], [2, 1])
    assert (shared_prefix_decode(last, k[:10], v[:10], own_k, own_v, plan) - expected).abs().max() <= 1e-12


def test_sequences_do_not_affect_each_other():
    plan = DecodePlan.from_counts([40], [3])
    q, prefix_k, prefix_v, own_k, own_v = random_step(plan, 7, dtype=torch.float32)
    before = shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, plan)
    for t in (q, own_k, own_v):
        t[1] = float("nan")
    after = shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, plan)
    assert after[1].isnan().all() and torch.equal(before[[0, 2]], after[[0, 2]])


def test_calls_are_counted_and_inputs_are_unchanged():
    plan = DecodePlan.from_counts([4, 3], [2, 1])
    tensors = random_step(plan, 3)
    copies = [t.clone() for t in tensors]
    before = attention_calls()
    shared_prefix_decode(*tensors, plan)
    assert attention_calls() == before + 1
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_opcheck_and_compile():
    plan = DecodePlan.from_counts([4, 3], [2, 1])
    # All sizes differ, because torch.compile treats equal sizes as one symbol.
    tensors = random_step(plan, 6, dtype=torch.float32)
    edges = (plan.lengths, plan.group_queries, plan.group_keys)
    torch.library.opcheck(decode._decode, (*tensors, None, *edges, 0.5, "auto"))
    used = torch.tensor([2, 6, 1], dtype=torch.int32)
    torch.library.opcheck(decode._decode, (*tensors, used, *edges, 0.5, "auto"))
    suffixes = DecodePlan.from_counts([2, 5, 1], [1, 1, 1])
    suffix = (*torch.randn(2, 8, 2, 8), suffixes.lengths, suffixes.group_queries, suffixes.group_keys)
    torch.library.opcheck(decode._decode, (*tensors, used, *edges, 0.5, "auto", *suffix))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *step: shared_prefix_decode(*step, plan), fullgraph=True, backend="aot_eager", dynamic=True
    )
    compiled(*tensors)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for own_tokens in (5, 7, 9):
            tensors = random_step(plan, own_tokens, dtype=torch.float32)
            assert torch.equal(compiled(*tensors), shared_prefix_decode(*tensors, plan))


def test_autocast():
    plan = DecodePlan.from_counts([4], [2])
    tensors = random_step(plan, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = shared_prefix_decode(*tensors, plan)
    expected = shared_prefix_decode(*(t.bfloat16() for t in tensors), plan)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("prefixes", "rows", "message"),
    [
        ([], [], "rows: expected one number per prefix and at least one prefix, got 0 for 0 prefixes"),
        ([3], [1, 2], "rows: expected one number per prefix and at least one prefix, got 2 for 1 prefixes"),
        ([3, 0], [1, 2], "prefix_lengths: expected at least 1 token each"),
        ([3, 2], [1, -1], "rows: expected numbers >= 0"),
        ([3, 2], [0, 0], "not all 0"),
    ],
)
def test_invalid_plans_are_refused(prefixes, rows, message):
    with pytest.raises(ValueError, match=message):
        DecodePlan.from_counts(prefixes, rows)


def test_counts_are_integers():
    for prefixes, rows, name in (([3.5], [2], "prefix_lengths"), ([3], [1.9], "rows")):
        with pytest.raises(TypeError, match=f"{name}: expected a list of integers"):
            DecodePlan.from_counts(prefixes, rows)


@pytest.mark.parametrize(
    ("position", "change", "kind", "message"),
    [
        (0, lambda q: q[:-1], ValueError, "own_k: expected B=2 sequences"),
        (0, lambda q: q[:, :3], ValueError, "prefix_k: expected a number of heads that divides the 3 heads"),
        (1, lambda k: k[:-1], ValueError, "prefix_v"),
        (2, lambda v: v.float(), TypeError, "prefix_v: expected the dtype of q"),
        (3, lambda k: k[:, :1], ValueError, "own_v"),
        (4, lambda v: v[0], ValueError, "own_v"),
        (4, lambda v: v.to("meta"), ValueError, "own_v: expected device cpu"),
    ],
)
def test_invalid_tensors_are_refused(position, change, kind, message):
    plan = DecodePlan.from_counts([4, 3], [2, 1])
    tensors = random_step(plan, 3)
    tensors[position] = change(tensors[position])
    with pytest.raises(kind, match=message):
        shared_prefix_decode(*tensors, plan)


def test_invalid_calls_are_refused():
    plan = DecodePlan.from_counts([4, 3], [2, 1])
    q, prefix_k, prefix_v, own_k, own_v = random_step(plan, 3)
    with pytest.raises(ValueError, match="own_k: expected B=3 sequences of t >= 1 tokens"):
        shared_prefix_decode(q, prefix_k, prefix_v, own_k[:, :, :0], own_v[:, :, :0], plan)
    with pytest.raises(ValueError, match="q and prefix_k: expected the plan's B=3 and Tp=7, got 3 and 6"):
        shared_prefix_decode(q, prefix_k[:-1], prefix_v[:-1], own_k, own_v, plan)
    with pytest.raises(ValueError, match="own_k: expected the 2 heads of prefix_k, got 1"):
        shared_prefix_decode(q, prefix_k, prefix_v, own_k[:, :1], own_v[:, :1], plan)
    with pytest.raises(ValueError, match="plan: expected a DecodePlan, got SharedPrefixPlan"):
        shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, SharedPrefixPlan.from_lengths([4], [[2]]))
    with pytest.raises(ValueError, match="plan: expected device cpu, got meta"):
        shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, plan.to("meta"))
    for own_lengths, kind, message in (
        (torch.ones(3, dtype=torch.int64), TypeError, "own_lengths: expected int32, got torch.int64"),
        (torch.ones(2, dtype=torch.int32), ValueError, r"own_lengths: expected a contiguous vector of B=3, got \[2\]"),
        (torch.ones(6, dtype=torch.int32)[::2], ValueError, "own_lengths: expected a contiguous vector of B=3"),
        (torch.ones(3, dtype=torch.int32, device="meta"), ValueError, "own_lengths: expected device cpu, got meta"),
        (torch.tensor([1, 0, 3]).int(), ValueError, "own_lengths: expected numbers from 1 to t=3, got .1, 0, 3"),
        (torch.tensor([1, 4, 3]).int(), ValueError, "own_lengths: expected numbers from 1 to t=3, got .1, 4, 3"),
    ):
        with pytest.raises(kind, match=message):
            shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, plan, own_lengths=own_lengths)
    with pytest.raises(RuntimeError, match="no gradient; call it under torch.no_grad"):
        shared_prefix_decode(q.requires_grad_(), prefix_k, prefix_v, own_k, own_v, plan)
    with torch.no_grad():
        assert not shared_prefix_decode(q, prefix_k, prefix_v, own_k, own_v, plan).requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("own", [1, 40])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_cuda_flash(step, heads, own):
    plan = DecodePlan.from_counts(*STEPS[step], device="cuda")
    tensors = random_step(plan, own, heads, 64, torch.bfloat16)
    exact = one_by_one(*(t.double() for t in tensors), plan)
    out = shared_prefix_decode(*tensors, plan, impl="flash")
    assert float((out.double() - exact).norm()) <= 0.01 * float(exact.norm())


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["flash", "torch"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("step", STEPS)
def test_cuda_buffers_in_a_graph(step, heads, impl):
    """A captured step reads as many tokens as the device says at each replay."""
    plan = DecodePlan.from_counts(*STEPS[step], device="cuda")
    dtype = torch.bfloat16 if impl == "flash" else torch.float32
    tensors = random_step(plan, 40, heads, 64, dtype)
    buffers = as_buffers(tensors, 64)
    used = torch.full((len(tensors[0]),), 40, dtype=torch.int32, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.stream(stream):
        shared_prefix_decode(*buffers, plan, own_lengths=used, impl=impl)
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        out = shared_prefix_decode(*buffers, plan, own_lengths=used, impl=impl)
    q, prefix_k, prefix_v, own_k, own_v = tensors
    for own in (40, 1, 17):
        used.fill_(own)
        graph.replay()
        exact = one_by_one(*(t.double() for t in (q, prefix_k, prefix_v, own_k[:, :, :own], own_v[:, :, :own])), plan)
        bound = 0.01 if impl == "flash" else 1e-5
        assert float((out.double() - exact).norm()) <= bound * float(exact.norm())
