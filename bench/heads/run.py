"""What the benchmarks of the linear losses share: which cases run, one case against all peers, ours by condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from bench.heads.cases import GATE_TOKENS, Case, Errors, HeadInputs, checked, head_inputs
from bench.heads.peers import Build, as_variant, gather

# Beyond this relative difference to ours a peer is named in the record: a filter or rounding of its own.
_NOTABLE = 0.05


@dataclass(frozen=True)
class HeadBench:
    """One public loss: `ours` gives the scalar that is timed, `gate_*` what is compared with float64.

    gemms: the bare products, if they are not those of the scored rows. buffers: heads whose logits share a budget.
    """

    name: str
    ours: Callable[[HeadInputs], Tensor]
    gate_ours: Callable[[HeadInputs, int | None], Tensor]
    gate_eager: Callable[[HeadInputs], Tensor]
    peers: dict[str, Build]
    gemms: Callable[[HeadInputs], Variant] | None = None
    buffers: int = 1


def base_cases(quick: bool, device: str) -> list[Case]:
    """Shapes with nothing masked and a random softmax."""
    if device == "cuda":
        # Those that carry claims first: a run may end before the last.
        return [Case(t, d, torch.bfloat16, device=device) for d in (2560, 4096) for t in (8192, 2048, 32768, 512)]
    narrow, wide = ((128,), (128,)) if quick else ((512, 2048), (512, 2048))
    return [Case(t, 256, torch.float32) for t in narrow] + [Case(t, 2560, torch.bfloat16) for t in wide]


def toy_cases(device: str) -> list[Case]:
    """A rehearsal: nothing is learnt from its times."""
    return [Case(64, 64, torch.bfloat16, device=device, vocabulary=512)]


def condition_cases(quick: bool, device: str) -> list[Case]:
    """One condition changed at a time, against peers."""
    if quick or device == "cuda":
        return []
    shape = Case(512, 256, torch.float32)
    return [replace(shape, mask=50), replace(shape, mask=90), replace(shape, softmax="peaked")]


def conditions(quick: bool, device: str, on_cpu: Sequence[Case]) -> list[Case]:
    """Shapes on which ours alone is timed under every condition."""
    return [Case(8192, 2560, torch.bfloat16, device=device)] if device == "cuda" else [] if quick else list(on_cpu)


def run_case(bench: HeadBench, case: Case, effort: Effort, skip: dict[str, str] | None = None) -> tuple[dict, Variant]:
    """Gate, then the bare GEMMs of the scored rows, ours and every peer. Return the record and ours."""
    errors = gate(bench, case, effort)
    inputs = head_inputs(case)
    score = case.head == "score"
    ours = as_variant(OURS, lambda: bench.ours(inputs), inputs, score)
    others, not_run = gather(bench.peers, inputs, score=score, skip=skip)
    own = bench.gemms or (lambda x: bare_gemms(x.hidden[x.scored], x.weight, case.head))
    variants = [own(inputs), ours, *others]
    samples = measure(variants, effort, inputs.hidden.device, not_run, base=OURS)
    numbers = numbers_of(samples, variants)
    far = differences_of(samples)
    notable = {name: f"differs from ours by {d}" for name, d in far.items() if max(d.values()) > _NOTABLE}
    flop = gemm_flop(inputs.count, case.hidden, case.vocabulary, case.head)
    # The logits of each further head take 2TDV.
    flop += (bench.buffers - 1) * gemm_flop(inputs.count, case.hidden, case.vocabulary, "score")
    for own in numbers.values():
        own["tflop_per_s"] = flop / main_time(own) / 1e9
    record = case.facts(bench.name) | {"gemm_flop": flop, "variants": numbers}
    record |= {"differences": far, "remarks": notable, "not_run": not_run, "errors": errors._asdict()}
    return record, ours


def run_conditions(bench: HeadBench, case: Case, effort: Effort) -> tuple[dict, Variant]:
    """Ours alone under each condition, interleaved: what masked rows and a frozen head save, what a peak costs."""
    conditions = {
        OURS: case,
        "50% masked": replace(case, mask=50),
        "90% masked": replace(case, mask=90),
        "peaked": replace(case, softmax="peaked"),
        "frozen head": replace(case, head="frozen"),
    }
    errors = {name: gate(bench, own, effort)._asdict() for name, own in conditions.items()}
    inputs = {name: head_inputs(own) for name, own in conditions.items()}
    variants = [as_variant(name, lambda x=x: bench.ours(x), x, False) for name, x in inputs.items()]
    samples = measure(variants, replace(effort, least_rounds=effort.always_rounds), inputs[OURS].hidden.device)
    numbers = numbers_of(samples, variants, baseline=OURS)
    for own in numbers.values():
        # The same ratio the other way round: time under the condition / time without it.
        own["times_base"] = 1 / own.pop("share_of_gemms")
        by_round = own.pop("share_of_gemms_by_round")
        own["times_base_by_round"] = None if by_round is None else 1 / by_round
    record = case.facts(bench.name) | {"case": f"{case.name}-conditions", "variants": numbers, "errors": errors}
    return record, variants[0]


def gate(bench: HeadBench, case: Case, effort: Effort) -> Errors:
    """The error gate of a case on few tokens, once for all lengths; scoring stands before that of the frozen head."""
    if effort.gate_vocabulary and case.hidden > 1024:
        case = replace(case, vocabulary=effort.gate_vocabulary)
    head = "frozen" if case.head == "score" else case.head
    case = replace(case, head=head, tokens=GATE_TOKENS)
    return checked(bench.name, case, bench.gate_ours, bench.gate_eager, bench.buffers)
