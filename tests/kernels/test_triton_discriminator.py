"""Test the Triton discriminator against the float64 reference on the same rounded inputs, interpreted and on CUDA."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, Case, as_stored, compare, interpret, main
from undefined_gradient import Drop

from rmsd_kernels import reference

# The size exceeds one block of the forward kernel and several blocks of the backward kernel, and the last block is
# partial.
TOKENS, DIM = 40, 700
STUDENTS, TEACHERS, PAIRS = 5, 4, 23
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class Setup:
    """Hold hidden states, a value head and pairs, in one dtype and with gradients."""

    def __init__(self, device, dtype, students=STUDENTS, teachers=TEACHERS, pairs=PAIRS, dim=DIM):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        def index(count: int, limit: int) -> Tensor:
            return torch.randint(max(limit, 1), (count,), generator=generator).to(device)

        self.students = students
        self.hidden, self.head = normal(TOKENS, dim), normal(dim) / 8
        self.bias, self.norm_weight = normal(), 1 + normal(dim) / 4
        self.last_index = index(students + teachers, TOKENS)
        self.student_index, self.teacher_index = index(pairs, students), index(pairs, teachers)
        self.quality = torch.rand(pairs, generator=generator).to(device)
        self.pair_weight = torch.rand(pairs, generator=generator).to(device)

    def losses(self, functions, convert=lambda t: t, *, norm=True, bias=True, weighted=False, factor=1.7, **options):
        """Return outputs and gradients of discriminator_loss * factor by name, with inputs converted by `convert`."""
        leaves = {"hidden": self.hidden, "head": self.head}
        leaves |= {"bias": self.bias} if bias else {}
        leaves |= {"norm_weight": self.norm_weight} if norm else {}
        leaves = {name: convert(t.detach()).requires_grad_() for name, t in leaves.items()}
        pairs = (self.last_index, leaves.pop("head"), self.student_index, self.teacher_index, convert(self.quality))
        head, hidden = pairs[1], leaves.pop("hidden")
        options |= {"pair_weight": convert(self.pair_weight)} if weighted else {}
        output = functions.discriminator_loss(hidden, *pairs, num_students=self.students, **leaves, **options)
        (output.loss * factor).backward()
        gradients = {f"d_{name}": t.grad for name, t in {"hidden": hidden, "head": head, **leaves}.items()}
        return {**{name: t.detach() for name, t in output._asdict().items()}, **gradients}


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def check(setup: Setup, dtype: torch.dtype, **options) -> float:
    from rmsd_kernels.discriminator import triton_loss

    kernel = setup.losses(triton_loss, **options)
    again = setup.losses(triton_loss, **options)
    for name in kernel:
        assert torch.equal(kernel[name].nan_to_num(), again[name].nan_to_num()), f"{name}: two runs differ"
    eager, exact = (setup.losses(reference, convert, **options) for convert in (torch.Tensor.float, in_double))
    worst = 0.0
    for name, value in kernel.items():
        stored = name.startswith("d_")
        assert value.dtype == (dtype if stored else torch.float32) and value.shape == exact[name].shape, name
        expected = as_stored(eager[name], dtype) if stored else eager[name]
        worst = max(worst, compare(name, value.reshape(-1), expected.reshape(-1), exact[name].reshape(-1)))
    return worst


@case
def loss_with_and_without_norm_and_bias(device, dtype):
    setup = Setup(device, dtype)
    return max(
        check(setup, dtype, norm=n, bias=b, weighted=n != b) for n, b in itertools.product((False, True), repeat=2)
    )


@case
def loss_normalizers_and_l2(device, dtype):
    """The normalizers are None, a number, a tensor, and 0, which is treated as 1."""
    setup, worst = Setup(device, dtype, dim=40), []
    normalizers = [None, 3.5, torch.tensor(2.5, device=device), torch.tensor(7, device=device), 0.0]
    for number, l2_number in zip(normalizers, [4.0, None, *normalizers[3:], normalizers[2]], strict=True):
        options = {"weighted": True, "normalizer": number, "l2_normalizer": l2_number, "score_l2": 0.3}
        worst.append(check(setup, dtype, **options))
    setup.pair_weight.zero_()
    return max(*worst, check(setup, dtype, weighted=True))


@case
def loss_with_shared_rows(device, dtype):
    """Two, three, and one of each side of the responses end at the same row."""
    setup = Setup(device, dtype)
    setup.last_index[:] = torch.tensor([7, 3, 7, 9, 9, 9, 1, 3, 0])
    return max(check(setup, dtype, score_l2=0.1), check(setup, dtype, norm=False))


@case
def loss_with_views(device, dtype):
    """Use views with gaps between rows and with gaps between columns."""
    setup, expected = Setup(device, dtype), None
    for columns in (torch.zeros(TOKENS, DIM + 30), torch.zeros(TOKENS, 2 * DIM)):
        wide = columns.to(dtype).to(device)
        view = wide[:, 9 : 9 + DIM] if wide.shape[1] < 2 * DIM else wide[:, ::2]
        view.copy_(setup.hidden)
        setup.hidden = view
        worst = check(setup, dtype)
        expected = worst if expected is None else max(expected, worst)
    return expected


@case
def loss_of_many_responses(device, dtype):
    """More responses than one program processes take two launches, with several programs for the scores."""
    from rmsd_kernels.discriminator import triton_loss

    setup = Setup(device, dtype, students=triton_loss.ONE_PROGRAM_ROWS - 20, teachers=30, pairs=600, dim=24)
    return check(setup, dtype, weighted=True, score_l2=0.1)


@case
def loss_of_nothing(device, dtype):
    """Without pairs or without responses, the loss and the gradients are 0 and nothing is read."""
    worst = [check(Setup(device, dtype, 2, 1, 0), dtype), check(Setup(device, dtype, 0, 0, 0), dtype, score_l2=0.5)]
    return max(worst)


@case
def loss_by_hand(device, dtype):
    """The scores are 1, -1 | 0, and the pairs have margins -1 and 1 and weights 1 and 3."""
    from rmsd_kernels.discriminator import triton_loss

    hidden = torch.tensor([[1.0, 0.0], [-1.0, 5.0], [0.0, 1.0]], dtype=dtype, device=device, requires_grad=True)
    head = torch.tensor([1.0, 0.0], dtype=dtype, device=device)
    index = [torch.tensor(i, device=device) for i in ([0, 1, 2], [0, 1], [0, 0])]
    quality, weight = torch.tensor([0.5, 1.0], device=device), torch.tensor([1.0, 3.0], device=device)
    out = triton_loss.discriminator_loss(
        hidden, index[0], head, index[1], index[2], quality, num_students=2, pair_weight=weight
    )
    assert out.scores.tolist() == [1.0, -1.0, 0.0]
    wrong, right = math.log1p(math.e), math.log1p(math.exp(-1))
    assert out.loss.item() == pytest.approx((0.5 * wrong + 3 * right) / 4, rel=1e-6)
    assert (out.accuracy.item(), out.margin.item()) == pytest.approx((0.75, 0.5), rel=1e-6)
    out.loss.backward()
    slopes = [0.5 / 4 / (1 + math.exp(-1)), 3 / 4 / (1 + math.e)]
    assert hidden.grad[:, 0].tolist() == pytest.approx([*slopes, -sum(slopes)], rel=1e-2)
    assert hidden.grad[:, 1].tolist() == [0.0] * 3
    return 0.0


@case
def index_out_of_range(device, dtype):
    """An index out of range gives NaN instead of a wild read, and nothing is written."""
    from rmsd_kernels.discriminator import triton_loss

    setup = Setup(device, dtype, dim=40)
    setup.last_index[2] = TOKENS
    setup.last_index[6] = -1
    values = triton_loss.last_token_values(setup.hidden.requires_grad_(), setup.last_index, setup.head)
    assert values.isnan().tolist() == [i in (2, 6) for i in range(STUDENTS + TEACHERS)]
    values[0].backward()
    rows = torch.arange(TOKENS, device=device) == setup.last_index[0]
    assert torch.equal(setup.hidden.grad.ne(0).any(dim=1), rows)
    scores = torch.zeros(3, device=device)
    for student, teacher in ((3, 0), (-1, 0), (0, 3)):
        pair = [torch.tensor([i], device=device) for i in (student, teacher)]
        assert triton_loss.pairwise_discriminator_loss(scores, scores, *pair, scores[:1]).loss.isnan()
    return 0.0


def pairwise(functions, scores, indices, quality, convert, **options):
    leaves = [convert(s).requires_grad_() for s in scores]
    result = functions.pairwise_discriminator_loss(*leaves, *indices, convert(quality), **options)
    result.loss.backward()
    return [*(t.detach() for t in result), *(leaf.grad for leaf in leaves)]


def check_pairwise(setup: Setup, scores: list[Tensor], dtype: torch.dtype, **options) -> float:
    from rmsd_kernels.discriminator import triton_loss

    indices = (setup.student_index, setup.teacher_index)
    kernel = pairwise(triton_loss, scores, indices, setup.quality, lambda t: t.clone(), **options)
    eager = pairwise(reference, scores, indices, setup.quality, lambda t: t.clone().float(), **options)
    exact = pairwise(reference, scores, indices, setup.quality, in_double, **options)
    assert [t.dtype for t in kernel] == [torch.float32] * 3 + [dtype] * 2
    pairs = [(k, e.to(k.dtype), x) for k, e, x in zip(kernel, eager, exact, strict=True)]
    return max(compare(str(i), *(t.reshape(-1) for t in triple)) for i, triple in enumerate(pairs))


@case
def every_row_is_written(device, dtype):
    """Rows without a response get 0 in every tile; values that are not written would stay NaN here."""
    from rmsd_kernels.discriminator import triton_loss

    tokens = 64 * 16 + 150
    hidden = torch.randn(tokens, 72, device=device).to(dtype)
    index = torch.tensor([1173, 3, 64, 3], device=device)
    head = torch.randn(72, device=device).to(dtype)
    results = []
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for functions in (triton_loss, reference):
            leaf = hidden.clone().requires_grad_()
            functions.last_token_values(leaf, index, head).sum().backward()
            results.append(leaf.grad)
    finally:
        torch.use_deterministic_algorithms(was)
    assert results[0].ne(0).any(dim=1).nonzero()[:, 0].tolist() == [3, 64, 1173]
    return compare("hidden", *(t.reshape(-1) for t in (results[0], results[1], results[1].double())))


@case
def outputs_without_a_gradient(device, dtype):
    """accuracy, margin and scores are constants, and a loss whose gradient is undefined returns None."""
    from rmsd_kernels.discriminator import triton_loss

    setup = Setup(device, dtype, dim=40)
    pairs = (setup.student_index, setup.teacher_index, setup.quality)
    leaf = setup.hidden.requires_grad_()
    out = triton_loss.discriminator_loss(leaf, setup.last_index, setup.head, *pairs, num_students=STUDENTS)
    assert out.loss.requires_grad and not any(t.requires_grad for t in out[1:])
    scores = torch.zeros(STUDENTS, device=device, requires_grad=True)
    pairwise = triton_loss.pairwise_discriminator_loss(scores, torch.zeros(TEACHERS, device=device), *pairs)
    for loss, leaf_of_loss in ((out.loss, leaf), (pairwise.loss, scores)):
        (gradient,) = torch.autograd.grad(Drop.apply(loss) + leaf_of_loss.sum() * 2, leaf_of_loss)
        assert torch.equal(gradient, torch.full_like(leaf_of_loss, 2))
    return 0.0


@case
def pairwise_scores(device, dtype):
    """Use ordinary scores, and margins of ±2e4, for which the loss is the margin or exactly 0."""
    setup, worst = Setup(device, dtype), []
    for size in (1.0, 1e4):
        scores = [size * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (STUDENTS, TEACHERS)]
        scores = [s.to(dtype).to(device) for s in scores]
        worst.append(check_pairwise(setup, scores, dtype))
        worst.append(
            check_pairwise(setup, scores, dtype, pair_weight=setup.pair_weight.double().float(), score_l2=1e-3)
        )
    return max(worst)


@case
def small_losses_keep_their_digits(device, dtype):
    """For large m, softplus(-m) = exp(-m), which log(1 + exp(-m)) would round to 0."""
    from rmsd_kernels.discriminator import triton_loss

    margins = torch.tensor([0.0, 1.0, 5.0, 20.0, 60.0], device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for i, margin in enumerate(margins.tolist()):
        scores = (torch.zeros(1, device=device), margins[i : i + 1])
        loss = triton_loss.pairwise_discriminator_loss(*scores, zero, zero, torch.ones(1, device=device)).loss
        assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-5)
    return 0.0


@case
def values(device, dtype):
    """Check last_token_values with any upstream gradient, including an expanded one."""
    from rmsd_kernels.discriminator import triton_loss

    setup, worst = Setup(device, dtype), []
    upstream = torch.linspace(-1, 1, STUDENTS + TEACHERS, device=device)
    names = ("hidden", "head", "bias", "norm_weight")
    for wanted in (names, ("hidden",), ("head", "bias"), ("norm_weight",)):
        results = []
        for functions, convert in (
            (triton_loss, torch.clone),
            (reference, Tensor.float),
            (reference, in_double),
        ):
            leaves = {n: convert(getattr(setup, n)).detach().clone().requires_grad_(n in wanted) for n in names}
            hidden, head = leaves.pop("hidden"), leaves.pop("head")
            out = functions.last_token_values(hidden, setup.last_index, head, **leaves)
            (out.sum() + (out * upstream.to(out.dtype)).sum()).backward()
            gradients = {"hidden": hidden.grad, "head": head.grad, **{n: t.grad for n, t in leaves.items()}}
            results.append({"values": out.detach(), **gradients})
        kernel, eager, exact = results
        for name, value in kernel.items():
            assert (value is None) == (name in names and name not in wanted), name
            if value is not None:
                stored = eager[name] if name == "values" else as_stored(eager[name], dtype)
                worst.append(compare(name, *(t.reshape(-1) for t in (value, stored, exact[name]))))
    return max(worst)


@case
def compiled_in_one_graph(device, dtype):
    """Check that torch.compile(fullgraph=True) gives equal results and that the ops match their schemas."""
    from rmsd_kernels.discriminator import triton_loss as ours

    setup = Setup(device, dtype, dim=40)
    pairs = (setup.student_index, setup.teacher_index, setup.quality)

    def loss(hidden, head, norm_weight):
        out = ours.discriminator_loss(
            hidden, setup.last_index, head, *pairs, num_students=STUDENTS, norm_weight=norm_weight, score_l2=0.1
        )
        values = ours.last_token_values(hidden, setup.last_index, head)
        again = ours.pairwise_discriminator_loss(values[:STUDENTS], values[STUDENTS:], *pairs, normalizer=3.0)
        return out.loss + again.loss + out.scores.sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (setup.hidden, setup.head, setup.norm_weight)]
        result = function(*leaves)
        result.backward()
        results.append([result.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    ops, tests = torch.ops.rmsd_kernels, ("test_schema", "test_faketensor")
    head = (setup.hidden, setup.last_index, setup.head, setup.bias, setup.norm_weight)
    numbers = (None, 0.1, None, torch.tensor(3.0, device=device), 2.0, None)
    scores = torch.randn(STUDENTS, device=device), torch.randn(TEACHERS, device=device)
    gradient, saved = torch.randn(STUDENTS + TEACHERS, device=device), torch.rand(2, STUDENTS + TEACHERS, device=device)
    for needed in (True, False):
        pair_arguments = (*pairs, *numbers, needed)
        torch.library.opcheck(ops.discriminator_forward, (*head, 1e-6, STUDENTS, *pair_arguments), test_utils=tests)
        torch.library.opcheck(ops.pairwise_discriminator_forward, (*scores, *pair_arguments), test_utils=tests)
        arguments = (gradient, None, *head, saved, True, needed, needed, True)
        torch.library.opcheck(ops.discriminator_backward, arguments, test_utils=tests)
    torch.library.opcheck(ops.last_token_values_forward, (*head, 1e-6), test_utils=tests)
    return 0.0


@case
def refusals(device, dtype):
    from rmsd_kernels.discriminator import triton_loss as ours

    setup = Setup(device, dtype, dim=40)
    with pytest.raises(TypeError, match="hidden: expected float32, bfloat16 or float16, got torch.float64"):
        ours.last_token_values(setup.hidden.double(), setup.last_index, setup.head)
    # Second derivatives are not supported.
    values = ours.last_token_values(setup.hidden.requires_grad_(), setup.last_index, setup.head.requires_grad_())
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(values.sum(), setup.head, create_graph=True)
    return 0.0


@pytest.fixture(scope="module")
def interpreted() -> dict[tuple[str, str], dict]:
    pytest.importorskip("triton")
    return interpret(__file__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(interpreted, name, dtype):
    failure = interpreted[name, dtype]["failure"]
    assert not failure, failure


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_on_cuda(name, dtype):
    CASES[name](torch.device("cuda"), DTYPES[dtype])


if __name__ == "__main__":
    main(CASES)
