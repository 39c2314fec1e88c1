"""The losses straight from hidden states, against eager code, torch.compile and the libraries of peers.py.

- linear_policy_loss: GRPO on policy (ratio 1, clip 0.2) with 0.04 * k3 to given reference log-probs, called as a
  training step of stage 2 calls it: temperature 0.8, a given normalizer, log-probs of the rollout engine.
- linear_logprob: log-prob and entropy of every token, both differentiated with constants as upstream gradients.
- linear_cross_entropy: the mean over the scored rows.
- linear_divergence: between a student's and a teacher's head; the teacher is a constant.

GEMM flop over the scored rows: 6TDV with a trainable head, 4TDV with a frozen one, 2TDV for scoring without gradients;
a divergence has 2TDV more, for the teacher's logits. Shares are of that rate, TFLOP/s = flop / time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.core.measure import (
    OURS,
    Effort,
    Variant,
    bare_gemms,
    differences_of,
    gemm_flop,
    main_time,
    measure,
    numbers_of,
)
from bench.heads import peers
from bench.heads.cases import GATE_TOKENS, Case, Errors, HeadInputs, checked, head_inputs
from rmsd_fast.losses import linear_cross_entropy, linear_divergence, linear_logprob, linear_policy_loss

NAME = "linear losses"
# Beyond this relative difference to ours a peer is named in the record: a filter or rounding of its own.
_NOTABLE = 0.05
_CHUNKED = "torch l.c.e. chunked"


def policy_loss(x: HeadInputs, budget: int | None = None) -> Tensor:
    """Call it as rmsd_fast/stages/distill.py does. With masked rows the trainer's ignore_index=None is not possible."""
    return linear_policy_loss(
        x.hidden,
        x.weight,
        x.targets,
        x.advantages,
        normalizer=x.count,
        temperature=x.temperature,
        ignore_index=x.ignore_index,
        rollout_logp=x.rollout_logp,
        kl="k3",
        kl_coef=peers.KL_COEF,
        ref_logp=x.ref_logp,
        memory_budget_bytes=budget,
    ).loss


def _logprob(x: HeadInputs, budget: int | None = None) -> tuple[Tensor, Tensor]:
    options = {"ignore_index": x.ignore_index, "memory_budget_bytes": budget}
    return linear_logprob(x.hidden, x.weight, x.targets, return_entropy=True, **options)


def logprob_sum(x: HeadInputs) -> Tensor:
    return peers.weighted_sum(_logprob(x), peers.logprob_weights(x))


def _stacked(x: HeadInputs, scores: tuple[Tensor, Tensor]) -> Tensor:
    """Stack both values of the scored rows, weighted so that neither gradient hides the other's error."""
    return torch.cat([values[x.scored] for values in scores])


def cross_entropy(x: HeadInputs, budget: int | None = None) -> Tensor:
    return linear_cross_entropy(x.hidden, x.weight, x.targets, ignore_index=x.ignore_index, memory_budget_bytes=budget)


def divergence(x: HeadInputs, budget: int | None = None, *, kind: str) -> Tensor:
    teacher = {"teacher_hidden": x.teacher_hidden, "teacher_weight": x.weight.detach()}
    return linear_divergence(x.hidden, x.weight, **teacher, kind=kind, memory_budget_bytes=budget)


@dataclass(frozen=True)
class Loss:
    """One public loss: `ours` gives the scalar that is timed, `gate_*` what is compared with float64.

    buffers: heads whose logits share a budget.
    """

    ours: Callable[[HeadInputs], Tensor]
    gate_ours: Callable[[HeadInputs, int | None], Tensor]
    gate_eager: Callable[[HeadInputs], Tensor]
    others: dict[str, peers.Build]
    buffers: int = 1


def _divergence(kind: str) -> Loss:
    ours = partial(divergence, kind=kind)
    return Loss(ours, ours, partial(peers.eager_divergence, kind=kind), peers.divergence_peers(kind), buffers=2)


# By name of the records and kind.
LOSSES = {
    ("linear_policy_loss", ""): Loss(policy_loss, policy_loss, peers.eager_policy_loss, peers.POLICY),
    ("linear_logprob", ""): Loss(
        logprob_sum,
        lambda x, budget: _stacked(x, _logprob(x, budget)),
        lambda x: _stacked(x, peers.eager_logprob(x)),
        peers.LOGPROB,
    ),
    ("linear_cross_entropy", ""): Loss(cross_entropy, cross_entropy, peers.eager_cross_entropy, peers.CROSS_ENTROPY),
    **{("linear_divergence", kind): _divergence(kind) for kind in ("forward_kl", "jsd")},
}


def _of_losses(policy: list[Case], logprob: list[Case], entropy: list[Case], divergence: list[Case]) -> list[Case]:
    """Name the losses of these cases. Those that carry claims come first: a run may end before the last."""
    found = [replace(case, bench="linear_policy_loss", temperature=peers.TEMPERATURE) for case in policy]
    found += [replace(case, bench="linear_logprob") for case in logprob]
    found += [replace(case, bench="linear_cross_entropy") for case in entropy]
    return found + [replace(case, bench="linear_divergence", kind=case.kind or "forward_kl") for case in divergence]


def cases(quick: bool, device: str) -> list[Case]:
    if device == "cuda":
        base = [Case(t, d, torch.bfloat16, device=device) for d in (2560, 4096) for t in (8192, 2048, 32768, 512)]
        long, *others = base
        heads = [long, *(replace(long, head=head) for head in ("frozen", "score")), *others]
        return _of_losses(base, heads, base, [long, replace(long, kind="jsd")])
    narrow, wide = (
        Case(128 if quick else 512, d, dtype) for d, dtype in ((256, torch.float32), (2560, torch.bfloat16))
    )
    kinds = [narrow, replace(narrow, kind="jsd")]
    if quick:
        return _of_losses([narrow, wide], [narrow, replace(wide, head="frozen")], [narrow, wide], kinds)
    base = [narrow, replace(narrow, tokens=2048), wide, replace(wide, tokens=2048)]
    heads = [*base, *(replace(case, head="frozen") for case in (narrow, wide)), replace(base[-1], head="score")]
    # One condition changed at a time, against peers.
    changed = [replace(narrow, mask=50), replace(narrow, mask=90), replace(narrow, softmax="peaked")]
    return _of_losses(base, heads, [*base, *changed], [*kinds, wide])


def toy_cases(device: str) -> list[Case]:
    """Return the cases of a rehearsal: nothing is learned from its times."""
    return _of_losses(*[[Case(64, 64, torch.bfloat16, device=device, vocabulary=512)]] * 4)


def conditions(quick: bool, device: str) -> list[Case]:
    """Return shapes on which ours alone is timed under every condition."""
    if device == "cuda":
        return _of_losses(*[[Case(8192, 2560, torch.bfloat16, device=device)]] * 3, [])
    narrow, long = [Case(512, 256, torch.float32)], [Case(2048, 2560, torch.bfloat16)]
    return [] if quick else _of_losses(narrow + long, narrow, long, [])


def left_out(case: Case, quick: bool) -> dict[str, str]:
    """Return peers that would take minutes on a CPU, with the reason."""
    if case.device != "cpu":
        return {}
    if quick:
        return dict.fromkeys((*peers.COMPILES, _CHUNKED), "quick: its compilation, or seconds a call, are left out")
    skip, slow = {}, ("CCE torch_compile", _CHUNKED)
    if case.mask or case.softmax != "random":
        # Compilation alone takes half a minute, and the other forms stand for these.
        skip = dict.fromkeys(slow, "left out under conditions, to save time")
    elif case.tokens > 512 and case.head == "trainable":
        names = ("Liger scaled CE", *slow * (case.dtype is torch.float32))
        skip = dict.fromkeys(names, "left out at this length, to save time: see T = 512")
    return skip | ({_CHUNKED: "16 tokens take 12 s on a CPU"} if case.dtype is torch.bfloat16 else {})


def gemms_of(case: Case, x: HeadInputs) -> Variant:
    """Return the bare products of the scored rows; of a divergence, the teacher's logits too."""
    own = bare_gemms(x.hidden[x.scored], x.weight, case.head)
    if x.teacher_hidden is None:
        return own
    score = bare_gemms(x.teacher_hidden, x.weight, "score")

    def forward() -> Tensor:
        score.forward()
        return own.forward()

    return replace(own, forward=forward)


def run_case(case: Case, effort: Effort, skip: dict[str, str]) -> tuple[dict, Variant]:
    """Check errors, then time bare GEMMs, ours and every peer. Return the record and ours."""
    loss, errors, inputs = LOSSES[case.bench, case.kind], gate(case, effort), head_inputs(case)
    score = case.head == "score"
    ours = peers.as_variant(OURS, lambda: loss.ours(inputs), inputs, score)
    others, not_run = peers.gather(loss.others, inputs, score=score, skip=skip)
    variants = [gemms_of(case, inputs), ours, *others]
    samples = measure(variants, effort, inputs.hidden.device, not_run, base=OURS)
    numbers = numbers_of(samples, variants)
    far = differences_of(samples)
    notable = {name: f"differs from ours by {d}" for name, d in far.items() if max(d.values()) > _NOTABLE}
    flop = gemm_flop(inputs.count, case.hidden, case.vocabulary, case.head)
    # The logits of each further head take 2TDV.
    flop += (loss.buffers - 1) * gemm_flop(inputs.count, case.hidden, case.vocabulary, "score")
    for own in numbers.values():
        own["tflop_per_s"] = flop / main_time(own) / 1e9
    record = case.facts() | {"gemm_flop": flop, "variants": numbers}
    record |= {"differences": far, "remarks": notable, "not_run": not_run, "errors": errors._asdict()}
    return record, ours


def run_conditions(case: Case, effort: Effort) -> tuple[dict, Variant]:
    """Time ours alone under each condition, interleaved: what masks and a frozen head save, what a peak costs."""
    conditions = {
        OURS: case,
        "50% masked": replace(case, mask=50),
        "90% masked": replace(case, mask=90),
        "peaked": replace(case, softmax="peaked"),
        "frozen head": replace(case, head="frozen"),
    }
    loss = LOSSES[case.bench, case.kind]
    errors = {name: gate(own, effort)._asdict() for name, own in conditions.items()}
    inputs = {name: head_inputs(own) for name, own in conditions.items()}
    variants = [peers.as_variant(name, lambda x=x: loss.ours(x), x, False) for name, x in inputs.items()]
    samples = measure(variants, replace(effort, least_rounds=effort.always_rounds), inputs[OURS].hidden.device)
    numbers = numbers_of(samples, variants, baseline=OURS)
    for own in numbers.values():
        # The same ratio the other way round: time under the condition / time without it.
        own["times_base"] = 1 / own.pop("share_of_gemms")
        by_round = own.pop("share_of_gemms_by_round")
        own["times_base_by_round"] = None if by_round is None else 1 / by_round
    return case.facts() | {"case": f"{case.name}-conditions", "variants": numbers, "errors": errors}, variants[0]


def gate(case: Case, effort: Effort) -> Errors:
    """Check errors on few tokens, once for all lengths; scoring stands before the gate of the frozen head."""
    loss = LOSSES[case.bench, case.kind]
    if effort.gate_vocabulary and case.hidden > 1024:
        case = replace(case, vocabulary=effort.gate_vocabulary)
    head = "frozen" if case.head == "score" else case.head
    return checked(replace(case, head=head, tokens=GATE_TOKENS), loss.gate_ours, loss.gate_eager, loss.buffers)


@pytest.mark.timeout(1800)
def test_loss(case: Case, effort: Effort, report: Callable[[dict, Variant], None], quick: bool) -> None:
    report(*run_case(case, effort, left_out(case, quick)))


@pytest.mark.timeout(1800)
def test_conditions(condition_case: Case, effort: Effort, report: Callable[[dict, Variant], None]) -> None:
    report(*run_conditions(condition_case, effort))
