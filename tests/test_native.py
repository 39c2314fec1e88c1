"""The compiled row op against the truth in float64, judged by the error of eager torch at the same dtype."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmsd_kernels import native

needs_native = pytest.mark.skipif(not native.available(), reason=f"native ops: {native.why_not()}")

# (T, V, spread of the logits) and why.
SHAPES = [
    pytest.param(5, 33, 1.0, id="tail-shorter-than-a-vector"),
    pytest.param(1, 1, 1.0, id="one-token-one-word"),
    pytest.param(3, 2048, 4.0, id="exactly-one-block"),
    pytest.param(3, 2 * 2048 + 7, 4.0, id="block-tail"),
    pytest.param(70, 4099, 8.0, id="several-tasks-of-rows"),
    pytest.param(4, 5000, 60.0, id="peaked-exp-underflows"),
]


def eager(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    logp = (logits / temperature[:, None]).log_softmax(-1)
    probability = logp.exp()
    entropy = -torch.where(probability > 0, probability * logp, 0.0).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


def make(rows: int, vocab: int, spread: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return logits, targets, torch.rand(rows, generator=generator) + 0.5


def assert_no_worse_than_twice_eager(logits: Tensor, targets: Tensor, temperature: Tensor) -> None:
    truth = eager(logits.double(), targets, temperature.double())
    peer = eager(logits.float(), targets, temperature)
    ours = native.row_logprob(logits, targets, temperature)
    for name, got, other, exact in zip(("logp", "entropy"), ours, peer, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        assert got.isfinite().all()
        error, bar = (got - exact).abs().max().item(), (other - exact).abs().max().item()
        floor = 1e-6 * max(1.0, exact.abs().max().item())
        assert error <= 2 * bar + floor, f"{name}: error {error:.2e}, eager's {bar:.2e}, floor {floor:.1e}"


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab", "spread"), SHAPES)
def test_error_is_within_twice_eagers(rows: int, vocab: int, spread: float, dtype: torch.dtype) -> None:
    assert_no_worse_than_twice_eager(*make(rows, vocab, spread, dtype))


@needs_native
def test_hand_worked_row() -> None:
    # Logits log 1, log 2, log 5 at temperature 1: p = 1/8, 2/8, 5/8. Temperature 1/2 squares them: 1, 4, 25 over 30.
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log().repeat(2, 1)
    logp, entropy = native.row_logprob(logits, torch.tensor([1, 2]), torch.tensor([1.0, 0.5]))
    assert logp.tolist() == pytest.approx([math.log(2 / 8), math.log(25 / 30)], abs=1e-6)
    expected = [-sum(p * math.log(p) for p in row) for row in ([1 / 8, 2 / 8, 5 / 8], [1 / 30, 4 / 30, 25 / 30])]
    assert entropy.tolist() == pytest.approx(expected, abs=1e-6)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Descending rows never raise the maximum, ascending rows raise it in every block; both at huge offsets."""
    ramp = torch.linspace(-300.0, 300.0, 9000)
    logits = torch.stack([ramp, ramp.flip(0), ramp + 1e4, torch.zeros(9000)]).to(dtype)
    targets = torch.tensor([8999, 8999, 4500, 17])
    assert_no_worse_than_twice_eager(logits, targets, torch.ones(4))
    logp, entropy = native.row_logprob(logits, targets)
    assert (logp <= 0).all()
    assert entropy[3].item() == pytest.approx(math.log(9000), rel=1e-6)


@needs_native
def test_masked_and_non_finite_logits() -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.zeros(5, 3000)
    logits[0, 10:] = -inf  # the first block holds the only live logits
    logits[1, :2990] = -inf  # the first block is masked out as a whole
    logits[2, 5] = nan
    logits[3, 2999] = inf
    logits[4] = -inf
    logp, entropy = native.row_logprob(logits, torch.tensor([3, 0, 0, 0, 0]))
    assert logp[0].item() == pytest.approx(-math.log(10)) and logp[1].item() == -inf
    assert entropy[:2].tolist() == pytest.approx([math.log(10)] * 2)
    assert logp[2:].isnan().all() and entropy[2:].isnan().all()


@needs_native
def test_strided_rows_and_columns_and_slices() -> None:
    logits, targets, temperature = make(6, 2100, 3.0, torch.float32)
    expected = native.row_logprob(logits, targets, temperature)
    wide = torch.full((6, 2300), 1e9)
    wide[:, 100:2200] = logits
    views = [wide[:, 100:2200], logits.t().contiguous().t(), logits.repeat_interleave(2, 0)[::2]]
    for view in views:
        assert not view.is_contiguous()
        for got, want in zip(native.row_logprob(view, targets, temperature), expected, strict=True):
            assert torch.equal(got, want)
    every_other = native.row_logprob(logits[::2], targets[::2], temperature[::2])
    assert torch.equal(every_other[0], expected[0][::2]) and torch.equal(every_other[1], expected[1][::2])


@needs_native
def test_no_rows_and_a_plain_number_as_temperature() -> None:
    logp, entropy = native.row_logprob(torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)
    logits, targets, _ = make(3, 40, 2.0, torch.float32)
    same = native.row_logprob(logits, targets, torch.full((3,), 0.8))
    assert torch.equal(native.row_logprob(logits, targets, 0.8)[0], same[0])


@needs_native
def test_result_does_not_depend_on_threads() -> None:
    logits, targets, temperature = make(70, 4099, 8.0, torch.float32)
    before, expected = torch.get_num_threads(), native.row_logprob(logits, targets, temperature)
    try:
        torch.set_num_threads(2)
        threaded = native.row_logprob(logits, targets, temperature)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded[0], expected[0]) and torch.equal(threaded[1], expected[1])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    logits, targets, temperature = make(4, 50, 1.0, dtype)
    torch.library.opcheck(torch.ops.rmsd_kernels.row_logprob.default, (logits, targets, temperature))


@needs_native
def test_inside_torch_compile() -> None:
    logits, targets, temperature = make(4, 50, 1.0, torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def scaled(x: Tensor) -> Tensor:
        logp, entropy = torch.ops.rmsd_kernels.row_logprob(x * 2.0, targets, temperature)
        return logp + entropy

    logp, entropy = native.row_logprob(logits * 2.0, targets, temperature)
    assert torch.equal(scaled(logits), logp + entropy)


@needs_native
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "logits: expected float32 or bfloat16"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, TypeError, "targets: expected int64"),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, TypeError, "temperature: expected float32"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits: expected shape \[T, V\]"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "with V >= 1"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets: expected shape \[2\], got \[3\]"),
        ({"temperature": torch.ones(2, 1)}, ValueError, r"temperature: expected shape \[2\]"),
        ({"targets": torch.tensor([0, 3])}, ValueError, r"targets\[1\]: expected 0 to 2, got 3"),
        ({"targets": torch.tensor([-100, 0])}, ValueError, r"targets\[0\]: expected 0 to 2, got -100"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, r"temperature\[1\]: expected a finite positive"),
        ({"temperature": torch.tensor([float("nan"), 1.0])}, ValueError, r"temperature\[0\]: expected a finite"),
        ({"logits": torch.zeros(2, 3, requires_grad=True)}, RuntimeError, "no gradient"),
    ],
)
def test_refusals(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {
        "logits": torch.zeros(2, 3),
        "targets": torch.zeros(2, dtype=torch.int64),
        "temperature": torch.ones(2),
        **change,
    }
    with pytest.raises(error, match=f"^row_logprob.*{message}"):
        native.row_logprob(**arguments)


@needs_native
def test_logits_that_require_grad_pass_under_no_grad() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        logp, _ = native.row_logprob(logits, torch.zeros(2, dtype=torch.int64))
    assert not logp.requires_grad


def test_missing_library_says_why_and_what_to_do(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import torch; from rmsd_kernels import native\n"
        f"native.LIBRARY = Path({str(tmp_path)!r}) / '_native.abi3.so'\n"
        "assert not native.available()\n"
        "try:\n    native.row_logprob(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "was not built" in done.stdout and "install g++" in done.stdout
