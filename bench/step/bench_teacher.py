"""What a self-teacher adds to a stage-2 step on CPU: N rollouts, each after a hint of `hint` tokens.

The steps are the trainer's own, with the small student and generated rollouts. `plain` has no self-teacher. `frozen`
scores rollouts with and without hints in one pass, which replaces that of the reference; `live` and `ema` have a pass
of their own. Steps are made in turns. A step's `extra` is the time of its phases teacher and reference beyond that of
the reference in `plain`, and `extra_share` is its median over the median of a whole plain step. Rollouts vary in time,
so whole steps are recorded, and not compared. All times are processor time of the process, which other processes on the
machine change little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

from bench.core.measure import Effort, facts_of, in_turns, quantiles
from bench.prefix.groups import Case, make_texts
from bench.step import models
from bench.step.models import SMALL, start, stop
from rmsd_fast.config import RunConfig
from rmsd_fast.method.hints import Hint
from rmsd_fast.runtime.metrics import PhaseTimer
from rmsd_fast.runtime.moving_average import MovingAverage
from rmsd_fast.stages import distill
from rmsd_fast.stages.state import StageState

NAME = "self_teacher"
PLAIN, KINDS = "plain", ("frozen", "live", "ema")
N, K, HINT = 8, 4, 64


class ProcessorTimer(PhaseTimer):
    """Measure processor time of this process instead of time by the clock."""

    _start = 0.0

    def _now(self) -> float:
        return time.process_time()

    def take(self) -> dict[str, float]:
        seconds, now = super().take(), self._now()
        seconds["seconds/step"], self._start = now - self._start, now
        return seconds


@dataclass(frozen=True)
class TeacherCase(Case):
    @property
    def name(self) -> str:
        return f"{super().name}-N{N}-H{HINT}"


def cases(quick: bool, device: str) -> list[TeacherCase]:
    shapes = [(512, 32)] if quick else [(2048, 128), (1024, 64)]
    return [TeacherCase(*shape) for shape in shapes if device == "cpu"]


def settings_of(case: TeacherCase, prefix: int, kind: str) -> RunConfig:
    hints = ["self_teacher.views=[answer]", f"self_teacher.max_hint_tokens={HINT}", "kd.kind=k1"]
    chosen = [] if kind == PLAIN else [f"self_teacher.kind={kind}", *hints]
    return models.settings_of(SMALL, "shared", prefix, case.response, K, N, "model.dtype=float32", *chosen)


def hint_of(state: StageState) -> str:
    """Return a text of exactly HINT tokens as a hint."""
    text = make_texts(state.builder, 1, 2 * HINT, seed=0)[0]
    for end in range(len(text), 0, -1):
        if len(state.builder.encode_hint(text[:end], max_tokens=10**6)) == HINT:
            return text[:end]
    raise ValueError(f"hint: expected a text with a beginning of {HINT} tokens, got {text!r}; choose another seed")


@pytest.fixture(scope="module")
def world():
    yield start()
    stop()


@pytest.mark.timeout(3600)
def test_self_teacher(case: TeacherCase, world, effort: Effort, publish: Callable[[dict], dict]) -> None:
    state = models.make_state(SMALL, settings_of(case, case.prefix, PLAIN), world)
    prompts = models.make_prompts(state, case.prefix, 1)
    prefix = len(prompts[0].input_ids)
    models.set_teacher(state, prompts, case.response, K)
    state.hints = {prompts[0].question.id: (Hint(hint_of(state)),)}
    state.average = MovingAverage(state.policy, 0.01)
    state.timer = ProcessorTimer(world.device)
    every = {kind: settings_of(case, prefix, kind) for kind in (PLAIN, *KINDS)}
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in every}
    sizes = {}
    # The first round is a warm-up.
    for number, kind in in_turns(list(every), 1 + effort.always_rounds):
        state.settings = every[kind]
        state.timer.take()
        result = distill.step(state, prompts, 0)
        assert not result.skipped
        sizes[kind] = result.metrics.get("self_teacher/gap_size")
        if number:
            rounds[kind].append(state.timer.take())
    assert all(sizes[kind] > 0 for kind in KINDS), sizes
    publish(record_of(case, prefix, state, rounds))


def record_of(case: TeacherCase, prefix: int, state: StageState, rounds: dict[str, list[dict]]) -> dict[str, Any]:
    def seconds(kind: str, *phases: str) -> list[float]:
        return [sum(spent.get(f"seconds/{phase}", 0.0) for phase in phases) for spent in rounds[kind]]

    step, reference = median(seconds(PLAIN, "step")), median(seconds(PLAIN, "reference"))
    variants = {}
    for kind, spent in rounds.items():
        phases = sorted({name.removeprefix("seconds/") for own in spent for name in own} - {"step"})
        extra = [own - reference for own in seconds(kind, "teacher", "reference")]
        variants[kind] = {
            "rounds": len(spent),
            "forward": quantiles([1e3 * own for own in seconds(kind, "step")]),
            "phases_s": {phase: median(seconds(kind, phase)) for phase in phases},
            "extra_s": median(extra),
            "extra_share": median(extra) / step,
        }
    text = state.student.model.config.text_config
    shape = {"P": prefix, "R": case.response, "N": N, "K": K, "hint": HINT, "D": text.hidden_size}
    return facts_of(NAME, case, shape | {"layers": text.num_hidden_layers}, PLAIN) | {
        "student": "small, random weights",
        "variants": variants,
        "remarks": {"extra": "teacher and reference, beyond the reference of a plain step, over a whole plain step"},
    }
