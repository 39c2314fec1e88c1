"""Test the schemas of the compiled row ops, their shapes under tracing, and their argument errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from native_row_cases import make, terms_of

from rmsd_kernels import native
from rmsd_kernels.heads import native_rows

pytestmark = pytest.mark.skipif(not native.available(), reason=f"native ops: {native.why_not()}")


def head(x, ref=True):
    return (x.logits.clone(), *x.inputs, *(x.ref if ref else (None,) * 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full, dtype):
    x, ops = make(dtype, 50, full, rows=4), torch.ops.rmsd_kernels
    stats = native_rows.score(x.logits, x.inputs, x.ref)
    check = torch.library.opcheck
    check(ops.row_score.default, head(x, full))
    check(ops.row_gradient_.default, (*head(x), stats.logp, stats.lse, stats.entropy, stats.full_kl, x.a, x.b, x.c))
    check(ops.row_gradient_.default, (*head(x, False), stats.logp, stats.lse, None, None, x.a, None, None))
    policy = (x.a, x.b, x.c, None, x.c, native_rows.KL_CODES["full"], 0.1, None, 0.2, 0.2, 2.0, 0.01)
    check(ops.row_policy_.default, (*head(x), *policy))
    check(ops.row_divergence_.default, (x.logits.clone(), x.ref.logits, x.inputs.temperature, 2, 0.5, x.a))


def test_a_correction_needs_its_cap():
    x = make(torch.float32, 5, False)
    terms = terms_of(x, "none", True, 0.0, None)._replace(rollout_logp=x.c)
    with pytest.raises(RuntimeError, match="rollout_logp: needs tis_cap"):
        native_rows.policy_(x.logits, x.inputs, terms)


def test_inside_torch_compile(monkeypatch):
    """Check that the in-place writes are part of the graph."""
    assert native.available()  # Load the library, because tracing cannot load it.
    monkeypatch.setattr(native, "available", lambda: True)
    x = make(torch.float32, 700, True)
    terms = terms_of(x, "k3", False, 0.01, None)

    def both(logits):
        scaled = logits * 2.0
        stats = native_rows.policy_(scaled, x.inputs, terms)
        other = logits + 1.0
        value = native_rows.divergence_(other, x.ref.logits, None, "jsd", None, x.a)
        return scaled * 3.0, stats.logp + stats.entropy, other, value

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(x.logits), both(x.logits)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float16)}, TypeError, "logits: expected float32 or bfloat16"),
        ({"logits": torch.zeros(3, 2).t()}, RuntimeError, "logits: expected adjacent columns"),
        ({"logits": torch.zeros(3).expand(2, 3)}, RuntimeError, "logits: rows overlap"),
        ({"logits": torch.zeros(2, 0)}, RuntimeError, "V >= 1"),
        ({"logits": torch.zeros(6)}, RuntimeError, r"expected shape \[n, V\]"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, RuntimeError, "targets: expected int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, RuntimeError, r"targets: expected shape \[2\]"),
        ({"target_logit": torch.zeros(2).double()}, RuntimeError, "target_logit: expected float32"),
        ({"target_logit": torch.zeros(4)[::2]}, RuntimeError, "target_logit: expected a contiguous vector"),
        ({"bias": torch.zeros(2)}, RuntimeError, r"bias: expected shape \[3\]"),
        ({"bias": torch.zeros(3, dtype=torch.bfloat16)}, RuntimeError, "bias: expected float32"),
        ({"temperature": torch.ones(())}, RuntimeError, r"temperature: expected shape \[2\]"),
        ({"softcap": 0.0}, RuntimeError, "softcap: expected a positive number"),
    ],
)
def test_refusals_of_the_head(change, error, message):
    x = make(torch.float32, 3, True, rows=2)
    logits = change.pop("logits", torch.zeros(2, 3)) if "logits" in change else torch.zeros(2, 3)
    with pytest.raises(error, match=message):
        native_rows.score(logits, x.inputs._replace(**change))


def test_refusals_of_the_terms():
    x = make(torch.float32, 3, False, rows=2)
    terms = terms_of(x, "k3", True, 0.0, None)
    with pytest.raises(ValueError, match="kl: expected one of none, k1, k2, k3, full, got 'k4'"):
        native_rows.policy_(x.logits, x.inputs, terms._replace(settings=terms.settings._replace(kl_loss="k4")))
    with pytest.raises(RuntimeError, match="k1, k2 and k3 need ref_logp"):
        native_rows.policy_(x.logits, x.inputs, terms._replace(ref_logp=None))
    with pytest.raises(RuntimeError, match="full needs the reference's logits"):
        native_rows.policy_(x.logits, x.inputs, terms._replace(settings=terms.settings._replace(kl_loss="full")))
    with pytest.raises(RuntimeError, match="ref_logits: expected shape and dtype of logits"):
        native_rows.score(x.logits, x.inputs, x.ref._replace(logits=x.ref.logits.bfloat16()))
    stats = native_rows.score(x.logits, x.inputs)
    with pytest.raises(RuntimeError, match="g_full_kl: needs the reference"):
        native_rows.gradient_(x.logits, x.inputs, stats, x.a, None, None, x.b)
    with pytest.raises(ValueError, match="kind: expected one of"):
        native_rows.divergence_(x.logits, x.logits, None, "kl", None, None)
    with pytest.raises(RuntimeError, match="alpha: expected a number between 0 and 1"):
        native_rows.divergence_(x.logits, x.logits, None, "jsd", 1.0, None)
    with pytest.raises(RuntimeError, match=r"teacher_logits: expected the shape of logits, \[2, 3\]"):
        native_rows.divergence_(x.logits, torch.zeros(2, 4), None, "jsd", None, None)


def test_missing_library_is_reported(tmp_path):
    code = (
        "from pathlib import Path; import torch\n"
        "from rmsd_kernels import native; from rmsd_kernels.heads import native_rows\n"
        f"native.LIBRARY = Path({str(tmp_path)!r}) / '_native.abi3.so'\n"
        "try:\n    native_rows.divergence_(torch.zeros(1, 2), torch.zeros(1, 2), None, 'jsd', None, None)\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "native ops are not available" in done.stdout and "was not built" in done.stdout
