"""Test the Triton row back end against float64 torch_rows on the same rounded inputs, interpreted and on CUDA."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, Case, as_stored, compare, interpret, main

from rmsd_kernels.heads import torch_rows
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs, RowReference, RowStats

ROWS = 3
# A row has three blocks in float32 and two in 16 bit, and the last block is partial.
VOCAB = 9001
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


class Setup:
    """Hold a chunk of logits and its other inputs, and the same in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype, vocab: int = VOCAB, rows: int = ROWS, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype, self.rows, self.vocab = device, dtype, rows, vocab
        self.logits = (3 * self.normal(rows, vocab)).to(dtype)
        self.targets = torch.randint(vocab, (rows,), generator=self.generator).to(device)
        self.inputs = RowInputs(self.targets, self.target_logit(), None, None, None)
        self.ref: RowReference | None = None

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.empty(self.rows).uniform_(low, high, generator=self.generator).to(self.device)

    def target_logit(self) -> Tensor:
        """Return the target's logit as a float32 dot product gives it: close to the rounded logit but not equal."""
        picked = self.logits.gather(1, self.targets.clamp(0, self.vocab - 1).unsqueeze(1)).squeeze(1).float()
        return picked + 0.01 * self.normal(self.rows)

    def transformed(self) -> Setup:
        self.inputs = self.inputs._replace(
            bias=self.normal(self.vocab), temperature=self.uniform(0.5, 1.5), softcap=6.0
        )
        return self

    def with_reference(self, bias: bool = False, spread: float = 0.5) -> Setup:
        logits = (self.logits.float() + spread * self.normal(self.rows, self.vocab)).to(self.dtype)
        ref_bias = self.normal(self.vocab) if bias else None
        target_logit = logits.gather(1, self.targets.unsqueeze(1)).squeeze(1).float()
        exact = torch_rows.score(
            logits.double(), double(self.inputs._replace(bias=ref_bias, target_logit=target_logit))
        )
        self.ref = RowReference(logits, ref_bias, exact.lse.float(), exact.logp.float())
        return self

    def terms(self, **changes) -> PolicyTerms:
        """Return terms with changed fields; the changes are fields of the terms or of their settings."""
        settings = {name: changes.pop(name) for name in PolicySettings._fields if name in changes}
        vectors = {"scale": self.uniform(0.1, 1.0), "advantage": self.normal(self.rows)}
        clips = {"clip_low": 0.2, "clip_high": 0.3}
        return PolicyTerms(**{**vectors, **changes}, settings=PolicySettings(**clips, **settings))


def double(record):
    """Return a record with its floating tensors in float64."""
    if isinstance(record, Tensor):
        return record.double() if record.is_floating_point() else record
    return None if record is None else type(record)(*(doubled(v) for v in record))


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def compare_gradients(kernel: Tensor, eager: Tensor, exact: Tensor, targets: Tensor | None = None) -> float:
    """Compare target columns and the smaller other columns separately, with floors in units of the largest gradient."""
    at_target = torch.zeros_like(exact, dtype=torch.bool)
    if targets is not None:
        at_target.scatter_(1, targets.clamp(0, exact.shape[1] - 1).unsqueeze(1), True)
    worst = 0.0
    for columns in (at_target, ~at_target):
        if columns.any():
            selected = [t[columns] for t in (kernel, eager, exact)]
            largest = selected[2].nan_to_num(0, 0, 0).abs().max().item()
            worst = max(worst, compare("gradient", *selected, floor=4e-7 * largest / max(1.0, largest)))
    return worst


def compare_stats(kernel: RowStats, eager: RowStats, exact: RowStats) -> float:
    assert not (kernel.logp > 0).any()
    pairs = zip(RowStats._fields, kernel, eager, exact, strict=True)
    return max(compare(name, k, e, x) for name, k, e, x in pairs if x is not None)


def check_score(setup: Setup) -> float:
    from rmsd_kernels.heads import triton_rows

    before = setup.logits.clone()
    kernel = triton_rows.score(setup.logits, setup.inputs, setup.ref)
    assert torch.equal(setup.logits.nan_to_num(), before.nan_to_num()), "score changed the logits"
    again = triton_rows.score(setup.logits, setup.inputs, setup.ref)
    assert all(
        a is b is None or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(kernel, again, strict=True)
    )
    eager = torch_rows.score(setup.logits, setup.inputs, setup.ref)
    return compare_stats(
        kernel, eager, torch_rows.score(setup.logits.double(), double(setup.inputs), double(setup.ref))
    )


def check_policy(setup: Setup, terms: PolicyTerms) -> float:
    from rmsd_kernels.heads import triton_rows

    gradient, again = setup.logits.clone(), setup.logits.clone()
    stats = triton_rows.policy_(gradient, setup.inputs, terms, setup.ref)
    triton_rows.policy_(again, setup.inputs, terms, setup.ref)
    assert torch.equal(gradient.nan_to_num(), again.nan_to_num()), "two runs differ"
    eager, exact = setup.logits.float(), setup.logits.double()
    eager_stats = torch_rows.policy_(eager, setup.inputs, terms, in_float(setup.ref))
    exact_stats = torch_rows.policy_(exact, double(setup.inputs), double(terms), double(setup.ref))
    worst = compare_stats(stats, eager_stats, exact_stats)
    return max(worst, compare_gradients(gradient, as_stored(eager, setup.dtype), exact, setup.targets))


def check_gradient(setup: Setup, entropy: bool, full_kl: bool) -> float:
    from rmsd_kernels.heads import triton_rows

    exact_inputs, exact_ref = double(setup.inputs), double(setup.ref)
    exact_stats = torch_rows.score(setup.logits.double(), exact_inputs, exact_ref)
    stats = RowStats(*(t if t is None else t.float() for t in exact_stats))
    upstream = [setup.normal(setup.rows), setup.normal(setup.rows) if entropy else None]
    upstream += [setup.ref, setup.normal(setup.rows) if full_kl else None]
    gradient, again = setup.logits.clone(), setup.logits.clone()
    triton_rows.gradient_(gradient, setup.inputs, stats, *upstream)
    triton_rows.gradient_(again, setup.inputs, stats, *upstream)
    assert torch.equal(gradient.nan_to_num(), again.nan_to_num()), "two runs differ"
    eager, exact = setup.logits.float(), setup.logits.double()
    torch_rows.gradient_(eager, setup.inputs, stats, *upstream[:2], in_float(setup.ref), upstream[3])
    torch_rows.gradient_(exact, exact_inputs, exact_stats, *(double(g) for g in upstream))
    return compare_gradients(gradient, as_stored(eager, setup.dtype), exact, setup.targets)


def in_float(ref: RowReference | None) -> RowReference | None:
    return None if ref is None else ref._replace(logits=ref.logits.float())


@case
def score_plain(device, dtype):
    return check_score(Setup(device, dtype))


@case
def score_bias_softcap_temperature(device, dtype):
    return check_score(Setup(device, dtype).transformed())


@case
def score_full_kl(device, dtype):
    return max(
        check_score(Setup(device, dtype).with_reference()),
        check_score(Setup(device, dtype).transformed().with_reference(bias=True)),
    )


@case
def score_small_vocabularies(device, dtype):
    worst = [check_score(Setup(device, dtype, vocab).transformed().with_reference()) for vocab in (1, 2, 5, 37)]
    return max(worst)


@case
def score_one_choice_is_certain(device, dtype):
    from rmsd_kernels.heads import triton_rows

    stats = triton_rows.score((setup := Setup(device, dtype, 1)).logits, setup.inputs)
    assert stats.logp.tolist() == [0.0] * ROWS and stats.entropy.tolist() == [0.0] * ROWS
    return 0.0


@case
def score_two_logits_by_hand(device, dtype):
    """Probabilities 1/4 and 3/4 give entropy = 2 log 2 - 3/4 log 3, and KL against 1/2, 1/2 is log 2 - entropy."""
    from rmsd_kernels.heads import triton_rows

    logits = torch.tensor([[5.0, 9.0]], dtype=dtype, device=device)
    logit = torch.tensor([5.0 + math.log(3.0)], device=device)
    inputs = RowInputs(torch.tensor([1], device=device), logit, None, None, None)
    half = torch.tensor([-math.log(2.0)], device=device)
    ref = RowReference(torch.zeros(1, 2, dtype=dtype, device=device), None, -half, half)
    stats = triton_rows.score(logits, inputs, ref)
    entropy = 2 * math.log(2) - 0.75 * math.log(3)
    expected = [math.log(0.75), entropy, 5 + math.log(4), math.log(2) - entropy]
    assert [value.item() for value in stats] == pytest.approx(expected, abs=1e-6)
    return 0.0


@case
def score_extreme_logits(device, dtype):
    """Use logits of ±1e4 with the maximum in the last block, so that all earlier sums vanish."""
    setup = Setup(device, dtype)
    setup.logits *= 1e4 / 3
    setup.logits[0, -1] = 1.5 * setup.logits[0].abs().max()
    setup.targets[0] = setup.vocab - 1
    setup.inputs = setup.inputs._replace(target_logit=setup.target_logit())
    return max(check_score(setup), check_policy(setup, setup.terms(entropy_coef=0.1)))


@case
def masked_logits(device, dtype):
    """Use -inf before and after finite logits, and as the target."""
    setup = Setup(device, dtype)
    setup.logits[:, :5000] = -math.inf
    setup.logits[1, 6000:] = -math.inf
    setup.targets[:] = torch.tensor([5003, 5500, 17])
    setup.inputs = setup.inputs._replace(target_logit=setup.target_logit())
    setup = setup.with_reference()
    terms = setup.terms(entropy_coef=0.1, kl_loss="full", kl_coef=0.2)
    return max(check_score(setup), check_gradient(setup, True, True), check_policy(setup, terms))


@case
def masked_rows_and_nan(device, dtype):
    """A row of only -inf, or with NaN or +inf, gives NaN, and the row next to it is not affected."""
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype, rows=4)
    setup.logits[0] = -math.inf
    setup.logits[1, 3] = math.nan
    setup.logits[2, 8000] = math.inf
    setup.targets[:3] = 5
    setup.inputs = setup.inputs._replace(target_logit=setup.target_logit())
    gradient = setup.logits.clone()
    stats = triton_rows.policy_(gradient, setup.inputs, setup.terms(entropy_coef=0.1))
    assert stats.logp.isnan().tolist() == stats.entropy.isnan().tolist() == [True, True, True, False]
    assert gradient.isnan().all(dim=1).tolist() == [True, True, True, False]
    for kind in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        value = triton_rows.divergence_(setup.logits, setup.logits.flip(0), None, kind, None, None)
        assert value.isnan().all(), kind
    return 0.0


@case
def target_out_of_range(device, dtype):
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype).transformed()
    setup.targets[:] = torch.tensor([-1, setup.vocab, 1 << 40])
    stats = triton_rows.score(setup.logits, setup.inputs)
    exact = torch_rows.score(setup.logits.double(), double(setup.inputs))
    assert stats.logp.isnan().all()
    compare("lse", stats.lse, stats.lse, exact.lse)
    # Out-of-bounds writes would change the rows around the middle one.
    padded = torch.full((3, setup.vocab), 7.0, dtype=dtype, device=device)
    for target in (-1, setup.vocab):
        inputs = RowInputs(torch.tensor([target], device=device), setup.inputs.target_logit[:1], None, None, None)
        terms = setup.terms().rows(slice(1))
        triton_rows.policy_(padded[1:2], inputs, terms)
        assert bool((padded[[0, 2]] == 7).all())
    return 0.0


@case
def strided_rows(device, dtype):
    """A row stride above V gives the same numbers, and nothing is written between the rows."""
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype).transformed()
    wide = torch.full((ROWS, VOCAB + 55), 7.0, dtype=dtype, device=device)
    wide[:, :VOCAB] = setup.logits
    terms, whole = setup.terms(entropy_coef=0.1), setup.logits.clone()
    expected = triton_rows.policy_(whole, setup.inputs, terms)
    stats = triton_rows.policy_(wide[:, :VOCAB], setup.inputs, terms)
    assert torch.equal(stats.logp, expected.logp) and torch.equal(wide[:, :VOCAB], whole)
    assert bool((wide[:, VOCAB:] == 7).all())
    # One temperature for all rows is passed as a view.
    temperature = torch.tensor(0.7, device=device)
    for_all, per_row = (
        setup.inputs._replace(temperature=t) for t in (temperature.expand(ROWS), temperature.repeat(ROWS))
    )
    assert torch.equal(triton_rows.score(whole, for_all).logp, triton_rows.score(whole, per_row).logp)
    return 0.0


@case
def no_rows(device, dtype):
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype, vocab=5, rows=0)
    assert triton_rows.score(setup.logits, setup.inputs).logp.shape == (0,)
    assert triton_rows.policy_(setup.logits, setup.inputs, setup.terms()).lse.shape == (0,)
    empty = torch.empty(0, device=device)
    triton_rows.gradient_(setup.logits, setup.inputs, RowStats(empty, empty, empty, None), empty)
    assert triton_rows.divergence_(setup.logits, setup.logits, None, "jsd", None, None).shape == (0,)
    return 0.0


@case
def gradient_of_each_output(device, dtype):
    worst = [check_gradient(Setup(device, dtype), False, False), check_gradient(Setup(device, dtype), True, False)]
    worst += [check_gradient(Setup(device, dtype).transformed().with_reference(bias=True), True, True)]
    worst += [check_gradient(Setup(device, dtype, 37).with_reference(), False, True)]
    return max(worst)


@case
def gradient_with_an_offset_on_all_logits(device, dtype):
    """The float32 log-sum-exp has an error of up to 2^-13 here; a likely target uses logp, which is exact."""
    setup = Setup(device, dtype)
    setup.logits += 4000.0
    setup.inputs = setup.inputs._replace(target_logit=torch.tensor([4013.3, 4014.4, 4015.5], device=device))
    return check_gradient(setup, False, False)


@case
def policy_on_policy(device, dtype):
    setup = Setup(device, dtype)
    return max(check_policy(setup, setup.terms()), check_policy(setup.transformed(), setup.terms(entropy_coef=0.05)))


@case
def policy_ratio_clip_and_kl(device, dtype):
    """Check each side of the clip and each estimator, with and without a limit on the log-ratio.

    The rows have ratios below, inside and above the clip and beyond the limit of exp, each with both signs of the
    advantage.
    """
    setup, worst = Setup(device, dtype, vocab=300, rows=8).transformed(), []
    logp = torch_rows.score(setup.logits.double(), double(setup.inputs)).logp.float()
    shift = torch.tensor([-0.5, 0.1, 0.5, 90.0] * 2, device=device)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 4, device=device) * setup.uniform(0.5, 1.5)
    ref_logp = logp + torch.linspace(-1, 1, 8, device=device)
    for kl in ("none", "k1", "k2", "k3"):
        for clip in (None, 0.4):
            settings = {"kl_loss": kl, "kl_coef": 0.3, "kl_log_ratio_clip": clip}
            terms = setup.terms(advantage=advantage, old_logp=logp - shift, ref_logp=ref_logp, **settings)
            worst.append(check_policy(setup, terms))
    return max(worst)


@case
def policy_with_importance_correction(device, dtype):
    """The weights are below, at and above their cap, and beyond the limit of exp."""
    setup = Setup(device, dtype, rows=5)
    logp = torch_rows.score(setup.logits.double(), double(setup.inputs)).logp.float()
    mismatch = torch.tensor([-1.0, 0.0, 0.5, 3.0, 90.0], device=device)
    terms = setup.terms(rollout_logp=logp - mismatch, tis_cap=2.0, entropy_coef=0.05)
    return check_policy(setup, terms)


@case
def target_logit_of_rows(device, dtype):
    """Check any stride, rows longer than a block, and targets out of range."""
    from rmsd_kernels.heads import triton_rows

    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for dim in (7, 1024, 2560):
        hidden, weight = (torch.randn(n, dim + 3, generator=generator).to(device, dtype)[:, :dim] for n in (6, 11))
        targets = torch.tensor([0, 10, 5, -100, 11, 1 << 40], device=device)
        kernel = triton_rows.target_logit(hidden, weight, targets)
        eager = torch_rows.target_logit(hidden, weight, targets)
        exact = torch_rows.target_logit(hidden.double(), weight.double(), targets)
        worst = max(worst, compare("target_logit", kernel, eager, exact))
        turned = weight.t().contiguous().t()
        assert torch.equal(triton_rows.target_logit(hidden, turned, targets), kernel)
    return worst


@case
def results_are_written_to_out(device, dtype):
    """`out` may be slices of a longer tensor; the elements next to them do not change."""
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype).with_reference()
    buffer = torch.full((4, ROWS + 2), 7.0, device=device)
    out = RowStats(*buffer[:, 1:-1])
    expected = triton_rows.score(setup.logits, setup.inputs, setup.ref)
    triton_rows.score(setup.logits, setup.inputs, setup.ref, out=out)
    assert torch.equal(buffer[:, 1:-1], torch.stack(expected)) and bool((buffer[:, [0, -1]] == 7).all())
    gaps = RowStats(*(torch.zeros(2 * ROWS, device=device)[::2] for _ in range(4)))
    with pytest.raises(ValueError, match=r"out.logp: expected a contiguous vector"):
        triton_rows.score(setup.logits, setup.inputs, setup.ref, out=gaps)
    return 0.0


@case
def very_negative_masks(device, dtype):
    """Finite numbers replace -inf in part of a row: 2^d is 0, and products with d must not overflow."""
    worst = 0.0
    for mask in (-1e9, -1e30, -1e37, float(torch.finfo(dtype).min)):
        setup = Setup(device, dtype)
        setup.logits[:, 100:900] = mask
        setup.logits[1, :] = mask
        setup.logits[1, :3] = 0.5
        setup.targets[:] = torch.tensor([950, 1, 2])
        setup.inputs = setup.inputs._replace(target_logit=setup.target_logit())
        terms = setup.terms(entropy_coef=0.1)
        worst = max(worst, check_score(setup), check_policy(setup, terms), check_gradient(setup, True, False))
    return worst


@case
def peaked_rows_and_low_temperatures(device, dtype):
    worst = 0.0
    for spread, temperature in ((30.0, 1.0), (3.0, 0.1)):
        setup = Setup(device, dtype)
        setup.logits = (spread * setup.logits.float()).to(dtype)
        setup.inputs = setup.inputs._replace(
            target_logit=setup.target_logit(), temperature=torch.full((setup.rows,), temperature, device=device)
        )
        setup = setup.with_reference()
        worst = max(worst, check_score(setup), check_gradient(setup, True, True))
    return worst


@case
def policy_k3_beyond_exp(device, dtype):
    """If log ref - log pi = 100, the limited exp has no gradient, so only the 1 of -d remains."""
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, torch.float32, vocab=50, rows=1)
    zero = torch.zeros(1, device=device)
    terms = setup.terms(advantage=zero, scale=zero + 1, kl_loss="k3", kl_coef=0.5, ref_logp=zero + 95.0)
    gradient = setup.logits.clone()
    logp = triton_rows.policy_(gradient, setup.inputs, terms).logp
    assert gradient[0, setup.targets[0]].item() == pytest.approx(0.5 * (1 - math.exp(logp.item())), rel=1e-5)
    return 0.0


@case
def policy_full_kl(device, dtype):
    plain = Setup(device, dtype).with_reference()
    worst = [check_policy(plain, plain.terms(kl_loss="full", kl_coef=0.5))]
    setup = Setup(device, dtype).transformed().with_reference(bias=True)
    worst += [check_policy(setup, setup.terms(kl_loss="full", kl_coef=0.5, entropy_coef=0.1))]
    # With a coefficient of 0, the KL is reported but has no gradient.
    worst += [check_policy(setup, setup.terms(kl_loss="none"))]
    return max(worst)


@case
def divergences(device, dtype):
    from rmsd_kernels.heads import triton_rows

    worst = []
    for kind, alpha in (("forward_kl", None), ("reverse_kl", None), ("jsd", None), ("jsd", 0.3), ("skew_kl", None)):
        for vocab, tempered in ((VOCAB, False), (37, True), (1, True)):
            setup = Setup(device, dtype, vocab)
            teacher = setup.logits.float() + setup.normal(ROWS, vocab)
            # A teacher may have another dtype.
            teacher = teacher.to(torch.float32 if tempered else dtype)
            if kind == "forward_kl" and vocab > 30:
                teacher[0, 7:20] = -math.inf
            temperature = setup.uniform(0.5, 2.0) if tempered else None
            scale = setup.uniform()
            gradient, eager, exact = setup.logits.clone(), setup.logits.float(), setup.logits.double()
            only_read = triton_rows.divergence_(gradient, teacher, temperature, kind, alpha, None)
            assert torch.equal(gradient, setup.logits)
            value = triton_rows.divergence_(gradient, teacher, temperature, kind, alpha, scale)
            assert torch.equal(value, only_read)
            again = setup.logits.clone()
            triton_rows.divergence_(again, teacher, temperature, kind, alpha, scale)
            assert torch.equal(gradient, again)
            eager_value = torch_rows.divergence_(eager, teacher.float(), temperature, kind, alpha, scale)
            doubles = (double(temperature), kind, alpha, double(scale))
            exact_value = torch_rows.divergence_(exact, teacher.double(), *doubles)
            worst.append(compare(f"{kind} value", value, eager_value, exact_value))
            worst.append(compare_gradients(gradient, as_stored(eager, dtype), exact))
    return max(worst)


@case
def divergences_with_bounded_summands(device, dtype):
    from rmsd_kernels.heads import triton_rows

    worst = []
    for kind, alpha in (("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3), ("skew_kl", None)):
        # Rows of several blocks for one kind; the others differ only within a block.
        for vocab, tempered in ((VOCAB, False), (37, True)) if kind == "reverse_kl" else ((37, True),):
            setup = Setup(device, dtype, vocab)
            teacher = (setup.logits.float() + setup.normal(ROWS, vocab)).to(dtype)
            # Infinite summands of the reverse KL are clipped.
            teacher[0, 7:20] = -math.inf
            temperature, scale = setup.uniform(0.5, 2.0) if tempered else None, setup.uniform()
            arguments = (temperature, kind, alpha, scale)
            doubles = (double(temperature), kind, alpha, double(scale))
            unbounded = torch_rows.divergence_(setup.logits.clone().float(), teacher.float(), *arguments)
            for clip in (1e-3, 1e30):
                gradient, eager, exact = setup.logits.clone(), setup.logits.clone().float(), setup.logits.double()
                value = triton_rows.divergence_(gradient, teacher, *arguments, vocab_clip=clip)
                eager_value = torch_rows.divergence_(eager, teacher.float(), *arguments, vocab_clip=clip)
                exact_value = torch_rows.divergence_(exact, teacher.double(), *doubles, vocab_clip=clip)
                worst.append(compare(f"{kind} value", value, eager_value, exact_value))
                worst.append(compare_gradients(gradient, as_stored(eager, dtype), exact))
                finite = unbounded.isfinite()
                close = torch.allclose(value[finite], unbounded[finite], rtol=1e-3, atol=1e-5)
                assert close == (clip > 1), (kind, clip)
    return max(worst)


@case
def scale_unless_one(device, dtype):
    from rmsd_kernels.heads import triton_rows

    values = torch.randn(5, 1001).to(dtype).to(device)
    expected = as_stored(values.float() * 0.3, dtype).to(dtype)
    before = values.clone()
    triton_rows.scale_unless_one_(values, torch.ones(1, device=device))
    assert torch.equal(values, before)
    triton_rows.scale_unless_one_(values, torch.tensor(0.3, device=device))
    assert torch.equal(values, expected)
    assert triton_rows.scale_unless_one_(values[:0], torch.tensor(0.3, device=device)).shape == (0, 1001)
    with pytest.raises(TypeError, match="values: expected contiguous"):
        triton_rows.scale_unless_one_(values[:, ::2], torch.ones(1, device=device))
    with pytest.raises(ValueError, match="scalar"):
        triton_rows.scale_unless_one_(values, torch.ones(2, device=device))
    return 0.0


@case
def wrong_arguments(device, dtype):
    from rmsd_kernels.heads import triton_rows

    setup = Setup(device, dtype, vocab=37)
    with pytest.raises(TypeError, match="logits: expected float32, bfloat16 or float16, got torch.float64"):
        triton_rows.score(setup.logits.double(), setup.inputs)
    with pytest.raises(TypeError, match="temperature: expected float32"):
        triton_rows.score(setup.logits, setup.inputs._replace(temperature=setup.uniform().double()))
    with pytest.raises(ValueError, match="temperature: expected shape"):
        triton_rows.score(setup.logits, setup.inputs._replace(temperature=setup.uniform()[:2]))
    with pytest.raises(ValueError, match="logits: expected rows without gaps"):
        triton_rows.score(setup.logits[:, ::2], setup.inputs)
    with pytest.raises(ValueError, match="needs ref"):
        triton_rows.policy_(setup.logits, setup.inputs, setup.terms(kl_loss="full", kl_coef=1.0))
    with pytest.raises(ValueError, match="full_kl"):
        triton_rows.gradient_(setup.logits, setup.inputs, None, setup.uniform(), None, None, setup.uniform())
    with pytest.raises(ValueError, match="kind"):
        triton_rows.divergence_(setup.logits, setup.logits, None, "tv", None, None)
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


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_cuda_with_a_large_vocabulary(dtype):
    setup = Setup(torch.device("cuda"), DTYPES[dtype], vocab=151936, rows=64).transformed().with_reference()
    check_policy(setup, setup.terms(kl_loss="full", kl_coef=0.5, entropy_coef=0.1))
    check_gradient(setup, True, True)


@pytest.mark.cuda
def test_on_cuda_beyond_2_to_the_31_elements():
    vocab, rows = 151936, 14200
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free device memory")
    from rmsd_kernels.heads import triton_rows

    setup = Setup(torch.device("cuda"), torch.bfloat16, vocab, rows=2)
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = setup.logits
    ones = torch.ones(rows, device="cuda")
    targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
    targets[-2:] = setup.targets
    target_logit = 0 * ones
    target_logit[-2:] = setup.inputs.target_logit
    terms = PolicyTerms(ones, ones)
    stats = triton_rows.policy_(logits, RowInputs(targets, target_logit, None, None, None), terms)
    last = setup.logits.clone()
    expected = triton_rows.policy_(last, setup.inputs, PolicyTerms(ones[:2], ones[:2]))
    assert torch.equal(stats.logp[-2:], expected.logp) and torch.equal(logits[-2:], last)
    assert stats.logp[0].item() == pytest.approx(-math.log(vocab), abs=1e-5)


if __name__ == "__main__":
    main(CASES)
