"""Test the compiled row back end against float64 torch_rows, relative to the error of torch_rows itself."""

from __future__ import annotations

import math

import pytest
import torch
from native_row_cases import assert_close, assert_stats_close, doubled, make, terms_of

from rmsd_kernels import native
from rmsd_kernels.heads import native_rows, torch_rows
from rmsd_kernels.heads.row_types import PolicySettings, PolicyTerms, RowInputs, RowReference, RowStats

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native ops: {native.why_not()}")

DTYPES = [torch.float32, torch.bfloat16]
# The sizes cover a row shorter than a vector, one column, a tail after a piece of 512, exactly a block of 2048, and a
# tail after blocks.
VOCABULARIES = [5, 1, 700, 2048, 4099]
LEVELS = {0: "portable", 1: "avx2", 2: "avx512"}
NAN, INF = math.nan, math.inf


@pytest.fixture(params=LEVELS, ids=LEVELS.get)
def level(request):
    """Run the test with each build of the loops that this processor supports."""
    if torch.ops.rmsd_kernels.cpu_level(request.param) != request.param:
        pytest.skip(f"this processor has no {LEVELS[request.param]}")
    yield request.param
    torch.ops.rmsd_kernels.cpu_level(max(LEVELS))


def plain(targets, target_logit):
    return RowInputs(torch.tensor(targets), torch.tensor(target_logit), None, None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("full", [False, True], ids=["plain", "bias-cap-temperature"])
def test_score_and_gradient(level, full, vocab, dtype):
    for spread in (1.0, 8.0):
        x = make(dtype, vocab, full, spread=spread)
        before = x.logits.clone()
        for ref in (None, x.ref):
            exact = torch_rows.score(x.logits.double(), doubled(x.inputs), doubled(ref))
            assert_stats_close(
                native_rows.score(x.logits, x.inputs, ref), torch_rows.score(x.logits, x.inputs, ref), exact
            )
        assert torch.equal(x.logits, before)
        stats = RowStats(*(t.float() for t in exact))
        for entropy, kl in ((False, False), (True, False), (False, True), (True, True)):
            upstream = (x.a, x.b if entropy else None, x.ref if kl else None, x.c if kl else None)
            got, eager, truth = x.logits.clone(), x.logits.clone(), x.logits.double()
            native_rows.gradient_(got, x.inputs, stats, *upstream)
            torch_rows.gradient_(eager, x.inputs, stats, *upstream)
            torch_rows.gradient_(truth, doubled(x.inputs), doubled(stats), *map(doubled, upstream))
            assert_close(f"gradient entropy={entropy} kl={kl}", got, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 2500])
@pytest.mark.parametrize("kl", native_rows.KL_CODES)
def test_policy(level, kl, vocab, dtype):
    # Cover off-policy with ratios beyond the clip, and on-policy, each with the entropy term and the log-ratio clip.
    for full, on_policy, entropy_coef, clip in (
        (0, 0, 0.0, None),
        (1, 0, 0.01, 0.2),
        (1, 1, 0.0, 0.2),
        (0, 1, 0.01, None),
    ):
        x = make(dtype, vocab, bool(full), seed=full + 2 * on_policy, rows=8)
        terms = terms_of(x, kl, bool(on_policy), entropy_coef, clip)
        ref = x.ref if kl == "full" else None
        got, eager, truth = x.logits.clone(), x.logits.clone(), x.logits.double()
        stats = native_rows.policy_(got, x.inputs, terms, ref)
        bar = torch_rows.policy_(eager, x.inputs, terms, ref)
        assert_stats_close(stats, bar, torch_rows.policy_(truth, doubled(x.inputs), doubled(terms), doubled(ref)))
        assert_close(f"gradient {kl} full={full} on_policy={on_policy}", got, eager, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", native_rows.DIVERGENCE_CODES)
def test_divergence(level, kind, teacher_dtype, dtype):
    for vocab, full, alpha, spread in (
        (5, False, None, 3.0),
        (4099, True, None, 1.0),
        (700, True, 0.9, 8.0),
        (1, False, 0.3, 1.0),
    ):
        x = make(dtype, vocab, full, spread=spread)
        teacher, temperature = x.ref.logits.to(teacher_dtype), x.inputs.temperature
        before = x.logits.clone()
        value = native_rows.divergence_(x.logits, teacher, temperature, kind, alpha, None)
        assert torch.equal(x.logits, before)
        got, eager, truth = x.logits.clone(), x.logits.clone(), x.logits.double()
        again = native_rows.divergence_(got, teacher, temperature, kind, alpha, x.a)
        bar = torch_rows.divergence_(eager, teacher, temperature, kind, alpha, x.a)
        exact = torch_rows.divergence_(truth, teacher.double(), doubled(temperature), kind, alpha, doubled(x.a))
        assert torch.equal(value, again)
        assert_close(f"{kind} V={vocab}", value, bar, exact)
        assert_close(f"gradient of {kind} V={vocab}", got, eager, truth)


def test_hand_worked_score_and_gradient():
    # p = 1/8, 2/8, 5/8, and the target is 1. The exact logit of the target is passed, and its logit in the row is not
    # read.
    logits = torch.tensor([[0.0, 77.0, math.log(5.0)]])
    inputs = plain([1], [math.log(2.0)])
    p = [1 / 8, 2 / 8, 5 / 8]
    entropy = -sum(v * math.log(v) for v in p)
    r = [1 / 4, 1 / 4, 1 / 2]
    ref = RowReference(
        torch.tensor([[0.0, 9.0, math.log(2.0)]]), None, torch.tensor([math.log(4.0)]), torch.tensor([math.log(0.25)])
    )
    kl = sum(v * math.log(v / w) for v, w in zip(p, r, strict=True))
    stats = native_rows.score(logits, inputs, ref)
    assert [float(t) for t in stats] == pytest.approx([math.log(2 / 8), entropy, math.log(8.0), kl], abs=1e-6)
    native_rows.gradient_(logits, inputs, stats, torch.tensor([2.0]), torch.tensor([3.0]), ref, torch.tensor([5.0]))
    expected = [
        2.0 * ((i == 1) - v) - 3.0 * v * (math.log(v) + entropy) + 5.0 * v * (math.log(v / w) - kl)
        for i, (v, w) in enumerate(zip(p, r, strict=True))
    ]
    assert logits[0].tolist() == pytest.approx(expected, abs=2e-6)


# Each case gives advantage, logp - old_logp, ref_logp - logp, kl and the log-ratio clip, and the coefficient of d logp
# by hand.
@pytest.mark.parametrize(
    ("advantage", "log_ratio", "d", "kl", "clip", "expected"),
    [
        (3.0, None, 0.0, "none", None, -3.0),
        (3.0, math.log(1.1), 0.0, "none", None, -3.3),
        (3.0, math.log(1.3), 0.0, "none", None, 0.0),
        (-3.0, math.log(1.3), 0.0, "none", None, 3.9),
        (3.0, math.log(0.7), 0.0, "none", None, -2.1),
        (-3.0, math.log(0.7), 0.0, "none", None, 0.0),
        (-3.0, 90.0, 0.0, "none", None, 0.0),
        (0.0, None, 0.5, "k1", None, 0.1),
        (0.0, None, 0.5, "k2", None, -0.05),
        (0.0, None, 0.5, "k3", None, 0.1 * (1 - math.exp(0.5))),
        (0.0, None, -0.5, "k3", None, 0.1 * (1 - math.exp(-0.5))),
        (0.0, None, 90.0, "k3", None, 0.1),
        (0.0, None, 0.5, "k1", 0.4, 0.0),
        (0.0, None, -0.5, "k3", 0.4, 0.0),
    ],
)
def test_hand_worked_policy(advantage, log_ratio, d, kl, clip, expected):
    # Two columns of logit 0 give p = 1/2, so the gradient is +-g/2.
    logits, logp = torch.zeros(1, 2), -math.log(2.0)
    old = None if log_ratio is None else torch.tensor([logp - log_ratio])
    settings = PolicySettings(kl_loss=kl, kl_coef=0.1, kl_log_ratio_clip=clip, clip_low=0.2, clip_high=0.2)
    row = {"scale": 0.5, "advantage": advantage, "ref_logp": logp + d}
    terms = PolicyTerms(**{n: torch.tensor([v]) for n, v in row.items()}, old_logp=old, settings=settings)
    native_rows.policy_(logits, plain([1], [0.0]), terms)
    assert logits[0].tolist() == pytest.approx([-0.25 * expected, 0.25 * expected], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rows", [native_rows, torch_rows])
@pytest.mark.parametrize(
    ("mismatch", "cap", "correction"),
    [(math.log(1.5), 2.0, 1.5), (math.log(4.0), 2.0, 2.0), (math.log(0.25), 2.0, 0.25), (90.0, 3.0, 3.0)],
)
def test_hand_worked_importance_correction(rows, mismatch, cap, correction):
    """The weight min(exp(logp - rollout_logp), cap) multiplies only the policy term and is not differentiated."""
    logits, logp = torch.zeros(1, 2), -math.log(2.0)
    row = {"scale": 0.5, "advantage": 2.0, "ref_logp": logp + 0.5, "rollout_logp": logp - mismatch}
    settings = PolicySettings(kl_loss="k1", kl_coef=0.1, tis_cap=cap)
    terms = PolicyTerms(**{name: torch.tensor([value]) for name, value in row.items()}, settings=settings)
    rows.policy_(logits, plain([1], [0.0]), terms)
    slope = 0.5 * (-2.0 * correction + 0.1)
    assert logits[0].tolist() == pytest.approx([-slope / 2, slope / 2], rel=1e-5)


def test_hand_worked_divergence():
    # q = 1/4, 3/4 and p = 1/2, 1/2. M is 3/8, 5/8 for jsd and 0.1 p + 0.9 q = 0.275, 0.725 for skew_kl.
    q, p = (0.25, 0.75), (0.5, 0.5)
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.5 * kl(p, (0.375, 0.625)) + 0.5 * kl(q, (0.375, 0.625)),
        "skew_kl": kl(p, (0.275, 0.725)),
    }
    for kind, value in expected.items():
        logits = torch.tensor([[0.0, math.log(3.0)]])
        assert float(native_rows.divergence_(logits, torch.zeros(1, 2), None, kind, None, None)) == pytest.approx(
            value, abs=1e-6
        )
    native_rows.divergence_(
        logits := torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2), None, "forward_kl", None, torch.tensor([2.0])
    )
    assert logits[0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(level, dtype):
    """Use ascending rows, which raise the maximum in every block, and descending and one-hot rows."""
    ramp = torch.linspace(-1e4, 1e4, 5000)
    spike = torch.full((5000,), -1e4)
    spike[4000] = 1e4
    logits = torch.stack([ramp, ramp.flip(0), 1e-3 * ramp + 1e4, 1e-3 * ramp - 1e4, spike, torch.zeros(5000)]).to(dtype)
    targets = torch.tensor([4999, 4999, 4500, 3, 4000, 17])
    inputs = RowInputs(targets, logits.float().gather(1, targets[:, None])[:, 0], None, torch.full((6,), 0.7), None)
    terms = PolicyTerms(torch.ones(6), torch.ones(6), settings=PolicySettings(entropy_coef=0.5))
    got, eager, truth = logits.clone(), logits.clone(), logits.double()
    stats = native_rows.policy_(got, inputs, terms)
    assert_stats_close(
        stats, torch_rows.policy_(eager, inputs, terms), torch_rows.policy_(truth, doubled(inputs), doubled(terms))
    )
    assert_close("gradient", got, eager, truth)
    assert stats.logp[4] == 0 and stats.entropy[5] == pytest.approx(math.log(5000), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_masked_and_non_finite_rows(level, dtype, temperature):
    logits = torch.zeros(6, 3000)
    logits[0, 10:] = -INF  # Only the first block has finite logits.
    logits[1, :2990] = -INF  # The whole first block is masked.
    logits[2, 5] = NAN
    logits[3, 2999] = INF
    logits[4] = -INF
    logits[5, 100:] = -INF
    logits, targets = logits.to(dtype), torch.tensor([3, 0, 0, 0, 0, 7])
    row_temperature = None if temperature is None else torch.full((6,), temperature)
    inputs = RowInputs(targets, logits.float().gather(1, targets[:, None])[:, 0], None, row_temperature, None)
    ref = RowReference(logits, None, torch.full((6,), math.log(100.0)), torch.full((6,), -math.log(100.0)))
    settings = PolicySettings(kl_loss="full", kl_coef=0.3, entropy_coef=0.1)
    terms = PolicyTerms(torch.ones(6), torch.ones(6), settings=settings)
    got, masked = logits.clone(), logits == -INF
    stats = native_rows.policy_(got, inputs, terms, ref)
    assert stats.logp[0].item() == pytest.approx(-math.log(10)) and stats.logp[1].item() == -INF
    assert stats.entropy[:2].tolist() == pytest.approx([math.log(10)] * 2)
    assert stats.full_kl[5].item() == pytest.approx(0.0, abs=1e-6)
    # The target of row 1 is masked, but d log p_y is not zero.
    masked[1, 0] = False
    assert got[[0, 1, 5]].isfinite().all() and not got[[0, 1, 5]][masked[[0, 1, 5]]].any()
    for values in (stats.logp, stats.entropy, stats.full_kl):
        assert values[2:5].isnan().all()
    assert got[2:5].isnan().any(dim=1).all()
    teacher = logits[[0, 5, 5]]
    student = logits[[0, 5, 0]].clone()
    values = native_rows.divergence_(student, teacher, None, "forward_kl", None, torch.ones(3))
    assert values[:2].tolist() == pytest.approx([0.0, 0.0], abs=1e-6) and values[2].item() == INF
    assert student[:2].abs().max() < 1e-6


def test_target_outside_the_vocabulary_gives_nan_in_its_row_only():
    x = make(torch.float32, 50, True, rows=6)
    targets = torch.tensor([-1, 50, 2**40, -(2**40), 3, -100])
    inputs = x.inputs._replace(targets=targets)
    buffer = torch.full((8, 64), 7.0)
    buffer[1:7, 4:54] = x.logits
    stats = native_rows.policy_(buffer[1:7, 4:54], inputs, terms_of(x, "none", True, 0.0, None))
    assert stats.logp.isnan().tolist() == [True] * 4 + [False, True]
    expected = torch_rows.score(x.logits, inputs).lse
    assert torch.allclose(stats.lse, expected, atol=1e-5)
    buffer[1:7, 4:54] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_give_the_same_bits(dtype):
    x = make(dtype, 2100, True, rows=6)
    terms = terms_of(x, "full", False, 0.01, None)
    expected = x.logits.clone()
    expected_stats = native_rows.policy_(expected, x.inputs, terms, x.ref)
    wide, wide_ref = torch.full((6, 2300), 3.0, dtype=dtype), torch.full((6, 2200), NAN, dtype=dtype)
    wide[:, 100:2200], wide_ref[:, 3:2103] = x.logits, x.ref.logits
    view = wide[:, 100:2200]
    stats = native_rows.policy_(view, x.inputs, terms, x.ref._replace(logits=wide_ref[:, 3:2103]))
    assert torch.equal(view, expected) and all(torch.equal(a, b) for a, b in zip(stats, expected_stats, strict=True))
    assert (wide[:, :100] == 3.0).all() and (wide[:, 2200:] == 3.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_and_with_any_number_of_threads(dtype):
    x = make(dtype, 4099, True, rows=70)
    terms = terms_of(x, "full", False, 0.01, None)

    def run():
        logits, other = x.logits.clone(), x.logits.clone()
        stats = native_rows.policy_(logits, x.inputs, terms, x.ref)
        return (
            logits,
            other,
            *stats,
            native_rows.divergence_(other, x.ref.logits, x.inputs.temperature, "jsd", None, x.a),
        )

    threads, first = torch.get_num_threads(), run()
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, first, run()))
        torch.set_num_threads(3)
        assert all(map(torch.equal, first, run()))
    finally:
        torch.set_num_threads(threads)


def test_policy_is_score_and_gradient():
    """On-policy, the coefficient is -A * scale, so gradient_ gives the same result up to rounding of lse."""
    x = make(torch.float32, 3000, True)
    terms = terms_of(x, "none", True, 0.0, None)
    one, two = x.logits.clone(), x.logits.clone()
    stats = native_rows.policy_(one, x.inputs, terms)
    scored = native_rows.score(two, x.inputs)
    assert all(torch.equal(a, b) for a, b in zip(stats[:3], scored[:3], strict=True))
    native_rows.gradient_(two, x.inputs, scored, -terms.scale * terms.advantage)
    assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_no_rows():
    inputs = RowInputs(torch.empty(0, dtype=torch.int64), torch.empty(0), None, None, None)
    terms = PolicyTerms(torch.empty(0), torch.empty(0))
    logits = torch.empty(0, 7)
    assert [t if t is None else t.shape for t in native_rows.policy_(logits, inputs, terms)] == [(0,), (0,), (0,), None]
    stats = native_rows.score(logits, inputs)
    native_rows.gradient_(logits, inputs, stats, torch.empty(0))
    assert native_rows.divergence_(logits, logits, None, "jsd", None, torch.empty(0)).shape == (0,)


def test_offsets_beyond_2_to_the_31():
    """The rows are 2^30 elements apart, and only the pages of the rows are touched."""
    vocab, stride = 300, 2**30 + 8
    try:
        buffer = torch.empty(2 * stride + vocab, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4.3 GB of address space cannot be reserved")
    x = make(torch.bfloat16, vocab, False)
    inputs = x.inputs._replace(targets=x.inputs.targets[:3], target_logit=x.inputs.target_logit[:3])
    far = buffer.as_strided((3, vocab), (stride, 1)).copy_(x.logits[:3])
    near = x.logits[:3].clone()
    assert all(torch.equal(a, b) for a, b in zip(*(native_rows.score(t, inputs)[:3] for t in (far, near)), strict=True))
    stats = native_rows.score(near, inputs)
    for logits in (far, near):
        native_rows.gradient_(logits, inputs, stats, torch.ones(3))
    assert torch.equal(far, near) and not torch.equal(near, x.logits[:3])
